"""Cholesky factors of many units at once."""

import pytest
import torch

from pavi_scale.guide.gaussian import back, factorise, forward, log_det, solve


def _precisions(n, e):
    a = torch.randn(n, e, e)
    return a @ a.mT + 0.1 * torch.eye(e)


@pytest.mark.parametrize("e", [1, 2, 4])
def test_factors_solve_and_sample_as_the_matrices_do(e):
    h, right, u = _precisions(6, e), torch.randn(6, e, 3), torch.randn(6, e)
    factor = factorise(h)
    torch.testing.assert_close(factor @ factor.mT, h)
    torch.testing.assert_close(solve(factor, right), torch.linalg.solve(h, right))
    torch.testing.assert_close(forward(factor, back(factor, u)), u)
    # z = L^-T u has covariance H^-1
    columns = torch.stack([back(factor, torch.eye(e)[i].expand(6, e)) for i in range(e)], -1)
    torch.testing.assert_close(columns @ columns.mT, torch.linalg.inv(h))
    torch.testing.assert_close(log_det(factor[:, None]), 0.5 * torch.linalg.slogdet(h).logabsdet)


@pytest.mark.parametrize("e", [1, 3])
def test_an_indefinite_precision_gets_a_definite_factor(e):
    bad = torch.diag_embed(torch.linspace(-2.0, 1.0, e)[None] if e > 1 else torch.tensor([[-2.0]]))
    factor = factorise(bad)
    assert factor.isfinite().all()
    assert (torch.linalg.eigvalsh(factor @ factor.mT) > 0).all()


def test_a_units_factor_does_not_depend_on_its_neighbours():
    # Ill-conditioned yet positive definite: it must be left alone even when a neighbour is not.
    good = torch.diag(torch.tensor([1.0, 1e-5]))
    bad = torch.diag(torch.tensor([1.0, -1.0]))
    alone, together = factorise(good[None])[0], factorise(torch.stack([good, bad]))[0]
    torch.testing.assert_close(together, alone, rtol=0, atol=0)
    torch.testing.assert_close(alone @ alone.mT, good)
