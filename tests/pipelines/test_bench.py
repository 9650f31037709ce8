"""The benchmark of rivals: its closed forms against joint Gaussians, when a curve holds its target, and the harness at tiny size."""

import ast
import importlib.util
import json
import math
import sys

import numpy as np
import pytest
import xarray as xr
from scipy.stats import multivariate_normal

from pipelines import gre
from pipelines.bench import curves, exact, flat, ours, rivals
from pipelines.bench.curves import Curve, Point
from pipelines.bench.meter import Job

SCALES = (1.0, 0.5, 1.3)
GROUPS, OBSERVATIONS, FEATURES = 4, 6, 3


@pytest.fixture(scope="module")
def x():
    return exact.simulate(GROUPS, OBSERVATIONS, FEATURES, 1, SCALES).astype(float)


def statistics(x):
    return exact.statistics(iter([x[:1], x[1:]]))


def prior_covariance(scales, groups):
    """Of one feature's (mu, theta_1 ... theta_G)."""
    s0, s1, _ = scales
    return s0**2 * np.ones((groups + 1, groups + 1)) + s1**2 * np.diag([0.0] + [1.0] * groups)


def joint_posterior(x, scales):
    """Mean `[D, 1 + G]` and covariance `[1 + G, 1 + G]` of (mu, theta) given x, by conditioning the joint Gaussian on every single observation."""
    groups, observations, _ = x.shape
    prior = prior_covariance(scales, groups)
    reads = np.repeat(np.eye(groups + 1)[1:], observations, axis=0)
    gain = prior @ reads.T @ np.linalg.inv(reads @ prior @ reads.T + scales[2] ** 2 * np.eye(len(reads)))
    return np.moveaxis(x, 2, 0).reshape(x.shape[2], -1) @ gain.T, prior - gain @ reads @ prior


def divergence(mean, cov, other_mean, other_cov):
    """KL(N(mean, cov) || N(other_mean, other_cov))."""
    inverse, off = np.linalg.inv(other_cov), other_mean - mean
    logs = np.linalg.slogdet(other_cov)[1] - np.linalg.slogdet(cov)[1]
    return 0.5 * (np.trace(inverse @ cov) + off @ inverse @ off - len(mean) + logs)


def test_evidence_of_statistics_is_the_joint_gaussian_s(x):
    covariance = np.kron(prior_covariance(SCALES, GROUPS)[1:, 1:], np.ones((OBSERVATIONS, OBSERVATIONS))) + SCALES[2] ** 2 * np.eye(GROUPS * OBSERVATIONS)
    truth = sum(multivariate_normal(np.zeros(len(covariance)), covariance).logpdf(column) for column in x.reshape(-1, FEATURES).T)
    assert exact.log_evidence(statistics(x), SCALES) == pytest.approx(truth, abs=1e-9)


def test_mu_posterior_is_the_joint_gaussian_s(x):
    mean, sd = exact.mu_posterior(statistics(x), SCALES)
    all_mean, cov = joint_posterior(x, SCALES)
    np.testing.assert_allclose(mean, all_mean[:, 0], rtol=1e-10)
    assert sd == pytest.approx(math.sqrt(cov[0, 0]), rel=1e-10)


def guide(mean, cov):
    """The same Gaussian `cov` for every feature, as (mu, theta) moments."""
    variance = np.diagonal(cov)
    each = np.ones(FEATURES)
    return exact.GaussianGuide(mean[:, 0], variance[0] * each, mean[:, 1:].T, np.outer(variance[1:], each), np.outer(cov[0, 1:], each))


def test_the_exact_posterior_has_no_gap(x):
    q = guide(*joint_posterior(x, SCALES))
    assert exact.gap(q, x.mean(1), statistics(x), SCALES) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("coupled", [False, True])
def test_gap_is_the_divergence_from_the_posterior(x, coupled):
    mean, cov = joint_posterior(x, SCALES)
    rng = np.random.default_rng(0)
    wrong_mean = mean + 0.1 * rng.normal(size=mean.shape)
    slope = 0.3 * rng.normal(size=GROUPS) if coupled else np.zeros(GROUPS)
    # theta_g = slope_g mu + noise: given mu, all theta are independent.
    lower = np.eye(GROUPS + 1)
    lower[1:, 0] = slope
    wrong_cov = lower @ np.diag(rng.uniform(0.02, 0.2, GROUPS + 1)) @ lower.T
    truth = sum(divergence(wrong_mean[d], wrong_cov, mean[d], cov) for d in range(FEATURES)) / (FEATURES * (GROUPS + 1))
    assert truth > 0.01
    assert exact.gap(guide(wrong_mean, wrong_cov), x.mean(1), statistics(x), SCALES) == pytest.approx(truth, rel=1e-9)


