"""The root's finish on targets whose evidence and moments are known."""

import math

import numpy as np
import pytest
from scipy import stats

from pavi_scale.guide.student import StudentT
from pavi_scale.marginal import Pool, covariance, curvature, find_mode, nearest, polish, refit, whitening
from pavi_scale.psis import smooth

SHIFT = 3.7  # log evidence of every target below


def _gaussian():
    cov = np.array([[2.0, 0.9, 0.0], [0.9, 1.0, -0.3], [0.0, -0.3, 0.5]])
    mean, precision = np.array([1.0, -2.0, 0.5]), np.linalg.inv(cov)
    law = stats.multivariate_normal(mean, cov)
    return lambda z: np.atleast_1d(law.logpdf(z)), lambda z: -(z - mean) @ precision, mean, np.sqrt(np.diagonal(cov))


def _banana():
    # y | x ~ N(x^2 / 2, 0.7^2): mean of y 1/2, variance 1/2 + 0.49
    def value(z):
        return stats.norm.logpdf(z[:, 0]) + stats.norm(0.5 * z[:, 0] ** 2, 0.7).logpdf(z[:, 1])

    def gradient(z):
        rest = (z[:, 1] - 0.5 * z[:, 0] ** 2) / 0.49
        return np.stack([-z[:, 0] + rest * z[:, 0], -rest], 1)

    return value, gradient, np.array([0.0, 0.5]), np.array([1.0, np.sqrt(0.99)])


def _skewed():
    # log of a Gamma(2) variable: its left tail falls as exp(2 z), its right one doubly exponentially; and an independent normal
    law = stats.loggamma(2.0)
    return (
        lambda z: law.logpdf(z[:, 0]) + stats.norm.logpdf(z[:, 1]),
        lambda z: np.stack([2.0 - np.exp(z[:, 0]), -z[:, 1]], 1),
        np.array([law.mean(), 0.0]),
        np.array([law.std(), 1.0]),
    )


def _heavy():
    law = stats.t(5.0)
    return lambda z: law.logpdf(z).sum(1), lambda z: -6.0 * z / (5.0 + z**2), np.zeros(2), np.full(2, law.std())


def _funnel():
    # scale of a group effect, marginal of the effect's own: log-scale s ~ N(0, 1), one effect of five seen
    def value(z):
        return stats.norm.logpdf(z[:, 0]) + stats.norm(0.0, np.exp(0.5 * z[:, 0])).logpdf(z[:, 1])

    def gradient(z):
        e = z[:, 1] ** 2 * np.exp(-z[:, 0])
        return np.stack([-z[:, 0] - 0.5 + 0.5 * e, -z[:, 1] * np.exp(-z[:, 0])], 1)

    return value, gradient, np.zeros(2), np.array([1.0, math.exp(0.25)])


TARGETS = {"gaussian": _gaussian, "banana": _banana, "skewed": _skewed, "heavy": _heavy, "funnel": _funnel}


def _bound(name):
    value, gradient, mean, sd = TARGETS[name]()
    return (lambda z, wanted: (value(z) + SHIFT, gradient(z) if wanted else None)), mean, sd


def _fit(name, shrink=1.0, seed=0):
    bound, mean, sd = _bound(name)
    draws = mean + 3 * sd * np.random.default_rng(seed).normal(size=(64, len(mean)))
    mode, _ = find_mode(bound, draws, starts=2, max_evaluations=200, deadline=math.inf, on_step=lambda *a: None)[0]
    _, scale = whitening(draws)
    mode, cov = polish(bound, mode, scale, 3)[:2]
    return refit(bound, mode, shrink * cov, seed=seed, per_round=256, target=1500.0, max_points=8192, deadline=math.inf, on_step=lambda *a: None), mean, sd


def _moments(pool):
    mean = pool.weight @ pool.points
    return mean, np.sqrt(pool.weight @ (pool.points - mean) ** 2)


@pytest.mark.parametrize("name", TARGETS)
def test_moments_and_evidence_are_the_targets(name):
    pool, mean, sd = _fit(name)
    found_mean, found_sd = _moments(pool)
    assert pool.ess > 1000
    # A banana's horns stick out of any elliptical proposal: its k-hat may warn although the moments are right.
    assert name == "banana" or pool.khat < 0.7
    np.testing.assert_allclose((found_mean - mean) / sd, 0.0, atol=0.08)
    np.testing.assert_allclose(found_sd / sd, 1.0, atol=0.1 if name in ("heavy", "funnel", "banana") else 0.06)
    evidence = [value for stage, _, value, _ in pool.trace if stage == "refit"][-1]
    assert evidence == pytest.approx(SHIFT, abs=0.05)
    np.testing.assert_allclose(pool.weight.sum(), 1.0)


