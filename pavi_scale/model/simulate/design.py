"""What a simulation is of: cardinalities, event sizes, and the covariates and indices that are given, all checked before any draw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr

from pavi_scale.errors import InputError, ModelError
from pavi_scale.model.protocol import ModelLike


@dataclass(frozen=True)
class Design:
    """A model with every size known.

    Args:
        model: The model.
        cardinality: Size of every plate.
        events: Size of every event dimension.
        index: `(child, parent)` -> name of the index variable.
        given: Variables that are taken, not drawn; dims in model order.
        coords: Coordinates to hand on.
    """

    model: ModelLike
    cardinality: Mapping[str, int]
    events: Mapping[str, int]
    index: Mapping[tuple[str, str], str]
    given: Mapping[str, xr.DataArray] = field(default_factory=dict)
    coords: Mapping[str, Any] = field(default_factory=dict)


def plan(model: ModelLike, sizes: Mapping[str, int], given: xr.Dataset | None, fixed: xr.Dataset | None) -> Design:
    """Check and complete the sizes.

    Raises:
        InputError: A size is unknown, missing, not a positive integer, or contradicts `given`; an index is out of range.
        ModelError: An event dimension has no size.
    """
    for name, data in (("given", given), ("fixed", fixed)):
        if data is not None and not isinstance(data, xr.Dataset):
            raise InputError(f"{name} must be an xarray.Dataset", where=f"{name}=", got=type(data).__name__)
    index = {(p.name, q): f"{p.name}_{q}" for p in model.plates.values() for q in p.within}
    taken: dict[str, xr.DataArray] = {}
    if given is not None:
        for (child, parent), found in _indices(index, given).items():
            index[child, parent] = str(found.name)
            taken[str(found.name)] = found
        taken.update({v.name: given[v.name] for v in model.variables.values() if v.kind == "covariate" and v.name in given})
    if fixed is not None:
        taken.update({v.name: fixed[v.name] for v in model.variables.values() if v.kind == "latent" and v.name in fixed})
    clash = set(index.values()) & (set(model.variables) | set(model.plates))
    if clash:
        raise ModelError("a variable has the name of an index variable", where=f"variable {sorted(clash)[0]!r}", remedy="rename the variable")
    known = _sizes(model, sizes, taken, index)
    taken = {name: _ordered(model, name, array) for name, array in taken.items()}
    cardinality = {p: known[p] for p in model.plates}
    for pair, name in index.items():
        if name in taken:
            _check_index(taken[name], pair, cardinality)
    dims = set(known)
    coords = {str(name): c for name, c in ({} if given is None else given.coords).items() if set(c.dims) <= dims and c.dims and name not in taken}
    return Design(model, cardinality, {d: known[d] for d in model.dims}, index, taken, coords)


def _indices(index: Mapping[tuple[str, str], str], given: xr.Dataset) -> dict[tuple[str, str], xr.DataArray]:
    found: dict[tuple[str, str], xr.DataArray] = {}
    for child, parent in index:
        names = [n for n, v in given.variables.items() if v.attrs.get("instance_dimension") == parent and v.dims == (child,)]
        if len(names) > 1:
            raise InputError("two index variables for one plate", where=f"plate {child!r} within {parent!r}", got=str(names), remedy="drop one")
        if names:
            found[child, parent] = given[names[0]]
    return found


def _sizes(model: ModelLike, sizes: Mapping[str, int], taken: Mapping[str, xr.DataArray], index: Mapping[tuple[str, str], str]) -> dict[str, int]:
    wanted = [*model.plates, *model.dims]
    known: dict[str, tuple[int, str]] = {}

    def learn(name: str, size: int, source: str) -> None:
        if name in known and known[name][0] != size:
            raise InputError(
                "sizes contradict each other", where=f"dimension {name!r}", expected=f"{known[name][0]} ({known[name][1]})", got=f"{size} ({source})"
            )
        known.setdefault(name, (size, source))

    for name, size in sizes.items():
        if name not in wanted and name not in model.sizes:
            raise InputError("size for an unknown plate or dimension", where=f"sizes[{name!r}]", expected=f"one of {wanted}")
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:
            raise InputError("a size is a positive integer", where=f"sizes[{name!r}]", got=repr(size))
        learn(name, int(size), "sizes")
    for name, size in model.sizes.items():
        learn(name, size, "Model(sizes=)")
    for array in taken.values():
        for dim, size in array.sizes.items():
            if dim in wanted:
                learn(str(dim), size, f"given {array.name!r}")
    for (_, parent), name in index.items():
        if parent not in known and name in taken and taken[name].size:
            learn(parent, int(taken[name].max()) + 1, f"largest index of {name!r} + 1")
    for name in wanted:
        if name not in known and name in model.plates:
            raise InputError(
                "plate has no size",
                where=f"plate {name!r}",
                expected=f"sizes={{{name!r}: ...}}",
                got=f"sizes for {sorted(known)}",
                remedy="name every plate in sizes, or pass given= with variables on it",
            )
        if name not in known:
            v = next(v for v in model.variables.values() if name in v.dims)
            raise ModelError(
                "event dimension has no size", where=f"variable {v.name!r}, dim {name!r}", remedy=f"pass sizes={{{name!r}: ...}}, or Model(sizes=...)"
            )
    return {name: size for name, (size, _) in known.items()}


def _ordered(model: ModelLike, name: str, array: xr.DataArray) -> xr.DataArray:
    if name not in model.variables:
        return array
    dims = model.variables[name].plates + model.variables[name].dims
    if set(array.dims) != set(dims):
        raise InputError("given variable has the wrong dimensions", where=f"variable {name!r}", expected=str(dims), got=str(array.dims))
    if array.dtype.kind not in "fiub":
        raise InputError("given variable is not numeric", where=f"variable {name!r}", expected="float, integer or boolean", got=str(array.dtype))
    return array.transpose(*dims)


def _check_index(array: xr.DataArray, pair: tuple[str, str], cardinality: Mapping[str, int]) -> None:
    where = f"index variable {array.name!r} of plate {pair[0]!r}"
    if array.dtype.kind not in "iu":
        raise InputError("index variable is not integer", where=where, expected="0-based integer positions", got=str(array.dtype))
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= cardinality[pair[1]]:
        raise InputError(
            "index out of range",
            where=where,
            expected=f"0 to {cardinality[pair[1]] - 1}",
            got=f"{low} to {high}",
            remedy=f"positions count the units of {pair[1]!r} from 0",
        )
