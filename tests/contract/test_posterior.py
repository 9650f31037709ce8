"""The posterior as the user meets it: schema, laziness, other processes, plain Zarr, ArviZ."""

import subprocess
import sys
import time
import warnings
from importlib.metadata import entry_points

import cloudpickle
import numpy as np
import pytest
import torch
import xarray as xr
from torch.distributions import Bernoulli, Categorical, HalfNormal, Independent, LogNormal, MixtureSameFamily, Normal

import pavi_scale as ps
from pavi_scale.errors import InputError


@pytest.fixture(scope="module")
def fitted(conjugate, tmp_path_factory):
    model, cohort, evidence, latents = conjugate
    run = tmp_path_factory.mktemp("conjugate") / "run"
    return ps.fit(model, cohort, run=run, seed=0), run, cohort, evidence


def test_schema(fitted):
    posterior, _, cohort, _ = fitted
    tree = posterior.datatree
    assert isinstance(tree, xr.DataTree)
    assert {"posterior", "posterior_mean", "posterior_sd", "observed_data", "constant_data", "fit"} <= set(tree.children)
    draws = tree["posterior"]
    assert draws["theta"].dims == ("chain", "draw", "group", "feature")
    assert draws["mu"].dims == ("chain", "draw", "feature")
    assert draws.sizes["chain"] == 1
    assert tree["posterior_mean"]["theta"].dims == tree["posterior_sd"]["theta"].dims == ("group", "feature")
    for group in ("posterior", "posterior_mean", "posterior_sd"):
        assert tree[group]["group"].values.tolist() == list("abcdef")
        assert tree[group]["feature"].values.tolist() == ["u", "v"]
    np.testing.assert_allclose(tree["observed_data"]["x"].values, cohort["x"].values)
    assert tree["fit"].data_vars


def test_draws_agree_with_moments(fitted):
    tree = fitted[0].datatree
    theta = tree["posterior"]["theta"]
    n = theta.sizes["draw"]
    mean, sd = theta.mean(("chain", "draw")), theta.std(("chain", "draw"))
    assert float((abs(mean - tree["posterior_mean"]["theta"]) / tree["posterior_sd"]["theta"]).max()) < 5 / n**0.5 + 0.05
    assert float(abs(sd / tree["posterior_sd"]["theta"] - 1).max()) < 4 / n**0.5 + 0.05


def test_same_numbers_whatever_slice(fitted):
    draws = fitted[0].datatree["posterior"]
    whole = draws["theta"].values
    np.testing.assert_array_equal(draws["theta"].isel(draw=slice(3, 40, 7), group=[4, 1]).values, whole[:, 3:40:7][:, :, [4, 1]])
    np.testing.assert_array_equal(draws["theta"].isel(draw=5, group=3, feature=1, chain=0).values, whole[0, 5, 3, 1])
    np.testing.assert_array_equal(draws["theta"].sel(group=["f", "a"]).isel(draw=[9, 2]).values, whole[:, [9, 2]][:, :, [5, 0]])
    np.testing.assert_array_equal(draws["theta"].isel(draw=slice(None, None, -1)).values, whole[:, ::-1])
    np.testing.assert_array_equal(draws["mu"].isel(draw=-1).values, draws["mu"].values[:, -1])


def test_draws_are_joint(fitted):
    """mu and theta of one draw belong together: their regression slope is the conditional prior's."""
    draws = fitted[0].datatree["posterior"]
    mu, theta = draws["mu"].values[0, :, 0], draws["theta"].values[0, :, 2, 0]
    # Group c has one observation: theta | mu, x has slope (1/s1^2) / (1/s1^2 + 1/sx^2).
    slope = np.cov(mu, theta)[0, 1] / mu.var(ddof=1)
    assert abs(slope - (1 / 0.25) / (1 / 0.25 + 1 / 0.09)) < 4 / mu.size**0.5


