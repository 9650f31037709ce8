"""The study's command: simulate or ingest a cohort, write a posterior's maps, or run the demo from a simulated store to a report."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from distributed import Client, LocalCluster
from matplotlib.figure import Figure

import pavi_scale as ps
from pavi_scale.errors import InputError
from pipelines import common, hcp
from pipelines.hcp import figures, quality
from pipelines.hcp.simulate import THREADS, VERTICES, make_cohort, subjects_of


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Say what is done, and how long it took."""
    print(f"== {what}", flush=True)
    began = time.perf_counter()
    yield
    print(f"   {what}: {time.perf_counter() - began:.1f} s", flush=True)


def demo(args: argparse.Namespace) -> None:
    """Simulate to Zarr, plan, fit on worker processes, query, report."""
    began = time.perf_counter()
    with timed("simulate"):
        simulate(args)
    with timed("plan"):
        print(ps.plan(hcp.model, args.cohort, memory=args.memory))
    with (
        timed(f"fit on {args.workers} workers"),
        LocalCluster(n_workers=args.workers, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):
        if (Path(args.run) / "run.json").exists():
            print(f"run {args.run} is there already: it goes on where it stopped")
            posterior = ps.resume(args.run, client=client)
        else:
            posterior = ps.fit(hcp.model, args.cohort, run=args.run, seed=args.seed, client=client, memory=args.memory, max_time=args.max_time)
    print(posterior)
    truth = xr.open_zarr(args.cohort, group="truth", consolidated=False)
    # Networks are numbered arbitrarily: number the truth as the fit does.
    order = np.argsort(figures.match(posterior.datatree["posterior_mean"]["mu"].values, truth["mu"].values))
    truth = truth.isel(network=order)
    with timed("query"):
        query(posterior)
    with timed("report"):
        page = ps.report(posterior, truth=truth, figures=pictures(posterior, truth))
        figures.collage(page.parent, ("elbo", "fingerprints", "calibration", "parcellation"), page.parent / "overview.png")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"report: {page}")
    print(f"whole demo: {time.perf_counter() - began:.0f} s; peak memory {peak:.2f} GiB in the driver, {children:.2f} GiB in the largest worker")


def query(posterior: Any) -> None:
    """What a researcher asks of the posterior, with the time of each answer."""
    tree = posterior.datatree
    some = slice(50)
    questions = {
        "population fingerprints, mean": lambda: tree["posterior_mean"]["mu"].values,
        "first subject's label logits, mean map": lambda: tree["posterior_mean"]["label_logits"].isel(subject=0).values,
        "the same, sd map": lambda: tree["posterior_sd"]["label_logits"].isel(subject=0).values,
        "first subject, 50 vertices, 100 lazy draws": lambda: tree["posterior"]["label_logits"].isel(subject=0, vertex=some, draw=slice(100)).values,
    }
    for question, ask in questions.items():
        began = time.perf_counter()
        answer = np.asarray(ask())
        print(f"   {question}: {answer.shape}, {answer.nbytes / 2**20:.2f} MiB, {1e3 * (time.perf_counter() - began):.0f} ms")


def pictures(posterior: Any, truth: xr.Dataset) -> dict[str, Figure]:
    """Fingerprints and parcellations against truth; prints how many labels are right."""
    mean = posterior.datatree["posterior_mean"]
    found = {"population": mean["rho"].values.argmax(1), "subject 1": mean["label_logits"].isel(subject=0).values.argmax(1)}
    true = {"population": truth["rho"].values.argmax(1), "subject 1": truth["label_logits"].isel(subject=0).values.argmax(1)}
    labels = {}
    for who, label in found.items():
        share = (label == true[who]).mean()
        print(f"   {who}: {share:.1%} of the vertices have their true label")
        labels |= {f"{who}, true": true[who], f"{who}, recovered ({share:.0%} right)": label}
    figure = Figure(figsize=(5, 5), layout="constrained")
    figures.fingerprints(figure.subplots(), mean["mu"].values, truth["mu"].values)
    return {"Fingerprints": figure, "Parcellation": figures.maps(labels)}


class Told:
    """Progress as plain lines on standard error, one every few seconds and one at the end of each stage."""

    def __init__(self, unit: str, seconds: float = 5.0) -> None:
        self._unit, self._seconds, self._stage = unit, seconds, ""

    def __call__(self, stage: str, done: int, of: int) -> None:
        """`done` of `of` units of a stage are done."""
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._began, self._first, self._last = stage, now, done, now
        if now - self._last > self._seconds or done == of:
            self._last, new = now, done - self._first
            left = f", about {(now - self._began) / new * (of - done):.0f} s left" if new and done < of else ""
            print(f"   {stage}: {done:,} of {of:,} {self._unit}, {100 * done / of:.0f} %{left}", file=sys.stderr, flush=True)


def simulate(args: argparse.Namespace) -> None:
    """The cohort alone."""
    subjects = subjects_of(args.size) if args.size else args.subjects
    told = Told("subjects")
    make = partial(make_cohort, args.cohort, subjects, args.vertices, seed=args.seed, threads=args.threads, tell=partial(told, "simulated"))
    common.provide(args.cohort, make)


