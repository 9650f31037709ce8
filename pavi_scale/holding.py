"""Reduced models kept between rounds, within a budget of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from pavi_scale.memory import Arena
from pavi_scale.reduced import Reduced

Key = tuple[object, ...]


@runtime_checkable
class Summed(Protocol):
    """A law summed up over its units."""

    def moved(self, arena: Arena) -> Summed:
        """The same, in an arena."""
        ...


class Holding:
    """What fits is kept; the rest is built again each time.

    A pass over shards visits each once, so that replacing the oldest by the newest would keep none that is asked for next: shards never
    displace shards. Only what was kept for another purpose (samples of an earlier stage) gives way.

    Args:
        limit: Bytes.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held: OrderedDict[Key, tuple[Reduced | Mapping[object, Any], int]] = OrderedDict()
        self._lock = threading.Lock()
        self._arena = Arena()

    def get(self, key: Key) -> Reduced | Mapping[object, Any] | None:
        """The reduced model kept under a key, or the laws that were summed up for it; None if neither is kept."""
        with self._lock:
            return self._held.get(key, (None, 0))[0]

    def keep(self, key: Key, reduced: Reduced) -> None:
        """Keep a reduced model, or account for its growth, if there is room; called after each use.

        Of one that has let go of its data only the laws summed up are kept, apart from the heap.
        """
        size = reduced.nbytes
        with self._lock:
            former, _ = self._held.pop(key, (None, 0))
            for other in [k for k in self._held if k[0] != key[0]]:
                if self._total() + size <= self._limit:
                    break
                del self._held[other]
            if self._total() + size > self._limit:
                return
            if reduced.data or any(not isinstance(a, Summed) for a in reduced.absorbed.values()):
                self._held[key] = reduced, size
            elif isinstance(former, Mapping) and former.keys() == reduced.absorbed.keys():
                self._held[key] = former, size
            else:
                self._held[key] = {k: a.moved(self._arena) for k, a in reduced.absorbed.items()}, size

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        with self._lock:
            return self._total()

    def _total(self) -> int:
        return sum(size for _, size in self._held.values())
