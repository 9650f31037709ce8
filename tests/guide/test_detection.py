"""What the probe finds of a model's structure, against what is known of it."""

from itertools import combinations

import numpy as np
import pytest
import torch
import xarray as xr
from torch.distributions import Bernoulli, Categorical, Gamma, HalfNormal, Laplace, LogNormal, MixtureSameFamily, MultivariateNormal, Normal, Poisson, StudentT

import pavi_scale as ps
from pavi_scale.cohort import open_cohort
from pavi_scale.study import prepare
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


def _told(law, *, dims=(), **columns):
    """The component of one latent per unit, whose data follow a law of it and of the unit's covariates."""
    n = len(next(iter(columns.values())))
    shape = {"sizes": {d: 3 for d in dims}} if dims else {}
    model = ps.Model(
        ps.Plate("unit"),
        **shape,
        **{name: ps.covariate(plates="unit") for name in columns},
        a=ps.latent(lambda: Normal(0.0, 1.0), plates="unit", dims=dims),
        y=ps.observed(law, plates="unit", dims=dims),
    )
    y = np.random.default_rng(5).normal(size=(n, *(3 for _ in dims)))
    data = xr.Dataset({"y": (("unit", *dims), y), **{name: ("unit", column) for name, column in columns.items()}})
    (component,) = oracle.compute(model, data).guide.components
    return component


