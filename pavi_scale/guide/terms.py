"""The laws of a component on a reduced model: values, gradients and second derivatives at their own ground units.

For each law that touches the component, copies of the latents it reads are made at the law's own units. Copies of different units do not
interact, so one reverse pass per column gives the column of every unit's Hessian at once. Cheaper where a law allows it: one quadratic for
good (`Absorbed`), second derivatives from one unit (`Component.uniform`), or from the law's own formula (`Graph.curved`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pavi_scale.guide.blocks import Block, Component, Factor
from pavi_scale.guide.gaussian import Pair
from pavi_scale.memory import Arena
from pavi_scale.model.density import Aligned, align
from pavi_scale.model.template import Model, Variable
from pavi_scale.reduced import Reduced, Value

MANY_COLUMNS = 16  # of a Hessian that are had at once
BATCHED = 1 << 21  # numbers of such a batch: more leave the processor's cache, and passes one by one take as long


@dataclass(frozen=True)
class Absorbed:
    """A law summed over the units of its block: value + gradient.z - z.H z / 2.

    Args:
        block: The block.
        value: `[1, n]`.
        gradient: `[1, n, C, e]`.
        precision: H, `[1, n, C, e, e]`.
    """

    block: str
    value: Tensor
    gradient: Tensor
    precision: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in (self.value, self.gradient, self.precision))

    def moved(self, arena: Arena) -> Absorbed:
        """The same, kept for long; a precision that all units share is kept once."""
        shared = bool((self.precision == self.precision[:, :1]).all())
        precision = arena.copy(self.precision[:, :1]).expand_as(self.precision) if shared else arena.copy(self.precision)
        return Absorbed(self.block, arena.copy(self.value), arena.copy(self.gradient), precision)

    def at(self, z: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[Pair, Tensor]]:
        """Value `[K, n]`, gradient and minus second derivatives at `z` `[K, n, C, e]`."""
        pull = (self.precision @ z[..., None])[..., 0]
        value = self.value + ((self.gradient - 0.5 * pull) * z).sum((-1, -2))
        return value, {self.block: self.gradient - pull}, {(self.block, self.block): self.precision}


class Laws:
    """The laws of a component on a reduced model, given root variables and earlier components.

    Args:
        component: The component.
        reduced: Reduced model whose selection holds every child of the selected units (pools are complete), except below free blocks.
        given: Values of the root variables and of earlier components.
        particles: K.
    """

    def __init__(self, component: Component, reduced: Reduced, given: Mapping[str, Value], particles: int) -> None:
        self.component, self.reduced, self.given, self.particles = component, reduced, given, particles
        self.blocks = {b.name: b for b in component.blocks}
        self.width = (
            {b.name: torch.ones(particles, self.units(b), *component.shape(b), dtype=reduced.dtype) for b in component.blocks} if component.rough else {}
        )

    def units(self, block: Block) -> int:
        """Number of selected units."""
        return self.reduced.count(block.plates)

    def split(self, block: Block, latent: str, z: Tensor) -> Tensor:
        """Coordinates of one latent, `[K, n, *base_shape]`, of a block's `[K, n, C, e]`."""
        return self.columns_of(self.component, block, latent, z).reshape(*z.shape[:2], *self.reduced.graph.links[latent].base_shape)

    @staticmethod
    def columns_of(component: Component, block: Block, latent: str, z: Tensor) -> Tensor:
        """Coordinates of one latent as a flat vector per unit, `[K, n, size]`."""
        own = component.columns(block, latent)
        return z[..., own.start : own.stop].flatten(2)

    def join(self, block: Block, parts: Mapping[str, Tensor]) -> Tensor:
        """The inverse of `split` over all latents of the block."""
        c, _ = self.component.shape(block)
        flat = [parts[n].reshape(*parts[n].shape[:2], c, len(self.component.columns(block, n))) for n in block.latents]
        return torch.cat(flat, -1)

    def values(self, z: Mapping[str, Tensor]) -> dict[str, Value]:
        """Constrained values of the component's latents, with what was given."""
        out = dict(self.given)
        for name, zb in z.items():
            block = self.blocks[name]
            sizes = self.reduced.sizes(block.plates)
            for latent in block.latents:
                link = self.reduced.graph.links[latent]
                theta = link.forward(self.split(block, latent, zb)).reshape(zb.shape[0], *sizes, *link.event_shape)
                out[latent] = Value(theta, block.plates)
        return out

    def _absorbed(self, factor: Factor) -> Absorbed | None:
        """The law as one quadratic per unit, where neither root nor other components enter it; kept with the reduced model.

        A linear-Gaussian likelihood with known scale is then read once, however many root points are looked at.
        """
        model = self.reduced.graph.model
        if not absorbable(self.component, factor, model):
            return None
        name, v = factor.touches[0][0], model.variables[factor.variable]
        block, key = self.blocks[name], (self.component.name, factor.variable)
        if key not in self.reduced.absorbed:
            self.reduced.absorbed[key] = self._summed(factor, block, v)
        return self.reduced.absorbed[key]

    def _summed(self, factor: Factor, block: Block, v: Variable) -> Absorbed:
        """Value, gradient and curvature of an absorbable law at zero, summed over its units: no copies, since units of the block do not interact."""
        c, e = self.component.shape(block)
        sizes = self.reduced.sizes(block.plates)
        with torch.enable_grad():
            z = torch.zeros(1, self.units(block), c, e, dtype=self.reduced.dtype, requires_grad=True)
            values, jacobian = {}, z.new_zeros(())
            for latent in block.latents:
                link = self.reduced.graph.links[latent]
                base = self.split(block, latent, z)
                theta = link.forward(base)
                if latent == factor.variable:
                    jacobian = link.log_det(base, theta)
                values[latent] = Value(theta.reshape(1, *sizes, *link.event_shape), block.plates)
            found = self.reduced.log_prob(factor.variable, values)
            term = found.reshape(len(found), -1) + jacobian
            (gradient,) = torch.autograd.grad(term.sum(), z, create_graph=True)
            if gradient.requires_grad:
                columns = [torch.autograd.grad(gradient[..., i].sum(), z, retain_graph=True, materialize_grads=True)[0] for i in range(e)]
            else:  # the law has no units here: of groups without observations, say
                columns = [torch.zeros_like(z)] * e
        value = scatter(torch.zeros_like(z[..., 0, 0]), self.reduced.unit_index(v.plates, block.plates), term)
        return Absorbed(block.name, value.detach(), gradient.detach(), -torch.stack(columns, -1))

    def _copies(self, factor: Factor, z: Mapping[str, Tensor], differentiable: bool, alone: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """One law's log-densities at its own units, `[K, n_f]`, and the copies of the blocks' coordinates they were computed from.

        With `alone`, those of its first unit only.
        """
        copies, given, jacobian = self._copied(factor, z, differentiable, alone)
        found = self.reduced.log_prob(factor.variable, self.given, given, alone=alone)
        value = found.reshape(len(found), -1) + jacobian
        return value.expand(self.particles, -1), copies

    def _copied(
        self, factor: Factor, z: Mapping[str, Tensor], differentiable: bool, alone: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Aligned], Tensor | float]:
        """Copies of the blocks' coordinates at one law's own units, the values made of them, and the log-Jacobian of a latent's own law."""
        v = self.reduced.graph.model.variables[factor.variable]
        sizes = (1,) * len(v.plates) if alone else self.reduced.sizes(v.plates)
        copies: dict[str, Tensor] = {}
        given: dict[str, Aligned] = {}
        jacobian: Tensor | float = 0.0
        for name, latents in factor.touches:
            block = self.blocks[name]
            index = self.reduced.unit_index(v.plates, block.plates)
            if alone:  # of coordinates of one unit, that
                index = torch.zeros(1, dtype=torch.int64, device=z[name].device) if index is None or z[name].shape[1] == 1 else index[:1]
            copy = z[name] if index is None else z[name].index_select(1, index)
            copy = copy if differentiable and copy.requires_grad else copy.detach().requires_grad_()
            if differentiable and copy is z[name]:
                copy = copy.clone()
            copies[name] = copy
            for latent in latents:
                link = self.reduced.graph.links[latent]
                base = self.split(block, latent, copy)
                theta = link.forward(base)
                given[latent] = Aligned(theta.reshape(theta.shape[0], *sizes, *link.event_shape), v.plates, True)
                if latent == factor.variable:
                    jacobian = link.log_det(base, theta)
        return copies, given, jacobian

    def one_unit(
        self, factor: Factor, z: Mapping[str, Tensor], *, differentiable: bool
    ) -> tuple[Tensor, dict[str, Tensor], dict[Pair, Tensor]]:
        """Value `[K, 1]`, gradients `[K, 1, C, e]` and minus second derivatives of one law at its first unit.

        Args:
            factor: The law.
            z: Coordinates of all units of its blocks, or of one unit that stands for them.
            differentiable: Whether the result keeps its graph to what was given.
        """
        with torch.enable_grad():
            value, few = self._copies(factor, z, differentiable, alone=True)
            slope = torch.autograd.grad(value.sum(), list(few.values()), create_graph=True, materialize_grads=True)
            return value, dict(zip(few, slope, strict=True)), self._columns(factor, few, slope, differentiable)

    def products(self, factor: Factor, z: Mapping[str, Tensor], vector: Tensor | None) -> dict[Pair, Tensor]:
        """Hessian of one law times a vector of ones, or an event-wise vector `[C]`, per pair of blocks, `[K, n_f, C, e]`."""
        with torch.enable_grad():
            return self._traced_products(factor, z, vector)

    def _traced_products(self, factor: Factor, z: Mapping[str, Tensor], vector: Tensor | None) -> dict[Pair, Tensor]:
        value, copies = self._copies(factor, z, False)
        first = torch.autograd.grad(value.sum(), list(copies.values()), create_graph=True, materialize_grads=True)
        out: dict[Pair, Tensor] = {}
        for a, g in zip(copies, first, strict=True):
            seed = (g if vector is None else g * vector[:, None]).sum()
            if seed.requires_grad:
                second = torch.autograd.grad(seed, list(copies.values()), retain_graph=True, materialize_grads=True)
                out.update({(b, a): h for b, h in zip(copies, second, strict=True)})
        return out

    def _factor(
        self, factor: Factor, z: Mapping[str, Tensor], differentiable: bool, *, second: bool = True
    ) -> tuple[Tensor, dict[str, Tensor], dict[Pair, Tensor]]:
        """Terms of one law: value `[K, n_f]`, gradients and minus second derivatives, in the blocks' full e axes."""
        with torch.enable_grad():  # the caller may not track gradients; second derivatives need it
            return self._derivatives(factor, z, differentiable, second)

    def _derivatives(self, factor: Factor, z: Mapping[str, Tensor], differentiable: bool, second: bool) -> tuple[Tensor, dict[str, Tensor], dict[Pair, Tensor]]:
        if second and not differentiable and (known := self._own(factor, z)) is not None:
            return known
        if second and not differentiable and self._has_labels(factor):
            return self._by_labels(factor, z)
        value, copies = self._copies(factor, z, differentiable)
        uniform = factor.variable in self.component.uniform and value.shape[1] > 0  # of no units there is none that stands for all
        first = torch.autograd.grad(value.sum(), list(copies.values()), create_graph=differentiable or (second and not uniform), materialize_grads=True)
        grads = {n: g if differentiable else g.detach() for n, g in zip(copies, first, strict=True)}
        hess: dict[Pair, Tensor] = {}
        if second and uniform:  # one unit's second derivatives are everybody's
            alone, few = self._copies(factor, z, differentiable, alone=True)
            slope = torch.autograd.grad(alone.sum(), list(few.values()), create_graph=True, materialize_grads=True)
            hess = {pair: h.expand(-1, value.shape[1], -1, -1, -1) for pair, h in self._columns(factor, few, slope, differentiable).items()}
        elif second:
            hess = self._columns(factor, copies, first, differentiable)
        return value if differentiable else value.detach(), grads, hess

    def _columns(self, factor: Factor, copies: Mapping[str, Tensor], first: tuple[Tensor, ...], differentiable: bool) -> dict[Pair, Tensor]:
        """Minus second derivatives, a column at a time: one reverse pass gives that column of every unit's."""
        names = list(copies)
        hess: dict[Pair, Tensor] = {}
        for i, a in enumerate(names):
            columns = sorted({c for latent in dict(factor.touches)[a] for c in self.component.columns(self.blocks[a], latent)})
            rows = names[i:]
            if len(columns) >= MANY_COLUMNS and copies[a].numel() * len(columns) <= BATCHED:
                hess.update({(b, a): h for b, h in self._at_once(copies, rows, first[i], columns, differentiable).items()})
                continue
            parts: dict[str, list[Tensor]] = {b: [torch.zeros_like(copies[b])] * copies[a].shape[3] for b in rows}
            for c in columns:
                seed = first[i][..., c].sum()
                if not seed.requires_grad:
                    continue
                found = torch.autograd.grad(seed, [copies[b] for b in rows], create_graph=differentiable, retain_graph=True, materialize_grads=True)
                for b, column in zip(rows, found, strict=True):
                    parts[b] = [*parts[b][:c], -column, *parts[b][c + 1 :]]
            for b in rows:  # stored (fine, coarse): `b` comes later, so it is the finer one
                hess[b, a] = torch.stack(parts[b], -1)
        return hess

    def _at_once(self, copies: Mapping[str, Tensor], rows: Sequence[str], slope: Tensor, columns: Sequence[int], differentiable: bool) -> dict[str, Tensor]:
        """Many columns of minus second derivatives by one batched reverse pass: of few units, passes take longer to begin than to compute."""
        e = slope.shape[3]
        if not slope.requires_grad:
            return {b: copies[b].new_zeros(*copies[b].shape, e) for b in rows}
        seeds = torch.eye(e, dtype=slope.dtype)[list(columns)][:, None, None, None].expand(-1, *slope.shape)
        found = torch.autograd.grad(
            slope, [copies[b] for b in rows], seeds, create_graph=differentiable, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
        out = {}
        for b, part in zip(rows, found, strict=True):
            each = copies[b].new_zeros(len(columns), *copies[b].shape) if part is None else -part
            if len(columns) < e:
                each = each.new_zeros(e, *each.shape[1:]).index_copy(0, torch.tensor(columns), each)
            out[b] = each.movedim(0, -1).contiguous()
        return out

    def _own(self, factor: Factor, z: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor], dict[Pair, Tensor]] | None:
        """The terms of a law that gives its own second derivatives by the only latent it touches; None for others."""
        latent = self.reduced.graph.curved.get(factor.variable)
        v = self.reduced.graph.model.variables[factor.variable]
        if latent is None or v.missing == "mask" or len(factor.touches) != 1 or factor.touches[0][1] != (latent,) or self.component.elementwise:
            return None
        name = factor.touches[0][0]
        block, k, n = self.blocks[name], self.particles, self.reduced.count(v.plates)
        value, plates = self.values({name: z[name]})[latent].theta, self.reduced.graph.model.variables[latent].plates
        given = {latent: align(value.detach(), True, block.plates if plates == block.plates else plates, v.plates, self.reduced.selection)}
        found = self.reduced.second_order(factor.variable, self.given, given)
        sizes = self.reduced.sizes(v.plates)
        term, slope, curve = (t.detach().expand(k, *sizes, *t.shape[1 + len(sizes) :]).reshape(k, n, *t.shape[1 + len(sizes) :]) for t in found)
        gradient, hessian = slope[:, :, None], curve[:, :, None]
        if block.dim != slope.shape[-1]:
            columns = torch.tensor(list(self.component.columns(block, latent)))
            gradient = gradient.new_zeros(k, n, 1, block.dim)
            gradient[..., columns] = slope[:, :, None]
            hessian = gradient.new_zeros(k, n, 1, block.dim, block.dim)
            hessian[..., columns[:, None], columns] = curve[:, :, None]
        return term, {name: gradient}, {(name, name): hessian}

    def _has_labels(self, factor: Factor) -> bool:
        """Whether a law is a mixture that is differentiated by its labels' logits and by latents of other blocks."""
        logits = self.reduced.graph.labelled.get(factor.variable)
        return len(factor.touches) > 1 and not self.component.elementwise and any(logits in latents for _, latents in factor.touches)

    def _by_labels(self, factor: Factor, z: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor], dict[Pair, Tensor]]:
        r"""The terms of a mixture, log sum_k exp(l_k + e_k) - log sum_k exp(l_k) of logits l and evidences e, from its labels' posterior r.

        With J the derivatives of l + e, s = J^T r, and p = softmax(l): gradient s - p, minus Hessian (Louis 1982)

            s s^T - J^T (diag r) J - sum_k r_k d^2 e_k + diag p - p p^T.

        One reverse pass per label for J, and short ones through the evidence alone, take the place of one through the whole mixture per column.
        """
        graph, k = self.reduced.graph, self.particles
        latent, sizes = graph.labelled[factor.variable], self.reduced.sizes(graph.model.variables[factor.variable].plates)
        own = next(b for b, latents in factor.touches if latent in latents)
        copies, given, _ = self._copied(factor, z, False)
        others = list(copies.values())
        found = self.reduced.evidence(factor.variable, self.given, given=given)
        evidence = found.expand(k, *sizes, -1).reshape(k, -1, found.shape[-1])
        if not evidence.requires_grad:  # a law may leave out what it is given
            evidence = evidence + 0.0 * others[0].sum()
        logits = self.split(self.blocks[own], latent, copies[own]).detach()
        joint = logits + evidence.detach()
        r, p = joint.softmax(-1), logits.softmax(-1)
        first = torch.autograd.grad(evidence, others, r, create_graph=True, materialize_grads=True)
        hess = self._columns(factor, copies, first, False)
        each = [torch.autograd.grad(e.sum(), others, retain_graph=True, materialize_grads=True) for e in evidence.unbind(-1)]
        jacobian = {b: torch.stack(part, 2)[..., 0, :] for b, part in zip(copies, zip(*each, strict=True), strict=True)}  # [K, n, labels, e]
        columns = self.component.columns(self.blocks[own], latent)
        at = slice(columns.start, columns.stop)
        jacobian[own][..., at] += torch.eye(len(columns))
        slope = {b: r[..., None, :] @ j for b, j in jacobian.items()}
        left = {b: torch.cat([slope[b], r[..., None] * -j], 2).flatten(0, 1) for b, j in jacobian.items()}
        right = {b: torch.cat([slope[b], j], 2).flatten(0, 1) for b, j in jacobian.items()}
        hess = {(b, a): torch.baddbmm(h.flatten(0, 2), left[b].mT, right[a]).reshape(h.shape) for (b, a), h in hess.items()}
        hess[own, own][:, :, 0, at, at] += torch.diag_embed(p) - p[..., :, None] * p[..., None, :]
        slope[own][:, :, 0, at] -= p
        return joint.logsumexp(-1) - logits.logsumexp(-1), slope, hess

    def _rough(self, factor: Factor, z: Mapping[str, Tensor], differentiable: bool) -> tuple[Tensor, dict[str, Tensor], dict[Pair, Tensor]]:
        """As `_factor` for a law with kinks (Laplace), whose second derivative says nothing.

        Gradient and curvature are those of the law averaged over the width of the posterior: means and differences of gradients
        at +- one width per coordinate, as a Gaussian variational posterior would see them.
        """
        value, _ = self._copies(factor, z, differentiable)
        names = [name for name, _ in factor.touches]
        v = self.reduced.graph.model.variables[factor.variable]
        smoothed: dict[str, list[Tensor]] = {n: [] for n in names}
        hess: dict[Pair, Tensor] = {}
        for i, a in enumerate(names):
            block = self.blocks[a]
            columns = sorted({c for latent in dict(factor.touches)[a] for c in self.component.columns(block, latent)})
            parts: dict[str, list[Tensor]] = {}
            index = self.reduced.unit_index(v.plates, block.plates)
            for c in columns:
                width = self.width[a][..., c]
                sides = []
                for sign in (1.0, -1.0):
                    moved = z[a].detach().clone()
                    moved[..., c] += sign * width
                    _, grads, _ = self._factor(factor, {**z, a: moved}, False, second=False)
                    sides.append(grads)
                step = 2 * (width if index is None else width.index_select(1, index))[..., None]
                for b in names:
                    smoothed[b].append(0.5 * (sides[0][b] + sides[1][b]))
                for b in names[i:]:
                    parts.setdefault(b, [torch.zeros_like(sides[0][b])] * z[a].shape[3])
                    parts[b] = [*parts[b][:c], (sides[1][b] - sides[0][b]) / step, *parts[b][c + 1 :]]
            for b in names[i:]:
                hess[b, a] = torch.stack(parts[b], -1)
        return value, {n: torch.stack(g).mean(0) for n, g in smoothed.items()}, hess


