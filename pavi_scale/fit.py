"""Fit a model to a cohort, resume a run, open its posterior."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import shutil
import sys
import time
import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import xarray as xr
from distributed import Client

from pavi_scale.cohort import Cohort, open_cohort
from pavi_scale.computation import Settings, StudyComputation, make_graph
from pavi_scale.diagnosing import diagnose
from pavi_scale.errors import InputError, Interrupted, ModelError, PlanRefused, RunError
from pavi_scale.marginal import Pool
from pavi_scale.memory import format_bytes
from pavi_scale.model.template import Model
from pavi_scale.planning import Plan
from pavi_scale.posterior.posterior import Posterior
from pavi_scale.posterior.sampler import Context, set_loader
from pavi_scale.posterior.store import PosteriorWriter
from pavi_scale.progress import Progress
from pavi_scale.run import Run
from pavi_scale.sampling import GuideSampler
from pavi_scale.server.local import LocalEngine
from pavi_scale.server.protocol import Engine
from pavi_scale.server.runtime import DaskEngine
from pavi_scale.study import Encoding, Study, prepare
from pavi_scale.training import Fitted, Trainer

SMALL = 64 << 20  # bytes of data up to which the fit ends with an evaluation of the full ELBO
Source = xr.Dataset | str | os.PathLike[str]
_known: weakref.WeakValueDictionary[str, Model] = weakref.WeakValueDictionary()


def fit(
    model: Model,
    cohort: Source,
    *,
    run: str | os.PathLike[str] | None = None,
    seed: int = 0,
    client: Client | None = None,
    encoding: Encoding = "auto",
    memory: str | int = "4 GiB",
    device: str = "auto",
    max_time: float | None = None,
    progress: bool = True,
) -> Posterior:
    """Fit a model to a cohort by plate-amortised variational inference.

    Args:
        model: The model.
        cohort: A Dataset, or path or URL of a Zarr store that holds one.
        run: Run directory; None for a temporary one.
        seed: Seed of everything random: the same seed gives the same numbers, in process and on any number of workers.
        client: A Dask client whose workers compute; None to compute in this process.
        encoding: "auto", "free", "encoder", "hybrid", or {plate set: scheme}.
        memory: Bytes allowed per process, such as "4 GiB"; a fit that would need more is refused.
        device: "auto" or "cpu".
        max_time: Seconds after which training stops (the posterior is still written; its status may be "unconverged").
        progress: Whether to show progress on standard error.

    Returns:
        The posterior.

    Raises:
        InputError: Bad model, cohort, option or run path, before any compute.
        PlanRefused: It will not fit in memory or on disk.
        Interrupted: By a signal; `resume` goes on.

    Example:
        >>> import xarray as xr
        >>> from torch.distributions import Normal
        >>> from pavi_scale import Model, Plate, fit, latent, observed
        >>> model = Model(Plate("obs"), mu=latent(lambda: Normal(0.0, 1.0)), x=observed(lambda mu: Normal(mu, 1.0), plates="obs"))
        >>> posterior = fit(model, xr.Dataset({"x": ("obs", [0.5, 1.5, 1.0])}), progress=False)
        >>> round(float(posterior.datatree["posterior_mean"]["mu"]), 2)
        0.75
    """
    check_options(seed, max_time, device)
    config = {"seed": int(seed), "encoding": encoding_record(encoding), "memory": memory, "device": device, "max_time": max_time}
    if not isinstance(model, Model):
        raise ModelError("the first argument is not a model", expected="pavi_scale.Model", got=type(model).__name__)
    opened = open_cohort(cohort, model)
    study = make_study(opened, config, client)
    opened.check_values()
    directory = Run.create(run)
    check_disk(study, directory)
    with directory.lock():
        record(directory, opened, study, config)
        return complete(directory, study, config, client, progress)


def plan(model: Model, cohort: Source, *, encoding: Encoding = "auto", memory: str | int = "4 GiB", client: Client | None = None) -> Plan:
    """What a fit would take, without running it.

    Raises:
        PlanRefused: It will not fit in memory.
    """
    opened = open_cohort(cohort, model)
    return make_study(opened, {"seed": 0, "encoding": encoding, "memory": memory}, client).plan


def resume(run: str | os.PathLike[str], *, model: Model | None = None, client: Client | None = None, progress: bool = True) -> Posterior:
    """Go on with an interrupted run; a finished one is just opened.

    Raises:
        RunError: No run there, or model or cohort have changed since (the message names what).
    """
    directory = Run.open(run)
    study_record = directory.read_study()
    if directory.generation is not None and directory.state().get("phase") == "done":
        return open_posterior(run, model=model)
    found = find_model(study_record, model, directory)
    opened = reopen_cohort(study_record, found, directory)
    config = study_record["config"]
    study = make_study(opened, {**config, "encoding": encoding_from(config["encoding"])}, client)
    with directory.lock():
        return complete(directory, study, config, client, progress)


def open_posterior(run: str | os.PathLike[str], *, model: Model | None = None) -> Posterior:
    """The posterior of a finished run.

    Args:
        run: The run directory.
        model: Needed only where the run's model cannot be imported (one defined inside a function).
    """
    directory = Run.open(run)
    return Posterior.open(directory, load_context(str(directory.path), model))


def check_options(seed: int, max_time: float | None, device: str) -> None:
    """Refuse options that mean nothing."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise InputError("the seed must be a non-negative integer", where="seed", got=repr(seed))
    if max_time is not None and (isinstance(max_time, bool) or not isinstance(max_time, (int, float)) or not max_time > 0):
        raise InputError("the time allowed must be a positive number of seconds, or None", where="max_time", got=repr(max_time))
    if device not in ("auto", "cpu"):
        raise InputError("device is not available", where="device", expected="'auto' or 'cpu'", got=repr(device))


