"""The part of a cohort that simulations take as given: covariates, index variables, labels and which observations are missing."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xarray as xr

from pavi_scale.batching import closure
from pavi_scale.cohort import Cohort
from pavi_scale.errors import InputError
from pavi_scale.plates import Selection


def given_of(cohort: Cohort, sizes: Mapping[str, int] | None = None) -> tuple[dict[str, int], xr.Dataset]:
    """Sizes and `given` for `Model.sample`.

    Args:
        cohort: The cohort.
        sizes: Top-level plate -> units kept, the first ones, with everything below them; all units of other plates.

    Raises:
        InputError: A plate that is unknown or lies within another, or a size outside 1 to its cardinality.
    """
    top = {name: n for name, n in cohort.layout.cardinality.items() if not cohort.model.plates[name].within}
    for name, size in (sizes or {}).items():
        if name not in top:
            raise InputError("no such top-level plate", where=f"sizes, {name!r}", expected=f"among {sorted(top)}", remedy="other plates follow from those")
        if not 1 <= size <= top[name]:
            raise InputError("size out of range", where=f"sizes, plate {name!r}", expected=f"1 to {top[name]}, as the cohort has", got=size)
    kept = closure(cohort.layout, {name: np.arange(size) for name, size in (sizes or {}).items()})
    if empty := [name for name, units in kept.units.items() if not len(units)]:
        raise InputError("no unit is left of a plate", where=f"plate {empty[0]!r}", remedy="keep more units of the plates that it lies within")
    variables: dict[str, xr.Variable] = {}
    for key, array in cohort.dataset.variables.items():
        name = str(key)
        picks = {p: kept.units[p] for p in map(str, array.dims) if p in kept.units}
        if "instance_dimension" in array.attrs and name not in cohort.model.variables:
            variables[name] = _moved(array, kept)
        elif name in cohort.dataset.coords or cohort.model.variables[name].kind == "covariate":
            variables[name] = array.isel(picks)
        elif cohort.model.variables[name].missing == "mask":
            # Only where it is missing matters; the values are not passed on.
            variables[name] = array.isel(picks).astype(np.float64) * 0.0
    return {**{p: len(u) for p, u in kept.units.items()}, **cohort.event_sizes}, xr.Dataset(variables)


def _moved(array: xr.Variable, kept: Selection) -> xr.Variable:
    """An index variable among the units that are kept."""
    child, parent = str(array.dims[0]), str(array.attrs["instance_dimension"])
    return xr.Variable(array.dims, np.searchsorted(kept.units[parent], array.values[kept.units[child]]), array.attrs)
