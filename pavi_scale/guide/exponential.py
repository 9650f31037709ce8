"""Exponential and logarithm that the compiler turns into vector instructions."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from pavi_scale.instructions import bits_of_float, float_of_bits, fma

ONE, HALF = np.float32(1.0), np.float32(0.5)
LOG2_E, LN2_HIGH, LN2_LOW = np.float32(1.4426950408889634), np.float32(0.693359375), np.float32(-2.12194440e-4)
E2, E3, E4, E5, E6 = (np.float32(1.0 / k) for k in (2, 6, 24, 120, 720))

SQRT_HALF = np.int32(0x3F3504F3)  # the bits of sqrt(1/2)
LOG_1, LOG_2, LOG_3, LOG_4 = (np.float32(c) for c in (0.66666662693, 0.40000972152, 0.28498786688, 0.24279078841))
LOG_HIGH, LOG_LOW = np.float32(6.9313812256e-01), np.float32(9.0580006145e-06)  # ln 2, the first with few bits


@njit(inline="always")  # type: ignore[misc]
def exp(x: Any) -> Any:
    """e^x of x <= 0 to the accuracy of float32, e^-86 below -86: the library's own function is not vectorised."""
    x = max(x, np.float32(-86.0))
    k = np.floor(fma(x, LOG2_E, HALF))
    r = fma(-k, LN2_LOW, fma(-k, LN2_HIGH, x))
    series = fma(fma(fma(fma(fma(fma(E6, r, E5), r, E4), r, E3), r, E2), r, ONE), r, ONE)
    return series * float_of_bits(np.int32((np.int32(k) + np.int32(127)) << np.int32(23)))  # sums of integers are wider in Numba


@njit(inline="always")  # type: ignore[misc]
def log(x: Any) -> Any:
    """Log x of a positive normal x, within one unit in the last place of float32 (the series of the FreeBSD library's logf)."""
    k = np.int32((bits_of_float(x) - SQRT_HALF) >> np.int32(23))
    f = float_of_bits(np.int32(bits_of_float(x) - (k << np.int32(23)))) - ONE  # x = (1 + f) 2^k, 1 + f from sqrt(1/2) to sqrt(2)
    s = f / (np.float32(2.0) + f)
    z = s * s
    rest = z * fma(fma(fma(LOG_4, z, LOG_3), z, LOG_2), z, LOG_1)
    half, whole = HALF * f * f, np.float32(k)
    return fma(whole, LOG_HIGH, f - (half - fma(s, half + rest, whole * LOG_LOW)))
