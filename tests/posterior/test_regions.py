"""Shards that are computed one by one and written together: the same numbers in fewer files."""

import importlib

import numpy as np
import pytest
import zarr

import pavi_scale as ps
from pipelines import gre

writing = importlib.import_module("pavi_scale.writing")
study_of = importlib.import_module("pavi_scale.study")


@pytest.fixture
def fitted(tmp_path, monkeypatch):
    """A fit of many shards: `fitted(name, files)` writes them as about so many chunks."""
    store = str(tmp_path / "cohort.zarr")
    gre.make_cohort(store, 700, observations=20)
    real = study_of.make_plan
    monkeypatch.setattr(study_of, "make_plan", lambda *args, **more: real(*args, **{**more, "chunk": 2048}))

    def fit(name, files):
        monkeypatch.setattr(writing, "FILES", files)
        return ps.fit(gre.model, store, run=tmp_path / name, seed=0, progress=False)

    return fit


def test_written_together_or_apart_the_posterior_is_the_same(fitted):
    apart, together = fitted("apart", 10_000), fitted("together", 3)
    chunks = [zarr.open_array(f"{p.run}/posterior.zarr/posterior_mean/theta").chunks[0] for p in (apart, together)]
    assert chunks[1] > 4 * chunks[0]
    for group in ("posterior_mean", "posterior_sd"):
        for name in ("mu", "theta"):
            a, b = (p.datatree[group][name].values for p in (apart, together))
            assert np.isfinite(a).all()
            np.testing.assert_array_equal(a, b)
