"""The cortical study on one and on two single-threaded workers, and in process with one task at a time: seconds of `fit`, SHA-256 of what it stored.

What two workers gain is set against what two processes of mere arithmetic gain on the same machine (`ceiling`).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch
from distributed import Client, LocalCluster

import pavi_scale as ps
from pipelines.bench.ceiling import gain
from pipelines.bench.cortex import provide
from pipelines.bench.meter import Found, Job, timing
from pipelines.hcp import model

SHARE, ROUNDS = "10%", 3
IMPORTED = ("pipelines.hcp", "pavi_scale.spec", "pavi_scale.searching", "pavi_scale.distances", "pavi_scale.guide.sweeps", "xarray", "scipy.special")
# (workers, whether they have imported the package before the clock starts, as this process has)
WAYS: tuple[tuple[int, bool], ...] = ((0, True), (1, True), (2, True), (1, False), (2, False))


def digest(run: Path) -> str:
    """SHA-256 of the stored moments."""
    found = hashlib.sha256()
    for path in sorted(p for p in (run / "posterior.zarr").rglob("*") if p.is_file()):
        found.update(str(path.relative_to(run)).encode() + path.read_bytes())
    return found.hexdigest()


def one(cohort: str, run: Path, workers: int, ready: bool) -> dict[str, Any]:
    """One fit in this process or on a fresh cluster of so many workers."""
    torch.set_num_threads(1)
    for name in ("pavi_scale.fitting", *IMPORTED):
        importlib.import_module(name)
    importlib.import_module("pavi_scale.study").MOST_LANES = 1  # no option of a fit: one lane is slower wherever there are two cores
    row: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        client = None
        if workers:
            quiet = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}
            cluster = stack.enter_context(LocalCluster(n_workers=workers, threads_per_worker=1, memory_limit="8GiB", **quiet))
            client = stack.enter_context(Client(cluster))
            client.wait_for_workers(workers, timeout=120)
            if ready:
                for name in IMPORTED:
                    client.run(importlib.import_module, name)
        with timing(row, "seconds"):
            row["status"] = ps.fit(model, cohort, run=run, seed=0, client=client, progress=False).status
    return row | {"digest": digest(run)}


def measure(job: Job) -> Found:
    """Each way in turn, some rounds of all, each fit by a process of its own."""
    cohort, found = provide((job.cohorts or (SHARE,))[0], job), Found()
    run, seconds, digests = job.work / "speedup-run", {way: [] for way in WAYS}, set()
    ceilings = []
    for turn in range(job.runs or ROUNDS):
        ceilings.append(gain())
        for way in WAYS:
            shutil.rmtree(run, ignore_errors=True)
            command = [sys.executable, "-W", "ignore", "-m", "pipelines.bench.speedup", cohort.store, str(run), str(way[0]), str(int(way[1]))]
            row = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])
            seconds[way].append(row["seconds"])
            digests.add(row["digest"])
            name = "in process" if not way[0] else f"{way[0]} worker{'s' * (way[0] > 1)}"
            imported = "before" if way[1] else "in the fit"
            found.rows.append({"turn": turn, "who": name, "package imported": imported, "fit s": row["seconds"], "status": row["status"]})
    shutil.rmtree(run, ignore_errors=True)
    middle = {way: median(each) for way, each in seconds.items()}
    found.details = {f"{w} workers, {'ready' if r else 'fresh'}": {"median": middle[w, r], "all": seconds[w, r]} for w, r in WAYS}
    found.details["two processes of arithmetic over one"] = ceilings
    ready = middle[1, True] / middle[2, True]
    found.notes = [
        f"the machine itself: two processes of arithmetic do {median(ceilings):.2f} times the work of one ({', '.join(f'{c:.2f}' for c in ceilings)}); "
        f"reached: {100 * ready / median(ceilings):.0f} % of that",
        f"speed-up of two workers over one, medians: {ready:.2f} ready, {middle[1, False] / middle[2, False]:.2f} fresh",
        f"one worker over in process, medians: {100 * (middle[1, True] / middle[0, True] - 1):+.1f} % ready, "
        f"{100 * (middle[1, False] / middle[0, True] - 1):+.1f} % fresh",
        f"stored moments: {'the same SHA-256 in all' if len(digests) == 1 else f'{len(digests)} different ones'}",
        "starting the cluster is not counted; ready: nor is the import of the package by its workers, as that of the fit's own process is not",
    ]
    return found


def main() -> None:
    """One fit, for `measure`: prints its row as JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("cohort")
    parser.add_argument("run", type=Path)
    parser.add_argument("workers", type=int)
    parser.add_argument("ready", type=int)
    args = parser.parse_args()
    print(json.dumps(one(args.cohort, args.run, args.workers, bool(args.ready))))


if __name__ == "__main__":
    main()
