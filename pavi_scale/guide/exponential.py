"""An exponential function and a fused product that the compiler turns into vector instructions."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

ONE, HALF = np.float32(1.0), np.float32(0.5)
LOG2_E, LN2_HIGH, LN2_LOW = np.float32(1.4426950408889634), np.float32(0.693359375), np.float32(-2.12194440e-4)
E2, E3, E4, E5, E6 = (np.float32(1.0 / k) for k in (2, 6, 24, 120, 720))


@intrinsic  # type: ignore[misc]
def _float_of_bits(_context: Any, bits: Any) -> Any:
    """The float32 that an int32's bits are."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), generate


def _fma(_context: Any, a: Any, b: Any, c: Any) -> Any:
    """a b + c of float32 with one rounding."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.fma(*args)

    return types.float32(types.float32, types.float32, types.float32), generate


fma: Any = intrinsic(_fma)


@njit(inline="always")  # type: ignore[misc]
def exp(x: Any) -> Any:
    """e^x of x <= 0 to the accuracy of float32, e^-86 below -86: the library's own function is not vectorised."""
    x = max(x, np.float32(-86.0))
    k = np.floor(fma(x, LOG2_E, HALF))
    r = fma(-k, LN2_LOW, fma(-k, LN2_HIGH, x))
    series = fma(fma(fma(fma(fma(fma(E6, r, E5), r, E4), r, E3), r, E2), r, ONE), r, ONE)
    return series * _float_of_bits((np.int32(k) + np.int32(127)) << np.int32(23))  # type: ignore[call-arg]
