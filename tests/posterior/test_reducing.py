"""Quantiles and exceedance probabilities by map-reduce: those of the draws, whatever the pieces; those of the posterior, where it is known."""

import tracemalloc
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm
from torch.distributions import Normal

import pavi_scale as ps
from pavi_scale.errors import InputError, PlanRefused, RunError
from pavi_scale.plates import Layout
from pavi_scale.posterior.integrity import verify
from pavi_scale.posterior.posterior import Posterior
from pavi_scale.posterior.reducing import COPIES, _pieces, exceedances, piece_lengths, quantiles
from pavi_scale.posterior.sampler import Context, Latent
from pavi_scale.rng import normal, stream
from pavi_scale.run import Run
from tests.posterior import toy

SELECTIONS = [
    {},
    {"subject": "cleo"},
    {"subject": ["dörte", "anna", "anna"]},
    {"vertex": slice(2, 8), "network": 1},
    {"vertex": [9, 0, 4, 4], "subject": slice("bert", None)},
    {"vertex": slice(None, None, -2), "network": [2, 0]},
    {"vertex": 3, "subject": "bert", "network": 0},
]


@pytest.fixture
def posterior(finished: Path) -> Posterior:
    return Posterior(Run.open(finished), toy.context())


@pytest.mark.parametrize("memory", ["1 GiB", "100 kB"])
@pytest.mark.parametrize("sel", SELECTIONS, ids=str)
def test_summaries_are_those_of_the_draws(posterior, tmp_path, memory, sel):
    """Against xarray on the lazy group, in one piece or in pieces of a unit or two, in memory or in a store."""
    lazy = posterior.datatree["posterior"]["logits"].isel(chain=0, draw=slice(70)).drop_vars(["chain", "draw"]).sel(sel)
    expected = {
        "quantile": lambda q: lazy.quantile(q, "draw").astype(float),
        "exceedance": lambda t: xr.concat([(lazy > v).mean("draw") for v in np.atleast_1d(t)], "threshold").assign_coords(threshold=np.atleast_1d(t)),
    }
    for what, several in (("quantile", [0.05, 0.5, 1.0]), ("exceedance", [3.0, 10.0])):
        wanted = expected[what](several)
        found = getattr(posterior, what)("logits", several, draws=70, memory=memory, **sel)
        assert found.dtype == np.float64
        assert {d: str(found[d].values) for d, label in sel.items() if isinstance(label, str)} == {d: v for d, v in sel.items() if isinstance(v, str)}
        xr.testing.assert_allclose(found.drop_vars(set(found.coords) - set(wanted.coords)), wanted, rtol=1e-12)
        stored = getattr(posterior, what)("logits", several, draws=70, memory=memory, store=tmp_path / f"{what}.zarr", **sel)
        xr.testing.assert_equal(stored, found)
        one = getattr(posterior, what)("logits", several[1], draws=70, memory=memory, **sel)
        xr.testing.assert_equal(one, found.isel({found.dims[0]: 1}))


def test_an_empty_selection_is_empty(posterior):
    assert posterior.quantile("logits", [0.1, 0.2], subject=[]).shape == (2, 0, toy.VERTICES, toy.NETWORKS)


def test_every_latent_and_other_streams(posterior):
    for name, shape in toy.shapes().items():
        found = posterior.quantile(name, 0.5, draws=40, seed=3)
        assert found.shape == shape
        np.testing.assert_allclose(found, posterior.sample(40, seed=3)[name].median("draw"), rtol=1e-12)
    assert not np.isclose(posterior.quantile("mu", 0.5, draws=40), posterior.quantile("mu", 0.5, draws=40, seed=3))


def test_a_stored_summary_is_plain_and_checksummed(posterior, tmp_path):
    store = tmp_path / "deep" / "q.zarr"
    posterior.quantile("logits", [0.1, 0.9], draws=50, store=store, memory="50 kB")
    assert verify(store) > 3
    assert not store.with_name("q.zarr.partial").exists()
    found = xr.open_zarr(store)
    assert found["logits"].dims == ("quantile", "subject", "vertex", "network")
    assert list(map(str, found["subject"].values)) == list(toy.LABELS)
    np.testing.assert_allclose(found["quantile"], [0.1, 0.9])
    with pytest.raises(RunError, match="already"):
        posterior.quantile("logits", 0.1, store=store)


