"""Labelled components: logits of mixture labels below at most one coarser block, with priors that are one fixed quadratic.

Given the root, a parent unit rho (population logits of a vertex) has leaves z_s (those of its subjects), each with a few observations whose labels are
summed out. Profile Newton on rho: every sweep settles the leaves at the present rho, exactly and one by one (`sweeps`), and answers with

    g(rho) = d/drho log p(rho) + sum_s E[d/drho log p(z_s | rho)],    H(rho) = R_0 + sum_s (R - Q^T C_s Q)

for prior precisions R_0, R, P of rho and z and their coupling Q. The mean of z_s, not its mode, enters g: by Fisher's identity g is then the gradient of
the marginal log p(rho | x), where a joint mode would be off by an amount that does not shrink as leaves are added. Single precision, with sums over
leaves in double.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pavi_scale.device import array, doubles, on, tensor
from pavi_scale.guide.blocks import Factor
from pavi_scale.guide.curvature import LocalModel
from pavi_scale.guide.gaussian import Pair, factorise
from pavi_scale.guide.mixing import Mixing
from pavi_scale.guide.mode import Noise
from pavi_scale.later import Later
from pavi_scale.reduced import Value

if TYPE_CHECKING:
    from scipy import special

    from pavi_scale.guide import parents as drawing
    from pavi_scale.guide import sweeps
else:  # the compiler of the loops is not imported for models that have no labels
    special, drawing, sweeps = Later("scipy.special"), Later("pavi_scale.guide.parents"), Later("pavi_scale.guide.sweeps")

SLAB = 1 << 23  # values of the data, times particles, looked at together
SWEEPS = 20
FIRST_STEPS, STEPS, DRAW_STEPS = 3, 2, 3  # Newton steps of each leaf in the first sweep, in the others, and for a draw
LEAST = 0.95  # precision of a parent unit, in units of its prior's: a few leaves with two modes would make it less, or nothing
SETTLED = 1e-2  # Newton decrement (nats) of a parent unit at which its search ends
NOTHING = np.zeros((0, 0, 0), np.float32)


@dataclass(frozen=True)
class Prior:
    """The quadratic priors of one root point: v + c.z + d.rho - z P z / 2 - z Q rho - rho R rho / 2 per leaf, v0 + d0.rho - rho R0 rho / 2 per parent."""

    v: float
    c: np.ndarray
    d: np.ndarray
    p: np.ndarray
    q: np.ndarray
    r: np.ndarray
    v0: float
    d0: np.ndarray
    r0: np.ndarray

    @cached_property
    def inverse(self) -> np.ndarray:
        """P^-1."""
        return np.linalg.inv(self.p)


@dataclass(frozen=True)
class Parents:
    """What draws of n parent units need of them, E numbers each.

    Args:
        mode: `[E, n]`.
        spread: M^T, `[E, E, n]`: M M^T is the covariance, M upper triangular.
    """

    mode: np.ndarray
    spread: np.ndarray

    @classmethod
    def of(cls, held: np.ndarray) -> Parents:
        """From the mode and the Cholesky factor of the precision of each, `[n, E + E E]` (`LabelledCore.held`)."""
        n, e = len(held), math.isqrt(held.shape[1])  # e^2 <= e + e^2 < (e + 1)^2
        return cls(np.array(held[:, :e].T, order="C"), np.array(np.linalg.inv(held[:, e:].reshape(n, e, e)).transpose(1, 2, 0), order="C"))


class Labels:
    """A labelled component on a reduced model: priors, and the evidence of every label, for K root points.

    Args:
        local: The component given root and earlier components.
        data: The observed mixture (`labelled`).
        priors: Where the priors are the same at all root points (`constant`), that of one.
    """

    def __init__(self, local: LocalModel, data: str, priors: Sequence[Prior] | None = None) -> None:
        self.local, self.data, self.particles = local, data, local.particles
        *tops, self.leaf = local.component.blocks
        self.parent = tops[0] if tops else None
        self.plates = local.reduced.graph.model.variables[data].plates
        outer = self.parent.plates if self.parent else self.leaf.plates
        inner = tuple(p for p in self.leaf.plates if p not in outer)
        below = tuple(p for p in self.plates if p not in self.leaf.plates)
        self.layout = (inner, below, outer)
        sizes = local.reduced.sizes
        self.shape = (math.prod(sizes(inner)), math.prod(sizes(below)), self.leaf.dim, math.prod(sizes(outer)))
        self.priors = list(priors) * self.particles if priors else self._priors()
        self.evidence = np.empty((self.particles, *self.shape), np.float32)
        own = self.by_plates(self.evidence)
        for rows in self.slabs():
            own[:, rows] = array(local.reduced.evidence(data, local.given, rows))

    def by_plates(self, x: np.ndarray) -> np.ndarray:
        """A view of `[K, S, T, L, n]` as `[K, *plates, L]`."""
        inner, below, outer = self.layout
        sizes, axes = self.local.reduced.sizes, (*inner, *below, "", *outer)
        whole = x.reshape(len(x), *sizes(inner), *sizes(below), self.leaf.dim, *sizes(outer))
        return whole.transpose(0, *(1 + axes.index(p) for p in self.plates), 1 + axes.index(""))

    def slabs(self) -> list[slice]:
        """Units of the data's first plate, some at a time: what is computed of a slab stays in the processor's cache."""
        first, *rest = self.local.reduced.sizes(self.plates)
        v = self.local.reduced.graph.model.variables[self.data]
        values = self.particles * math.prod(rest) * math.prod(self.local.reduced.graph.shape(v))
        step = max(1, SLAB // max(1, values))
        return [slice(a, min(a + step, first)) for a in range(0, first, step)]

    def _priors(self) -> list[Prior]:
        """The priors' quadratics, from one unit."""
        local, leaf = self.local, self.leaf.name
        zeros = {b.name: torch.zeros((), dtype=local.reduced.dtype).expand(self.particles, local.units(b), 1, b.dim) for b in local.component.blocks}
        coarse = self.parent.dim if self.parent else 0
        above = self.parent.name if self.parent else ""
        out: list[Prior] = []
        found = [(f, *_quadratic(local, f, zeros)) for f in local.component.factors if f.variable in local.component.uniform]
        for k in range(self.particles):
            if self.constant and out:
                out.append(out[0])
                continue
            v = v0 = 0.0
            c, d, d0 = np.zeros(self.leaf.dim), np.zeros(coarse), np.zeros(coarse)
            p, q, r, r0 = np.zeros((self.leaf.dim,) * 2), np.zeros((self.leaf.dim, coarse)), np.zeros((coarse, coarse)), np.zeros((coarse, coarse))
            for factor, value, slope, hess in found:
                one = [{n: doubles(t[min(k, len(t) - 1)].squeeze(0).squeeze(0)) for n, t in part.items()} for part in (slope, hess)]
                own = float(value[min(k, len(value) - 1), 0])
                if any(name == leaf for name, _ in factor.touches):
                    v, c, p = v + own, c + one[0][leaf], p + one[1][leaf, leaf]
                    if above in one[0]:
                        d, q, r = d + one[0][above], q + one[1][leaf, above], r + one[1][above, above]
                else:
                    v0, d0, r0 = v0 + own, d0 + one[0][above], r0 + one[1][above, above]
            out.append(Prior(v, c, d, p, q, r, v0, d0, r0))
        return out

    def units_first(self, parts: np.ndarray) -> Tensor:
        """`[K, S, L, n]` as the coordinates of the leaves' block, `[K, S n, 1, L]`; L may be another length."""
        inner, _, outer = self.layout
        sizes, axes, dim = self.local.reduced.sizes, (*inner, "", *outer), parts.shape[2]
        whole = tensor(parts).reshape(len(parts), *sizes(inner), dim, *sizes(outer))
        return whole.permute(0, *(1 + axes.index(p) for p in self.leaf.plates), 1 + axes.index("")).reshape(len(parts), -1, 1, dim)

    def leaves_first(self, coordinates: Tensor) -> np.ndarray:
        """The inverse of `units_first`, in single precision."""
        inner, _, outer = self.layout
        sizes = self.local.reduced.sizes
        whole = coordinates.reshape(len(coordinates), *sizes(self.leaf.plates), self.leaf.dim).to(torch.float32)
        axes = (*self.leaf.plates, "")
        out = whole.permute(0, *(1 + axes.index(p) for p in (*inner, "", *outer)))
        return np.ascontiguousarray(array(out)).reshape(len(coordinates), self.shape[0], self.shape[2], self.shape[3])

    @property
    def constant(self) -> bool:
        """Whether neither root nor earlier components enter the priors."""
        laws = (self.local.reduced.graph.model.variables[name] for name in self.local.component.uniform)
        return not any(p in self.local.given for law in laws for p in law.parents)

    def draw(self, held: Parents, noise: Noise) -> dict[str, Tensor]:
        """A draw for each root point, by block, `[K, n, 1, e]`: the parent from what a pass over all its leaves left, the leaves given it.

        What a draw of the root would change of the parent is left out: it speaks through all the leaves, a leaf's own data through few.

        Args:
            held: Mode and spread of each parent unit.
            noise: Standard normals by block.
        """
        leaves, _, labels, n = self.shape
        drawn, offset, z = self._parents(held, noise, np.float32)
        white = self.leaves_first(noise(self.leaf, (self.particles, leaves * n, 1, labels)))
        for k, prior in enumerate(self.priors):
            sweeps.scatter(self.evidence[k], z[k], offset[k], prior.p.astype(np.float32), DRAW_STEPS, white[k])
        return {**({self.parent.name: tensor(drawn)} if self.parent else {}), self.leaf.name: self.units_first(z)}

    def ratios(self, held: Parents, noise: Noise, samples: int) -> Tensor:
        """log p - log q of draws of the leaves at the first root point and one draw of their parents, `[samples, leaves]`; up to a constant of each leaf."""
        leaves, _, labels, n = self.shape
        _, (offset, *_), (start, *_) = self._parents(held, noise, np.float64)
        prior, out = self.priors[0], np.empty((samples, leaves, 1, n))
        for ratio in out:
            (white,), z = self.leaves_first(noise(self.leaf, (1, leaves * n, 1, labels))), start.copy()
            sweeps.scatter(self.evidence[0], z, offset.astype(np.float32), prior.p.astype(np.float32), DRAW_STEPS, white)
            ratio[:, 0] = ((offset - 0.5 * np.einsum("lm,smn->sln", prior.p, z, optimize=True)) * z).sum(1) + 0.5 * (white.astype(np.float64) ** 2).sum(1)
            ratio[:, 0] += (special.logsumexp(z[:, None] + self.evidence[0], axis=2) - special.logsumexp(z, axis=1)[:, None]).sum(1)
        return self.units_first(out)[:, :, 0, 0]

    def _parents(self, held: Parents, noise: Noise, dtype: type[np.floating[Any]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each root point a draw of the parents `[K, n, 1, E]`, pull `[K, L, n]`, in `dtype`, and mean `[K, S, L, n]` of their leaves' priors."""
        (leaves, _, labels, n), e = self.shape, len(held.mode)
        white = np.zeros((self.particles, n, 1, 0)) if self.parent is None else array(noise(self.parent, (self.particles, n, 1, e)))
        drawn, offset = np.empty((self.particles, n, 1, e)), np.empty((self.particles, labels, n), dtype)
        start = np.empty((self.particles, leaves, labels, n), np.float32)
        for k, p in enumerate(self.priors):
            given = np.ascontiguousarray(white[k, :, 0]), p.c, np.ascontiguousarray(p.q), np.ascontiguousarray(p.inverse)  # one layout is compiled
            drawing.descend(held.mode, held.spread, *given, drawn[k, :, 0], offset[k], start[k])
        return drawn, offset, start


class LabelledCore(Labels):
    """Posterior of a labelled component at K root points, to third derivatives.

    Args:
        local: The component given root and earlier components; its data whole below the selected parents.
        data: The observed mixture (`labelled`).
        wanted: "shares", "moments", or "" for neither.
    """

    def __init__(self, local: LocalModel, data: str, wanted: str = "") -> None:
        super().__init__(local, data)
        self.wanted = wanted
        start: np.ndarray | None = None
        if self.parent is not None:
            known = local.reduced.starts.get(self.parent.name)  # where an earlier round ended
            start = doubles(local.start()[self.parent.name][0, :, 0] if known is None else known)
        leaves, observations, labels, n = self.shape
        moments, shares = int(wanted == "moments"), int(wanted == "shares")
        self._share = np.empty((self.particles, leaves * shares, observations, labels, n), np.float32)
        self._mean, self._variance = (np.empty((self.particles, leaves * moments, labels, n), np.float32) for _ in range(2))
        self.top: list[np.ndarray] = []
        self.factor: list[np.ndarray] = []
        self.value: list[np.ndarray] = []
        self._z: np.ndarray | None = None
        for k in range(self.particles):
            self._settle(k, start)
            start = self.top[-1].T  # neighbouring root points have neighbouring answers
        self._z = None
        if self.parent is not None:
            local.reduced.starts[self.parent.name] = tensor(self.top[0].T.copy())

    @property
    def held(self) -> np.ndarray:
        """What `Parents.of` makes of the parents, from the first root point: mode and Cholesky factor of the precision of each, `[n, E + E E]`."""
        return np.concatenate([self.top[0].T, self.factor[0].reshape(len(self.factor[0]), -1)], 1)

    def _settle(self, k: int, start: np.ndarray | None) -> None:
        """Newton steps of the parents until they move by little."""
        leaves, _, _, n = self.shape
        prior, b = self.priors[k], self.evidence[k]
        groups = np.arange(0, n, sweeps.LANES)
        if start is None:
            offset = np.repeat(prior.c[:, None], n, 1)
            z = np.repeat(np.linalg.solve(prior.p, offset)[None], leaves, 0).astype(np.float32)
            self._sweep(b, z, groups, offset, prior, 2 * FIRST_STEPS)
            self._finish(k, z, np.zeros((0, n)), np.zeros((n, 0, 0)))
            return
        top = np.array(start, dtype=np.float64).T
        fresh = self._z is None
        z = np.repeat(np.linalg.solve(prior.p, prior.c[:, None] - prior.q @ top)[None], leaves, 0).astype(np.float32) if self._z is None else self._z
        self._z = z
        factor, mixing = np.zeros((n, len(top), len(top))), Mixing(top, float(np.mean(1 / np.sqrt(np.diagonal(prior.r0)))))
        todo = groups
        for number in range(SWEEPS):
            at = (todo[:, None] + np.arange(sweeps.LANES)).ravel()
            at = at[at < n]
            mean, cov = self._sweep(b, z, todo, prior.c[:, None] - prior.q @ top, prior, FIRST_STEPS if fresh and not number else STEPS)
            here = top[:, at]
            g = prior.d0[:, None] - prior.r0 @ here + leaves * (prior.d[:, None] - prior.r @ here) - prior.q.T @ mean[:, at]
            h = prior.r0 + leaves * prior.r - np.einsum("ie,nij,jf->nef", prior.q, cov[at], prior.q, optimize=True)
            found = factorise(at_least(torch.from_numpy(h), torch.from_numpy(LEAST * prior.r0)))
            step = torch.cholesky_solve(torch.from_numpy(g.T[:, :, None].copy()), found)[..., 0].numpy().T
            factor[at] = found.numpy()
            mixing.move(top, at, step)
            unsettled = np.zeros(n, bool)
            unsettled[at] = (g * step).sum(0) > SETTLED
            todo = np.unique(np.flatnonzero(unsettled) // sweeps.LANES) * sweeps.LANES
            if not len(todo):
                break
        self._finish(k, z, top, factor)

    def _finish(self, k: int, z: np.ndarray, top: np.ndarray, factor: np.ndarray) -> None:
        """One more sweep, for the value and what is wanted of the leaves; the parents' spread counts."""
        leaves, _, labels, n = self.shape
        prior, value, gain = self.priors[k], np.zeros(n), NOTHING
        offset = np.repeat(prior.c[:, None], n, 1) - prior.q @ top
        if self.parent is not None:
            spread = np.linalg.inv(factor).transpose(0, 2, 1)  # M M^T = H^-1
            gain = np.ascontiguousarray(np.einsum("le,nef->lfn", -prior.q, spread, optimize=True), dtype=np.float32)
        sweeps.sweep(
            self.evidence[k], z, np.arange(0, n, sweeps.LANES), offset.astype(np.float32), prior.p.astype(np.float32), 1, gain,
            np.zeros((labels, n)), np.zeros((labels, labels, n)), value, self._mean[k], self._variance[k], self._share[k],
        )
        value = value + leaves * (prior.v + 0.5 * labels * math.log(2 * math.pi) + prior.d @ top - 0.5 * (top * (prior.r @ top)).sum(0))
        value = value + prior.v0 + prior.d0 @ top - 0.5 * (top * (prior.r0 @ top)).sum(0) + 0.5 * len(top) * math.log(2 * math.pi)
        self.value.append(value - np.log(np.diagonal(factor, axis1=1, axis2=2)).sum(1))
        self.top.append(top)
        self.factor.append(factor)

    def _sweep(self, b: np.ndarray, z: np.ndarray, todo: np.ndarray, offset: np.ndarray, prior: Prior, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Settle the leaves; sums over them of means `[L, n]` and covariances `[n, L, L]`."""
        _, _, labels, n = self.shape
        mean, cov = np.zeros((labels, n)), np.zeros((labels, labels, n))
        sweeps.sweep(b, z, todo, offset.astype(np.float32), prior.p.astype(np.float32), steps, NOTHING, mean, cov, np.zeros(0), NOTHING, NOTHING, NOTHING[None])
        cov = cov.transpose(2, 0, 1)
        return mean, cov + np.tril(cov, -1).transpose(0, 2, 1)

    def log_marginal(self, weights: Tensor) -> Tensor:
        """Laplace value of log p(data | root), `[K]`; weights of the parents' units `[n]`."""
        return tensor(np.stack(self.value) @ doubles(weights))

    def shares(self) -> np.ndarray:
        """Posterior probabilities of each observation's labels, `[K, *plates, L]`."""
        return self.by_plates(self._share)

    def expected(self, values: Mapping[str, Value]) -> Tensor:
        """Zeros `[K]` whose gradient is that of the log marginal: the evidence of each label, averaged over the labels' posterior (Fisher's identity).

        Args:
            values: What the core was given, differentiable.
        """
        parents = [p for p in self.local.reduced.graph.model.variables[self.data].parents if p in values and values[p].theta.requires_grad]
        shares = self.shares()

        def of(rows: slice, tensors: Sequence[Tensor]) -> Tensor:
            given = {**self.local.given, **{p: Value(t, values[p].plates) for p, t in zip(parents, tensors, strict=True)}}
            return self.local.reduced.evidence(self.data, given, rows)

        return _Slabs.apply(of, shares, self.slabs(), *(values[p].theta for p in parents))  # type: ignore[no-any-return,no-untyped-call]

    def moments(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Block -> mean and variance of its coordinates given the root, `[K, n, 1, e]`."""
        out = {self.leaf.name: (self.units_first(self._mean), self.units_first(self._variance))}
        if self.parent is not None:
            spread = [np.linalg.inv(f) for f in self.factor]
            top = tensor(np.stack(self.top)).transpose(1, 2)[:, :, None]
            out[self.parent.name] = top, tensor(np.stack([(s**2).sum(1) for s in spread]))[:, :, None]
        return out


class _Slabs(torch.autograd.Function):
    """A sum over slabs, weighted, of which only the gradient is asked for: each is computed in the backward pass and let go."""

    @staticmethod
    def forward(ctx: Any, of: Callable[[slice, Sequence[Tensor]], Tensor], weights: np.ndarray, slabs: list[slice], *tensors: Tensor) -> Tensor:
        """Zeros `[K]`; `of` answers for units of the first plate with values of the shape of `weights[:, rows]`, those that do not vary along an axis once."""
        ctx.of, ctx.weights, ctx.slabs = of, weights, slabs
        ctx.save_for_backward(*tensors)
        return torch.zeros(len(weights), dtype=tensors[0].dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Sum of the slabs' gradients."""
        tensors = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        total = [torch.zeros_like(t) for t in tensors]
        scale = grads[0].reshape(-1, *[1] * (ctx.weights.ndim - 1))
        with torch.enable_grad(), on(total[0].device):  # a device has a thread of its own for this
            for rows in ctx.slabs:
                value = ctx.of(rows, tensors)
                weight = (tensor(ctx.weights[:, rows]) * scale).sum_to_size(value.shape)
                # Not with `weight` as what torch calls the gradient of the outputs: to look at that it imports a computer algebra, half a second.
                for t, g in zip(total, torch.autograd.grad((value * weight).sum(), tensors, allow_unused=True, materialize_grads=True), strict=True):
                    t += g
        return None, None, None, *total


def at_least(precision: Tensor, least: Tensor) -> Tensor:
    """Matrices `[n, E, E]` with no direction's precision below that of `least` `[E, E]`, a positive definite one; those above it as they are."""
    low = torch.linalg.cholesky_ex(precision - least).info.nonzero()[:, 0]
    if not len(low):
        return precision
    root = torch.linalg.cholesky(least)
    inner = torch.linalg.solve_triangular(root, precision[low], upper=False)
    value, vector = torch.linalg.eigh(torch.linalg.solve_triangular(root.mT, inner, upper=True, left=False))
    vector = root @ vector
    return precision.index_copy(0, low, (vector * value.clamp(min=1.0).unsqueeze(-2)) @ vector.mT)


def _quadratic(local: LocalModel, factor: Factor, zeros: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor], dict[Pair, Tensor]]:
    """Value, gradient and minus second derivatives of a law at zero, from its first unit."""
    value, slope, hess = local.one_unit(factor, zeros, differentiable=False)
    return value.detach(), {n: s.detach() for n, s in slope.items()}, {pair: h.detach() for pair, h in hess.items()}
