"""The plan of a fit: latents, bytes, disk and passes, and the refusal of what will not fit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pavi_scale.errors import PlanRefused
from pavi_scale.guide.blocks import COLUMN_NUMBERS, MOST_COLUMNS, Component, dense_rest, dense_units, labelled
from pavi_scale.guide.guide import Guide
from pavi_scale.memory import format_bytes
from pavi_scale.model.density import Graph
from pavi_scale.plates import Layout

PROCESS_BYTES = 520 << 20  # a Python process with torch, zarr and xarray loaded: measured resident set, rounded up
TEMPORARIES = 24  # arrays of the size of one chunk's values that a second-order expansion holds at its peak; measured by tests/test_memory.py
LABELLED_VALUES, LABELLED_LABELS = 2, 5  # the same where units are settled by sweeps: arrays of an observation's values, and of its labels
SWEPT_CHUNK = 1 << 20  # units x particles of one chunk there: larger ones only take memory that the system must hand out anew
LONG_CHUNK = 1 << 22  # the same at most, where the store's own chunks are long
SITE_ARRAYS = 40  # sites, centres, widths; score and curvature of a round, and those of up to 16 tasks that wait for an earlier one
ROOT_PASSES = 12  # full-data rounds of the finish, typically


@dataclass(frozen=True)
class Plan:
    """What a fit will take; but for `lanes`, every figure is a function of cardinalities and budget alone.

    Args:
        latents: Ground latents by variable.
        data_bytes: The cohort's bytes.
        cache_bytes: Data kept in memory between rounds, per process.
        chunk: Ground units x particles computed at once.
        chunk_bytes: Working memory of one chunk.
        table_bytes: Free rows, and what is gathered of them.
        index_bytes: Parent positions of ragged and crossed plates.
        disk_bytes: Stored posterior (mean and sd).
        processes: Processes that compute.
        lanes: Tasks that one process computes at the same time.
        budget_bytes: Memory allowed per process.
        method: How each group of latents is inferred.
    """

    latents: Mapping[str, int]
    data_bytes: int
    cache_bytes: int
    chunk: int
    chunk_bytes: int
    table_bytes: int
    index_bytes: int
    disk_bytes: int
    processes: int
    lanes: int
    budget_bytes: int
    method: Mapping[str, str]

    @property
    def peak_bytes(self) -> int:
        """Modelled peak of one process."""
        return PROCESS_BYTES + self.cache_bytes + self.lanes * self.chunk_bytes + self.table_bytes + self.index_bytes

    def table(self) -> list[tuple[str, str]]:
        """(what, figure) rows for people."""
        rows = [(f"latent {name}", f"{count:,}") for name, count in self.latents.items()]
        rows += [("latents in all", f"{sum(self.latents.values()):,}")]
        rows += [(f"method {name}", how) for name, how in self.method.items()]
        rows += [
            ("cohort", format_bytes(self.data_bytes)),
            ("memory: data kept", format_bytes(self.cache_bytes)),
            ("memory: computing", format_bytes(self.lanes * self.chunk_bytes)),
            ("memory: rows", format_bytes(self.table_bytes)),
            ("memory: plate indices", format_bytes(self.index_bytes)),
            ("memory: peak of a process", f"{format_bytes(self.peak_bytes)} of {format_bytes(self.budget_bytes)}"),
            ("processes", str(self.processes) if self.lanes == 1 else f"{self.processes}, {self.lanes} tasks at a time"),
            ("disk: posterior", format_bytes(self.disk_bytes)),
            ("passes over the cohort", f"about {ROOT_PASSES}, and one for the posterior"),
        ]
        return rows

    def __repr__(self) -> str:
        return "\n".join(f"{what:28s} {figure}" for what, figure in self.table())


def unit_bytes(graph: Graph, components: Sequence[Component], itemsize: int) -> int:
    """Working memory of one ground unit and particle."""
    if swept(graph, components):
        labels = max(graph.links[name].size for name in graph.labelled.values())
        return itemsize * max(LABELLED_VALUES * math.prod(graph.shape(graph.model.variables[x])) + LABELLED_LABELS * labels for x in graph.labelled)
    width = max((math.prod(graph.shape(v)) for v in graph.model.of_kind("latent", "observed")), default=1)
    columns = max((sum(b.dim if not c.elementwise else len(b.sizes) for b in c.blocks) for c in components), default=1)
    return itemsize * TEMPORARIES * (width + min(columns, MOST_COLUMNS) * COLUMN_NUMBERS)


def swept(graph: Graph, components: Sequence[Component]) -> bool:
    """Whether all data belong to labelled components with rows above them: units are then settled by sweeps, which keep little of each."""
    return bool(graph.labelled) and any(b.free for c in components for b in c.blocks) and all(
        f.variable in graph.labelled and labelled(c, graph) == f.variable
        for c in components for f in c.factors if graph.model.variables[f.variable].kind == "observed"
    )  # fmt: skip


def swept_chunk(units: float, row: int | None) -> int:
    """Units x particles of one chunk of units that are settled by sweeps: a row of the store's chunks, which is decoded whole, is not cut while that is small.

    Args:
        units: Units for each unit of the split plate.
        row: Length of the store's chunks along it.
    """
    return max(SWEPT_CHUNK, min(LONG_CHUNK, int(2 * units * (row or 0))))


def room_for(budget: int, layout: Layout) -> int:
    """Bytes left for computing."""
    return budget - PROCESS_BYTES - sum(2 * x.nbytes for x in layout.index.values())


def make_plan(guide: Guide, layout: Layout, data_bytes: int, budget: int, *, processes: int, lanes: int, itemsize: int, chunk: int, needs_whole: bool) -> Plan:
    """Plan a fit within `budget` bytes per process.

    Args:
        guide: The guide.
        layout: Cardinalities.
        data_bytes: Bytes of the cohort in the computation's dtype.
        budget: Bytes allowed per process.
        processes: Processes that compute.
        lanes: Tasks that a process may compute at the same time, if memory allows.
        itemsize: Bytes of a number in the computation.
        chunk: Wanted units x particles of one chunk.
        needs_whole: Whether some component must see the whole cohort at once.

    Raises:
        PlanRefused: Even the smallest chunk does not fit; both figures are named.
    """
    model = guide.graph.model
    latents = {v.name: math.prod(layout.cardinality[p] for p in v.plates) * math.prod(guide.graph.shape(v)) for v in model.latents}
    per_unit = unit_bytes(guide.graph, guide.components, itemsize)
    tables = SITE_ARRAYS * 8 * sum(b.dim * math.prod(layout.cardinality[p] for p in b.plates) for b in guide.blocks if b.free)
    index = sum(2 * x.nbytes for x in layout.index.values())
    whole = max((math.prod(layout.cardinality[p] for p in v.plates) for v in model.of_kind("observed", "latent")), default=1)
    whole = max(whole, dense_units(guide.components, layout.cardinality))
    room = budget - PROCESS_BYTES - tables - index
    smallest = (whole if needs_whole else 1024) * per_unit
    if room < smallest:
        raise PlanRefused(
            "the fit does not fit into the memory allowed", where="plan", expected=f"at most {format_bytes(budget)} per process",
            got=f"at least {format_bytes(PROCESS_BYTES + tables + index + smallest)}", remedy="raise memory=, or use a smaller model",
        )
    chunk = max(whole if needs_whole else 1024, min(chunk, int(0.5 * room / per_unit)))
    # What cannot be kept whole is read anew in every pass, however much of it is kept: then tasks at the same time are worth more.
    kept = room - chunk * per_unit if 2 * data_bytes <= room - chunk * per_unit else room - lanes * chunk * per_unit
    cache = min(2 * data_bytes, max(0, kept) // 2)
    lanes = max(1, min(lanes, (room - cache) // max(1, chunk * per_unit)))
    disk = sum(2 * n * (4 if n > 1_000_000 else 8) for n in latents.values())
    method = {}
    for component in guide.components:
        kind = "Gaussian elimination"
        if not component.tree:
            kind += " of the largest block, {1:,} columns dense".format(*dense_rest(component, layout.cardinality))
        exact = "exact" if component.quadratic else "mode and curvature"
        free = [b.name for b in component.blocks if b.free]
        method[component.name] = f"{kind}, {exact}" + (f", free rows for {', '.join(free)}" if free else "")
    return Plan(latents, data_bytes, int(cache), chunk, chunk * per_unit, tables, index, disk, processes, int(lanes), budget, method)
