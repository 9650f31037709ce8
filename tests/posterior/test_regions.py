"""Shards that are computed one by one and written together: the same numbers in fewer files."""

import importlib

import numpy as np
import pytest
import zarr

import pavi_scale as ps
from pipelines import gre, hcp

writing = importlib.import_module("pavi_scale.writing")
study_of = importlib.import_module("pavi_scale.study")


@pytest.fixture
def fitted(tmp_path, monkeypatch):
    """A fit of many shards: `fitted(name, files)` writes them as about so many chunks."""
    store = str(tmp_path / "cohort.zarr")
    real = study_of.make_plan

    def fit(model, name, files, chunk):
        monkeypatch.setattr(study_of, "make_plan", lambda *args, **more: real(*args, **{**more, "chunk": chunk}))
        monkeypatch.setattr(writing, "FILES", files)
        return ps.fit(model, store, run=tmp_path / name, seed=0, progress=False)

    return store, fit


def both(fit, model, chunk, latent, axis):
    """The same fit, shards written apart and together: posteriors, and how many times longer the chunks are."""
    apart, together = fit(model, "apart", 10_000, chunk), fit(model, "together", 3, chunk)
    chunks = [zarr.open_array(f"{p.run}/posterior.zarr/posterior_mean/{latent}").chunks[axis] for p in (apart, together)]
    return apart, together, chunks[1] / chunks[0]


def same(apart, together):
    for group in ("posterior_mean", "posterior_sd"):
        for name in apart.datatree[group].data_vars:
            a, b = (p.datatree[group][name].values for p in (apart, together))
            assert np.isfinite(a).all()
            np.testing.assert_array_equal(a, b)


def test_written_together_or_apart_the_posterior_is_the_same(fitted):
    store, fit = fitted
    gre.make_cohort(store, 700, observations=20)
    apart, together, longer = both(fit, gre.model, 2048, "theta", 0)
    assert longer > 4
    same(apart, together)


def test_labelled_units_too(fitted):
    """The split plate is not the first axis, and what draws need of each shard comes back to be put in place."""
    store, fit = fitted
    hcp.make_cohort(store, subjects=8, vertices=400, seed=6)
    apart, together, longer = both(fit, hcp.model, 1024, "label_logits", 1)
    assert longer > 2
    same(apart, together)
    some = {"subject": [2, 5], "vertex": slice(150, 250)}
    a, b = (p.sample(20, **some) for p in (apart, together))
    np.testing.assert_array_equal(a["label_logits"].values, b["label_logits"].values)
