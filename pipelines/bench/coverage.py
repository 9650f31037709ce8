"""Coverage and simulation-based calibration at thousands of groups: crossed, ragged, three-level and Bernoulli models drawn from their priors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch.distributions import Bernoulli, HalfNormal, Normal

import pavi_scale as ps
from pipelines.bench.meter import Found, Job, timing

DRAWS = 255
UNITS = 200  # local units looked at in each run, of each latent; SBC tests the first few
TESTED = 3
RUNS = 50
CENTRE, SCALE = ps.latent(lambda: Normal(0.0, 1.0)), ps.latent(lambda: HalfNormal(1.0))

Run = tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, Any]]  # ranks by latent, those of half the variance, facts of the fit


def _within(child: str, parent: str, index: np.ndarray) -> dict[str, Any]:
    return {f"{child}_{parent}": (child, index, {"instance_dimension": parent})}


def _lecturers(students: int) -> int:
    return max(2, students // 4)


def crossed(groups: int) -> tuple[ps.Model, xr.Dataset]:
    """Ratings of lecturers by students: 1 to 15 ratings a student, a quarter as many lecturers as students."""
    rng = np.random.default_rng(1)
    lecturers = _lecturers(groups)
    student = np.repeat(np.arange(groups), rng.integers(1, 16, groups))
    # Each lecturer is rated at least once.
    lecturer = np.concatenate([rng.permutation(lecturers), rng.integers(0, lecturers, len(student) - lecturers)])
    model = ps.Model(
        ps.Plate("student"), ps.Plate("lecturer"), ps.Plate("rating", within=("student", "lecturer")),
        mu=CENTRE, sd_student=SCALE, sd_lecturer=SCALE, sigma=SCALE,
        a=ps.latent(lambda sd_student: Normal(0.0, sd_student), plates="student"),
        b=ps.latent(lambda sd_lecturer: Normal(0.0, sd_lecturer), plates="lecturer"),
        y=ps.observed(lambda mu, a, b, sigma: Normal(mu + a + b, sigma), plates="rating"),
    )  # fmt: skip
    return model, xr.Dataset({**_within("rating", "student", student), **_within("rating", "lecturer", lecturer)})


def ragged(groups: int) -> tuple[ps.Model, xr.Dataset]:
    """Houses in counties, as in the radon study: 1 to 20 houses a county, one covariate."""
    rng = np.random.default_rng(2)
    county = np.repeat(np.arange(groups), rng.integers(1, 21, groups))
    model = ps.Model(
        ps.Plate("county"), ps.Plate("house", within="county"),
        mu_alpha=CENTRE, sigma_alpha=SCALE, beta=CENTRE, sigma_y=SCALE,
        floor=ps.covariate(plates="house"),
        alpha=ps.latent(lambda mu_alpha, sigma_alpha: Normal(mu_alpha, sigma_alpha), plates="county"),
        y=ps.observed(lambda alpha, beta, floor, sigma_y: Normal(alpha + beta * floor, sigma_y), plates="house"),
    )  # fmt: skip
    return model, xr.Dataset({**_within("house", "county", county), "floor": ("house", rng.integers(0, 2, len(county)).astype(float))})


def levels(groups: int) -> tuple[ps.Model, xr.Dataset]:
    """Pupils in classes in schools: 1 to 4 classes a school, 5 to 20 pupils a class."""
    rng = np.random.default_rng(3)
    school = np.repeat(np.arange(groups), rng.integers(1, 5, groups))
    room = np.repeat(np.arange(len(school)), rng.integers(5, 21, len(school)))
    model = ps.Model(
        ps.Plate("school"), ps.Plate("room", within="school"), ps.Plate("pupil", within="room"),
        mu=CENTRE, sd_school=SCALE, sd_room=SCALE, sigma=SCALE,
        a=ps.latent(lambda mu, sd_school: Normal(mu, sd_school), plates="school"),
        b=ps.latent(lambda a, sd_room: Normal(a, sd_room), plates="room"),
        y=ps.observed(lambda b, sigma: Normal(b, sigma), plates="pupil"),
    )  # fmt: skip
    return model, xr.Dataset({**_within("room", "school", school), **_within("pupil", "room", room)})


def bernoulli(groups: int) -> tuple[ps.Model, xr.Dataset]:
    """Yes or no answers with a random intercept: 2 to 20 answers a group, one covariate."""
    rng = np.random.default_rng(4)
    group = np.repeat(np.arange(groups), rng.integers(2, 21, groups))
    model = ps.Model(
        ps.Plate("group"), ps.Plate("answer", within="group"),
        mu=CENTRE, tau=SCALE, beta=CENTRE,
        x=ps.covariate(plates="answer"),
        alpha=ps.latent(lambda mu, tau: Normal(mu, tau), plates="group"),
        y=ps.observed(lambda alpha, beta, x: Bernoulli(logits=alpha + beta * x), plates="answer"),
    )  # fmt: skip
    return model, xr.Dataset({**_within("answer", "group", group), "x": ("answer", rng.normal(size=len(group)))})


# name -> (what makes model and design of so many groups, groups)
MODELS: dict[str, tuple[Callable[[int], tuple[ps.Model, xr.Dataset]], int]] = {
    "ragged": (ragged, 2000), "bernoulli": (bernoulli, 2000), "levels": (levels, 1000), "crossed": (crossed, 2000),
}  # fmt: skip


def one_run(model: ps.Model, given: xr.Dataset, sizes: Mapping[str, int], seed: int) -> Run:
    """Fit one simulated cohort: ranks of truths by latent, those among draws of half the variance, and facts of the fit."""
    cohort = model.sample(sizes, given, seed)
    facts: dict[str, Any] = {}
    with timing(facts, "fit"):
        posterior = ps.fit(model, cohort.drop_vars([v.name for v in model.latents]), seed=seed, progress=False)
    facts["status"] = posterior.status
    rng = np.random.default_rng(seed)
    ranks, halved = {}, {}
    with timing(facts, "draws"):
        group = posterior.datatree["posterior"].dataset
        for v in model.latents:
            units = {p: np.sort(rng.choice(cohort.sizes[p], min(UNITS, cohort.sizes[p]), replace=False)) for p in v.plates}
            drawn = group[v.name].isel(units | {"chain": 0, "draw": slice(DRAWS)}).values
            true = cohort[v.name].transpose(*v.plates, *v.dims).isel(units).values
            # In random order, so that any first few are a random few.
            shuffle = rng.permutation(prod(true.shape))
            ranks[v.name] = (drawn < true).sum(0).ravel()[shuffle]
            middle = drawn.mean(0)
            halved[v.name] = (middle + np.sqrt(0.5) * (drawn - middle) < true).sum(0).ravel()[shuffle]
    truth = {v.name: float(cohort[v.name]) for v in model.latents if not v.plates and not v.dims}
    return ranks, halved, facts | {"truth": truth}


def sbc_of(runs: list[dict[str, np.ndarray]], statuses: list[str], model: ps.Model, locals_: int) -> ps.SBC:
    """The ranks of all roots and of `locals_` units of each plated latent."""
    names = [(v.name, i) for v in model.latents for i in range(min(len(runs[0][v.name]), locals_) if v.plates else len(runs[0][v.name]))]
    rank = np.array([[run[name][i] for name, i in names] for run in runs])
    coords = {"quantity": [f"{name}[{i}]" for name, i in names], "latent": ("quantity", [name for name, _ in names])}
    return ps.SBC.from_dataset(xr.Dataset({"rank": (("simulation", "quantity"), rank), "status": ("simulation", statuses)}, coords, {"draws": DRAWS}))


def pooled(found: ps.SBC, names: list[str]) -> str:
    """Coverage of 50 and 90 % intervals over several variables at once, with its confidence interval."""
    own = found.to_dataset().sel(quantity=np.isin(found.to_dataset()["latent"].values, names))
    one = ps.SBC.from_dataset(own.assign_coords(latent=("quantity", ["all"] * own.sizes["quantity"])))
    shown = []
    for level in (0.5, 0.9):
        share, low, high = one.coverage("all", level)
        shown.append(f"{100 * share:.1f} ({100 * low:.1f}-{100 * high:.1f})")
    return ", ".join(shown)


def sizes_of(name: str, model: ps.Model, given: xr.Dataset, groups: int) -> dict[str, int]:
    """Cardinality of every plate."""
    tops = {next(iter(model.plates)): groups} | ({"lecturer": _lecturers(groups)} if name == "crossed" else {})
    return {str(p): n for p, n in given.sizes.items()} | tops


def simulations(name: str, runs: int, groups: int | None = None) -> Iterator[Run]:
    """One model's runs, one after another."""
    make, default = MODELS[name]
    model, given = make(groups or default)
    sizes = sizes_of(name, model, given, groups or default)
    for seed in range(runs):
        yield one_run(model, given, sizes, 1000 + seed)


