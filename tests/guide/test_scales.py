"""The unit in which data are given changes no posterior: dollars or micrometres."""

import numpy as np
import pytest
import xarray as xr
from torch.distributions import HalfNormal, Normal

import pavi_scale as ps

RNG = np.random.default_rng(0)
EFFECT, NOISE = RNG.normal(size=(40, 1)), RNG.normal(size=(40, 5))


def _fit(unit, known):
    """Normal groups in some unit; the scales known, or not."""
    scales = {} if known else {"tau": ps.latent(lambda: HalfNormal(4.0 * unit)), "sigma": ps.latent(lambda: HalfNormal(2.0 * unit))}
    prior = (lambda mu: Normal(mu, 2.0 * unit)) if known else lambda mu, tau: Normal(mu, tau)
    law = (lambda a: Normal(a, unit)) if known else lambda a, sigma: Normal(a, sigma)
    model = ps.Model(
        ps.Plate("group"), ps.Plate("obs"), mu=ps.latent(lambda: Normal(0.0, 100.0 * unit)), **scales,
        a=ps.latent(prior, plates="group"), x=ps.observed(law, plates=("group", "obs")),
    )
    return ps.fit(model, xr.Dataset({"x": (("group", "obs"), unit * (10.0 + 2.0 * EFFECT + NOISE))}), progress=False)


def _moments(posterior, unit):
    groups = {group: posterior.datatree[group].data_vars for group in ("posterior_mean", "posterior_sd")}
    return {f"{group} of {name}": value.values / unit for group, found in groups.items() for name, value in found.items()}


@pytest.mark.parametrize("unit", [1e-9, 1e-4, 1e4, 1e6, 1e9])
def test_a_conjugate_posterior_in_any_unit_is_the_exact_one(unit):
    posterior = _fit(unit, known=True)
    x = 10.0 + 2.0 * EFFECT + NOISE
    v = 4 + 1 / 5
    precision = 40 / v + 1e-4
    mean = x.mean(1).sum() / v / precision
    k = 5 / (5 + 1 / 4)
    found = _moments(posterior, unit)
    assert posterior.status == "ok"
    assert abs(found["posterior_mean of mu"] - mean) * precision**0.5 < 1e-3
    assert found["posterior_sd of mu"] * precision**0.5 == pytest.approx(1.0, abs=1e-3)
    np.testing.assert_allclose(found["posterior_mean of a"], k * x.mean(1) + (1 - k) * mean, atol=1e-3)
    np.testing.assert_allclose(found["posterior_sd of a"], np.sqrt(1 / (5 + 1 / 4) + (1 - k) ** 2 / precision), rtol=1e-3)


@pytest.mark.parametrize("unit", [1e-5, 1e5])
def test_scales_that_are_unknown_too(unit):
    one, other = _fit(1.0, known=False), _fit(unit, known=False)
    assert one.status == other.status == "ok"
    expected, sd = _moments(one, 1.0), {n: one.datatree["posterior_sd"][n].values for n in ("mu", "tau", "sigma", "a")}
    for key, value in _moments(other, unit).items():
        assert np.abs((value - expected[key]) / sd[key.split()[-1]]).max() < 0.05, key
