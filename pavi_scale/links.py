"""Links: bijections from unconstrained space onto the support of a latent variable."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import AffineTransform, ComposeTransform, IndependentTransform, Transform

from pavi_scale.errors import ModelError


@dataclass(frozen=True)
class Link:
    """theta = T(z) with z in R^size.

    Args:
        transform: torch bijection T, acting on the trailing event dimensions.
        event_shape: Shape of theta for one ground unit.
        base_shape: Shape of z for one ground unit (a simplex of K has K - 1).

    Example:
        >>> link = make_link(constraints.positive, (3,), "scale")
        >>> link.size, bool(torch.allclose(link.inverse(link.forward(torch.zeros(2, 3))), torch.zeros(2, 3)))
        (3, True)
    """

    transform: Transform
    event_shape: tuple[int, ...]
    base_shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of unconstrained coordinates of one ground unit."""
        return math.prod(self.base_shape)

    @property
    def identity(self) -> bool:
        """Whether theta = z."""
        base = self.transform
        while isinstance(base, IndependentTransform):
            base = base.base_transform
        return isinstance(base, ComposeTransform) and not base.parts

    def forward(self, z: Tensor) -> Tensor:
        """Theta of z, `[..., *base_shape]` -> `[..., *event_shape]`."""
        return self.transform(z)

    def inverse(self, theta: Tensor) -> Tensor:
        """Z of theta."""
        return self.transform.inv(theta)

    def log_det(self, z: Tensor, theta: Tensor) -> Tensor:
        """log |dT/dz|, `[...]`: summed over the event."""
        value = self.transform.log_abs_det_jacobian(z, theta)
        extra = value.ndim - (z.ndim - len(self.base_shape))
        return value.sum(tuple(range(value.ndim - extra, value.ndim))) if extra else value


def _base_shape(transform: Transform, shape: tuple[int, ...]) -> tuple[int, ...]:
    """As `transform.inverse_shape`, but that affine parts are not broadcast by torch, which imports a computer algebra system for it (half a second)."""
    match transform:
        case ComposeTransform():
            for part in reversed(transform.parts):
                shape = _base_shape(part, shape)
            return shape
        case IndependentTransform():
            return _base_shape(transform.base_transform, shape)
        case AffineTransform():
            return np.broadcast_shapes(shape, *(tuple(getattr(number, "shape", ())) for number in (transform.loc, transform.scale)))
    return tuple(transform.inverse_shape(torch.Size(shape)))


def make_link(support: constraints.Constraint, event_shape: tuple[int, ...], name: str) -> Link:
    """The link onto `support`.

    Raises:
        ModelError: Discrete support, or one that torch has no bijection for.
    """
    if support.is_discrete:
        raise ModelError(
            "a discrete latent variable cannot be inferred by a flow", where=f"latent {name!r}", got=f"support {support}",
            remedy="marginalise it inside the law, for instance with torch.distributions.MixtureSameFamily",
        )
    try:
        transform = biject_to(support)
    except NotImplementedError as error:
        raise ModelError(
            "no bijection onto the support of this latent", where=f"latent {name!r}", expected="real, positive, interval, simplex, ...", got=str(support)
        ) from error
    return Link(transform, tuple(event_shape), _base_shape(transform, tuple(event_shape)))
