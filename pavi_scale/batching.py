"""Which ground units are computed together: a partition of the cohort into shards, and random selections of it.

A selection must hold every child of the units it infers (their pools are complete), except below free blocks. So a plate
may be split only if no block pools over it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pavi_scale.guide.blocks import Block, Component, lies_below
from pavi_scale.model.template import Model
from pavi_scale.plates import Layout, Selection, ancestors
from pavi_scale.rng import stream

ROWS = 16  # rows of chunks that are open at the same time


def splittable(model: Model, components: Sequence[Component]) -> tuple[str, ...]:
    """Top-level plates over which no block pools its data, in the model's order."""
    plates = model.plates
    blocks = {b.name: b for c in components for b in c.blocks}
    out = []
    for name, plate in plates.items():
        if plate.within:
            continue
        pooled = any(
            lies_below(plates, model.variables[f.variable].plates, (name,)) and not lies_below(plates, blocks[b].plates, (name,))
            for c in components for f in c.factors for b, _ in f.touches
        )
        if not pooled:
            out.append(name)
    return tuple(out)


def leaves(model: Model, components: Sequence[Component]) -> tuple[str, ...]:
    """Plates within others whose units no block pools: their units may be selected one by one."""
    plates = model.plates
    touched = [model.variables[f.variable].plates for c in components for f in c.factors]
    return tuple(name for name, plate in plates.items() if plate.within and not any(lies_below(plates, t, (name,)) for t in touched))


def closure(layout: Layout, chosen: Mapping[str, np.ndarray], weight: Mapping[str, float] | None = None) -> Selection:
    """The chosen units of top-level plates and everything below them; all units of plates not concerned."""
    weight = weight or {}
    units: dict[str, np.ndarray] = {}
    weights: dict[str, np.ndarray] = {}

    def visit(name: str) -> None:
        if name in units:
            return
        parents = layout.plates[name].within
        for parent in parents:
            visit(parent)
        if name in chosen:
            units[name] = np.asarray(chosen[name])
            weights[name] = np.full(len(units[name]), weight.get(name, 1.0))
            return
        picked = np.arange(layout.cardinality[name])
        for parent in parents:
            if len(units[parent]) < layout.cardinality[parent]:
                below = layout.children(name, parent, units[parent])
                picked = below if len(picked) == layout.cardinality[name] else np.intersect1d(picked, below, assume_unique=True)
        units[name] = picked
        own = np.ones(len(picked))
        for parent in parents:
            own = own * weights[parent][np.searchsorted(units[parent], layout.index[name, parent][picked])]
        weights[name] = own

    for name in layout.plates:
        visit(name)
    return Selection(layout, units, weights)


def upward(layout: Layout, leaf: str, picked: np.ndarray) -> Selection:
    """Units of a leaf plate selected one by one, and the ancestors they belong to.

    An ancestor's own terms are spread over the leaf units below it: its weight is (N / B) (selected below it) / (all below it).
    """
    above = ancestors(layout.plates, leaf)
    units = {p: np.arange(n) for p, n in layout.cardinality.items()}
    weights = {p: np.ones(n) for p, n in layout.cardinality.items()}
    ratio = layout.cardinality[leaf] / len(picked)
    units[leaf], weights[leaf] = picked, np.full(len(picked), ratio)
    for plate in above:
        parent = layout.path(leaf, plate)
        counts = np.bincount(parent[picked], minlength=layout.cardinality[plate])
        totals = np.bincount(parent, minlength=layout.cardinality[plate])
        # A unit with nothing below it can never be selected this way, so it is always kept, with weight one.
        keep = np.flatnonzero((counts > 0) | (totals == 0))
        units[plate] = keep
        weights[plate] = np.where(totals[keep] > 0, ratio * counts[keep] / np.maximum(totals[keep], 1), 1.0)
    return Selection(layout, units, weights)


@dataclass(frozen=True)
class Shard:
    """A contiguous range of the split plate; `first` marks the one that answers for what does not depend on that plate."""

    plate: str | None
    start: int
    stop: int
    first: bool

    def selection(self, layout: Layout) -> Selection:
        """The shard's units and everything below them, with weight one."""
        if self.plate is None:
            return Selection.whole(layout)
        return closure(layout, {self.plate: np.arange(self.start, self.stop)})

    def parts(self, length: int) -> list[Shard]:
        """It in parts of at most `length` units, one after another."""
        if self.plate is None:
            return [self]
        return [Shard(self.plate, a, min(a + length, self.stop), self.first and a == self.start) for a in range(self.start, self.stop, length)]


