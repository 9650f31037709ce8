"""The groups of a run in ArviZ's schema, each an xarray Dataset that computes or reads nothing until asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import dask.array  # noqa: F401  xarray imports it with the first Dataset it makes: half a second that is better spent now than in a fit
import numpy as np
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing

from pavi_scale.errors import RunError
from pavi_scale.posterior.integrity import verify
from pavi_scale.posterior.predictive import LogLikelihoods, Replicates
from pavi_scale.posterior.sampler import DRAWS, Context, Latent, Sampler, fetch
from pavi_scale.posterior.store import MOMENTS, NAME, settle
from pavi_scale.run import Run

STORED = (*MOMENTS, "fit", "diagnostics")
DERIVED = ("posterior", "posterior_predictive", "log_likelihood", "observed_data", "constant_data")
GROUPS = ("posterior", *MOMENTS, "posterior_predictive", "log_likelihood", "observed_data", "constant_data", "fit", "diagnostics")
_BLOCK_BYTES = 1 << 26  # preferred chunk of lazy draws


class LazyDraws(BackendArray):
    """Draws of one latent, shape (1, draw, *plates, *dims), sampled when indexed.

    Thread-safe and picklable where the sampler is; holds no draws.
    """

    def __init__(self, sampler: Sampler, latent: Latent, draws: int) -> None:
        self.sampler, self.latent = sampler, latent
        self.shape = (1, draws, *latent.shape)
        self.dtype = latent.dtype

    def __getitem__(self, key: indexing.ExplicitIndexer) -> np.ndarray:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> np.ndarray:
        positions = [np.arange(size)[part] for size, part in zip(self.shape, key, strict=True)]
        flat = [np.atleast_1d(p) for p in positions]
        if any(p.size == 0 for p in flat):
            return np.empty([p.size for p in positions if p.ndim], dtype=self.dtype)
        # A full slice is left out: the sampler may then skip gathering rows.
        picks = {name: p for name, p, part in zip(self.latent.axes, flat[2:], key[2:], strict=True) if not (isinstance(part, slice) and part == slice(None))}
        values = fetch(self.sampler, [self.latent], flat[1], picks)[self.latent.name]
        values = np.broadcast_to(values, (len(flat[0]), *values.shape))
        return np.ascontiguousarray(values[tuple(slice(None) if p.ndim else 0 for p in positions)]).reshape([p.size for p in positions if p.ndim])

    def preferred_chunks(self) -> dict[str, int]:
        """Chunks of about 64 MiB: all draws of few units, the outermost plate split first."""
        lengths = list(self.shape)
        room = max(1, _BLOCK_BYTES // self.dtype.itemsize)
        for axis in range(2, 2 + len(self.latent.plates)):
            others = prod(lengths) // max(1, lengths[axis])
            lengths[axis] = max(1, min(lengths[axis], room // max(1, others)))
        return dict(zip(("chain", "draw", *self.latent.axes), lengths, strict=True))


def lazy_group(context: Context, sampler: Sampler, latents: Sequence[Latent], draws: int) -> xr.Dataset:
    """Lazy draws of variables."""
    variables = {}
    for v in latents:
        array = LazyDraws(sampler, v, draws)
        variables[v.name] = xr.Variable(("chain", "draw", *v.axes), indexing.LazilyIndexedArray(array), encoding={"preferred_chunks": array.preferred_chunks()})
    coords = {"chain": np.arange(1), "draw": np.arange(draws), **context.coords([d for v in latents for d in v.axes])}
    return xr.Dataset(variables, coords={d: (d, values) for d, values in coords.items()}, attrs={"inference_library": "pavi_scale"})


def observed_group(context: Context) -> xr.Dataset:
    """Observed variables: a lazy view of the cohort."""
    return context.dataset[[v.name for v in context.model.of_kind("observed") if v.name in context.dataset]]


def constant_group(context: Context) -> xr.Dataset:
    """Covariates and index variables: a lazy view of the cohort."""
    names = [v.name for v in context.model.of_kind("covariate") if v.name in context.dataset]
    names += [str(n) for n, v in context.dataset.variables.items() if "instance_dimension" in v.attrs and n not in names and n not in context.dataset.dims]
    return context.dataset[names]


def table_group(tables: Mapping[str, tuple[tuple[str, ...], Any]], labels: Mapping[str, np.ndarray]) -> xr.Dataset:
    """A small group of named arrays, each with its dimensions, and the labels of those."""
    return xr.Dataset({name: (dims, np.asarray(values)) for name, (dims, values) in tables.items()}, coords={p: (p, values) for p, values in labels.items()})


def trace_group(trace: Sequence[tuple[str, float | None]], history: Mapping[str, Sequence[Any]]) -> xr.Dataset:
    """The group `fit`: stage and bound of each step, NaN where it was not finite; location and sd of the unconstrained q(root) after some.

    Args:
        trace: (stage, bound) of each step.
        history: "step", and "loc" and "sd" after it.
    """
    elbo = np.asarray([np.nan if value is None else value for _, value in trace], dtype=np.float64)
    stage = np.asarray([stage for stage, _ in trace], dtype=object)
    out = xr.Dataset({"elbo": ("step", elbo), "stage": ("step", stage)}, coords={"step": np.arange(len(trace))})
    if history.get("step"):
        at = ("milestone", np.asarray(history["step"], dtype=np.int64))
        moments = {f"root_{k}": (("milestone", "root"), np.asarray(history[k], dtype=np.float64)) for k in ("loc", "sd")}
        out = out.assign({"root_step": at, **moments})
    return out


def timed(run: Run, group: xr.Dataset) -> xr.Dataset:
    """The group `fit` with the seconds of each step since the call: they lie with the run, so that a posterior's bytes depend on its numbers alone."""
    seconds = run.state().get("trace_seconds") if run.generation is not None else None
    if seconds is None or len(seconds) != group.sizes.get("step"):
        return group
    return group.assign(seconds=("step", np.asarray(seconds, dtype=np.float64), {"units": "s"}))


