"""The local guide: one conditional Gaussian core per component, sampled coarse to fine, with a learned correction on top."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pavi_scale.guide.arrow import Arrow
from pavi_scale.guide.blocks import Block
from pavi_scale.guide.curvature import Coordinates, Expansion, LocalModel
from pavi_scale.guide.gaussian import Tree, back, forward, log_det
from pavi_scale.guide.kept import costly, settle
from pavi_scale.guide.mode import Noise, find_mode, nearer, per_unit
from pavi_scale.reduced import Value

Correction = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # (noise, context) -> (corrected noise, log |d corrected / d noise|)


@dataclass
class Core:
    """The Gaussian core of one component at given root values."""

    local: LocalModel
    mode: Coordinates
    expansion: Expansion

    def log_marginal(self, weights: Tensor) -> Tensor:
        """Laplace value of the log marginal likelihood of the component, `[K]`; exact for linear-Gaussian laws.

        Args:
            weights: Weight of each unit of the top block, `[n_top]`.
        """
        gaussian, local = self.expansion.gaussian, self.local
        units = self.expansion.value
        if isinstance(gaussian, Tree):
            for block in local.component.blocks:
                term = 0.5 * block.dim * math.log(2 * math.pi) - log_det(gaussian.factor[block.name])
                units = units + local.to_top(term, block.plates)
            total = (units * weights).sum(1)
        else:
            count = sum(z[0].numel() for z in self.mode.values())
            total = (units * weights).sum(1) + 0.5 * count * math.log(2 * math.pi) - gaussian.log_det()
        # Without digits the value is anything, and one huge value would take all the weight of the refit. Curvatures of other laws may be
        # indefinite for good reasons.
        return torch.where(gaussian.lost, -math.inf, total) if local.component.quadratic else total

    def repeat(self, times: int) -> Core:
        """The same core for `times` particles in place of each, neighbours together."""
        def many(t: Tensor) -> Tensor:
            return t.repeat_interleave(times, 0)

        given = {n: Value(many(v.theta), v.plates) for n, v in self.local.given.items()}
        local = LocalModel(self.local.component, self.local.reduced, given, self.local.sites, times * self.local.particles)
        return Core(local, {b: many(t) for b, t in self.mode.items()}, replace(self.expansion, gaussian=self.expansion.gaussian.mapped(many)))

    def parts(self, size: int) -> Iterator[Core]:
        """The core of some neighbouring particles after the other, `size` at a time."""
        for start in range(0, self.local.particles, size):
            at = torch.arange(start, min(start + size, self.local.particles))
            few = self.expansion.gaussian.mapped(lambda t, at=at: t[at])  # type: ignore[misc]
            yield Core(self.local.select(at), {b: t[at] for b, t in self.mode.items()}, replace(self.expansion, gaussian=few))


def weights(core: Core) -> Tensor:
    """Weight of each unit of the top block, `[n_top]`; one where there is no top block."""
    local = core.local
    if local.top is None:
        return torch.ones(1, dtype=local.reduced.dtype)
    return local.reduced.weights(local.top.plates).flatten()


def fit_core(local: LocalModel, *, differentiable: bool) -> Core:
    """Mode and curvature of a component.

    With `differentiable`, one Newton step from the (detached) mode carries its derivative with respect to what was given
    (implicit function theorem), so that neither the search nor its length enters the gradient.
    """
    if local.component.quadratic:
        start = local.start()
        expansion = local.expand(start, differentiable=differentiable)
        mode = {b: z + expansion.gaussian.step[b] for b, z in start.items()}
        value = expansion.value
        for block in local.component.blocks:  # a quadratic rises by g.step / 2 on the way to its mode
            rise = 0.5 * (expansion.gradient[block.name] * expansion.gaussian.step[block.name]).sum((-1, -2))
            value = value + local.to_top(rise, block.plates)
        return Core(local, mode, Expansion(value, expansion.gradient, expansion.gaussian))
    if costly(local):
        mode, expansion = settle(local, nearer(local, local.start()))
        if not differentiable:
            return Core(local, mode, expansion)
        # At the mode the gradient is zero, so that the step's derivative is that of the gradient alone: the curvature's need not be known.
        step = expansion.gaussian.solve(local.slope(mode, differentiable=True)[1])  # type: ignore[union-attr]
        mode = {b: z + step[b] for b, z in mode.items()}
        return Core(local, mode, local.expand(mode, differentiable=True))
    mode = find_mode(local)
    if differentiable:
        step = local.expand(mode, differentiable=True).gaussian.step
        mode = {b: z + step[b] for b, z in mode.items()}
    return Core(local, mode, local.expand(mode, differentiable=differentiable))


@dataclass
class Sample:
    """A draw of a component: coordinates `[K, n, C, e]` and log q per unit `[K, n]` of each block."""

    z: Coordinates
    log_q: dict[str, Tensor]
    values: dict[str, Value] = field(default_factory=dict)


def draw(core: Core, noise: Noise, corrections: Mapping[str, Correction] | None = None, each: int = 1) -> Sample:
    """Sample the component, coarse blocks first.

    Args:
        core: The Gaussian core.
        noise: Standard normals by block.
        corrections: Block -> learned map of its noise; the identity where absent.
        each: Neighbouring particles that are candidates of one draw: a part of them has heavy tails (`widen`).
    """
    local, gaussian = core.local, core.expansion.gaussian
    corrections = corrections or {}
    white: Coordinates = {}
    log_q: dict[str, Tensor] = {}
    for block in local.component.blocks:
        u = noise(block, tuple(core.mode[block.name].shape))
        widened = block.name in local.component.resampled
        # A learned map has seen normals, and is anybody's guess far out.
        white[block.name], log_q[block.name] = widen(u, 1 if block.name in corrections else each) if widened else (u, _standard(u))
    if isinstance(gaussian, Arrow):
        z = gaussian.colour(white, core.mode)
        log_q = {b: log_q[b] + share for b, share in gaussian.log_dets().items()}
        return Sample(z, log_q, local.values(z))
    z = {}
    for block in local.component.blocks:
        b, u = block.name, white[block.name]
        if b in corrections:
            u, log_jacobian = corrections[b](u, context(core, gaussian, b))
            log_q[b] = log_q[b] - log_jacobian
        z[b] = gaussian.conditional(b, core.mode, z) + back(gaussian.factor[b], u)
        log_q[b] = log_q[b] + log_det(gaussian.factor[b])
    return Sample(z, log_q, local.values(z))


TAIL, HEAVY_TAIL = 1.25, 2.0
HEAVY = 4  # one of so many candidates has heavy tails


def widen(u: Tensor, each: int) -> tuple[Tensor, Tensor]:
    """Candidates `[K, n, C, e]` in the core's whitened coordinates from standard normals, and their log-density per unit, `[K, n]`.

    x = sinh(delta asinh u) / delta (sinh-arcsinh transformation, Jones & Pewsey 2009; the identity near zero). delta = 1.25 is nearly the normal core. Of each
    draw's candidates the last quarter has delta = 2, whose tails are exponential as those of a logarithm or logit of which the data say little are; the
    density is that of the mixture (deterministic mixture weights, Owen & Zhou 2000), so that a core that is right loses little by it.

    Args:
        u: Standard normals.
        each: Neighbouring particles that are candidates of one draw.
    """
    share = each // HEAVY / each
    if not share:
        x = _tailed(u, TAIL)
        return x, _log_tailed(x, TAIL)
    heavy = torch.arange(len(u)) % each >= each - each // HEAVY
    x = torch.where(heavy[:, None, None, None], _tailed(u, HEAVY_TAIL), _tailed(u, TAIL))
    return x, torch.logaddexp(_log_tailed(x, TAIL) + math.log1p(-share), _log_tailed(x, HEAVY_TAIL) + math.log(share))


def _tailed(u: Tensor, delta: float) -> Tensor:
    return torch.sinh(delta * torch.asinh(u)) / delta


def _log_tailed(x: Tensor, delta: float) -> Tensor:
    """Log-density of `_tailed` normals, summed over a unit's coordinates."""
    u = torch.sinh(torch.asinh(delta * x) / delta)
    return _standard(u) - 0.5 * (torch.log1p((delta * x) ** 2) - torch.log1p(u * u)).sum((-1, -2))


