"""Links: every bijection against autograd, and the supports that are refused."""

import math

import pytest
import torch
from torch.distributions import Categorical, Dirichlet, HalfNormal, LKJCholesky, LogNormal, MixtureSameFamily, Normal, Poisson, Uniform, constraints
from torch.distributions.constraints import Constraint

from pavi_scale.errors import ModelError
from pavi_scale.links import make_link

SUPPORTS: dict[str, tuple[Constraint, tuple[int, ...]]] = {
    "real": (constraints.real, ()),
    "real vector": (constraints.real_vector, (3,)),
    "real, with event dims": (constraints.real, (2, 3)),
    "positive": (constraints.positive, (3,)),
    "nonnegative": (constraints.nonnegative, (2,)),
    "half-line above": (constraints.greater_than(-2.0), (2, 2)),
    "closed half-line above": (constraints.greater_than_eq(1.0), ()),
    "half-line below": (constraints.less_than(3.0), (3,)),
    "interval": (constraints.interval(-1.0, 4.0), (3,)),
    "half-open interval": (constraints.half_open_interval(0.0, 2.0), (2,)),
    "unit interval": (constraints.unit_interval, (2, 2)),
    "simplex": (constraints.simplex, (4,)),
    "simplexes": (constraints.simplex, (2, 4)),
    "independent positive": (constraints.independent(constraints.positive, 1), (3,)),
    "independent real": (constraints.independent(constraints.real, 2), (2, 2)),
    "correlation factor": (constraints.corr_cholesky, (3, 3)),
    "support of HalfNormal": (HalfNormal(1.0).support, (2,)),
    "support of LogNormal": (LogNormal(0.0, 1.0).support, ()),
    "support of Uniform": (Uniform(torch.tensor(-3.0, dtype=torch.float64), torch.tensor(5.0, dtype=torch.float64)).support, (2,)),
    "support of Dirichlet": (Dirichlet(torch.ones(3)).support, (3,)),
    "support of LKJCholesky": (LKJCholesky(3).support, (3, 3)),
}


@pytest.fixture(autouse=True)
def _double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def _free_coordinates(support: Constraint, theta: torch.Tensor) -> torch.Tensor:
    """The coordinates of theta in which its density is written: all but the last of a simplex, the strict lower triangle of a correlation factor."""
    if support is constraints.simplex:
        return theta[..., :-1].flatten()
    if support is constraints.corr_cholesky:
        rows, columns = torch.tril_indices(*theta.shape[-2:], offset=-1)
        return theta[..., rows, columns].flatten()
    return theta.flatten()


@pytest.mark.parametrize("name", SUPPORTS)
def test_forward_lands_in_the_support_and_inverse_undoes_it(name):
    support, shape = SUPPORTS[name]
    link = make_link(support, shape, "x")
    z = torch.randn(5, 7, *link.base_shape)
    theta = link.forward(z)
    assert theta.shape == (5, 7, *shape)
    assert bool(support.check(theta).all())
    assert link.size == math.prod(link.base_shape)
    torch.testing.assert_close(link.inverse(theta), z, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SUPPORTS)
def test_log_determinant_is_that_of_autograds_jacobian(name):
    support, shape = SUPPORTS[name]
    link = make_link(support, shape, "x")
    for z in torch.randn(4, *link.base_shape):

        def flat(v, link=link, support=support):
            return _free_coordinates(support, link.forward(v.reshape(link.base_shape)))

        jacobian = torch.autograd.functional.jacobian(flat, z.flatten())
        expected = torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(link.log_det(z, link.forward(z)), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SUPPORTS)
def test_log_determinant_has_one_number_per_unit(name):
    support, shape = SUPPORTS[name]
    link = make_link(support, shape, "x")
    z = torch.randn(2, 3, *link.base_shape)
    value = link.log_det(z, link.forward(z))
    assert value.shape == (2, 3)
    each = torch.stack([torch.stack([link.log_det(u, link.forward(u)) for u in row]) for row in z])
    torch.testing.assert_close(value, each)


def test_identity_is_told_from_other_links():
    assert make_link(Normal(0.0, 1.0).support, (2,), "x").identity
    assert make_link(constraints.real_vector, (2,), "x").identity
    assert not make_link(constraints.positive, (2,), "x").identity
    assert not make_link(constraints.simplex, (3,), "x").identity


@pytest.mark.parametrize("law", [Poisson(1.0), Categorical(logits=torch.zeros(3))])
def test_discrete_support_is_refused_and_says_to_marginalise(law):
    with pytest.raises(ModelError, match="discrete latent.*label.*marginalise") as caught:
        make_link(law.support, (), "label")
    assert caught.value.exit_code == 2


def test_a_support_without_bijection_is_refused():
    law = MixtureSameFamily(Categorical(logits=torch.zeros(2)), Normal(torch.zeros(2), 1.0))
    with pytest.raises(ModelError, match="no bijection.*'x'"):
        make_link(law.support, (), "x")


@pytest.mark.parametrize("support", [constraints.lower_cholesky, constraints.positive_definite, constraints.positive_semidefinite])
def test_a_matrix_link_without_log_determinant_is_refused_at_once(support):
    # torch has a map onto these supports, but from all of R^(D x D) and without a Jacobian: no density could be computed.
    with pytest.raises(ModelError):
        make_link(support, (2, 2), "covariance")
