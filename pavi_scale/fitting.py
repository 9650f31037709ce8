"""Fit a model to a cohort, resume a run, open its posterior."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pavi_scale.cohort import Cohort, Origin, open_cohort
from pavi_scale.cohort.foreign import is_url
from pavi_scale.cohort.readers import READ
from pavi_scale.computation import StudyComputation
from pavi_scale.device import find
from pavi_scale.errors import InputError, Interrupted, ModelError, PlanRefused
from pavi_scale.importing import leave_import
from pavi_scale.memory import format_bytes, keep_freed_memory
from pavi_scale.model.template import Model
from pavi_scale.posterior.posterior import Posterior
from pavi_scale.progress import Progress
from pavi_scale.recording import encoding_from, encoding_record, find_model, read_record, record, reopen_cohort
from pavi_scale.rows import Rows
from pavi_scale.run import OWN_DIRECTORIES, Run, local_path
from pavi_scale.searching import begin
from pavi_scale.server.answer import blas_threads, taking_turns
from pavi_scale.server.local import LocalEngine
from pavi_scale.server.protocol import Engine
from pavi_scale.server.runtime import Client, DaskEngine
from pavi_scale.study import Encoding, Study, make_study
from pavi_scale.training import Fitted, Trainer
from pavi_scale.watching import Watch
from pavi_scale.writing import load_context, write_posterior

MOST_SEEDS = 1 << 63  # what torch's generators take is smaller
MOST_STALE = 8  # updates: less than good steps between two kept copies of the weights (`nonfinite`), so that one of them is from before a bad one
TRACED = 256  # root coordinates up to which q(root) is kept with the trace
CHECKED_FIRST = 64 << 20  # bytes of a variable up to which it is read once, for bad values, before anything is computed


def fit(
    model: Model,
    cohort: Origin,
    *,
    run: str | os.PathLike[str] | None = None,
    seed: int = 0,
    client: Client | None = None,
    encoding: Encoding = "auto",
    memory: str | int = "4 GiB",
    device: str = "auto",
    max_time: float | None = None,
    staleness: int = 0,
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
        device: Where tasks are computed: "auto" and "cpu" are the processor; "cuda" is the first CUDA device of each worker's machine
            (of this one without a client). What is done by compiled loops (labelled components) stays on the processor.
        max_time: Seconds after which training stops (the posterior is still written; its status may be "unconverged").
        staleness: Updates that the weights which a minibatch step reads may be behind, so that this many more steps are computed at the same time;
            0 waits for each. Only learned corrections have such steps: whatever is summed over the whole cohort is summed at one state.
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
    leave_import()
    began = time.monotonic()
    check_options(seed, max_time, device, staleness, client)
    options = {"memory": memory, "device": device, "max_time": max_time, "staleness": int(staleness)}
    config = {"seed": int(seed), "encoding": encoding_record(encoding), **options}
    if run is not None:
        local_path(run)  # no path, no study
    if not isinstance(model, Model):
        raise ModelError("the first argument is not a model", expected="pavi_scale.Model", got=type(model).__name__)
    try:
        with terminable():
            opened = open_cohort(cohort, model)
            study = make_study(opened, config, client)
            opened.check_values(limit_bytes=CHECKED_FIRST)
            check_apart(opened, run)
            directory = Run.create(run)
            check_disk(study, directory)
            with directory.lock():
                record(directory, opened, study, config)
                return complete(directory, study, config, client, progress, began)
    except KeyboardInterrupt as error:  # later ones are told by `complete`
        raise Interrupted("the fit was interrupted before it had begun", where=run, remedy="fit again") from error


def resume(
    run: str | os.PathLike[str], *, model: Model | None = None, client: Client | None = None, progress: bool = True, device: str | None = None
) -> Posterior:
    """Go on with an interrupted run; a finished one is just opened.

    Args:
        run: The run directory.
        model: Needed only where the run's model cannot be imported (one defined inside a function).
        client: A Dask client whose workers compute; None to compute in this process.
        progress: Whether to show progress on standard error.
        device: Where to go on computing; None for where it was.

    Raises:
        RunError: No run there, or model or cohort have changed since (the message names what).
    """
    leave_import()
    began = time.monotonic()
    directory = Run.open(run)
    study_record = read_record(directory)
    if directory.generation is not None and directory.state().get("phase") == "done":
        return open_posterior(run, model=model)
    found = find_model(study_record, model, directory)
    opened = reopen_cohort(study_record, found, directory)
    config = {**study_record["config"], **({} if device is None else {"device": device})}
    check_options(config["seed"], config["max_time"], config["device"], config.get("staleness", 0), client)
    study = make_study(opened, {**config, "encoding": encoding_from(config["encoding"])}, client)
    with directory.lock():
        return complete(directory, study, config, client, progress, began)


def open_posterior(run: str | os.PathLike[str], *, model: Model | None = None) -> Posterior:
    """The posterior of a finished run.

    Args:
        run: The run directory.
        model: Needed only where the run's model cannot be imported (one defined inside a function).
    """
    leave_import()
    directory = Run.open(run)
    return Posterior.open(directory, load_context(str(directory.path), model))


def check_options(seed: int, max_time: float | None, device: str, staleness: int = 0, client: Client | None = None) -> None:
    """Refuse options that mean nothing."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < MOST_SEEDS:
        raise InputError("the seed must be a non-negative integer", where="seed", expected="an integer from 0 to 2**63 - 1", got=repr(seed)[:200])
    if max_time is not None and (isinstance(max_time, bool) or not isinstance(max_time, (int, float)) or not max_time > 0):
        raise InputError("the time allowed must be a positive number of seconds, or None", where="max_time", got=repr(max_time))
    if isinstance(staleness, bool) or not isinstance(staleness, (int, np.integer)) or not 0 <= staleness <= MOST_STALE:
        raise InputError("the staleness is a number of updates", where="staleness", expected=f"an integer from 0 to {MOST_STALE}", got=repr(staleness))
    if client is None:  # with workers it is theirs that count, and they look
        find(device)


