"""The finish: fit the root block to the marginal bound L(root) = log p(root) + sum_n L_n(root), seen only through full-data rounds.

1. Mode of L in prior-whitened coordinates (L-BFGS from the best of a batch of prior draws), curvature by differences of gradients.
2. Adaptive multiple importance sampling (Cornuet et al. 2012): Student-t proposals, deterministic-mixture weights, Pareto smoothing
   (Vehtari et al. 2024). With exact local bounds this samples the true marginal posterior of the root; k-hat says whether to believe it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import minimize
from scipy.special import logsumexp, ndtri

from pavi_scale.errors import NumericalError
from pavi_scale.guide.student import StudentT
from pavi_scale.noise import quasi_random
from pavi_scale.psis import smooth
from pavi_scale.rng import stream

# (points [K, R], with gradient) -> (L [K], gradient [K, R] or None)
Bound = Callable[[np.ndarray, bool], tuple[np.ndarray, np.ndarray | None]]
# (normal q(root), number) -> draws of it [N, R], log p - log q there [N]
Check = Callable[[StudentT, int], tuple[np.ndarray, np.ndarray]]

GAIN = 1e-2  # nats of one step below which the search for a mode ends: Newton steps do the rest


@dataclass
class Pool:
    """Weighted root points: the refitted root posterior.

    Args:
        points: `[N, R]`, unconstrained.
        log_bound: L at the points.
        weight: Pareto-smoothed importance weights, sum 1.
        khat: Pareto shape of the raw weights.
        gaussian: Normal with the pool's mean and covariance: the density q(root) of the ELBO.
        trace: One entry per round: (stage, evaluations, value, effective sample size).
    """

    points: np.ndarray
    log_bound: np.ndarray
    weight: np.ndarray
    khat: float
    gaussian: StudentT
    converged: bool = True
    trace: list[tuple[str, int, float, float]] = field(default_factory=list)

    @property
    def ess(self) -> float:
        """Effective sample size of the weights."""
        return float(1.0 / np.sum(self.weight**2))

    def resample(self, uniforms: np.ndarray) -> np.ndarray:
        """Positions of points drawn by their weights, one per uniform."""
        return np.searchsorted(np.cumsum(self.weight), uniforms * (1 - 1e-12)).clip(0, len(self.weight) - 1)


def whitening(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Robust location and scale of prior draws `[N, R]`: median and half the 68 % range."""
    low, mid, high = np.quantile(draws, [0.16, 0.5, 0.84], axis=0)
    return mid, np.maximum(0.5 * (high - low), 1e-3)


def find_mode(
    bound: Bound, draws: np.ndarray, *, starts: int, max_evaluations: int, deadline: float, on_step: Callable[[str, float], None],
    on_start: Callable[[np.ndarray], None] = lambda point: None, unit: np.ndarray | None = None,
) -> list[tuple[np.ndarray, float]]:
    """Modes of L by L-BFGS in prior-whitened coordinates.

    Args:
        bound: The marginal bound.
        draws: Prior draws, `[N, R]`.
        starts: How many of the best draws are followed.
        max_evaluations: Budget per start.
        deadline: `time.monotonic()` at which the search ends where it is.
        on_step: Told of each evaluation.
        on_start: Told of each point that is followed, before it is.
        unit: Scale of the coordinates, `[R]`, if `draws` are chosen points that do not show it.

    Returns:
        (mode `[R]`, L there) of each start, the highest first.
    """
    loc, scale = whitening(draws) if unit is None else (draws[0], unit)
    first = np.concatenate([loc[None], draws]) if unit is None else draws
    value, _ = bound(first, False)
    value = np.where(np.isfinite(value), value, -np.inf)
    if not np.isfinite(value).any():
        raise NumericalError(
            "the bound is not finite at any prior draw of the root variables",
            expected="a finite log-density",
            got=f"{len(first)} non-finite values",
            remedy="check the laws' supports against the data",
        )

    def objective(y: np.ndarray) -> tuple[float, np.ndarray]:
        v, g = bound((loc + scale * y)[None], True)
        if g is None or not np.isfinite(v[0]) or not np.isfinite(g).all():
            return 1e300, np.zeros_like(y)
        on_step("mode", float(v[0]))
        return -float(v[0]), -g[0] * scale

    def in_time(_: np.ndarray) -> None:
        if time.monotonic() > deadline:
            raise StopIteration

    found: list[tuple[np.ndarray, float]] = []
    for i in spread_out((first - loc) / scale, value, starts):
        if not np.isfinite(value[i]) or (found and time.monotonic() > deadline):
            continue
        on_start(first[i])
        result = minimize(
            objective,
            (first[i] - loc) / scale,
            jac=True,
            method="L-BFGS-B",
            callback=in_time,
            options={"maxfun": max_evaluations, "maxiter": max_evaluations, "ftol": GAIN / max(1.0, abs(value[i])), "gtol": 1e-5, "maxls": 6},
        )
        found.append((loc + scale * result.x, -float(result.fun)))
    return sorted(found, key=lambda f: -f[1])


