"""A small study in a folder of its own, and the command run inside this process."""

import sys

import numpy as np
import pytest
import xarray as xr
import yaml

from pavi_scale.cli import main

MODEL = """
from torch.distributions import HalfNormal, Normal
import pavi_scale as ps

model = ps.Model(
    ps.Plate("group"),
    ps.Plate("obs", within="group"),
    mu=ps.latent(lambda: Normal(0.0, 1.0)),
    sigma=ps.latent(lambda: HalfNormal(1.0)),
    theta=ps.latent(lambda mu, sigma: Normal(mu, sigma), plates="group"),
    x=ps.observed(lambda theta: Normal(theta, 0.5), plates="obs"),
)
number = 3
"""


def make_cohort(groups=6, each=5, seed=0):
    rng = np.random.default_rng(seed)
    index = np.repeat(np.arange(groups), each)
    x = rng.normal(0.5, 1.0, groups)[index] + 0.5 * rng.normal(size=len(index))
    labels = np.array([f"g{i}" for i in range(groups)], dtype=object)
    return xr.Dataset({"x": ("obs", x), "obs_group": ("obs", index, {"instance_dimension": "group"})}, coords={"group": labels})


def write(path, **changes):
    """The study file, keys replaced by `changes` (None drops the key)."""
    study = {"model": "toystudy:model", "cohort": "cohort.zarr", "run": "runs/toy", "fit": {"seed": 0, "progress": False}} | changes
    path.write_text(yaml.safe_dump({key: value for key, value in study.items() if value is not None}))


def fill(folder):
    (folder / "toystudy.py").write_text(MODEL)
    make_cohort().to_zarr(folder / "cohort.zarr", zarr_format=3, consolidated=False)
    write(folder / "study.yaml")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    fill(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("toystudy", "broken", "cyclic", "quits", "fits"):
        sys.modules.pop(name, None)


@pytest.fixture
def run(capsys):
    """Run the command; returns (exit code, standard output, standard error)."""

    def call(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return call
