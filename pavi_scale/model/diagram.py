"""Pictures of a model: text, a table of ground counts, Graphviz source and a plate diagram."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pavi_scale.errors import InputError
from pavi_scale.later import Later
from pavi_scale.model.protocol import ModelLike, VariableLike
from pavi_scale.plates import ancestors

if TYPE_CHECKING:
    import pandas as pd
else:
    pd = Later("pandas")

_SPREAD = 1.3  # distance of neighbouring columns; rows are 1 apart
_FILL = {"latent": "#ffffff", "observed": "#c9d3df", "covariate": "#efe9dc"}


def law_source(v: VariableLike) -> str:
    """The law's expression as it stands in the source, on one line; "" where the source is not available."""
    if v.law is None:
        return ""
    try:
        text = " ".join(inspect.getsource(v.law).split())
    except (OSError, TypeError):
        return ""
    start = text.find("lambda", max(0, text.find(f"{v.name} =") if f"{v.name} =" in text else text.find(f"{v.name}=")))
    if start < 0:
        return getattr(v.law, "__name__", "")
    text = text[start:]
    text = text[text.find(":") + 1 :].strip()
    depth = 0
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if depth < 0 or (depth == 0 and c == ","):
            return text[:i].strip()
    return text


def text(model: ModelLike) -> str:
    """The template graph as text: plates, then one line per variable."""
    plates = [p.name + (f" within {', '.join(p.within)}" if p.within else "") for p in model.plates.values()]
    count = {kind: sum(v.kind == kind for v in model.variables.values()) for kind in ("latent", "observed")}
    lines = [f"Model of {count['latent']} latent and {count['observed']} observed template variables"]
    lines.append("  plates: " + ("; ".join(plates) or "none") + (f"   sizes: {', '.join(f'{k}={n}' for k, n in model.sizes.items())}" if model.sizes else ""))
    heads = {v.name: f"{v.name}[{', '.join([*v.plates, *v.dims])}]" if v.plates or v.dims else v.name for v in model.variables.values()}
    width = min(40, max((len(h) for h in heads.values()), default=0))
    for v in model.variables.values():
        source = law_source(v) or (f"law of ({', '.join(v.parents)})" if v.law is not None else "given")
        source = source if len(source) <= 100 else source[:97] + "..."
        lines.append(f"  {v.kind:<9} {heads[v.name]:<{width}} {'~' if v.law is not None else ' '} {source}")
    return "\n".join(lines)


def describe(model: ModelLike, sizes: Mapping[str, int]) -> pd.DataFrame:
    """Ground counts of every variable.

    Args:
        model: The model.
        sizes: Cardinality of each plate and size of each event dimension that `Model(sizes=)` does not fix.

    Returns:
        One row per variable: kind, plates, dims, `units` (ground variables) and `numbers` (units times event size). `attrs["latents"]` is the total number
        of latent numbers.

    Raises:
        InputError: A size is missing.
    """
    known = {**model.sizes, **sizes}
    rows = []
    for v in model.variables.values():
        for name in (*v.plates, *v.dims):
            if name not in known:
                raise InputError(
                    "plate or dimension has no size", where=f"variable {v.name!r}", expected=f"sizes={{{name!r}: ...}}", got=f"sizes for {sorted(known)}"
                )
        units = math.prod(int(known[p]) for p in v.plates)
        rows.append((v.name, v.kind, ", ".join(v.plates), ", ".join(v.dims), units, units * math.prod(int(known[d]) for d in v.dims)))
    table = pd.DataFrame(rows, columns=["variable", "kind", "plates", "dims", "units", "numbers"]).set_index("variable")
    table.attrs["latents"] = int(table.loc[table["kind"] == "latent", "numbers"].sum())
    return table


def regions(model: ModelLike) -> list[tuple[frozenset[str], list[str]]]:
    """Sets of plates that variables live in (ancestors included), each with its variables, in order of appearance."""
    found: dict[frozenset[str], list[str]] = {}
    for v in model.variables.values():
        inside = frozenset(v.plates).union(*(ancestors(model.plates, p) for p in v.plates))
        found.setdefault(inside, []).append(v.name)
    return list(found.items())


# --- Graphviz


class Dot(str):
    """DOT source, where the `graphviz` package is not installed."""

    __slots__ = ()

    @property
    def source(self) -> str:
        """The source, as `graphviz.Source.source`."""
        return str(self)


