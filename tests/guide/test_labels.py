"""Labelled components: sweeps against quadrature, autograd and the generic path."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.stats import t as student
from torch.distributions import Categorical, HalfNormal, Independent, LogNormal, MixtureSameFamily, Normal

import pavi_scale as ps
from pavi_scale.ambient import precision
from pavi_scale.cohort import open_cohort
from pavi_scale.guide import labels, sweeps
from pavi_scale.guide.blocks import labelled
from pavi_scale.guide.curvature import LocalModel
from pavi_scale.guide.guide import Guide
from pavi_scale.guide.labels import LabelledCore, Parents, at_least
from pavi_scale.guide.local import fit_core
from pavi_scale.guide.parents import descend
from pavi_scale.plates import Selection
from pavi_scale.reduced import Reduced, Value
from pavi_scale.settings import make_graph

LABELS, FEATURES = 3, 2


def model_of(law, scale=1.5):
    return ps.Model(
        ps.Plate("subject"), ps.Plate("session"), ps.Plate("vertex"), sizes={"network": LABELS},
        kappa=ps.latent(lambda: LogNormal(-0.7, 0.2)),
        m=ps.latent(lambda: Normal(0.0, 2.0), plates=("subject", "session"), dims=("network", "feature")),
        rho=ps.latent(lambda: Normal(0.0, scale), plates="vertex", dims="network"),
        z=ps.latent(lambda rho: Normal(rho, 0.8), plates=("subject", "vertex"), dims="network"),
        x=ps.observed(law, plates=("subject", "session", "vertex"), dims="feature"),
    )  # fmt: skip


def fast(z, m, kappa):
    return ps.laws.IsotropicNormalMixture(z, m, kappa)


def generic(z, m, kappa):
    return MixtureSameFamily(Categorical(logits=z), Independent(Normal(m, kappa), 1))


FREE = frozenset({frozenset({"subject", "session"})})


def setting(law, subjects=4, vertices=70, seed=0, dtype=torch.float32, scale=1.5):
    """A core of a small cohort's labelled component at two root points, its local model and its cohort."""
    model = model_of(law, scale)
    data = model_of(generic, scale).sample({"subject": subjects, "session": 2, "vertex": vertices, "feature": FEATURES}, seed=seed)
    cohort = open_cohort(data, model)
    graph = make_graph(cohort)
    structure = {"vertex+subject*vertex": {"uniform": ["rho", "z"]}}
    guide = Guide(graph, FREE, structure)
    component = next(c for c in guide.components if c.name == "vertex+subject*vertex")
    with precision(dtype):
        tensors = {"x": torch.as_tensor(data["x"].transpose("subject", "session", "vertex", "feature").values).to(dtype)}
        reduced = Reduced(graph, Selection.whole(cohort.layout), tensors, dtype=dtype)
        m = torch.as_tensor(data["m"].transpose("subject", "session", "network", "feature").values).to(dtype)
        values = {
            "kappa": Value(torch.as_tensor([float(data["kappa"]), 1.2 * float(data["kappa"])], dtype=dtype), ()),
            "m": Value(torch.stack([m, m + 0.1]), ("subject", "session")),
        }
        return data, graph, component, LocalModel(component, reduced, values, {}, 2)


def core_of(law, wanted="moments", **sizes):
    data, graph, component, local = setting(law, **sizes)
    with precision(torch.float32):
        name = labelled(component, graph)
        return data, local, LabelledCore(local, name, wanted)


def log_joint(data, k, rho, z, vertex):
    """Log p(rho, z, x) of one vertex, up to nothing: rho `[..., L]`, z `[..., S, L]`."""
    m = data["m"].transpose("subject", "session", "network", "feature").values + (0.1 if k else 0.0)
    kappa = float(data["kappa"]) * (1.2 if k else 1.0)
    x = data["x"].transpose("subject", "session", "vertex", "feature").values[:, :, vertex]
    square = ((x[:, :, None] - m) ** 2).sum(-1)
    evidence = -0.5 * square / kappa**2 - FEATURES * np.log(kappa * np.sqrt(2 * np.pi))
    logits = z[..., :, None, :]
    data_term = (np.logaddexp.reduce(logits + evidence, -1) - np.logaddexp.reduce(logits, -1)).sum((-1, -2))
    norm = lambda d, s: (-0.5 * (d / s) ** 2 - np.log(s * np.sqrt(2 * np.pi))).sum(-1)  # noqa: E731
    return norm(rho, 1.5) + norm(z - rho[..., None, :], 0.8).sum(-1) + data_term


