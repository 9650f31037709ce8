"""Mathematics scores of students in schools by socio-economic status (Raudenbush & Bryk 2002): lines that vary by school."""

from __future__ import annotations

import pandas as pd
import xarray as xr
from torch.distributions import HalfNormal, Normal

import pavi_scale as ps
from pipelines import common

SOURCE = "R package nlme, data set MathAchieve, with the school mean MEANSES of MathAchSchool joined; columns School, SES, MathAch, MEANSES"

model = ps.Model(
    ps.Plate("school"),
    ps.Plate("student", within="school"),
    mu_intercept=ps.latent(lambda: Normal(12.0, 10.0)),
    gamma_meanses=ps.latent(lambda: Normal(0.0, 10.0)),
    mu_slope=ps.latent(lambda: Normal(0.0, 10.0)),
    sigma_intercept=ps.latent(lambda: HalfNormal(5.0)),
    sigma_slope=ps.latent(lambda: HalfNormal(5.0)),
    sigma_y=ps.latent(lambda: HalfNormal(10.0)),
    meanses=ps.covariate(plates="school"),
    ses=ps.covariate(plates="student"),
    intercept=ps.latent(
        lambda mu_intercept, gamma_meanses, meanses, sigma_intercept: Normal(mu_intercept + gamma_meanses * meanses, sigma_intercept), plates="school"
    ),
    slope=ps.latent(lambda mu_slope, sigma_slope: Normal(mu_slope, sigma_slope), plates="school"),
    score=ps.observed(lambda intercept, slope, ses, sigma_y: Normal(intercept + slope * ses, sigma_y), plates="student"),
)


def make_cohort(table: str) -> xr.Dataset:
    """The cohort: students within schools."""
    frame = pd.read_csv(table)[["School", "SES", "MathAch", "MEANSES"]].rename(columns=str.lower).rename(columns={"mathach": "score"})
    return ps.from_table(frame, plate="student", within={"school": ["meanses"]})


def main() -> None:
    """Store the cohort and fit it."""
    args = common.options("math_achieve", __doc__, SOURCE).parse_args()
    common.provide(args.cohort, lambda: common.store(make_cohort(args.table), args.cohort))
    common.fit(model, args)


if __name__ == "__main__":
    common.start("pipelines.math_achieve")
