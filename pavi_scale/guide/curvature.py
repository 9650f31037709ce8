"""Likelihood-informed encodings: score and curvature of a component's log joint, unit by unit.

Summed over the laws below a unit, score and curvature are its encoding: permutation-invariant, whatever the number of children
(method note, section 4.2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pavi_scale.guide.arrow import Arrow, factorise_arrow
from pavi_scale.guide.blocks import Component
from pavi_scale.guide.fronts import Coupling, Pattern, make_pattern
from pavi_scale.guide.gaussian import Pair, Tree, eliminate
from pavi_scale.guide.terms import Laws, scatter
from pavi_scale.reduced import Reduced, Value

Coordinates = dict[str, Tensor]


@dataclass
class Expansion:
    """Second-order expansion of a component's log joint at a point.

    Args:
        value: Log joint per unit of the top block, `[K, n_top]` (`[K, 1]` where there is none).
        gradient: Block -> `[K, n, C, e]`.
        gaussian: The factorised Gaussian with the expansion's curvature; its `step` is the Newton step.
    """

    value: Tensor
    gradient: Coordinates
    gaussian: Tree | Arrow


class LocalModel(Laws):
    """A component on a reduced model, given root variables and earlier components.

    Args:
        component: The component.
        reduced: Reduced model whose selection holds every child of the selected units (pools are complete), except below free blocks.
        given: Values of the root variables and of earlier components.
        sites: Free block -> (location, log precision), `[n, d]` each.
        particles: K.
    """

    def __init__(self, component: Component, reduced: Reduced, given: Mapping[str, Value], sites: Mapping[str, tuple[Tensor, Tensor]], particles: int) -> None:
        super().__init__(component, reduced, given, particles)
        self.sites = sites
        self.top = component.top(reduced.graph.model.plates)
        self.index: dict[Pair, Tensor | None] = {
            (fine, coarse): reduced.unit_index(self.blocks[fine].plates, self.blocks[coarse].plates)
            for fine, above in component.couplings.items()
            for coarse in above
        }

    def select(self, particles: Tensor) -> LocalModel:
        """The same component for some of the particles (a mask, or positions)."""
        given = {n: Value(v.theta[particles] if len(v.theta) == self.particles else v.theta, v.plates) for n, v in self.given.items()}
        count = int(particles.sum()) if particles.dtype == torch.bool else len(particles)
        return LocalModel(self.component, self.reduced, given, self.sites, count)

    def start(self) -> Coordinates:
        """Prior means, parents first: where the search for the mode starts."""
        z: Coordinates = {}
        values = dict(self.given)
        with torch.no_grad():
            for block in self.component.blocks:
                parts = {}
                for latent in block.latents:
                    v = self.reduced.graph.model.variables[latent]
                    mean = self.reduced.prior_mean(latent, values)
                    mean = mean.expand(self.particles, *mean.shape[1:])
                    order = [0, *(1 + v.plates.index(p) for p in block.plates), *range(1 + len(v.plates), mean.ndim)]
                    mean = mean.permute(order)
                    link = self.reduced.graph.links[latent]
                    parts[latent] = mean.reshape(self.particles, -1, *link.base_shape)
                    values[latent] = Value(link.forward(mean), block.plates)
                z[block.name] = self.join(block, parts)
        return z

    def log_terms(self, z: Mapping[str, Tensor]) -> Tensor:
        """Log joint in unconstrained coordinates per unit of the top block."""
        values = self.values(z)
        total: Tensor | float = 0.0
        for factor in self.component.factors:
            term = self.reduced.log_prob(factor.variable, values).flatten(1)
            total = total + self.to_top(term.expand(self.particles, -1), self.reduced.graph.model.variables[factor.variable].plates)
        for name, zb in z.items():
            block = self.blocks[name]
            sizes = self.reduced.sizes(block.plates)
            own = torch.zeros((), dtype=zb.dtype)
            for latent in block.latents:
                link = self.reduced.graph.links[latent]
                base = self.split(block, latent, zb)
                theta = values[latent].theta.reshape(*zb.shape[:2], *link.event_shape)
                own = own + link.log_det(base, theta)
            if name in self.sites:
                own = own + self._site(name, zb)[0]
            total = total + self.to_top(own.reshape(self.particles, -1) if sizes else own, block.plates)
        return total if isinstance(total, Tensor) else torch.zeros(self.particles, 1)

    def to_top(self, term: Tensor, plates: tuple[str, ...]) -> Tensor:
        """Sum `[K, n]` terms on `plates` by the unit of the top block they lie below, `[K, n_top]`."""
        if self.top is None:
            return term.sum(1, keepdim=True)
        index = self.reduced.unit_index(plates, self.top.plates)
        if index is None:
            return term
        return term.new_zeros(term.shape[0], self.units(self.top)).index_add(1, index, term)

    def _site(self, name: str, zb: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Value `[K, n]`, gradient and precision `[K, n, C, e]` of a free block's Gaussian site."""
        block = self.blocks[name]
        links = self.reduced.graph.links
        loc, log_precision = (
            self.join(block, {n: part.reshape(1, -1, *links[n].base_shape) for n, part in zip(block.latents, rows.split(block.sizes, -1), strict=True)})
            for rows in self.sites[name]
        )
        precision = log_precision.exp()
        offset = loc - zb
        return -0.5 * (precision * offset * offset).sum((-1, -2)), precision * offset, precision.expand_as(zb)

    def expand(self, z: Mapping[str, Tensor], *, differentiable: bool) -> Expansion:
        """Value, gradient and factorised curvature at `z`.

        Args:
            z: Coordinates of each block.
            differentiable: Whether the result keeps its graph (to `z` and to what was given).
        """
        k = self.particles
        gradient = {n: torch.zeros_like(zb) for n, zb in z.items()}
        precision: dict[Pair, Tensor] = {}
        couplings: list[Coupling] = []
        value: Tensor | None = None
        for factor in self.component.factors:
            plates = self.reduced.graph.model.variables[factor.variable].plates
            known = self._absorbed(factor)
            if known is not None:
                plates = self.blocks[factor.touches[0][0]].plates
                term, grads, hess = known.at(z[factor.touches[0][0]])
            elif factor.variable in self.component.rough:
                term, grads, hess = self._rough(factor, z, differentiable)
            else:
                term, grads, hess = self._factor(factor, z, differentiable)
            topped = self.to_top(term, plates)
            value = topped if value is None else value + topped
            at = {b: self.reduced.unit_index(plates, self.blocks[b].plates) for b, _ in factor.touches}
            for b, grad in grads.items():
                gradient[b] = scatter(gradient[b], at[b], grad)
            for (a, b), h in hess.items():
                if a != b and not self.component.tree:
                    couplings.append(Coupling((a, b), (at[a], at[b]), h))
                    continue
                if (a, b) not in precision:
                    precision[a, b] = h.new_zeros(k, z[a].shape[1], h.shape[2], z[a].shape[3], z[b].shape[3])
                precision[a, b] = scatter(precision[a, b], at[a], h)
        for b in self.sites:
            if b not in z:
                continue
            site, grad, prec = self._site(b, z[b])
            value = self.to_top(site, self.blocks[b].plates) + (0.0 if value is None else value)
            gradient[b] = gradient[b] + grad
            precision[b, b] = precision[b, b] + torch.diag_embed(prec)
        if self.component.tree:
            gaussian: Tree | Arrow = eliminate(self.component, self.index, precision, gradient)
        else:
            gaussian = factorise_arrow(self._pattern(z, couplings), precision, couplings, gradient)
        return Expansion(value if value is not None else torch.zeros(k, 1), gradient, gaussian)

    def slope(self, z: Mapping[str, Tensor], *, differentiable: bool = False) -> tuple[Tensor, Coordinates]:
        """Log joint, `[K]`, and gradient at `z`, without curvature: of a component whose laws have no kinks. `differentiable` as in `expand`."""
        gradient = {n: torch.zeros_like(zb) for n, zb in z.items()}
        value = torch.zeros(self.particles, dtype=self.reduced.dtype)
        for factor in self.component.factors:
            term, grads, _ = self._factor(factor, z, differentiable, second=False)
            plates = self.reduced.graph.model.variables[factor.variable].plates
            value = value + term.sum(1)
            for b, grad in grads.items():
                gradient[b] = scatter(gradient[b], self.reduced.unit_index(plates, self.blocks[b].plates), grad)
        for b in (b for b in self.sites if b in z):
            site, grad, _ = self._site(b, z[b])
            value, gradient[b] = value + site.sum(1), gradient[b] + grad
        return value, gradient

    def _pattern(self, z: Mapping[str, Tensor], couplings: list[Coupling]) -> Pattern:
        """What a crossed component eliminates: a matter of the selection alone, and kept with it."""
        key = ("pattern", self.component.name, self.component.elementwise)
        if key not in self.reduced.absorbed:
            self.reduced.absorbed[key] = make_pattern({b: (t.shape[1], t.shape[3]) for b, t in z.items()}, couplings)
        return self.reduced.absorbed[key]  # type: ignore[no-any-return]
