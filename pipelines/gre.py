r"""Gaussian random effects, of which everything is known in closed form: the exact evidence is printed beside the ELBO.

    mu ~ N(0, s0^2 I);  theta_g | mu ~ N(mu, s1^2 I);  x_gn | theta_g ~ N(theta_g, sx^2 I)

evidence - ELBO is the Kullback-Leibler divergence of the fit from the posterior, in nats. `model` is dense (every group has as many observations),
`ragged` is not.
"""

from __future__ import annotations

import numpy as np
import xarray as xr
from torch.distributions import Normal

import pavi_scale as ps
from pipelines import common

SCALES = (0.5, 0.5, 0.1)


def make_model(scales: tuple[float, float, float] = SCALES, ragged: bool = False) -> ps.Model:
    """The model with scales (s0, s1, sx)."""
    s0, s1, sx = scales
    return ps.Model(
        ps.Plate("group"),
        ps.Plate("observation", within="group" if ragged else None),
        mu=ps.latent(lambda: Normal(0.0, s0), dims="feature"),
        theta=ps.latent(lambda mu: Normal(mu, s1), plates="group", dims="feature"),
        x=ps.observed(lambda theta: Normal(theta, sx), plates="observation" if ragged else ("group", "observation"), dims="feature"),
    )


model = make_model()
ragged = make_model(ragged=True)


def make_cohort(store: str, groups: int = 30, observations: int = 50, features: int = 2, seed: int = 0, given: ps.Model = model) -> None:
    """Simulate a cohort into a Zarr store, its truth in group `truth`; ragged groups have 1 to `observations` each."""
    if not given.plates["observation"].within:
        ps.simulate(given, {"group": groups, "observation": observations, "feature": features}, store, seed=seed)
        return
    counts = np.random.default_rng(seed).integers(1, observations, groups, endpoint=True)
    index = xr.DataArray(np.repeat(np.arange(groups), counts), dims="observation", attrs={"instance_dimension": "group"})
    ps.simulate(given, {"group": groups, "feature": features}, store, given=xr.Dataset({"observation_group": index}), seed=seed)


def log_evidence(cohort: xr.Dataset, scales: tuple[float, float, float] = SCALES) -> float:
    """The exact log p(x), in nats.

    Group means are N(mu, v_g) with v_g = s1^2 + sx^2 / n_g once theta is integrated out, and mu couples them by the rank-one term s0^2 1 1^T.
    """
    s0, s1, sx = scales
    x = cohort["x"].transpose("group", "observation", "feature").values.astype(float) if "group" in cohort["x"].dims else cohort["x"].values.astype(float)
    group = cohort["observation_group"].values if x.ndim == 2 else np.repeat(np.arange(x.shape[0]), x.shape[1])
    x = x.reshape(-1, x.shape[-1])
    n = np.bincount(group)[:, None]
    mean = np.stack([np.bincount(group, column) for column in x.T], axis=1) / n
    within = -0.5 * ((x - mean[group]) ** 2).sum() / sx**2 - 0.5 * x.shape[1] * ((n - 1) * np.log(2 * np.pi * sx**2) + np.log(n)).sum()
    v = s1**2 + sx**2 / n
    coupling = 1 + s0**2 * (1 / v).sum()
    quadratic = (mean**2 / v).sum() - s0**2 * ((mean / v).sum(0) ** 2).sum() / coupling
    return float(within - 0.5 * (x.shape[1] * (np.log(2 * np.pi * v).sum() + np.log(coupling)) + quadratic))


def main() -> None:
    """Simulate, fit, and compare the ELBO with the evidence."""
    parser = common.options("gre", __doc__)
    parser.add_argument("--groups", type=int, default=30)
    parser.add_argument("--observations", type=int, default=50)
    parser.add_argument("--features", type=int, default=2)
    parser.add_argument("--scales", type=float, nargs=3, default=SCALES, metavar=("S0", "S1", "SX"))
    parser.add_argument("--ragged", action="store_true", help="groups of 1 to OBSERVATIONS each")
    args = parser.parse_args()
    default = ragged if args.ragged else model
    chosen = default if tuple(args.scales) == SCALES else make_model(tuple(args.scales), args.ragged)
    common.provide(args.cohort, lambda: make_cohort(args.cohort, args.groups, args.observations, args.features, args.seed, chosen))
    posterior = common.fit(chosen, args)
    if posterior is not None:
        evidence = log_evidence(xr.open_zarr(args.cohort, consolidated=False), tuple(args.scales))
        elbo, error = posterior.elbo()
        latents = (args.groups + 1) * args.features
        print(f"log evidence {evidence:.3f} nats, ELBO {elbo:.3f} +- {error:.3f}, gap {(evidence - elbo) / latents:.6f} nats per latent")


if __name__ == "__main__":
    common.start("pipelines.gre")
