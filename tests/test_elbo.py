"""The reduced model and the reduced ELBO, averaged over all selections, against the full ones."""

from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest
import torch
import xarray as xr
from scipy.stats import norm
from torch.distributions import Bernoulli, Normal

import pavi_scale as ps
from pavi_scale.ambient import precision
from pavi_scale.batching import closure, flat_positions, upward
from pavi_scale.computation import StudyComputation
from pavi_scale.elbo import Weights, local_elbo, log_root, reduced_elbo
from pavi_scale.guide import Guide
from pavi_scale.plates import Selection
from pavi_scale.reduced import Value
from tests.guide import oracle


@pytest.fixture(autouse=True)
def _double():
    with precision(torch.float64):
        yield


def _selections(study, plates):
    """Every selection of the given numbers of units of top-level plates, with inverse inclusion probabilities."""
    n = study.layout.cardinality
    weight = {p: n[p] / b for p, b in plates.items()}
    for units in product(*(combinations(range(n[p]), b) for p, b in plates.items())):
        yield closure(study.layout, dict(zip(plates, map(np.array, units), strict=True)), weight)


def _leaf_selections(study, leaf, size):
    for picked in combinations(range(study.layout.cardinality[leaf]), size):
        yield upward(study.layout, leaf, np.array(picked))


# case -> the ways in which its plates may be subsampled
WAYS = {
    "ragged 2 counties": ("ragged", lambda s: _selections(s, {"county": 2})),
    "ragged counties and extras": ("ragged", lambda s: _selections(s, {"county": 3, "extra": 1})),
    "masked": ("masked", lambda s: _selections(s, {"county": 2})),
    "three levels, by region": ("three_levels", lambda s: _selections(s, {"region": 1})),
    "three levels, by observation": ("three_levels", lambda s: _leaf_selections(s, "obs", 3)),
    "dense, two plates": ("dense_events", lambda s: _selections(s, {"subject": 2, "session": 1})),
    "dense, three plates": ("dense_events", lambda s: _selections(s, {"subject": 1, "session": 1, "obs": 1})),
    "crossed, by both parents": ("crossed", lambda s: _selections(s, {"student": 2, "lecturer": 3})),
    "crossed, by rating": ("crossed", lambda s: _leaf_selections(s, "rating", 2)),
    "dense crossed": ("crossed_events", lambda s: _selections(s, {"a": 1, "b": 2})),
    "ragged crossed with dense": ("swapped_axes", lambda s: _selections(s, {"county": 1, "year": 1})),
}
each_way = pytest.mark.parametrize("way", WAYS)


def _ground(study):
    """One value for every ground latent of the whole cohort."""
    rng = np.random.default_rng(0)
    out = {}
    for v in study.graph.model.latents:
        z = rng.normal(size=(1, *(study.layout.cardinality[p] for p in v.plates), *study.graph.links[v.name].base_shape))
        out[v.name] = Value(study.graph.links[v.name].forward(torch.from_numpy(z)), v.plates)
    return out


def _log_joint(study, selection, ground):
    reduced = study.reduced(selection)
    values = {}
    for name, value in ground.items():
        at = np.ix_(np.arange(1), *(selection.units[p] for p in value.plates))
        values[name] = Value(value.theta[at], value.plates)
    # a plate may be selected in such a way that no unit is left of one below it
    laws = [v for v in study.graph.model.of_kind("latent", "observed") if reduced.count(v.plates)]
    return sum(float((reduced.log_prob(v.name, values) * reduced.weights(v.plates)).sum()) for v in laws)


@each_way
def test_weighted_log_joint_averages_to_the_full_one(way):
    name, selections = WAYS[way]
    study = oracle.computation(name)
    ground = _ground(study)
    found = [_log_joint(study, s, ground) for s in selections(study)]
    assert len(found) > 1
    full = _log_joint(study, Selection.whole(study.layout), ground)
    assert np.std(found) > 1e-3  # the selections do differ
    assert np.mean(found) == pytest.approx(full, rel=1e-10)


@pytest.mark.parametrize("name", sorted(set(oracle.CASES) - {"coupled_events"}))  # that one's law is no product of scalars
def test_full_log_joint_is_that_of_the_model_built_unit_by_unit(name):
    study, case = oracle.computation(name), oracle.case(name)
    ground, data = _ground(study), case.data()
    theta = {k: v.theta[0].numpy() for k, v in ground.items()}
    g = case.brute(float(theta["mu"]), float(theta["s"]))
    keys = list(g.at)
    value = {k: data[k] if k in data else theta[k[0]][k[1:]] if k[0] in theta else np.nan for k in keys}
    expected = norm(0, 1).logpdf(theta["mu"]) + norm(0, 1).logpdf(theta["s"]) + np.log(2)
    for key, (constant, terms, sd) in zip(keys, g.rows, strict=True):
        if not np.isnan(value[key]):
            expected += norm(constant + sum(c * value[keys[j]] for j, c in terms), sd).logpdf(value[key])
    assert _log_joint(study, Selection.whole(study.layout), ground) == pytest.approx(float(expected), rel=1e-10)


