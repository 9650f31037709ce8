"""What travels between the driver and its workers: arrays as raw buffers, tasks as pickles, errors as text.

Dask's comms frame, send and encrypt the messages. Its per-object serialisation is left out: at some 0.1 ms an object, it would cost more than
a small task; and answers, which come back from the workers, are never unpickled.
"""

from __future__ import annotations

import math
import pickle
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from distributed.comm import Comm
from distributed.protocol import Serialized

from pavi_scale import errors
from pavi_scale.errors import PaviError, WorkerError
from pavi_scale.server.answer import aligned

Message = dict[str, Any]

_FIELDS = ("what", "where", "expected", "got", "remedy")
# Below this many bytes one copy into the message is cheaper than frames of their own.
_SMALL = 16_384


def pack(arrays: Mapping[str, np.ndarray]) -> Message:
    """Named `aligned` arrays as a message; large ones go as they lie in memory, without a copy.

    Raises:
        WorkerError: An array holds objects or records.
    """
    for name, array in arrays.items():
        if array.dtype.kind in "OV":
            raise WorkerError("only plain arrays travel", where=f"array {name!r}", expected="a numeric dtype", got=array.dtype)
    views = [array.reshape(-1).view(np.uint8).data for array in arrays.values() if array.nbytes]
    small = sum(view.nbytes for view in views) <= _SMALL
    return {"arrays": [(name, a.dtype.str, a.shape) for name, a in arrays.items()], "data": b"".join(views) if small else Serialized({}, views)}


def unpack(message: Message) -> dict[str, np.ndarray]:
    """The arrays of `pack`, copied to aligned memory of their own: frames lie anywhere in the receive buffer.

    Raises:
        WorkerError: The message is not one of `pack`; nothing larger than what came is allocated.
    """
    try:
        return _unpacked(message)
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration, OverflowError, MemoryError) as error:
        raise WorkerError("a message is damaged", where="arrays", expected="named plain arrays", got=f"{type(error).__name__}: {error}") from error


def _unpacked(message: Message) -> dict[str, np.ndarray]:
    data, start, out = message["data"], 0, {}
    frames = iter(data.frames) if isinstance(data, Serialized) else None
    for name, code, shape in message["arrays"]:
        dtype = np.dtype(code)
        plain = isinstance(name, str) and isinstance(code, str) and dtype.kind not in "OV" and dtype.itemsize
        if not plain or any(type(n) is not int or n < 0 for n in shape):
            raise ValueError(f"array {name!r} of dtype {code!r} and shape {shape!r}")
        size = math.prod(shape) * dtype.itemsize
        if not size:
            out[name] = np.empty(shape, dtype)
            continue
        # Either one frame an array, or all arrays in one byte string, one after the other.
        buffer = memoryview(data)[start : start + size] if frames is None else next(frames)
        out[name] = aligned(np.frombuffer(buffer, dtype).reshape(shape))
        start += size
    return out


def pack_object(value: object, dumps: Callable[..., bytes] = pickle.dumps) -> Message:
    """Any picklable value as a message; large buffers in it are not copied."""
    buffers: list[memoryview] = []

    def out_of_band(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes > _SMALL:
            buffers.append(raw)
        return raw.nbytes <= _SMALL

    head = dumps(value, protocol=5, buffer_callback=out_of_band)
    return {"head": head, "data": Serialized({}, buffers)} if buffers else {"head": head}


def unpack_object(message: Message) -> Any:
    """The value of `pack_object`; only for messages from the driver, which the worker trusts as it trusts Dask."""
    frames = message["data"].frames if "data" in message else []
    return pickle.loads(message["head"], buffers=[aligned(np.frombuffer(frame, np.uint8)) for frame in frames])


def describe(error: Exception) -> Message:
    """An exception as plain text, for the way from a worker to the driver."""
    if isinstance(error, PaviError):
        fields = {name: None if getattr(error, name) is None else str(getattr(error, name)) for name in _FIELDS}
        return {"types": [cls.__name__ for cls in type(error).__mro__], **fields}
    return {"types": [], "what": f"{type(error).__name__}: {error}", "got": "".join(traceback.format_exception(error))}


def rebuild(message: Message, where: str) -> PaviError:
    """The error of `describe`: of its own type if that is one of the package's, else a WorkerError with the traceback.

    Args:
        message: From `describe`.
        where: The story of the task.
    """
    types = message.get("types")
    for name in types if isinstance(types, (list, tuple)) else ():
        cls = getattr(errors, name, None) if isinstance(name, str) else None
        if isinstance(cls, type) and issubclass(cls, PaviError):
            error = cls(str(message.get("what")), **{field: message.get(field) for field in _FIELDS[1:]})
            error.add_note(where)
            return error
    return WorkerError("a task failed on a worker", where=where, got=message.get("got"), remedy="run it in process (no client) to debug it")


async def ask(comm: Comm, **message: Any) -> Message:
    """Send one message and wait for its answer.

    Raises:
        OSError: The connection broke (distributed's CommClosedError is one).
    """
    await comm.write(message)
    reply: Message = await comm.read()
    return reply