def split_plate(model: Model, layout: Layout, components: Sequence[Component]) -> str | None:
    """The splittable plate with most observed units below it."""
    candidates = splittable(model, components)

    def load(plate: str) -> int:
        return sum(
            math.prod(layout.cardinality[p] for p in v.plates) for v in model.of_kind("observed", "latent") if lies_below(model.plates, v.plates, (plate,))
        )

    return max(candidates, key=load, default=None)


def most_units(model: Model, layout: Layout, plate: str) -> int:
    """Units of the largest of the variables below a plate."""
    below = [v.plates for v in model.of_kind("observed", "latent") if lies_below(layout.plates, v.plates, (plate,))]
    return max(math.prod(layout.cardinality[p] for p in plates) for plates in below)


def shards(layout: Layout, plate: str | None, per_shard: int) -> list[Shard]:
    """Contiguous shards of at most `per_shard` units of the split plate."""
    if plate is None:
        return [Shard(None, 0, 0, True)]
    n = layout.cardinality[plate]
    per_shard = max(1, min(per_shard, n))
    return [Shard(plate, a, min(a + per_shard, n), a == 0) for a in range(0, n, per_shard)]


def spread_out(count: int, length: int, chunk: int, key: int) -> np.ndarray:
    """An order of units that selections begin with: runs of at most `length` neighbours, which lie in one row of chunks each.

    At random over `ROWS` rows until these are used up, then over the next: what is read of a row is decoded whole, and a selection of many
    runs should not touch all rows.
    """
    rng = np.random.default_rng(key % 2**63)
    each = -(-chunk // length)
    edges = np.linspace(0, chunk, each + 1).astype(np.int64)
    rows = rng.permutation(-(-count // chunk))
    found: list[np.ndarray] = []
    for start in range(0, len(rows), ROWS):
        some = rows[start : start + ROWS]
        parts = np.stack([rng.permutation(each) for _ in some])
        for turn in range(each):  # one run of each row, then a second one
            found += [np.arange(r * chunk + edges[p], min(r * chunk + edges[p + 1], count)) for r, p in rng.permutation(np.stack([some, parts[:, turn]], 1))]
    return np.concatenate(found)


def batches(layout: Layout, plates: Mapping[str, int], seed: int, cells: Mapping[str, int] | None = None) -> Iterator[dict[str, np.ndarray]]:
    """Endless random selections without replacement: each plate's cells are shuffled once per its own epoch.

    A cell is a run of neighbouring units that are selected together, so that a selection touches few chunks of a store (block shuffle,
    CorgiPile, Xu et al. 2022). Each unit's inclusion probability is (cells per selection) / (cells), also in a shorter last cell.

    Args:
        layout: The layout.
        plates: Plate -> units per selection.
        seed: Seed of the shuffles.
        cells: Plate -> units of a cell; 1 where absent.
    """
    def one(plate: str, size: int) -> Iterator[np.ndarray]:
        epoch, n = 0, layout.cardinality[plate]
        length = (cells or {}).get(plate, 1)
        count, together = -(-n // length), max(1, size // length)
        while True:
            order = np.random.default_rng(stream(seed, "batches", plate, epoch) % 2**63).permutation(count)
            for start in range(0, count - together + 1, together):
                picked = np.sort(order[start : start + together])
                units = (picked[:, None] * length + np.arange(length)).ravel()
                yield units[units < n]
            epoch += 1

    sources = {p: one(p, min(size, layout.cardinality[p])) for p, size in plates.items()}
    while True:
        yield {p: next(s) for p, s in sources.items()}


def flat_positions(layout: Layout, selection: Selection, block: Block) -> np.ndarray:
    """Positions of the selected units of a block in its table of rows."""
    grid = np.ix_(*(selection.units[p] for p in block.plates))
    return np.ravel_multi_index(grid, [layout.cardinality[p] for p in block.plates]).ravel()
