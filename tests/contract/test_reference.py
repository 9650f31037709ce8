"""Real tables against long NUTS runs, with default settings."""

import json
import time

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from torch.distributions import HalfCauchy, HalfNormal, Normal

import pavi_scale as ps


def eight_schools(shared):
    table = json.loads((shared / "data" / "eight_schools.json").read_text())
    cohort = xr.Dataset({"y": ("school", np.array(table["y"], float)), "se": ("school", np.array(table["sigma"], float))})
    model = ps.Model(
        ps.Plate("school"),
        mu=ps.latent(lambda: Normal(0.0, 5.0)),
        tau=ps.latent(lambda: HalfCauchy(5.0)),
        se=ps.covariate(plates="school"),
        theta=ps.latent(lambda mu, tau: Normal(mu, tau), plates="school"),
        y=ps.observed(lambda theta, se: Normal(theta, se), plates="school"),
    )
    return model, cohort


def radon_mn(shared):
    frame = pd.read_csv(shared / "data" / "radon_mn.csv")
    model = ps.Model(
        ps.Plate("county"),
        ps.Plate("house", within="county"),
        mu_alpha=ps.latent(lambda: Normal(0.0, 10.0)),
        gamma=ps.latent(lambda: Normal(0.0, 10.0)),
        beta=ps.latent(lambda: Normal(0.0, 10.0)),
        sigma_alpha=ps.latent(lambda: HalfNormal(1.0)),
        sigma_y=ps.latent(lambda: HalfNormal(1.0)),
        floor=ps.covariate(plates="house"),
        log_uppm=ps.covariate(plates="county"),
        alpha=ps.latent(lambda mu_alpha, gamma, log_uppm, sigma_alpha: Normal(mu_alpha + gamma * log_uppm, sigma_alpha), plates="county"),
        log_radon=ps.observed(lambda alpha, beta, floor, sigma_y: Normal(alpha + beta * floor, sigma_y), plates="house"),
    )
    return model, ps.from_table(frame, plate="house", within={"county": ["log_uppm"]})


def sleepstudy(shared):
    frame = pd.read_csv(shared / "data" / "sleepstudy.csv").rename(columns={"Subject": "subject"})
    model = ps.Model(
        ps.Plate("subject"),
        ps.Plate("obs", within="subject"),
        mu_intercept=ps.latent(lambda: Normal(250.0, 50.0)),
        mu_slope=ps.latent(lambda: Normal(10.0, 10.0)),
        sigma_intercept=ps.latent(lambda: HalfNormal(50.0)),
        sigma_slope=ps.latent(lambda: HalfNormal(20.0)),
        sigma_y=ps.latent(lambda: HalfNormal(50.0)),
        Days=ps.covariate(plates="obs"),
        intercept=ps.latent(lambda mu_intercept, sigma_intercept: Normal(mu_intercept, sigma_intercept), plates="subject"),
        slope=ps.latent(lambda mu_slope, sigma_slope: Normal(mu_slope, sigma_slope), plates="subject"),
        Reaction=ps.observed(lambda intercept, slope, Days, sigma_y: Normal(intercept + slope * Days, sigma_y), plates="obs"),
    )
    return model, ps.from_table(frame, plate="obs", within={"subject": []})


def math_achieve(shared):
    frame = pd.read_csv(shared / "data" / "math_achieve.csv")[["School", "SES", "MathAch", "MEANSES"]]
    model = ps.Model(
        ps.Plate("School"),
        ps.Plate("student", within="School"),
        mu_intercept=ps.latent(lambda: Normal(12.0, 10.0)),
        gamma_meanses=ps.latent(lambda: Normal(0.0, 10.0)),
        mu_slope=ps.latent(lambda: Normal(0.0, 10.0)),
        sigma_intercept=ps.latent(lambda: HalfNormal(5.0)),
        sigma_slope=ps.latent(lambda: HalfNormal(5.0)),
        sigma_y=ps.latent(lambda: HalfNormal(10.0)),
        SES=ps.covariate(plates="student"),
        MEANSES=ps.covariate(plates="School"),
        intercept=ps.latent(
            lambda mu_intercept, gamma_meanses, MEANSES, sigma_intercept: Normal(mu_intercept + gamma_meanses * MEANSES, sigma_intercept),
            plates="School",
        ),
        slope=ps.latent(lambda mu_slope, sigma_slope: Normal(mu_slope, sigma_slope), plates="School"),
        MathAch=ps.observed(lambda intercept, slope, SES, sigma_y: Normal(intercept + slope * SES, sigma_y), plates="student"),
    )
    return model, ps.from_table(frame, plate="student", within={"School": ["MEANSES"]})


@pytest.mark.parametrize("build", [eight_schools, radon_mn, sleepstudy, math_achieve], ids=lambda f: f.__name__)
def test_agrees_with_nuts(build, shared, tmp_path, misses):
    model, cohort = build(shared)
    reference = json.loads((shared / "reference" / f"{build.__name__}.json").read_text())["posterior"]
    start = time.perf_counter()
    posterior = ps.fit(model, cohort, run=tmp_path / "run", seed=0)
    seconds = time.perf_counter() - start
    truth = {name: (entry["mean"], entry["sd"]) for name, entry in reference.items()}
    wrong = misses(posterior, truth)
    scalars = sum(np.size(mean) for mean, _ in truth.values())
    print(build.__name__, f"{seconds:.1f} s", posterior.status, f"{len(wrong)}/{scalars}", wrong)
    assert len(wrong) <= 0.1 * scalars, wrong
    assert posterior.status == "ok"
    if build is eight_schools:
        tau = posterior.datatree["posterior"]["tau"].values
        mean, sd, q05, q95 = (reference["tau"][k] for k in ("mean", "sd", "q05", "q95"))
        got = np.quantile(tau, [0.05, 0.95])
        assert abs(got[0] - q05) <= 0.2 * sd, (got, q05, q95)
        assert abs(got[1] - q95) <= 0.2 * sd, (got, q05, q95)
        assert abs(tau.mean() - mean) <= 0.2 * sd