def summarise(name: str, done: list[Run], groups: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Row and details of one model's runs."""
    make, default = MODELS[name]
    groups = groups or default
    model, given = make(groups)
    sizes = sizes_of(name, model, given, groups)
    ranks, halved, facts = ([part[i] for part in done] for i in range(3))
    statuses = [f["status"] for f in facts]
    tests, power = (sbc_of(which, statuses, model, TESTED) for which in (ranks, halved))
    wide = sbc_of(ranks, statuses, model, UNITS)
    roots, plated = [v.name for v in model.latents if not v.plates], [v.name for v in model.latents if v.plates]
    times = [f["fit"] for f in facts]
    row = {
        "model": name, "groups": groups, "latents": sum(prod(sizes[p] for p in v.plates) for v in model.latents), "runs": len(done), "ok": statuses.count("ok"),
        "globals 50, 90 %": pooled(wide, roots), "locals 50, 90 %": pooled(wide, plated),
        "smallest p": float(tests.pvalues.min()), "of": str(tests.pvalues.idxmin()), "calibrated": tests.calibrated(),
        "p, half variance": float(power.pvalues.min()), "fit s, median": float(np.median(times)), "most": max(times),
    }  # fmt: skip
    details = {"table": wide.table().to_dict("index"), "pvalues": tests.pvalues.to_dict(), "facts": facts}
    return row, details


def measure(job: Job) -> Found:
    """Fit cohorts drawn from each model's prior; coverage, rank tests, and their power."""
    torch.set_num_threads(1)
    found = Found(notes=[
        "intervals in brackets: 95 % confidence, by the effective number of trials; p: smallest of the rank tests, adjusted for their number",
        "half variance: the same fits, their draws pulled to their mean until the variance is halved; the tests should refuse it",
    ])
    for name, (_, own) in MODELS.items():
        for groups in job.groups or (own,):
            row, found.details[f"{name}, {groups}"] = summarise(name, list(simulations(name, job.runs or RUNS, groups)), groups)
            found.rows.append(row)
    return found
