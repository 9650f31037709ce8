"""Draws and moments of a fitted guide.

Draw d of a ground unit is a function of (seed, block, ground index, d): the same whatever slice is asked for (see `rng`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pavi_scale import rng
from pavi_scale.ambient import precision
from pavi_scale.batching import closure, flat_positions, most_units, shards, splittable
from pavi_scale.computation import Arrays, StudyComputation
from pavi_scale.elbo import correctors, log_root
from pavi_scale.guide.blocks import Block, Component, labelled, lies_below
from pavi_scale.guide.curvature import LocalModel
from pavi_scale.guide.labels import Labels, Parents, Prior
from pavi_scale.guide.local import candidates, draw, fit_core, resample
from pavi_scale.plates import Selection
from pavi_scale.reduced import Value
from pavi_scale.server.answer import settle_threads
from pavi_scale.weighing import groups_of


def needed(components: Sequence[Component], computation: StudyComputation, names: Sequence[str]) -> list[Component]:
    """Components whose values the named latents depend on, in order."""
    owner = {n: c for c in components for b in c.blocks for n in b.latents}
    wanted = {owner[n].name for n in names if n in owner}
    for component in reversed(components):
        if component.name in wanted:
            for f in component.factors:
                v = computation.graph.model.variables[f.variable]
                wanted |= {owner[p].name for p in (*v.parents, v.name) if p in owner}
    return [c for c in components if c.name in wanted]


def inputs(computation: StudyComputation, components: Sequence[Component]) -> list[str]:
    """Observed variables and covariates that the components read."""
    model = computation.graph.model
    touched = [model.variables[f.variable] for c in components for f in c.factors]
    names = {n for v in touched for n in (v.name, *v.parents)} | {p for v in model.latents if not v.plates for p in v.parents}
    return [n for n in model.variables if n in names and model.variables[n].kind != "latent"]


STRATA = 1000
FIRST = 4  # draws of a labelled component before threads share the rest
AT_ONCE = 1 << 21  # values of the data, times draws, of a labelled component's units: what is computed of them stays in the processor's cache
TOGETHER = 1 << 17  # coordinates of the other components, times draws, where threads share the draws
MOST = 125  # draws at once there


@dataclass
class GuideSampler:
    """The `Sampler` of a fitted study.

    Args:
        computation: The study's computation, in this process.
        state: Its weights: `pool/points`, `pool/weight`, `root/loc`, `root/raw`, tables of rows, corrections.
        base: Seed of the fit.
        seed: Number of the stream of draws.
    """

    computation: StudyComputation
    state: Arrays
    base: int = 0
    seed: int = 0

    def with_seed(self, seed: int) -> GuideSampler:
        """The same guide with another stream of draws."""
        return GuideSampler(self.computation, self.state, self.base, seed)

    def root_points(self, draws: np.ndarray) -> np.ndarray:
        """Root coordinates of the draws, `[len(draws), R]`."""
        u = self._strata(draws)
        weight = np.cumsum(self.state["pool/weight"])
        return self.state["pool/points"][np.searchsorted(weight / weight[-1], u).clip(0, len(weight) - 1)]

    def _strata(self, draws: np.ndarray) -> np.ndarray:
        """Uniforms, one per draw, stratified over each thousand draws (Kitagawa 1996): in the pool's order, near points share a stratum.

        Each thousand visits its strata in an order of its own, so that neighbouring draws are not alike.
        """
        jitter = rng.uniform(rng.stream(self.base, "draw", self.seed, "root"), draws)
        thousand, place = np.divmod(draws, STRATA)
        orders = {int(t): np.random.default_rng(rng.stream(self.base, "strata", self.seed, int(t))).permutation(STRATA) for t in np.unique(thousand)}
        stratum = np.asarray([orders[int(t)][p] for t, p in zip(thousand, place, strict=True)], dtype=np.float64)
        return (stratum + jitter) / STRATA

    def draw(self, names: Sequence[str], draws: np.ndarray, units: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Values of latents, `[len(draws), *units of the plates, *dims]`; a plate left out of `units` stands for all its units."""
        study = self.computation
        model = study.graph.model
        draws = np.asarray(draws)
        components = needed(study.guide.components, study, names)
        asked = {p: np.asarray(units[p]) if p in units else np.arange(study.layout.cardinality[p]) for n in names for p in model.variables[n].plates}
        held = {c.name: f"held/{c.blocks[0].name}" for c in components if labelled(c, study.graph) and f"held/{c.blocks[0].name}" in self.state}
        selection = self._selection(components, asked, held)
        with precision(study.dtype), torch.no_grad():
            reduced = study.reduced(selection, inputs(study, components))
            weights = study.weights(self.state, reduced)
            corrections = correctors(weights, reduced)
        size = max(1, study.per_chunk(reduced) // max(1, study.draws_per_unit(self.state)))
        few = size
        if held:
            values_read = sum(math.prod((*reduced.sizes(v.plates), *study.graph.shape(v))) for v in model.of_kind("observed"))
            others = sum(reduced.count(b.plates) * b.dim for c in components if c.name not in held for b in c.blocks)
            few = max(1, min(size, AT_ONCE // max(1, values_read)))
            size = max(few, min(size, MOST, TOGETHER // max(1, others)))
        parents = {c.name: Parents.of(self.state[held[c.name]][flat_positions(study.layout, selection, c.blocks[0])]) for c in components if c.name in held}
        priors: dict[str, list[Prior]] = {}
        out: dict[str, np.ndarray] = {}

        def follow(components: Sequence[Component], values: dict[str, Value], start: int, part: np.ndarray) -> None:
            """Draw the components in order and put what was asked for in its place; from the first labelled one on, few draws at once."""
            noise = self._noise(selection, part)
            for number, component in enumerate(components):
                if component.name in held and len(part) > few:
                    for at in range(0, len(part), few):
                        cut = slice(at, at + few)
                        some = {n: Value(v.theta[cut] if len(v.theta) == len(part) else v.theta, v.plates) for n, v in values.items()}
                        follow(components[number:], some, start + at, part[cut])
                    return
                local = LocalModel(component, reduced, values, weights.sites, len(part))
                if component.name in held:
                    labels = Labels(local, str(labelled(component, study.graph)), priors.get(component.name))
                    if labels.constant:
                        priors[component.name] = labels.priors[:1]
                    values.update(local.values(labels.draw(parents[component.name], noise)))
                    continue
                core = fit_core(local, differentiable=False)
                if component.resampled:
                    most = min(component.candidates, study.draws_per_unit(self.state))
                    tried = candidates(core, noise, most, corrections, groups_of(self.state))
                    values.update(resample(core, tried, self._uniforms(selection, component, part)))
                else:
                    values.update(draw(core, noise, corrections).values)
            for n in names:
                found = self._pick(values[n], model.variables[n].plates, selection, asked)
                if start == 0:
                    out[n] = np.empty((len(draws), *found.shape[1:]), found.dtype)
                out[n][start : start + len(part)] = found

        def some(start: int, size: int = size) -> None:
            part = draws[start : start + size]
            with precision(study.dtype), torch.no_grad():
                follow(components, dict(study.space.values(torch.tensor(self.root_points(part), dtype=study.dtype))), start, part)

        first = min(FIRST, size) if held else size
        some(0, first)  # reads the data
        rest = range(first, len(draws), size)
        if held and len(rest) > 1:  # the loops over leaves let other threads run
            with ThreadPoolExecutor(os.cpu_count() or 1, "pavi-draw", settle_threads, (1,)) as pool:
                list(pool.map(some, rest))
        else:
            for start in rest:
                some(start)
        return out

    def _selection(self, components: Sequence[Component], asked: Mapping[str, np.ndarray], held: Mapping[str, str]) -> Selection:
        """The smallest closed selection that holds what is asked for; of components whose parents' posterior is held, only that itself."""
        study = self.computation
        plates = study.graph.model.plates
        mine = {p for c in components if c.name in held for b in c.blocks for p in b.plates}
        chosen = {p: np.unique(asked[p]) if p in asked else np.arange(1) for p in mine}
        components = [c for c in components if c.name not in held]
        for top in splittable(study.graph.model, components):
            if top in chosen:
                continue
            below = [p for p in asked if lies_below(plates, (p,), (top,))]
            if below:
                chosen[top] = np.unique(np.concatenate([study.layout.path(p, top)[asked[p]] for p in below]))
            elif not any(lies_below(plates, b.plates, (top,)) for c in components for b in c.blocks):
                chosen[top] = np.arange(1)  # nothing asked for depends on it
        return closure(study.layout, chosen)

    def _noise(self, selection: Selection, draws: np.ndarray) -> Any:
        study = self.computation

        def noise(block: Block, shape: tuple[int, ...]) -> Tensor:
            units = flat_positions(study.layout, selection, block)
            key = rng.stream(self.base, "draw", self.seed, block.name)
            many = np.arange(shape[0] // len(draws))  # candidates of each draw
            counters = draws[:, None, None, None], many[None, :, None, None], units[None, None, :, None], np.arange(shape[2] * shape[3])
            grid = rng.normal(key, *counters, dtype=np.float32 if study.dtype == torch.float32 else np.float64)
            return torch.from_numpy(grid.reshape(shape))

        return noise

    def _uniforms(self, selection: Selection, component: Component, draws: np.ndarray) -> dict[str, Tensor]:
        study = self.computation
        out = {}
        for block in component.blocks:
            units = flat_positions(study.layout, selection, block)
            key = rng.stream(self.base, "pick", self.seed, block.name)
            out[block.name] = torch.from_numpy(rng.uniform(key, draws[:, None], units[None, :])).to(study.dtype)
        return out

    def _pick(self, value: Value, plates: tuple[str, ...], selection: Selection, asked: Mapping[str, np.ndarray]) -> np.ndarray:
        order = [0, *(1 + value.plates.index(p) for p in plates), *range(1 + len(plates), value.theta.ndim)]
        array = value.theta.permute(order).numpy()
        for axis, p in enumerate(plates, start=1):
            at = np.searchsorted(selection.units[p], asked[p])
            if len(at) != array.shape[axis]:
                array = array.take(at, axis)
        return array

    def elbo(self, particles: int, seed: int) -> tuple[float, float]:
        """Full-data ELBO in nats and its standard error, root drawn from the Gaussian q(root) by at least two particles."""
        study = self.computation
        key = rng.stream(self.base, "elbo", seed)
        loc, raw = self.state["root/loc"], self.state["root/raw"]
        chol = np.tril(raw, -1) + np.diag(np.exp(np.diagonal(raw)))
        # Antithetic pairs, so that what is linear in the root cancels; a standard error takes two of them, and whole ones.
        paired = particles >= 4 and len(loc) > 0
        half = (particles + 1) // 2
        eps = rng.normal(key, np.arange(half if paired else particles)[:, None], np.arange(len(loc))[None, :])
        eps = np.concatenate([eps, -eps]) if paired else eps
        z = torch.tensor(loc + eps @ chol.T)
        with precision(study.dtype), torch.no_grad():
            total = (study.space.log_prior(z.to(study.dtype)).double() - log_root(torch.tensor(loc), torch.tensor(chol), z)).numpy()
        state = {**self.state, "points": z.numpy()}
        for shard in shards(study.layout, study.settings.split, self.per_shard()):
            total = total + study.compute("elbo", state, {"shard": (shard.plate, shard.start, shard.stop, shard.first), "seed": seed})["bound"]
        pairs = 0.5 * (total[:half] + total[half:]) if paired else total
        return float(total.mean()), float(pairs.std(ddof=1) / np.sqrt(len(pairs)))

    def per_shard(self) -> int:
        """Units of the split plate computed at once."""
        return shard_length(self.computation)


def shard_length(study: StudyComputation, particles: int = 1) -> int:
    """Units of the split plate in one shard, from the chunk budget of the settings."""
    split = study.settings.split
    if split is None:
        return 1
    layout = study.layout
    units = most_units(study.graph.model, layout, split)
    # Two particles of a shard fill a chunk: fewer, longer tasks, and the data of a shard read once for both.
    length = max(1, int(study.settings.chunk * layout.cardinality[split] / (2 * particles * units)))
    chunk = study.cohort.chunk(split)
    if chunk and length > chunk:
        length -= length % chunk
    elif chunk:
        length = -(-chunk // -(-chunk // length))  # the shards of one row of chunks are alike
    return min(length, layout.cardinality[split])
