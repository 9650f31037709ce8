"""Runs the measurements, each in a process of its own, and prints and stores what they found."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipelines.bench.meter import Found, Job, Measurement, Watch, machine, peak_bytes

# name -> (module:function, what must have run before in the same folder, title)
STEPS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "references": ("pipelines.bench.references:measure", (), "Real tables against long NUTS runs"),
    "gre": ("pipelines.bench.gaussian:exact", (), "Gaussian random effects: (log evidence - ELBO), nats per latent; D=2, scales (.5, .5, .1)"),
    "mixture": ("pipelines.bench.mixture:mixture", (), "Gaussian mixture with random effects, L=G=3, N=50, D=2: nats"),
    "nc": ("pipelines.bench.mixture:without_conjugacy", (), "Gamma root, Laplace children, Gaussian data: (log evidence - ELBO), nats per latent"),
    "engines": ("pipelines.bench.gaussian:engines", (), "One process and two workers: Gaussian random effects, G=300, N=50, D=2"),
    "store": ("pipelines.bench.gaussian:large_store", (), "Large cohort simulated"),
    "memory": ("pipelines.bench.gaussian:memory", ("store",), "Out of a store within a budget: G=20,000, N=50, D=8, scales (1, .5, 1)"),
    "coverage": ("pipelines.bench.coverage:measure", (), "Coverage (%) and rank tests: models simulated from their priors at thousands of groups"),
    "crossed": ("pipelines.bench.crossed:measure", (), "Crossed model: our global posterior against the exact one"),
    "bounded": ("pipelines.bench.bounded:measure", (), "Bounded staleness with a kill in each fit against waiting for each step: encoder, nc"),
    "queries": ("pipelines.bench.gaussian:queries", ("store", "memory"), "Lazy queries on that run"),
    "rivals": ("pipelines.bench.rivals:rivals", (), "Seconds to 0.002 nats per latent: Gaussian random effects, N=50, D=8, scales (1, .5, 1)"),
    "flat": ("pipelines.bench.flat:flat", (), "Cost against cardinality: Gaussian random effects out of a store, N=50, D=8, scales (1, .5, 1)"),
    "cortex": ("pipelines.bench.cortex:cortex", (), "The cortical study in other packages: full batch, mean-field normals, begun at the centres of k-means"),
    "speedup": ("pipelines.bench.speedup:measure", (), "The cortical study at 10 %: in process with one task at a time, on one and on two workers"),
    "stream": ("pipelines.bench.stream:measure", (), "The stream that feeds a fit, alone, against a plain sequential Zarr read of the same store"),
    "scale": ("pipelines.bench.scale:scale", (), "The server at scale: measured costs, simulated cluster"),
}

LONG = {"bounded", "coverage", "crossed", "cortex", "speedup", "stream"}  # hundreds of fits, hours of rivals, or stores of gigabytes: measured only when named


def wanted(only: list[str] | None) -> list[str]:
    """Steps to run, with those they need, in order."""
    chosen = set(only or set(STEPS) - LONG)
    for name in tuple(chosen):
        chosen |= set(STEPS[name][1])
    return [name for name in STEPS if name in chosen]


def measure_here(name: str, job: Job, out: Path) -> None:
    """Run one measurement in this process and write what it found."""
    module, function = STEPS[name][0].split(":")
    measurement: Measurement = getattr(importlib.import_module(module), function)
    found = measurement(job)
    found.details["peak_bytes"] = peak_bytes()
    out.write_text(json.dumps(dataclasses.asdict(found), default=float))


def measure_apart(name: str, job: Job) -> dict[str, Any]:
    """Run one measurement in a process of its own; its result, or its error, with the wall time of the whole process."""
    out = job.work / f"{name}.result.json"
    command = [sys.executable, "-W", "ignore", "-m", "pipelines.bench", "--step", name, "--work", str(job.work), "--shared", str(job.shared), "--out", str(out)]
    command += ["--results", str(job.results)]
    for option in ("limit", "runs", "steps", "memory"):
        value = getattr(job, option)
        command += [] if value is None else [f"--{option}", str(value)]
    for option in ("groups", "cohorts", "who", "rates"):
        values = getattr(job, option)
        command += [f"--{option}", *map(str, values)] if values else []
    before, watch = machine(), Watch()
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    record: dict[str, Any] = {"wall_seconds": watch.seconds, "before": before, "after": machine()}
    if done.returncode:
        return record | {"error": done.stderr.strip()[-4000:], "exit_code": done.returncode}
    found: dict[str, Any] = json.loads(out.read_text())
    return record | found


def shown(value: Any) -> str:
    """A cell of the table."""
    if isinstance(value, bool) or not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return f"{value:.2e}" if value and abs(value) < 1e-3 else f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.1f}"


def show(console: Console, name: str, record: dict[str, Any]) -> None:
    """Print one measurement."""
    if "error" in record:
        console.print(f"[bold red]{name}: failed (exit {record['exit_code']}) after {record['wall_seconds']:.1f} s[/]")
        console.print(record["error"].splitlines()[-1] if record["error"] else "", markup=False)
        return
    found = Found(record["rows"], record["notes"], record["details"])
    table = Table(title=STEPS[name][2], title_justify="left", caption_justify="left")
    table.caption = f"process: {record['wall_seconds']:.1f} s, peak {found.details['peak_bytes'] / 2**30:.2f} GiB; load {record['before']['load'][0]}"
    for column in found.rows[0]:
        table.add_column(column, justify="left" if isinstance(found.rows[0][column], str) else "right")
    for row in found.rows:
        table.add_row(*(shown(value) for value in row.values()))
    console.print(table)
    for note in found.notes:
        console.print("  " + note, markup=False, highlight=False)


def options() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.bench", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(STEPS), metavar="NAME", help=f"measure these: {', '.join(STEPS)}")
    parser.add_argument("--shared", type=Path, default=Path("../shared"), metavar="DIR", help="folder of the real tables and references (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("bench-results/bench.json"), metavar="FILE.json", help="where the figures go (%(default)s)")
    parser.add_argument("--work", type=Path, help="folder for stores and runs, kept; a temporary one unless given")
    parser.add_argument("--groups", type=int, nargs="+", default=[], metavar="G", help="cohort sizes of rivals, flat, coverage, crossed, bounded")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="stop a contestant of rivals or cortex, or a fit of flat, after so long")
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--runs", type=int, metavar="N", help="instead of their own: coverage, mixture, crossed, bounded, speedup, stream")
    of = parser.add_argument_group("cortex, speedup, stream")
    of.add_argument("--cohorts", nargs="+", default=[], metavar="COHORT", help="stores that are there, or shares of the study to simulate (1%% 10%% 100%%)")
    of.add_argument("--who", nargs="+", default=[], choices=["ours", "numpyro", "pyro", "pymc"], metavar="NAME", help="ours, numpyro, pyro, pymc (all)")
    of.add_argument("--steps", type=int, metavar="N", help="steps of each rival; their rate decays to zero over them")
    of.add_argument("--rates", type=float, nargs="+", default=[], metavar="R", help="learning rates of each rival, each a row")
    of.add_argument("--memory", type=float, metavar="GIB", help="stop a contestant whose processes hold more")
    parser.add_argument("--step", choices=list(STEPS), help=argparse.SUPPRESS)
    return parser


def job_of(args: argparse.Namespace, work: Path, results: Path) -> Job:
    """What the command line says to a measurement."""
    return Job(
        work, args.shared.absolute(), results, tuple(args.groups), args.limit, args.runs, tuple(args.cohorts), tuple(args.who), args.steps,
        tuple(args.rates), args.memory,
    )  # fmt: skip


def main() -> None:
    """Measure what was asked for; exit code 1 if a measurement failed."""
    args = options().parse_args()
    if args.step:
        measure_here(args.step, job_of(args, args.work, args.results), args.out)
        return
    console = Console(width=None if sys.stdout.isatty() else 160)
    names = wanted(args.only)
    if "references" in names and not (args.shared / "reference").is_dir():
        console.print(f"references: left out, there is no folder {args.shared / 'reference'}; name it with --shared", markup=False)
        names.remove("references")
    records: dict[str, Any] = {"machine": machine()}
    with tempfile.TemporaryDirectory(prefix="pavi-bench-") as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        job = job_of(args, work.absolute(), args.out.parent.absolute())
        for name in names:
            missing = [need for need in STEPS[name][1] if "error" in records[need]]
            if missing:
                records[name] = {"error": f"left out: {missing[0]} failed", "exit_code": 1, "wall_seconds": 0.0}
            else:
                records[name] = measure_apart(name, job)
            show(console, name, records[name])
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(records, indent=1))
    console.print(f"figures: {args.out}", markup=False)
    if any("error" in record for name, record in records.items() if name != "machine"):
        raise SystemExit(1)
