"""Us and what users would pick instead, on the same data in one run: quality against seconds."""

from __future__ import annotations

import importlib.util
import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines.bench import curves, exact
from pipelines.bench.curves import Curve, Point
from pipelines.bench.gaussian import FEATURES, GROUPS, OBSERVATIONS, SCALES
from pipelines.bench.meter import Found, Job
from pipelines.bench.ours import fit_apart

SEED = 0
LIMIT = 600.0  # seconds of a contestant's process, unless the job says otherwise
EXPERT, AUTONORMAL, OURS = "hand-written guide (NumPyro)", "AutoNormal (NumPyro)", "ours"
MULTIVARIATE, PYRO, NUTS = "AutoMultivariateNormal (NumPyro)", "AutoNormal (Pyro)", "NUTS (NumPyro)"
NUMPYRO_NEEDS = ("jax", "numpyro", "optax")
ASKED = {EXPERT: 1 / 2, AUTONORMAL: 1 / 50}


@dataclass(frozen=True)
class Grid:
    """Settings that are tried; of each contestant the best counts.

    Args:
        batches: Groups in a step of the hand-written guide.
        rates: Learning rates, for all that have one.
        steps: Lengths of the hand-written guide's schedule, which decays to zero at its end.
        full_steps: Those of the full-batch guides.
        warmup: Steps of NUTS before it draws.
        checkpoints: Evaluations of a curve, not counted in its seconds; a held time is known to one part in so many.
        small: Groups where a guide with a full covariance is possible, and NUTS ends.
    """

    batches: tuple[int, ...] = (32, 64, 128, 256, 512)
    rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    steps: tuple[int, ...] = (1000, 2500, 5000)
    full_steps: tuple[int, ...] = (2000,)
    warmup: int = 1000
    checkpoints: int = 50
    small: int = 200


@dataclass(frozen=True)
class Contestant:
    """A rival with its settings: a process that prints one JSON line per checkpoint.

    Args:
        who: Its name.
        groups: Size of its cohort.
        command: What follows the interpreter on the command line.
        needs: Modules without which it cannot run.
        settings: As printed.
    """

    who: str
    groups: int
    command: tuple[str, ...]
    needs: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)


def contestants(job: Job, groups: int, grid: Grid) -> list[Contestant]:
    """Every rival with every choice of its settings."""
    script = str(job.shared / "rivals" / "gre_numpyro.py")

    def sizes(count: int, steps: int) -> tuple[str, ...]:
        numbers = {"groups": count, "per-group": OBSERVATIONS, "dim": FEATURES, "seed": SEED, "steps": steps, "checkpoints": min(grid.checkpoints, steps)}
        return tuple(part for name, value in numbers.items() for part in (f"--{name}", str(value)))

    small = min(grid.small, groups)
    own = ("-m", "pipelines.bench.rival_numpyro")
    found = []
    for batch, rate, steps in itertools.product(grid.batches, grid.rates, grid.steps):
        options = ("--guide", "amortised", "--batch", str(batch), "--lr", str(rate), *sizes(groups, steps))
        found.append(Contestant(EXPERT, groups, (script, *options), NUMPYRO_NEEDS, {"batch": batch, "lr": rate, "steps": steps}))
    for rate, steps in itertools.product(grid.rates, grid.full_steps):
        chosen = {"lr": rate, "steps": steps}
        options = ("--lr", str(rate))
        found += [
            Contestant(AUTONORMAL, groups, (script, "--guide", "autonormal", *options, *sizes(groups, steps)), NUMPYRO_NEEDS, chosen),
            Contestant(PYRO, groups, ("-m", "pipelines.bench.rival_pyro", *options, *sizes(groups, steps)), ("pyro",), chosen),
            Contestant(MULTIVARIATE, small, (*own, "--guide", "multivariate", *options, *sizes(small, steps)), NUMPYRO_NEEDS, chosen),
        ]
    for count in dict.fromkeys((small, groups)):
        found.append(Contestant(NUTS, count, (*own, "--guide", "nuts", *sizes(count, grid.warmup)), NUMPYRO_NEEDS, {"warm-up": grid.warmup}))
    return found


def points(text: str) -> tuple[Point, ...]:
    """The checkpoints in what a contestant printed; a line cut short by its end is left out."""
    found = []
    for line in text.splitlines(keepends=True):
        if line.startswith("{") and line.endswith("}\n"):
            values = json.loads(line)
            found.append(Point(values["seconds"], values["gap_per_latent"], values["standard_error"]))
    return tuple(found)


