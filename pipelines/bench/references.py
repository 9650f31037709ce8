"""The four real tables against their reference posteriors from long NUTS runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import xarray as xr

import pavi_scale as ps
from pipelines import eight_schools, math_achieve, radon, sleepstudy
from pipelines.bench.meter import Found, Job, timing

# (name, model, cohort from the folder of tables, file of the reference)
STUDIES: tuple[tuple[str, ps.Model, Callable[[str], xr.Dataset], str], ...] = (
    ("eight_schools", eight_schools.model, lambda folder: eight_schools.make_cohort(), "eight_schools"),
    ("radon", radon.model, lambda folder: radon.make_cohort(f"{folder}/radon_mn.csv"), "radon_mn"),
    ("sleepstudy", sleepstudy.model, lambda folder: sleepstudy.make_cohort(f"{folder}/sleepstudy.csv"), "sleepstudy"),
    ("math_achieve", math_achieve.model, lambda folder: math_achieve.make_cohort(f"{folder}/math_achieve.csv"), "math_achieve"),
)
WIDE = (0.2, 0.8, 1.25)  # |mean difference| in reference sds, and the interval of the sd ratio
NARROW = (0.1, 0.9, 1.1)
DRAWS = 20_000


def agreement(posterior: ps.Posterior, reference: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, np.ndarray]]:
    """Mean difference in reference sds, and sd ratio, of every scalar by variable; units are in the order of their sorted labels."""
    mean, sd = (posterior.datatree[group].to_dataset() for group in ("posterior_mean", "posterior_sd"))
    plates = [plate for plate in mean.dims if plate in mean.coords]
    mean, sd = mean.sortby(plates), sd.sortby(plates)
    found = {}
    for name, entry in reference.items():
        scale = np.asarray(entry["sd"])
        found[name] = {"shift": (mean[name].values - np.asarray(entry["mean"])) / scale, "ratio": sd[name].values / scale}
    return found


def within(found: Mapping[str, Mapping[str, np.ndarray]], bounds: tuple[float, float, float]) -> float:
    """Share of scalars that keep the bounds."""
    most, low, high = bounds
    good = [np.ravel((np.abs(f["shift"]) <= most) & (f["ratio"] >= low) & (f["ratio"] <= high)) for f in found.values()]
    return float(np.concatenate(good).mean())


def worst(found: Mapping[str, Mapping[str, np.ndarray]]) -> tuple[str, str]:
    """The largest shift and the ratio farthest from 1, with their variables."""
    shifts = {name: float(f["shift"].flat[np.abs(f["shift"]).argmax()]) for name, f in found.items()}
    ratios = {name: float(f["ratio"].flat[np.abs(np.log(f["ratio"])).argmax()]) for name, f in found.items()}
    shift = max(shifts, key=lambda name: abs(shifts[name]))
    ratio = max(ratios, key=lambda name: abs(np.log(ratios[name])))
    return f"{shifts[shift]:+.3f} ({shift})", f"{ratios[ratio]:.3f} ({ratio})"


def scale_quantiles(posterior: ps.Posterior, reference: Mapping[str, Mapping[str, Any]]) -> tuple[str, dict[str, Any]]:
    """Quantiles of eight schools' tau over draws, beside the reference."""
    # One school is named so that the draws of the others are not made.
    draws = posterior.sample(DRAWS, school=["A"])["tau"].values
    q05, q50, q95 = np.quantile(draws, [0.05, 0.5, 0.95])
    truth = reference["tau"]
    off = max(abs(q05 - truth["q05"]), abs(q95 - truth["q95"])) / truth["sd"]
    note = (
        f"eight_schools, tau from {DRAWS:,} draws: 5 % {q05:.3f} (reference {truth['q05']:.3f}), 50 % {q50:.3f} (reference has none), "
        f"95 % {q95:.3f} ({truth['q95']:.3f}); farthest {off:.3f} reference sd; mean {draws.mean():.3f} ({truth['mean']:.3f})"
    )
    return note, {"q05": q05, "q50": q50, "q95": q95, "mean": draws.mean(), "farthest_in_sd": off}


def measure(job: Job) -> Found:
    """Fit each table at default settings and compare all scalars, globals and locals."""
    found = Found(notes=["wide: share of scalars with |mean difference| <= 0.2 reference sd and sd ratio in [0.8, 1.25]; narrow: 0.1 and [0.9, 1.1]"])
    for name, model, make, file in STUDIES:
        reference = json.loads((job.shared / "reference" / f"{file}.json").read_text())["posterior"]
        clock: dict[str, Any] = {}
        cohort = make(str(job.shared / "data"))
        with timing(clock, "seconds"):
            posterior = ps.fit(model, cohort, progress=False)
        scalars = agreement(posterior, reference)
        shift, ratio = worst(scalars)
        roots = {v: f for v, f in scalars.items() if f["shift"].ndim == 0}
        found.rows.append(
            {
                "data": name,
                "scalars": sum(f["shift"].size for f in scalars.values()),
                "wide": within(scalars, WIDE),
                "narrow": within(scalars, NARROW),
                "globals narrow": within(roots, NARROW),
                "worst shift (sd)": shift,
                "worst ratio": ratio,
                "status": posterior.status,
                "fit s": clock["seconds"],
            }
        )
        found.details[name] = {v: {key: np.ravel(value).tolist() for key, value in f.items()} for v, f in scalars.items()}
        if name == "eight_schools":
            note, found.details["tau"] = scale_quantiles(posterior, reference)
            found.notes.append(note)
    total = sum(row["scalars"] for row in found.rows)
    pooled = {key: sum(row[key] * row["scalars"] for row in found.rows) / total for key in ("wide", "narrow")}
    found.notes.append(f"all {total} scalars together: wide {pooled['wide']:.4f}, narrow {pooled['narrow']:.4f}")
    return found
