"""Gaussians over crossed blocks: the largest block is eliminated unit by unit, the rest is solved densely.

Every law touches one unit of each block, so that within a block the precision is block-diagonal. With j the block eliminated and r the rest,

    H = [[H_jj, B], [B^T, H_rr]],   S = H_rr - sum_u B_u^T H_uu^-1 B_u,   z_r ~ N(m_r, S^-1),   z_j | z_r ~ N(m_j - H_jj^-1 B (z_r - m_r), H_jj^-1),

an arrow-shaped Cholesky factor (Rue & Held, Gaussian Markov Random Fields, 2005, section 2.4). B is never dense as a whole (`fronts`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pavi_scale.device import on
from pavi_scale.guide.fronts import SLAB, Coupling, Front, Pattern
from pavi_scale.guide.gaussian import DIGITS, Pair, back, factorise, forward, log_det, solve


class _Taken(torch.autograd.Function):
    """sum_u B_u^T H_uu^-1 B_u, `[Q, T, T]`, from the Cholesky factors `[Q, n, e, e]` of H and the terms of B, `[Q, n_f, e, e_b]` for each link.

    With W = L^-1 B and a symmetrised gradient G, M = L^-T W G: dB = M, dL = -tril(M W^T). Nothing dense in units is kept for it.
    """

    @staticmethod
    def forward(ctx: Any, pattern: Pattern, factor: Tensor, *values: Tensor) -> Tensor:  # noqa: ANN401
        """The sum."""
        ctx.pattern = pattern
        ctx.save_for_backward(factor, *values)
        t = pattern.total
        out = factor.new_zeros(len(factor), t, t)
        for front, at, lower, w in _rows(pattern, factor, values):
            if front.columns is None:
                flat = w.flatten(1, 2)
                out[at] += flat.mT @ flat
            else:
                square = w.mT * w if lower.shape[-1] == 1 else w.mT @ w
                out[at].view(len(w), -1).index_add_(1, _squares(pattern, front).flatten(), square.flatten(1))
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """Gradients with respect to factors and terms."""
        pattern, (factor, *values) = ctx.pattern, ctx.saved_tensors
        both = grad + grad.mT
        of_factor, of_values = torch.zeros_like(factor), [v.new_zeros(v.shape) for v in values]
        with on(grad.device):  # a device has a thread of its own for this
            for front, at, lower, w in _rows(pattern, factor, values):
                m = _back(lower, _times(pattern, front, w, both[at]))
                of_factor[at, front.units] = -(m @ w.mT).tril()
                for out, terms, where in zip(of_values, front.terms, front.where, strict=True):
                    out[at, terms] = m.flatten(1).index_select(1, where).reshape(len(w), len(terms), *out.shape[2:])
        return None, of_factor, *of_values


def _rows(pattern: Pattern, factor: Tensor, values: Sequence[Tensor]) -> Iterator[tuple[Front, slice, Tensor, Tensor]]:
    """Front after front, for some of Q at a time: the slice of those, L `[q, U, e, e]`, and W = L^-1 B `[q, U, e, w]`."""
    e = factor.shape[-1]
    for front in pattern.fronts:
        size = max(1, SLAB // front.entries)
        for start in range(0, len(factor), size):
            at = slice(start, start + size)
            lower = factor[at, front.units]
            flat = lower.new_zeros(len(lower), len(front.units) * e * front.width)
            for value, terms, where in zip(values, front.terms, front.where, strict=True):
                flat.index_add_(1, where, value[at, terms].flatten(1))
            b = flat.reshape(len(lower), len(front.units), e, front.width)
            yield front, at, lower, b / lower if e == 1 else torch.linalg.solve_triangular(lower, b, upper=False)


@dataclass
class Arrow:
    """A factorised Gaussian on a crossed component.

    Args:
        pattern: What is eliminated.
        head: Cholesky factor of each unit of the eliminated block, `[K, n, C, e, e]`.
        values: Terms of B for each link, `[K, n_f, C, e, e_b]`.
        factor: Cholesky factor of the rest, `[K, C, T, T]`.
        step: Newton step H^-1 g of each block, `[K, n, C, e]`.
        lost: Whether elimination lost all digits of the rest's precision, `[K]`.
    """

    pattern: Pattern
    head: Tensor
    values: tuple[Tensor, ...]
    factor: Tensor
    step: dict[str, Tensor]
    lost: Tensor

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Arrow:
        """The same for other particles: `change` along the first axis."""
        return replace(self, head=change(self.head), values=tuple(change(v) for v in self.values), factor=change(self.factor), lost=change(self.lost))

    def solve(self, gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """H^-1 g, `[K, n, C, e]` by block."""
        j = self.pattern.head
        inner = solve(self.head, gradient[j][..., None])[..., 0]
        g = {b: gradient[b] for b in self.pattern.starts}
        for link, value in zip(self.pattern.links, self.values, strict=True):
            g[link.block] = g[link.block].index_add(1, link.unit, -(value.mT @ inner.index_select(1, link.head)[..., None])[..., 0])
        step = _unpack(self.pattern, solve(self.factor, _pack(self.pattern, g)[..., None])[..., 0])
        away = _along(self.pattern, self.values, step, torch.zeros_like(inner))
        return {**step, j: inner - solve(self.head, away[..., None])[..., 0]}

    def log_det(self) -> Tensor:
        """log det of the whole Cholesky factor, `[K]`."""
        return log_det(self.head).sum(1) + log_det(self.factor)

    def conditional(self, mode: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Tensor:
        """Location of the eliminated block given the rest, `[K, n, C, e]`."""
        j = self.pattern.head
        offset = {b: values[b] - mode[b] for b in self.pattern.starts}
        return mode[j] - solve(self.head, _along(self.pattern, self.values, offset, torch.zeros_like(mode[j]))[..., None])[..., 0]

    def colour(self, white: Mapping[str, Tensor], mode: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Coordinates from standard normals."""
        flat = back(self.factor, _pack(self.pattern, white))
        z = {b: mode[b] + offset for b, offset in _unpack(self.pattern, flat).items()}
        z[self.pattern.head] = self.conditional(mode, z) + back(self.head, white[self.pattern.head])
        return z

    def whiten(self, z: Mapping[str, Tensor], mode: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `colour`."""
        white = _unpack(self.pattern, forward(self.factor, _pack(self.pattern, {b: z[b] - mode[b] for b in self.pattern.starts})))
        white[self.pattern.head] = forward(self.head, z[self.pattern.head] - self.conditional(mode, z))
        return white

    def log_dets(self) -> dict[str, Tensor]:
        """`log_det`, shared out over the units of each block, `[K, n]` (that of the rest as a whole has no units: evenly)."""
        n = sum(self.pattern.sizes[b][0] for b in self.pattern.starts)
        share = (log_det(self.factor) / n)[:, None]
        return {self.pattern.head: log_det(self.head), **{b: share.expand(-1, self.pattern.sizes[b][0]) for b in self.pattern.starts}}

    @cached_property
    def inverse(self) -> Tensor:
        """S^-1, `[K, C, T, T]`."""
        return torch.cholesky_inverse(self.factor)

    def variance(self, name: str) -> Tensor:
        """Marginal variances of a block's coordinates, `[K, n, C, e]`; of the eliminated one, the diagonal of H_uu^-1 + H_uu^-1 B_u S^-1 B_u^T H_uu^-1."""
        if name != self.pattern.head:
            return _unpack(self.pattern, self.inverse.diagonal(dim1=-2, dim2=-1))[name]
        k, n, c, e, _ = self.head.shape
        lower, inverse = _flat(self.head), self.inverse.flatten(0, 1)
        own = lower[..., 0] ** -2.0 if e == 1 else torch.cholesky_inverse(lower).diagonal(dim1=-2, dim2=-1).clone()
        for front, at, part, w in _rows(self.pattern, lower, [_flat(v) for v in self.values]):
            m = _back(part, w)
            own[at, front.units] += (_times(self.pattern, front, m, inverse[at]) * m).sum(-1)
        return own.reshape(k, c, n, e).transpose(1, 2)


def _flat(t: Tensor) -> Tensor:
    """`[K, n, C, ...]` -> `[K C, n, ...]`."""
    return t.transpose(1, 2).flatten(0, 1)


def _back(lower: Tensor, w: Tensor) -> Tensor:
    """L^-T w."""
    return w / lower if lower.shape[-1] == 1 else torch.linalg.solve_triangular(lower.mT, w, upper=True)


def _times(pattern: Pattern, front: Front, w: Tensor, square: Tensor) -> Tensor:
    """Rows `[q, U, e, w]` of a front times the entries of `[q, T, T]` that it touches."""
    if front.columns is None:
        return (w.flatten(1, 2) @ square).reshape(w.shape)
    where = _squares(pattern, front)
    return w @ square.flatten(1).index_select(1, where.flatten()).reshape(len(w), *where.shape)


def _squares(pattern: Pattern, front: Front) -> Tensor:
    """Flat positions in `[T, T]` of each unit's columns times themselves, `[U, w, w]`."""
    columns = torch.zeros(0, dtype=torch.long) if front.columns is None else front.columns
    return columns[..., :, None] * pattern.total + columns[..., None, :]


def _pack(pattern: Pattern, values: Mapping[str, Tensor]) -> Tensor:
    """Blocks of the rest `[K, n, C, e]` -> `[K, C, T]`."""
    return torch.cat([values[b].transpose(1, 2).flatten(2) for b in pattern.starts], -1)


def _unpack(pattern: Pattern, flat: Tensor) -> dict[str, Tensor]:
    """The inverse of `_pack`."""
    sizes = {b: pattern.sizes[b] for b in pattern.starts}
    parts = flat.split([n * e for n, e in sizes.values()], -1)
    return {b: part.unflatten(-1, size).transpose(1, 2) for (b, size), part in zip(sizes.items(), parts, strict=True)}


def _along(pattern: Pattern, values: Sequence[Tensor], rest: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """B x, `[K, n, C, e]`, added to `like`."""
    for link, value in zip(pattern.links, values, strict=True):
        like = like.index_add(1, link.head, (value @ rest[link.block].index_select(1, link.unit)[..., None])[..., 0])
    return like


def factorise_arrow(pattern: Pattern, precision: Mapping[Pair, Tensor], couplings: Sequence[Coupling], gradient: Mapping[str, Tensor]) -> Arrow:
    """Factorise a crossed component.

    Args:
        pattern: Its pattern.
        precision: (block, block) -> minus second derivatives within each unit, `[K, n, C, e, e]`.
        couplings: Those between blocks, in the order that the pattern was made from.
        gradient: Block -> first derivatives, `[K, n, C, e]`.
    """
    j = pattern.head
    k, _, c, _ = gradient[j].shape
    head = factorise(precision[j, j])
    values = tuple(couplings[link.number].value.mT if link.turned else couplings[link.number].value for link in pattern.links)
    whole = _rest(pattern, {b: _flat(precision[b, b]) for b in pattern.starts}, couplings)
    left = whole - _Taken.apply(pattern, _flat(head), *(_flat(v) for v in values))  # type: ignore[no-untyped-call]
    diagonal, before = (t.detach().diagonal(dim1=-2, dim2=-1) for t in (left, whole))
    lost = (diagonal <= DIGITS * torch.finfo(left.dtype).eps * before).reshape(k, -1).any(1)
    found = Arrow(pattern, head, values, factorise(left.unflatten(0, (k, c))), {}, lost)
    found.step = found.solve(gradient)
    return found


def _rest(pattern: Pattern, own: Mapping[str, Tensor], couplings: Sequence[Coupling]) -> Tensor:
    """H_rr, `[Q, T, T]`."""
    t = pattern.total
    out = next(iter(own.values())).new_zeros(len(next(iter(own.values()))), t * t)
    for b, value in own.items():
        unit = torch.arange(pattern.sizes[b][0])
        out.index_add_(1, _positions(pattern, (b, b), unit, unit), value.flatten(1))
    for found in couplings:
        if pattern.head not in found.pair:
            row, column = (torch.arange(found.value.shape[1]) if at is None else at for at in found.at)
            value = _flat(found.value)
            out.index_add_(1, _positions(pattern, found.pair, row, column), value.flatten(1))
            out.index_add_(1, _positions(pattern, found.pair[::-1], column, row), value.mT.flatten(1))
    return out.unflatten(1, (t, t))


def _positions(pattern: Pattern, pair: Pair, row: Tensor, column: Tensor) -> Tensor:
    """Flat positions in the rest of the entries `[n, e_a, e_b]` between units of two blocks."""
    (a, b), (ea, eb) = pair, (pattern.sizes[name][1] for name in pair)
    rows = pattern.starts[a] + row[:, None] * ea + torch.arange(ea)
    columns = pattern.starts[b] + column[:, None] * eb + torch.arange(eb)
    return (rows[:, :, None] * pattern.total + columns[:, None, :]).flatten()
