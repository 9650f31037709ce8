"""Runs: seeds, encodings, interruption and resumption, workers, stores, limits, status."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from distributed import Client, LocalCluster
from torch.distributions import Bernoulli, Categorical, HalfNormal, MixtureSameFamily, Normal

import pavi_scale as ps
from pavi_scale.errors import InputError, Interrupted

ROOT = Path(__file__).resolve().parents[2]


def logistic():
    """Bernoulli groups with an unknown scale: no closed form, so that training does something."""
    rng = np.random.default_rng(8)
    g = np.repeat(np.arange(12), rng.integers(2, 9, 12))
    y = (rng.random(g.size) < 1 / (1 + np.exp(-(0.3 + rng.normal(0, 1.0, 12))[g]))).astype(int)
    model = ps.Model(
        ps.Plate("g"),
        ps.Plate("i", within="g"),
        mu=ps.latent(lambda: Normal(0.0, 2.0)),
        sigma=ps.latent(lambda: HalfNormal(1.0)),
        theta=ps.latent(lambda mu, sigma: Normal(mu, sigma), plates="g"),
        y=ps.observed(lambda theta: Bernoulli(logits=theta), plates="i"),
    )
    return model, xr.Dataset({"y": ("i", y), "g_of": ("i", g, {"instance_dimension": "g"})})


def numbers(posterior):
    tree = posterior.datatree
    return {n: tree["posterior"][n].isel(draw=slice(0, 20)).values for n in tree["posterior"].data_vars} | {
        f"mean {n}": tree["posterior_mean"][n].values for n in tree["posterior_mean"].data_vars
    }


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[n], b[n]) for n in a)


def test_seeds(tmp_path):
    model, cohort = logistic()
    first, again, other = (numbers(ps.fit(model, cohort, run=tmp_path / str(i), seed=s)) for i, s in enumerate((3, 3, 4)))
    assert same(first, again)
    assert not np.array_equal(first["theta"], other["theta"])


def test_without_a_run_path():
    model, cohort = logistic()
    posterior = ps.fit(model, cohort, seed=0)
    assert np.isfinite(posterior.datatree["posterior_mean"]["theta"].values).all()


def test_a_store_gives_the_same_as_memory(tmp_path):
    model, cohort = logistic()
    cohort.to_zarr(tmp_path / "c.zarr", zarr_format=3)
    runs = [ps.fit(model, source, run=tmp_path / f"run{i}", seed=1) for i, source in enumerate((cohort, str(tmp_path / "c.zarr"), tmp_path / "c.zarr"))]
    assert same(numbers(runs[0]), numbers(runs[1]))
    assert same(numbers(runs[1]), numbers(runs[2]))


def test_fit_ignores_variables_named_like_latents(tmp_path):
    model, cohort = logistic()
    spoilt = cohort.assign(theta=("g", np.full(12, 1e3)), mu=7.0)
    assert same(numbers(ps.fit(model, cohort, run=tmp_path / "a")), numbers(ps.fit(model, spoilt, run=tmp_path / "b")))


@pytest.mark.parametrize("encoding", ["free", "encoder", "hybrid", {"g": "free"}, {"g": "encoder"}, {"g": "hybrid"}, {("g",): "free"}], ids=str)
def test_encodings(encoding, tmp_path, misses):
    model, cohort = logistic()
    auto = ps.fit(model, cohort, run=tmp_path / "auto").datatree
    truth = {n: (auto["posterior_mean"][n].values, auto["posterior_sd"][n].values) for n in ("mu", "sigma", "theta")}
    posterior = ps.fit(model, cohort, run=tmp_path / "run", encoding=encoding)
    assert not misses(posterior, truth)
    assert posterior.status == "ok"


def test_progress_goes_to_the_terminal(tmp_path, capfd):
    model, cohort = logistic()
    ps.fit(model, cohort, run=tmp_path / "quiet", progress=False)
    quiet = "".join(capfd.readouterr())
    ps.fit(model, cohort, run=tmp_path / "loud", progress=True)
    loud = "".join(capfd.readouterr())
    assert quiet == ""
    assert "elbo" in loud.lower()


def test_no_time_is_not_ok(tmp_path):
    model, cohort = logistic()
    start = time.perf_counter()
    try:
        posterior = ps.fit(model, cohort, run=tmp_path / "run", max_time=1e-3)
    except Interrupted:
        return
    assert posterior.status in {"unconverged", "unreliable"}
    assert time.perf_counter() - start < 20


def test_multimodal_trap_is_not_ok(tmp_path):
    """Two far modes that no single Gaussian-like guide holds: the square of a location is observed."""
    y = np.full(10, 9.0)
    model = ps.Model(ps.Plate("i"), a=ps.latent(lambda: Normal(0.0, 5.0)), y=ps.observed(lambda a: Normal(a**2, 0.5), plates="i"))
    posterior = ps.fit(model, xr.Dataset({"y": ("i", y)}), run=tmp_path / "run")
    draws = posterior.datatree["posterior"]["a"].values
    both = 0.2 < (draws > 0).mean() < 0.8
    assert both or posterior.status != "ok"


def test_multimodal_local_is_not_ok(tmp_path):
    y = np.full((5, 10), 9.0)
    model = ps.Model(
        ps.Plate("g"),
        ps.Plate("i"),
        s=ps.latent(lambda: HalfNormal(1.0)),
        a=ps.latent(lambda: Normal(0.0, 5.0), plates="g"),
        y=ps.observed(lambda a, s: Normal(a**2, s), plates=("g", "i")),
    )
    posterior = ps.fit(model, xr.Dataset({"y": (("g", "i"), y + np.random.default_rng(0).normal(size=y.shape))}), run=tmp_path / "run")
    share = (posterior.datatree["posterior"]["a"].values > 0).mean((0, 1))
    assert ((share > 0.2) & (share < 0.8)).all() or posterior.status != "ok"


def test_mixture_centres_are_found(tmp_path):
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(-3, 0.5, 30), rng.normal(3, 0.5, 30)])
    model = ps.Model(
        ps.Plate("i"),
        sizes={"k": 2},
        m=ps.latent(lambda: Normal(0.0, 4.0), dims="k"),
        x=ps.observed(lambda m: MixtureSameFamily(Categorical(logits=torch.zeros(2)), Normal(m, 0.5)), plates="i"),
    )
    posterior = ps.fit(model, xr.Dataset({"x": ("i", x)}), run=tmp_path / "run")
    m = np.sort(posterior.datatree["posterior"]["m"].values[0], -1)
    assert np.abs(np.median(m, 0) - [x[:30].mean(), x[30:].mean()]).max() < 0.3


def test_from_table():
    frame = pd.DataFrame({"county": ["b", "a", "b", "c"], "u": [1.0, 2.0, 1.0, 3.0], "y": [0.1, 0.2, 0.3, 0.4]}, index=[7, 5, 3, 1])
    cohort = ps.from_table(frame, plate="house", within={"county": ["u"]})
    assert cohort["county"].values.tolist() == ["a", "b", "c"]
    assert cohort["u"].dims == ("county",)
    assert cohort["u"].values.tolist() == [2.0, 1.0, 3.0]
    assert cohort["y"].dims == ("house",)
    assert cohort["y"].values.tolist() == [0.1, 0.2, 0.3, 0.4]
    (index,) = [v for v in cohort.variables.values() if v.attrs.get("instance_dimension") == "county"]
    assert index.values.tolist() == [1, 0, 1, 2]
    frame.loc[3, "u"] = 9.0
    with pytest.raises(InputError):
        ps.from_table(frame, plate="house", within={"county": ["u"]})
    for bad in ({"nowhere": []}, {"county": ["nothing"]}):
        with pytest.raises(InputError):
            ps.from_table(frame, plate="house", within=bad)


def test_from_table_crossed(tmp_path):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"student": rng.choice(list("xyz"), 30), "lecturer": rng.integers(10, 14, 30), "score": rng.normal(size=30)})
    cohort = ps.from_table(frame, plate="rating", within={"student": [], "lecturer": []})
    model = ps.Model(
        ps.Plate("student"),
        ps.Plate("lecturer"),
        ps.Plate("rating", within=("student", "lecturer")),
        s=ps.latent(lambda: HalfNormal(1.0)),
        a=ps.latent(lambda: Normal(0.0, 1.0), plates="student"),
        b=ps.latent(lambda: Normal(0.0, 1.0), plates="lecturer"),
        score=ps.observed(lambda a, b, s: Normal(a + b, s), plates="rating"),
    )
    tree = ps.fit(model, cohort, run=tmp_path / "run").datatree
    assert tree["posterior_mean"]["student"].values.tolist() == ["x", "y", "z"]
    assert tree["posterior_mean"]["lecturer"].values.tolist() == sorted(set(frame["lecturer"]))


def test_simulation_in_memory_and_out_of_core(tmp_path):
    model, _ = logistic()
    given = xr.Dataset({"g_of": ("i", np.repeat(np.arange(5), 4), {"instance_dimension": "g"})})
    one = model.sample({"g": 5, "i": 20}, given=given, seed=3)
    assert {"mu", "sigma", "theta", "y"} <= set(one)
    assert one["theta"].dims == ("g",)
    assert one["y"].dims == ("i",)
    xr.testing.assert_equal(one, model.sample({"g": 5, "i": 20}, given=given, seed=3))
    assert float(one["mu"]) != float(model.sample({"g": 5, "i": 20}, given=given, seed=4)["mu"])
    ps.simulate(model, {"g": 5, "i": 20}, tmp_path / "s.zarr", given=given, seed=3)
    stored, truth = xr.open_zarr(tmp_path / "s.zarr"), xr.open_zarr(tmp_path / "s.zarr", group="truth")
    assert "y" in stored
    assert "theta" not in stored
    assert {"mu", "sigma", "theta"} <= set(truth)
    ps.fit(model, one, run=tmp_path / "a")
    ps.fit(model, tmp_path / "s.zarr", run=tmp_path / "b")


def test_simulated_moments():
    model = ps.Model(
        ps.Plate("g"),
        ps.Plate("i"),
        m=ps.latent(lambda: Normal(2.0, 0.001)),
        t=ps.latent(lambda m: Normal(m, 1.0), plates="g"),
        x=ps.observed(lambda t: Normal(t, 2.0), plates=("g", "i")),
    )
    data = model.sample({"g": 4000, "i": 5}, seed=0)
    residual = data["x"] - data["t"]
    assert abs(float(data["t"].mean()) - 2) < 0.08
    assert abs(float(data["t"].std()) - 1) < 0.05
    assert abs(float(residual.std()) - 2) < 0.05
    assert abs(float(np.corrcoef(residual[:, 0], residual[:, 1])[0, 1])) < 0.07


CHILD = """
import sys
sys.path.insert(0, {root!r})
import numpy as np, xarray as xr
import pavi_scale as ps
from torch.distributions import Bernoulli, HalfNormal, Normal

