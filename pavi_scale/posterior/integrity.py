"""Checksums and completeness of a stored posterior: the manifest and its verification."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

import zarr

from pavi_scale.durable import disk_errors, seal, sync_directory, sync_file, unseal, write_bytes
from pavi_scale.errors import RunError

MANIFEST = "manifest.json"
FORMAT = "pavi-scale-posterior"
VERSION = 1


def _crc(path: Path) -> int:
    total = 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            total = zlib.crc32(block, total)
    return total


def _files(store: Path) -> Iterator[Path]:
    return (p for p in store.rglob("*") if p.is_file() and p != store / MANIFEST)


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
    with disk_errors("the posterior's manifest cannot be written", store):
        paths = sorted(_files(store))

        def entry(path: Path) -> tuple[str, list[int]]:
            sync_file(path)
            return path.relative_to(store).as_posix(), [path.stat().st_size, _crc(path)]

        with ThreadPoolExecutor(4) as pool:  # zlib and fsync release the GIL
            files = dict(pool.map(entry, paths))
        total = sum(size for size, _ in files.values())
        document = {"format": FORMAT, "version": VERSION, "files": files, "count": len(files), "bytes": total, "attributes": dict(attributes)}
        for directory in {p.parent for p in paths}:
            sync_directory(directory)
        write_bytes(store / MANIFEST, seal(document, where=store / MANIFEST))
        sync_directory(store)


def read_manifest(store: Path) -> dict[str, Any]:
    """The manifest of a complete posterior.

    Raises:
        RunError: There is none (the posterior is not complete), it is damaged, or its format is unknown.
    """
    path = store / MANIFEST
    if not path.is_file():
        raise RunError("there is no complete stored posterior", where=store, expected=MANIFEST, got="nothing", remedy="resume the run")
    with disk_errors("the posterior cannot be read", store):
        document = unseal(path.read_bytes(), where=path)
    if document.get("format") != FORMAT or document.get("version") != VERSION:
        raise RunError(
            "the stored posterior has a format that this version does not read",
            where=path,
            expected=f"{FORMAT} {VERSION}",
            got=f"{document.get('format')} {document.get('version')}",
        )
    return document


def verify(store: Path, *, content: bool = True) -> int:
    """Compare the store with its manifest; returns the number of files.

    Args:
        store: The Zarr store.
        content: Read every file; otherwise sizes, plus the content of all metadata.

    Raises:
        RunError: A file is missing, of another size, damaged, a symbolic link, or not listed. The message names the first ones.
    """
    files: dict[str, list[int]] = read_manifest(store)["files"]

    def fault(item: tuple[str, list[int]]) -> str | None:
        name, (size, crc) = item
        path = store / name
        if path.is_symlink() or ".." in Path(name).parts:
            return f"{name} leaves the store"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if (content or path.name == "zarr.json") and _crc(path) != crc:
            return f"{name} differs from its checksum"
        return None

    with disk_errors("the posterior cannot be read", store), ThreadPoolExecutor(4) as pool:
        faults = [f for f in pool.map(fault, files.items()) if f]
        faults += [f"{name} is not in the manifest" for name in sorted({p.relative_to(store).as_posix() for p in _files(store)} - set(files))]
    if faults:
        raise RunError(
            "the stored posterior is damaged",
            where=store,
            got="; ".join(faults[:3]) + (f"; and {len(faults) - 3} more" if len(faults) > 3 else ""),
            remedy="run the posterior again from the run's weights (resume)",
        )
    return len(files)
