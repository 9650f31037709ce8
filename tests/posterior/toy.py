"""An analytic guide: every latent is a shifted, scaled counter-based normal of its ground index and the draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import xarray as xr
from torch.distributions import Normal

from pavi_scale.model.template import Model, covariate, latent, observed
from pavi_scale.plates import Layout, Plate
from pavi_scale.posterior.sampler import Context
from pavi_scale.rng import normal, stream

SUBJECTS, VERTICES, NETWORKS, VISITS = 4, 10, 3, 7
LABELS = np.array(["anna", "bert", "cleo", "dörte"])

model = Model(
    Plate("subject"),
    Plate("vertex"),
    Plate("visit", within="subject"),
    sizes={"network": NETWORKS},
    mu=latent(lambda: Normal(0.0, 1.0)),
    kappa=latent(lambda: Normal(0.0, 1.0), dims="network"),
    theta=latent(lambda mu: Normal(mu, 1.0), plates="subject"),
    logits=latent(lambda kappa: Normal(kappa, 1.0), plates=("subject", "vertex"), dims="network"),
    age=covariate(plates="visit"),
    score=observed(lambda theta, age: Normal(theta + age, 1.0), plates="visit"),
)


def shapes() -> dict[str, tuple[int, ...]]:
    return {"mu": (), "kappa": (NETWORKS,), "theta": (SUBJECTS,), "logits": (SUBJECTS, VERTICES, NETWORKS)}


def mean(name: str) -> np.ndarray:
    shape = shapes()[name]
    return np.arange(np.prod(shape, dtype=int)).reshape(shape) / 3 + 1


def sd(name: str) -> np.ndarray:
    return 0.5 + 0.1 * mean(name)


@dataclass(frozen=True)
class ToySampler:
    """theta = mean + sd * normal(key of the variable, draw, *ground index)."""

    seed: int = 0
    sizes: tuple[tuple[str, int], ...] = (("subject", SUBJECTS), ("vertex", VERTICES), ("visit", VISITS))

    def draw(self, names: Sequence[str], draws: np.ndarray, units: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        for positions in (draws, *units.values()):
            assert positions.dtype == np.int64
            assert (np.diff(positions) > 0).all()
        out = {}
        for name in names:
            v = model.variables[name]
            axes = [units.get(p, np.arange(dict(self.sizes)[p])) for p in v.plates] + [np.arange(NETWORKS) for _ in v.dims]
            grid = np.ix_(draws, *axes)
            where = np.ix_(*axes) if axes else ()
            out[name] = mean(name)[where] + sd(name)[where] * normal(stream(self.seed, name), *grid)
        return out

    def elbo(self, particles: int, seed: int) -> tuple[float, float]:
        values = normal(stream(seed, "elbo"), np.arange(particles))
        return float(values.mean() - 10), float(values.std() / np.sqrt(particles))

    def with_seed(self, seed: int) -> ToySampler:
        return replace(self, seed=seed)


def cohort() -> xr.Dataset:
    rng = np.random.default_rng(0)
    return xr.Dataset(
        {
            "score": ("visit", rng.normal(size=VISITS)),
            "age": ("visit", rng.normal(size=VISITS)),
            "subject_of_visit": ("visit", np.array([0, 0, 1, 2, 2, 3, 3]), {"instance_dimension": "subject"}),
            "unrelated": ("vertex", np.zeros(VERTICES)),
        },
        coords={"subject": LABELS},
    )


def context(run_path: str = "", given: Model | None = None) -> Context:
    data = cohort()
    layout = Layout(model.plates, {"subject": SUBJECTS, "vertex": VERTICES, "visit": VISITS}, {("visit", "subject"): data["subject_of_visit"].values})
    return Context(ToySampler(), model, data, layout, {"network": NETWORKS}, {"subject": LABELS})


def fill(writer, variables=("mu", "kappa", "theta", "logits")) -> None:
    """Write the exact moments, shard by shard."""
    for name in variables:
        unit = writer.unit(name)
        plates = model.variables[name].plates
        regions = [{}]
        for plate in plates:
            size = dict(ToySampler().sizes)[plate]
            regions = [{**r, plate: slice(a, min(a + unit[plate], size))} for r in regions for a in range(0, size, unit[plate])]
        for region in regions:
            part = tuple(region[p] for p in plates)
            writer.write(name, region, mean(name)[part], sd(name)[part])
