"""Modes of components whose curvature is costly: Newton steps with a curvature that is kept while it serves.

Of a crossed component a factorised curvature takes as long as tens of gradients. Near the mode it hardly changes, so that steps with the one at hand still
contract: z <- z + H_0^-1 g(z), at the rate of |1 - H_0^-1 H| (the chord method; Ortega & Rheinboldt 1970, section 10.1). It is computed anew
where they do not, and at the mode, where it is asked for; there it says whether the mode was reached.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pavi_scale.guide.curvature import Coordinates, Expansion, LocalModel
from pavi_scale.guide.mode import TOLERANCE, along, decrement, search

LEAST_COLUMNS = 100  # of the dense rest from which a curvature is kept
AT_REST = 1e-10  # decrement (nats) at which steps with a kept curvature end: a hundred-thousandth of a conditional sd, which Newton's last step squares
SHRINK = 0.5  # of the decrement by a step, at least, or the curvature is computed anew: it costs as much as tens of steps
STEPS = 40  # with one curvature
CURVATURES = 12  # computed anew, before the guarded search takes over


def costly(local: LocalModel) -> bool:
    """Whether the mode is looked for here: a crossed component without kinks whose dense rest is large."""
    component = local.component
    if component.tree or component.quadratic or component.rough or local.reduced.dtype == torch.float32:
        return False
    sizes = [local.units(b) * component.shape(b)[1] for b in component.blocks]
    return sum(sizes) - max(sizes) >= LEAST_COLUMNS


def settle(local: LocalModel, z: Coordinates) -> tuple[Coordinates, Expansion]:
    """Mode of the log joint from a start `[K, n, C, e]`, and the expansion within `AT_REST` of it, without derivatives.

    Each particle goes its own way; those that are at rest wait while the others are given a new curvature.
    """
    with torch.no_grad():
        found = {b: zb.clone() for b, zb in z.items()}
        going = torch.arange(local.particles)
        for _ in range(CURVATURES):
            some = local.select(going)
            at = {b: zb[going] for b, zb in found.items()}
            moved, rests = _follow(some, at, some.expand(at, differentiable=False))
            for b, zb in moved.items():
                found[b][going] = zb
            going = going[~rests]
            if not len(going):
                break
        expansion = local.expand(found, differentiable=False)
        if not bool((decrement(local, expansion).sum(1) < TOLERANCE[local.reduced.dtype]).all()):
            found = search(local, found)
            expansion = local.expand(found, differentiable=False)
        return {b: zb + expansion.gaussian.step[b] for b, zb in found.items()}, expansion


def _follow(local: LocalModel, z: Coordinates, expansion: Expansion) -> tuple[Coordinates, Tensor]:
    """Where steps with one curvature lead, and which particles are at rest there, `[K]`: the others contract too slowly.

    The first step is Newton's own, shortened where the log joint falls.
    """
    none = torch.zeros_like(expansion.value, dtype=torch.bool)
    size = decrement(local, expansion).sum(1)
    found, _ = along(local, z, expansion, none, none)
    rests = torch.zeros(local.particles, dtype=torch.bool)
    rows, gaussian = torch.arange(local.particles), expansion.gaussian
    here = {b: zb.clone() for b, zb in found.items()}
    for _ in range(STEPS):
        _, gradient = local.slope(here)
        step = gaussian.solve(gradient)  # type: ignore[union-attr]
        after = sum((gradient[b] * s).sum((-1, -2, -3)) for b, s in step.items()).abs()  # type: ignore[union-attr]
        good = after <= torch.maximum(SHRINK * size, torch.full_like(size, AT_REST))
        for b, zb in here.items():  # a step is taken if it contracts, whatever the next one does
            found[b][rows] = torch.where(good[:, None, None, None], zb + step[b], found[b][rows])
        rests[rows] = good & (after < AT_REST)
        on = good & (after >= AT_REST)
        if not bool(on.any()):
            break
        if not bool(on.all()):
            local, rows, gaussian = local.select(on), rows[on], gaussian.mapped(lambda t, on=on: t[on])  # type: ignore[misc]
        here, size = {b: found[b][rows] for b in found}, after[on]
    return found, rests


__all__ = ["costly", "settle"]
