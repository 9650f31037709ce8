"""What other packages do with the cortical study (`pipelines.hcp`), and we on the same cohorts: seconds, memory, quality.

NumPyro and Pyro fit AutoNormal, PyMC its mean-field ADVI (it installs beside the versions of `requirements.lock`), each as a competent user would have it
do: `pipelines.bench.rival_cortex` says how. Every contestant is a process of its own, whose resident memory is summed over all its processes twice a second.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import zarr

from pavi_scale.errors import PaviError
from pipelines.bench.meter import Found, Job
from pipelines.bench.rivals import NUMPYRO_NEEDS, missing
from pipelines.hcp.simulate import SUBJECTS, make_cohort, subjects_of
from pipelines.hcp.study import NETWORKS

SHARES = ("1%", "10%", "100%")
LIMIT = 3600.0  # seconds of training
GRACE = 900.0  # seconds beside the training: reading, starting values, compilation, judging
MEMORY = 16.0  # GiB
STEPS, RATES, EVERY = 2000, (3e-2,), 10
OURS_UP_TO = 0.1  # share of the subjects; the whole study is measured elsewhere
CHANGE, OVER = 1e-4, 100  # a bound has settled where its relative change over so many steps is less
LOOK = 0.5  # seconds between two looks at the memory
NEEDS = {"ours": (), "numpyro": NUMPYRO_NEEDS, "pyro": ("pyro",), "pymc": ("pymc",)}
NAMES = {"ours": "ours", "numpyro": "AutoNormal (NumPyro)", "pyro": "AutoNormal (Pyro)", "pymc": "ADVI (PyMC)"}
EXHAUSTED = ("MemoryError", "RESOURCE_EXHAUSTED", "DefaultCPUAllocator", "out of memory", "Unable to allocate", "bad_alloc")
COLUMNS = {"right labels": "right labels", "50 % hold": "label_logits, 50 % intervals hold", "90 % hold": "label_logits, 90 % intervals hold"}


@dataclass(frozen=True)
class Cohort:
    """A store of the study.

    Args:
        store: Its path.
        sizes: Cardinalities by dimension.
    """

    store: str
    sizes: dict[str, int]

    @property
    def share(self) -> float:
        """Of the full study's subjects."""
        return self.sizes["subject"] / SUBJECTS

    @property
    def latents(self) -> int:
        """Number of scalars that are inferred."""
        s, t, v, d = (self.sizes[name] for name in ("subject", "session", "vertex", "feature"))
        return NETWORKS * (d * (1 + s + s * t) + v * (1 + s) + 2) + 1


@dataclass
class Run:
    """What one process did.

    Args:
        outcome: `ended`, `stopped after N s`, `out of memory at N GiB`, or `failed: ...`.
        peak_gib: Highest resident memory: the process's own figure where it came to its last line, else the highest seen.
        points: Its checkpoints, as it printed them.
        last: Its last line; empty if it did not come to that.
    """

    outcome: str
    peak_gib: float
    points: list[dict[str, float]] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)


def cohort_at(path: str) -> Cohort:
    """A store that is there."""
    array = zarr.open_group(path, mode="r")["x"]
    return Cohort(path, dict(zip(array.metadata.dimension_names, array.shape, strict=True)))


def provide(what: str, job: Job) -> Cohort:
    """The store of that path, or one of a share of the study's subjects, simulated unless it lies in the job's folder already."""
    if not what.endswith("%"):
        return cohort_at(what)
    path = job.work / f"cortex-{what.removesuffix('%')}.zarr"
    if not path.exists():
        make_cohort(str(path), subjects_of(what))
    return cohort_at(str(path))


