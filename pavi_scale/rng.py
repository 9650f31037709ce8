"""Counter-based random numbers: a draw is a pure function of (seed, variable, ground index, draw).

The same number comes back whatever slice, shard or worker asks for it. Bits come from two rounds of the
SplitMix64 finaliser (Steele, Lea, Flood 2014) over the mixed key; normals from the normal quantile function (`quantile`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pavi_scale.counters import GOLDEN, LAST
from pavi_scale.later import Later

if TYPE_CHECKING:
    from pavi_scale import quantile
else:
    quantile = Later("pavi_scale.quantile")


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64 finaliser, element-wise on uint64 (wrap-around is intended)."""
    shifted = x >> np.uint64(30)
    x = np.bitwise_xor(x, shifted, out=shifted)  # the caller's array is kept, and no further one is made
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def stream(seed: int, *names: object) -> int:
    """A 64-bit stream key from a seed and any printable names.

    Example:
        >>> stream(0, "alpha") == stream(0, "alpha"), stream(0, "alpha") == stream(1, "alpha")
        (True, False)
    """
    text = repr((int(seed), *names)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def uniform(key: int, *counters: np.ndarray) -> np.ndarray:
    """Uniform numbers in (0, 1), float64, one per broadcast position of the integer counters.

    Example:
        >>> rows = uniform(7, np.arange(3)[:, None], np.arange(2))
        >>> bool((rows[1:] == uniform(7, np.arange(1, 3)[:, None], np.arange(2))).all())
        True
    """
    shape = np.broadcast_shapes(*(np.shape(c) for c in counters))
    with np.errstate(over="ignore"):
        state = _mix(_state(key, counters) + GOLDEN)
    state >>= np.uint64(11)
    out = state.astype(np.float64)
    out += 0.5
    out *= 2.0**-53
    np.minimum(out, LAST, out=out)  # half of the largest integer's last place rounds to one
    return out.reshape(shape)


def normal(key: int, *counters: np.ndarray, dtype: type[np.floating[Any]] = np.float64) -> np.ndarray:
    """Standard normal numbers, one per broadcast position of the integer counters: the quantiles of `uniform`, rounded to `dtype`."""
    shape = np.broadcast_shapes(*(np.shape(c) for c in counters))
    *earlier, last = (np.asarray(c).reshape((1,) * (len(shape) - np.ndim(c)) + np.shape(c)) for c in counters)
    # Leading axes of the earlier counters times trailing ones of the last: their sums are made as they are used.
    axis = next((i for i, size in enumerate(last.shape) if size != 1), len(shape))
    step = _step(last)
    with np.errstate(over="ignore"):
        state = _state(key, earlier)
        if any(size != 1 for c in earlier for size in c.shape[axis:]):
            state, step, axis = state + step, np.zeros(1, np.uint64), len(shape)
    rows = np.broadcast_to(state.reshape(state.shape[:axis]), shape[:axis]).reshape(-1)
    out = np.empty(math.prod(shape), dtype)
    quantile.normals(np.ascontiguousarray(rows), step.reshape(-1), out)
    return out.reshape(shape)


def _step(counter: np.ndarray) -> np.ndarray:
    """What a counter adds to the state."""
    with np.errstate(over="ignore"):
        return np.asarray(GOLDEN * (np.asarray(counter).astype(np.uint64) + np.uint64(1)))


def _state(key: int, counters: Sequence[np.ndarray]) -> np.ndarray:
    """The key mixed with the counters, uint64, of their broadcast shape (with one axis at least)."""
    axes = max([1, *(np.ndim(c) for c in counters)])
    state = np.full((1,) * axes, np.uint64(key), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for counter in counters:  # each broadcasts the state no further than it must
            state = _mix(state + _step(counter))
    return state
