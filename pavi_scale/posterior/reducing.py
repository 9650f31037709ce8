"""Summaries of lazy draws by map-reduce: pieces of units, all draws of a piece at once, so that each summary is exact in bounded memory."""

from __future__ import annotations

import itertools
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from zarr.codecs import Crc32cCodec
from zarr.errors import ZarrUserWarning

from pavi_scale.durable import disk_errors, sync_directory
from pavi_scale.errors import InputError, PlanRefused, RunError
from pavi_scale.memory import format_bytes
from pavi_scale.posterior.integrity import write_manifest
from pavi_scale.posterior.sampler import Latent, Sampler, fetch
from pavi_scale.posterior.selecting import Selected

COPIES = 4  # of a piece's draws in float64 at the peak: the sampler's, gathered, transposed, and the summary's own
PIECE = 1 << 14  # units of a piece where nothing says how the data lie

Reduce = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Summary:
    """What each element's draws are reduced to.

    Args:
        dim: Name of the new dimension.
        labels: Its labels; of length one, and dropped, where `single`.
        single: Whether the user gave a single number.
        reduce: Draws (element, draw), which it may overwrite, to (label, element).
    """

    dim: str
    labels: np.ndarray
    single: bool
    reduce: Reduce


def _numbers(values: Any, what: str, low: float, high: float) -> tuple[np.ndarray, bool]:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.full(1, np.nan)
    good = array.ndim <= 1 and array.size > 0 and bool(np.isfinite(array).all()) and bool(((array >= low) & (array <= high)).all())
    if not good:
        between = f" between {low:g} and {high:g}" if math.isfinite(low) else ""
        raise InputError(f"not a {what}", where=what, expected=f"a finite number{between}, or a list of such", got=repr(values))
    return np.atleast_1d(array), array.ndim == 0


def quantiles(q: Any) -> Summary:
    """Quantiles with linear interpolation between order statistics (Hyndman & Fan 1996, type 7, NumPy's default).

    Raises:
        InputError: Not numbers in [0, 1].

    Example:
        >>> quantiles([0.25, 1.0]).reduce(np.array([[4.0, 0.0, 2.0]]))
        array([[1.],
               [4.]])
    """
    levels, single = _numbers(q, "quantile", 0.0, 1.0)

    def reduce(draws: np.ndarray) -> np.ndarray:
        draws.sort(axis=1)  # contiguous rows sort several times faster than `np.quantile` selects
        out = np.empty((len(levels), len(draws)), dtype=draws.dtype)
        for row, level in zip(out, levels, strict=True):
            place = level * (draws.shape[1] - 1)
            below = math.floor(place)
            above = min(below + 1, draws.shape[1] - 1)
            row[...] = draws[:, below] + (place - below) * (draws[:, above] - draws[:, below])
        return out

    return Summary("quantile", levels, single, reduce)


def exceedances(threshold: Any) -> Summary:
    """Share of the draws above thresholds: posterior probabilities, of standard error sqrt(p (1 - p) / draws) at most.

    Raises:
        InputError: Not finite numbers.

    Example:
        >>> exceedances(1.0).reduce(np.array([[4.0, 0.0, 2.0, 1.0]]))
        array([[0.5]])
    """
    levels, single = _numbers(threshold, "threshold", -math.inf, math.inf)

    def reduce(draws: np.ndarray) -> np.ndarray:
        return np.stack([np.count_nonzero(draws > level, axis=1) / draws.shape[1] for level in levels])

    return Summary("threshold", levels, single, reduce)


