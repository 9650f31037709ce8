"""Laws of lazy draws, groups and the xarray engine."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from pavi_scale.errors import InputError, RunError
from pavi_scale.posterior.backend import PaviBackendEntrypoint
from pavi_scale.posterior.posterior import Posterior
from pavi_scale.run import Run
from tests.posterior import toy


@pytest.fixture
def posterior(finished: Path) -> Posterior:
    return Posterior(Run.open(finished), toy.context())


@pytest.fixture
def whole() -> dict[str, np.ndarray]:
    """Every draw of every latent, straight from the sampler."""
    return toy.ToySampler().draw(list(toy.shapes()), np.arange(200), {})


def test_groups_and_dims(posterior: Posterior, whole: dict[str, np.ndarray]) -> None:
    tree = posterior.datatree
    assert list(tree.children) == [
        "posterior", "posterior_mean", "posterior_sd", "posterior_predictive", "log_likelihood", "observed_data", "constant_data", "fit", "diagnostics",
    ]  # fmt: skip
    draws = tree["posterior"].dataset
    assert draws["logits"].dims == ("chain", "draw", "subject", "vertex", "network")
    assert draws.sizes["chain"] == 1
    assert draws.sizes["draw"] == 200
    assert list(draws["subject"].values) == list(toy.LABELS)
    assert "vertex" not in draws.coords
    for name, values in whole.items():
        np.testing.assert_array_equal(draws[name].values[0], values)
    assert set(tree["observed_data"].data_vars) == {"score"}
    assert set(tree["constant_data"].data_vars) == {"age", "subject_of_visit"}


def test_nothing_is_computed_until_asked(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> dict[str, np.ndarray]:
        raise RuntimeError("drawn")

    monkeypatch.setattr(toy.ToySampler, "draw", refuse)
    tree = Posterior(Run.open(finished), toy.context()).datatree
    repr(tree)
    part = tree["posterior"]["logits"].sel(subject="bert").isel(vertex=slice(0, 3), draw=0)
    assert part.shape == (1, 3, toy.NETWORKS)
    with pytest.raises(RuntimeError, match="drawn"):
        part.load()


@pytest.mark.parametrize("seed", range(60))
def test_any_slice_equals_the_slice_of_the_whole(posterior: Posterior, whole: dict[str, np.ndarray], seed: int) -> None:
    rng = np.random.default_rng(seed)
    variable = posterior.datatree["posterior"]["logits"]
    indexers: dict[str, object] = {}
    for dim, size in variable.sizes.items():
        kind = rng.integers(5)
        if kind == 0:
            indexers[dim] = int(rng.integers(-size, size))
        elif kind == 1:
            indexers[dim] = slice(int(rng.integers(size)), int(rng.integers(size + 1)), int(rng.integers(1, 4)))
        elif kind == 2:
            indexers[dim] = slice(None, None, -int(rng.integers(1, 3)))
        elif kind == 3:
            indexers[dim] = rng.integers(0, size, size=int(rng.integers(0, 6)))  # any order, repeats, none
    expected = xr.DataArray(whole["logits"][None], dims=variable.dims).isel(indexers)
    np.testing.assert_array_equal(variable.isel(indexers).values, expected.values)


def test_vectorised_and_boolean_indexing(posterior: Posterior, whole: dict[str, np.ndarray]) -> None:
    variable = posterior.datatree["posterior"]["logits"]
    pair = {"subject": xr.DataArray([0, 3, 3], dims="pair"), "vertex": xr.DataArray([5, 1, 9], dims="pair")}
    expected = xr.DataArray(whole["logits"][None], dims=variable.dims)
    np.testing.assert_array_equal(variable.isel(pair).values, expected.isel(pair).values)
    mask = np.arange(200) % 7 == 0
    np.testing.assert_array_equal(variable.isel(draw=mask).values, expected.isel(draw=mask).values)


def test_lazy_draws_pickle_and_are_thread_safe(posterior: Posterior, whole: dict[str, np.ndarray]) -> None:
    variable = pickle.loads(pickle.dumps(posterior.datatree["posterior"].to_dataset()["logits"]))
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda i: variable.isel(vertex=i % 10).values, range(40)))
    for i, part in enumerate(parts):
        np.testing.assert_array_equal(part[0], whole["logits"][:, :, i % 10])


def test_dask_chunks_give_the_same(finished: Path, loader: object, whole: dict[str, np.ndarray]) -> None:
    chunked = xr.open_dataset(finished, engine=PaviBackendEntrypoint, group="posterior", chunks={})
    assert chunked["logits"].chunks is not None
    np.testing.assert_array_equal(chunked["logits"].values[0], whole["logits"])
    small = chunked.chunk({"draw": 50, "vertex": 3})
    np.testing.assert_allclose(small["logits"].mean("draw").values[0], whole["logits"].mean(0), rtol=1e-12)


def test_engine_gives_the_same_as_the_object(finished: Path, posterior: Posterior, loader: object) -> None:
    tree = xr.open_datatree(finished, engine=PaviBackendEntrypoint)
    assert list(tree.children) == list(posterior.datatree.children)
    for name, node in posterior.datatree.children.items():
        xr.testing.assert_identical(tree[name].to_dataset().load(), node.to_dataset().load())
        xr.testing.assert_identical(xr.open_dataset(finished, engine=PaviBackendEntrypoint, group=name).load(), node.to_dataset().load())
    assert xr.open_dataset(finished, engine=PaviBackendEntrypoint, draws=7).sizes["draw"] == 7
    assert "mu" not in xr.open_dataset(finished, engine=PaviBackendEntrypoint, drop_variables="mu")
    with pytest.raises(InputError, match="no such group"):
        xr.open_dataset(finished, engine=PaviBackendEntrypoint, group="prior")
    with pytest.raises(RunError, match="no run"):
        xr.open_datatree(finished / "nowhere", engine=PaviBackendEntrypoint)


def test_guess_can_open(finished: Path, tmp_path: Path) -> None:
    guess = PaviBackendEntrypoint().guess_can_open
    assert guess(finished)
    assert guess(str(finished))
    (tmp_path / "run.json").write_text("{}")
    assert not guess(tmp_path)
    assert not guess(tmp_path / "nowhere")
    assert not guess(3)
    assert not guess("s3://bucket/run")


def test_stored_groups_need_no_loader(finished: Path) -> None:
    stored = xr.open_dataset(finished, engine=PaviBackendEntrypoint, group="posterior_sd")
    np.testing.assert_allclose(stored["theta"].values, toy.sd("theta"))


def test_sample_agrees_with_the_lazy_group(posterior: Posterior, whole: dict[str, np.ndarray]) -> None:
    drawn = posterior.sample(50)
    assert drawn["logits"].dims == ("draw", "subject", "vertex", "network")
    lazy = posterior.datatree["posterior"].to_dataset().isel(chain=0, draw=slice(50)).drop_vars("chain")
    selections = [
        {},
        {"subject": "cleo"},
        {"subject": ["dörte", "anna"]},
        {"subject": slice("bert", "cleo")},
        {"vertex": 3},
        {"vertex": slice(2, 6)},
        {"vertex": [9, 0], "subject": "anna"},
        {"network": 1, "subject": slice("bert", None)},
        {"vertex": slice(None, None, -2), "network": [2, 2]},
    ]
    for sel in selections:
        part = posterior.sample(50, **sel)
        xr.testing.assert_equal(part, drawn.sel(sel))
        xr.testing.assert_equal(part, lazy.sel(sel).load())


def test_seeds_are_streams(posterior: Posterior) -> None:
    zero, one = posterior.sample(30), posterior.sample(30, seed=1)
    assert not np.isclose(zero["logits"], one["logits"]).any()
    xr.testing.assert_equal(one.sel(subject="bert"), posterior.sample(30, seed=1, subject="bert"))
    # Laws of the draws: right moments (4 standard errors over 4,000 draws).
    many = posterior.sample(4000, seed=5)
    error = (many["theta"].mean("draw") - toy.mean("theta")) / (toy.sd("theta") / np.sqrt(4000))
    assert abs(error).max() < 4


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"draws": 0}, "positive integer"),
        ({"draws": 2.5}, "positive integer"),
        ({"draws": 3, "seed": -1}, "non-negative"),
        ({"draws": 3, "planet": 1}, "unknown dimension"),
        ({"draws": 3, "subject": "zoe"}, "cannot be resolved"),
        ({"draws": 3, "vertex": 99}, "cannot be resolved"),
    ],
)
def test_bad_requests(posterior: Posterior, arguments: dict[str, object], match: str) -> None:
    with pytest.raises(InputError, match=match):
        posterior.sample(**arguments)


@pytest.mark.parametrize("particles", [1, 0, -3, True, 2.0, "8"])
def test_a_bound_of_fewer_than_two_particles_has_no_standard_error(posterior: Posterior, particles: object) -> None:
    with pytest.raises(InputError, match="at least 2.*standard error"):
        posterior.elbo(particles)


def test_the_rest_of_the_object(posterior: Posterior, finished: Path) -> None:
    assert posterior.run == str(finished)
    assert posterior.status == "ok"
    assert posterior.diagnostics["khat"].dims == ("subject",)
    nats, error = posterior.elbo(16, seed=3)
    assert (nats, error) == toy.ToySampler().elbo(16, 3)
    text, markup = repr(posterior), posterior._repr_html_()
    for fact in ("status: ok", "-12.50 nats", "subject 4", "logits", "latents: 128"):
        assert fact in text
    assert "<table>" in markup
    with pytest.raises(RunError, match="cannot be extended"):
        posterior.extend(toy.cohort())
    axes = posterior.plot_elbo().axes[0]
    np.testing.assert_allclose(axes.lines[0].get_ydata()[-1], -100 / 40)


def test_a_run_without_stored_posterior_still_samples(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run")
    posterior = Posterior(run, toy.context())
    assert posterior.status == "unconverged"
    assert list(posterior.datatree.children) == ["posterior", "posterior_predictive", "log_likelihood", "observed_data", "constant_data"]
    assert posterior.datatree["posterior"].sizes["draw"] == 1000
    with pytest.raises(RunError, match="no stored posterior"):
        posterior.diagnostics  # noqa: B018


def test_arviz_reads_the_tree(posterior: Posterior, whole: dict[str, np.ndarray]) -> None:
    table = posterior.summary(var_names=["mu", "theta"], round_to=None)
    assert list(table.index) == ["mu", "theta[anna]", "theta[bert]", "theta[cleo]", "theta[dörte]"]
    np.testing.assert_allclose(table["mean"].astype(float)[1:], whole["theta"].mean(0), rtol=1e-6)


def test_registered_engine(finished: Path, loader: object) -> None:
    if "pavi" not in xr.backends.list_engines():
        pytest.skip("the package is not installed, so its entry point is not registered")
    assert "posterior" in xr.open_datatree(finished, engine="pavi").children
