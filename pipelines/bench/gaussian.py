"""Gaussian random effects: distance from the exact evidence, engines side by side, memory against the plan, lazy queries."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from distributed import Client, LocalCluster
from safetensors.numpy import load_file

import pavi_scale as ps
from pipelines import gre
from pipelines.bench.meter import Found, Job, Watch, peak_bytes, timing

SCALES = (1.0, 0.5, 1.0)
GROUPS, OBSERVATIONS, FEATURES = 20_000, 50, 8
MEMORY = "2 GiB"
PARTICLES = 32
large = gre.make_model(SCALES)  # at module level, so that the queries' process can import it


def gap(posterior: ps.Posterior, evidence: float, latents: int, particles: int = PARTICLES) -> dict[str, float]:
    """(log evidence - ELBO) per latent with the ELBO's standard error."""
    elbo, error = posterior.elbo(particles)
    return {"gap per latent": (evidence - elbo) / latents, "+-": error / latents}


def exact(job: Job) -> Found:
    """Small cohorts, dense and ragged."""
    found = Found()
    for shape, model, most, size in (("dense", gre.model, 50, "50"), ("ragged", gre.ragged, 60, "1-60")):
        for groups in (3, 30, 300):
            store = str(job.work / f"{shape}-{groups}.zarr")
            gre.make_cohort(store, groups, observations=most, given=model)
            row: dict[str, Any] = {"groups of": size, "G": groups}
            with timing(row, "fit s"):
                posterior = ps.fit(model, store, progress=False)
            evidence = gre.log_evidence(xr.open_zarr(store, consolidated=False))
            row |= {"log evidence": evidence, **gap(posterior, evidence, 2 * (groups + 1)), "status": posterior.status}
            found.rows.append(row)
    return found


def weights(run: Path) -> dict[str, np.ndarray]:
    """The state of a run's newest generation."""
    generation = max(p for p in (run / "generations").iterdir() if (p / "weights.safetensors").exists())
    return load_file(generation / "weights.safetensors")


def engines(job: Job) -> Found:
    """The same fit in this process, and on worker processes."""
    store = str(job.work / "engines.zarr")
    gre.make_cohort(store, 300)
    found = Found()
    runs = {"in process": job.work / "run-inside", "2 workers": job.work / "run-workers"}
    for name, run in runs.items():
        row: dict[str, Any] = {"engine": name}
        if name == "in process":
            with timing(row, "fit s"):
                posterior = ps.fit(gre.model, store, run=run, progress=False)
            row["cluster start s"] = 0.0
        else:
            watch = Watch()
            with LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=None) as cluster, Client(cluster) as client:
                client.wait_for_workers(2)
                row["cluster start s"] = watch.seconds
                with timing(row, "fit s"):
                    posterior = ps.fit(gre.model, store, run=run, client=client, progress=False)
        found.rows.append({key: row[key] for key in ("engine", "fit s", "cluster start s")} | {"status": posterior.status})
    first, second = (weights(run) for run in runs.values())
    if first.keys() != second.keys():
        found.notes.append(f"the engines' states hold different arrays: {sorted(first.keys() ^ second.keys())}")
    shared = sorted(first.keys() & second.keys())
    apart = {name: float(np.abs(first[name] - second[name]).max(initial=0.0)) if first[name].shape == second[name].shape else float("inf") for name in shared}
    means = [xr.open_zarr(run / "posterior.zarr", group="posterior_mean").load() for run in runs.values()]
    apart |= {f"posterior_mean of {v}": float(abs(means[0][v] - means[1][v]).max()) for v in means[0].data_vars}
    found.notes += [f"largest difference of {name}: {value:.3g}" for name, value in apart.items()]
    found.details["differences"] = apart
    return found