def _contiguous(n, few):
    kind = np.zeros(n)
    kind[n // 3 : n // 3 + few] = 1.0
    return kind


ORDER = np.random.default_rng(1).permutation(400)
KINDS = {
    "one cell of a shuffled design": {"one": (np.arange(400) // 200)[ORDER] * 1.0, "two": (np.arange(400) // 100 % 2)[ORDER] * 1.0},
    "a kind between others": {"one": np.repeat([0.0, 1.0, 2.0], [120, 60, 220]), "two": np.ones(400)},
    "a kind between others, one unit": {"one": np.where(np.arange(30_000) == 17_321, 1.0, np.arange(30_000) % 2 * 2.0), "two": np.ones(30_000)},
    "neighbours": {"one": _contiguous(30_000, 5_000), "two": np.ones(30_000)},
    "one in a million": {"one": _contiguous(1_000_000, 1), "two": np.ones(1_000_000)},
}


@pytest.mark.parametrize("name", KINDS)
def test_a_law_that_is_bent_for_some_units_is_not_quadratic(name):
    columns = KINDS[name]
    inside = lambda one, two: ((one == 1.0) & (two == 1.0)).to(torch.float64)  # noqa: E731
    assert not _told(lambda a, one, two: Normal(a + 0.3 * inside(one, two) * a**3, 0.3), **columns).quadratic
    assert not _told(lambda a, one, two: Normal(torch.where(inside(one, two) > 0, (2 * a).exp(), a), 0.3), **columns).quadratic
    assert _told(lambda a, one, two: Normal(a + 0.3 * inside(one, two) * 2.0 * a, 0.3 + 0.1 * two), **columns).quadratic


def test_a_threshold_in_a_covariate_is_found():
    dose = np.random.default_rng(2).uniform(0.0, 10.0, 20_000)
    assert not _told(lambda a, dose: Normal(torch.where((dose > 4.0) & (dose < 4.1), a.abs() * a, a), 0.3), dose=dose).quadratic
    assert _told(lambda a, dose: Normal(torch.where((dose > 4.0) & (dose < 4.1), 2.0 * a, a), 0.3), dose=dose).quadratic


@pytest.mark.parametrize("pair", [(0, 1), (0, 2), (1, 2)])
def test_events_that_meet_for_some_units_are_not_separate(pair):
    one, other = pair

    def law(a, one_cell, *, mixed):
        share = torch.zeros(3, dtype=a.dtype)
        share[one] = 1.0
        return Normal(a + mixed * one_cell * share * a[..., other : other + 1], 0.3)

    columns = {"one_cell": (np.arange(5_000) == 2_777) * 1.0}
    assert _told(lambda a, one_cell: law(a, one_cell, mixed=0.0), dims=("event",), **columns).elementwise
    assert not _told(lambda a, one_cell: law(a, one_cell, mixed=0.5), dims=("event",), **columns).elementwise


def test_units_at_which_a_law_has_no_value_tell_nothing_of_its_events():
    """exp(1000 a) is beyond all numbers for some: that is no interaction."""
    model = ps.Model(
        ps.Plate("unit"), sizes={"event": 3}, a=ps.latent(lambda: Normal(0.0, 1.0), plates="unit", dims="event"),
        y=ps.observed(lambda a: Poisson((1000.0 * a).exp()), plates="unit", dims="event"),
    )
    (component,) = oracle.compute(model, xr.Dataset({"y": (("unit", "event"), np.ones((200, 3)))})).guide.components
    assert component.elementwise
    assert not component.quadratic


def test_of_a_larger_table_neighbourhoods_all_over_it_are_tried(monkeypatch):
    monkeypatch.setattr("pavi_scale.structure.TRIED", 10_000)
    law = lambda a, one: Normal(a + 0.3 * (one == 1.0) * a**3, 0.3)  # noqa: E731
    assert not _told(law, one=_contiguous(100_000, 3_000) + 2.0 * (np.arange(100_000) > 90_000)).quadratic
    assert _told(lambda a, one: Normal(a * one, 0.3), one=_contiguous(100_000, 3_000)).quadratic


def test_units_of_a_bent_cell_have_the_posterior_that_quadrature_finds():
    treated, late = KINDS["one cell of a shuffled design"].values()
    rng = np.random.default_rng(0)
    a = rng.normal(size=400)
    bent = (1 - treated) * late
    y = a + bent * 0.3 * a**3 + 0.3 * rng.normal(size=400)
    model = ps.Model(
        ps.Plate("unit"), treated=ps.covariate(plates="unit"), late=ps.covariate(plates="unit"),
        a=ps.latent(lambda: Normal(0.0, 1.0), plates="unit"),
        y=ps.observed(lambda a, treated, late: Normal(a + (1 - treated) * late * 0.3 * a**3, 0.3), plates="unit"),
    )
    data = xr.Dataset({"y": ("unit", y), "treated": ("unit", treated), "late": ("unit", late)})
    grid = np.linspace(-6.0, 6.0, 20_001)
    log = -0.5 * grid**2 - 0.5 * ((y[:, None] - grid - 0.3 * bent[:, None] * grid**3) / 0.3) ** 2
    weight = np.exp(log - log.max(1, keepdims=True))
    weight /= weight.sum(1, keepdims=True)
    mean = weight @ grid
    sd = np.sqrt(weight @ grid**2 - mean**2)
    # Once all units are fitted, once those of the other cells, by whom the law is linear, and all are new.
    for posterior in (ps.fit(model, data, progress=False), ps.fit(model, data.isel(unit=bent == 0), progress=False).extend(data)):
        assert posterior.status == "ok"
        assert np.abs((posterior.datatree["posterior_mean"]["a"].values - mean) / sd).max() < 0.1
        assert np.abs(np.log(posterior.datatree["posterior_sd"]["a"].values / sd)).max() < 0.1
        assert float(posterior.diagnostics["khat"].max()) > -1.0


@pytest.mark.parametrize("seed", range(3))
def test_a_law_is_bent_where_a_wide_prior_rarely_looks(seed):
    """Logits of draws from such a prior are so far out that a Bernoulli law is flat there; it was taken for linear-Gaussian."""
    group = np.repeat(np.arange(30), 8)
    y = (np.random.default_rng(seed).random(240) < 0.6).astype(float)
    model = ps.Model(
        ps.Plate("g"), ps.Plate("i", within="g"), mu=ps.latent(lambda: Normal(0.0, 1000.0)), a=ps.latent(lambda: Normal(0.0, 1.0), plates="g"),
        y=ps.observed(lambda mu, a: Bernoulli(logits=mu + a), plates="i"),
    )  # fmt: skip
    data = xr.Dataset({"y": ("i", y), "of": ("i", group, {"instance_dimension": "g"})})
    assert not prepare(open_cohort(data, model), seed=seed).guide.components[0].quadratic
