"""Trees whose laws are the same for all units: their log marginal against dense normal densities, and against the general elimination."""

import numpy as np
import pytest
import torch
import xarray as xr
from scipy.stats import multivariate_normal
from torch.distributions import HalfNormal, LogNormal, Normal
from torch.distributions.constraints import positive

import pavi_scale as ps
from pavi_scale import study
from pavi_scale.ambient import precision
from pavi_scale.cohort import open_cohort
from pavi_scale.computation import StudyComputation
from pavi_scale.guide.alike import Alike, alike
from pavi_scale.guide.curvature import LocalModel
from pavi_scale.guide.local import fit_core, weights
from pavi_scale.sites import Sites
from pavi_scale.upper import Upper

SCHOOLS, EVENTS = 7, 3


def upper(monkeypatch, balanced, wide=False):
    """Events of classes, which have rows, in schools about a common mean; `wide`: laws that differ between schools."""
    rng = np.random.default_rng(3)
    school = np.repeat(np.arange(SCHOOLS), 4) if balanced else rng.permutation(np.concatenate([np.arange(SCHOOLS), rng.integers(0, SCHOOLS, 15)]))
    pupil = np.repeat(np.arange(len(school)), 2)
    spread = {"spread": ps.covariate(plates="school")} if wide else {}
    law = (lambda mu, tau, spread: Normal(mu, tau * spread)) if wide else (lambda mu, tau: Normal(1.5 * mu + 0.2, tau))
    model = ps.Model(
        ps.Plate("school"), ps.Plate("class", within="school"), ps.Plate("pupil", within="class"),
        mu=ps.latent(lambda: Normal(torch.tensor([0.0, 1.0, -1.0]), 3.0), dims=("k",)), tau=ps.latent(lambda: HalfNormal(torch.ones(3)), dims=("k",)),
        sigma=ps.latent(lambda: HalfNormal(1.0)), **spread,
        theta=ps.latent(law, plates="school", dims=("k",)),
        phi=ps.latent(lambda theta, mu, sigma: Normal(theta - 0.5 * mu, sigma), plates="class", dims=("k",)),
        y=ps.observed(lambda phi: Normal(phi, 1.0), plates="pupil", dims=("k",)),
    )
    data = xr.Dataset({
        "y": (("pupil", "k"), rng.normal(size=(len(pupil), EVENTS))), "of": ("pupil", pupil, {"instance_dimension": "class"}),
        "in": ("class", school, {"instance_dimension": "school"}), **({"spread": ("school", 1.0 + rng.random(SCHOOLS))} if wide else {}),
    })
    chosen = frozenset({frozenset({"class"})})
    monkeypatch.setattr(study, "choose_free", lambda *_, **__: chosen)
    made = study.prepare(open_cohort(data, model), seed=0)
    found = Upper(StudyComputation(made.graph, made.cohort, made.settings), np.ones(7))
    loc = {"class": rng.normal(size=(len(school), EVENTS))}
    precise = {b: np.exp(rng.normal(size=x.shape)) for b, x in loc.items()}
    root = np.array([0.3, 1.2, -0.4, 0.1, -0.3, 0.4, -0.2])
    curve = rng.normal(size=(7, 7))
    return found, Sites(loc, precise, root - 0.1, rng.normal(size=7), curve @ curve.T), school, root


def dense(found, sites, school, root):
    """The log marginal of the root, common mean integrated out, from dense covariances."""
    z = torch.tensor(root)[None]
    theta = {n: v.theta[0].numpy() for n, v in found.space.values(z).items()}
    away = root - sites.root
    total = float(found.space.log_prior(z, ["mu"])) + away @ sites.pull - 0.5 * away @ sites.root_precision @ away
    under = np.eye(SCHOOLS)[school]
    for k in range(EVENTS):
        # Classes as sums of independent normals: 1.5 mu - mu / 2 for all, their schools' and their own.
        precise = sites.precision["class"][:, k]
        covariance = 9.0 + theta["tau"][k] ** 2 * under @ under.T + np.diag(theta["sigma"] ** 2 + 1 / precise)
        mean = np.full(len(school), (0.0, 1.0, -1.0)[k] + 0.2)
        total += multivariate_normal(mean, covariance).logpdf(sites.loc["class"][:, k]) + 0.5 * np.log(2 * np.pi / precise).sum()
    return total


@pytest.mark.parametrize("balanced", [True, False])
def test_the_log_marginal_is_that_of_the_dense_normal(monkeypatch, balanced):
    found, sites, school, root = upper(monkeypatch, balanced)
    assert found.joined == ["mu"]
    assert all(alike(c, found.reduced) for c in found.components)
    for move in (0.0, 0.4):
        value, _ = found.bound(sites, (root + move)[None])
        assert value[0] == pytest.approx(dense(found, sites, school, root + move), rel=1e-10)


@pytest.mark.parametrize("balanced", [True, False])
def test_value_and_gradient_are_those_of_the_general_elimination(monkeypatch, balanced):
    found, sites, _, root = upper(monkeypatch, balanced)
    points = root + 0.3 * np.random.default_rng(0).normal(size=(5, 7))
    value, gradient = found.bound(sites, points)
    z = torch.tensor(points, requires_grad=True)
    general, _ = found.cores(sites, z, found.reduced)
    (slope,) = torch.autograd.grad(general.sum(), z)
    np.testing.assert_allclose(value, general.detach().numpy(), rtol=1e-11)
    np.testing.assert_allclose(gradient, slope.numpy(), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.value(sites, points), value, rtol=1e-13)


