"""Blocks and components: which local latents are inferred together.

A block gathers the latents of equal plates. A law that touches two blocks couples them; coupled blocks form a component.
A block with *free* encodings takes part in the laws of its own latents only: what its other children say is in its rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from pavi_scale.model.density import Graph
from pavi_scale.model.template import Model, Variable
from pavi_scale.plates import Plate, ancestors

DENSE_LIMIT = 1500  # unconstrained coordinates of a crossed component, but for its largest block, that are solved densely: ~1 GFLOP a factorisation
DENSE_UNITS = 16  # numbers of a dense factor whose working memory is that of one ground unit of a law of few coordinates, at least
JOINT = 32  # candidates of a component below which its coarser blocks are drawn once for all
COLUMN_NUMBERS, MOST_COLUMNS = 4, 64  # numbers of a unit for each column of its Hessian, and how many of those are held at once
DENSE_NEWTON_LIMIT = 500  # the same where the laws are not Gaussian and it takes many factorisations to find the mode


@dataclass(frozen=True)
class Block:
    """Latents on equal plates.

    Args:
        plates: The plates, in the axis order of the first latent.
        latents: Names, parents first.
        sizes: Unconstrained coordinates of each latent.
        free: Whether rows stand for the data below.
    """

    plates: tuple[str, ...]
    latents: tuple[str, ...]
    sizes: tuple[int, ...]
    free: bool = False

    @property
    def name(self) -> str:
        """The plates, joined."""
        return "*".join(self.plates)

    @property
    def dim(self) -> int:
        """Unconstrained coordinates of one unit."""
        return sum(self.sizes)


@dataclass(frozen=True)
class Factor:
    """The law of one variable, and the latents of each block in the component that it touches."""

    variable: str
    touches: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Component:
    """Blocks that are inferred jointly, coarse to fine.

    Args:
        blocks: The blocks.
        factors: Laws that the component answers for.
        couplings: Block name -> coarser blocks it is coupled to when it is eliminated (fill-in counted).
        tree: Whether elimination from fine to coarse stays local; else only the largest block is eliminated, and the rest is solved densely.
        elementwise: Whether coordinates of different event index are independent: C = event size, e = latents per block.
        candidates: Draws per unit of its finest blocks among which one is picked by importance weight; 0 for none.
        rough: Laws with kinks, whose second derivative is zero where it exists.
        head: The block of a crossed component that is eliminated unit by unit; empty where it is not told.
        uniform: Laws whose second derivatives are the same for all units and points, given the root: had from one unit.
        quadratic: Whether its log joint is quadratic in its coordinates (linear-Gaussian laws): its Gaussian is then exact.
    """

    blocks: tuple[Block, ...]
    factors: tuple[Factor, ...]
    couplings: Mapping[str, tuple[str, ...]]
    tree: bool
    elementwise: bool = False
    quadratic: bool = False
    candidates: int = 0
    rough: tuple[str, ...] = ()
    uniform: tuple[str, ...] = ()
    head: str = ""

    @property
    def name(self) -> str:
        """The blocks' names, joined."""
        return "+".join(b.name for b in self.blocks)

    @property
    def finest(self) -> tuple[str, ...]:
        """Blocks of a component that is not Gaussian whose units are independent given the other blocks: those of a tree below which there is no other."""
        if self.quadratic:
            return ()
        if not self.tree:
            return (self.head,) if self.head else ()
        above = {name for names in self.couplings.values() for name in names}
        return tuple(b.name for b in self.blocks if b.name not in above)

    @property
    def resampled(self) -> tuple[str, ...]:
        """Blocks whose draws are picked among candidates by importance weight."""
        return self.finest if self.candidates else ()

    @property
    def remembered(self) -> bool:
        """Whether its mode is looked for, so that a good one is worth remembering: laws that are not Gaussian, without kinks or rows."""
        return not self.quadratic and not self.rough and not any(b.free for b in self.blocks)

    @property
    def joint(self) -> bool:
        """Whether its coarser blocks are picked among candidates, too, by the weights of all that lies below."""
        return len(self.blocks) > 1 and bool(self.resampled) and self.candidates >= JOINT

    def shape(self, block: Block) -> tuple[int, int]:
        """(C, e): independent copies of a unit's coordinates, and coordinates in each."""
        return (block.sizes[0], len(block.sizes)) if self.elementwise else (1, block.dim)

    def columns(self, block: Block, latent: str) -> range:
        """Positions on the e axis of a latent's coordinates."""
        i = block.latents.index(latent)
        start = i if self.elementwise else sum(block.sizes[:i])
        return range(start, start + (1 if self.elementwise else block.sizes[i]))

    def top(self, plates: Mapping[str, Plate]) -> Block | None:
        """The block that every other lies below, if there is one."""
        first = self.blocks[0]
        return first if all(lies_below(plates, b.plates, first.plates) for b in self.blocks) else None


