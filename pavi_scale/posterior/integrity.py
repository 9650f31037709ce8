"""Completeness of a stored posterior: every chunk written, then sealed by a manifest."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import zarr

from pavi_scale.digests import MANIFEST, POSTERIOR
from pavi_scale.errors import RunError

__all__ = ["MANIFEST", "expected_chunks", "missing_chunks", "read_manifest", "verify", "write_manifest"]


def expected_chunks(array: zarr.Array[Any]) -> list[str]:
    """Keys of all chunk (or shard) files of an array, relative to the array."""
    unit = array.shards or array.chunks
    counts = [-(-size // step) for size, step in zip(array.shape, unit, strict=True)]
    return ["/".join(["c", *map(str, index)]) for index in itertools.product(*(range(n) for n in counts))]


def missing_chunks(store: Path) -> list[str]:
    """Paths, relative to the store, of chunk files that should be there and are not."""
    root = zarr.open_group(store, mode="r", use_consolidated=False)
    missing = []
    for name, member in root.members(max_depth=None):
        if isinstance(member, zarr.Array) and prod(member.shape) > 0:
            missing += [f"{name}/{key}" for key in expected_chunks(member) if not (store / name / key).is_file()]
    return missing


def write_manifest(store: Path, attributes: Mapping[str, Any]) -> None:
    """Force every file of the store to disk and record its size and CRC-32.

    Raises:
        RunError: A chunk was never written, or the disk fails.
    """
    if missing := missing_chunks(store):
        raise RunError(
            "the posterior is incomplete",
            where=store,
            expected="every chunk written",
            got=f"{len(missing)} missing, first {missing[:3]}",
            remedy="resume the run",
        )
    POSTERIOR.write(store, attributes)


def read_manifest(store: Path) -> dict[str, Any]:
    """The manifest of a complete posterior.

    Raises:
        RunError: There is none (the posterior is not complete), it is damaged, or its format is unknown.
    """
    return POSTERIOR.read(store)


def verify(store: Path, *, content: bool = True) -> int:
    """Compare the store with its manifest; returns the number of files.

    Args:
        store: The Zarr store.
        content: Read every file; otherwise sizes, plus the content of all metadata.

    Raises:
        RunError: A file is missing, of another size, damaged, a symbolic link, or not listed. The message names the first ones.
    """
    return POSTERIOR.verify(store, content=content)
