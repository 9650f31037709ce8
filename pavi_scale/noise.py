"""Normals of a round's local blocks, even points of the root."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from pavi_scale.device import PROCESSOR, to_default
from pavi_scale.guide.blocks import Block
from pavi_scale.rng import stream

MOST_QUASI = 64  # coordinates of a unit up to which quasi-random sequences are better than normals


def generator_noise(seed: int, dtype: torch.dtype) -> Any:
    """Independent normals for every particle."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    return lambda block, shape: to_default(torch.randn(shape, generator=generator, dtype=dtype, device=PROCESSOR))


def shared_noise(seed: int, dtype: torch.dtype, alone: Collection[str] = ()) -> Any:
    """The same normals whenever they are asked for: differences between root points keep less noise.

    Args:
        seed: Seed.
        dtype: Of the normals.
        alone: Blocks whose units are averaged over one by one: each has a quasi-random sequence, shifted at random (Cranley & Patterson 1976), whose means
            vary less than those of independent normals. Between units they are uncorrelated, but not independent.
    """
    def noise(block: Block, shape: tuple[int, ...]) -> Tensor:
        key = stream(seed, block.name)
        generator, each = torch.Generator().manual_seed(key % 2**63), math.prod(shape[2:])
        if block.name not in alone or each > MOST_QUASI or shape[0] < 2:
            return to_default(torch.randn(shape, generator=generator, dtype=dtype, device=PROCESSOR))
        shift = torch.rand(shape[1], each, generator=generator, dtype=torch.float64, device=PROCESSOR)
        points = torch.from_numpy(quasi_random(key, shape[0], each))[:, None]
        uniforms = ((points.to(PROCESSOR) + shift) % 1.0).clamp(1e-12, 1 - 1e-12)
        return to_default(torch.special.ndtri(uniforms).to(dtype).reshape(shape))

    return noise


def quasi_random(key: int, count: int, dim: int) -> np.ndarray:
    """The first `count` points of a scrambled Sobol sequence (Owen 1998), `[count, dim]` in (0, 1), float64.

    Example:
        >>> points = quasi_random(0, 64, 2)
        >>> [int(n) for n in np.histogram(points[:, 1], 4, (0, 1))[0]]
        [16, 16, 16, 16]
    """
    engine = SobolEngine(max(dim, 1), scramble=True, seed=key % 2**63)  # type: ignore[no-untyped-call]
    points = engine.draw_base2(max(1, math.ceil(math.log2(count))), dtype=torch.float64)  # type: ignore[no-untyped-call]
    points[0] = engine.shift.double() / 2**engine.MAXBIT  # the engine rounds this one to torch's default dtype, whatever that is at the moment
    return np.asarray(points.numpy()[:count, :dim].clip(1e-9, 1 - 1e-9))
