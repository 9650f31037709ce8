r"""Sweeps over the leaves of a labelled component: many small posteriors of the same shape, all at once.

A leaf has logits z in R^L with a Gaussian prior of precision P, and T observations of a mixture whose labels have probabilities softmax(z):

.. math:: f(z) = o \cdot z - z P z / 2 + \sum_t \left( \log\sum_l e^{z_l + b_{tl}} - \log\sum_l e^{z_l} \right)

b is the evidence of each label, o = P loc the prior's pull. With p = softmax(z), r_t = softmax(z + b_t),

.. math:: \nabla f = o - P z + \sum_t (r_t - p), \qquad -\nabla^2 f = P + T (\mathrm{diag}\,p - p p^T) - \sum_t (\mathrm{diag}\,r_t - r_t r_t^T) = H

The mean lies off the mode by C t / 2 with C = H^-1 and t the gradient of tr(C \nabla^2 f) at fixed C, to the order of the third derivatives
(Tierney & Kadane 1986; Rue, Martino & Chopin 2009).

Fused products are asked for by name, and the compiler may not reorder anything: the bits are the same wherever and whenever the code was compiled.

Leaves of one parent unit lie along the first axis, parent units along the last, and every inner loop runs over parent units: the compiler turns
it into vector instructions, and nothing of a leaf is written to memory but what was asked for. Division is NumPy's, since a loop that may raise
is not turned into any.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from pavi_scale.guide.exponential import HALF, ONE, exp, log
from pavi_scale.instructions import fma

LANES = 128  # parent units at once: long loops, since each begins with checks that its arrays lie apart; more, and a leaf's work space outgrows the cache
LEAST = np.float32(0.05)  # of a pivot, in units of the prior's: the mixture may be convex far from the mode
LONGEST = np.float32(4.0)  # of one step of a logit


@njit(nogil=True, error_model="numpy", forceinline=True)  # type: ignore[misc]
def _load(row: Any, out: Any) -> None:
    """out <- row, with zeros where it ends."""
    # From a view: an index with an offset might be negative for all that the compiler knows, and its loop would gather.
    out[: len(row)] = row
    out[len(row) :] = np.float32(0.0)


@njit(nogil=True, error_model="numpy", forceinline=True)  # type: ignore[misc]
def _look(
    b: Any, s: Any, at: Any, width: Any, z: Any, offset: Any, precision: Any, share: Any, top: Any, total: Any, g: Any, h: Any, level: Any, valued: Any
) -> None:
    """Gradient and curvature of the leaves `s` of the parents from `at` at z; label probabilities into `share` (prior's last), sum_t of f to `level`."""
    observations, labels = b.shape[1], b.shape[2]
    for i in range(labels):
        for u in range(LANES):
            g[i, u] = offset[i, u]
        for k in range(labels):
            q = precision[i, k]
            for u in range(LANES):
                g[i, u] = fma(-q, z[k, u], g[i, u])
    for u in range(LANES):
        level[u] = np.float32(0.0)
    for t in range(observations, -1, -1):  # the prior's labels first: they set h
        sign = np.float32(observations) if t == observations else -ONE
        for u in range(LANES):
            top[u] = np.float32(-1e30)
            total[u] = np.float32(0.0)
        for i in range(labels):
            for u in range(LANES):
                share[t, i, u] = z[i, u]
            if t < observations:
                row = b[s, t, i, at : at + width]
                for u in range(width):
                    share[t, i, u] += row[u]
            for u in range(LANES):
                top[u] = max(top[u], share[t, i, u])
        for i in range(labels):
            for u in range(LANES):
                share[t, i, u] = exp(share[t, i, u] - top[u])
                total[u] += share[t, i, u]
        if valued:
            for u in range(LANES):
                level[u] -= sign * (top[u] + log(total[u]))
        for u in range(LANES):
            total[u] = ONE / total[u]
        for i in range(labels):
            for u in range(LANES):
                share[t, i, u] *= total[u]
                g[i, u] = fma(-sign, share[t, i, u], g[i, u])
            for k in range(i + 1):
                if t == observations:
                    q = precision[i, k]
                    for u in range(LANES):
                        h[i, k, u] = fma(-sign * share[t, i, u], share[t, k, u], q)
                else:
                    for u in range(LANES):
                        h[i, k, u] = fma(-sign * share[t, i, u], share[t, k, u], h[i, k, u])
            for u in range(LANES):
                h[i, i, u] = fma(sign, share[t, i, u], h[i, i, u])


@njit(nogil=True, error_model="numpy", forceinline=True)  # type: ignore[misc]
def _factorise(h: Any, precision: Any) -> None:
    """Cholesky factor of h in its place, with the inverse of its diagonal on the diagonal; a pivot is not less than a share of the prior's."""
    labels = len(precision)
    for k in range(labels):
        for i in range(k, labels):
            for m in range(k):
                for u in range(LANES):
                    h[i, k, u] = fma(-h[i, m, u], h[k, m, u], h[i, k, u])
        least = LEAST * precision[k, k]
        for u in range(LANES):
            h[k, k, u] = ONE / np.sqrt(max(h[k, k, u], least))
        for i in range(k + 1, labels):
            for u in range(LANES):
                h[i, k, u] *= h[k, k, u]


@njit(nogil=True, error_model="numpy", forceinline=True)  # type: ignore[misc]
def _solve(h: Any, x: Any) -> None:
    """x <- H^-1 x, from the factor."""
    labels = len(x)
    for i in range(labels):
        for m in range(i):
            for u in range(LANES):
                x[i, u] = fma(-h[i, m, u], x[m, u], x[i, u])
        for u in range(LANES):
            x[i, u] *= h[i, i, u]
    for i in range(labels - 1, -1, -1):
        for m in range(i + 1, labels):
            for u in range(LANES):
                x[i, u] = fma(-h[m, i, u], x[m, u], x[i, u])
        for u in range(LANES):
            x[i, u] *= h[i, i, u]


@njit(nogil=True, error_model="numpy", forceinline=True)  # type: ignore[misc]
def _invert(h: Any, c: Any) -> None:
    """c <- H^-1, both halves; h, the factor, is overwritten by its inverse."""
    labels = len(h)
    for k in range(labels):
        for i in range(k + 1, labels):
            for u in range(LANES):
                c[0, 0, u] = h[i, k, u] * h[k, k, u]
            for m in range(k + 1, i):
                for u in range(LANES):
                    c[0, 0, u] = fma(h[i, m, u], h[m, k, u], c[0, 0, u])
            for u in range(LANES):
                h[i, k, u] = -c[0, 0, u] * h[i, i, u]
    for i in range(labels):
        for k in range(i + 1):
            for u in range(LANES):
                c[i, k, u] = h[i, i, u] * h[i, k, u]
            for m in range(i + 1, labels):
                for u in range(LANES):
                    c[i, k, u] = fma(h[m, i, u], h[m, k, u], c[i, k, u])
            for u in range(LANES):
                c[k, i, u] = c[i, k, u]


@njit(nogil=True, error_model="numpy", forceinline=True)  # type: ignore[misc]
def _times(c: Any, x: Any, out: Any) -> None:
    """out <- C x."""
    labels = len(c)
    for i in range(labels):
        for u in range(LANES):
            out[i, u] = np.float32(0.0)
        for k in range(labels):
            for u in range(LANES):
                out[i, u] = fma(c[i, k, u], x[k, u], out[i, u])


@njit(nogil=True, error_model="numpy", forceinline=True)  # type: ignore[misc]
def _third(c: Any, share: Any, sign: Any, work: Any, one: Any, two: Any, t: Any) -> None:
    """Adds sign times the gradient of tr(C (diag r - r r^T)) by z to t: r_j (C_jj - sum_k C_kk r_k - 2 ((C r)_j - r C r))."""
    labels = len(c)
    _times(c, share, work)
    for u in range(LANES):
        one[u] = np.float32(0.0)
        two[u] = np.float32(0.0)
    for i in range(labels):
        for u in range(LANES):
            one[u] = fma(c[i, i, u], share[i, u], one[u])
            two[u] = fma(work[i, u], share[i, u], two[u])
    for i in range(labels):
        for u in range(LANES):
            t[i, u] += sign * share[i, u] * (c[i, i, u] - one[u] - np.float32(2.0) * (work[i, u] - two[u]))


@njit(nogil=True, error_model="numpy", forceinline=True)  # type: ignore[misc]
def _average(c: Any, share: Any, work: Any, one: Any, two: Any) -> None:
    """share <- its mean over z with covariance C about where it was taken, to second order; `work`, `one`, `two` as `_third` left them.

    E[r_j] = r_j + r_j ((e_j - r)^T C (e_j - r) - (sum_k C_kk r_k - r C r)) / 2.
    """
    labels = len(c)
    for i in range(labels):
        for u in range(LANES):
            bend = c[i, i, u] - np.float32(2.0) * work[i, u] + two[u] - (one[u] - two[u])
            share[i, u] = max(share[i, u] * (ONE + HALF * bend), np.float32(0.0))
    for u in range(LANES):  # what was cut off below zero
        one[u] = np.float32(0.0)
    for i in range(labels):
        for u in range(LANES):
            one[u] += share[i, u]
    for i in range(labels):
        for u in range(LANES):
            share[i, u] /= one[u]


@njit(nogil=True, error_model="numpy", forceinline=True)  # type: ignore[misc]
def _value(at: Any, width: Any, z: Any, offset: Any, precision: Any, h: Any, level: Any, one: Any, value: Any) -> None:
    """Adds f(z) - log det L of the leaves to `value`; h the factor, `level` the observations' part of f."""
    labels = len(precision)
    for u in range(LANES):
        one[u] = ONE
    for i in range(labels):
        for u in range(LANES):
            one[u] *= h[i, i, u]
            level[u] += z[i, u] * offset[i, u]
        for k in range(labels):
            q = HALF * precision[i, k]
            for u in range(LANES):
                level[u] -= q * z[i, u] * z[k, u]
    row = value[at : at + width]
    for u in range(width):
        row[u] += level[u] + log(one[u])


@njit(nogil=True, error_model="numpy", forceinline=True)  # type: ignore[misc]
def _spread(c: Any, gain: Any, v: Any, h: Any) -> None:
    """h <- C + V V^T with V = C gain: the leaf's covariance with what its parent's spread adds."""
    labels = len(c)
    for i in range(labels):
        for k in range(i + 1):
            for u in range(LANES):
                h[i, k, u] = c[i, k, u]
    for e in range(gain.shape[1]):
        for i in range(labels):
            for u in range(LANES):
                v[i, u] = np.float32(0.0)
            for k in range(labels):
                for u in range(LANES):
                    v[i, u] = fma(c[i, k, u], gain[k, e, u], v[i, u])
        for i in range(labels):
            for k in range(i + 1):
                for u in range(LANES):
                    h[i, k, u] = fma(v[i, u], v[k, u], h[i, k, u])
    for i in range(labels):
        for k in range(i):
            for u in range(LANES):
                h[k, i, u] = h[i, k, u]


@njit(nogil=True, error_model="numpy", forceinline=True)  # type: ignore[misc]
def _skew(c: Any, share: Any, averaged: Any, work: Any, one: Any, two: Any, shift: Any) -> None:
    """shift <- the gradient t of tr(C Hessian of f); the observations' label probabilities are averaged over z if asked for."""
    observations, labels = len(share) - 1, len(c)
    for i in range(labels):
        for u in range(LANES):
            shift[i, u] = np.float32(0.0)
    for t in range(observations + 1):
        _third(c, share[t], np.float32(-observations) if t == observations else ONE, work, one, two, shift)
        if averaged and t < observations:
            _average(c, share[t], work, one, two)


@njit(nogil=True, error_model="numpy", forceinline=True)  # type: ignore[misc]
def _report(
    s: Any, at: Any, width: Any, here: Any, c: Any, whole: Any, share: Any, work: Any, shift: Any, mean_sum: Any, mean: Any, variance: Any, share_out: Any
) -> None:
    """Write what is asked of a leaf: its mean here + C t / 2, its variance, its observations' label probabilities."""
    labels = len(c)
    _times(c, shift, work)
    for i in range(labels):
        row = mean_sum[i, at : at + width]
        for u in range(width):
            row[u] += here[i, u] + HALF * work[i, u]
        if mean.size:
            first, second = mean[s, i, at : at + width], variance[s, i, at : at + width]
            for u in range(width):
                first[u] = here[i, u] + HALF * work[i, u]
                second[u] = whole[i, i, u]
        if share_out.size:
            for t in range(len(share) - 1):
                out = share_out[s, t, i, at : at + width]
                for u in range(width):
                    out[u] = share[t, i, u]


@njit(nogil=True, error_model="numpy", cache=True)  # type: ignore[misc]
def sweep(
    b: Any, z: Any, todo: Any, offset: Any, precision: Any, steps: int, gain: Any,
    mean_sum: Any, cov_sum: Any, value: Any, mean: Any, variance: Any, share_out: Any,
) -> None:
    """Newton steps of every leaf given its parent, and what the parents need of them.

    Args:
        b: Evidence, `[S, T, L, n]`, float32: S leaves of each of n parents.
        z: Logits, `[S, L, n]`; moved to the mode.
        todo: First parents of the groups of `LANES` to look at.
        offset: P loc, `[L, n]`.
        precision: P, `[L, L]`.
        steps: Newton steps.
        gain: -Q M, `[L, E, n]`: Q the coupling to the parent, M a factor of its covariance; or of no size, for conditional moments.
        mean_sum: Means given the parent, summed over leaves, `[L, n]`, float64; added to.
        cov_sum: Their covariances, `[L, L, n]`, float64; added to.
        value: sum over leaves of f at the mode - log det L, `[n]`, float64; or of no size.
        mean: Means, `[S, L, n]`; or of no size.
        variance: Variances, with what `gain` adds, `[S, L, n]`; or of no size.
        share_out: Mean label probabilities, `[S, T, L, n]`; or of no size.
    """
    leaves, observations, labels, parents = b.shape
    coarse = gain.shape[1]
    h = np.empty((labels, labels, LANES), np.float32)
    c = np.empty((labels, labels, LANES), np.float32)
    share = np.empty((observations + 1, labels, LANES), np.float32)
    here, g, work = np.empty((labels, LANES), np.float32), np.empty((labels, LANES), np.float32), np.empty((labels, LANES), np.float32)
    own, shift = np.empty((labels, LANES), np.float32), np.empty((labels, LANES), np.float32)
    one, two, level = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    local = np.empty((labels, coarse, LANES), np.float32)
    for at in todo:
        width = min(LANES, parents - at)
        for i in range(labels):
            _load(offset[i, at : at + width], own[i])
            for e in range(coarse):
                _load(gain[i, e, at : at + width], local[i, e])
        for s in range(leaves):
            for i in range(labels):
                _load(z[s, i, at : at + width], here[i])
            for step in range(steps):
                valued = value.size > 0 and step == steps - 1
                _look(b, s, at, width, here, own, precision, share, one, two, g, h, level, valued)
                _factorise(h, precision)
                if valued:  # before the step, which leaves it where it is at the mode
                    _value(at, width, here, own, precision, h, level, one, value)
                _solve(h, g)
                for i in range(labels):
                    for u in range(LANES):
                        g[i, u] = min(max(g[i, u], -LONGEST), LONGEST)
                        here[i, u] += g[i, u]
            for i in range(labels):
                row = z[s, i, at : at + width]
                for u in range(width):
                    row[u] = here[i, u]
            _invert(h, c)
            for i in range(labels):
                for k in range(i + 1):
                    out = cov_sum[i, k, at : at + width]
                    for u in range(width):
                        out[u] += c[i, k, u]
            if coarse:
                _spread(c, local, g, h)
            _skew(h if coarse else c, share, share_out.size > 0, work, one, two, shift)
            _report(s, at, width, here, c, h if coarse else c, share, work, shift, mean_sum, mean, variance, share_out)


@njit(nogil=True, error_model="numpy", cache=True)  # type: ignore[misc]
def scatter(b: Any, z: Any, offset: Any, precision: Any, steps: int, noise: Any) -> None:
    """A draw of every leaf given its parent: mean + L^-T u.

    Args:
        b: Evidence, `[S, T, L, n]`, float32.
        z: Logits to start from, `[S, L, n]`; replaced by the draw.
        offset: P loc, `[L, n]`.
        precision: P, `[L, L]`.
        steps: Newton steps.
        noise: Standard normals u, `[S, L, n]`.
    """
    leaves, observations, labels, parents = b.shape
    h = np.empty((labels, labels, LANES), np.float32)
    c = np.empty((labels, labels, LANES), np.float32)
    share = np.empty((observations + 1, labels, LANES), np.float32)
    here, g, work = np.empty((labels, LANES), np.float32), np.empty((labels, LANES), np.float32), np.empty((labels, LANES), np.float32)
    own, shift = np.empty((labels, LANES), np.float32), np.empty((labels, LANES), np.float32)
    one, two, level = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    for at in range(0, parents, LANES):
        width = min(LANES, parents - at)
        for i in range(labels):
            _load(offset[i, at : at + width], own[i])
        for s in range(leaves):
            for i in range(labels):
                _load(z[s, i, at : at + width], here[i])
            for _ in range(steps):
                _look(b, s, at, width, here, own, precision, share, one, two, g, h, level, False)
                _factorise(h, precision)
                _solve(h, g)
                for i in range(labels):
                    for u in range(LANES):
                        here[i, u] += min(max(g[i, u], -LONGEST), LONGEST)
            for i in range(labels - 1, -1, -1):
                _load(noise[s, i, at : at + width], g[i])
                for m in range(i + 1, labels):
                    for u in range(LANES):
                        g[i, u] = fma(-h[m, i, u], g[m, u], g[i, u])
                for u in range(LANES):
                    g[i, u] *= h[i, i, u]
            _invert(h, c)
            _skew(c, share, False, work, one, two, shift)
            _times(c, shift, work)
            for i in range(labels):
                row = z[s, i, at : at + width]
                for u in range(width):
                    row[u] = here[i, u] + HALF * work[i, u] + g[i, u]
