"""The stored posterior: Zarr arrays of mean and standard deviation, written shard by shard from any process.

Arrays are created beforehand with known chunks; each region has one writer; every chunk carries a crc32c. The store is built aside
(`posterior.zarr.partial`) and takes its name when it is complete, so that a reader sees a whole posterior or none.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec
from zarr.errors import ZarrUserWarning

from pavi_scale.digests import tree
from pavi_scale.durable import disk_errors, sync_directory, sync_file
from pavi_scale.errors import NumericalError, RunError
from pavi_scale.later import Later
from pavi_scale.posterior.integrity import MANIFEST, expected_chunks, missing_chunks, write_manifest
from pavi_scale.posterior.sampler import Context, Latent

if TYPE_CHECKING:
    import xarray as xr
else:
    xr = Later("xarray")

NAME = "posterior.zarr"
PARTIAL = "posterior.zarr.partial"
MOMENTS = ("posterior_mean", "posterior_sd")
_CHUNK_ELEMENTS = 1 << 18  # of a dimension that the caller gives no chunk length for


def _labels(values: np.ndarray) -> np.ndarray:
    """Labels in a type that Zarr 3 specifies: strings of variable length, numbers as they are."""
    return values.astype(object) if values.dtype.kind in "US" else values


def _chunk_shape(latent: Latent, chunks: Mapping[str, int]) -> tuple[int, ...]:
    shape = latent.shape
    inner = max(1, prod(shape[len(latent.plates) :]))
    lengths = list(shape)
    for axis, plate in reversed(list(enumerate(latent.plates))):
        lengths[axis] = max(1, min(shape[axis], chunks.get(plate, max(1, _CHUNK_ELEMENTS // inner))))
        inner *= lengths[axis]
    return tuple(max(1, n) for n in lengths)


class PosteriorWriter:
    """Writes a run's stored posterior. Picklable: it is its path.

    Attributes:
        run_path: The run directory.

    Example of use: the driver calls `PosteriorWriter.create(...)`, workers call `PosteriorWriter.open(path).write(...)` for the
    regions they own, the driver calls `put(...)` for the small groups, then `finish()`.
    """

    def __init__(self, run_path: str | os.PathLike[str]) -> None:
        self.run_path = Path(run_path)
        self._arrays: dict[tuple[str, str], zarr.Array[Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"run_path": self.run_path, "_arrays": {}}

    @property
    def path(self) -> Path:
        """The store while it is being written."""
        return self.run_path / PARTIAL

    @classmethod
    def create(
        cls,
        run_path: str | os.PathLike[str],
        context: Context,
        *,
        chunks: Mapping[str, int] | None = None,
        shards: Mapping[str, int] | None = None,
        attributes: Mapping[str, Any] | None = None,
        keep: bool = False,
    ) -> PosteriorWriter:
        """Create all arrays of `posterior_mean` and `posterior_sd`.

        Args:
            run_path: The run directory.
            context: Model, layout, event sizes and coordinates (the sampler is not used).
            chunks: Plate -> chunk length.
            shards: Plate -> shard length (a multiple of the chunk length); without it each chunk is its own file.
            attributes: JSON values, kept in the store's attributes.
            keep: Go on with a partial store that an interrupted pass left, if there is one with the same arrays. Chunks that a power failure
                damaged (nothing is forced to disk before `finish`) count as not written.

        Raises:
            RunError: The disk is full or not writable, or a shard is no multiple of its chunk.
        """
        writer = cls(run_path)
        with disk_errors("the posterior cannot be created", writer.path):
            if keep and writer._matches(context, chunks or {}, shards or {}):
                writer._drop_damaged()
                return writer
            if writer.path.exists():
                shutil.rmtree(writer.path)
            root = zarr.open_group(writer.path, mode="w", zarr_format=3)
            root.attrs.update(dict(attributes or {}))
            for name in MOMENTS:
                writer._create_group(root, name, context, chunks or {}, shards or {})
        return writer

    def _create_group(self, root: zarr.Group, name: str, context: Context, chunks: Mapping[str, int], shards: Mapping[str, int]) -> None:
        root.create_group(name)
        self._put(name, xr.Dataset(coords={d: (d, _labels(values)) for d, values in context.coords(context.dims).items()}), "a")
        for v in context.latents:
            chunk, shard = _grid(v, chunks, shards)
            array = root[name].create_array(  # type: ignore[union-attr]
                v.name,
                shape=v.shape,
                chunks=chunk,
                shards=shard if shard != chunk else None,
                dtype=v.dtype,
                filters=None,
                compressors=[Crc32cCodec()],
                fill_value=float("nan"),
                dimension_names=v.axes,
            )
            array.attrs["plates"] = list(v.plates)

    def _matches(self, context: Context, chunks: Mapping[str, int], shards: Mapping[str, int]) -> bool:
        """Whether the partial store has exactly the arrays that would be created."""
        if not (self.path / "zarr.json").is_file():
            return False
        for v in context.latents:
            for group in MOMENTS:
                try:
                    array = self._array(group, v.name)
                except RunError:
                    return False
                chunk, shard = _grid(v, chunks, shards)
                if array.shape != v.shape or array.dtype != v.dtype or (array.shards or array.chunks) != shard or array.chunks != chunk:
                    return False
        return True

    def _drop_damaged(self) -> None:
        """Remove chunk files whose crc32c does not hold."""
        root = zarr.open_group(self.path, mode="r", use_consolidated=False)
        for name, array in root.members(max_depth=None):
            if not isinstance(array, zarr.Array) or name.split("/")[0] not in MOMENTS:
                continue
            unit = array.shards or array.chunks
            for key in expected_chunks(array):
                at = [int(i) for i in key.split("/")[1:]]
                try:
                    array[tuple(slice(i * n, (i + 1) * n) for i, n in zip(at, unit, strict=True))]
                except (ValueError, RuntimeError):
                    (self.path / name / key).unlink(missing_ok=True)

    @classmethod
    def open(cls, run_path: str | os.PathLike[str]) -> PosteriorWriter:
        """A writer in a worker process, for arrays that `create` made."""
        writer = cls(run_path)
        if not (writer.path / "zarr.json").is_file():
            expected = "the run directory of the driver: workers write the posterior into it, and see it under the same path"
            raise RunError("there is no posterior to write into", where=writer.path, expected=expected, remedy="choose a run path on a shared disk")
        return writer

    def _array(self, group: str, variable: str) -> zarr.Array[Any]:
        key = group, variable
        if key not in self._arrays:
            try:
                self._arrays[key] = zarr.open_array(self.path, path=f"{group}/{variable}", mode="r+")
            except (OSError, ValueError, KeyError) as error:
                raise RunError("the stored posterior has no such array", where=f"{self.path}, {group}/{variable}", got=str(error)) from error
        return self._arrays[key]

    def unit(self, variable: str) -> dict[str, int]:
        """Plate -> length of the blocks that a region must be made of (shards, or chunks where there are no shards)."""
        array = self._array(MOMENTS[0], variable)
        plates = array.attrs["plates"]
        return dict(zip(plates, array.shards or array.chunks, strict=False))  # type: ignore[arg-type]

    def write(self, variable: str, region: Mapping[str, slice | range], mean: np.ndarray, sd: np.ndarray) -> None:
        """Write one region of a latent's mean and standard deviation.

        Args:
            variable: The latent.
            region: Plate -> slice or range of units, made of whole shards; a missing plate stands for all its units.
            mean: Values, shape (*region, *dims), finite.
            sd: The same for the standard deviation, not negative.

        Raises:
            NumericalError: A value is not finite (in the stored type), or a standard deviation is negative.
            RunError: The region cuts a shard or lies outside, the shape is wrong, or the disk fails.
        """
        spans = self._spans(variable, region)
        where = f"latent {variable!r}, region {[f'{s.start}:{s.stop}' for s in spans]}"
        for group, values in zip(MOMENTS, (mean, sd), strict=True):
            array = self._array(group, variable)
            shape = (*(s.stop - s.start for s in spans), *array.shape[len(spans) :])
            if np.shape(values) != shape:
                raise RunError(f"{group} has a wrong shape", where=where, expected=shape, got=np.shape(values))
            with np.errstate(over="ignore"):
                block = np.asarray(values).astype(array.dtype, copy=False)
            self._check_values(block, group, variable, spans)
            with disk_errors("the posterior cannot be written", where):
                array[(*spans, *(slice(None) for _ in shape[len(spans) :]))] = block

    def _spans(self, variable: str, region: Mapping[str, slice | range]) -> tuple[slice, ...]:
        array, unit = self._array(MOMENTS[0], variable), self.unit(variable)
        if extra := set(region) - set(unit):
            raise RunError("the region names a plate that the latent does not live on", where=f"latent {variable!r}", expected=sorted(unit), got=sorted(extra))
        spans = []
        for (plate, step), size in zip(unit.items(), array.shape, strict=False):
            part = region.get(plate, slice(None))
            start, stop, stride = (part.start, part.stop, part.step) if isinstance(part, range) else part.indices(size)
            if stride != 1 or not 0 <= start <= stop <= size or start % step or (stop % step and stop != size):
                where = f"latent {variable!r}, plate {plate!r}"
                raise RunError("the region is not made of whole shards", where=where, expected=f"multiples of {step} up to {size}", got=part)
            spans.append(slice(start, stop))
        return tuple(spans)

    @staticmethod
    def _check_values(block: np.ndarray, group: str, variable: str, spans: Sequence[slice]) -> None:
        good = np.isfinite(block) if group == MOMENTS[0] else np.isfinite(block) & (block >= 0)
        if not good.all():
            first = np.argwhere(~np.atleast_1d(good))[0][: block.ndim]
            index = [int(i) + (spans[axis].start if axis < len(spans) else 0) for axis, i in enumerate(first)]
            where = f"latent {variable!r}, index {index}"
            raise NumericalError(
                f"{group} is not finite, or negative, and is not stored", where=where, expected="finite numbers", got=float(block[tuple(first)])
            )

    def put(self, group: str, dataset: xr.Dataset) -> None:
        """Write a small group whole (`fit`, `diagnostics`), replacing an earlier one. From one process only.

        Raises:
            NumericalError: A floating-point value is infinite (NaN is allowed here: "not known").
        """
        for name, values in dataset.data_vars.items():
            if values.dtype.kind == "f" and np.isinf(values.values).any():
                raise NumericalError("a value is infinite and is not stored", where=f"group {group!r}, variable {name!r}")
        if group in MOMENTS:
            raise RunError("this group is written region by region", where=f"group {group!r}", remedy="use write")
        with disk_errors("the posterior cannot be written", self.path):
            shutil.rmtree(self.path / group, ignore_errors=True)
            self._put(group, dataset.assign({n: (v.dims, _labels(v.values), v.attrs) for n, v in dataset.variables.items() if v.dtype.kind in "US"}), "w")

    def _put(self, group: str, dataset: xr.Dataset, mode: Any) -> None:
        # Chunks of nothing but fill values are files too: a missing file always means damage.
        encoding: dict[Any, dict[str, Any]] = {n: {"compressors": (Crc32cCodec(),), "write_empty_chunks": True} for n in dataset.variables}
        dataset.drop_encoding().to_zarr(self.path, group=group, mode=mode, consolidated=False, zarr_format=3, encoding=encoding)

    def missing(self) -> list[str]:
        """Chunk files not written yet, relative to the store: what a resumed pass has still to do."""
        return missing_chunks(self.path)

    def flush(self) -> None:
        """Force to disk what has been written so far: `finish` has less to wait for."""
        with disk_errors("the posterior cannot be written", self.path):
            for name in tree(self.path, self.path / MANIFEST)[0]:
                with contextlib.suppress(FileNotFoundError):  # what is being written has a passing name
                    sync_file(self.path / name)

    def finish(self) -> Path:
        """Complete the store: consolidate metadata, force it to disk, write the manifest, take the final name.

        Raises:
            RunError: A region was never written, or the disk fails.
        """
        with disk_errors("the posterior cannot be completed", self.path), warnings.catch_warnings():
            # Plain xarray reads it; zarr warns because the specification does not have it yet.
            warnings.simplefilter("ignore", ZarrUserWarning)
            root = zarr.open_group(self.path, mode="r+", use_consolidated=False)
            for name in [name for name, _ in root.groups()]:
                zarr.consolidate_metadata(self.path, path=name)
            zarr.consolidate_metadata(self.path)
            write_manifest(self.path, dict(root.attrs))
            return settle(self.run_path)

    @property
    def is_complete(self) -> bool:
        """Whether the run has a complete stored posterior and no newer one is being written."""
        return (self.run_path / NAME / MANIFEST).is_file() and not self.path.exists()


def _grid(latent: Latent, chunks: Mapping[str, int], shards: Mapping[str, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Chunk and shard shape. Zarr wants whole chunks in a shard, also where the shard is longer than the plate."""
    chunk = _chunk_shape(latent, chunks)
    shard = list(chunk)
    for axis, plate in enumerate(latent.plates):
        if plate not in shards:
            continue
        if shards[plate] % chunks.get(plate, chunk[axis]):
            raise RunError("a shard is not made of whole chunks", where=f"plate {plate!r}", expected=f"a multiple of {chunk[axis]}", got=shards[plate])
        shard[axis] = chunk[axis] * max(1, min(shards[plate] // chunk[axis], -(-latent.shape[axis] // chunk[axis])))
    return chunk, tuple(shard)


def settle(run_path: Path) -> Path:
    """Give a complete partial store its final name; completes a renaming that a crash cut in two."""
    final, partial, retired = run_path / NAME, run_path / PARTIAL, run_path / f"{NAME}.old"
    if (partial / MANIFEST).is_file():
        if final.exists():
            shutil.rmtree(retired, ignore_errors=True)
            sync_directory(run_path)  # the new one's present name must outlive a crash before the old one loses its own
            os.rename(final, retired)
        try:
            os.rename(partial, final)
        except FileNotFoundError:  # a reader, or the writer, has done it meanwhile
            if not final.exists():
                raise
        sync_directory(run_path)
    if final.exists():
        shutil.rmtree(retired, ignore_errors=True)
    return final