def piece_lengths(latent: Latent, draws: int, budget: int, chunks: Mapping[str, int]) -> dict[str, int]:
    """Plate -> units of a piece, whose draws with all that is made of them fit the budget.

    Args:
        latent: The latent.
        draws: Number of draws.
        budget: Bytes.
        chunks: Plate -> length that its data lie in; pieces are whole chunks or halves of them, so that none is read more often than must be.

    Raises:
        PlanRefused: Not even a single unit fits; both figures are named.

    Example:
        >>> piece_lengths(Latent("y", ("g",), (), (10**6,)), 1000, 64 << 20, {"g": 5000})
        {'g': 1250}
    """
    sizes = dict(zip(latent.plates, latent.shape, strict=False))
    events = math.prod(latent.shape[len(latent.plates) :])
    lengths = {p: max(1, min(n, chunks.get(p, PIECE))) for p, n in sizes.items()}
    unit = COPIES * 8 * draws * events
    while (needed := unit * math.prod(lengths.values())) > budget:
        outermost = next((p for p, n in lengths.items() if n > 1), None)  # its units lie farthest apart on the disk
        if outermost is None:
            raise PlanRefused(
                "the draws of a single unit do not fit into the memory allowed", where=f"latent {latent.name!r}, {draws:,} draws",
                expected=f"at most {format_bytes(budget)}", got=format_bytes(needed), remedy="raise memory=, or ask for fewer draws",
            )  # fmt: skip
        lengths[outermost] = -(-lengths[outermost] // 2)
    return lengths


def _pieces(positions: np.ndarray, length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(places in the result, positions) of each piece, cut where positions enter another block of `length`."""
    order = np.argsort(positions, kind="stable")
    blocks = positions[order] // length
    for part in np.split(order, np.flatnonzero(np.diff(blocks)) + 1):
        if len(part):
            yield part, positions[part]


def reduce_draws(
    sampler: Sampler, latent: Latent, selected: Selected, summary: Summary, draws: int, lengths: Mapping[str, int], write: Callable[[Any, np.ndarray], None]
) -> None:
    """Draw piece by piece and hand each piece's summary to `write`, with its places along each axis of the result.

    Args:
        sampler: The stream of draws.
        latent: The latent.
        selected: Which of its units.
        summary: What their draws are reduced to.
        draws: Number of draws, from the first.
        lengths: Plate -> units of a piece.
        write: Takes (places along each kept axis, values (label, *kept)).
    """
    positions = selected.positions(latent)
    cuts = [list(_pieces(positions[p], lengths[p])) for p in latent.plates]
    events = {d: positions[d] for d in latent.dims if d in selected.picks}
    for piece in itertools.product(*cuts):
        picks = {p: at for p, (_, at) in zip(latent.plates, piece, strict=True)} | events
        values = fetch(sampler, [latent], np.arange(draws), picks)[latent.name]
        shape = values.shape[1:]
        reduced = summary.reduce(np.ascontiguousarray(values.reshape(draws, -1).T))
        places = {p: place for p, (place, _) in zip(latent.plates, piece, strict=True)} | {d: np.arange(len(positions[d])) for d in latent.dims}
        kept = [n for n, d in zip(shape, latent.axes, strict=True) if d not in selected.scalar]
        write([places[d] for d in selected.kept(latent)], reduced.reshape(-1, *kept))


def in_memory(latent: Latent, selected: Selected, summary: Summary, budget: int, run: Callable[[Any], None]) -> xr.DataArray:
    """The summary as a DataArray; `run` fills it.

    Raises:
        PlanRefused: It is larger than the memory allowed; both figures are named.
    """
    shape = _shape(latent, selected, summary)
    if (needed := math.prod(shape) * latent.dtype.itemsize) > budget:
        raise PlanRefused(
            "the result does not fit into the memory allowed", where=f"latent {latent.name!r}", expected=f"at most {format_bytes(budget)}",
            got=format_bytes(needed), remedy="write it to a Zarr store (store=), select fewer units, or raise memory=",
        )  # fmt: skip
    out = np.empty(shape, latent.dtype)

    def write(places: Sequence[np.ndarray], values: np.ndarray) -> None:
        out[np.ix_(np.arange(len(out)), *places)] = values

    run(write)
    dims = (summary.dim, *selected.kept(latent))
    found = xr.DataArray(out, _coords(dims, selected, summary), dims, latent.name)
    return found.isel({summary.dim: 0}) if summary.single else found


def in_store(latent: Latent, selected: Selected, summary: Summary, lengths: Mapping[str, int], store: Path, run: Callable[[Any], None]) -> xr.DataArray:
    """The summary in a new Zarr store, built aside and checksummed; returned lazily.

    Raises:
        RunError: There is something at the path already, or the disk fails.
    """
    if store.exists():
        raise RunError("there is something at the store's path already", where=store, remedy="choose another path, or delete it")
    partial, dims = store.with_name(f"{store.name}.partial"), selected.kept(latent)
    shape = _shape(latent, selected, summary)
    with disk_errors("the summary cannot be written", store):
        shutil.rmtree(partial, ignore_errors=True)
        partial.parent.mkdir(parents=True, exist_ok=True)
        root = zarr.open_group(partial, mode="w", zarr_format=3)
        chunks = (shape[0], *(max(1, min(n, lengths.get(d, n))) for d, n in zip(dims, shape[1:], strict=True)))
        array = root.create_array(
            latent.name, shape=shape, chunks=tuple(max(1, c) for c in chunks), dtype=latent.dtype, compressors=[Crc32cCodec()], fill_value=float("nan"),
            dimension_names=(summary.dim, *dims), config={"write_empty_chunks": True},
        )  # fmt: skip

        def write(places: Sequence[np.ndarray], values: np.ndarray) -> None:
            array.set_orthogonal_selection((slice(None), *map(_span, places)), values.astype(latent.dtype, copy=False))

        run(write)
        labels = xr.Dataset(coords=_coords((summary.dim, *dims), selected, summary))
        plain = labels.assign_coords({n: (c.dims, c.values.astype(object)) for n, c in labels.coords.items() if c.dtype.kind in "US"})
        encoding: Any = {n: {"compressors": (Crc32cCodec(),), "write_empty_chunks": True} for n in plain.variables}
        plain.to_zarr(partial, mode="a", consolidated=False, zarr_format=3, encoding=encoding)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ZarrUserWarning)  # plain xarray reads it; zarr warns because the specification does not have it yet
            zarr.consolidate_metadata(partial)
        write_manifest(partial, {"summary": summary.dim})
        os.rename(partial, store)
        sync_directory(store.parent)
    found = xr.open_zarr(store, chunks=None)[latent.name]
    return found.isel({summary.dim: 0}) if summary.single else found


def _span(places: np.ndarray) -> slice | np.ndarray:
    """A slice where the places are consecutive: whole chunks are then written without being read before."""
    first, last = int(places[0]), int(places[-1])
    return slice(first, last + 1) if np.array_equal(places, np.arange(first, last + 1)) else places


def _shape(latent: Latent, selected: Selected, summary: Summary) -> tuple[int, ...]:
    positions = selected.positions(latent)
    return (len(summary.labels), *(len(positions[d]) for d in selected.kept(latent)))


def _coords(dims: Sequence[str], selected: Selected, summary: Summary) -> dict[str, Any]:
    """Labels of the result's dimensions."""
    return {**{n: c for n, c in selected.coords.items() if set(c.dims) <= set(dims)}, summary.dim: (summary.dim, summary.labels)}