def lies_below(plates: Mapping[str, Plate], fine: Iterable[str], coarse: Iterable[str]) -> bool:
    """Whether each unit on plates `fine` has exactly one unit on plates `coarse`."""
    reach = {q for p in fine for q in (p, *ancestors(plates, p))}
    return set(coarse) <= reach


def make_blocks(graph: Graph, free: frozenset[frozenset[str]] = frozenset()) -> list[Block]:
    """The blocks of a model's local latents, coarse to fine, in template order."""
    groups: dict[frozenset[str], list[Variable]] = {}
    for v in graph.model.latents:
        if v.plates:
            groups.setdefault(frozenset(v.plates), []).append(v)
    blocks = [
        Block(members[0].plates, tuple(v.name for v in members), tuple(graph.links[v.name].size for v in members), key in free)
        for key, members in groups.items()
    ]
    plates = graph.model.plates
    ordered: list[Block] = []
    while blocks:  # a block follows every block it lies strictly below
        ready = next(
            b for b in blocks if not any(o is not b and lies_below(plates, b.plates, o.plates) and not lies_below(plates, o.plates, b.plates) for o in blocks)
        )
        ordered.append(ready)
        blocks.remove(ready)
    return ordered


def make_components(graph: Graph, blocks: Sequence[Block]) -> list[Component]:
    """Components in an order in which each needs values of earlier ones only."""
    owner = {name: b for b in blocks for name in b.latents}
    touches: dict[str, list[tuple[Block, tuple[str, ...]]]] = {}
    for v in graph.model.of_kind("latent", "observed"):
        involved = [n for n in (*v.parents, v.name) if n in owner and not (owner[n].free and v.name not in owner[n].latents)]
        per_block = [(b, tuple(n for n in b.latents if n in involved)) for b in blocks]
        touches[v.name] = [(b, names) for b, names in per_block if names]
    group = {b.name: i for i, b in enumerate(blocks)}
    for touched in touches.values():
        for a, b in combinations([t[0] for t in touched], 2):
            old, new = group[b.name], group[a.name]
            group = {name: new if g == old else g for name, g in group.items()}
    components = []
    for g in dict.fromkeys(group.values()):
        members = tuple(b for b in blocks if group[b.name] == g)
        names = {b.name for b in members}
        factors = tuple(Factor(v, tuple((b.name, n) for b, n in t)) for v, t in touches.items() if t and t[0][0].name in names)
        couplings, tree = _symbolic(graph.model.plates, members, factors)
        components.append(Component(members, factors, couplings, tree))
    return _in_order(graph, components)


def coupled(plates: Mapping[str, Plate], blocks: tuple[Block, ...], factors: tuple[Factor, ...], like: Component) -> Component:
    """A component of other blocks and laws, with what is known of the laws of `like`."""
    couplings, tree = _symbolic(plates, blocks, factors)
    return replace(like, blocks=blocks, factors=factors, couplings=couplings, tree=tree)


def _symbolic(plates: Mapping[str, Plate], blocks: Sequence[Block], factors: Sequence[Factor]) -> tuple[dict[str, tuple[str, ...]], bool]:
    """Symbolic elimination, fine to coarse: couplings with fill-in, and whether each stays on one path of plates."""
    by_name = {b.name: b for b in blocks}
    neighbours: dict[str, set[str]] = {b.name: set() for b in blocks}
    for factor in factors:
        for (a, _), (b, _) in combinations(factor.touches, 2):
            neighbours[a].add(b)
            neighbours[b].add(a)
    couplings: dict[str, tuple[str, ...]] = {}
    position = {b.name: i for i, b in enumerate(blocks)}
    for block in reversed(blocks):
        coarser = sorted((n for n in neighbours[block.name] if position[n] < position[block.name]), key=position.__getitem__)
        for a, b in combinations([*coarser, block.name], 2):
            if not lies_below(plates, by_name[b].plates, by_name[a].plates):
                return {}, False
            neighbours[a].add(b)
            neighbours[b].add(a)
        couplings[block.name] = tuple(coarser)
    return couplings, True


def _in_order(graph: Graph, components: list[Component]) -> list[Component]:
    mine = {n: c.name for c in components for b in c.blocks for n in b.latents}
    needs = {
        c.name: {mine[p] for f in c.factors for p in (*graph.model.variables[f.variable].parents, f.variable) if p in mine} - {c.name}
        for c in components
    }
    ordered: list[Component] = []
    while components:
        ready = next(c for c in components if needs[c.name] <= {o.name for o in ordered})
        ordered.append(ready)
        components = [c for c in components if c is not ready]
    return ordered


