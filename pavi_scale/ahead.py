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
        self._fetcher: threading.Thread | None = None
        self._lock, self._busy = threading.Lock(), False

    def idle(self, pieces: Sequence[Any], share: float) -> None:
        """Have pieces fetched into the operating system's cache, one after the other, until there is something to compute; returns at once.

        Args:
            pieces: What a pass begins with.
            share: This process's share of the memory that may be used for that; the first call's counts.
        """
        if not self._worth or self._busy:
            return
        with self._lock:
            self._waiting.extend(pieces)
            if self._fetcher is None:
                limit = CACHED * share * psutil.virtual_memory().available
                self._fetcher = threading.Thread(target=self._until_busy, args=(limit,), name="pavi-idle", daemon=True)
                self._fetcher.start()

    def _until_busy(self, limit: float) -> None:
        cardinality = self._cohort.layout.cardinality[str(self._split)]
        while self._waiting and not self._busy:
            piece = self._waiting.popleft()
            limit -= self._cohort.nbytes * (len(_units(piece)) / cardinality)
            if limit < 0:
                return
            self._fetch(piece, aside=False)

    def each(self, pieces: Sequence[Any], then: Any = None) -> Iterator[Any]:
        """The pieces in their order; of each the next one is asked for first, and with the last one what is likely to be looked at `then`."""
        self._busy = True  # the disk is for what is asked of it now
        for piece, following in zip(pieces, [*pieces[1:], then], strict=True):
            if following is not None:
                self._fetch(following)
            yield piece

    def after(self, shard: Shard) -> None:
        """Ask for the two shards after one: the first may be another's, who will be there at about the same time."""
        if self._worth and shard.plate is not None:
            stop = min(shard.stop + 2 * (shard.stop - shard.start), self._cohort.layout.cardinality[shard.plate])
            self._fetch((shard.plate, shard.stop, stop))

    def _fetch(self, piece: Any, aside: bool = True) -> None:
        if not self._worth or self._holding.get(key_of(piece)) is not None:
            return
        layout = self._cohort.layout
        selected = closure(layout, {str(self._split): _units(piece)}).units
        self._cohort.will_need({p: u for p, u in selected.items() if len(u) < layout.cardinality[p]}, aside)


def _units(piece: Any) -> np.ndarray:
    """Positions of a piece."""
    return np.arange(piece[1], piece[2]) if isinstance(piece, tuple) else piece
