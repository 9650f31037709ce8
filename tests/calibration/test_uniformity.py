"""Rank tests against simulation, and intervals against exact coverage."""

import numpy as np
import pytest
from scipy.stats import binom

from pavi_scale.calibration.uniformity import Bands, holm, spread_pvalues, uniform_pvalues, wilson


@pytest.mark.parametrize("test", [lambda r, m: Bands(len(r), m).pvalues(r), spread_pvalues, uniform_pvalues], ids=["bands", "spread", "both"])
@pytest.mark.parametrize(("ranks", "values"), [(40, 256), (100, 101), (20, 20)])
def test_pvalues_are_uniform_under_uniform_ranks_and_never_too_small(ranks, values, test):
    p = test(np.random.default_rng(0).integers(0, values, (ranks, 4000)), values)
    for level in (0.01, 0.05, 0.2, 0.5):
        # Discrete: P(p <= level) is at most level, up to the noise of 4,000 series.
        error = np.sqrt(level * (1 - level) / 4000)
        assert level * 0.6 - 4 * error <= (p <= level).mean() <= level + 4 * error


def test_leaving_probability_against_simulation():
    bands = Bands(30, 64)
    counts = bands.counts(np.random.default_rng(1).integers(0, 64, (30, 20_000)))
    extreme = np.take_along_axis(bands._tails, counts, 1).min(0)
    gamma = np.array([1e-3, 1e-2, 0.1])
    simulated = (extreme[None] <= gamma[:, None]).mean(1)
    np.testing.assert_allclose(bands.leaving(gamma), simulated, atol=4 * np.sqrt(0.25 / 20_000), rtol=0.15)


def test_one_cut_is_the_binomial_test():
    bands = Bands(20, 2)
    assert bands.cuts.tolist() == [1]
    ranks = np.zeros((20, 1), dtype=int)
    ranks[:4] = 1
    assert bands.pvalues(ranks)[0] == pytest.approx(2 * binom.cdf(4, 20, 0.5))


def test_limits_are_left_with_the_probability_asked_for():
    bands = Bands(60, 256)
    low, high = bands.limits(0.05)
    counts = bands.counts(np.random.default_rng(2).integers(0, 256, (60, 20_000)))
    left = ((counts < low[:, None]) | (counts > high[:, None])).any(0).mean()
    assert 0.03 < left < 0.055


@pytest.mark.parametrize("wrong", ["narrow", "wide", "shifted"])
def test_wrong_posteriors_are_found(wrong):
    rng = np.random.default_rng(3)
    truth, draws = rng.normal(size=(100, 20)), rng.normal(size=(255, 100, 20))
    draws = {"narrow": draws * np.sqrt(0.5), "wide": draws * np.sqrt(2), "shifted": draws + 0.6}[wrong]
    found = uniform_pvalues((draws < truth).sum(0), 256)
    assert (found < 0.01).mean() >= 0.9


def test_holm_rejects_as_its_definition_says():
    p = np.random.default_rng(4).uniform(size=30) ** 3
    adjusted = holm(p)
    for level in (0.01, 0.05, 0.3):
        order = np.argsort(p)
        passed = p[order] > level / np.arange(30, 0, -1)
        rejected = order[: passed.argmax() if passed.any() else 30]
        assert set(np.flatnonzero(adjusted <= level)) == set(rejected.tolist())


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_wilson_covers(share):
    n = 80
    low, high = np.array([wilson(k / n, n) for k in range(n + 1)]).T
    assert binom.pmf(np.arange(n + 1), n, share)[(low <= share) & (share <= high)].sum() > 0.92
