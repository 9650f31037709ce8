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
from pavi_scale.guide.mode import Noise, find_mode, nearer
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


def draw(core: Core, noise: Noise, corrections: Mapping[str, Correction] | None = None) -> Sample:
    """Sample the component, coarse blocks first.

    Args:
        core: The Gaussian core.
        noise: Standard normals by block.
        corrections: Block -> learned map of its noise; the identity where absent.
    """
    local, gaussian = core.local, core.expansion.gaussian
    corrections = corrections or {}
    z: Coordinates = {}
    log_q: dict[str, Tensor] = {}
    shapes = {b.name: tuple(core.mode[b.name].shape) for b in local.component.blocks}
    if isinstance(gaussian, Arrow):
        white = {b.name: noise(b, shapes[b.name]) for b in local.component.blocks}
        z = gaussian.colour(white, core.mode)
        log_q = {b: _standard(white[b]) + share for b, share in gaussian.log_dets().items()}
    else:
        for block in local.component.blocks:
            b = block.name
            u = noise(block, shapes[b])
            log_q[b] = _standard(u)
            if b in local.component.resampled:
                u, log_jacobian = widen(u)
                log_q[b] = log_q[b] - log_jacobian
            if b in corrections:
                u, log_jacobian = corrections[b](u, context(core, gaussian, b))
                log_q[b] = log_q[b] - log_jacobian
            loc = gaussian.conditional(b, core.mode, z)
            z[b] = loc + back(gaussian.factor[b], u)
            log_q[b] = log_q[b] + log_det(gaussian.factor[b])
    return Sample(z, log_q, local.values(z))


TAIL = 1.25


def widen(u: Tensor) -> tuple[Tensor, Tensor]:
    """sinh(delta asinh u) / delta with delta = 1.25, and its log-Jacobian per unit: the normal core, with tails that importance weights can rely on.

    (Sinh-arcsinh transformation, Jones & Pewsey 2009; the identity near zero.)
    """
    inner = TAIL * torch.asinh(u)
    log_slope = torch.log(torch.cosh(inner)) - 0.5 * torch.log1p(u * u)
    return torch.sinh(inner) / TAIL, log_slope.sum((-1, -2))


@dataclass
class Candidates:
    """M draws of a component for each particle, neighbours together, with log weights of the resampled blocks' units.

    Args:
        sample: The draws, `[K M, ...]`.
        log_weight: Block -> log p - log q per unit given its parents, `[K, M, n]`.
    """

    sample: Sample
    log_weight: dict[str, Tensor]


def candidates(core: Core, noise: Noise, samples: int, corrections: Mapping[str, Correction] | None = None) -> Candidates:
    """Draw M candidates for each particle; coarser blocks are drawn once and held.

    A Gaussian conditional would give constant weights, so they tell how far the guide's conditional is from the model's.
    """
    component, k = core.local.component, core.local.particles

    def once(block: Block, shape: tuple[int, ...]) -> Tensor:
        if block.name in component.finest:
            return noise(block, shape)
        return noise(block, (k, *shape[1:])).repeat_interleave(samples, 0)

    many = core.repeat(samples)
    local, reduced = many.local, many.local.reduced
    sample = draw(many, once, corrections)
    weight = {b: -sample.log_q[b] for b in component.finest}
    for factor in component.factors:
        finest = factor.touches[-1][0]
        if finest in weight:
            v = reduced.graph.model.variables[factor.variable]
            term = reduced.log_prob(v.name, sample.values).flatten(1)
            index = reduced.unit_index(v.plates, local.blocks[finest].plates)
            weight[finest] = weight[finest] + term if index is None else weight[finest].index_add(1, index, term)
    for b in weight:
        for latent in local.blocks[b].latents:
            link = reduced.graph.links[latent]
            base = local.split(local.blocks[b], latent, sample.z[b])
            weight[b] = weight[b] + link.log_det(base, sample.values[latent].theta.reshape(*base.shape[:2], *link.event_shape))
    return Candidates(sample, {b: w.reshape(k, samples, -1) for b, w in weight.items()})


def component_bound(core: Core, noise: Noise, samples: int, corrections: Mapping[str, Correction] | None = None) -> Tensor:
    """Evidence lower bound of one component given what it was given, weighted over its units, `[K]`.

    E_q[log p - log q], with log 1/M sum_m p/q (Burda et al. 2016) in place of the last for each unit of a resampled block.
    """
    found = candidates(core, noise, max(1, samples), corrections)
    local, reduced, k = core.local, core.local.reduced, core.local.particles
    total = torch.zeros(k, dtype=reduced.dtype)
    for b, log_weight in found.log_weight.items():
        units = torch.logsumexp(log_weight, 1) - math.log(log_weight.shape[1])
        total = total + (units * reduced.weights(local.blocks[b].plates).flatten()).sum(1)
    step = max(1, samples)
    values = {n: Value(v.theta[::step], v.plates) for n, v in found.sample.values.items()}
    for factor in local.component.factors:
        if factor.touches[-1][0] not in found.log_weight:
            v = reduced.graph.model.variables[factor.variable]
            total = total + (reduced.log_prob(v.name, values) * reduced.weights(v.plates)).flatten(1).sum(1)
    for block in local.component.blocks:
        if block.name in found.log_weight:
            continue
        weight = reduced.weights(block.plates).flatten()
        total = total - (found.sample.log_q[block.name][::step] * weight).sum(1)
        for latent in block.latents:
            link = reduced.graph.links[latent]
            base = local.split(block, latent, found.sample.z[block.name][::step])
            total = total + (link.log_det(base, values[latent].theta.reshape(*base.shape[:2], *link.event_shape)) * weight).sum(1)
    return total


def shared_bound(core: Core, noise: Noise, samples: int, corrections: Mapping[str, Correction] | None, size: int) -> Tensor:
    """`component_bound` with the same normals for every particle (common random numbers), `size` particles at once."""
    def common(block: Block, shape: tuple[int, ...]) -> Tensor:
        own = noise(block, (shape[0] // particles, *shape[1:]))
        return own.repeat(particles, *([1] * (len(shape) - 1)))

    found = []
    for part in core.parts(size):
        particles = part.local.particles
        found.append(component_bound(part, common, samples, corrections))
    return torch.cat(found)


def resample(core: Core, found: Candidates, uniforms: Mapping[str, Tensor]) -> dict[str, Value]:
    """One candidate per particle and unit, drawn by its weight; uniforms `[K, n]` by block."""
    k, local = core.local.particles, core.local
    out = {}
    for block in local.component.blocks:
        zb = found.sample.z[block.name]
        grouped = zb.unflatten(0, (k, -1))
        if block.name in found.log_weight:
            share = torch.softmax(found.log_weight[block.name], 1).cumsum(1)
            pick = (share < uniforms[block.name][:, None, :] * share[:, -1:, :]).sum(1).clamp_max(grouped.shape[1] - 1)
            chosen = grouped.gather(1, pick[:, None, :, None, None].expand(-1, 1, *grouped.shape[2:]))[:, 0]
        else:
            chosen = grouped[:, 0]
        out[block.name] = chosen
    return {n: v for n, v in local.values(out).items() if n not in local.given}


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
