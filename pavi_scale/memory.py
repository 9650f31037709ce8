"""Sizes in bytes, as users write and read them."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import re
from typing import TYPE_CHECKING

from pavi_scale.errors import InputError
from pavi_scale.later import Later

if TYPE_CHECKING:
    import torch
else:
    torch = Later("torch")

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_bytes(size: str | int | float) -> int:
    """Bytes of "4 GiB", "500MB" or a number.

    Raises:
        InputError: Not a size.

    Example:
        >>> parse_bytes("4 GiB"), parse_bytes(1000)
        (4294967296, 1000)
    """
    if isinstance(size, (int, float)) and not isinstance(size, bool) and 0 < size < float("inf"):
        return int(size)
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", str(size))
    unit = match.group(2).lower() if match else ""
    if match is None or unit not in _UNITS or float(match.group(1)) <= 0:
        raise InputError("not a size in bytes", where="memory", expected="a positive number with a unit, such as '4 GiB'", got=repr(size))
    return int(float(match.group(1)) * _UNITS[unit])


def keep_freed_memory(limit: int = 256 << 20) -> bool:
    """Let the C library keep up to `limit` freed bytes instead of returning them at once, where it is glibc.

    Dask starts its workers with a limit of 64 KiB; every temporary array is then mapped, zeroed by the kernel and unmapped again, which
    takes as long as the arithmetic. Threads share one heap: each with its own would keep what it freed from the others. Returns whether it was set.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        options = {-8: 1, -1: limit, -3: 1 << 30}  # M_ARENA_MAX, M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        return all([bool(libc.mallopt(key, value)) for key, value in options.items()])
    except (OSError, AttributeError):
        return False


def release_freed_memory() -> None:
    """Give the holes of the heap back to the system: between temporaries of many sizes they grow without bound."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def format_bytes(size: float) -> str:
    """A size in binary units.

    Example:
        >>> format_bytes(4294967296)
        '4.0 GiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


class Arena:
    """Memory for what lives long among what is freed soon: small arrays kept on the heap would pin the holes that large temporaries leave.

    Args:
        block: Bytes of one block; it is returned to the system when nothing in it is referred to any more.
    """

    def __init__(self, block: int = 16 << 20) -> None:
        self._block, self._open, self._used = block, mmap.mmap(-1, block), 0

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous copy of a tensor in the arena; one on another device stays there."""
        if tensor.device.type != "cpu":
            return tensor.clone(memory_format=torch.contiguous_format)
        size = tensor.numel() * tensor.element_size()
        if size == 0:
            return tensor.clone()
        if self._used + size > len(self._open):
            self._open, self._used = mmap.mmap(-1, max(self._block, size)), 0
        out = torch.frombuffer(self._open, dtype=tensor.dtype, count=tensor.numel(), offset=self._used).reshape(tensor.shape)
        self._used += -(-size // 64) * 64
        return out.copy_(tensor)
