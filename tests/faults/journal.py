"""Records what a program does to a directory tree, and rebuilds the tree as a crash would leave it.

Every call that changes names or forces data to disk is intercepted; before and after each, the tree is compared with what was last seen, so that
whatever else wrote there (Rust, C, other threads) is recorded too. What POSIX promises is modelled strictly: a file's content is durable once the
file was fsynced after the write, a name once its directory was fsynced after the change; everything else may or may not have reached the disk.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

CHANGES = ("mkdir", "rename", "replace", "unlink", "remove", "rmdir", "link")
RULES = ("everything", "only what was synced", "all but the last unsynced", "names without data", "data without names", "torn", "some", "others")


@dataclass
class Step:
    """One change: names of directories, the content of a file, or that a file or directory was forced to disk."""

    names: list[tuple[int, str, int | None]] = field(default_factory=list)
    data: tuple[int, bytes] | None = None
    sync: int | None = None
    mark: object = None


class Journal:
    """The steps of a program below `root`. Directories have even numbers, files odd ones; the root's is 0."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.steps: list[Step] = []
        self._lock = threading.RLock()
        self._numbers: dict[int, int] = {root.stat().st_ino: 0}
        self._count = 0
        self._stamps: dict[int, tuple[int, int, float]] = {}
        self._names: dict[int, dict[str, int]] = {0: {}}
        self._data: dict[int, bytes] = {}

    def mark(self, what: object) -> None:
        """The program was told that something is done."""
        with self._lock:
            self._look()
            self.steps.append(Step(mark=what))

    @contextlib.contextmanager
    def recording(self) -> Iterator[Journal]:
        with pytest.MonkeyPatch.context() as patch:
            for name in CHANGES:
                patch.setattr(os, name, self._around(getattr(os, name)))
            patch.setattr(os, "fsync", self._synced(os.fsync))
            yield self
            with self._lock:
                self._look()

    def _around(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                self._look()
                try:
                    return real(*args, **kwargs)
                finally:
                    self._look(together=True)

        return call

    def _synced(self, real: Callable[[int], None]) -> Callable[[int], None]:
        def call(handle: int) -> None:
            with self._lock:
                self._look()
                real(handle)
                number = self._numbers.get(os.fstat(handle).st_ino)
                if number is not None:
                    self.steps.append(Step(sync=number))

        return call

    def _look(self, together: bool = False) -> None:
        """Compare the tree with what was last seen; `together`: name changes are the effect of one call."""
        names: dict[int, dict[str, int]] = {0: {}}
        data: dict[int, bytes] = {}
        seen: dict[int, int] = {self.root.stat().st_ino: 0}
        pending = [(self.root, 0)]
        while pending:
            place, number = pending.pop()
            with contextlib.suppress(FileNotFoundError):
                for entry in sorted(os.scandir(place), key=lambda e: e.name):
                    info = entry.stat(follow_symlinks=False)
                    child = seen.get(info.st_ino, self._numbers.get(info.st_ino))
                    directory = stat.S_ISDIR(info.st_mode)
                    if child is None or (child % 2 == 0) != directory:
                        self._count += 2
                        child = self._count + (not directory)
                    seen[info.st_ino] = child
                    names[number][entry.name] = child
                    if directory:
                        names[child] = {}
                        pending.append((Path(entry.path), child))
                    else:
                        stamp = info.st_size, info.st_mtime_ns
                        known = self._stamps.get(child)
                        # Times of files tick slowly: only what was old when last read is taken as unchanged.
                        if known is not None and known[:2] == stamp and known[2] - info.st_mtime > 0.1:
                            data[child] = self._data[child]
                        else:
                            self._stamps[child] = (*stamp, time.time())
                            data[child] = Path(entry.path).read_bytes()
        changes = [(d, n, c) for d, held in names.items() for n, c in held.items() if self._names.get(d, {}).get(n) != c]
        changes += [(d, n, None) for d, held in self._names.items() for n in held if n not in names.get(d, {}) and (d in names or not together)]
        if together and changes:
            self.steps.append(Step(names=changes))
        elif changes:
            self.steps += [Step(names=[c]) for c in changes]
        self.steps += [Step(data=(number, content)) for number, content in data.items() if self._data.get(number, b"") != content]
        self._numbers, self._names, self._data = seen, names, data


Tree = dict[str, bytes | None]  # path -> content, None for a directory


def crashed(steps: Sequence[Step], count: int, rule: str, seed: int = 0) -> Tree:
    """The tree after the first `count` steps and a crash, as `rule` (and `seed`, of what is random) says what of the unsynced was kept."""
    done = steps[:count]
    synced: dict[int, int] = {step.sync: i for i, step in enumerate(done) if step.sync is not None}
    rng = np.random.default_rng([count, RULES.index(rule), seed])
    changes: list[tuple[int, int, str, int | None]] = []  # step, directory, name, file
    writes: list[tuple[int, int, bytes]] = []
    for i, step in enumerate(done):
        changes += [(i, d, n, c) for d, n, c in step.names]
        writes += [(i, *step.data)] if step.data is not None else []
    # What one call does to the names of one directory happens together: a rename is atomic, durable or not.
    loose = {(i, d, "names") for i, d, _, _ in changes if synced.get(d, -1) < i} | {(i, n, "data") for i, n, _ in writes if synced.get(n, -1) < i}
    last = max(loose, default=None)
    chosen = {key for key in sorted(loose) if rng.random() < 0.5}

    def kept(key: tuple[int, int, str]) -> bool:
        if key not in loose or rule in ("everything", "torn"):
            return True
        if rule == "all but the last unsynced":
            return key != last
        if rule in ("some", "others"):
            return key in chosen
        return rule == ("names without data" if key[2] == "names" else "data without names")

    names: dict[int, dict[str, int]] = {}
    data: dict[int, bytes] = {}
    for i, directory, name, child in changes:
        if kept((i, directory, "names")):
            held = names.setdefault(directory, {})
            held.pop(name, None)
            if child is not None:
                held[name] = child
    for i, number, content in writes:
        if kept((i, number, "data")):
            torn = rule == "torn" and (i, number, "data") == last
            data[number] = content[: len(content) // 2] if torn else content
    return dict(_walk(names, data, 0, ""))


def _walk(names: Mapping[int, Mapping[str, int]], data: Mapping[int, bytes], number: int, path: str) -> Iterator[tuple[str, bytes | None]]:
    for name, child in names.get(number, {}).items():
        below = f"{path}/{name}" if path else name
        if child % 2 == 0:
            yield below, None
            yield from _walk(names, data, child, below)
        else:
            yield below, data.get(child, b"")


def build(tree: Tree, place: Path) -> None:
    """Write a tree to the disk."""
    place.mkdir(parents=True)
    for name, content in tree.items():
        if content is None:
            (place / name).mkdir()
        else:
            (place / name).write_bytes(content)


def states(steps: Sequence[Step], rules: Sequence[str] = RULES, every: int = 1) -> Iterator[tuple[int, str, Tree]]:
    """Every different (number of steps, rule, tree), each tree once for what was promised until then; or one in `every`."""
    seen = set()
    for count, rule in [(count, rule) for count in range(len(steps) + 1) for rule in rules][::every]:
        tree = crashed(steps, count, rule)
        key = sum(step.mark is not None for step in steps[:count]), tuple(tree.items())
        if key not in seen:
            seen.add(key)
            yield count, rule, tree
