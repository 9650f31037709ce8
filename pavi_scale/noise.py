"""Standard normals for the local blocks of a round."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pavi_scale.guide.blocks import Block
from pavi_scale.rng import stream


def generator_noise(seed: int, dtype: torch.dtype) -> Any:
    """Independent normals for every particle."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    return lambda block, shape: torch.randn(shape, generator=generator, dtype=dtype)


def shared_noise(seed: int, dtype: torch.dtype) -> Any:
    """The same normals whenever they are asked for: differences between root points keep less noise."""
    def noise(block: Block, shape: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(stream(seed, block.name) % 2**63)
        return torch.randn(shape, generator=generator, dtype=dtype)

    return noise
