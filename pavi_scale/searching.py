"""Where the training of free rows begins: a large cohort is searched in miniature, the starts shared by the workers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pavi_scale.computation import StudyComputation
from pavi_scale.errors import NumericalError
from pavi_scale.miniature import Ready, few_units, miniature
from pavi_scale.rows import LOOK, Found, Rows
from pavi_scale.server.local import LocalEngine
from pavi_scale.server.protocol import Asked, Engine
from pavi_scale.settings import make_graph
from pavi_scale.sites import Sites
from pavi_scale.training import Trainer

FIRST = 3  # tasks of each worker that read while the miniature is made


def begin(rows: Rows) -> tuple[Sites, np.ndarray]:
    """First sites and root of a study's free rows.

    A large cohort is searched in miniature, and followed from the root found there. Meanwhile shards are read that will be kept beside the growing
    selections, most likely by who is asked for them: some while the miniature is made, the others once its starts have been followed. Of a cohort that
    leaves no such room, the operating system fetches what the first pass begins with.
    """
    trainer = rows.trainer
    study, engine = trainer.study, trainer.engine
    units = few_units(study, trainer.seed)
    if units is None:
        return rows.search()
    together = engine.processes > 1  # one has enough to read while the driver searches
    parts = rows.parts(rows.pieces(rows.count)) if rows.room > 0 or together else []  # one that keeps nothing has the whole pass fetched
    ahead = [{"pieces": pieces, "room": rows.room, "share": 1 / engine.processes, "on": False} for pieces in parts]
    at_once = FIRST * engine.processes if together else len(ahead)
    rows.fetch_pass()
    if ahead:
        engine.submit("fetch", {}, ahead[:at_once])
    small = miniature(study, units)

    def follow(starts: np.ndarray) -> list[Found]:
        asked, left = send(engine, small, rows.draws, trainer.seed, starts)
        engine.submit("fetch", {}, ahead[at_once:])
        mine = [followed(small, starts, rows.draws, left, trainer.seed)] if left else []  # the driver would only wait
        return received([*asked.result(), *mine], trainer)

    with LocalEngine(Ready(small)) as here:
        there = Rows(replace(trainer, study=small, engine=here), least=1, prior=rows.draws)  # nobody shares its rounds
        found, root = there.search(follow if together else None)
    fresh = rows.upper.initial(root, rows.rows_at(root, 0))
    sites = Sites(fresh.loc, fresh.precision, found.root, found.pull, found.root_precision)
    # Such sites say nothing of the joined roots yet: rows are looked at where the root says.
    centre = replace(rows.upper.centre(sites, root), root=root, loc=fresh.loc)
    sites, root, _ = rows.follow(sites, centre, LOOK, 1000)
    return sites, root


def send(engine: Engine, small: StudyComputation, prior: np.ndarray, seed: int, starts: np.ndarray) -> tuple[Asked, list[int]]:
    """Ask for the starts to be followed: some each for as many workers as there are, and some left for who asks.

    Args:
        engine: Whose computations are of the study that `small` is a part of.
        small: The miniature; its data travel with the tasks.
        prior: Draws of the root's prior, `[N, R]`.
        seed: Seed of the fit.
        starts: Root points, `[K, R]`.

    Returns:
        What was asked, and the numbers of the starts that were not.
    """
    cohort, each = small.cohort.spec(), min(len(starts), engine.processes + 1)
    shares = [list(range(first, len(starts), each)) for first in range(each)]
    left = shares.pop() if each > engine.processes else []
    return engine.submit("search", {"points": starts, "prior": prior}, [{"cohort": cohort, "starts": share, "seed": seed} for share in shares]), left


def received(answers: Sequence[Mapping[str, np.ndarray]], trainer: Trainer) -> list[Found]:
    """What was found from each start that led anywhere, in their order; told to the trainer as if it had been found here."""
    arrays: dict[int, dict[str, np.ndarray]] = {}
    for key, value in (item for answer in answers for item in answer.items()):
        number, _, name = key.partition("/")
        arrays.setdefault(int(number), {})[name] = value
    out = []
    for _, mine in sorted(arrays.items()):
        trainer.skips.total += int(mine["skipped"])
        for value in mine["trace"]:
            trainer.tell("start", float(value))
        if "root" in mine:
            out.append(unpacked(mine))
    return out


def search(study: StudyComputation, state: Mapping[str, np.ndarray], task: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Answer one task: follow `task["starts"]` of the points `state["points"]` on the cohort `task["cohort"]`, on the processor."""
    cohort = task["cohort"].open(study.graph.model)
    small = StudyComputation(make_graph(cohort), cohort, study.settings)
    return followed(small, state["points"], state["prior"], task["starts"], int(task["seed"]))


def followed(small: StudyComputation, points: np.ndarray, prior: np.ndarray, starts: Sequence[int], seed: int) -> dict[str, np.ndarray]:
    """What some of the points lead to on a miniature, as named arrays `<start>/<name>`."""
    out: dict[str, np.ndarray] = {}
    with LocalEngine(Ready(small)) as engine:
        trainer = Trainer(small, engine, seed, math.inf, lambda *_: None)
        rows = Rows(trainer, least=1, prior=prior)
        for i in starts:
            seen, skipped = len(trainer.trace), trainer.skips.total
            mine = {}
            with contextlib.suppress(NumericalError):  # not each start leads somewhere: the driver says so if none does
                mine = packed(rows.follow_each(points[i : i + 1], first=int(i))[0])
            mine |= {"trace": np.asarray([value for _, value in trainer.trace[seen:]], dtype=np.float64), "skipped": np.asarray(trainer.skips.total - skipped)}
            out |= {f"{i}/{key}": value for key, value in mine.items()}
    return out


def packed(found: Found) -> dict[str, np.ndarray]:
    """As named arrays, to the last bit."""
    sites = found.sites
    return {
        **{f"loc/{b}": x for b, x in sites.loc.items()}, **{f"precision/{b}": x for b, x in sites.precision.items()}, **found.starts,
        "centre": sites.root, "pull": sites.pull, "curvature": sites.root_precision, "root": found.root, "value": np.asarray(found.value),
    }


def unpacked(arrays: Mapping[str, np.ndarray]) -> Found:
    """The inverse of `packed`."""
    def under(name: str, short: bool) -> dict[str, np.ndarray]:
        return {k.removeprefix(f"{name}/") if short else k: np.array(v) for k, v in arrays.items() if k.startswith(f"{name}/")}

    centre, pull, curvature, root = (np.array(arrays[k]) for k in ("centre", "pull", "curvature", "root"))
    return Found(Sites(under("loc", True), under("precision", True), centre, pull, curvature), root, float(arrays["value"]), under("start", False))
