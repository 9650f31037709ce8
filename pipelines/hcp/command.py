"""The study's command: simulate, or the demo from a simulated store to a report."""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from distributed import Client, LocalCluster
from matplotlib.figure import Figure

import pavi_scale as ps
from pipelines import common, hcp
from pipelines.hcp import figures
from pipelines.hcp.simulate import VERTICES, make_cohort


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
        common.provide(args.cohort, lambda: make_cohort(args.cohort, args.subjects, args.vertices, seed=args.seed))
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


def main() -> None:
    """Parse the command line and run it."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.hcp", description=hcp.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("demo", "simulate"))
    parser.add_argument("--subjects", type=int, default=20)
    parser.add_argument("--vertices", type=int, default=VERTICES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--memory", default="1400 MiB", help="of each process (%(default)s)")
    parser.add_argument("--max-time", type=float, default=45.0, help="seconds after which training stops, converged or not (%(default)s)")
    parser.add_argument("--cohort", help="Zarr store of the cohort (simulate: data/hcp.zarr; demo: runs/hcp-demo/cohort.zarr)")
    parser.add_argument("--run", default="runs/hcp-demo/run", help="run directory of the demo (%(default)s)")
    args = parser.parse_args()
    if args.what == "simulate":
        path = args.cohort or "data/hcp.zarr"
        common.provide(path, lambda: make_cohort(path, args.subjects, args.vertices, seed=args.seed))
        return
    args.cohort = args.cohort or "runs/hcp-demo/cohort.zarr"
    demo(args)
