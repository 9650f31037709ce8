"""One fit of the Gaussian random effects at default settings in this process: its curve, its memory, its mu beside the exact one."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

import pavi_scale as ps
from pipelines import common
from pipelines.bench import exact
from pipelines.bench.gaussian import SCALES, large
from pipelines.bench.meter import Watch, peak_bytes

PARTICLES = 4


def milestones(trace: xr.Dataset, found: exact.Statistics) -> list[dict[str, float]]:
    """Points of the curve from the q(root) that the trace keeps with its clock; none if it keeps none.

    Given mu, the guide's theta is exact for this model and needs no training, so that the gap is the divergence of q(mu) alone; the bound of the finished
    posterior, evaluated on all data, would show if it were not. The trace's other values are at points of the root: no bounds.
    """
    if not {"seconds", "root_step", "root_loc", "root_sd"} <= set(trace.data_vars):
        return []
    seconds = trace["seconds"].values[trace["root_step"].values]
    states = zip(seconds, trace["root_loc"].values, trace["root_sd"].values, strict=True)
    return [{"seconds": float(s), "gap": exact.root_gap(loc, sd, found, SCALES), "error": 0.0} for s, loc, sd in states]


def fit(store: str, run: str) -> dict[str, Any]:
    """Fit a store, then compare with what is exact.

    The last point of the curve is the finished posterior, written, at the seconds of the whole call; its bound is evaluated afterwards.
    """
    before, watch = peak_bytes(), Watch()
    posterior = ps.fit(large, store, run=run, progress=False)
    seconds, peak = watch.seconds, peak_bytes()
    found = exact.statistics(exact.blocks(store))
    evidence = exact.log_evidence(found, SCALES)
    bound, error = posterior.elbo(PARTICLES)
    points = milestones(posterior.datatree["fit"].to_dataset(), found)
    final = {"seconds": seconds, "gap": (evidence - bound) / found.latents, "error": error / found.latents}
    mean, sd = exact.mu_posterior(found, SCALES)
    stored = [posterior.datatree[group].to_dataset()["mu"].values for group in ("posterior_mean", "posterior_sd")]
    return {
        "fit_seconds": seconds,
        "before_bytes": before,
        "peak_bytes": peak,
        "status": posterior.status,
        "timed": bool(points),
        "points": [*points, final],
        "mu_shift": float(np.abs((stored[0] - mean) / sd).max()),
        "mu_sd_ratio": [float((stored[1] / sd).min()), float((stored[1] / sd).max())],
    }


def fit_apart(store: str, run: Path, out: Path, limit: float | None = None) -> dict[str, Any]:
    """`fit` in a process of its own; {"error": ...} if that failed or was too slow."""
    command = [sys.executable, "-W", "ignore", "-m", "pipelines.bench.ours", store, str(run), str(out)]
    try:
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"error": f"stopped after {limit:g} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def main() -> None:
    """Fit and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store")
    parser.add_argument("run")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    args.out.write_text(json.dumps(fit(args.store, args.run)))


if __name__ == "__main__":
    common.start("pipelines.bench.ours")