def steep(monkeypatch, slope, coarse):
    """Classes in schools in districts: a school's mean is a steep function of its district's, so that no two levels are on the same scale."""
    rng = np.random.default_rng(5)
    district, school = np.array([2, 0, 1, 1, 2, 0, 2]), rng.permutation(np.repeat(np.arange(7), 3))
    model = ps.Model(
        ps.Plate("district"), ps.Plate("school", within="district"), ps.Plate("class", within="school"), ps.Plate("pupil", within="class"),
        t=ps.latent(lambda: HalfNormal(1.0)),
        g=ps.latent(lambda: coarse, plates="district"),
        theta=ps.latent(lambda g, t: Normal(slope * (g.log() if coarse.support is positive else g), t), plates="school"),
        phi=ps.latent(lambda theta, t: Normal(theta, t), plates="class"),
        y=ps.observed(lambda phi: Normal(phi, 1.0), plates="pupil"),
    )
    data = xr.Dataset({
        "y": ("pupil", rng.normal(size=21)), "of": ("pupil", np.arange(21), {"instance_dimension": "class"}),
        "in": ("class", school, {"instance_dimension": "school"}), "at": ("school", district, {"instance_dimension": "district"}),
    })
    monkeypatch.setattr(study, "choose_free", lambda *_, **__: frozenset({frozenset({"class"})}))
    made = study.prepare(open_cohort(data, model), seed=0)
    found = Upper(StudyComputation(made.graph, made.cohort, made.settings), np.ones(1))
    assert all(alike(c, found.reduced) for c in found.components)
    level = slope * (float(coarse.loc) if coarse.support is not positive else 0.3)
    loc, precise = rng.normal(level, 1.0, (21, 1)), np.exp(rng.normal(size=(21, 1)))
    return found, Sites({"class": loc}, {"class": precise}, np.zeros(1), np.zeros(1), np.zeros((1, 1))), district[school], school


@pytest.mark.parametrize("log_t", [0.0, -3.0, -7.0])
@pytest.mark.parametrize("slope", [1.0, 100.0, 1000.0])
def test_levels_of_different_scales_lose_no_digits(monkeypatch, slope, log_t):
    found, sites, district, school = steep(monkeypatch, slope, Normal(10.0, 1.3))
    under, above = np.eye(7)[school], np.eye(3)[district]
    precise = sites.precision["class"][:, 0]

    def exact(log_t):
        covariance = (1.3 * slope) ** 2 * above @ above.T + np.exp(2 * log_t) * (under @ under.T + np.eye(21)) + np.diag(1 / precise)
        own = multivariate_normal(np.full(21, 10.0 * slope), covariance).logpdf(sites.loc["class"][:, 0]) + 0.5 * np.log(2 * np.pi / precise).sum()
        return own + float(found.space.log_prior(torch.tensor([[log_t]])))

    value, gradient = found.bound(sites, np.array([[log_t]]))
    assert value[0] == pytest.approx(exact(log_t), abs=1e-4)
    assert gradient[0, 0] == pytest.approx((exact(log_t + 1e-4) - exact(log_t - 1e-4)) / 2e-4, rel=1e-3, abs=1e-3)


def test_coarse_blocks_on_another_support_are_those_of_the_general_elimination(monkeypatch):
    found, sites, *_ = steep(monkeypatch, 100.0, LogNormal(0.3, 0.7))
    for log_t in (0.0, -3.0):
        value, gradient = found.bound(sites, np.array([[log_t]]))
        z = torch.tensor([[log_t]], dtype=torch.float64, requires_grad=True)
        with precision(torch.float64):
            general, _ = found.cores(sites, z, found.reduced)
        (slope,) = torch.autograd.grad(general.sum(), z)
        assert value[0] == pytest.approx(float(general.detach()), abs=1e-6)
        assert gradient[0, 0] == pytest.approx(float(slope), rel=1e-6)


def test_new_sites_are_looked_at_anew(monkeypatch):
    found, sites, school, root = upper(monkeypatch, False)
    found.bound(sites, root[None])
    other = Sites({b: x + 1.0 for b, x in sites.loc.items()}, sites.precision, sites.root, sites.pull, sites.root_precision)
    assert found.bound(other, root[None])[0][0] == pytest.approx(dense(found, other, school, root), rel=1e-10)


def test_laws_that_differ_between_units_go_the_general_way(monkeypatch):
    found, sites, _, root = upper(monkeypatch, False, wide=True)
    assert not any(alike(c, found.reduced) for c in found.components)
    assert np.isfinite(found.bound(sites, root[None])[0]).all()


def test_a_scale_next_to_nothing_is_told_rather_than_computed_with(monkeypatch):
    found, sites, _, root = upper(monkeypatch, False)
    root[-1] = -40.0  # log sigma: no digit of the schools' precision is left
    assert found.bound(sites, root[None])[0][0] == -np.inf


def test_weighted_units_stand_for_others(monkeypatch):
    found, sites, _, root = upper(monkeypatch, False)
    inner = [c for c in found.study.guide.components if {b.name for b in c.blocks} == {"school", "class"}]
    assert len(inner) == 1
    part = found._part([n for n, v in found.study.graph.model.variables.items() if v.kind != "latent"], 1)
    rows = found._rows(sites, part)
    values = dict(found.space.values(torch.tensor(root)[None]))
    few = Alike(inner[0], part, rows).log_marginal(values, 1)
    core = fit_core(LocalModel(inner[0], part, values, rows, 1), differentiable=False)
    np.testing.assert_allclose(few.detach(), core.log_marginal(weights(core)), rtol=1e-11)
