"""Which modes a component has: searches from conditional prior draws, and from good modes whose exchangeable rows are renumbered."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, permutations

import numpy as np
import torch
from torch import Tensor

from pavi_scale.guide.blocks import Block
from pavi_scale.guide.curvature import Coordinates, LocalModel
from pavi_scale.guide.gaussian import Tree, back, factorise, forward, log_det
from pavi_scale.guide.mode import Noise, decrement, per_unit, search

SETTLED = 1e-3  # decrement below which a search has reached a mode
UNSETTLED = 1e6  # nats that a point is put behind every mode
APART = 5.0  # conditional sds between two modes
MODES = 6  # that are told of each unit, at most
FEW_ROWS = 3  # exchangeable rows up to which every renumbering is tried; of more, exchanges of two
MOST_EXCHANGES = 15  # of two rows; of more rows than that allows none is tried
FAINT = 12.0  # nats of mass below its unit's best at which a local mode is forgotten
SAME = 1e-9  # relative change of the data's log-density that renumbering may cause where rows are exchangeable


@dataclass(frozen=True)
class Explored:
    """Local modes at one root point, unit by unit, the one of most Laplace mass first.

    Args:
        modes: Block -> `[S, n, C, e]`; the first again where a unit has fewer than S.
        volume: Block -> log volume of the Laplace approximation of its units, `[S, n]`, less that of the first.
        odds: Log mass of each unit of the top block, less that of the first; -inf where there is no such mode, `[S, n_top]`.
    """

    modes: Coordinates
    volume: dict[str, Tensor]
    odds: Tensor

    @property
    def missed(self) -> Tensor:
        """What the first mode leaves out: the mass of the second over the sum of both, `[n_top]`."""
        return torch.sigmoid(self.odds[1]) if len(self.odds) > 1 else torch.zeros_like(self.odds[0])

    def table(self, block: str) -> Tensor:
        """Log volume and coordinates of each unit's modes, `[n, S, 1 + C e]`, as they are remembered (`Reduced.modes`)."""
        return torch.cat([self.volume[block][..., None], self.modes[block].flatten(2)], -1).transpose(0, 1)


def explore(local: LocalModel, noise: Noise, attempts: int) -> Explored:
    """The modes that searches from the prior means, from conditional prior draws and from renumbered rows of the best so far lead to.

    Mixtures have poor local modes (a component that starts far from its data stays empty), and good ones in competition: rows exchanged, which
    the data do not tell apart and only the distance from the root's rows does. Modes are judged by their Laplace mass.

    Args:
        local: A component without kinks at one root point.
        noise: Standard normals.
        attempts: Draws; none, and no renumbering, where the component is no tree.
    """
    with torch.no_grad():
        found = search(_times(local, 1 + attempts), _prior_draws(local, noise, attempts))
        if attempts:
            masses = _masses(_times(local, 1 + attempts), found)[0]
            best = _picked(local, found, masses.argmax(0, keepdim=True))
            for again in renumberings(local, best):
                more = search(_times(local, len(next(iter(again.values())))), again)
                found = {b: torch.cat([zb, more[b]]) for b, zb in found.items()}
        return _told(_times(local, len(next(iter(found.values())))), found)


def renumberings(local: LocalModel, z: Coordinates) -> Iterator[Coordinates]:
    """A point `[1, n, C, e]` with its exchangeable rows in other orders, `[P, n, C, e]`: for each event dimension that leaves the data's density unchanged.

    Latents of the component that share their first event dimension are renumbered together: components of a mixture, with their weights.
    """
    model = local.reduced.graph.model
    own = [model.variables[n] for block in local.component.blocks for n in block.latents]
    before = _data(local, z)
    for dim, k in {v.dims[0]: local.reduced.graph.shape(v)[0] for v in own if v.dims}.items():
        orders = _orders(k)
        if not orders:
            continue
        # One order tells whether the data know the rows apart.
        if bool((_data(local, _in_order(local, z, dim, orders[:1])) - before).abs().amax() <= SAME * (1.0 + float(before.abs().max()))):
            yield _in_order(local, z, dim, orders)


def _in_order(local: LocalModel, z: Coordinates, dim: str, orders: list[list[int]]) -> Coordinates:
    """A point `[1, n, C, e]` with the rows along an event dimension in each of some orders, `[P, n, C, e]`."""
    graph, values, out = local.reduced.graph, local.values(z), {}
    for block in local.component.blocks:
        parts = {}
        for latent in block.latents:
            link, dims = graph.links[latent], graph.model.variables[latent].dims
            theta = values[latent].theta.reshape(1, -1, *link.event_shape).expand(len(orders), -1, *link.event_shape)
            if dims and dims[0] == dim:
                theta = torch.stack([t[:, order] for t, order in zip(theta, torch.tensor(orders), strict=True)])
            parts[latent] = link.inverse(theta)
        moved = local.join(block, parts)
        out[block.name] = torch.where(torch.isfinite(moved), moved, z[block.name])
    return out


