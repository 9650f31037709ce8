"""What every rival of the cortical study does alike: data in memory, starting values, checkpoints, its posterior before the judge.

A rival is a script of its own for each package. It prints one JSON line per checkpoint, `{"step", "seconds", "bound"}`: seconds of training without
compilation, and the mean over the steps since the last checkpoint of the bound (one draw of the guide a step). Its last line says how it ended and how
good it is, by `pipelines.hcp.quality` as for our own posteriors.

All of them fit the model of `pipelines.hcp.study` as it is written there (centred, labels summed out by logsumexp over the networks), with a normal of its
own for each of the scalars, on all of the data at every step: a guide with parameters of their own for every unit gains nothing from a part of the units.
The square |x - m|^2 is expanded, so that no array over networks and features of every vertex is formed. Adam's rate decays to zero by a cosine.

Bytes, of S subjects, T sessions, V vertices, K networks, D features: 4 STVD for the data, at least 32 SVK for the guide (location and scale, their
gradients, two moments of each), and a few times 4 STVK in a step.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import xarray as xr
from scipy.cluster.vq import kmeans2

from pipelines.bench.meter import peak_bytes

NETWORKS, LOGIT_SCALE = 7, 2.0  # as in `pipelines.hcp.study`, which would bring our own package into a rival's memory
ROWS = 10_000  # recordings of a vertex that are clustered
RESTARTS = 10
SPREAD = 0.2  # at which eps and sigma begin
SCALE = 0.1  # standard deviation at which each normal of a guide begins, on the unconstrained scale: the default of NumPyro and Pyro
DIMS = {
    "mu": ("network", "feature"),
    "mu_subject": ("subject", "network", "feature"),
    "mu_session": ("subject", "session", "network", "feature"),
    "rho": ("vertex", "network"),
    "label_logits": ("subject", "vertex", "network"),
}  # what is judged; eps, sigma and kappa are not


@dataclass(frozen=True)
class Data:
    """A cohort in memory.

    Args:
        x: `[subject, session, vertex, feature]`, float32.
        square: Squared length of each x, `[subject, session, vertex]`, float32.
    """

    x: np.ndarray
    square: np.ndarray

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each latent array."""
        s, t, v, d = self.x.shape
        sizes = {"subject": s, "session": t, "vertex": v, "feature": d, "network": NETWORKS}
        return {name: tuple(sizes[dim] for dim in dims) for name, dims in DIMS.items()}


def load(store: str) -> Data:
    """The whole cohort of a store."""
    x = xr.open_zarr(store, consolidated=False, chunks=None)["x"].transpose("subject", "session", "vertex", "feature").values.astype("f4", copy=False)
    return Data(x, np.einsum("stvd,stvd->stv", x, x))


def start(data: Data, seed: int = 0) -> dict[str, np.ndarray]:
    """Where the guide's means begin, by name, in the latents' own space, float32.

    Fingerprints at the centres of k-means (k-means++, the best of ten restarts on 10,000 recordings), those of subjects and sessions at the population's;
    kappa at the spread around the centres; logits of each vertex at the logarithms of how often each centre is the nearest there, plus one, less their
    mean over networks, the same for all subjects.
    """
    rng = np.random.default_rng(seed)
    subjects, sessions, vertices, features = data.x.shape
    count = subjects * sessions * vertices
    at = np.unravel_index(np.sort(rng.choice(count, min(ROWS, count), replace=False)), data.square.shape)
    rows = data.x[at]

    def clustered() -> tuple[float, np.ndarray]:
        centres, label = kmeans2(rows, NETWORKS, iter=30, minit="++", rng=rng)
        return float(((rows - centres[label]) ** 2).mean()), centres

    variance, centres = min((clustered() for _ in range(RESTARTS)), key=lambda found: found[0])
    counts = np.ones((vertices, NETWORKS), "f4")
    for x in data.x:
        nearest = (x @ centres.T - 0.5 * (centres**2).sum(-1)).argmax(-1)  # session, vertex
        for label in nearest:
            counts[np.arange(vertices), label] += 1
    rho = np.log(counts)
    rho -= rho.mean(-1, keepdims=True)
    spread = np.full(NETWORKS, SPREAD, "f4")
    means = {name: np.broadcast_to(centres, data.shapes[name]) for name in ("mu", "mu_subject", "mu_session")}
    logits = {"rho": rho, "label_logits": np.broadcast_to(rho, data.shapes["label_logits"])}
    all_of = means | logits | {"eps": spread, "sigma": spread.copy(), "kappa": np.asarray(math.sqrt(variance))}
    return {name: np.array(value, "f4") for name, value in all_of.items()}


