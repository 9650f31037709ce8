"""The crossed model's global posterior against its exact one, cohort by cohort: what coverage over some hundred cohorts can hardly tell.

Given the three scales all else is normal. Students are eliminated one by one and the lecturers, with mu, by a dense factorisation, written here anew;
the scales are integrated by importance sampling from a t distribution about their mode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize
from scipy.sparse import csr_matrix, diags, hstack
from scipy.special import gammaincinv, ndtri
from scipy.stats import qmc

import pavi_scale as ps
from pipelines.bench import coverage
from pipelines.bench.meter import Found, Job, timing

COHORTS, FIRST_SEED, GROUPS = 12, 1000, 2000
POINTS = 1024  # root points of the exact posterior
# Widths of the log scales and degrees of freedom of t distributions about the mode; the second where the students' scale may be next to nothing.
PROPOSALS = (np.ones(3), 8.0), (np.array([2.5, 1.2, 1.2]), 3.0)
ENOUGH = 0.7  # effective share of the points at which the first one does
SCALES = ("sd_student", "sd_lecturer", "sigma")


@dataclass
class Exact:
    """log p(log scales, y) with mu and all effects integrated out, and mu's normal given the scales.

    Args:
        cohort: A simulated cohort of `coverage.crossed`.
    """

    cohort: xr.Dataset

    def __post_init__(self) -> None:
        student, lecturer = (self.cohort[f"rating_{p}"].values for p in ("student", "lecturer"))
        y = self.cohort["y"].values.astype(float)
        self.students, self.lecturers, self.ratings = self.cohort.sizes["student"], self.cohort.sizes["lecturer"], len(y)
        self.of_student, self.of_lecturer = np.bincount(student, minlength=self.students), np.bincount(lecturer, minlength=self.lecturers)
        both = csr_matrix((np.ones(len(y)), (student, lecturer)), shape=(self.students, self.lecturers))
        self.columns = hstack([csr_matrix(self.of_student[:, None].astype(float)), both]).tocsr()  # of mu and the lecturers' effects
        self.sums = np.bincount(student, y, self.students)
        self.right = np.concatenate([[y.sum()], np.bincount(lecturer, y, self.lecturers)])
        self.square = float(y @ y)

    def at(self, scales: np.ndarray) -> tuple[float, float, float]:
        """Log density at log scales `[3]`; mean and variance of mu there."""
        own, other, sigma = np.exp(scales)
        w = sigma**-2.0
        precision = self.of_student * w + own**-2.0
        a = np.diag(np.concatenate([[self.ratings * w + 1.0], self.of_lecturer * w + other**-2.0]))
        a[0, 1:] = a[1:, 0] = self.of_lecturer * w
        a -= w * w * (self.columns.T @ diags(1 / precision) @ self.columns).toarray()
        h = w * self.right - w * w * (self.columns.T @ (self.sums / precision))
        factor = cho_factor(a, lower=True)
        unit = np.zeros(len(h))
        unit[0] = 1.0
        mean, column = cho_solve(factor, np.stack([h, unit], 1)).T
        value = 0.5 * (-w * self.square + w * w * (self.sums**2 / precision).sum() + h @ mean)
        value -= np.log(np.diag(factor[0])).sum() + 0.5 * np.log(precision).sum()
        value -= self.ratings * scales[2] + self.students * scales[0] + self.lecturers * scales[1]
        return float(value - 0.5 * np.exp(2 * scales).sum() + scales.sum()), float(mean[0]), float(column[0])  # half-normal priors, log scales

    def mode(self) -> np.ndarray:
        """The log scales of highest density."""
        start = np.log([max(float(self.cohort[s]), 1e-3) for s in SCALES])
        return np.asarray(minimize(lambda u: -self.at(u)[0], start, method="Nelder-Mead", options={"xatol": 1e-5, "fatol": 1e-6, "maxiter": 1000}).x)

    def curvature(self, at: np.ndarray, step: np.ndarray) -> np.ndarray:
        """Minus the Hessian of the log density by central differences, `[3, 3]`."""
        h, e = np.empty((3, 3)), np.diag(step)
        for i in range(3):
            for j in range(3):
                corners = [s * t * self.at(at + s * e[i] + t * e[j])[0] for s in (1, -1) for t in (1, -1)]
                h[i, j] = -sum(corners) / (4 * step[i] * step[j])
        return h

    def moments(self, points: int = POINTS) -> tuple[dict[str, tuple[float, float]], float]:
        """Mean and standard deviation of each global, and the effective number of points."""
        mode = self.mode()
        rough = self.curvature(mode, np.full(3, 0.02))
        chol = np.linalg.cholesky(np.linalg.inv(self.curvature(mode, 0.7 / np.sqrt(np.diagonal(rough).clip(1e-3)))))
        even = qmc.Sobol(4, seed=0).random(points).clip(1e-9, 1 - 1e-9)
        for wide, freedom in PROPOSALS:
            z = ndtri(even[:, :3]) / np.sqrt(2 * gammaincinv(freedom / 2, even[:, 3:]) / freedom)
            u = mode + z @ chol.T * wide
            value, mean, variance = np.array([self.at(v) for v in u]).T
            log_w = value + 0.5 * (freedom + 3) * np.log1p((z * z).sum(1) / freedom)
            w = np.exp(log_w - log_w.max())
            w /= w.sum()
            if 1 / (w * w).sum() > ENOUGH * points:
                break
        found = {}
        for i, name in enumerate(SCALES):
            middle = float(w @ np.exp(u[:, i]))
            found[name] = (middle, float(np.sqrt(w @ (np.exp(u[:, i]) - middle) ** 2)))
        middle = float(w @ mean)
        found["mu"] = (middle, float(np.sqrt(w @ (variance + (mean - middle) ** 2))))
        return found, float(1 / (w * w).sum())


def compare(model: ps.Model, cohort: xr.Dataset, seed: int) -> dict[str, Any]:
    """One cohort: our posterior's globals against the exact ones."""
    row: dict[str, Any] = {"seed": seed}
    with timing(row, "fit s"):
        posterior = ps.fit(model, cohort.drop_vars([v.name for v in model.latents]), seed=seed, progress=False)
    row["status"] = posterior.status
    mean, sd = (posterior.datatree[f"posterior_{of}"].dataset for of in ("mean", "sd"))
    exact, row["effective points"] = Exact(cohort).moments()
    shift = {n: (float(mean[n]) - m) / s for n, (m, s) in exact.items()}
    ratio = {n: float(sd[n]) / s for n, (m, s) in exact.items()}
    worst = max(shift, key=lambda n: abs(shift[n]))
    wrong = max(ratio, key=lambda n: abs(np.log(ratio[n])))
    row |= {"largest shift, sd": shift[worst], "of": worst, "worst sd ratio": ratio[wrong], " of": wrong}
    return row | {f"truth {n}": (float(cohort[n]) - m) / s for n, (m, s) in exact.items()}


def measure(job: Job) -> Found:
    """Fit cohorts of the crossed model and compare each global posterior with the exact one."""
    torch.set_num_threads(1)
    groups = (job.groups or (GROUPS,))[0]
    model, given = coverage.crossed(groups)
    sizes = coverage.sizes_of("crossed", model, given, groups)
    found = Found(notes=["truth: (value drawn from the prior - exact posterior mean) in exact posterior sds, which no fit has a part in"])
    for seed in range(FIRST_SEED, FIRST_SEED + (job.runs or COHORTS)):
        found.rows.append(compare(model, model.sample(sizes, given, seed), seed))
    return found
