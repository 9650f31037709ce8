"""Candidates of several blocks at once, against quadrature: crossed and nested laws that are not Gaussian, and tails that are heavier than normal ones."""

import itertools

import numpy as np
import pytest
import torch
import xarray as xr
from numpy.polynomial.hermite_e import hermegauss
from scipy.integrate import quad
from scipy.special import gammaln, logsumexp
from torch.distributions import Bernoulli, Dirichlet, LogNormal, Multinomial, Normal

import pavi_scale as ps
from pavi_scale.guide.curvature import LocalModel
from pavi_scale.guide.local import candidates, component_bound, fit_core, resample, widen
from pavi_scale.noise import generator_noise, shared_noise
from tests.guide import oracle

SCALE = 2.5
RATINGS = np.array([[1, 1], [1, 0], [1, 1], [0, 1], [1, 1], [1, 1], [1, 0]], dtype=float)  # [student, item]


def crossed():
    model = ps.Model(
        ps.Plate("student"), ps.Plate("item"),
        ability=ps.latent(lambda: Normal(0.0, SCALE), plates="student"),
        ease=ps.latent(lambda: Normal(0.0, SCALE), plates="item"),
        y=ps.observed(lambda ability, ease: Bernoulli(logits=ability + ease), plates=("student", "item")),
    )  # fmt: skip
    return model, xr.Dataset({"y": (("student", "item"), RATINGS)})


def nested():
    model = ps.Model(
        ps.Plate("school"), ps.Plate("pupil", within="school"),
        level=ps.latent(lambda: Normal(0.5, SCALE), plates="school"),
        pupil_level=ps.latent(lambda level: Normal(level, SCALE), plates="pupil"),
        y=ps.observed(lambda pupil_level: Bernoulli(logits=pupil_level), plates="pupil"),
    )  # fmt: skip
    school = ("pupil", np.repeat(np.arange(3), 3), {"instance_dimension": "school"})
    return model, xr.Dataset({"school": school, "y": ("pupil", np.array([1.0, 1, 1, 0, 0, 1, 0, 0, 0]))})


def normal_grid(count=61):
    x, w = hermegauss(count)
    return x, np.log(w) - 0.5 * np.log(2 * np.pi)


def bernoulli(y, logits):
    return -np.logaddexp(0.0, np.where(y > 0, -logits, logits))


def crossed_truth():
    """Log evidence; means and standard deviations of `ability` and `ease`: given both items' ease the students are independent."""
    x, lw = normal_grid()
    x = SCALE * x
    pairs = np.array(list(itertools.product(range(len(x)), repeat=2)))
    ease = x[pairs]
    log_joint = lw[pairs].sum(1)
    terms = np.stack([bernoulli(y[0], x[None] + ease[:, :1]) + bernoulli(y[1], x[None] + ease[:, 1:]) + lw[None] for y in RATINGS])  # [student, pair, x]
    each = logsumexp(terms, 2)
    log_joint = log_joint + each.sum(0)
    evidence = logsumexp(log_joint)
    p = np.exp(log_joint - evidence)
    inner = np.exp(terms - each[..., None])
    ability = [(p * (inner[i] @ x**k)).sum() for k in (1, 2) for i in range(len(RATINGS))]
    ability = np.reshape(ability, (2, -1))
    mean = p @ ease
    return evidence, {
        "ability": (ability[0], np.sqrt(ability[1] - ability[0] ** 2)),
        "ease": (mean, np.sqrt(p @ ease**2 - mean**2)),
    }


def nested_evidence(data):
    x, lw = normal_grid()
    level = 0.5 + SCALE * x
    total = 0.0
    for school in range(3):
        y = data["y"].values[3 * school : 3 * school + 3]
        own = [logsumexp(bernoulli(v, level[:, None] + SCALE * x[None]) + lw[None], 1) for v in y]
        total += logsumexp(np.sum(own, 0) + lw)
    return total


def core_of(make):
    model, data = make()
    study = oracle.compute(model, data)
    (component,) = study.guide.components
    reduced, _ = study.shard({"shard": (None, 0, 1, True)})
    return fit_core(LocalModel(component, reduced, {}, {}, 1), differentiable=False)


def test_the_density_of_candidates_with_heavy_tails_is_one():
    seen = {}
    for each in (1, 2, 8, 16):
        x = torch.linspace(-400.0, 400.0, 800_001, dtype=torch.float64)
        u, log_q = widen(x.reshape(-1, 1, 1, 1), each)  # of a grid of normals: the map is increasing in each part
        seen[each] = log_q
        heavy = torch.arange(len(x)) % each >= each - each // 4
        for part in {False, bool(heavy.any())}:
            at = u[heavy == part][:, 0, 0, 0]
            assert float(torch.trapezoid(log_q[heavy == part][:, 0].exp(), at)) == pytest.approx(1.0, abs=2e-3)


