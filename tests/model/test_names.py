"""Names that a posterior has a use for are refused before anything is fitted, and no others."""

import inspect

import numpy as np
import pytest
import xarray as xr
from torch.distributions import Normal

import pavi_scale as ps
from pavi_scale.errors import InputError, ModelError
from pavi_scale.model.template import OF_CALLS, OF_DRAWS, OF_MODEL, OF_RESULTS

AXES = sorted({*OF_DRAWS, *OF_RESULTS, *OF_CALLS})


def renamed(**names):
    """A model and its cohort, some of whose names are replaced."""
    a, k, y, z, x = (names.get(n, n) for n in "akyzx")
    scope = {"Normal": Normal}
    variables = {
        "mu": ps.latent(lambda: Normal(0.0, 1.0), dims=k),
        y: ps.latent(lambda mu: Normal(mu, 1.0), plates=a, dims=k),
        z: ps.covariate(plates=a),
        x: ps.observed(eval(f"lambda {y}, {z}: Normal({y} + {z}, 1.0)", scope), plates=a, dims=k),
    }
    data = xr.Dataset({x: ((a, k), np.random.default_rng(0).normal(size=(4, 2))), z: (a, np.arange(4.0))})
    return ps.Model(ps.Plate(a), **variables), data


def test_the_arguments_beside_a_selection_are_those_that_the_posterior_has():
    found = set()
    for method in (ps.Posterior.sample, ps.Posterior.predict):
        found |= {p.name for p in inspect.signature(method).parameters.values() if p.kind is not p.VAR_KEYWORD}
    assert sorted(OF_CALLS) == sorted(found)
    of_model = {p.name for p in inspect.signature(ps.Model.__init__).parameters.values() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    assert sorted(OF_MODEL) == sorted(of_model)


@pytest.mark.parametrize(
    ("place", "name"),
    [(place, name) for place in "ak" for name in AXES]
    + [("y", name) for name in sorted({*OF_DRAWS, *OF_RESULTS, *OF_MODEL})]
    + [("x", name) for name in sorted({*OF_DRAWS, *OF_MODEL})]
    + [("z", name) for name in OF_MODEL],
)
def test_a_reserved_name_is_refused(place, name):
    with pytest.raises(ModelError, match="a name is reserved") as caught:
        renamed(**{place: name})
    assert repr(name) in str(caught.value.got)
    assert name in str(caught.value.expected)
    assert "rename" in str(caught.value.remedy)


def test_all_reserved_names_of_a_model_are_told_at_once():
    with pytest.raises(ModelError) as caught:
        renamed(a="seed", k="draw", y="chain")
    assert caught.value.got == "plate 'seed', event dimension 'draw', variable 'chain'"


@pytest.mark.parametrize(
    "names",
    [
        {"a": "value", "k": "root", "y": "at", "x": "mean", "z": "draw"},
        {"a": "sample", "k": "sizes", "y": "seed", "x": "quantile", "z": "chain"},
        {"a": "mean", "k": "at", "y": "variable", "x": "store", "z": "threshold"},
    ],
    ids=lambda names: ",".join(names.values()),
)
def test_other_names_are_free(names, tmp_path):
    model, data = renamed(**names)
    posterior = ps.fit(model, data, run=tmp_path / "run", progress=False)
    a, k, y, x = (names[n] for n in "akyx")
    assert posterior.sample(3, **{a: 1})[y].dims == ("draw", k)
    assert posterior.predict(3, **{a: [0, 1], k: 0})[x].shape == (3, 2)
    assert posterior.quantile(y, [0.1, 0.9], store=tmp_path / "q", **{a: [0, 1], k: 0}).shape == (2, 2)
    assert posterior.exceedance(y, [0.1, 0.9], **{a: [0, 1], k: 0}).shape == (2, 2)
    assert posterior.datatree["posterior"][y].sizes == {"chain": 1, "draw": 1000, a: 4, k: 2}


@pytest.mark.parametrize("name", ["store", "memory"])
def test_an_option_of_quantiles_may_be_a_plate_but_not_both(name):
    model, data = renamed(a=name)
    posterior = ps.fit(model, data, progress=False)
    assert posterior.sample(3, **{name: 1})["y"].dims == ("draw", "k")
    assert posterior.quantile("y", 0.5, draws=5).dims == (name, "k")
    for ask in (posterior.quantile, posterior.exceedance):
        with pytest.raises(InputError, match="an option or a plate"):
            ask("y", 0.5, **{name: 1})
