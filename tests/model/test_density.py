"""Vectorised laws against loops over ground units, and values carried between plates."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import (
    Bernoulli,
    Beta,
    Binomial,
    Categorical,
    Cauchy,
    Dirichlet,
    Exponential,
    Gamma,
    Geometric,
    Gumbel,
    HalfNormal,
    Independent,
    Laplace,
    LogNormal,
    LowRankMultivariateNormal,
    MixtureSameFamily,
    Multinomial,
    MultivariateNormal,
    NegativeBinomial,
    Normal,
    OneHotCategorical,
    Poisson,
    StudentT,
    VonMises,
    Weibull,
)

import pavi_scale as ps
from pavi_scale.ambient import precision
from pavi_scale.errors import ModelError
from pavi_scale.model.density import Aligned, Graph, align, expanded, unvalidated
from pavi_scale.plates import Layout, Selection
from pavi_scale.reduced import Reduced, Value


@pytest.fixture(autouse=True)
def _double():
    with precision(torch.float64):
        yield


# Each law of one ground unit from a real parameter t, its event shape, and whether `t` is a vector of 3.
LAWS = {
    "Normal": (lambda t: Normal(t, 0.5), ()),
    "StudentT": (lambda t: StudentT(3.0, t, 2.0), ()),
    "Cauchy": (lambda t: Cauchy(t, 1.0), ()),
    "Laplace": (lambda t: Laplace(t, 1.0), ()),
    "Gumbel": (lambda t: Gumbel(t, 1.0), ()),
    "LogNormal": (lambda t: LogNormal(t, 1.0), ()),
    "HalfNormal": (lambda t: HalfNormal(t.exp()), ()),
    "Gamma": (lambda t: Gamma(2.0, t.exp()), ()),
    "Exponential": (lambda t: Exponential(t.exp()), ()),
    "Weibull": (lambda t: Weibull(t.exp(), 1.5), ()),
    "Beta": (lambda t: Beta(t.exp(), 2.0), ()),
    "VonMises": (lambda t: VonMises(t, 1.0), ()),
    "Bernoulli": (lambda t: Bernoulli(logits=t), ()),
    "Poisson": (lambda t: Poisson(t.exp()), ()),
    "Binomial": (lambda t: Binomial(10, logits=t), ()),
    "NegativeBinomial": (lambda t: NegativeBinomial(5.0, logits=t), ()),
    "Geometric": (lambda t: Geometric(logits=t), ()),
    "Categorical": (lambda t: Categorical(logits=torch.stack([t, -t, 0 * t])), ()),
    "mixture": (lambda t: MixtureSameFamily(Categorical(logits=torch.zeros(2)), Normal(torch.stack([t, -t]), 1.0)), ()),
    "Normal over dims": (lambda t: Normal(t, 0.5), (2, 3)),
    "Independent": (lambda t: Independent(Normal(t.expand(3), 0.5), 1), (3,)),
    "Dirichlet": (lambda t: Dirichlet(t.exp().expand(3)), (3,)),
    "MultivariateNormal": (lambda t: MultivariateNormal(t.expand(3), torch.eye(3) + 0.5), (3,)),
    "MultivariateNormal over dims": (lambda t: MultivariateNormal(t.expand(3), torch.eye(3) + 0.5), (2, 3)),
    "LowRankMultivariateNormal": (lambda t: LowRankMultivariateNormal(t.expand(3), torch.ones(3, 1), torch.ones(3)), (3,)),
    "OneHotCategorical": (lambda t: OneHotCategorical(logits=torch.stack([t, -t, 0 * t])), (3,)),
    "Multinomial": (lambda t: Multinomial(4, logits=torch.stack([t, -t, 0 * t])), (3,)),
}


def _model(law, event):
    dims = tuple(f"d{i}" for i in range(len(event)))
    return ps.Model(
        ps.Plate("group"),
        ps.Plate("obs"),
        sizes=dict(zip(dims, event, strict=True)),
        t=ps.latent(lambda: Normal(0.0, 0.7), plates="group"),
        x=ps.observed(law, plates=("group", "obs"), dims=dims),
    )


def _reduced(law, event, groups=3, n=2, missing=None):
    model = _model(law, event)
    if missing:
        v = model.variables["x"]
        model = ps.Model(*model.plates.values(), sizes=model.sizes, t=model.variables["t"], x=ps.observed(v.law, v.plates, v.dims, missing))
    layout = Layout(model.plates, {"group": groups, "obs": n})
    graph = Graph(model, model.sizes)
    t = torch.randn(4, groups) * 0.7
    x = torch.stack([torch.stack([expanded(law(t[0, i]), event, "x").sample() for _ in range(n)]) for i in range(groups)]).to(torch.float64)
    return graph, layout, x, t


@pytest.mark.parametrize("name", LAWS)
def test_log_density_of_every_unit_is_the_laws_own(name):
    law, event = LAWS[name]
    graph, layout, x, t = _reduced(law, event)
    found = Reduced(graph, Selection.whole(layout), {"x": x}).log_prob("x", {"t": Value(t, ("group",))})
    assert found.shape == (4, 3, 2)
    for k, i, o in np.ndindex(4, 3, 2):
        expected = law(t[k, i]).log_prob(x[i, o]).sum()
        torch.testing.assert_close(found[k, i, o], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "name", ["Normal", "Gamma", "Beta", "Bernoulli", "Normal over dims", "MultivariateNormal", "MultivariateNormal over dims", "Dirichlet"]
)
def test_masked_entries_add_nothing_and_pass_no_gradient(name):
    law, event = LAWS[name]
    graph, layout, x, t = _reduced(law, event, missing="mask")
    inner = len(law(torch.tensor(0.0)).event_shape)
    holes = torch.zeros_like(x, dtype=torch.bool)
    holes[0, 1] = True  # a whole observation
    if event and inner < len(event):
        holes[1, 0, 0] = True  # an entry, or a row that the law treats on its own
    elif event:
        holes[1, 0, 0] = True  # one coordinate of a joint law: the law counts only where all of it is seen
    reduced = Reduced(graph, Selection.whole(layout), {"x": torch.where(holes, torch.nan, x)})
    at = t.clone().requires_grad_()
    found = reduced.log_prob("x", {"t": Value(at, ("group",))})
    for k, i, o in np.ndindex(4, 3, 2):
        terms = expanded(law(t[k, i]), event, "x").log_prob(x[i, o])
        keep = ~holes[i, o]
        keep = keep.flatten(keep.ndim - inner).all(-1) if inner else keep
        torch.testing.assert_close(found[k, i, o], (terms * keep).sum(), rtol=1e-10, atol=1e-10)
    (gradient,) = torch.autograd.grad(found.sum(), at)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", ["Normal", "Gamma", "LogNormal", "Beta", "Weibull", "Poisson", "Dirichlet"])
def test_a_selection_in_which_all_is_missing_counts_nothing(name):
    # Lazy draws ask for single units; a country may have no observations at all.
    law, event = LAWS[name]
    graph, layout, x, t = _reduced(law, event, missing="mask")
    reduced = Reduced(graph, Selection.whole(layout), {"x": torch.full_like(x, torch.nan)})
    at = t.clone().requires_grad_()
    found = reduced.log_prob("x", {"t": Value(at, ("group",))})
    assert (found == 0).all()
    (gradient,) = torch.autograd.grad(found.sum(), at, create_graph=True)
    assert (gradient == 0).all()


def test_a_selection_without_units_of_a_plate_has_an_empty_density():
    # A county without houses; students and lecturers without a common rating.
    law, event = LAWS["Normal"]
    graph, layout, x, t = _reduced(law, event)
    selection = Selection(layout, {"group": np.arange(3), "obs": np.arange(0)}, {"group": np.ones(3), "obs": np.ones(0)})
    found = Reduced(graph, selection, {"x": x[:, :0]}).log_prob("x", {"t": Value(t, ("group",))})
    assert found.shape == (4, 3, 0)


def test_prior_means_are_the_laws_in_unconstrained_coordinates():
    model = ps.Model(
        ps.Plate("group"),
        m=ps.latent(lambda: Normal(0.0, 1.0)),
        a=ps.latent(lambda m: Normal(m + 2.0, 1.0), plates="group"),
        b=ps.latent(lambda m: Gamma(3.0, m.exp()), plates="group"),
        c=ps.latent(lambda: Cauchy(1.0, 1.0), plates="group"),
        d=ps.latent(lambda: Dirichlet(torch.tensor([1.0, 2.0, 3.0])), plates="group", dims="k"),
        x=ps.observed(lambda a: Normal(a, 1.0), plates="group"),
        sizes={"k": 3},
    )
    layout = Layout(model.plates, {"group": 2})
    graph = Graph(model, model.sizes)
    reduced = Reduced(graph, Selection.whole(layout), {"x": torch.zeros(2)})
    values = {"m": Value(torch.tensor([0.5, -0.5]), ())}
    m = values["m"].theta
    torch.testing.assert_close(reduced.prior_mean("a", values), (m + 2.0)[:, None].expand(2, 2))
    torch.testing.assert_close(reduced.prior_mean("b", values), (torch.log(torch.tensor(3.0)) - m)[:, None].expand(2, 2))
    assert (reduced.prior_mean("c", values) == 0).all()  # no mean
    simplex = graph.links["d"].forward(reduced.prior_mean("d", values))
    torch.testing.assert_close(simplex, torch.tensor([1.0, 2.0, 3.0]).div(6).expand(1, 2, 3))


# -- alignment ----------------------------------------------------------------------------------------------------------------

PLATES = {p.name: p for p in (ps.Plate("region"), ps.Plate("county", within="region"), ps.Plate("house", within="county"), ps.Plate("year"))}
LAYOUT = Layout(
    PLATES, {"region": 3, "county": 4, "house": 6, "year": 2}, {("county", "region"): np.array([2, 0, 2, 1]), ("house", "county"): np.array([3, 1, 1, 0, 2, 3])}
)


@pytest.mark.parametrize("particles", [False, True])
@pytest.mark.parametrize(
    ("own", "target"),
    [
        ((), ("house",)),
        (("house",), ("house",)),
        (("region",), ("house",)),
        (("county",), ("year", "house")),
        (("year",), ("year", "house")),
        (("county", "year"), ("year", "house")),
        (("year", "region"), ("house", "year")),
        (("year", "county"), ("year", "county")),
        (("county", "year"), ("year", "county")),
        (("region", "county"), ("house",)),
        (("region", "year"), ("county", "year")),
    ],
)
def test_each_unit_receives_its_own_parents_value(own, target, particles):
    selection = Selection.whole(LAYOUT)
    value = torch.randn(*([3] if particles else []), *selection.sizes(own), 2)
    found = align(value, particles, own, target, selection)
    assert isinstance(found, Aligned)
    assert found.axes == tuple(t for t in target if t in found.axes)  # in the target's order
    lead = [slice(None)] if particles else []
    for position in np.ndindex(*selection.sizes(target)):
        unit = dict(zip(target, position, strict=True))
        at = []
        for p in own:
            if p in unit:
                at.append(unit[p])
            else:
                fine = next(t for t in target if t != "year" and p != "year")
                at.append(int(LAYOUT.path(fine, p)[unit[fine]]))
        got = found.value[(*lead, *(unit[a] for a in found.axes))]
        torch.testing.assert_close(got, value[(*lead, *at)], rtol=0, atol=0)


# -- laws that are refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("law", "message"),
    [
        (lambda t: Normal(torch.zeros(5), 1.0), "wrong shape"),
        (lambda t: MultivariateNormal(torch.zeros(4), torch.eye(4)), "wrong shape"),
        (lambda t: 3.0, "does not return a distribution"),
        (lambda t: t.nothing, "law fails on one ground unit"),
        (lambda t: Normal(t, -1.0), "law fails on one ground unit"),
        (lambda t: Normal(torch.ones(3) * float(t), 1.0), "cannot be computed on many ground units at once"),
        (lambda t: Normal(torch.ones(3) * math.exp(t), 1.0), "cannot be computed on many ground units at once"),
        (lambda t: Normal(torch.ones(3) * t.tolist(), 1.0), "cannot be computed on many ground units at once"),
        (lambda t: Normal(torch.from_numpy(np.ones(3) * np.abs(t.numpy())), 1.0), "cannot be computed on many ground units at once"),
        (lambda t: Normal(torch.ones(3) * (t if t > 0 else -t), 1.0), "cannot be computed on many ground units at once"),
    ],
)
def test_a_bad_law_is_refused_with_its_name(law, message):
    with pytest.raises(ModelError, match=message) as caught:
        Graph(_model(law, (3,)), {"d0": 3})
    assert "'x'" in str(caught.value)


def test_a_support_that_moves_with_a_parent_is_refused():
    model = ps.Model(
        ps.Plate("group"),
        s=ps.latent(lambda: LogNormal(0.0, 1.0)),
        t=ps.latent(lambda s: torch.distributions.Uniform(0.0, s), plates="group"),
        x=ps.observed(lambda t: Normal(t, 1.0), plates="group"),
    )
    with pytest.raises(ModelError, match="support of a latent depends on its parent"):
        Graph(model, {})


def test_validation_is_off_inside_and_as_before_outside():
    def failing():
        with unvalidated():
            assert not torch.distributions.Distribution._validate_args
            raise KeyError("anything")

    assert torch.distributions.Distribution._validate_args
    with pytest.raises(KeyError):
        failing()
    assert torch.distributions.Distribution._validate_args
