"""The guide as a whole: root block, components and what is known of their structure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pavi_scale.guide.blocks import Component, Factor, lies_below, make_blocks, make_components
from pavi_scale.guide.curvature import LocalModel
from pavi_scale.guide.gaussian import Tree
from pavi_scale.guide.local import Correction, component_bound, fit_core, shared_bound, weights
from pavi_scale.guide.mode import Noise
from pavi_scale.model.density import Graph
from pavi_scale.reduced import Reduced, Value


class Guide:
    """q(Theta) = q(root) prod over components q(component | root, earlier components, encodings).

    Args:
        graph: Model with its links.
        free: Plate sets whose blocks have free encodings.
        structure: Component name -> {"elementwise": ..., "quadratic": ..., "candidates": ...}: found by `probe`, decided by the plan.
    """

    def __init__(self, graph: Graph, free: frozenset[frozenset[str]] = frozenset(), structure: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self.graph, self.free = graph, free
        structure = structure or {}
        self.blocks = make_blocks(graph, free)
        found = {name: {k: tuple(v) if k in ("rough", "uniform") else v for k, v in what.items()} for name, what in structure.items()}
        self.components: list[Component] = [replace(c, **found.get(c.name, {})) for c in make_components(graph, self.blocks)]  # type: ignore[arg-type]
        touched = {f.variable for c in self.components for f in c.factors}
        self.plain = [v for v in graph.model.of_kind("observed") if v.name not in touched]

    @property
    def candidates(self) -> int:
        """Most candidates per draw of any component."""
        return max((c.candidates for c in self.components if c.resampled), default=0)

    @property
    def finest(self) -> set[str]:
        """Blocks whose units are independent given the others."""
        return {b for c in self.components for b in c.finest}

    @property
    def exact(self) -> bool:
        """Whether every local conditional is Gaussian, so that local bounds are exact."""
        return all(c.quadratic for c in self.components)

    def counted(self, reduced: Reduced, plates: tuple[str, ...], split: str | None, first: bool) -> bool:
        """Whether a shard answers for terms on `plates`: those below the split plate always, others in the first shard."""
        return first or (split is not None and lies_below(reduced.graph.model.plates, plates, (split,)))

    def local_bound(
        self, reduced: Reduced, root: Mapping[str, Value], particles: int, *, split: str | None = None, first: bool = True,
        differentiable: bool = False, bound: bool = False, samples: int = 0, noise: Noise | None = None, corrections: Mapping[str, Correction] | None = None,
        together: int = 0, groups: int = 1,
    ) -> Tensor:
        """sum_n L_n(root) over the shard, `[K]`.

        Quadratic components give their exact log marginal. Others give the Laplace value; if `samples` = M is not zero, the importance-weighted one,
        log 1/M sum_m p/q per unit, of several blocks that of `groups` > 1. With `bound`, those too are drawn and judged by their laws (of a quadratic
        component every draw has the same log p - log q: its log marginal).
        """
        total = torch.zeros(particles, dtype=reduced.dtype)
        for v in self.plain:
            if self.counted(reduced, v.plates, split, first):
                term = reduced.log_prob(v.name, root) * reduced.weights(v.plates)
                total = total + term.reshape(term.shape[0], -1).sum(1)
        for component in self.components:
            if not self.counted(reduced, component.blocks[-1].plates, split, first):
                continue
            local = LocalModel(component, reduced, root, {}, particles)
            core = fit_core(local, differentiable=differentiable)
            honest = (bound and not component.quadratic) or (samples and component.resampled and (groups > 1 or not component.joint))
            if noise is None or not honest:
                total = total + core.log_marginal(weights(core))
            elif together:
                total = total + shared_bound(core, noise, samples if component.resampled else 1, corrections, together, groups)
            else:
                total = total + component_bound(core, noise, samples if component.resampled else 1, corrections, groups)
        return total


def probe(graph: Graph, free: frozenset[frozenset[str]], reduced: Reduced, draws: list[dict[str, Value]]) -> dict[str, dict[str, Any]]:
    """Find, numerically on a small selection, which components are element-wise over events, and which are quadratic.

    Element-wise: with a random vector v over the events, H v = v (H 1) for every law. Quadratic: the curvature does not move with the point.

    Args:
        graph: The model.
        free: Free plate sets.
        reduced: A small reduced model.
        draws: Values of all latents at a few points (root and local).
    """
    found: dict[str, dict[str, Any]] = {}
    guide = Guide(graph, free)
    for component in guide.components:
        size = {s for b in component.blocks for s in b.sizes}
        shapes = {graph.links[n].base_shape for b in component.blocks for n in b.latents}
        trial = [component]
        if len(size) == 1 and len(shapes) == 1 and size != {1}:
            trial = [replace(component, elementwise=True)]
            if not all(separate(LocalModel(trial[0], reduced, d, {}, 1)) for d in draws):
                trial = [component]
        if trial[0].elementwise or sum(b.dim for b in component.blocks) <= 64:
            quadratic = all(curvature_fixed(LocalModel(trial[0], reduced, d, {}, 1)) for d in draws)
        else:
            quadratic = False
        seen = [f for f in component.factors if not _unseen(reduced, f)]
        rough = [f.variable for f in seen if all(_kinked(LocalModel(trial[0], reduced, d, {}, 1), f) for d in draws)]
        uniform = [f.variable for f in seen if all(_uniform(LocalModel(trial[0], reduced, d, {}, 1), f) for d in draws)]
        told = not rough and len(seen) == len(component.factors)
        found[component.name] = {"elementwise": trial[0].elementwise, "quadratic": quadratic and told, "rough": rough, "uniform": uniform}
    return found


def _points(local: LocalModel, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {b: z + 0.7 * torch.randn(z.shape, generator=generator, dtype=z.dtype) for b, z in local.start().items()}


def separate(local: LocalModel) -> bool:
    """Whether coordinates of different event index do not interact in any law of the component."""
    z = _points(local, 0)
    generator = torch.Generator().manual_seed(1)
    for factor in local.component.factors:
        vector = torch.randn(local.component.shape(local.component.blocks[0])[0], generator=generator, dtype=local.reduced.dtype)
        plain, along = local.products(factor, z, None), local.products(factor, z, vector)
        for pair, product in plain.items():
            scale = torch.maximum(product.abs().max(), along[pair].abs().max()).clamp_min(1e-12)
            if float((product * vector[:, None] - along[pair]).abs().max() / scale) > 1e-8:
                return False
    return True


def _unseen(reduced: Reduced, factor: Factor) -> bool:
    """Whether a law has no unit, or nothing observed, in the selection, which then says nothing of its curvature."""
    v = reduced.graph.model.variables[factor.variable]
    if not reduced.count(v.plates) or v.missing != "mask":
        return not reduced.count(v.plates)
    reduced.data[factor.variable]  # read when it is first asked for, and its mask made
    return not bool(reduced.masks[factor.variable].any())


def _kinked(local: LocalModel, factor: Factor) -> bool:
    """Whether a law's gradient changes between two points although its second derivative is zero at both."""
    one, two = (_points(local, seed) for seed in (4, 5))
    (_, first, h_one), (_, second, h_two) = (local._factor(factor, z, False) for z in (one, two))
    flat = all(float(h.abs().max()) == 0.0 for h in (*h_one.values(), *h_two.values()))
    return flat and any(float((first[b] - second[b]).abs().max()) > 1e-9 for b in first)


