"""One task answered so that the bits do not depend on the engine: same thread count, same memory layout, same alignment."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from threadpoolctl import ThreadpoolController

from pavi_scale.errors import WorkerError
from pavi_scale.server.protocol import Computation

# Vector kernels may sum in another order when memory is aligned differently; buffers off the network are aligned to nothing.
_ALIGNMENT = 64
TURN = 1e-4  # seconds that a thread keeps the interpreter while another waits for it


def aligned(array: Any) -> np.ndarray:
    """The array itself if it is writable, C-contiguous and aligned to 64 bytes, else such a copy; shape and dtype are kept.

    Example:
        >>> aligned(np.arange(6.0).reshape(2, 3).T).flags.c_contiguous
        True
    """
    given: np.ndarray = np.asarray(array)
    if given.flags.c_contiguous and given.flags.writeable and given.ctypes.data % _ALIGNMENT == 0:
        return given
    if given.dtype.hasobject:
        return given.copy(order="C")
    buffer = np.empty(given.nbytes + _ALIGNMENT, dtype=np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    out: np.ndarray = np.ndarray(given.shape, given.dtype, buffer=buffer, offset=start)
    out[...] = given
    return out


def align_all(values: Mapping[str, Any]) -> dict[str, Any]:
    """`aligned` for the arrays among `values`."""
    return {name: aligned(value) if isinstance(value, np.ndarray | np.generic) else value for name, value in values.items()}


def answer(computation: Computation, kind: str, state: Mapping[str, np.ndarray], task: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The computation's answer to one task, as plain arrays.

    Args:
        computation: What answers.
        kind: The round's kind.
        state: The round's state; arrays must be `aligned`.
        task: The task.

    Raises:
        WorkerError: The answer is no mapping of names to numeric arrays.
    """
    result = computation.compute(kind, state, align_all(task))
    if not isinstance(result, Mapping):
        raise WorkerError("a computation must answer with named arrays", where=f"kind {kind!r}", expected="dict[str, ndarray]", got=type(result).__name__)
    arrays = {name: aligned(value) for name, value in result.items()}
    for name, array in arrays.items():
        if not isinstance(name, str) or array.dtype.kind in "OV":
            raise WorkerError("a computation must answer with numeric arrays", where=f"kind {kind!r}, array {name!r}", got=f"dtype {array.dtype}")
    return arrays


def settle_threads(count: int | None) -> None:
    """Fix torch's thread count of this thread for good; None leaves it.

    Each thread takes its first count from whoever set one last, anywhere, when it first looks: it must look before it sets.
    """
    torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Run the body with torch's thread count set to `count` (None: as it is); the former count comes back afterwards."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def blas_threads(count: int | None) -> Iterator[None]:
    """Run the body with NumPy's linear algebra on `count` threads (None: as it is) in all of the process; the former count comes back afterwards.

    Its products are small here, and its idle threads turn round and round waiting for the next: a quarter of the processor, taken from those who compute.
    """
    with _blas.shared(partial(_libraries().limit, limits=count, user_api="blas")):
        yield


@cache
def _libraries() -> ThreadpoolController:
    """Those of the process, looked for once: each look reads the map of its memory."""
    return ThreadpoolController()


class _Shared:
    """What belongs to the process, set for a while by several of its threads: the first sets it, the last restores what was before."""

    def __init__(self) -> None:
        self._lock, self._users, self._held = threading.Lock(), 0, ExitStack()

    @contextmanager
    def shared(self, make: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
        """Run the body within `make()`, or within that of a thread that came before."""
        with self._lock:
            if not self._users:
                self._held.enter_context(make())
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._held.close()


_blas, _turns = _Shared(), _Shared()


@contextmanager
def _short_turns() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, TURN))
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@contextmanager
def taking_turns() -> Iterator[None]:
    """Run the body with threads of this process taking the interpreter from one another after 0.1 ms, in place of 5.

    Who reads a chunk, or a message, asks for it back after each call of the system: with 5 ms each time, a read of 100 chunks takes up to a hundred times as
    long beside a thread that computes in Python.
    """
    with _turns.shared(_short_turns):
        yield
