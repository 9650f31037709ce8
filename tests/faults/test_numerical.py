"""Bounds and gradients that are not finite: left out, counted, rolled back, and in the end an error that says where."""

import math
import warnings

import numpy as np
import pytest
import torch
import xarray as xr
from torch.distributions import Bernoulli, Normal

import pavi_scale as ps
from pavi_scale import study as preparing
from pavi_scale.cohort import open_cohort
from pavi_scale.computation import StudyComputation
from pavi_scale.errors import NumericalError
from pavi_scale.fitting import MOST_STALE
from pavi_scale.nonfinite import GIVE_UP, KEPT_EVERY, ROLL_BACK, Skips
from pavi_scale.rows import Rows
from pavi_scale.run import Run
from pavi_scale.server.local import Done, LocalEngine
from pavi_scale.study import prepare
from pavi_scale.training import Trainer

LABELS = [f"s{i}" for i in range(6)]


def study(law):
    """Six groups; the covariate of group s4 is not what the law takes."""
    model = ps.Model(
        ps.Plate("g"), ps.Plate("i"),
        mu=ps.latent(lambda: Normal(0.0, 1.0)), theta=ps.latent(lambda mu: Normal(mu, 1.0), plates="g"), c=ps.covariate(plates="g"),
        x=ps.observed(law, plates=("g", "i")),
    )  # fmt: skip
    x = np.random.default_rng(0).normal(size=(6, 3))
    return model, xr.Dataset({"x": (("g", "i"), x), "c": ("g", np.where(np.arange(6) == 4, -1.0, 1.0))}, coords={"g": LABELS})


@pytest.mark.parametrize(
    ("law", "where"),
    [
        (lambda theta, c: Normal(theta, torch.sqrt(c)), r"variable 'x' at \(g=s4 \(position 4\), i=0\), .*i=1\), .*i=2\)"),
        (lambda theta, c: Normal(theta * torch.log(c), 1.0), r"variable 'x' at \(g=s4 "),
        (lambda theta, c: Normal(theta / (c + 1.0), 1.0), r"variable 'x' at \(g=s4 "),
        (lambda theta, c: Normal(torch.sqrt((theta - theta) * c), 1.0), "variable 'x', gradient by the root variables"),
        (lambda theta, c: Normal(torch.sqrt(theta + 3.0), 1.0), "g 0 to 5: finite at the prior means, not at the local modes"),
    ],
    ids=["scale", "location", "infinite", "gradient", "at the modes"],
)
def test_the_error_says_where(law, where, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with pytest.raises(NumericalError, match=f"not finite; where: {where}"):
            ps.fit(*study(law), run=tmp_path / "run", progress=False)
    assert Run.open(tmp_path / "run").generation is None  # nothing of it was recorded
    assert not (tmp_path / "run" / "posterior.zarr").exists()


def with_free_rows(monkeypatch):
    monkeypatch.setattr(preparing, "choose_free", lambda *_, **__: frozenset({frozenset({"g"})}))


def test_scores_of_free_rows_say_where(tmp_path, monkeypatch):
    with_free_rows(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with pytest.raises(NumericalError, match=r"not finite; where: variable 'x' at \(g=s4 "):
            ps.fit(*study(lambda theta, c: Normal(theta * torch.log(c), 1.0)), run=tmp_path / "run", progress=False)
    assert Run.open(tmp_path / "run").generation is None
    assert not (tmp_path / "run" / "posterior.zarr").exists()


def test_scores_that_are_not_finite_once_are_left_out(tmp_path, monkeypatch):
    with_free_rows(monkeypatch)
    real, spoilt = Rows.ask, []

    def ask(self, size, centre, step, spread, more):
        total = real(self, size, centre, step, spread, more)
        if not more and len(spoilt) < 2:
            spoilt.append(step)
            total["root"] = total["root"] * math.nan
        return total

    monkeypatch.setattr(Rows, "ask", ask)
    ps.fit(*study(lambda theta, c: Normal(theta, 1.0)), run=tmp_path / "run", progress=False)
    assert Run.open(tmp_path / "run").state()["skipped"] == 2


def test_a_sound_law_loses_nothing(tmp_path):
    ps.fit(*study(lambda theta, c: Normal(theta * c, 1.0)), run=tmp_path / "run", progress=False)
    assert Run.open(tmp_path / "run").state()["skipped"] == 0


class Spoilt(LocalEngine):
    """An engine some of whose gradients come out as NaN."""

    def __init__(self, spec, steps):
        super().__init__(spec)
        self.steps, self.step = set(steps), 0

    def submit(self, kind, state, tasks):
        answers = super().submit(kind, state, tasks).result()
        if kind == "correct":
            if self.step in self.steps:
                answers = [{k: np.full_like(v, math.nan) if k.startswith("grad/correction/") else v for k, v in a.items()} for a in answers]
            self.step += 1
        return Done(answers)


def corrected(steps, staleness=0):
    """A trainer whose corrections were trained on an engine that is spoilt at some steps."""
    rng = np.random.default_rng(8)
    g = np.repeat(np.arange(4), 3)
    model = ps.Model(
        ps.Plate("g"), ps.Plate("i", within="g"),
        mu=ps.latent(lambda: Normal(0.0, 2.0)), theta=ps.latent(lambda mu: Normal(mu, 1.0), plates="g"),
        y=ps.observed(lambda theta: Bernoulli(logits=theta), plates="i"),
    )  # fmt: skip
    data = xr.Dataset({"y": ("i", (rng.random(g.size) < 0.5).astype(int)), "of": ("i", g, {"instance_dimension": "g"})})
    made = prepare(open_cohort(data, model), encoding="encoder")
    trainer = Trainer(StudyComputation(made.graph, made.cohort, made.settings), Spoilt(made.spec, steps), 0, math.inf, lambda *_: None, staleness=staleness)
    trainer._correct(np.zeros((16, 1)), 40)
    return trainer


def test_bad_gradients_are_skipped_counted_and_rolled_back():
    sound, few, many = corrected([]), corrected([3, 17]), corrected(range(20, 20 + ROLL_BACK))
    assert (sound.skips.total, few.skips.total, many.skips.total) == (0, 2, ROLL_BACK)
    assert (sound.skips.rolled_back, few.skips.rolled_back, many.skips.rolled_back) == (0, 0, 1)
    lagging = corrected(range(20, 20 + ROLL_BACK), MOST_STALE)
    assert (lagging.skips.total, lagging.skips.rolled_back) == (ROLL_BACK, 1)
    for trainer in (sound, few, many, lagging):
        assert any(k.startswith("correction/") for k in trainer.state)
        assert all(np.isfinite(v).all() for v in trainer.state.values())
    # Two steps of forty left out hardly matter.
    name = next(k for k in sound.state if k.startswith("correction/") and sound.state[k].ndim == 2)
    assert np.abs(few.state[name] - sound.state[name]).max() < 0.1


def test_too_many_in_a_row_stop_the_fit():
    with pytest.raises(NumericalError, match="not finite; where"):
        corrected(range(10, 10 + GIVE_UP))


def test_rolling_back_goes_to_weights_from_before_the_trouble():
    skips = Skips()
    for i in range(3 * KEPT_EVERY):
        skips.saw(np.array(True), NumericalError)
        skips.keep({"w": np.array(float(i))})
    found = []
    for _ in range(ROLL_BACK):
        skips.saw(np.array(False), lambda: NumericalError("never"))
        found.append(skips.back())
    assert found[:-1] == [None] * (ROLL_BACK - 1)
    assert found[-1]["w"] == KEPT_EVERY  # the last copy but one
