"""Stores that others wrote: which codecs and chunk sizes are accepted, and what can be verified without a manifest."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import zarr
from zarr.errors import UnstableSpecificationWarning, ZarrUserWarning

from pavi_scale.cohort.readers import EMPTY_OK, STORE_ERRORS, ZarrArray, ZarrReader, reading
from pavi_scale.cohort.scan import blocks, check_chunks
from pavi_scale.digests import COHORT, MANIFEST
from pavi_scale.errors import CohortError

# Codecs that turn bytes into numbers or text and do nothing else: `pickle`, and whatever a plug-in registers, could run code.
_CHECKSUMS = {"crc32", "crc32c", "adler32", "fletcher32", "jenkins_lookup3"}
_SAFE = _CHECKSUMS | {
    "bytes", "endian", "transpose", "sharding_indexed", "vlen-utf8", "vlen-bytes", "blosc", "zstd", "gzip", "zlib", "bz2", "lz4", "lzma",
    "astype", "bitround", "delta", "fixedscaleoffset", "packbits", "quantize", "shuffle", "pcodec", "zfpy", "base64", "json2", "msgpack2",
}  # fmt: skip
LARGEST_CHUNK = 2 << 30  # decoded bytes: a chunk is decoded whole, whatever is wanted of it
_BLOCK = 64 << 20


def codecs(array: ZarrArray) -> set[str]:
    """Names of all codecs of an array, those within shards too; without the prefix `numcodecs.`."""

    def walk(entry: object) -> Iterator[str]:
        if isinstance(entry, Mapping):
            name = entry.get("name", entry.get("id"))
            if isinstance(name, str):
                yield name.removeprefix("numcodecs.")
            settings = entry.get("configuration")
            if isinstance(settings, Mapping):
                yield from walk([settings.get("codecs"), settings.get("index_codecs")])
        elif isinstance(entry, (list, tuple)):
            for part in entry:
                yield from walk(part)

    stored: Mapping[str, Any] = array.metadata.to_dict()
    return {name for key in ("codecs", "compressor", "filters") for name in walk(stored.get(key))}


@contextmanager
def text_as_it_is() -> Iterator[None]:
    """Zarr warns whenever it looks at text of fixed length, as plain xarray writes it; whoever reads a store has the text that is there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnstableSpecificationWarning)
        yield


def arrays_of(group: zarr.Group, label: str) -> dict[str, ZarrArray]:
    """The arrays of a group.

    Raises:
        CohortError: There is one whose metadata is not understood: Zarr would leave it out with a warning.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ZarrUserWarning)  # other files in the folder
        members = dict(group.members())
    place = Path(label)
    for entry in sorted(place.iterdir()) if not is_url(label) and place.is_dir() else ():
        if entry.name not in members and any((entry / name).is_file() for name in ("zarr.json", ".zarray")):
            raise CohortError(
                "cohort store cannot be read", where=f"cohort {label!r}, {entry.name!r}", expected="a Zarr group that holds an xarray.Dataset",
                got="metadata that is damaged", remedy="restore it, or write it again with Dataset.to_zarr",
            )
    return {name: member for name, member in members.items() if isinstance(member, zarr.Array)}


def check_arrays(label: str, arrays: Mapping[str, ZarrArray]) -> None:
    """Refuse codecs that are not known to be harmless, and chunks that would not fit in memory.

    Raises:
        CohortError: With the variable and the codec, or the size.
    """
    for name, array in sorted(arrays.items()):
        where = f"variable {name!r} of cohort {label!r}"
        if strange := sorted(codecs(array) - _SAFE):
            raise CohortError(
                "the store uses a codec that is not read", where=where, expected="plain compressors, filters and checksums", got=strange[0],
                remedy="write it again with Dataset.to_zarr",
            )
        size = prod(array.chunks) * array.dtype.itemsize
        if size > LARGEST_CHUNK:
            raise CohortError(
                "chunks are too large", where=where, expected=f"at most {LARGEST_CHUNK:,} bytes decoded", got=f"{size:,} bytes",
                remedy="write it again in smaller chunks",
            )


def check_seal(label: str, attributes: Mapping[str, Any]) -> None:
    """Refuse a simulated cohort that was cut short, or has lost its manifest.

    Raises:
        CohortError: Run the simulation again.
    """
    simulation = attributes.get("pavi_simulation")
    if not isinstance(simulation, dict):
        return
    if simulation.get("complete") is False:
        raise CohortError("simulated cohort is incomplete", where=f"cohort {label!r}", got="a simulation that was cut short", remedy="run ps.simulate again")
    if simulation.get("sealed") and not is_url(label) and not COHORT.path(Path(label)).is_file():
        raise CohortError("simulated cohort lacks its manifest", where=f"cohort {label!r}", expected=MANIFEST, got="nothing", remedy=COHORT.remedy)


def is_url(path: str) -> bool:
    """Whether a string names a store by URL rather than a local path."""
    return "://" in path or "::" in path


@text_as_it_is()
def check_store(path: Path) -> tuple[int, int]:
    """Read every chunk of every array of a store's root group; returns the number of arrays, and of those whose chunks carry checksums.

    Raises:
        CohortError: A chunk is missing, or cannot be decoded.
    """
    try:
        group = zarr.open_group(path, mode="r")
        arrays = arrays_of(group, str(path))
    except STORE_ERRORS as error:
        raise CohortError("cohort store cannot be read", where=path, got=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    check_seal(str(path), dict(group.attrs))
    check_arrays(str(path), arrays)
    for name, array in arrays.items():
        reader, where = ZarrReader(array, tuple(range(array.ndim))), f"variable {name!r} of cohort {str(path)!r}"
        if not group.attrs.get(EMPTY_OK):
            check_chunks(reader, tuple(f"axis {i}" for i in range(array.ndim)), where)
        for block in blocks(array.shape, reader.chunks, array.dtype.itemsize, _BLOCK) if prod(array.shape) else ():
            with reading(where):
                reader.read(block)
    return len(arrays), sum(bool(codecs(a) & _CHECKSUMS) for a in arrays.values())
