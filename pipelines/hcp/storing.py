"""Stores built aside: arrays in checksummed chunks, room on the disk, what an interruption left, and the final name."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from pavi_scale.errors import PlanRefused, RunError

PARTIAL = ".partial"
_CHECKSUM = 4  # bytes that the codec adds to a chunk
_SPARE = 64 << 20  # bytes that directories and metadata of a large store take, at most


@dataclass(frozen=True)
class Files:
    """Where the chunks of an array lie and how long each is, known beforehand since they are not compressed.

    Args:
        name: Path of the array in the store.
        shape: Shape of the array.
        chunk: Shape of a chunk.
    """

    name: str
    shape: tuple[int, ...]
    chunk: tuple[int, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of chunks along each axis."""
        return tuple(-(-n // c) for n, c in zip(self.shape, self.chunk, strict=True))

    @property
    def bytes(self) -> int:
        """Length of a chunk's file."""
        return 4 * math.prod(self.chunk) + _CHECKSUM

    def written(self, store: Path, row: int) -> bool:
        """Whether every chunk of a row of the first axis is there in full; a file takes its name when it is whole."""
        paths = (store / self.name / "c" / "/".join(map(str, (row, *rest))) for rest in np.ndindex(*self.counts[1:]))
        return all(p.is_file() and p.stat().st_size == self.bytes for p in paths)


@dataclass(frozen=True)
class Block:
    """Lengths of chunks along the large plates; a row of chunks is written at once.

    Of chunks of one subject, a pass over shards of vertices spends half of its time on the files themselves; of many subjects, the map of a single
    one costs the reading of all. Of chunks of many vertices, a fit's small selections of vertices cost the reading of large ones.
    """

    subjects: int
    vertices: int

    def chunk(self, dims: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of a chunk: whole along the other dimensions."""
        lengths = {"subject": self.subjects, "vertex": self.vertices}
        return tuple(min(n, lengths.get(d, n)) for d, n in zip(dims, shape, strict=True))

    def files(self, name: str, dims: tuple[str, ...], shape: tuple[int, ...]) -> Files:
        """The files of an array."""
        return Files(name, shape, self.chunk(dims, shape))

    def parts(self, subjects: int) -> list[range]:
        """Subjects of each row of chunks."""
        return [range(start, min(start + self.subjects, subjects)) for start in range(0, subjects, self.subjects)]


BLOCK = Block(20, 128)


def file_bytes(files: Files, rows: int, of: int) -> int:
    """Bytes of `rows` of the `of` rows of chunks of an array."""
    return rows * math.prod(files.counts) // of * files.bytes


def check_free(path: Path, needed: int) -> None:
    """Refuse before anything is written what the disk has no room for.

    Raises:
        PlanRefused: Names the bytes needed and free.
    """
    there = next(p for p in (path.absolute(), *path.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(there).free
    needed += min(needed, _SPARE)
    if needed > free:
        raise PlanRefused(
            "the store does not fit on the disk", where=there, expected=f"{needed / 1e9:,.2f} GB free", got=f"{free / 1e9:,.2f} GB free",
            remedy="free space, choose a path on another disk, or a smaller size",
        )  # fmt: skip


def create_array(root: zarr.Group, name: str, shape: tuple[int, ...], dims: tuple[str, ...], chunks: tuple[int, ...], dtype: Any = "float32") -> Any:
    """An array of the store, made unless an interrupted call has made it."""
    if name in root:
        return root[name]
    # Not-a-number is never plausible data: a chunk that was lost does not go unnoticed. Chunks are always written, so nobody need compare them with it.
    return root.create_array(
        name, shape=shape, chunks=chunks, dtype=dtype, dimension_names=dims, compressors=[Crc32cCodec()],
        fill_value=np.nan if np.dtype(dtype).kind == "f" else -1, config={"write_empty_chunks": True},
    )  # fmt: skip


def expect(partial: Path, key: str, settings: Mapping[str, Any]) -> None:
    """Refuse to go on with a partial store that was begun with other settings.

    Raises:
        RunError: Names what differs.
    """
    if not (partial / "zarr.json").is_file():
        return
    begun = dict(zarr.open_group(partial, mode="r").attrs).get(key)
    remedy = f"repeat the call that began it, or delete {partial}"
    if not isinstance(begun, Mapping):
        raise RunError("a partial store of something else is in the way", where=partial, expected=f"attribute {key!r}", remedy=remedy)
    if differ := {k: (begun.get(k), v) for k, v in settings.items() if begun.get(k) != v}:
        raise RunError(
            "an interrupted store was begun with other settings", where=partial, expected={k: a for k, (a, _) in differ.items()},
            got={k: b for k, (_, b) in differ.items()}, remedy=remedy,
        )  # fmt: skip


def settle(partial: Path, path: Path) -> None:
    """Give a whole store its name.

    Its files are not forced to disk one by one: it can be made again, and what a power failure takes is noticed by the checksums.
    """
    os.rename(partial, path)


@contextlib.contextmanager
def storing(what: str, where: object) -> Iterator[None]:
    """Turn an `OSError` inside the block into a typed error."""
    try:
        yield
    except OSError as error:
        raise RunError(what, where=where, got=f"{type(error).__name__}: {error}", remedy="free space or check the path, then repeat the call") from error
