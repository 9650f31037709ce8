"""Newton searches for the mode of a component's log joint: every unit on its own, guarded where the law is not Gaussian."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pavi_scale.guide.blocks import Block
from pavi_scale.guide.curvature import Coordinates, Expansion, LocalModel
from pavi_scale.guide.gaussian import Tree

Noise = Callable[[Block, tuple[int, ...]], Tensor]  # (block, [K, n, C, e]) -> standard normals

MAX_ITERATIONS = 20
TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-4}  # Newton decrement (nats) at which a unit's search ends: the last step squares what is left
MAX_SHORTENED = 24  # times that a step is shortened to a quarter before it is given up
DIGITS = {torch.float64: 1e-9, torch.float32: 1e-5}  # of a log joint, that it may fall by
ROUGH_ITERATIONS = 12
COMPACT = 0.8  # share of particles still searched below which the batch is made smaller


def find_mode(local: LocalModel) -> Coordinates:
    """Mode of the log joint by damped Newton steps, without derivatives."""
    with torch.no_grad():  # sites and root values may be tracked; the search is not
        z = local.start()
        if local.component.rough:
            return _rough(local, z)
        return search(local, nearer(local, z))


def nearer(local: LocalModel, z: Coordinates) -> Coordinates:
    """The prior means, or those of the modes found at another root point where log joint and log volume are highest here, unit by unit."""
    starts, modes = local.reduced.starts, local.reduced.modes
    tables = [{b: torch.nn.functional.pad(starts[b], (1, 0)) for b in z}] if all(b in starts for b in z) else []
    if all(b in modes for b in z):
        tables += [{b: modes[b][:, s] for b in z} for s in range(min(modes[b].shape[1] for b in z))]
    if not tables:
        return z
    highest = local.log_terms(z)
    for table in tables:
        other = {b: table[b][:, 1:].reshape(1, *zb.shape[1:]).expand_as(zb) for b, zb in z.items()}
        height = local.log_terms(other)
        for b in z:
            height = height + local.to_top(table[b][None, :, 0], local.blocks[b].plates)
        better = height > highest
        highest = torch.where(better, height, highest)
        z = {b: torch.where(per_unit(local, b, better)[..., None, None], other[b], zb) for b, zb in z.items()}
    return z


def search(local: LocalModel, z: Coordinates) -> Coordinates:
    """Each unit of the top block stops by its own decrement: its mode does not depend on which others are searched with it.

    Particles whose units have all settled leave the batch; a step is shortened by looking at values alone.
    """
    found = {b: zb.clone() for b, zb in z.items()}
    rows = torch.arange(local.particles)
    settled: Tensor | None = None
    for _ in range(MAX_ITERATIONS):
        expansion = local.expand(z, differentiable=False)
        before = torch.zeros_like(expansion.value, dtype=torch.bool) if settled is None else settled
        settled = before | (decrement(local, expansion) < TOLERANCE[local.reduced.dtype])
        # The step at hand is free, and squares what is left of a settled unit's error; after it the unit rests, however long the others take.
        z, stuck = along(local, z, expansion, settled, before)
        settled = settled | stuck
        going = ~settled.all(1)
        if not bool(going.any()):
            break
        if float(going.to(torch.float32).mean()) < COMPACT:
            for b, zb in z.items():
                found[b][rows] = zb
            local, rows, settled = local.select(going), rows[going], settled[going]
            z = {b: zb[going] for b, zb in z.items()}
    for b, zb in z.items():
        found[b][rows] = zb
    return found


def along(local: LocalModel, z: Coordinates, expansion: Expansion, settled: Tensor, resting: Tensor) -> tuple[Coordinates, Tensor]:
    """The point a Newton step leads to, and the units that no length of it raises (they stay where they are, as those at rest do).

    Units whose log joint falls, or is not finite, try a quarter of the step; settled ones take it whole, or not at all.
    """
    step = expansion.gaussian.step
    scale = (~resting).to(expansion.value.dtype)
    least = expansion.value - DIGITS[expansion.value.dtype] * (1 + expansion.value.abs())
    for _ in range(MAX_SHORTENED):
        trial = _move(local, z, step, scale)
        worse = ~(local.log_terms(trial) >= least)
        if not bool(worse.any()):
            return trial, worse
        scale = torch.where(worse, torch.where(settled, 0.0, 0.25 * scale), scale)
    scale = torch.where(worse, 0.0, scale)
    return _move(local, z, step, scale), worse


def decrement(local: LocalModel, expansion: Expansion) -> Tensor:
    """|g . H^-1 g| per unit of the top block, `[K, n_top]`."""
    total = torch.zeros_like(expansion.value)
    for b, step in expansion.gaussian.step.items():
        total = total + local.to_top((expansion.gradient[b] * step).sum((-1, -2)), local.blocks[b].plates)
    return total.abs()


def _rough(local: LocalModel, z: Coordinates) -> Coordinates:
    """Fixed point of averaged Newton steps, each at most three widths long; widths follow the conditional sds of the curvature."""
    for _ in range(ROUGH_ITERATIONS):
        gaussian = local.expand(z, differentiable=False).gaussian
        limit = {b: 3 * w for b, w in local.width.items()}
        z = {b: zb + gaussian.step[b].clamp(-limit[b], limit[b]) for b, zb in z.items()}
        if isinstance(gaussian, Tree):
            for b, factor in gaussian.factor.items():
                precision = (factor @ factor.mT).diagonal(dim1=-2, dim2=-1)
                width = local.width[b]
                # At most halved or doubled a step: a width is judged by an average over the one before.
                local.width[b] = torch.minimum(torch.maximum(precision.rsqrt(), 0.5 * width), 2.0 * width).clamp(1e-4, 10.0).detach()
    return z


def per_unit(local: LocalModel, block: str, per_top: Tensor) -> Tensor:
    """Values per unit of the top block, `[K, n_top]` -> per unit of a block, `[K, n]` or `[K, 1]`."""
    if local.top is None:
        return per_top[:, :1].expand(-1, local.units(local.blocks[block]))
    index = local.reduced.unit_index(local.blocks[block].plates, local.top.plates)
    return per_top if index is None else per_top.index_select(1, index)


def _move(local: LocalModel, z: Coordinates, step: Mapping[str, Tensor], scale: Tensor) -> Coordinates:
    out = {}
    for name, zb in z.items():
        s = per_unit(local, name, scale)[..., None, None]
        out[name] = torch.where(s > 0, zb + s * step[name], zb)  # a step may not be finite
    return out
