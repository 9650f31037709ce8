"""One fit of the cortical study at default settings in this process: seconds of the whole call, its memory, how good its posterior is."""

from __future__ import annotations

import argparse

import xarray as xr

import pavi_scale as ps
from pipelines import common, hcp
from pipelines.bench.meter import Watch, peak_bytes
from pipelines.bench.rival_cortex import tell
from pipelines.hcp import quality

PARTICLES = 4


def main() -> None:
    """Fit, judge, print one line as a rival's last. The bound and the judgement are not in the seconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cohort", required=True, metavar="STORE", help="Zarr store of the cohort, with its truth")
    parser.add_argument("--run", required=True, metavar="RUN", help="run directory")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    watch = Watch()
    posterior = ps.fit(hcp.model, args.cohort, run=args.run, seed=args.seed, progress=False)
    seconds, peak = watch.seconds, peak_bytes()
    truth = quality.in_order(posterior, xr.open_zarr(args.cohort, group="truth", consolidated=False))
    found = quality.against_truth(posterior, truth)
    bound, error = posterior.elbo(PARTICLES)
    tell(f"ended, status {posterior.status}", peak, found, seconds=seconds, bound=bound, bound_error=error)


if __name__ == "__main__":
    common.start("pipelines.bench.ours_cortex")
