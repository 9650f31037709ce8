"""The crossed model's exact posterior against dense joint normals, and the fit against it."""

import numpy as np
import pytest
from scipy.stats import halfnorm, multivariate_normal

from pipelines.bench import coverage, crossed


def cohort_of(groups, seed):
    model, given = coverage.crossed(groups)
    return model, model.sample(coverage.sizes_of("crossed", model, given, groups), given, seed)


def dense(cohort, scales):
    """log p(log scales, y) and mu's conditional moments, by conditioning mu's prior on every rating at once."""
    own, other, sigma = np.exp(scales)
    student, lecturer, y = (cohort[name].values for name in ("rating_student", "rating_lecturer", "y"))
    cov = 1.0 + own**2 * (student[:, None] == student) + other**2 * (lecturer[:, None] == lecturer) + sigma**2 * np.eye(len(y))
    gain = np.linalg.solve(cov, np.ones(len(y)))
    prior = halfnorm.logpdf(np.exp(scales)).sum() + scales.sum()
    return multivariate_normal(np.zeros(len(y)), cov).logpdf(y) + prior, gain @ y, 1.0 - gain.sum()


@pytest.mark.parametrize("seed", [0, 1])
def test_eliminated_density_is_the_dense_normal_s(seed):
    _, cohort = cohort_of(12, seed)
    exact, points = crossed.Exact(cohort), np.random.default_rng(seed).normal(0.0, 0.7, (5, 3))
    found, truth = (np.array([at(u) for u in points]) for at in (exact.at, lambda u: dense(cohort, u)))
    np.testing.assert_allclose(np.diff(found[:, 0]), np.diff(truth[:, 0]), rtol=1e-9, atol=1e-8)  # up to a constant
    np.testing.assert_allclose(found[:, 1:], truth[:, 1:], rtol=1e-8)


def test_global_posterior_is_the_exact_one():
    model, cohort = cohort_of(100, 1002)
    row = crossed.compare(model, cohort, 1002)
    assert row["status"] == "ok"
    assert row["effective points"] > 800  # else the reference itself is not to be trusted
    assert abs(row["largest shift, sd"]) < 0.06
    assert row["worst sd ratio"] == pytest.approx(1.0, abs=0.06)