def check_disk(study: Study, run: Run) -> None:
    """Refuse a posterior that the run's disk has no room for."""
    free = shutil.disk_usage(run.path).free
    if study.plan.disk_bytes > free:
        raise PlanRefused("the posterior does not fit on the disk", where=run.path, expected=f"{format_bytes(study.plan.disk_bytes)} free", got=format_bytes(free), remedy="free some space, or choose another run path")


# -- preparation ----------------------------------------------------------------------------------------------------------------


def make_study(cohort: Cohort, config: Mapping[str, Any], client: Client | None) -> Study:
    """Checks, structure and plan of a fit."""
    processes = max(1, len(client.scheduler_info(n_workers=-1)["workers"])) if client is not None else 1
    return prepare(cohort, encoding=config["encoding"], memory=config["memory"], processes=processes, threads=1, seed=config["seed"])


def encoding_record(encoding: Encoding) -> Any:
    """An encoding option as JSON."""
    if isinstance(encoding, str):
        return encoding
    return {(key if isinstance(key, str) else "*".join(key)): scheme for key, scheme in encoding.items()}  # type: ignore[arg-type]


def encoding_from(stored: Any) -> Encoding:
    """The inverse of `encoding_record`."""
    return stored if isinstance(stored, str) else dict(stored)


def record(run: Run, cohort: Cohort, study: Study, config: Mapping[str, Any]) -> None:
    """Write down what is fitted; a cohort that lives in memory is copied into the run."""
    model = cohort.model
    fingerprint = model.fingerprint()
    _known[fingerprint] = model
    path = model.import_path()
    module = sys.modules.get(path.split(":")[0]) if path else None
    source = cohort.source
    if source is None or source.startswith("memory:"):
        source = "cohort.zarr"
        labelled = {n: c.astype(object) for n, c in cohort.dataset.coords.items() if c.dtype.kind == "U"}
        cohort.dataset.assign_coords(labelled).drop_encoding().to_zarr(run.path / source, mode="w", consolidated=False, zarr_format=3)
    run.write_study({
        "model": {"import": path, "file": getattr(module, "__file__", None), "fingerprint": fingerprint},
        "cohort": {"source": source, "fingerprint": cohort.fingerprint, "sizes": {**cohort.layout.cardinality, **cohort.event_sizes}},
        "config": dict(config), "settings": settings_record(study.settings), "plan": dict(study.plan.table()),
    })


