"""Reaction times over days of sleep deprivation (Belenky et al. 2003): a line for each subject."""

from __future__ import annotations

import pandas as pd
import xarray as xr
from torch.distributions import HalfNormal, Normal

import pavi_scale as ps
from pipelines import common

SOURCE = "R package lme4, data set sleepstudy, with columns Reaction, Days, Subject"

model = ps.Model(
    ps.Plate("subject"),
    ps.Plate("observation", within="subject"),
    mu_intercept=ps.latent(lambda: Normal(250.0, 50.0)),
    mu_slope=ps.latent(lambda: Normal(10.0, 10.0)),
    sigma_intercept=ps.latent(lambda: HalfNormal(50.0)),
    sigma_slope=ps.latent(lambda: HalfNormal(20.0)),
    sigma_y=ps.latent(lambda: HalfNormal(50.0)),
    days=ps.covariate(plates="observation"),
    intercept=ps.latent(lambda mu_intercept, sigma_intercept: Normal(mu_intercept, sigma_intercept), plates="subject"),
    slope=ps.latent(lambda mu_slope, sigma_slope: Normal(mu_slope, sigma_slope), plates="subject"),
    reaction=ps.observed(lambda intercept, slope, days, sigma_y: Normal(intercept + slope * days, sigma_y), plates="observation"),
)


def make_cohort(table: str) -> xr.Dataset:
    """The cohort: reaction times (ms) within subjects."""
    frame = pd.read_csv(table)[["Subject", "Days", "Reaction"]].rename(columns=str.lower)
    return ps.from_table(frame, plate="observation", within="subject")


def main() -> None:
    """Store the cohort and fit it."""
    args = common.options("sleepstudy", __doc__, SOURCE).parse_args()
    common.provide(args.cohort, lambda: common.store(make_cohort(args.table), args.cohort))
    common.fit(model, args)


if __name__ == "__main__":
    common.start("pipelines.sleepstudy")
