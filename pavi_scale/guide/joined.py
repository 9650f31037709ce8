"""Root latents that are linear-Gaussian together with a component: its coarsest block, above every plate."""

from __future__ import annotations

import numpy as np
import torch

from pavi_scale.ambient import precision
from pavi_scale.guide.blocks import Block, Component, Factor, coupled
from pavi_scale.guide.curvature import LocalModel
from pavi_scale.guide.guide import curvature_fixed, separate
from pavi_scale.guide.root import RootSpace
from pavi_scale.reduced import Reduced


def with_roots(component: Component, few: Reduced, space: RootSpace, told: np.ndarray) -> Component:
    """The component with the root latents that are linear-Gaussian together with it as its coarsest block; as it was if there are none.

    Args:
        component: A component with free blocks.
        few: Some of its units, to look at the laws.
        space: Root coordinates.
        told: Root coordinates that the data below the free blocks speak of: they are not Gaussian for good.
    """
    model = few.graph.model
    owner = np.repeat(np.arange(len(space.names)), space.sizes)
    own = {f.variable for f in component.factors}

    def fits(name: str) -> bool:
        readers = {v.name for v in model.variables.values() if name in v.parents}
        spoken_of = bool(np.isin(owner[told], space.names.index(name)).any())
        alike = not component.elementwise or {few.graph.links[name].size} == {s for b in component.blocks for s in b.sizes}
        return bool(readers) and readers <= own and not spoken_of and few.graph.links[name].identity and alike

    joined = tuple(n for n in space.names if fits(n))
    if not joined or not component.tree or not component.quadratic:
        return component
    block = Block((), joined, tuple(few.graph.links[n].size for n in joined))
    parents = {f.variable: tuple(n for n in joined if n in model.variables[f.variable].parents) for f in component.factors}
    factors = [Factor(n, ((block.name, tuple(m for m in joined if m == n or m in model.variables[n].parents)),)) for n in joined]
    factors += [Factor(f.variable, (((block.name, parents[f.variable]),) if parents[f.variable] else ()) + f.touches) for f in component.factors]
    larger = coupled(model.plates, (block, *component.blocks), tuple(factors), component)
    with precision(torch.float64):
        given = dict(space.values(torch.from_numpy(space.prior_draws(1, 0))))
        shape = {b.name: (few.count(b.plates), b.dim) for b in component.blocks if b.free}
        data = {b: (torch.ones(n), torch.zeros(n)) for b, n in shape.items()}  # without any, all digits would cancel
        local = LocalModel(larger, few, given, data, 1)
        return larger if larger.tree and (not larger.elementwise or separate(local)) and curvature_fixed(local) else component
