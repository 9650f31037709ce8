"""A log of events: one JSON object a line, each line ending with its CRC-32; a torn or damaged line is left out, never misread."""

from __future__ import annotations

import os
import time
import zlib
from json import loads
from pathlib import Path
from typing import Any

from pavi_scale.durable import disk_errors, to_json

_MARK = b',"crc32":"'


def append(path: Path, event: str, fields: dict[str, object]) -> None:
    """Append one event: `event`, `time` (seconds since the epoch) and the fields.

    Raises:
        RunError: The disk fails, or a value has no JSON form.
        NumericalError: A number is not finite.
    """
    text = to_json({"event": event, "time": time.time(), **fields}, where=f"event {event!r}").encode()
    line = text[:-1] + _MARK + b'%08x"}\n' % zlib.crc32(text)
    with disk_errors("the log cannot be written", path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size = os.fstat(handle).st_size
            # A crash may have torn the last line; the new one must not continue it.
            torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
            os.write(handle, b"\n" + line if torn else line)
        finally:
            os.close(handle)


def read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The events, oldest first, and the number of lines that a crash tore or that are damaged.

    Raises:
        RunError: The file cannot be read.
    """
    with disk_errors("the log cannot be read", path):
        lines = [line for line in path.read_bytes().split(b"\n") if line] if path.is_file() else []
    found = [event for event in map(_event, lines) if event is not None]
    return found, len(lines) - len(found)


def _event(line: bytes) -> dict[str, Any] | None:
    head, found, tail = line.rpartition(_MARK)
    if not found or tail != b'%08x"}' % zlib.crc32(head + b"}"):
        return None
    event: dict[str, Any] = loads(head + b"}")
    return event
