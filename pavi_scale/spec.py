"""What travels to workers, once: the recipe of a study's computation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pavi_scale.cohort import CohortSpec
from pavi_scale.computation import Arrays, StudyComputation
from pavi_scale.device import check_room, find
from pavi_scale.later import Later
from pavi_scale.memory import keep_freed_memory
from pavi_scale.model.template import Model
from pavi_scale.settings import Settings, make_graph

if TYPE_CHECKING:
    from pavi_scale import searching
else:
    searching = Later("pavi_scale.searching")  # takes a second: for those who are asked to search


class Answers(StudyComputation):
    """A study's computation that follows starts of the search in miniature, too."""

    def compute(self, kind: str, state: Arrays, task: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Answer one task of a round; a search is a study of its own, with its own data."""
        return searching.search(self, state, task) if kind == "search" else super().compute(kind, state, task)


@dataclass(frozen=True)
class StudySpec:
    """Picklable recipe of a study's computation.

    Args:
        model: The model.
        cohort: Where the data are.
        settings: How to compute.
        device: Where, on the machine that builds it.
        device_bytes: What is kept and computed there at most.
    """

    model: Model
    cohort: CohortSpec
    settings: Settings
    device: str = "auto"
    device_bytes: int = 0

    @property
    def threads(self) -> int:
        """torch threads of a task."""
        return self.settings.threads

    def build(self) -> Answers:
        """Open the cohort and build the guide.

        Raises:
            InputError: There is no such device here.
            PlanRefused: It has too little memory.
        """
        keep_freed_memory()
        device = find(self.device)
        check_room(device, self.device_bytes)
        cohort = self.cohort.open(self.model)
        return Answers(make_graph(cohort), cohort, self.settings, device)