def absorbable(component: Component, factor: Factor, model: Model) -> bool:
    """Whether a law is one fixed quadratic of one block of its component: linear-Gaussian, and neither root nor other components enter it."""
    if not component.quadratic or len(factor.touches) != 1:
        return False
    return not any(model.variables[p].kind == "latent" and p not in factor.touches[0][1] for p in model.variables[factor.variable].parents)


def spent(components: Sequence[Component], model: Model) -> dict[str, list[tuple[str, str]]]:
    """Data that nobody needs once the laws that read them are summed up: variable -> keys of those laws in `Reduced.absorbed`."""
    laws = {f.variable: (c, f) for c in components for f in c.factors if model.variables[f.variable].kind == "observed" and absorbable(c, f, model)}
    readers: dict[str, list[str]] = {v.name: [v.name] for v in model.of_kind("observed")}
    for v in model.variables.values():
        for p in v.parents:
            if model.variables[p].kind != "latent":
                readers.setdefault(p, []).append(v.name)
    return {name: [(laws[r][0].name, r) for r in who] for name, who in readers.items() if all(r in laws for r in who)}


def scatter(target: Tensor, index: Tensor | None, source: Tensor) -> Tensor:
    """`target` with the units of `source` added to the units that `index` names, all in order if it is None."""
    return target + source if index is None else target.index_add(1, index, source)
