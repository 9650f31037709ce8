"""Bad input: one clear typed error each, before any compute; no stray exception types."""

import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from torch.distributions import Bernoulli, Categorical, Dirichlet, HalfNormal, Normal, Poisson

import pavi_scale as ps
from pavi_scale.errors import CohortError, InputError, ModelError, PlanRefused, RunError


def model(**changes):
    parts = {
        "mu": ps.latent(lambda: Normal(0.0, 1.0)),
        "theta": ps.latent(lambda mu: Normal(mu, 1.0), plates="g"),
        "z": ps.covariate(plates="i"),
        "x": ps.observed(lambda theta, z: Normal(theta + z, 1.0), plates="i"),
    }
    return ps.Model(ps.Plate("g"), ps.Plate("i", within="g"), **{**parts, **changes})


def cohort(**changes):
    parts = {
        "x": ("i", np.zeros(6)),
        "z": ("i", np.ones(6)),
        "g_of": ("i", np.array([0, 0, 1, 1, 2, 2]), {"instance_dimension": "g"}),
    }
    parts = {**parts, **changes}
    return xr.Dataset({k: v for k, v in parts.items() if v is not None})


def refused(kind, build_model, build_cohort, tmp_path):
    with pytest.raises(kind) as caught:
        ps.fit(build_model(), build_cohort(), run=tmp_path / "run", seed=0)
    assert isinstance(caught.value, InputError)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def nan(i):
    x = np.zeros(6)
    x[i] = np.nan
    return x


COHORTS = {
    "wrong dim": (lambda: cohort(x=("j", np.zeros(6))), "x"),
    "extra dim": (lambda: cohort(x=(("i", "k"), np.zeros((6, 2)))), "x"),
    "text dtype": (lambda: cohort(x=("i", list("abcdef"))), "x"),
    "complex dtype": (lambda: cohort(x=("i", np.zeros(6, complex))), "x"),
    "date dtype": (lambda: cohort(z=("i", np.zeros(6, "M8[ns]"))), "z"),
    "index out of range": (lambda: cohort(g_of=("i", [0, 0, 1, 1, 2, 7], {"instance_dimension": "g"}), w=("g", np.zeros(3))), "g_of"),
    "negative index": (lambda: cohort(g_of=("i", [0, 0, 1, 1, 2, -1], {"instance_dimension": "g"})), "g_of"),
    "float index": (lambda: cohort(g_of=("i", [0, 0, 1, 1, 2, 1.5], {"instance_dimension": "g"})), "g_of"),
    "no index": (lambda: cohort(g_of=None), "g"),
    "two indices": (lambda: cohort(h_of=("i", [0, 0, 1, 1, 2, 2], {"instance_dimension": "g"})), "g"),
    "nan without mask": (lambda: cohort(x=("i", nan(4))), "4"),
    "nan covariate": (lambda: cohort(z=("i", nan(3))), "3"),
    "inf": (lambda: cohort(x=("i", [0, 0, np.inf, 0, 0, 0])), "2"),
    "inf covariate": (lambda: cohort(z=("i", [0, -np.inf, 0, 0, 0, 0])), "1"),
    "missing observed": (lambda: cohort(x=None), "x"),
    "missing covariate": (lambda: cohort(z=None), "z"),
    "identifiers for an index": (lambda: cohort(g_of=("i", [0, 0, 1, 1, 2, 10**12], {"instance_dimension": "g"})), "largest index 1,000,000,000,000"),
    "huge identifiers": (lambda: cohort(g_of=("i", [0, 0, 1, 1, 2, 2**60], {"instance_dimension": "g"})), "g_of"),
    "huge float index": (lambda: cohort(g_of=("i", [0, 0, 1, 1, 2, 1e300], {"instance_dimension": "g"})), "g_of"),
    "two levels of labels": (lambda: cohort().assign_coords(a=("i", list("aaabbb")), b=("i", [0, 1, 2] * 2)).set_index(i=["a", "b"]), "reset_index('i')"),
    "empty plate": (lambda: cohort().isel(i=slice(0, 0)), "i"),
}


@pytest.mark.parametrize("case", COHORTS)
def test_bad_cohort(case, tmp_path):
    build, word = COHORTS[case]
    message = refused(CohortError, model, build, tmp_path)
    assert word in message, message
    assert not (tmp_path / "run" / "posterior.zarr").exists()