def tree(process: psutil.Process) -> list[psutil.Process]:
    """A process and all that it started; those that have ended are left out."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def resident(process: psutil.Process) -> float:
    """GiB that they hold together."""
    total = 0
    for one in tree(process):
        try:
            total += one.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total / 2**30


def lines(text: str) -> list[dict[str, Any]]:
    """The JSON lines in what a contestant printed; one cut short by its end is left out."""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.startswith("{") and line.endswith("}\n")]


def watched(command: Sequence[str], printed: Path, seconds: float, gib: float) -> Run:
    """Run a command and stop it, with all that it started, when it takes too long or holds too much.

    Args:
        command: With its interpreter.
        printed: File of its standard output; its errors go beside it, to `*.err`.
        seconds: Of wall time.
        gib: Of resident memory, all its processes together.
    """
    errors, highest, stopped, began = printed.with_suffix(".err"), 0.0, "", time.monotonic()
    with printed.open("w") as out, errors.open("w") as err:
        child = subprocess.Popen(command, stdout=out, stderr=err, env={**os.environ, "JAX_PLATFORMS": "cpu"}, start_new_session=True)
        process = psutil.Process(child.pid)
        try:
            while child.poll() is None and not stopped:
                highest = max(highest, resident(process))
                if highest > gib:
                    stopped = f"out of memory at {gib:g} GiB"
                elif time.monotonic() - began > seconds:
                    stopped = f"stopped after {seconds:g} s"
                else:
                    try:
                        child.wait(LOOK)
                    except subprocess.TimeoutExpired:
                        continue
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)  # its own session: only what it started is in the group
            child.wait()
    found = lines(printed.read_text())
    points, last = [line for line in found if "step" in line], next((line for line in found if "outcome" in line), {})
    if last and not stopped:
        return Run(last["outcome"], last["peak_gib"], points, last)
    return Run(stopped or failure(child.returncode, errors.read_text(), highest), highest, points)


def failure(code: int, errors: str, highest: float) -> str:
    """How a process ended that did not come to its last line, from what it said."""
    if any(word in errors for word in EXHAUSTED) or code == -signal.SIGKILL:
        return f"out of memory at {highest:.1f} GiB"
    return "failed: " + (errors.strip().splitlines() or [f"exit code {code}"])[-1]


def settled(points: Sequence[dict[str, float]], every: int) -> float | None:
    """Seconds of training until the bound, averaged over 100 steps, changed by less than 1e-4 of itself from that of the 100 steps before.

    Args:
        points: Checkpoints, each with the mean bound since the one before.
        every: Steps between two.
    """
    k = max(1, OVER // every)
    for n in range(2 * k, len(points) + 1):
        bounds = [p["bound"] for p in points[n - 2 * k : n]]
        before, now = sum(bounds[:k]) / k, sum(bounds[k:]) / k
        if abs(now - before) < CHANGE * abs(now):
            return points[n - 1]["seconds"]
    return None


def row(who: str, cohort: Cohort, run: Run, rate: float | None = None) -> dict[str, Any]:
    """A line of the table."""
    seconds = run.last.get("seconds", run.points[-1]["seconds"] if run.points else "")
    held = settled(run.points, EVERY)
    bound = run.last.get("bound", run.points[-1]["bound"] if run.points else None)
    quality = run.last.get("quality", {})
    return {
        "software": NAMES[who], "subjects": f"{100 * cohort.share:g} %", "latents": cohort.latents, "lr": "" if rate is None else rate,
        "s/step": run.points[-1]["seconds"] / run.points[-1]["step"] if run.points else "",
        "s to settle": seconds if who == "ours" else "not settled" if held is None else held,
        "s": seconds, "bound/latent": "" if bound is None else bound / cohort.latents,
        "+-": run.last["bound_error"] / cohort.latents if "bound_error" in run.last else "",
        **{column: quality.get(key, "") for column, key in COLUMNS.items()}, "peak GiB": run.peak_gib, "outcome": run.outcome,
    }  # fmt: skip


def contest(who: str, cohort: Cohort, rate: float, job: Job) -> Run:
    """One contestant in a process of its own."""
    limit, memory = job.limit or LIMIT, job.memory or MEMORY
    command = [sys.executable, "-W", "ignore", "-m"]
    if who == "ours":
        folder = job.work / "cortex-run"
        shutil.rmtree(folder, ignore_errors=True)
        command += ["pipelines.bench.ours_cortex", "--cohort", cohort.store, "--run", str(folder)]
    else:
        numbers = {"steps": job.steps or STEPS, "lr": rate, "every": EVERY, "limit": limit}
        command += [f"pipelines.bench.rival_cortex_{who}", "--cohort", cohort.store, *(part for k, v in numbers.items() for part in (f"--{k}", str(v)))]
    run = watched(command, job.work / f"cortex-{who}.txt", limit + GRACE, memory)
    if who == "ours":
        shutil.rmtree(folder, ignore_errors=True)
    return run


def cortex(job: Job) -> Found:
    """All contestants one after the other; rows to `cortex-rows.jsonl` as they come, checkpoints to `cortex.jsonl`."""
    kept, curves, found = job.results / "cortex-rows.jsonl", job.results / "cortex.jsonl", Found()
    job.results.mkdir(parents=True, exist_ok=True)
    kept.write_text("")
    curves.write_text("")
    whos, left_out = [], {}
    for who in job.who or NEEDS:
        gone = missing(NEEDS[who])
        if gone:
            left_out[who] = f"not installed: {', '.join(gone)} (extra `bench`)"
        else:
            whos.append(who)
    for what in job.cohorts or SHARES:
        try:
            cohort = provide(what, job)
        except PaviError as error:  # no room for it, say; hours of others are not lost for that
            left_out[what] = str(error)
            continue
        for who in whos:
            if who == "ours" and cohort.share > OURS_UP_TO and not job.who:
                continue
            for rate in job.rates or RATES if who != "ours" else (None,):
                run = contest(who, cohort, rate or 0.0, job)
                found.rows.append(row(who, cohort, run, rate))
                with kept.open("a") as rows, curves.open("a") as points:
                    rows.write(json.dumps(found.rows[-1] | {"quality": run.last.get("quality", {})}) + "\n")
                    points.writelines(json.dumps({"who": who, "subjects": cohort.sizes["subject"], "lr": rate, **p}) + "\n" for p in run.points)
    found.notes = [
        f"s to settle: until the bound, averaged over {OVER} steps, changed by less than {CHANGE:g} of itself; ours: the whole call of fit, store to posterior",
        "s: training without reading, starting values, compilation and judging, at most the limit; ours: the whole call of fit",
        f"a contestant whose processes hold more than {job.memory or MEMORY:g} GiB is stopped; peak: before the posterior is judged",
        "bound/latent: rivals, mean of their last steps; ours, Posterior.elbo with its standard error, labels integrated out by Laplace's method",
        *(f"{NAMES.get(what, what)}: left out, {why}" for what, why in left_out.items()),
    ]
    found.details = {"left_out": left_out, "curves": str(curves)}
    return found