def importance(data, k, core, vertex, draws=20_000):
    """Posterior moments and log evidence of one vertex by importance sampling from a wide Gaussian about the core."""
    rng = np.random.default_rng(vertex)
    mean = {b: t[0][k].double().numpy() for b, t in core.moments().items()}
    sd = {b: t[1][k].double().sqrt().numpy() for b, t in core.moments().items()}
    vertices, subjects = len(mean["vertex"]), len(mean["subject*vertex"]) // len(mean["vertex"])
    at = np.arange(subjects) * vertices + vertex
    # Parents first, children about their shifted prior: heavy enough on every side.
    rho = mean["vertex"][vertex, 0] + 1.2 * sd["vertex"][vertex, 0] * rng.standard_t(8, (draws, LABELS))
    centre = 0.7 * (rho - mean["vertex"][vertex, 0])[:, None] + mean["subject*vertex"][at, 0]
    z = centre + 0.85 * rng.standard_t(8, (draws, subjects, LABELS))
    log_q = student.logpdf((rho - mean["vertex"][vertex, 0]) / (1.2 * sd["vertex"][vertex, 0]), 8).sum(-1) - np.log(1.2 * sd["vertex"][vertex, 0]).sum()
    log_q = log_q + (student.logpdf((z - centre) / 0.85, 8) - np.log(0.85)).sum((-1, -2))
    weight = log_joint(data, k, rho, z, vertex) - log_q
    evidence = np.logaddexp.reduce(weight) - np.log(draws)
    w = np.exp(weight - weight.max())
    w /= w.sum()
    moments = lambda v: (np.tensordot(w, v, 1), np.sqrt(np.tensordot(w, v**2, 1) - np.tensordot(w, v, 1) ** 2))  # noqa: E731
    return evidence, 1 / (w**2).sum(), moments(rho), moments(z)


def test_only_mixtures_by_latent_logits_are_labelled():
    for law in (fast, generic):
        _, graph, component, _ = setting(law)
        assert graph.labelled == {"x": "z"}
        assert labelled(component, graph) == "x"
    _, graph, component, _ = setting(lambda z, m, kappa: MixtureSameFamily(Categorical(logits=2 * z), Independent(Normal(m, kappa), 1)))
    assert graph.labelled == {}
    assert labelled(component, graph) is None
    _, graph, _, _ = setting(lambda z, m, kappa: MixtureSameFamily(Categorical(logits=z), Independent(Normal(m + z[:, None], kappa), 1)))
    assert graph.labelled == {}


def test_evidence_is_that_of_each_component():
    data, local, _ = core_of(fast)
    with precision(torch.float32):
        own = local.reduced.evidence("x", local.given)
        other = setting(generic)[3]
        assert torch.allclose(own, other.reduced.evidence("x", other.given), atol=1e-4)
        z = torch.zeros(2, 4, 70, LABELS)
        shown = local.reduced.log_prob("x", {**local.given, "z": Value(z, ("subject", "vertex"))})
    assert torch.allclose(shown, torch.logsumexp(own, -1) - np.log(LABELS), atol=1e-4)
    assert own.shape == (2, 4, 2, 70, LABELS)
    assert data.sizes["vertex"] == 70


