"""Conditional flows that start as the identity: an affine map, then a neural spline flow (zuko)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

_validating = Distribution._validate_args
import zuko  # noqa: E402

# Importing zuko switches argument validation of torch distributions off in the whole process; put it back.
Distribution.set_default_validate_args(_validating)


class ConditionalFlow(nn.Module):
    """u' = S(a + exp(b) u; c), with (a, b) linear in the context c and S a spline flow conditioned on c.

    Neural spline flows: Durkan et al. 2019, arXiv 1906.04032. All last layers start at zero, so u' = u before training.

    Args:
        features: Size of u.
        context: Size of c.
        hidden: Width of the flow's hidden layer.

    Example:
        >>> flow = ConditionalFlow(2, 3)
        >>> u = torch.randn(5, 2)
        >>> moved, log_det = flow(u, torch.zeros(5, 3))
        >>> bool(torch.allclose(moved, u, atol=1e-5)), bool(log_det.abs().max() < 1e-5)
        (True, True)
    """

    def __init__(self, features: int, context: int, hidden: int = 32) -> None:
        super().__init__()
        self.features = features
        self.affine = nn.Linear(context, 2 * features)
        self.spline = zuko.flows.NSF(features, context, transforms=1, hidden_features=(hidden,))
        for layer in (self.affine, *_last_layers(self.spline)):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, u: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """u' and log |du'/du|; u `[..., features]`, context `[..., context]`."""
        shift, log_scale = self.affine(context).split(self.features, -1)
        log_scale = 3.0 * torch.tanh(log_scale / 3.0)
        inner = shift + log_scale.exp() * u
        if inner.numel() == 0:  # of no units; zuko cannot sum over their features
            return inner, log_scale.sum(-1)
        moved, log_det = self.spline(context).transform.call_and_ladj(inner)
        return moved, log_det + log_scale.sum(-1)

    def inverse(self, moved: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """u of u', and log |du/du'|."""
        shift, log_scale = self.affine(context).split(self.features, -1)
        log_scale = 3.0 * torch.tanh(log_scale / 3.0)
        middle, log_det = self.spline(context).transform.inv.call_and_ladj(moved)
        return (middle - shift) * (-log_scale).exp(), log_det - log_scale.sum(-1)


def _last_layers(module: nn.Module) -> list[nn.Linear | zuko.nn.Linear]:
    found = []
    for child in module.modules():
        if isinstance(child, nn.Sequential):
            # zuko's networks of one feature use a linear layer of its own
            linear = [m for m in child if isinstance(m, (nn.Linear, zuko.nn.Linear))]
            found += linear[-1:]
    return found