@dataclass
class Candidates:
    """M draws of a component for each particle, neighbours together, in G groups that share their coarser blocks.

    Args:
        core: The component's core, at the K particles.
        sample: The draws, `[K M, ...]`.
        log_weight: Resampled block -> log p - log q per unit given its parents, `[K, G, M / G, n]`.
        log_group: Log p - log q of each group's coarser blocks, finer ones integrated out by their weights, `[K, G, n_top]`: of blocks without coarser ones
            their log evidence.
    """

    core: Core
    sample: Sample
    log_weight: dict[str, Tensor]
    log_group: Tensor

    def log_share(self, block: str) -> Tensor:
        """Log weight of each candidate of a block's units, `[K, M, n]` (n may be 1), sum 1 over candidates."""
        k, groups, _ = self.log_group.shape
        each = len(self.sample.z[block]) // (k * groups)
        group = per_unit(self.core.local, block, torch.log_softmax(self.log_group, 1).flatten(0, 1)).unflatten(0, (k, groups))
        own = torch.log_softmax(self.log_weight[block], 2) if block in self.log_weight else torch.full((1, 1, each, 1), -math.log(each))
        return (group[:, :, None] + own).flatten(1, 2)

    def log_marginal(self, *, corrected: bool) -> Tensor:
        """Log of the mean weight, `[K]`, weighted over the units of the top block: a lower bound in expectation.

        Args:
            corrected: Whether its bias is made up for to first order: var(w) / (2 G mean(w)^2) (delta method; Nowozin 2018), so that it is no bound.
        """
        over = self.log_group
        if over.shape[1] == 1 and len(self.log_weight) == 1 and len(self.core.local.component.blocks) == 1:
            over = self.log_weight[self.core.local.component.blocks[0].name][:, 0]
        units = torch.logsumexp(over, 1) - math.log(over.shape[1])
        if corrected and over.shape[1] > 1:
            units = units + 0.5 * (over.shape[1] * torch.softmax(over, 1).square().sum(1) - 1) / (over.shape[1] - 1)
        return (units * weights(self.core)).sum(1)


