"""Helpers of the acceptance tests, which know the public contract and nothing of the source."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch.distributions import Normal

import pavi_scale as ps


def gre(scales: tuple[float, float, float], shape: tuple[int, int], per_group: np.ndarray, seed: int) -> tuple[ps.Model, xr.Dataset, float, int]:
    """Gaussian random effects: the model, a cohort drawn from it, its log evidence and its number of latents."""
    s0, s1, sx = scales
    groups, features = shape
    rng = np.random.default_rng(seed)
    mu = rng.normal(0, s0, features)
    theta = rng.normal(mu, s1, (groups, features))
    group = np.repeat(np.arange(groups), per_group)
    x = rng.normal(theta[group], sx)
    model = ps.Model(
        ps.Plate("group"),
        ps.Plate("point", within="group"),
        sizes={"feature": features},
        mu=ps.latent(lambda: Normal(0.0, s0), dims="feature"),
        theta=ps.latent(lambda mu: Normal(mu, s1), plates="group", dims="feature"),
        x=ps.observed(lambda theta: Normal(theta, sx), plates="point", dims="feature"),
    )
    cohort = xr.Dataset({"x": (("point", "feature"), x), "g": ("point", group, {"instance_dimension": "group"})})
    return model, cohort, gre_evidence(x, group, groups, scales), groups * features + features


def gre_evidence(x: np.ndarray, group: np.ndarray, groups: int, scales: tuple[float, float, float]) -> float:
    """log p(x) in closed form: group means are sufficient, mu is the only coupling."""
    s0, s1, sx = scales
    count = np.bincount(group, minlength=groups).astype(float)
    total = np.stack([np.bincount(group, weights=column, minlength=groups) for column in x.T])
    mean = total / np.maximum(count, 1)
    within = sum(float(((column - mean[d][group]) ** 2).sum()) for d, column in enumerate(x.T))
    features = x.shape[1]
    # Given the mean of a group, its residuals do not depend on any latent.
    out = -0.5 * within / sx**2 - 0.5 * features * float((count - 1).sum()) * np.log(2 * np.pi * sx**2) - 0.5 * features * float(np.log(count).sum())
    var = s1**2 + sx**2 / count
    precision = 1 / s0**2 + (1 / var).sum()
    for d in range(features):
        b = (mean[d] / var).sum()
        out += -0.5 * (mean[d] ** 2 / var).sum() - 0.5 * np.log(2 * np.pi * var).sum() + 0.5 * b**2 / precision - 0.5 * np.log(precision * s0**2)
    return float(out)


def close(posterior: Any, truth: Mapping[str, tuple[Any, Any]], shift: float = 0.2, ratio: tuple[float, float] = (0.8, 1.25)) -> list[str]:
    """What of the stored posterior is not within `shift` sds and `ratio` of the truth (name -> mean, sd)."""
    mean, sd = posterior.datatree["posterior_mean"], posterior.datatree["posterior_sd"]
    wrong = []
    for name, (m, s) in truth.items():
        got_m, got_s, m, s = mean[name].values, sd[name].values, np.asarray(m), np.asarray(s)
        if got_m.shape != m.shape:
            wrong.append(f"{name}: shape {got_m.shape} instead of {m.shape}")
            continue
        bad = ~((np.abs(got_m - m) <= shift * s) & (got_s / s >= ratio[0]) & (got_s / s <= ratio[1]))
        where = [tuple(int(k) for k in i) for i in np.argwhere(bad)]
        z, q = (got_m - m) / s, got_s / s
        wrong += [f"{name}{i}: shift {float(z[i]):.3f} sd, sd ratio {float(q[i]):.3f}, true mean {float(m[i]):.3f}" for i in where]
    return wrong


def grid_moments(log_density: Callable[..., torch.Tensor], *axes: torch.Tensor) -> list[tuple[float, float]]:
    """Means and sds on a dense grid of a density of a few scalars (log density up to a constant, in the axes' own measure)."""
    mesh = torch.meshgrid(*[a.double() for a in axes], indexing="ij")
    logp = log_density(*mesh)
    # Trapezoid-like cell widths, so that axes may be unevenly spaced.
    for k, a in enumerate(axes):
        width = torch.gradient(a.double())[0]
        logp = logp + width.log().reshape([-1 if j == k else 1 for j in range(len(axes))])
    w = torch.softmax(logp.flatten(), 0).reshape(logp.shape)
    out = []
    for m in mesh:
        mean = (w * m).sum()
        out.append((float(mean), float(((w * (m - mean) ** 2).sum()).sqrt())))
    return out


def metropolis(
    log_density: Callable[[torch.Tensor], torch.Tensor], size: int, steps: int = 4000, chains: int = 256, start: float = 0.5, seed: int = 0
) -> torch.Tensor:
    """Draws (n, size) by many parallel random-walk chains with differential-evolution proposals; the density takes (chains, size)."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(chains, size, generator=g, dtype=torch.float64) * start
    logp = log_density(x)
    kept = []
    for step in range(steps):
        # Difference of two other chains: the proposal takes the posterior's own shape; now and then a full step jumps modes.
        i, j = torch.randint(chains, (2, chains), generator=g)
        gamma = 1.0 if step % 10 == 9 else 2.38 / (2 * size) ** 0.5
        new = x + gamma * (x[i] - x[j]) + 1e-4 * torch.randn(chains, size, generator=g, dtype=torch.float64)
        new_logp = log_density(new)
        accept = torch.rand(chains, generator=g, dtype=torch.float64).log() < new_logp - logp
        x = torch.where(accept[:, None], new, x)
        logp = torch.where(accept, new_logp, logp)
        if step >= steps // 2 and step % 10 == 0:
            kept.append(x.clone())
    return torch.cat(kept)


@pytest.fixture(scope="session")
def make_gre():
    return gre


@pytest.fixture(scope="session")
def misses():
    return close


@pytest.fixture(scope="session")
def grid():
    return grid_moments


@pytest.fixture(scope="session")
def mcmc():
    return metropolis


# At module level: a run names its model by import path, and other processes open it.
conjugate_model, conjugate_cohort, conjugate_evidence, conjugate_latents = gre((1.0, 0.5, 0.3), (6, 2), np.array([3, 5, 1, 8, 2, 4]), 3)


@pytest.fixture(scope="session")
def conjugate():
    """A ragged Gaussian model, its cohort and its fitted posterior, with coordinates: shared by tests that only read."""
    cohort = conjugate_cohort.assign_coords(group=list("abcdef"), feature=["u", "v"])
    return conjugate_model, cohort, conjugate_evidence, conjugate_latents
