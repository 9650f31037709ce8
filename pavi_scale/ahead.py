"""Reading ahead: what a task looks at next is fetched from the disk while it computes, and what a pass begins with while the driver searches."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import psutil

from pavi_scale.batching import Shard, closure
from pavi_scale.cohort import Cohort
from pavi_scale.holding import Holding, Key

LARGE = 256 << 20  # bytes of a cohort that is read ahead: a smaller one is soon in memory
CACHED = 0.5  # share of the memory that nobody uses into which a pass's beginning is fetched


def key_of(piece: Any) -> Key:
    """Under which a piece of the split plate is kept: a shard `(plate, start, stop, ...)`, or any units."""
    return ("shard", *piece[:3]) if isinstance(piece, tuple) else ("units", piece.tobytes())


class Ahead:
    """Has pieces of the split plate fetched that are not kept.

    Args:
        cohort: The data.
        split: The plate.
        holding: What is kept.
    """

    def __init__(self, cohort: Cohort, split: str | None, holding: Holding) -> None:
        self._cohort, self._split, self._holding = cohort, split, holding
        self._worth = split is not None and cohort.nbytes >= LARGE
        self._waiting: deque[Any] = deque()
        self._fetched: dict[Key, float] = {}  # bytes of what has been fetched and not been looked at
        self._taken: set[Key] = set()
        self._turn, self._busy = threading.Condition(), False
        self._fetcher: threading.Thread | None = None
        self._limit: float | None = None

    def beforehand(self, pieces: Sequence[Any], share: float, on: bool = False) -> None:
        """Have the pieces of a pass fetched into the operating system's cache, one after the other; returns at once.

        They are read while nothing is computed. Then the thread ends or, if it goes `on`, asks for pieces as far ahead of those looked at as memory
        allows: a disk that stalls for some seconds is not waited for.

        Args:
            pieces: Those of a pass, or some more of them.
            share: This process's share of the memory that may be used for that; the first call's counts.
            on: Whether this process is the only one that looks at the pieces; a call while an earlier one goes on is ignored.
        """
        with self._turn:
            going = self._fetcher is not None and self._fetcher.is_alive()
            if not self._worth or (self._busy and not on) or (going and on):
                return
            self._waiting.extend(pieces)
            if on or self._limit is None:
                self._fetched, self._taken, self._limit = {}, set(), CACHED * share * psutil.virtual_memory().available
            if not going:
                self._fetcher = threading.Thread(target=self._fetch_on, args=(self._limit, on), name="pavi-beforehand", daemon=True)
                self._fetcher.start()

    def _fetch_on(self, limit: float, on: bool) -> None:
        each = self._cohort.nbytes / self._cohort.layout.cardinality[str(self._split)]
        while True:
            with self._turn:
                while self._waiting and key_of(self._waiting[0]) in self._taken:
                    self._waiting.popleft()
                if not self._waiting or (self._busy and not on):
                    self._waiting.clear()
                    return
                size = each * len(_units(self._waiting[0]))
                if sum(self._fetched.values()) + size > limit and (self._fetched or not on):
                    if not on:
                        self._waiting.clear()
                        return
                    self._turn.wait()
                    continue
                piece = self._waiting.popleft()
                self._fetched[key_of(piece)] = size
                through = not self._busy
            self._fetch(piece, aside=False, through=through)

    def _begin(self, piece: Any) -> None:
        """A piece is looked at now."""
        with self._turn:
            self._busy = True
            self._taken.add(key_of(piece))
            self._fetched.pop(key_of(piece), None)
            self._turn.notify()

    def each(self, pieces: Sequence[Any], then: Any = None) -> Iterator[Any]:
        """The pieces in their order; of each the next one is asked for first, and with the last one what is likely to be looked at `then`."""
        for piece, following in zip(pieces, [*pieces[1:], then], strict=True):
            self._begin(piece)
            if following is not None:
                self._fetch(following)
            yield piece

    def after(self, shard: Shard) -> None:
        """Ask for the two shards after one: the first may be another's, who will be there at about the same time."""
        if self._worth and shard.plate is not None:
            stop = min(shard.stop + 2 * (shard.stop - shard.start), self._cohort.layout.cardinality[shard.plate])
            self._fetch((shard.plate, shard.stop, stop))

    def _fetch(self, piece: Any, aside: bool = True, through: bool = False) -> None:
        if not self._worth or self._holding.get(key_of(piece)) is not None:
            return
        layout = self._cohort.layout
        selected = closure(layout, {str(self._split): _units(piece)}).units
        self._cohort.will_need({p: u for p, u in selected.items() if len(u) < layout.cardinality[p]}, aside, through)


def _units(piece: Any) -> np.ndarray:
    """Positions of a piece."""
    return np.arange(piece[1], piece[2]) if isinstance(piece, tuple) else piece
