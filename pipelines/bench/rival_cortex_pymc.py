"""Rival in PyMC of the cortical study: mean-field ADVI in float32, full batch. What it prints and how it begins: `pipelines.bench.rival_cortex`."""

from __future__ import annotations

import math

import numpy as np
import pymc as pm
import pytensor
import pytensor.tensor as pt

from pipelines.bench import rival_cortex
from pipelines.bench.rival_cortex import LOGIT_SCALE, NETWORKS, Data


def make_model(data: Data) -> pm.Model:
    """The model of `pipelines.hcp.study` with all data."""
    shapes, features = data.shapes, data.x.shape[-1]
    x, square = pytensor.shared(data.x, "x", borrow=True), pytensor.shared(data.square, "square", borrow=True)
    with pm.Model() as model:
        mu = pm.Normal("mu", 0.0, 1.0, shape=shapes["mu"])
        eps = pm.HalfNormal("eps", 0.5, shape=NETWORKS)
        sigma = pm.HalfNormal("sigma", 0.5, shape=NETWORKS)
        kappa = pm.LogNormal("kappa", 0.0, 1.0)
        mu_subject = pm.Normal("mu_subject", mu, eps[:, None], shape=shapes["mu_subject"])
        mu_session = pm.Normal("mu_session", mu_subject[:, None], sigma[:, None], shape=shapes["mu_session"])
        rho = pm.Normal("rho", 0.0, LOGIT_SCALE, shape=shapes["rho"])
        logits = pm.Normal("label_logits", rho, 1.0, shape=shapes["label_logits"])
        product = pt.matmul(x, mu_session.swapaxes(-1, -2))
        away = square[..., None] - 2 * product + (mu_session**2).sum(-1)[:, :, None]
        evidence = -0.5 * away / kappa**2 - features * (pt.log(kappa) + np.float32(0.5 * math.log(2 * math.pi)))
        pm.Potential("x", pt.logsumexp(pt.special.log_softmax(logits, axis=-1)[:, None] + evidence, axis=-1).sum())
    return model


def place(approx: pm.MeanField, begin: dict[str, np.ndarray]) -> None:
    """Set the guide's means and standard deviations where training begins. Positive latents lie there as their logarithms."""
    flat = np.empty(approx.ddim, "f4")
    for name, part, *_ in approx.ordering.values():
        latent = name.removesuffix("_log__")
        flat[part] = (np.log(begin[latent]) if name != latent else begin[latent]).ravel()
    approx.params_dict["mu"].set_value(flat)
    approx.params_dict["rho"].set_value(np.full_like(flat, math.log(math.expm1(rival_cortex.SCALE))))


def main() -> None:
    """Train, and print."""
    args = rival_cortex.options(__doc__)
    pytensor.config.floatX = "float32"
    cohort = rival_cortex.load(args.cohort)
    shapes = cohort.shapes
    lr = pytensor.shared(np.float32(args.lr), "lr")
    with make_model(cohort):
        inference = pm.ADVI(random_seed=args.seed)
    approx = inference.approx
    place(approx, rival_cortex.start(cohort, args.seed))
    step = inference.objective.step_function(obj_optimizer=pm.adam(learning_rate=lr), score=True)
    # Numba compiles at the first call, which is therefore a step of its own, at rate zero and not counted.
    lr.set_value(np.float32(0.0))
    step()

    def advance(first: int) -> float:
        total = 0.0
        for k in range(first, first + args.every):
            lr.set_value(np.float32(rival_cortex.rate(k, args.lr, args.steps)))
            total -= float(step())
        return total / args.every

    outcome = rival_cortex.train(advance, args)

    def moments(name: str) -> tuple[np.ndarray, np.ndarray]:
        part = approx.ordering[name][1]
        mean, rho = (approx.params_dict[which].get_value(borrow=True)[part] for which in ("mu", "rho"))
        return mean.reshape(shapes[name]), np.logaddexp(rho, np.float32(0)).reshape(shapes[name])

    rival_cortex.finish(outcome, args.cohort, moments)


if __name__ == "__main__":
    main()
