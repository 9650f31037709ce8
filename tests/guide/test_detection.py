"""What the probe finds of a model's structure, against what is known of it."""

from itertools import combinations

import numpy as np
import pytest
import torch
import xarray as xr
from torch.distributions import Bernoulli, Categorical, Gamma, HalfNormal, Laplace, LogNormal, MixtureSameFamily, MultivariateNormal, Normal, Poisson, StudentT

import pavi_scale as ps
from tests.guide import oracle

RNG = np.random.default_rng(0)


def _structure(x, likelihood, prior=lambda mu: Normal(mu, 1.0), **more):
    model = ps.Model(
        ps.Plate("group"),
        ps.Plate("obs"),
        mu=ps.latent(lambda: Normal(0.0, 1.0)),
        **more,
        t=ps.latent(prior, plates="group"),
        x=ps.observed(likelihood, plates=("group", "obs")),
    )
    study = oracle.compute(model, xr.Dataset({"x": (("group", "obs"), x)}))
    (component,) = study.guide.components
    return component


REAL = RNG.normal(size=(4, 5))
QUADRATIC = {
    "normal": (REAL, lambda t: Normal(t, 0.5), {}),
    "normal with an affine mean": (REAL, lambda t, mu: Normal(3.0 * t - mu + 1.0, 0.5), {}),
    "normal with a global scale": (REAL, lambda t, s: Normal(t, s), {"s": ps.latent(lambda: HalfNormal(1.0))}),
}
NOT_QUADRATIC = {
    "bernoulli": ((REAL > 0) * 1.0, lambda t: Bernoulli(logits=t), {}),
    "poisson": (np.floor(np.abs(REAL)), lambda t: Poisson(t.exp()), {}),
    "gamma": (np.abs(REAL) + 0.1, lambda t: Gamma(2.0, (-t).exp()), {}),
    "student": (REAL, lambda t: StudentT(4.0, t, 1.0), {}),
    "laplace": (REAL, lambda t: Laplace(t, 1.0), {}),
    "mixture": (REAL, lambda t: MixtureSameFamily(Categorical(logits=torch.zeros(2)), Normal(torch.stack([t, -t]), 1.0)), {}),
    "normal with a bent mean": (REAL, lambda t: Normal(t.exp(), 0.5), {}),
    "normal with a folded mean": (REAL, lambda t: Normal(t.abs(), 0.5), {}),
    "normal with a local log-scale": (REAL, lambda t: Normal(0.0, t.exp()), {}),
    "normal with a local scale beside its mean": (REAL, lambda t, s: Normal(t, s.exp()), {"s": ps.latent(lambda: Normal(0.0, 1.0), plates="group")}),
    "product of two latents": (REAL, lambda t, s: Normal(t * s, 1.0), {"s": ps.latent(lambda: Normal(0.0, 1.0), plates="group")}),
}


@pytest.mark.parametrize("name", QUADRATIC)
def test_linear_gaussian_models_are_quadratic(name):
    x, likelihood, more = QUADRATIC[name]
    assert _structure(x, likelihood, **more).quadratic


@pytest.mark.parametrize("name", NOT_QUADRATIC)
def test_other_models_are_not(name):
    x, likelihood, more = NOT_QUADRATIC[name]
    assert not _structure(x, likelihood, **more).quadratic


@pytest.mark.parametrize(
    "prior", [lambda mu: StudentT(4.0, mu, 1.0), lambda mu: Laplace(mu, 1.0), lambda mu: LogNormal(mu, 1.0)], ids=["student", "laplace", "lognormal"]
)
def test_nor_is_a_prior_that_is_not_gaussian(prior):
    assert not _structure(REAL, lambda t: Normal(t, 1.0), prior).quadratic


def _events(size, prior, likelihood):
    model = ps.Model(
        ps.Plate("group"),
        ps.Plate("obs"),
        mu=ps.latent(lambda: Normal(0.0, 1.0)),
        t=ps.latent(prior, plates="group", dims="d"),
        x=ps.observed(likelihood, plates=("group", "obs"), dims="d"),
    )
    study = oracle.compute(model, xr.Dataset({"x": (("group", "obs", "d"), RNG.normal(size=(3, 2, size)))}))
    (component,) = study.guide.components
    return component


@pytest.mark.parametrize("size", [2, 3, 4, 7])
def test_events_that_do_not_interact_are_elementwise(size):
    assert _events(size, lambda mu: Normal(mu, torch.arange(1.0, size + 1)), lambda t: Normal(2 * t, 0.5)).elementwise
    assert _events(size, lambda mu: StudentT(3.0, mu, torch.ones(size)), lambda t: Laplace(t, 0.5)).elementwise