def stored_path(run: Run) -> Path:
    """The complete stored posterior of a run, its sizes and metadata checked against the manifest.

    Raises:
        RunError: There is none yet, or it is damaged.
    """
    path = run.path / NAME
    if not path.exists():
        path = settle(run.path)
    if not path.exists():
        raise RunError("the run has no stored posterior yet", where=run.path, expected=NAME, remedy="resume the run to completion")
    verify(path, content=False)
    return path


def stored_group(run: Run, group: str, context_path: Path | None = None) -> xr.Dataset:
    """A stored group, opened lazily.

    Raises:
        RunError: There is no stored posterior, it is damaged, or it lacks the group.
    """
    path = context_path or stored_path(run)
    if not (path / group / "zarr.json").is_file():
        raise RunError("the stored posterior lacks a group", where=path, expected=group, remedy="resume the run to completion")
    found = xr.open_zarr(path, group=group, chunks=None)
    return timed(run, found) if group == "fit" else found


def stored_groups(run: Run) -> dict[str, xr.Dataset]:
    """All stored groups; empty while there is no complete posterior."""
    if not (run.path / NAME).exists() and not settle(run.path).exists():
        return {}
    path = stored_path(run)
    return {name: stored_group(run, name, path) for name in STORED if (path / name / "zarr.json").is_file()}


def derived_group(context: Context, group: str, draws: int) -> xr.Dataset:
    """One of the groups that are computed or viewed, not stored."""
    if group == "posterior":
        return lazy_group(context, context.sampler, context.latents, draws)
    if group in ("posterior_predictive", "log_likelihood"):
        sampler = (Replicates if group == "posterior_predictive" else LogLikelihoods)(context, context.sampler.seed)
        return lazy_group(context, sampler, sampler.variables(), draws)
    return observed_group(context) if group == "observed_data" else constant_group(context)


def draw_count(run: Run, draws: int | None = None) -> int:
    """Number of draws of the lazy group: as asked, else as the run's state says, else 1,000."""
    if draws is not None:
        if isinstance(draws, bool) or not isinstance(draws, (int, np.integer)) or draws < 1:
            raise RunError("the number of draws must be a positive integer", where="draws", got=draws)
        return int(draws)
    state: Mapping[str, Any] = run.state() if run.generation is not None else {}
    return int(state.get("draws", DRAWS))


def all_groups(run: Run, context: Context, draws: int | None = None) -> dict[str, xr.Dataset]:
    """Every group that the run has, in the schema's order."""
    count = draw_count(run, draws)
    found = {**stored_groups(run), **{name: derived_group(context, name, count) for name in DERIVED}}
    return {name: found[name] for name in GROUPS if name in found}
