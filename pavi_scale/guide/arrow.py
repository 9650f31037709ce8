"""Gaussians over crossed blocks: the largest block is eliminated unit by unit, the rest is solved densely.

Every law touches one unit of each block, so that within a block the precision is block-diagonal. With j the block eliminated and r the rest,

    H = [[H_jj, B], [B^T, H_rr]],   S = H_rr - sum_u B_u^T H_uu^-1 B_u,   z_r ~ N(m_r, S^-1),   z_j | z_r ~ N(m_j - H_jj^-1 B (z_r - m_r), H_jj^-1),

an arrow-shaped Cholesky factor (Rue & Held, Gaussian Markov Random Fields, 2005, section 2.4). B is a list of terms, one per law and ground unit;
it is made dense for a few units at a time, over the columns that they touch only (their fronts; Duff & Reid 1983).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pavi_scale.guide.gaussian import DIGITS, Pair, back, factorise, forward, log_det, solve

SLAB = 1 << 22  # numbers of a front or its square held at once
FULL = 12  # a unit that touches more than one in so many columns of the rest is given all: one matrix product beats many small ones


@dataclass(frozen=True)
class Coupling:
    """Cross derivatives of one law.

    Args:
        pair: Two blocks (a, b).
        at: Unit of a, and of b, of each ground unit of the law, `[n_f]`; None for the identity.
        value: Minus second derivatives, `[K, n_f, C, e_a, e_b]`.
    """

    pair: Pair
    at: tuple[Tensor | None, Tensor | None]
    value: Tensor


@dataclass(frozen=True)
class Link:
    """Where the terms of one law lie in B: unit of the eliminated block, block of the rest and unit there, `[n_f]`; `turned` if stored (rest, eliminated)."""

    number: int
    turned: bool
    head: Tensor
    block: str
    unit: Tensor


@dataclass(frozen=True)
class Front:
    """Units of the eliminated block whose rows of B are made dense together.

    Args:
        units: `[U]`.
        columns: Columns of the rest that each touches, `[U, w]`, padded by columns where its row is zero; None for all columns.
        width: w.
        terms: Positions of their terms, for each link.
        where: Flat positions of those in `[U, e, w]`, for each link.
    """

    units: Tensor
    columns: Tensor | None
    width: int
    terms: tuple[Tensor, ...]
    where: tuple[Tensor, ...]

    @property
    def entries(self) -> int:
        """Numbers held per particle."""
        return len(self.units) * self.width * (1 if self.columns is None else self.width)


@dataclass(frozen=True)
class Pattern:
    """Which block is eliminated, and what of B each of its units touches.

    Args:
        head: The eliminated block.
        sizes: Block -> (n, e).
        starts: Block of the rest -> its first column.
        total: Columns of the rest, T.
        links: The terms of B.
        fronts: All units of the eliminated block that touch the rest.
    """

    head: str
    sizes: Mapping[str, tuple[int, int]]
    starts: Mapping[str, int]
    total: int
    links: tuple[Link, ...]
    fronts: tuple[Front, ...]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        held = [t for link in self.links for t in (link.head, link.unit)]
        held += [t for f in self.fronts for t in (f.units, *f.terms, *f.where, *([] if f.columns is None else [f.columns]))]
        return sum(t.numel() * t.element_size() for t in held)


def make_pattern(sizes: Mapping[str, tuple[int, int]], couplings: Sequence[Coupling]) -> Pattern:
    """The block with most coordinates is eliminated; units are gathered in fronts of like widths."""
    head = max(sizes, key=lambda b: sizes[b][0] * sizes[b][1])
    starts, first, total, rest = {}, {}, 0, 0
    for b, (n, e) in sizes.items():
        if b != head:
            starts[b], first[b] = total, rest
            total, rest = total + n * e, rest + n
    links = []
    for number, found in enumerate(couplings):
        if head in found.pair:
            side = found.pair.index(head)
            mine, theirs = (torch.arange(found.value.shape[1]) if t is None else t for t in (found.at[side], found.at[1 - side]))
            links.append(Link(number, side == 1, mine, found.pair[1 - side], theirs))
    if not links:
        return Pattern(head, dict(sizes), starts, total, (), ())
    # Each pair of a unit and a unit of the rest that it touches, once, in the order of the units; and the columns of those.
    key, inverse = torch.unique(torch.cat([k.head * rest + first[k.block] + k.unit for k in links]), return_inverse=True)
    width = torch.cat([torch.full((sizes[b][0],), sizes[b][1]) for b in starts])[key % rest]
    column = torch.cat([starts[b] + sizes[b][1] * torch.arange(sizes[b][0]) for b in starts])[key % rest]
    own = torch.zeros(sizes[head][0], dtype=torch.long).index_add(0, key // rest, width)
    place = width.cumsum(0) - width - (own.cumsum(0) - own)[key // rest]
    each = inverse.split([len(k.head) for k in links])
    return Pattern(head, dict(sizes), starts, total, tuple(links), tuple(_fronts(sizes, head, total, links, each, key // rest, width, column, place, own)))


def _fronts(
    sizes: Mapping[str, tuple[int, int]], head: str, total: int, links: Sequence[Link], each: Sequence[Tensor],
    owner: Tensor, width: Tensor, column: Tensor, place: Tensor, own: Tensor,
) -> Iterator[Front]:
    """Units in order of their widths, cut where the width has grown by half and where a slab is full.

    Args:
        sizes: As in `Pattern`.
        head: As in `Pattern`.
        total: As in `Pattern`.
        links: As in `Pattern`.
        each: Entry of each term, by link.
        owner: Unit of each entry.
        width: Columns of each entry.
        column: Its first column in the rest.
        place: Its first column in its unit's front.
        own: Columns of each unit.
    """
    e = sizes[head][1]
    full = own * FULL > total
    level = torch.where(full, 1000, (2 * own.clamp_min(1).double().log2()).ceil().long())
    slab, local = torch.full_like(own, -1), torch.zeros_like(own)
    plans: list[tuple[Tensor, int, bool]] = []
    for value in torch.unique(level[own > 0]).tolist():
        units = torch.nonzero((level == value) & (own > 0))[:, 0]
        dense = value == 1000
        wide = total if dense else int(own[units].max())
        for part in units.split(max(1, SLAB // (wide * (e if dense else max(e, wide))))):
            slab[part], local[part] = len(plans), torch.arange(len(part))
            plans.append((part, wide, dense))
    entries = _by(slab[owner], len(plans))
    terms = [_by(slab[k.head], len(plans)) for k in links]
    for number, (units, wide, dense) in enumerate(plans):
        columns = None
        if not dense:
            mine = entries[number]
            again = torch.repeat_interleave(mine, width[mine])
            step = torch.arange(len(again)) - torch.repeat_interleave(width[mine].cumsum(0) - width[mine], width[mine])
            columns = torch.zeros(len(units), wide, dtype=torch.long)
            columns[local[owner[again]], place[again] + step] = column[again] + step
        where = []
        for link, entry, chosen in zip(links, each, terms, strict=True):
            at = chosen[number]
            start = (column if dense else place)[entry[at]]
            row = local[link.head[at]][:, None] * e + torch.arange(e)
            where.append((row[:, :, None] * wide + start[:, None, None] + torch.arange(sizes[link.block][1])).flatten())
        yield Front(units, columns, wide, tuple(t[number] for t in terms), tuple(where))


def _by(label: Tensor, count: int) -> tuple[Tensor, ...]:
    """Positions of each label."""
    return torch.argsort(label, stable=True).split(torch.bincount(label, minlength=count).tolist())


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
                where = front.columns[:, :, None] * t + front.columns[:, None, :]
                out[at].view(len(w), -1).index_add_(1, where.flatten(), square.flatten(1))
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """Gradients with respect to factors and terms."""
        pattern, (factor, *values) = ctx.pattern, ctx.saved_tensors
        t = pattern.total
        both = grad + grad.mT
        of_factor, of_values = torch.zeros_like(factor), [torch.zeros(v.shape, dtype=v.dtype) for v in values]
        for front, at, lower, w in _rows(pattern, factor, values):
            if front.columns is None:
                m = (w.flatten(1, 2) @ both[at]).reshape(w.shape)
            else:
                where = front.columns[:, :, None] * t + front.columns[:, None, :]
                m = w @ both[at].reshape(len(w), -1).index_select(1, where.flatten()).reshape(len(w), *where.shape)
            m = m / lower if lower.shape[-1] == 1 else torch.linalg.solve_triangular(lower.mT, m, upper=True)
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

    def variance(self, name: str) -> Tensor:
        """Variances of a block's coordinates, `[K, n, C, e]`: of the eliminated one given the rest, of the others marginally."""
        if name != self.pattern.head:
            return _unpack(self.pattern, torch.cholesky_inverse(self.factor).diagonal(dim1=-2, dim2=-1))[name]
        return self.head[..., 0] ** -2.0 if self.head.shape[-1] == 1 else torch.cholesky_inverse(self.head).diagonal(dim1=-2, dim2=-1)


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
    inner = solve(head, gradient[j][..., None])[..., 0]
    values = tuple(couplings[link.number].value.mT if link.turned else couplings[link.number].value for link in pattern.links)
    g = {b: gradient[b] for b in pattern.starts}
    for link, value in zip(pattern.links, values, strict=True):
        g[link.block] = g[link.block].index_add(1, link.unit, -(value.mT @ inner.index_select(1, link.head)[..., None])[..., 0])

    def flat(t: Tensor) -> Tensor:  # [K, n, C, ...] -> [K C, n, ...]
        return t.transpose(1, 2).flatten(0, 1)

    whole = _rest(pattern, {b: flat(precision[b, b]) for b in pattern.starts}, couplings, flat)
    left = whole - _Taken.apply(pattern, flat(head), *(flat(v) for v in values))  # type: ignore[no-untyped-call]
    diagonal, before = (t.detach().diagonal(dim1=-2, dim2=-1) for t in (left, whole))
    lost = (diagonal <= DIGITS * torch.finfo(left.dtype).eps * before).reshape(k, -1).any(1)
    factor = factorise(left.unflatten(0, (k, c)))
    step = _unpack(pattern, solve(factor, _pack(pattern, g)[..., None])[..., 0])
    away = _along(pattern, values, step, torch.zeros_like(inner))
    step[j] = inner - solve(head, away[..., None])[..., 0]
    return Arrow(pattern, head, values, factor, step, lost)


