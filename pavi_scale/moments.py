"""Posterior means and standard deviations of local latents."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import numpy as np
import torch
from torch import Tensor

from pavi_scale.batching import Shard
from pavi_scale.device import array
from pavi_scale.elbo import Weights, correctors
from pavi_scale.errors import NumericalError
from pavi_scale.guide.arrow import Arrow
from pavi_scale.guide.blocks import Block, Component, labelled, lies_below
from pavi_scale.guide.curvature import Expansion, LocalModel
from pavi_scale.guide.guide import Guide
from pavi_scale.guide.labels import LabelledCore
from pavi_scale.guide.local import Candidates, Core, candidates, fit_core
from pavi_scale.guide.mode import Noise
from pavi_scale.reduced import Reduced, Value


def conditional_moments(core: Core, z: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Mean and variance of a block's coordinates given the root, `[K, n, C, e]`; on a tree given its sampled coarser blocks, too."""
    gaussian = core.expansion.gaussian
    if isinstance(gaussian, Arrow):
        return core.mode[name], gaussian.variance(name)
    factor = gaussian.factor[name]
    if factor.shape[-1] == 1:
        variance = factor[..., 0] ** -2.0
    else:
        variance = torch.cholesky_inverse(factor).diagonal(dim1=-2, dim2=-1)
    return gaussian.conditional(name, core.mode, z), variance