@pytest.mark.parametrize("k", [0, 1])
def test_moments_and_evidence_agree_with_importance_sampling(k):
    data, _, core = core_of(fast, subjects=3)
    double = setting(fast, subjects=3, dtype=torch.float64)[3]
    with precision(torch.float64):
        mode = {b: t[k, :, 0].numpy() for b, t in fit_core(double, differentiable=False).mode.items()}
    worst, plain, gaps = [], [], []
    for vertex in range(0, 70, 10):
        evidence, effective, (rho, rho_sd), (z, z_sd) = importance(data, k, core, vertex)
        assert effective > 300
        found = {b: (t[0][k].numpy(), t[1][k].sqrt().numpy()) for b, t in core.moments().items()}
        at = np.arange(3) * 70 + vertex
        worst.append(np.abs((found["subject*vertex"][0][at, 0] - z) / z_sd).max())
        worst.append(np.abs((found["vertex"][0][vertex, 0] - rho) / rho_sd).max())
        plain.append(np.abs((mode["subject*vertex"][at] - z) / z_sd).max())
        plain.append(np.abs((mode["vertex"][vertex] - rho) / rho_sd).max())
        gaps.append(core.value[k][vertex] - evidence)
        assert np.abs(found["subject*vertex"][1][at, 0] / z_sd - 1).max() < 0.12
        assert np.abs(found["vertex"][1][vertex, 0] / rho_sd - 1).max() < 0.12
    # Three leaves: the parent's own skewness is left out, and the more there are the less it matters. The joint mode lies further off.
    assert max(worst) < 0.2
    assert np.mean(worst) < 0.6 * np.mean(plain)
    assert np.abs(gaps).max() < 0.15


def test_the_parents_mean_stays_right_as_leaves_are_added():
    # A joint mode of parent and leaves is off by a constant while the posterior narrows: with 400 leaves, by several of its sds.
    data, _, core = core_of(fast, subjects=400, vertices=64, seed=2)
    covariance = np.linalg.inv(core.factor[0] @ core.factor[0].transpose(0, 2, 1))
    away = data["rho"].values - core.top[0].T
    contrast = (away[:, 0] - away[:, 1]) / np.sqrt(covariance[:, 0, 0] + covariance[:, 1, 1] - 2 * covariance[:, 0, 1])
    leaves_mean, leaves_variance = (t[0].numpy()[:, 0] for t in core.moments()["subject*vertex"])
    truth = data["z"].transpose("subject", "vertex", "network").values.reshape(-1, LABELS)
    leaves = (truth - leaves_mean) / np.sqrt(leaves_variance)
    # Differences between labels are what data speak of: 64 of them here.
    assert 0.75 < np.sqrt(np.mean(contrast**2)) < 1.3
    assert abs(contrast.mean()) < 0.4
    assert abs((np.abs(leaves) < 0.6745).mean() - 0.5) < 0.02
    assert abs((np.abs(leaves) < 1.6449).mean() - 0.9) < 0.02
    narrow = (truth - leaves_mean) / np.sqrt(0.5 * leaves_variance)
    assert abs((np.abs(narrow) < 0.6745).mean() - 0.5) > 0.05


def test_the_expected_evidence_has_the_gradient_of_the_log_marginal(monkeypatch):
    # Fisher's identity, against differences of the value along kappa and along a shift of all fingerprints.
    monkeypatch.setattr(labels, "SLAB", 200)  # several slabs
    _, local, core = core_of(fast, "shares", subjects=40)
    assert len(core.slabs()) > 4
    shares = core.shares()
    assert np.abs(shares.sum(-1) - 1).max() < 1e-5
    with precision(torch.float32):
        moving = {n: Value(v.theta.clone().requires_grad_(), v.plates) for n, v in local.given.items()}
        surrogate = core.expected(moving)
        slope = dict(zip(moving, torch.autograd.grad(surrogate.sum(), [v.theta for v in moving.values()]), strict=True))
        for name, step in (("kappa", 0.02), ("m", 0.02)):
            value = []
            for sign in (1, -1):
                moved = {**local.given, name: Value(local.given[name].theta + sign * step, local.given[name].plates)}
                value.append(LabelledCore(LocalModel(local.component, local.reduced, moved, {}, 2), "x").log_marginal(torch.ones(70)).numpy())
            difference = (value[0] - value[1]) / (2 * step)
            assert slope[name].reshape(2, -1).sum(1).numpy() == pytest.approx(difference, rel=0.02, abs=0.02 * 40 * 2 * 70)


