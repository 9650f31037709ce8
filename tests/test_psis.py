"""Pareto-smoothed importance weights against arviz-stats and against known tails."""

import numpy as np
import pytest
from arviz_stats.base import array_stats
from scipy import stats

from pavi_scale.psis import khat, smooth, tail_length

TAILS = {
    "normal, wide enough": lambda r, n: _ratio(r, n, 1.2),
    "normal, narrow": lambda r, n: _ratio(r, n, 0.7),
    "normal, far too narrow": lambda r, n: _ratio(r, n, 0.4),
    "Pareto 0.3": lambda r, n: np.log(stats.genpareto(0.3).rvs(n, random_state=r) + 1.0),
    "Pareto 0.9": lambda r, n: np.log(stats.genpareto(0.9).rvs(n, random_state=r) + 1.0),
    "uniform weights": lambda r, n: np.log(r.uniform(0.5, 1.0, n)),
    "log-normal": lambda r, n: 1.5 * r.normal(size=n),
    "shifted far": lambda r, n: 1000.0 + r.normal(size=n),
}


def _ratio(rng, n, scale):
    x = scale * rng.normal(size=n)
    return stats.norm.logpdf(x) - stats.norm.logpdf(x, scale=scale)


@pytest.mark.parametrize("n", [100, 400, 2500])  # sizes at which both packages round the tail's length alike
@pytest.mark.parametrize("tail", TAILS)
def test_khat_and_smoothed_weights_are_arvizs(tail, n):
    ratio = TAILS[tail](np.random.default_rng(n), n)
    # arviz takes log-likelihoods, that is minus log ratios
    expected_w, expected_k = array_stats.psislw(-ratio)
    log_w, k = smooth(ratio)
    np.testing.assert_allclose(k, expected_k, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(np.exp(log_w), np.exp(expected_w), rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(khat(ratio), expected_k, rtol=1e-6, atol=1e-6)


def test_units_are_treated_alone():
    rng = np.random.default_rng(0)
    ratios = np.stack([make(rng, 500) for make in TAILS.values()])
    together = khat(ratios.reshape(2, 4, 500))
    np.testing.assert_array_equal(together.ravel(), [float(khat(r)) for r in ratios])


def test_a_known_shape_is_recovered():
    rng = np.random.default_rng(1)
    for shape in (0.2, 0.5, 0.8, 1.2):
        ratio = np.log(stats.genpareto(shape).rvs(200_000, random_state=rng) + 1.0)
        assert abs(float(khat(ratio)) - shape) < 0.12


def test_shifting_and_permuting_the_log_ratios_changes_nothing():
    rng = np.random.default_rng(2)
    ratio = rng.normal(size=800)
    order = rng.permutation(800)
    log_w, k = smooth(ratio)
    shifted, k2 = smooth(ratio[order] + 300.0)
    assert k2 == pytest.approx(k, abs=1e-9)
    np.testing.assert_allclose(shifted, log_w[order], atol=1e-9)


def test_equal_ratios_have_no_tail_and_stay_equal():
    log_w, k = smooth(np.full(300, -17.3))
    assert k == -np.inf
    np.testing.assert_allclose(log_w, -np.log(300))
    assert khat(np.full((2, 300), 4.0)).tolist() == [-np.inf, -np.inf]


def test_what_is_not_finite_is_not_trusted():
    ratio = np.random.default_rng(3).normal(size=(3, 200))
    ratio[1, 5], ratio[2, 7] = np.nan, np.inf
    assert np.isfinite(khat(ratio)).tolist() == [True, False, False]
    assert (khat(ratio)[1:] == np.inf).all()
    log_w, _ = smooth(np.where(np.arange(200) == 5, np.nan, ratio[0]))
    assert np.exp(log_w)[5] == 0.0
    assert np.exp(log_w).sum() == pytest.approx(1.0)


def test_too_few_draws_are_not_trusted():
    assert khat(np.zeros(10) + np.arange(10)) == np.inf
    assert [tail_length(n) for n in (100, 225, 10_000)] == [20, 45, 300]


def test_smoothed_weights_keep_the_order_and_sum_to_one():
    ratio = np.random.default_rng(4).standard_t(2, size=1000)
    log_w, _ = smooth(ratio)
    assert np.exp(log_w).sum() == pytest.approx(1.0)
    assert (np.diff(log_w[np.argsort(ratio)]) >= -1e-12).all()


def test_smoothing_estimates_a_mean_better_than_raw_weights():
    # E[x^2] of a standard normal from a narrow proposal: raw weights have infinite variance.
    raw, smoothed = [], []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        x = 0.65 * rng.normal(size=2000)
        ratio = stats.norm.logpdf(x) - stats.norm.logpdf(x, scale=0.65)
        w = np.exp(ratio - ratio.max())
        raw.append((w / w.sum()) @ x**2 - 1.0)
        smoothed.append(np.exp(smooth(ratio)[0]) @ x**2 - 1.0)
    assert np.mean(np.square(smoothed)) < np.mean(np.square(raw))
