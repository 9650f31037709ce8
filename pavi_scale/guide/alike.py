"""Linear-Gaussian trees whose laws are the same for all units: a few numbers of each law stand for all of its units.

Given the root, the law f of a block's latent is at each of its units, and separately at each event index,

    v_f + s_f . d - d . H_f d / 2

in the offsets d of what it touches from the prior means. One unit tells v, s and H by differentiation. Sites are independent normals. Elimination from fine
to coarse (`gaussian.eliminate`) then takes a few operations on arrays `[K, n, C]`, where every unit's laws would be differentiated twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations
from typing import TypeVar

import torch
from torch import Tensor

from pavi_scale.guide.blocks import Component, Factor
from pavi_scale.guide.gaussian import DIGITS, Pair, factorise
from pavi_scale.guide.terms import Laws
from pavi_scale.model.density import Aligned
from pavi_scale.reduced import Reduced, Value

Key = TypeVar("Key")


def alike(component: Component, reduced: Reduced) -> bool:
    """Whether a component is a linear-Gaussian tree, one coordinate per unit and event index, whose laws are all latents' and the same for all units."""
    variables = reduced.graph.model.variables
    if not (component.tree and component.quadratic) or any(component.shape(b)[1] != 1 for b in component.blocks):
        return False
    own = {n for b in component.blocks for n in b.latents}
    for factor in component.factors:
        touched = {n for _, names in factor.touches for n in names}
        single = not variables[factor.variable].plates and not any(variables[p].plates for p in variables[factor.variable].parents if p not in touched)
        if factor.variable not in own or not (single or factor.variable in component.uniform):
            return False
    return True