def optional(module: str) -> Any:
    """A module that needs nibabel, imported only for those who use it.

    Raises:
        InputError: nibabel is not installed.
    """
    if importlib.util.find_spec("nibabel") is None:
        raise InputError("surface files need nibabel", where=f"python -m pipelines.hcp {module}", remedy="pip install 'pavi-scale[hcp]'")
    return importlib.import_module(f"pipelines.hcp.{module}")


def ingest(args: argparse.Namespace) -> None:
    """Surface files into a cohort."""
    done = optional("ingest").ingest([Path(f) for f in args.files], Path(args.out), args.zscore, Told("recordings"))
    sizes = " x ".join(f"{n:,} {d}" for d, n in done.sizes.items())
    print(f"cohort written to {args.out}: {sizes}" + (f"; {done.dropped:,} vertices of the medial wall left out" if done.dropped else ""))


def maps(args: argparse.Namespace) -> None:
    """A run's posterior into surface files."""
    subjects = [] if args.group_only else args.subjects
    files = optional("maps").write_maps(ps.open_posterior(args.run), Path(args.out), subjects, args.draws, Told("subjects"))
    print(f"{len(files):,} files written to {args.out}")


def judge(args: argparse.Namespace) -> None:
    """Compare a run's posterior with the truth that its cohort was made from, and with an oracle; time what is asked of it."""
    posterior = ps.open_posterior(args.run, model=hcp.model)
    cohort, truth = (xr.open_zarr(args.cohort, group=group, consolidated=False) for group in (None, "truth"))
    truth = quality.in_order(posterior, truth)
    print(f"status: {posterior.status}")
    for what, found in (
        ("queries", lambda: quality.queries(posterior)), ("against the oracle", lambda: quality.against_oracle(posterior, cohort, truth)),
        ("against the truth", lambda: quality.against_truth(posterior, truth)),
    ):  # fmt: skip
        with timed(what):
            for name, figure in found().items():
                print(f"   {name}: {figure:,.4g}")


def add_surfaces(commands: Any) -> None:
    """The commands that read and write surface files."""
    of = commands.add_parser("ingest", help="surface files into a cohort", description="CIFTI or GIFTI files with BIDS names into a cohort's Zarr store.")
    of.add_argument("files", nargs="+", metavar="FILE", help="*.dscalar.nii, *.dtseries.nii, or *.func.gii of both hemispheres")
    of.add_argument("--out", required=True, metavar="STORE", help="Zarr store of the cohort")
    of.add_argument("--zscore", choices=("maps", "vertices"), help="mean 0 and sd 1 of each map over its vertices, or of each vertex over its features")
    of.set_defaults(run_command=ingest)
    of = commands.add_parser("maps", help="parcellation maps with uncertainty from a run", description="Labels, their probability and entropy as CIFTI files.")
    of.add_argument("run", metavar="RUN", help="run directory")
    of.add_argument("--out", required=True, metavar="FOLDER")
    some = of.add_mutually_exclusive_group()
    some.add_argument("--subjects", nargs="+", metavar="LABEL", help="these subjects (all)")
    some.add_argument("--group-only", action="store_true", help="no subjects")
    of.add_argument("--draws", type=int, default=0, help="average over that many lazy draws; 0: over normals with the stored means and sds (%(default)s)")
    of.set_defaults(run_command=maps)


def main() -> None:
    """Parse the command line and run it."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.hcp", description=hcp.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    made = argparse.ArgumentParser(add_help=False)
    size = made.add_mutually_exclusive_group()
    size.add_argument("--subjects", type=int, default=20, help="number of subjects (%(default)s)")
    size.add_argument("--size", metavar="PERCENT", help="or a share of the full study's 1,000: 1%%, 10%%, 100%%")
    made.add_argument("--vertices", type=int, default=VERTICES)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--threads", type=int, default=THREADS, help="that simulate; the numbers do not depend on them (%(default)s)")
    of = commands.add_parser("demo", parents=[made], help="simulate, plan, fit, query, report")
    of.add_argument("--workers", type=int, default=2)
    of.add_argument("--memory", default="1400 MiB", help="of each process (%(default)s)")
    of.add_argument("--max-time", type=float, help="seconds after which training stops, converged or not")
    of.add_argument("--cohort", default="runs/hcp-demo/cohort.zarr", help="Zarr store of the cohort (%(default)s)")
    of.add_argument("--run", default="runs/hcp-demo/run", help="run directory of the demo (%(default)s)")
    of.set_defaults(run_command=demo)
    of = commands.add_parser("simulate", parents=[made], help="simulate the cohort alone")
    of.add_argument("--cohort", default="data/hcp.zarr", help="Zarr store of the cohort (%(default)s)")
    of.set_defaults(run_command=simulate)
    of = commands.add_parser("judge", help="a run's posterior against the truth and an oracle, and the time of queries")
    of.add_argument("run", metavar="RUN", help="run directory")
    of.add_argument("--cohort", required=True, help="Zarr store that it was fitted to, with its truth")
    of.set_defaults(run_command=judge)
    add_surfaces(commands)
    args = parser.parse_args()
    args.run_command(args)
