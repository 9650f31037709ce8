"""Counter-based random numbers: a draw is a pure function of (seed, variable, ground index, draw).

The same number comes back whatever slice, shard or worker asks for it. Bits come from two rounds of the
SplitMix64 finaliser (Steele, Lea, Flood 2014) over the mixed key; normals from the inverse normal distribution function.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from scipy.special import ndtri

BLOCK = 1 << 15  # numbers made at once: they stay in the processor's cache
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


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
    state = np.full((1,) * max(1, len(shape)), np.uint64(key), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for counter in counters:  # each broadcasts the state no further than it must
            state = _mix(state + _GOLDEN * (np.asarray(counter).astype(np.uint64) + np.uint64(1)))
        state += _GOLDEN
        state = _mix(state)
    state >>= np.uint64(11)
    out = state.astype(np.float64)
    out += 0.5
    out *= 2.0**-53
    return out.reshape(shape)


def normal(key: int, *counters: np.ndarray) -> np.ndarray:
    """Standard normal numbers, float64, one per broadcast position of the integer counters."""
    shape = np.broadcast_shapes(*(np.shape(c) for c in counters))
    if not shape:
        return ndtri(uniform(key, *counters))
    out = np.empty(shape)
    rows = max(1, BLOCK // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], rows):
        part = slice(start, start + rows)
        ndtri(uniform(key, *(_rows(np.asarray(c), len(shape), part) for c in counters)), out=out[part])
    return out


def _rows(counter: np.ndarray, axes: int, part: slice) -> np.ndarray:
    """Those of a counter that belong to a part of the first axis it is broadcast to."""
    return counter[part] if counter.ndim == axes and len(counter) > 1 else counter