def test_an_interrupted_store_has_no_name(posterior, tmp_path, monkeypatch):
    calls = []
    draw = toy.ToySampler.draw

    def stop(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(self, *arguments)

    monkeypatch.setattr(toy.ToySampler, "draw", stop)
    with pytest.raises(KeyboardInterrupt):
        posterior.exceedance("logits", 0.0, draws=50, store=tmp_path / "e.zarr", memory="50 kB")
    assert not (tmp_path / "e.zarr").exists()
    stored = posterior.exceedance("logits", 0.0, draws=50, store=tmp_path / "e.zarr", memory="50 kB")
    np.testing.assert_array_equal(stored, posterior.exceedance("logits", 0.0, draws=50))


@pytest.mark.parametrize(
    ("what", "value", "options", "match"),
    [
        ("quantile", 1.5, {}, "between 0 and 1"),
        ("quantile", [], {}, "not a quantile"),
        ("quantile", "half", {}, "not a quantile"),
        ("quantile", [[0.5]], {}, "not a quantile"),
        ("exceedance", np.nan, {}, "not a threshold"),
        ("quantile", 0.5, {"draws": 0}, "positive integer"),
        ("quantile", 0.5, {"seed": -1}, "non-negative"),
        ("quantile", 0.5, {"planet": 1}, "unknown dimension"),
        ("quantile", 0.5, {"subject": "zoe"}, "cannot be resolved"),
        ("quantile", 0.5, {"memory": "much"}, "not a size"),
    ],
)
def test_bad_requests(posterior, what, value, options, match):
    with pytest.raises(InputError, match=match):
        getattr(posterior, what)("logits", value, **options)


def test_what_does_not_fit_is_refused(posterior, tmp_path):
    with pytest.raises(InputError, match="unknown latent.*'kappa'"):
        posterior.quantile("kapa", 0.5)
    with pytest.raises(PlanRefused, match="single unit.*expected: at most 1000 B; got: 7.0 KiB"):
        posterior.quantile("logits", 0.5, draws=75, memory=2000)
    with pytest.raises(PlanRefused, match="result does not fit.*store="):
        posterior.quantile("logits", np.linspace(0, 1, 900), draws=2, memory="1 MiB")
    stored = posterior.quantile("logits", np.linspace(0, 1, 900), draws=2, memory="1 MiB", store=tmp_path / "q.zarr")
    assert stored.shape == (900, *toy.shapes()["logits"])


@given(st.lists(st.integers(0, 60), min_size=1, max_size=40), st.integers(1, 70))
def test_pieces_cover_a_selection_once(positions, length):
    positions = np.asarray(positions)
    found = list(_pieces(positions, length))
    assert sorted(np.concatenate([place for place, _ in found])) == list(range(len(positions)))
    for place, at in found:
        np.testing.assert_array_equal(positions[place], at)
        assert len(set(at // length)) == 1
    assert all(a[1][0] // length < b[1][0] // length for a, b in pairwise(found))


@given(st.integers(1, 1000), st.integers(1, 10**6), st.integers(1, 64), st.integers(1, 5000), st.integers(10**6, 10**9))
def test_pieces_fit_their_budget(a, b, events, draws, budget):
    latent = Latent("y", ("a", "b"), ("e",), (a, b, events))
    if COPIES * 8 * draws * events > budget:
        with pytest.raises(PlanRefused):
            piece_lengths(latent, draws, budget, {"b": 1024})
        return
    lengths = piece_lengths(latent, draws, budget, {"b": 1024})
    assert COPIES * 8 * draws * events * lengths["a"] * lengths["b"] <= budget
    if lengths["a"] > 1:
        assert lengths["b"] == min(b, 1024)


@dataclass(frozen=True)
class Many:
    """Standard normals for a great many units; says how many it was asked for at once."""

    seed: int = 0

    def draw(self, names, draws, units):
        return {"theta": normal(stream(self.seed, "theta"), draws[:, None], units["group"][None])}

    def with_seed(self, seed):
        return replace(self, seed=seed)


def test_memory_stays_within_the_promise(tmp_path):
    """2 million units' draws would take 1.6 GB."""
    groups, memory = 200_000, 32 << 20
    model = ps.Model(
        ps.Plate("group"),
        theta=ps.latent(lambda: Normal(0.0, 1.0), plates="group"),
        x=ps.observed(lambda theta: Normal(theta, 1.0), plates="group"),
    )
    data = xr.Dataset({"x": ("group", np.zeros(groups))})
    posterior = Posterior(Run.create(tmp_path / "run"), Context(Many(), model, data, Layout(model.plates, {"group": groups}, {})))
    posterior.quantile("theta", 0.5, draws=10, group=slice(10))
    tracemalloc.start()
    found = posterior.quantile("theta", [0.1, 0.9], draws=100, memory=memory)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < memory
    assert found.sizes == {"quantile": 2, "group": groups}
    np.testing.assert_allclose(found.mean("group"), norm.ppf([0.1, 0.9]), atol=0.03)


def test_against_the_closed_form(tmp_path):
    """theta_g | x is Gaussian, and the fit of it exact: quantiles and probabilities of 1,000 draws, within their Monte Carlo error."""
    s0, s1, sx, groups, size, draws = 0.5, 0.5, 0.8, 300, 5, 1000
    model = ps.Model(
        ps.Plate("group"), ps.Plate("observation"),
        mu=ps.latent(lambda: Normal(0.0, s0)),
        theta=ps.latent(lambda mu: Normal(mu, s1), plates="group"),
        x=ps.observed(lambda theta: Normal(theta, sx), plates=("group", "observation")),
    )  # fmt: skip
    cohort = model.sample({"group": groups, "observation": size}, seed=1)
    posterior = ps.fit(model, cohort, run=tmp_path / "run", progress=False)
    means = cohort["x"].values.mean(1)
    v = sx**2 / size
    mu_variance = 1 / (1 / s0**2 + groups / (s1**2 + v))
    mu_mean = mu_variance * means.sum() / (s1**2 + v)
    shrink = s1**2 / (s1**2 + v)
    mean = shrink * means + (1 - shrink) * mu_mean
    sd = np.sqrt(s1**2 * v / (s1**2 + v) + (1 - shrink) ** 2 * mu_variance)

    def compare(sd):
        """Standardised differences of quantiles and of probabilities; each has mean square 1 if they are right."""
        scores = {}
        for q in (0.05, 0.5, 0.9):
            error = np.sqrt(q * (1 - q) / draws) / norm.pdf(norm.ppf(q)) * sd
            scores[q] = (found.sel(quantile=q).values - (mean + norm.ppf(q) * sd)) / error
        p = norm.sf((0.2 - mean) / sd)
        usable = (p > 0.02) & (p < 0.98)
        scores["p"] = ((above.values - p) / np.sqrt(p * (1 - p) / draws))[usable]
        return {k: (s**2).mean() for k, s in scores.items()}

    found = posterior.quantile("theta", [0.05, 0.5, 0.9], draws=draws)
    above = posterior.exceedance("theta", 0.2, draws=draws, store=tmp_path / "above.zarr", memory="2 MiB")
    right = compare(sd)
    assert all(0.6 < score < 1.5 for score in right.values()), right
    wrong = compare(1.1 * sd)  # a spread that is 10 % off would be noticed
    assert wrong[0.05] > 2.0
    assert wrong["p"] > 2.0


def test_summaries_follow_their_definitions():
    rng = np.random.default_rng(0)
    draws = rng.standard_normal((50, 31))
    np.testing.assert_allclose(quantiles([0, 0.013, 0.5, 0.77, 1]).reduce(draws.copy()), np.quantile(draws, [0, 0.013, 0.5, 0.77, 1], axis=1))
    np.testing.assert_array_equal(exceedances([-1, 0.3]).reduce(draws.copy()), [(draws > t).mean(1) for t in (-1, 0.3)])
    np.testing.assert_array_equal(quantiles(0.3).reduce(draws[:, :1].copy())[0], draws[:, 0])