@pytest.mark.skipif(not entry_points(group="xarray.backends", name="pavi"), reason="the xarray engine needs an installed package: pip install -e .")
def test_another_process_gives_the_same(fitted, tmp_path):
    posterior, run, _, _ = fitted
    draws = posterior.datatree["posterior"]["theta"].isel(draw=[0, 7]).values
    code = f"""
import numpy as np, xarray as xr
tree = xr.open_datatree({str(run)!r}, engine="pavi")
np.save({str(tmp_path / "tree.npy")!r}, tree["posterior"]["theta"].isel(draw=[0, 7]).values)
np.save({str(tmp_path / "mean.npy")!r}, xr.open_dataset({str(run)!r}, engine="pavi", group="posterior_mean")["theta"].values)
np.save({str(tmp_path / "draws.npy")!r}, xr.open_dataset({str(run)!r}, engine="pavi", group="posterior")["theta"].isel(draw=[0, 7]).values)
import pavi_scale as ps
from pavi_scale.errors import InputError
again = ps.open_posterior({str(run)!r})
np.save({str(tmp_path / "open.npy")!r}, again.datatree["posterior"]["theta"].isel(draw=[0, 7]).values)
np.save({str(tmp_path / "elbo.npy")!r}, again.elbo())
print(again.status)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr[-3000:]
    assert out.stdout.strip() == posterior.status
    for name in ("tree", "draws", "open"):
        np.testing.assert_array_equal(np.load(tmp_path / f"{name}.npy"), draws)
    np.testing.assert_array_equal(np.load(tmp_path / "mean.npy"), posterior.datatree["posterior_mean"]["theta"].values)
    np.testing.assert_allclose(np.load(tmp_path / "elbo.npy"), posterior.elbo())


def test_pickled_draws_read_elsewhere(fitted, tmp_path):
    """Nothing but what the pickle asks for is imported there; pickled as Dask does, since the model is a local function's."""
    draws = fitted[0].datatree["posterior"]["theta"].isel(draw=[0, 7])
    (tmp_path / "draws.pickle").write_bytes(cloudpickle.dumps(draws))
    code = f"import pickle, numpy as np; np.save({str(tmp_path / 'there.npy')!r}, pickle.load(open({str(tmp_path / 'draws.pickle')!r}, 'rb')).values)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr[-3000:]
    np.testing.assert_array_equal(np.load(tmp_path / "there.npy"), draws.values)


def test_plain_zarr_without_the_package(fitted, tmp_path):
    posterior, run, _, _ = fitted
    code = f"""
import sys
sys.modules["pavi_scale"] = None
sys.modules["torch"] = None
import numpy as np, xarray as xr
data = xr.open_zarr({str(run)!r} + "/posterior.zarr", group="posterior_mean")
assert data["group"].values.tolist() == list("abcdef"), data
np.save({str(tmp_path / "mean.npy")!r}, data["theta"].values)
np.save({str(tmp_path / "sd.npy")!r}, xr.open_zarr({str(run)!r} + "/posterior.zarr", group="posterior_sd")["theta"].values)
"""
    out = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr[-3000:]
    np.testing.assert_array_equal(np.load(tmp_path / "mean.npy"), posterior.datatree["posterior_mean"]["theta"].values)
    np.testing.assert_array_equal(np.load(tmp_path / "sd.npy"), posterior.datatree["posterior_sd"]["theta"].values)