def candidates(core: Core, noise: Noise, samples: int, corrections: Mapping[str, Correction] | None = None, groups: int = 1) -> Candidates:
    """Draw candidates for each particle: coarser blocks once for each group, finest ones for each candidate.

    A Gaussian conditional would give constant weights, so they tell how far the guide's conditional is from the model's. Weights of a group are unbiased
    whatever the number of its candidates (random-weight importance sampling, Fearnhead et al. 2010).

    Args:
        core: The Gaussian core.
        noise: Standard normals by block.
        samples: Candidates of a draw.
        corrections: As in `draw`.
        groups: In how many groups, where there are coarser blocks.
    """
    component, k = core.local.component, core.local.particles
    groups = min(groups, samples) if component.joint else 1
    each = samples // groups

    def once(block: Block, shape: tuple[int, ...]) -> Tensor:
        if block.name in component.finest:
            return noise(block, shape)
        return noise(block, (k * groups, *shape[1:])).repeat_interleave(each, 0)

    many = core.repeat(groups * each)
    local, reduced = many.local, many.local.reduced
    sample = draw(many, once, corrections, each)
    first = {n: Value(v.theta[::each], v.plates) for n, v in sample.values.items()}
    weight = {b: -sample.log_q[b] for b in component.finest}
    group: Tensor | float = 0.0
    for factor in component.factors:
        v = reduced.graph.model.variables[factor.variable]
        owner = next((b for b, _ in reversed(factor.touches) if b in weight), None)
        term = reduced.log_prob(v.name, sample.values if owner else first).flatten(1)
        if owner is None:
            group = group + local.to_top(term, v.plates)
            continue
        index = reduced.unit_index(v.plates, local.blocks[owner].plates)
        weight[owner] = weight[owner] + term if index is None else weight[owner].index_add(1, index, term)
    for block in component.blocks:
        b, step = block.name, 1 if block.name in weight else each
        own = weight[b] if b in weight else -sample.log_q[b][::step]
        for latent in block.latents:
            link = reduced.graph.links[latent]
            base = local.split(block, latent, sample.z[b][::step])
            own = own + link.log_det(base, sample.values[latent].theta[::step].reshape(*base.shape[:2], *link.event_shape))
        if b in weight:
            weight[b] = own = own.unflatten(0, (k, groups, each))
            own = (torch.logsumexp(own, 2) - math.log(each)).flatten(0, 1)
        group = group + local.to_top(own, block.plates)
    return Candidates(core, sample, weight, torch.as_tensor(group).expand(k * groups, -1).unflatten(0, (k, groups)))


