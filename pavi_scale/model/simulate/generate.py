"""Generation block by block, parents first.

A logical block's numbers depend on (seed, variable, block) alone, where the block's size follows from the variable's own
shape: neither memory nor storage chunks change a draw.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from pavi_scale import rng
from pavi_scale.ambient import precision, seeded
from pavi_scale.errors import NumericalError
from pavi_scale.model.protocol import VariableLike
from pavi_scale.model.simulate.batched import draw
from pavi_scale.model.simulate.design import Design
from pavi_scale.model.simulate.sinks import BLOCK, Axis, Sink
from pavi_scale.plates import ancestors

_WINDOW = 1 << 16  # rows that are read as one range rather than one by one


def generate(design: Design, sink: Sink, seed: int, dtype: np.dtype[Any]) -> None:
    """Draw every index variable, then every variable of the design, into `sink`."""
    for (child, parent), name in design.index.items():
        _write_index(design, sink, child, parent, name, seed)
    for v in design.model.variables.values():
        _write_variable(design, sink, v, seed, dtype)


def block_lengths(plates: Sequence[int], event: int) -> list[int]:
    """Length along each plate of a logical block, filled from the last plate."""
    room, lengths = max(1, BLOCK // max(event, 1)), []
    for n in reversed(plates):
        lengths.append(max(1, min(n, room)))
        room = max(1, room // lengths[-1])
    return lengths[::-1]


def _write_index(design: Design, sink: Sink, child: str, parent: str, name: str, seed: int) -> None:
    n, m = design.cardinality[child], design.cardinality[parent]
    source = design.given.get(name)
    array = sink.create(name, (child,), (n,), np.dtype(np.int64), {"instance_dimension": parent}, latent=False)
    first = design.model.plates[child].within[0] == parent
    for (rows,) in sink.regions(name, [BLOCK]):
        if source is not None:
            array[rows] = source.isel({child: rows}).values.astype(np.int64)
        else:
            units = np.arange(rows.start, rows.stop)
            # i m / n: sizes as even as they can be, groups contiguous; a further parent crosses it in shuffled order
            units = units if first else shuffled(units, n, rng.stream(seed, "index", child, parent))
            array[rows] = units * m // n


def shuffled(units: np.ndarray, n: int, key: int) -> np.ndarray:
    """Images of `units` under a keyed permutation of 0..n-1, without holding it: a Feistel network with cycle walking."""
    half = max(1, math.ceil(math.log2(max(n, 2)) / 2))
    mask = (1 << half) - 1
    out = np.asarray(units, dtype=np.int64).copy()
    todo = np.ones(len(out), dtype=bool)
    while todo.any():
        left, right = out[todo] >> half, out[todo] & mask
        for step in range(4):
            noise = (rng.uniform(key + step & 0xFFFFFFFFFFFFFFFF, right) * (mask + 1)).astype(np.int64)
            left, right = right, left ^ noise
        out[todo] = (left << half) | right
        todo &= out >= n
    return out


def _write_variable(design: Design, sink: Sink, v: VariableLike, seed: int, dtype: np.dtype[Any]) -> None:
    plates = tuple(design.cardinality[p] for p in v.plates)
    event = tuple(design.events[d] for d in v.dims)
    source = design.given.get(v.name)
    attrs = {} if source is None else {k: x for k, x in source.attrs.items() if isinstance(x, (str, int, float, bool))}
    if v.kind == "covariate" and source is None:
        attrs["simulated"] = "standard normal"
    array = sink.create(v.name, v.plates + v.dims, plates + event, dtype, attrs, latent=v.kind == "latent")
    lengths = block_lengths(plates, math.prod(event))
    for region in sink.regions(v.name, lengths):
        if source is not None:
            array[region] = source.isel(dict(zip(v.plates, region, strict=True))).values.astype(dtype)
            continue
        shape = tuple(r.stop - r.start for r in region)
        buffer = np.empty(shape + event, dtype=dtype)
        parents = {p: _Parent(design, sink, design.model.variables[p], v, region) for p in v.parents}
        for corner, block in _covering(plates, lengths, region):
            full = tuple(b.stop - b.start for b in block)
            above = {p: parent.rows(block) for p, parent in parents.items()}
            with precision(torch.float64 if dtype.itemsize == 8 else torch.float32), seeded(rng.stream(seed, v.name, *corner)):
                values = (torch.randn(full + event) if v.law is None else draw(v, above, full, event)).numpy()
            inside = tuple(slice(max(b.start, r.start), min(b.stop, r.stop)) for b, r in zip(block, region, strict=True))
            kept = values[tuple(slice(i.start - b.start, i.stop - b.start) for i, b in zip(inside, block, strict=True))]
            _check_finite(v, kept, inside)
            buffer[tuple(slice(i.start - r.start, i.stop - r.start) for i, r in zip(inside, region, strict=True))] = kept
        array[region if region else ...] = buffer


def _covering(plates: Sequence[int], lengths: Sequence[int], region: Sequence[slice]) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """Number and extent of every whole logical block that meets `region`."""
    first = [r.start // c for r, c in zip(region, lengths, strict=True)]
    count = [-(-r.stop // c) - f for r, c, f in zip(region, lengths, first, strict=True)]
    for offset in np.ndindex(*count):
        corner = tuple(f + o for f, o in zip(first, offset, strict=True))
        yield corner, tuple(slice(i * c, min((i + 1) * c, n)) for i, c, n in zip(corner, lengths, plates, strict=True))


def _check_finite(v: VariableLike, values: np.ndarray, where: Sequence[slice]) -> None:
    if not np.isfinite(values).all():
        bad = np.argwhere(~np.isfinite(values))[0]
        place = {p: int(w.start + i) for p, w, i in zip(v.plates, where, bad[: len(v.plates)], strict=True)}
        raise NumericalError(
            "a simulated value is not finite",
            where=f"variable {v.name!r} at {place}",
            expected="finite",
            got=float(values[tuple(bad)]),
            remedy="check the law's scale; heavy-tailed priors can overflow float32: use dtype='float64'",
        )


class _Parent:
    """Rows of one parent that a region of a child reads: raw rows are read once, then gathered block by block.

    Blocks that stick out of the region (storage chunks not aligned with blocks) are covered too: the region is widened to whole blocks.
    """

    def __init__(self, design: Design, sink: Sink, parent: VariableLike, child: VariableLike, region: Sequence[slice]) -> None:
        plates = tuple(design.cardinality[p] for p in child.plates)
        lengths = block_lengths(plates, math.prod(design.events[d] for d in child.dims))
        starts = [r.start // c * c for r, c in zip(region, lengths, strict=True)]
        stops = [min(-(-r.stop // c) * c, n) for r, c, n in zip(region, lengths, plates, strict=True)]
        self.starts = starts
        self.target = [_axis(design, child, p) for p in parent.plates]
        self.exact = [child.plates[a] == p for a, p in zip(self.target, parent.plates, strict=True)]
        rows: list[Axis] = []
        self.inverse: list[np.ndarray] = []
        for p, a in zip(parent.plates, self.target, strict=True):
            positions = _path(design, sink, child.plates[a], p, np.arange(starts[a], stops[a]))
            axis, inverse = window(positions)
            rows.append(axis)
            self.inverse.append(inverse)
        self.values = sink.read(parent.name, rows)

    def rows(self, block: Sequence[slice]) -> tuple[torch.Tensor, tuple[int, ...]]:
        """The parent's values aligned with a block: axes of the child that the parent reaches, then event dimensions."""
        axes = tuple(sorted(set(self.target)))
        local = [slice(block[a].start - self.starts[a], block[a].stop - self.starts[a]) for a in self.target]
        if all(self.exact):
            order = sorted(range(len(self.target)), key=lambda i: self.target[i])
            values = self.values[tuple(local)].transpose(*order, *range(len(order), self.values.ndim))
        else:
            index = [inv[s].reshape([-1 if a == b else 1 for b in axes]) for inv, s, a in zip(self.inverse, local, self.target, strict=True)]
            values = self.values[tuple(index)]
        return torch.from_numpy(np.asarray(values, order="C")), axes


def _axis(design: Design, child: VariableLike, plate: str) -> int:
    if plate in child.plates:
        return child.plates.index(plate)
    return next(a for a, p in enumerate(child.plates) if plate in ancestors(design.model.plates, p))


def _path(design: Design, sink: Sink, child: str, ancestor: str, units: np.ndarray) -> np.ndarray:
    """Positions in `ancestor` of `units` of `child`, through the plates between."""
    if child == ancestor:
        return units
    within = design.model.plates[child].within
    step = ancestor if ancestor in within else next(p for p in within if ancestor in ancestors(design.model.plates, p))
    rows, inverse = window(units)
    return _path(design, sink, step, ancestor, sink.read(design.index[child, step], [rows])[inverse])


def window(positions: np.ndarray) -> tuple[Axis, np.ndarray]:
    """Rows to read so that `read[inverse]` are those at `positions`: one range where that is not wasteful, else each row once."""
    if not len(positions):
        return slice(0, 0), positions
    low, high = int(positions.min()), int(positions.max()) + 1
    if high - low <= max(2 * len(positions), _WINDOW):
        return slice(low, high), positions - low
    return np.unique(positions, return_inverse=True)
