"""What travels: arrays bit for bit, errors with their type."""

import asyncio
import pickle

import numpy as np
import pytest
from distributed.comm import connect, listen
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pavi_scale.errors import CohortError, PaviError, WorkerError
from pavi_scale.server.answer import aligned
from pavi_scale.server.runtime.wire import describe, pack, pack_object, rebuild, unpack, unpack_object

arrays = hnp.arrays(hnp.scalar_dtypes() | hnp.byte_string_dtypes() | hnp.unicode_string_dtypes(), hnp.array_shapes(min_dims=0, min_side=0))


def over_tcp(message):
    """The message after a journey over a real connection."""

    async def travel():
        received = asyncio.get_running_loop().create_future()

        async def serve(comm):
            received.set_result(await comm.read())
            await comm.close()

        async with listen("tcp://127.0.0.1:0", serve, deserialize=False) as listener:
            comm = await connect(listener.contact_address, deserialize=False)
            await comm.write(message)
            out = await received
            await comm.close()
            return out

    return asyncio.run(travel())


@given(st.dictionaries(st.text(max_size=5), arrays, max_size=5))
def test_arrays_survive(values):
    values = {name: aligned(array) for name, array in values.items()}
    out = unpack(pack(values))
    assert list(out) == list(values)
    for name, array in values.items():
        assert (out[name].dtype, out[name].shape, out[name].tobytes()) == (array.dtype, array.shape, array.tobytes())
        assert out[name].flags.writeable


@pytest.mark.parametrize("size", [3, 100_000])
def test_arrays_and_objects_survive_a_connection(size):
    values = {"a": np.arange(float(size)), "none": np.empty((0, 3)), "scalar": np.asarray(7), "b": np.arange(size, dtype=np.int32)}
    out = over_tcp({"x": pack({k: aligned(v) for k, v in values.items()}), "y": pack_object(values | {"plain": ("t", [1])})})
    for received in (unpack(out["x"]), unpack_object(out["y"])):
        for name, array in values.items():
            np.testing.assert_array_equal(received[name], array, strict=True)
            assert received[name].size == 0 or size == 3 or received[name].ctypes.data % 8 == 0
    assert unpack_object(out["y"])["plain"] == ("t", [1])


def test_objects_do_not_travel_as_arrays():
    with pytest.raises(WorkerError, match="only plain arrays"):
        pack({"x": np.asarray([object()])})


def test_errors_keep_type_and_fields():
    error = CohortError("what", where=("a", 1), got=[2])
    again = rebuild(describe(error), "task 3")
    assert type(again) is CohortError
    assert str(again) == str(error)
    assert again.__notes__ == ["task 3"]
    assert str(pickle.loads(pickle.dumps(again))) == str(error)


def test_unknown_subclass_becomes_its_nearest_base():
    class Special(CohortError):
        pass

    assert type(rebuild(describe(Special("what")), "")) is CohortError
    foreign = rebuild(describe(KeyError("k")), "task 3")
    assert type(foreign) is WorkerError
    assert "KeyError" in str(foreign)
    assert isinstance(foreign, PaviError)
