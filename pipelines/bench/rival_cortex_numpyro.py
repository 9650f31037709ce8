"""Rival in NumPyro of the cortical study: AutoNormal, full batch. What it prints and how it begins: `pipelines.bench.rival_cortex`."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.infer import SVI, Trace_ELBO, autoguide, init_to_value

from pipelines.bench import rival_cortex
from pipelines.bench.rival_cortex import LOGIT_SCALE, NETWORKS


def model(x: jax.Array, square: jax.Array) -> None:
    """The model of `pipelines.hcp.study`; x `[subject, session, vertex, feature]`, its squared lengths `[subject, session, vertex]`."""
    subjects, sessions, vertices, features = x.shape
    mu = numpyro.sample("mu", dist.Normal(0, 1).expand([NETWORKS, features]).to_event(2))
    eps = numpyro.sample("eps", dist.HalfNormal(0.5).expand([NETWORKS]).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfNormal(0.5).expand([NETWORKS]).to_event(1))
    kappa = numpyro.sample("kappa", dist.LogNormal(0, 1))
    mu_subject = numpyro.sample("mu_subject", dist.Normal(mu, eps[:, None]).expand([subjects, NETWORKS, features]).to_event(3))
    session = dist.Normal(mu_subject[:, None], sigma[:, None]).expand([subjects, sessions, NETWORKS, features])
    mu_session = numpyro.sample("mu_session", session.to_event(4))
    rho = numpyro.sample("rho", dist.Normal(0, LOGIT_SCALE).expand([vertices, NETWORKS]).to_event(2))
    logits = numpyro.sample("label_logits", dist.Normal(rho, 1).expand([subjects, vertices, NETWORKS]).to_event(3))
    product = jnp.einsum("stvd,stkd->stvk", x, mu_session)
    away = square[..., None] - 2 * product + (mu_session**2).sum(-1)[:, :, None]
    evidence = -0.5 * away / kappa**2 - features * (jnp.log(kappa) + 0.5 * math.log(2 * math.pi))
    numpyro.factor("x", jax.nn.logsumexp(jax.nn.log_softmax(logits)[:, None] + evidence, axis=-1).sum())


def main() -> None:
    """Train, and print."""
    args = rival_cortex.options(__doc__)
    cohort = rival_cortex.load(args.cohort)
    begin = rival_cortex.start(cohort, args.seed)
    data = (jnp.asarray(cohort.x), jnp.asarray(cohort.square))
    del cohort
    guide = autoguide.AutoNormal(model, init_loc_fn=init_to_value(values=begin), init_scale=rival_cortex.SCALE)
    svi = SVI(model, guide, optax.adam(optax.cosine_decay_schedule(args.lr, args.steps)), Trace_ELBO())
    state = jax.jit(svi.init)(jax.random.PRNGKey(args.seed), *data)
    del begin

    def block(state: object, *data: jax.Array) -> tuple[object, jax.Array]:
        state, losses = jax.lax.scan(lambda s, _: svi.update(s, *data), state, None, length=args.every)
        return state, -losses.mean()

    # The old state's memory is the new one's.
    run = jax.jit(block, donate_argnums=0).lower(state, *data).compile()

    def advance(_step: int) -> float:
        nonlocal state
        state, bound = run(state, *data)
        return float(jax.block_until_ready(bound))

    outcome = rival_cortex.train(advance, args)
    found = svi.get_params(state)
    rival_cortex.finish(outcome, args.cohort, lambda name: (np.asarray(found[f"{name}_auto_loc"]), np.asarray(found[f"{name}_auto_scale"])))


if __name__ == "__main__":
    main()
