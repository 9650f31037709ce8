"""A cohort: checked, lazily read data with the axes in the model's order."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.errors import ZarrUserWarning

from pavi_scale.cohort import scan, schema
from pavi_scale.cohort.foreign import is_url
from pavi_scale.cohort.readers import EMPTY_OK, READ, Index, MemoryReader, Reader, ZarrReader, as_index, reading
from pavi_scale.cohort.source import Origin, Source, open_source
from pavi_scale.digests import COHORT
from pavi_scale.durable import disk_errors, sync_directory
from pavi_scale.errors import CohortError
from pavi_scale.later import Later
from pavi_scale.model.supports import Support
from pavi_scale.model.template import Model
from pavi_scale.plates import Layout, ancestors

if TYPE_CHECKING:
    import xarray as xr
else:
    xr = Later("xarray")


class Cohort:
    """The data of a model; made by `open_cohort`.

    Attributes:
        model: The model it was checked against.
        layout: Cardinalities of the plates, and the parent positions of ragged and crossed ones.
        event_sizes: Size of each event dimension.
        source: Path or URL, or None for a Dataset in memory.
        supports: What the laws of observed variables can take; whoever knows the laws says so, and no other values are handed out from then on.

    A store that leaves out chunks of fill values on purpose says so by the attribute `_empty_chunks_ok: true` of an array or its root group.
    """

    def __init__(self, model: Model, opened: Source, storage_options: Mapping[str, Any] | None = None, known: Mapping[str, int] | None = None) -> None:
        self.model, self.source, self._options = model, opened.label, dict(storage_options or {})
        self._opened, held = opened, opened.contents
        self.supports: dict[str, Support] = {}
        schema.check_stacked(opened.levels, model)
        schema.check_variables(held, model)
        self._index_names = schema.find_indices(held, model)
        self._axes: dict[str, tuple[str, ...]] = {v.name: v.plates + v.dims for v in schema.inputs(model)}
        self._axes |= {name: (child,) for (child, _), name in self._index_names.items()}
        self._empty_ok = bool(held.attrs.get(EMPTY_OK))
        self._single = {p for p in model.plates if held.sizes.get(p) == 1}
        self._readers: dict[str, Reader] = {name: opened.reader(name, axes) for name, axes in self._axes.items()}
        self.layout: Layout = schema.build_layout(held, model, self._index_names, self._index_values, known or {})
        self.event_sizes: dict[str, int] = schema.event_sizes(held, model, known or {})
        schema.check_labels(opened.repeated, model)

    @cached_property
    def dataset(self) -> xr.Dataset:
        """Lazy Dataset of the observed variables, covariates, index variables and coordinates, axes in the model's order."""
        return _narrow(self._opened.dataset, self._axes, {*self.model.plates, *self.model.dims})

    def _index_values(self, name: str, child: str) -> np.ndarray:
        # A lost chunk of positions would read as zeros and put its units into the first group, silently.
        where = f"index variable {name!r} of plate {child!r}"
        parents = [p for (c, p), n in self._index_names.items() if n == name and c == child]
        # With a single parent all positions are zero, and a chunk of zeros that the writer left out loses nothing.
        if not (self._empty_ok or self._single.issuperset(parents)):
            scan.check_chunks(self._readers[name], (child,), where)
        with reading(where):
            return self._readers[name].read([slice(None)])

    @property
    def nbytes(self) -> int:
        """Bytes of all variables that the model reads, uncompressed."""
        return sum(int(np.prod(r.shape, dtype=np.int64)) * r.dtype.itemsize for r in self._readers.values())

    @cached_property
    def fingerprint(self) -> str:
        """Digest of names, dimensions, sizes, dtypes, chunks, labels and parent positions; of the bytes too for data in memory."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((sorted(self.layout.cardinality.items()), sorted(self.event_sizes.items()))).encode())
        for pair in sorted(self.layout.index):
            digest.update(repr(pair).encode())
            digest.update(np.ascontiguousarray(self.layout.index[pair]).data)
        for name in sorted(self._axes):
            reader, attrs = self._readers[name], self.dataset.variables[name].attrs
            digest.update(repr((name, self._axes[name], reader.shape, reader.dtype.str, reader.chunks, sorted((k, str(v)) for k, v in attrs.items()))).encode())
            if isinstance(reader, MemoryReader):
                digest.update(np.ascontiguousarray(reader.values).data)
        for name in sorted({*self.model.plates, *self.model.dims}):
            labels = self.coordinate(name)
            digest.update(repr((name, None if labels is None else labels.dtype.str)).encode())
            if labels is not None:
                digest.update("\0".join(map(str, labels)).encode() if labels.dtype.kind == "O" else np.ascontiguousarray(labels).tobytes())
        return digest.hexdigest()

    def coordinate(self, plate_or_dim: str) -> np.ndarray | None:
        """Labels along a plate or event dimension, shape (size,), or None when there are none."""
        if plate_or_dim not in self.dataset.coords or self.dataset.coords[plate_or_dim].ndim != 1:
            return None
        labels = np.asarray(self.dataset.coords[plate_or_dim].values)
        # NumPy's variable-length strings, as Zarr reads text, are not understood everywhere yet.
        return labels.astype(object) if labels.dtype.kind == "T" else labels

    def chunk(self, plate: str) -> int | None:
        """Chunk length (shard length for sharded arrays) along a plate of the largest observed variable on it; None when not chunked."""
        best: tuple[int, int | None] = (-1, None)
        for v in self.model.of_kind("observed"):
            reader = self._readers[v.name]
            if plate in v.plates:
                chunks = reader.chunks
                best = max(best, (int(np.prod(reader.shape)), None if chunks is None else chunks[v.plates.index(plate)]), key=lambda b: b[0])
        return best[1]

    def read(self, name: str, units: Mapping[str, np.ndarray] | None = None) -> np.ndarray:
        """Values of an observed variable, covariate or index variable.

        Args:
            name: The variable.
            units: Plate -> positions wanted, sorted; a plate that is not named is read whole.

        Returns:
            Array of shape (units of each plate, sizes of the event dimensions), native byte order. It may share memory with the cohort.

        Raises:
            CohortError: Unknown variable, position out of range, damaged or unreachable store, infinite values, NaN where none may be, values
                that the law cannot take.
        """
        if name not in self._readers:
            raise CohortError("cohort holds no such variable", where=f"variable {name!r}", expected=f"one of {sorted(self._readers)}")
        index = [self._positions(axis, (units or {}).get(axis)) for axis in self._axes[name]]
        began, computed = time.perf_counter(), time.thread_time()
        with reading(f"variable {name!r} of cohort {self.source or 'in memory'}"):
            out = self._readers[name].read(index)
        seconds = time.perf_counter() - began
        READ.add(seconds=seconds, waited=max(0.0, seconds - (time.thread_time() - computed)), nbytes=out.nbytes)
        v = self.model.variables.get(name)
        if v is not None:  # never a silent NaN, whatever was checked before
            masked = v.kind == "observed" and v.missing == "mask"
            scan.check_block(out, index, self._axes[name], self.describe, f"{v.kind} variable {name!r}", nan_ok=masked, kind=v.kind)
            if name in self.supports:
                scan.check_support(out, index, self._axes[name], self.describe, f"{v.kind} variable {name!r}", self.supports[name])
        # torch refuses to share read-only memory without a warning.
        return out if out.flags.writeable else out.copy()

    def will_need(self, units: Mapping[str, np.ndarray], aside: bool = True, through: bool = False) -> None:
        """Have the chunks of observed variables and covariates fetched from the disk while something else is computed.

        Args:
            units: Plate -> positions that will be read, sorted; a plate that is not named is read whole.
            aside: Whether to return at once, or when the disk has been asked for all.
            through: Whether the chunks are read, too.
        """
        for v in self.model.of_kind("observed", "covariate"):
            reader = self._readers[v.name]
            if isinstance(reader, ZarrReader) and any(p in units for p in v.plates):
                reader.will_need([self._positions(axis, units.get(axis)) for axis in self._axes[v.name]], aside, through)

    def part(self, units: Mapping[str, np.ndarray]) -> Cohort:
        """Some units of plates that are not nested, as a cohort in memory.

        Args:
            units: Plate -> positions wanted, sorted; others are kept whole.
        """
        data = {v.name: (self._axes[v.name], self.read(v.name, {p: units[p] for p in v.plates if p in units})) for v in schema.inputs(self.model)}
        return open_cohort(xr.Dataset(data), self.model)

    def _positions(self, axis: str, wanted: np.ndarray | None) -> Index:
        if wanted is None:
            return slice(None)
        positions, size = np.asarray(wanted), self.layout.cardinality.get(axis, self.event_sizes.get(axis, 0))
        if len(positions) and (positions.min() < 0 or positions.max() >= size):
            raise CohortError(
                "selection out of range", where=f"plate {axis!r}", expected=f"positions 0 to {size - 1}", got=f"{positions.min()} to {positions.max()}"
            )
        return as_index(positions)

    def check_values(self, budget_bytes: int = 64 << 20, limit_bytes: int | None = None) -> None:
        """Missing chunks of every variable; then everything read once, in blocks: NaN without a mask, infinities, damaged chunks, `supports`.

        Args:
            budget_bytes: Bytes of a block; a single larger chunk is still read at once.
            limit_bytes: Variables larger than this are not read here: `read` checks what it reads, whenever that is.

        Raises:
            CohortError: On the first value that cannot be used, with its coordinates.
        """
        for v in schema.inputs(self.model):
            where = f"{v.kind} variable {v.name!r}"
            if not self._empty_ok:
                scan.check_chunks(self._readers[v.name], v.plates + v.dims, where)
            reader = self._readers[v.name]
            if limit_bytes is not None and math.prod(reader.shape) * reader.dtype.itemsize > limit_bytes:
                continue
            masked = v.kind == "observed" and v.missing == "mask"
            scan.check_finite(
                reader, v.plates + v.dims, self.describe, where, nan_ok=masked, kind=v.kind, budget_bytes=budget_bytes, support=self.supports.get(v.name)
            )

    def describe(self, axis: str, position: int) -> str:
        """A position along a plate or event dimension in words: its label, and those of the plates that it lies within.

        Example: `house=7, county=AITKIN (position 0)`.
        """
        parts = []
        for plate in (axis, *(ancestors(self.model.plates, axis) if axis in self.model.plates else ())):
            at = position if plate == axis else self._parent(axis, plate, position)
            labels = self.coordinate(plate)
            parts.append(f"{plate}={at}" if labels is None else f"{plate}={labels[at]!s} (position {at})")
        return ", ".join(parts)

    def _parent(self, child: str, ancestor: str, position: int) -> int:
        """Position in `ancestor` of one unit; `Layout.path` would compose whole levels."""
        for parent in self.model.plates[child].within:
            if parent == ancestor or ancestor in ancestors(self.model.plates, parent):
                at = int(self.layout.index[child, parent][position])
                return at if parent == ancestor else self._parent(parent, ancestor, at)
        raise CohortError("plate does not lie within the other", where=f"plate {child!r}", expected=f"within {ancestor!r}")

    def spec(self) -> CohortSpec:
        """A small picklable description from which a worker process opens the same cohort."""
        if self.source is not None and not self.source.startswith("memory:"):
            return CohortSpec(self.source, self._options)
        # What lies in this process's memory must travel with the spec.
        dataset = self.dataset.load() if self.source is not None else self.dataset
        return CohortSpec(self.source, self._options, dataset, {**self.layout.cardinality, **self.event_sizes})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the Dataset, labels included, as a Zarr store with checksums and a manifest; what is there is replaced.

        Raises:
            RunError: The disk fails.
        """
        path = Path(path)
        aside = path.with_name(f"{path.name}.partial")
        labels = {n: c.astype(object) for n, c in self.dataset.coords.items() if c.dtype.kind == "U"}
        dataset = self.dataset.assign_coords(labels).drop_encoding()
        encoding: dict[Any, dict[str, Any]] = {n: {"compressors": (ZstdCodec(), Crc32cCodec()), "write_empty_chunks": True} for n in dataset.variables}
        with disk_errors("the cohort cannot be written", path), warnings.catch_warnings():
            warnings.simplefilter("ignore", ZarrUserWarning)  # consolidated metadata: plain xarray reads it, the specification lacks it yet
            shutil.rmtree(aside, ignore_errors=True)
            dataset.to_zarr(aside, mode="w", consolidated=True, zarr_format=3, encoding=encoding)
            COHORT.write(aside, {})
            if path.exists():
                shutil.rmtree(path)
            os.rename(aside, path)
            sync_directory(path.parent)

    def __repr__(self) -> str:
        sizes = {**self.layout.cardinality, **self.event_sizes}
        shown = ", ".join(f"{name}={size:,}" for name, size in sizes.items())
        lines = [f"Cohort({self.source or 'in memory'}: {shown}; {self.nbytes / 2**20:,.1f} MiB)"]
        for name, axes in self._axes.items():
            reader = self._readers[name]
            chunks = "" if reader.chunks is None else f" in chunks of {'x'.join(map(str, reader.chunks))}"
            lines.append(f"  {name}[{', '.join(axes)}] {reader.dtype}{chunks}")
        return "\n".join(lines)