def marginal_moments(core: Core) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance given the root of every block of a linear-Gaussian tree, its coarser blocks integrated out; empty for other components.

    The mean is the mode; covariances from coarse to fine, S_j = H_jj^-1 + G_ji S_i G_ji^T with the gain G_ji = H_jj^-1 H_ji.
    """
    gaussian, component = core.expansion.gaussian, core.local.component
    if isinstance(gaussian, Arrow) or not component.quadratic or any(len(above) > 1 for above in component.couplings.values()):
        return {}
    variance: dict[str, list[Tensor]] = {block.name: [] for block in component.blocks}
    for k in range(len(next(iter(core.mode.values())))):  # one root point at a time: whole covariances take room
        covariance: dict[str, Tensor] = {}
        for block in component.blocks:
            factor = _at(gaussian.factor[block.name], k)
            own = factor**-2.0 if factor.shape[-1] == 1 else torch.cholesky_inverse(factor)
            for above in component.couplings[block.name]:
                index, gain = gaussian.index[block.name, above], _at(gaussian.gain[block.name, above], k)
                parent = covariance[above] if index is None else covariance[above].index_select(0, index)
                own += (gain @ parent) @ gain.mT
            covariance[block.name] = own
            variance[block.name].append(own.diagonal(dim1=-2, dim2=-1).clone())
    return {b: (core.mode[b], torch.stack(v)) for b, v in variance.items()}


def _at(x: Tensor, k: int) -> Tensor:
    """That of root point k, or of all."""
    return x[min(k, len(x) - 1)]


Cores = dict[tuple[str, bytes], tuple[dict[str, Tensor], Expansion]]  # (component, root points) -> its core's mode and expansion
PASSED = 1 << 22  # coordinates x root points of a core that is kept at most


class Passed:
    """Cores of components that shards draw but do not answer for: found by the first shard of a round, the same for all.

    Only of components no law of which lies below the plate that shards divide.
    """

    def __init__(self) -> None:
        self._state: object = None
        self._cores: Cores = {}

    def of(self, state: object) -> Cores:
        """Those found at a state so far."""
        if state is not self._state:
            self._state, self._cores = state, {}
        return self._cores


MOST_CANDIDATES = 128  # per root point: hundreds of root points are averaged over


class Moments:
    """Posterior means and standard deviations of a shard's latents, over a fixed set of root points.

    Gaussian conditionals of latents with the identity link are Rao-Blackwellised: their moments are averaged, not draws. Resampled
    blocks average their candidates by importance weight.

    Args:
        guide: The guide.
        reduced: The shard's reduced model.
        weights: Sites and corrections of its units.
        noise: Standard normals.
        repeats: Local draws per root point, where draws are needed.
        most: Most candidates per draw.
        groups: In how many groups they are drawn (`candidates`).
        own: Components whose moments are wanted; the others are only drawn for those. None for all.
        passed: Where cores of the others are kept (`Passed`).
    """

    def __init__(
        self, guide: Guide, reduced: Reduced, weights: Weights, noise: Noise, repeats: int, most: int = MOST_CANDIDATES, groups: int = 1,
        own: Collection[str] | None = None, passed: Cores | None = None,
    ) -> None:
        self.own = {c.name for c in guide.components} if own is None else set(own)
        self.passed = {} if passed is None else passed
        self.guide, self.reduced, self.weights, self.noise = guide, reduced, weights, noise
        self.repeats, self.most, self.groups = repeats, most, groups
        self.corrections = correctors(weights, reduced)
        self.first: dict[str, Tensor] = {}
        self.second: dict[str, Tensor] = {}
        self.shift: dict[str, Tensor] = {}
        self.count: dict[str, int] = {}
        self.held: dict[str, np.ndarray] = {}  # coarse block of a labelled component -> what its draws need (`Parents.of`)

    def over(self, points: np.ndarray, root: Callable[[np.ndarray], Mapping[str, Value]], limits: Mapping[str, int], size: int) -> None:
        """Account for root points `[K, R]`, at most `size` of them at once.

        Args:
            points: The points.
            root: Points -> values of the root variables.
            limits: Component -> how many of the points it looks at.
            size: Points looked at together.
        """
        start = 0
        with torch.no_grad():
            while start < max(limits.values(), default=0):
                going = {name: stop for name, stop in limits.items() if stop > start}
                part = points[start : min(start + size, *going.values())]
                self.add(root(part), len(part), going, part.tobytes())
                start += len(part)

    def add(self, root: Mapping[str, Value], particles: int, only: Collection[str] | None = None, at: bytes = b"") -> None:
        """Account for K root points.

        Args:
            root: Values of the root variables.
            particles: K.
            only: Components to look at (an earlier one that they need must be among them), by default all.
            at: What tells these points from others.
        """
        values: dict[str, Value] = dict(root)
        for component in self.guide.components:
            if only is not None and component.name not in only:
                continue
            local = LocalModel(component, self.reduced, values, self.weights.sites, particles)
            if component.name not in self.own:
                self._pass_on(local, values, at)
                continue
            for latent in (n for b in component.blocks for n in b.latents):
                self.count[latent] = self.count.get(latent, 0) + particles
            data = labelled(component, self.guide.graph) if self.reduced.dtype == torch.float32 else None
            if data is not None:
                labels = LabelledCore(local, data, "moments")
                if labels.parent is not None:
                    self.held.setdefault(labels.parent.name, labels.held)
                found_labels = labels.moments()
                for block in component.blocks:
                    for latent in block.latents:
                        self._accumulate(latent, particles, *(local.split(block, latent, t) for t in found_labels[block.name]))
                continue
            core = fit_core(local, differentiable=False)
            closed = {b.name for b in component.blocks if b.name not in component.resampled and all(self.guide.graph.links[n].identity for n in b.latents)}
            closed = set() if self._groups(component) > 1 else closed
            times = self._candidates(component) if component.resampled else 1 if len(closed) == len(component.blocks) else self.repeats
            found = candidates(core, self.noise, times, self.corrections, self._groups(component))
            times = len(next(iter(found.sample.z.values()))) // particles
            mine = {n for b in component.blocks for n in b.latents}
            values.update({n: Value(v.theta[::times], v.plates) for n, v in found.sample.values.items() if n in mine})
            first = {b: z[::times] for b, z in found.sample.z.items()}
            marginal = marginal_moments(core)
            for block in component.blocks:
                if block.name in closed:
                    loc, variance = marginal[block.name] if marginal else conditional_moments(core, first, block.name)
                    for latent in block.latents:
                        self._accumulate(latent, particles, local.split(block, latent, loc), local.split(block, latent, variance))
                else:
                    self._accumulate_draws(block, particles, times, found)

    def _groups(self, component: Component) -> int:
        """Groups of a component's candidates."""
        return self.groups if component.joint else 1

    def _candidates(self, component: Component) -> int:
        """Candidates of a resampled component: hundreds of root points are averaged over, so that few do, but for groups."""
        return min(component.candidates, self.most, self.most if self._groups(component) > 1 else MOST_CANDIDATES)

    def _pass_on(self, local: LocalModel, values: dict[str, Value], at: bytes) -> None:
        """Draw a component for those that need it."""
        component, key = local.component, (local.component.name, at)
        # What hangs on a draw of an earlier component is this shard's alone.
        keep = rests_on_root(self.guide, component)
        known = self.passed.get(key) if keep else None
        core = fit_core(local, differentiable=False) if known is None else Core(local, *known)
        if keep and known is None and sum(z.numel() for z in core.mode.values()) <= PASSED:
            self.passed[key] = core.mode, core.expansion
        times = self._candidates(component) if component.resampled else 1
        found = candidates(core, self.noise, times, self.corrections).sample.values
        values.update({n: Value(found[n].theta[::times], found[n].plates) for b in component.blocks for n in b.latents})

    def _accumulate_draws(self, block: Block, particles: int, times: int, found: Candidates) -> None:
        """Account for weighted candidates: mean and variance over each root point's own."""
        share = found.log_share(block.name).exp()
        for latent in block.latents:
            event = self.guide.graph.links[latent].event_shape
            theta = found.sample.values[latent].theta.reshape(particles, times, -1, *event)
            weight = share.reshape(*share.shape, *([1] * len(event)))
            mean = (weight * theta).sum(1)
            self._accumulate(latent, particles, mean, (weight * (theta - mean[:, None]) ** 2).sum(1))

    def _accumulate(self, latent: str, weight: int, mean: Tensor, variance: Tensor) -> None:
        mean = mean.to(torch.float64)
        if latent not in self.shift:
            self.shift[latent] = mean.mean(0)  # sums are taken about it: no cancellation
            self.first[latent] = torch.zeros_like(self.shift[latent])
            self.second[latent] = torch.zeros_like(self.shift[latent])
        centred = mean - self.shift[latent]
        square = (centred * centred).mean(0) + variance.to(torch.float64).mean(0)
        self.first[latent] += weight * centred.mean(0)
        self.second[latent] += weight * square

    def result(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Latent -> (mean, sd), each `[*sizes(plates), *event]` in the variable's own axis order."""
        out = {}
        for latent, shift in self.shift.items():
            block = next(b for b in self.guide.blocks if latent in b.latents)
            v = self.guide.graph.model.variables[latent]
            mean = self.first[latent] / self.count[latent]
            variance = (self.second[latent] / self.count[latent] - mean * mean).clamp_min(0.0)
            sizes = self.reduced.sizes(block.plates)
            order = [*(block.plates.index(p) for p in v.plates), *range(len(v.plates), len(v.plates) + len(v.dims))]
            shaped = [array(t.reshape(*sizes, *self.guide.graph.shape(v)).permute(order)) for t in (shift + mean, variance.sqrt())]
            out[latent] = (shaped[0], shaped[1])
        return out

    def check(self, latent: str, mean: np.ndarray, sd: np.ndarray) -> None:
        """Refuse a moment that is not finite, and name its unit."""
        if not np.isfinite(mean).all() or not np.isfinite(sd).all():
            bad = np.argwhere(~(np.isfinite(mean) & np.isfinite(sd)))[0]
            plates = self.guide.graph.model.variables[latent].plates
            where = {p: int(self.reduced.selection.units[p][i]) for p, i in zip(plates, bad, strict=False)}
            raise NumericalError("posterior moment is not finite", where=f"latent {latent!r}, unit {where}")


def points_of(guide: Guide, reduced: Reduced, shard: Shard, asked: Mapping[str, int], most: int) -> dict[str, int]:
    """Root points that each component looks at in a shard; one that the shard does not answer for serves those that need its draws.

    Args:
        guide: The guide.
        reduced: The shard's reduced model.
        shard: The shard.
        asked: Component -> points, where not `most`.
        most: Points at hand.
    """
    here = {c.name: guide.counted(reduced, c.blocks[-1].plates, shard.plate, shard.first) for c in guide.components}
    needed = max((min(most, asked.get(n, most)) for n, own in here.items() if own), default=0)
    return {n: min(most, asked.get(n, most)) if own else needed for n, own in here.items()}


def answers_for(guide: Guide, reduced: Reduced, shard: Shard) -> set[str]:
    """Components whose moments a shard answers for; beside those no law of which lies below the split plate, the others of later shards, too."""
    model, split = guide.graph.model, shard.plate

    def below(component: Component) -> bool:
        laws = (model.variables[f.variable] for f in component.factors)
        return split is not None and any(lies_below(model.plates, v.plates, (split,)) for v in laws)

    return {c.name for c in guide.components if guide.counted(reduced, c.blocks[-1].plates, split, shard.first) or below(c)}


def rests_on_root(guide: Guide, component: Component) -> bool:
    """Whether no law of a component reads latents of another one: its core is then the same in all shards, given the root."""
    variables, own = guide.graph.model.variables, {n for b in component.blocks for n in b.latents}
    parents = {p for f in component.factors for p in variables[f.variable].parents}
    return not any(variables[p].kind == "latent" and variables[p].plates for p in parents - own)