def dot_source(model: ModelLike) -> str:
    """The plate diagram in the DOT language; a set of plates is one cluster, inside the largest set that it extends."""
    sets = sorted(regions(model), key=lambda item: len(item[0]))
    lines = ["digraph model {", "  rankdir=TB; node [shape=ellipse, style=filled, fontname=Helvetica]; edge [arrowsize=0.7];"]

    def emit(own: frozenset[str], names: Sequence[str], depth: int) -> None:
        pad = "  " * depth
        lines.append(f'{pad}subgraph "cluster_{"_".join(sorted(own))}" {{ label="{_label(model, own)}"; labeljust=r; labelloc=b; style=rounded;')
        body(own, names, depth + 1)
        lines.append(f"{pad}}}")

    def body(own: frozenset[str], names: Sequence[str], depth: int) -> None:
        for name in names:
            v = model.variables[name]
            extra = f"\\n[{', '.join(v.dims)}]" if v.dims else ""
            shape = "box" if v.kind == "covariate" else "ellipse"
            lines.append(f'{"  " * depth}"{name}" [label="{name}{extra}", fillcolor="{_FILL[v.kind]}", shape={shape}];')
        for other, inside in sets:
            if _home(other, [s for s, _ in sets]) == own and other != own:
                emit(other, inside, depth)

    body(frozenset(), [n for own, names in sets if not own for n in names], 1)
    lines += [f'  "{p}" -> "{v.name}";' for v in model.variables.values() for p in v.parents]
    return "\n".join([*lines, "}", ""])


def _home(own: frozenset[str], sets: Sequence[frozenset[str]]) -> frozenset[str]:
    """The largest proper subset of `own` that has a rectangle: where its own rectangle is drawn (the first, if two cross)."""
    return max((s for s in sets if s < own), key=len, default=frozenset())


def _label(model: ModelLike, own: frozenset[str]) -> str:
    inner = [p for p in model.plates if p in own and not any(p in ancestors(model.plates, q) for q in own)]
    return " x ".join(p + (f" ({model.sizes[p]})" if p in model.sizes else "") for p in inner)


def to_graphviz(model: ModelLike) -> Any:
    """`graphviz.Source` of the diagram if the `graphviz` package is installed, else a string with the source."""
    if importlib.util.find_spec("graphviz") is None:
        return Dot(dot_source(model))
    return importlib.import_module("graphviz").Source(dot_source(model))


# --- Matplotlib


def positions(model: ModelLike) -> dict[str, tuple[float, float]]:
    """Centre of every node.

    Plate-free variables are on top; each set of plates below has columns of its own,
    ordered so that a plate's columns are neighbours wherever such an order exists: its rectangle then holds its own variables alone.
    """
    groups = {own: names for own, names in regions(model) if own}
    order = _column_order(list(groups))
    depth = _depths(model)
    place: dict[str, tuple[float, float]] = {}
    left = 0.0
    for own in order:
        rows: dict[int, list[str]] = {}
        for name in groups[own]:
            rows.setdefault(depth[name], []).append(name)
        width = max(len(row) for row in rows.values())
        for row, names in rows.items():
            for i, name in enumerate(names):
                place[name] = (left + (i + 0.5) * _SPREAD * width / len(names), -float(row))
        left += width * _SPREAD
    free = [n for own, names in regions(model) if not own for n in names]
    levels = sorted({depth[n] for n in free}, reverse=True)
    children = {n: [v.name for v in model.variables.values() if n in v.parents] for n in free}
    for height, level in enumerate(levels, start=1):
        names = [n for n in free if depth[n] == level]
        # over the mean of their children, then spread over the width
        names.sort(key=lambda n: sum(place[c][0] for c in children[n] if c in place) / max(1, sum(c in place for c in children[n])))
        span = max(left, float(len(names)))
        for i, name in enumerate(names):
            place[name] = ((i + 0.5) * span / len(names) + (left - span) / 2, float(height))
    return place


def _depths(model: ModelLike) -> dict[str, int]:
    """Row of each variable: longest way from its first ancestors of the same kind of place (plate-free, or in plates)."""
    depth: dict[str, int] = {}
    for v in model.variables.values():
        drawn_above = (p for p in v.parents if bool(model.variables[p].plates) == bool(v.plates) and model.variables[p].kind != "covariate")
        depth[v.name] = max((depth[p] + 1 for p in drawn_above), default=0)
    for v in model.variables.values():
        if v.kind == "covariate":  # beside its first child: nothing else then passes through it
            depth[v.name] = min((depth[c.name] for c in model.variables.values() if v.name in c.parents and c.plates), default=0)
    return depth


def _column_order(sets: list[frozenset[str]]) -> list[frozenset[str]]:
    """Order with the fewest columns between those of one plate that are not its own."""

    def foreign(columns: Iterable[frozenset[str]]) -> int:
        total = 0
        order = list(columns)
        for plate in frozenset().union(*order):
            at = [i for i, s in enumerate(order) if plate in s]
            total += at[-1] - at[0] + 1 - len(at)
        return total

    if len(sets) <= 7:
        return list(min(itertools.permutations(sets), key=foreign, default=()))
    order: list[frozenset[str]] = []
    for own in sets:  # too many to try all: insert each where it disturbs least
        order = min((order[:i] + [own] + order[i:] for i in range(len(order), -1, -1)), key=foreign)
    return order


