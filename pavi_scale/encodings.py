"""Encodings learned from raw data: a permutation-invariant set encoder over the observations below a unit."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SetEncoder(nn.Module):
    """E_n = g(mean_{m below n} h(x_m), log(1 + count)): deep sets (Zaheer et al. 2017) that know how many they pooled.

    Args:
        inputs: Size of one observation's features.
        outputs: Size of the encoding.
        hidden: Width of h and g.

    Example:
        >>> encoder = SetEncoder(2, 3)
        >>> x, unit = torch.randn(6, 2), torch.tensor([0, 0, 1, 1, 1, 1])
        >>> order = torch.tensor([1, 0, 5, 3, 2, 4])
        >>> bool(torch.allclose(encoder(x, unit, 2), encoder(x[order], unit[order], 2), atol=1e-6))
        True
    """

    def __init__(self, inputs: int, outputs: int, hidden: int = 32) -> None:
        super().__init__()
        self.each = nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU())
        self.pooled = nn.Sequential(nn.Linear(hidden + 1, hidden), nn.SiLU(), nn.Linear(hidden, outputs))
        self.register_buffer("loc", torch.zeros(inputs))
        self.register_buffer("scale", torch.ones(inputs))

    def standardise(self, x: Tensor) -> None:
        """Fix the location and scale of the inputs from a sample of observations `[m, inputs]`."""
        self.loc = x.mean(0)
        self.scale = x.std(0).nan_to_num(1.0).clamp_min(1e-6) if len(x) > 1 else torch.ones_like(self.loc)

    def forward(self, x: Tensor, unit: Tensor, count: int) -> Tensor:
        """Encodings `[count, outputs]` of observations `[m, inputs]` that belong to units `[m]`."""
        each = self.each((x - self.loc) / self.scale)
        total = each.new_zeros(count, each.shape[1]).index_add(0, unit, each)
        n = each.new_zeros(count).index_add(0, unit, each.new_ones(len(each)))
        mean = total / n.clamp_min(1.0)[:, None]
        return self.pooled(torch.cat([mean, torch.log1p(n)[:, None]], -1))
