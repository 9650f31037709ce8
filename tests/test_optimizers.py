"""Adam against torch's, over whole arrays and over rows."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pavi_scale.optimizers import Adam


def _torch_ascent(start, gradients, rate):
    x = torch.tensor(start, requires_grad=True)
    adam = torch.optim.Adam([x], lr=rate, betas=(0.9, 0.99), eps=1e-8, maximize=True)
    for g in gradients:
        x.grad = torch.tensor(g)
        adam.step()
    return x.detach().numpy()


def test_whole_arrays_move_as_under_torchs_adam():
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=(3, 2)), rng.normal(size=(25, 3, 2))
    value, adam = start.copy(), Adam(rate=0.03)
    for g in gradients:
        adam.update("w", value, g)
    np.testing.assert_allclose(value, _torch_ascent(start, gradients, 0.03), rtol=1e-10)


@settings(max_examples=25)
@given(st.lists(st.sets(st.integers(0, 4), min_size=1), min_size=1, max_size=12), st.integers(0, 100))
def test_a_row_moves_as_if_it_were_alone(visits, seed):
    rng = np.random.default_rng(seed)
    start = rng.normal(size=(5, 2))
    table, adam, seen = start.copy(), Adam(rate=0.1), {i: [] for i in range(5)}
    for visit in visits:
        rows = np.array(sorted(visit))
        g = rng.normal(size=(len(rows), 2))
        adam.update("table", table, g, rows)
        for r, own in zip(rows, g, strict=True):
            seen[int(r)].append(own)
    for i in range(5):
        np.testing.assert_allclose(table[i], _torch_ascent(start[i], seen[i], 0.1) if seen[i] else start[i], rtol=1e-10)


def test_state_taken_out_and_put_back_goes_on_as_before():
    rng = np.random.default_rng(1)
    gradients = rng.normal(size=(10, 4))
    one, value = Adam(rate=0.1, scale={"w": np.array([1.0, 2.0, 0.5, 0.0])}), np.zeros(4)
    rows_one, table = np.array([0, 2]), np.zeros((3, 2))
    for g in gradients[:5]:
        one.update("w", value, g)
        one.update("site/b", table, g.reshape(2, 2), rows_one)
    two = Adam(rate=0.1, scale=one.scale)
    two.load({k: v.copy() for k, v in one.arrays().items()})
    copy, table_copy = value.copy(), table.copy()
    for adam, x, t in ((one, value, table), (two, copy, table_copy)):
        for g in gradients[5:]:
            adam.update("w", x, g)
            adam.update("site/b", t, g.reshape(2, 2), rows_one)
    np.testing.assert_array_equal(value, copy)
    np.testing.assert_array_equal(table, table_copy)
    assert value[3] == 0.0  # scale zero: not trained
    assert (table[1] == 0).all()


def test_it_climbs_a_badly_scaled_hill():
    target, curvature = np.array([3.0, -2.0]), np.array([1.0, 1e4])
    x, adam = np.zeros(2), Adam(rate=0.1)
    for step in range(600):
        adam.rate = 0.1 * (1 - step / 600)
        adam.update("x", x, curvature * (target - x))
    np.testing.assert_allclose(x, target, atol=1e-3)
