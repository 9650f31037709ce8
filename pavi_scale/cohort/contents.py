"""What a cohort holds, as its checks see it: names, dimensions, types and attributes.

A Zarr store whose numbers are stored as they are needs no xarray to say so, whose import takes as long as all else that opens a store.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from pavi_scale.cohort.readers import ZarrArray

if TYPE_CHECKING:
    import xarray as xr

_NAN = "AAAAAAAA+H8="  # NaN as xarray writes it into the attribute `_FillValue`
# Attributes by which xarray decodes numbers (CF conventions, and its own for booleans and durations).
_CODING = {"scale_factor", "add_offset", "_Unsigned", "missing_value", "calendar", "dtype"}


@dataclass(frozen=True)
class Described:
    """A variable.

    Args:
        dims: Its dimensions.
        dtype: Type of its values, decoded.
        attrs: Attributes.
    """

    dims: tuple[str, ...]
    dtype: Any
    attrs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Contents:
    """The variables of a cohort, the sizes of their dimensions, and the attributes of the whole."""

    variables: Mapping[str, Described]
    sizes: Mapping[str, int]
    attrs: Mapping[str, Any] = field(default_factory=dict)


def of_dataset(dataset: xr.Dataset) -> Contents:
    """The contents of a Dataset."""
    variables = {str(n): Described(tuple(map(str, v.dims)), v.dtype, v.attrs) for n, v in dataset.variables.items()}
    return Contents(variables, {str(d): n for d, n in dataset.sizes.items()}, dataset.attrs)


def of_store(arrays: Mapping[str, ZarrArray], attrs: Mapping[str, Any]) -> Contents | None:
    """The contents of a Zarr group; None where xarray would decode some of it, or is to say what is wrong.

    Args:
        arrays: The arrays by name; each has names for its dimensions, on whose sizes they agree.
        attrs: Attributes of the group.
    """
    variables: dict[str, Described] = {}
    sizes: dict[str, int] = {}
    for name, array in arrays.items():
        dims = tuple(getattr(array.metadata, "dimension_names", None) or ())
        # Before version 3 of the format the fill value stands for what is missing, whatever the attributes say.
        if array.metadata.zarr_format != 3 or not _plain(array) or len(set(dims)) < len(dims) or (name in dims and len(dims) > 1):
            return None
        variables[name] = Described(dims, np.dtype(array.dtype), dict(array.attrs))
        sizes |= dict(zip(dims, array.shape, strict=True))
    return Contents(variables, sizes, attrs)


def _plain(array: ZarrArray) -> bool:
    """Whether what is stored is what is meant: numbers or text, no packing, no times, nothing that stands for missing values but NaN."""
    if not isinstance(array.metadata.attributes, Mapping):
        return False
    found, kind = dict(array.attrs), np.dtype(array.dtype).kind
    if kind not in "fiubTO" or _CODING & set(found) or "since" in str(found.get("units")):
        return False
    return "_FillValue" not in found or (kind == "f" and found["_FillValue"] == _NAN)
