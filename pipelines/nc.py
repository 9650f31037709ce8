"""A model without conjugacy (the NC model of ADAVI, ICLR 2022): a positive Gamma root, heavy-tailed Laplace children, Gaussian data."""

from __future__ import annotations

from torch.distributions import Gamma, Laplace, Normal

import pavi_scale as ps
from pipelines import common

model = ps.Model(
    ps.Plate("group"),
    ps.Plate("observation"),
    a=ps.latent(lambda: Gamma(1.0, 0.5), dims="feature"),
    b=ps.latent(lambda a: Laplace(a, 0.5), plates="group", dims="feature"),
    x=ps.observed(lambda b: Normal(b, 0.5), plates=("group", "observation"), dims="feature"),
)


def make_cohort(store: str, groups: int = 10, observations: int = 10, features: int = 2, seed: int = 0) -> None:
    """Simulate a cohort into a Zarr store, its truth in group `truth`."""
    ps.simulate(model, {"group": groups, "observation": observations, "feature": features}, store, seed=seed)


def main() -> None:
    """Simulate and fit."""
    parser = common.options("nc", __doc__)
    parser.add_argument("--groups", type=int, default=10)
    parser.add_argument("--observations", type=int, default=10)
    args = parser.parse_args()
    common.provide(args.cohort, lambda: make_cohort(args.cohort, args.groups, args.observations, seed=args.seed))
    common.fit(model, args)


if __name__ == "__main__":
    common.start("pipelines.nc")
