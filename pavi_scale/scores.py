"""What the data below the free blocks say of them, and of the root: bound, score and curvature of L(z) = log p(data | z), as sums over shards.

z are the coordinates of the free blocks and of the root. L is the sum over the components without rows, each with its latents integrated out
(exactly where linear-Gaussian, else by its Gaussian core), and over the laws that touch no such component. At antithetic points z+- = m +- s v with random
signs v,

    E[L'(z)] = (g+ + g-) / 2,    -E[L''(z)]_ii = -E[v_i (g+ - g-)_i / (2 s_i)],

where the off-diagonal elements of L'' enter the second with mean zero (Hutchinson 1989; Rademacher signs have the least variance). Every shard
draws its own signs, so that they average out over a pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pavi_scale.device import doubles
from pavi_scale.guide.blocks import Block, Component, labelled
from pavi_scale.guide.curvature import LocalModel
from pavi_scale.guide.guide import Guide
from pavi_scale.guide.labels import LabelledCore
from pavi_scale.guide.local import fit_core, weights
from pavi_scale.guide.root import RootSpace
from pavi_scale.plates import Layout, Selection
from pavi_scale.reduced import Reduced, Value
from pavi_scale.rng import stream

ROOT = "*"  # stands for the root where blocks stand by their names, which are those of plates


def lower(guide: Guide) -> list[Component]:
    """Components without rows."""
    return [c for c in guide.components if not any(b.free for b in c.blocks)]


def upper(guide: Guide) -> list[Component]:
    """Components with rows."""
    return [c for c in guide.components if any(b.free for b in c.blocks)]


def speaks_of(guide: Guide, space: RootSpace) -> np.ndarray:
    """Positions of the root coordinates that L depends on."""
    model = guide.graph.model
    laws = [model.variables[f.variable] for c in lower(guide) for f in c.factors] + list(guide.plain)
    named = {p for v in laws for p in v.parents}
    owner = np.repeat(np.arange(len(space.names)), space.sizes)
    return np.flatnonzero(np.isin(owner, [i for i, n in enumerate(space.names) if n in named]))


def row_values(reduced: Reduced, block: Block, rows: Tensor) -> dict[str, Value]:
    """Constrained values of a block's latents at coordinates `[K, n, d]`."""
    out = {}
    sizes = reduced.sizes(block.plates)
    for latent, part in zip(block.latents, rows.split(block.sizes, -1), strict=True):
        link = reduced.graph.links[latent]
        theta = link.forward(part.reshape(*part.shape[:2], *link.base_shape))
        out[latent] = Value(theta.reshape(len(rows), *sizes, *link.event_shape), block.plates)
    return out


def lower_bound(
    guide: Guide, reduced: Reduced, values: Mapping[str, Value], particles: int, split: str | None, first: bool
) -> tuple[Tensor, Tensor]:
    """L at K points, and a sum whose gradient in the values given (those of root and free blocks) is that of L; `[K]` each.

    Labelled components use Fisher's identity over their labels: the gradient is that of the evidence of each label, averaged over the labels'
    posterior. Others are differentiated through their core. (Over a draw of it, Fisher's identity has the noise of all that the units would tell if they were
    known, which may be a thousand times what the data tell of a level that they share.)
    """
    total = torch.zeros(particles, dtype=reduced.dtype)
    surrogate = torch.zeros(particles, dtype=reduced.dtype)
    still = {n: Value(v.theta.detach(), v.plates) for n, v in values.items()}
    for v in guide.plain:
        if guide.counted(reduced, v.plates, split, first):
            term = reduced.log_prob(v.name, values).flatten(1).sum(1)
            total, surrogate = total + term.detach(), surrogate + term
    for component in lower(guide):
        if not guide.counted(reduced, component.blocks[-1].plates, split, first):
            continue
        if (data := _labels_of(guide, component, reduced, values)) is not None:
            moving = any(p in values and values[p].theta.requires_grad for p in guide.graph.model.variables[data].parents)
            labels = LabelledCore(LocalModel(component, reduced, still, {}, particles), data, "shares" if moving else "")
            total = total + labels.log_marginal(reduced.weights(component.blocks[0].plates).flatten()).to(reduced.dtype)
            surrogate = surrogate + labels.expected(values) if moving else surrogate
            continue
        core = fit_core(LocalModel(component, reduced, values, {}, particles), differentiable=True)
        term = core.log_marginal(weights(core))
        total, surrogate = total + term.detach(), surrogate + term
    return total, surrogate


