"""Reading ahead: what a pass begins with is fetched before its first piece is looked at, what comes next while the present piece is computed."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import psutil

from pavi_scale.batching import Shard, closure
from pavi_scale.cohort import Cohort
from pavi_scale.holding import Holding, Key

LARGE = 256 << 20  # bytes of a cohort that is read ahead: a smaller one is soon in memory
PATIENCE = 1.0  # seconds between looks at whether anybody is still there
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
        self._taken: set[Key] = set()  # what has been looked at, perhaps before it was fetched
        self._turn, self._busy, self._going = threading.Condition(), False, False
        self._limit: float | None = None

    def beforehand(self, pieces: Sequence[Any], share: float, on: bool = False) -> None:
        """Have the pieces of a pass fetched into the operating system's cache, one after the other; returns at once.

        They are read until the first piece is looked at. Then the thread ends or, if it goes `on`, asks for pieces as far ahead of those looked at as
        memory allows: a disk that stalls for some seconds is not waited for.

        Args:
            pieces: Those of a pass, or some more of them.
            share: This process's share of the memory that may be used for that; without `on` the first call's counts.
            on: Whether this process is the only one that looks at the pieces, which are all of a pass.
        """
        with self._turn:
            if not self._worth or (self._busy and not on):
                return
            self._waiting.extend(pieces)
            if on:
                self._taken.difference_update(map(key_of, pieces))
            if self._limit is None or (on and not self._going):
                self._fetched, self._limit = {}, CACHED * share * psutil.virtual_memory().available
            if not self._going:
                self._going = True
                threading.Thread(target=_go_on, args=(weakref.ref(self), self._turn, on), name="pavi-beforehand", daemon=True).start()

    def _next(self, on: bool) -> bool | None:
        """Fetch the next piece: whether there may be another one; None if there is no room for it yet."""
        with self._turn:
            while self._waiting and key_of(self._waiting[0]) in self._taken:
                self._waiting.popleft()
            each = self._cohort.nbytes / self._cohort.layout.cardinality[str(self._split)]
            size = each * len(_units(self._waiting[0])) if self._waiting else 0.0
            full = sum(self._fetched.values()) + size > (self._limit or 0.0) and bool(self._fetched or not on)
            if full and on and self._waiting:
                return None
            if full or not self._waiting or (self._busy and not on):
                self._waiting.clear()
                self._going = False
                return False
            piece = self._waiting.popleft()
            self._fetched[key_of(piece)] = size
            through = not self._busy
        try:
            self._fetch(piece, aside=False, through=through)
        except BaseException:  # the thread ends with it: a later pass begins another one
            self._going = False
            raise
        return True

    def _begin(self, piece: Any) -> None:
        """A piece is looked at now."""
        if self._worth:
            with self._turn:
                self._busy = True
                self._taken.add(key_of(piece))
                self._fetched.pop(key_of(piece), None)
                self._turn.notify()

    def each(self, pieces: Sequence[Any], then: Any = None) -> Iterator[Any]:
        """The pieces in their order; of each the next one is asked for first, and with the last one what is likely to be looked at `then`."""
        for piece, following in pairwise([*pieces, then]):
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


def _go_on(of: weakref.ref[Ahead], turn: threading.Condition, on: bool) -> None:
    """Fetch piece after piece, until there is none or nobody will look at them any more."""
    going: bool | None = True
    while going is not False and (ahead := of()) is not None:
        going = ahead._next(on)
        del ahead
        if going is None:
            with turn:
                turn.wait(PATIENCE)


def _units(piece: Any) -> np.ndarray:
    """Positions of a piece."""
    return np.arange(piece[1], piece[2]) if isinstance(piece, tuple) else piece