def plot(model: ModelLike, ax: Any = None) -> Any:
    """Draw the plate diagram with Matplotlib: circles are latent, shaded ones observed, boxes covariates; a rectangle is a plate.

    Args:
        model: The model.
        ax: Axes to draw into; new ones if None.

    Returns:
        The axes.
    """
    patches = importlib.import_module("matplotlib.patches")
    place = positions(model)
    xs, ys = zip(*place.values(), strict=True) if place else ((0.0,), (0.0,))
    if ax is None:
        size = (1.5 * (max(xs) - min(xs)) + 2.6, 1.35 * (max(ys) - min(ys)) + 2.2)
        _, ax = importlib.import_module("matplotlib.pyplot").subplots(figsize=size, layout="constrained")
    boxes = plate_boxes(model, place)
    for plate, (left, bottom, right, top) in boxes.items():
        ax.add_patch(
            patches.FancyBboxPatch(
                (left, bottom), right - left, top - bottom, boxstyle="round,pad=0,rounding_size=0.08", fill=False, edgecolor="#5b6b7b", linewidth=1.1, zorder=1
            )
        )
        label = plate + (f" ({model.sizes[plate]})" if plate in model.sizes else "")
        ax.text(right - 0.07, bottom + 0.05, label, ha="right", va="bottom", fontsize=9, style="italic", color="#5b6b7b", zorder=4)
    shapes = {}
    for v in model.variables.values():
        x, y = place[v.name]
        shape = patches.Rectangle((x - 0.34, y - 0.2), 0.68, 0.4) if v.kind == "covariate" else patches.Ellipse((x, y), 0.84, 0.5)
        shape.set(facecolor=_FILL[v.kind], edgecolor="#1f2933", linewidth=1.2, zorder=3)
        ax.add_patch(shape)
        label = v.name if not v.dims else f"{v.name}\n[{', '.join(v.dims)}]"
        ax.text(x, y, label, ha="center", va="center", fontsize=8.5 if len(max(label.split("\n"), key=len)) <= 10 else 7, zorder=4, linespacing=0.95)
        shapes[v.name] = shape
    for v in model.variables.values():
        for p in v.parents:
            ends = {"patchA": shapes[p], "patchB": shapes[v.name], "shrinkA": 0, "shrinkB": 1}
            ax.add_patch(
                patches.FancyArrowPatch(
                    place[p],
                    place[v.name],
                    arrowstyle="-|>",
                    mutation_scale=9,
                    color="#1f2933",
                    linewidth=0.9,
                    connectionstyle="arc3,rad=0.05",
                    zorder=2,
                    **ends,
                )
            )
    ax.set_xlim(min([*xs, *(b[0] + 0.4 for b in boxes.values())]) - 0.6, max([*xs, *(b[2] - 0.4 for b in boxes.values())]) + 0.6)
    ax.set_ylim(min([*ys, *(b[1] + 0.3 for b in boxes.values())]) - 0.4, max(ys) + 0.4)
    ax.set_aspect("equal")
    ax.set_axis_off()
    return ax


def plate_boxes(model: ModelLike, place: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float, float, float]]:
    """Rectangle (left, bottom, right, top) of every plate that has variables; a plate that holds another's variables is drawn wider."""
    inside = {name: own for own, names in regions(model) for name in names}
    members = {p: [n for n in place if p in inside[n]] for p in model.plates}
    drawn = [p for p in sorted(members, key=lambda p: len(members[p])) if members[p]]
    boxes: dict[str, tuple[float, float, float, float]] = {}
    for rank, p in enumerate(drawn):
        pad = 0.45 + 0.28 * rank / max(1, len(drawn)) * min(2.0, 0.5 * len(drawn)) / 2.0
        x, y = [place[n][0] for n in members[p]], [place[n][1] for n in members[p]]
        boxes[p] = (min(x) - pad, min(y) - pad + 0.02 - 0.13 * rank, max(x) + pad, max(y) + pad - 0.1)
    return boxes


class Drawn:
    """Mixin that gives a model its text, table and pictures."""

    def __repr__(self: ModelLike) -> str:
        return text(self)

    def describe(self: ModelLike, sizes: Mapping[str, int]) -> pd.DataFrame:
        """Ground counts of every variable; see `pavi_scale.model.diagram.describe`."""
        return describe(self, sizes)

    def to_graphviz(self: ModelLike) -> Any:
        """`graphviz.Source` of the plate diagram, or a string with the DOT source."""
        return to_graphviz(self)

    def plot(self: ModelLike, ax: Any = None) -> Any:
        """Plate diagram drawn into Matplotlib axes."""
        return plot(self, ax)
