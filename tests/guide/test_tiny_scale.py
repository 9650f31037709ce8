"""The exact marginal bound where a scale is next to nothing."""

import math

import numpy as np
import xarray as xr
from scipy.stats import multivariate_normal, norm
from torch.distributions import Normal

from pavi_scale.cohort import open_cohort
from pavi_scale.computation import StudyComputation
from pavi_scale.model import Model, latent, observed
from pavi_scale.plates import Plate
from pavi_scale.server.local import LocalEngine
from pavi_scale.study import prepare
from pavi_scale.training import Trainer


def test_a_scale_next_to_nothing_never_beats_the_mode():
    """Three levels: at sd_room = e^-20 the elimination has no digits left, and must say so instead of any number (it once said +9e13)."""
    model = Model(
        Plate("school"), Plate("room", within="school"), Plate("pupil", within="room"),
        a=latent(lambda: Normal(0.0, 1.0), plates="school"),
        log_sd=latent(lambda: Normal(0.0, 5.0)),
        b=latent(lambda a, log_sd: Normal(a, log_sd.exp()), plates="room"),
        y=observed(lambda b: Normal(b, 1.0), plates="pupil"),
    )  # fmt: skip
    school, room = np.arange(40) // 4, np.arange(160) // 4
    given = xr.Dataset({
        "room_school": ("room", school, {"instance_dimension": "school"}), "pupil_room": ("pupil", room, {"instance_dimension": "room"}),
        "log_sd": ((), -20.0),
    })  # fmt: skip
    cohort = model.sample({"school": 10}, given, seed=3, fixed=given)
    study = prepare(open_cohort(cohort.drop_vars(["a", "b", "log_sd"]), model))
    trainer = Trainer(StudyComputation(study.graph, study.cohort, study.settings), LocalEngine(study.spec), 0, math.inf, lambda *a: None)
    grid = np.linspace(-30, 1, 63)[:, None]
    value, _ = trainer.bound(grid, False)
    y = cohort["y"].values
    # Independent truth: y is normal with covariance I + e^2z (same room) + 1 (same school).
    same_room, same_school = room[:, None] == room, school[room][:, None] == school[room]
    exact = np.array([
        multivariate_normal(np.zeros(160), np.eye(160) + math.exp(2 * z) * same_room + same_school).logpdf(y) + norm(0, 5).logpdf(z) for z in grid[:, 0]
    ])  # fmt: skip
    assert np.isneginf(value[grid[:, 0] < -18]).all()
    known = np.isfinite(value)
    assert known[grid[:, 0] > -14].all()
    np.testing.assert_allclose(value[known], exact[known], atol=2.0)
    np.testing.assert_allclose(value[grid[:, 0] > -9], exact[grid[:, 0] > -9], atol=1e-4)