def test_one_block_without_a_parent():
    model = ps.Model(
        ps.Plate("unit"), ps.Plate("visit"), sizes={"label": LABELS},
        s=ps.latent(lambda: HalfNormal(1.0)),
        c=ps.latent(lambda: Normal(0.0, 2.0), plates="visit", dims=("label",)),
        z=ps.latent(lambda: Normal(0.3, 1.2), plates="unit", dims="label"),
        x=ps.observed(lambda z, c, s: MixtureSameFamily(Categorical(logits=z), Normal(c, s)), plates=("unit", "visit")),
    )  # fmt: skip
    data = model.sample({"unit": 30, "visit": 3}, seed=1)
    cohort = open_cohort(data, model)
    graph = make_graph(cohort)
    guide = Guide(graph, frozenset({frozenset({"visit"})}), {"unit": {"uniform": ["z"]}})
    component = next(c for c in guide.components if c.name == "unit")
    assert labelled(component, graph) == "x"
    with precision(torch.float32):
        reduced = Reduced(graph, Selection.whole(cohort.layout), {"x": torch.as_tensor(data["x"].values).float()}, dtype=torch.float32)
        values = {"s": Value(torch.tensor([0.5]), ()), "c": Value(torch.as_tensor(data["c"].values).float()[None], ("visit",))}
        local = LocalModel(component, reduced, values, {}, 1)
        core = LabelledCore(local, "x", "moments")
    mean, variance = (t[0, :, 0].double().numpy() for t in core.moments()["unit"])
    rng = np.random.default_rng(0)
    z = 0.3 + 1.2 * rng.standard_normal((100_000, 1, LABELS))  # the prior is the proposal
    evidence = -0.5 * ((data["x"].values[:, :, None] - data["c"].values) / 0.5) ** 2
    log_weight = (np.logaddexp.reduce(z[:, :, None] + evidence, -1) - np.logaddexp.reduce(z[:, :, None], -1)).sum(-1)
    w = np.exp(log_weight - log_weight.max(0))
    w /= w.sum(0)
    truth = np.einsum("mn,mnl->nl", w, np.broadcast_to(z, (len(z), 30, LABELS)))
    sd = np.sqrt(np.einsum("mn,mnl->nl", w, np.broadcast_to(z, (len(z), 30, LABELS)) ** 2) - truth**2)
    assert np.abs((mean - truth) / sd).max() < 0.08
    assert np.abs(np.sqrt(variance) / sd - 1).max() < 0.06


def test_ratios_are_those_of_the_leaves_draws(monkeypatch):
    data, _, core = core_of(fast)
    generator, asked = torch.Generator().manual_seed(0), []

    def noise(block, shape):
        asked.append(torch.randn(shape, generator=generator))
        return asked[-1]

    samples, leaf = 3, "subject*vertex"
    held = Parents.of(core.held)
    ratio = core.ratios(held, noise, samples).numpy().reshape(samples, 4, 70)
    parents, *white = asked
    expected = np.empty_like(ratio)
    for m in range(samples):
        drawn = core.draw(held, lambda block, shape, m=m: white[m].expand(shape) if block.name == leaf else parents)
        rho, z = drawn["vertex"][0, :, 0].double().numpy(), drawn[leaf][0].double().numpy().reshape(4, 70, LABELS)
        for s in range(4):
            own = data.isel(subject=[s])
            expected[m, s] = [log_joint(own, 0, rho[v], z[s, v][None], v) for v in range(70)]
        expected[m] += 0.5 * (white[m].double().numpy().reshape(4, 70, LABELS) ** 2).sum(-1)
    np.testing.assert_allclose(ratio - ratio[0], expected - expected[0], atol=2e-4)

    def efficiency():
        found = core.ratios(held, noise, 200).numpy()
        weight = np.exp(found - found.max(0))
        return np.median(weight.sum(0) ** 2 / (weight**2).sum(0)) / 200

    assert efficiency() > 0.9
    right = sweeps.scatter

    def shifted(evidence, z, *others):
        right(evidence, z, *others)
        z += 0.7

    monkeypatch.setattr(sweeps, "scatter", shifted)  # a guide that is an sd off would be seen
    assert efficiency() < 0.2


