"""What a command and a worker import: no more than they use, since both are started often and are waited for."""

import subprocess
import sys

import numpy as np
import pytest
import xarray as xr
import yaml

HEAVY = {"arviz_base", "arviz_stats", "dask", "distributed", "matplotlib", "numba", "pandas", "scipy", "tqdm", "xarray", "torch"}

MODEL = """
from torch.distributions import HalfNormal, Normal
import pavi_scale as ps

model = ps.Model(
    ps.Plate("group"), ps.Plate("obs", within="group"),
    mu=ps.latent(lambda: Normal(0.0, 1.0)), sigma=ps.latent(lambda: HalfNormal(1.0)),
    theta=ps.latent(lambda mu, sigma: Normal(mu, sigma), plates="group"),
    x=ps.observed(lambda theta: Normal(theta, 0.5), plates="obs"),
)
"""
PLAN = """
from pavi_scale.cli import main
try:
    main(["plan", "study.yaml"])
except SystemExit as end:
    assert not end.code
"""


@pytest.fixture
def study(tmp_path):
    (tmp_path / "somestudy.py").write_text(MODEL)
    data = {"x": ("obs", np.linspace(-1.0, 1.0, 12)), "obs_group": ("obs", np.arange(12) % 3, {"instance_dimension": "group"})}
    labels = {"group": np.array(["a", "b", "c"], dtype=object)}
    xr.Dataset(data, coords=labels).to_zarr(tmp_path / "cohort.zarr", zarr_format=3, consolidated=False)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({"model": "somestudy:model", "cohort": "cohort.zarr", "run": "run"}))
    return tmp_path


def imported(code, folder, root):
    """What a program prints, and which heavy libraries it leaves behind."""
    told = f"import sys\nsys.path[:0] = [{str(root)!r}, {str(folder)!r}]\n{code}\nprint(*(m for m in sys.modules if '.' not in m))"
    done = subprocess.run([sys.executable, "-c", told], cwd=folder, capture_output=True, text=True, check=True)
    *shown, modules = done.stdout.splitlines()
    return shown, HEAVY & set(modules.split())


def test_a_plan_needs_torch_alone(study, root):
    shown, heavy = imported(PLAN, study, root)
    assert any(line.split() == ["latents", "in", "all", "5"] for line in shown), shown
    assert heavy == {"torch"}


def test_a_worker_needs_torch_alone(tmp_path, root):
    assert imported("import pavi_scale.spec", tmp_path, root)[1] == {"torch"}


def test_the_command_and_the_package_need_nothing_by_themselves(tmp_path, root):
    assert imported("import pavi_scale, pavi_scale.cli", tmp_path, root)[1] == set()
