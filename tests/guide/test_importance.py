"""Guides that are not exact: E_q[p / q] is the evidence whatever q is, and candidates resampled by p / q follow the posterior."""

import numpy as np
import pytest
import torch
import xarray as xr
from scipy import stats
from scipy.special import betaln, gammaln
from torch.distributions import Bernoulli, Beta, Categorical, Dirichlet, Gamma, Normal, Poisson

import pavi_scale as ps
from pavi_scale.elbo import Weights, correctors, local_elbo
from pavi_scale.guide.correction import Corrections
from pavi_scale.guide.curvature import LocalModel
from pavi_scale.guide.local import candidates, draw, fit_core, resample
from pavi_scale.moments import Moments
from tests.guide import oracle

RNG = np.random.default_rng(3)
COUNTS = RNG.poisson(3.0, size=(3, 4)).astype(float)
FLIPS = (RNG.uniform(size=(3, 5)) < 0.7) * 1.0
LABELS = RNG.choice(3, p=[0.2, 0.3, 0.5], size=(3, 9)).astype(float)


ALPHA = np.array([1.0, 2.0, 1.5])


def _tally(x):
    return np.bincount(x.astype(int), minlength=3)


def _log_dirichlet(a):
    return gammaln(a).sum() - gammaln(a.sum())


# name -> (data, dims, prior, likelihood, log evidence of one group, posterior mean, posterior sd)
CONJUGATE = {
    "gamma-poisson": (
        COUNTS,
        (),
        lambda: Gamma(2.0, 0.7),
        lambda t: Poisson(t),
        lambda x: gammaln(2 + x.sum()) - gammaln(2.0) + 2 * np.log(0.7) - (2 + x.sum()) * np.log(0.7 + len(x)) - gammaln(x + 1).sum(),
        lambda x: stats.gamma(2 + x.sum(), scale=1 / (0.7 + len(x))).mean(),
        lambda x: stats.gamma(2 + x.sum(), scale=1 / (0.7 + len(x))).std(),
    ),
    "beta-bernoulli": (
        FLIPS,
        (),
        lambda: Beta(1.5, 2.0),
        lambda t: Bernoulli(probs=t),
        lambda x: betaln(1.5 + x.sum(), 2 + (1 - x).sum()) - betaln(1.5, 2.0),
        lambda x: stats.beta(1.5 + x.sum(), 2 + (1 - x).sum()).mean(),
        lambda x: stats.beta(1.5 + x.sum(), 2 + (1 - x).sum()).std(),
    ),
    "dirichlet-categorical": (
        LABELS,
        ("k",),
        lambda: Dirichlet(torch.tensor(ALPHA)),
        lambda t: Categorical(probs=t),
        lambda x: _log_dirichlet(ALPHA + _tally(x)) - _log_dirichlet(ALPHA),
        lambda x: stats.dirichlet(ALPHA + _tally(x)).mean(),
        lambda x: np.sqrt(stats.dirichlet(ALPHA + _tally(x)).var()),
    ),
}
each_law = pytest.mark.parametrize("name", CONJUGATE)


def _study(name, **options):
    x, dims, prior, likelihood = CONJUGATE[name][:4]
    model = ps.Model(
        ps.Plate("group"),
        ps.Plate("obs"),
        t=ps.latent(prior, plates="group", dims=dims),
        x=ps.observed(likelihood, plates=("group", "obs")),
        sizes=dict.fromkeys(dims, 3),
    )
    return oracle.compute(model, xr.Dataset({"x": (("group", "obs"), x)}), **options)


