"""Chunks that lie on the disk as in memory: read as Zarr reads them, and refused where they are not what was written."""

import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal
from zarr.codecs import BytesCodec, Crc32cCodec, TransposeCodec, ZstdCodec
from zarr.storage import LocalStore, MemoryStore

import pavi_scale as ps
from pavi_scale.cohort import open_cohort
from pavi_scale.cohort.plain import plain, read_plain
from pavi_scale.errors import CohortError

CHECKED = (Crc32cCodec(),)


def stored(path, shape=(5, 7, 4), chunks=(2, 3, 4), dtype="f4", compressors=CHECKED, fill=None, **more):
    array = zarr.create_array(LocalStore(path), shape=shape, chunks=chunks, dtype=dtype, compressors=compressors, fill_value=fill, **more)
    array[...] = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    return array


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_block_is_what_zarr_reads(tmp_path_factory, data):
    shape = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    chunks = [data.draw(st.integers(1, n + 2)) for n in shape]
    dtype = data.draw(st.sampled_from(["f4", "f8", "i2", "u1"]))
    array = stored(tmp_path_factory.mktemp("plain"), shape, chunks, dtype, data.draw(st.sampled_from([(), (Crc32cCodec(),)])))
    spans = [tuple(sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n))))) for n in shape]
    assert plain(array)
    found = read_plain(array, spans)
    expected = array[tuple(slice(a, b) for a, b in spans)]
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


def test_what_is_absent_has_the_fill_value(tmp_path):
    array = stored(tmp_path, fill=-7.0)
    (tmp_path / "c" / "0" / "1" / "0").unlink()
    found = read_plain(array, [(0, 5), (0, 7), (0, 4)])
    np.testing.assert_array_equal(found, array[...])
    assert (found[:2, 3:6] == -7.0).all()


@pytest.mark.parametrize("at", [0, 50, -1])
def test_a_byte_that_is_not_what_was_written_is_seen(tmp_path, at):
    array = stored(tmp_path)
    path = tmp_path / "c" / "1" / "0" / "0"
    raw = bytearray(path.read_bytes())
    raw[at] ^= 4
    path.write_bytes(raw)
    read_plain(array, [(0, 2), (0, 7), (0, 4)])  # other chunks are
    with pytest.raises(ValueError, match="c/1/0/0 is damaged"):
        read_plain(array, [(0, 5), (0, 7), (0, 4)])


@pytest.mark.parametrize("compressors", [(), (Crc32cCodec(),)])
def test_a_chunk_of_the_wrong_length_is_seen(tmp_path, compressors):
    array = stored(tmp_path, compressors=compressors)
    path = tmp_path / "c" / "1" / "0" / "0"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="bytes, not"):
        read_plain(array, [(0, 5), (0, 7), (0, 4)])


def test_arrays_of_other_kinds_are_left_to_zarr(tmp_path):
    other = [
        stored(tmp_path / "zstd", compressors=(ZstdCodec(), Crc32cCodec())),
        stored(tmp_path / "big", serializer=BytesCodec(endian="big"), compressors=()),
        stored(tmp_path / "turned", filters=(TransposeCodec(order=(2, 1, 0)),), compressors=()),
        stored(tmp_path / "sharded", shards=(4, 6, 4), compressors=()),
        stored(tmp_path / "bool", dtype="bool", compressors=()),
        stored(tmp_path / "two", zarr_format=2, compressors=()),
        zarr.create_array(MemoryStore(), shape=(4,), chunks=(2,), dtype="f4", compressors=()),
    ]
    assert not any(plain(a) for a in other)


def test_damage_is_a_cohort_error_that_names_the_variable(tmp_path):
    model = ps.Model(ps.Plate("obs"), mu=ps.latent(lambda: Normal(0.0, 1.0)), x=ps.observed(lambda mu: Normal(mu, 1.0), plates="obs"))
    store = tmp_path / "cohort.zarr"
    encoding = {"x": {"chunks": (4,), "compressors": (Crc32cCodec(),)}}
    xr.Dataset({"x": ("obs", np.arange(10.0))}).to_zarr(store, zarr_format=3, encoding=encoding, consolidated=False)
    cohort = open_cohort(store, model)
    np.testing.assert_array_equal(cohort.read("x", {"obs": np.array([1, 2, 3, 4, 5])}), np.arange(1.0, 6.0))
    path = store / "x" / "c" / "1"
    path.write_bytes(path.read_bytes().replace(b"\x40", b"\x41", 1))
    with pytest.raises(CohortError, match=r"cohort data cannot be read; where: variable 'x'.*is damaged"):
        cohort.read("x", {"obs": np.arange(10)})
