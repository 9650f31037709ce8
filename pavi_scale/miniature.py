"""A small part of a large cohort, in memory: where its fit looks for the right mode.

Which of the poor local optima of a mixture a search ends in is decided by a few units of every plate; what is found there starts the fit of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pavi_scale.computation import StudyComputation
from pavi_scale.rng import stream
from pavi_scale.settings import make_graph

LARGE = 20_000  # coordinates of free rows above which a cohort is searched in miniature
SMALL = 20_000  # the same there
FIRST = 16_000  # ground units of the smallest selection
EACH = 16  # observed values in it for each coordinate of a free row, at least


@dataclass(frozen=True)
class Ready:
    """A computation that is there already, as an engine's recipe."""

    computation: StudyComputation

    @property
    def threads(self) -> int:
        """torch threads of a task."""
        return self.computation.settings.threads

    def build(self) -> StudyComputation:
        """The computation."""
        return self.computation


def coordinates_of_rows(study: StudyComputation) -> int:
    """Coordinates of all free rows."""
    return sum(math.prod(study.layout.cardinality[p] for p in b.plates) * b.dim for b in study.guide.blocks if b.free)


def first_selection(study: StudyComputation, fewer: dict[str, int] | None = None) -> int:
    """Units of the split plate in the smallest selection that rows are trained on.

    Args:
        study: The study.
        fewer: Units of other plates, where not all.
    """
    cardinality = {**study.layout.cardinality, **(fewer or {})}
    laws = list(study.graph.model.of_kind("observed"))
    observed = max((math.prod(cardinality[p] for p in v.plates) for v in laws), default=1)
    values = sum(math.prod(cardinality[p] for p in v.plates) * math.prod(study.graph.shape(v)) for v in laws)
    rows = sum(math.prod(cardinality[p] for p in b.plates) * b.dim for b in study.guide.blocks if b.free)
    return math.ceil(max(FIRST / max(observed, 1), EACH * rows / max(values, 1)) * cardinality.get(study.settings.split or "", 1))


def few_units(study: StudyComputation, seed: int) -> dict[str, np.ndarray] | None:
    """A few random units of each plate that free rows lie on, and of the split plate; None where the whole is small, or plates are nested."""
    layout, split = study.layout, study.settings.split
    if split is None or layout.index or coordinates_of_rows(study) <= LARGE:
        return None
    few = {p: layout.cardinality[p] for b in study.guide.blocks if b.free for p in b.plates if p != split}
    per_unit = coordinates_of_rows(study) / math.prod(few.values())
    while math.prod(few.values()) * per_unit > SMALL and max(few.values(), default=0) > 2:
        largest = max(few, key=lambda p: few[p])
        few[largest] = max(2, min(few[largest] - 1, int(SMALL / per_unit * few[largest] / math.prod(few.values()))))
    few[split] = min(first_selection(study, few), layout.cardinality[split])
    rng = np.random.default_rng(stream(seed, "miniature") % 2**63)
    return {p: np.sort(rng.choice(layout.cardinality[p], n, replace=False)) for p, n in few.items()}


def miniature(study: StudyComputation, units: Mapping[str, np.ndarray]) -> StudyComputation:
    """The study of some units; their data are read."""
    part = study.cohort.part(units)
    return StudyComputation(make_graph(part), part, study.settings)
