"""Digest manifests: size and CRC-32 of every file of a directory, forced to disk and written last.

A store that has one is whole: a missing, added, truncated or flipped file, or a symbolic link, is found by comparing.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pavi_scale.durable import disk_errors, replace_bytes, seal, sync_directory, sync_file, unseal
from pavi_scale.errors import CohortError, InputError, RunError

MANIFEST = "manifest.json"
_READERS = 4  # zlib and fsync release the GIL


def crc(path: Path) -> int:
    """CRC-32 of a file, read in blocks."""
    total = 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            total = zlib.crc32(block, total)
    return total


def tree(store: Path, manifest: Path) -> tuple[list[str], list[Path], list[str]]:
    """Files (relative, without the manifest), directories, and whatever is neither (relative): links are named, not followed."""
    files, directories, others = [], [store], []
    pending = [store]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                name = Path(entry.path).relative_to(store).as_posix()
                if entry.is_dir(follow_symlinks=False):
                    pending.append(Path(entry.path))
                    directories.append(Path(entry.path))
                elif not entry.is_file(follow_symlinks=False):
                    others.append(name)
                elif store / name != manifest:
                    files.append(name)
    return sorted(files), directories, sorted(others)


@dataclass(frozen=True)
class Manifest:
    """How stores of one kind are sealed and verified.

    Args:
        format: Name of the format, in the manifest.
        version: Version of the format.
        what: The kind of store, in words.
        error: What is raised.
        remedy: What to do about damage.
        within: Whether the manifest lies within the first array: Zarr warns of strange files in its groups, which users list.
    """

    format: str
    version: int
    what: str
    error: type[InputError]
    remedy: str
    within: bool = False

    def path(self, store: Path) -> Path:
        """Where the manifest of a store lies."""
        if self.within and store.is_dir():
            for child in sorted(store.iterdir()):
                if (child / "c").exists() and (child / "zarr.json").is_file():
                    return child / MANIFEST
        return store / MANIFEST

    def write(self, store: Path, attributes: Mapping[str, Any]) -> None:
        """Force every file and directory of the store to disk, then record sizes and checksums.

        Raises:
            RunError: The disk fails, or there is a link in the store.
        """
        with disk_errors(f"the manifest of {self.what} cannot be written", store):
            names, directories, others = tree(store, self.path(store))
            if others:
                got = f"{others[0]} is a link or a special file"
                raise RunError("a store holds plain files", where=store, got=got, remedy="replace it by what it leads to")

            def entry(name: str) -> tuple[str, list[int]]:
                sync_file(store / name)
                return name, [(store / name).stat().st_size, crc(store / name)]

            with ThreadPoolExecutor(_READERS) as pool:
                files = dict(pool.map(entry, names))
            total = sum(size for size, _ in files.values())
            document = {
                "format": self.format, "version": self.version, "files": files, "count": len(files), "bytes": total, "attributes": dict(attributes),
            }
            for directory in directories:
                sync_directory(directory)
            replace_bytes(self.path(store), seal(document, where=self.path(store)))

    def read(self, store: Path) -> dict[str, Any]:
        """The manifest of a complete store.

        Raises:
            InputError: (of the kind's own type) There is none, it is damaged, or its format is unknown.
        """
        path = self.path(store)
        if path.is_symlink() or not path.is_file():
            raise self.error(f"there is no complete {self.what}", where=store, expected=MANIFEST, got="nothing", remedy=self.remedy)
        try:
            with disk_errors(f"the manifest of {self.what} cannot be read", store):
                document = unseal(path.read_bytes(), where=path)
        except RunError as error:
            raise self.error(error.what, where=error.where, expected=error.expected, got=error.got, remedy=self.remedy) from error
        found = f"{document.get('format')} {document.get('version')}"
        if found != f"{self.format} {self.version}":
            what = f"the {self.what} has a format that this version does not read"
            raise self.error(what, where=path, expected=f"{self.format} {self.version}", got=found)
        if not _well_formed(document.get("files")):
            raise self.error(f"the manifest of the {self.what} is not one", where=path, expected="size and CRC-32 of each file", remedy=self.remedy)
        return document

    def verify(self, store: Path, *, content: bool = True) -> int:
        """Compare the store with its manifest; returns the number of files.

        Args:
            store: The Zarr store.
            content: Read every file; otherwise sizes, plus the content of all metadata.

        Raises:
            InputError: (of the kind's own type) A file is missing, of another size, damaged, a link, or not listed. The message names the first ones.
        """
        files: dict[str, list[int]] = self.read(store)["files"]
        try:
            with disk_errors(f"the {self.what} cannot be read", store):
                faults = _faults(store, self.path(store), files, content)
        except RunError as error:
            raise self.error(error.what, where=error.where, got=error.got, remedy=error.remedy) from error
        if faults:
            got = "; ".join(faults[:3]) + (f"; and {len(faults) - 3} more" if len(faults) > 3 else "")
            raise self.error(f"the {self.what} is damaged", where=store, got=got, remedy=self.remedy)
        return len(files)


def _well_formed(files: object) -> bool:
    return isinstance(files, dict) and all(isinstance(v, list) and len(v) == 2 and all(type(n) is int for n in v) for v in files.values())


def _faults(store: Path, manifest: Path, files: Mapping[str, list[int]], content: bool) -> list[str]:
    names, _, others = tree(store, manifest)
    there = set(names)

    def fault(item: tuple[str, list[int]]) -> str | None:
        name, (size, wanted) = item
        if name not in there:
            return None if name in others else f"{name} is missing"
        path = store / name
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if (content or path.name == "zarr.json") and crc(path) != wanted:
            return f"{name} differs from its checksum"
        return None

    with ThreadPoolExecutor(_READERS) as pool:
        faults = [f for f in pool.map(fault, files.items()) if f]
    return [*(f"{name} leaves the store: it is a link or a special file" for name in others), *faults,
            *(f"{name} is not in the manifest" for name in sorted(there - set(files)))]


POSTERIOR = Manifest(
    "pavi-scale-posterior", 1, "stored posterior", RunError, "run the posterior again from the run's weights (resume)",
)
COHORT = Manifest(
    "pavi-scale-cohort", 1, "cohort", CohortError, 
    f"restore it or write it again; if it was changed on purpose, remove {MANIFEST} and the root's attribute 'pavi_simulation'",
    within=True,
)
