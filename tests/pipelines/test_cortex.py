"""The cortical study in other packages: their bound against brute force, their judge and their keeper, and the harness at tiny size."""

import argparse
import json
import math
import os
import subprocess
import sys

import numpy as np
import psutil
import pytest
import xarray as xr
from scipy import stats
from scipy.special import log_softmax, logsumexp

from pavi_scale.errors import PlanRefused
from pipelines.bench import command, cortex, rival_cortex
from pipelines.bench.meter import Job
from pipelines.hcp import figures, make_cohort, quality, study

SUBJECTS, VERTICES, FEATURES = 3, 60, 8
RIVALS = ("numpyro", "pyro", "pymc")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("cortex") / "c.zarr")
    make_cohort(path, subjects=SUBJECTS, vertices=VERTICES, features=FEATURES, seed=1)
    return path


@pytest.fixture(scope="module")
def truth(store):
    return xr.open_zarr(store, group="truth", consolidated=False).load()


@pytest.fixture(scope="module")
def begin(store):
    return rival_cortex.start(rival_cortex.load(store))


def test_the_model_s_numbers_are_the_study_s():
    assert (rival_cortex.NETWORKS, rival_cortex.LOGIT_SCALE) == (study.NETWORKS, study.LOGIT_SCALE)


def test_latents_are_counted():
    full = {"subject": 1000, "session": 2, "vertex": 59_412, "feature": 32}
    assert cortex.Cohort("", full).latents == 416_972_123
    assert cortex.Cohort("", full).share == 1.0


def test_a_cohort_is_held_once_in_float32(store):
    data = rival_cortex.load(store)
    assert (data.x.dtype, data.square.dtype) == (np.float32, np.float32)
    np.testing.assert_allclose(data.square, (data.x.astype(float) ** 2).sum(-1), rtol=1e-5)
    assert cortex.cohort_at(store).sizes == {"subject": SUBJECTS, "session": 2, "vertex": VERTICES, "feature": FEATURES}
    assert data.shapes["label_logits"] == (SUBJECTS, VERTICES, study.NETWORKS)


def test_training_begins_near_the_truth(tmp_path):
    """Fingerprints of well separated networks; logits that count the labels as those do who know every session's fingerprints."""
    path = str(tmp_path / "c.zarr")
    make_cohort(path, subjects=5, vertices=300, features=32, seed=2)
    true = xr.open_zarr(path, group="truth", consolidated=False).load()
    data = rival_cortex.load(path)
    begin = rival_cortex.start(data)
    assert all(value.dtype == np.float32 and np.isfinite(value).all() for value in begin.values())
    order = figures.match(begin["mu"], true["mu"].values)
    np.testing.assert_allclose(begin["mu"][order], true["mu"].values, atol=0.6)
    label = ((data.x[:, :, :, None] - true["mu_session"].values[:, :, None]) ** 2).sum(-1).argmin(-1)
    logs = np.log(1 + (label[..., None] == np.arange(study.NETWORKS)).sum((0, 1)))
    assert np.mean(np.abs(begin["rho"][:, order] - (logs - logs.mean(-1, keepdims=True))) < 1e-6) > 0.95
    assert float(begin["kappa"]) == pytest.approx(1.0, abs=0.05)
    np.testing.assert_array_equal(begin["label_logits"], np.broadcast_to(begin["rho"], begin["label_logits"].shape))
    np.testing.assert_array_equal(begin["mu_session"], np.broadcast_to(begin["mu"], begin["mu_session"].shape))