def _labels_of(guide: Guide, component: Component, reduced: Reduced, values: Mapping[str, Value]) -> str | None:
    """The observed mixture of a labelled component whose priors nothing differentiable enters."""
    data = labelled(component, guide.graph) if reduced.dtype == torch.float32 else None
    priors = [guide.graph.model.variables[f.variable] for f in component.factors if f.variable != data]
    moving = any(p in values and values[p].theta.requires_grad for v in priors for p in v.parents)
    return None if moving else data


@dataclass
class Probe:
    """Where L is looked at.

    Args:
        root: Centre of the root, `[R]`.
        root_spread: Half distances of the root's pairs, `[R]`; zero where L does not depend on it.
        centre: Free block -> centre of the selected units, `[n, d]`.
        spread: Free block -> half distance.
        apart: Whether each root coordinate has a pair of its own, in which all else stays at the centre: gives the root's whole curvature.
        towards: Block (and `ROOT`) -> direction to look along, in units of the half distances, in place of random signs.
    """

    root: np.ndarray
    root_spread: np.ndarray
    centre: Mapping[str, np.ndarray]
    spread: Mapping[str, np.ndarray]
    apart: bool = False
    towards: Mapping[str, np.ndarray] | None = None


@dataclass
class Scores:
    """Sums over shards.

    Args:
        value: Mean of L over the first pair.
        root: Score of the root, `[R]`.
        root_curvature: Minus second derivatives, `[R, R]`.
        score: Free block -> `[n, d]`.
        curvature: Free block -> diagonal, `[n, d]`.
        along: Block (and `ROOT`) -> minus half the difference of gradients along the direction asked for.
    """

    value: float
    root: np.ndarray
    root_curvature: np.ndarray
    score: dict[str, np.ndarray]
    curvature: dict[str, np.ndarray]
    along: dict[str, np.ndarray] = field(default_factory=dict)


def probe(guide: Guide, space: RootSpace, reduced: Reduced, blocks: Sequence[Block], at: Probe, split: str | None, first: bool, seed: int) -> Scores:
    """Score and curvature of L over one selection."""
    rng = np.random.default_rng(seed % 2**63)

    told = np.flatnonzero(at.root_spread)
    signs = {b.name: rng.choice([-1.0, 1.0], at.centre[b.name].shape) for b in blocks}
    root_sign = rng.choice([-1.0, 1.0], len(at.root)) * (not at.apart)
    if at.towards is not None:
        signs, root_sign = {b.name: at.towards[b.name] for b in blocks}, at.towards[ROOT]
    value, (root_plus, root_minus), rows = _pair(
        guide, space, reduced, blocks, at, split, first, root_sign * at.root_spread, {b.name: signs[b.name] * at.spread[b.name] for b in blocks},
    )
    if at.towards is not None:
        along = {b.name: -0.5 * (rows[b.name][0] - rows[b.name][1]) for b in blocks}
        return Scores(value, np.zeros(0), np.zeros((0, 0)), {}, {}, {**along, ROOT: -0.5 * (root_plus - root_minus)})
    curvature = np.zeros((len(at.root), len(at.root)))
    if at.apart:
        still = {b.name: np.zeros_like(at.centre[b.name]) for b in blocks}
        for i in told:
            move = np.zeros(len(at.root))
            move[i] = at.root_spread[i]
            _, (plus, minus), _ = _pair(guide, space, reduced, blocks, at, split, first, move, still)
            curvature[:, i] = -(plus - minus) / (2 * at.root_spread[i])
        curvature = 0.5 * (curvature + curvature.T)
    else:
        curvature[told, told] = -(root_sign * (root_plus - root_minus))[told] / (2 * at.root_spread[told])
    return Scores(
        value, 0.5 * (root_plus + root_minus), curvature, {b.name: 0.5 * (rows[b.name][0] + rows[b.name][1]) for b in blocks},
        {b.name: -signs[b.name] * (rows[b.name][0] - rows[b.name][1]) / (2 * at.spread[b.name]) for b in blocks},
    )


def _pair(
    guide: Guide, space: RootSpace, reduced: Reduced, blocks: Sequence[Block], at: Probe, split: str | None, first: bool,
    root_move: np.ndarray, move: Mapping[str, np.ndarray],
) -> tuple[float, np.ndarray, dict[str, np.ndarray]]:
    """Mean of L at centre + move and centre - move, and the gradients at both: of the root `[2, R]`, of each block `[2, n, d]`."""
    z = torch.tensor(np.stack([at.root + root_move, at.root - root_move]), dtype=reduced.dtype, requires_grad=True)
    rows = {
        b.name: torch.tensor(np.stack([at.centre[b.name] + move[b.name], at.centre[b.name] - move[b.name]]), dtype=reduced.dtype, requires_grad=True)
        for b in blocks
    }
    values: dict[str, Value] = dict(space.values(z))
    for b in blocks:
        values.update(row_values(reduced, b, rows[b.name]))
    bound, surrogate = lower_bound(guide, reduced, values, 2, split, first)
    grads: tuple[Tensor, ...] = tuple(torch.zeros_like(t) for t in (z, *rows.values()))
    if surrogate.requires_grad:
        grads = torch.autograd.grad(surrogate.sum(), [z, *rows.values()], allow_unused=True, materialize_grads=True)
    found = [doubles(g) for g in grads]
    return float(bound.to(torch.float64).mean()), found[0], dict(zip(rows, found[1:], strict=True))


