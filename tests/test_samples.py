"""Samples that stand for the whole: unbiased, read from few chunks, and only where a fit begins."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr
from torch.distributions import Normal

import pavi_scale as ps
from pavi_scale.cohort import open_cohort
from pavi_scale.computation import StudyComputation
from pavi_scale.marginal import ascend
from pavi_scale.samples import draw_sample, sample_sizes
from pavi_scale.study import prepare

GROUPS, EACH = 60_000, 4

model = ps.Model(
    ps.Plate("group"),
    ps.Plate("item", within="group"),
    mu=ps.latent(lambda: Normal(0.0, 1.0)),
    theta=ps.latent(lambda mu: Normal(mu, 0.5), plates="group"),
    x=ps.observed(lambda theta: Normal(theta, 1.0), plates="item"),
)


@pytest.fixture(scope="module")
def cohort() -> xr.Dataset:
    index = xr.DataArray(np.repeat(np.arange(GROUPS), EACH), dims="item", attrs={"instance_dimension": "group"})
    return model.sample(sizes={"group": GROUPS}, given=xr.Dataset({"item_group": index}), seed=1)


def computation(origin: object) -> StudyComputation:
    opened = open_cohort(origin, model)  # type: ignore[arg-type]
    study = prepare(opened)
    return StudyComputation(study.graph, opened, study.settings)


def bound(study: StudyComputation, tasks: list[dict[str, object]], points: np.ndarray) -> np.ndarray:
    answers = [study.compute("bound", {"points": points}, {**t, "gradient": False, "weighted": False, "seed": 0}) for t in tasks]
    return np.sum([a["bound"] for a in answers], axis=0)


def test_bound_of_samples_is_unbiased(cohort: xr.Dataset) -> None:
    study = computation(cohort)
    points = np.array([[0.0], [0.3]])
    whole = bound(study, [{"shard": ("group", 0, GROUPS, True)}], points)
    found = np.stack([bound(study, draw_sample(study, 500, seed).tasks(), points) for seed in range(60)])
    error = found.std(0, ddof=1) / np.sqrt(len(found))
    assert (np.abs(found.mean(0) - whole) < 3.5 * error).all()
    # The power of this: one whose units counted 2 % too little would be far outside.
    assert (np.abs(found.mean(0) * (490 / 500) - whole) > 3.5 * error).all()


def test_sample_of_a_store_is_made_of_runs(cohort: xr.Dataset, tmp_path: object) -> None:
    store = f"{tmp_path}/cohort.zarr"
    cohort.drop_encoding().to_zarr(store, encoding={"x": {"chunks": [4000]}, "theta": {"chunks": [1000]}}, zarr_format=3, consolidated=False)
    ragged = computation(store)
    sample = draw_sample(ragged, 500, 0)
    assert len(np.unique(sample.units)) == len(sample.units) >= 500
    whole = np.concatenate([t["sample"] for t in sample.tasks()])
    np.testing.assert_array_equal(whole, sample.units)


def test_sizes_do_not_grow_with_the_cohort() -> None:
    per_unit = 2e-6
    first = [sample_sizes(n, n * per_unit, 8) for n in (200_000, 2_000_000, 200_000_000)]
    assert first[0] == first[1] == first[2]
    assert len(first[0]) == 2
    assert sample_sizes(3000, 3000 * per_unit, 8) == []


def test_ascent_reaches_a_mode_from_a_poor_curvature() -> None:
    rng = np.random.default_rng(0)
    root = rng.normal(size=(5, 5))
    precision, mode = root @ root.T + 5 * np.eye(5), rng.normal(size=5)

    def quadratic(points: np.ndarray, gradient: bool) -> tuple[np.ndarray, np.ndarray]:
        away = points - mode
        return -0.5 * np.einsum("ki,ij,kj->k", away, precision, away), -away @ precision

    start = mode + 3 * rng.normal(size=5)
    found, reached = ascend(quadratic, start, np.linalg.inv(precision) * 1.3 + 0.01 * np.eye(5), 12, lambda *a: None)
    assert reached
    assert np.abs((found - mode) * np.sqrt(np.diagonal(precision))).max() < 0.02
    _, reached = ascend(quadratic, start, np.linalg.inv(precision) * 1.3 + 0.01 * np.eye(5), 1, lambda *a: None)
    assert not reached


def test_large_fit_is_exact(cohort: xr.Dataset) -> None:
    posterior = ps.fit(model, cohort, progress=False)
    trace = posterior.datatree["fit"].dataset
    assert trace.sizes["milestone"] >= 3  # a sample came before the whole
    assert (np.diff(trace["seconds"]) >= 0).all()
    means = cohort["x"].values.reshape(GROUPS, EACH).mean(1)
    variance = 0.25 + 1 / EACH
    precision = 1 + GROUPS / variance
    mean, sd = means.sum() / variance / precision, precision**-0.5
    assert abs(float(posterior.datatree["posterior_mean"]["mu"]) - mean) < 0.02 * sd
    assert float(posterior.datatree["posterior_sd"]["mu"]) == pytest.approx(sd, rel=0.02)
    assert abs(float(trace["root_loc"][0, 0]) - mean) < 10 * sd  # where the sample left it: about sqrt(60,000 / 13,000) sds off
    assert posterior.status == "ok"
    assert torch.get_default_dtype() == torch.float32