def log_joint(z, x):
    """Log density of the study at one point, from scipy's laws; logarithms are the coordinates of what is positive."""
    mu, eps, sigma, kappa = z["mu"], z["eps"], z["sigma"], z["kappa"]
    total = stats.norm.logpdf(mu).sum() + stats.norm.logpdf(z["rho"], 0, study.LOGIT_SCALE).sum() + stats.norm.logpdf(z["label_logits"], z["rho"], 1).sum()
    total += stats.halfnorm.logpdf(np.stack([eps, sigma]), scale=0.5).sum() + stats.lognorm.logpdf(kappa, 1.0) + np.log(np.concatenate([eps, sigma])).sum()
    total += np.log(kappa) + stats.norm.logpdf(z["mu_subject"], mu, eps[:, None]).sum()
    total += stats.norm.logpdf(z["mu_session"], z["mu_subject"][:, None], sigma[:, None]).sum()
    each = stats.norm.logpdf(x[:, :, :, None], z["mu_session"][:, :, None], kappa).sum(-1)  # subject, session, vertex, network
    return total + logsumexp(log_softmax(z["label_logits"], -1)[:, None] + each, -1).sum()


@pytest.fixture(scope="module")
def first_bounds(store, begin):
    """Bound of the guide with which training begins: mean and standard error over draws, by brute force."""
    rng, x, logs = np.random.default_rng(0), rival_cortex.load(store).x.astype(float), {"eps", "sigma", "kappa"}
    scalars = sum(value.size for value in begin.values())
    entropy = scalars * (0.5 * math.log(2 * math.pi * math.e) + math.log(rival_cortex.SCALE))
    values = []
    for _ in range(100):
        noise = {name: rival_cortex.SCALE * rng.standard_normal(value.shape) for name, value in begin.items()}
        values.append(log_joint({n: v * np.exp(noise[n]) if n in logs else v + noise[n] for n, v in begin.items()}, x))
    return np.mean(values) + entropy, np.std(values)


