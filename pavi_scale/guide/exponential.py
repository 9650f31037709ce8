"""An exponential function that the compiler turns into vector instructions."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from pavi_scale.instructions import float_of_bits, fma

ONE, HALF = np.float32(1.0), np.float32(0.5)
LOG2_E, LN2_HIGH, LN2_LOW = np.float32(1.4426950408889634), np.float32(0.693359375), np.float32(-2.12194440e-4)
E2, E3, E4, E5, E6 = (np.float32(1.0 / k) for k in (2, 6, 24, 120, 720))


@njit(inline="always")  # type: ignore[misc]
def exp(x: Any) -> Any:
    """e^x of x <= 0 to the accuracy of float32, e^-86 below -86: the library's own function is not vectorised."""
    x = max(x, np.float32(-86.0))
    k = np.floor(fma(x, LOG2_E, HALF))
    r = fma(-k, LN2_LOW, fma(-k, LN2_HIGH, x))
    series = fma(fma(fma(fma(fma(fma(E6, r, E5), r, E4), r, E3), r, E2), r, ONE), r, ONE)
    return series * float_of_bits(np.int32((np.int32(k) + np.int32(127)) << np.int32(23)))  # sums of integers are wider in Numba
