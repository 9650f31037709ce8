"""`IsotropicNormalMixture` against torch's element-wise mixture."""

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, Independent, MixtureSameFamily, Normal

from pavi_scale.laws import IsotropicNormalMixture


def reference(logits: Tensor, loc: Tensor, scale: Tensor) -> Distribution:
    spread = scale[..., None, None].expand(loc.shape)
    return MixtureSameFamily(Categorical(logits=logits), Independent(Normal(loc, spread), 1))


def arguments(batch: tuple[int, ...], dtype: torch.dtype, shift: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    new = {"generator": g, "dtype": torch.float64}
    logits, loc = torch.randn(*batch, 4, **new), torch.randn(*batch, 4, 6, **new) + shift
    scale, x = torch.rand(batch, **new) + 0.3, torch.randn(*batch, 6, **new) + shift
    return tuple(t.to(dtype) for t in (logits, loc, scale, x))


@pytest.mark.parametrize("batch", [(), (3,), (2, 5)])
def test_log_prob_equals_the_element_wise_mixture(batch: tuple[int, ...]) -> None:
    logits, loc, scale, x = arguments(batch, torch.float64)
    law = IsotropicNormalMixture(logits, loc, scale)
    assert (law.batch_shape, law.event_shape) == (torch.Size(batch), torch.Size([6]))
    torch.testing.assert_close(law.log_prob(x), reference(logits, loc, scale).log_prob(x), rtol=1e-12, atol=1e-12)


def test_float32_far_from_the_origin_is_as_good_as_element_wise() -> None:
    logits, loc, scale, x = arguments((200,), torch.float32, shift=1000.0)
    truth = reference(*(t.double() for t in (logits, loc, scale))).log_prob(x.double())
    assert (IsotropicNormalMixture(logits, loc, scale).log_prob(x) - truth).abs().max() < 2e-3
    assert (reference(logits, loc, scale).log_prob(x) - truth).abs().max() < 2e-3


def test_gradients_and_curvature_equal_autograd_of_the_element_wise_mixture() -> None:
    inputs = arguments((), torch.float64)

    def ours(logits: Tensor, loc: Tensor, scale: Tensor, x: Tensor) -> Tensor:
        return IsotropicNormalMixture(logits, loc, scale, validate_args=False).log_prob(x)

    def theirs(logits: Tensor, loc: Tensor, scale: Tensor, x: Tensor) -> Tensor:
        return reference(logits, loc, scale).log_prob(x)

    every = (0, 1, 2, 3)
    for mine, other in zip(torch.func.grad(ours, every)(*inputs), torch.func.grad(theirs, every)(*inputs), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-10)
    mine, other = (torch.autograd.functional.hessian(f, inputs) for f in (ours, theirs))
    for i in every:
        for j in every:
            torch.testing.assert_close(mine[i][j], other[i][j], rtol=1e-8, atol=1e-9)


def test_nested_vmap_equals_a_loop() -> None:
    g = torch.Generator().manual_seed(0)
    loc, logits, x = torch.randn(3, 2, 4, 6, generator=g), torch.randn(3, 5, 4, generator=g), torch.randn(3, 2, 5, 6, generator=g)

    def unit(x: Tensor, loc: Tensor, logits: Tensor) -> Tensor:
        return IsotropicNormalMixture(logits, loc, 0.7, validate_args=False).log_prob(x)

    vertex = torch.func.vmap(unit, in_dims=(0, None, 0))
    got = torch.func.vmap(torch.func.vmap(vertex, in_dims=(0, 0, None)))(x, loc, logits)
    for s, t, n in [(0, 0, 0), (1, 1, 3), (2, 0, 4)]:
        torch.testing.assert_close(got[s, t, n], reference(logits[s, n], loc[s, t], torch.tensor(0.7)).log_prob(x[s, t, n]))


def test_sample_has_the_moments_of_the_mixture() -> None:
    logits, loc, scale, _ = arguments((2,), torch.float64)
    law = IsotropicNormalMixture(logits, loc, scale)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = law.sample((40_000,))
    assert x.shape == (40_000, 2, 6)
    other = reference(logits, loc, scale)
    torch.testing.assert_close(law.mean, other.mean)
    torch.testing.assert_close(law.variance, other.variance)
    assert ((x.mean(0) - other.mean).abs() < 5 * (other.variance / 40_000).sqrt()).all()
    assert ((x.var(0) / other.variance - 1).abs() < 0.05).all()


def test_responsibilities_are_bayes_rule() -> None:
    logits, loc, scale, x = arguments((3,), torch.float64)
    joint = logits.log_softmax(-1) + Normal(loc, scale[:, None, None]).log_prob(x[:, None]).sum(-1)
    torch.testing.assert_close(IsotropicNormalMixture(logits, loc, scale).responsibilities(x), joint.softmax(-1))


def test_expand_keeps_the_density() -> None:
    logits, loc, scale, x = arguments((), torch.float64)
    law = IsotropicNormalMixture(logits, loc, scale)
    wide = law.expand(torch.Size([2, 3]))
    assert wide.batch_shape == (2, 3)
    torch.testing.assert_close(wide.log_prob(x), law.log_prob(x).expand(2, 3))


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected logits \[\.\.\., K\]"):
        IsotropicNormalMixture(torch.zeros(3), torch.zeros(4, 2), 1.0)


def test_second_order_is_what_autograd_finds():
    generator = torch.Generator().manual_seed(3)
    logits, loc, x = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((5,), (5, 3), (3,)))
    law = IsotropicNormalMixture(logits, loc, 0.7)
    value, gradient, hessian = law.second_order(x)

    def density(free: torch.Tensor) -> torch.Tensor:
        return IsotropicNormalMixture(free, loc, 0.7).log_prob(x)

    torch.testing.assert_close(value, density(logits))
    torch.testing.assert_close(gradient, torch.autograd.functional.jacobian(density, logits))
    torch.testing.assert_close(hessian, -torch.autograd.functional.hessian(density, logits))
    assert law.curved is logits
