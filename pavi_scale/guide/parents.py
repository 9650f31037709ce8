r"""Draws of the parents of a labelled component, and what each leaves to its leaves.

.. math:: \rho = \hat\rho + M u, \qquad o = c - Q \rho, \qquad z_0 = P^{-1} o

for the mode and a factor M of a parent's covariance; o is the pull of a leaf's prior, z_0 its mean (`labels.Prior`). In double precision, in a compiled
loop whose innermost index runs over parents, as in `sweeps`; fused products are asked for by name, so that the bits are the same wherever it runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from pavi_scale.instructions import fma

_LANES = 128  # parents at once


@njit(nogil=True, error_model="numpy", cache=True)  # type: ignore[misc]
def descend(mode: Any, spread: Any, white: Any, c: Any, q: Any, inverse: Any, drawn: Any, offset: Any, start: Any) -> None:
    """Draws of all parents at one root point.

    Args:
        mode: `[E, n]`, float64.
        spread: M^T, `[E, E, n]`, float64.
        white: Standard normals, `[n, E]`, float32 or float64.
        c: `[L]`, float64.
        q: `[L, E]`, float64.
        inverse: P^-1, `[L, L]`, float64.
        drawn: Replaced by the parents, `[n, E]`, float64.
        offset: Replaced by o, `[L, n]`, float64.
        start: Replaced by z_0, `[S, L, n]`, float32: the same for all leaves.
    """
    coarse, parents = mode.shape
    labels = len(c)
    u, rho, o, z = np.empty((coarse, _LANES)), np.empty((coarse, _LANES)), np.empty((labels, _LANES)), np.empty(_LANES)
    for at in range(0, parents, _LANES):
        width = min(_LANES, parents - at)
        given, kept = white[at : at + width], drawn[at : at + width]
        for f in range(coarse):
            for i in range(width):
                u[f, i] = given[i, f]
        for e in range(coarse):
            rho[e, :width] = mode[e, at : at + width]
            for f in range(e, coarse):
                row = spread[f, e, at : at + width]
                for i in range(width):
                    rho[e, i] = fma(row[i], u[f, i], rho[e, i])
            for i in range(width):
                kept[i, e] = rho[e, i]
        for k in range(labels):
            o[k, :] = c[k]
            for e in range(coarse):
                slope = -q[k, e]
                for i in range(width):
                    o[k, i] = fma(slope, rho[e, i], o[k, i])
            offset[k, at : at + width] = o[k, :width]
        for k in range(labels):
            z[:] = 0.0
            for m in range(labels):
                slope = inverse[k, m]
                for i in range(width):
                    z[i] = fma(slope, o[m, i], z[i])
            for s in range(len(start)):
                row = start[s, k, at : at + width]
                for i in range(width):
                    row[i] = z[i]
