"""Where searches of mixtures start: clusters that groups shift about, told apart though they overlap when pooled."""

import math
from itertools import permutations

import numpy as np
import pytest

from pavi_scale.cohort import open_cohort
from pavi_scale.marginal import find_mode
from pavi_scale.server.local import LocalEngine
from pavi_scale.starts import clusterings, highest, observed_sample, shifted_clusterings
from pavi_scale.study import prepare
from pavi_scale.training import Trainer
from pipelines import gm
from tests.guide import oracle

K, D = 3, 2


def farthest(centres, truth):
    """Largest distance of a coordinate to its true value under the best numbering."""
    return min(float(np.abs(centres[list(p)] - truth).max()) for p in permutations(range(len(truth))))


def test_centres_of_shifted_groups_are_found_where_pooled_clusters_overlap():
    rng = np.random.default_rng(0)
    groups, n = 8, 40
    mu = np.array([[0.0, 0.0], [0.5, 0.0], [0.0, 0.5]])
    shifted = mu + 0.25 * rng.normal(size=(groups, K, D))
    label = rng.integers(K, size=(groups, n))
    x = (shifted[np.arange(groups)[:, None], label] + 0.03 * rng.normal(size=(groups, n, D))).reshape(-1, D)
    group = np.repeat(np.arange(groups) * 7, n)  # any numbers
    truth = shifted.mean(0)
    best = shifted_clusterings(x, group, K, 0)
    near = min(farthest(c, truth) for c in best)
    assert near < 0.1
    assert min(farthest(c, truth) for c in clusterings(x, K, 0)) > near
    assert all(np.isfinite(c).all() for c in best)


@pytest.mark.parametrize("x", [np.zeros((12, D)), np.random.default_rng(0).normal(size=(12, D)) * 1e-8, np.arange(24.0).reshape(12, D) * 1e6])
def test_degenerate_samples_give_finite_centres(x):
    assert all(np.isfinite(c).all() for c in shifted_clusterings(x, np.repeat([0, 1, 2], 4), K, 0))


def test_sampled_vectors_know_their_group():
    truth = gm.model.sample(sizes={"group": 3, "observation": 20, "feature": 2}, seed=1)
    x, group = observed_sample(oracle.compute(gm.model, truth[["x"]]), "x", ("group",), 0)
    all_x = truth["x"].transpose("group", "observation", "feature").values
    assert len(x) == 60
    for g in range(3):
        assert {tuple(v) for v in x[group == g]} == {tuple(v) for v in all_x[g]}


def test_the_search_is_as_high_as_one_from_the_truth_where_pooled_clusters_mislead():
    truth = gm.model.sample(sizes={"group": 3, "observation": 50, "feature": 2}, seed=23)
    spec = prepare(open_cohort(truth[["x"]], gm.model), seed=0).spec
    with LocalEngine(spec) as engine:
        study = spec.build()

        def trainer():
            return Trainer(study, engine, 0, math.inf, lambda *told: None)

        ours = trainer()
        mode, _, _ = ours._search(study.space.prior_draws(64, 0))
        height = ours.bound(mode[None], False)[0][0]
        other, mu = trainer(), truth["mu"].transpose("component", "feature").values.reshape(1, -1)
        other._explore(mu[0])
        (_, at_truth), *_ = find_mode(other.bound, mu, starts=1, max_evaluations=60, deadline=math.inf, on_step=other.tell, unit=np.ones(6))
        assert height > at_truth - 0.1
        pooled = clusterings(truth["x"].values.reshape(-1, 2), K, 0)
        starts = highest(np.stack([c.ravel() for c in pooled]), other.bound, other._explore, 1)
        (_, misled), *_ = find_mode(other.bound, starts, starts=1, max_evaluations=60, deadline=math.inf, on_step=other.tell, unit=np.ones(6))
        assert misled < height - 10
