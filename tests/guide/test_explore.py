"""Several local searches for mixtures, and renumbered components."""

from itertools import product

import numpy as np
import pytest
import torch
import xarray as xr
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

import pavi_scale as ps
from pavi_scale.guide.curvature import LocalModel
from pavi_scale.guide.exploring import explore
from pavi_scale.guide.mode import find_mode
from pavi_scale.noise import generator_noise
from pavi_scale.numbering import exchangeable, one_numbering, renumbered
from pipelines import gm
from tests.guide import oracle


def _local(points):
    truth = gm.model.sample(sizes={"group": 3, "observation": 50, "feature": 2}, seed=1)
    study = oracle.compute(gm.model, truth[["x"]])
    mu = truth["mu"].transpose("component", "feature").values.reshape(1, -1).repeat(points, 0)
    (component,) = study.guide.components
    reduced = oracle.whole(study)
    return study, reduced, LocalModel(component, reduced, study.space.values(torch.tensor(mu)), {}, points), truth


def test_exploring_finds_a_mode_above_the_truth_where_one_search_does_not():
    study, reduced, local, truth = _local(1)
    parts = {n: torch.tensor(truth[n].transpose("group", *study.graph.model.variables[n].dims).values)[None] for n in ("weight", "mu_group")}
    coordinates = {n: study.graph.links[n].inverse(t) for n, t in parts.items()}
    at_truth = local.log_terms({"group": local.join(local.blocks["group"], coordinates)})
    alone = local.log_terms(find_mode(local))
    found = explore(local, generator_noise(0, torch.float64), 16)
    value = local.log_terms({b: z[:1] for b, z in found.modes.items()})
    assert (value > at_truth).all()
    assert float((value - alone).max()) > 10  # nats: a component of one group stays empty in the plain search
    assert ((found.missed >= 0) & (found.missed <= 0.5)).all()
    # Searches at other root points start from what is remembered.
    _, again, few, _ = _local(3)
    again.modes = {"group": found.table("group")}
    torch.testing.assert_close(few.log_terms(find_mode(few)), value.expand(3, -1), rtol=0, atol=1e-5)


def test_an_exchange_of_components_is_a_mode_whose_odds_the_prior_alone_sets():
    _, _, local, _ = _local(1)
    found = explore(local, generator_noise(0, torch.float64), 16)
    values = local.values(found.modes)["mu_group"].theta  # [S, group, component, feature]
    mu = local.given["mu"].theta[0]
    best, seen = values[0], 0
    for g, (i, j) in product(range(3), ((0, 1), (0, 2), (1, 2))):
        order = [j if r == i else i if r == j else r for r in range(3)]
        told = [s for s in range(len(values)) if found.odds[s, g] > -50 and float((values[s, g] - best[g][order]).abs().max()) < 0.03]
        # log N(c | mu, 0.2^2) before and after; of components with few observations the modes themselves move.
        expected = float(((best[g] - mu).square() - (best[g][order] - mu).square()).sum() / (2 * 0.2**2))
        for s in told:
            assert float(found.odds[s, g]) == pytest.approx(expected, abs=1.5, rel=0.1)
        seen += len(told)
    assert seen >= 4
    assert (found.odds[0] == 0).all()
    assert (found.odds[1:] <= found.odds[:-1]).all()


def test_a_search_ends_at_the_best_of_the_remembered_modes():
    study, reduced, local, _ = _local(1)
    found = explore(local, generator_noise(0, torch.float64), 16)
    table = found.table("group")
    rows = torch.tensor([[0, 1, 2], [1, 0, 2], [2, 1, 0]])
    values = local.given["mu"]
    here = LocalModel(local.component, reduced, {"mu": type(values)(values.theta[0][rows], values.plates)}, {}, 3)
    heights = []
    for s in range(table.shape[1]):
        reduced.modes = {"group": table[:, s : s + 1]}
        heights.append(here.log_terms(find_mode(here)))
    reduced.modes = {"group": table}
    # At a renumbered root the renumbered modes are as high as the best one was; one remembered mode does not know of them.
    assert float((torch.stack(heights).amax(0) - here.log_terms(find_mode(here))).max()) < 0.5
    assert float((torch.stack(heights).amax(0) - heights[0]).max()) > 5