@pytest.mark.parametrize("name", TARGETS)
def test_a_start_of_halved_variance_is_corrected(name):
    pool, mean, sd = _fit(name, shrink=0.5)
    found_mean, found_sd = _moments(pool)
    np.testing.assert_allclose((found_mean - mean) / sd, 0.0, atol=0.1)
    np.testing.assert_allclose(found_sd / sd, 1.0, atol=0.12)


@pytest.mark.parametrize("name", ["heavy", "skewed", "funnel"])
def test_a_far_too_narrow_gaussian_is_flagged(name):
    value, _, mean, sd = TARGETS[name]()
    narrow = StudentT(mean, np.diag(0.4 * sd))
    z = narrow.sample(np.random.default_rng(0).normal(size=(4000, len(mean))), np.full(4000, 0.5))
    assert smooth(value(z) - narrow.log_prob(z))[1] > 0.7


def test_resampling_follows_the_weights():
    weight = np.array([0.5, 0.0, 0.2, 0.3])
    pool = Pool(np.arange(4.0)[:, None], np.zeros(4), weight, 0.0, StudentT(np.zeros(1), np.eye(1)))
    picks = pool.resample((np.arange(1000) + 0.5) / 1000)
    assert np.bincount(picks, minlength=4).tolist() == [500, 0, 200, 300]
    assert pool.resample(np.array([0.0, 1.0])).tolist() == [0, 3]
    assert pool.ess == pytest.approx(1 / 0.38)


@pytest.mark.parametrize("name", TARGETS)
def test_curvature_is_that_of_the_log_density(name):
    bound, mean, sd = _bound(name)
    value, gradient = TARGETS[name]()[:2]
    at = mean + 0.2 * sd
    found_gradient, found = curvature(bound, at, 1e-4 * sd)
    h = 1e-3
    for i in range(len(at)):
        e = h * np.eye(len(at))[i]
        ends = value(np.stack([at + e, at - e]))
        assert found_gradient[i] == pytest.approx((ends[0] - ends[1]) / (2 * h), abs=1e-4)
        for j in range(len(at)):
            f = h * np.eye(len(at))[j]
            pp, pm, mp, mm = value(np.stack([at + e + f, at + e - f, at - e + f, at - e - f]))
            assert found[i, j] == pytest.approx(-(pp - pm - mp + mm) / (4 * h * h), abs=2e-3)


def test_covariance_inverts_a_precision_and_bounds_a_bad_one():
    precision = np.array([[4.0, 1.0], [1.0, 2.0]])
    np.testing.assert_allclose(covariance(precision, np.array([1.0, 3.0])), np.linalg.inv(precision), rtol=1e-10)
    lifted = covariance(np.diag([-3.0, 1e-9]), np.ones(2))
    assert (np.linalg.eigvalsh(lifted) > 0).all()
    assert np.linalg.eigvalsh(lifted).max() <= 4.0 + 1e-9


@pytest.mark.parametrize("df", [math.inf, 6.0, 20.0])
def test_student_t_density_and_draws_agree_with_scipy(df):
    rng = np.random.default_rng(0)
    chol = np.array([[1.2, 0.0], [-0.5, 0.7]])
    law = StudentT(np.array([1.0, -1.0]), chol, df)
    reference = stats.multivariate_normal(law.loc, chol @ chol.T) if math.isinf(df) else stats.multivariate_t(law.loc, chol @ chol.T, df)
    z = rng.normal(size=(50, 2)) * 3
    np.testing.assert_allclose(law.log_prob(z), reference.logpdf(z), rtol=1e-10)
    draws = law.sample(rng.normal(size=(20_000, 2)), rng.uniform(size=20_000))
    white = np.linalg.solve(chol, (draws - law.loc).T)
    marginal = stats.norm if math.isinf(df) else stats.t(df)
    assert min(stats.kstest(w, marginal.cdf).pvalue for w in white) > 1e-3


@pytest.mark.parametrize("name", TARGETS)
def test_a_normal_brought_nearer(name):
    """From a few sds off: to the target itself where that is normal, never further away, and not at all on too few draws."""
    bound, mean, sd = _bound(name)
    rng, asked, seen = np.random.default_rng(0), [], []

    def check(q, number, count=64):
        z = q.sample(rng.normal(size=(count, len(mean))), np.full(count, 0.5))
        ratio = bound(z, False)[0] - q.log_prob(z)
        asked.append(number)
        seen.append(ratio.std())
        return z, ratio

    start = StudentT(mean + 2.0 * sd, np.diag(0.8 * sd))
    found, left = nearest(check, start, 0.05, 3)
    assert left == min(seen)
    assert asked == list(range(len(asked)))
    if name == "gaussian":
        assert left < 0.05
        np.testing.assert_allclose(found.loc, mean, atol=1e-6)
        np.testing.assert_allclose(np.sqrt(np.diagonal(found.chol @ found.chol.T)), sd, rtol=1e-6)
    assert nearest(lambda q, number: check(q, number, 5), start, 0.05, 3)[0] is start
    assert nearest(check, start, 0.05, 0)[0] is start
