"""Quality against seconds: curves, when they come under a target for good, their file and their picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

TARGET = 0.002  # nats per latent
SMALLEST = 1e-7  # drawn instead of what is smaller, or below zero by noise


@dataclass(frozen=True)
class Point:
    """Quality at a time.

    Args:
        seconds: Since the beginning.
        gap: (log evidence - ELBO) per latent, nats.
        error: Its standard error.
    """

    seconds: float
    gap: float
    error: float = 0.0


@dataclass(frozen=True)
class Curve:
    """One contestant with one choice of its settings.

    Args:
        who: The contestant.
        groups: Size of the cohort it was given.
        settings: Its settings.
        points: In order of time.
        note: What to know about it; why it ended, for instance.
    """

    who: str
    groups: int
    settings: dict[str, Any] = field(default_factory=dict)
    points: tuple[Point, ...] = ()
    note: str = ""

    @property
    def held(self) -> float | None:
        """Seconds at which the gap comes under the target and stays there; None if it does not.

        A gap below zero by as much is no better than one above: then the bound is none.
        """
        found = None
        for point in self.points:
            if abs(point.gap) > TARGET or point.gap != point.gap:
                found = None
            elif found is None:
                found = point.seconds
        return found


def best(curves: Sequence[Curve]) -> Curve | None:
    """The curve that comes under the target first; else the one that ends nearest to it. None of no curves."""
    ended = [c for c in curves if c.points]
    holding = [c for c in ended if c.held is not None]
    if holding:
        return min(holding, key=lambda c: c.held or 0.0)
    return min(ended, key=lambda c: abs(c.points[-1].gap), default=None)


def save(curves: Sequence[Curve], path: Path) -> None:
    """One JSON line per point."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for c in curves:
            for p in c.points:
                line = {"who": c.who, "groups": c.groups, **c.settings, "seconds": p.seconds, "gap_per_latent": p.gap, "standard_error": p.error}
                file.write(json.dumps(line) + "\n")


def draw(curves: Sequence[Curve], title: str, paths: Sequence[Path]) -> None:
    """Both axes logarithmic; the best settings of each contestant in colour, its others behind, thin."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for number, who in enumerate(dict.fromkeys(c.who for c in curves)):
        own = [c for c in curves if c.who == who and c.points]
        chosen = best(own)
        for c in sorted(own, key=lambda c: c is chosen):
            times, gaps = [max(p.seconds, 1e-3) for p in c.points], [max(p.gap, SMALLEST) for p in c.points]
            front = c is chosen
            settings = ", ".join(f"{k} {v}" for k, v in c.settings.items())
            axes.plot(
                times, gaps, color=f"C{number % 10}", alpha=1.0 if front else 0.25, linewidth=1.6 if front else 0.6,
                marker="o" if len(times) < 4 else None, label=(f"{who} ({settings})" if settings else who) if front else None,
            )  # fmt: skip
    axes.axhline(TARGET, color="black", linestyle=":", linewidth=1.0)
    axes.set(xscale="log", yscale="log", xlabel="seconds", ylabel="(log evidence - ELBO) per latent, nats", title=title)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
    axes.grid(visible=True, which="major", alpha=0.3)
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