class Alike:
    """The log marginal of such a component against its sites.

    Args:
        component: The component (`alike`).
        reduced: Its units.
        sites: Free block -> location and log precision, `[n, C]` each.
    """

    def __init__(self, component: Component, reduced: Reduced, sites: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        self.component, self.reduced = component, reduced
        plates = {b.name: b.plates for b in component.blocks}
        self.owner = {n: b.name for b in component.blocks for n in b.latents}
        self.index = {(fine, coarse): reduced.unit_index(plates[fine], plates[coarse]) for fine, above in component.couplings.items() for coarse in above}
        self.counts = {
            (self.owner[f.variable], b): self._count(plates[self.owner[f.variable]], plates[b]) for f in component.factors for b, _ in f.touches
        }
        top = component.top(reduced.graph.model.plates)
        self.weight = {b: self._weight(p, () if top is None else top.plates) for b, p in plates.items()}
        self.sites = {b: (loc, log_precision.exp()) for b, (loc, log_precision) in sites.items()}

    def _count(self, fine: tuple[str, ...], coarse: tuple[str, ...]) -> Tensor:
        """Units on plates `fine` of each unit on plates `coarse`, `[n, 1]`; `[1, 1]` where all have as many."""
        index, n = self.reduced.unit_index(fine, coarse), self.reduced.count(coarse)
        found = torch.ones(n) if index is None else torch.bincount(index, minlength=n)
        found = found.to(self.reduced.dtype)[:, None]
        return found[:1] if bool((found == found[0]).all()) else found

    def _weight(self, plates: tuple[str, ...], top: tuple[str, ...]) -> Tensor:
        """Weight of the top unit that each unit lies below, `[n]`."""
        n = self.reduced.count(plates)
        if not top:
            return torch.ones(n, dtype=self.reduced.dtype)
        index, weight = self.reduced.unit_index(plates, top), self.reduced.weights(top).flatten()
        return weight if index is None else weight.index_select(0, index)

    def log_marginal(self, given: Mapping[str, Value], particles: int) -> Tensor:
        """Log marginal of the component's latents, `[K]`; minus infinity where rounding has eaten a precision.

        Args:
            given: Values of the root variables.
            particles: K.
        """
        total = torch.zeros(particles, dtype=self.reduced.dtype)
        laws = Laws(self.component, self.reduced, given, particles)
        one = self._start(laws, particles)
        numbers = [(self.owner[f.variable], *self._numbers(laws, f, one)) for f in self.component.factors]
        for own, value, _, _ in numbers:
            total = total + value * self.weight[own].sum()
        h: dict[Pair, Tensor] = {}
        g: dict[str, Tensor] = {}
        for b, (loc, k) in self.sites.items():
            away = loc - one[b][..., 0]
            h[b, b], g[b] = k, k * away
            total = total - 0.5 * ((g[b] * away).sum(2) * self.weight[b]).sum(1)
        # Small terms first: what is as large as the units is added to once.
        slopes = _summed([(b, s * self.counts[own, b]) for own, _, slope, _ in numbers for b, s in slope.items()])
        curves = _summed([(pair, c * self.counts[own, pair[0]]) for own, _, _, curve in numbers for pair, c in curve.items()])
        g = {b: s + g[b] if b in g else s for b, s in slopes.items()}
        h = {pair: c + h[pair] if pair in h else c for pair, c in curves.items()}
        integral, lost = self._eliminate(h, g, particles)
        return torch.where(lost, -math.inf, total + integral)

    def _start(self, laws: Laws, particles: int) -> dict[str, Tensor]:
        """The prior means of one unit of each block, `[K, 1, C, 1]`, coarse to fine: far from where its laws put a unit their values lose all digits."""
        one: dict[str, Tensor] = {}
        theta: dict[str, Tensor] = {}
        variables, links = self.reduced.graph.model.variables, self.reduced.graph.links
        with torch.no_grad():
            for block in self.component.blocks:
                parts = {}
                for name in block.latents:
                    v = variables[name]
                    above = {p: t.reshape(particles, *(1,) * len(v.plates), *links[p].event_shape) for p, t in theta.items() if p in v.parents}
                    mean = self.reduced.prior_mean(name, laws.given, {p: Aligned(t, v.plates, True) for p, t in above.items()}, alone=True)
                    parts[name] = mean.expand(particles, *mean.shape[1:]).reshape(particles, 1, *links[name].base_shape)
                    theta[name] = links[name].forward(parts[name])
                one[block.name] = laws.join(block, parts)
        return one

    @staticmethod
    def _numbers(laws: Laws, factor: Factor, one: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor], dict[Pair, Tensor]]:
        """v `[K]`, s and H `[K, 1, C]` of a law at these points."""
        value, slope, curve = laws.one_unit(factor, one, differentiable=True)
        return value[:, 0], {b: s[..., 0] for b, s in slope.items()}, {pair: c[..., 0, 0] for pair, c in curve.items()}

    def _eliminate(self, h: dict[Pair, Tensor], g: dict[str, Tensor], particles: int) -> tuple[Tensor, Tensor]:
        """Log integral of exp(g d - d h d / 2) over all units, `[K]`, and whether a precision is rounding alone; must agree with `gaussian.eliminate`."""
        total, lost = torch.zeros(particles, dtype=self.reduced.dtype), torch.zeros(particles, dtype=torch.bool)
        whole = {b: h[b, b].detach() for b in g}
        for block in reversed(self.component.blocks):
            j, n = block.name, self.reduced.count(block.plates)
            own = h[j, j].expand(particles, n, -1)
            lost = lost | (own.detach() <= DIGITS * torch.finfo(own.dtype).eps * whole[j]).flatten(1).any(1)
            factor = factorise(own[..., None, None])[..., 0, 0]
            inner = g[j] / (factor * factor)
            units = (0.5 * g[j] * inner - factor.log()).sum(-1) + 0.5 * own.shape[-1] * math.log(2 * math.pi)
            total = total + (units * self.weight[j]).sum(1)
            above = self.component.couplings[j]
            gain = {i: h[j, i] / (factor * factor) for i in above}
            for i in above:
                g[i] = self._add(g[i], (j, i), -h[j, i] * inner)
                h[i, i] = self._add(h[i, i], (j, i), -h[j, i] * gain[i])
            for coarse, fine in combinations(above, 2):
                update, index = -h[j, fine] * gain[coarse], self.index[j, fine]
                start = h.get((fine, coarse), update.new_zeros(1, 1, 1)).expand(particles, g[fine].shape[1], update.shape[2])
                h[fine, coarse] = start + update if index is None else start.index_add(1, index, update)
        return total, lost

    def _add(self, target: Tensor, pair: Pair, source: Tensor) -> Tensor:
        """`target` of a coarser block with what finer units add to theirs."""
        index = self.index[pair]
        n = self.reduced.count(next(b.plates for b in self.component.blocks if b.name == pair[1]))
        if index is None:
            return target + source
        if n == 1:
            return target + source.sum(1, keepdim=True)
        return target.expand(len(source), n, -1).index_add(1, index, source)


def _summed(parts: list[tuple[Key, Tensor]]) -> dict[Key, Tensor]:
    """Sums by key."""
    out: dict[Key, Tensor] = {}
    for key, part in parts:
        out[key] = out[key] + part if key in out else part
    return out
