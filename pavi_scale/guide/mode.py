"""Newton searches for the mode of a component's log joint: every unit on its own, guarded where the law is not Gaussian."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pavi_scale.guide.curvature import Coordinates, Expansion, LocalModel
from pavi_scale.guide.gaussian import Tree

MAX_ITERATIONS = 20
TOLERANCE = 1e-9  # Newton decrement (nats) at which a unit's search ends
LONGEST = 4.0  # conditional sds of one unguarded step
MAX_SHORTENED = 24  # times that a step is shortened to a quarter before it is given up
ENCODING_ITERATIONS = 2  # Newton steps where the mode is an encoding for stochastic training, not the centre of an expansion
ROUGH_ITERATIONS = 12


def find_mode(local: LocalModel) -> tuple[Coordinates, int]:
    """Mode of the log joint by damped Newton steps, without derivatives; and the number of steps taken."""
    with torch.no_grad():  # sites and root values may be tracked; the search is not
        z = local.start()
        if local.component.rough:
            return _rough(local, z), ROUGH_ITERATIONS
        return _newton(local, z)


def _newton(local: LocalModel, z: Coordinates) -> tuple[Coordinates, int]:
    """Each unit of the top block stops by its own decrement: its mode does not depend on which others are searched with it."""
    if local.reduced.dtype == torch.float32:  # an encoding for stochastic training: no search along the step
        for _ in range(ENCODING_ITERATIONS):
            z = {b: zb + step for (b, zb), step in zip(z.items(), _bounded(local.expand(z, differentiable=False)), strict=True)}
        return z, ENCODING_ITERATIONS
    expansion = local.expand(z, differentiable=False)
    settled = stuck = torch.zeros_like(expansion.value, dtype=torch.bool)
    for iteration in range(MAX_ITERATIONS):
        step = expansion.gaussian.step
        settled = settled | (_decrement(local, expansion) < TOLERANCE)
        if bool(settled.all()):
            # The step at hand is free, and squares what is left of the error.
            return _move(local, z, step, (~stuck).to(expansion.value.dtype)), iteration
        scale = (~settled).to(expansion.value.dtype)
        if iteration == MAX_ITERATIONS - 1:
            break
        for _ in range(MAX_SHORTENED):
            # Units whose log joint fell (or is not finite) try a quarter of the step.
            trial = _move(local, z, step, scale)
            found = local.expand(trial, differentiable=False)
            worse = ~settled & ~(found.value >= expansion.value - 1e-9 * (1 + expansion.value.abs()))
            if not bool(worse.any()):
                break
            scale = torch.where(worse, 0.25 * scale, scale)
        else:
            settled, stuck = settled | worse, stuck | worse
            trial = _move(local, z, step, torch.where(worse, torch.zeros_like(scale), scale))
            found = local.expand(trial, differentiable=False)
        z, expansion = trial, found
    return _move(local, z, step, scale), MAX_ITERATIONS


def _bounded(expansion: Expansion) -> list[Tensor]:
    """Newton steps, in the order of the blocks, no longer than a few conditional sds where the component is not Gaussian."""
    steps = []
    for b, step in expansion.gaussian.step.items():
        if isinstance(expansion.gaussian, Tree):
            sd = expansion.gaussian.factor[b].diagonal(dim1=-2, dim2=-1).reciprocal()
            step = step.clamp(-LONGEST * sd, LONGEST * sd)
        steps.append(step)
    return steps


def _decrement(local: LocalModel, expansion: Expansion) -> Tensor:
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


def _move(local: LocalModel, z: Coordinates, step: Mapping[str, Tensor], scale: Tensor) -> Coordinates:
    out = {}
    for name, zb in z.items():
        if local.top is None:
            s = scale[:, :1]
        else:
            index = local.reduced.unit_index(local.blocks[name].plates, local.top.plates)
            s = scale if index is None else scale.index_select(1, index)
        out[name] = zb + s[..., None, None] * step[name]
    return out