@pytest.mark.parametrize("make", [crossed, nested])
@pytest.mark.parametrize("groups", [1, 8])
def test_weights_of_groups_are_unbiased(make, groups):
    model, data = make()
    truth = crossed_truth()[0] if make is crossed else nested_evidence(data)
    core = core_of(make)
    assert core.local.component.joint
    noise = generator_noise(3, torch.float64)
    found = torch.cat([candidates(core, noise, 8 * groups, groups=groups).log_group for _ in range(4000 // groups)], 1)[0]  # [G, n_top]
    total = sum(float(torch.logsumexp(unit, 0)) - np.log(len(unit)) for unit in found.T)
    assert total == pytest.approx(truth, abs=0.05)
    assert float(component_bound(core, noise, 4096, groups=512, corrected=True)) == pytest.approx(truth, abs=0.2)


@pytest.mark.parametrize("make", [crossed, nested])
def test_the_bound_of_groups_is_below_the_evidence_and_nearer_than_that_of_one(make):
    _, data = make()
    truth = crossed_truth()[0] if make is crossed else nested_evidence(data)
    core, noise = core_of(make), generator_noise(4, torch.float64)
    mean = {g: np.mean([float(component_bound(core, noise, 8 * g, groups=g)) for _ in range(200)]) for g in (1, 16)}
    assert mean[1] < mean[16] < truth + 0.02
    assert truth - mean[16] < 0.3 * (truth - mean[1])


def test_picked_candidates_of_crossed_blocks_follow_the_posterior():
    core = core_of(crossed)
    truth = crossed_truth()[1]
    noise, many = generator_noise(5, torch.float64), core.repeat(3000)
    found = candidates(many, noise, 256, groups=32)
    uniforms = {b.name: torch.rand(3000, n, dtype=torch.float64) for b, n in zip(core.local.component.blocks, (len(RATINGS), 2), strict=True)}
    drawn = resample(many, found, uniforms)
    for name, (mean, sd) in truth.items():
        theta = drawn[name].theta.numpy()
        np.testing.assert_allclose((theta.mean(0) - mean) / sd, 0.0, atol=0.1)
        np.testing.assert_allclose(theta.std(0) / sd, 1.0, atol=0.06)


def test_a_crossed_fit_has_the_moments_of_quadrature():
    """Mode and curvature were half a standard deviation off, and the status said ok."""
    model, data = crossed()
    evidence, truth = crossed_truth()
    posterior = ps.fit(model, data, progress=False)
    tree = posterior.datatree
    draws = posterior.sample(2000)
    for name, (mean, sd) in truth.items():
        np.testing.assert_allclose((tree["posterior_mean"][name].values - mean) / sd, 0.0, atol=0.1)
        np.testing.assert_allclose(tree["posterior_sd"][name].values / sd, 1.0, atol=0.1)
        np.testing.assert_allclose((draws[name].mean("draw").values - mean) / sd, 0.0, atol=0.15)
    assert posterior.status == "ok"
    nats, error = posterior.elbo(16)
    assert evidence - 0.6 < nats < evidence + 4 * error + 0.02


def test_a_root_above_skewed_simplices_has_the_posterior_of_quadrature():
    """Half a standard deviation off with status ok: tails of logits that few counts tell of are exponential, and few normal candidates reach them."""
    rng = np.random.default_rng(1)
    counts = np.stack([rng.multinomial(10, rng.dirichlet([0.6, 0.6, 0.6])) for _ in range(25)]).astype(float)
    model = ps.Model(
        ps.Plate("group"),
        concentration=ps.latent(lambda: LogNormal(0.0, 1.0)),
        share=ps.latent(lambda concentration: Dirichlet(concentration + torch.zeros(3)), plates="group", dims="kind"),
        y=ps.observed(lambda share: Multinomial(10, probs=share), plates="group", dims="kind"),
    )
    posterior = ps.fit(model, xr.Dataset({"y": (("group", "kind"), counts)}), progress=False)

    def log_joint(z):
        a = np.exp(z)
        each = gammaln(3 * a) - gammaln(3 * a + 10) + (gammaln(a + counts) - gammaln(a)).sum(1)
        return each.sum() - 0.5 * z * z

    top = max(log_joint(z) for z in np.linspace(-3, 3, 601))
    moment = [quad(lambda z, k=k: np.exp(k * z + log_joint(z) - top), -6, 6, limit=200)[0] for k in (0, 1, 2)]
    mean = moment[1] / moment[0]
    sd = np.sqrt(moment[2] / moment[0] - mean**2)
    assert abs(float(posterior.datatree["posterior_mean"]["concentration"]) - mean) < 0.15 * sd
    assert float(posterior.datatree["posterior_sd"]["concentration"]) == pytest.approx(sd, rel=0.1)


def test_shifted_sequences_are_normal_and_even():
    block = core_of(nested).local.component.blocks[1]
    draws = shared_noise(7, torch.float64, {block.name})(block, (256, 400, 1, 2))
    again = shared_noise(7, torch.float64, {block.name})(block, (256, 400, 1, 2))
    assert bool((draws == again).all())
    assert float(draws.mean(0).std()) < 0.2 / 16  # of independent normals: 1 / 16
    assert float((draws**2).mean()) == pytest.approx(1.0, abs=5e-3)
    assert float((draws[..., 0] * draws[..., 1]).mean()) == pytest.approx(0.0, abs=5e-3)
    between = np.corrcoef(draws[3, :-1, 0, 0], draws[3, 1:, 0, 0])[0, 1]  # neighbouring units
    assert abs(between) < 0.2
