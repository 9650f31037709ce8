"""Bounded staleness against waiting for each step: learned corrections trained on two workers, of which one is killed in each fit."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from distributed import Client, LocalCluster

import pavi_scale as ps
from pipelines import nc
from pipelines.bench.meter import Found, Job, timing

SEEDS, STALENESS, PARTICLES = 20, 3, 256
GROUPS, OBSERVATIONS, FEATURES = 20, 10, 2
KILLS_WITHIN = 4.0  # seconds of the first answer


def cohort_of(groups: int) -> xr.Dataset:
    """Data of the model without conjugacy, drawn from its prior."""
    drawn = nc.model.sample({"group": groups, "observation": OBSERVATIONS, "feature": FEATURES}, seed=7)
    return drawn[["x"]]


def events(run: Path, name: str) -> list[str]:
    """Lines of a run's log that tell of an event."""
    path = run / "events.jsonl"
    return [line for line in path.read_text().splitlines() if f'"event":"{name}"' in line] if path.exists() else []


def strike(client: Client, run: Path, after: float, over: threading.Event) -> None:
    """Kill a worker some seconds after the run's first answer."""
    while not over.is_set() and not events(run, "first round done"):
        time.sleep(0.02)
    if not over.wait(after):
        pids = client.run(os.getpid)
        os.kill(pids[sorted(pids)[int(1e3 * after) % len(pids)]], signal.SIGKILL)


def one(cohort: xr.Dataset, run: Path, seed: int, staleness: int, client: Client | None) -> tuple[dict[str, Any], dict[str, tuple[np.ndarray, np.ndarray]]]:
    """One fit; on a cluster, with a kill: its figures, and (mean, sd) of each latent."""
    row: dict[str, Any] = {}
    over = threading.Event()
    if client is not None:
        after = float(np.random.default_rng(seed).uniform(0.0, KILLS_WITHIN))
        threading.Thread(target=strike, args=(client, run, after, over), daemon=True).start()
    try:
        with timing(row, "s"):
            posterior = ps.fit(nc.model, cohort, run=run, seed=seed, client=client, encoding="encoder", staleness=staleness, progress=False)
    finally:
        over.set()
    row["elbo"], row["error"] = posterior.elbo(PARTICLES, seed=seed)
    row["status"], row["lost"] = posterior.status, len(events(run, "worker left"))
    mean, sd = (posterior.datatree[f"posterior_{of}"].dataset for of in ("mean", "sd"))
    return row, {str(name): (mean[name].values, sd[name].values) for name in mean.data_vars}


def measure(job: Job) -> Found:
    """Fit the same cohort by both ways at each seed and compare bound and posterior means."""
    torch.set_num_threads(1)
    cohort, rows = cohort_of((job.groups or (GROUPS,))[0]), []
    with LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0") as cluster, Client(cluster) as client:
        for seed in range(job.runs or SEEDS):
            waits, calm = one(cohort, job.work / f"waits{seed}", seed, 0, None)
            client.wait_for_workers(2, timeout=120)
            stale, killed = one(cohort, job.work / f"stale{seed}", seed, STALENESS, client)
            apart = max(float((np.abs(killed[name][0] - mean) / sd).max()) for name, (mean, sd) in calm.items())
            rows.append({
                "seed": seed, "ELBO, waiting": waits["elbo"], "ELBO, stale": stale["elbo"], "error": float(np.hypot(waits["error"], stale["error"])),
                "means apart, sd": apart, "status": f"{waits['status']}, {stale['status']}", "workers lost": stale["lost"],
                "s, waiting": waits["s"], "s, stale and killed": stale["s"],
            })  # fmt: skip
    gap = np.array([row["ELBO, stale"] - row["ELBO, waiting"] for row in rows])
    error = float(gap.std(ddof=1) / np.sqrt(len(gap))) if len(gap) > 1 else float("nan")
    note = f"ELBO, stale - waiting: {gap.mean():+.4f} +- {error:.4f} nats over {len(gap)} seeds; staleness {STALENESS}; waiting in process and undisturbed"
    return Found(rows, [note], {"gap": float(gap.mean()), "error": error, "apart": max(row["means apart, sd"] for row in rows)})
