"""What the posterior needs from the mathematics: a sampler, and a context to make sense of its draws."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from math import prod
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pavi_scale.errors import RunError
from pavi_scale.model.template import Model, Variable
from pavi_scale.plates import Layout

if TYPE_CHECKING:
    import xarray as xr

# Tensor libraries use all cores for one draw and keep settings per process: threads of a chunked read take turns.
_drawing = threading.Lock()

DRAWS = 1000  # draws of the lazy group when the run's state does not say


class Sampler(Protocol):
    """Draws from a fitted guide; picklable if lazy draws are to cross process borders. Called by one thread at a time.

    Attributes:
        seed: Number of the stream of draws; the sampler of a `Context` has stream 0.
    """

    seed: int

    def draw(self, names: Sequence[str], draws: np.ndarray, units: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Values of latents, each float of shape [len(draws), *units of the variable's plates, *dims].

        Args:
            names: Latents wanted.
            draws: int64 numbers of the draws, sorted, each once.
            units: Plate -> sorted int64 positions, each once; a plate left out stands for all its units.

        The same (seed, draw, ground index) gives the same number, whatever else is asked for.
        """

    def elbo(self, particles: int, seed: int) -> tuple[float, float]:
        """Full-data ELBO in nats and its standard error."""

    def with_seed(self, seed: int) -> Sampler:
        """The same guide with another stream of draws."""


@dataclass(frozen=True)
class Latent:
    """Name, plates, event dimensions and shape of one draw of a latent: what lazy draws carry instead of the model."""

    name: str
    plates: tuple[str, ...]
    dims: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes of one draw."""
        return (*self.plates, *self.dims)

    @property
    def size(self) -> int:
        """Number of elements of one draw."""
        return prod(self.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Float type in which draws and moments are kept."""
        return storage_dtype(self.size)


@dataclass(frozen=True)
class Context:
    """Everything that turns a run directory into a posterior.

    Args:
        sampler: The fitted guide's sampler, stream 0.
        model: The model.
        dataset: The cohort, lazy.
        layout: Cardinalities and parents of the cohort's plates.
        event_sizes: Size of each event dimension.
        coordinates: Labels of plates and event dimensions that have some, one-dimensional.
        extend: Makes the posterior of a new cohort's units; None where the encodings cannot.
    """

    sampler: Sampler
    model: Model
    dataset: xr.Dataset
    layout: Layout
    event_sizes: Mapping[str, int] = field(default_factory=dict)
    coordinates: Mapping[str, np.ndarray] = field(default_factory=dict)
    extend: Callable[[Any], Any] | None = None

    def shape(self, variable: Variable) -> tuple[int, ...]:
        """Shape of one draw of a variable: plates, then event dimensions."""
        return tuple(self.size(d) for d in (*variable.plates, *variable.dims))

    @cached_property
    def latents(self) -> tuple[Latent, ...]:
        """The model's latents, parents first."""
        return tuple(Latent(v.name, v.plates, v.dims, self.shape(v)) for v in self.model.latents)

    @property
    def dims(self) -> tuple[str, ...]:
        """Plates and event dimensions of the latents, each once."""
        return tuple(dict.fromkeys(d for v in self.latents for d in v.axes))

    def size(self, dim: str) -> int:
        """Length of a plate or event dimension."""
        return self.layout.cardinality[dim] if dim in self.layout.cardinality else self.event_sizes[dim]

    def coords(self, dims: Sequence[str]) -> dict[str, np.ndarray]:
        """Labels of those of `dims` that have some."""
        return {d: np.asarray(self.coordinates[d]) for d in dict.fromkeys(dims) if d in self.coordinates}


def storage_dtype(elements: int) -> np.dtype[Any]:
    """Float type of a latent with that many elements per draw: float64, or float32 above a million."""
    return np.dtype(np.float32 if elements > 1_000_000 else np.float64)


def fetch(sampler: Sampler, latents: Sequence[Latent], draws: np.ndarray, picks: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Draws of several latents at any positions.

    Args:
        sampler: The stream to draw from.
        latents: The latents.
        draws: Numbers of draws, any order.
        picks: Plate or event dimension -> positions, any order, repeats allowed; a missing one stands for all.

    Returns:
        Name -> array of shape (draws, *plates, *dims), of the latent's dtype.
    """
    drawn_set, draw_back = np.unique(np.asarray(draws, dtype=np.int64), return_inverse=True)
    unique = {name: np.unique(np.asarray(p, dtype=np.int64), return_inverse=True) for name, p in picks.items()}
    nowhere = {name for name, (found, _) in unique.items() if len(found) == 0}
    wanted = [v for v in latents if not nowhere.intersection(v.axes)]  # of no units there is nothing to compute
    plates = {p for v in wanted for p in v.plates}
    units = {name: found for name, (found, _) in unique.items() if name in plates}
    with _drawing:
        drawn = sampler.draw([v.name for v in wanted], drawn_set, units) if wanted else {}
    out = {}
    for v in latents:
        if v not in wanted:
            out[v.name] = np.empty((len(draw_back), *(len(picks[d]) if d in picks else n for d, n in zip(v.axes, v.shape, strict=True))), v.dtype)
            continue
        values = np.asarray(drawn[v.name])
        expected = (len(drawn_set), *(len(units[d]) if d in units else n for d, n in zip(v.axes, v.shape, strict=True)))
        if values.shape != expected:
            raise RunError("the sampler returned a wrong shape", where=f"latent {v.name!r}", expected=expected, got=values.shape)
        values = _take(values, draw_back, 0)
        for axis, dim in enumerate(v.axes, start=1):
            if dim in picks:
                values = _take(values, unique[dim][1] if dim in v.plates else np.asarray(picks[dim], dtype=np.int64), axis)
        out[v.name] = values.astype(v.dtype, copy=False)
    return out


def _take(values: np.ndarray, positions: np.ndarray, axis: int) -> np.ndarray:
    """`np.take`, without the copy where it would change nothing."""
    same = len(positions) == values.shape[axis] and np.array_equal(positions, np.arange(len(positions)))
    return values if same else np.take(values, positions, axis=axis)


_Loader = Callable[[str, Model | None], Context]
_LOADING = "pavi_scale.writing"  # registers the loader; a process that only unpickles lazy arrays, or opens a run through xarray, has not imported it
_loaders: list[_Loader] = []


def set_loader(loader: _Loader) -> None:
    """Register the function that turns a run path (and, where it cannot be imported, the model) into a `Context`."""
    _loaders[:] = [loader]


def load(run_path: str, model: Model | None = None) -> Context:
    """The context of a run.

    Raises:
        InputError: The model cannot be imported.
        RunError: No run, or a damaged one.
    """
    if not _loaders:
        import_module(_LOADING)
    return _loaders[0](run_path, model)
