"""Replicated observations and log-likelihoods of a posterior's draws.

Replicate d of a ground unit is a function of (seed, variable, ground index, d), as the draws of latents are: the same whatever slice is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import numpy as np
import torch
from torch import Tensor

from pavi_scale import rng
from pavi_scale.ambient import seeded
from pavi_scale.model.density import Aligned, Graph, align
from pavi_scale.model.simulate.batched import captured, draw, unvalidated
from pavi_scale.model.simulate.quantiles import NoQuantileError, draw_by_quantiles
from pavi_scale.model.template import Variable
from pavi_scale.plates import Selection, ancestors
from pavi_scale.posterior.sampler import Context, Latent, Sampler

_VALUES = 1 << 22  # values computed at once


@dataclass
class Replicates:
    """The `Sampler` of replicated observed variables.

    Args:
        context: The posterior's.
        seed: Stream of draws: of the latents, and of the noise on top.
    """

    context: Context
    seed: int = 0

    def variables(self) -> tuple[Latent, ...]:
        """What there is to draw."""
        return tuple(Latent(v.name, v.plates, v.dims, self.context.shape(v)) for v in self.context.model.of_kind("observed"))

    def with_seed(self, seed: int) -> Sampler:
        """Another stream."""
        return replace(self, seed=seed)

    def draw(self, names: Sequence[str], draws: np.ndarray, units: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Replicated values, `[len(draws), *units of the plates, *dims]`; as for `Sampler`."""
        return {name: self._each(self.context.model.variables[name], np.asarray(draws), units) for name in names}

    def elbo(self, particles: int, seed: int) -> tuple[float, float]:
        """That of the posterior."""
        return self.context.sampler.elbo(particles, seed)

    def _each(self, v: Variable, draws: np.ndarray, units: Mapping[str, np.ndarray]) -> np.ndarray:
        selection = self._selection(v, units)
        size = max(1, _VALUES // max(1, prod(selection.sizes(v.plates)) * prod(self.context.shape(v)[len(v.plates) :])))
        fixed = {p: self._covariate(p, v, selection) for p in v.parents if self.context.model.variables[p].kind == "covariate"}
        parts = []
        for start in range(0, len(draws), size):
            part = draws[start : start + size]
            parents = self._latents(v, part, selection) | fixed
            parts.append(self._values(v, part, {p: parents[p] for p in v.parents}, selection))
        return np.concatenate(parts)

    def _selection(self, v: Variable, units: Mapping[str, np.ndarray]) -> Selection:
        """The wanted units of the variable's plates, and what they lie within."""
        layout = self.context.layout
        chosen = {p: np.asarray(units.get(p, np.arange(layout.cardinality[p]))) for p in v.plates}
        for plate in v.plates:
            for above in ancestors(layout.plates, plate):
                # A plate that the variable has itself stays as it was asked for.
                reached = np.unique(layout.path(plate, above)[units[plate]] if plate in units else layout.path(plate, above))
                chosen[above] = chosen[above] if above in v.plates else np.union1d(chosen.get(above, reached), reached)
        return Selection(layout, chosen, {})

    def _latents(self, v: Variable, draws: np.ndarray, selection: Selection) -> dict[str, Aligned]:
        model = self.context.model
        names = [p for p in v.parents if model.variables[p].kind == "latent"]
        plates = {q for n in names for q in model.variables[n].plates}
        sampler = self.context.sampler if self.seed == self.context.sampler.seed else self.context.sampler.with_seed(self.seed)
        drawn = sampler.draw(names, draws, {q: selection.units[q] for q in plates}) if names else {}
        return {n: align(torch.as_tensor(drawn[n], dtype=torch.float64), True, model.variables[n].plates, v.plates, selection) for n in names}

    def _covariate(self, name: str, v: Variable, selection: Selection) -> Aligned:
        own = self.context.model.variables[name]
        values = self.context.dataset[name].transpose(*own.plates, *own.dims).isel({q: selection.units[q] for q in own.plates}).values
        return align(torch.as_tensor(np.array(values, dtype=np.float64)), False, own.plates, v.plates, selection)

    def _values(self, v: Variable, draws: np.ndarray, parents: Mapping[str, Aligned], selection: Selection) -> np.ndarray:
        sizes, event = (len(draws), *selection.sizes(v.plates)), self.context.shape(v)[len(v.plates) :]
        placed = {p: (a.value, ((0,) if a.particles else ()) + tuple(1 + v.plates.index(q) for q in a.axes)) for p, a in parents.items()}
        law = captured(v, placed, sizes, event)
        positions = [selection.units[p] for p in v.plates]

        def uniforms(path: str, shape: torch.Size) -> Tensor:
            rest = np.arange(prod(shape[len(sizes) :]))
            grid = np.ix_(draws, *positions, rest)
            return torch.from_numpy(rng.uniform(rng.stream(self.seed, "predict", v.name, path), *grid).reshape(shape))

        if law is not None:
            try:
                with unvalidated():
                    return draw_by_quantiles(law, uniforms).double().numpy()
            except NoQuantileError:
                pass
        return self._one_by_one(v, draws, placed, sizes, event, positions)

    def _one_by_one(
        self, v: Variable, draws: np.ndarray, placed: Mapping[str, tuple[Tensor, tuple[int, ...]]], sizes: tuple[int, ...], event: tuple[int, ...],
        positions: Sequence[np.ndarray],
    ) -> np.ndarray:  # fmt: skip
        """For laws that torch alone can draw from: its generator is seeded for every draw of every unit."""
        out = np.empty((*sizes, *event))
        with seeded():
            for at in np.ndindex(*sizes):
                units = [int(p[i]) for p, i in zip(positions, at[1:], strict=True)]
                torch.manual_seed(rng.stream(self.seed, "predict", v.name, int(draws[at[0]]), *units))
                out[at] = draw(v, {p: (value[tuple(at[a] for a in axes)], ()) for p, (value, axes) in placed.items()}, (), event).numpy()
        return out


class LogLikelihoods(Replicates):
    """The `Sampler` of log p(observed | latents) of each ground unit; NaN where an observation is missing."""

    def variables(self) -> tuple[Latent, ...]:
        """What there is to compute: a number for each ground unit."""
        return tuple(replace(v, dims=(), shape=v.shape[: len(v.plates)]) for v in super().variables())

    @cached_property
    def _graph(self) -> Graph:
        return Graph(self.context.model, self.context.event_sizes)

    def _values(self, v: Variable, draws: np.ndarray, parents: Mapping[str, Aligned], selection: Selection) -> np.ndarray:
        own = self._covariate(v.name, v, selection)
        seen = ~torch.isnan(own.value)
        mask = Aligned(seen.double(), v.plates, False) if v.missing == "mask" else None
        if mask is not None:
            own = Aligned(torch.where(seen, own.value, self._graph.fillers[v.name].double()), v.plates, False)
        out = self._graph.log_prob(v, own, parents, mask).numpy()
        absent = ~seen.reshape(*selection.sizes(v.plates), -1).any(-1).numpy()
        return np.where(absent, np.nan, np.broadcast_to(out, (len(draws), *selection.sizes(v.plates))))
