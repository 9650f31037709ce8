"""Lazy draws of labelled components: against stored moments, the same in every slice, and from their own units' data alone."""

import numpy as np
import pytest
import xarray as xr

import pavi_scale as ps
from pavi_scale import sampling
from pavi_scale.cohort import Cohort
from pipelines.hcp import make_cohort, model, quality


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelled")
    make_cohort(str(folder / "cohort.zarr"), subjects=8, vertices=300, seed=6)
    return ps.fit(model, str(folder / "cohort.zarr"), run=str(folder / "run"), progress=False, seed=6), folder


def test_draws_have_the_stored_moments(fitted):
    posterior, _ = fitted
    mean, sd = posterior.datatree["posterior_mean"], posterior.datatree["posterior_sd"]
    group = posterior.datatree["posterior"].dataset
    for name, part in (("label_logits", {"subject": slice(3)}), ("rho", {}), ("mu_session", {"subject": slice(3)}), ("mu_subject", {})):
        drawn = group[name].isel(part).isel(chain=0, draw=slice(600)).transpose("draw", *mean[name].dims).values
        m, s = (g[name].isel(part).values for g in (mean, sd))
        shift = (drawn.mean(0) - m) / s * np.sqrt(600)
        assert 0.9 < np.sqrt(np.mean(shift**2)) < 1.35  # one, if all that differs is chance; a little more, for fixed root points in the stored ones
        ratio = drawn.std(0) / s
        assert abs(np.median(ratio) - 1) < 0.02
        assert np.mean(np.abs(ratio - 1) < 0.15) > 0.98


def test_the_bound_is_about_that_of_training(fitted):
    """Labels integrated out by the same expansion, the root drawn from its Gaussian instead of looked at at its sites' centre."""
    posterior, _ = fitted
    nats, error = posterior.elbo(16)
    assert error < 1.0
    assert nats == pytest.approx(posterior.datatree["fit"]["elbo"].values[-1], abs=10.0)


def test_draws_do_not_depend_on_the_slice(fitted):
    group = fitted[0].datatree["posterior"].dataset["label_logits"]
    one = group.isel(chain=0, draw=slice(10, 20), subject=5, vertex=slice(100, 110)).values
    assert (group.isel(chain=0, draw=slice(10, 20), vertex=slice(100, 110)).isel(subject=5).values == one).all()
    assert (group.isel(chain=0, draw=slice(0, 40), subject=5, vertex=[104]).values[10:20, 0] == one[:, 4]).all()
    assert (group.isel(chain=0, draw=slice(10, 20), subject=4, vertex=slice(100, 110)).values != one).all()


def test_draws_do_not_depend_on_how_many_are_made_at_once(fitted, monkeypatch):
    at = {"chain": 0, "draw": slice(30), "subject": slice(2), "vertex": slice(50)}
    group = fitted[0].datatree["posterior"].dataset[["rho", "label_logits", "mu_session"]]
    together = {name: group[name].isel({d: s for d, s in at.items() if d in group[name].dims}).values for name in group}
    monkeypatch.setattr(sampling, "AT_ONCE", 1)  # one by one
    monkeypatch.setattr(sampling, "MOST", 7)
    for name, values in together.items():
        np.testing.assert_array_equal(group[name].isel({d: s for d, s in at.items() if d in group[name].dims}).values, values)


def test_draws_read_their_own_units(fitted, monkeypatch):
    folder = fitted[1]
    posterior = ps.open_posterior(folder / "run")
    read, real = [], Cohort.read
    monkeypatch.setattr(Cohort, "read", lambda self, name, units=None: (read.append((name, units)), real(self, name, units))[1])
    posterior.datatree["posterior"].dataset["label_logits"].isel(chain=0, draw=slice(5), subject=2, vertex=slice(40, 60)).values  # noqa: B018
    assert [name for name, _ in read] == ["x"]
    assert list(read[0][1]["subject"]) == [2]
    assert list(read[0][1]["vertex"]) == list(range(40, 60))


def test_leaves_follow_the_parents_they_are_drawn_with(fitted):
    group = fitted[0].datatree["posterior"].dataset
    at = {"chain": 0, "draw": slice(400), "vertex": slice(60)}
    rho = group["rho"].isel(at).values
    logits = group["label_logits"].isel(at).isel(subject=0).values
    r = np.array([np.corrcoef(rho[:, v, k], logits[:, v, k])[0, 1] for v in range(60) for k in range(7)])
    assert 0.4 < np.median(r) < 0.95  # the common shift of all networks is nothing that data speak of: parent and leaf share it


def test_quality_tells_a_good_posterior_from_a_narrow_one(fitted, monkeypatch):
    posterior, folder = fitted
    cohort, truth = (xr.open_zarr(folder / "cohort.zarr", group=g, consolidated=False) for g in (None, "truth"))
    truth = quality.in_order(posterior, truth)
    found = quality.against_truth(posterior, truth)
    assert abs(found["label_logits, 90 % intervals hold"] - 0.9) < 0.03
    assert found["lowest correlation of a network's fingerprints"] > 0.98
    monkeypatch.setattr(quality, "SUBJECTS", 3)
    monkeypatch.setattr(quality, "VERTICES", 10)
    monkeypatch.setattr(quality, "PROPOSALS", 4000)
    oracle = quality.against_oracle(posterior, cohort, truth)
    assert oracle["units compared"] == 30
    assert oracle["mean KL of label probabilities, nats"] < 0.15  # eight subjects say less of a vertex than the oracle is told
    wrong = quality.against_oracle(posterior, cohort, truth.isel(network=np.roll(np.arange(7), 1)))
    assert wrong["mean KL of label probabilities, nats"] > 3 * oracle["mean KL of label probabilities, nats"]
    assert all(v >= 0 for v in quality.queries(posterior).values())
