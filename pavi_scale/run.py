"""The run directory: generations of a fit's state, of which a crash leaves exactly the old or the new.

    run.json                      pointer: format, current generation, digest of each kept generation's manifest
    study.json                    model, cohort and configuration, with fingerprints
    generations/000003/           weights.safetensors, state.json, manifest.json (size and SHA-256 of both)
    events.jsonl                  log, one JSON object a line
    leases/000001.json            who may write (see `pavi_scale.lease`)
    posterior.zarr/               see `pavi_scale.posterior.store`

A generation is written under a temporary name, files and directory are forced to disk, it is renamed, and then the pointer is replaced.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from pavi_scale.durable import disk_errors, file_digest, make_directory, replace_bytes, seal, sync_directory, sync_file, unseal, write_bytes
from pavi_scale.errors import NumericalError, RunError
from pavi_scale.events import append, read
from pavi_scale.lease import Lease, acquire, guard, newest

FORMAT = "pavi-scale-run"
VERSION = 1
READABLE = (1,)
KEEP = 2
OWN_DIRECTORIES = ("generations", "posterior.zarr", "posterior.zarr.partial", "posterior.zarr.old", "cohort.zarr", "cohort.zarr.partial")
_FILES = ("weights.safetensors", "state.json")

# Directories of runs without a path; they live as long as the process.
_temporary: list[tempfile.TemporaryDirectory[str]] = []


def local_path(path: str | os.PathLike[str]) -> Path:
    """The local path that a run is given by.

    Raises:
        RunError: It is no path, or a URL of a remote store.
    """
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    if not isinstance(text, str):
        raise RunError("a run is named by its path", where="run", expected="a string or Path", got=repr(path)[:200])
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    elif re.match(r"^[A-Za-z][A-Za-z0-9+.-]*://", text):
        raise RunError(
            "a run lives in a local directory",
            where=f"run {text!r}",
            expected="a path",
            got="a URL",
            remedy="fit into a local path, then copy the directory (posterior.zarr opens from any store)",
        )
    if not text or "\0" in text:
        raise RunError("the run path is empty or not a path", where=f"run {text!r}", expected="a path")
    return Path(text).expanduser().absolute()


def is_run(path: object) -> bool:
    """Whether `path` is a directory whose `run.json` has our format key."""
    if not isinstance(path, (str, os.PathLike)):
        return False
    try:
        text = (local_path(path) / "run.json").read_bytes()
    except (OSError, RunError, TypeError):
        return False
    return FORMAT.encode() in text[:4096]


class Run:
    """One fit's directory on disk. Make it by `Run.create` or `Run.open`.

    Attributes:
        path: The absolute path.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lease: Lease | None = None

    @classmethod
    def create(cls, path: str | os.PathLike[str] | None = None, *, overwrite: bool = False) -> Run:
        """A new run; with `path=None` in a temporary directory that lives as long as the process.

        Raises:
            RunError: The path cannot be written, or holds a run with a committed generation (unless `overwrite`).
        """
        if path is None:
            keeper = tempfile.TemporaryDirectory(prefix="pavi-scale-", ignore_cleanup_errors=True)
            _temporary.append(keeper)
            path = keeper.name
        run = cls(local_path(path))
        with disk_errors("the run path cannot be written", run.path):
            make_directory(run.path)
            (run.path / "leases").mkdir(exist_ok=True)
            with guard(run.path / "leases"):  # a contender that takes the lease meanwhile would lose its files
                if (run.path / "run.json").exists():
                    run._retire(overwrite)
                (run.path / "generations").mkdir(exist_ok=True)
                run._point_nowhere()
        return run

    def _point_nowhere(self) -> None:
        replace_bytes(self.path / "run.json", seal({"format": FORMAT, "version": VERSION, "generation": None, "manifests": {}}, where=self.path))

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Run:
        """An existing run.

        Raises:
            RunError: There is no run, its pointer is damaged, or its format is not one that this version reads.
        """
        run = cls(local_path(path))
        run._pointer()
        return run

    def _retire(self, overwrite: bool) -> None:
        """Clear an earlier run out of the way, or refuse."""
        holder = newest(self.path / "leases")
        if holder is not None and holder.alive:
            raise RunError("another process is working on this run", where=self.path, got=holder, remedy="wait for it, stop it, or choose another run path")
        if not overwrite and self._pointer()["generation"] is not None:
            raise RunError(
                "the path holds a run already",
                where=self.path,
                got=f"generation {self.generation}",
                remedy="resume it, remove the directory, or choose another run path",
            )
        # The pointer goes first: a crash in between leaves a run that has not begun, which is cleared again; never one with another's files.
        self._point_nowhere()
        for name in OWN_DIRECTORIES:
            shutil.rmtree(self.path / name, ignore_errors=True)
        for name in ("study.json", "events.jsonl"):
            (self.path / name).unlink(missing_ok=True)
        sync_directory(self.path)

    def _pointer(self) -> dict[str, Any]:
        where = self.path / "run.json"
        try:
            document = unseal(where.read_bytes(), where=where)
        except FileNotFoundError:
            raise RunError(
                "there is no run", where=self.path, expected="a directory with run.json", remedy="check the path, or fit with run=<this path>"
            ) from None
        except OSError as error:
            raise RunError(
                "the run cannot be read", where=where, got=f"{type(error).__name__}: {error}", remedy="check the path and its permissions"
            ) from error
        if document.get("format") != FORMAT:
            raise RunError("the directory is not a run of pavi-scale", where=where, expected=f"format {FORMAT!r}", got=document.get("format"))
        if document.get("version") not in READABLE:
            raise RunError(
                "the run has a format that this version does not read",
                where=where,
                expected=f"version among {READABLE}",
                got=document.get("version"),
                remedy="use the version of pavi-scale that wrote it",
            )
        if not _is_pointer(document):
            raise RunError("file is damaged: not a pointer to a generation", where=where, remedy="restore the file from a copy, or start the run again")
        return document

    @property
    def generation(self) -> int | None:
        """Number of the current generation; None before the first commit."""
        return self._pointer()["generation"]

    @property
    def posterior_path(self) -> Path:
        """Where the stored posterior is, once it is complete."""
        return self.path / "posterior.zarr"

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, generation={self.generation})"

    # -- generations ------------------------------------------------------------------------------------------------

    def commit(self, tensors: Mapping[str, np.ndarray], state: Mapping[str, Any]) -> int:
        """Write a new generation and make it the current one; returns its number.

        Args:
            tensors: Named arrays (weights, moments, tables), finite.
            state: JSON values (cursor, random state, configuration), finite.

        Raises:
            NumericalError: A value is not finite.
            RunError: The disk is full or not writable, or another process holds the run. The last generation stays.
        """
        arrays = {str(name): _storable(str(name), value) for name, value in sorted(tensors.items())}
        pointer = self._pointer()
        number = (pointer["generation"] or 0) + 1
        document = seal({"format": FORMAT, "version": VERSION, "generation": number, "state": dict(state)}, where=f"state of generation {number}")
        home = self.path / "generations"
        aside = home / f".{number:06d}.{secrets.token_hex(4)}.tmp"
        with disk_errors("a generation cannot be written", self.path):
            try:
                digest = self._write(aside, arrays, document, number)
                with guard(self.path / "leases"):
                    self._authorise()
                    target = home / f"{number:06d}"
                    if target.exists():
                        shutil.rmtree(target)  # left by a crash before its pointer was written
                    os.rename(aside, target)
                    sync_directory(home)
                    kept = {k: v for k, v in pointer["manifests"].items() if int(k) > number - KEEP}
                    pointer |= {"generation": number, "version": VERSION, "manifests": {**kept, str(number): digest}}
                    replace_bytes(self.path / "run.json", seal(pointer, where=self.path))
            finally:
                shutil.rmtree(aside, ignore_errors=True)
        self._sweep(number)
        return number

    @staticmethod
    def _write(aside: Path, arrays: dict[str, np.ndarray], document: bytes, number: int) -> str:
        aside.mkdir()
        try:
            save_file(arrays, aside / "weights.safetensors")
        except SafetensorError as error:
            code = re.search(r"os error (\d+)", str(error))
            raise OSError(int(code[1]) if code else 0, f"safetensors: {error}") from error
        sync_file(aside / "weights.safetensors")
        write_bytes(aside / "state.json", document)
        files = {name: [(aside / name).stat().st_size, file_digest(aside / name)] for name in _FILES}
        write_bytes(aside / "manifest.json", seal({"generation": number, "files": files}, where=aside))
        sync_directory(aside)
        return file_digest(aside / "manifest.json")

    def _authorise(self) -> None:
        """Only the leaseholder writes while there is one."""
        if self._lease is not None and self._lease.held:
            self._lease.check()
            return
        holder = newest(self.path / "leases")
        if holder is not None and holder.alive:
            raise RunError("another process is working on this run", where=self.path, got=holder, remedy="take the lease first: with run.lock(): ...")

    def _sweep(self, current: int) -> None:
        for entry in (self.path / "generations").iterdir():
            if entry.name.startswith(".") or (entry.name.isdigit() and not current - KEEP < int(entry.name) <= current):
                shutil.rmtree(entry, ignore_errors=True)

    def latest(self, generation: int | None = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Tensors and state of the current generation, verified; or of another that is kept (`kept`).

        Raises:
            RunError: Nothing was committed yet, or a file is damaged or missing.
        """
        state, directory = self._verified(generation)
        try:
            return load_file(directory / "weights.safetensors"), state
        except (SafetensorError, OSError, ValueError, TypeError, KeyError, MemoryError) as error:
            raise RunError("weights cannot be read", where=directory, got=f"{type(error).__name__}: {error}") from error

    def verify(self) -> tuple[int, ...]:
        """Compare everything but the posterior with its digests; returns the numbers of the generations that are kept.

        Raises:
            RunError: A file is damaged or missing.
        """
        self.read_study()
        for number in self.kept:
            self._verified(number)
        return self.kept

    def state(self) -> dict[str, Any]:
        """State of the current generation, verified, without its tensors."""
        return self._verified(None)[0]

    @property
    def kept(self) -> tuple[int, ...]:
        """Numbers of the generations that are kept, oldest first."""
        return tuple(sorted(int(k) for k in self._pointer()["manifests"]))

    def _verified(self, generation: int | None) -> tuple[dict[str, Any], Path]:
        for attempt in range(5):
            pointer = self._pointer()
            number = pointer["generation"] if generation is None else generation
            if number is None:
                raise RunError(
                    "the run has no generation yet: it was interrupted before its first commit", where=self.path, remedy="fit again with the same run path"
                )
            try:
                return self._check(number, pointer), self.path / "generations" / f"{number:06d}"
            except FileNotFoundError as error:
                # A writer may have moved on and swept this generation while we read it.
                if attempt == 4 or self._pointer() == pointer:
                    raise self._damaged(number, f"{error.filename} is missing") from error
        raise RunError("generations change faster than they can be read", where=self.path, remedy="try again")

    def _damaged(self, number: int, got: str) -> RunError:
        other = [k for k in self.kept if k != number]
        remedy = f"generation {other[-1]} is kept: run.latest({other[-1]})" if other else "restore the directory from a copy, or fit again"
        return RunError(
            "a generation is damaged", where=self.path / "generations" / f"{number:06d}", expected="the digests recorded at commit", got=got, remedy=remedy
        )

    def _check(self, number: int, pointer: dict[str, Any]) -> dict[str, Any]:
        directory = self.path / "generations" / f"{number:06d}"
        if str(number) not in pointer["manifests"]:
            raise RunError("generation is not kept", where=self.path, expected=f"one of {sorted(pointer['manifests'])}", got=number)
        for path in (directory, *(directory / name for name in (*_FILES, "manifest.json"))):
            if path.is_symlink():
                raise self._damaged(number, f"{path.name} is a symbolic link")
        try:
            if file_digest(directory / "manifest.json") != pointer["manifests"][str(number)]:
                raise self._damaged(number, "manifest.json differs from its digest")
            manifest = unseal((directory / "manifest.json").read_bytes(), where=directory / "manifest.json")
            for name in _FILES:
                size, digest = manifest["files"][name]
                if (directory / name).stat().st_size != size or file_digest(directory / name) != digest:
                    raise self._damaged(number, f"{name} differs from its digest")
            state = unseal((directory / "state.json").read_bytes(), where=directory / "state.json")["state"]
        except (PermissionError, IsADirectoryError, NotADirectoryError) as error:
            raise self._damaged(number, str(error)) from error
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged(number, f"manifest or state lacks what belongs there: {error}") from error
        if not isinstance(state, dict):
            raise self._damaged(number, "the state is no mapping")
        return state

    # -- study, log, lease ------------------------------------------------------------------------------------------

    def write_study(self, study: Mapping[str, Any]) -> None:
        """Record what is fitted: model path and fingerprint, cohort source and fingerprint, configuration."""
        with disk_errors("the study cannot be recorded", self.path):
            replace_bytes(self.path / "study.json", seal({"format": FORMAT, "version": VERSION, "study": dict(study)}, where="study"))

    def read_study(self) -> dict[str, Any]:
        """What `write_study` recorded.

        Raises:
            RunError: Nothing was recorded, or the file is damaged.
        """
        where = self.path / "study.json"
        if not where.is_file():
            raise RunError("the run does not say what was fitted", where=where, remedy="fit again with the same run path")
        with disk_errors("the study cannot be read", where):
            study = unseal(where.read_bytes(), where=where).get("study")
        if not isinstance(study, dict):
            raise RunError("file is damaged: no study in it", where=where, remedy="restore the file from a copy, or start the run again")
        return study

    def log(self, event: str, **fields: object) -> None:
        """Append one event to the log (see `pavi_scale.events`)."""
        append(self.path / "events.jsonl", event, fields)

    def events(self) -> list[dict[str, Any]]:
        """The log, oldest first; a line that a crash tore or that is damaged is left out."""
        return read(self.path / "events.jsonl")[0]

    @contextlib.contextmanager
    def lock(self) -> Iterator[Lease]:
        """Hold the run against a second writer for the length of a `with` block.

        Raises:
            RunError: A live process holds it; the message says which.
        """
        with acquire(self.path / "leases") as lease:
            self._lease = lease
            try:
                yield lease
            finally:
                self._lease = None


def _is_pointer(document: Mapping[str, Any]) -> bool:
    number, manifests = document.get("generation"), document.get("manifests")
    if not isinstance(manifests, dict) or not all(k.isdecimal() and k.isascii() and isinstance(v, str) for k, v in manifests.items()):
        return False
    return "generation" in document and (number is None or (type(number) is int and str(number) in manifests))


def _storable(name: str, value: np.ndarray) -> np.ndarray:
    array = np.array(value, order="C", copy=None)
    if array.dtype.kind not in "biuf":
        raise RunError("a tensor has a type that is not stored", where=f"tensor {name!r}", expected="bool, integer or float", got=array.dtype)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = np.argwhere(~np.isfinite(array))[0].tolist()
        raise NumericalError(
            "a tensor is not finite and is not recorded", where=f"tensor {name!r}, index {bad}", expected="finite values", got=float(array[tuple(bad)])
        )
    return array
