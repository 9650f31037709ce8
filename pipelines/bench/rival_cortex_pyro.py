"""Rival in Pyro of the cortical study: AutoNormal, full batch. What it prints and how it begins: `pipelines.bench.rival_cortex`."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO, autoguide
from pyro.infer.autoguide.initialization import init_to_value
from pyro.optim import CosineAnnealingLR

from pipelines.bench import rival_cortex
from pipelines.bench.rival_cortex import LOGIT_SCALE, NETWORKS


def model(x: torch.Tensor, square: torch.Tensor) -> None:
    """The model of `pipelines.hcp.study`; x `[subject, session, vertex, feature]`, its squared lengths `[subject, session, vertex]`."""
    subjects, sessions, vertices, features = x.shape
    zero, half, one = torch.zeros(()), torch.full((), 0.5), torch.ones(())
    mu = pyro.sample("mu", dist.Normal(zero, one).expand([NETWORKS, features]).to_event(2))
    eps = pyro.sample("eps", dist.HalfNormal(half).expand([NETWORKS]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(half).expand([NETWORKS]).to_event(1))
    kappa = pyro.sample("kappa", dist.LogNormal(zero, one))
    mu_subject = pyro.sample("mu_subject", dist.Normal(mu, eps[:, None]).expand([subjects, NETWORKS, features]).to_event(3))
    session = dist.Normal(mu_subject[:, None], sigma[:, None]).expand([subjects, sessions, NETWORKS, features])
    mu_session = pyro.sample("mu_session", session.to_event(4))
    rho = pyro.sample("rho", dist.Normal(zero, LOGIT_SCALE * one).expand([vertices, NETWORKS]).to_event(2))
    logits = pyro.sample("label_logits", dist.Normal(rho, one).expand([subjects, vertices, NETWORKS]).to_event(3))
    product = x @ mu_session.mT
    away = square[..., None] - 2 * product + mu_session.square().sum(-1)[:, :, None]
    evidence = -0.5 * away / kappa**2 - features * (kappa.log() + 0.5 * math.log(2 * math.pi))
    pyro.factor("x", torch.logsumexp(logits.log_softmax(-1)[:, None] + evidence, -1).sum())


def main() -> None:
    """Train, and print."""
    args = rival_cortex.options(__doc__)
    cohort = rival_cortex.load(args.cohort)
    begin = {name: torch.from_numpy(value) for name, value in rival_cortex.start(cohort, args.seed).items()}
    data = (torch.from_numpy(cohort.x), torch.from_numpy(cohort.square))
    pyro.set_rng_seed(args.seed)
    pyro.enable_validation(False)
    guide = autoguide.AutoNormal(model, init_loc_fn=init_to_value(values=begin), init_scale=rival_cortex.SCALE)
    schedule = CosineAnnealingLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": args.lr}, "T_max": args.steps})
    svi = SVI(model, guide, schedule, Trace_ELBO())
    guide(*data)  # sets its parameters up, which takes no step
    del begin

    def advance(_step: int) -> float:
        total = 0.0
        for _ in range(args.every):
            total -= svi.step(*data)
            schedule.step()
        return total / args.every

    def moments(name: str) -> tuple[np.ndarray, np.ndarray]:
        loc, scale = (getattr(part, name).detach().numpy() for part in (guide.locs, guide.scales))
        return loc, scale

    rival_cortex.finish(rival_cortex.train(advance, args), args.cohort, moments)


if __name__ == "__main__":
    main()
