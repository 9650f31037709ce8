"""Opening a cohort source: a Dataset, or a Zarr store behind a path or URL."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import zarr

from pavi_scale.cohort.contents import Contents, of_dataset, of_store
from pavi_scale.cohort.foreign import arrays_of, check_arrays, check_seal, is_url, text_as_it_is
from pavi_scale.cohort.readers import STORE_ERRORS, LazyReader, MemoryReader, Reader, ZarrArray, ZarrReader, reading
from pavi_scale.errors import CohortError
from pavi_scale.later import Later

if TYPE_CHECKING:
    import xarray as xr
else:
    xr = Later("xarray")

Origin: TypeAlias = "xr.Dataset | str | os.PathLike[str]"  # what a cohort may be given as
_CODING = ("scale_factor", "add_offset", "_Unsigned")


@dataclass(frozen=True)
class Source:
    """An opened cohort source.

    Args:
        contents: What it holds.
        label: Path or URL, or None for a Dataset in memory.
        arrays: The Zarr arrays by name (empty for a Dataset).
        group: Their group, where they are read as they are stored.
        decoded: All variables, lazily where they are not in memory; None where they are read as they are stored.
    """

    contents: Contents
    label: str | None = None
    arrays: Mapping[str, ZarrArray] = field(default_factory=dict)
    group: zarr.Group | None = None
    decoded: xr.Dataset | None = None

    @classmethod
    def of(cls, dataset: xr.Dataset, label: str | None = None, arrays: Mapping[str, ZarrArray] | None = None) -> Source:
        """That of a Dataset, which may be a view of Zarr arrays."""
        return cls(of_dataset(dataset), label, arrays or {}, decoded=dataset)

    @cached_property
    def dataset(self) -> xr.Dataset:
        """All variables, lazily where they are not in memory.

        Raises:
            CohortError: The store cannot be read.
        """
        return self.decoded if self.group is None else _in_xarray(self.group, str(self.label))  # type: ignore[return-value]

    def reader(self, name: str, dims: tuple[str, ...]) -> Reader:
        """Reader of a variable, axes in the order of `dims`."""
        stored = ZarrReader(self.arrays[name], tuple(self.contents.variables[name].dims.index(d) for d in dims)) if name in self.arrays else None
        if self.decoded is None and stored is not None:
            return stored
        variable = self.dataset.variables[name].transpose(*dims)
        if stored is None:
            # Dask and lazily decoded arrays are computed block by block; `values` of all others is there already.
            return MemoryReader(variable.values) if variable._in_memory else LazyReader(variable)
        return stored if _is_plain(variable, stored.array) else LazyReader(variable, stored)

    def levels(self, dim: str) -> int:
        """Number of levels of a dimension's index; 1 where it has none (a store holds no other)."""
        index = None if self.decoded is None else self.decoded.indexes.get(dim)
        return 1 if index is None else index.nlevels

    def repeated(self, plate: str) -> tuple[int, object] | None:
        """Position and label of the first unit of a plate whose label another had before it; None if there is none."""
        if self.decoded is not None:
            index = self.decoded.indexes.get(plate)
            if index is None or index.is_unique:
                return None
            at = int(np.flatnonzero(index.duplicated())[0])
            return at, index[at]
        if plate not in self.arrays:
            return None
        with reading(f"labels of plate {plate!r}"):
            labels = np.asarray(self.arrays[plate][...])
        labels = labels.astype(object) if labels.dtype.kind == "T" else labels
        _, first = np.unique(labels, return_index=True)
        again = np.setdiff1d(np.arange(len(labels)), first)
        return (int(again[0]), labels[again[0]]) if len(again) else None


def _is_plain(variable: xr.Variable, array: ZarrArray) -> bool:
    """Whether the stored numbers are the decoded ones: no packing, no sentinel for missing values but NaN."""
    coding = variable.encoding
    fills = [coding[key] for key in ("_FillValue", "missing_value") if key in coding]
    nan_only = all(isinstance(f, (float, np.floating)) and math.isnan(f) for f in fills)
    return variable.dtype == np.dtype(array.dtype) and nan_only and not any(key in coding for key in _CODING)


