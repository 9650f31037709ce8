"""Linear-Gaussian models written twice: for the package, and unit by unit as one joint Gaussian for NumPy."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import xarray as xr
from scipy.stats import multivariate_normal
from torch.distributions import HalfNormal, MultivariateNormal, Normal

import pavi_scale as ps
from pavi_scale.cohort import open_cohort
from pavi_scale.computation import StudyComputation
from pavi_scale.plates import Selection
from pavi_scale.study import prepare


class LinearGaussian:
    """Scalars added one at a time: each is N(constant + sum of coefficient * earlier scalar, sd^2)."""

    def __init__(self):
        self.at, self.rows = {}, []

    def add(self, key, constant, terms, sd):
        self.at[key] = len(self.rows)
        self.rows.append((float(constant), [(self.at[k], c) for k, c in terms], float(sd)))

    def joint(self):
        """Mean and covariance of everything."""
        n = len(self.rows)
        mean, mixing = np.zeros(n), np.zeros((n, n))
        for i, (constant, terms, sd) in enumerate(self.rows):
            mean[i] = constant + sum(c * mean[j] for j, c in terms)
            mixing[i] = sum((c * mixing[j] for j, c in terms), np.zeros(n))
            mixing[i, i] += sd
        return mean, mixing @ mixing.T

    def posterior(self, data):
        """Log evidence of `data` {key: value}; keys, mean and covariance of all the rest."""
        mean, cov = self.joint()
        seen = [self.at[k] for k in data]
        rest = [i for k, i in self.at.items() if k not in data]
        x = np.array(list(data.values()))
        evidence = multivariate_normal(mean[seen], cov[np.ix_(seen, seen)]).logpdf(x)
        gain = np.linalg.solve(cov[np.ix_(seen, seen)], cov[np.ix_(seen, rest)]).T
        keys = [k for k in self.at if k not in data]
        return evidence, keys, mean[rest] + gain @ (x - mean[seen]), cov[np.ix_(rest, rest)] - gain @ cov[np.ix_(seen, rest)]


@dataclass(frozen=True)
class Case:
    """One model, its cohort, and the same model as a joint Gaussian given the root variables."""

    model: ps.Model
    cohort: xr.Dataset
    brute: Callable[[float, float], LinearGaussian]  # (mu, s) -> all ground scalars
    elementwise: bool = False

    @property
    def latents(self):
        """Names of the local latents."""
        return {v.name for v in self.model.latents if v.plates}

    def data(self):
        """Observed scalars, {(variable, *position): value}; NaN left out."""
        out = {}
        for v in self.model.of_kind("observed"):
            x = self.cohort[v.name].transpose(*v.plates, *v.dims).values
            out.update({(v.name, *i): x[i] for i in np.ndindex(*x.shape) if not np.isnan(x[i])})
        return out

    def evidence(self, z):
        """Log evidence given the root at unconstrained z = (mu, log s)."""
        return self.brute(z[0], np.exp(z[1])).posterior(self.data())[0]


def _roots():
    return {"mu": ps.latent(lambda: Normal(0.0, 1.0)), "s": ps.latent(lambda: HalfNormal(1.0))}


def _child(child, parent, positions):
    return {f"{child}_{parent}": ((child,), np.array(positions), {"instance_dimension": parent})}


def ragged():
    """One level, a covariate, a county without houses, an observation of the roots alone."""
    county = [0, 0, 0, 1, 3, 3]
    floor = np.array([0.0, 1.0, 1.0, 0.5, -1.0, 0.2])
    model = ps.Model(
        ps.Plate("county"),
        ps.Plate("house", within="county"),
        ps.Plate("extra"),
        **_roots(),
        floor=ps.covariate(plates="house"),
        alpha=ps.latent(lambda mu, s: Normal(mu, s), plates="county"),
        y=ps.observed(lambda alpha, floor, mu: Normal(alpha + mu * floor, 0.7), plates="house"),
        e=ps.observed(lambda mu: Normal(mu, 1.5), plates="extra"),
    )
    rng = np.random.default_rng(1)
    cohort = xr.Dataset(
        {
            "floor": ("house", floor),
            "y": ("house", rng.normal(size=6)),
            "e": ("extra", rng.normal(size=2)),
            "area": ("county", np.zeros(4)),
            **_child("house", "county", county),
        }
    )

    def brute(mu, s):
        g = LinearGaussian()
        for c in range(4):
            g.add(("alpha", c), mu, [], s)
        for h in range(6):
            g.add(("y", h), mu * floor[h], [(("alpha", county[h]), 1.0)], 0.7)
        for i in range(2):
            g.add(("e", i), mu, [], 1.5)
        return g

    return Case(model, cohort, brute)


def masked():
    """As `ragged`, with observations missing: one house of a county, and all of another."""
    case = ragged()
    y = case.cohort["y"].values.copy()
    y[[0, 3]] = np.nan
    variables = {n: v for n, v in case.model.variables.items() if n != "y"}
    y_law = ps.observed(lambda alpha, floor, mu: Normal(alpha + mu * floor, 0.7), plates="house", missing="mask")
    return Case(ps.Model(*case.model.plates.values(), **variables, y=y_law), case.cohort.assign(y=("house", y)), case.brute)


def two_latents():
    """Two latents of a block, one the other's parent."""
    group, t = [0, 0, 1, 1, 1, 2], np.array([0.0, 1.0, -1.0, 2.0, 0.5, 1.0])
    model = ps.Model(
        ps.Plate("group"),
        ps.Plate("obs", within="group"),
        **_roots(),
        t=ps.covariate(plates="obs"),
        a=ps.latent(lambda mu, s: Normal(mu, s), plates="group"),
        b=ps.latent(lambda a: Normal(0.5 * a, 0.7), plates="group"),
        y=ps.observed(lambda a, b, t: Normal(a + b * t, 0.4), plates="obs"),
    )
    cohort = xr.Dataset({"t": ("obs", t), "y": ("obs", np.random.default_rng(2).normal(size=6)), **_child("obs", "group", group)})

    def brute(mu, s):
        g = LinearGaussian()
        for i in range(3):
            g.add(("a", i), mu, [], s)
            g.add(("b", i), 0.0, [(("a", i), 0.5)], 0.7)
        for i in range(6):
            g.add(("y", i), 0.0, [(("a", group[i]), 1.0), (("b", group[i]), t[i])], 0.4)
        return g

    return Case(model, cohort, brute)


