"""The stream that feeds a fit, with nothing computed from it, against a plain sequential Zarr read of the same store."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import zarr

import pavi_scale as ps
from pipelines.bench.cortex import provide
from pipelines.bench.meter import Found, Job, Watch
from pipelines.hcp import model

SHARE, TURNS = "10%", 2
BLOCK = 512 << 20  # bytes of a plain read
PIECE = 128 << 20  # bytes of a shard, about as many as in a fit
LANES = 2  # shards at the same time, as a fit has on two cores
FILES = {True: "on the disk", False: "in the cache"}


def evict(store: str) -> None:
    """Have the operating system forget a store's files."""
    os.sync()
    for path in (p for p in Path(store).rglob("*") if p.is_file()):
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def plainly(store: str) -> tuple[float, int]:
    """Seconds and bytes of reading the data in rows of whole chunks, one call of Zarr after the other."""
    array = zarr.open_group(store, mode="r")["x"]
    axis = array.metadata.dimension_names.index("vertex")
    row = array.chunks[axis] * max(1, BLOCK // (array.nbytes // array.shape[axis] * array.chunks[axis]))
    watch, read = Watch(), 0
    for start in range(0, array.shape[axis], row):
        read += array[tuple(slice(start, start + row) if a == axis else slice(None) for a in range(array.ndim))].nbytes
    return watch.seconds, read


def streamed(store: str) -> tuple[float, int]:
    """Seconds and bytes of one pass over shards as a fit reads them: some at a time, those that follow fetched ahead."""
    cohort = ps.open_cohort(store, model)
    vertices, chunk = cohort.layout.cardinality["vertex"], cohort.chunk("vertex") or 1
    length = chunk * max(1, PIECE // (cohort.nbytes // vertices * chunk))

    def ready(start: int) -> int:
        after = np.arange(min(start + length, vertices), min(start + 3 * length, vertices))
        if len(after):
            cohort.will_need({"vertex": after})
        return cohort.read("x", {"vertex": np.arange(start, min(start + length, vertices))}).nbytes

    watch = Watch()
    with ThreadPoolExecutor(LANES) as pool:
        read = sum(pool.map(ready, range(0, vertices, length)))
    return watch.seconds, read


def measure(job: Job) -> Found:
    """Both, in turn, with and without the files in the operating system's cache."""
    store, found = provide((job.cohorts or (SHARE,))[0], job).store, Found()
    for turn in range(job.runs or TURNS):
        for cold in (True, False):
            rates = {}
            for name, read in (("plain", lambda: plainly(store)), ("stream", lambda: streamed(store))):
                if cold:
                    evict(store)
                else:
                    plainly(store)
                seconds, size = read()
                rates[name] = size / seconds / 1e9
                found.rows.append({"turn": turn, "files": FILES[cold], "who": name, "s": seconds, "GB": size / 1e9, "GB/s": rates[name]})
            found.notes.append(f"turn {turn}, files {FILES[cold]}: stream / plain sequential Zarr read {rates['stream'] / rates['plain']:.2f}")
    return found
