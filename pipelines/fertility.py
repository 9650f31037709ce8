"""Births per woman by country and year, 1960-2013: a level and a trend for each country, with years that were not reported.

The table installs with statsmodels (World Bank, World Development Indicators, SP.DYN.TFRT.IN).
"""

from __future__ import annotations

import numpy as np
import xarray as xr
from statsmodels.datasets import fertility
from torch.distributions import HalfNormal, Normal

import pavi_scale as ps
from pipelines import common

model = ps.Model(
    ps.Plate("country"),
    ps.Plate("year"),
    mu_level=ps.latent(lambda: Normal(4.0, 2.0)),
    mu_trend=ps.latent(lambda: Normal(0.0, 1.0)),
    sigma_level=ps.latent(lambda: HalfNormal(2.0)),
    sigma_trend=ps.latent(lambda: HalfNormal(1.0)),
    sigma_y=ps.latent(lambda: HalfNormal(1.0)),
    decade=ps.covariate(plates="year"),
    level=ps.latent(lambda mu_level, sigma_level: Normal(mu_level, sigma_level), plates="country"),
    trend=ps.latent(lambda mu_trend, sigma_trend: Normal(mu_trend, sigma_trend), plates="country"),
    births=ps.observed(lambda level, trend, decade, sigma_y: Normal(level + trend * decade, sigma_y), plates=("country", "year"), missing="mask"),
)


def make_cohort() -> xr.Dataset:
    """The cohort: countries with any report, NaN where a year was not reported; decades count from the middle year."""
    frame = fertility.load_pandas().data.set_index("Country Name")
    births = frame[[c for c in frame.columns if c.isdigit()]].dropna(how="all", axis=0).dropna(how="all", axis=1)
    year = births.columns.astype(int).to_numpy()
    return xr.Dataset(
        {"births": (("country", "year"), births.to_numpy(float)), "decade": ("year", (year - np.median(year)) / 10)},
        coords={"country": births.index.to_numpy(object), "year": year},
    )


def main() -> None:
    """Store the cohort and fit it."""
    args = common.options("fertility", __doc__).parse_args()
    common.provide(args.cohort, lambda: common.store(make_cohort(), args.cohort))
    common.fit(model, args)


if __name__ == "__main__":
    common.start("pipelines.fertility")
