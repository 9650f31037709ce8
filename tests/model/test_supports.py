"""All observations are compared with the support of their law, and with what of it holds for all units."""

import numpy as np
import pytest
import torch
import xarray as xr
from torch.distributions import (
    Bernoulli,
    Beta,
    Binomial,
    Categorical,
    Dirichlet,
    Independent,
    MixtureSameFamily,
    Multinomial,
    Normal,
    Poisson,
    Uniform,
    constraints,
)

import pavi_scale as ps
from pavi_scale.cohort import open_cohort
from pavi_scale.errors import CohortError
from pavi_scale.fitting import CHECKED_FIRST
from pavi_scale.model.supports import Support, common
from pavi_scale.settings import make_graph

SIMPLEX = np.array([[0.2, 0.3, 0.5], [0.1, 0.1, 0.9], [np.nan, 0.3, 0.7], [1.0, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("constraint", "values", "bad"),
    [
        (constraints.nonnegative_integer, [0, 3, 0.5, -1, np.nan], [False, False, True, True, False]),
        (constraints.boolean, [0, 1, 2, np.nan], [False, False, True, False]),
        (constraints.unit_interval, [[0, 1], [1.5, np.nan]], [[False, False], [True, False]]),
        (constraints.independent(constraints.positive, 1), [[1, np.nan], [0, 1]], [[False, False], [True, False]]),
        (constraints.simplex, SIMPLEX, [False, True, False, False]),
        (constraints.nonnegative_integer, -1.0, True),
    ],
    ids=str,
)
def test_what_is_outside_is_found(constraint, values, bad):
    found = Support(constraint).outside(np.asarray(values))
    np.testing.assert_array_equal(found, bad)


@pytest.mark.parametrize("constraint", [constraints.real, constraints.independent(constraints.real, 1), MixtureSameFamily(
    Categorical(torch.ones(2)), Independent(Normal(torch.zeros(2, 3), 1.0), 1)).support])  # fmt: skip
def test_nothing_finite_is_outside_the_reals(constraint):
    assert Support(constraint).outside(np.array([[1.0, -1.0, np.nan]])) is None


@pytest.mark.parametrize("dtype", ["int8", "uint16", "uint64", "bool", "float16", "float32"])
@pytest.mark.parametrize("shape", [(3_000_000,), (3, 1_000_000), (1_000_000, 3)])
def test_every_value_of_a_large_array_is_compared(dtype, shape):
    x = np.zeros(shape, dtype)
    assert Support(constraints.boolean).outside(x) is None
    x[(-1,) * len(shape)] = 1
    assert np.argwhere(Support(constraints.less_than(1)).outside(x)).tolist() == [[n - 1 for n in shape]]


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [
        (Binomial(3, torch.tensor(0.5)).support, Binomial(9, torch.tensor(0.5)).support, "IntegerGreaterThan(lower_bound=0)"),
        (Binomial(3, torch.tensor(0.5)).support, Binomial(3, torch.tensor(0.5)).support, "IntegerInterval(lower_bound=0, upper_bound=3.0)"),
        (Multinomial(3, torch.ones(2)).support, Multinomial(9, torch.ones(2)).support, "Independent"),
        (Uniform(0.0, 1.0).support, Uniform(0.0, 2.0).support, "GreaterThanEq(lower_bound=0.0)"),
        (Uniform(-1.0, 1.0).support, Uniform(0.0, 2.0).support, "Real()"),
        (Independent(Uniform(0.0, torch.ones(2)), 1).support, Independent(Uniform(0.0, 2 * torch.ones(2)), 1).support, "IndependentConstraint(GreaterThanEq"),
        (Poisson(1.0).support, Binomial(3, torch.tensor(0.5)).support, "IntegerGreaterThan(lower_bound=0)"),
        (Normal(0.0, 1.0).support, Poisson(1.0).support, "Real()"),
        (Dirichlet(torch.ones(2)).support, Dirichlet(torch.ones(2)).support, "Simplex()"),
        (Beta(1.0, 1.0).support, Beta(2.0, 1.0).support, "Interval(lower_bound=0.0, upper_bound=1.0)"),
    ],
    ids=str,
)
def test_a_bound_that_moves_is_none(first, second, shared):
    assert shared in str(common(first, second))


def counts(law=lambda mu: Poisson(torch.exp(mu)), plates="o", missing=None):
    return ps.Model(ps.Plate("o"), mu=ps.latent(lambda: Normal(0.0, 1.0)), x=ps.observed(law, plates=plates, missing=missing))


def test_a_late_value_outside_is_refused_before_anything_is_computed(tmp_path):
    x = np.ones(1_000_100)
    x[1_000_049] = 0.5
    data = xr.Dataset({"x": ("o", x)}).assign_coords(o=np.arange(len(x)) + 7)
    with pytest.raises(CohortError, match="outside the support") as caught:
        ps.fit(counts(), data, run=tmp_path / "run", progress=False)
    assert "'x' at (o=1000056 (position 1000049))" in str(caught.value)
    assert caught.value.got == 0.5
    assert not (tmp_path / "run").exists()


def test_what_is_too_large_to_be_read_first_is_compared_when_it_is_read(tmp_path):
    x = np.ones((CHECKED_FIRST >> 3) + 100)
    x[-3] = -1.0
    model, data = counts(), xr.Dataset({"x": ("o", x)})
    cohort = open_cohort(data, model)
    make_graph(cohort)
    cohort.check_values(limit_bytes=CHECKED_FIRST)
    assert cohort.read("x", {"o": np.arange(len(x) - 3)}).all()
    with pytest.raises(CohortError, match=rf"at \(o={len(x) - 3}\)"):
        cohort.read("x", {"o": np.arange(100, len(x))})
    with pytest.raises(CohortError, match=rf"at \(o={len(x) - 3}\)"):
        ps.fit(model, data, run=tmp_path / "run", progress=False)


def test_totals_that_are_a_covariate_bound_each_unit_by_its_own(tmp_path):
    """The first unit's total is no bound for the others."""
    rng = np.random.default_rng(0)
    n = np.r_[1.0, rng.integers(2, 30, 49)]
    data = xr.Dataset({"x": ("o", np.r_[1.0, rng.binomial(n[1:].astype(int), 0.4)]), "n": ("o", n), "p": ("o", np.full(50, 0.9))})
    model = ps.Model(
        ps.Plate("o"), mu=ps.latent(lambda: Normal(0.0, 1.0)), n=ps.covariate(plates="o"), p=ps.covariate(plates="o"),
        x=ps.observed(lambda mu, n, p: Binomial(n, probs=p * torch.sigmoid(mu)), plates="o"),
    )  # fmt: skip
    assert ps.fit(model, data, run=tmp_path / "run", progress=False).status == "ok"
    data.x[7] = 1.5
    with pytest.raises(CohortError, match=r"at \(o=7\)"):
        ps.fit(model, data, run=tmp_path / "again", progress=False)


@pytest.mark.parametrize("law", [lambda mu: Poisson(torch.exp(mu)), lambda mu: Bernoulli(logits=mu)], ids=["counts", "booleans"])
def test_missing_observations_are_in_every_support(law, tmp_path):
    data = xr.Dataset({"x": ("o", [1.0, np.nan, 0.0, 1.0, np.nan])})
    assert ps.fit(counts(law, missing="mask"), data, run=tmp_path / "run", progress=False).status == "ok"
