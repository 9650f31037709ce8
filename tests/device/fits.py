"""Fits of small studies on both devices, in a process of their own: prints how far apart the posteriors are, as JSON.

Usage: python -m tests.device.fits FOLDER
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import xarray as xr
from distributed import Client, LocalCluster
from torch.distributions import Bernoulli, HalfNormal, Normal

import pavi_scale as ps
from pavi_scale.errors import PlanRefused
from pipelines import gre, hcp
from tests.device import second

ITEMS = ps.Model(
    ps.Plate("group"), ps.Plate("answer"),
    mu=ps.latent(lambda: Normal(0.0, 1.0)),
    sigma=ps.latent(lambda: HalfNormal(1.0)),
    theta=ps.latent(lambda mu, sigma: Normal(mu, sigma), plates="group"),
    y=ps.observed(lambda theta: Bernoulli(logits=theta), plates=("group", "answer")),
)  # fmt: skip
CROSSED = ps.Model(
    ps.Plate("a"), ps.Plate("b"),
    mu=ps.latent(lambda: Normal(0.0, 1.0)),
    scale=ps.latent(lambda: HalfNormal(1.0)),
    u=ps.latent(lambda scale: Normal(0.0, scale), plates="a"),
    v=ps.latent(lambda: Normal(0.0, 1.0), plates="b"),
    y=ps.observed(lambda mu, u, v: Normal(mu + u + v, 0.5), plates=("a", "b")),
)  # fmt: skip


def studies(folder):
    """Name -> model, cohort, encoding: elimination, learned corrections, crossed plates, labelled components with free rows."""
    rng = np.random.default_rng(0)
    answers = rng.binomial(1, 1 / (1 + np.exp(-rng.normal(0.3, 0.8, (8, 1)))), (8, 5)).astype(float)
    sums = rng.normal(size=(6, 1)) + rng.normal(size=5) + 0.5 * rng.normal(size=(6, 5))
    gre.make_cohort(str(folder / "gre.zarr"), groups=50, observations=4)
    hcp.make_cohort(str(folder / "hcp.zarr"), subjects=4, vertices=300)
    yield "gre", gre.model, str(folder / "gre.zarr"), "auto"
    yield "items", ITEMS, xr.Dataset({"y": (("group", "answer"), answers)}), "encoder"
    yield "crossed", CROSSED, xr.Dataset({"y": (("a", "b"), sums)}), "auto"
    yield "hcp", hcp.model, str(folder / "hcp.zarr"), "auto"


def fit(model, cohort, device, encoding="auto", **more):
    """Means and sds, by latent."""
    posterior = ps.fit(model, cohort, encoding=encoding, device=device, progress=False, **more)
    mean, sd = (posterior.datatree[f"posterior_{what}"] for what in ("mean", "sd"))
    return {name: (mean[name].values, sd[name].values) for name in mean.data_vars}


def gap(one, other):
    """Largest difference of a mean or an sd, in sds."""
    return max(float((np.abs(a - b) / one[name][1]).max()) for name in one for a, b in zip(one[name], other[name], strict=True))


def main(folder):
    # Devices are compared, not ways to compute: the processor's own loops (tests/test_distances.py) are off by single precision's rounding.
    ps.laws.IsotropicNormalMixture.evidence = ps.laws.IsotropicNormalMixture.products
    found = {}
    for name, model, cohort, encoding in studies(folder):
        began = time.monotonic()
        here = fit(model, cohort, "cpu", encoding)
        before = sum(second.done.values())
        found[name] = {"gap": gap(here, fit(model, cohort, second.NAME, encoding)), "operations": sum(second.done.values()) - before}
        print(name, round(time.monotonic() - began, 1), found[name], file=sys.stderr)
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0", preload=["tests.device.second"]
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        cohort = str(folder / "gre.zarr")
        found["workers"] = {"gap": gap(fit(gre.model, cohort, "cpu"), fit(gre.model, cohort, second.NAME, client=client))}
        found["workers"]["operations"] = sum(client.run(lambda: sum(sys.modules["tests.device.second"].done.values())).values())
    second.FREE = 1 << 20
    try:
        fit(gre.model, cohort, second.NAME)
    except PlanRefused as error:
        found["refused"] = str(error)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
