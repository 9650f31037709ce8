"""Gaussians over the units of a component: elimination on a tree of plates.

Precision H and gradient g of a log joint are kept per unit, `[K, n, C, e, e']` and `[K, n, C, e]`. On a tree, block j is
eliminated into the coarser blocks i it is coupled to by Schur complements,

    H_ii -= sum_{j below i} H_ij H_jj^-1 H_ji,   g_i -= sum_{j below i} H_ij H_jj^-1 g_j,

and sampled from coarse to fine, z_j = m_j - H_jj^-1 sum_i H_ji (z_i - m_i) + L_j^-T u_j with H_jj = L_j L_j^T
(multifrontal Cholesky; Rue & Held, Gaussian Markov Random Fields, 2005, section 2.4). Exact for Gaussian trees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import Tensor

from pavi_scale.guide.blocks import Component

Pair = tuple[str, str]
DIGITS = 1e3  # roundings that a precision must be larger than
LEAST = 1e-24  # precision that is one: what is measured in millions of millions has it, and that of single numbers still has its square root


def factorise(precision: Tensor) -> Tensor:
    """Lower Cholesky factor of `[..., e, e]`; where it is not positive definite, of the matrix with absolute eigenvalues.

    (Saddle-free Newton, Dauphin et al. 2014: steps stay as long as the curvature says, whatever its sign.) Such a matrix is a constant for
    differentiation: it only guards iterations far from the mode and laws that are not log-concave.
    """
    e = precision.shape[-1]
    if e == 1:
        return torch.where(precision > LEAST, precision, precision.detach().abs().clamp_min(_floor(precision))).sqrt()
    factor, info = torch.linalg.cholesky_ex(precision)
    bad = (info > 0) | ~torch.isfinite(factor).all(-1).all(-1)
    if bool(bad.any()):
        with torch.no_grad():
            values, vectors = torch.linalg.eigh(torch.nan_to_num(precision[bad]))
            size = values.abs()
            lifted = torch.maximum(size, 0.1 * size.amax(-1, keepdim=True)).clamp_min(_floor(precision))
            safe = precision.detach().clone()
            safe[bad] = (vectors * lifted[..., None, :]) @ vectors.mT
        factor = torch.linalg.cholesky_ex(torch.where(bad[..., None, None], safe, precision))[0]
    return factor


def _floor(precision: Tensor) -> float:
    return 1e-6 if precision.dtype == torch.float32 else 1e-10


def solve(factor: Tensor, right: Tensor) -> Tensor:
    """H^-1 right, from the Cholesky factor; right `[..., e, r]`."""
    if factor.shape[-1] == 1:
        return right / (factor * factor)
    return torch.cholesky_solve(right, factor)


def back(factor: Tensor, noise: Tensor) -> Tensor:
    """L^-T u, u `[..., e]`."""
    if factor.shape[-1] == 1:
        return noise / factor[..., 0]
    return torch.linalg.solve_triangular(factor.mT, noise[..., None], upper=True)[..., 0]


def forward(factor: Tensor, offset: Tensor) -> Tensor:
    """u = L^T (z - loc), the inverse of `back`."""
    if factor.shape[-1] == 1:
        return offset * factor[..., 0]
    return (factor.mT @ offset[..., None])[..., 0]


def log_det(factor: Tensor) -> Tensor:
    """log det L, summed over C and e: `[K, n]`."""
    return factor.diagonal(dim1=-2, dim2=-1).log().sum((-1, -2))


def _add(target: Tensor, index: Tensor | None, source: Tensor) -> Tensor:
    return target + source if index is None else target.index_add(1, index, source)


def _take(source: Tensor, index: Tensor | None) -> Tensor:
    return source if index is None else source.index_select(1, index)


@dataclass
class Tree:
    """A factorised Gaussian on a tree component.

    Args:
        component: The component.
        index: (fine block, coarse block) -> position of each fine unit's coarse unit; None for the identity.
        factor: Cholesky factor of each eliminated block, `[K, n, C, e, e]`.
        gain: (fine, coarse) -> H_jj^-1 H_ji, `[K, n_j, C, e_j, e_i]`.
        step: Newton step H^-1 g of each block, `[K, n, C, e]`.
        lost: Whether elimination lost all digits of a unit's precision, `[K]`: what a scale next to nothing of a finer block does.
    """

    component: Component
    index: Mapping[Pair, Tensor | None]
    factor: dict[str, Tensor]
    gain: dict[Pair, Tensor]
    step: dict[str, Tensor]
    lost: Tensor

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Tree:
        """The same for other particles: `change` along the first axis."""
        return replace(self, factor={b: change(t) for b, t in self.factor.items()}, gain={p: change(t) for p, t in self.gain.items()})

    def conditional(self, name: str, mode: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Tensor:
        """Location of a block given the sampled coarser ones, `[K, n, C, e]`."""
        loc = mode[name]
        for above in self.component.couplings[name]:
            offset = _take(values[above] - mode[above], self.index[name, above])
            loc = loc - (self.gain[name, above] @ offset[..., None])[..., 0]
        return loc


def eliminate(component: Component, index: Mapping[Pair, Tensor | None], precision: Mapping[Pair, Tensor], gradient: Mapping[str, Tensor]) -> Tree:
    """Factorise a tree component.

    Args:
        component: Its symbolic structure.
        index: As in `Tree`.
        precision: (fine, coarse) and (block, block) -> minus second derivatives, `[K, n_fine, C, e_fine, e_coarse]`.
        gradient: Block -> first derivatives.
    """
    h, g = dict(precision), dict(gradient)
    factor: dict[str, Tensor] = {}
    gain: dict[Pair, Tensor] = {}
    inner: dict[str, Tensor] = {}
    lost = torch.zeros(max(len(t) for t in g.values()), dtype=torch.bool)
    for block in reversed(component.blocks):
        j = block.name
        # H_jj less what its finer blocks took: of a positive definite matrix, more than rounding is left (Higham 2002, section 10.1).
        left, whole = (t[j, j].detach().diagonal(dim1=-2, dim2=-1) for t in (h, precision))
        lost = lost | (left <= DIGITS * torch.finfo(left.dtype).eps * whole).flatten(1).any(1)
        factor[j] = factorise(h[j, j])
        inner[j] = solve(factor[j], g[j][..., None])[..., 0]
        above = component.couplings[j]
        for i in above:
            gain[j, i] = solve(factor[j], h[j, i])
            g[i] = _add(g[i], index[j, i], -(h[j, i].mT @ inner[j][..., None])[..., 0])
        for i in above:
            h[i, i] = _add(h[i, i], index[j, i], -h[j, i].mT @ gain[j, i])
        for coarse, fine in combinations(above, 2):
            update = -h[j, fine].mT @ gain[j, coarse]
            if (fine, coarse) not in h:
                k, _, c, e_fine, e_coarse = update.shape
                h[fine, coarse] = update.new_zeros(k, g[fine].shape[1], c, e_fine, e_coarse)
            h[fine, coarse] = _add(h[fine, coarse], index[j, fine], update)
    step: dict[str, Tensor] = {}
    for block in component.blocks:
        j = block.name
        step[j] = inner[j]
        for i in component.couplings[j]:
            step[j] = step[j] - (gain[j, i] @ _take(step[i], index[j, i])[..., None])[..., 0]
    return Tree(component, index, factor, gain, step, lost)
