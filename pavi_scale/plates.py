"""Plates, their cardinalities in a cohort, and selections of their ground units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from pavi_scale.errors import ModelError


@dataclass(frozen=True)
class Plate:
    """A named set of exchangeable copies.

    Args:
        name: The plate's name; also the name of its dimension in the cohort.
        within: The plate, or plates, that each unit of this one belongs to (ragged with one, crossed with several).

    Raises:
        ModelError: A name that is none, or a plate that is named twice in `within`.

    Example:
        >>> Plate("house", within="county").within
        ('county',)
    """

    name: str
    within: tuple[str, ...] = ()

    def __init__(self, name: str, within: str | tuple[str, ...] | list[str] | None = None) -> None:
        if not isinstance(name, str) or not name.isidentifier():
            raise ModelError("a plate's name must be a Python identifier", where="Plate", got=repr(name), remedy="rename the plate")
        parents: object = (within,) if isinstance(within, str) else () if within is None else within
        if not isinstance(parents, (tuple, list)) or not all(isinstance(p, str) for p in parents) or len(set(parents)) < len(parents):
            expected = "the name of a plate, or different names in a tuple"
            raise ModelError("a plate lies within plates that are named, each once", where=f"Plate({name!r}, within=...)", expected=expected, got=repr(within))
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "within", tuple(parents))


def ancestors(plates: Mapping[str, Plate], name: str) -> tuple[str, ...]:
    """All plates that `name` lies within, nearest first, each once."""
    found: list[str] = []
    queue = list(plates[name].within)
    while queue:
        parent = queue.pop(0)
        if parent not in found:
            found.append(parent)
            queue.extend(plates[parent].within)
    return tuple(found)


@dataclass(frozen=True)
class Layout:
    """Cardinalities of a cohort's plates and, for ragged or crossed plates, the position of each unit's parent.

    Args:
        plates: The model's plates by name.
        cardinality: Size of each plate.
        index: `(child, parent)` -> int64 positions in the parent plate, one per unit of the child.
    """

    plates: Mapping[str, Plate]
    cardinality: Mapping[str, int]
    index: Mapping[tuple[str, str], np.ndarray] = field(default_factory=dict)

    def path(self, child: str, ancestor: str) -> np.ndarray:
        """Position in `ancestor` of every unit of `child` (composed over the levels between)."""
        if child == ancestor:
            return np.arange(self.cardinality[child])
        for parent in self.plates[child].within:
            if parent == ancestor:
                return self.index[child, parent]
            if ancestor in ancestors(self.plates, parent):
                return self.path(parent, ancestor)[self.index[child, parent]]
        raise ModelError("plate does not lie within the other", where=f"plate {child!r}", expected=f"within {ancestor!r}")

    @cached_property
    def _order(self) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
        return {}

    def children(self, child: str, parent: str, units: np.ndarray) -> np.ndarray:
        """Sorted positions of the units of `child` whose `parent` (direct) is among `units`."""
        key = (child, parent)
        if key not in self._order:
            order = np.argsort(self.index[key], kind="stable")
            counts = np.bincount(self.index[key], minlength=self.cardinality[parent])
            self._order[key] = order, np.concatenate([[0], np.cumsum(counts)])
        order, start = self._order[key]
        units = np.asarray(units)
        counts = start[units + 1] - start[units]
        offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.sort(order[np.repeat(start[units], counts) + offsets])

    def __repr__(self) -> str:
        return "Layout(" + ", ".join(f"{name}={size:,}" for name, size in self.cardinality.items()) + ")"


@dataclass(frozen=True)
class Selection:
    """Ground units selected of each plate, and how much each counts for.

    Args:
        layout: The layout selected from.
        units: Plate -> sorted int64 positions in the whole cohort.
        weight: Plate -> inverse inclusion probability of each selected unit (float64).
    """

    layout: Layout
    units: Mapping[str, np.ndarray]
    weight: Mapping[str, np.ndarray]

    def path(self, child: str, ancestor: str) -> np.ndarray:
        """Position, among the selected units of `ancestor`, of each selected unit of `child`."""
        if child == ancestor:
            return np.arange(len(self.units[child]))
        positions = self.layout.path(child, ancestor)[self.units[child]]
        return np.searchsorted(self.units[ancestor], positions)

    def sizes(self, plates: tuple[str, ...]) -> tuple[int, ...]:
        """Number of selected units of each plate."""
        return tuple(len(self.units[p]) for p in plates)

    def weights(self, plates: tuple[str, ...]) -> np.ndarray:
        """Weights of a variable's ground units, shape `sizes(plates)`.

        A plate that lies within another of the same variable already carries that one's weight.
        """
        inner = [p for p in plates if not any(p in ancestors(self.layout.plates, q) for q in plates)]
        out = np.ones(self.sizes(plates))
        for axis, plate in enumerate(plates):
            if plate in inner:
                out = out * self.weight[plate].reshape([-1 if a == axis else 1 for a in range(len(plates))])
        return out

    @classmethod
    def whole(cls, layout: Layout) -> Selection:
        """Every unit of every plate, with weight one."""
        units = {p: np.arange(n) for p, n in layout.cardinality.items()}
        return cls(layout, units, {p: np.ones(n) for p, n in layout.cardinality.items()})

    def __repr__(self) -> str:
        parts = (f"{p}: {len(u):,} of {self.layout.cardinality[p]:,}" for p, u in self.units.items())
        return "Selection(" + ", ".join(parts) + ")"