def _rest(pattern: Pattern, own: Mapping[str, Tensor], couplings: Sequence[Coupling], flat: Callable[[Tensor], Tensor]) -> Tensor:
    """H_rr, `[Q, T, T]`."""
    t = pattern.total
    out = next(iter(own.values())).new_zeros(len(next(iter(own.values()))), t * t)
    for b, value in own.items():
        unit = torch.arange(pattern.sizes[b][0])
        out = out.index_add(1, _positions(pattern, (b, b), unit, unit), value.flatten(1))
    for found in couplings:
        if pattern.head not in found.pair:
            row, column = (torch.arange(found.value.shape[1]) if at is None else at for at in found.at)
            value = flat(found.value)
            out = out.index_add(1, _positions(pattern, found.pair, row, column), value.flatten(1))
            out = out.index_add(1, _positions(pattern, found.pair[::-1], column, row), value.mT.flatten(1))
    return out.unflatten(1, (t, t))


def _positions(pattern: Pattern, pair: Pair, row: Tensor, column: Tensor) -> Tensor:
    """Flat positions in the rest of the entries `[n, e_a, e_b]` between units of two blocks."""
    (a, b), (ea, eb) = pair, (pattern.sizes[name][1] for name in pair)
    rows = pattern.starts[a] + row[:, None] * ea + torch.arange(ea)
    columns = pattern.starts[b] + column[:, None] * eb + torch.arange(eb)
    return (rows[:, :, None] * pattern.total + columns[:, None, :]).flatten()
