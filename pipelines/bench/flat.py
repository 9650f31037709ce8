"""Cost against cardinality: the same model with ever more groups, out of a store, each fit in a process of its own."""

from __future__ import annotations

import shutil
from typing import Any

from pipelines import gre
from pipelines.bench.curves import Curve, Point
from pipelines.bench.gaussian import FEATURES, OBSERVATIONS, large
from pipelines.bench.meter import Found, Job, timing
from pipelines.bench.ours import fit_apart

SIZES = (2_000, 20_000, 200_000, 2_000_000)
BASE = 20_000  # what the others are compared with
SPARE = 1.5  # free disk asked for, over the bytes of cohort, truth and posterior


def bytes_needed(groups: int) -> int:
    """Disk for a cohort in float32, its truth, and the mean and standard deviation of its posterior."""
    return int(SPARE * 4 * FEATURES * groups * (OBSERVATIONS + 1 + 4))


def one(job: Job, groups: int) -> dict[str, Any]:
    """Simulate, fit, delete; what was found, or {"error": ...}."""
    free = shutil.disk_usage(job.work).free
    if bytes_needed(groups) > free:
        return {"error": f"left out: {bytes_needed(groups) / 2**30:.1f} GiB of disk wanted, {free / 2**30:.1f} GiB free"}
    store, run = job.work / f"flat-{groups}.zarr", job.work / f"flat-{groups}-run"
    clock: dict[str, Any] = {}
    try:
        with timing(clock, "simulate_seconds"):
            gre.make_cohort(str(store), groups, OBSERVATIONS, FEATURES, given=large)
        return clock | fit_apart(str(store), run, job.work / f"flat-{groups}.json", job.limit)
    finally:
        for path in (store, run):
            shutil.rmtree(path, ignore_errors=True)


def over(value: float | None, base: float | None) -> float | str:
    """A ratio, where both are known."""
    return value / base if value is not None and base else "-"


def flat(job: Job) -> Found:
    """Seconds to the target, memory and the global mu at every size, and their ratios to those at 20,000 groups."""
    sizes = job.groups or SIZES
    results = {groups: one(job, groups) for groups in sizes}
    good = {groups: r for groups, r in results.items() if "error" not in r}
    found = Found(details={"fits": {str(groups): r for groups, r in results.items()}})
    found.notes = [f"G={groups:,}: {r['error']}" for groups, r in results.items() if "error" in r]
    if not good:
        raise RuntimeError("; ".join(found.notes))
    held = {groups: Curve("ours", groups, {}, tuple(Point(**p) for p in r["points"])).held for groups, r in good.items()}
    base = BASE if BASE in good else min(good)
    for groups, r in good.items():
        ratio = max(r["mu_sd_ratio"], key=lambda v: abs(v - 1))
        found.rows.append(
            {
                "G": groups,
                "fit s": r["fit_seconds"],
                "x": over(r["fit_seconds"], good[base]["fit_seconds"]),
                "s to 0.002": held[groups] if held[groups] is not None else "not reached",
                "x ": over(held[groups], held[base]),
                "gap per latent": r["points"][-1]["gap"],
                "peak GiB": r["peak_bytes"] / 2**30,
                "x  ": over(r["peak_bytes"], good[base]["peak_bytes"]),
                "mu shift (sd)": r["mu_shift"],
                "mu sd ratio": ratio,
                "status": r["status"],
            }
        )
    found.notes.append(f"x: over the figure at G={base:,}; asked: seconds and memory at 2,000,000 <= 1.5; mu shift <= 0.1, sd ratio in [0.95, 1.05] at every G")
    if not all(r["timed"] for r in good.values()):
        found.notes.append("the trace has no clock: the seconds to 0.002 are those of the whole fit, an upper bound")
    return found
