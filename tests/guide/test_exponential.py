"""The compiled exponential and logarithm against double precision."""

import numpy as np
from numba import njit

from pavi_scale.guide.exponential import exp, log


@njit(error_model="numpy")
def of_each(x: np.ndarray, out: np.ndarray, logarithm: bool) -> None:
    for i in range(len(x)):
        out[i] = log(x[i]) if logarithm else exp(x[i])


def units_in_the_last_place(found: np.ndarray, exact: np.ndarray) -> float:
    return float((np.abs(found - exact) / np.spacing(np.abs(exact).astype(np.float32))).max())


def test_exponential_is_that_of_single_precision() -> None:
    x = np.linspace(-86.0, 0.0, 200_001, dtype=np.float32)
    out = np.empty_like(x)
    of_each(x, out, False)
    assert units_in_the_last_place(out, np.exp(x.astype(np.float64))) < 4


def test_logarithm_is_within_one_unit_in_the_last_place() -> None:
    x = np.concatenate([np.exp(np.linspace(-87.0, 88.0, 200_001)), np.linspace(0.5, 2.0, 200_001)]).astype(np.float32)
    out = np.empty_like(x)
    of_each(x, out, True)
    assert units_in_the_last_place(out, np.log(x.astype(np.float64))) < 1
    assert (out[x == 1] == 0).all()
