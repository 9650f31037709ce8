"""Counter-based random numbers: pure functions of their counters, and random."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pavi_scale import rng


@given(st.integers(0, 2**63), st.lists(st.integers(0, 10**9), min_size=1, max_size=20), st.lists(st.integers(0, 10**6), min_size=1, max_size=5))
def test_a_number_depends_on_its_counters_alone(key, rows, columns):
    rows, columns = np.array(rows), np.array(columns)
    block = rng.normal(key, rows[:, None], columns[None, :])
    one_by_one = [[float(rng.normal(key, np.array(r), np.array(c))) for c in columns] for r in rows]
    np.testing.assert_array_equal(block, one_by_one)


@given(st.integers(0, 2**64 - 1))
def test_uniforms_lie_strictly_inside(key):
    u = rng.uniform(key, np.arange(1000))
    assert u.min() > 0.0
    assert u.max() < 1.0


@pytest.mark.parametrize("counters", ["one", "two", "three", "large"])
def test_numbers_are_uniform_and_independent_across_every_counter(counters):
    n = 40_000
    i = np.arange(n)
    grids = {"one": (i,), "two": (i // 200, i % 200), "three": (i // 1000, i // 10 % 100, i % 10), "large": (i + 2**40, i * 0)}
    u = rng.uniform(rng.stream(0, counters), *grids[counters])
    assert stats.kstest(u, "uniform").pvalue > 1e-3
    z = rng.normal(rng.stream(0, counters), *grids[counters])
    assert stats.kstest(z, "norm").pvalue > 1e-3
    for lag in (1, 10, 200):
        assert abs(np.corrcoef(z[:-lag], z[lag:])[0, 1]) < 4.5 / np.sqrt(n)


def test_counters_do_not_commute_and_streams_differ():
    i, j = np.meshgrid(np.arange(50), np.arange(50), indexing="ij")
    a, b = rng.uniform(1, i, j), rng.uniform(1, j, i)
    assert (a == b).sum() == 50  # the diagonal only
    streams = [rng.uniform(rng.stream(seed, name), np.arange(5000)) for seed in (0, 1) for name in ("alpha", "beta")]
    correlation = np.corrcoef(streams)[np.triu_indices(4, 1)]
    assert np.abs(correlation).max() < 4.5 / np.sqrt(5000)


def test_stream_keys_are_fixed_for_ever():
    # Stored posteriors are read back with these keys: a change would silently change their draws.
    assert rng.stream(0, "draw", 0, "root") == rng.stream(0, "draw", 0, "root")
    assert len({rng.stream(s, *n) for s in range(20) for n in (("a",), ("a", 1), ("a", "1"), ("b",))}) == 80
    np.testing.assert_allclose(rng.uniform(7, np.arange(2)), rng.uniform(7, np.arange(3))[:2], rtol=0)


@pytest.mark.parametrize("shapes", [((0, 1), (1, 3)), ((3, 1), (0,)), ((2, 1, 3), (4, 1)), ((), (2,))])
def test_normals_are_the_quantiles_of_uniforms_of_any_shape(shapes):
    counters = [np.arange(np.prod(s, dtype=int)).reshape(s) for s in shapes]
    np.testing.assert_allclose(rng.normal(5, *counters), stats.norm.ppf(rng.uniform(5, *counters)), rtol=1e-12)
