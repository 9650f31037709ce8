"""Where tensors live, and the border between them and NumPy's arrays."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pavi_scale.errors import InputError, PlanRefused
from pavi_scale.memory import format_bytes

PROCESSOR = "cpu"


def find(name: str) -> torch.device:
    """The device of a name, which is there and computes in double precision.

    Args:
        name: "auto" (the processor), "cpu", or what torch calls a device: "cuda", "cuda:1".

    Raises:
        InputError: There is no such device here.

    Example:
        >>> find("auto")
        device(type='cpu')
    """
    try:
        device = torch.device(PROCESSOR if name == "auto" else str(name))  # a bare number would be a card, or none
        torch.zeros(1, dtype=torch.float64, device=device).add_(1.0).cpu()
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:  # torch raises any of these, by build and by device
        raise InputError(
            "device is not available", where="device", expected="'auto', 'cpu', or a device of this machine that has double precision, such as 'cuda'",
            got=f"{name!r}: {error}",
        ) from error
    return device


def check_room(device: torch.device, needed: int) -> None:
    """Refuse what a device has no memory for.

    Args:
        device: Where data are kept and computed.
        needed: Bytes.

    Raises:
        PlanRefused: Both figures are named.
    """
    ask = getattr(torch.get_device_module(device), "mem_get_info", None) if device.type != PROCESSOR else None
    free = ask(device)[0] if ask is not None else None
    if free is not None and free < needed:
        raise PlanRefused(
            "the device has too little memory", where=str(device), expected=f"{format_bytes(needed)} free", got=format_bytes(free),
            remedy="lower memory=, or choose device='cpu'",
        )


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Where tensors are made inside: constants written in laws, too, lie where the data do."""
    return contextlib.nullcontext() if device.type == PROCESSOR else device


def tensor(array: np.ndarray) -> Tensor:
    """An array as a tensor, where tensors are made at present; on the processor they share memory."""
    return to_default(torch.from_numpy(array))


def to_default(tensor: Tensor) -> Tensor:
    """A tensor, where tensors are made at present."""
    return tensor.to(torch.empty(0).device)


def array(tensor: Tensor) -> np.ndarray:
    """A tensor's values; those of one on the processor share memory with it."""
    return np.asarray(tensor.detach().cpu().numpy())


def doubles(tensor: Tensor) -> np.ndarray:
    """A tensor's values in double precision."""
    return array(tensor.to(torch.float64))
