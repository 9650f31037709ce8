"""The compiled normal quantile against mpmath and scipy, and the same bits wherever a number lies and whoever computes it."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import ndtri

from pavi_scale import rng
from pavi_scale.quantile import GOLDEN, LANES, LAST, normals, quantiles


def quantile(p, dtype=np.float64):
    out = np.empty(len(p), dtype)
    quantiles(np.asarray(p, dtype=np.float64), out)
    return out


def exact(p):
    """Phi^-1 to thirty digits: Newton steps from scipy's, on the side where nothing cancels."""
    with mpmath.workdps(40):
        low = mpmath.mpf(p) if p <= 0.5 else 1 - mpmath.mpf(p)
        x = mpmath.mpf(float(ndtri(float(low))))
        for _ in range(3):
            x -= (mpmath.erfc(-x / mpmath.sqrt(2)) / 2 - low) / mpmath.npdf(x)
        return x if p <= 0.5 else -x


def places():
    """Probabilities in every part: the middle, both tails down to the least and the largest uniform number, and where the formulas change."""
    random = np.random.default_rng(0)
    edges = [0.5, 0.075, 0.925, np.exp(-25.0), 0.5 + 2.0**-53, 0.5 - 2.0**-54, 2.0**-54, LAST]
    near = [np.nextafter(e, side) for e in edges[1:4] for side in (0, 1)]
    return np.concatenate([edges, near, random.random(200), np.exp(-random.uniform(0.7, 37.4, 200)), 1 - np.exp(-random.uniform(0.7, 36.7, 200))])


def test_quantiles_are_those_of_the_normal_distribution():
    p = places()
    found, truth = quantile(p), [exact(v) for v in p]
    off = [float(abs(f - t) / abs(t)) if t else abs(f) for f, t in zip(found, truth, strict=True)]
    assert max(off) < 3e-15


def test_a_million_agree_with_scipy():
    p = np.random.default_rng(1).random(1_000_000)
    np.testing.assert_allclose(quantile(p), ndtri(p), rtol=5e-15)


def test_quantiles_rise_and_are_odd():
    for at in (0.5, 0.075, 0.925, np.exp(-25.0), 1e-15, 1e-9, 0.3):
        wide = np.sort(at * (1 + np.linspace(-1e-3, 1e-3, 20_001)))
        found = quantile(wide)
        assert (np.diff(found) >= -2e-15 * np.abs(found[1:])).all()
        assert (np.diff(quantile(wide, np.float32)) >= 0).all()
    p = np.arange(1, 2**12) * 2.0**-12
    assert (quantile(1 - p) == -quantile(p)).all()


@given(st.integers(0, 2**63), st.integers(0, 3 * LANES), st.sampled_from([np.float32, np.float64]))
def test_a_number_does_not_depend_on_where_it_lies(key, shift, dtype):
    whole = rng.normal(key, np.arange(4 * LANES), dtype=dtype)
    assert (rng.normal(key, np.arange(shift, shift + LANES // 3), dtype=dtype) == whole[shift : shift + LANES // 3]).all()


@pytest.mark.parametrize(
    "counters",
    [
        (np.arange(5),),
        (np.array(3), np.array(4)),
        (np.arange(4), np.arange(5)[:, None]),
        (np.arange(7), np.arange(7)),
        (np.arange(5)[:, None, None], np.arange(3)[None, :, None], np.arange(7)),
        (np.arange(6)[:, None, None], np.arange(12).reshape(3, 4)[None]),
        (np.arange(3)[:, None], np.arange(12).reshape(3, 4)),
        (np.arange(3)[:, None], np.array(4), np.arange(2)),
        (np.arange(3)[:, None], np.arange(0)),
        (np.arange(0)[:, None], np.arange(3)),
        (np.arange(90)[:, None], np.arange(50)),
    ],
)
def test_normals_are_the_quantiles_of_the_uniforms(counters):
    found, u = rng.normal(11, *counters), rng.uniform(11, *counters)
    assert found.shape == u.shape
    assert (found.ravel() == quantile(u.ravel())).all()
    assert (rng.normal(11, *counters, dtype=np.float32) == found.astype(np.float32)).all()


def test_threads_agree():
    state, step = np.arange(50_000, dtype=np.uint64) * np.uint64(0x1234567), GOLDEN * np.arange(1, 8, dtype=np.uint64)

    def made(_):
        out = np.empty(len(state) * len(step))
        normals(state, step, out)
        return out

    with ThreadPoolExecutor(4) as pool:
        first, *others = pool.map(made, range(4))
    assert all((other == first).all() for other in others)


KERNEL = """
import hashlib
import numpy as np
from pavi_scale import rng
from pavi_scale.quantile import normals
numbers = rng.normal(5, np.arange(3000)[:, None], np.arange(7))
print(sum(normals.stats.cache_hits.values()), hashlib.sha256(numbers.tobytes()).hexdigest())
"""


def test_compiled_here_or_loaded_the_bits_are_the_same(tmp_path, root):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(root)}
    runs = [subprocess.run([sys.executable, "-c", KERNEL], env=environment, capture_output=True, text=True, check=True).stdout.split() for _ in range(2)]
    assert [int(hits) for hits, _ in runs] == [0, 1]
    assert runs[0][1] == runs[1][1]
