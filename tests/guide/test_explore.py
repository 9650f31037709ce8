"""Several local searches for mixtures, and renumbered components."""

import numpy as np
import torch

from pavi_scale.guide.curvature import LocalModel
from pavi_scale.guide.exploring import explore
from pavi_scale.guide.mode import find_mode
from pavi_scale.noise import generator_noise
from pavi_scale.starts import renumbered
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
    again.starts = {"group": torch.cat([found.volume["group"][..., None], found.modes["group"].flatten(2)], -1).transpose(0, 1)}
    torch.testing.assert_close(few.log_terms(find_mode(few)), value.expand(3, -1), rtol=0, atol=1e-5)


def test_renumbered_components_are_matched_by_whole_rows():
    study, *_ = _local(1)
    mode = np.array([[-1.0, 0.5], [0.0, 0.4], [2.0, -1.0]])
    other = mode[[2, 0, 1]] + 0.01
    np.testing.assert_allclose(renumbered(study, other.ravel(), mode.ravel(), np.full(6, 0.1)), mode.ravel() + 0.01)
    mixed = mode[:, ::-1]  # the same numbers, but not the same rows
    assert np.abs(renumbered(study, mixed.ravel(), mode.ravel(), np.full(6, 0.1)) - mode.ravel()).max() > 0.5
