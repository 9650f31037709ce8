"""Which units the diagnostics look at."""

import numpy as np
import pytest
import xarray as xr
from torch.distributions import Bernoulli, Normal

import pavi_scale as ps
from pavi_scale.diagnosing import PROBED, UNITS, few
from tests.guide import oracle


def _study(groups):
    model = ps.Model(
        ps.Plate("group"),
        ps.Plate("obs"),
        mu=ps.latent(lambda: Normal(0.0, 1.0)),
        t=ps.latent(lambda mu: Normal(mu, 1.0), plates="group"),
        x=ps.observed(lambda t: Bernoulli(logits=t), plates=("group", "obs")),
    )
    return oracle.compute(model, xr.Dataset({"x": (("group", "obs"), np.zeros((groups, 2)))}))


@pytest.mark.parametrize("groups", [UNITS + 1, 50_000, 1_000_003])
def test_units_looked_at_are_spread_over_the_plate(groups):
    tasks = [{"shard": ("group", a, min(a + 5_000, groups), a == 0), "seed": 3} for a in range(0, groups, 5_000)]
    found = few(_study(groups), tasks)
    spans = [task["shard"][1:3] for task in found]
    assert all(task["seed"] == 3 and task["shard"][0] == "group" for task in found)
    assert 0 < sum(stop - start for start, stop in spans) <= PROBED
    assert all(before[1] <= after[0] for before, after in zip(spans, spans[1:], strict=False))  # none twice
    assert [task["shard"][3] for task in found] == [True] + [False] * (len(found) - 1)  # what lies on no plate is counted once
    assert spans[0][0] == 0
    assert spans[-1][1] == groups
    gaps = [after[0] - before[1] for before, after in zip(spans, spans[1:], strict=False)]
    assert max(gaps) <= groups / 2


def test_of_a_small_study_all_are_looked_at():
    tasks = [{"shard": ("group", 0, 100, True)}, {"shard": ("group", 100, 200, False)}]
    assert few(_study(200), tasks) == tasks