def three_levels():
    """Ragged, three levels deep, children that read parents and grandparents."""
    county, house, obs = [0, 0, 1], [0, 0, 1, 2, 2], [0, 1, 1, 2, 3, 4, 4, 4]
    model = ps.Model(
        ps.Plate("region"),
        ps.Plate("county", within="region"),
        ps.Plate("house", within="county"),
        ps.Plate("obs", within="house"),
        **_roots(),
        r=ps.latent(lambda mu: Normal(mu, 1.0), plates="region"),
        c=ps.latent(lambda r, s: Normal(r, s), plates="county"),
        h=ps.latent(lambda c, r: Normal(c + 0.3 * r, 0.5), plates="house"),
        y=ps.observed(lambda h, c, r: Normal(h + 0.2 * c - 0.4 * r, 0.3), plates="obs"),
    )
    cohort = xr.Dataset(
        {
            "y": ("obs", np.random.default_rng(3).normal(size=8)),
            **_child("county", "region", county),
            **_child("house", "county", house),
            **_child("obs", "house", obs),
        }
    )

    def brute(mu, s):
        g = LinearGaussian()
        for i in range(2):
            g.add(("r", i), mu, [], 1.0)
        for i, r in enumerate(county):
            g.add(("c", i), 0.0, [(("r", r), 1.0)], s)
        for i, c in enumerate(house):
            g.add(("h", i), 0.0, [(("c", c), 1.0), (("r", county[c]), 0.3)], 0.5)
        for i, h in enumerate(obs):
            g.add(("y", i), 0.0, [(("h", h), 1.0), (("c", house[h]), 0.2), (("r", county[house[h]]), -0.4)], 0.3)
        return g

    return Case(model, cohort, brute)


