"""Tests of uniform ranks by simultaneous bands of their empirical distribution function, and intervals of shares.

Säilynoja, Bürkner and Vehtari (2022), "Graphical test for discrete uniformity and its applications in goodness-of-fit evaluation and multiple
sample comparison", arXiv 2103.10522. Of N ranks, uniform on 0..M-1, the number below c is Binomial(N, c/M). A band is every count x with

    2 min(P(X <= x), P(X >= x)) > gamma

at each of K cuts c; the chance of leaving it anywhere follows exactly from the Markov chain of the counts (their section 2.2), no simulation.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import sqrt

import numpy as np
from scipy.special import bdtr, bdtrc, chdtr, chdtrc, gammaln, ndtri

CUTS = 64


@dataclass(frozen=True)
class Bands:
    """The distribution of counts of uniform ranks below a grid of cuts.

    Args:
        ranks: Number of ranks, N.
        values: Number of values that a rank can take, M.
        most: Cuts, at most; never more than ranks.
    """

    ranks: int
    values: int
    most: int = CUTS

    @cached_property
    def cuts(self) -> np.ndarray:
        """Cuts 0 < c < M, evenly spaced, `[K]`."""
        count = max(1, min(self.most, self.ranks, self.values - 1))
        return np.unique(np.rint(np.arange(1, count + 1) * self.values / (count + 1)).astype(int).clip(1, self.values - 1))

    @cached_property
    def _tails(self) -> np.ndarray:
        """2 min(P(X <= x), P(X >= x)) for every cut and count, `[K, N + 1]`."""
        x, share = np.arange(self.ranks + 1), self.cuts[:, None] / self.values
        return 2 * np.minimum(bdtr(x, self.ranks, share), np.where(x > 0, bdtrc(np.maximum(x - 1, 0), self.ranks, share), 1.0))

    def counts(self, ranks: np.ndarray) -> np.ndarray:
        """How many of each series' ranks `[N, S]` lie below each cut, `[K, S]`."""
        return (ranks[None] < self.cuts[:, None, None]).sum(1)

    def leaving(self, gamma: np.ndarray) -> np.ndarray:
        """Probability that uniform ranks leave the band of each `gamma`, `[S]`."""
        n = np.arange(self.ranks + 1)
        more, left = n[None] - n[:, None], self.ranks - n
        # log of (N - a)! / ((b - a)! (N - b)!): from a ranks below one cut to b below the next.
        ways = np.where(more >= 0, gammaln(left[:, None] + 1) - gammaln(np.maximum(more, 0) + 1) - gammaln(left[None] + 1), -np.inf)
        chance = np.zeros((len(gamma), self.ranks + 1))
        chance[:, 0] = 1.0
        before = 0
        for cut, tails in zip(self.cuts, self._tails, strict=True):
            step = (cut - before) / (self.values - before)
            moves = np.exp(ways + np.maximum(more, 0) * np.log(step) + left[None] * np.log1p(-step))
            # A hair wider, so that a count as extreme as gamma itself counts as outside whatever its rounding.
            chance = chance @ moves * (tails[None] > gamma[:, None] * (1 + 1e-9))
            before = cut
        return 1 - chance.sum(1)

    def pvalues(self, ranks: np.ndarray) -> np.ndarray:
        """p-value of each series of ranks `[N, S]` under uniformity, `[S]`: the chance of an excursion at least as extreme, anywhere.

        Example:
            >>> uniform, narrow = np.arange(100) % 20, np.arange(100) % 10 + 5
            >>> [bool(p < 0.01) for p in Bands(100, 20).pvalues(np.stack([uniform, narrow], 1))]
            [False, True]
        """
        extreme = np.take_along_axis(self._tails, self.counts(ranks), 1).min(0)
        return self.leaving(extreme).clip(0.0, 1.0)

    def limits(self, level: float) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest counts of a band that uniform ranks leave with probability at most `level`, each `[K]`."""
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            if self.leaving(np.array([middle]))[0] > level:
                high = middle
            else:
                low = middle
        inside = self._tails > low
        return inside.argmax(1), self.ranks - inside[:, ::-1].argmax(1)


def spread_pvalues(ranks: np.ndarray, values: int) -> np.ndarray:
    """p-value of each series of ranks `[N, S]` on 0..values-1, `[S]`, against posteriors that are too narrow or too wide.

    X^2 = sum of squared normal scores of the ranks (Cook, Gelman and Rubin 2006), referred to the scaled chi-squared law of its mean and variance.
    """
    score = ndtri((np.arange(values) + 0.5) / values) ** 2
    scale, freedom = score.var() / (2 * score.mean()), 2 * len(ranks) * score.mean() ** 2 / score.var()
    found = score[ranks].sum(0) / scale
    return 2 * np.minimum(chdtr(freedom, found), chdtrc(freedom, found))


def uniform_pvalues(ranks: np.ndarray, values: int) -> np.ndarray:
    """The smaller p-value of the two tests of each series of ranks `[N, S]`, twice: any departure from uniformity, and too narrow or too wide posteriors."""
    return 2 * np.minimum(Bands(len(ranks), values).pvalues(ranks), spread_pvalues(ranks, values)).clip(max=0.5)


def holm(pvalues: np.ndarray) -> np.ndarray:
    """p-values adjusted for their number (Holm 1979): reject those below a level, and the chance of any false rejection is at most that level.

    Example:
        >>> holm(np.array([0.01, 0.5, 0.04])).round(2).tolist()
        [0.03, 0.5, 0.08]
    """
    order = np.argsort(pvalues)
    scaled = pvalues[order] * np.arange(len(pvalues), 0, -1)
    out = np.empty(len(pvalues))
    out[order] = np.maximum.accumulate(scaled).clip(max=1.0)
    return out


def wilson(share: float, count: float, level: float = 0.95) -> tuple[float, float]:
    """Confidence interval of a probability, from a share of `count` trials (Wilson 1927)."""
    z = float(ndtri(0.5 + level / 2))
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return middle - half, middle + half
