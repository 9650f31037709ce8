"""Bounded staleness of a whole fit: the same bits whoever computes, and the posterior of a fit that waits for each step."""

import numpy as np
import pytest
import xarray as xr
from distributed import Client, LocalCluster
from torch.distributions import Bernoulli, HalfNormal, Normal

import pavi_scale as ps

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")]

MODEL = ps.Model(
    ps.Plate("group"), ps.Plate("answer"),
    mu=ps.latent(lambda: Normal(0.0, 1.0)),
    sigma=ps.latent(lambda: HalfNormal(1.0)),
    theta=ps.latent(lambda mu, sigma: Normal(mu, sigma), plates="group"),
    y=ps.observed(lambda theta: Bernoulli(logits=theta), plates=("group", "answer")),
)  # fmt: skip


@pytest.fixture(scope="module")
def cohort():
    rng = np.random.default_rng(0)
    theta = rng.normal(0.3, 0.8, 40)
    return xr.Dataset({"y": (("group", "answer"), rng.binomial(1, 1 / (1 + np.exp(-theta[:, None])), (40, 9)).astype(float))})


def fit(cohort, run, seed=0, **more):
    return ps.fit(MODEL, cohort, run=run, seed=seed, encoding="encoder", progress=False, **more)


def test_a_lagged_fit_has_the_same_bits_on_workers(cohort, tmp_path, tools):
    digests = {}
    for name, staleness in (("waits", 0), ("lags", 3)):
        fit(cohort, tmp_path / name, staleness=staleness)
        digests[name] = tools.digest(tmp_path / name)
        (trained,) = tools.events(tmp_path / name, "trained")
        assert trained["staleness"] == staleness
    assert digests["lags"] != digests["waits"]
    quiet = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}
    with LocalCluster(n_workers=2, threads_per_worker=1, **quiet) as cluster, Client(cluster, set_as_default=False) as client:
        fit(cohort, tmp_path / "workers", staleness=3, client=client)
    assert tools.digest(tmp_path / "workers") == digests["lags"]


def test_a_lagged_fit_finds_the_same_posterior(cohort, tmp_path):
    gaps = []
    for seed in range(3):
        waits, lags = (fit(cohort, tmp_path / f"{seed}-{staleness}", seed, staleness=staleness) for staleness in (0, 3))
        (at, error), (there, other) = waits.elbo(64, seed=seed), lags.elbo(64, seed=seed)
        gaps.append((there - at) / np.hypot(error, other))
        for name in ("mu", "sigma", "theta"):
            means = [p.datatree["posterior_mean"][name].values for p in (waits, lags)]
            assert (np.abs(means[0] - means[1]) < 0.1 * waits.datatree["posterior_sd"][name].values).all()
        assert lags.status == waits.status
    assert abs(np.mean(gaps)) < 3 / np.sqrt(len(gaps))


@pytest.mark.parametrize("staleness", [-1, 1.5, True, "3", 9])
def test_a_staleness_that_means_nothing_is_refused(cohort, tmp_path, staleness):
    with pytest.raises(ps.errors.InputError, match="staleness"):
        fit(cohort, tmp_path / "run", staleness=staleness)
    assert not (tmp_path / "run").exists()
