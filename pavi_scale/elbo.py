"""Estimators of the evidence lower bound on a reduced model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from pavi_scale.guide.blocks import labelled
from pavi_scale.guide.correction import Corrections
from pavi_scale.guide.curvature import LocalModel
from pavi_scale.guide.guide import Guide
from pavi_scale.guide.labels import LabelledCore
from pavi_scale.guide.local import Correction, Sample, draw, fit_core, log_density
from pavi_scale.guide.mode import Noise
from pavi_scale.guide.root import RootSpace
from pavi_scale.reduced import Reduced, Value


@dataclass
class Weights:
    """Everything a guide has learned, as tensors.

    Args:
        loc: Location of q(root), `[R]`.
        raw: Lower-triangular parameter of its scale: strict lower part as it is, diagonal in logs, `[R, R]`.
        sites: Free block -> (location, log precision) of the selected units, `[n, d]` each.
        residuals: Hybrid block -> residual rows of the selected units, `[n, 2 C e]`.
        corrections: Learned corrections, if any.
    """

    loc: Tensor
    raw: Tensor
    sites: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    residuals: Mapping[str, Tensor] = field(default_factory=dict)
    corrections: Corrections | None = None

    @property
    def chol(self) -> Tensor:
        """Lower Cholesky factor of the covariance of q(root)."""
        return self.raw.tril(-1) + torch.diag_embed(self.raw.diagonal().exp())


def log_root(loc: Tensor, chol: Tensor, z: Tensor) -> Tensor:
    """log q(root) of the Gaussian root block, `[K]`; z `[K, R]`."""
    r = len(loc)
    if r == 0:
        return z.new_zeros(len(z))
    white = torch.linalg.solve_triangular(chol, (z - loc).mT, upper=False)
    return -0.5 * (white * white).sum(0) - 0.5 * r * math.log(2 * math.pi) - chol.diagonal().log().sum()


def correctors(weights: Weights, reduced: Reduced) -> dict[str, Correction]:
    """Corrections as `draw` wants them: block -> (noise, core features) -> (corrected noise, log-Jacobian)."""
    corrections = weights.corrections
    if corrections is None:
        return {}

    def corrected(name: str, u: Tensor, core: Tensor) -> tuple[Tensor, Tensor]:
        return corrections.apply_to(name, u, core, reduced, weights.residuals.get(name))

    return {b: partial(corrected, b) for b in corrections.names()}


def reduced_elbo(guide: Guide, reduced: Reduced, space: RootSpace, weights: Weights, eps: Tensor, noise: Noise) -> Tensor:
    """The reduced ELBO of K draws, `[K]`, differentiable in the weights.

    E_q[log p - log q] with every term weighted by its inverse inclusion probability (unbiased for the full ELBO with free encodings).
    The root block and the sites stick the landing (Roeder et al. 2017): log q is evaluated with detached weights. The cores of blocks
    without rows are encodings: recomputed at each step, and not differentiated through.

    Args:
        guide: The guide.
        reduced: The reduced model.
        space: Root coordinates.
        weights: What is trained.
        eps: Standard normals of the root, `[K, R]`.
        noise: Standard normals of the local blocks.
    """
    chol = weights.chol
    z = weights.loc + eps @ chol.mT
    total = space.log_prior(z) - log_root(weights.loc.detach(), chol.detach(), z)
    return total + local_elbo(guide, reduced, space.values(z), weights, noise, particles=len(z), differentiable=True)


def local_elbo(
    guide: Guide, reduced: Reduced, root: Mapping[str, Value], weights: Weights, noise: Noise, *, particles: int, differentiable: bool,
    split: str | None = None, first: bool = True,
) -> Tensor:
    """sum over local terms of w (log p - log q) at one draw per root value, `[K]`; of labelled components their Laplace log marginal.

    Args:
        guide: The guide.
        reduced: The reduced model.
        root: Root values.
        weights: Sites and corrections.
        noise: Standard normals.
        particles: K.
        differentiable: Whether gradients with respect to root and rows are wanted.
        split: With `first`, which terms a shard answers for (`Guide.counted`).
        first: See `split`.
    """
    values: dict[str, Value] = dict(root)
    total = torch.zeros(particles, dtype=reduced.dtype)
    frozen = {b: (loc.detach(), log_precision.detach()) for b, (loc, log_precision) in weights.sites.items()}
    settled: set[str] = set()
    for component in guide.components:
        rows = differentiable and any(b.free for b in component.blocks)
        local = LocalModel(component, reduced, values, weights.sites, particles)
        data = None if differentiable or reduced.dtype != torch.float32 else labelled(component, guide.graph)
        if data is not None:
            # Its laws are integrated out: at a draw from normals that leaves with two modes make wide, log p - log q has no useful mean.
            top = component.blocks[0].plates
            if guide.counted(reduced, component.blocks[-1].plates, split, first):
                total = total + LabelledCore(local, data).log_marginal(reduced.weights(top).flatten()).to(total.dtype)
            settled |= {f.variable for f in component.factors}
            continue
        sample = draw(fit_core(local, differentiable=rows), noise, correctors(weights, reduced))
        log_q = sample.log_q
        if rows:  # stick the landing: the density keeps its dependence on the draw and on the root, not on the rows
            log_q = log_density(fit_core(LocalModel(component, reduced, values, frozen, particles), differentiable=True), sample.z)
        values.update(sample.values)
        if guide.counted(reduced, component.blocks[-1].plates, split, first):
            total = total + log_jacobian(local, sample)
            for block in component.blocks:
                total = total - (log_q[block.name] * reduced.weights(block.plates).flatten()).sum(1)
    for v in guide.graph.model.of_kind("latent", "observed"):
        if v.name not in settled and (v.plates or v.kind == "observed") and guide.counted(reduced, v.plates, split, first):
            term = reduced.log_prob(v.name, values) * reduced.weights(v.plates)
            total = total + term.reshape(term.shape[0], -1).sum(1)
    return total


def log_jacobian(local: LocalModel, sample: Sample) -> Tensor:
    """Weighted log |d theta / d z| of a component's latents, `[K]`."""
    total = torch.zeros((), dtype=local.reduced.dtype)
    for block in local.component.blocks:
        zb = sample.z[block.name]
        weight = local.reduced.weights(block.plates).flatten()
        for latent in block.latents:
            link = local.reduced.graph.links[latent]
            if not link.identity:
                base = local.split(block, latent, zb)
                theta = sample.values[latent].theta.reshape(*zb.shape[:2], *link.event_shape)
                total = total + (link.log_det(base, theta) * weight).sum(1)
    return total
