"""The reduced model: a model's log-densities on a selection of ground units, with its data in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
        data: Observed variables and covariates on those units, `[*sizes(plates), *event]`; NaN marks a masked observation.
        dtype: Floating-point type of the computation.
        device: Where it runs.
        partial: Whether `data` may lack variables (those that are never asked for).
    """

    def __init__(
        self, graph: Graph, selection: Selection, data: Mapping[str, Tensor], *, dtype: torch.dtype = torch.float64, device: str = "cpu", partial: bool = False
    ) -> None:
        self.graph, self.selection, self.dtype, self.device = graph, selection, dtype, device
        self.data: dict[str, Tensor] = {}
        self.masks: dict[str, Tensor] = {}
        for v in graph.model.of_kind("observed", "covariate"):
            if partial and v.name not in data:
                continue
            x = data[v.name].to(device=device, dtype=dtype)
            if v.missing == "mask":
                seen = ~torch.isnan(x)
                # A masked entry is given some value of the support, so that its (unused) density and gradient stay finite.
                filler = graph.fillers[v.name].to(device=device, dtype=dtype)
                self.masks[v.name] = seen.to(dtype)
                x = torch.where(seen, x, filler)
            self.data[v.name] = x
        self._aligned: dict[tuple[str, tuple[str, ...]], Aligned] = {}
        self._index: dict[tuple[tuple[str, ...], tuple[str, ...]], Tensor | None] = {}
        self.absorbed: dict[object, Any] = {}  # laws summed up once for all (see guide.curvature)
        self._weights: dict[tuple[str, ...], Tensor] = {}

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

    def log_prob(self, name: str, values: Mapping[str, Value], given: Mapping[str, Aligned] | None = None) -> Tensor:
        """log p(name | parents) per selected ground unit, `[K, *sizes(plates)]`.

        Args:
            name: A latent or observed variable.
            values: Latent values.
            given: Already aligned values that take precedence (copies to differentiate by).
        """
        v: Variable = self.graph.model.variables[name]
        given = given or {}
        own = given.get(name) or self.aligned(name, v.plates, values)
        parents = {p: given.get(p) or self.aligned(p, v.plates, values) for p in v.parents}
        mask = Aligned(self.masks[name], v.plates, False) if name in self.masks else None
        return self.graph.log_prob(v, own, parents, mask)

    def prior_mean(self, name: str, values: Mapping[str, Value]) -> Tensor:
        """Unconstrained conditional prior mean per ground unit, `[K, *sizes, *base_shape]`."""
        v = self.graph.model.variables[name]
        out = self.graph.prior_mean(v, {p: self.aligned(p, v.plates, values) for p in v.parents})
        return out.expand(out.shape[0], *self.sizes(v.plates), *self.graph.links[name].base_shape).to(self.dtype)


def read(graph: Graph, selection: Selection, names: Sequence[str], source: object) -> dict[str, Tensor]:
    """Data of `names` on the selected units, from anything with `read(name, units)` (a `Cohort`)."""
    reader = source.read  # type: ignore[attr-defined]
    return {n: torch.as_tensor(np.asarray(reader(n, {p: selection.units[p] for p in graph.model.variables[n].plates}))) for n in names}