def rival(who, store, *options):
    """What a rival printed."""
    if gone := cortex.missing(cortex.NEEDS[who]):
        pytest.skip(f"not installed: {gone}")
    # To compile this little takes longer than Python needs for it.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTENSOR_FLAGS": "linker=py,optimizer=fast_compile", "PYTHONPATH": os.pathsep.join(sys.path)}
    program = [sys.executable, "-W", "ignore", "-m", f"pipelines.bench.rival_cortex_{who}", "--cohort", store, *options]
    done = subprocess.run(program, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    *points, last = cortex.lines(done.stdout)
    return points, last


@pytest.mark.parametrize("who", RIVALS)
def test_a_rival_s_bound_is_that_of_the_model(store, who, first_bounds):
    """At rate zero the guide stays where it begins."""
    points, last = rival(who, store, "--steps", "100", "--every", "50", "--lr", "0")
    mean, sd = first_bounds
    assert last["outcome"] == "ended"
    assert [p["step"] for p in points] == [50, 100]
    assert np.mean([p["bound"] for p in points]) == pytest.approx(mean, abs=5 * sd * math.sqrt(2 / 100))


@pytest.mark.parametrize("who", RIVALS)
def test_a_rival_learns(store, who):
    points, last = rival(who, store, "--steps", "200", "--every", "100")
    assert points[1]["bound"] > points[0]["bound"] + 100
    assert points[1]["seconds"] > points[0]["seconds"] > 0
    assert last["quality"]["right labels"] > 0.5
    assert 0.2 < last["quality"]["label_logits, 90 % intervals hold"] < 1
    assert 0.05 < last["peak_gib"] < 4


def test_a_rival_stops_at_its_limit(capsys, monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr(rival_cortex.time, "perf_counter", lambda: float(next(ticks)))  # a block takes one second
    args = argparse.Namespace(steps=100, every=10, limit=2.0)
    assert rival_cortex.train(lambda step: -1.0, args) == "stopped after 2 s"
    assert [line["step"] for line in cortex.lines(capsys.readouterr().out)] == [10, 20]
    assert rival_cortex.train(lambda step: math.nan, args) == "not finite after 10 steps"
    assert rival_cortex.train(lambda step: -1.0, argparse.Namespace(steps=25, every=10, limit=60.0)) == "ended"


def test_the_rate_decays_to_zero():
    assert rival_cortex.rate(0, 0.1, 100) == 0.1
    assert rival_cortex.rate(50, 0.1, 100) == pytest.approx(0.05)
    assert rival_cortex.rate(100, 0.1, 100) == 0.0


def test_the_judge_renumbers_networks(store, truth):
    """The truth itself is always right, whatever its networks' numbers; far from it nothing is."""
    order = np.random.default_rng(0).permutation(study.NETWORKS)
    true = {name: truth[name].isel(network=order).transpose(*dims).values for name, dims in rival_cortex.DIMS.items()}
    sd = {name: np.full_like(value, 0.1) for name, value in true.items()}
    found = rival_cortex.judge(store, true, sd)
    assert found["right labels"] == 1.0
    assert all(found[f"{name}, {level} intervals hold"] == 1.0 for name in rival_cortex.DIMS for level in quality.LEVELS)
    off = rival_cortex.judge(store, {name: value + 0.1 for name, value in true.items()}, sd)  # one standard deviation
    assert (off["rho, 50 % intervals hold"], off["rho, 90 % intervals hold"]) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("bounds", "held"),
    [
        ([-2000.0, -1000.0, -999.95], 3.0),
        ([-2000.0, -1000.0, -999.0], None),
        ([-1000.0], None),
        ([], None),
        ([-5.0, 5.0, 5.0], 3.0),
        ([-1.0, math.nan, math.nan], None),
    ],
)
def test_when_a_bound_has_settled(bounds, held):
    """A checkpoint a second, of 100 steps; in pieces of 10 steps it is the same, at the same second."""
    coarse = [{"step": 100 * k, "seconds": float(k), "bound": b} for k, b in enumerate(bounds, 1)]
    assert cortex.settled(coarse, 100) == held
    fine = [p | {"seconds": p["seconds"] - 1 + 0.1 * (k + 1)} for p in coarse for k in range(10)]
    assert cortex.settled(fine, 10) == (None if held is None else pytest.approx(held, abs=0.5))


PRINT = "import subprocess, sys, time; print('noise'); print('{\"step\": 10, \"seconds\": 1.5, \"bound\": -2.0}', flush=True);"
CHILD = "subprocess.Popen([sys.executable, '-c', 'import time; held = bytearray(300 * 2**20); time.sleep(60)']); time.sleep(60)"


def test_a_process_and_its_children_are_stopped_above_the_memory(tmp_path):
    run = cortex.watched([sys.executable, "-c", PRINT + CHILD], tmp_path / "out.txt", 60.0, 0.2)
    assert run.outcome == "out of memory at 0.2 GiB"
    assert run.peak_gib > 0.2
    assert run.points == [{"step": 10, "seconds": 1.5, "bound": -2.0}]
    assert not [p for p in psutil.Process().children(recursive=True) if "held" in " ".join(p.cmdline())]


def test_a_process_is_stopped_after_its_time(tmp_path):
    run = cortex.watched([sys.executable, "-c", PRINT + "time.sleep(60)"], tmp_path / "out.txt", 1.0, 16.0)
    assert (run.outcome, run.last, len(run.points)) == ("stopped after 1 s", {}, 1)


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        ("raise ValueError('why')", "failed: ValueError: why"),
        ("raise MemoryError", "out of memory at"),
        ("import os; os.kill(os.getpid(), 9)", "out of memory at"),
        ("import os; os._exit(3)", "failed: exit code 3"),
        ("print('{\"outcome\": \"ended\", \"peak_gib\": 1.5}')", "ended"),
    ],
)
def test_how_a_process_ended(tmp_path, code, outcome):
    assert cortex.watched([sys.executable, "-c", code], tmp_path / "out.txt", 60.0, 16.0).outcome.startswith(outcome)


def test_the_step_is_measured_only_when_named():
    assert "cortex" not in command.wanted(None)
    assert command.wanted(["cortex"]) == ["cortex"]