model = ps.Model(
    ps.Plate("g"),
    ps.Plate("i", within="g"),
    mu=ps.latent(lambda: Normal(0.0, 2.0)),
    sigma=ps.latent(lambda: HalfNormal(1.0)),
    theta=ps.latent(lambda mu, sigma: Normal(mu, sigma), plates="g"),
    y=ps.observed(lambda theta: Bernoulli(logits=theta), plates="i"),
)
if __name__ == "__main__":
    rng = np.random.default_rng(8)
    g = np.repeat(np.arange(400), 5)
    y = (rng.random(g.size) < 1 / (1 + np.exp(-(0.3 + rng.normal(0, 1.0, 400))[g]))).astype(int)
    cohort = xr.Dataset({{"y": ("i", y), "g_of": ("i", g, {{"instance_dimension": "g"}})}})
    fit = ps.fit  # what it takes is imported now
    print("go", flush=True)
    fit(model, cohort, run=sys.argv[1], seed=0, progress=False)
    print("done", flush=True)
"""


@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT", "SIGTERM"])
def test_resume_after_a_signal(name, tmp_path):
    """Whenever the signal comes, the run is resumed to the undisturbed numbers, or says that it had not begun."""
    script = tmp_path / "study.py"
    script.write_text(CHILD.format(root=str(ROOT)))
    start = time.perf_counter()
    out = subprocess.run([sys.executable, str(script), str(tmp_path / "whole")], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr[-2000:]
    seconds = time.perf_counter() - start
    child = subprocess.Popen([sys.executable, str(script), str(tmp_path / "cut")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout.readline().strip() == "go"
    time.sleep(min(0.35 * seconds, 10))
    child.send_signal(getattr(signal, name))
    _, err = child.communicate(timeout=60)
    if child.returncode == 0:
        pytest.skip("the run ended before the signal came")
    if name != "SIGKILL":
        assert "Interrupted" in err or child.returncode == 75, err[-1500:]
    if "before it had begun" in err:
        pytest.skip("the signal came before the run had begun")
    # The laws lie in a module of the user's; the run remembers where.
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r}); sys.path.insert(0, {str(tmp_path)!r})
import pavi_scale as ps
print(ps.resume({str(tmp_path / "cut")!r}).status)
"""
    resumed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    whole, cut = (xr.open_zarr(tmp_path / n / "posterior.zarr", group="posterior_mean") for n in ("whole", "cut"))
    np.testing.assert_array_equal(whole["theta"].values, cut["theta"].values)