def coordinates(component: Component, cardinality: Mapping[str, int]) -> int:
    """Unconstrained coordinates of a whole component."""
    return sum(b.dim * math.prod(cardinality[p] for p in b.plates) for b in component.blocks)


def dense_rest(component: Component, cardinality: Mapping[str, int]) -> tuple[int, int]:
    """(C, T): independent copies, and the columns of each that are left of a crossed component when its largest block is eliminated."""
    sizes = [component.shape(b)[1] * math.prod(cardinality[p] for p in b.plates) for b in component.blocks]
    return component.shape(component.blocks[0])[0], 0 if component.tree else sum(sizes) - max(sizes)


def dense_units(components: Iterable[Component], cardinality: Mapping[str, int]) -> int:
    """Ground units of a law that weigh as much in memory as the largest dense factor.

    Of a unit, a column of its Hessian takes as many numbers as the plan counts for it (`planning.unit_bytes`); of element-wise laws there are few.
    """
    found = [(dense_rest(c, cardinality), 1 if c.elementwise else sum(b.dim for b in c.blocks)) for c in components]
    return max((copies * t * t // max(DENSE_UNITS, COLUMN_NUMBERS * min(columns, MOST_COLUMNS)) for (copies, t), columns in found), default=0)


def largest(component: Component, cardinality: Mapping[str, int], elementwise: bool) -> str:
    """The block of a crossed component with most coordinates: the one that is eliminated (`fronts.make_pattern`)."""
    def size(block: Block) -> int:
        return (len(block.sizes) if elementwise else block.dim) * math.prod(cardinality[p] for p in block.plates)

    return max(component.blocks, key=size).name


def law_units(graph: Graph, component: Component, cardinality: Mapping[str, int]) -> int:
    """Ground units of the largest law of a component."""
    return max(math.prod(cardinality[p] for p in graph.model.variables[f.variable].plates) for f in component.factors)


def inputs_of(model: Model, component: Component) -> list[str]:
    """Covariates that the laws of a component's own latents read."""
    own = {n for b in component.blocks for n in b.latents}
    return [n for n in model.variables if model.variables[n].kind == "covariate" and any(n in model.variables[o].parents for o in own)]


def fan_in(graph: Graph, cardinality: Mapping[str, int], block: Block) -> float:
    """Children of one unit of a block, of the variable that has most."""
    units = math.prod(cardinality[p] for p in block.plates)
    children = [v for v in graph.model.of_kind("latent", "observed") if v.name not in block.latents and set(v.parents) & set(block.latents)]
    return max((math.prod(cardinality[p] for p in v.plates) / units for v in children), default=0.0)


def choose_free(graph: Graph, cardinality: Mapping[str, int], limit: int = DENSE_LIMIT, most: float = math.inf) -> frozenset[frozenset[str]]:
    """The fewest coarse blocks to free so that every component is a tree, or crossed and small enough to be solved at once.

    The block whose units have most children goes first: its site is the most concentrated, so freeing it costs least.

    Args:
        graph: The model.
        cardinality: Units of each plate.
        limit: Columns that the dense part of a crossed component may have.
        most: Ground units of a law that are computed at once.
    """
    free: frozenset[frozenset[str]] = frozenset()
    while True:
        blocks = make_blocks(graph, free)
        crossed = [c for c in make_components(graph, blocks) if not c.tree]
        hard = [c for c in crossed if dense_rest(c, cardinality)[1] > limit or law_units(graph, c, cardinality) > most]
        if not hard:
            return free
        candidates = [b for b in hard[0].blocks if not b.free]
        free = free | {frozenset(max(candidates, key=lambda b: fan_in(graph, cardinality, b)).plates)}


def labelled(component: Component, graph: Graph) -> str | None:
    """The observed mixture of a labelled component; None for any other component."""
    if not component.tree or component.quadratic or component.rough or component.elementwise or len(component.blocks) > 2 or component.resampled:
        return None
    *tops, leaf = component.blocks
    if any(b.free for b in component.blocks) or len(leaf.latents) != 1:
        return None
    data = None
    for factor in component.factors:
        touched = tuple(name for name, _ in factor.touches)
        if graph.labelled.get(factor.variable) == leaf.latents[0] and touched == (leaf.name,):
            if data is not None:
                return None
            data = factor.variable
        elif factor.variable not in component.uniform or graph.model.variables[factor.variable].kind != "latent":
            return None
    if data is None or not all(graph.links[n].identity for b in component.blocks for n in b.latents):
        return None
    nested = [set(b.plates) for b in tops] + [set(leaf.plates), set(graph.model.variables[data].plates)]
    return data if all(a < b for a, b in zip(nested[:-2], nested[1:-1], strict=True)) and nested[-2] <= nested[-1] else None
