"""Simulation-based calibration of a conjugate model: exact fits pass, the same fits with half the variance fail; resumption; errors."""

import os
import signal
import threading

import numpy as np
import pytest
import torch
import xarray as xr
from torch.distributions import LKJCholesky, Normal

import pavi_scale as ps
from pavi_scale.calibration.given import given_of
from pavi_scale.calibration.simulated import append, empty, quantities, rank
from pavi_scale.cohort import open_cohort
from pavi_scale.errors import InputError, Interrupted, ModelError, RunError

RUNS = 50
model = ps.Model(
    ps.Plate("group"),
    ps.Plate("obs", within="group"),
    mu=ps.latent(lambda: Normal(0.0, 1.0)),
    theta=ps.latent(lambda mu: Normal(mu, 0.5), plates="group"),
    w=ps.covariate(plates="obs"),
    x=ps.observed(lambda theta, w: Normal(theta + w, 0.7), plates="obs", missing="mask"),
)
given = xr.Dataset({"group_index": ("obs", np.array([0, 0, 0, 1, 1, 2, 3, 3]), {"instance_dimension": "group"}), "w": ("obs", np.linspace(-1, 1, 8))})
small = {"sizes": {"group": 4, "obs": 8}, "given": given, "progress": False}


@pytest.fixture(scope="module")
def both():
    """Ranks of the same fits, as they are and with half the variance."""
    exact = halved = None
    for seed in range(RUNS):
        cohort = model.sample(small["sizes"], given, seed)
        plan = quantities(model, cohort, 4)
        exact, halved = (empty(plan, 255, "") if old is None else old for old in (exact, halved))
        posterior = ps.fit(model, cohort, seed=seed, progress=False)
        exact = append(exact, rank(posterior, cohort, plan, 255, seed), posterior.status)
        halved = append(halved, rank(posterior, cohort, plan, 255, seed, shrink=0.5), posterior.status)
    return exact, halved


def test_exact_fits_are_calibrated(both):
    exact, _ = both
    assert exact.calibrated()
    assert (exact.pvalues > 0.05).all()
    for latent in ("mu", "theta"):
        for level in (0.5, 0.9):
            _, low, high = exact.coverage(latent, level)
            assert low <= level <= high


def test_half_the_variance_is_found(both):
    _, halved = both
    assert not halved.calibrated()
    assert halved.pvalues.min() < 1e-3
    share, _, high = halved.coverage("theta", 0.9)
    assert high < 0.9
    assert share == pytest.approx(0.755, abs=0.06)  # 2 Phi(1.645 / sqrt 2) - 1


def test_picture_and_table(both, tmp_path):
    exact, halved = both
    halved.plot().savefig(tmp_path / "sbc.png")
    colours = {line.get_color() for axes in halved.plot().axes for line in axes.lines}
    assert "C3" in colours
    assert {line.get_color() for axes in exact.plot().axes for line in axes.lines} == {"C0"}
    assert list(exact.table().index) == ["mu", "theta"]
    assert exact.table().loc["theta", "quantities"] == 4
    assert "not calibrated" in repr(halved)
    assert "not calibrated" not in repr(exact)


def test_file_and_dataset_give_it_back(both, tmp_path):
    exact, _ = both
    for again in (ps.SBC.open(exact.save(tmp_path / "deep" / "ranks.json")), ps.SBC.from_dataset(exact.to_dataset())):
        xr.testing.assert_equal(again.dataset, exact.dataset)
        assert repr(again) == repr(exact)
    with pytest.raises(InputError, match="does not hold ranks"):
        ps.SBC.from_dataset(xr.Dataset())


def test_goes_on_where_it_was_interrupted(tmp_path):
    whole = ps.sbc(model, **small, runs=4)
    first = ps.sbc(model, **small, runs=2, run=tmp_path)
    (path,) = (tmp_path / "sbc").iterdir()
    before = path.stat().st_mtime_ns
    ps.sbc(model, **small, runs=2, run=tmp_path)
    assert path.stat().st_mtime_ns == before
    timer = threading.Timer(2.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(Interrupted, match="run="):
        ps.sbc(model, **small, runs=500, run=tmp_path)
    timer.join()
    kept = ps.SBC.open(path)
    assert 2 < kept.runs < 500
    again = ps.sbc(model, **small, runs=4, run=tmp_path)
    np.testing.assert_array_equal(first.dataset["rank"], whole.dataset["rank"][:2])
    np.testing.assert_array_equal(again.dataset["rank"], whole.dataset["rank"])
    path.write_bytes(path.read_bytes().replace(b'"draws"', b'"drawn"', 1))
    with pytest.raises(RunError, match="damaged"):
        ps.sbc(model, **small, runs=4, run=tmp_path)


def test_another_study_has_another_file(tmp_path):
    moved, holed = given.assign(w=given["w"] + 1), given.assign(x=given["w"].where(given["w"] > 0))
    for change in ({}, {"seed": 1}, {"draws": 99}, {"given": moved}, {"units": 1}, {"given": holed}):
        ps.sbc(model, **{**small, **change}, runs=1, run=tmp_path)
    assert len(list((tmp_path / "sbc").iterdir())) == 6


def test_ties_are_broken_at_random():
    correlated = ps.Model(
        ps.Plate("obs"), sizes={"i": 2, "j": 2},
        chol=ps.latent(lambda: LKJCholesky(2, 1.0), dims=("i", "j")),
        x=ps.observed(lambda chol: Normal((chol @ torch.ones(2, dtype=chol.dtype))[1], 1.0), plates="obs"),
    )  # fmt: skip
    found = ps.sbc(correlated, {"obs": 3}, runs=6, progress=False)
    constant = found.dataset["rank"].sel(quantity="chol[0, 1]").values
    assert len(set(constant.tolist())) > 2


def test_a_cohort_gives_what_simulations_take():
    cohort = model.sample(small["sizes"], given, 0).drop_vars(["mu", "theta"]).assign_coords(group=list("abcd"))
    cohort["x"][3] = np.nan
    sizes, taken = given_of(open_cohort(cohort, model), {"group": 3})
    assert sizes == {"group": 3, "obs": 6}
    np.testing.assert_array_equal(taken["group_index"], [0, 0, 0, 1, 1, 2])
    np.testing.assert_array_equal(taken["w"], given["w"][:6])
    assert taken["group"].values.tolist() == list("abc")
    assert np.isnan(taken["x"].values).tolist() == [False] * 3 + [True] + [False] * 2
    assert np.nansum(taken["x"].values) == 0
    for wrong in ({"obs": 3}, {"planet": 1}, {"group": 0}, {"group": 5}):
        with pytest.raises(InputError):
            given_of(open_cohort(cohort, model), wrong)


@pytest.mark.parametrize("wrong", [{"runs": 0}, {"draws": 5}, {"draws": 100_000}, {"units": 0}, {"seed": -1}, {"runs": True}, {"speed": 3}, {"sizes": {}}])
def test_bad_options_are_refused(wrong):
    with pytest.raises(InputError):
        ps.sbc(model, **({"runs": 1, "sizes": small["sizes"], "progress": False} | wrong))


def test_not_a_model():
    with pytest.raises(ModelError):
        ps.sbc(3, {}, 1)