def test_no_direction_is_less_precise_than_asked_for():
    g = torch.Generator().manual_seed(0)
    root = torch.randn(5, 5, generator=g, dtype=torch.float64)
    least = root @ root.T + torch.eye(5, dtype=torch.float64)
    vector = torch.linalg.cholesky(least) @ torch.linalg.qr(torch.randn(5, 5, generator=g, dtype=torch.float64)).Q
    values = torch.tensor([[2.0, 1.5, 1.1, 3.0, 9.0], [2.0, -0.5, 0.3, 1.0, 4.0]], dtype=torch.float64)
    given = (vector * values[:, None]) @ vector.T
    found = at_least(given, least)
    assert torch.equal(found[0], given[0])
    torch.testing.assert_close(found[1], (vector * values[1].clamp(min=1.0)) @ vector.T)


@pytest.mark.parametrize("parents", [1, 127, 300])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_parents_are_drawn_from_their_posterior(parents, dtype):
    """Mean and covariance in the precision of the formula, and what the leaves' priors make of a draw."""
    rng = np.random.default_rng(parents)
    factor = np.tril(rng.normal(size=(parents, 4, 4))) + 3 * np.eye(4)
    mode, white = rng.normal(size=(parents, 4)), rng.normal(size=(parents, 4)).astype(dtype)
    held = Parents.of(np.concatenate([mode, factor.reshape(parents, -1)], 1))
    c, q, p = rng.normal(size=5), rng.normal(size=(5, 4)), np.eye(5) + 0.1
    drawn, pull, first = np.empty((parents, 4)), np.empty((5, parents)), np.empty((3, 5, parents), np.float32)
    descend(held.mode, held.spread, white, c, q, np.linalg.inv(p), drawn, pull, first)
    np.testing.assert_allclose(drawn, mode + np.linalg.solve(factor.transpose(0, 2, 1), white[..., None].astype(float))[..., 0], rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(pull, c[:, None] - q @ drawn.T, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(first, np.broadcast_to(np.linalg.solve(p, pull), first.shape), rtol=1e-5, atol=1e-6)


KERNEL = """
import hashlib
import numpy as np
from pavi_scale.guide.labels import Parents
from pavi_scale.guide.parents import descend
from pavi_scale.guide.sweeps import scatter, sweep
rng = np.random.default_rng(0)
draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
b, offset, precision, gain = 3 * draw(3, 2, 5, 100), draw(5, 100), np.eye(5, dtype=np.float32) + 0.1, 0.1 * draw(5, 4, 100)
z, sums, square, value, shares = draw(3, 5, 100), np.zeros((5, 100)), np.zeros((5, 5, 100)), np.zeros(100), np.zeros((3, 2, 5, 100), np.float32)
mean, variance, thrown = (np.zeros((3, 5, 100), np.float32) for _ in range(3))
sweep(b, z, np.arange(0, 100, 64), offset, precision, 3, gain, sums, square, value, mean, variance, shares)
scatter(b, thrown, offset, precision, 3, draw(3, 5, 100))
held = Parents(rng.normal(size=(4, 100)), rng.normal(size=(4, 4, 100)))
drawn, pull, first = np.zeros((100, 4)), np.zeros((5, 100)), np.zeros((3, 5, 100), np.float32)
descend(held.mode, held.spread, draw(100, 4), rng.normal(size=5), rng.normal(size=(5, 4)), rng.normal(size=(5, 5)), drawn, pull, first)
made = (z, sums, square, value, shares, mean, variance, thrown, drawn, pull, first)
print(sum(sweep.stats.cache_hits.values()), hashlib.sha256(b"".join(a.tobytes() for a in made)).hexdigest())
"""


def test_compiled_here_or_loaded_the_bits_are_the_same(tmp_path, root):
    """Two workers, one of which compiles while the other finds the code in the cache, must agree."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(root)}
    runs = [subprocess.run([sys.executable, "-c", KERNEL], env=environment, capture_output=True, text=True, check=True).stdout.split() for _ in range(2)]
    assert [int(hits) for hits, _ in runs] == [0, 1]
    assert runs[0][1] == runs[1][1]