def crosswise():
    """Two components, and three groups of which the last has its centres across: which is which hangs on the root."""
    model = ps.Model(
        ps.Plate("group"), ps.Plate("obs"), sizes={"component": 2, "feature": 2},
        mu=ps.latent(lambda: Normal(0.0, 1.0), dims=("component", "feature")),
        centre=ps.latent(lambda mu: Normal(mu, 0.2), plates="group", dims=("component", "feature")),
        x=ps.observed(
            lambda centre: MixtureSameFamily(Categorical(torch.full((2,), 0.5)), Independent(Normal(centre, 0.03), 1)), plates=("group", "obs"), dims="feature"
        ),
    )  # fmt: skip
    apart = np.array([[0.9, 0.0], [0.9, 0.0], [0.05, 0.6]])
    centre = 0.5 * np.stack([apart, -apart], 1)
    noise = np.random.default_rng(0).normal(size=(3, 2, 10, 2))
    x = centre[:, :, None] + 0.03 * (noise - noise.mean(2, keepdims=True))
    return model, xr.Dataset({"x": (("group", "obs", "feature"), x.reshape(3, 20, 2))}), centre, x


def test_a_fit_holds_both_ways_to_number_the_components_of_a_group():
    model, cohort, centre, x = crosswise()
    # Which cluster is which component, group by group, the first one's fixed: the clusters' means are normal, and every sum of labels has one term that counts.
    cov = np.ones((3, 3)) + (0.2**2 + 0.03**2 / 10) * np.eye(3)
    ways = {
        flips: sum(
            multivariate_normal(np.zeros(3), cov).logpdf(np.array([centre[g, r if not flip else 1 - r, d] for g, flip in enumerate((0, *flips))]))
            for r, d in product(range(2), range(2))
        )
        for flips in product((0, 1), repeat=2)
    }
    square, n = float(((x - centre[:, :, None]) ** 2).sum()), 10
    within = -0.5 * square / 0.03**2 - 12 * (0.5 * (n - 1) * np.log(2 * np.pi * 0.03**2) + 0.5 * np.log(n)) + 60 * np.log(0.5)
    evidence = within + logsumexp(list(ways.values()))
    share = np.exp(logsumexp([v for flips, v in ways.items() if flips[1]]) - logsumexp(list(ways.values())))
    assert 0.25 < share < 0.4
    posterior = ps.fit(model, cohort, progress=False)
    drawn = posterior.datatree["posterior"]["centre"].isel(chain=0).transpose("draw", "group", "component", "feature").values
    apart = drawn[:, :, 0] - drawn[:, :, 1]
    flipped = (apart[:, 2, 1] < 0) != (apart[:, 0, 0] < 0)
    assert flipped.mean() == pytest.approx(share, abs=0.07)
    assert abs((apart[:, 0, 0] < 0).mean() - 0.5) > 0.49  # one numbering of the cohort, though another is within reach of the refit
    elbo, error = posterior.elbo(256)
    assert evidence - 0.5 < elbo < evidence + 4 * error


def test_only_exchangeable_rows_keep_to_a_numbering():
    study, *_ = _local(1)
    mode = np.array([-0.2, 0.0, 0.2, 0.0, 3.0, 0.0])
    swapped, outside = mode[[2, 3, 0, 1, 4, 5]], mode + np.array([0.5, 0, 0, 0, 0, 0])

    def alike(points, gradient):
        return -(points[:, ::2] ** 2).sum(1), None

    def told_apart(points, gradient):
        return alike(points, gradient)[0] + points[:, 0], None

    points = np.stack([mode, swapped, outside])
    for bound, kept in ((alike, [True, False, False]), (told_apart, [True, True, True])):
        sd = np.full(6, 0.2)
        value, _ = one_numbering(bound, exchangeable(study, bound, mode, sd), mode, sd)(points, False)
        assert np.isfinite(value).tolist() == kept


def test_renumbered_components_are_matched_by_whole_rows():
    study, *_ = _local(1)
    mode = np.array([[-1.0, 0.5], [0.0, 0.4], [2.0, -1.0]])
    other = mode[[2, 0, 1]] + 0.01
    np.testing.assert_allclose(renumbered(study, other.ravel(), mode.ravel(), np.full(6, 0.1)), mode.ravel() + 0.01)
    mixed = mode[:, ::-1]  # the same numbers, but not the same rows
    assert np.abs(renumbered(study, mixed.ravel(), mode.ravel(), np.full(6, 0.1)) - mode.ravel()).max() > 0.5