def _normals(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda block, shape: torch.randn(shape, generator=generator, dtype=torch.float64)


def _evidence(name):
    return sum(CONJUGATE[name][4](x) for x in CONJUGATE[name][0])


def _log_mean(log_ratio):
    """log of the mean of exp(log_ratio), and its standard error."""
    w = np.exp(log_ratio - log_ratio.max())
    return np.log(w.mean()) + log_ratio.max(), w.std() / w.mean() / np.sqrt(len(w))


@each_law
def test_weights_average_to_the_evidence(name):
    study, k = _study(name), 20_000
    elbo = local_elbo(study.guide, oracle.whole(study), {}, Weights(torch.zeros(0), torch.zeros(0, 0)), _normals(0), particles=k, differentiable=False)
    found, error = _log_mean(elbo.detach().numpy())
    assert abs(found - _evidence(name)) < 4.5 * error + 1e-6
    assert error < 0.02


@each_law
def test_the_elbo_is_below_the_evidence_and_the_importance_bound_between(name):
    study, reduced = _study(name), None
    reduced = oracle.whole(study)
    elbo = local_elbo(study.guide, reduced, {}, Weights(torch.zeros(0), torch.zeros(0, 0)), _normals(1), particles=4000, differentiable=False).detach().numpy()
    bound = study.guide.local_bound(reduced, {}, 4000, samples=16, noise=_normals(2)).detach().numpy()
    evidence, error = _evidence(name), 4 * elbo.std() / np.sqrt(4000)
    assert elbo.mean() < evidence + error
    assert elbo.mean() - error < bound.mean() < evidence + error
    assert evidence - bound.mean() < 0.05 * len(CONJUGATE[name][0])


@each_law
def test_moments_are_the_closed_forms(name):
    study, k = _study(name), 4000
    moments = Moments(study.guide, oracle.whole(study), Weights(torch.zeros(0), torch.zeros(0, 0)), _normals(3), 4)
    moments.add({}, k)
    mean, sd = moments.result()["t"]
    for i, x in enumerate(CONJUGATE[name][0]):
        expected_mean, expected_sd = CONJUGATE[name][5](x), CONJUGATE[name][6](x)
        np.testing.assert_allclose(mean[i], expected_mean, atol=0.05 * np.max(expected_sd))
        np.testing.assert_allclose(sd[i], expected_sd, rtol=0.06)


def test_resampled_candidates_follow_the_posterior():
    study, k = _study("gamma-poisson"), 4000
    (component,) = study.guide.components
    core = fit_core(LocalModel(component, oracle.whole(study), {}, {}, k), differentiable=False)
    found = candidates(core, _normals(4), 16)
    uniforms = {"group": torch.rand(k, 3, generator=torch.Generator().manual_seed(5))}
    t = resample(core, found, uniforms)["t"].theta.numpy()
    for i, x in enumerate(COUNTS):
        law = stats.gamma(2 + x.sum(), scale=1 / (0.7 + len(x)))
        assert stats.kstest(t[:, i], law.cdf).pvalue > 1e-3
        narrow = law.mean() + np.sqrt(0.5) * (t[:, i] - law.mean())
        assert stats.kstest(narrow, law.cdf).pvalue < 1e-6  # the test has the power to see halved variance


# -- corrections --------------------------------------------------------------------------------------------------------------


def _corrected(scheme):
    """A Bernoulli study whose block has a correction, and its fresh state."""
    study = _study("beta-bernoulli", encoding=scheme)
    reduced = oracle.whole(study)
    state = {"root/loc": np.zeros(0), "root/raw": np.zeros((0, 0)), **study.fresh_corrections(reduced, np.zeros((1, 0)), 0)}
    return study, reduced, state


@pytest.mark.parametrize("scheme", ["likelihood", "encoder", "hybrid"])
def test_corrections_are_the_identity_before_training(scheme):
    study, reduced, state = _corrected(scheme)
    weights = study.weights(state, reduced)
    assert isinstance(weights.corrections, Corrections)
    assert weights.corrections.names() == ["group"]
    (component,) = study.guide.components
    core = fit_core(LocalModel(component, reduced, {}, {}, 50), differentiable=False)
    plain = draw(core, _normals(6))
    corrected = draw(core, _normals(6), correctors(weights, reduced))
    torch.testing.assert_close(corrected.z["group"], plain.z["group"], rtol=0, atol=1e-8)
    torch.testing.assert_close(corrected.log_q["group"], plain.log_q["group"], rtol=0, atol=1e-8)


@pytest.mark.parametrize("scheme", ["likelihood", "encoder", "hybrid"])
def test_weights_average_to_the_evidence_whatever_the_correction(scheme):
    study, reduced, state = _corrected(scheme)
    rng = np.random.default_rng(7)
    for name, value in state.items():
        if name.startswith("residual/") or (name.startswith("correction/") and ("flow" in name)):
            state[name] = value + 0.08 * rng.normal(size=value.shape)
    weights = study.weights(state, reduced)
    plain = local_elbo(study.guide, reduced, {}, Weights(torch.zeros(0), torch.zeros(0, 0)), _normals(8), particles=20_000, differentiable=False)
    elbo = local_elbo(study.guide, reduced, {}, weights, _normals(8), particles=20_000, differentiable=False)
    assert float((elbo - plain).detach().abs().max()) > 0.01  # it does move the draws
    found, error = _log_mean(elbo.detach().numpy())
    assert abs(found - _evidence("beta-bernoulli")) < 4.5 * error
    assert error < 0.03


def test_a_normal_prior_with_bernoulli_data_agrees_with_quadrature():
    y = FLIPS
    model = ps.Model(
        ps.Plate("group"),
        ps.Plate("obs"),
        mu=ps.latent(lambda: Normal(0.0, 1.0)),
        t=ps.latent(lambda mu: Normal(mu, 1.2), plates="group"),
        y=ps.observed(lambda t: Bernoulli(logits=t), plates=("group", "obs")),
    )
    study = oracle.compute(model, xr.Dataset({"y": (("group", "obs"), y)}))
    grid = np.linspace(-12, 12, 20_001)
    expected = 0.0
    for row in y:
        log_joint = stats.norm(0.6, 1.2).logpdf(grid) + (row[:, None] * grid - np.logaddexp(0, grid)).sum(0)
        expected += np.log(np.trapezoid(np.exp(log_joint), grid))
    root = study.space.values(torch.full((20_000, 1), 0.6))
    elbo = local_elbo(study.guide, oracle.whole(study), root, Weights(torch.zeros(0), torch.zeros(0, 0)), _normals(9), particles=20_000, differentiable=False)
    found, error = _log_mean(elbo.detach().numpy())
    assert abs(found - expected) < 4.5 * error


def test_a_poisson_tree_agrees_with_nested_quadrature():
    county, y = np.array([0, 0, 1]), np.array([[3.0, 1.0], [0.0, 2.0], [9.0, 7.0]])
    model = ps.Model(
        ps.Plate("region"),
        ps.Plate("county", within="region"),
        ps.Plate("visit"),
        mu=ps.latent(lambda: Normal(0.0, 1.0)),
        r=ps.latent(lambda mu: Normal(mu, 1.0), plates="region"),
        c=ps.latent(lambda r: Normal(r, 0.8), plates="county"),
        y=ps.observed(lambda c: Poisson(c.exp()), plates=("county", "visit")),
    )
    study = oracle.compute(model, xr.Dataset({"y": (("county", "visit"), y), "county_region": ("county", county, {"instance_dimension": "region"})}))
    grid, expected = np.linspace(-9, 9, 1201), 0.0
    conditional = stats.norm(grid[:, None], 0.8).pdf(grid[None, :])  # [r, c]
    likelihood = [np.exp((row[:, None] * grid - np.exp(grid) - gammaln(row + 1)[:, None]).sum(0)) for row in y]
    for region in range(2):
        over_c = np.prod([np.trapezoid(conditional * likelihood[c], grid, axis=1) for c in np.flatnonzero(county == region)], axis=0)
        expected += np.log(np.trapezoid(stats.norm(0.3, 1.0).pdf(grid) * over_c, grid))
    k = 20_000
    root = study.space.values(torch.full((k, 1), 0.3))
    elbo = local_elbo(study.guide, oracle.whole(study), root, Weights(torch.zeros(0), torch.zeros(0, 0)), _normals(10), particles=k, differentiable=False)
    found, error = _log_mean(elbo.detach().numpy())
    assert abs(found - expected) < 4.5 * error
    assert error < 0.02
    assert float(elbo.detach().mean()) < expected + 4 * float(elbo.detach().std()) / np.sqrt(k)
