"""What torch keeps once for a whole process - default dtype and generator - shared by threads: workers of one process, or two fits at the same time.

Who needs both asks for the dtype first: whoever has the generator waits for nobody.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch


class _Precision:
    """Who has asked for which default dtype: it is one for the process, so threads that want the same one share it, and others wait."""

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._inside = 0
        self._before = torch.get_default_dtype()
        self._mine = threading.local()

    def enter(self, dtype: torch.dtype) -> torch.dtype:
        """Set the default dtype; returns the one to restore in this thread."""
        with self._free:
            depth = getattr(self._mine, "depth", 0)
            self._free.wait_for(lambda: depth > 0 or self._inside == 0 or torch.get_default_dtype() == dtype)
            if self._inside == 0:
                self._before = torch.get_default_dtype()
            self._inside += 1
            self._mine.depth = depth + 1
            outer = torch.get_default_dtype()
            torch.set_default_dtype(dtype)
            return outer

    def leave(self, outer: torch.dtype) -> None:
        """The last to leave restores what was before the first."""
        with self._free:
            self._inside -= 1
            self._mine.depth -= 1
            torch.set_default_dtype(self._before if self._inside == 0 else outer if self._mine.depth else torch.get_default_dtype())
            self._free.notify_all()


_precision = _Precision()
_generator = threading.RLock()


@contextlib.contextmanager
def precision(dtype: torch.dtype) -> Iterator[None]:
    """Default dtype inside, so that constants written in laws have the precision of the computation."""
    outer = _precision.enter(dtype)
    try:
        yield
    finally:
        _precision.leave(outer)


@contextlib.contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Torch's generator, which laws draw from, for this thread alone, begun with `seed`; as it was afterwards."""
    with _generator, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