# -- with a guide: free encodings, noise fixed per ground unit ----------------------------------------------------------------


def _with_free(name, *free):
    """A case's computation with blocks freed, and sites for all their ground units."""
    study = oracle.computation(name)
    made = StudyComputation(study.graph, study.cohort, replace(study.settings, free=free, structure={}))
    rng, state = np.random.default_rng(1), {}
    for block in made.guide.blocks:
        if block.free:
            n = int(np.prod([study.layout.cardinality[p] for p in block.plates]))
            state[f"site/{block.name}"] = rng.normal(size=(n, 2 * block.dim))
    return made, state


def _fixed_noise(study, selection):
    """Normals that belong to ground units, whichever selection they are asked for in."""

    def noise(block, shape):
        n = int(np.prod([study.layout.cardinality[p] for p in block.plates]))
        table = np.random.default_rng(len(block.name)).normal(size=(n, *shape[2:]))
        at = flat_positions(study.layout, selection, block)
        return torch.from_numpy(np.broadcast_to(table[at], shape).copy())

    return noise


FREE = {
    "ragged, nothing free": ("ragged", (), {"county": 3}, None),
    "three levels, nothing free": ("three_levels", (), {"region": 1}, None),
    "dense, subject free": ("dense_events", (("subject",),), {"subject": 2, "session": 1}, None),
    "dense, all free": ("dense_events", (("subject",), ("session", "subject")), {"subject": 2, "session": 1, "obs": 1}, None),
    "crossed, lecturer free": ("crossed", (("lecturer",),), {"student": 2}, None),
    "crossed, both free, by parents": ("crossed", (("lecturer",), ("student",)), {"student": 2, "lecturer": 2}, None),
    "crossed, both free, by rating": ("crossed", (("lecturer",), ("student",)), None, ("rating", 2)),
}


@pytest.mark.parametrize("how", FREE)
def test_reduced_elbo_averages_to_the_full_elbo(how):
    name, free, plates, leaf = FREE[how]
    study, state = _with_free(name, *free)
    chosen = list(_leaf_selections(study, *leaf) if leaf else _selections(study, plates))
    eps = torch.tensor([[0.4, -0.7], [0.1, 1.2]])
    raw = torch.tensor([[-1.0, 0.0], [0.3, -0.5]])

    def elbo(selection):
        reduced = study.reduced(selection)
        sites = {b: tuple(t.chunk(2, -1)) for b, t in study.rows(state, selection, "site").items()}
        weights = Weights(torch.tensor([0.2, -0.1]), raw, sites)
        return reduced_elbo(study.guide, reduced, study.space, weights, eps, _fixed_noise(study, selection)).detach().numpy()

    full = elbo(Selection.whole(study.layout))
    found = np.array([elbo(s) for s in chosen])
    assert found.std(0).min() > 1e-3
    np.testing.assert_allclose(found.mean(0), full, rtol=1e-9)


def test_gradient_of_the_reduced_elbo_averages_to_the_full_one():
    study, state = _with_free("crossed", ("lecturer",), ("student",))

    def gradient(selection):
        table = {k: torch.tensor(v, requires_grad=True) for k, v in state.items()}
        loc, raw = torch.zeros(2, requires_grad=True), torch.zeros(2, 2, requires_grad=True)
        blocks = {b.name: b for b in study.guide.blocks}
        sites = {k[5:]: tuple(t[flat_positions(study.layout, selection, blocks[k[5:]])].chunk(2, -1)) for k, t in table.items()}
        value = reduced_elbo(
            study.guide, study.reduced(selection), study.space, Weights(loc, raw, sites), torch.tensor([[0.3, -0.2]]), _fixed_noise(study, selection)
        )
        return torch.cat([g.flatten() for g in torch.autograd.grad(value.sum(), [loc, raw, *table.values()])]).detach().numpy()

    full = gradient(Selection.whole(study.layout))
    found = np.mean([gradient(s) for s in _leaf_selections(study, "rating", 3)], 0)
    assert np.abs(full).min() < np.abs(full).max()
    np.testing.assert_allclose(found, full, rtol=1e-8, atol=1e-9)


def test_root_density_is_the_gaussians():
    rng = np.random.default_rng(0)
    loc, raw = torch.from_numpy(rng.normal(size=3)), torch.from_numpy(rng.normal(size=(3, 3)))
    weights = Weights(loc, raw)
    z = torch.from_numpy(rng.normal(size=(5, 3)))
    expected = torch.distributions.MultivariateNormal(loc, scale_tril=weights.chol).log_prob(z)
    torch.testing.assert_close(log_root(loc, weights.chol, z), expected)
    assert log_root(torch.zeros(0), torch.zeros(0, 0), torch.zeros(4, 0)).tolist() == [0.0] * 4


