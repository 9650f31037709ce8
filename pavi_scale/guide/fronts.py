"""Fronts of crossed blocks: which columns of the rest each unit of the eliminated block touches.

B, the part of a precision between one block and the others of a crossed component, is a list of terms, one per law and ground unit. It is made
dense for a few units at a time, over the columns that they touch only (their fronts; Duff & Reid 1983). This is a matter of indices alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pavi_scale.guide.gaussian import Pair

SLAB = 1 << 22  # numbers of a front or its square held at once
FULL = 12  # a unit of one coordinate that touches more than one in so many columns of the rest is given all: one matrix product beats many small ones


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
    # Given all columns, work grows with e; with its own, most of it is to add w^2 numbers to the rest's, whatever e.
    full = own * (FULL / math.sqrt(e)) > total
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
