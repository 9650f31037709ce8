"""Durable small files: written aside, forced to disk, renamed into place, and sealed with a digest.

A crash after any single call leaves exactly the old or the new content; a flipped bit is noticed on reading.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pavi_scale.errors import NumericalError, RunError

_SEAL = "sha256"


def sync_directory(path: Path) -> None:
    """Force the names in a directory to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Force a file's content to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_directory(path: Path) -> None:
    """Create a directory and its parents, their names durable."""
    if path.is_dir():
        return
    make_directory(path.parent)
    path.mkdir(exist_ok=True)
    sync_directory(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Create or overwrite a file and force it to disk (the name is durable only once its directory is synced)."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(handle, view) :]
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_bytes(path: Path, data: bytes) -> None:
    """Replace a file atomically: after a crash it holds exactly the old or the new bytes."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        write_bytes(aside, data)
        os.replace(aside, path)
    except OSError:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise
    sync_directory(path.parent)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal, read in blocks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _plain(value: object) -> object:
    """NumPy scalars and arrays as JSON values."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def to_json(document: object, *, where: object) -> str:
    """Canonical JSON text (sorted keys).

    Raises:
        NumericalError: A number is NaN or infinite.
        RunError: A value has no JSON form.
    """
    try:
        return json.dumps(document, sort_keys=True, allow_nan=False, default=_plain, separators=(",", ":"))
    except TypeError as error:
        raise RunError(
            "a value cannot be recorded as JSON", where=where, got=str(error), remedy="record plain numbers, strings, lists and dictionaries"
        ) from error
    except ValueError as error:
        raise NumericalError("a value to be recorded is not finite", where=where, got=str(error), remedy="record None where there is no number yet") from error


def seal(document: dict[str, Any], *, where: object) -> bytes:
    """JSON bytes of a document together with the SHA-256 of its canonical text.

    Example:
        >>> unseal(seal({"generation": 3}, where="here"), where="here")
        {'generation': 3}
    """
    # Through text once, so that the digest is taken of what a reader will parse (tuples become lists, keys strings).
    plain = json.loads(to_json(document, where=where))
    text = to_json(plain, where=where)
    return _written({**plain, _SEAL: hashlib.sha256(text.encode()).hexdigest()})


def _written(document: dict[str, Any]) -> bytes:
    return json.dumps(document, indent=1, sort_keys=True).encode() + b"\n"


def unseal(data: bytes, *, where: object) -> dict[str, Any]:
    """The document inside sealed bytes.

    Raises:
        RunError: The bytes are no JSON object, or do not match their digest.
    """
    remedy = "restore the file from a copy, or start the run again"
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RunError("file is damaged: not JSON", where=where, got=str(error), remedy=remedy) from error
    if not isinstance(document, dict) or not isinstance(document.get(_SEAL), str):
        raise RunError("file is damaged or foreign: it carries no digest", where=where, expected=f"a JSON object with {_SEAL!r}", remedy=remedy)
    recorded = document.pop(_SEAL)
    try:
        found = hashlib.sha256(to_json(document, where=where).encode()).hexdigest()
    except (NumericalError, ValueError, RecursionError) as error:
        raise RunError("file is damaged: a number is not finite or a text not valid", where=where, got=str(error), remedy=remedy) from error
    if found != recorded:
        raise RunError("file is damaged: content and digest differ", where=where, expected=recorded[:16], got=found[:16], remedy=remedy)
    if _written({**document, _SEAL: recorded}) != data:  # a lost newline, or E for e in a number
        raise RunError("file is damaged: not written as a digest is", where=where, expected="the bytes that were written", remedy=remedy)
    return document


@contextlib.contextmanager
def disk_errors(what: str, where: object) -> Iterator[None]:
    """Turn an `OSError` inside the block into a `RunError` that says what to do about it."""
    try:
        yield
    except OSError as error:
        remedies = {
            errno.ENOSPC: "the disk is full: free space, then resume",
            errno.EDQUOT: "the disk quota is used up: free space, then resume",
            errno.EACCES: "choose a path you may write to",
            errno.EPERM: "choose a path you may write to",
            errno.EROFS: "the file system is read-only: choose another path",
            errno.ENOTDIR: "a part of the path is a file: choose another path",
        }
        raise RunError(
            what, where=where, got=f"{type(error).__name__}: {error}", remedy=remedies.get(error.errno or 0, "check the path and the disk")
        ) from error
