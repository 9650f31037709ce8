"""From a model and a cohort to a study that can be computed: checks, schemes of encodings, structure, plan."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pavi_scale.batching import most_units, split_plate
from pavi_scale.cohort import Cohort, Origin, open_cohort
from pavi_scale.errors import InputError, PlanRefused
from pavi_scale.guide.blocks import (
    DENSE_LIMIT,
    DENSE_NEWTON_LIMIT,
    JOINT,
    Block,
    Component,
    choose_free,
    coordinates,
    dense_rest,
    largest,
    law_units,
    make_blocks,
    make_components,
)  # fmt: skip
from pavi_scale.guide.correction import below
from pavi_scale.guide.guide import Guide
from pavi_scale.later import Later
from pavi_scale.memory import format_bytes, parse_bytes
from pavi_scale.model.density import Graph
from pavi_scale.model.template import Model
from pavi_scale.planning import Plan, make_plan, room_for, swept, swept_chunk, unit_bytes
from pavi_scale.server.answer import torch_threads
from pavi_scale.settings import Settings, make_graph
from pavi_scale.structure import look

if TYPE_CHECKING:
    from pavi_scale import spec as recipe
    from pavi_scale.server.runtime import Client
else:  # what computes a study is not needed to plan it
    recipe = Later("pavi_scale.spec")

CANDIDATES = (16, 512)  # fewest and most draws of a unit among which one is picked by importance weight
CANDIDATE_BUDGET = 100_000  # candidates x coordinates aimed at
RESAMPLE_LIMIT = 2_000_000
JOINT_VALUES = 1 << 20  # ground units of a law, times candidates, where candidates are of several blocks
LOOKED_AT = 1_000_000  # values of a variable that are compared with the support of its law
MOST_LANES = 8  # threads that compute in one process: beyond, they wait for the interpreter
LEARNED = ("free", "encoder", "hybrid")
POOLED = ("encoder", "hybrid")  # of these, the data of a unit are read by a set encoder
SCHEMES = ("auto", "likelihood", "free", "encoder", "hybrid")
Encoding = str | Mapping[object, str]


@dataclass(frozen=True)
class Study:
    """A model on a cohort, ready to be computed.

    Args:
        cohort: The data.
        graph: The model with its links.
        guide: The guide's structure.
        settings: How to compute.
        plan: What it will take.
        trained: Blocks whose corrections are trained whatever the core reaches (encoder and hybrid schemes).
    """

    cohort: Cohort
    graph: Graph
    guide: Guide
    settings: Settings
    plan: Plan
    trained: tuple[str, ...]

    @property
    def spec(self) -> recipe.StudySpec:
        """What workers build."""
        needed = self.plan.cache_bytes + self.plan.lanes * self.plan.chunk_bytes
        return recipe.StudySpec(self.cohort.model, self.cohort.spec(), self.settings, device_bytes=needed)


def schemes_of(encoding: Encoding, blocks: list[Block], plates: Mapping[str, object]) -> dict[str, str]:
    """Scheme of each block.

    Args:
        encoding: One scheme for all, or {plate set: scheme} with plate sets as a name, a tuple of names, or names joined by "*" or ",".
        blocks: Blocks of the model.
        plates: The model's plates.

    Raises:
        InputError: Unknown scheme or plate set.
    """
    if isinstance(encoding, str):
        table: dict[frozenset[str], str] = {frozenset(b.plates): encoding for b in blocks}
    else:
        table = {}
        for key, scheme in encoding.items():
            names = key.replace("*", ",").split(",") if isinstance(key, str) else list(key)  # type: ignore[call-overload]
            where = frozenset(n.strip() for n in names)
            if not any(frozenset(b.plates) == where for b in blocks):
                raise InputError(
                    "encoding names plates that no latent lives on", where="encoding", expected=f"one of {[b.name for b in blocks]}", got=repr(key)
                )
            table[where] = scheme
    for scheme in table.values():
        if scheme not in SCHEMES:
            raise InputError("unknown encoding scheme", where="encoding", expected=f"one of {SCHEMES}", got=repr(scheme))
    return {b.name: table.get(frozenset(b.plates), "auto") for b in blocks}


def candidates_of(graph: Graph, component: Component, cardinality: Mapping[str, int]) -> int:
    """Most candidates of a draw of a component that is not Gaussian: each costs an evaluation of its laws, past a few million coordinates too much."""
    count = max(coordinates(component, cardinality), 1)
    if count > RESAMPLE_LIMIT:
        return 0
    most = CANDIDATE_BUDGET // count
    if len(component.blocks) > 1:  # groups of them, which pick coarser blocks, too
        most = min(2 * most, JOINT_VALUES // law_units(graph, component, cardinality))
    found = int(np.clip(most, *CANDIDATES))
    return found if component.tree or found >= JOINT else 0


def prepare(
    cohort: Cohort, *, encoding: Encoding = "auto", memory: str | int = "4 GiB", processes: int = 1, lanes: int = 1, threads: int = 1, seed: int = 0
) -> Study:
    """Check everything and decide how to compute.

    Raises:
        ModelError: A law is ill-formed.
        CohortError: Data outside the support of their law.
        PlanRefused: It will not fit in memory.
    """
    budget = parse_bytes(memory)
    graph = make_graph(cohort)
    check_supports(graph, cohort)
    cardinality = cohort.layout.cardinality
    schemes = schemes_of(encoding, make_blocks(graph), graph.model.plates)
    # What crosses is computed whole, or not exactly.
    most = room_for(budget, cohort.layout) / unit_bytes(graph, make_components(graph, make_blocks(graph)), 8)
    free = choose_free(graph, cardinality, most=most)
    for block in make_blocks(graph, free):
        # Of a hybrid scheme for all, what is left where data cannot be encoded are rows.
        if block.free and (schemes[block.name] == "encoder" or (schemes[block.name] == "hybrid" and encoding != "hybrid")):
            raise InputError(
                "this block cannot have the scheme: its pool of data is not local",
                where=f"encoding of {block.name!r}",
                expected="'auto' or 'free'",
                got=schemes[block.name],
                remedy="name plate sets one by one: encoding={...}; or choose 'hybrid' for all",
            )
    structure = look(graph, cohort, free, seed)
    costly = [c for c in make_components(graph, make_blocks(graph, free)) if not c.tree and not structure[c.name]["quadratic"]]
    if any(dense_rest(c, cardinality)[1] > DENSE_NEWTON_LIMIT for c in costly):
        free = choose_free(graph, cardinality, DENSE_NEWTON_LIMIT, most)
        structure = look(graph, cohort, free, seed)
    for component in make_components(graph, make_blocks(graph, free)):
        known = structure[component.name]
        if not component.tree:
            known["head"] = largest(component, cardinality, bool(known["elementwise"]))
        known["candidates"] = 0 if free or known["quadratic"] else candidates_of(graph, component, cardinality)
    guide = Guide(graph, free, structure)
    path = "float32" if free else "float64"
    split = split_plate(graph.model, cohort.layout, guide.components)
    whole = any(not c.tree for c in guide.components)
    values = sum(math.prod(cardinality[p] for p in v.plates) * math.prod(graph.shape(v)) for v in graph.model.of_kind("observed", "covariate"))
    itemsize = 4 if free else 8
    chunk = 1 << 18
    if split is not None and swept(graph, guide.components):
        chunk = swept_chunk(most_units(graph.model, cohort.layout, split) / cardinality[split], cohort.chunk(split))
    plan = make_plan(
        guide, cohort.layout, values * itemsize, budget, processes=processes, lanes=lanes, itemsize=itemsize, chunk=chunk, needs_whole=whole or split is None
    )
    for c in guide.components:
        if not c.tree and dense_rest(c, cardinality)[1] > 4 * DENSE_LIMIT:
            raise PlanRefused(
                "a crossed component is too large to be solved at once",
                where=c.name,
                expected=f"at most {4 * DENSE_LIMIT:,} columns besides its largest block",
                got=f"{dense_rest(c, cardinality)[1]:,}",
                remedy="give its coarsest plates encoding='free'",
            )
    trained = tuple(b.name for b in guide.blocks if schemes[b.name] in LEARNED and not b.free)
    kinds = {b.name: schemes[b.name] if schemes[b.name] in LEARNED else "likelihood" for b in guide.blocks if not b.free}
    read = {b.name: below(graph.model, cardinality, b) for b in guide.blocks if kinds.get(b.name) in POOLED}
    seen = {name: v for name, v in read.items() if v is not None}
    settings = Settings(
        tuple(tuple(sorted(f)) for f in sorted(free, key=sorted)), kinds, seen, structure, split, path, threads, plan.cache_bytes, plan.chunk,
    )
    return Study(cohort, graph, guide, settings, plan, trained)


def check_client(client: Client | None) -> None:
    """Refuse what is no client that can be waited for; Dask is not imported where there is none."""
    if client is None:
        return
    if not callable(getattr(client, "scheduler_info", None)):  # a cluster has one, too, which is no function
        raise InputError(
            "the client cannot be used", where="client", expected="a dask.distributed.Client, or None to compute in this process", got=repr(client)[:200],
            remedy="from dask.distributed import Client; client=Client(address)",
        )
    if client.asynchronous or client.status != "running":
        got = "an asynchronous one" if client.asynchronous else f"one that is {client.status}"
        raise InputError(
            "the client cannot be used", where="client", expected="a Client that is connected, and synchronous", got=got,
            remedy="client=Client(address), kept open while the fit works",
        )


def make_study(cohort: Cohort, config: Mapping[str, Any], client: Client | None) -> Study:
    """Checks, structure and plan of a fit.

    Raises:
        InputError: The client is none, or cannot be used.
    """
    check_client(client)
    processes = max(1, len(client.scheduler_info(n_workers=-1)["workers"])) if client is not None else 1
    lanes = min(MOST_LANES, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1) if client is None else 1
    with torch_threads(1):  # laws are probed on a few units: more threads spend their time waiting for each other
        return prepare(cohort, encoding=config["encoding"], memory=config["memory"], processes=processes, lanes=lanes, threads=1, seed=config["seed"])


def plan(model: Model, cohort: Origin, *, encoding: Encoding = "auto", memory: str | int = "4 GiB", client: Client | None = None) -> Plan:
    """What a fit would take, without running it.

    Raises:
        PlanRefused: It will not fit in memory.
    """
    opened = open_cohort(cohort, model)
    return make_study(opened, {"seed": 0, "encoding": encoding, "memory": memory}, client).plan


def check_supports(graph: Graph, cohort: Cohort) -> None:
    """Refuse observations outside the support of their law, before anything is planned: in the first units, up to a million values of each variable.

    The others are compared whenever they are read, which `Cohort.read` does since it has been told of the supports (`make_graph`).

    Raises:
        CohortError: With the position of the first one.
    """
    for v in graph.model.of_kind("observed"):
        units = {p: np.arange(cohort.layout.cardinality[p]) for p in v.plates}
        for plate in v.plates:
            rest = math.prod(len(u) for p, u in units.items() if p != plate) * math.prod(graph.shape(v))
            units[plate] = units[plate][: max(1, LOOKED_AT // max(rest, 1))]
        cohort.read(v.name, units)


def describe(study: Study) -> str:
    """One line about a study."""
    return f"{sum(study.plan.latents.values()):,} latents, {format_bytes(study.plan.data_bytes)} of data, peak {format_bytes(study.plan.peak_bytes)}"
