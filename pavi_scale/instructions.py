"""Instructions that Numba has no name for; loops of them become vector instructions, and their bits are the same on every machine."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic


def _fma(_context: Any, a: Any, b: Any, c: Any) -> Any:
    """a b + c with one rounding, all three of float32 or all of float64."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.fma(*args)

    return (a(a, b, c), generate) if a == b == c and a in (types.float32, types.float64) else None


def _float_of_bits(_context: Any, bits: Any) -> Any:
    """The float that an integer's bits are: float32 of int32, float64 of int64."""
    kind, made = (types.float32, ir.FloatType()) if bits == types.int32 else (types.float64, ir.DoubleType())

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], made)

    return (kind(bits), generate) if bits in (types.int32, types.int64) else None


def _bits_of_float(_context: Any, x: Any) -> Any:
    """The integer that a float's bits are: int32 of float32, int64 of float64."""
    kind, made = (types.int32, ir.IntType(32)) if x == types.float32 else (types.int64, ir.IntType(64))

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], made)

    return (kind(x), generate) if x in (types.float32, types.float64) else None


fma: Any = intrinsic(_fma)
float_of_bits: Any = intrinsic(_float_of_bits)
bits_of_float: Any = intrinsic(_bits_of_float)