def settings_record(settings: Settings) -> dict[str, Any]:
    """Settings as JSON."""
    return {
        "free": [list(f) for f in settings.free], "schemes": dict(settings.schemes), "structure": {k: dict(v) for k, v in settings.structure.items()},
        "split": settings.split, "dtype": settings.dtype, "chunk": settings.chunk, "cache_bytes": settings.cache_bytes,
    }


def settings_from(stored: Mapping[str, Any]) -> Settings:
    """The inverse of `settings_record`."""
    return Settings(tuple(tuple(f) for f in stored["free"]), stored["schemes"], stored["structure"], stored["split"], stored["dtype"], 1, stored["cache_bytes"], stored["chunk"])


def find_model(study: Mapping[str, Any], model: Model | None, run: Run) -> Model:
    """The run's model: the one given, one alive in this process, or imported; its fingerprint must be the recorded one."""
    stored = study["model"]
    wanted = stored["fingerprint"]
    found = model or _known.get(wanted) or import_model(stored)
    if found is None:
        raise RunError("the run's model cannot be imported", where=run.path, expected=stored["import"] or "a model at module level", got="nothing importable", remedy="pass model=, or define the model at the top level of a module")
    if found.fingerprint() != wanted:
        raise RunError("the model has changed since the run", where=run.path, expected=f"fingerprint {wanted}", got=found.fingerprint(), remedy="restore the model's code, or fit again in a new run")
    return found


def import_model(stored: Mapping[str, Any]) -> Model | None:
    """Import a model by its recorded path, or from its recorded file."""
    path, file = stored["import"], stored["file"]
    if not path:
        return None
    name, attribute = path.split(":")
    try:
        module = importlib.import_module(name)
        if not isinstance(getattr(module, attribute, None), Model):
            raise ImportError(name)
    except ImportError:
        if not file or not os.path.exists(file):
            return None
        spec = importlib.util.spec_from_file_location(f"_pavi_{name.replace('.', '_')}", file)
        if spec is None or spec.loader is None:
            return None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    found = getattr(module, attribute, None)
    return found if isinstance(found, Model) else None


def reopen_cohort(study: Mapping[str, Any], model: Model, run: Run) -> Cohort:
    """The run's cohort; its fingerprint must be the recorded one where it lies outside the run."""
    stored = study["cohort"]
    if stored["source"] == "cohort.zarr":
        return open_cohort(run.path / "cohort.zarr", model)
    opened = open_cohort(stored["source"], model)
    if opened.fingerprint != stored["fingerprint"]:
        raise RunError("the cohort has changed since the run", where=stored["source"], expected=f"fingerprint {stored['fingerprint']}", got=opened.fingerprint, remedy="restore the cohort, or fit again in a new run")
    return opened


# -- the run --------------------------------------------------------------------------------------------------------------------


def complete(run: Run, study: Study, config: Mapping[str, Any], client: Client | None, progress: bool) -> Posterior:
    """Train unless that is done, then write the posterior."""
    deadline = time.monotonic() + float(config.get("max_time") or math.inf)
    engine: Engine = DaskEngine(client, study.spec) if client is not None else LocalEngine(study.spec)
    computation = StudyComputation(study.graph, study.cohort, study.settings)
    try:
        with Progress(progress) as bar:
            state, facts = train(run, study, computation, engine, config, deadline, bar)
            bar.stage("posterior")
            facts |= write_posterior(run, study, computation, engine, state, facts, config)
            run.commit(state, facts)
    except KeyboardInterrupt as error:
        run.log("interrupted")
        raise Interrupted("the fit was interrupted", where=run.path, remedy=f"pavi_scale.resume({str(run.path)!r}) goes on") from error
    finally:
        engine.close()
    return Posterior.open(run, load_context(str(run.path), study.cohort.model, computation))