def _orders(k: int) -> list[list[int]]:
    if k <= FEW_ROWS:
        return [list(p) for p in permutations(range(k))][1:]
    pairs = list(combinations(range(k), 2))
    if len(pairs) > MOST_EXCHANGES:
        return []
    return [[j if r == i else i if r == j else r for r in range(k)] for i, j in pairs]


def _data(local: LocalModel, z: Coordinates) -> Tensor:
    """Log-density of the observed variables, `[K, n_f]` of each, side by side."""
    values, variables = local.values(z), local.reduced.graph.model.variables
    terms = [local.reduced.log_prob(f.variable, values).flatten(1) for f in local.component.factors if variables[f.variable].kind == "observed"]
    return torch.cat([t.expand(local.particles, -1) for t in terms], 1) if terms else torch.zeros(local.particles, 1)


def _prior_draws(local: LocalModel, noise: Noise, attempts: int) -> Coordinates:
    """The prior means, and draws about them of the conditional priors' curvature, `[1 + attempts, n, C, e]`."""
    centre, z = local.start(), {}
    for block in local.component.blocks:
        factor = factorise(_prior_precision(local, centre, block))
        away = back(factor, noise(block, (attempts, *centre[block.name].shape[1:])))
        z[block.name] = torch.cat([centre[block.name], centre[block.name] + away])
    return z


def _prior_precision(local: LocalModel, z: Coordinates, block: Block) -> Tensor:
    """Minus second derivative of the log-density of a block's own laws, `[1, n, C, e, e]`."""
    total: Tensor | float = 0.0
    for factor in local.component.factors:
        if factor.variable in block.latents:
            _, _, hess = local._factor(factor, z, False)
            total = total + hess[block.name, block.name]
    return torch.as_tensor(total)


def _masses(local: LocalModel, found: Coordinates) -> tuple[Tensor, dict[str, Tensor], Tree | None]:
    """Laplace mass of each unit `[K, n_top]` and its volumes `[K, n]` by block; points that are no modes come behind every mode."""
    expansion = local.expand(found, differentiable=False)
    mass, volume = expansion.value, {b: torch.zeros(zb.shape[:2]) for b, zb in found.items()}
    tree = expansion.gaussian if isinstance(expansion.gaussian, Tree) else None
    if tree is not None:
        volume = {b: -log_det(factor) for b, factor in tree.factor.items()}
        for b, v in volume.items():
            mass = mass + local.to_top(v, local.blocks[b].plates)
    settled = decrement(local, expansion) < SETTLED
    return torch.where(settled, mass, expansion.value - UNSETTLED).nan_to_num(nan=-torch.inf), volume, tree


def _told(local: LocalModel, found: Coordinates) -> Explored:
    """Of each unit the mode of most mass, then those that lie apart from all before."""
    mass, volume, tree = _masses(local, found)
    first, rest = mass.amax(0), mass.clone()
    best = mass.argmax(0, keepdim=True)
    chosen, odds = [best], [torch.zeros_like(first)]
    while tree is not None and len(chosen) < MODES:
        last, near = _picked(local, found, chosen[-1]), torch.zeros_like(mass)
        for b, factor in tree.factor.items():
            near = near + local.to_top(forward(factor, found[b] - last[b]).square().sum((-1, -2)), local.blocks[b].plates)
        rest = torch.where((near > APART**2) & (mass > first - UNSETTLED / 2), rest, -torch.inf)
        known = torch.isfinite(rest.amax(0))
        if not bool(known.any()):
            break
        chosen.append(torch.where(known, rest.argmax(0), best[0])[None])
        odds.append(rest.amax(0) - first)
    modes = {b: torch.cat([_picked(local, found, at)[b] for at in chosen]) for b in found}
    volumes = {b: torch.cat([v.gather(0, per_unit(local, b, at)) for at in chosen]) for b, v in volume.items()}
    return Explored(modes, {b: v - v[:1] for b, v in volumes.items()}, torch.stack(odds))


def _picked(local: LocalModel, z: Coordinates, at: Tensor) -> Coordinates:
    """Of each unit the coordinates of one particle, `at` `[1, n_top]`."""
    return {b: zb.gather(0, per_unit(local, b, at)[..., None, None].expand(1, *zb.shape[1:])) for b, zb in z.items()}


def _times(local: LocalModel, count: int) -> LocalModel:
    """The component at its one root point, for several particles."""
    return local.select(torch.zeros(count, dtype=torch.long))


def rivals(odds: np.ndarray) -> int:
    """How many modes are worth remembering, of log masses `[n, S]` less that of the first: those that hold something in some unit."""
    return int((odds.max(0, initial=-np.inf) > -FAINT).sum())
