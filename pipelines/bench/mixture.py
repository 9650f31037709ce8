"""Mixtures with random effects against restarts of a full-rank normal guide; a model without conjugacy against its evidence."""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any

import numpy as np
import torch
import xarray as xr
from scipy.special import log_ndtr, logsumexp
from torch import Tensor
from torch.distributions import Normal
from torch.distributions.transforms import StickBreakingTransform
from torch.nn.functional import logsigmoid

import pavi_scale as ps
from pipelines import gm, nc
from pipelines.bench.meter import Found, Job, timing

GROUPS, OBSERVATIONS, FEATURES = 3, 50, 2
COHORTS = 40  # fitted by us, and judged by their true label means
COMPARED = 10  # of them also fitted by the rival
RESTARTS, STEPS, RATE = 20, 3000, 1e-2
PARTICLES = 64
PRESENT = 0.05  # weight in a group below which a component may have no observation there, so that nothing is to be found


def log_joint(z: Tensor, x: Tensor) -> Tensor:
    """Log joint of `pipelines.gm`, labels summed out, at unconstrained points `[K, d]` (`mu`, `mu_group`, `weight`); x `[group, observation, feature]`."""
    k = gm.COMPONENTS
    parts = z.split([k * FEATURES, GROUPS * k * FEATURES, GROUPS * (k - 1)], -1)
    mu, mu_group, sticks = (part.reshape(-1, *shape) for part, shape in zip(parts, [(1, k, FEATURES), (GROUPS, k, FEATURES), (GROUPS, k - 1)], strict=True))
    offset = torch.arange(k - 1, 0, -1).log()  # stick-breaking, its log-determinant in a form that holds far out
    below, above = logsigmoid(sticks - offset), logsigmoid(offset - sticks)
    left = torch.cat([torch.zeros_like(above[..., :1]), above.cumsum(-1)], -1)
    log_weight = torch.cat([below, torch.zeros_like(below[..., :1])], -1) + left
    slope = (below + above + left[..., :-1]).sum(-1)
    prior = Normal(0.0, 1.0, validate_args=False).log_prob(mu).sum((1, 2, 3)) + Normal(mu, 0.2, validate_args=False).log_prob(mu_group).sum((1, 2, 3))
    prior = prior + (slope + math.lgamma(k)).sum(1)
    each = Normal(mu_group[:, :, None], 0.05, validate_args=False).log_prob(x[None, :, :, None]).sum(-1) + log_weight[:, :, None]
    return prior + each.logsumexp(-1).sum((1, 2))


def starting_points(generator: torch.Generator) -> Tensor:
    """Draws of the prior, unconstrained, `[RESTARTS, d]`."""
    k = gm.COMPONENTS
    mu = torch.randn(RESTARTS, 1, k * FEATURES, generator=generator)
    mu_group = mu + 0.2 * torch.randn(RESTARTS, GROUPS, k * FEATURES, generator=generator)
    exponential = -torch.rand(RESTARTS, GROUPS, k, generator=generator).log()
    sticks = StickBreakingTransform().inv(exponential / exponential.sum(-1, keepdim=True))
    return torch.cat([t.flatten(1) for t in (mu, mu_group, sticks)], -1)


def rival(x: Tensor, seed: int) -> np.ndarray:
    """ELBO of `RESTARTS` full-rank normal guides in unconstrained space, from as many prior draws.

    Guide and objective are those of NumPyro's `AutoMultivariateNormal` under Adam: a location and a Cholesky factor of everything, as scales
    (0.1 at first) times a unit lower triangle. The step follows a cosine to zero.
    """
    generator = torch.Generator().manual_seed(seed)
    loc = starting_points(generator)
    d = loc.shape[1]
    raw = torch.zeros(RESTARTS, d, d)
    raw.diagonal(dim1=1, dim2=2).fill_(math.log(0.1))
    for t in (loc, raw):
        t.requires_grad_()
    optimizer = torch.optim.Adam([loc, raw], RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)

    def elbo(particles: int) -> Tensor:
        log_scale = raw.diagonal(dim1=1, dim2=2)
        eps = torch.randn(RESTARTS, particles, d, generator=generator)
        z = loc[:, None] + (eps + eps @ raw.tril(-1).mT) * log_scale.exp()[:, None]
        entropy = 0.5 * d * (1 + math.log(2 * math.pi)) + log_scale.sum(1)
        return log_joint(z.flatten(0, 1), x).reshape(RESTARTS, particles).mean(1) + entropy

    for _ in range(STEPS):
        optimizer.zero_grad()
        (-elbo(1).sum()).backward()
        for t in (loc, raw):
            t.grad = t.grad.nan_to_num(0.0, 0.0, 0.0).clamp(-1e3, 1e3)  # a step that is not finite is skipped, as NumPyro's stable_update does
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return torch.stack([elbo(50) for _ in range(20)]).mean(0).numpy()


def means_found(posterior: ps.Posterior, truth: xr.Dataset) -> bool:
    """Whether, in the best numbering, every group mean of a component that is present lies within 0.25 or four posterior sds of its true value."""
    mean, sd = (posterior.datatree[g].to_dataset()["mu_group"].transpose("group", "component", "feature").values for g in ("posterior_mean", "posterior_sd"))
    true = truth["mu_group"].transpose("group", "component", "feature").values
    absent = truth["weight"].transpose("group", "component").values < PRESENT
    near = [(np.abs(mean[:, p] - true) < np.maximum(4 * sd[:, p], 0.25)).all(-1) | absent for p in map(list, permutations(range(gm.COMPONENTS)))]
    return bool(max(n.mean() for n in near) == 1.0)


def mixture(job: Job, cohorts: int = COHORTS, compared: int = COMPARED) -> Found:
    """Simulated cohorts: label means, ELBO beside the best restart of the rival, seconds, status."""
    found = Found()
    for seed in range(cohorts):
        truth = gm.model.sample(sizes={"group": GROUPS, "observation": OBSERVATIONS, "feature": FEATURES}, seed=seed)
        row: dict[str, Any] = {"cohort": seed}
        with timing(row, "fit s"):
            posterior = ps.fit(gm.model, truth[["x"]], progress=False)
        elbo, error = posterior.elbo(PARTICLES)
        row |= {"status": posterior.status, "found": means_found(posterior, truth), "ELBO": elbo, "+-": error, "rival best": float("nan")}
        row |= {"rival median": float("nan"), "rival s": float("nan")}
        if seed < compared:
            x = truth["x"].transpose("group", "observation", "feature").values
            with timing(row, "rival s"):
                elbos = rival(torch.from_numpy(x).to(torch.float32), seed)
            row |= {"rival best": float(elbos.max()), "rival median": float(np.median(elbos))}
        found.rows.append(row)
    pairs = [(r["ELBO"] - r["rival best"]) for r in found.rows if np.isfinite(r["rival best"])]
    count = sum(r["found"] for r in found.rows)
    found.notes = [
        f"label means found in {count} of {cohorts} cohorts; status ok in {sum(r['status'] == 'ok' for r in found.rows)}",
        f"ELBO minus the best of {RESTARTS} restarts of a full-rank normal guide, {len(pairs)} cohorts: lowest {min(pairs, default=np.nan):+.3f}, "
        f"median {float(np.median(pairs)) if pairs else np.nan:+.3f} nats",
        f"seconds of a fit: median {np.median([r['fit s'] for r in found.rows]):.1f}, highest {max(r['fit s'] for r in found.rows):.1f}",
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
