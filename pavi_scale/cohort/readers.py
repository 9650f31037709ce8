"""Readers: one way to read a block of an array, wherever it lies (memory, dask, Zarr)."""

from __future__ import annotations

import itertools
import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from zarr import Array as ZarrArrayType
from zarr.core.sync import sync
from zarr.storage import LocalStore

from pavi_scale.cohort.plain import plain, read_plain
from pavi_scale.errors import CohortError

if TYPE_CHECKING:
    import xarray as xr

try:
    from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped]

    _REMOTE_ERRORS: tuple[type[Exception], ...] = (BotoCoreError, ClientError)
except ImportError:  # s3 is optional
    _REMOTE_ERRORS = ()

# What zarr, its codecs, fsspec, xarray and pandas raise for a store that is absent, denied, torn or not understood.
STORE_ERRORS: tuple[type[Exception], ...] = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    RuntimeError,
    ArithmeticError,
    ImportError,
    MemoryError,
    SystemError,
    *_REMOTE_ERRORS,
)
EMPTY_OK = "_empty_chunks_ok"
_RUN = 64
MOST_AHEAD = 4096  # chunks that are fetched ahead at once
_ROW_BYTES = 64 << 20  # of a row of chunks that may be kept

Index = slice | np.ndarray
ZarrArray = ZarrArrayType[Any]
Block = tuple[slice, ...]


class Tally:
    """What this process has read of cohorts: seconds of its threads, and those of them that they waited; bytes handed out; bytes of their chunks."""

    def __init__(self) -> None:
        self.seconds, self.waited, self.nbytes, self.decoded = 0.0, 0.0, 0, 0
        self._lock = threading.Lock()

    def add(self, *, seconds: float = 0.0, waited: float = 0.0, nbytes: int = 0, decoded: int = 0) -> None:
        """Account for one read; who waits is without a processor."""
        with self._lock:
            self.seconds += seconds
            self.waited += waited
            self.nbytes += nbytes
            self.decoded += decoded

    def so_far(self) -> tuple[float, float, int, int]:
        """Seconds, those waited, bytes, bytes of chunks."""
        with self._lock:
            return self.seconds, self.waited, self.nbytes, self.decoded


READ = Tally()


class Reader(Protocol):
    """An array with its axes in the model's order."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape, axes in the model's order."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of what `read` returns, up to byte order."""
        ...

    @property
    def chunks(self) -> tuple[int, ...] | None:
        """Length of a chunk (of a shard, in sharded arrays) along each axis, or None."""
        ...

    def read(self, index: Sequence[Index]) -> np.ndarray:
        """The orthogonal selection `index`, one entry per axis, in native byte order."""
        ...

    def absent(self) -> Iterator[Block]:
        """Blocks of the array for which the store holds nothing."""
        ...


def as_index(positions: np.ndarray) -> Index:
    """A slice when the positions are consecutive, else the positions themselves.

    Example:
        >>> as_index(np.array([3, 4, 5]))
        slice(3, 6, None)
    """
    if len(positions) == 0:
        return slice(0, 0)
    first, last = int(positions[0]), int(positions[-1])
    if last - first + 1 == len(positions) and (len(positions) == 1 or bool((np.diff(positions) == 1).all())):
        return slice(first, last + 1)
    return positions


def _hull(index: Index, size: int) -> tuple[int, int]:
    """First position and one past the last."""
    if isinstance(index, slice):
        start, stop, _ = index.indices(size)
        return start, stop
    return (int(index.min()), int(index.max()) + 1) if len(index) else (0, 0)


def _shareable(values: np.ndarray) -> np.ndarray:
    """Values as torch can share them: in native byte order, and not backwards."""
    if not values.dtype.isnative:
        return values.astype(values.dtype.newbyteorder("="))
    return values.copy() if any(step < 0 for step in values.strides) else values


