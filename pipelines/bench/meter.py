"""What a measurement is taken with: seconds, the peak of the resident set, and what it hands back."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil


@dataclass(frozen=True)
class Job:
    """What a measurement is given.

    Args:
        work: Folder that the measurements of one command share; what one needs of another lies there.
        shared: Folder of the real tables (`data`), their reference posteriors (`reference`) and the hand-written rival (`rivals`).
        results: Folder of what is kept beside the figures: curves and pictures.
        groups: Cohort sizes where those are a choice; empty for a measurement's own.
        limit: Seconds after which a contestant or a fit is stopped; None lets it run.
        runs: Simulations of each model, where a measurement simulates; None for its own number.
        cohorts: Stores of the cortical study, or shares of its subjects (`10%`) that are simulated; empty for the measurement's own.
        who: Contestants of the cortical study; empty for all.
        steps: Of its rivals; None for their own number.
        rates: Learning rates of its rivals; empty for their own.
        memory: GiB above which a contestant of the cortical study is stopped; None for its own limit.
    """

    work: Path
    shared: Path
    results: Path
    groups: tuple[int, ...] = ()
    limit: float | None = None
    runs: int | None = None
    cohorts: tuple[str, ...] = ()
    who: tuple[str, ...] = ()
    steps: int | None = None
    rates: tuple[float, ...] = ()
    memory: float | None = None


@dataclass
class Found:
    """What a measurement hands back.

    Args:
        rows: Its table: column -> value, the same columns in every row.
        notes: Sentences under the table.
        details: What goes into the JSON file alone.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


Measurement = Callable[[Job], Found]


class Watch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Wall time."""
        return time.perf_counter() - self._began


@contextmanager
def timing(into: dict[str, Any], key: str) -> Iterator[None]:
    """Put the seconds of a block into a row."""
    watch = Watch()
    yield
    into[key] = watch.seconds


def peak_bytes() -> int:
    """Highest resident set of this process so far.

    `getrusage` is not used: Linux carries the peak of the process that forked into it, so that it may belong to the parent.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return int(getattr(psutil.Process().memory_info(), "peak_wset", psutil.Process().memory_info().rss))
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))


def machine() -> dict[str, Any]:
    """The machine, and how busy it is now."""
    return {"cores": os.cpu_count(), "memory_gib": round(psutil.virtual_memory().total / 2**30, 1), "load": [round(v, 2) for v in psutil.getloadavg()]}
