"""What the computation of a study is told: its settings, and the graph of the cohort's model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from pavi_scale.ambient import precision
from pavi_scale.cohort import Cohort
from pavi_scale.model.density import Graph
from pavi_scale.model.supports import Support


@dataclass(frozen=True)
class Settings:
    """How a study is computed; plain data, recorded with the run.

    Args:
        free: Plate sets with free encodings.
        schemes: Block name -> scheme of its learned correction.
        seen: Block name -> observed variable that its set encoder reads, where the scheme has one.
        structure: What `probe` found of the components, and the candidates of each draw.
        split: The plate that shards divide.
        dtype: "float64" or "float32".
        threads: torch threads of a task.
        cache_bytes: Data kept between rounds, per process.
        chunk: Ground units x particles computed at once.
    """

    free: tuple[tuple[str, ...], ...] = ()
    schemes: Mapping[str, str] = field(default_factory=dict)
    seen: Mapping[str, str] = field(default_factory=dict)
    structure: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    split: str | None = None
    dtype: str = "float64"
    threads: int = 1
    cache_bytes: int = 1 << 30
    chunk: int = 1 << 18


def make_graph(cohort: Cohort) -> Graph:
    """The cohort's model with event sizes, its laws looked at once with the first unit's covariates; what is read from then on lies in their support."""
    example = {}
    for v in cohort.model.of_kind("covariate"):
        first = cohort.read(v.name, {p: np.arange(1) for p in v.plates})
        example[v.name] = torch.as_tensor(first.reshape(first.shape[len(v.plates) :])).to(torch.float64)
    with precision(torch.float64):
        graph = Graph(cohort.model, cohort.event_sizes, example)
    cohort.supports |= {v.name: Support(graph.supports[v.name]) for v in cohort.model.of_kind("observed")}
    return graph
