"""Importance ratios of the guide's local draws: how far its conditionals are from the model's."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import torch
from torch import Tensor

from pavi_scale.elbo import Weights, correctors
from pavi_scale.guide.blocks import labelled
from pavi_scale.guide.curvature import LocalModel
from pavi_scale.guide.guide import Guide
from pavi_scale.guide.labels import Labels, Parents
from pavi_scale.guide.local import candidates, draw, fit_core
from pavi_scale.guide.mode import Noise, per_unit
from pavi_scale.reduced import Reduced, Value

GROUP = 8  # candidates of a group by which its coarser blocks are judged
TOGETHER = 16  # such groups computed at once


def local_ratios(
    guide: Guide, reduced: Reduced, root: Mapping[str, Value], weights: Weights, held: Mapping[str, np.ndarray], noise: Noise, samples: int,
    wanted: Collection[str],
) -> dict[str, Tensor]:
    """log p - log q of draws of each finest block's units at one root point, `[samples, n]`, by block; of labelled leaves up to a constant of the unit.

    Coarser blocks' ratios are those of all that lies below with them (`Candidates.log_group`), where they are picked among candidates.
    Linear-Gaussian components are left out: their ratios are constant.

    Args:
        guide: The guide.
        reduced: The reduced model.
        root: One root point.
        weights: Sites and corrections of its units.
        held: Coarse block of a labelled component -> what the draws of its leaves need (`Parents.of`).
        noise: Standard normals, other ones at each call.
        samples: Draws per unit.
        wanted: Finest blocks of the components that are asked for; the others are only drawn.
    """
    values, corrections, out = dict(root), correctors(weights, reduced), {}
    with torch.no_grad():
        for component in guide.components:
            local, coarse, leaf = LocalModel(component, reduced, values, weights.sites, 1), component.blocks[0].name, component.blocks[-1].name
            data = labelled(component, guide.graph) if coarse in held else None
            if data is not None:
                labels, parents = Labels(local, data), Parents.of(held[coarse])
                values.update(local.values(labels.draw(parents, noise)))
                if leaf in wanted:
                    out[leaf] = labels.ratios(parents, noise, samples)
                continue
            core = fit_core(local, differentiable=False)
            values.update(draw(core, noise, corrections).values)
            if component.finest and leaf in wanted:
                out.update({name: ratio[0, 0] for name, ratio in candidates(core, noise, samples, corrections).log_weight.items()})
                if component.joint:
                    calls = [candidates(core, noise, GROUP * TOGETHER, corrections, TOGETHER).log_group for _ in range(-(-samples // TOGETHER))]
                    groups = torch.cat(calls, 1)[0, :samples]
                    coarser = [b for b in component.blocks if b.name not in component.finest]
                    out.update({b.name: per_unit(local, b.name, groups).expand(-1, local.units(b)) for b in coarser})
    return out
