"""An exponential function that the compiler turns into vector instructions."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

FAST = {"contract", "reassoc", "nsz", "arcp"}  # no assumption about NaN: they must come through
ONE, HALF = np.float32(1.0), np.float32(0.5)
LOG2_E, LN2_HIGH, LN2_LOW = np.float32(1.4426950408889634), np.float32(0.693359375), np.float32(-2.12194440e-4)
E2, E3, E4, E5, E6 = (np.float32(1.0 / k) for k in (2, 6, 24, 120, 720))


@intrinsic  # type: ignore[misc]
def _float_of_bits(_context: Any, bits: Any) -> Any:
    """The float32 that an int32's bits are."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), generate


@njit(fastmath=FAST, inline="always")  # type: ignore[misc]
def exp(x: Any) -> Any:
    """e^x of x <= 0 to the accuracy of float32, e^-86 below -86: the library's own function is not vectorised."""
    x = max(x, np.float32(-86.0))
    k = np.floor(x * LOG2_E + HALF)
    r = (x - k * LN2_HIGH) - k * LN2_LOW
    series = (((((E6 * r + E5) * r + E4) * r + E3) * r + E2) * r + ONE) * r + ONE
    return series * _float_of_bits((np.int32(k) + np.int32(127)) << np.int32(23))  # type: ignore[call-arg]