MODELS = {
    "unknown parent": (lambda: model(theta=ps.latent(lambda nobody: Normal(nobody, 1.0), plates="g")), "nobody"),
    "cycle": (lambda: model(mu=ps.latent(lambda nu: Normal(nu, 1.0)), nu=ps.latent(lambda mu: Normal(mu, 1.0))), "mu"),
    "itself": (lambda: model(mu=ps.latent(lambda mu: Normal(mu, 1.0))), "mu"),
    "discrete latent": (lambda: model(mu=ps.latent(lambda: Poisson(3.0))), "MixtureSameFamily"),
    "discrete local": (lambda: model(theta=ps.latent(lambda mu: Bernoulli(logits=mu), plates="g")), "theta"),
    "parent observed": (lambda: model(theta=ps.latent(lambda x: Normal(x, 1.0), plates="g")), "x"),
    "parent below": (lambda: model(mu=ps.latent(lambda: Normal(0.0, 1.0), plates="i")), "mu"),
    "unknown plate": (lambda: model(theta=ps.latent(lambda mu: Normal(mu, 1.0), plates="galaxy")), "galaxy"),
    "not a distribution": (lambda: model(mu=ps.latent(lambda: 3.0)), "mu"),
    "wrong shape": (lambda: model(mu=ps.latent(lambda: Normal(torch.zeros(3), 1.0))), "mu"),
    "wrong event shape": (lambda: model(mu=ps.latent(lambda: Dirichlet(torch.ones(3))), x=ps.observed(lambda theta: Normal(theta, 1.0), plates="i")), "mu"),
    "law is not callable": (lambda: model(mu=ps.latent(Normal(0.0, 1.0))), "mu"),
    "defaults and stars": (lambda: model(theta=ps.latent(lambda *mu: Normal(mu[0], 1.0), plates="g")), "theta"),
    "within an unknown plate": (lambda: ps.Model(ps.Plate("i", within="nope"), x=ps.observed(lambda: Normal(0.0, 1.0), plates="i")), "nope"),
    "within a number": (lambda: ps.Model(ps.Plate("i", within=3), x=ps.observed(lambda: Normal(0.0, 1.0), plates="i")), "3"),
    "within one plate twice": (lambda: ps.Model(ps.Plate("g"), ps.Plate("i", within=("g", "g"))), "('g', 'g')"),
    "plate twice": (lambda: ps.Model(ps.Plate("i"), ps.Plate("i"), x=ps.observed(lambda: Normal(0.0, 1.0), plates="i")), "i"),
    "plates in a circle": (lambda: ps.Model(ps.Plate("g", within="i"), ps.Plate("i", within="g"), x=ps.observed(lambda: Normal(0.0, 1.0), plates="i")), "g"),
    "dim without a size": (lambda: model(mu=ps.latent(lambda: Normal(0.0, 1.0), dims="k"), theta=ps.latent(lambda mu: Normal(mu.sum(), 1.0), plates="g")), "k"),
    "wrong missing": (
        lambda: ps.Model(ps.Plate("i"), m=ps.latent(lambda: Normal(0.0, 1.0)), x=ps.observed(lambda m: Normal(m, 1.0), plates="i", missing="drop")),
        "missing",
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_bad_model(case, tmp_path):
    build, word = MODELS[case]
    message = refused(InputError, build, cohort, tmp_path)
    assert word in message, message


def test_support_of_the_data(tmp_path):
    """Data outside a law's support would give minus infinity."""
    build = lambda: model(x=ps.observed(lambda theta, z: Poisson(torch.exp(theta)), plates="i"))  # noqa: E731
    for bad in ([0, 1, 2, -1, 0, 0], [0.5, 1, 2, 0, 0, 0]):
        message = refused(InputError, build, lambda bad=bad: cohort(x=("i", bad)), tmp_path)
        assert "x" in message
    build = lambda: model(x=ps.observed(lambda theta, z: Categorical(logits=torch.stack([theta, z])), plates="i"))  # noqa: E731
    refused(InputError, build, lambda: cohort(x=("i", [0, 1, 0, 1, 2, 0])), tmp_path)


def test_cardinalities_disagree(tmp_path):
    m = ps.Model(
        ps.Plate("i"),
        sizes={"k": 3},
        t=ps.latent(lambda: Normal(0.0, 1.0), dims="k"),
        x=ps.observed(lambda t: Normal(t, 1.0), plates="i", dims="k"),
    )
    assert "k" in refused(InputError, lambda: m, lambda: xr.Dataset({"x": (("i", "k"), np.zeros((4, 2)))}), tmp_path)


def test_index_labels_misaligned(tmp_path):
    """Positions count along the parent's coordinate; more positions than labels cannot be meant."""
    bad = cohort(g_of=("i", [0, 0, 1, 1, 2, 3], {"instance_dimension": "g"})).assign_coords(g=["a", "b", "c"])
    assert "g" in refused(CohortError, model, lambda: bad, tmp_path)


def test_unreadable_stores(tmp_path):
    for path in (tmp_path / "nothing.zarr", tmp_path):
        with pytest.raises(CohortError):
            ps.fit(model(), str(path), run=tmp_path / "run")
    (tmp_path / "file.zarr").write_text("not a store")
    with pytest.raises(CohortError):
        ps.fit(model(), tmp_path / "file.zarr", run=tmp_path / "run")


def test_missing_chunk_and_damaged_metadata(tmp_path):
    store = tmp_path / "c.zarr"
    cohort().chunk({"i": 2}).to_zarr(store, zarr_format=3, consolidated=False)
    chunk = next(p for p in sorted((store / "x").rglob("*")) if p.is_file() and p.name != "zarr.json")
    chunk.unlink()
    with pytest.raises(CohortError):
        ps.fit(model(), store, run=tmp_path / "run")
    (store / "zarr.json").write_text("{")
    with pytest.raises(CohortError):
        ps.fit(model(), store, run=tmp_path / "run")


def test_not_a_cohort(tmp_path):
    for bad in (None, 3, {"x": np.zeros(3)}, np.zeros(3)):
        with pytest.raises(InputError):
            ps.fit(model(), bad, run=tmp_path / "run")


def test_run_paths(tmp_path):
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file", tmp_path / "file" / "run", "/proc/nothing/run"):
        with pytest.raises(RunError):
            ps.fit(model(), cohort(), run=bad)
    with pytest.raises(RunError):
        ps.open_posterior(tmp_path / "nowhere")
    with pytest.raises(RunError):
        ps.resume(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "options",
    [
        {"encoding": "magic"},
        {"encoding": {"galaxy": "free"}},
        {"encoding": {"g": "magic"}},
        {"memory": "lots"},
        {"memory": "-1 GiB"},
        {"max_time": -1},
        {"device": "abacus"},
        {"seed": "x"},
        {"seed": -1},
        {"seed": 2**63},
        {"seed": 2**70},
        {"run": 3},
        {"client": "tcp://localhost:8786"},
    ],
    ids=str,
)
def test_bad_options(options, tmp_path):
    with pytest.raises(InputError):
        ps.fit(model(), cohort(), **{"run": tmp_path / "run", **options})


def test_what_is_no_run_client_or_posterior_is_named(tmp_path):
    for call in (ps.open_posterior, ps.resume, ps.report):
        for thing in (None, 3, b"runs/a"):
            with pytest.raises(InputError, match="run is named by its path|not a posterior"):
                call(thing)
    with pytest.raises(InputError, match=r"open_posterior\(run\)"):
        ps.report(str(tmp_path))
    with pytest.raises(InputError, match=r"Client\(address\)"):
        ps.plan(model(), cohort(), client="tcp://localhost:8786")


def test_the_largest_seed_is_a_seed(tmp_path):
    assert ps.fit(model(), cohort(), run=tmp_path / "run", seed=2**63 - 1, progress=False).status == "ok"


def test_too_little_memory_is_refused(tmp_path):
    with pytest.raises(PlanRefused) as caught:
        ps.fit(model(), cohort(), run=tmp_path / "run", memory="1 MiB")
    assert caught.value.exit_code == 3
    assert "1" in str(caught.value)


def test_second_run_in_the_same_place(tmp_path):
    """A finished run is never silently overwritten by another model."""
    ps.fit(model(), cohort(), run=tmp_path / "run")
    other = model(sigma=ps.latent(lambda: HalfNormal(1.0)), x=ps.observed(lambda theta, z, sigma: Normal(theta + z, sigma), plates="i"))
    with pytest.raises(RunError):
        ps.fit(other, cohort(), run=tmp_path / "run")


def test_errors_are_the_documented_family():
    assert issubclass(ModelError, InputError)
    assert issubclass(CohortError, InputError)
    assert issubclass(RunError, InputError)
    assert issubclass(InputError, ValueError)


def test_zarr_of_format_two_is_read_or_refused(tmp_path):
    store = tmp_path / "old.zarr"
    cohort().to_zarr(store, zarr_format=2)
    assert zarr.open_group(store, mode="r").metadata.zarr_format == 2
    try:
        posterior = ps.fit(model(), store, run=tmp_path / "run")
    except CohortError:
        return
    assert posterior.status == "ok"