@pytest.mark.cluster
@pytest.mark.filterwarnings("ignore")
def test_two_workers_give_the_same_numbers(tmp_path):
    model, cohort = logistic()
    alone = numbers(ps.fit(model, cohort, run=tmp_path / "alone", seed=2))
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, host="127.0.0.1") as cluster,
        Client(cluster) as client,
    ):
        together = numbers(ps.fit(model, cohort, run=tmp_path / "together", seed=2, client=client))
    for name, value in alone.items():
        np.testing.assert_allclose(together[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


STUDY = """
from torch.distributions import Normal
import pavi_scale as ps
model = ps.Model(
    ps.Plate("g"), ps.Plate("i"),
    mu=ps.latent(lambda: Normal(0.0, 1.0)),
    t=ps.latent(lambda mu: Normal(mu, 1.0), plates="g"),
    x=ps.observed(lambda t: Normal(t, 1.0), plates=("g", "i")),
)
"""


@pytest.fixture
def study(tmp_path):
    (tmp_path / "mystudy.py").write_text(STUDY)
    x = np.random.default_rng(0).normal(size=(5, 3))
    xr.Dataset({"x": (("g", "i"), x)}).to_zarr(tmp_path / "c.zarr", zarr_format=3)
    (tmp_path / "study.yaml").write_text("model: mystudy:model\ncohort: c.zarr\nrun: runs/r\nfit: {encoding: auto, memory: 4 GiB, seed: 0}\n")

    def command(*words):
        return subprocess.run(
            [sys.executable, "-m", "pavi_scale.cli", *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    return command


def test_command_line(study, tmp_path):
    for verb in ("plan", "fit", "posterior", "report", "check"):
        out = study(verb, "study.yaml")
        assert out.returncode == 0, (verb, out.stdout[-1500:], out.stderr[-1500:])
        if verb == "plan":
            assert "latents" in out.stdout
            assert "6" in out.stdout
            assert not (tmp_path / "runs" / "r" / "posterior.zarr").exists()
    again = study("resume", "study.yaml")
    assert again.returncode == 0, again.stderr[-1500:]
    assert xr.open_zarr(tmp_path / "runs" / "r" / "posterior.zarr", group="posterior_mean")["t"].shape == (5,)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("fit", "nothing.yaml"), 2),
        (("fit", "study.yaml", "--set", "cohort=nothing.zarr"), 2),
        (("plan", "study.yaml", "--set", "model=mystudy:nothing"), 2),
        (("fit", "study.yaml", "--set", "fit.colour=blue"), 2),
        (("fit", "study.yaml", "--set", "fit.memory=1 MiB"), 3),
        (("posterior", "study.yaml"), 2),
        (("resume", "study.yaml"), 2),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, tuple) else str(v),
)
def test_exit_codes(words, code, study):
    out = study(*words)
    assert out.returncode == code, (out.stdout[-800:], out.stderr[-1500:])
    assert "Traceback" not in out.stderr
    assert out.stderr.strip()


def test_model_text(tmp_path):
    model, cohort = logistic()
    for word in ("theta", "sigma", "y", "g", "i"):
        assert word in repr(model)
    posterior = ps.fit(model, cohort, run=tmp_path / "run")
    assert isinstance(repr(posterior), str)
