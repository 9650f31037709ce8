"""The Newton search: stationary points of log joints written out again, from near and far starts."""

import math

import numpy as np
import pytest
import torch
import xarray as xr
from torch.distributions import Bernoulli, Gamma, Normal, Poisson, StudentT

import pavi_scale as ps
from pavi_scale.guide.curvature import LocalModel
from pavi_scale.guide.local import fit_core
from tests.guide import oracle

RNG = np.random.default_rng(0)
GROUPS, N = 6, 8
TRUTH = RNG.normal(size=(GROUPS, 1))
# name -> (data, law, log-likelihood of one observation written out, root points that the search starts from)
LAWS = {
    "bernoulli": (
        (RNG.uniform(size=(GROUPS, N)) < 1 / (1 + np.exp(-TRUTH))) * 1.0,
        lambda t: Bernoulli(logits=t),
        lambda x, t: x * t - torch.log1p(torch.exp(t)),
        [0.0, 12.0, -25.0],
    ),
    "poisson": (
        RNG.poisson(np.exp(TRUTH), size=(GROUPS, N)).astype(float),
        lambda t: Poisson(t.exp()),
        lambda x, t: x * t - torch.exp(t) - torch.lgamma(x + 1),
        [0.0, 8.0, -12.0],
    ),
    "gamma": (
        RNG.gamma(2.0, np.exp(TRUTH), size=(GROUPS, N)),
        lambda t: Gamma(2.0, (-t).exp()),
        lambda x, t: torch.log(x) - 2 * t - x * torch.exp(-t),
        [0.0, 8.0, -8.0],
    ),
    "student": (
        TRUTH + RNG.standard_t(3, size=(GROUPS, N)),
        lambda t: StudentT(3.0, t, 0.5),
        lambda x, t: math.lgamma(2.0) - math.lgamma(1.5) - 0.5 * math.log(3 * math.pi) - math.log(0.5) - 2.0 * torch.log1p((2 * (x - t)) ** 2 / 3),
        [0.0, 6.0, -20.0],
    ),
}
CASES = [(name, mu) for name, law in LAWS.items() for mu in law[3]]


def _study(name):
    x, law, _, _ = LAWS[name]
    model = ps.Model(
        ps.Plate("group"),
        ps.Plate("obs"),
        mu=ps.latent(lambda: Normal(0.0, 10.0)),
        t=ps.latent(lambda mu: Normal(mu, 3.0), plates="group"),
        x=ps.observed(law, plates=("group", "obs")),
    )
    return oracle.compute(model, xr.Dataset({"x": (("group", "obs"), x)}))


def _log_joint(name, mu, t):
    x, _, log_lik, _ = LAWS[name]
    prior = -0.5 * ((t - mu) / 3.0) ** 2 - math.log(3.0) - 0.5 * math.log(2 * math.pi)
    return prior + log_lik(torch.as_tensor(x), t[:, None]).sum(1)


