"""Crossed mixtures: second derivatives from the labels, and modes found with a curvature that is kept."""

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, HalfNormal, Independent, MixtureSameFamily, Normal

import pavi_scale as ps
from pavi_scale.guide.curvature import LocalModel
from pavi_scale.guide.kept import costly, settle
from pavi_scale.guide.local import fit_core
from pavi_scale.guide.mode import decrement, search
from pavi_scale.guide.terms import Laws
from tests.guide import oracle


@pytest.fixture(scope="module")
def crossed():
    """A study of 3 subjects with centres of their own and 14 vertices with labels of their own, and six of its root points."""
    model = ps.Model(
        ps.Plate("subject"),
        ps.Plate("vertex"),
        sizes={"label": 3, "feature": 6},
        sd=ps.latent(lambda: HalfNormal(0.5)),
        centre=ps.latent(lambda: Normal(0.0, 1.0), plates="subject", dims=("label", "feature")),
        rho=ps.latent(lambda: Normal(0.0, 1.0), plates="vertex", dims="label"),
        logits=ps.latent(lambda rho: Normal(rho, 0.7), plates=("subject", "vertex"), dims="label"),
        x=ps.observed(
            lambda centre, logits, sd: MixtureSameFamily(Categorical(logits=logits), Independent(Normal(centre, sd[..., None, None]), 1)),
            plates=("subject", "vertex"), dims="feature",
        ),
    )  # fmt: skip
    study = oracle.compute(model, model.sample({"subject": 3, "vertex": 60, "label": 3, "feature": 6}, seed=2))
    return study, torch.tensor(np.linspace(-1.5, 0.5, 6))[:, None]


def local_of(crossed, **given):
    study, points = crossed
    points = points.clone().requires_grad_(given.get("tracked", False))
    (component,) = study.guide.components
    return LocalModel(component, oracle.whole(study), study.space.values(points), {}, len(points)), points


def test_derivatives_from_the_labels_are_those_of_the_mixture(crossed, monkeypatch):
    local, _ = local_of(crossed)
    (factor,) = (f for f in local.component.factors if f.variable == "x")
    z = {b: zb + 0.5 * torch.randn(zb.shape, generator=torch.Generator().manual_seed(1), dtype=zb.dtype) for b, zb in local.start().items()}
    assert local._has_labels(factor)
    found = local._factor(factor, z, False)
    monkeypatch.setattr(Laws, "_has_labels", lambda *_: False)
    monkeypatch.setattr("pavi_scale.guide.terms.BATCHED", 0)
    expected = local._factor(factor, z, False)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-10, atol=1e-10)
    for got, wanted in zip(found[1:], expected[1:], strict=True):
        assert got.keys() == wanted.keys()
        for key, value in got.items():
            torch.testing.assert_close(value, wanted[key], rtol=1e-9, atol=1e-9)


def test_a_kept_curvature_leads_to_the_mode_that_newton_steps_lead_to(crossed):
    local, _ = local_of(crossed)
    assert costly(local)
    start = {b: zb + 0.1 * torch.randn(zb.shape, generator=torch.Generator().manual_seed(3), dtype=zb.dtype) for b, zb in local.start().items()}
    mode, expansion = settle(local, start)
    assert float(decrement(local, local.expand(mode, differentiable=False)).max()) < 1e-12
    newton = local.expand(search(local, mode), differentiable=False)
    torch.testing.assert_close(expansion.value, newton.value, rtol=0, atol=1e-8)
    torch.testing.assert_close(expansion.gaussian.log_det(), newton.gaussian.log_det(), rtol=0, atol=1e-4)


def test_the_gradient_of_the_bound_is_that_of_its_differences(crossed):
    local, points = local_of(crossed, tracked=True)
    study, h = crossed[0], 1e-4
    # From the prior means, where all labels are alike, each search would lead to a mode of its own.
    start = {b: zb[:1] + torch.randn(zb[:1].shape, generator=torch.Generator().manual_seed(4), dtype=zb.dtype) for b, zb in local.start().items()}
    known = {b: zb[0].flatten(1).detach() for b, zb in settle(local.select(torch.tensor([5])), start)[0].items()}
    local.reduced.starts = known
    bound = fit_core(local, differentiable=True).log_marginal(torch.ones(1))
    (gradient,) = torch.autograd.grad(bound.sum(), points)
    ends = [study.guide.local_bound(local.reduced, study.space.values(points.detach() + step), len(points)) for step in (h, -h)]
    torch.testing.assert_close(gradient[:, 0], (ends[0] - ends[1]) / (2 * h), rtol=1e-4, atol=1e-4)
