"""A complete run with stored moments, made once; tests that damage it take a copy."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from pavi_scale.posterior import sampler
from pavi_scale.posterior.store import PosteriorWriter
from pavi_scale.run import Run
from tests.posterior import toy


@pytest.fixture(scope="session")
def _finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("posterior") / "run"
    run = Run.create(path)
    run.commit({"w": np.arange(3.0)}, {"status": "ok", "elbo": -12.5, "draws": 200})
    writer = PosteriorWriter.create(path, toy.context(), chunks={"subject": 1, "vertex": 2}, shards={"vertex": 4})
    toy.fill(writer)
    steps = np.arange(40)
    writer.put("fit", xr.Dataset({"elbo": ("step", -100 / (steps + 1.0))}, coords={"step": steps}))
    writer.put("diagnostics", xr.Dataset({"khat": ("subject", np.linspace(0, 0.5, toy.SUBJECTS))}, coords={"subject": toy.LABELS}, attrs={"status": "ok"}))
    writer.finish()
    return path


@pytest.fixture
def finished(_finished: Path, tmp_path: Path) -> Path:
    """A finished run that the test may damage."""
    return Path(shutil.copytree(_finished, tmp_path / "run"))


@pytest.fixture
def loader() -> object:
    """Register the toy loader for the length of a test."""
    before = list(sampler._loaders)
    sampler.set_loader(toy.context)
    yield
    sampler._loaders[:] = before
