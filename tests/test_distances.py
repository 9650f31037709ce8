"""Compiled squared distances against double precision, automatic differentiation and loops."""

import pytest
import torch
from torch import Tensor

from pavi_scale.distances import LANES, TOGETHER, squares
from pavi_scale.laws import IsotropicNormalMixture


def generic(x: Tensor, m: Tensor) -> Tensor:
    """`[..., N, D]`, `[..., L, D]` -> `[..., L, N]`."""
    return (x.unsqueeze(-3) - m.unsqueeze(-2)).square().sum(-1)


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def over(x: Tensor, m: Tensor, *plates: tuple[int | None, int | None]) -> Tensor:
    """`squares` mapped over plates, the outermost first."""
    function = squares
    for dims in reversed(plates):
        function = torch.func.vmap(function, in_dims=dims)
    return function(x, m)


@pytest.mark.parametrize("points", [1, TOGETHER - 1, LANES, 2 * LANES + 5])
@pytest.mark.parametrize("dim", [1, 3, 4, 32])
def test_distances_and_gradient_are_those_of_double_precision(points: int, dim: int) -> None:
    x, m, g = normals(points, dim), normals(7, dim, seed=1).requires_grad_(), normals(7, points, seed=2)
    wide = m.detach().double().requires_grad_()
    found, exact = over(x, m, (0, None)).T, generic(x.double(), wide)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    (mine,), (theirs,) = torch.autograd.grad(found, m, g), torch.autograd.grad(exact, wide, g.double())
    torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-4 * points**0.5)


def test_any_nesting_of_plates_is_a_loop() -> None:
    """Particles of centres alone, plates of both, points alone - and points mapped over outside of a plate that the centres have."""
    x, m = normals(3, 2, 5, 6), normals(4, 3, 2, 7, 6, seed=1)
    found = over(x, m, (None, 0), (0, 0), (0, 0), (0, None))
    assert found.shape == (4, 3, 2, 5, 7)
    torch.testing.assert_close(found.mT, generic(x, m))
    outside = over(x.permute(2, 0, 1, 3), m[0], (0, None), (0, 0), (0, 0))
    torch.testing.assert_close(outside.permute(1, 2, 3, 0), generic(x, m[0]))
    shared = over(x[:, 0], m[0], (0, 0), (None, 0), (0, None))  # sessions that look at the same points
    torch.testing.assert_close(shared.mT, generic(x[:, :1], m[0]))


def test_gradients_through_nested_plates() -> None:
    x, m = normals(3, 2, 5, 6).requires_grad_(), normals(4, 3, 2, 7, 6, seed=1).requires_grad_()
    g = normals(4, 3, 2, 5, 7, seed=2)
    mine = torch.autograd.grad(over(x, m, (None, 0), (0, 0), (0, 0), (0, None)), (x, m), g)
    theirs = torch.autograd.grad(generic(x, m).mT, (x, m), g)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_bits_do_not_depend_on_where_points_lie() -> None:
    x, m = normals(300, 8), normals(7, 8, seed=1)
    whole = over(x, m, (0, None))
    assert torch.equal(over(x[17:131].clone(), m, (0, None)), whole[17:131])
    padded = torch.empty(300 * 8 + 3)[3:].reshape(300, 8).copy_(x)  # aligned to four bytes alone
    assert torch.equal(over(padded, m, (0, None)), whole)


def test_evidence_far_from_the_origin_is_exact_to_single_precision() -> None:
    x, m = normals(50, 6) + 4096.0, normals(4, 6, seed=1) + 4096.0
    law = IsotropicNormalMixture(torch.zeros(4), m, torch.tensor(0.7), validate_args=False)
    found = torch.func.vmap(law.evidence)(x)
    exact = torch.func.vmap(IsotropicNormalMixture(torch.zeros(4).double(), m.double(), torch.tensor(0.7).double(), validate_args=False).evidence)(x.double())
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)


def test_evidence_has_the_gradient_of_the_law_in_double_precision() -> None:
    x, m, s, g = normals(40, 6), normals(4, 6, seed=1).requires_grad_(), torch.tensor(0.7, requires_grad=True), normals(40, 4, seed=2)

    def evidence(x: Tensor, m: Tensor, s: Tensor) -> Tensor:
        return torch.func.vmap(lambda one: IsotropicNormalMixture(torch.zeros(4, dtype=m.dtype), m, s, validate_args=False).evidence(one))(x)

    wide = [t.detach().double().requires_grad_() for t in (m, s)]
    mine = torch.autograd.grad(evidence(x, m, s), (m, s), g)
    for a, b in zip(mine, torch.autograd.grad(evidence(x.double(), *wide), wide, g.double()), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-3)
