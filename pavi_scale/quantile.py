r"""Standard normals from counters, in one compiled loop: the last mixing of the bits, then the normal quantile function.

The quantile is Wichura's PPND16 (algorithm AS 241, Applied Statistics 37, 477-484, 1988): with q = p - 1/2,

.. math:: \Phi^{-1}(p) = q A(r) / B(r), r = 0.425^2 - q^2 \;(|q| \le 0.425), \qquad \pm C(r - 1.6) / D(r - 1.6), r = \sqrt{-\log\min(p, 1 - p)} \le 5,

and E(r - 5) / F(r - 5) beyond, in the outermost 1.4e-11. Seven numbers of eight are central: all are computed as if they were, without a branch, and
those of the tails are then gathered, computed and put back. Products are fused by name and nothing is reordered, so that a number has the same bits
wherever in an array it lies, on every machine, and whether this code was compiled in the process or loaded from the cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from pavi_scale.counters import GOLDEN, LAST
from pavi_scale.instructions import bits_of_float, float_of_bits, fma

LANES = 1024  # numbers made at once: their work space stays in the fastest cache
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_LN2_HIGH, _LN2_LOW = 0.6931471803691238, 1.9082149292705877e-10  # the first with few bits, so that its products with small integers are exact
_SQRT_HALF = np.int64(0x3FE6A09E667F3BCD)  # the bits of sqrt(1/2)


@njit(inline="always")  # type: ignore[misc]
def _mix(x: Any) -> Any:
    """SplitMix64 finaliser (Steele, Lea, Flood 2014) of a uint64."""
    x = (x ^ (x >> np.uint64(30))) * _FIRST
    x = (x ^ (x >> np.uint64(27))) * _SECOND
    return x ^ (x >> np.uint64(31))


@njit(inline="always")  # type: ignore[misc]
def _log(x: Any) -> Any:
    """log x of a normal float64 x, off by less than 2 units in the last place below 0.1.

    x = 2^k m with sqrt(1/2) <= m < sqrt(2), log m = 2 artanh s = 2 (s + s^3 / 3 + ...), s = (m - 1) / (m + 1), |s| < 0.172: after s^21 less than 1e-18 is left.
    """
    bits = bits_of_float(x)
    k = (bits - _SQRT_HALF) >> np.int64(52)
    m = float_of_bits(bits - (k << np.int64(52)))
    s = (m - 1.0) / (m + 1.0)
    w = s * s
    series = fma(w, 1 / 21, 1 / 19)
    series = fma(w, fma(w, fma(w, fma(w, series, 1 / 17), 1 / 15), 1 / 13), 1 / 11)
    series = fma(w, fma(w, fma(w, fma(w, series, 1 / 9), 1 / 7), 1 / 5), 1 / 3)
    e = np.float64(k)
    return fma(e, _LN2_HIGH, fma(2.0 * s, fma(w, series, 0.0), fma(e, _LN2_LOW, 2.0 * s)))


@njit(inline="always")  # type: ignore[misc]
def _central(q: Any) -> Any:
    """The quantile of 1/2 + q, |q| <= 0.425."""
    r = fma(-q, q, 0.180625)
    a = fma(fma(fma(r, 2509.0809287301226727, 33430.575583588128105), r, 67265.770927008700853), r, 45921.953931549871457)
    a = fma(fma(fma(fma(a, r, 13731.693765509461125), r, 1971.5909503065514427), r, 133.14166789178437745), r, 3.387132872796366608)
    b = fma(fma(fma(r, 5226.495278852854561, 28729.085735721942674), r, 39307.89580009271061), r, 21213.794301586595867)
    b = fma(fma(fma(fma(b, r, 5394.1960214247511077), r, 687.1870074920579083), r, 42.313330701600911252), r, 1.0)
    return q * a / b


@njit(inline="always")  # type: ignore[misc]
def _tail(r: Any) -> Any:
    """Minus the quantile of exp(-r^2), r <= 5."""
    r = r - 1.6
    c = fma(fma(fma(r, 7.7454501427834140764e-4, 0.0227238449892691845833), r, 0.24178072517745061177), r, 1.27045825245236838258)
    c = fma(fma(fma(fma(c, r, 3.64784832476320460504), r, 5.7694972214606914055), r, 4.6303378461565452959), r, 1.42343711074968357734)
    d = fma(fma(fma(r, 1.05075007164441684324e-9, 5.475938084995344946e-4), r, 0.0151986665636164571966), r, 0.14810397642748007459)
    d = fma(fma(fma(fma(d, r, 0.68976733498510000455), r, 1.6763848301838038494), r, 2.05319162663775882187), r, 1.0)
    return c / d


@njit(inline="always")  # type: ignore[misc]
def _far(r: Any) -> Any:
    """Minus the quantile of exp(-r^2), r > 5."""
    r = r - 5.0
    e = fma(fma(fma(r, 2.01033439929228813265e-7, 2.71155556874348757815e-5), r, 0.0012426609473880784386), r, 0.026532189526576123093)
    e = fma(fma(fma(fma(e, r, 0.29656057182850489123), r, 1.7848265399172913358), r, 5.4637849111641143699), r, 6.6579046435011037772)
    f = fma(fma(fma(r, 2.04426310338993978564e-15, 1.4215117583164458887e-7), r, 1.8463183175100546818e-5), r, 7.868691311456132591e-4)
    f = fma(fma(fma(fma(f, r, 0.0148753612908506148525), r, 0.13692988092273580531), r, 0.59983220655588793769), r, 1.0)
    return e / f


@njit(nogil=True, error_model="numpy", forceinline=True)  # type: ignore[misc]
def _quantiles(p: Any, out: Any, side: Any, low: Any, where: Any) -> None:
    """out <- the normal quantiles of p, `[LANES]`, float64, 2^-54 <= p < 1; `side`, `low` and `where` (int64) are work space of the same length."""
    for u in range(LANES):
        out[u] = _central(p[u] - 0.5)
    count = np.int64(0)
    for u in range(LANES):  # which are not central: no branch, which could not be foreseen
        where[count] = u
        count += np.int64(abs(p[u] - 0.5) > 0.425)
    for v in range(count):
        side[v] = p[where[v]]
    for v in range(count):
        low[v] = np.sqrt(-_log(min(side[v], 1.0 - side[v])))
    far = np.int64(0)
    for v in range(count):
        far += np.int64(low[v] > 5.0)
    if far:
        for v in range(count):
            low[v] = _far(low[v]) if low[v] > 5.0 else _tail(low[v])
    else:
        for v in range(count):
            low[v] = _tail(low[v])
    for v in range(count):
        out[where[v]] = low[v] if side[v] > 0.5 else -low[v]


@njit(nogil=True, error_model="numpy", cache=True)  # type: ignore[misc]
def quantiles(p: Any, out: Any) -> None:
    """Standard normal quantiles.

    Args:
        p: Probabilities in [2^-54, 1), `[n]`, float64.
        out: Replaced by the quantiles, `[n]`, float32 or float64.
    """
    some, where = np.full(LANES, 0.5), np.empty(LANES, np.int64)
    found, side, low = np.empty(LANES), np.empty(LANES), np.empty(LANES)
    for at in range(0, len(p), LANES):
        width = min(LANES, len(p) - at)
        some[:width] = p[at : at + width]
        _quantiles(some, found, side, low, where)
        row = out[at : at + width]
        for u in range(width):
            row[u] = found[u]


@njit(nogil=True, error_model="numpy", cache=True)  # type: ignore[misc]
def normals(state: Any, last: Any, out: Any) -> None:
    """Standard normals, number (i, j) that of `state[i]` after the counter `last[j]`: as `rng.uniform` mixes them, then the quantile.

    Args:
        state: What the earlier counters left, `[m]`, uint64.
        last: The last counter, plus one, times `GOLDEN`, `[k]`, uint64.
        out: Replaced by the numbers, `[m k]`, float32 or float64.
    """
    some, where = np.zeros(LANES, np.uint64), np.empty(LANES, np.int64)
    p, found, side, low = np.empty(LANES), np.empty(LANES), np.empty(LANES), np.empty(LANES)
    i = j = 0
    for at in range(0, len(out), LANES):
        width = min(LANES, len(out) - at)
        for u in range(width):
            some[u] = state[i] + last[j]
            j += 1
            if j == len(last):
                i, j = i + 1, 0
        for u in range(LANES):
            bits = _mix(_mix(some[u]) + GOLDEN) >> np.uint64(11)
            p[u] = min((np.float64(bits) + 0.5) * 2.0**-53, LAST)
        _quantiles(p, found, side, low, where)
        row = out[at : at + width]
        for u in range(width):
            row[u] = found[u]
