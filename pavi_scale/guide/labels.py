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
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from pavi_scale.guide.blocks import Component, Factor
from pavi_scale.guide.curvature import LocalModel
from pavi_scale.guide.gaussian import Pair, factorise
from pavi_scale.guide.sweeps import LANES, sweep
from pavi_scale.model.density import Graph

SWEEPS = 20
FIRST_STEPS, STEPS = 3, 2  # Newton steps of each leaf in the first sweep, and in the others
SETTLED = 1e-2  # Newton decrement (nats) of a parent unit at which its search ends
NOTHING = np.zeros((0, 0, 0), np.float32)


def labelled(component: Component, graph: Graph) -> str | None:
    """The observed mixture of a labelled component; None for any other component."""
    if not component.tree or component.quadratic or component.rough or component.elementwise or len(component.blocks) > 2 or component.resampled:
        return None
    *tops, leaf = component.blocks
    if any(b.free for b in component.blocks) or len(leaf.latents) != 1:
        return None
    data = None
    for factor in component.factors:
        touched = tuple(name for name, _ in factor.touches)
        if graph.labelled.get(factor.variable) == leaf.latents[0] and touched == (leaf.name,):
            if data is not None:
                return None
            data = factor.variable
        elif factor.variable not in component.uniform or graph.model.variables[factor.variable].kind != "latent":
            return None
    if data is None or not all(graph.links[n].identity for b in component.blocks for n in b.latents):
        return None
    nested = [set(b.plates) for b in tops] + [set(leaf.plates), set(graph.model.variables[data].plates)]
    return data if all(a < b for a, b in zip(nested[:-2], nested[1:-1], strict=True)) and nested[-2] <= nested[-1] else None


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


