"""`status` on fits that are good, and on fits made bad on purpose."""

import numpy as np
import pytest
import torch
import xarray as xr
from torch.distributions import Bernoulli, HalfNormal, Normal, Poisson

import pavi_scale as ps
from pavi_scale import training
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


counts = ps.Model(
    ps.Plate("group"),
    ps.Plate("obs", within="group"),
    mu=ps.latent(lambda: Normal(0.0, 10.0)),
    s=ps.latent(lambda: HalfNormal(1.0)),
    a=ps.latent(lambda mu, s: Normal(mu, s), plates="group"),
    y=ps.observed(lambda a: Poisson(torch.exp(a)), plates="obs"),
)


def counted(groups):
    rng, of = np.random.default_rng(0), np.repeat(np.arange(groups), 5)
    y = rng.poisson(np.exp(rng.normal(size=groups))[of]).astype(float)
    return xr.Dataset({"y": ("obs", y), "group_of": ("obs", of, {"instance_dimension": "group"})})


def root_of(posterior):
    means, sds = (posterior.datatree[g] for g in ("posterior_mean", "posterior_sd"))
    return tuple(np.array([float(t[n]) for n in ("mu", "s")]) for t in (means, sds))


def test_many_groups_are_ok():
    """Of as many groups, time allows for fewer points of the root than would count as a converged refit."""
    posterior = ps.fit(counts, counted(8_000), progress=False)
    assert posterior.status == "ok"
    assert (np.abs(root_of(posterior)[0] - [0.0, 1.0]) < [0.04, 0.03]).all()


@pytest.mark.parametrize("points", [32, 150])
def test_few_points_find_the_root_that_many_find(points, monkeypatch):
    cohort = counted(500)
    mean, sd = root_of(ps.fit(counts, cohort, progress=False))
    cost = []
    monkeypatch.setattr(training.Trainer, "cost", lambda self, weighted, whole=training.Trainer.cost: cost.append(whole(self, weighted)) or cost[-1])
    ps.fit(counts, cohort, progress=False)
    monkeypatch.setattr(training, "REFIT_SECONDS", points * cost[-1])
    few = ps.fit(counts, cohort, progress=False)
    assert few.status == "ok"
    near, width = root_of(few)
    assert (np.abs(near - mean) < 0.15 * sd).all()
    np.testing.assert_allclose(width, sd, rtol=0.15)


def test_a_search_that_stopped_early_is_unconverged_all_the_same(monkeypatch):
    """However near q(root) is brought afterwards."""
    monkeypatch.setattr(training, "REFIT_SECONDS", 0.0)
    monkeypatch.setattr(training, "polish", lambda *given, whole=training.polish: (*whole(*given)[:2], False))
    assert ps.fit(counts, counted(200), progress=False).status == "unconverged"
