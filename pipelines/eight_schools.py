"""Effects of coaching in eight schools (Rubin 1981), with their known standard errors."""

from __future__ import annotations

import numpy as np
import xarray as xr
from torch.distributions import HalfCauchy, Normal

import pavi_scale as ps
from pipelines import common

model = ps.Model(
    ps.Plate("school"),
    mu=ps.latent(lambda: Normal(0.0, 5.0)),
    tau=ps.latent(lambda: HalfCauchy(5.0)),
    sigma=ps.covariate(plates="school"),
    theta=ps.latent(lambda mu, tau: Normal(mu, tau), plates="school"),
    y=ps.observed(lambda theta, sigma: Normal(theta, sigma), plates="school"),
)


def make_cohort() -> xr.Dataset:
    """The eight rows of Rubin's table: effect and standard error, in points of the SAT-V test."""
    y = [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]
    sigma = [15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]
    return xr.Dataset({"y": ("school", y), "sigma": ("school", sigma)}, coords={"school": np.array(list("ABCDEFGH"), dtype=object)})


def main() -> None:
    """Store the cohort and fit it."""
    args = common.options("eight_schools", __doc__).parse_args()
    common.provide(args.cohort, lambda: common.store(make_cohort(), args.cohort))
    common.fit(model, args)


if __name__ == "__main__":
    common.start("pipelines.eight_schools")
