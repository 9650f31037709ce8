"""Log radon in houses of Minnesota, by county and floor (Gelman & Hill 2007): varying intercepts with a county-level predictor."""

from __future__ import annotations

import pandas as pd
import xarray as xr
from torch.distributions import HalfNormal, Normal

import pavi_scale as ps
from pipelines import common

SOURCE = "posteriordb, data set radon_mn, with columns county, floor, log_radon, log_uppm"

model = ps.Model(
    ps.Plate("county"),
    ps.Plate("house", within="county"),
    mu_alpha=ps.latent(lambda: Normal(0.0, 10.0)),
    gamma=ps.latent(lambda: Normal(0.0, 10.0)),
    beta=ps.latent(lambda: Normal(0.0, 10.0)),
    sigma_alpha=ps.latent(lambda: HalfNormal(1.0)),
    sigma_y=ps.latent(lambda: HalfNormal(1.0)),
    log_uppm=ps.covariate(plates="county"),
    floor=ps.covariate(plates="house"),
    alpha=ps.latent(lambda mu_alpha, gamma, log_uppm, sigma_alpha: Normal(mu_alpha + gamma * log_uppm, sigma_alpha), plates="county"),
    log_radon=ps.observed(lambda alpha, beta, floor, sigma_y: Normal(alpha + beta * floor, sigma_y), plates="house"),
)


def make_cohort(table: str) -> xr.Dataset:
    """The cohort: houses within counties, uranium of the county."""
    return ps.from_table(pd.read_csv(table), plate="house", within={"county": ["log_uppm"]})


def main() -> None:
    """Store the cohort and fit it."""
    args = common.options("radon", __doc__, SOURCE).parse_args()
    common.provide(args.cohort, lambda: common.store(make_cohort(args.table), args.cohort))
    common.fit(model, args)


if __name__ == "__main__":
    common.start("pipelines.radon")
