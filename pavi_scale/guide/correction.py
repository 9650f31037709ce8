"""Learned corrections of the Gaussian core: one conditional flow per block, shared over its plates.

In the core's whitened coordinates the posterior of every unit is close to a standard normal, so one small flow, given the unit's
encoding, serves a whole plate. Hybrid blocks add one residual row (shift, log scale) per ground unit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pavi_scale.encodings import SetEncoder
from pavi_scale.flows import ConditionalFlow
from pavi_scale.guide.blocks import Block, Component, lies_below
from pavi_scale.model.template import Model
from pavi_scale.reduced import Reduced

ENCODING = 8
HIDDEN = 32


class BlockCorrection(nn.Module):
    """u' = flow(u; context network(mode, log curvature, set encoding)) per unit and event copy.

    Args:
        block: The block.
        e: Coordinates of one copy.
        seen: The observed variable below the block that its set encoder reads; None for no set encoder.
        inputs: Features of one observation of it.
    """

    def __init__(self, block: Block, e: int, seen: str | None, inputs: int) -> None:
        super().__init__()
        self.block, self.e, self.seen = block, e, seen
        self.encoder = SetEncoder(inputs, ENCODING) if inputs else None
        self.network = nn.Sequential(nn.Linear(2 * e + (ENCODING if inputs else 0), HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN), nn.SiLU())
        self.flow = ConditionalFlow(e, HIDDEN)
        self.register_buffer("loc", torch.zeros(2 * e))
        self.register_buffer("scale", torch.ones(2 * e))

    def standardise(self, context: Tensor) -> None:
        """Fix location and scale of the core's features from a sample `[..., 2 e]`."""
        flat = context.reshape(-1, context.shape[-1])
        self.loc, self.scale = flat.mean(0), flat.std(0).nan_to_num(1.0).clamp_min(1e-3)

    def context(self, core: Tensor, reduced: Reduced) -> Tensor:
        """Context of the flow, `[K, n, C, hidden]`, from the core's features `[K, n, C, 2 e]` and the data below."""
        features = (core - self.loc) / self.scale
        if self.encoder is not None:
            x, unit = self.observations(reduced)
            code = self.encoder(x, unit, reduced.count(self.block.plates))
            features = torch.cat([features, code[None, :, None, :].expand(*features.shape[:3], -1)], -1)
        return self.network(features)

    def observations(self, reduced: Reduced) -> tuple[Tensor, Tensor]:
        """What the set encoder reads of a reduced model: features `[m, inputs]`, and the unit of each, `[m]`."""
        return observations(reduced, self.block, str(self.seen))


def observations(reduced: Reduced, block: Block, v: str) -> tuple[Tensor, Tensor]:
    """Features `[m, inputs]` of all observations `v` below the block's units (values, then their covariates), and their unit `[m]`."""
    variable = reduced.graph.model.variables[v]
    sizes = reduced.sizes(variable.plates)
    own = _flat(reduced.data[v], sizes)
    parts = [own]
    for parent in variable.parents:
        if parent in reduced.data:
            aligned = reduced.aligned(parent, variable.plates, {})
            shape = [s if p in aligned.axes else 1 for p, s in zip(variable.plates, sizes, strict=True)]
            event = aligned.value.shape[len(aligned.axes) :]
            parts.append(_flat(aligned.value.reshape(*shape, *event).expand(*sizes, *event), sizes))
    index = reduced.unit_index(variable.plates, block.plates)
    return torch.cat(parts, -1), torch.arange(len(own)) if index is None else index


def _flat(values: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Values of each unit in a row, `[m, inputs]`, also of no units."""
    return values.reshape(math.prod(sizes), math.prod(values.shape[len(sizes) :]))


def below(model: Model, cardinality: Mapping[str, int], block: Block) -> str | None:
    """The observed variable with most values below a block's units, if there is one: what a set encoder is trained on, and reads ever after."""
    found = [v for v in model.of_kind("observed") if lies_below(model.plates, v.plates, block.plates)]
    return max(found, key=lambda v: math.prod(cardinality[p] for p in v.plates)).name if found else None


class Corrections(nn.Module):
    """The corrections of a guide's blocks, with the schemes of their encodings.

    Args:
        components: Components of the guide; only their resampled blocks have a correction.
        schemes: Block name -> "likelihood", "encoder", "hybrid" or "free"; blocks not named have no correction.
        seen: Block name -> the observed variable that its set encoder reads; blocks not named have no set encoder.
        reduced: A reduced model, for the sizes of the data.
    """

    def __init__(self, components: list[Component], schemes: Mapping[str, str], seen: Mapping[str, str], reduced: Reduced) -> None:
        super().__init__()
        self.schemes = dict(schemes)
        blocks = {b.name: (c, b) for c in components for b in c.blocks if b.name in schemes and b.name in c.resampled and c.tree}
        self.parts = nn.ModuleDict()
        for name, (component, block) in blocks.items():
            inputs = observations(reduced, block, seen[name])[0].shape[1] if name in seen else 0
            self.parts[_key(name)] = BlockCorrection(block, component.shape(block)[1], seen.get(name), inputs)

    def names(self) -> list[str]:
        """Blocks that have a correction."""
        return [part.block.name for part in self.parts.values() if isinstance(part, BlockCorrection)]

    def part(self, name: str) -> BlockCorrection:
        """The correction of one block."""
        return self.parts[_key(name)]  # type: ignore[return-value]

    def apply_to(self, name: str, u: Tensor, core: Tensor, reduced: Reduced, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Corrected noise `[K, n, C, e]` and the log-Jacobian per unit, `[K, n]`.

        Args:
            name: The block.
            u: Standard normals.
            core: The core's features, `[K, n, C, 2 e]`.
            reduced: Where the raw data are.
            rows: Residual rows of a hybrid block, `[n, 2 C e]`; None for none.
        """
        part = self.part(name)
        moved, log_det = part.flow(u, part.context(core, reduced))
        log_det = log_det.sum(-1)
        if rows is not None:
            shift, log_scale = (t.reshape(1, *u.shape[1:]) for t in rows.chunk(2, -1))
            moved = shift + log_scale.exp() * moved
            log_det = log_det + log_scale.sum((-1, -2))
        return moved, log_det


def _key(name: str) -> str:
    return name.replace("*", "__")