def check_apart(cohort: Cohort, run: str | os.PathLike[str] | None) -> None:
    """Refuse a cohort that lies where the run keeps files of its own: a later fit would clear it away."""
    if run is None or cohort.source is None or is_url(cohort.source):
        return
    place, source = local_path(run).resolve(), Path(cohort.source).resolve()
    if source.is_relative_to(place) and source.relative_to(place).parts[:1] in [(name,) for name in OWN_DIRECTORIES]:
        raise InputError("the cohort lies among the run's own files", where=f"run {str(place)!r}", got=str(source), remedy="choose another run path")


def check_disk(study: Study, run: Run) -> None:
    """Refuse a posterior that the run's disk has no room for."""
    free = shutil.disk_usage(run.path).free
    if study.plan.disk_bytes > free:
        raise PlanRefused(
            "the posterior does not fit on the disk",
            where=run.path,
            expected=f"{format_bytes(study.plan.disk_bytes)} free",
            got=format_bytes(free),
            remedy="free some space, or choose another run path",
        )


# -- the run --------------------------------------------------------------------------------------------------------------------


def complete(run: Run, study: Study, config: Mapping[str, Any], client: Client | None, progress: bool, began: float) -> Posterior:
    """Train unless that is done, then write the posterior."""
    keep_freed_memory()
    deadline = began + float(config.get("max_time") or math.inf)
    before, since = READ.so_far(), time.monotonic()
    spec = replace(study.spec, device=config["device"])
    engine: Engine = DaskEngine(client, spec) if client is not None else LocalEngine(spec, study.plan.lanes)
    computation = StudyComputation(study.graph, study.cohort, study.settings)
    try:
        with (
            blas_threads(study.settings.threads), taking_turns(), terminable(), Progress(progress) as shown,
            Watch(run, shown, getattr(engine, "meter", None), getattr(engine, "publish", None)) as bar,
        ):  # fmt: skip
            state, facts = train(run, study, computation, engine, config, (began, deadline), bar)
            bar.stage("posterior")
            facts |= write_posterior(run, study, computation, engine, state, facts, config)
            run.commit(state, facts)
            if client is None:  # with workers, it is they who read
                seconds, waited, nbytes, decoded = (now - then for now, then in zip(READ.so_far(), before, strict=True))
                whole = max(time.monotonic() - since, 1e-9) * engine.parallelism
                shares = {"share_of_time": round(seconds / whole, 4), "share_waited": round(waited / whole, 4)}  # of the first the second is no arithmetic
                run.log("read", bytes=int(nbytes), bytes_of_chunks=int(decoded), thread_seconds=round(seconds, 3), **shares)
    except KeyboardInterrupt as error:
        run.log("interrupted")
        raise Interrupted("the fit was interrupted", where=run.path, remedy=f"pavi_scale.resume({str(run.path)!r}) goes on") from error
    finally:
        engine.close()
    return Posterior.open(run, load_context(str(run.path), study.cohort.model, computation))


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM (preemption, `kill`) ends a fit as Ctrl-C does, unless the program has a handler of its own."""
    mine = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if mine:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        if mine:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def train(
    run: Run, study: Study, computation: StudyComputation, engine: Engine, config: Mapping[str, Any], span: tuple[float, float], bar: Watch
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Weights and facts of the trained guide; taken from the run where it has them. `span`: when the call began, and its deadline."""
    resumed = None
    (began, deadline) = span
    if run.generation is not None:
        tensors, facts = run.latest()
        if facts["phase"] != "training":
            return tensors, facts
        resumed = (tensors, int(facts["step"]))
    trainer = Trainer(computation, engine, int(config["seed"]), deadline, bar.update, began, int(config.get("staleness", 0)))
    if study.settings.free:
        def checkpoint(state: dict[str, np.ndarray], step: int) -> None:
            run.commit(state, {"phase": "training", "step": step, "trace": finite_trace(trainer.trace), "trace_seconds": trainer.seconds})

        if resumed is not None:  # the trace goes on where it was cut
            trainer.trace += [(stage, math.nan if value is None else value) for stage, value in facts.get("trace", [])]
            trainer.seconds += facts.get("trace_seconds", [])
        rows = Rows(trainer)
        fitted = rows.fit(checkpoint, resumed, partial(begin, rows))
    else:
        fitted = trainer.marginal(study.trained)
    facts = {**facts_of(fitted, time.monotonic() - began, deadline), "skipped": trainer.skips.total}
    run.commit(fitted.state, facts)
    run.log("trained", seconds=facts["seconds"], converged=facts["converged"], skipped=facts["skipped"], staleness=trainer.oldest)
    return fitted.state, facts


def finite_trace(trace: list[tuple[str, float]]) -> list[list[Any]]:
    """(stage, bound) as JSON: None where it is not finite."""
    return [[stage, value if math.isfinite(value) else None] for stage, value in trace]


def facts_of(fitted: Fitted, seconds: float, deadline: float) -> dict[str, Any]:
    """The JSON part of a trained run."""
    khat = fitted.khat if math.isfinite(fitted.khat) else None
    late = time.monotonic() > deadline
    few = fitted.history if fitted.history and len(fitted.history[0][1]) <= TRACED else []
    return {
        "phase": "trained",
        "converged": bool(fitted.converged and not late),
        "khat_root": khat,
        "modes": fitted.modes,
        "efficiency": fitted.efficiency,
        "lost": fitted.lost,
        "trace": finite_trace(fitted.trace),
        "trace_seconds": fitted.seconds,
        "history": {"step": [i for i, _, _ in few], "loc": [loc.tolist() for _, loc, _ in few], "sd": [sd.tolist() for _, _, sd in few]},
        "seconds": seconds,
    }
