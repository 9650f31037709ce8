"""What travels to workers, once: the recipe of a study's computation."""

from __future__ import annotations

from dataclasses import dataclass

from pavi_scale.cohort import CohortSpec
from pavi_scale.computation import StudyComputation
from pavi_scale.device import check_room, find
from pavi_scale.memory import keep_freed_memory
from pavi_scale.model.template import Model
from pavi_scale.settings import Settings, make_graph


@dataclass(frozen=True)
class StudySpec:
    """Picklable recipe of a `StudyComputation`.

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

    def build(self) -> StudyComputation:
        """Open the cohort and build the guide.

        Raises:
            InputError: There is no such device here.
            PlanRefused: It has too little memory.
        """
        keep_freed_memory()
        device = find(self.device)
        check_room(device, self.device_bytes)
        cohort = self.cohort.open(self.model)
        return StudyComputation(make_graph(cohort), cohort, self.settings, device)
