"""Progress of a fit on standard error: stage, ELBO, rate."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import Progress as RichProgress
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

LINE_SECONDS = 10.0


class Progress:
    """A spinner with the present stage, its steps, bound and rate; silent if not wanted.

    Args:
        show: Whether to show anything.
    """

    def __init__(self, show: bool) -> None:
        self._show, self._console, self._told = show, Console(stderr=True), time.monotonic()
        self._bar = RichProgress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not show or not self._console.is_terminal,
        )
        self._task = self._bar.add_task("start")
        self._stage, self._steps, self._since = "", 0, time.monotonic()
        self._text, self._note = "", ""

    def note(self, text: str) -> None:
        """Show something beside the present step: what the workers do."""
        self._note = f"; {text}"
        self._bar.update(self._task, description=self._text + self._note)
        self._line(self._text + self._note)

    def _line(self, text: str) -> None:
        """Where standard error is not a terminal: one plain line at the start of a stage, and every few seconds."""
        if self._show and not self._console.is_terminal:
            self._console.print(text, highlight=False)
            self._told = time.monotonic()

    def stage(self, name: str) -> None:
        """Enter a stage."""
        if name != self._stage:
            self._stage, self._steps, self._since = name, 0, time.monotonic()
            self._text = name
            self._bar.update(self._task, description=name + self._note)

    def update(self, stage: str, value: float, share: float) -> None:
        """Account for one step of a stage."""
        self.stage(stage)
        self._steps += 1
        rate = self._steps / max(time.monotonic() - self._since, 1e-9)
        done = f", {100 * share:.0f} %" if share == share else ""
        text = self._text = f"{stage}: step {self._steps}, ELBO {value:,.3f}, {rate:.1f}/s{done}"
        self._bar.update(self._task, description=text + self._note)
        if self._steps == 1 or time.monotonic() - self._told > LINE_SECONDS:
            self._line(text)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()
