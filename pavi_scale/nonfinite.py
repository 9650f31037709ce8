"""What happens when a bound or gradient is not finite: it is left out and counted; after many in a row the fit stops and says where.

The first variable, in the model's order, whose density or gradient is not finite at a root point is the culprit; local latents are put at
their conditional prior means, where no search for modes can have gone astray.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from pavi_scale.computation import StudyComputation
from pavi_scale.errors import NumericalError
from pavi_scale.reduced import Reduced, Value

ROLL_BACK = 5  # steps in a row without a finite gradient after which weights go back to where they were last kept
GIVE_UP = 20  # rounds or steps in a row without a finite number after which the fit stops
KEPT_EVERY = 10  # good steps after which weights are kept to go back to
SHOWN = 3


@dataclass
class Skips:
    """Counts what was left out, and keeps weights to go back to.

    Args:
        total: Evaluations left out so far.
        in_a_row: Rounds or steps without a finite number since the last one that had some.
        rolled_back: How often weights went back.
    """

    total: int = 0
    in_a_row: int = 0
    rolled_back: int = 0
    _good: int = 0
    _kept: list[dict[str, np.ndarray]] = field(default_factory=list)

    def saw(self, finite: np.ndarray, fail: Callable[[], NumericalError]) -> None:
        """Take note of a round's evaluations.

        Args:
            finite: Whether each was.
            fail: Makes the error for `GIVE_UP` rounds in a row without any.
        """
        self.total += int((~finite).sum())
        self.in_a_row = 0 if finite.any() else self.in_a_row + 1
        if self.in_a_row >= GIVE_UP:
            raise fail()

    def keep(self, weights: Mapping[str, np.ndarray]) -> None:
        """After a good step: keep a copy of the weights, now and then."""
        if self._good % KEPT_EVERY == 0:
            # Of the last two copies: the newest may be the very weights that lead to the trouble.
            self._kept = [*self._kept[-1:], {name: np.array(value) for name, value in weights.items()}]
        self._good += 1

    def back(self) -> dict[str, np.ndarray] | None:
        """After a bad step: the weights to go back to, every `ROLL_BACK` in a row."""
        if self.in_a_row % ROLL_BACK or not self._kept:
            return None
        self.rolled_back += 1
        return {name: np.array(value) for name, value in self._kept[0].items()}


def shards_without(answers: list[dict[str, np.ndarray]]) -> list[int]:
    """Positions of the answers to a round of bounds that are not finite."""
    return [i for i, a in enumerate(answers) if not all(np.isfinite(a[k]).all() for k in ("bound", "gradient") if k in a)]


def where_from(study: StudyComputation, tasks: Sequence[Mapping[str, Any]], point: np.ndarray) -> str:
    """The culprit in the tasks' shards at a root point `[R]`, in words: variable and plate indices."""
    for task in tasks:
        if (found := _culprit(study, task, point)) is not None:
            return found
    shards = [study.shard(task)[1] for task in tasks]
    units = "all units" if shards[0].plate is None else f"{shards[0].plate} {shards[0].start} to {shards[-1].stop - 1}"
    return f"{units}: finite at the prior means, not at the local modes"


def _culprit(study: StudyComputation, task: Mapping[str, Any], point: np.ndarray) -> str | None:
    reduced, _ = study.shard(task)
    z = torch.tensor(point[None], dtype=torch.float64, requires_grad=True)
    values: dict[str, Value] = dict(study.space.values(z))
    for v in (v for v in study.graph.model.variables.values() if v.kind != "covariate"):
        if v.kind == "latent" and v.name not in values:
            mean = reduced.prior_mean(v.name, values)
            values[v.name] = Value(study.graph.links[v.name].forward(mean), v.plates)
        density = reduced.log_prob(v.name, values)
        bad = np.argwhere(~np.isfinite(density.detach().numpy()))
        if len(bad):
            return f"variable {v.name!r} at {_places(study, reduced, v.plates, bad[:, 1:])}"
        if density.requires_grad:
            (slope,) = torch.autograd.grad(density.sum(), z, allow_unused=True, materialize_grads=True, retain_graph=True)
            if not bool(torch.isfinite(slope).all()):
                return f"variable {v.name!r}, gradient by the root variables"
    return None


def _places(study: StudyComputation, reduced: Reduced, plates: tuple[str, ...], bad: np.ndarray) -> str:
    places = []
    for at in bad[:SHOWN]:
        units = [int(reduced.selection.units[p][i]) if p in reduced.selection.units else int(i) for p, i in zip(plates, at, strict=False)]
        places.append("(" + ", ".join(study.cohort.describe(p, u) for p, u in zip(plates, units, strict=True)) + ")" if plates else "the root")
    return ", ".join(places) + (f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else "")
