"""The reduced model: a model's log-densities on a selection of ground units, with its data in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pavi_scale.device import PROCESSOR
from pavi_scale.model.density import Aligned, Graph, align
from pavi_scale.model.template import Variable
from pavi_scale.plates import Selection


@dataclass(frozen=True)
class Value:
    """A latent's value on the selected units: `[K, *sizes(plates), *event]`; K particles."""

    theta: Tensor
    plates: tuple[str, ...]


class Reduced:
    """Model x Selection.

    log p_reduced = sum_i sum_{n selected} w_{i,n} log p_i(theta_{i,n} | parents), w the inverse inclusion probability
    (method of PAVI, section 3); `log_prob` returns the unweighted terms, `weights` the w.

    Args:
        graph: Model with its links.
        selection: Selected ground units.
        data: Observed variables and covariates on those units, `[*sizes(plates), *event]`; NaN marks a masked observation. A variable is
            looked up when it is first needed, so that a mapping may read it from a store then (`Reading`).
        dtype: Floating-point type of the computation.
        device: Where it runs.
    """

    def __init__(
        self, graph: Graph, selection: Selection, data: Mapping[str, Tensor], *, dtype: torch.dtype = torch.float64, device: torch.device | str = PROCESSOR
    ) -> None:
        self.graph, self.selection, self.dtype, self.device = graph, selection, dtype, device
        self.masks: dict[str, Tensor] = {}
        self.data = _Data(data, partial(_prepare, graph, self.masks, dtype, device))
        self._aligned: dict[tuple[str, tuple[str, ...]], Aligned] = {}
        self._index: dict[tuple[tuple[str, ...], tuple[str, ...]], Tensor | None] = {}
        self.absorbed: dict[object, Any] = {}  # laws summed up once for all (see guide.curvature)
        self.starts: dict[str, Tensor] = {}  # block -> coordinates `[n, C e]` from which modes are searched, and where they were found
        self.modes: dict[str, Tensor] = {}  # block -> log volume and coordinates `[n, S, 1 + C e]` of modes known of each unit
        self._weights: dict[tuple[str, ...], Tensor] = {}

    def forget(self, names: Iterable[str]) -> None:
        """Let go of variables that are not needed any more (they are read again if they are)."""
        for name in names:
            self.data.pop(name, None)
            self.masks.pop(name, None)
            for key in [k for k in list(self._aligned) if k[0] == name]:
                self._aligned.pop(key, None)
            plates = self.graph.model.variables[name].plates
            if not any(v.plates == plates for v in self.graph.model.latents):
                for pair in [p for p in list(self._index) if p[0] == plates]:
                    self._index.pop(pair, None)
                self._weights.pop(plates, None)

    def load(self) -> None:
        """Have all data read now."""
        for name in self.data.known:
            self.data[name]

    def _held(self) -> list[Tensor]:
        return [t for t in (*list(self._index.values()), *list(self._weights.values())) if t is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of what is held: data, masks, copies aligned to other plates, and laws summed up."""
        copies = [a.value for a in list(self._aligned.values())]
        held = {t.untyped_storage()._cdata: t for t in (*self.data.values(), *self.masks.values(), *copies, *self._held())}
        return sum(t.numel() * t.element_size() for t in held.values()) + sum(getattr(a, "nbytes", 0) for a in list(self.absorbed.values()))

    def sizes(self, plates: tuple[str, ...]) -> tuple[int, ...]:
        """Numbers of selected units."""
        return self.selection.sizes(plates)

    def weights(self, plates: tuple[str, ...]) -> Tensor:
        """Inverse inclusion probabilities, `[*sizes(plates)]`."""
        if plates not in self._weights:
            self._weights[plates] = torch.from_numpy(self.selection.weights(plates)).to(device=self.device, dtype=self.dtype)
        return self._weights[plates]

    def count(self, plates: tuple[str, ...]) -> int:
        """Number of selected ground units of a variable on `plates`."""
        return math.prod(self.sizes(plates))

    def unit_index(self, fine: tuple[str, ...], coarse: tuple[str, ...]) -> Tensor | None:
        """Flat position of the unit on plates `coarse` that each unit on plates `fine` belongs to; None for the identity."""
        key = (fine, coarse)
        if key not in self._index:
            grid = torch.arange(self.count(coarse), device=self.device).reshape(self.sizes(coarse))
            flat = align(grid, False, coarse, fine, self.selection)
            shape = [len(self.selection.units[p]) if p in flat.axes else 1 for p in fine]
            index = flat.value.reshape(shape).expand(self.sizes(fine)).flatten()
            self._index[key] = None if fine == coarse else index
        return self._index[key]

    def aligned(self, name: str, target: tuple[str, ...], values: Mapping[str, Value]) -> Aligned:
        """Value of `name` (a latent in `values`, or data) on the ground units of plates `target`."""
        v = self.graph.model.variables[name]
        if name in values:
            return align(values[name].theta, True, values[name].plates, target, self.selection)
        key = (name, target)
        if key not in self._aligned:
            self._aligned[key] = align(self.data[name], False, v.plates, target, self.selection)
        return self._aligned[key]

    def log_prob(self, name: str, values: Mapping[str, Value], given: Mapping[str, Aligned] | None = None, *, alone: bool = False) -> Tensor:
        """log p(name | parents) per selected ground unit, `[K, *sizes(plates)]`.

        Args:
            name: A latent or observed variable.
            values: Latent values.
            given: Already aligned values that take precedence (copies to differentiate by).
            alone: Only the first unit; `given` holds that one's values.
        """
        v: Variable = self.graph.model.variables[name]
        given = given or {}
        look: Callable[[str], Aligned] = partial(self.aligned, target=v.plates, values=values)
        own = given.get(name) or (_first(look(name)) if alone else look(name))
        parents = {p: given.get(p) or (_first(look(p)) if alone else look(p)) for p in v.parents}
        mask = Aligned(self.masks[name], v.plates, False) if name in self.masks else None
        return self.graph.log_prob(v, own, parents, _first(mask) if mask is not None and alone else mask)

    def second_order(self, name: str, values: Mapping[str, Value], given: Mapping[str, Aligned]) -> tuple[Tensor, Tensor, Tensor]:
        """As `log_prob`, with the gradient and minus the Hessian that the law gives by one of its parents (`Graph.second_order`)."""
        v = self.graph.model.variables[name]
        parents = {p: given.get(p) or self.aligned(p, v.plates, values) for p in v.parents}
        return self.graph.second_order(v, self.aligned(name, v.plates, values), parents)

    def evidence(
        self, name: str, values: Mapping[str, Value], rows: slice = slice(None), given: Mapping[str, Aligned] | None = None,  # noqa: B008 (immutable)
    ) -> Tensor:
        """Log p(name | label, other parents) per ground unit of a mixture, `[K, *sizes(plates), labels]` (`Graph.evidence`).

        Args:
            name: The observed mixture.
            values: Latent values.
            rows: Units of its first plate.
            given: As in `log_prob`.
        """
        v, given = self.graph.model.variables[name], given or {}
        logits = self.graph.labelled[name]
        zero = Aligned(torch.zeros(self.graph.links[logits].size, dtype=self.dtype), (), False)  # it does not enter
        look = {p: zero if p == logits else given.get(p) or self.aligned(p, v.plates, values) for p in (name, *v.parents)}
        some = {p: a.rows(rows) if a.axes and a.axes[0] == v.plates[0] else a for p, a in look.items()}
        return self.graph.evidence(v, some.pop(name), some)

    def prior_mean(self, name: str, values: Mapping[str, Value], given: Mapping[str, Aligned] | None = None, *, alone: bool = False) -> Tensor:
        """Unconstrained conditional prior mean per ground unit, `[K, *sizes, *base_shape]`; `given` and `alone` as in `log_prob`."""
        v, given = self.graph.model.variables[name], given or {}
        look: Callable[[str], Aligned] = partial(self.aligned, target=v.plates, values=values)
        out = self.graph.prior_mean(v, {p: given.get(p) or (_first(look(p)) if alone else look(p)) for p in v.parents})
        sizes = (1,) * len(v.plates) if alone else self.sizes(v.plates)
        return out.expand(out.shape[0], *sizes, *self.graph.links[name].base_shape).to(self.dtype)


def _first(aligned: Aligned) -> Aligned:
    """The value on the first unit."""
    lead = (slice(None),) * int(aligned.particles)
    return Aligned(aligned.value[(*lead, *(slice(1) for _ in aligned.axes))], aligned.axes, aligned.particles)


def _prepare(graph: Graph, masks: dict[str, Tensor], dtype: torch.dtype, device: torch.device | str, name: str, raw: Tensor) -> Tensor:
    """Data in the precision of the computation; what was not observed becomes a mask."""
    x = raw.to(device).to(dtype)  # as it is stored: that is less to carry
    if graph.model.variables[name].missing == "mask":
        seen = ~torch.isnan(x)
        # A masked entry is given some value of the support, so that its (unused) density and gradient stay finite.
        masks[name] = seen.to(dtype)
        x = torch.where(seen, x, graph.fillers[name].to(device=device, dtype=dtype))
    return x


class _Data(dict[str, Tensor]):
    """Data by name, prepared on first use."""

    def __init__(self, source: Mapping[str, Tensor], prepare: Callable[[str, Tensor], Tensor]) -> None:
        super().__init__()
        self._source, self._prepare = source, prepare

    @property
    def known(self) -> tuple[str, ...]:
        """Names that may be asked for."""
        return tuple(self._source)

    def __missing__(self, name: str) -> Tensor:
        self[name] = self._prepare(name, self._source[name])
        return self[name]

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in self._source


class Reading(Mapping[str, Tensor]):
    """Data of a selection, read from a cohort when asked for.

    Args:
        graph: The model.
        selection: The ground units.
        names: Variables that may be asked for.
        source: Anything with `read(name, units)`, a `Cohort`.
    """

    def __init__(self, graph: Graph, selection: Selection, names: Sequence[str], source: Source) -> None:
        self._graph, self._selection, self._names, self._source = graph, selection, tuple(names), source

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        plates = self._graph.model.variables[name].plates
        return torch.as_tensor(np.asarray(self._source.read(name, {p: self._selection.units[p] for p in plates})))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Source(Protocol):
    """What data are read from."""

    def read(self, name: str, units: Mapping[str, np.ndarray] | None = None) -> np.ndarray:
        """Values of a variable on the given units of its plates."""
        ...
