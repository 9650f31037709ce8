"""Rivals in NumPyro at sizes that they can hold: AutoMultivariateNormal, and NUTS. One JSON line per checkpoint, as the hand-written rival prints.

The quality of NUTS is that of the Gaussian which has its draws' moments (mean, variance, and covariance of theta with mu): exact in the limit.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO, autoguide

from pipelines.bench import exact

SCALES = (1.0, 0.5, 1.0)
DRAWS = 100  # of NUTS between two checkpoints


def make_model(x: np.ndarray) -> Callable[[], None]:
    """The model of `pipelines.gre`, all observations `[G, n, D]` at once."""
    s0, s1, sx = SCALES
    groups, observations, features = x.shape
    data = jnp.swapaxes(jnp.asarray(x), 0, 1)

    def model() -> None:
        mu = numpyro.sample("mu", dist.Normal(0, s0).expand([features]).to_event(1))
        with numpyro.plate("group", groups):
            theta = numpyro.sample("theta", dist.Normal(mu, s1).to_event(1))
            with numpyro.plate("observation", observations):
                numpyro.sample("x", dist.Normal(theta, sx).to_event(1), obs=data)

    return model


def report(seconds: float, q: exact.GaussianGuide, means: np.ndarray, found: exact.Statistics) -> None:
    """Print one checkpoint; the bound is in closed form, so there is no error of it."""
    print(json.dumps({"seconds": seconds, "gap_per_latent": exact.gap(q, means, found, SCALES), "standard_error": 0.0}), flush=True)


def multivariate(x: np.ndarray, args: argparse.Namespace) -> None:
    """AutoMultivariateNormal with a cosine-decayed Adam, full batch; compilation is not counted."""
    means, found = x.mean(1, dtype="f8"), exact.statistics(iter([x.astype(float)]))
    model = make_model(x)
    guide = autoguide.AutoMultivariateNormal(model)
    svi = SVI(model, guide, optax.adam(optax.cosine_decay_schedule(args.lr, args.steps)), Trace_ELBO())
    state = svi.init(jax.random.PRNGKey(args.seed))
    length = args.steps // args.checkpoints
    run = jax.jit(lambda s: jax.lax.scan(lambda s, _: svi.update(s), s, None, length=length)).lower(state).compile()
    seconds = 0.0
    for _ in range(args.checkpoints):
        began = time.perf_counter()
        state, _losses = jax.block_until_ready(run(state))
        seconds += time.perf_counter() - began
        joint = guide.get_posterior(svi.get_params(state))
        report(seconds, exact.from_cholesky(np.asarray(joint.loc, "f8"), np.asarray(joint.scale_tril, "f8"), args.dim), means, found)


def nuts(x: np.ndarray, args: argparse.Namespace) -> None:
    """NUTS with its defaults; warm-up and compilation are counted."""
    means, found = x.mean(1, dtype="f8"), exact.statistics(iter([x.astype(float)]))
    mcmc = MCMC(NUTS(make_model(x)), num_warmup=args.steps, num_samples=DRAWS, progress_bar=False)
    began, evaluating = time.perf_counter(), 0.0
    mcmc.warmup(jax.random.PRNGKey(args.seed))
    key, count = jax.random.PRNGKey(args.seed + 1), 0
    sums = [np.zeros(1)] * 5
    for _ in range(args.checkpoints):
        mcmc.run(key)
        jax.block_until_ready(mcmc.last_state)
        paused = time.perf_counter()
        mu, theta = (np.asarray(mcmc.get_samples()[name], "f8") for name in ("mu", "theta"))
        count += len(mu)
        # Moments about the groups' means and the origin of mu lose nothing in float64: all values are of order one.
        new = (mu.sum(0), (mu**2).sum(0), theta.sum(0), (theta**2).sum(0), (theta * mu[:, None]).sum(0))
        sums = [old + part for old, part in zip(sums, new, strict=True)]
        m, mm, t, tt, tm = (total / count for total in sums)
        q = exact.GaussianGuide(m, mm - m**2, t, tt - t**2, tm - t * m)
        report(paused - began - evaluating, q, means, found)
        mcmc.post_warmup_state = mcmc.last_state
        key = mcmc.post_warmup_state.rng_key
        evaluating += time.perf_counter() - paused


def main() -> None:
    """Train or sample, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--guide", choices=["multivariate", "nuts"], required=True)
    for name, default in {"groups": 200, "per-group": 50, "dim": 8, "steps": 2000, "checkpoints": 20, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=1e-2)
    args = parser.parse_args()
    x = exact.simulate(args.groups, args.per_group, args.dim, args.seed, SCALES)
    (multivariate if args.guide == "multivariate" else nuts)(x, args)


if __name__ == "__main__":
    main()
