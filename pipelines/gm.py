"""A Gaussian mixture with random effects (the GM model of ADAVI, ICLR 2022): component means vary by group; labels are summed out.

The law of x is unchanged when the components are renumbered, so the posterior has one mode for each numbering, of which the fit represents one.
"""

from __future__ import annotations

import torch
from torch.distributions import Categorical, Dirichlet, Independent, MixtureSameFamily, Normal

import pavi_scale as ps
from pipelines import common

COMPONENTS = 3

model = ps.Model(
    ps.Plate("group"),
    ps.Plate("observation"),
    sizes={"component": COMPONENTS},
    mu=ps.latent(lambda: Normal(0.0, 1.0), dims=("component", "feature")),
    weight=ps.latent(lambda: Dirichlet(torch.ones(COMPONENTS)), plates="group", dims="component"),
    mu_group=ps.latent(lambda mu: Normal(mu, 0.2), plates="group", dims=("component", "feature")),
    x=ps.observed(
        lambda mu_group, weight: MixtureSameFamily(Categorical(weight), Independent(Normal(mu_group, 0.05), 1)),
        plates=("group", "observation"),
        dims="feature",
    ),
)


def make_cohort(store: str, groups: int = 3, observations: int = 50, features: int = 2, seed: int = 0) -> None:
    """Simulate a cohort into a Zarr store, its truth in group `truth`."""
    ps.simulate(model, {"group": groups, "observation": observations, "feature": features}, store, seed=seed)


def main() -> None:
    """Simulate and fit."""
    parser = common.options("gm", __doc__)
    parser.add_argument("--groups", type=int, default=3)
    parser.add_argument("--observations", type=int, default=50)
    args = parser.parse_args()
    common.provide(args.cohort, lambda: make_cohort(args.cohort, args.groups, args.observations, seed=args.seed))
    common.fit(model, args)


if __name__ == "__main__":
    common.start("pipelines.gm")
