"""What is known exactly of the Gaussian random effects model: evidence, posterior of the population mean, the gap of any Gaussian guide."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xarray as xr

LOG2PI = math.log(2 * math.pi)
Scales = tuple[float, float, float]
BLOCK_BYTES = 64 << 20  # of float64 observations, read at once


@dataclass(frozen=True)
class Statistics:
    """Sufficient statistics of a dense cohort, `G` groups of `n` observations of `D` features.

    Args:
        groups: G.
        observations: n.
        sums: Sum of the groups' means, `[D]`.
        squares: Sum of their squares, `[D]`.
        within: Sum of squared distances from the group's mean, over everything.
    """

    groups: int
    observations: int
    sums: np.ndarray
    squares: np.ndarray
    within: float

    @property
    def latents(self) -> int:
        """G D + D."""
        return (self.groups + 1) * len(self.sums)


def simulate(groups: int, observations: int, features: int, seed: int, scales: Scales) -> np.ndarray:
    """Observations `[G, n, D]` in float32; the same numbers as in the hand-written rival, which makes its own data."""
    s0, s1, sx = scales
    rng = np.random.default_rng(seed)
    mu = s0 * rng.normal(size=features)
    theta = mu + s1 * rng.normal(size=(groups, features))
    return (theta[:, None] + sx * rng.normal(size=(groups, observations, features))).astype("f4")


def save(x: np.ndarray, store: str) -> None:
    """Write observations as a cohort, in uncompressed chunks of about 16 MiB, as `ps.simulate` writes them."""
    rows = max(1, min(len(x), (16 << 20) // (x[:1].nbytes)))
    encoding = {"x": {"chunks": (rows, *x.shape[1:]), "compressors": None}}
    xr.Dataset({"x": (("group", "observation", "feature"), x)}).to_zarr(store, mode="w-", zarr_format=3, consolidated=False, encoding=encoding)


def blocks(store: str) -> Iterator[np.ndarray]:
    """The store's observations, some groups at a time, in float64."""
    x = xr.open_zarr(store, consolidated=False, chunks=None)["x"].transpose("group", "observation", "feature")
    step = max(1, BLOCK_BYTES // (8 * x.sizes["observation"] * x.sizes["feature"]))
    for start in range(0, x.sizes["group"], step):
        yield x[start : start + step].values.astype(float)


def statistics(parts: Iterator[np.ndarray]) -> Statistics:
    """Sufficient statistics of observations that come some groups at a time, `[g, n, D]` each."""
    groups, observations, within = 0, 0, 0.0
    sums, squares = np.zeros(1), np.zeros(1)
    for x in parts:
        mean = x.mean(1)
        groups, observations = groups + len(x), x.shape[1]
        within += float(((x - mean[:, None]) ** 2).sum())
        sums, squares = sums + mean.sum(0), squares + (mean**2).sum(0)
    return Statistics(groups, observations, sums, squares, within)


def log_evidence(found: Statistics, scales: Scales) -> float:
    """log p(x), in nats: group means are N(mu, v), v = s1^2 + sx^2 / n, and mu couples them by s0^2 1 1^T."""
    s0, s1, sx = scales
    n, groups, features = found.observations, found.groups, len(found.sums)
    v = s1**2 + sx**2 / n
    within = -0.5 * found.within / sx**2 - 0.5 * features * groups * ((n - 1) * (LOG2PI + 2 * math.log(sx)) + math.log(n))
    coupling = 1 + s0**2 * groups / v
    quadratic = found.squares.sum() / v - s0**2 * ((found.sums / v) ** 2).sum() / coupling
    return float(within - 0.5 * (features * (groups * math.log(2 * math.pi * v) + math.log(coupling)) + quadratic))


def mu_posterior(found: Statistics, scales: Scales) -> tuple[np.ndarray, float]:
    """Mean `[D]` and standard deviation (the same for every feature) of mu given the data."""
    s0, s1, sx = scales
    v = s1**2 + sx**2 / found.observations
    precision = 1 / s0**2 + found.groups / v
    return found.sums / v / precision, precision**-0.5


def root_gap(loc: np.ndarray, sd: np.ndarray, found: Statistics, scales: Scales) -> float:
    """The gap per latent of q(mu) = N(loc, diag(sd^2)) with the exact posterior of theta given mu: the divergence of q(mu) alone, over all latents."""
    mean, exact_sd = mu_posterior(found, scales)
    ratio = np.square(sd / exact_sd)
    return float(0.5 * (ratio + np.square((loc - mean) / exact_sd) - 1 - np.log(ratio)).sum()) / found.latents


@dataclass(frozen=True)
class GaussianGuide:
    """Moments of a Gaussian q(mu, theta), as far as its bound depends on them.

    Args:
        mu: Mean of mu, `[D]`.
        mu_var: Its variances, `[D]`.
        theta: Mean of theta, `[G, D]`.
        theta_var: Its variances, `[G, D]`.
        covariance: Of theta with the mu of the same feature, `[G, D]`.
        entropy: Of the joint Gaussian, nats; None if given mu all theta are independent, and each depends on the mu of its feature alone.
    """

    mu: np.ndarray
    mu_var: np.ndarray
    theta: np.ndarray
    theta_var: np.ndarray
    covariance: np.ndarray | float = 0.0
    entropy: float | None = None


def from_cholesky(loc: np.ndarray, chol: np.ndarray, features: int) -> GaussianGuide:
    """The guide N(loc, chol chol^T) over the coordinates (mu, theta), theta's in the order `[G, D]`."""
    variance = np.square(chol).sum(1)
    across = (chol[features:].reshape(-1, features, len(loc)) * chol[:features]).sum(-1)
    entropy = 0.5 * len(loc) * (1 + LOG2PI) + float(np.log(np.abs(np.diagonal(chol))).sum())
    theta, theta_var = (v[features:].reshape(-1, features) for v in (loc, variance))
    return GaussianGuide(loc[:features], variance[:features], theta, theta_var, across, entropy)


def elbo(q: GaussianGuide, means: np.ndarray, found: Statistics, scales: Scales) -> float:
    """The bound of a Gaussian guide in closed form, nats; `means` are the groups' means, `[G, D]`."""
    s0, s1, sx = scales
    n = found.observations
    entropy = q.entropy
    if entropy is None:
        given = q.theta_var - np.square(q.covariance) / q.mu_var
        entropy = 0.5 * float((1 + LOG2PI + np.log(q.mu_var)).sum() + (1 + LOG2PI + np.log(given)).sum())
    root = -0.5 * ((q.mu**2 + q.mu_var) / s0**2 + LOG2PI + 2 * math.log(s0)).sum()
    spread = (q.theta - q.mu) ** 2 + q.theta_var + q.mu_var - 2 * q.covariance
    local = -0.5 * (spread / s1**2 + LOG2PI + 2 * math.log(s1)).sum()
    misfit = found.within + n * ((means - q.theta) ** 2 + q.theta_var).sum()
    data = -0.5 * misfit / sx**2 - 0.5 * n * means.size * (LOG2PI + 2 * math.log(sx))
    return float(root + local + data + entropy)


def gap(q: GaussianGuide, means: np.ndarray, found: Statistics, scales: Scales) -> float:
    """(log evidence - ELBO) per latent, nats: the divergence of the guide from the posterior."""
    return (log_evidence(found, scales) - elbo(q, means, found, scales)) / found.latents