@pytest.mark.parametrize(("name", "mu"), CASES)
def test_the_gradient_vanishes_at_the_mode_and_the_curvature_is_right(name, mu):
    study = _study(name)
    (component,) = study.guide.components
    root = study.space.values(torch.tensor([[mu]]))
    core = fit_core(LocalModel(component, oracle.whole(study), root, {}, 1), differentiable=False)
    t = core.mode["group"].reshape(-1).clone().requires_grad_()
    value = _log_joint(name, mu, t)
    (gradient,) = torch.autograd.grad(value.sum(), t, create_graph=True)
    (hessian,) = torch.autograd.grad(gradient.sum(), t)
    assert (hessian < 0).all()  # a maximum
    assert float((gradient * (-hessian).rsqrt()).detach().abs().max()) < 1e-4  # in posterior standard deviations
    torch.testing.assert_close(core.expansion.value[0], value.detach(), rtol=1e-9, atol=1e-8)
    torch.testing.assert_close(core.expansion.gaussian.factor["group"].flatten() ** 2, -hessian, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", LAWS)
def test_a_far_unit_does_not_move_the_others(name):
    # Root points are searched together: each must get the mode it gets alone.
    study = _study(name)
    (component,) = study.guide.components
    reduced, points = oracle.whole(study), torch.tensor(LAWS[name][3])[:, None]
    together = fit_core(LocalModel(component, reduced, study.space.values(points), {}, len(points)), differentiable=False)
    for k, point in enumerate(points):
        alone = fit_core(LocalModel(component, reduced, study.space.values(point[None]), {}, 1), differentiable=False)
        torch.testing.assert_close(together.mode["group"][k], alone.mode["group"][0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["bernoulli", "poisson", "gamma"])
def test_gradient_of_the_laplace_value_is_that_of_its_differences(name):
    study = _study(name)
    reduced, at, h = oracle.whole(study), torch.tensor([[0.4]], requires_grad=True), 1e-3
    bound = study.guide.local_bound(reduced, study.space.values(at), 1, differentiable=True)
    (gradient,) = torch.autograd.grad(bound.sum(), at)
    ends = study.guide.local_bound(reduced, study.space.values(torch.tensor([[0.4 + h], [0.4 - h]])), 2)
    assert float(gradient) == pytest.approx(float(ends[0] - ends[1]) / (2 * h), rel=1e-5)


def test_a_crossed_bernoulli_component_reaches_its_mode():
    student, lecturer = RNG.integers(0, 5, 40), RNG.integers(0, 4, 40)
    y = RNG.integers(0, 2, 40).astype(float)
    model = ps.Model(
        ps.Plate("student"),
        ps.Plate("lecturer"),
        ps.Plate("rating", within=("student", "lecturer")),
        mu=ps.latent(lambda: Normal(0.0, 1.0)),
        a=ps.latent(lambda mu: Normal(mu, 1.0), plates="student"),
        b=ps.latent(lambda: Normal(0.0, 2.0), plates="lecturer"),
        y=ps.observed(lambda a, b: Bernoulli(logits=a - b), plates="rating"),
    )
    index = {f"rating_{p}": ("rating", i, {"instance_dimension": p}) for p, i in (("student", student), ("lecturer", lecturer))}
    study = oracle.compute(model, xr.Dataset({"y": ("rating", y), **index, "s": ("student", np.zeros(5)), "l": ("lecturer", np.zeros(4))}))
    (component,) = study.guide.components
    assert not component.tree
    for mu in (0.5, 15.0):
        core = fit_core(LocalModel(component, oracle.whole(study), study.space.values(torch.tensor([[mu]])), {}, 1), differentiable=False)
        a, b = (core.mode[p].reshape(-1).clone().requires_grad_() for p in ("student", "lecturer"))
        eta = a[student] - b[lecturer]
        joint = Normal(mu, 1.0).log_prob(a).sum() + Normal(0.0, 2.0).log_prob(b).sum() + (torch.as_tensor(y) * eta - torch.log1p(torch.exp(eta))).sum()
        gradients = torch.autograd.grad(joint, (a, b))
        assert max(float(g.abs().max()) for g in gradients) < 1e-4


def test_a_three_level_poisson_tree_reaches_its_mode():
    county, house = np.array([0, 0, 1]), np.array([0, 1, 1, 2, 2, 2])
    y = np.array([3.0, 0.0, 50.0, 1.0, 2.0, 7.0])
    model = ps.Model(
        ps.Plate("region"),
        ps.Plate("county", within="region"),
        ps.Plate("house", within="county"),
        mu=ps.latent(lambda: Normal(0.0, 1.0)),
        r=ps.latent(lambda mu: Normal(mu, 1.0), plates="region"),
        c=ps.latent(lambda r: Normal(r, 0.5), plates="county"),
        y=ps.observed(lambda c, r: Poisson((c + 0.1 * r).exp()), plates="house"),
    )
    index = {"county_region": ("county", county, {"instance_dimension": "region"}), "house_county": ("house", house, {"instance_dimension": "county"})}
    study = oracle.compute(model, xr.Dataset({"y": ("house", y), **index}))
    (component,) = study.guide.components
    for mu in (0.0, 6.0, -6.0):
        core = fit_core(LocalModel(component, oracle.whole(study), study.space.values(torch.tensor([[mu]])), {}, 1), differentiable=False)
        r, c = (core.mode[p].reshape(-1).clone().requires_grad_() for p in ("region", "county"))
        eta = c[house] + 0.1 * r[county[house]]
        joint = Normal(mu, 1.0).log_prob(r).sum() + Normal(r[county], 0.5).log_prob(c).sum() + (torch.as_tensor(y) * eta - torch.exp(eta)).sum()
        gradients = torch.autograd.grad(joint, (r, c))
        assert max(float(g.abs().max()) for g in gradients) < 1e-4
