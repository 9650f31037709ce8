"""What is known of a model's components beyond their graph: told by few units, and held against all of them.

The curvature of a law is looked at in a few units (`probe`); what they say is then tried on every unit: along a line a quadratic has no third difference,
and where coordinates do not interact f(z + u + w) - f(z + u) - f(z + w) + f(z) = 0. That takes some values of a law, without a gradient, where a
unit's covariates or data could make it another law; a threshold in a covariate, or one cell of a design, is found wherever it is.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pavi_scale.ambient import precision
from pavi_scale.batching import closure, splittable
from pavi_scale.cohort import Cohort
from pavi_scale.guide.blocks import Component, Factor
from pavi_scale.guide.guide import Guide, probe
from pavi_scale.guide.root import RootSpace
from pavi_scale.guide.terms import Laws
from pavi_scale.model.density import Graph
from pavi_scale.plates import Layout, Selection, ancestors
from pavi_scale.reduced import Reading, Reduced, Value

ENOUGH = 64  # units of a plate over which data are pooled that tell the structure of what hangs on it
RUNS = 8  # of neighbours among them
EXTREMES = 1_000_000  # values of a covariate up to which its least and largest are looked for
TRIED = 4_000_000  # values of a variable that its law is tried on; of more, those of units spread over all
AT_ONCE = 1 << 18
LONG_RUNS = 64  # of neighbours, where not all are tried
MOST_READ = 64_000_000  # values that such runs may lie in chunks of
EXACT = 1e-7  # of the values, that a difference which should be zero may be
WIDTH = 0.7  # of steps, in unconstrained coordinates
NEAR = 0.3  # the same of the points about which few units are probed


def small_reduced(graph: Graph, cohort: Cohort, guide: Guide, units: int) -> Reduced:
    """A reduced model of a few units of each splittable plate, and some more of other plates that neither hold nor lie within another.

    They are spread over the plate, and those with the least and largest values of its own covariates are among them: tables are sorted by dose or
    treatment, and the first units may say nothing.
    """
    tops, plates, cardinality = splittable(graph.model, guide.components), graph.model.plates, cohort.layout.cardinality
    simple = [p for p, plate in plates.items() if not plate.within and not any(p in other.within for other in plates.values())]
    chosen = {}
    for p in (*simple, *tops):
        some = populated(cohort.layout, p)
        chosen[p] = some[spread(len(some), units if p in tops else ENOUGH)]
    for v in graph.model.of_kind("covariate"):
        if len(v.plates) == 1 and v.plates[0] in chosen and cardinality[v.plates[0]] * math.prod(graph.shape(v)) <= EXTREMES:
            x = np.asarray(cohort.read(v.name, {})).reshape(cardinality[v.plates[0]], -1)
            chosen[v.plates[0]] = np.union1d(chosen[v.plates[0]], np.concatenate([x.argmin(0)[:units], x.argmax(0)[:units]]))
    selection = closure(cohort.layout, chosen)
    names = [v.name for v in graph.model.of_kind("observed", "covariate")]
    return Reduced(graph, selection, Reading(graph, selection, names, cohort))


def populated(layout: Layout, plate: str) -> np.ndarray:
    """Units of a plate that have something below them on as many plates as any of them has."""
    found = np.zeros(layout.cardinality[plate], np.int64)
    for below in (p for p in layout.plates if plate in ancestors(layout.plates, p)):
        found[layout.path(below, plate)] += 1
    return np.flatnonzero(found == found.max(initial=0))


def spread(count: int, few: int) -> np.ndarray:
    """Positions of a few of so many units, in runs of neighbours (which lie in few chunks) from the first to the last."""
    runs = min(RUNS, few)
    length = few // runs
    starts = np.unique(np.linspace(0, max(count - length, 0), runs).astype(np.int64))
    return np.unique(np.minimum(starts[:, None] + np.arange(length), count - 1))


def look(graph: Graph, cohort: Cohort, free: frozenset[frozenset[str]], seed: int) -> dict[str, dict[str, Any]]:
    """Structure of the components, probed on a few units at values drawn from the prior."""
    guide = Guide(graph, free)
    if not guide.components:
        return {}
    with precision(torch.float64):
        reduced = small_reduced(graph, cohort, guide, 3)
        space = RootSpace(graph, reduced)
        prior = torch.from_numpy(space.prior_draws(2, seed))
        # Of a wide prior each draw may lie where a law is flat: the bend of a logistic one is within some units of zero.
        roots = [space.values(z) for z in torch.cat([prior[:1].tanh(), prior]).split(1)]
        draws = [near_prior(guide, reduced, root, list(graph.links), NEAR, torch.Generator().manual_seed(seed))[0] for root in roots]
        return tried(graph, cohort, free, probe(graph, free, reduced, draws), roots[0], seed)


def tried(
    graph: Graph, cohort: Cohort, free: frozenset[frozenset[str]], structure: dict[str, dict[str, Any]], root: Mapping[str, Value], seed: int
) -> dict[str, dict[str, Any]]:
    """A structure without what does not hold for all units.

    Args:
        graph: The model.
        cohort: Its data.
        free: Free plate sets.
        structure: What few units say (`probe`).
        root: Values of the root variables at a point.
        seed: Seed of the points.
    """
    guide, names = Guide(graph, free, structure), [v.name for v in graph.model.of_kind("observed", "covariate")]
    for component in guide.components:
        known = structure[component.name]
        for factor in (f for f in component.factors if differs(graph, f)):
            for selection in selections(graph, cohort, factor):
                if not (known["quadratic"] or known["elementwise"]):
                    break
                reduced = Reduced(graph, selection, Reading(graph, selection, names, cohort))
                line, apart = differences(guide, component, factor, reduced, root, seed)
                known["quadratic"] = known["quadratic"] and line
                known["elementwise"] = known["elementwise"] and apart
                if not line:
                    known["uniform"] = [n for n in known["uniform"] if n != factor.variable]
    return structure


def differs(graph: Graph, factor: Factor) -> bool:
    """Whether a law may be another one for other units: it has data, or covariates of its units."""
    v = graph.model.variables[factor.variable]
    return bool(v.plates) and (v.kind == "observed" or any(graph.model.variables[p].kind != "latent" and graph.model.variables[p].plates for p in v.parents))


def selections(graph: Graph, cohort: Cohort, factor: Factor) -> Iterator[Selection]:
    """Units of a law's largest plate, some at a time, with the units above them and all of the law's other plates; one unit of plates not concerned."""
    v, layout = graph.model.variables[factor.variable], cohort.layout
    fine = max(v.plates, key=lambda p: layout.cardinality[p])
    above = ancestors(layout.plates, fine)
    involved = {q for p in v.plates for q in (p, *ancestors(layout.plates, p))}
    idle = {p: np.arange(1) for p, plate in layout.plates.items() if p not in involved and not plate.within}
    n = layout.cardinality[fine]
    each = math.prod(layout.cardinality[p] for p in v.plates if p != fine) * math.prod(graph.shape(v))
    units = np.arange(n)
    if n * each > TRIED:
        runs = min(n, LONG_RUNS, max(RUNS, MOST_READ // (each * (cohort.chunk(fine) or 1))))
        length = max(1, TRIED // (each * runs))
        starts = np.unique(np.linspace(0, n - length, runs).astype(np.int64))
        units = (starts[:, None] + np.arange(length)).flatten()  # runs do not meet: together they are less than the plate
    size = max(1, AT_ONCE // each)
    for start in range(0, len(units), size):
        some = units[start : start + size]
        yield closure(layout, {**idle, fine: some, **{q: np.flatnonzero(np.bincount(layout.path(fine, q)[some])) for q in above}})


def differences(guide: Guide, component: Component, factor: Factor, reduced: Reduced, root: Mapping[str, Value], seed: int) -> tuple[bool, bool]:
    """Whether a law has no third difference along a line, and whether events of its component do not interact in it, at all units of a reduced model."""
    generator = torch.Generator().manual_seed(seed)
    laws, start = at_prior(guide, component, factor, reduced, root, generator)
    step = {b: WIDTH * torch.randn(1, 1, *z.shape[2:], generator=generator, dtype=z.dtype) for b, z in start.items()}
    with torch.no_grad():
        def value(steps: Mapping[str, Tensor | float]) -> Tensor:
            return laws._copies(factor, {b: z + steps[b] * step[b] for b, z in start.items()}, False)[0]

        values = [value(dict.fromkeys(start, float(k))) for k in range(4)]
        size = torch.stack(values).abs().sum(0).clamp_min(1e-12)
        line = bool(((values[3] - 3 * values[2] + 3 * values[1] - values[0]).abs() <= EXACT * size).all())
        if not component.elementwise:
            return line, False
        apart, events = True, torch.arange(component.shape(component.blocks[0])[0])
        for bit in range(len(events).bit_length()):  # each pair of events is on different sides once
            side = ((events >> bit) & 1).to(reduced.dtype)[:, None]
            one, other = value(dict.fromkeys(start, side)), value(dict.fromkeys(start, 1.0 - side))
            # What has no value there says nothing: of counts, say, under a prior that is wide.
            apart = apart and not bool(((values[1] - one - other + values[0]).abs() > EXACT * size).any())
        return line, apart


def at_prior(
    guide: Guide, component: Component, factor: Factor, reduced: Reduced, root: Mapping[str, Value], generator: torch.Generator
) -> tuple[Laws, dict[str, Tensor]]:
    """The laws of a component, and coordinates of the blocks that one of them touches, near the prior means of a reduced model's units."""
    graph = guide.graph
    variables = graph.model.variables
    touched = [b for b in component.blocks if b.name in dict(factor.touches)]
    needed, more = set(), [*variables[factor.variable].parents, *(n for b in touched for n in b.latents)]
    while more:
        name = more.pop()
        if name not in needed and variables[name].kind == "latent":
            needed.add(name)
            more += variables[name].parents
    values, coordinates = near_prior(guide, reduced, root, needed, WIDTH, generator)
    laws = Laws(component, reduced, values, 1)
    start = {}
    for block in touched:
        parts = {}
        for latent in block.latents:
            v = variables[latent]
            order = [0, *(1 + v.plates.index(p) for p in block.plates), *range(1 + len(v.plates), coordinates[latent].ndim)]
            parts[latent] = coordinates[latent].permute(order).reshape(1, -1, *graph.links[latent].base_shape)
        start[block.name] = laws.join(block, parts)
    return laws, start


def near_prior(
    guide: Guide, reduced: Reduced, root: Mapping[str, Value], wanted: Collection[str], width: float, generator: torch.Generator
) -> tuple[dict[str, Value], dict[str, Tensor]]:
    """Values of the root and of wanted latents near their prior means given their parents, which are wanted too; and their unconstrained coordinates."""
    links, variables = guide.graph.links, guide.graph.model.variables
    values, coordinates = dict(root), {}
    for latent in (n for b in guide.blocks for n in b.latents if n in wanted):
        mean = reduced.prior_mean(latent, values)
        coordinates[latent] = mean + width * torch.randn(mean.shape, generator=generator, dtype=mean.dtype)
        values[latent] = Value(links[latent].forward(coordinates[latent]), variables[latent].plates)
    return values, coordinates
