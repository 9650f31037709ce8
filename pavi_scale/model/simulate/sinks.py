"""Where simulated variables live: NumPy arrays, or arrays of a Zarr store in fixed chunks."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from pavi_scale.errors import InputError
from pavi_scale.model.simulate.batched import blocks
from pavi_scale.model.simulate.design import Design

BLOCK = 1 << 19  # elements of a logical block; 2 MB in float32. Changing it changes every simulated number.
_CHUNK = 16 << 20  # bytes of a storage chunk, by default
_RESIDENT = 32 << 20  # bytes up to which a stored variable is kept in memory while others read it

Axis = np.ndarray | slice


class Array(Protocol):
    """What NumPy and Zarr arrays share here."""

    shape: tuple[int, ...]

    def __setitem__(self, key: Any, value: Any) -> None: ...


class Sink(Protocol):
    """Where simulated variables go to, and are read back from."""

    def create(self, name: str, dims: tuple[str, ...], shape: tuple[int, ...], dtype: np.dtype[Any], attrs: Mapping[str, Any], latent: bool) -> Array:
        """A new array; what is assigned to its slices is kept."""

    def regions(self, name: str, lengths: Sequence[int]) -> Iterator[tuple[slice, ...]]:
        """Parts along the plates to be written one by one, given the lengths of logical blocks."""

    def read(self, name: str, rows: Sequence[Axis]) -> np.ndarray:
        """Rows of the leading axes, outer-indexed."""


class Memory:
    """Variables as NumPy arrays; a region is the whole variable."""

    def __init__(self) -> None:
        self.held: dict[str, tuple[tuple[str, ...], np.ndarray, dict[str, Any]]] = {}

    def create(self, name: str, dims: tuple[str, ...], shape: tuple[int, ...], dtype: np.dtype[Any], attrs: Mapping[str, Any], latent: bool) -> Array:
        """As `Sink.create`."""
        self.held[name] = dims, np.empty(shape, dtype=dtype), dict(attrs)
        return self.held[name][1]

    def regions(self, name: str, lengths: Sequence[int]) -> Iterator[tuple[slice, ...]]:
        """As `Sink.regions`."""
        yield tuple(slice(0, n) for n in self.held[name][1].shape[: len(lengths)])

    def read(self, name: str, rows: Sequence[Axis]) -> np.ndarray:
        """As `Sink.read`."""
        return _outer(self.held[name][1], rows)


class Stored:
    """Variables as arrays of a Zarr store; a region is one or more whole chunks, about one logical block at least."""

    def __init__(self, root: zarr.Group, truth: zarr.Group, chunks: Mapping[str, Mapping[str, int]]) -> None:
        self.root, self.truth, self.chunks = root, truth, chunks
        self.arrays: dict[str, zarr.Array[Any]] = {}
        self.resident: dict[str, np.ndarray] = {}

    def create(self, name: str, dims: tuple[str, ...], shape: tuple[int, ...], dtype: np.dtype[Any], attrs: Mapping[str, Any], latent: bool) -> Array:
        """As `Sink.create`."""
        group = self.truth if latent else self.root
        lengths = tuple(self.chunks[name][d] for d in dims)
        fill = -1 if dtype.kind == "i" else math.nan  # never a plausible value: a lost chunk must not look like data
        self.arrays[name] = group.create_array(
            name, shape=shape, chunks=lengths, dtype=dtype, compressors=[Crc32cCodec()], fill_value=fill, dimension_names=dims, attributes=dict(attrs)
        )
        return self.arrays[name]

    def regions(self, name: str, lengths: Sequence[int]) -> Iterator[tuple[slice, ...]]:
        """As `Sink.regions`."""
        array = self.arrays[name]
        whole = [c * max(1, -(-b // c)) for b, c in zip(lengths, array.chunks, strict=False)]
        yield from blocks(array.shape[: len(lengths)], whole)

    def read(self, name: str, rows: Sequence[Axis]) -> np.ndarray:
        """As `Sink.read`."""
        array = self.arrays[name]
        if array.nbytes <= _RESIDENT:
            if name not in self.resident:
                self.resident[name] = np.asarray(array[...])
            return _outer(self.resident[name], rows)
        return np.asarray(array.oindex[tuple(rows)])


def _outer(values: np.ndarray, rows: Sequence[Axis]) -> np.ndarray:
    for axis, row in enumerate(rows):
        values = values[(slice(None),) * axis + (row,)]
    return values


def open_new(target: Any, overwrite: bool) -> zarr.Group:
    """A new root group.

    Raises:
        InputError: The store holds data already.
    """
    try:
        return zarr.open_group(target, mode="w" if overwrite else "w-", zarr_format=3)
    except FileExistsError as error:
        with contextlib.suppress(FileNotFoundError, ValueError):
            about = zarr.open_group(target, mode="r").attrs.get("pavi_simulation")
            if isinstance(about, dict) and about.get("complete") is False:
                return zarr.open_group(target, mode="w", zarr_format=3)
        raise InputError("the store already holds data", where=f"store {target}", remedy="choose another path, or pass overwrite=True") from error


def chunk_lengths(design: Design, asked: Mapping[str, int], itemsize: int) -> dict[str, dict[str, int]]:
    """Chunk lengths of every variable: shared along each plate, so that chunks of children and parents line up."""
    for name, length in asked.items():
        if name not in design.cardinality and name not in design.events:
            raise InputError("chunk length for an unknown dimension", where=f"chunks[{name!r}]", expected=f"one of {[*design.cardinality, *design.events]}")
        if isinstance(length, bool) or not isinstance(length, (int, np.integer)) or length < 1:
            raise InputError("a chunk length is a positive integer", where=f"chunks[{name!r}]", got=repr(length))
    size = {**design.cardinality, **design.events}
    shapes = {v.name: v.plates + v.dims for v in design.model.variables.values()}
    shared: dict[str, int] = {}
    for v in sorted(design.model.variables.values(), key=lambda v: -math.prod(size[d] for d in shapes[v.name])):
        room = max(1, _CHUNK // (itemsize * math.prod(size[d] for d in v.dims)))
        for plate in reversed(v.plates):
            length = asked.get(plate, shared.setdefault(plate, max(1, min(size[plate], room))))
            room = max(1, room // min(length, size[plate]))
    out: dict[str, dict[str, int]] = {}
    for name, dims in {**shapes, **{index: (child,) for (child, _), index in design.index.items()}}.items():
        small = math.prod(size[d] for d in dims) * itemsize <= _CHUNK
        default = {d: size[d] if small else shared.get(d, size[d]) for d in dims}
        out[name] = {d: max(1, min(asked.get(d, default[d]), size[d])) for d in dims}
    for (child, _), index in design.index.items():
        out[index] = {child: min(max(out[index][child], min(BLOCK, size[child])), size[child]) if child not in asked else out[index][child]}
    return out
