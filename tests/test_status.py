"""`status` on fits that are good, and on fits made bad on purpose."""

import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli, HalfNormal, Normal, Poisson

import pavi_scale as ps
from pipelines import eight_schools, gm, gre, nc


def plates(**laws):
    return ps.Model(ps.Plate("group"), ps.Plate("obs"), sizes={"axis": 2}, **laws)


INTERCEPTS = {
    "mu": ps.latent(lambda: Normal(0.0, 1.0)),
    "tau": ps.latent(lambda: HalfNormal(1.0)),
    "theta": ps.latent(lambda mu, tau: Normal(mu, tau), plates="group"),
}
UNITS = ("group", "obs")
bernoulli = plates(**INTERCEPTS, y=ps.observed(lambda theta: Bernoulli(logits=theta), plates=UNITS))
poisson = plates(**INTERCEPTS, y=ps.observed(lambda theta: Poisson(theta.exp()), plates=UNITS))
normal = plates(**INTERCEPTS, y=ps.observed(lambda theta: Normal(theta, 1.0), plates=UNITS))
# The sign of every local (and of the root) is lost in the data: two equal modes, of which a normal guide has one.
local_signs = plates(
    mu=ps.latent(lambda: Normal(0.0, 0.1)),
    theta=ps.latent(lambda mu: Normal(mu, 1.0), plates="group"),
    y=ps.observed(lambda theta: Normal(theta**2, 0.1), plates=UNITS),
)
root_sign = plates(mu=ps.latent(lambda: Normal(0.0, 10.0)), y=ps.observed(lambda mu: Normal(mu**2, 0.3), plates=UNITS))
# A ring: the local posterior given its parents is no normal, nor close to one.
ring = plates(
    mu=ps.latent(lambda: Normal(0.0, 0.1)),
    theta=ps.latent(lambda mu: Normal(mu + torch.zeros(2), 1.0), plates="group", dims="axis"),
    y=ps.observed(lambda theta: Normal(theta.square().sum(-1).sqrt(), 0.05), plates=UNITS),
)

GOOD = {
    "bernoulli": (bernoulli, {"group": 40, "obs": 8}),
    "poisson": (poisson, {"group": 40, "obs": 5}),
    "normal": (normal, {"group": 30, "obs": 5}),
    "funnel": (normal, {"group": 8, "obs": 1}),
    "gaussian random effects": (gre.model, {"group": 30, "observation": 50, "feature": 2}),
    "mixture": (gm.model, {"group": 3, "observation": 50, "feature": 2}),
    "laplace children": (nc.model, {"group": 10, "observation": 10, "feature": 2}),
}
BAD = {
    "two modes of each local": (local_signs, {"group": 10, "obs": 5}),
    "two modes of the root": (root_sign, {"group": 5, "obs": 10}),
    "rings": (ring, {"group": 10, "obs": 5}),
}


def simulated(model, sizes):
    truth = model.sample(sizes=sizes, seed=0)
    return truth[[v.name for v in model.of_kind("observed")]]


@pytest.mark.parametrize("name", GOOD)
def test_a_good_fit_is_ok(name):
    model, sizes = GOOD[name]
    assert ps.fit(model, simulated(model, sizes), progress=False).status == "ok"


def test_eight_schools_is_ok():
    assert ps.fit(eight_schools.model, eight_schools.make_cohort(), progress=False).status == "ok"


@pytest.mark.parametrize("name", BAD)
def test_a_fit_of_the_wrong_family_is_unreliable(name):
    model, sizes = BAD[name]
    cohort = simulated(model, sizes)
    assert float(np.abs(cohort["y"]).mean()) > 0.3  # the data speak of a size
    assert ps.fit(model, cohort, progress=False).status == "unreliable"


@pytest.mark.parametrize("name", ["bernoulli", "mixture"])
def test_a_fit_cut_short_is_not_ok(name):
    model, sizes = GOOD[name]
    assert ps.fit(model, simulated(model, sizes), progress=False, max_time=1e-3).status in {"unconverged", "unreliable"}