@pytest.mark.parametrize(("size", "pair"), [(n, p) for n in (2, 3, 4) for p in combinations(range(n), 2)])
def test_one_correlated_pair_is_seen_in_the_prior(size, pair):
    covariance = torch.eye(size)
    covariance[pair] = covariance[pair[::-1]] = 0.5

    def prior(mu):
        return MultivariateNormal(mu.expand(size), covariance.to(mu.dtype))

    assert not _events(size, prior, lambda t: Normal(t, 0.5)).elementwise


@pytest.mark.parametrize(("size", "pair"), [(n, p) for n in (2, 3, 4) for p in combinations(range(n), 2)])
def test_one_interaction_is_seen_in_the_likelihood(size, pair):
    mix = torch.eye(size)
    mix[pair] = 0.7

    assert not _events(size, lambda mu: Normal(mu, torch.ones(size)), lambda t: Normal(mix.to(t.dtype) @ t, 0.5)).elementwise


def test_a_softmax_over_events_is_seen():
    model = ps.Model(
        ps.Plate("group"),
        ps.Plate("obs"),
        t=ps.latent(lambda: Normal(0.0, 1.0), plates="group", dims="k"),
        x=ps.observed(lambda t: Normal(t.softmax(-1)[0], 1.0), plates=("group", "obs")),
        sizes={"k": 3},
    )
    study = oracle.compute(model, xr.Dataset({"x": (("group", "obs"), REAL)}))
    assert not study.guide.components[0].elementwise


def test_latents_whose_events_mean_different_things_are_not_paired():
    # t[i, j] meets s[j, i]: of equal sizes, yet no coordinate-wise pairing.
    model = ps.Model(
        ps.Plate("group"),
        t=ps.latent(lambda: Normal(0.0, 1.0), plates="group", dims=("i", "j")),
        s=ps.latent(lambda: Normal(0.0, 1.0), plates="group", dims=("j", "i")),
        x=ps.observed(lambda t, s: Normal(t + s.mT, 1.0), plates="group", dims=("i", "j")),
        sizes={"i": 2, "j": 2},
    )
    study = oracle.compute(model, xr.Dataset({"x": (("group", "i", "j"), RNG.normal(size=(3, 2, 2)))}))
    assert not study.guide.components[0].elementwise


def _sorted_tables():
    """Counts of 20 items and 200 subjects of which the first halves say nothing of the effects, or all but one unit does."""
    rng = np.random.default_rng(0)
    theta = 0.5 + 0.7 * rng.normal(size=20)
    late, one, some, single = np.arange(200) >= 100, np.arange(200) == 137, np.arange(20) >= 10, np.arange(20) == 7
    for name, plate, dose in (
        ("of subjects", "subject", late), ("of one subject", "subject", one), ("of items", "item", some), ("of one item", "item", single),
    ):  # fmt: skip
        rate = np.exp(np.where(dose[:, None], theta, 0.0)) if plate == "subject" else np.exp(np.where(dose, theta, 0.0)) * np.ones((200, 1))
        yield name, xr.Dataset({"y": (("subject", "item"), rng.poisson(rate).astype(float)), "dose": (plate, dose.astype(float))}), theta
    counts = rng.poisson(np.exp(theta) * np.ones((200, 1))).astype(float)
    counts[:100] = np.nan
    yield "missing", xr.Dataset({"y": (("subject", "item"), counts)}), theta


def _counts(data):
    """theta of each item; counts with log rate theta x dose, or missing ones."""
    if "dose" not in data:
        return _items(y=ps.observed(lambda theta: Poisson(theta.exp()), plates=("subject", "item"), missing="mask"))
    dose = ps.covariate(plates=data["dose"].dims[0])
    return _items(dose=dose, y=ps.observed(lambda theta, dose: Poisson((theta * dose).exp()), plates=("subject", "item")))


def _items(**more):
    return ps.Model(
        ps.Plate("item"), ps.Plate("subject"), mu=ps.latent(lambda: Normal(0.0, 1.0)), tau=ps.latent(lambda: HalfNormal(1.0)),
        theta=ps.latent(lambda mu, tau: Normal(mu, tau), plates="item"), **more,
    )


@pytest.mark.parametrize(("name", "data", "theta"), [pytest.param(*case, id=case[0]) for case in _sorted_tables()])
def test_sorted_tables_are_not_taken_for_quadratic(name, data, theta):
    (component,) = oracle.compute(_counts(data), data).guide.components
    assert not component.quadratic


def test_a_posterior_of_a_sorted_table():
    _, data, theta = next(_sorted_tables())
    posterior = ps.fit(_counts(data), data, progress=False, seed=0)
    mean, sd = (posterior.datatree[group]["theta"].values for group in ("posterior_mean", "posterior_sd"))
    assert np.abs((mean - theta) / sd).max() < 4  # 17 where only the first 64 subjects were looked at
    assert posterior.status == "ok"
