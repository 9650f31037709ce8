"""Rival in Pyro: AutoNormal, full batch, cosine-decayed Adam. One JSON line per checkpoint, as the hand-written rival prints."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import CosineAnnealingLR

from pipelines.bench import exact

SCALES = (1.0, 0.5, 1.0)


def make_model(x: np.ndarray) -> Callable[[], None]:
    """The model of `pipelines.gre`, all observations `[G, n, D]` at once."""
    s0, s1, sx = SCALES
    groups, observations, features = x.shape
    data = torch.from_numpy(x).transpose(0, 1).contiguous()

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(features), s0).to_event(1))
        with pyro.plate("group", groups):
            theta = pyro.sample("theta", dist.Normal(mu, s1).to_event(1))
            with pyro.plate("observation", observations):
                pyro.sample("x", dist.Normal(theta, sx).to_event(1), obs=data)

    return model


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in {"groups": 20000, "per-group": 50, "dim": 8, "steps": 2000, "checkpoints": 40, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=1e-2)
    args = parser.parse_args()
    x = exact.simulate(args.groups, args.per_group, args.dim, args.seed, SCALES)
    means, found = x.mean(1, dtype="f8"), exact.statistics(iter([x.astype(float)]))
    pyro.set_rng_seed(args.seed)
    pyro.enable_validation(False)
    model = make_model(x)
    guide = AutoNormal(model)
    schedule = CosineAnnealingLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": args.lr}, "T_max": args.steps})
    svi = SVI(model, guide, schedule, Trace_ELBO())
    seconds = 0.0
    for _ in range(args.checkpoints):
        began = time.perf_counter()
        for _ in range(args.steps // args.checkpoints):
            svi.step()
            schedule.step()
        seconds += time.perf_counter() - began
        moments = (part.detach().double().numpy() for part in (guide.locs.mu, guide.scales.mu**2, guide.locs.theta, guide.scales.theta**2))
        gap = exact.gap(exact.GaussianGuide(*moments), means, found, SCALES)
        print(json.dumps({"seconds": seconds, "gap_per_latent": gap, "standard_error": 0.0}), flush=True)


if __name__ == "__main__":
    main()