def options(about: str | None) -> argparse.Namespace:
    """The command line of a rival, parsed."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cohort", required=True, metavar="STORE", help="Zarr store of the cohort, with its truth")
    parser.add_argument("--steps", type=int, default=2000, help="length of the rate's decay (%(default)s)")
    parser.add_argument("--lr", type=float, default=3e-2, help="learning rate at the first step (%(default)s)")
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints (%(default)s)")
    parser.add_argument("--limit", type=float, default=math.inf, metavar="SECONDS", help="of training, after which no further step is begun")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.every = min(args.every, args.steps)
    return args


def rate(step: int, lr: float, steps: int) -> float:
    """Learning rate of a step: lr (1 + cos(pi step / steps)) / 2."""
    return 0.5 * lr * (1 + math.cos(math.pi * min(step / steps, 1.0)))


def train(advance: Callable[[int], float], args: argparse.Namespace) -> str:
    """Train by checkpoints until the steps are done, or the limit; how it ended.

    Args:
        advance: Called with the number of the next step; takes `args.every` steps and returns their mean bound in nats.
        args: The command line.
    """
    seconds = 0.0
    for step in range(0, args.steps - args.every + 1, args.every):
        began = time.perf_counter()
        bound = advance(step)
        seconds += time.perf_counter() - began
        print(json.dumps({"step": step + args.every, "seconds": seconds, "bound": bound}), flush=True)
        if not math.isfinite(bound):
            return f"not finite after {step + args.every} steps"
        if seconds >= args.limit:
            return f"stopped after {args.limit:g} s"
    return "ended"


def judge(store: str, mean: dict[str, np.ndarray], sd: dict[str, np.ndarray]) -> dict[str, float]:
    """What `pipelines.hcp.quality` says of a posterior with these means and standard deviations, by latent, shaped as in `DIMS`."""
    moments = {group: xr.Dataset({n: (dims, values[n]) for n, dims in DIMS.items()}) for group, values in (("posterior_mean", mean), ("posterior_sd", sd))}
    posterior, quality = SimpleNamespace(datatree=moments), importlib.import_module("pipelines.hcp.quality")  # after the peak of the rival was taken
    truth = quality.in_order(posterior, xr.open_zarr(store, group="truth", consolidated=False))
    found: dict[str, float] = quality.against_truth(posterior, truth)
    return found


def tell(outcome: str, peak: int, quality: dict[str, float], **more: float) -> None:
    """Print the last line."""
    print(json.dumps({"outcome": outcome, "peak_gib": peak / 2**30, "quality": quality, **more}), flush=True)


def finish(outcome: str, store: str, moments: Callable[[str], tuple[np.ndarray, np.ndarray]]) -> None:
    """Judge a trained guide and print the last line; the peak is that of the training.

    Args:
        outcome: As `train` returned it.
        store: The cohort.
        moments: Name of a latent -> mean and standard deviation of its normals.
    """
    peak = peak_bytes()
    found = {name: moments(name) for name in DIMS}
    mean, sd = ({name: np.asarray(pair[k]) for name, pair in found.items()} for k in (0, 1))
    tell(outcome, peak, judge(store, mean, sd))
