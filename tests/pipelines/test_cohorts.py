"""Every study's cohort fits its model, and its command explains itself."""

import importlib
import subprocess
import sys

import numpy as np
import pytest
import xarray as xr

import pavi_scale as ps

NAMES = ["eight_schools", "fertility", "gm", "gre", "hcp", "math_achieve", "nc", "radon", "sleepstudy"]
TABLES = {"radon": "radon_mn.csv", "sleepstudy": "sleepstudy.csv", "math_achieve": "math_achieve.csv"}
SIZES = {
    "radon": {"county": 85, "house": 919},
    "sleepstudy": {"subject": 18, "observation": 180},
    "math_achieve": {"school": 160, "student": 7185},
    "eight_schools": {"school": 8},
    "fertility": {"country": 210, "year": 52},
}


def module(name):
    return importlib.import_module(f"pipelines.{name}")


@pytest.mark.parametrize("name", ["eight_schools", "fertility"])
def test_cohort_without_a_table(name):
    cohort = ps.open_cohort(module(name).make_cohort(), module(name).model)
    cohort.check_values()
    assert cohort.layout.cardinality == SIZES[name]


@pytest.mark.parametrize("name", TABLES)
def test_cohort_of_a_table(shared, name):
    cohort = ps.open_cohort(module(name).make_cohort(shared / "data" / TABLES[name]), module(name).model)
    cohort.check_values()
    assert cohort.layout.cardinality == SIZES[name]


SMALL = {"gre": {"groups": 3, "observations": 4}, "gm": {}, "nc": {}, "hcp": {"subjects": 2, "vertices": 50, "features": 3}}


@pytest.mark.parametrize("name", SMALL)
def test_simulated_cohort_keeps_its_truth(tmp_path, name):
    module(name).make_cohort(str(tmp_path / "c.zarr"), **SMALL[name])
    model = module(name).model
    cohort = ps.open_cohort(tmp_path / "c.zarr", model)
    cohort.check_values()
    truth = xr.open_zarr(tmp_path / "c.zarr", group="truth", consolidated=False)
    for v in model.latents:
        assert truth[v.name].dims == (*v.plates, *v.dims)
        assert np.isfinite(truth[v.name].values).all()


@pytest.mark.parametrize("name", NAMES)
def test_command_explains_itself(monkeypatch, capsys, name):
    command = importlib.import_module("pipelines.hcp.command") if name == "hcp" else module(name)
    monkeypatch.setattr(sys, "argv", ["x", "--help"])
    with pytest.raises(SystemExit) as stop:
        command.main()
    assert stop.value.code == 0
    assert f"python -m pipelines.{name}" in capsys.readouterr().out


def test_a_study_runs_from_its_command_and_its_file(root, tmp_path):
    def call(*arguments):
        environment = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-m", *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    out = call("pipelines.eight_schools")
    assert "status: ok" in out
    assert "tau" in out
    # The run is that of the study file: it names the model by the same import path.
    study = str(root / "pipelines" / "eight_schools.yaml")
    assert "theta[C]" in call("pavi_scale.cli", "posterior", study, "--sel", "school=C")
    assert "sound" in call("pavi_scale.cli", "check", study)