def test_gap_of_a_full_covariance(x):
    mean, cov = joint_posterior(x, SCALES)
    size = FEATURES * (GROUPS + 1)
    rng = np.random.default_rng(1)
    chol = np.tril(0.05 * rng.normal(size=(size, size)), -1) + np.diag(rng.uniform(0.1, 0.3, size))
    loc = rng.normal(size=size)
    # The posterior over (mu_1 ... mu_D, theta_11 ... theta_GD): features are independent.
    truth = divergence(loc, chol @ chol.T, mean.T.ravel(), np.kron(cov, np.eye(FEATURES))) / size
    assert exact.gap(exact.from_cholesky(loc, chol, FEATURES), x.mean(1), statistics(x), SCALES) == pytest.approx(truth, rel=1e-9)


def test_store_is_read_in_parts(tmp_path, x, monkeypatch):
    exact.save(x.astype("f4"), str(tmp_path / "c.zarr"))
    monkeypatch.setattr(exact, "BLOCK_BYTES", 8 * OBSERVATIONS * FEATURES * 3)
    found = exact.statistics(exact.blocks(str(tmp_path / "c.zarr")))
    assert len(list(exact.blocks(str(tmp_path / "c.zarr")))) == 2
    assert (found.groups, found.observations, found.latents) == (GROUPS, OBSERVATIONS, FEATURES * (GROUPS + 1))
    cohort = xr.open_zarr(tmp_path / "c.zarr", consolidated=False)
    assert exact.log_evidence(found, SCALES) == pytest.approx(gre.log_evidence(cohort, SCALES), abs=1e-9)


def test_the_hand_written_rival_has_the_same_data_and_evidence(shared):
    """Its functions, without the libraries that its module imports."""
    script = shared / "rivals" / "gre_numpyro.py"
    if not script.is_file():
        pytest.skip(f"there is no {script}")
    tree = ast.parse(script.read_text())
    wanted = {"simulate", "sufficient", "log_evidence"}
    tree.body = [n for n in tree.body if isinstance(n, ast.Assign) or (isinstance(n, ast.FunctionDef) and n.name in wanted)]
    theirs = {"np": np}
    exec(compile(tree, str(script), "exec"), theirs)
    scales = (theirs["S0"], theirs["S1"], theirs["SX"])
    assert scales == rivals.SCALES
    data = theirs["simulate"](7, 5, 3, 4)
    np.testing.assert_array_equal(data, exact.simulate(7, 5, 3, 4, scales))
    assert theirs["log_evidence"](*theirs["sufficient"](data)) == pytest.approx(exact.log_evidence(statistics(data.astype(float)), scales), abs=1e-4)


@pytest.mark.parametrize(
    ("gaps", "held"),
    [
        ([0.1, 0.001, 0.0005], 2.0),
        ([0.1, 0.001, 0.01, 0.001], 4.0),
        ([0.1, 0.001, 0.003], None),
        ([0.001], 1.0),
        ([0.1, -0.5, 0.001], 3.0),
        ([0.001, math.nan], None),
        ([], None),
    ],
)
def test_held_is_for_good(gaps, held):
    assert Curve("a", 1, {}, tuple(Point(float(t), g) for t, g in enumerate(gaps, 1))).held == held


def test_the_best_settings_are_the_first_to_hold():
    slow, fast, never, empty = (Curve("a", 1, {}, tuple(Point(t, g) for t, g in p)) for p in ([(3.0, 0.001)], [(2.0, 0.001)], [(1.0, 0.01)], []))
    assert curves.best([slow, fast, never, empty]) is fast
    assert curves.best([never, empty]) is never
    assert curves.best([empty]) is None


def test_ratio_is_to_the_best_of_the_rival():
    found = [
        Curve(rivals.OURS, 9, {}, (Point(1.0, 0.0),)),
        Curve(rivals.EXPERT, 9, {}, (Point(5.0, 0.001),)),
        Curve(rivals.EXPERT, 9, {}, (Point(1.5, 0.001),)),
        Curve(rivals.AUTONORMAL, 9, {}, (Point(100.0, 0.5),)),
    ]
    expert, normal = rivals.ratios(found, 9)
    assert "0.6667" in expert
    assert "NOT met" in expert
    assert "not known" in normal
    assert "100" in normal


def test_root_gap_is_that_of_a_guide_with_exact_locals(x):
    mean, cov = joint_posterior(x, SCALES)
    loc, sd = mean[:, 0] + 0.1, 1.3 * math.sqrt(cov[0, 0])
    # theta_g = E[theta_g | mu] + noise of its exact variance, on another mu.
    slope, given = cov[1:, 0] / cov[0, 0], cov[1:, 1:] - np.outer(cov[1:, 0], cov[0, 1:]) / cov[0, 0]
    lower = np.concatenate([[1.0], slope])
    other_cov = sd**2 * np.outer(lower, lower)
    other_cov[1:, 1:] += given
    truth = exact.gap(guide(mean + 0.1 * lower, other_cov), x.mean(1), statistics(x), SCALES)
    assert truth > 0.005
    assert exact.root_gap(loc, np.full(FEATURES, sd), statistics(x), SCALES) == pytest.approx(truth, rel=1e-9)