@dataclass(frozen=True)
class MemoryReader:
    """A NumPy array."""

    values: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape, axes in the model's order."""
        return self.values.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of what `read` returns, up to byte order."""
        return self.values.dtype

    @property
    def chunks(self) -> None:
        """Length of a chunk or shard along each axis, or None."""
        return None

    def read(self, index: Sequence[Index]) -> np.ndarray:
        """The orthogonal selection `index`."""
        out = self.values[tuple(i if isinstance(i, slice) else slice(None) for i in index)]
        for axis, i in enumerate(index):
            if not isinstance(i, slice):
                out = np.take(out, i, axis=axis)
        return _shareable(out)

    def absent(self) -> Iterator[Block]:
        """Blocks that the store lacks."""
        return iter(())


@dataclass(frozen=True)
class LazyReader:
    """An xarray variable that is computed or decoded on reading (dask, netCDF, packed Zarr arrays)."""

    variable: xr.Variable
    stored: ZarrReader | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape, axes in the model's order."""
        return self.variable.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of what `read` returns, up to byte order."""
        return self.variable.dtype  # type: ignore[no-any-return]

    @property
    def chunks(self) -> tuple[int, ...] | None:
        """Length of a chunk or shard along each axis, or None."""
        if self.stored is not None:
            return self.stored.chunks
        if self.variable.chunks is not None:
            return tuple(max(c, default=1) for c in self.variable.chunks)
        preferred = self.variable.encoding.get("preferred_chunks")
        return tuple(int(preferred.get(d, n)) for d, n in zip(self.variable.dims, self.shape, strict=True)) if isinstance(preferred, Mapping) else None

    def read(self, index: Sequence[Index]) -> np.ndarray:
        """The orthogonal selection `index`."""
        return _shareable(np.asarray(self.variable[tuple(index)].values))

    def absent(self) -> Iterator[Block]:
        """Blocks that the store lacks."""
        return iter(()) if self.stored is None else self.stored.absent()


@dataclass(frozen=True)
class ZarrReader:
    """A Zarr array, read directly.

    Args:
        array: The array.
        order: `order[i]` is the array's axis that holds the model's axis i.
        row: The row of chunks decoded last, by (axis, start).
        lock: Held while a row is decoded.
    """

    array: ZarrArray
    order: tuple[int, ...]
    row: dict[tuple[int, int], np.ndarray] = field(default_factory=dict, compare=False, repr=False)
    lock: threading.Lock = field(default_factory=threading.Lock, compare=False, repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape, axes in the model's order."""
        return tuple(self.array.shape[a] for a in self.order)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of what `read` returns, up to byte order."""
        return np.dtype(self.array.dtype)

    @property
    def chunks(self) -> tuple[int, ...]:
        """Length of a chunk or shard along each axis, or None."""
        return tuple(self._grid[a] for a in self.order)

    @property
    def _grid(self) -> tuple[int, ...]:
        return self.array.shards or self.array.chunks

    @cached_property
    def _plain(self) -> bool:
        return plain(self.array)

    def read(self, index: Sequence[Index]) -> np.ndarray:
        """The orthogonal selection `index`."""
        # Remote stores keep the single call: it fetches all chunks at the same time.
        if isinstance(self.array.store, LocalStore):
            for axis, i in enumerate(index):
                row = i // self.chunks[axis] if isinstance(i, np.ndarray) and len(i) else None
                cuts = np.flatnonzero(np.diff(row)) + 1 if row is not None else ()
                if len(cuts) and (len(cuts) + 1) * _RUN <= len(i):  # type: ignore[arg-type]
                    # Runs of neighbours (block shuffle): a plain read from each row of chunks is 2-3 times as fast as Zarr's fancy indexing.
                    parts = [self.read([*index[:axis], as_index(part), *index[axis + 1 :]]) for part in np.split(i, cuts)]  # type: ignore[arg-type]
                    return np.concatenate(parts, axis=axis)
            return self._from_row(index)
        return self._read(index)

    def _from_row(self, index: Sequence[Index]) -> np.ndarray:
        """A part of one row of chunks: the row is decoded whole, as Zarr must, and kept until another is asked for."""
        spans = [_hull(i, n) for i, n in zip(index, self.shape, strict=True)]
        partial = [axis for axis, (i, span, n) in enumerate(zip(index, spans, self.shape, strict=True)) if not isinstance(i, slice) or span != (0, n)]
        if len(partial) != 1 or spans[partial[0]][0] == spans[partial[0]][1]:
            return self._read(index)
        (axis,) = partial
        (low, high), chunk = spans[axis], self.chunks[axis]
        row = slice(low // chunk * chunk, min((low // chunk + 1) * chunk, self.shape[axis]))
        size = (row.stop - row.start) * math.prod(n for a, n in enumerate(self.shape) if a != axis) * self.dtype.itemsize
        if high > row.stop or high - low == row.stop - row.start or size > _ROW_BYTES:
            return self._read(index)
        key = axis, row.start
        with self.lock:  # threads that want the same row decode it once
            if key not in self.row:
                self.row.clear()
                self.row[key] = self._read([row if a == axis else slice(None) for a in range(len(self.shape))])
            values = self.row[key]
        i = index[axis]
        within: Index = slice(low - row.start, high - row.start) if isinstance(i, slice) else np.asarray(i) - row.start
        return MemoryReader(values).read([within if a == axis else slice(None) for a in range(len(self.shape))])

    def _read(self, index: Sequence[Index]) -> np.ndarray:
        stored: list[Index] = [slice(None)] * len(self.order)
        later: list[Index] = [slice(None)] * len(self.order)
        for axis, i in zip(self.order, index, strict=True):
            stored[axis] = i
            if isinstance(i, np.ndarray):
                low, high = int(i.min()), int(i.max()) + 1
                # Zarr decodes whole chunks anyway, and its fancy indexing is slow: read the hull when it is at most twice too large.
                if high - low <= 2 * len(i):
                    stored[axis], later[axis] = slice(low, high), i - low
        READ.add(decoded=self._chunk_bytes(stored))
        if any(isinstance(i, np.ndarray) for i in stored):
            raw: Any = self.array.oindex[tuple(stored)]
        elif self._plain:
            raw = read_plain(self.array, [_hull(i, n) for i, n in zip(stored, self.array.shape, strict=True)])
        else:
            raw = self.array[tuple(stored)]
        return MemoryReader(np.asarray(raw)).read(later).transpose(self.order)

    def _chunk_bytes(self, stored: Sequence[Index]) -> int:
        """Bytes of the chunks that a selection lies in."""
        touched = 1
        for i, c, n in zip(stored, self._grid, self.array.shape, strict=True):
            low, high = _hull(i, n)
            touched *= c * (len(np.unique(i // c)) if isinstance(i, np.ndarray) else -(-high // c) - low // c if high > low else 0)
        return touched * self.dtype.itemsize

    def will_need(self, index: Sequence[Index], aside: bool = True, through: bool = False) -> None:
        """Have the operating system fetch the chunks of a selection into its cache; does nothing for stores that are no local folder.

        Args:
            index: The selection.
            aside: Whether to return at once, or when the disk has been asked for all: it takes so many requests at a time.
            through: Whether they are read, too: the system may forget a request, and pages that nobody has touched are slow to read.
        """
        if not isinstance(self.array.store, LocalStore) or not hasattr(os, "posix_fadvise"):
            return
        at: list[np.ndarray] = [np.zeros(0)] * len(self.order)
        for axis, i, n in zip(self.order, index, self.shape, strict=True):
            chunk, positions = self._grid[axis], np.arange(*i.indices(n)) if isinstance(i, slice) else i
            at[axis] = np.unique(positions // chunk)
        if math.prod(len(a) for a in at) > MOST_AHEAD:
            return
        keys = [self.array.metadata.encode_chunk_key(tuple(map(int, place))) for place in itertools.product(*at)]
        files = [Path(self.array.store.root, self.array.path, key) for key in keys]
        if aside:
            threading.Thread(target=_fetch, args=(files, through), name="pavi-ahead", daemon=True).start()
        else:
            _fetch(files, through)

    def absent(self) -> Iterator[Block]:
        """Blocks that the store lacks."""
        if self.array.attrs.get(EMPTY_OK):
            return
        grid, shape = self._grid, self.array.shape
        present = sync(_keys(self.array))
        prefix = f"{self.array.path}/" if self.array.path else ""
        counts = [math.ceil(n / c) for n, c in zip(shape, grid, strict=True)]
        for at in itertools.product(*(range(n) for n in counts)):
            if prefix + self.array.metadata.encode_chunk_key(at) not in present:
                block = [slice(k * c, min((k + 1) * c, n)) for k, c, n in zip(at, grid, shape, strict=True)]
                yield tuple(block[a] for a in self.order)


def _fetch(files: Sequence[Path], through: bool) -> None:
    buffer = bytearray(through << 20)

    def ask(handle: int) -> None:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_WILLNEED)

    def read(handle: int) -> None:
        while os.readv(handle, [buffer]):
            pass

    for act in (ask, read) if through else (ask,):  # all are asked for before one is waited for
        for file in files:
            with suppress(OSError):  # whoever reads it will say what is wrong
                handle = os.open(file, os.O_RDONLY)
                try:
                    act(handle)
                finally:
                    os.close(handle)


async def _keys(array: ZarrArray) -> set[str]:
    return {key async for key in array.store.list_prefix(array.path)}


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Turn errors of the store into `CohortError`."""
    try:
        yield
    except CohortError:
        raise
    except STORE_ERRORS as error:
        got = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise CohortError("cohort data cannot be read", where=where, got=got, remedy="the store is damaged or unreachable: restore or rewrite it") from error