def test_opening_is_lazy(tmp_path):
    """A million latents times all draws would take far longer than opening does."""
    groups = 100_000
    rng = np.random.default_rng(0)
    cohort = xr.Dataset({"x": (("g", "i"), rng.normal(rng.normal(1, 1, groups)[:, None], 1, (groups, 2)).astype("f4"))})
    model = ps.Model(
        ps.Plate("g"),
        ps.Plate("i"),
        mu=ps.latent(lambda: Normal(0.0, 3.0)),
        theta=ps.latent(lambda mu: Normal(mu, 1.0), plates="g"),
        x=ps.observed(lambda theta: Normal(theta, 1.0), plates=("g", "i")),
    )
    posterior = ps.fit(model, cohort, run=tmp_path / "run")
    start = time.perf_counter()
    again = ps.open_posterior(tmp_path / "run")
    tree = again.datatree
    assert tree["posterior"]["theta"].shape[2] == groups
    assert time.perf_counter() - start < 2.0
    start = time.perf_counter()
    few = tree["posterior"]["theta"].isel(g=[12, 77_777], draw=slice(0, 50)).values
    assert time.perf_counter() - start < 2.0
    np.testing.assert_array_equal(few[0, 3, 1], posterior.datatree["posterior"]["theta"].isel(g=77_777, draw=3, chain=0).values)
    s = float(cohort["x"].values.mean())
    assert abs(float(tree["posterior_mean"]["mu"]) - s) < 0.2 * (1.5 / groups) ** 0.5 + 1e-3
    np.testing.assert_allclose(float(tree["posterior_sd"]["mu"]), (1.5 / groups) ** 0.5, rtol=0.1)


def test_sample_of_a_selection(fitted):
    posterior = fitted[0]
    few = posterior.sample(7, seed=3, group=["d", "b"])
    assert isinstance(few, xr.Dataset)
    assert few["theta"].sizes["draw"] == 7
    assert few["group"].values.tolist() == ["d", "b"]
    whole = posterior.sample(7, seed=3)
    np.testing.assert_array_equal(few["theta"].values, whole["theta"].sel(group=["d", "b"]).values)
    np.testing.assert_array_equal(whole["theta"].values, posterior.sample(7, seed=3)["theta"].values)
    assert not np.array_equal(whole["theta"].values, posterior.sample(7, seed=4)["theta"].values)
    one = posterior.sample(5, group="c", feature="v")
    assert one["theta"].size == 5
    piece = posterior.sample(5, group=slice("b", "d"))
    assert piece["group"].values.tolist() == ["b", "c", "d"]
    with pytest.raises(InputError):
        posterior.sample(5, group="nobody")


def test_sample_by_position_where_no_labels(tmp_path):
    x = np.random.default_rng(1).normal(size=(6, 3))
    model = ps.Model(
        ps.Plate("g"), ps.Plate("i"), t=ps.latent(lambda: Normal(0.0, 1.0), plates="g"), x=ps.observed(lambda t: Normal(t, 1.0), plates=("g", "i"))
    )
    posterior = ps.fit(model, xr.Dataset({"x": (("g", "i"), x)}), run=tmp_path / "run")
    whole = posterior.sample(4)["t"].transpose(..., "draw", "g").values
    np.testing.assert_array_equal(posterior.sample(4, g=slice(2, 5))["t"].transpose(..., "draw", "g").values, whole[..., 2:5])
    np.testing.assert_array_equal(posterior.sample(4, g=[5, 0])["t"].transpose(..., "draw", "g").values, whole[..., [5, 0]])


def test_elbo(fitted):
    posterior, _, _, evidence = fitted
    value, error = posterior.elbo(particles=64, seed=1)
    assert abs(value - evidence) < 4 * error + 0.1
    assert posterior.elbo(particles=64, seed=1) == (value, error)
    assert posterior.elbo(64, 1) == (value, error)


def test_elbo_is_below_the_evidence(tmp_path):
    """A model with one latent whose evidence is a one-dimensional integral."""
    y = np.array([1, 1, 1, 0, 1, 1, 1, 1])
    model = ps.Model(ps.Plate("i"), a=ps.latent(lambda: Normal(0.0, 2.0)), y=ps.observed(lambda a: Bernoulli(logits=a), plates="i"))
    posterior = ps.fit(model, xr.Dataset({"y": ("i", y)}), run=tmp_path / "run")
    a = torch.linspace(-20, 20, 40001, dtype=torch.float64)
    evidence = float(torch.logsumexp(Normal(0.0, 2.0).log_prob(a) + Bernoulli(logits=a).log_prob(torch.tensor(y).double()[:, None]).sum(0), 0) + np.log(1e-3))
    value, error = posterior.elbo(particles=2000)
    assert evidence - 0.03 - 4 * error < value < evidence + 4 * error + 1e-3