class LabelledCore:
    """Posterior of a labelled component at K root points, to third derivatives.

    Args:
        local: The component given root and earlier components; its data whole below the selected parents.
        data: The observed mixture (`labelled`).
        evidence: `Reduced.evidence` of it, `[K, *plates, L]`.
        start: Parents' coordinates to start from, `[n, E]`; the prior mean by default.
    """

    def __init__(self, local: LocalModel, data: str, evidence: Tensor, start: np.ndarray | None = None) -> None:
        self.local, self.particles = local, local.particles
        *tops, self.leaf = local.component.blocks
        self.parent = tops[0] if tops else None
        self.plates = local.reduced.graph.model.variables[data].plates
        outer = self.parent.plates if self.parent else self.leaf.plates
        inner = tuple(p for p in self.leaf.plates if p not in outer)
        below = tuple(p for p in self.plates if p not in self.leaf.plates)
        self.layout = (inner, below, outer)
        sizes = local.reduced.sizes
        self.shape = (math.prod(sizes(inner)), math.prod(sizes(below)), self.leaf.dim, math.prod(sizes(outer)))
        if start is None and self.parent is not None:
            start = local.start()[self.parent.name][0, :, 0].to(torch.float64).numpy()
        self.evidence, self.z, self.top, self.factor, self.value = [], [], [], [], []
        order = [self.plates.index(p) for p in (*inner, *below)] + [len(self.plates)] + [self.plates.index(p) for p in outer]
        self.priors = self._priors()
        for k in range(self.particles):
            own = evidence[min(k, len(evidence) - 1)].detach().to(torch.float32).expand(*sizes(self.plates), self.leaf.dim)
            self.evidence.append(own.permute(order).reshape(self.shape).contiguous().numpy())
            self._settle(k, start)
            start = self.top[-1].T  # neighbouring root points have neighbouring answers

    def _priors(self) -> list[Prior]:
        """The priors' quadratics, from one unit."""
        local, leaf = self.local, self.leaf.name
        zeros = {b.name: torch.zeros((), dtype=local.reduced.dtype).expand(self.particles, local.units(b), 1, b.dim) for b in local.component.blocks}
        coarse = self.parent.dim if self.parent else 0
        above = self.parent.name if self.parent else ""
        out = []
        found = [(f, *_quadratic(local, f, zeros)) for f in local.component.factors if f.variable in local.component.uniform]
        for k in range(self.particles):
            v = v0 = 0.0
            c, d, d0 = np.zeros(self.leaf.dim), np.zeros(coarse), np.zeros(coarse)
            p, q, r, r0 = np.zeros((self.leaf.dim,) * 2), np.zeros((self.leaf.dim, coarse)), np.zeros((coarse, coarse)), np.zeros((coarse, coarse))
            for factor, value, slope, hess in found:
                one = [{n: t[min(k, len(t) - 1)].squeeze(0).squeeze(0).to(torch.float64).numpy() for n, t in part.items()} for part in (slope, hess)]
                own = float(value[min(k, len(value) - 1), 0])
                if any(name == leaf for name, _ in factor.touches):
                    v, c, p = v + own, c + one[0][leaf], p + one[1][leaf, leaf]
                    if above in one[0]:
                        d, q, r = d + one[0][above], q + one[1][leaf, above], r + one[1][above, above]
                else:
                    v0, d0, r0 = v0 + own, d0 + one[0][above], r0 + one[1][above, above]
            out.append(Prior(v, c, d, p, q, r, v0, d0, r0))
        return out

    def _settle(self, k: int, start: np.ndarray | None) -> None:
        """Newton steps of the parents until they move by little."""
        leaves, _, labels, n = self.shape
        prior, b = self.priors[k], self.evidence[k]
        groups = np.arange(0, n, LANES)
        value = np.zeros(n)
        if start is None:
            top = np.zeros((0, n))
            offset = np.repeat(prior.c[:, None], n, 1)
            z = np.repeat(np.linalg.solve(prior.p, offset)[None], leaves, 0).astype(np.float32)
            self._sweep(b, z, groups, offset, prior, 2 * FIRST_STEPS, value)
            self._keep(z, top, np.zeros((n, 0, 0)), value + leaves * (prior.v + 0.5 * labels * math.log(2 * math.pi)))
            return
        top = np.array(start, dtype=np.float64).T
        z = np.repeat(np.linalg.solve(prior.p, prior.c[:, None] - prior.q @ top)[None], leaves, 0).astype(np.float32)
        longest = np.full(n, float(np.mean(1 / np.sqrt(np.diagonal(prior.r0)))))
        most, before, factor = longest.copy(), np.zeros_like(top), np.zeros((n, len(top), len(top)))
        todo = groups
        for number in range(SWEEPS):
            at = (todo[:, None] + np.arange(LANES)).ravel()
            at = at[at < n]
            mean, cov = self._sweep(b, z, todo, prior.c[:, None] - prior.q @ top, prior, STEPS if number else FIRST_STEPS, None)
            here = top[:, at]
            g = prior.d0[:, None] - prior.r0 @ here + leaves * (prior.d[:, None] - prior.r @ here) - prior.q.T @ mean[:, at]
            h = prior.r0 + leaves * prior.r - np.einsum("ie,nij,jf->nef", prior.q, cov[at], prior.q, optimize=True)
            found = factorise(torch.from_numpy(h))
            step = torch.cholesky_solve(torch.from_numpy(g.T[:, :, None].copy()), found)[..., 0].numpy().T
            decrement = (g * step).sum(0)
            # A step that turns back was too long: curvature far out says little of what lies between.
            longest[at] = np.where((step * before[:, at]).sum(0) < 0, 0.5 * longest[at], np.minimum(1.2 * longest[at], most[at]))
            step = step * np.minimum(1.0, longest[at] / np.maximum(np.abs(step).max(0), 1e-12))
            top[:, at], before[:, at], factor[at] = here + step, step, found.numpy()
            unsettled = np.zeros(n, bool)
            unsettled[at] = decrement > SETTLED
            todo = np.unique(np.flatnonzero(unsettled) // LANES) * LANES
            if not len(todo):
                break
        self._sweep(b, z, groups, prior.c[:, None] - prior.q @ top, prior, 1, value)
        value = value + leaves * (prior.v + 0.5 * labels * math.log(2 * math.pi) + prior.d @ top - 0.5 * (top * (prior.r @ top)).sum(0))
        value = value + prior.v0 + prior.d0 @ top - 0.5 * (top * (prior.r0 @ top)).sum(0) + 0.5 * len(top) * math.log(2 * math.pi)
        self._keep(z, top, factor, value - np.log(np.diagonal(factor, axis1=1, axis2=2)).sum(1))

    def _sweep(self, b: np.ndarray, z: np.ndarray, todo: np.ndarray, offset: np.ndarray, prior: Prior, steps: int, value: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Settle the leaves; sums over them of means `[L, n]` and covariances `[n, L, L]`."""
        _, _, labels, n = self.shape
        mean, cov = np.zeros((labels, n)), np.zeros((labels, labels, n))
        own = np.zeros(0) if value is None else value
        sweep(b, z, todo, offset.astype(np.float32), prior.p.astype(np.float32), steps, NOTHING, mean, cov, own, NOTHING, NOTHING, NOTHING[None])
        cov = cov.transpose(2, 0, 1)
        return mean, cov + np.tril(cov, -1).transpose(0, 2, 1)

    def _keep(self, z: np.ndarray, top: np.ndarray, factor: np.ndarray, value: np.ndarray) -> None:
        self.z.append(z)
        self.top.append(top)
        self.factor.append(factor)
        self.value.append(value)

    def log_marginal(self, weights: Tensor) -> Tensor:
        """Laplace value of log p(data | root), `[K]`; weights of the parents' units `[n]`."""
        return torch.from_numpy(np.stack(self.value) @ weights.to(torch.float64).numpy())

    def _last(self, k: int, mean: np.ndarray, variance: np.ndarray, share: np.ndarray) -> None:
        """One more sweep, for what is asked of it; the parents' spread counts."""
        prior, n = self.priors[k], self.shape[3]
        gain, offset = NOTHING, np.repeat(prior.c[:, None], n, 1)
        if self.parent is not None:
            spread = np.linalg.inv(self.factor[k]).transpose(0, 2, 1)  # M M^T = H^-1
            gain = np.ascontiguousarray(np.einsum("le,nef->lfn", -prior.q, spread, optimize=True), dtype=np.float32)
            offset = prior.c[:, None] - prior.q @ self.top[k]
        labels = self.shape[2]
        sweep(
            self.evidence[k], self.z[k], np.arange(0, n, LANES), offset.astype(np.float32), prior.p.astype(np.float32), 1, gain,
            np.zeros((labels, n)), np.zeros((labels, labels, n)), np.zeros(0), mean, variance, share,
        )

    def shares(self) -> Tensor:
        """Posterior probabilities of each observation's labels, `[K, *plates, L]`."""
        inner, below, outer = self.layout
        sizes = self.local.reduced.sizes
        out = np.empty((self.particles, *self.shape), np.float32)
        for k in range(self.particles):
            self._last(k, NOTHING, NOTHING, out[k])
        axes = (*inner, *below, "", *outer)
        whole = torch.from_numpy(out).reshape(self.particles, *sizes(inner), *sizes(below), self.leaf.dim, *sizes(outer))
        return whole.permute(0, *(1 + axes.index(p) for p in self.plates), 1 + axes.index(""))

    @cached_property
    def moments(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Block -> mean and variance of its coordinates given the root, `[K, n, 1, e]`."""
        inner, _, outer = self.layout
        sizes = self.local.reduced.sizes
        leaves, _, labels, n = self.shape
        mean, variance = np.empty((self.particles, leaves, labels, n), np.float32), np.empty((self.particles, leaves, labels, n), np.float32)
        for k in range(self.particles):
            self._last(k, mean[k], variance[k], NOTHING[None])
        axes = (*inner, "", *outer)

        def units_first(t: np.ndarray) -> Tensor:
            whole = torch.from_numpy(t).reshape(self.particles, *sizes(inner), labels, *sizes(outer))
            return whole.permute(0, *(1 + axes.index(p) for p in self.leaf.plates), 1 + axes.index("")).reshape(self.particles, -1, 1, labels)

        out = {self.leaf.name: (units_first(mean), units_first(variance))}
        if self.parent is not None:
            spread = [np.linalg.inv(f) for f in self.factor]
            top = torch.from_numpy(np.stack(self.top)).transpose(1, 2)[:, :, None]
            out[self.parent.name] = top, torch.from_numpy(np.stack([(s**2).sum(1) for s in spread]))[:, :, None]
        return out


def _quadratic(local: LocalModel, factor: Factor, zeros: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor], dict[Pair, Tensor]]:
    """Value, gradient and minus second derivatives of a law at zero, from its first unit."""
    with torch.enable_grad():
        value, few = local._copies(factor, zeros, False, alone=True)
        slope = torch.autograd.grad(value.sum(), list(few.values()), create_graph=True, materialize_grads=True)
        hess = local._columns(factor, few, slope, False)
    return value.detach(), {n: s.detach() for n, s in zip(few, slope, strict=True)}, {pair: h.detach() for pair, h in hess.items()}
