"""The rival of `mixture` in NumPyro: restarts of its full-rank normal guide on each cohort of a file. One JSON line per cohort."""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax.flatten_util import ravel_pytree
from numpyro.infer import SVI, Trace_ELBO, autoguide

COMPONENTS = 3
RATE, STEPS, PARTICLES = 2e-2, 4000, 4
JUDGED = 1000  # particles of one estimate of the bound
ESTIMATES = 20  # such estimates of the best restart
DRAWS = 4000  # of the best restart


def model(x: jax.Array) -> None:
    """The model of `pipelines.gm`, labels summed out; x `[G, N, D]`."""
    groups, observations, features = x.shape
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0).expand((COMPONENTS, features)).to_event(2))
    with numpyro.plate("group", groups, dim=-2):
        weight = numpyro.sample("weight", dist.Dirichlet(jnp.ones(COMPONENTS)))
        mu_group = numpyro.sample("mu_group", dist.Normal(mu, 0.2).to_event(2))
        with numpyro.plate("observation", observations, dim=-1):
            numpyro.sample("x", dist.MixtureSameFamily(dist.Categorical(weight), dist.Normal(mu_group, 0.05).to_event(1)), obs=x)


def prior_draw(groups: int, features: int, key: jax.Array) -> jax.Array:
    """A draw of the prior in the guide's flat coordinates, `[d]`."""
    first, second, third = jax.random.split(key, 3)
    mu = jax.random.normal(first, (COMPONENTS, features))
    mu_group = mu + 0.2 * jax.random.normal(second, (groups, 1, COMPONENTS, features))
    weight = dist.transforms.StickBreakingTransform().inv(jax.random.dirichlet(third, jnp.ones(COMPONENTS), (groups, 1)))
    return ravel_pytree({"mu": mu, "mu_group": mu_group, "weight": weight})[0]


class Rival:
    """Restarts of `AutoMultivariateNormal` from prior draws, all at once; compiled at the first cohort."""

    def __init__(self, restarts: int, shape: tuple[int, ...], steps: int) -> None:
        self.restarts, self.steps = restarts, steps
        self.svi = SVI(model, autoguide.AutoMultivariateNormal(model), optax.adam(optax.cosine_decay_schedule(RATE, steps)), Trace_ELBO(PARTICLES))
        self.state = self.svi.init(jax.random.PRNGKey(0), jnp.zeros(shape))
        self.draw = partial(prior_draw, shape[0], shape[2])
        self.train = jax.jit(jax.vmap(self._train, (0, None)))
        self.elbos = jax.jit(jax.vmap(self._elbo, (0, 0, None)))

    def _train(self, key: jax.Array, x: jax.Array) -> Any:
        first, second = jax.random.split(key)
        start = {**self.svi.optim.get_params(self.state.optim_state), "auto_loc": self.draw(first)}
        state = type(self.state)(self.svi.optim.init(start), self.state.mutable_state, second)
        return self.svi.get_params(jax.lax.fori_loop(0, self.steps, lambda _, s: self.svi.stable_update(s, x)[0], state))

    def _elbo(self, key: jax.Array, params: Any, x: jax.Array) -> jax.Array:
        return -Trace_ELBO(JUDGED).loss(key, params, model, self.svi.guide, x)

    def fit(self, x: jax.Array, seed: int) -> dict[str, Any]:
        """Median ELBO of the restarts, the best one's with its standard error from fresh particles, and mean and sd of its `mu_group` `[G, k, D]`."""
        began = time.perf_counter()
        first, second, third = jax.random.split(jax.random.PRNGKey(seed), 3)
        params = self.train(jax.random.split(first, self.restarts), x)
        found = np.nan_to_num(np.asarray(self.elbos(jax.random.split(second, self.restarts), params, x), "f8"), nan=-np.inf)
        chosen = jax.tree.map(lambda p: jnp.repeat(p[found.argmax()][None], ESTIMATES, 0), params)
        again = np.asarray(self.elbos(jax.random.split(third, ESTIMATES), chosen, x), "f8")
        draws = self.svi.guide.sample_posterior(third, jax.tree.map(lambda p: p[0], chosen), sample_shape=(DRAWS,))["mu_group"][:, :, 0]
        best = {"best": float(again.mean()), "error": float(again.std(ddof=1) / np.sqrt(ESTIMATES)), "median": float(np.median(found))}
        moments = {"mean": np.asarray(draws.mean(0)).tolist(), "sd": np.asarray(draws.std(0)).tolist()}
        return {"seed": seed, **best, **moments, "seconds": time.perf_counter() - began}


def main() -> None:
    """Fit and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cohorts", type=Path, required=True, help=".npy of [cohort, group, observation, feature]")
    parser.add_argument("--restarts", type=int, default=20)
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    x = np.load(args.cohorts).astype("f4")
    rival = Rival(args.restarts, x.shape[1:], args.steps)
    for seed, one in enumerate(x):
        print(json.dumps(rival.fit(jnp.asarray(one), seed)), flush=True)


if __name__ == "__main__":
    main()