def large_store(job: Job) -> Found:
    """Simulate the large cohort and find its evidence, away from the process whose memory is measured."""
    store = str(job.work / "large.zarr")
    row: dict[str, Any] = {"what": f"G={GROUPS:,} N={OBSERVATIONS} D={FEATURES}"}
    with timing(row, "simulate s"):
        gre.make_cohort(store, GROUPS, OBSERVATIONS, FEATURES, given=large)
    with timing(row, "evidence s"):
        evidence = gre.log_evidence(xr.open_zarr(store, consolidated=False), SCALES)
    (job.work / "large.json").write_text(json.dumps(evidence))
    return Found([row | {"log evidence": evidence}])


def stored_bytes(store: Path) -> int:
    """Bytes of a store's files, its truth apart."""
    return sum(f.stat().st_size for f in store.rglob("*") if f.is_file() and "truth" not in f.relative_to(store).parts)


def read_through(store: Path) -> tuple[float, int]:
    """Seconds, and bytes once decoded, of reading the observations in their stored order, some chunks at a time."""
    x = xr.open_zarr(store, consolidated=False, chunks=None)["x"]
    step = max(1, (16 << 20) // (x.nbytes // x.sizes["group"]))
    watch = Watch()
    for start in range(0, x.sizes["group"], step):
        np.asarray(x[start : start + step].values)
    return watch.seconds, x.nbytes


def memory(job: Job) -> Found:
    """The large cohort out of its store: seconds, and peak memory against the plan."""
    store = job.work / "large.zarr"
    row: dict[str, Any] = {"memory=": MEMORY}
    before = peak_bytes()
    planned = ps.plan(large, str(store), memory=MEMORY).peak_bytes
    with timing(row, "fit s"):
        posterior = ps.fit(large, str(store), run=job.work / "large-run", memory=MEMORY, progress=False)
    peak = peak_bytes()
    latents = (GROUPS + 1) * FEATURES
    with timing(row, "elbo s"):
        row |= gap(posterior, json.loads((job.work / "large.json").read_text()), latents)
    seconds, decoded = read_through(store)
    size = stored_bytes(store)
    row |= {"planned GiB": planned / 2**30, "peak GiB": peak / 2**30, "before GiB": before / 2**30, "status": posterior.status}
    bandwidth = size / seconds
    note = (
        f"floor of one pass: {size / 2**20:.1f} MiB stored ({decoded / 2**20:.1f} decoded) at {bandwidth / 2**20:.0f} MiB/s of plain sequential Zarr reading "
        f"= {seconds:.3f} s (files in the page cache, as they are for the fit); the fit takes {row['fit s'] / seconds:.0f} x that"
    )
    verdict = "below" if peak <= planned else "ABOVE"
    details = {"store_bytes": size, "read_seconds": seconds, "planned": planned, "peak": peak}
    return Found([row], [note, f"the measured peak is {verdict} the plan"], details)


def queries(job: Job) -> Found:
    """Questions to the posterior of the large cohort, each in a freshly opened run."""
    some = slice(100, 110)
    questions = {
        "posterior_mean of one group": lambda p: p.datatree["posterior_mean"]["theta"].isel(group=GROUPS // 2).values,
        "1,000 lazy draws of 10 groups": lambda p: p.datatree["posterior"]["theta"].isel(group=some, draw=slice(1000)).values,
        "the same, as sample(1000, group=...)": lambda p: p.sample(1000, group=list(range(100, 110)))["theta"].values,
    }
    found = Found()
    for question, ask in questions.items():
        row: dict[str, Any] = {"question": question}
        with timing(row, "open s"):
            posterior = ps.open_posterior(os.fspath(job.work / "large-run"))
        with timing(row, "first s"):
            answer = np.asarray(ask(posterior))
        with timing(row, "again s"):
            again = np.asarray(ask(posterior))
        row |= {"shape": str(answer.shape), "finite": bool(np.isfinite(answer).all()), "same again": bool((answer == again).all())}
        found.rows.append(row | {"peak GiB": peak_bytes() / 2**30})
    return found