def test_elbo_is_the_evidence_when_the_root_too_is_exact():
    # Known scales: root and locals are jointly Gaussian, so q(root) can be exact, and no draw differs from another.
    rng = np.random.default_rng(0)
    s0, s1, sx, groups, n = 0.5, 0.8, 0.3, 4, 3
    x = rng.normal(size=(groups, n))
    model = ps.Model(
        ps.Plate("group"),
        ps.Plate("obs"),
        mu=ps.latent(lambda: Normal(0.0, s0)),
        theta=ps.latent(lambda mu: Normal(mu, s1), plates="group"),
        x=ps.observed(lambda theta: Normal(theta, sx), plates=("group", "obs")),
    )
    study = oracle.compute(model, xr.Dataset({"x": (("group", "obs"), x)}))
    v = s1**2 + sx**2 / n
    precision_mu = 1 / s0**2 + groups / v
    mean = x.mean(1).sum() / v / precision_mu
    weights = Weights(torch.tensor([mean]), torch.tensor([[-0.5 * np.log(precision_mu)]]))
    elbo = reduced_elbo(study.guide, oracle.whole(study), study.space, weights, torch.randn(20, 1), lambda block, shape: torch.randn(shape)).detach().numpy()
    cov = s0**2 * np.ones((groups * n,) * 2) + np.kron(s1**2 * np.eye(groups), np.ones((n, n))) + sx**2 * np.eye(groups * n)
    evidence = torch.distributions.MultivariateNormal(torch.zeros(groups * n), torch.from_numpy(cov)).log_prob(torch.from_numpy(x.ravel()))
    np.testing.assert_allclose(elbo, float(evidence), rtol=0, atol=1e-8)
    # the same with halved variance is below it, and its draws differ
    halved = Weights(weights.loc, weights.raw - 0.5 * np.log(2))
    worse = reduced_elbo(study.guide, oracle.whole(study), study.space, halved, torch.randn(2000, 1), lambda block, shape: torch.randn(shape)).detach().numpy()
    # KL(N(m, v/2) || N(m, v)) = (log 2 - 1/2) / 2
    assert float(evidence) - worse.mean() == pytest.approx(0.5 * (np.log(2) - 0.5), abs=4.5 * worse.std() / np.sqrt(2000))
    assert worse.std() > 0.05


# -- missing observations -----------------------------------------------------------------------------------------------------


def _bernoulli(missing):
    return ps.Model(
        ps.Plate("group"),
        ps.Plate("obs", within="group"),
        mu=ps.latent(lambda: Normal(0.0, 1.0)),
        w=ps.covariate(plates="obs"),
        t=ps.latent(lambda mu: Normal(mu, 1.0), plates="group"),
        y=ps.observed(lambda t, w: Bernoulli(logits=t + w), plates="obs", missing="mask" if missing else None),
    )


def test_masked_entries_count_as_rows_that_are_not_there():
    rng = np.random.default_rng(0)
    group, y, w = np.repeat(np.arange(4), 5), rng.integers(0, 2, 20).astype(float), rng.normal(size=20)
    gone = rng.uniform(size=20) < 0.4
    gone[group == 0] = np.arange(5) > 0

    def cohort(keep, y):
        return xr.Dataset(
            {"y": ("obs", y[keep]), "w": ("obs", w[keep]), "obs_group": ("obs", group[keep], {"instance_dimension": "group"}), "g": ("group", np.zeros(4))}
        )

    masked = oracle.compute(_bernoulli(True), cohort(np.full(20, True), np.where(gone, np.nan, y)))
    dropped = oracle.compute(_bernoulli(False), cohort(~gone, y))
    noise = torch.randn(6, 4, 1, 1)
    results = []
    for study in (masked, dropped):
        reduced, root = oracle.whole(study), study.space.values(torch.linspace(-1, 1, 6)[:, None])
        elbo = local_elbo(study.guide, reduced, root, Weights(torch.zeros(0), torch.zeros(0, 0)), lambda b, s: noise, particles=6, differentiable=False)
        results.append((elbo, study.guide.local_bound(reduced, root, 6)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-9, atol=1e-9)


def test_what_a_masked_entry_might_have_been_does_not_matter():
    case = oracle.case("masked")
    study = oracle.compute(case.model, case.cohort)
    bounds = []
    for filler in (0.0, 1e6, -3.0):
        reduced = oracle.whole(oracle.compute(case.model, case.cohort))
        seen = reduced.data["y"]
        reduced.data["y"] = torch.where(reduced.masks["y"] > 0, seen, filler)
        bounds.append(study.guide.local_bound(reduced, study.space.values(torch.tensor(oracle.POINTS)), 3).detach())
    torch.testing.assert_close(bounds[0], bounds[1], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(bounds[0], bounds[2], rtol=1e-10, atol=1e-10)


def test_guide_needs_no_structure():
    # What `probe` finds saves time; without it the iterative search gives the same numbers.
    study, case = oracle.computation("three_levels"), oracle.case("three_levels")
    plain = Guide(study.graph)
    bound = plain.local_bound(oracle.whole(study), study.space.values(torch.tensor(oracle.POINTS)), 3)
    np.testing.assert_allclose(bound.detach().numpy(), [case.evidence(z) for z in oracle.POINTS], rtol=1e-8)