def train(run: Run, study: Study, computation: StudyComputation, engine: Engine, config: Mapping[str, Any], deadline: float, bar: Progress) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Weights and facts of the trained guide; taken from the run where it has them."""
    resumed = None
    if run.generation is not None:
        tensors, facts = run.latest()
        if facts["phase"] != "training":
            return tensors, facts
        resumed = (tensors, int(facts["step"]))
    trainer = Trainer(computation, engine, int(config["seed"]), deadline, bar.update)
    began = time.monotonic()
    if study.settings.free:
        fitted = trainer.stochastic(lambda state, step: run.commit(state, {"phase": "training", "step": step}) and None, resumed)
    else:
        fitted = trainer.marginal(study.trained)
    facts = facts_of(fitted, time.monotonic() - began, deadline)
    run.commit(fitted.state, facts)
    run.log("trained", seconds=facts["seconds"], converged=facts["converged"])
    return fitted.state, facts


def facts_of(fitted: Fitted, seconds: float, deadline: float) -> dict[str, Any]:
    """The JSON part of a trained run."""
    khat = fitted.khat if math.isfinite(fitted.khat) else None
    late = time.monotonic() > deadline
    trace = [[stage, value if math.isfinite(value) else None] for stage, value in fitted.trace]
    return {"phase": "trained", "converged": bool(fitted.converged and not late), "khat_root": khat, "modes": fitted.modes, "efficiency": fitted.efficiency, "trace": trace, "seconds": seconds}


def write_posterior(run: Run, study: Study, computation: StudyComputation, engine: Engine, state: dict[str, np.ndarray], facts: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The posterior pass: moments of every latent, diagnostics, trace; returns the facts that say it is done."""
    context = make_context(computation, state, int(config["seed"]))
    trainer = Trainer(computation, engine, int(config["seed"]), math.inf, lambda *a: None)
    tasks = trainer.tasks(run=str(run.path), repeats=4)
    length = tasks[0]["shard"][2] - tasks[0]["shard"][1]
    split = study.settings.split
    writer = PosteriorWriter.create(run.path, context, chunks={split: length} if split else None)
    pool = Pool(state["pool/points"], np.zeros(0), state["pool/weight"], 0.0, None)  # type: ignore[arg-type]
    count = moment_points(study)
    picks = pool.resample((np.arange(count) + 0.5) / count)
    answers = engine.round("moments", {**state, "points": state["pool/points"][picks]}, tasks)
    write_root(writer, computation, state)
    write_returned(writer, study, answers)
    status, diagnostics = diagnose(computation, engine, state, facts, int(config["seed"]), trainer.tasks())
    writer.put("diagnostics", diagnostics)
    trace = facts["trace"]
    writer.put("fit", xr.Dataset(
        {"elbo": ("step", np.asarray([np.nan if v is None else v for _, v in trace], dtype=np.float64)), "stage": ("step", np.asarray([s for s, _ in trace], dtype=object))},
        coords={"step": np.arange(len(trace))},
    ))
    writer.finish()
    run.log("done", status=status)
    nats, error = context.sampler.elbo(4, 0) if study.plan.data_bytes < SMALL else (facts["trace"][-1][1], None)
    return {"phase": "done", "status": status, "elbo": nats, "elbo_error": error if error is not None and math.isfinite(error) else None}


def moment_points(study: Study) -> int:
    """Root points that the moments are averaged over: as many as a pass can afford."""
    layout = study.cohort.layout
    units = max((math.prod(layout.cardinality[p] for p in v.plates) for v in study.graph.model.of_kind("observed", "latent")), default=1)
    return int(np.clip(1e7 // max(units, 1), 4, 512))


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


# -- loading --------------------------------------------------------------------------------------------------------------------


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
    study = run.read_study()
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


def extend(computation: StudyComputation, state: Mapping[str, np.ndarray], facts: Mapping[str, Any], new: Source, seed: int) -> Posterior:
    """Posterior of a new cohort's units under the trained guide: the root posterior stays, one pass over the new data, no training."""
    opened = open_cohort(new, computation.graph.model)
    opened.check_values()
    study = prepare(opened, seed=seed)
    settings = replace(computation.settings, split=study.settings.split)
    study = replace(study, settings=settings)
    kept = {k: v for k, v in state.items() if not k.startswith("residual/")}
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
