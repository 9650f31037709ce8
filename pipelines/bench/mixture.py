"""Mixtures with random effects against restarts of NumPyro's full-rank normal guide; a model without conjugacy against its evidence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from itertools import permutations
from typing import Any

import numpy as np
import xarray as xr
from scipy.special import log_ndtr, logsumexp

import pavi_scale as ps
from pipelines import gm, nc
from pipelines.bench.meter import Found, Job, timing
from pipelines.bench.rivals import NUMPYRO_NEEDS, missing

GROUPS, OBSERVATIONS, FEATURES = 3, 50, 2
COHORTS = 40  # fitted by us, and judged by their true label means
COMPARED = 12  # of them also fitted by the rival
RESTARTS = 20
PARTICLES = 256
PRESENT = 0.05  # weight in a group below which a component may have no observation there, so that nothing is to be found
NEAR, SDS = 0.25, 3.0  # distance, and posterior sds, within which a mean counts as found
ONE_THREAD = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"}


def rival(job: Job, cohorts: list[np.ndarray]) -> list[dict[str, Any]]:
    """ELBOs of the rival on each cohort `[group, observation, feature]`, in a process of its own (`pipelines.bench.rival_mixture`)."""
    path = job.work / "mixture-cohorts.npy"
    np.save(path, np.stack(cohorts))
    command = [sys.executable, "-W", "ignore", "-m", "pipelines.bench.rival_mixture", "--cohorts", str(path), "--restarts", str(RESTARTS)]
    done = subprocess.run(command, env={**os.environ, **ONE_THREAD}, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def means_found(mean: np.ndarray, sd: np.ndarray, truth: xr.Dataset) -> bool:
    """Whether every group mean of a component that is present in the group lies near its true value, under the best numbering of the cohort.

    Near: within `NEAR` or `SDS` posterior sds in every feature. One numbering holds for all groups.

    Args:
        mean: Posterior mean of `mu_group`, `[group, component, feature]`.
        sd: Its posterior sd.
        truth: The simulated cohort.
    """
    true = truth["mu_group"].transpose("group", "component", "feature").values
    absent = truth["weight"].transpose("group", "component").values < PRESENT
    numberings = map(list, permutations(range(gm.COMPONENTS)))
    return any(bool(((np.abs(mean[:, p] - true) <= np.maximum(SDS * sd[:, p], NEAR)).all(-1) | absent).all()) for p in numberings)


def mixture(job: Job, compared: int = COMPARED) -> Found:
    """Simulated cohorts: label means, ELBO beside the best restart of the rival, seconds, status; our rows to `mixture.jsonl` as they come."""
    found, truths, cohorts, kept = Found(), [], job.runs or COHORTS, job.results / "mixture.jsonl"
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text("")
    for seed in range(cohorts):
        truth = gm.model.sample(sizes={"group": GROUPS, "observation": OBSERVATIONS, "feature": FEATURES}, seed=seed)
        row: dict[str, Any] = {"cohort": seed}
        began = time.process_time()
        with timing(row, "fit s"):
            posterior = ps.fit(gm.model, truth[["x"]], progress=False)
        row["cpu s"] = time.process_time() - began
        elbo, error = posterior.elbo(PARTICLES)
        moments = (posterior.datatree[g].to_dataset()["mu_group"] for g in ("posterior_mean", "posterior_sd"))
        mean, sd = (m.transpose("group", "component", "feature").values for m in moments)
        row |= {"status": posterior.status, "found": means_found(mean, sd, truth), "ELBO": elbo, "+-": error}
        with kept.open("a") as lines:
            lines.write(json.dumps(row) + "\n")
        found.rows.append(row | dict.fromkeys(("rival best", "its +-", "rival median", "rival s", "rival found"), float("nan")))
        truths.append(truth)
    status, seconds = [r["status"] for r in found.rows], [r["cpu s"] for r in found.rows]
    found.notes = [
        f"label means found in {sum(r['found'] for r in found.rows)} of {cohorts} cohorts",
        "status: " + ", ".join(f"{status.count(s)} {s}" for s in dict.fromkeys(status)),
        f"CPU seconds of a fit: median {np.median(seconds):.1f}, highest {max(seconds):.1f}",
    ]
    if gone := missing(NUMPYRO_NEEDS):
        found.notes.append(f"the rival is left out, not installed: {', '.join(gone)} (extra `bench`)")
        return found
    rows = found.rows[:compared]
    data = [truth["x"].transpose("group", "observation", "feature").values for truth in truths[:compared]]
    for row, truth, other in zip(rows, truths, rival(job, data), strict=False):
        row |= {"rival best": other["best"], "its +-": other["error"], "rival median": other["median"], "rival s": other["seconds"]}
        row["rival found"] = float(means_found(np.array(other["mean"]), np.array(other["sd"]), truth))
    ahead = [r["ELBO"] - r["rival best"] for r in rows]
    below = sum(a < -3 * float(np.hypot(r["+-"], r["its +-"])) for a, r in zip(ahead, rows, strict=True))
    found.notes += [
        f"ELBO minus the best of {RESTARTS} restarts of NumPyro's AutoMultivariateNormal, {len(rows)} cohorts: lowest {min(ahead):+.3f}, "
        f"median {np.median(ahead):+.3f}, highest {max(ahead):+.3f} nats; below by more than three standard errors in {below}",
        f"label means found there: by us in {sum(r['found'] for r in rows)}, by the best restart in {sum(r['rival found'] for r in rows):.0f}",
    ]
    return found


def nc_evidence(x: np.ndarray) -> float:
    r"""Log evidence of `pipelines.nc`, x `[group, observation, feature]`, by quadrature over a; features are independent.

    Given a, the mean of a group is Laplace(a, beta) plus N(0, s^2), whose density at distance d is, with Phi the normal distribution function,
    exp(s^2 / 2 beta^2) / (2 beta) [exp(-d / beta) Phi(d / s - s / beta) + exp(d / beta) Phi(-d / s - s / beta)].
    """
    beta, noise, n = 0.5, 0.5, x.shape[1]
    s = noise / np.sqrt(n)
    mean = x.mean(1)
    within = -0.5 * ((x - mean[:, None]) ** 2).sum() / noise**2 - mean.size * (0.5 * (n - 1) * np.log(2 * np.pi * noise**2) + 0.5 * np.log(n))
    total = float(within)
    a = np.linspace(1e-9, 40.0, 400_001)
    step = a[1] - a[0]
    for column in mean.T:
        value = np.log(0.5) - 0.5 * a  # Gamma(1, 1/2)
        for m in column:
            d = m - a
            sides = np.logaddexp(-d / beta + log_ndtr(d / s - s / beta), d / beta + log_ndtr(-d / s - s / beta))
            value = value + s**2 / (2 * beta**2) - np.log(2 * beta) + sides
        value[[0, -1]] -= np.log(2.0)  # trapezoid
        total += float(logsumexp(value) + np.log(step))
    return total


def without_conjugacy(job: Job, seeds: int = 5) -> Found:
    """Distance of the ELBO from the evidence, per latent."""
    found = Found()
    for groups, observations in ((10, 10), (50, 20)):
        for seed in range(seeds):
            truth = nc.model.sample(sizes={"group": groups, "observation": observations, "feature": FEATURES}, seed=seed)
            row: dict[str, Any] = {"G": groups, "N": observations, "cohort": seed}
            with timing(row, "fit s"):
                posterior = ps.fit(nc.model, truth[["x"]], progress=False)
            elbo, error = posterior.elbo(PARTICLES)
            evidence, latents = nc_evidence(truth["x"].transpose("group", "observation", "feature").values), (groups + 1) * FEATURES
            row |= {"log evidence": evidence, "gap per latent": (evidence - elbo) / latents, "+-": error / latents, "status": posterior.status}
            found.rows.append(row)
    found.notes.append(f"largest gap {max(r['gap per latent'] for r in found.rows):.4f} nats per latent (asked: 0.05)")
    return found