def dense_events():
    """Dense plates, event dimension whose coordinates do not interact."""
    model = ps.Model(
        ps.Plate("subject"),
        ps.Plate("session"),
        ps.Plate("obs"),
        **_roots(),
        m=ps.latent(lambda mu, s: Normal(mu, s), plates="subject", dims="f"),
        w=ps.latent(lambda m: Normal(m, 0.6), plates=("subject", "session"), dims="f"),
        x=ps.observed(lambda w: Normal(w, 0.5), plates=("subject", "session", "obs"), dims="f"),
    )
    cohort = xr.Dataset({"x": (("subject", "session", "obs", "f"), np.random.default_rng(4).normal(size=(3, 2, 2, 3)))})

    def brute(mu, s):
        g = LinearGaussian()
        for i, f in np.ndindex(3, 3):
            g.add(("m", i, f), mu, [], s)
        for i, t, f in np.ndindex(3, 2, 3):
            g.add(("w", i, t, f), 0.0, [(("m", i, f), 1.0)], 0.6)
        for i, t, o, f in np.ndindex(3, 2, 2, 3):
            g.add(("x", i, t, o, f), 0.0, [(("w", i, t, f), 1.0)], 0.5)
        return g

    return Case(model, cohort, brute, elementwise=True)


def coupled_events():
    """An event dimension whose two coordinates are correlated a priori."""
    return _coupled(2, (0, 1))


def _coupled(size, pair):
    covariance = np.eye(size)
    covariance[pair] = covariance[pair[::-1]] = 0.8
    factor = np.linalg.cholesky(covariance)
    model = ps.Model(
        ps.Plate("group"),
        ps.Plate("obs"),
        **_roots(),
        t=ps.latent(lambda mu: MultivariateNormal(mu.expand(size), scale_tril=torch.tensor(factor, dtype=mu.dtype)), plates="group", dims="d"),
        x=ps.observed(lambda t, s: Normal(t, s), plates=("group", "obs"), dims="d"),
    )
    cohort = xr.Dataset({"x": (("group", "obs", "d"), np.random.default_rng(5).normal(size=(2, 3, size)))})

    def brute(mu, s):
        g = LinearGaussian()
        for i in range(2):
            for d in range(size):
                g.add(("noise", i, d), 0.0, [], 1.0)
            for d in range(size):
                g.add(("t", i, d), mu, [(("noise", i, k), factor[d, k]) for k in range(d + 1)], 0.0)
        for i, o, d in np.ndindex(2, 3, size):
            g.add(("x", i, o, d), 0.0, [(("t", i, d), 1.0)], s)
        return g

    return Case(model, cohort, brute)


def crossed():
    """Ratings cross students with lecturers: one block is eliminated, the other is dense."""
    student, lecturer, slope = [0, 0, 1, 2, 2, 2], [0, 1, 1, 0, 2, 3], np.array([1.0, 0.5, -1.0, 2.0, 1.0, 0.3])
    model = ps.Model(
        ps.Plate("student"),
        ps.Plate("lecturer"),
        ps.Plate("rating", within=("student", "lecturer")),
        **_roots(),
        slope=ps.covariate(plates="rating"),
        a=ps.latent(lambda mu, s: Normal(mu, s), plates="student"),
        b=ps.latent(lambda: Normal(0.0, 0.8), plates="lecturer"),
        r=ps.observed(lambda a, b, slope: Normal(a + slope * b, 0.5), plates="rating"),
    )
    cohort = xr.Dataset(
        {
            "slope": ("rating", slope),
            "r": ("rating", np.random.default_rng(6).normal(size=6)),
            **_child("rating", "student", student),
            **_child("rating", "lecturer", lecturer),
        }
    )

    def brute(mu, s):
        g = LinearGaussian()
        for i in range(3):
            g.add(("a", i), mu, [], s)
        for i in range(4):
            g.add(("b", i), 0.0, [], 0.8)
        for i in range(6):
            g.add(("r", i), 0.0, [(("a", student[i]), 1.0), (("b", lecturer[i]), slope[i])], 0.5)
        return g

    return Case(model, cohort, brute)


