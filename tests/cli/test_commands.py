"""The whole way through the command line: plan, fit, posterior, report, check; on a cluster; interrupted and resumed."""

import base64
import os
import re
import signal
import subprocess
import sys
import time
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import pavi_scale as ps

HERE = Path(__file__).parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(HERE.parent.parent), "OMP_NUM_THREADS": "1"}


def command(folder, *arguments):
    """The command in a process of its own."""
    call = [sys.executable, "-m", "pavi_scale.cli", *arguments]
    return subprocess.run(call, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def helpers():
    spec = spec_from_file_location("cli_helpers", HERE / "conftest.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, helpers):
    """A folder with a finished run, made by the command in a process of its own."""
    folder = tmp_path_factory.mktemp("fitted")
    helpers.fill(folder)
    done = command(folder, "fit", "study.yaml")
    assert done.returncode == 0, done.stderr
    assert "status: ok" in done.stdout
    return folder


@pytest.fixture
def here(fitted, monkeypatch):
    monkeypatch.chdir(fitted)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield fitted
    sys.modules.pop("toystudy", None)


def test_plan_tells_what_a_fit_takes_and_leaves_nothing(folder, run):
    code, out, err = run("plan", "study.yaml")
    assert (code, err) == (0, "")
    table = dict(line.split("  ", 1) for line in out.splitlines())
    assert table["latents in all"].strip() == "8"
    assert table["latent theta"].strip() == "6"
    assert any("memory" in what for what in table)
    assert any("disk" in what for what in table)
    assert any("passes" in what or "steps" in what for what in table)
    assert not (folder / "runs").exists()


def test_posterior_agrees_with_the_library(here, run):
    code, out, _ = run("posterior", "study.yaml")
    assert code == 0
    mean = ps.open_posterior("runs/toy").datatree["posterior_mean"]
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.startswith(("mu ", "sigma "))}
    assert set(rows) >= {"mu", "sigma"}
    assert "theta[" not in out
    code, out, _ = run("posterior", "study.yaml", "--sel", "group=g2")
    assert code == 0
    row = next(line.split() for line in out.splitlines() if line.startswith("theta[g2]"))
    assert float(row[1]) == pytest.approx(float(mean["theta"].sel(group="g2")), rel=1e-3)


@pytest.mark.parametrize(("selection", "words"), [("planet=3", "'planet=3'"), ("group=zz", "no unit of that label"), ("group", "plate=label")])
def test_wrong_selection(here, run, selection, words):
    code, _, err = run("posterior", "study.yaml", "--sel", selection)
    assert code == 2
    assert words in err


def test_check_finds_a_run_sound_and_a_flipped_bit(here, run, tmp_path):
    code, out, _ = run("check", "study.yaml")
    assert code == 0
    assert out.count("sound") == 3
    path = next(p for p in sorted((here / "runs/toy/posterior.zarr/posterior_mean/theta").rglob("*")) if p.is_file() and p.name != "zarr.json")
    before = path.read_bytes()
    try:
        path.write_bytes(before[:3] + bytes([before[3] ^ 1]) + before[4:])
        code, _, err = run("check", "study.yaml")
    finally:
        path.write_bytes(before)
    assert code == 2
    assert "damaged" in err


def test_a_second_fit_into_the_same_run_is_refused(here, run):
    code, _, err = run("fit", "study.yaml")
    assert code == 2
    assert "holds a run already" in err


def test_resume_of_a_finished_run_opens_it(here, run):
    code, out, _ = run("resume", "study.yaml")
    assert code == 0
    assert "status: ok" in out


def test_a_changed_model_is_refused(here, run):
    source = (here / "toystudy.py").read_text()
    try:
        (here / "toystudy.py").write_text(source.replace("Normal(theta, 0.5)", "Normal(theta, 0.25)"))
        sys.modules.pop("toystudy", None)
        code, _, err = run("posterior", "study.yaml")
    finally:
        (here / "toystudy.py").write_text(source)
        sys.modules.pop("toystudy", None)
    assert code == 2
    assert "model has changed" in err


def test_report_stands_alone(here, run):
    code, out, _ = run("report", "study.yaml", "--out", "page")
    assert code == 0
    assert "page/index.html" in out
    page = (here / "page/index.html").read_text()
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == page.count("<img ") >= 1
    assert all(base64.b64decode(p).startswith(b"\x89PNG") for p in pictures)
    assert "<script" not in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert all(word in page for word in ("sigma", "khat", "ok"))


def test_report_shows_coverage_where_the_truth_is_known(folder, run):
    sys.modules.pop("toystudy", None)
    given = xr.open_zarr(folder / "cohort.zarr", consolidated=False)[["obs_group"]].load()
    sys.path.insert(0, str(folder))
    model = import_module("toystudy").model
    ps.simulate(model, {"group": 6}, folder / "simulated.zarr", given=given)
    assert run("fit", "study.yaml", "--set", "cohort=simulated.zarr")[0] == 0
    assert run("report", "study.yaml", "--set", "cohort=simulated.zarr")[0] == 0
    page = (folder / "runs/toy/report/index.html").read_text()
    assert "Coverage of the truth" in page
    assert (folder / "runs/toy/report/calibration.png").exists()


@pytest.mark.cluster
def test_a_cluster_gives_the_same_numbers(fitted):
    (fitted / "local.yaml").write_text("{kind: local, workers: 2, threads: 1}\n")
    done = command(fitted, "fit", "study.yaml", "--cluster", "local.yaml", "--set", "run=runs/cluster")
    assert done.returncode == 0, done.stderr
    one, two = (ps.open_posterior(fitted / "runs" / name, model=None).datatree["posterior_mean"].dataset.load() for name in ("toy", "cluster"))
    for name in one.data_vars:
        np.testing.assert_allclose(one[name].values, two[name].values, rtol=1e-8)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_run_that_resumes(tmp_path, helpers, number):
    helpers.fill(tmp_path)
    helpers.make_cohort(groups=60_000, each=4).to_zarr(tmp_path / "large.zarr", zarr_format=3, consolidated=False)
    helpers.write(tmp_path / "study.yaml", cohort="large.zarr")
    arguments = [sys.executable, "-m", "pavi_scale.cli", "fit", "study.yaml"]
    process = subprocess.Popen(arguments, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 120
        while not (tmp_path / "runs/toy/study.json").exists():
            assert time.monotonic() < until
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(number)
        began = time.monotonic()
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75, err
    assert time.monotonic() - began < 30
    assert "interrupted" in err
    assert "Traceback" not in err
    resumed = command(tmp_path, "resume", "study.yaml")
    assert resumed.returncode == 0, resumed.stderr
    assert "status: ok" in resumed.stdout


def test_check_sbc_prints_a_table_keeps_it_and_exits_4_if_it_fails(folder, run):
    code, out, _ = run("check", "study.yaml", "--sbc", "--runs", "3", "--sizes", "group=3")
    assert code == 0
    assert all(word in out for word in ("p-value", "50 % covers", "90 % covers", "mu", "sigma", "theta", "3 simulations"))
    (path,) = (folder / "runs/toy/sbc").iterdir()
    kept = ps.SBC.open(path).to_dataset()
    # What is finished is taken up again: let it be finished and wrong.
    ranks = np.repeat(kept["rank"].values[:1] * 0, 40, axis=0)
    wrong = kept.drop_dims("simulation").assign(rank=(("simulation", "quantity"), ranks), status=("simulation", ["ok"] * 40))
    ps.SBC.from_dataset(wrong).save(path)
    code, out, _ = run("check", "study.yaml", "--sbc", "--runs", "40", "--sizes", "group=3")
    assert code == 4
    assert "not calibrated" in out
    # A fit into that folder is none the worse for it.
    assert run("fit", "study.yaml")[0] == 0


@pytest.mark.parametrize("sizes", ["group", "group=x", "obs=3", "group=0"])
def test_wrong_sizes_of_a_calibration(folder, run, sizes):
    code, _, err = run("check", "study.yaml", "--sbc", "--sizes", sizes)
    assert code == 2
    assert "size" in err or "plate" in err