def run(contestant: Contestant, job: Job) -> Curve:
    """One contestant in a process of its own, stopped at the limit; what it had printed until then counts."""
    limit, printed, note = job.limit or LIMIT, job.work / "printed.txt", ""
    command = [sys.executable, "-W", "ignore", *contestant.command]
    with printed.open("w") as out:
        try:
            done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, check=False, timeout=limit)
            if done.returncode:
                note = "failed: " + (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        except subprocess.TimeoutExpired:
            note = f"stopped after {limit:g} s"
    return Curve(contestant.who, contestant.groups, contestant.settings, points(printed.read_text()), note)


def missing(needs: Sequence[str]) -> list[str]:
    """Modules that are not installed."""
    return [name for name in needs if importlib.util.find_spec(name) is None]


def ours(job: Job, groups: int) -> Curve:
    """Our fit out of a store, at default settings, on the rivals' data."""
    store = job.work / f"rivals-{groups}.zarr"
    exact.save(exact.simulate(groups, OBSERVATIONS, FEATURES, SEED, SCALES), str(store))
    found = fit_apart(str(store), job.work / f"rivals-{groups}-run", job.work / f"rivals-{groups}.json")
    shutil.rmtree(store)
    if "error" in found:
        return Curve(OURS, groups, note="failed: " + found["error"])
    note = "" if found["timed"] else "whole fit: an upper bound, the trace has no clock"
    return Curve(OURS, groups, {}, tuple(Point(**p) for p in found["points"]), note)


def row(found: Sequence[Curve]) -> dict[str, Any]:
    """A contestant's line of the table: that of its best settings."""
    chosen = curves.best(found)
    if chosen is None:
        return {"who": found[0].who, "G": found[0].groups, "settings": "", "s to 0.002": "none", "last gap": "", "+-": "", "seconds": "", "note": found[0].note}
    last, held = chosen.points[-1], chosen.held
    settings = ", ".join(f"{k} {v}" for k, v in chosen.settings.items())
    held_text = held if held is not None else "not reached"
    count = f"best of {len(found)}" if len(found) > 1 else ""
    note = "; ".join(part for part in (count, chosen.note) if part)
    return {
        "who": chosen.who, "G": chosen.groups, "settings": settings, "s to 0.002": held_text, "last gap": last.gap, "+-": last.error,
        "seconds": last.seconds, "note": note,
    }  # fmt: skip


def ratios(found: Sequence[Curve], groups: int) -> list[str]:
    """Our time over those that were asked for, in words."""
    times = {}
    for who in (OURS, *ASKED):
        chosen = curves.best([c for c in found if c.who == who and c.groups == groups])
        times[who] = (chosen, chosen.held if chosen else None)
    mine, lines = times[OURS][1], []
    for who, asked in ASKED.items():
        chosen, theirs = times[who]
        if mine is None or chosen is None:
            lines.append(f"ours / {who}: not known")
        elif theirs is None:
            # It was still above the target at its end, so that its time is at least that.
            end = max(c.points[-1].seconds for c in found if c.who == who and c.points)
            lines.append(f"ours / {who}: not known, it had not come to the target after {end:.4g} s of training (ours: {mine:.4g} s); asked <= {asked:g}")
        else:
            verdict = "met" if mine / theirs <= asked else "NOT met"
            lines.append(f"ours / {who}: {mine / theirs:.4f} ({mine:.4g} s / {theirs:.4g} s); asked <= {asked:g}: {verdict}")
    return lines


def rivals(job: Job, grid: Grid | None = None) -> Found:
    """All contestants one after the other; curves to `rivals.jsonl`, drawn in `rivals.png` and `.svg`."""
    grid = grid or Grid()
    groups = job.groups[0] if job.groups else GROUPS
    small = min(grid.small, groups)
    found = [ours(job, size) for size in dict.fromkeys((groups, small))]
    left_out: dict[str, str] = {}
    for contestant in contestants(job, groups, grid):
        if gone := missing(contestant.needs):
            left_out[contestant.who] = f"not installed: {', '.join(gone)} (extra `bench`)"
        elif contestant.command[0] != "-m" and not (job.shared / "rivals" / "gre_numpyro.py").is_file():
            left_out[contestant.who] = f"there is no {contestant.command[0]}; name its folder with --shared"
        else:
            found.append(run(contestant, job))
            curves.save(found, job.results / "rivals.jsonl")  # hours of runs: what is finished is kept
    keys = dict.fromkeys((c.who, c.groups) for c in found)
    grouped = [[c for c in found if (c.who, c.groups) == key] for key in keys]
    curves.save(found, job.results / "rivals.jsonl")
    for size in dict.fromkeys((groups, small)):
        name = "rivals" if size == groups else "rivals-small"
        title = f"Gaussian random effects, G={size:,}, N={OBSERVATIONS}, D={FEATURES}"
        curves.draw([c for c in found if c.groups == size], title, [job.results / f"{name}.{kind}" for kind in ("png", "svg")])
    notes = [*ratios(found, groups), *(f"{who}: left out, {why}" for who, why in left_out.items())]
    notes.append("seconds: ours from the call of fit, all included; trained guides without compilation and evaluation; NUTS with compilation and warm-up")
    if any(c.who == MULTIVARIATE for c in found):
        notes.append(f"AutoMultivariateNormal at G={small:,}: at {groups:,} its covariance would have {(groups + 1) * FEATURES:,} rows")
    notes += [f"{c.who} {c.settings} G={c.groups:,}: {c.note}" for c in found if c.note and c.who != OURS]
    return Found([row(same) for same in grouped], notes, {"curves": str(job.results / "rivals.jsonl"), "left_out": left_out})
