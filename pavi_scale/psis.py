"""Pareto-smoothed importance weights (Vehtari, Simpson, Gelman, Yao, Gabry 2024; generalised Pareto fit of Zhang & Stephens 2009).

Vectorised over units; the tests hold it against arviz-stats, which treats one unit at a time.
"""

from __future__ import annotations

import numpy as np
from scipy.special import logsumexp


def pareto_shape(excess: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Generalised Pareto shape and scale of sorted positive excesses.

    Args:
        excess: `[..., M]`, ascending along the last axis.

    Returns:
        (k, sigma), each `[...]`; k is regularised towards 0.5 with ten pseudo-observations, as in the paper.
    """
    m = excess.shape[-1]
    grid = 30 + int(np.sqrt(m))
    quartile = np.maximum(excess[..., int(m / 4 + 0.5) - 1], 1e-300)
    b = 1.0 - np.sqrt(grid / (np.arange(1, grid + 1) - 0.5))
    b = b / (3.0 * quartile[..., None]) + 1.0 / np.maximum(excess[..., -1:], 1e-300)
    k = np.log1p(-b[..., None] * excess[..., None, :]).mean(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        length = m * (np.log(-b / k) - k - 1.0)
    length = np.where(np.isfinite(length), length, -np.inf)
    w = np.exp(length - logsumexp(length, axis=-1, keepdims=True))
    b_post = (b * w).sum(-1)
    k_post = np.log1p(-b_post[..., None] * excess).mean(-1)
    sigma = -k_post / b_post
    return (m * k_post + 10 * 0.5) / (m + 10), sigma


def tail_length(n: int) -> int:
    """How many of n weights the tail holds."""
    return int(np.ceil(min(n / 5, 3 * np.sqrt(n))))


def khat(log_ratio: np.ndarray) -> np.ndarray:
    """Pareto k-hat of log importance ratios along the last axis; -inf where they are all equal, inf where not finite.

    Args:
        log_ratio: `[..., S]`.
    """
    s = log_ratio.shape[-1]
    m = tail_length(s)
    if m < 5:
        return np.full(log_ratio.shape[:-1], np.inf)
    finite = np.isfinite(log_ratio).all(-1)
    safe = np.where(finite[..., None], log_ratio, 0.0)
    ordered = np.sort(safe - safe.max(-1, keepdims=True), -1)
    constant = ordered[..., 0] > -1e-8
    cut = np.exp(ordered[..., -m - 1])[..., None]
    excess = np.maximum(np.exp(ordered[..., -m:]) - cut, 1e-300)
    with np.errstate(all="ignore"):
        k, _ = pareto_shape(excess)
    k = np.where(constant, -np.inf, np.where(np.isfinite(k), k, np.inf))
    return np.where(finite, k, np.inf)


def smooth(log_ratio: np.ndarray) -> tuple[np.ndarray, float]:
    """Smoothed, normalised log weights of one set of log ratios `[S]`, and their k-hat."""
    s = len(log_ratio)
    log_w = np.where(np.isnan(log_ratio), -np.inf, log_ratio) - np.nanmax(log_ratio)
    m = tail_length(s)
    k = -np.inf
    if m >= 5 and np.ptp(log_w) > 1e-8:
        order = np.argsort(log_w, kind="stable")
        tail = order[-m:]
        cut = np.exp(log_w[order[-m - 1]])
        excess = np.maximum(np.exp(log_w[tail]) - cut, 1e-300)
        with np.errstate(all="ignore"):
            shape, scale = pareto_shape(excess)
        k = float(shape)
        if np.isfinite(k) and np.isfinite(scale):
            p = (np.arange(m) + 0.5) / m
            quantile = -scale * np.log1p(-p) if abs(k) < 1e-8 else scale / k * np.expm1(-k * np.log1p(-p))
            log_w[tail] = np.minimum(np.log(quantile + cut), 0.0)
        else:
            k = np.inf
    return log_w - logsumexp(log_w), k
