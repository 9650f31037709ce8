"""Laws whose log-density is a matrix product where the generic torch law is element-wise."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from pavi_scale.later import Later

if TYPE_CHECKING:
    from pavi_scale import distances
else:  # the compiler of its loops takes half a second to import, and most have no use for it
    distances = Later("pavi_scale.distances")


class IsotropicNormalMixture(Distribution):
    r"""Mixture of isotropic normals in R^D, component labels summed out.

    .. math:: p(x) = \sum_k \mathrm{softmax}(\ell)_k \, N(x; m_k, s^2 I_D)

    Equal to `MixtureSameFamily(Categorical(logits=logits), Independent(Normal(loc, scale[..., None, None]), 1))`. The square is
    expanded, \|x - m_k\|^2 = \|x\|^2 - 2 x.m_k + \|m_k\|^2, so under `vmap` over many x the cross term is one matrix product and no
    `[..., K, D]` array is formed. x and m are first moved by the mean of m, which keeps float32 safe far from the origin.

    Args:
        logits: Unnormalised log weights, `[..., K]`.
        loc: Component means, `[..., K, D]`.
        scale: Common standard deviation, `[...]` or a number.
        validate_args: As in torch.

    Example:
        >>> law = IsotropicNormalMixture(torch.zeros(2), torch.tensor([[0.0, 0.0], [1.0, 1.0]]), 1.0)
        >>> law.event_shape, round(law.log_prob(torch.zeros(2)).item(), 4)
        (torch.Size([2]), -2.2178)
    """

    arg_constraints = {"logits": constraints.real_vector, "loc": constraints.independent(constraints.real, 2), "scale": constraints.positive}  # noqa: RUF012 (torch's own protocol)
    support = constraints.real_vector
    has_rsample = False

    def __init__(self, logits: Tensor, loc: Tensor, scale: Tensor | float, validate_args: bool | None = None) -> None:
        self.logits = logits
        self.loc = loc
        self.scale = torch.as_tensor(scale, dtype=loc.dtype, device=loc.device) if not isinstance(scale, Tensor) else scale
        if loc.ndim < 2 or logits.ndim < 1 or logits.shape[-1] != loc.shape[-2]:
            raise ValueError(f"expected logits [..., K] and loc [..., K, D], got {tuple(logits.shape)} and {tuple(loc.shape)}")
        batch = torch.Size(np.broadcast_shapes(logits.shape[:-1], loc.shape[:-2], self.scale.shape))
        super().__init__(batch, loc.shape[-1:], validate_args=validate_args)

    @property
    def curved(self) -> Tensor:
        """The parameter that `second_order` differentiates by."""
        return self.logits

    def expand(self, batch_shape: torch.Size | list[int] | tuple[int, ...], _instance: object = None) -> IsotropicNormalMixture:
        """The same law for a larger batch; nothing is copied."""
        batch = torch.Size(batch_shape)
        logits = self.logits.expand(batch + self.logits.shape[-1:])
        return IsotropicNormalMixture(logits, self.loc.expand(batch + self.loc.shape[-2:]), self.scale.expand(batch), validate_args=False)

    @property
    def mean(self) -> Tensor:
        """Mean, `[..., D]`."""
        return (self.logits.softmax(-1).unsqueeze(-2) @ self.loc).squeeze(-2)

    @property
    def variance(self) -> Tensor:
        """Variance of each coordinate, `[..., D]`."""
        centred = self.loc - self.mean.unsqueeze(-2)
        return self.scale.unsqueeze(-1) ** 2 + (self.logits.softmax(-1).unsqueeze(-1) * centred**2).sum(-2)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of `value` `[..., D]`, `[...]`."""
        if self._validate_args:
            self._validate_sample(value)
        joint, rest = self._joint(value)
        return torch.logsumexp(joint, -1) + rest

    def evidence(self, value: Tensor) -> Tensor:
        """Log-density of `value` `[..., D]` under each component, `[..., K]`: log N(x; m_k, s^2 I).

        In single precision on the processor by compiled loops (`distances`), elsewhere by a matrix product (`products`).
        """
        if self.loc.ndim != 2 or {value.dtype, self.loc.dtype} != {torch.float32} or {value.device.type, self.loc.device.type} != {"cpu"}:
            return self.products(value)
        precision, constant = self._constants(value)
        return -0.5 * precision.unsqueeze(-1) * distances.squares(value, self.loc) - constant.unsqueeze(-1)

    def products(self, value: Tensor) -> Tensor:
        """`evidence` by a matrix product: differences between components as exact as in `log_prob`, what they share to single rounding of |x|^2."""
        centre = self.loc.detach().mean(-2)
        m = self.loc - centre.unsqueeze(-2)
        rows = torch.cat([m, centre.unsqueeze(-2)], -2)
        product = (value.unsqueeze(-2) @ rows.mT).squeeze(-2)
        apart = product[..., :-1] - (centre.unsqueeze(-2) * m).sum(-1) - 0.5 * m.square().sum(-1)
        off = torch.linalg.vector_norm(value, dim=-1).square() - 2 * product[..., -1] + centre.square().sum(-1)
        precision, constant = self._constants(value)
        return precision.unsqueeze(-1) * apart - (0.5 * precision * off + constant).unsqueeze(-1)

    def _constants(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """1 / s^2, and D log(s sqrt(2 pi))."""
        return self.scale**-2, value.shape[-1] * (self.scale.log() + 0.5 * math.log(2.0 * math.pi))

    def responsibilities(self, value: Tensor) -> Tensor:
        """Posterior probability of each component given `value` `[..., D]`, `[..., K]`."""
        return self._joint(value)[0].softmax(-1)

    def second_order(self, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-density, its gradient with respect to the logits `[..., K]`, and minus the Hessian `[..., K, K]`.

        With responsibilities r and weights p = softmax(logits): gradient r - p, minus Hessian (diag p - p p^T) - (diag r - r r^T).
        """
        joint, rest = self._joint(value)
        r, p = joint.softmax(-1), self.logits.softmax(-1)
        hessian = r.unsqueeze(-1) * r.unsqueeze(-2) - p.unsqueeze(-1) * p.unsqueeze(-2)
        return torch.logsumexp(joint, -1) + rest, r - p, hessian + torch.diag_embed(p - r)

    def _joint(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Log p(value, label = k), `[..., K]`, up to what all labels share; and that rest, `[...]`."""
        # The density does not depend on the shift, so its derivatives do not either: a constant, which spares the pass back through x.
        centre = self.loc.detach().mean(-2)
        m = self.loc - centre.unsqueeze(-2)
        x = value - centre
        # A row times a matrix, not a matrix times a column: under vmap over x alone, torch then makes one product of all rows (30 times faster).
        cross = (x.unsqueeze(-2) @ m.mT).squeeze(-2)
        precision = self.scale**-2
        joint = self.logits + precision.unsqueeze(-1) * (cross - 0.5 * m.square().sum(-1))
        constant = value.shape[-1] * (self.scale.log() + 0.5 * math.log(2.0 * math.pi))
        return joint, -0.5 * precision * x.square().sum(-1) - constant - torch.logsumexp(self.logits, -1)

    def sample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = torch.Size()) -> Tensor:  # noqa: B008 (torch's signature)
        """Draws, `[*sample_shape, *batch, D]`: a label, then noise around its mean."""
        shape = torch.Size(sample_shape) + self.batch_shape
        with torch.no_grad():
            weight = self.logits.softmax(-1).cumsum(-1).expand(shape + self.logits.shape[-1:])
            # the last edge is left out: rounding may put it just below one
            label = (torch.rand(shape, dtype=weight.dtype, device=weight.device).unsqueeze(-1) > weight[..., :-1]).sum(-1)
            where = label[..., None, None].expand(*shape, 1, self.event_shape[0])
            # gather reads through zero strides: means shared over the batch are not copied
            chosen = self.loc.expand(shape + self.loc.shape[-2:]).gather(-2, where).squeeze(-2)
            return chosen + self.scale.unsqueeze(-1) * torch.randn(shape + self.event_shape, dtype=self.loc.dtype, device=self.loc.device)