def spread_out(points: np.ndarray, value: np.ndarray, count: int) -> list[int]:
    """Positions of the highest point, and of others among the highest eighth that lie far from those chosen: near ones lead to the same mode."""
    order = list(np.argsort(-value, kind="stable")[: max(count, len(points) // 8)])
    chosen = [int(order.pop(0))]
    while order and len(chosen) < count:
        near = [min(float(np.square(points[i] - points[c]).sum()) for c in chosen) for i in order]
        chosen.append(int(order.pop(int(np.argmax(near)))))
    return chosen


def other_modes(found: list[tuple[np.ndarray, float]], cov: np.ndarray, renumbered: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> int:
    """Modes of comparable height (within 3 nats) that are neither the first one nor a renumbering of it.

    Args:
        found: Modes and their heights, the highest first.
        cov: Covariance at the first.
        renumbered: (mode, sd) -> the mode with exchangeable rows in the order nearest the first one's.
    """
    (first, value), sd = found[0], np.sqrt(np.diagonal(cov))
    return sum(value - height < 3.0 and bool((np.abs(renumbered(mode, sd) - first) > 6 * sd).any()) for mode, height in found[1:])


def curvature(bound: Bound, point: np.ndarray, step: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gradient and minus Hessian of L at a point, by central differences of gradients (one round of 2 R points)."""
    r = len(point)
    offsets = np.diag(step)
    points = np.concatenate([point + offsets, point - offsets])
    _, g = bound(points, True)
    if g is None:
        raise NumericalError("the bound returned no gradient", where="curvature")
    hess = (g[:r] - g[r:]) / (2 * step[:, None])
    return g.mean(0), -0.5 * (hess + hess.T)


def covariance(precision: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Inverse of a precision whose spectrum is lifted where it is not positive, in coordinates of unit `scale`."""
    values, vectors = np.linalg.eigh(precision * scale[:, None] * scale)
    values = np.where(np.isfinite(values), values, 1.0)
    values = np.maximum(np.abs(values), 0.25)  # never wider than twice the prior scale in any direction
    return (vectors / values) @ vectors.T * scale[:, None] * scale


def polish(bound: Bound, mode: np.ndarray, scale: np.ndarray, rounds: int) -> tuple[np.ndarray, np.ndarray, bool]:
    """Newton steps with full-data curvature; returns mode, covariance, and whether the last step was below a tenth of an sd."""
    cov = np.diag(scale**2) * 1e-4
    converged = False
    for _ in range(rounds):
        step = np.clip(0.5 * np.sqrt(np.diagonal(cov)), 1e-5 * scale, 0.05 * scale)
        gradient, precision = curvature(bound, mode, step)
        if not (np.isfinite(gradient).all() and np.isfinite(precision).all()):
            break
        cov = covariance(precision, scale)
        move = cov @ gradient
        sd = np.sqrt(np.diagonal(cov))
        mode = mode + move * min(1.0, 3.0 / max(float(np.abs(move / sd).max()), 1e-12))
        converged = bool(np.abs(move / sd).max() < 0.1)
        if converged:
            break
    return mode, cov, converged


def ascend(bound: Bound, mode: np.ndarray, cov: np.ndarray, rounds: int, on_step: Callable[[str, float], None]) -> tuple[np.ndarray, bool]:
    """Quasi-Newton steps, one gradient each, from a mode and covariance found on less data; returns the mode, and whether it was reached.

    The inverse Hessian starts as `cov` and is corrected by what the gradients say of it (BFGS). Reached: the next step would be below
    a fiftieth of an sd in every direction.
    """
    inverse = cov.copy()
    value, gradient = bound(mode[None], True)
    for _ in range(rounds):
        if gradient is None or not np.isfinite(value[0]) or not np.isfinite(gradient).all():
            return mode, False
        on_step("ascent", float(value[0]))
        move = inverse @ gradient[0]
        if np.abs(move / np.sqrt(np.diagonal(cov))).max() < 0.02:
            return mode + move, True
        for _ in range(8):
            higher, after = bound((mode + move)[None], True)
            if after is not None and higher[0] >= value[0] - 1e-9 * abs(value[0]):
                break
            move = 0.25 * move
        else:
            return mode, False
        fall = gradient[0] - after[0]
        along = float(move @ fall)
        if along > 0:
            left = np.eye(len(mode)) - np.outer(move, fall) / along
            inverse = left @ inverse @ left.T + np.outer(move, move) / along
        mode, value, gradient = mode + move, higher, after
    return mode, False


def nearest(check: Check, q: StudentT, alike: float, rounds: int) -> tuple[StudentT, float]:
    """A normal q(root), brought nearer to p while that makes log p - log q vary less over its draws; and the standard deviation that is left.

    p has the importance-weighted bound where q has the mode and curvature of the plain one. Each unit's difference of the two is smooth in the root, and of
    N units they move the root by about sqrt(N) of its sds. Few values tell nearly all of that, where a refit needs many, and more from so far away.

    Args:
        check: (q, number) -> draws `[N, R]`, others for each number, and log p - log q there.
        q: Normal.
        alike: Standard deviation at which it is near enough.
        rounds: Most times that it is moved.
    """
    z, ratio = check(q, 0)
    for number in range(1, rounds + 1):
        if ratio.std() < alike or len(z) < 2 * (1 + len(q.loc)) or not np.isfinite(ratio).all():
            break
        moved = aligned(q, z, ratio)
        there, after = check(moved, number)  # fresh draws: at the old ones least squares would have left less than there is
        if not after.std() < ratio.std():
            break
        q, z, ratio = moved, there, after
    return q, float(ratio.std())


def aligned(q: StudentT, points: np.ndarray, ratio: np.ndarray) -> StudentT:
    """The normal density nearest to p, as far as values of log p - log q at draws of a normal q tell.

    In coordinates w in which q is standard normal, log p - log q = c + b w + w A w / 2 makes p normal with precision I - A and mean (I - A)^-1 b.
    c, b and A are those of least squares; A is 0 where there are too few values.

    Args:
        q: Normal.
        points: Draws `[N, R]` of it.
        ratio: log p - log q there, `[N]`, nats.

    Example:
        >>> q, p = (StudentT(np.array([m]), np.array([[s]])) for m, s in ((0.0, 1.0), (1.0, 0.8)))
        >>> z = np.linspace(-2, 2, 9)[:, None]
        >>> found = aligned(q, z, p.log_prob(z) - q.log_prob(z))
        >>> round(float(found.loc[0]), 6), round(float(found.chol[0, 0]), 6)
        (1.0, 0.8)
    """
    n, r = points.shape
    w = np.linalg.solve(q.chol, (points - q.loc).T).T
    rows, columns = np.tril_indices(r)
    design = np.concatenate([np.ones((n, 1)), w, w[:, rows] * w[:, columns]], axis=1)
    if n < 2 * design.shape[1]:
        design = design[:, : 1 + r]
    found = np.linalg.lstsq(design, ratio, rcond=None)[0]
    half = np.zeros((r, r))
    half[rows, columns] = found[1 + r :] if len(found) > 1 + r else 0.0
    values, vectors = np.linalg.eigh(np.eye(r) - half - half.T)
    inverse = (vectors / np.clip(values, 0.25, 4.0)) @ vectors.T  # no sd more than doubled or halved at once
    return StudentT(q.loc + q.chol @ inverse @ found[1 : 1 + r], _chol(q.chol @ inverse @ q.chol.T))


def refit(
    bound: Bound, mode: np.ndarray, cov: np.ndarray, *, seed: int, per_round: int, target: float, max_points: int, deadline: float,
    on_step: Callable[[str, float], None],
) -> Pool:
    """Adaptive multiple importance sampling of exp L.

    Args:
        bound: The marginal bound.
        mode: Start, `[R]`.
        cov: Covariance at the mode.
        seed: Seed of the (quasi-random) points.
        per_round: Points per full-data round.
        target: Effective sample size at which to stop.
        max_points: Budget of points.
        deadline: `time.monotonic()` after which no further round starts.
        on_step: Told of each round.
    """
    r = len(mode)
    proposals = [StudentT(mode, _chol(1.5 * cov), 4.0)]
    points, values = np.empty((0, r)), np.empty(0)
    trace: list[tuple[str, int, float, float]] = []
    weight, khat = np.empty(0), math.inf
    counts: list[int] = []
    while True:
        block = len(proposals)
        uniforms = quasi_random(stream(seed, "refit", block), per_round, r + 1)
        fresh = proposals[-1].sample(ndtri(uniforms[:, :r]), uniforms[:, r])
        value, _ = bound(fresh, False)
        points, values = np.concatenate([points, fresh]), np.concatenate([values, np.where(np.isfinite(value), value, -np.inf)])
        counts.append(len(fresh))
        if not np.isfinite(values).any():
            raise NumericalError("the bound is not finite at any point near the mode", expected="a finite log-density", got=f"{len(values)} non-finite values")
        share = np.log(np.asarray(counts) / sum(counts))
        log_q = logsumexp(np.stack([p.log_prob(points) + s for p, s in zip(proposals, share, strict=True)]), axis=0)
        log_w, khat = smooth(values - log_q)
        weight = np.exp(log_w)
        ess = float(1.0 / np.sum(weight**2))
        evidence = float(logsumexp(values - log_q) - math.log(len(values)))
        trace.append(("refit", len(values), evidence, ess))
        on_step("refit", evidence)
        mean = weight @ points
        # With few effective points the sample covariance is shrunk towards the one before.
        centred = points - mean
        sample_cov = (weight[:, None] * centred).T @ centred
        trust = ess / (ess + 4.0 * r)
        cov = trust * sample_cov + (1 - trust) * cov
        if ess >= target or len(values) >= max_points or time.monotonic() > deadline:
            break
        proposals.append(StudentT(mean, _chol((1.1 if block % 2 else 2.5) * cov), 4.0))
    return Pool(points, values, weight, khat, StudentT(mean, _chol(cov)), True, trace)


def near_order(points: np.ndarray) -> np.ndarray:
    """An order of points `[N, R]` in which near ones stand near: the Morton order of their ranks in each coordinate."""
    n, r = points.shape
    if n < 2 or r == 0:
        return np.arange(n)
    bits = max(1, min(16, 60 // r))
    ranks = np.argsort(np.argsort(points[:, :60], axis=0, kind="stable"), axis=0, kind="stable")
    cells = (ranks * (1 << bits) // n).astype(np.uint64)
    key = np.zeros(n, dtype=np.uint64)
    for bit in reversed(range(bits)):
        for coordinate in cells.T:
            key = (key << np.uint64(1)) | ((coordinate >> np.uint64(bit)) & np.uint64(1))
    return np.argsort(key, kind="stable")


def _chol(cov: np.ndarray) -> np.ndarray:
    jitter = 1e-12 * np.diagonal(cov).max(initial=0.0) + 1e-300
    return np.linalg.cholesky(cov + jitter * np.eye(len(cov)))