def _uniform(local: LocalModel, factor: Factor) -> bool:
    """Whether a law's second derivatives are the same for all units and at two points; nothing but the root may enter beside what is differentiated."""
    model = local.reduced.graph.model
    v, touched = model.variables[factor.variable], {n for _, names in factor.touches for n in names}
    others = [model.variables[p] for p in v.parents if p not in touched]
    if v.missing == "mask" or any(p.plates for p in others) or local.reduced.count(v.plates) < 2:
        return False
    curved = [local._factor(factor, _points(local, seed), False)[2] for seed in (6, 7)]
    flat = all(float((h - h[:, :1]).abs().max()) <= 1e-10 * float(h.abs().max().clamp_min(1e-12)) for found in curved for h in found.values())
    return flat and all(float((h - curved[1][pair]).abs().max()) <= 1e-10 * float(h.abs().max().clamp_min(1e-12)) for pair, h in curved[0].items())


def curvature_fixed(local: LocalModel) -> bool:
    """Whether the curvature, and the mode that a Newton step leads to, are the same from two points (a kink moves the second only)."""
    points = [_points(local, seed) for seed in (2, 3)]
    one, two = (local.expand(z, differentiable=False).gaussian for z in points)
    if isinstance(one, Tree) and isinstance(two, Tree):
        pairs = [(one.factor[b], two.factor[b]) for b in one.factor] + [(one.gain[p], two.gain[p]) for p in one.gain]
    else:
        pairs = [(one.factor, two.factor), (one.head, two.head), *zip(one.values, two.values, strict=True)]  # type: ignore[union-attr, list-item]
    same = all(float((a - b).abs().max()) <= 1e-7 * float(a.abs().max().clamp_min(1e-12)) for a, b in pairs)
    # Of a mode at zero, which a prior of mean zero has without data, rounding is all there is: it is as near as the way there is long.
    ways = [(p + s, q + t, torch.maximum(s.abs(), t.abs())) for p, s, q, t in ((points[0][b], one.step[b], points[1][b], two.step[b]) for b in points[0])]
    return same and all(float((a - b).abs().max()) <= 1e-7 * max(float(a.abs().max()), float(way.max())) for a, b, way in ways)