def test_the_command_line_reaches_the_measurement(tmp_path, monkeypatch):
    said = ["--cohorts", "a.zarr", "10%", "--who", "pyro", "--steps", "7", "--rates", "0.1", "0.2", "--memory", "3.5", "--limit", "9"]
    args = command.options().parse_args(said)
    job = command.job_of(args, tmp_path, tmp_path)
    assert (job.cohorts, job.who, job.steps, job.rates, job.memory, job.limit) == (("a.zarr", "10%"), ("pyro",), 7, (0.1, 0.2), 3.5, 9.0)
    passed = []
    monkeypatch.setattr(command.subprocess, "run", lambda line, **_: passed.extend(line) or subprocess.CompletedProcess(line, 1, stderr=""))
    command.measure_apart("cortex", job)
    assert command.job_of(command.options().parse_args(passed[5:]), tmp_path, tmp_path) == job


def test_a_share_is_simulated_once(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(cortex, "make_cohort", lambda path, subjects: calls.append(subjects) or make_cohort(path, 1, 20, features=2))
    job = Job(tmp_path, tmp_path, tmp_path)
    assert cortex.provide("1%", job) == cortex.provide("1%", job)
    assert calls == [10]


def test_the_harness_at_tiny_size(store, tmp_path, monkeypatch):
    """Rows and checkpoints are kept as they come; a cohort for which there is no room is named."""
    last = {"outcome": "ended", "peak_gib": 1.0, "quality": {"right labels": 0.75}}

    def refuse(path, subjects):
        raise PlanRefused("the store does not fit on the disk")

    def run(command, printed, seconds, gib):
        mine = any("ours" in part for part in command)
        points = [] if mine else [{"step": 10 * k, "seconds": 0.5 * k, "bound": -4510.0} for k in range(1, 31)]
        return cortex.Run("ended", 1.0, points, last | ({"seconds": 20.0, "bound": -4500.0} if mine else {}))

    monkeypatch.setattr(cortex, "make_cohort", refuse)
    monkeypatch.setattr(cortex, "watched", run)
    monkeypatch.setattr(cortex, "missing", lambda needs: ["pyro"] if "pyro" in needs else [])
    found = cortex.cortex(Job(tmp_path, tmp_path, tmp_path / "results", cohorts=(store, "100%"), rates=(0.1, 0.2)))
    assert [r["software"] for r in found.rows] == ["ours", *[cortex.NAMES["numpyro"]] * 2, *[cortex.NAMES["pymc"]] * 2]
    assert all(list(r) == list(found.rows[0]) for r in found.rows)
    ours, first = found.rows[:2]
    assert (ours["subjects"], ours["latents"], ours["s"], ours["s to settle"]) == ("0.3 %", 2255, 20.0, 20.0)
    assert (first["lr"], first["s/step"], first["s"], first["s to settle"]) == (0.1, 0.05, 15.0, 10.0)
    assert first["bound/latent"] == -2.0
    assert first["right labels"] == 0.75
    assert any("does not fit" in note for note in found.notes)
    assert "pyro" in found.details["left_out"]
    assert len((tmp_path / "results" / "cortex-rows.jsonl").read_text().splitlines()) == 5
    assert len((tmp_path / "results" / "cortex.jsonl").read_text().splitlines()) == 4 * 30


def test_ours_is_judged_by_the_same(store, tmp_path):
    job = Job(tmp_path, tmp_path, tmp_path, cohorts=(store,), who=("ours",))
    (found,) = cortex.cortex(job).rows
    assert found["outcome"].startswith("ended, status ")
    assert found["right labels"] > 0.5
    assert isinstance(found["50 % hold"], float)
    assert found["s to settle"] == found["s"] > 0
    assert found["+-"] > 0
    assert not (tmp_path / "cortex-run").exists()
    assert json.loads((tmp_path / "cortex-rows.jsonl").read_text())["software"] == "ours"


def test_modules_of_rivals_are_scripts_apart():
    """Nothing of the harness imports them: it works without their libraries."""
    assert not [f"pipelines.bench.rival_cortex_{who}" for who in RIVALS if f"pipelines.bench.rival_cortex_{who}" in sys.modules]
