"""Reduced models kept between rounds, within a budget of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict

from pavi_scale.memory import Arena
from pavi_scale.reduced import Reduced

Key = tuple[object, ...]


class Holding:
    """What fits is kept; the rest is built again each time.

    A pass over shards visits each once, so that replacing the oldest by the newest would keep none that is asked for next: shards never
    displace shards. Only what was kept for another purpose (samples of an earlier stage) gives way.

    Args:
        limit: Bytes.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held: OrderedDict[Key, tuple[Reduced, int]] = OrderedDict()
        self._lock = threading.Lock()
        self._arena = Arena()

    def get(self, key: Key) -> Reduced | None:
        """The reduced model kept under a key, if it is."""
        with self._lock:
            found = self._held.get(key)
            return None if found is None else found[0]

    def keep(self, key: Key, reduced: Reduced) -> None:
        """Keep a reduced model, or account for its growth, if there is room; called after each use."""
        size = reduced.nbytes
        with self._lock:
            self._held.pop(key, None)
            for other in [k for k in self._held if k[0] != key[0]]:
                if self._total() + size <= self._limit:
                    break
                del self._held[other]
            if self._total() + size <= self._limit:
                reduced.settle(self._arena)
                self._held[key] = reduced, size

    def _total(self) -> int:
        return sum(size for _, size in self._held.values())