def test_curve_of_a_trace_with_a_clock(x):
    found = statistics(x)
    mean, sd = exact.mu_posterior(found, ours.SCALES)
    moments = {"root_loc": [mean + 1.0, mean], "root_sd": np.full((2, FEATURES), sd)}
    trace = xr.Dataset({"elbo": ("step", [1.0, 2.0, 3.0]), "seconds": ("step", [0.1, 0.2, 0.4]), "root_step": ("milestone", [0, 2])})
    trace = trace.assign({name: (("milestone", "root"), values) for name, values in moments.items()})
    first, last = ours.milestones(trace, found)
    assert (first["seconds"], last["seconds"]) == (0.1, 0.4)
    assert first["gap"] == pytest.approx(0.5 * FEATURES / sd**2 / found.latents)
    assert last["gap"] == pytest.approx(0.0, abs=1e-12)
    assert ours.milestones(trace.drop_vars("seconds"), found) == []


def test_a_contestant_stopped_at_the_limit_keeps_what_it_printed(tmp_path):
    program = (
        'import time; print(\'noise\'); print(\'{"seconds": 1.5, "gap_per_latent": 0.25, "standard_error": 0.0}\', flush=True);'
        "print('{\"seconds\": 2', end='', flush=True); time.sleep(600)"
    )
    job = Job(tmp_path, tmp_path, tmp_path, limit=2.0)
    curve = rivals.run(rivals.Contestant("a", 3, ("-c", program), ()), job)
    assert curve.points == (Point(1.5, 0.25),)
    assert curve.note == "stopped after 2 s"
    failed = rivals.run(rivals.Contestant("a", 3, ("-c", "raise ValueError('why')"), ()), job)
    assert (failed.points, failed.note) == ((), "failed: ValueError: why")


TINY = rivals.Grid(batches=(16,), rates=(1e-2,), steps=(20,), full_steps=(20,), warmup=20, checkpoints=2, small=20)


def test_the_harness_at_tiny_size(tmp_path, shared):
    """We hold the target; rivals that are not installed are named, those that are have curves."""
    work = tmp_path / "work"
    work.mkdir()
    found = rivals.rivals(Job(work, shared, tmp_path, groups=(40,), limit=120.0), TINY)
    assert {r["who"] for r in found.rows} | set(found.details["left_out"]) == {
        rivals.OURS, rivals.EXPERT, rivals.AUTONORMAL, rivals.MULTIVARIATE, rivals.PYRO, rivals.NUTS,
    }  # fmt: skip
    mine = [r for r in found.rows if r["who"] == rivals.OURS]
    assert [r["G"] for r in mine] == [40, 20]
    assert all(isinstance(r["s to 0.002"], float) for r in mine)
    lines = [json.loads(line) for line in (tmp_path / "rivals.jsonl").read_text().splitlines()]
    assert {line["who"] for line in lines} == {r["who"] for r in found.rows}
    assert all((tmp_path / f"rivals{which}.{kind}").stat().st_size > 1000 for which in ("", "-small") for kind in ("png", "svg"))


@pytest.mark.parametrize(
    ("who", "steps"), [(rivals.EXPERT, 600), (rivals.AUTONORMAL, 600), (rivals.MULTIVARIATE, 2000), (rivals.PYRO, 600), (rivals.NUTS, 600)]
)
def test_every_rival_comes_nearer_with_time(tmp_path, shared, who, steps):
    """Skipped where its library is absent. A full covariance has more to learn."""
    grid = rivals.Grid(batches=(16,), rates=(3e-2,), steps=(steps,), full_steps=(steps,), warmup=200, checkpoints=6, small=20)
    job = Job(tmp_path, shared, tmp_path, limit=200.0)
    chosen = next(c for c in rivals.contestants(job, 20, grid) if c.who == who)
    if gone := rivals.missing(chosen.needs):
        pytest.skip(f"not installed: {gone}")
    curve = rivals.run(chosen, job)
    assert not curve.note
    assert len(curve.points) == 6
    assert curve.points[-1].gap > -1e-3
    assert curve.points[-1].gap < 0.2
    assert curve.points[-1].gap < curve.points[0].gap


def test_flat_cost_at_two_sizes(tmp_path):
    found = flat.flat(Job(tmp_path, tmp_path, tmp_path, groups=(30, 60)))
    assert [r["G"] for r in found.rows] == [30, 60]
    for r in found.rows:
        assert isinstance(r["s to 0.002"], float)
        assert r["mu shift (sd)"] < 0.1
        assert r["mu sd ratio"] == pytest.approx(1.0, abs=0.05)
    assert found.rows[0]["x"] == 1.0
    assert not list(tmp_path.glob("*.zarr"))
    assert not list(tmp_path.glob("*-run"))


def test_flat_cost_asks_for_disk(tmp_path):
    assert "disk wanted" in flat.one(Job(tmp_path, tmp_path, tmp_path), 10**13)["error"]


def test_modules_of_rivals_are_scripts_apart():
    """Nothing of the harness imports them: it works without their libraries."""
    for name in ("rival_mixture", "rival_numpyro", "rival_pyro"):
        assert f"pipelines.bench.{name}" not in sys.modules
        assert importlib.util.find_spec(f"pipelines.bench.{name}") is not None
