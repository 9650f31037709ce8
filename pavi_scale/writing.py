"""From a trained guide to its posterior: the pass that writes moments, diagnostics and trace, and what serves a finished run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pavi_scale import rng
from pavi_scale.cohort import Origin, open_cohort
from pavi_scale.computation import StudyComputation
from pavi_scale.diagnosing import ask_ratios, diagnose
from pavi_scale.errors import CohortError, RunError
from pavi_scale.guide.blocks import dense_units
from pavi_scale.guide.guide import Guide
from pavi_scale.marginal import Pool
from pavi_scale.model.template import Model
from pavi_scale.moments import MOST_CANDIDATES
from pavi_scale.posterior.groups import table_group, trace_group
from pavi_scale.posterior.posterior import Posterior
from pavi_scale.posterior.sampler import Context, set_loader
from pavi_scale.posterior.store import PosteriorWriter
from pavi_scale.recording import find_model, read_record, record, reopen_cohort, settings_from
from pavi_scale.run import Run
from pavi_scale.sampling import GuideSampler
from pavi_scale.server.local import LocalEngine
from pavi_scale.server.protocol import Engine
from pavi_scale.settings import make_graph
from pavi_scale.study import Study, prepare
from pavi_scale.training import Trainer

FILES = 128  # chunks of the posterior along the split plate, about
REGION = 32 << 20  # bytes of the posterior that one task writes at most
SMALL = 16 << 20  # bytes of data up to which the fit ends with an evaluation of the full ELBO


def write_posterior(
    run: Run, study: Study, computation: StudyComputation, engine: Engine, state: dict[str, np.ndarray], facts: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Any]:
    """The posterior pass: moments of every latent, diagnostics, trace; returns the facts that say it is done."""
    context = make_context(computation, state, int(config["seed"]))
    trainer = Trainer(computation, engine, int(config["seed"]), math.inf, lambda *a: None)
    tasks = regions(study, trainer.tasks(run=str(run.path), repeats=4))
    length = tasks[0]["shard"][2] - tasks[0]["shard"][1]
    split = study.settings.split
    writer = PosteriorWriter.create(run.path, context, chunks={split: length} if split else None)
    pool = Pool(state["pool/points"], np.zeros(0), state["pool/weight"], 0.0, None)  # type: ignore[arg-type]
    limits = moment_points(study, min(MOST_CANDIDATES, computation.draws_per_unit(state)))
    count = max(limits.values(), default=1)
    picks = pool.resample(spread(min(limits.values(), default=count), count))
    answers = engine.round("moments", {**state, "points": state["pool/points"][picks]}, [{**t, "limits": limits} for t in tasks])
    held = gather_held(study, answers)
    state.update(held)
    ratios = ask_ratios(computation, engine, state, int(config["seed"]), trainer.tasks())  # while the driver writes
    if held:
        # Draws of few units take well below a second: the loop that makes their normals is compiled now, once per installation, not in the first of them.
        rng.normal(0, np.arange(1), dtype=np.float32 if study.settings.dtype == "float32" else np.float64)
    with ThreadPoolExecutor(1, "pavi-flush") as aside:
        flushed = aside.submit(writer.flush)  # the disk works while workers and driver compute
        write_root(writer, computation, state)
        write_returned(writer, study, answers)
        status, tables = diagnose(computation, [] if ratios is None else ratios.result(), state, facts)
        flushed.result()
    labels = {p: study.cohort.coordinate(p) for p in sorted({p for dims, _ in tables.values() for p in dims})}
    writer.put("diagnostics", table_group(tables, {p: label for p, label in labels.items() if label is not None}))
    writer.put("fit", trace_group(facts["trace"], facts.get("history", {})))
    writer.finish()
    run.log("done", status=status)
    nats, error = context.sampler.elbo(4, 0) if study.plan.data_bytes < SMALL else (facts["trace"][-1][1], None)
    return {"phase": "done", "status": status, "elbo": nats, "elbo_error": error if error is not None and math.isfinite(error) else None}


def regions(study: Study, tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tasks that each compute a few neighbouring shards and write them as one chunk: what is asked of a unit of another plate opens few files."""
    first = tasks[0]["shard"]
    length, per = first[2] - first[1], min(-(-len(tasks) // FILES), REGION * len(tasks) // max(1, study.plan.disk_bytes))
    per = 1 if study.cohort.layout.index else max(1, per)  # ragged units come back shard by shard
    some = [tasks[a : a + per] for a in range(0, len(tasks), per)]
    return [{**group[0], "shard": (first[0], group[0]["shard"][1], group[-1]["shard"][2], group[0]["shard"][3]), "length": length} for group in some]


def gather_held(study: Study, answers: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """What draws of labelled components need of their parents, as whole tables: a draw of few units then reads the data of those units only."""
    tables: dict[str, np.ndarray] = {}
    for answer in answers:
        for key in (k for k in answer if k.startswith("held/")):
            block = next(b for b in study.guide.blocks if b.name == key.removeprefix("held/"))
            count = math.prod(study.cohort.layout.cardinality[p] for p in block.plates)
            table = tables.setdefault(key, np.zeros((count, answer[key].shape[1])))
            table[answer[f"at/{block.name}"]] = answer[key]
    return tables


def spread(few: int, count: int) -> np.ndarray:
    """Numbers in (0, 1) of which the first `few` are spread out evenly, and all of them nearly (multiples of the golden ratio)."""
    return np.concatenate([(np.arange(few) + 0.5) / few, (0.5 + np.arange(count - few) * 0.6180339887498949) % 1.0])


def moment_points(study: Study, draws: int) -> dict[str, int]:
    """Root points that the moments of each component are averaged over: as many as a pass can afford.

    Args:
        study: The study.
        draws: Candidates of each draw of a resampled block; laws that touch one are computed for each.
    """
    layout, model = study.cohort.layout, study.graph.model
    budget, least, most = (1e6, 2, 128) if study.settings.free else (1e7, 4, 512)
    out: dict[str, int] = {}
    for c in study.guide.components:
        sizes = [(f, math.prod(layout.cardinality[p] for p in model.variables[f.variable].plates)) for f in c.factors]
        work = max((n * (draws if f.touches[-1][0] in c.resampled else 1) for f, n in sizes), default=1)
        out[c.name] = int(np.clip(budget // max(work, dense_units([c], layout.cardinality)), least, most))
    for i, c in enumerate(study.guide.components):  # a component that a later one needs looks at as many points at least
        out[c.name] = max(out[c.name], *(out[later.name] for later in study.guide.components[i:]))
    return out


def write_root(writer: PosteriorWriter, computation: StudyComputation, state: Mapping[str, np.ndarray]) -> None:
    """Moments of the root variables, from the whole weighted pool."""
    points, weight = torch.from_numpy(np.ascontiguousarray(state["pool/points"])), state["pool/weight"]
    for name, value in computation.space.values(points).items():
        theta = value.theta.numpy()
        mean = np.tensordot(weight, theta, 1)
        variance = np.tensordot(weight, (theta - mean) ** 2, 1)
        writer.write(name, {}, mean, np.sqrt(variance))


def write_returned(writer: PosteriorWriter, study: Study, answers: list[dict[str, np.ndarray]]) -> None:
    """Write the latents whose moments came back to the driver, their units put in place."""
    layout = study.cohort.layout
    for v in study.graph.model.latents:
        parts = [a for a in answers if f"mean/{v.name}" in a]
        if not parts:
            continue
        shape = (*(layout.cardinality[p] for p in v.plates), *study.graph.shape(v))
        mean, sd = np.full(shape, np.nan), np.full(shape, np.nan)
        for part in parts:
            at = np.ix_(*(part[f"units/{p}"] for p in v.plates))
            mean[at], sd[at] = part[f"mean/{v.name}"], part[f"sd/{v.name}"]
        writer.write(v.name, {}, mean, sd)


def make_context(computation: StudyComputation, state: Mapping[str, np.ndarray], seed: int, facts: Mapping[str, Any] | None = None) -> Context:
    """What a posterior needs of a computation; with the facts of a finished run it can be extended, unless it has rows of its own units."""
    rows = bool(computation.guide.free) or "free" in computation.settings.schemes.values()
    extension = None if rows or facts is None else lambda new: extend(computation, state, facts, new, seed)
    cohort = computation.cohort
    labels = {d: cohort.coordinate(d) for d in (*cohort.model.plates, *cohort.model.dims)}
    return Context(
        GuideSampler(computation, state, seed), cohort.model, cohort.dataset, cohort.layout, cohort.event_sizes,
        {d: label for d, label in labels.items() if label is not None}, extension,
    )


def load_context(path: str, model: Model | None = None, computation: StudyComputation | None = None) -> Context:
    """The context of a run on disk."""
    run = Run.open(path)
    study = read_record(run)
    found = find_model(study, model, run)
    if run.generation is None:
        raise RunError("the run has no weights yet", where=run.path, remedy="resume it")
    state, facts = run.latest()
    if facts["phase"] == "training":
        raise RunError("the run is not finished", where=run.path, got=f"phase {facts['phase']!r}", remedy=f"pavi_scale.resume({path!r})")
    if computation is None:
        cohort = reopen_cohort(study, found, run)
        computation = StudyComputation(make_graph(cohort), cohort, settings_from(study["settings"]))
    return make_context(computation, state, int(study["config"]["seed"]), facts)


def extend(computation: StudyComputation, state: Mapping[str, np.ndarray], facts: Mapping[str, Any], new: Origin, seed: int) -> Posterior:
    """Posterior of a new cohort's units under the trained guide: the root posterior stays, one pass over the new data, no training."""
    opened = open_cohort(new, computation.graph.model)
    opened.check_values()
    study = prepare(opened, seed=seed)
    if study.settings.free:
        free = ", ".join("*".join(p) for p in study.settings.free)
        raise CohortError(
            "the new units are too many to be computed together", where="extend", expected="a cohort without free rows", got=f"free rows of {free}",
            remedy="extend by fewer of them at a time",
        )
    # A law that is linear for all units of the old cohort need not be so for the new ones.
    known, found = computation.settings.structure, study.settings.structure
    structure = {name: found[name] if old["quadratic"] and not found[name]["quadratic"] else old for name, old in known.items()}
    settings = replace(computation.settings, split=study.settings.split, structure=structure)
    study = replace(study, settings=settings, guide=Guide(study.graph, structure=structure))
    kept = {k: v for k, v in state.items() if not k.startswith(("residual/", "start/", "modes/"))}
    run = Run.create(None)
    config = {"seed": seed, "encoding": "auto", "memory": "4 GiB", "device": "auto", "max_time": None}
    with run.lock(), LocalEngine(study.spec) as engine:
        record(run, opened, study, config)
        fresh = StudyComputation(study.graph, opened, settings)
        done = {**facts, "phase": "trained"}
        done |= write_posterior(run, study, fresh, engine, kept, done, config)
        run.commit(kept, done)
    return Posterior.open(run, make_context(fresh, kept, seed, done))


set_loader(load_context)
