"""Lazy draws: a slice is a slice of the whole, and the whole follows the posterior."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.distributions import Bernoulli, Normal, Poisson, StudentT

import pavi_scale as ps
from pavi_scale.computation import StudyComputation
from pavi_scale.posterior.sampler import Latent, fetch
from pavi_scale.sampling import GuideSampler, shard_length
from tests.guide import oracle


def _rng():
    return np.random.default_rng(0)


def _index(child, parent, positions):
    return {f"{child}_{parent}": (child, np.asarray(positions), {"instance_dimension": parent})}


def _bernoulli():
    model = ps.Model(
        ps.Plate("group"),
        ps.Plate("obs", within="group"),
        mu=ps.latent(lambda: Normal(0.0, 1.0)),
        s=ps.latent(lambda: Normal(0.0, 1.0)),
        t=ps.latent(lambda mu, s: Normal(mu, s.exp()), plates="group"),
        y=ps.observed(lambda t: Bernoulli(logits=t), plates="obs"),
    )
    return model, xr.Dataset({"y": ("obs", _rng().integers(0, 2, 20).astype(float)), **_index("obs", "group", np.repeat(np.arange(5), 4))})


def _poisson():
    model = ps.Model(
        ps.Plate("region"),
        ps.Plate("county", within="region"),
        ps.Plate("house", within="county"),
        mu=ps.latent(lambda: Normal(0.0, 1.0)),
        s=ps.latent(lambda: Normal(0.0, 1.0)),
        r=ps.latent(lambda mu: Normal(mu, 1.0), plates="region"),
        c=ps.latent(lambda r, s: Normal(r, s.exp()), plates="county"),
        y=ps.observed(lambda c: Poisson(c.exp()), plates="house"),
    )
    county, house = np.array([0, 1, 1, 2]), np.array([0, 0, 1, 2, 2, 3])
    return model, xr.Dataset({"y": ("house", _rng().poisson(4, 6).astype(float)), **_index("county", "region", county), **_index("house", "county", house)})


def _crossed():
    model = ps.Model(
        ps.Plate("student"),
        ps.Plate("item"),
        mu=ps.latent(lambda: Normal(0.0, 1.0)),
        s=ps.latent(lambda: Normal(0.0, 1.0)),
        a=ps.latent(lambda mu, s: Normal(mu, s.exp()), plates="student"),
        b=ps.latent(lambda: Normal(0.0, 1.0), plates="item"),
        y=ps.observed(lambda a, b: Bernoulli(logits=a - b), plates=("student", "item")),
    )
    return model, xr.Dataset({"y": (("student", "item"), _rng().integers(0, 2, (4, 3)).astype(float))})


def _childless(**variables):
    """Four groups, the third without observations."""
    model = ps.Model(ps.Plate("g"), ps.Plate("o", within="g"), mu=ps.latent(lambda: Normal(0.0, 1.0)), s=ps.latent(lambda: Normal(0.0, 1.0)), **variables)
    return model, xr.Dataset({"y": ("o", np.array([0.0, 1.0, 0.0, 3.0, 1.0, 2.0])), **_index("o", "g", [0, 0, 1, 1, 3, 3])}, coords={"g": list("abcd")})


def _known():  # no root enters the observations: they are summed up once
    return _childless(
        a=ps.latent(lambda mu: Normal(mu, 2.0), plates="g"),
        y=ps.observed(lambda a: Normal(a, 1.0), plates="o"),
    )


def _below():  # a latent of each observation, alike in all
    return _childless(
        a=ps.latent(lambda mu: Normal(mu, 2.0), plates="g"),
        z=ps.latent(lambda a: Normal(a, 1.0), plates="o"),
        y=ps.observed(lambda z: Normal(z, 1.0), plates="o"),
    )


def _below_counts():
    return _childless(
        a=ps.latent(lambda mu, s: Normal(mu, s.exp()), plates="g"),
        z=ps.latent(lambda a: Normal(a, 1.0), plates="o"),
        y=ps.observed(lambda z: Poisson(z.exp()), plates="o"),
    )


CHILDLESS = {"known": _known, "below": _below, "below, counts": _below_counts}
OTHERS = {"bernoulli": _bernoulli, "poisson, three levels": _poisson, "bernoulli, crossed": _crossed} | CHILDLESS
GAUSSIAN = ["ragged", "two_latents", "three_levels", "dense_events", "crossed", "crossed_events", "swapped_axes"]
DRAWS = 12


@cache
def _sampler(name, chunk=None):
    study = oracle.compute(*OTHERS[name]()) if name in OTHERS else oracle.computation(name)
    if chunk:
        study = StudyComputation(study.graph, study.cohort, replace(study.settings, chunk=chunk))
    points = np.random.default_rng(1).normal(size=(7, 2))
    return GuideSampler(
        study,
        {"pool/points": points, "pool/weight": np.array([0.1, 0.3, 0.05, 0.05, 0.2, 0.2, 0.1]), "root/loc": np.zeros(2), "root/raw": np.zeros((2, 2))},
        base=3,
    )


def _names(sampler):
    return [v.name for v in sampler.computation.graph.model.latents]


@cache
def _whole(name):
    sampler = _sampler(name)
    return sampler.draw(_names(sampler), np.arange(DRAWS), {})


@pytest.mark.parametrize("name", [*GAUSSIAN, *OTHERS])
@settings(max_examples=15)
@given(data=st.data())
def test_a_slice_is_the_slice_of_the_whole(name, data):
    sampler = _sampler(name)
    model, cardinality = sampler.computation.graph.model, sampler.computation.layout.cardinality
    names = data.draw(st.lists(st.sampled_from(_names(sampler)), min_size=1, unique=True))
    draws = np.array(sorted(data.draw(st.sets(st.integers(0, DRAWS - 1), min_size=1))))
    plates = {p for n in names for p in model.variables[n].plates}
    units = {p: np.array(sorted(data.draw(st.sets(st.integers(0, cardinality[p] - 1), min_size=1)))) for p in sorted(plates) if data.draw(st.booleans())}
    part = sampler.draw(names, draws, units)
    assert list(part) == names
    for n in names:
        at = np.ix_(draws, *(units.get(p, np.arange(cardinality[p])) for p in model.variables[n].plates))
        np.testing.assert_allclose(part[n], _whole(name)[n][at], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["three_levels", "dense_events", "crossed", "poisson, three levels"])
@settings(max_examples=10)
@given(data=st.data())
def test_positions_in_any_order_with_repeats(name, data):
    sampler = _sampler(name)
    study = sampler.computation
    latents = [Latent(v.name, v.plates, v.dims, tuple(study.layout.cardinality[p] for p in v.plates) + study.graph.shape(v)) for v in study.graph.model.latents]
    draws = np.array(data.draw(st.lists(st.integers(0, DRAWS - 1), min_size=1, max_size=6)))
    plates = sorted({p for v in latents for p in v.plates})
    picks = {p: np.array(data.draw(st.lists(st.integers(0, study.layout.cardinality[p] - 1), min_size=1, max_size=6))) for p in plates}
    found = fetch(sampler, latents, draws, picks)
    for v in latents:
        at = np.ix_(draws, *(picks[p] for p in v.plates))
        np.testing.assert_allclose(found[v.name], _whole(name)[v.name][at], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [*GAUSSIAN, *OTHERS])
@pytest.mark.parametrize("chunk", [1, 100])
def test_draws_do_not_depend_on_how_many_are_computed_at_once(name, chunk):
    sampler = _sampler(name, chunk)
    found = sampler.draw(_names(sampler), np.arange(DRAWS), {})
    for n, value in found.items():
        np.testing.assert_allclose(value, _whole(name)[n], rtol=1e-9, atol=1e-9)


def test_a_unit_with_nothing_below_it_can_be_asked_for_alone():
    found = _sampler("ragged").draw(["alpha"], np.arange(DRAWS), {"county": np.array([2])})
    np.testing.assert_allclose(found["alpha"], _whole("ragged")["alpha"][:, 2:3], rtol=1e-9)


@pytest.mark.parametrize("name", CHILDLESS)
def test_a_group_without_observations_alone_has_the_draws_it_has_among_others(name):
    sampler = _sampler(name)
    for names in (["a"], [n for n in _names(sampler) if n != "s"]):
        found = sampler.draw(names, np.arange(DRAWS), {"g": np.array([2])})
        np.testing.assert_allclose(found["a"], _whole(name)["a"][:, 2:3], rtol=1e-9)
    # Shards of one group, that one among them.
    assert shard_length(_sampler(name, 1).computation) == 1
    assert np.isfinite(_sampler(name, 1).elbo(4, 0)).all()


def test_a_group_without_observations_follows_its_prior_given_the_mean_of_groups():
    posterior = ps.fit(*_known(), seed=0, progress=False)
    count = 4000
    alone = posterior.sample(count, g="c")
    np.testing.assert_array_equal(alone["a"].values, posterior.sample(count)["a"].sel(g="c").values)
    np.testing.assert_array_equal(posterior.datatree["posterior"]["a"].sel(g="c").values[0], alone["a"].values[:1000])
    white = (alone["a"].values - alone["mu"].values) / 2.0
    assert stats.kstest(white, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(white, alone["mu"].values)[0, 1]) < 4 / np.sqrt(count)


@pytest.mark.parametrize("encoding", ["encoder", "hybrid"])
def test_a_group_without_observations_has_an_encoding_too(encoding):
    model = ps.Model(
        ps.Plate("g"), ps.Plate("o", within="g"), mu=ps.latent(lambda: Normal(0.0, 1.0)), a=ps.latent(lambda mu: Normal(mu, 2.0), plates="g"),
        w=ps.observed(lambda a: Normal(a, 5.0), plates="g"), y=ps.observed(lambda a: StudentT(3.0, a, 1.0), plates="o"),
    )  # fmt: skip
    cohort = _known()[1].assign(w=("g", np.array([0.0, 1.0, 2.0, 1.0])))
    for study in ((model, cohort), _below_counts()):
        posterior = ps.fit(*study, seed=0, encoding=encoding, progress=False)
        whole = posterior.sample(7)["a"]
        for g in "ca":
            np.testing.assert_allclose(posterior.sample(7, g=g)["a"].values, whole.sel(g=g).values, rtol=1e-9)
            np.testing.assert_allclose(posterior.datatree["posterior"]["a"].sel(g=g).values[0, :7], whole.sel(g=g).values, rtol=1e-9)  # alone


def test_another_seed_is_another_stream_and_the_same_seed_the_same():
    sampler = _sampler("three_levels")
    other = sampler.with_seed(1).draw(["r", "h"], np.arange(DRAWS), {})
    again = sampler.with_seed(1).with_seed(0).draw(["r", "h"], np.arange(DRAWS), {})
    for n in ("r", "h"):
        assert np.abs(other[n] - _whole("three_levels")[n]).min() > 1e-12
        np.testing.assert_array_equal(again[n], _whole("three_levels")[n])


def test_latents_of_one_draw_belong_together():
    # Locals follow the root point of their own draw, whichever names are asked for together.
    alone = _sampler("ragged").draw(["mu"], np.arange(DRAWS), {})["mu"]
    np.testing.assert_array_equal(alone, _whole("ragged")["mu"])
    assert set(alone.tolist()) <= set(_sampler("ragged").state["pool/points"][:, 0].tolist())


def test_root_points_are_drawn_by_their_weights():
    sampler = _sampler("ragged")
    found = sampler.root_points(np.arange(20_000))
    counts = [(found == p).all(1).sum() for p in sampler.state["pool/points"]]
    assert sum(counts) == 20_000
    assert stats.chisquare(counts, 20_000 * sampler.state["pool/weight"]).pvalue > 1e-3


@pytest.mark.parametrize("name", GAUSSIAN)
def test_draws_follow_the_conjugate_posterior(name):
    sampler, case, count = _sampler(name), oracle.case(name), 3000
    point = np.array([0.4, -0.3])
    fixed = GuideSampler(sampler.computation, {**sampler.state, "pool/points": point[None], "pool/weight": np.ones(1)}, base=5)
    found = fixed.draw([v.name for v in case.model.latents if v.plates], np.arange(count), {})
    _, keys, mean, cov = case.brute(point[0], np.exp(point[1])).posterior(case.data())
    draws = np.stack([found[k[0]][(slice(None), *k[1:])] for k in keys], 1)
    assert _pvalue(draws, mean, cov) > 1e-4
    assert _pvalue(mean + np.sqrt(0.5) * (draws - mean), mean, cov) < 1e-9  # halved variance is seen
    assert _pvalue(draws + 0.2 * np.sqrt(np.diagonal(cov)), mean, cov) < 1e-9  # and so is a shift


def _pvalue(draws, mean, cov):
    """Least p-value of tests that whitened draws are standard normal: lengths, coordinate means, products of coordinates; Bonferroni."""
    white = np.linalg.solve(np.linalg.cholesky(cov), (draws - mean).T).T
    n, d = white.shape
    length = stats.kstest((white**2).sum(1), stats.chi2(d).cdf).pvalue
    means = stats.norm.sf(np.abs(white.mean(0)) * np.sqrt(n)).min() * 2 * d
    products = (white.T @ white / n)[np.triu_indices(d, 1)]
    cross = stats.norm.sf(np.abs(products).max() * np.sqrt(n)) * d * (d - 1) if d > 1 else 1.0
    return min(1.0, 3 * min(length, means, cross))


def test_elbo_of_the_exact_guide_is_the_evidence_without_error():
    s0, s1, sx, n = 0.5, 0.8, 0.3, np.array([3, 1, 4])
    group = np.repeat(np.arange(3), n)
    x = _rng().normal(size=len(group))
    model = ps.Model(
        ps.Plate("group"),
        ps.Plate("obs", within="group"),
        mu=ps.latent(lambda: Normal(0.0, s0)),
        theta=ps.latent(lambda mu: Normal(mu, s1), plates="group"),
        x=ps.observed(lambda theta: Normal(theta, sx), plates="obs"),
    )
    study = oracle.compute(model, xr.Dataset({"x": ("obs", x), **_index("obs", "group", group)}))
    v, mean = s1**2 + sx**2 / n, np.bincount(group, x) / n
    precision = 1 / s0**2 + (1 / v).sum()
    state = {
        "pool/points": np.zeros((1, 1)),
        "pool/weight": np.ones(1),
        "root/loc": np.array([(mean / v).sum() / precision]),
        "root/raw": np.array([[-0.5 * np.log(precision)]]),
    }
    same = group[:, None] == group
    evidence = stats.multivariate_normal(np.zeros(len(x)), s0**2 + s1**2 * same + sx**2 * np.eye(len(x))).logpdf(x)
    for chunk in (1, 1 << 18):
        sampler = GuideSampler(StudyComputation(study.graph, study.cohort, replace(study.settings, chunk=chunk)), state)
        nats, error = sampler.elbo(8, 0)
        assert nats == pytest.approx(evidence, abs=1e-8)
        assert error < 1e-8
        assert 1 <= shard_length(sampler.computation) <= 3


@pytest.mark.parametrize("particles", [2, 3, 4])
def test_the_standard_error_of_few_particles_is_the_spread_over_seeds(particles):
    # A root near the fit: far from it the bound has tails that two hundred seeds do not average out.
    sampler = _sampler("bernoulli")
    narrow = GuideSampler(sampler.computation, {**sampler.state, "root/raw": np.log(0.2) * np.eye(2)}, base=3)
    found = np.array([narrow.elbo(particles, seed) for seed in range(200)])
    assert np.isfinite(found).all()
    assert (found[:, 1] ** 2).mean() == pytest.approx(found[:, 0].var(), rel=0.4)


@pytest.mark.parametrize("particles", [5, 6])
def test_the_standard_error_of_the_bound_is_its_spread_over_seeds(particles):
    """Odd numbers of particles, too, of which one would be without its mirror image; the posterior of the scale is no normal."""
    model = ps.Model(
        ps.Plate("i"), a=ps.latent(lambda: Normal(0.0, 2.0)), s=ps.latent(lambda: Normal(0.0, 1.0)),
        y=ps.observed(lambda a, s: Normal(a, s.exp()), plates="i"),
    )  # fmt: skip
    sampler = ps.fit(model, xr.Dataset({"y": ("i", np.array([0.3, 1.4, 0.8, 2.0]))}), progress=False)._context.sampler
    narrow = GuideSampler(sampler.computation, {**sampler.state, "root/raw": sampler.state["root/raw"] + np.log(0.3) * np.eye(2)})
    found, errors = np.array([narrow.elbo(particles, seed) for seed in range(3000)]).T
    assert found.std() == pytest.approx(np.sqrt((errors**2).mean()), rel=0.05)