def crossed_events():
    """Dense crossed plates below a third, with two event coordinates."""
    model = ps.Model(
        ps.Plate("g"),
        ps.Plate("a"),
        ps.Plate("b"),
        **_roots(),
        u=ps.latent(lambda mu, s: Normal(mu, s), plates="g", dims="f"),
        v=ps.latent(lambda u: Normal(0.5 * u, 0.9), plates=("g", "a"), dims="f"),
        w=ps.latent(lambda: Normal(0.0, 0.6), plates=("b", "g"), dims="f"),
        x=ps.observed(lambda u, v, w: Normal(u + v - w, 0.4), plates=("g", "a", "b"), dims="f"),
    )
    cohort = xr.Dataset({"x": (("g", "a", "b", "f"), np.random.default_rng(7).normal(size=(2, 2, 3, 2)))})

    def brute(mu, s):
        g = LinearGaussian()
        for i, f in np.ndindex(2, 2):
            g.add(("u", i, f), mu, [], s)
        for i, a, f in np.ndindex(2, 2, 2):
            g.add(("v", i, a, f), 0.0, [(("u", i, f), 0.5)], 0.9)
        for b, i, f in np.ndindex(3, 2, 2):
            g.add(("w", b, i, f), 0.0, [], 0.6)
        for i, a, b, f in np.ndindex(2, 2, 3, 2):
            g.add(("x", i, a, b, f), 0.0, [(("u", i, f), 1.0), (("v", i, a, f), 1.0), (("w", b, i, f), -1.0)], 0.4)
        return g

    return Case(model, cohort, brute, elementwise=True)


def swapped_axes():
    """One block whose latents name their plates in different orders, under a ragged plate crossed with a dense one."""
    county = [0, 0, 1]
    model = ps.Model(
        ps.Plate("county"),
        ps.Plate("house", within="county"),
        ps.Plate("year"),
        **_roots(),
        p=ps.latent(lambda mu, s: Normal(mu, s), plates=("county", "year")),
        q=ps.latent(lambda p: Normal(-p, 0.5), plates=("year", "county")),
        y=ps.observed(lambda p, q: Normal(p + 2.0 * q, 0.6), plates=("year", "house")),
    )
    cohort = xr.Dataset({"y": (("year", "house"), np.random.default_rng(8).normal(size=(2, 3))), **_child("house", "county", county)})

    def brute(mu, s):
        g = LinearGaussian()
        for c, t in np.ndindex(2, 2):
            g.add(("p", c, t), mu, [], s)
        for t, c in np.ndindex(2, 2):
            g.add(("q", t, c), 0.0, [(("p", c, t), -1.0)], 0.5)
        for t, h in np.ndindex(2, 3):
            g.add(("y", t, h), 0.0, [(("p", county[h], t), 1.0), (("q", t, county[h]), 2.0)], 0.6)
        return g

    return Case(model, cohort, brute)


CASES = {f.__name__: f for f in (ragged, masked, two_latents, three_levels, dense_events, coupled_events, crossed, crossed_events, swapped_axes)}
POINTS = np.array([[0.3, -0.4], [-1.0, 0.5], [0.0, 0.0]])  # root points (mu, log s)


@cache
def case(name):
    """A case by name, made once."""
    return CASES[name]()


@cache
def computation(name):
    """A case's study, made once."""
    return compute(case(name).model, case(name).cohort)


def compute(model, cohort, **options):
    """The computation of a model on a cohort, as `fit` prepares it."""
    study = prepare(open_cohort(cohort, model), **options)
    return StudyComputation(study.graph, study.cohort, study.settings)


def whole(study):
    """The reduced model of everything."""
    return study.reduced(Selection.whole(study.layout))


def flatten(values, model, keys):
    """Latent values `{name: Value}` as `[K, len(keys)]` in the order of keys (variable, *position)."""
    arrays = {}
    for v in model.latents:
        if v.name in values and v.plates:
            value = values[v.name]
            order = [0, *(1 + value.plates.index(p) for p in v.plates), *range(1 + len(v.plates), value.theta.ndim)]
            arrays[v.name] = value.theta.permute(order).detach().numpy()
    return np.stack([arrays[k[0]][(slice(None), *k[1:])] for k in keys], -1)


def sigma_noise(guide, reduced):
    """Noise whose K = 2 T particles have mean zero and unit covariance exactly: whatever is affine in it has exact sample moments."""
    sizes = [reduced.count(b.plates) * b.dim for b in guide.blocks]
    total = sum(sizes)
    points = np.sqrt(total) * np.concatenate([np.eye(total), -np.eye(total)])
    parts = dict(zip([b.name for b in guide.blocks], np.split(points, np.cumsum(sizes)[:-1], 1), strict=True))

    def noise(block, shape):
        return torch.from_numpy(parts[block.name].reshape(shape))

    return noise, 2 * total