@text_as_it_is()
def open_source(source: Origin, storage_options: Mapping[str, Any] | None) -> Source:
    """Open a Dataset, path or URL; nothing but metadata and dimension coordinates is read.

    Raises:
        CohortError: Not a Dataset or path; the store is missing, unreadable or inconsistent.
    """
    if not isinstance(source, (str, os.PathLike)):
        if isinstance(source, xr.Dataset):
            return Source.of(source)
        raise CohortError("a cohort is an xarray.Dataset, or a path or URL of a Zarr store", where="cohort", got=type(source).__name__)
    label = os.fspath(source)
    if not is_url(label):
        label = os.path.abspath(os.path.expanduser(label))
        if storage_options:
            raise CohortError("storage options are for URLs", where=f"cohort {label!r}", got=f"options {sorted(storage_options)}", remedy="drop them")
    try:
        group = zarr.open_group(label, mode="r", storage_options=dict(storage_options) if storage_options else None)
        arrays = arrays_of(group, label)
    except CohortError:
        raise
    except STORE_ERRORS as error:
        raise _unreadable(label, error) from error
    check_seal(label, dict(group.attrs))
    _check_dimensions(label, arrays)
    check_arrays(label, arrays)
    found = of_store(arrays, dict(group.attrs))
    return Source.of(_in_xarray(group, label), label, arrays) if found is None else Source(found, label, arrays, group)


@text_as_it_is()
def _in_xarray(group: zarr.Group, label: str) -> xr.Dataset:
    """A group as xarray decodes it."""
    try:
        consolidated = group.metadata.consolidated_metadata is not None
        # Neither dask's graph nor xarray's cache: `dataset` stays lazy however much of it was looked at.
        opener: Any = xr.open_dataset  # its annotation leaves out Zarr stores, which it takes
        return opener(group.store, engine="zarr", group=group.path or None, consolidated=consolidated, decode_timedelta=False, chunks=None, cache=False)
    except STORE_ERRORS as error:
        raise _unreadable(label, error) from error


def _unreadable(label: str, error: Exception) -> CohortError:
    got = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    remedy = "check the path, the credentials and that xarray.open_zarr reads it"
    if isinstance(error, FileNotFoundError):
        remedy = "check the path; write a cohort with Dataset.to_zarr"
    if isinstance(error, ImportError):
        remedy = "install the fsspec backend of that URL scheme, such as s3fs"
    return CohortError("cohort store cannot be read", where=f"cohort {label!r}", expected="a Zarr group that holds an xarray.Dataset", got=got, remedy=remedy)


def _check_dimensions(label: str, arrays: Mapping[str, ZarrArray]) -> None:
    """Refuse arrays without dimension names, or that disagree on a dimension's size; xarray's own messages do not name the store."""
    seen: dict[str, tuple[int, str]] = {}
    for name, array in sorted(arrays.items()):
        names: Any = getattr(array.metadata, "dimension_names", None) or array.attrs.get("_ARRAY_DIMENSIONS")
        if array.ndim and (names is None or None in names):
            where = f"variable {name!r} of cohort {label!r}"
            raise CohortError(
                "array without dimension names", where=where, expected=f"{array.ndim} dimension names", got=names, remedy="write it with Dataset.to_zarr"
            )
        if 0 in (array.shards or array.chunks) and 0 not in array.shape:
            raise CohortError("chunks of length zero", where=f"variable {name!r} of cohort {label!r}", expected="1 or more", got=array.shards or array.chunks)
        for dim, size in zip(names or (), array.shape, strict=True):
            known, other = seen.setdefault(dim, (size, name))
            if known != size:
                raise CohortError(
                    "coordinate or variable lengths disagree along a dimension",
                    where=f"dimension {dim!r} of cohort {label!r}",
                    expected=f"{known} as in {other!r}",
                    got=f"{size} in {name!r}",
                    remedy="align both to the same units and write the store again",
                )
