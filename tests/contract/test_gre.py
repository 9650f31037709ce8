"""Gaussian random effects, whose evidence is known in closed form."""

import numpy as np
import pytest
import xarray as xr
from torch.distributions import Normal

import pavi_scale as ps


@pytest.mark.parametrize("groups", [3, 30, 300])
def test_dense_gap(groups, tmp_path, make_gre):
    _, ragged, evidence, latents = make_gre((0.5, 0.5, 0.1), (groups, 2), np.full(groups, 50), groups)
    cohort = xr.Dataset({"x": (("G", "N", "D"), ragged["x"].values.reshape(groups, 50, 2))})
    model = ps.Model(
        ps.Plate("G"),
        ps.Plate("N"),
        mu=ps.latent(lambda: Normal(0.0, 0.5), dims="D"),
        theta=ps.latent(lambda mu: Normal(mu, 0.5), plates="G", dims="D"),
        x=ps.observed(lambda theta: Normal(theta, 0.1), plates=("G", "N"), dims="D"),
    )
    posterior = ps.fit(model, cohort, run=tmp_path / "run", seed=1)
    elbo, error = posterior.elbo()
    print("gap", groups, (evidence - elbo) / latents, error, posterior.status)
    assert -4 * error - 1e-3 * latents <= evidence - elbo <= 0.01 * latents
    assert posterior.status == "ok"


@pytest.mark.parametrize("groups", [3, 30, 300])
def test_ragged_gap(groups, tmp_path, make_gre):
    counts = np.random.default_rng(groups).integers(1, 61, groups)
    model, cohort, evidence, latents = make_gre((0.5, 0.5, 0.1), (groups, 2), counts, groups)
    posterior = ps.fit(model, cohort, run=tmp_path / "run", seed=0)
    elbo, error = posterior.elbo(particles=32, seed=5)
    print("gap ragged", groups, (evidence - elbo) / latents, error, posterior.status)
    assert -4 * error - 1e-3 * latents <= evidence - elbo <= 0.01 * latents
    assert posterior.status == "ok"
