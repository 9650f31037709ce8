"""Gaussian elimination against the joint Gaussian of all ground variables, built unit by unit."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pavi_scale.batching import shards
from pavi_scale.elbo import Weights, local_elbo
from pavi_scale.guide.curvature import LocalModel
from pavi_scale.guide.local import draw, fit_core, log_density
from pavi_scale.moments import Moments
from tests.guide import oracle

pytestmark = pytest.mark.parametrize("name", oracle.CASES)
NONE = Weights(torch.zeros(0), torch.zeros(0, 0))


def _bound(study, reduced, points, **options):
    z = torch.as_tensor(points)
    return study.guide.local_bound(reduced, study.space.values(z), len(z), **options)


def test_structure_is_seen(name):
    for component in oracle.computation(name).guide.components:
        assert component.quadratic
        assert component.elementwise == oracle.case(name).elementwise
        assert component.tree == (not name.startswith("crossed"))


def test_log_marginal_is_the_log_evidence(name):
    study = oracle.computation(name)
    bound = _bound(study, oracle.whole(study), oracle.POINTS)
    expected = [oracle.case(name).evidence(z) for z in oracle.POINTS]
    np.testing.assert_allclose(bound.detach().numpy(), expected, rtol=1e-9, atol=1e-9)


def test_gradient_with_respect_to_the_root_is_that_of_the_log_evidence(name):
    study, case = oracle.computation(name), oracle.case(name)
    z = torch.tensor(oracle.POINTS, requires_grad=True)
    (gradient,) = torch.autograd.grad(_bound(study, oracle.whole(study), z, differentiable=True).sum(), z)
    step = 1e-5
    for k, point in enumerate(oracle.POINTS):
        for i in range(2):
            e = step * np.eye(2)[i]
            expected = (case.evidence(point + e) - case.evidence(point - e)) / (2 * step)
            assert float(gradient[k, i]) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_shards_add_up_to_the_whole(name):
    study = oracle.computation(name)
    total = 0.0
    for s in shards(study.layout, study.settings.split, 1):
        total = total + _bound(study, study.reduced(s.selection(study.layout)), oracle.POINTS, split=s.plate, first=s.first)
    np.testing.assert_allclose(total.detach().numpy(), _bound(study, oracle.whole(study), oracle.POINTS).detach().numpy(), rtol=1e-9)


def test_every_draw_of_the_exact_guide_gives_the_log_evidence(name):
    study, k = oracle.computation(name), 12
    reduced = oracle.whole(study)
    generator = torch.Generator().manual_seed(0)

    def noise(block, shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    for point in oracle.POINTS:
        root = study.space.values(torch.as_tensor(np.tile(point, (k, 1))))
        elbo = local_elbo(study.guide, reduced, root, NONE, noise, particles=k, differentiable=False)
        np.testing.assert_allclose(elbo.detach().numpy(), oracle.case(name).evidence(point), rtol=0, atol=1e-8)


def _draws(name, point):
    study = oracle.computation(name)
    reduced = oracle.whole(study)
    noise, k = oracle.sigma_noise(study.guide, reduced)
    values = dict(study.space.values(torch.as_tensor(np.tile(point, (k, 1)))))
    for component in study.guide.components:
        values.update(draw(fit_core(LocalModel(component, reduced, values, {}, k), differentiable=False), noise).values)
    return values


def test_draws_have_the_posteriors_mean_and_covariance(name):
    case = oracle.case(name)
    for point in oracle.POINTS:
        _, keys, mean, cov = case.brute(point[0], np.exp(point[1])).posterior(case.data())
        kept = [i for i, k in enumerate(keys) if k[0] in case.latents]
        z = oracle.flatten(_draws(name, point), case.model, [keys[i] for i in kept])
        np.testing.assert_allclose(z.mean(0), mean[kept], atol=1e-9)
        np.testing.assert_allclose((z - z.mean(0)).T @ (z - z.mean(0)) / len(z), cov[np.ix_(kept, kept)], atol=1e-9)


def test_moments_are_the_posteriors(name):
    study, case = oracle.computation(name), oracle.case(name)
    reduced = oracle.whole(study)
    noise, k = oracle.sigma_noise(study.guide, reduced)
    for point in oracle.POINTS[:2]:
        moments = Moments(study.guide, reduced, NONE, noise, 1)
        moments.add(study.space.values(torch.as_tensor(np.tile(point, (k, 1)))), k)
        found = moments.result()
        _, keys, mean, cov = case.brute(point[0], np.exp(point[1])).posterior(case.data())
        for i, key in enumerate(keys):
            if key[0] in found:
                assert found[key[0]][0][key[1:]] == pytest.approx(mean[i], abs=1e-9)
                assert found[key[0]][1][key[1:]] == pytest.approx(np.sqrt(cov[i, i]), abs=1e-9)


def test_log_density_of_a_draw_is_what_drawing_it_said(name):
    study, k = oracle.computation(name), 5
    reduced = oracle.whole(study)
    root = study.space.values(torch.as_tensor(np.tile(oracle.POINTS[0], (k, 1))))
    for component in study.guide.components:
        core = fit_core(LocalModel(component, reduced, root, {}, k), differentiable=False)
        sample = draw(core, lambda block, shape: torch.randn(shape, dtype=torch.float64))
        again = log_density(core, sample.z)
        for block, value in sample.log_q.items():
            torch.testing.assert_close(again[block], value, rtol=1e-9, atol=1e-9)


def test_newton_search_agrees_with_the_closed_solution(name):
    # The iterative search, which non-Gaussian laws use, must land on the same mode.
    study = oracle.computation(name)
    reduced = oracle.whole(study)
    root = study.space.values(torch.as_tensor(oracle.POINTS))
    for component in study.guide.components:
        closed = fit_core(LocalModel(component, reduced, root, {}, 3), differentiable=False)
        searched = fit_core(LocalModel(replace(component, quadratic=False), reduced, root, {}, 3), differentiable=False)
        for b, z in closed.mode.items():
            torch.testing.assert_close(searched.mode[b], z, rtol=1e-8, atol=1e-8)
