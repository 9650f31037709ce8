"""Simulation-based calibration: draw truth and data from the model, fit, rank the truth among the posterior's draws; again and again."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from pavi_scale.calibration.result import FAILED, SBC
from pavi_scale.errors import InputError, Interrupted, ModelError, NumericalError
from pavi_scale.fitting import fit
from pavi_scale.model.template import Model
from pavi_scale.posterior.posterior import Posterior
from pavi_scale.posterior.sampler import DRAWS as STORED_DRAWS
from pavi_scale.progress import Progress
from pavi_scale.rng import stream

DRAWS = 255
UNITS = 3


@dataclass(frozen=True)
class Quantity:
    """A scalar that is ranked: an element of a latent, of a unit that each simulation chooses at random."""

    latent: str
    label: str
    slot: int
    element: tuple[int, ...]


def sbc(
    model: Model,
    sizes: Mapping[str, int],
    runs: int = 100,
    given: xr.Dataset | None = None,
    draws: int = DRAWS,
    units: int = UNITS,
    seed: int = 0,
    run: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **options: Any,
) -> SBC:
    """Simulation-based calibration of a model and its fits (Talts et al. 2018, arXiv 1804.06788).

    Each simulation draws a cohort from the model, fits it, and ranks the truth among draws of the posterior. Were every posterior exact, all
    ranks would be uniform. Intervals that are too narrow, shifted or too wide show as ranks that are not, however well each fit looks by itself.

    Args:
        model: The model; its priors must be proper, and simulate data like those that it is meant for.
        sizes: Cardinality of each plate, as for `Model.sample`.
        runs: Simulations.
        given: Covariates and index variables, as for `Model.sample`; where it holds an observed variable with missing values, so will the simulations.
        draws: Draws of each posterior, without any thinning: draws of a fit are independent.
        units: Units of each latent's plates looked at, chosen at random for each simulation. Latents without plates are ranked whole.
        seed: Seed of everything random.
        run: Folder whose subfolder `sbc` keeps what is finished: the same call goes on there after an interruption, or with more runs.
        progress: Whether to show progress on standard error.
        **options: Options of `fit`: `encoding`, `memory`, `device`, `client`, `max_time`, `staleness`.

    Returns:
        The ranks; `calibrated()`, `table()` and `plot()` tell what they mean.

    Raises:
        InputError: Bad model, sizes, given or option, before any fit.
        Interrupted: By a signal; what is finished is kept if there is a run.
        RunError: What the run keeps is damaged, or cannot be written.

    Example:
        >>> from torch.distributions import Normal
        >>> from pavi_scale import Model, Plate, latent, observed
        >>> model = Model(Plate("obs"), mu=latent(lambda: Normal(0.0, 1.0)), x=observed(lambda mu: Normal(mu, 1.0), plates="obs"))
        >>> sbc(model, {"obs": 5}, runs=3, progress=False).runs
        3
    """
    _check(model, {"runs": runs, "draws": draws, "units": units, "seed": seed}, options)
    cohort = model.sample(sizes, given, stream(seed, "sbc", 0, "cohort") % 2**63)
    plan = quantities(model, cohort, units)
    described = describe(model, cohort, given, draws, units, seed, options)
    path = None if run is None else Path(run) / "sbc" / f"{described}.json"
    found = SBC.open(path) if path is not None and path.exists() else empty(plan, draws, described)
    try:
        with Progress(progress) as bar:
            for number in range(found.runs, runs):
                bar.stage(f"simulation {number + 1} of {runs}")
                ranks, status = simulation(model, sizes, given, plan, draws, stream(seed, "sbc", number), options)
                found = append(found, ranks, status)
                if path is not None:
                    found.save(path)
    except (KeyboardInterrupt, Interrupted) as error:
        remedy = "the same call with run= goes on after the last finished simulation"
        raise Interrupted("calibration was interrupted", where="sbc", got=f"{found.runs} of {runs} simulations", remedy=remedy) from error
    return SBC(found.dataset.isel(simulation=slice(runs)))


def _check(model: Model, counts: Mapping[str, int], options: Mapping[str, Any]) -> None:
    if not isinstance(model, Model):
        raise ModelError("the first argument is not a model", expected="pavi_scale.Model", got=type(model).__name__)
    least, most = {"runs": 1, "draws": 19, "units": 1, "seed": 0}, {"draws": STORED_DRAWS}
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not least[name] <= value <= most.get(name, 2**63 - 1):
            expected = f"an integer from {least[name]}" + (f" to {most[name]}" if name in most else " on")
            raise InputError("a number is no integer or out of range", where=f"{name}=", expected=expected, got=repr(value))
    if unknown := set(options) - {"encoding", "memory", "device", "client", "max_time", "staleness"}:
        raise InputError("unknown option of a fit", where="sbc", expected="encoding, memory, device, client, max_time or staleness", got=sorted(unknown))
    if not model.latents:
        raise ModelError("the model has no latent variable to rank", where="sbc")


def quantities(model: Model, cohort: xr.Dataset, units: int) -> tuple[Quantity, ...]:
    """What is ranked of every latent."""
    found = []
    for v in model.latents:
        total = int(np.prod([cohort.sizes[p] for p in v.plates], dtype=np.int64))
        for slot in range(min(units, total)):
            for element in np.ndindex(*(cohort.sizes[d] for d in v.dims)):
                parts = ([f"unit {slot + 1}"] if v.plates else []) + [str(e) for e in element]
                found.append(Quantity(v.name, f"{v.name}[{', '.join(parts)}]" if parts else v.name, slot, element))
    return tuple(found)


def describe(model: Model, cohort: xr.Dataset, given: xr.Dataset | None, draws: int, units: int, seed: int, options: Mapping[str, Any]) -> str:
    """Digest of everything that the ranks depend on, but their number."""
    digest = hashlib.blake2b(digest_size=8)
    plain = {name: value for name, value in options.items() if name != "client"}
    digest.update(repr((model.fingerprint(), sorted(cohort.sizes.items()), draws, units, seed, sorted(plain.items(), key=lambda item: item[0]))).encode())
    for name, values in sorted(given.variables.items(), key=lambda item: str(item[0])) if given is not None else ():
        if name in model.variables or "instance_dimension" in values.attrs:
            # Of an observed variable only the missing values count.
            told = values.notnull() if name in model.variables and model.variables[str(name)].kind == "observed" else values
            digest.update(str(name).encode() + np.ascontiguousarray(told.values).tobytes())
    return digest.hexdigest()


def empty(plan: tuple[Quantity, ...], draws: int, described: str) -> SBC:
    """No simulation yet."""
    rank = np.zeros((0, len(plan)), dtype=np.int64)
    coords = {"quantity": [q.label for q in plan], "latent": ("quantity", [q.latent for q in plan])}
    status = ("simulation", np.zeros(0, dtype=object))
    return SBC(xr.Dataset({"rank": (("simulation", "quantity"), rank), "status": status}, coords, {"draws": int(draws), "study": described}))


def append(found: SBC, ranks: np.ndarray, status: str) -> SBC:
    """With one more simulation."""
    old = found.dataset
    rank = np.concatenate([old["rank"].values, ranks[None]])
    states = np.append(old["status"].values.astype(object), status)
    return SBC(old.drop_dims("simulation").assign({"rank": (("simulation", "quantity"), rank), "status": ("simulation", states)}))


def simulation(
    model: Model,
    sizes: Mapping[str, int],
    given: xr.Dataset | None,
    plan: tuple[Quantity, ...],
    draws: int,
    seed: int,
    options: Mapping[str, Any],
) -> tuple[np.ndarray, str]:
    """Ranks and status of one simulation; ranks of -1 where the fit fails.

    Args:
        model: As for `sbc`.
        sizes: As for `sbc`.
        given: As for `sbc`.
        plan: What is ranked.
        draws: As for `sbc`.
        seed: Seed of this simulation.
        options: As for `sbc`.
    """
    cohort = masked(model, model.sample(sizes, given, stream(seed, "cohort") % 2**63), given)
    data = cohort.drop_vars([v.name for v in model.latents])
    with tempfile.TemporaryDirectory(prefix="pavi-scale-sbc-") as folder:
        try:
            posterior = fit(model, data, run=folder, seed=stream(seed, "fit") % 2**31, progress=False, **options)
        except NumericalError:
            return np.full(len(plan), -1), FAILED
        return rank(posterior, cohort, plan, draws, seed), posterior.status


def masked(model: Model, cohort: xr.Dataset, given: xr.Dataset | None) -> xr.Dataset:
    """With observations missing where they are in `given`."""
    names = [v.name for v in model.of_kind("observed") if v.missing == "mask" and given is not None and v.name in given]
    return cohort.assign({n: cohort[n].where(given[n].transpose(*cohort[n].dims).notnull().values) for n in names}) if given is not None else cohort


def rank(posterior: Posterior, cohort: xr.Dataset, plan: tuple[Quantity, ...], draws: int, seed: int, shrink: float = 1.0) -> np.ndarray:
    """How many draws lie below the truth of each quantity; ties, as of a correlation matrix's diagonal, are broken at random.

    Args:
        posterior: The posterior.
        cohort: What it was fitted to, with the truth.
        plan: What is ranked.
        draws: How many draws.
        seed: Seed of the choice of units.
        shrink: Share of their variance that draws keep, about their mean: a wrong posterior, made on purpose to see that it is noticed.
    """
    rng = np.random.default_rng(stream(seed, "units"))
    out = np.empty(len(plan), dtype=np.int64)
    group = posterior.datatree["posterior"].dataset
    for v in posterior.model.latents:
        own = [(i, q) for i, q in enumerate(plan) if q.latent == v.name]
        shape = tuple(cohort.sizes[p] for p in v.plates)
        slots = rng.choice(int(np.prod(shape, dtype=np.int64)), 1 + max(q.slot for _, q in own), replace=False)
        # All units in one read: those of a crossed plate are drawn together whatever is asked for.
        axes = [np.unique(positions, return_inverse=True) for positions in np.unravel_index(slots, shape)] if shape else []
        units = {p: positions for p, (positions, _) in zip(v.plates, axes, strict=True)}
        drawn = group[v.name].isel(units | {"chain": 0, "draw": slice(draws)}).values
        drawn = drawn.mean(0) + np.sqrt(shrink) * (drawn - drawn.mean(0)) if shrink != 1.0 else drawn
        true = cohort[v.name].transpose(*v.plates, *v.dims).isel(units).values
        below, ties = (drawn < true).sum(0), (drawn == true).sum(0)
        for i, q in own:
            at = (*(int(back[q.slot]) for _, back in axes), *q.element)
            out[i] = below[at] + rng.integers(0, ties[at] + 1)
    return out