def test_diagnostics(fitted):
    posterior = fitted[0]
    assert posterior.status == "ok"
    khat = posterior.diagnostics
    assert isinstance(khat, xr.Dataset)
    assert any("khat" in str(name) for name in khat.variables)


def test_arviz(fitted):
    arviz_stats = pytest.importorskip("arviz_stats")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = arviz_stats.summary(fitted[0].datatree)
        ess = arviz_stats.ess(fitted[0].datatree)
    assert len(table) == 14
    draws = fitted[0].datatree["posterior"].sizes["draw"]
    assert float(ess["mu"].min()) > draws / 3


def test_arviz_plots(fitted):
    """What is drawn is this posterior: a named row for each scalar, at its mean and about as long as its sd says; densities with mean and sd."""
    plots = pytest.importorskip("arviz_plots")
    pytest.importorskip("matplotlib").use("Agg")
    tree = fitted[0].datatree
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        forest = plots.plot_forest(tree, backend="matplotlib").viz
        dist = plots.plot_dist(tree, var_names=["mu"], backend="matplotlib").viz["dist"]["mu"]
    names, rows = forest["figure"].item().axes
    assert {t.get_text() for t in names.texts} >= {"mu", "theta", *"abcdef", "u", "v"}
    assert len(rows.lines) == 2 * 14
    for name, dims in (("mu", ("feature",)), ("theta", ("group", "feature"))):
        mean, sd = (tree[group][name].transpose(*dims).values.ravel() for group in ("posterior_mean", "posterior_sd"))
        points, halves = (forest[part][name].squeeze(drop=True).transpose(*dims).values.ravel() for part in ("point_estimate", "trunk"))
        np.testing.assert_array_less(abs(np.array([p.get_offsets()[0, 0] for p in points]) - mean), 0.15 * sd)
        # The trunk holds the middle half.
        np.testing.assert_allclose([np.ptp(line.get_xdata()) for line in halves], 1.349 * sd, rtol=0.15)
    for line, mean, sd in zip(dist.values, tree["posterior_mean"]["mu"].values, tree["posterior_sd"]["mu"].values, strict=True):
        x, density = line.get_data()
        weight = density / density.sum()
        assert np.trapezoid(density, x) == pytest.approx(1.0, abs=0.02)
        assert weight @ x == pytest.approx(mean, abs=0.15 * sd)
        assert np.sqrt(weight @ (x - weight @ x) ** 2) == pytest.approx(sd, rel=0.15)


def test_reprs(fitted):
    model, posterior = fitted[0].model if hasattr(fitted[0], "model") else None, fitted[0]
    assert "theta" in repr(posterior)
    assert posterior.status in repr(posterior)
    if model is not None:
        assert "theta" in repr(model)
        assert "group" in repr(model)


def test_graphviz(conjugate):
    drawn = conjugate[0].to_graphviz()
    source = drawn if isinstance(drawn, str) else drawn.source
    assert "theta" in source
    assert "group" in source


@pytest.mark.parametrize("encoding", ["encoder", "hybrid"])
def test_extend_to_new_groups(encoding, tmp_path, make_gre, misses):
    model, cohort, _, _ = make_gre((1.0, 0.5, 0.3), (60, 2), np.random.default_rng(5).integers(1, 12, 60), 5)
    old, new = (cohort.isel(point=np.flatnonzero(keep)) for keep in (cohort["g"].values < 50, cohort["g"].values >= 50))
    new = new.assign(g=new["g"] - 50)
    posterior = ps.fit(model, old, run=tmp_path / "run", encoding=encoding)
    extended = posterior.extend(new)
    assert extended.datatree["posterior"]["theta"].sizes["group"] == 10
    whole = ps.fit(model, cohort, run=tmp_path / "whole").datatree
    truth = {"theta": (whole["posterior_mean"]["theta"].values[50:], whole["posterior_sd"]["theta"].values[50:])}
    # The globals do not see the new groups, which moves these by little.
    assert not misses(extended, truth)


