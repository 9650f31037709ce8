"""Set encoders and conditional flows."""

import subprocess
import sys

import pytest
import torch
from torch.distributions import Distribution, Normal

from pavi_scale.encodings import SetEncoder
from pavi_scale.flows import ConditionalFlow


def _sets():
    x = torch.randn(11, 2)
    unit = torch.tensor([0, 0, 0, 1, 3, 3, 3, 3, 3, 4, 4])  # unit 2 has no observations
    return x, unit


def test_encoder_does_not_depend_on_the_order_of_observations():
    encoder, (x, unit) = SetEncoder(2, 4), _sets()
    encoder.standardise(x)
    for _ in range(5):
        order = torch.randperm(11)
        torch.testing.assert_close(encoder(x[order], unit[order], 5), encoder(x, unit, 5), rtol=1e-10, atol=1e-10)


def test_encoder_knows_how_many_it_pooled():
    encoder, (x, unit) = SetEncoder(2, 4), _sets()
    once, twice = encoder(x, unit, 5), encoder(torch.cat([x, x]), torch.cat([unit, unit]), 5)
    changed = (once - twice).abs().amax(1) > 1e-4
    assert changed.tolist() == [True, True, False, True, True]


def test_each_unit_is_encoded_from_its_own_observations_alone():
    encoder, (x, unit) = SetEncoder(2, 4), _sets()
    before, moved = encoder(x, unit, 5), x.clone()
    moved[unit == 3] += 1.0
    changed = (encoder(moved, unit, 5) - before).abs().amax(1) > 1e-9
    assert changed.tolist() == [False, False, False, True, False]
    alone = encoder(x[unit == 3], torch.zeros(5, dtype=torch.int64), 1)
    torch.testing.assert_close(alone[0], before[3])


@pytest.mark.parametrize("count", [1, 6])
def test_encoder_stays_finite_where_inputs_have_no_spread(count):
    encoder, x = SetEncoder(2, 3), torch.ones(count, 2)
    encoder.standardise(x)
    assert encoder(x, torch.zeros(count, dtype=torch.int64), 2).isfinite().all()


def _stirred(features, context):
    flow = ConditionalFlow(features, context)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return flow


@pytest.mark.parametrize("features", [1, 2, 3])
def test_flow_starts_as_the_identity_for_every_context(features):
    flow, u = ConditionalFlow(features, 4), 3 * torch.randn(50, features)
    moved, log_det = flow(u, torch.randn(50, 4))
    torch.testing.assert_close(moved, u, rtol=0, atol=1e-8)
    torch.testing.assert_close(log_det, torch.zeros(50), rtol=0, atol=1e-8)


@pytest.mark.parametrize("features", [1, 2, 3])
def test_flow_inverts_itself(features):
    flow, u, context = _stirred(features, 4), 2 * torch.randn(5, 7, features), torch.randn(5, 7, 4)
    moved, log_det = flow(u, context)
    back, inverse_log_det = flow.inverse(moved, context)
    assert moved.shape == (5, 7, features)
    assert log_det.shape == (5, 7)
    assert float((moved - u).detach().abs().max()) > 0.1
    torch.testing.assert_close(back, u, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("features", [1, 2, 3])
def test_flow_log_determinant_is_that_of_autograds_jacobian(features):
    flow = _stirred(features, 4)
    for u, context in zip(2 * torch.randn(6, features), torch.randn(6, 4), strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda v, c=context: flow(v, c)[0], u)
        torch.testing.assert_close(flow(u, context)[1], torch.linalg.slogdet(jacobian).logabsdet, rtol=1e-8, atol=1e-8)


def test_argument_validation_of_torch_is_as_it_was():
    assert Distribution._validate_args
    with pytest.raises(ValueError, match="invalid values"):
        Normal(0.0, -1.0)


def test_importing_the_package_leaves_torchs_validation_alone():
    # Off before, off after; `test_argument_validation_of_torch_is_as_it_was` is the other half.
    code = "from torch.distributions import Distribution as D; D.set_default_validate_args(False); import pavi_scale, pavi_scale.flows; print(D._validate_args)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
