"""A lease on a directory: one holder at a time, with a fencing token and a heartbeat.

Each lease is a file `leases/NNNNNN.json` whose number is its token; the highest number is the current lease. It is created by hard-linking
a complete file, which fails when the name exists, so of several contenders exactly one wins. A holder that was presumed dead finds a higher
token and is refused. Only POSIX directory operations are needed; `flock`, where the file system has it, closes the gap between check and write.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from pavi_scale.durable import disk_errors, replace_bytes, seal, sync_directory, unseal, write_bytes
from pavi_scale.errors import RunError

STALE_AFTER = 60.0  # seconds without a heartbeat
BEAT = 5.0  # seconds between heartbeats


def _process_start(pid: int) -> str | None:
    """Start time of a live process in clock ticks since boot; None if it is gone or a zombie (Linux; "?" elsewhere)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    except ProcessLookupError:
        return None
    else:
        return None if fields[0] in "ZX" else fields[19]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        return "?"
    return "?"


def _machine() -> str:
    """Names the set of processes that a process number is meaningful in: boot and process namespace."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


@dataclass(frozen=True)
class Holder:
    """What a lease file says: its token, who took it, and how long ago the holder last gave a sign of life (seconds)."""

    token: int
    document: dict[str, Any]
    silent_for: float

    @property
    def released(self) -> bool:
        """The holder gave the lease back."""
        return bool(self.document.get("released"))

    @property
    def alive(self) -> bool:
        """The holder is presumed to work still: it did not release, fall silent or, on this machine, die."""
        if self.released or self.silent_for > STALE_AFTER:
            return False
        pid = self.document.get("pid")
        if self.document.get("machine") == _machine() and type(pid) is int:
            return _process_start(pid) == self.document.get("start")
        return True

    def __str__(self) -> str:
        who = f"process {self.document.get('pid', '?')} on host {self.document.get('host', '?')}"
        return f"{who}, lease {self.token}, last sign of life {self.silent_for:.0f} s ago"


def newest(directory: Path) -> Holder | None:
    """The current lease of a directory of leases, live or not."""
    for _ in range(10):
        tokens = sorted((int(p.stem) for p in directory.glob("[0-9]*.json") if p.stem.isdigit()), reverse=True) if directory.is_dir() else []
        if not tokens:
            return None
        path = directory / f"{tokens[0]:06d}.json"
        try:
            modified, data = path.stat().st_mtime, path.read_bytes()
        except FileNotFoundError:
            continue  # a newer lease replaced it meanwhile
        try:
            document = unseal(data, where=path)
        except RunError:
            document = {}  # damaged: nobody can be named; only silence frees it
        return Holder(tokens[0], document, max(0.0, _now(directory) - modified))
    raise RunError("leases change faster than they can be read", where=directory, remedy="try again")


def _now(directory: Path) -> float:
    """The file system's clock, which need not agree with ours on a network mount."""
    probe = directory / f".clock.{secrets.token_hex(4)}.tmp"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


@contextlib.contextmanager
def guard(directory: Path, patience: float = 30.0) -> Iterator[None]:
    """Mutual exclusion of short critical sections, by `flock` where the file system has it.

    Raises:
        RunError: Another process stays in its critical section for longer than `patience` seconds.
    """
    handle = os.open(directory / ".guard", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RunError(
                        "another process is writing to this run", where=directory.parent, got=str(newest(directory)), remedy="wait for it or stop it"
                    ) from None
                time.sleep(0.01)
                continue
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                    raise
            break
        yield
    finally:
        os.close(handle)


class Lease:
    """A lease held by this process, kept alive by a thread until `release`.

    Attributes:
        token: Fencing token, higher than every earlier lease's.
    """

    def __init__(self, directory: Path, token: int, document: dict[str, Any]) -> None:
        self.directory, self.token = directory, token
        self._document = document
        self._path = directory / f"{token:06d}.json"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lease-{token}", daemon=True)
        self._thread.start()

    @property
    def held(self) -> bool:
        """Not released by us (another process may still have taken it over: see `check`)."""
        return not self._stop.is_set()

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            try:
                os.utime(self._path)
            except FileNotFoundError:
                return  # taken over; `check` tells the next write
            except OSError:
                continue

    def check(self) -> None:
        """Refuse to go on when another process took the lease over.

        Raises:
            RunError: A higher token exists, or the lease was released.
        """
        current = newest(self.directory)
        if not self.held or current is None or current.token != self.token:
            raise RunError(
                "the lease on the run was lost",
                where=self.directory.parent,
                expected=f"lease {self.token}",
                got=current or "no lease",
                remedy="let the other process finish, then resume",
            )

    def release(self) -> None:
        """Give the lease back; calling it again does nothing."""
        if not self.held:
            return
        self._stop.set()
        self._thread.join(timeout=1.0)
        current = newest(self.directory)
        if current is not None and current.token == self.token:
            # The file stays, so that the next token is higher.
            try:
                replace_bytes(self._path, seal({**self._document, "released": True}, where=self._path))
            except OSError:
                with contextlib.suppress(OSError):
                    os.utime(self._path, (0, 0))  # a full disk has room for this: silent for long is as good as released

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


def acquire(directory: Path) -> Lease:
    """Take the lease of `directory` (created if need be).

    Raises:
        RunError: A live process holds it (the message says which), or the directory cannot be written.
    """
    with disk_errors("the run cannot be locked", directory):
        directory.mkdir(exist_ok=True)
        with guard(directory):
            current = newest(directory)
            if current is not None and current.alive:
                raise _held(directory, current)
            token = current.token + 1 if current else 1
            document = {
                "token": token,
                "pid": os.getpid(),
                "start": _process_start(os.getpid()),
                "host": socket.gethostname(),
                "machine": _machine(),
                "since": time.time(),
            }
            path = directory / f"{token:06d}.json"
            aside = directory / f".{secrets.token_hex(6)}.tmp"
            write_bytes(aside, seal(document, where=path))
            try:
                os.link(aside, path)
            except FileExistsError:
                raise _held(directory, newest(directory)) from None
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
                os.rename(aside, path)  # no hard links on this file system: the guard alone protects
            finally:
                aside.unlink(missing_ok=True)
            sync_directory(directory)
            for old in directory.glob("[0-9]*.json"):
                if old.stem.isdigit() and int(old.stem) < token:
                    old.unlink(missing_ok=True)
    return Lease(directory, token, document)


def _held(directory: Path, holder: Holder | None) -> RunError:
    return RunError(
        "another process is working on this run",
        where=directory.parent,
        expected="no other writer",
        got=holder,
        remedy="wait for it, stop it, or choose another run path",
    )
