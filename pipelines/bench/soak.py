"""A soak: fits of the cortical study, killed at seeded moments about once a minute and taken up again, for hours.

    python -m pipelines.bench.soak --hours 2 --subjects 10 --vertices 59412

A finished run must have the bits of the first, undisturbed one. Resident memory and open handles of each life are logged every second, and
compared at the end: lives that end late must not be larger than early ones. The log is one JSON object a line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

import pavi_scale as ps
from pavi_scale.errors import PaviError
from pipelines import common, hcp
from pipelines.hcp.simulate import VERTICES, make_cohort

FLAT = 0.05  # share that the largest memory of late lives may exceed that of early ones by
BETWEEN = (30.0, 90.0)  # seconds between two kills


def parser() -> argparse.ArgumentParser:
    """Options of the soak."""
    made = argparse.ArgumentParser(prog="python -m pipelines.bench.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--hours", type=float, default=2.0)
    made.add_argument("--subjects", type=int, default=10, help="of 1,000: 1 %% by default")
    made.add_argument("--vertices", type=int, default=VERTICES)
    made.add_argument("--between", type=float, nargs=2, default=BETWEEN, metavar="SECONDS", help="least and most time between two kills")
    made.add_argument("--memory", default="4 GiB")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--work", default="runs/soak", help="folder of the cohort, the runs and the log (%(default)s)")
    made.add_argument("--life", metavar="RUN", help=argparse.SUPPRESS)
    return made


def life(args: argparse.Namespace) -> None:
    """One life of a run: begin it, or go on with it, to its end."""
    cohort = str(Path(args.work) / "cohort.zarr")
    begun = (Path(args.life) / "study.json").exists()
    if begun:
        ps.resume(args.life, progress=False)
    else:
        ps.fit(hcp.model, cohort, run=args.life, seed=args.seed, memory=args.memory, progress=False)


def digest(run: Path) -> str:
    """SHA-256 of every file of the stored posterior's moments."""
    total = hashlib.sha256()
    for file in sorted(p for group in ("posterior_mean", "posterior_sd") for p in (run / "posterior.zarr" / group).rglob("*") if p.is_file()):
        total.update(file.relative_to(run).as_posix().encode() + file.read_bytes())
    return total.hexdigest()


def usage(process: psutil.Process) -> tuple[int, int]:
    """Resident bytes and open handles of a process and all below it; zeros once it is gone."""
    try:
        family = [process, *process.children(recursive=True)]
        return sum(p.memory_info().rss for p in family), sum(p.num_fds() for p in family)
    except psutil.Error:
        return 0, 0


def live(args: argparse.Namespace, run: Path, until: float) -> dict[str, Any]:
    """Start one life and watch it; kill it at `until` seconds if it has not ended. Returns what is logged of it."""
    began = time.monotonic()
    command = [sys.executable, "-m", "pipelines.bench.soak", *own_options(args), "--life", str(run)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True, text=True)
    watched, peak, handles = psutil.Process(child.pid), 0, 0
    while child.poll() is None:
        if time.monotonic() - began > until:
            os.killpg(child.pid, signal.SIGKILL)
            break
        found = usage(watched)
        peak, handles = max(peak, found[0]), max(handles, found[1])
        time.sleep(min(1.0, until / 10))
    error = child.communicate()[1]
    code = child.returncode
    found_error = "" if code in (0, -signal.SIGKILL) else error[-2000:]
    return {"seconds": time.monotonic() - began, "code": code, "rss": peak, "handles": handles, "error": found_error}


def own_options(args: argparse.Namespace) -> list[str]:
    """The options that a life needs."""
    names = ("subjects", "vertices", "memory", "seed", "work")
    return [word for name in names for word in (f"--{name}", str(getattr(args, name)))]


def soak(args: argparse.Namespace) -> int:
    """Kill and go on until the time is up; print the summary; 0 if all is well."""
    work, rng = Path(args.work), np.random.default_rng(args.seed)
    common.provide(str(work / "cohort.zarr"), lambda: make_cohort(str(work / "cohort.zarr"), args.subjects, args.vertices, seed=args.seed))
    shutil.rmtree(work / "runs", ignore_errors=True)
    (work / "runs").mkdir()
    end = time.monotonic() + 3600 * args.hours
    log, lives, wanted, number = (work / "soak.jsonl").open("w"), [], "", 0
    while time.monotonic() < end or not number:
        # The first run is left alone: the others must have its bits.
        until = float(rng.uniform(*args.between)) if number else 3600 * args.hours
        told = {"run": number, **live(args, work / "runs" / str(number), until)}
        if told["code"] == 0:
            found = digest(work / "runs" / str(number))
            wanted = wanted or found
            told["same"] = found == wanted
            shutil.rmtree(work / "runs" / str(number))
            number += 1
        lives.append(told)
        log.write(json.dumps(told) + "\n")
        log.flush()
        if told["error"] or not told.get("same", True):
            break
    log.close()
    return summary(lives)


def summary(lives: list[dict[str, Any]]) -> int:
    """Print what came of the lives; 0 if every run finished with the same bits and nothing grew."""
    killed, done = [v for v in lives if v["code"] < 0], [v for v in lives if v["code"] == 0]
    bad = [v for v in lives if v["error"] or not v.get("same", True)]
    print(f"{sum(v['seconds'] for v in lives) / 3600:.2f} h, {len(lives)} lives, {len(killed)} killed, {len(done)} runs finished, {len(bad)} went wrong")
    for v in bad:
        print(f"run {v['run']}: exit code {v['code']}, same bits: {v.get('same')}\n{v['error']}")
    half = len(done) // 2
    flat = True
    for what in ("rss", "handles") if half else ():
        early, late = max(v[what] for v in done[:half]), max(v[what] for v in done[half:])
        flat &= late <= (1 + FLAT) * early
        print(f"{what}: at most {early:,} in the first half of the lives that ended by themselves, {late:,} in the second")
    if len(done) < 2:
        print("no run that was killed came to its end: too short a time, or too little between kills")
    return int(bool(bad) or not flat or len(done) < 2)


def main() -> None:
    """Entry point."""
    args = parser().parse_args()
    if args.life:
        try:
            life(args)
        except PaviError as error:
            sys.exit(f"{type(error).__name__}: {error}")
        return
    sys.exit(soak(args))


if __name__ == "__main__":
    main()
