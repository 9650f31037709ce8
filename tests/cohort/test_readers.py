"""Reading ahead: the operating system fetches the chunks of a selection, and those alone."""

import ctypes
import mmap
import os
import time
from pathlib import Path

import numpy as np
import pytest
import zarr

from pavi_scale.cohort.readers import ZarrReader


def resident(path):
    """Whether all of a file is in the system's cache."""
    library = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as memory:
        pages = -(-len(memory) // mmap.PAGESIZE)
        found = (ctypes.c_ubyte * pages)()
        place = ctypes.c_char.from_buffer(memory)
        code = library.mincore(ctypes.c_void_p(ctypes.addressof(place)), ctypes.c_size_t(len(memory)), found)
        del place
    assert code == 0
    return all(page & 1 for page in found)


def forget(path):
    handle = os.open(path, os.O_RDWR)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


@pytest.fixture
def reader(tmp_path):
    array = zarr.create_array(tmp_path / "x.zarr", shape=(8, 6000), chunks=(4, 2000), dtype="f8", compressors=None)
    array[...] = np.random.default_rng(0).normal(size=array.shape)
    files = sorted(p for p in (tmp_path / "x.zarr" / "c").rglob("*") if p.is_file())
    assert len(files) == 6
    for file in files:
        forget(file)
    if any(resident(file) for file in files):
        pytest.skip("this file system keeps everything in memory")
    return ZarrReader(array, (0, 1))


def wait(path):
    until = time.monotonic() + 10
    while not resident(path) and time.monotonic() < until:
        time.sleep(0.01)
    return resident(path)


@pytest.mark.parametrize("index", [slice(2000, 4000), np.array([2100, 3999])], ids=["slice", "positions"])
def test_only_what_is_asked_for_is_fetched(reader, index):
    reader.will_need([slice(None), index])
    root = Path(reader.array.store.root) / "c"
    assert all(wait(root / row / "1") for row in "01")
    assert not any(resident(root / row / column) for row in "01" for column in "02")


def test_a_chunk_that_is_missing_is_nobodys_business_yet(reader):
    (Path(reader.array.store.root) / "c" / "0" / "1").unlink()
    reader.will_need([slice(None), slice(2000, 4000)])
    assert wait(Path(reader.array.store.root) / "c" / "1" / "1")