def gather(
    guide: Guide, space: RootSpace, split: str | None, state: Mapping[str, np.ndarray], pieces: Iterable[tuple[Reduced, bool]],
    positions: Callable[[Layout, Selection, Block], np.ndarray], apart: bool, seed: int,
) -> dict[str, np.ndarray]:
    """Scores at `centre/*`, `spread/*` of a state, summed over pieces: `value`, `root`, `root_curvature`, and `score/*`, `curvature/*` of the rows looked at.

    With `towards/*` in the state, `along/*` only. `start/*` are the modes of coarse blocks below, where they were found, `seen/*` how often. `at/<block>` are
    the rows of its tables that are returned, if not all (`whole`).

    Args:
        guide: The guide.
        space: Root coordinates.
        split: The plate that pieces divide.
        state: Named arrays.
        pieces: Reduced models, each with whether it answers for what does not depend on the split plate.
        positions: Rows of a selection's units in the table of a block.
        apart: As in `Probe`.
        seed: Seed of signs.
    """
    blocks = [b for b in guide.blocks if b.free]
    sums: dict[str, np.ndarray] = {}
    looked: dict[str, list[np.ndarray]] = {}
    for number, (reduced, first) in enumerate(pieces):
        rows = {b.name: positions(reduced.selection.layout, reduced.selection, b) for b in blocks}
        towards = {n: state[f"towards/{n}"][r] for n, r in rows.items()} | {ROOT: state[f"towards/{ROOT}"]} if f"towards/{ROOT}" in state else None
        at = Probe(
            state["root/centre"], state["root/spread"], {n: state[f"centre/{n}"][r] for n, r in rows.items()},
            {n: state[f"spread/{n}"][r] for n, r in rows.items()}, apart, towards,
        )
        found = probe(guide, space, reduced, blocks, at, split, first, stream(seed, number))
        parts = {"value": np.asarray(found.value), "root": found.root, "root_curvature": found.root_curvature}
        if towards is not None:
            parts = {f"along/{ROOT}": found.along.pop(ROOT)}
        for key, value in parts.items():
            sums[key] = sums[key] + value if key in sums else value
        for kind, tables in (("score", found.score), ("curvature", found.curvature), ("along", found.along)):
            for name, table in tables.items():
                if f"{kind}/{name}" not in sums:
                    sums[f"{kind}/{name}"] = np.zeros_like(state[f"centre/{name}"])
                sums[f"{kind}/{name}"][rows[name]] += table
        for block in guide.blocks:
            if block.name in reduced.starts:
                rows[block.name] = positions(reduced.selection.layout, reduced.selection, block)
                for key, found_there in ((f"start/{block.name}", doubles(reduced.starts[block.name])), (f"seen/{block.name}", np.ones((1, 1)))):
                    if key not in sums:
                        sums[key] = np.zeros((math.prod(reduced.selection.layout.cardinality[p] for p in block.plates), found_there.shape[1]))
                    sums[key][rows[block.name]] += found_there
        for name, units in rows.items():
            looked.setdefault(name, []).append(units)
    for name, units_of in looked.items():
        mine = np.unique(np.concatenate(units_of))
        for key in [k for k in sums if k.partition("/")[2] == name and len(mine) < len(sums[k])]:
            sums[key], sums[f"at/{name}"] = sums[key][mine], mine
    return sums


def summed(answers: Iterable[Mapping[str, np.ndarray]], counts: Mapping[str, int]) -> dict[str, np.ndarray]:
    """The sum of answers of `gather`, each added as it comes: arrays, and tables of all of a block's rows from those returned.

    Args:
        answers: In the order in which they are added.
        counts: Block -> rows.
    """
    total: dict[str, np.ndarray] = {}
    for answer in answers:
        for key in (k for k in answer if not k.startswith("at/")):
            block, value = key.partition("/")[2], answer[key]
            at = answer.get(f"at/{block}", ...)
            if key not in total:
                total[key] = np.zeros(value.shape if at is ... else (counts[block], *value.shape[1:]))
            total[key][at] += value
    return total
