"""Watches a run while it works: progress in the terminal, events in the run's log."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from pavi_scale.errors import RunError
from pavi_scale.progress import Progress
from pavi_scale.run import Run
from pavi_scale.server.meter import Meter

LOOK_SECONDS = 1.0  # between looks at the workers
LOG_SECONDS, LOG_SECONDS_ALONE = 5.0, 60.0  # between lines of progress in the log: with a cluster, in process


class Watch:
    """Passes a fit's reports on to the progress bar and, now and then, to the log; with a cluster also what its workers do.

    Nothing of a fit depends on it: a log that cannot be written is left alone here, the next commit says so.

    Args:
        run: The run.
        bar: The progress bar.
        meter: Of the engine's workers; None in process.
        publish: Shows the same figures as the log elsewhere, and says where; None where there is no such place.
    """

    def __init__(self, run: Run, bar: Progress, meter: Meter | None, publish: Callable[[dict[str, Any]], str] | None = None) -> None:
        self._run, self._bar, self._meter, self._publish = run, bar, meter, publish
        self._steps, self._last, self._page = 0, ("start", math.nan), ""
        self._logged = time.monotonic()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._look, name="pavi-watch", daemon=True) if meter is not None else None

    def stage(self, name: str) -> None:
        """Enter a stage."""
        self._last = (name, math.nan)
        self._bar.stage(name)

    def update(self, stage: str, value: float, share: float) -> None:
        """Account for one step of a stage; `value` is its bound."""
        self._steps, self._last = self._steps + 1, (stage, value)
        self._bar.update(stage, value, share)
        if self._meter is None:
            self._progress()

    def _look(self) -> None:
        while not self._stop.wait(LOOK_SECONDS):
            self._tell()

    def _tell(self) -> None:
        if self._meter is None:
            return
        with self._lock, contextlib.suppress(RunError):
            for event in self._meter.news():
                self._run.log(**event)
        self._progress()

    def _progress(self) -> None:
        now = time.monotonic()
        if now - self._logged < (LOG_SECONDS_ALONE if self._meter is None else LOG_SECONDS):
            return
        self._logged = now
        stage, value = self._last
        figures: dict[str, Any] = {} if self._meter is None else self._meter.snapshot(now)
        if figures:
            waiting = figures.get("waiting", {"mean": 0.0})["mean"]
            self._bar.note(f"{figures['workers']} workers, {figures.get('tasks_per_second', 0.0):.1f} tasks/s, waiting {100 * waiting:.0f} %")
        figures = {"stage": stage, "step": self._steps, "elbo": value if math.isfinite(value) else None, **figures}
        page = self._publish({"fit": str(self._run.path), **figures}) if self._publish is not None else ""
        with contextlib.suppress(RunError):
            if page != self._page:
                self._page = page
                self._run.log("page", address=page)
            self._run.log("progress", **figures)

    def __enter__(self) -> Watch:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._logged = -math.inf  # the last figures are told whenever they come
            self._tell()