def component_bound(
    core: Core, noise: Noise, samples: int, corrections: Mapping[str, Correction] | None = None, groups: int = 1, *, corrected: bool = False
) -> Tensor:
    """Evidence lower bound of one component given what it was given, weighted over its units, `[K]` (`Candidates.log_marginal`).

    E_q[log p - log q], with log 1/M sum_m p/q (Burda et al. 2016) in place of the last for each unit of a resampled block, and of groups of them.
    """
    return candidates(core, noise, max(1, samples), corrections, groups).log_marginal(corrected=corrected)


def shared_bound(core: Core, noise: Noise, samples: int, corrections: Mapping[str, Correction] | None, size: int, groups: int = 1) -> Tensor:
    """`component_bound`, its bias made up for, with the same normals for every particle (common random numbers), `size` particles at once."""
    def common(block: Block, shape: tuple[int, ...]) -> Tensor:
        own = noise(block, (shape[0] // particles, *shape[1:]))
        return own.repeat(particles, *([1] * (len(shape) - 1)))

    found = []
    for part in core.parts(size):
        particles = part.local.particles
        found.append(component_bound(part, common, samples, corrections, groups, corrected=True))
    return torch.cat(found)


def resample(core: Core, found: Candidates, uniforms: Mapping[str, Tensor]) -> dict[str, Value]:
    """One candidate per particle and unit, drawn by its weight: a group for each unit of the top block, then one of the group; uniforms `[K, n]` by block."""
    k, groups, _ = found.log_group.shape
    local = core.local
    top = _picked(torch.softmax(found.log_group, 1), uniforms[local.component.blocks[0].name]) if groups > 1 else torch.zeros(k, 1, dtype=torch.long)
    out = {}
    for block in local.component.blocks:
        grouped = found.sample.z[block.name].unflatten(0, (k, groups, -1))
        which = per_unit(local, block.name, top) if groups > 1 else top
        rows = grouped.gather(1, which[:, None, None, :, None, None].expand(-1, 1, grouped.shape[2], *grouped.shape[3:]))[:, 0]
        chosen = torch.zeros(k, 1, dtype=torch.long)
        if block.name in found.log_weight:
            weight = found.log_weight[block.name]
            own = weight.gather(1, which[:, None, None, :].expand(-1, 1, *weight.shape[2:]))[:, 0]
            chosen = _picked(torch.softmax(own, 1), uniforms[block.name])
        out[block.name] = rows.gather(1, chosen[:, None, :, None, None].expand(-1, 1, *rows.shape[2:]))[:, 0]
    return {n: v for n, v in local.values(out).items() if n not in local.given}


def _picked(weight: Tensor, uniforms: Tensor) -> Tensor:
    """Positions along the second axis of weights `[K, M, n]`, drawn by them, `[K, n]`."""
    share = weight.cumsum(1)
    return (share < uniforms[:, None, : share.shape[2]] * share[:, -1:, :]).sum(1).clamp_max(share.shape[1] - 1)


def log_density(core: Core, z: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """log q of given coordinates under the Gaussian core, per unit of each block, `[K, n]`."""
    gaussian = core.expansion.gaussian
    if isinstance(gaussian, Arrow):
        white = gaussian.whiten(z, core.mode)
        return {b: _standard(white[b]) + share for b, share in gaussian.log_dets().items()}
    return {
        b.name: _standard(forward(gaussian.factor[b.name], z[b.name] - gaussian.conditional(b.name, core.mode, z))) + log_det(gaussian.factor[b.name])
        for b in core.local.component.blocks
    }


def _standard(u: Tensor) -> Tensor:
    return (-0.5 * u * u - 0.5 * math.log(2 * math.pi)).sum((-1, -2))


def context(core: Core, gaussian: Tree, block: str) -> Tensor:
    """What a correction may look at, per unit and copy, `[K, n, C, 2 e]`: the mode and the log of the curvature's diagonal."""
    factor = gaussian.factor[block]
    return torch.cat([core.mode[block], 2 * factor.diagonal(dim1=-2, dim2=-1).log()], -1)
