"""The exact evidence of the Gaussian random effects model, against the joint Gaussian of all observations."""

import numpy as np
import pytest
import xarray as xr
from scipy.stats import multivariate_normal

import pavi_scale as ps
from pipelines import gre


def brute_force(x, group, scales):
    """log N(x; 0, C) with C = s0^2 + s1^2 [same group] + sx^2 [same observation], feature by feature."""
    s0, s1, sx = scales
    covariance = s0**2 + s1**2 * (group[:, None] == group) + sx**2 * np.eye(len(group))
    return sum(multivariate_normal(np.zeros(len(group)), covariance).logpdf(column) for column in x.T)


@pytest.mark.parametrize("scales", [(0.5, 0.5, 0.1), (1.0, 0.3, 2.0)])
@pytest.mark.parametrize("ragged", [False, True])
def test_evidence_is_the_joint_gaussian_s(tmp_path, scales, ragged):
    model = gre.make_model(scales, ragged)
    gre.make_cohort(str(tmp_path / "c.zarr"), groups=4, observations=6, features=3, seed=1, given=model)
    cohort = xr.open_zarr(tmp_path / "c.zarr", consolidated=False)
    x = cohort["x"].values.astype(float).reshape(-1, 3)
    group = cohort["observation_group"].values if ragged else np.repeat(np.arange(4), 6)
    assert gre.log_evidence(cohort, scales) == pytest.approx(brute_force(x, group, scales), abs=1e-8)


def test_expected_evidence_is_that_of_the_paper():
    """242.3 and 2433.6 nats for 3 and 30 groups (ADAVI, Table 2, derived): the mean over cohorts."""
    for groups, expected in ((3, 242.3), (30, 2433.6)):
        found = [gre.log_evidence(gre.model.sample({"group": groups, "observation": 50, "feature": 2}, seed=seed)) for seed in range(40)]
        assert abs(np.mean(found) - expected) < 4 * np.std(found) / np.sqrt(len(found))


@pytest.mark.parametrize("ragged", [False, True])
def test_the_fit_reaches_the_evidence(tmp_path, ragged):
    model = gre.ragged if ragged else gre.model
    gre.make_cohort(str(tmp_path / "c.zarr"), groups=5, observations=20, given=model)
    posterior = ps.fit(model, tmp_path / "c.zarr", run=tmp_path / "run", progress=False)
    elbo, error = posterior.elbo()
    evidence = gre.log_evidence(xr.open_zarr(tmp_path / "c.zarr", consolidated=False))
    assert abs(evidence - elbo) < 0.01 * 12 + 3 * error