def test_extend_with_labels_and_dense_plates(tmp_path, misses):
    rng = np.random.default_rng(6)
    x = rng.normal(rng.normal(1, 1, 40)[:, None], 0.5, (40, 3))
    cohort = xr.Dataset({"x": (("subject", "trial"), x)}, coords={"subject": [f"s{i:02d}" for i in range(40)]})
    model = ps.Model(
        ps.Plate("subject"),
        ps.Plate("trial"),
        mu=ps.latent(lambda: Normal(0.0, 2.0)),
        t=ps.latent(lambda mu: Normal(mu, 1.0), plates="subject"),
        x=ps.observed(lambda t: Normal(t, 0.5), plates=("subject", "trial")),
    )
    posterior = ps.fit(model, cohort.isel(subject=slice(0, 30)), run=tmp_path / "run", encoding="encoder")
    extended = posterior.extend(cohort.isel(subject=slice(30, 40)))
    assert extended.datatree["posterior_mean"]["subject"].values.tolist() == [f"s{i:02d}" for i in range(30, 40)]
    mu = x[:30].mean()
    precision = 1 + 3 / 0.25
    assert not misses(extended, {"t": ((mu + x[30:].sum(1) / 0.25) / precision, np.full(10, precision**-0.5))}, 0.25)


def hcp():
    return ps.Model(
        ps.Plate("subject"),
        ps.Plate("session"),
        ps.Plate("vertex"),
        sizes={"network": 3},
        mu=ps.latent(lambda: Normal(0.0, 1.0), dims=("network", "feature")),
        eps=ps.latent(lambda: HalfNormal(0.5), dims="network"),
        sigma=ps.latent(lambda: HalfNormal(0.5), dims="network"),
        kappa=ps.latent(lambda: LogNormal(0.0, 1.0)),
        mu_subject=ps.latent(lambda mu, eps: Normal(mu, eps[:, None]), plates="subject", dims=("network", "feature")),
        mu_session=ps.latent(lambda mu_subject, sigma: Normal(mu_subject, sigma[:, None]), plates=("subject", "session"), dims=("network", "feature")),
        rho=ps.latent(lambda: Normal(0.0, 1.0), plates="vertex", dims="network"),
        label_logits=ps.latent(lambda rho: Normal(rho, 1.0), plates=("subject", "vertex"), dims="network"),
        x=ps.observed(
            lambda mu_session, label_logits, kappa: MixtureSameFamily(Categorical(logits=label_logits), Independent(Normal(mu_session, kappa), 1)),
            plates=("subject", "session", "vertex"),
            dims="feature",
        ),
    )


def test_the_contracts_own_study_runs(tmp_path):
    model = hcp()
    sizes = {"subject": 4, "session": 2, "vertex": 60, "feature": 8}
    cohort = model.sample(sizes, seed=1)
    assert cohort["mu_session"].dims == ("subject", "session", "network", "feature")
    assert cohort["label_logits"].shape == (4, 60, 3)
    posterior = ps.fit(model, cohort, run=tmp_path / "run")
    tree = posterior.datatree
    assert tree["posterior"]["label_logits"].dims == ("chain", "draw", "subject", "vertex", "network")
    assert np.isfinite(tree["posterior_mean"]["label_logits"].values).all()
    kappa, sd = float(tree["posterior_mean"]["kappa"]), float(tree["posterior_sd"]["kappa"])
    assert abs(kappa - float(cohort["kappa"])) < 4 * sd + 0.1 * float(cohort["kappa"])