@dataclass(frozen=True)
class CohortSpec:
    """How to open a cohort elsewhere.

    Args:
        source: Path or URL, None for a Dataset.
        storage_options: Options of the URL's file system.
        dataset: The Dataset, when it lies in memory.
        sizes: Sizes that the Dataset alone does not tell.
    """

    source: str | None
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    dataset: xr.Dataset | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)

    def open(self, model: Model) -> Cohort:
        """The cohort, checked against `model` again."""
        if self.dataset is not None:
            return Cohort(model, Source.of(self.dataset, self.source), self.storage_options, self.sizes)
        return Cohort(model, open_source(str(self.source), self.storage_options), self.storage_options)


def open_cohort(source: Origin, model: Model, *, storage_options: Mapping[str, Any] | None = None) -> Cohort:
    """Open a cohort and check its schema against a model; only metadata, labels and index variables are read.

    Args:
        source: A Dataset, or path or URL (`memory://`, `s3://`, ...) of a Zarr store that holds one.
        model: The model.
        storage_options: Options of the URL's fsspec file system.

    Raises:
        CohortError: Whatever does not fit: what, where, expected, got, remedy.

    Example:
        >>> from torch.distributions import Normal
        >>> from pavi_scale.model.template import latent, observed
        >>> from pavi_scale.plates import Plate
        >>> model = Model(Plate("obs"), mu=latent(lambda: Normal(0.0, 1.0)), x=observed(lambda mu: Normal(mu, 1.0), plates="obs"))
        >>> open_cohort(xr.Dataset({"x": ("obs", np.zeros(3))}), model).layout
        Layout(obs=3)
    """
    if isinstance(source, (str, os.PathLike)) and not is_url(os.fspath(source)):
        place = Path(os.path.expanduser(source))
        if COHORT.path(place).exists():
            COHORT.verify(place, content=False)
    return Cohort(model, open_source(source, storage_options), storage_options)


def _narrow(dataset: xr.Dataset, axes: Mapping[str, tuple[str, ...]], dims: set[str]) -> xr.Dataset:
    """Only the variables of `axes`, transposed, with every coordinate whose dimensions are among `dims`."""
    coords = [name for name, c in dataset.coords.items() if set(c.dims) <= dims and (c.ndim or name in axes)]
    kept = dataset[[*axes]].drop_vars([name for name in dataset[[*axes]].coords if name not in coords])
    kept = kept.assign_coords({name: dataset.coords[name] for name in coords if name not in kept.variables})
    return kept.assign({name: kept[name].transpose(*order) for name, order in axes.items() if name not in kept.coords})
