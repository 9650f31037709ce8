"""Figures, for which matplotlib is imported when the first one is drawn: half a second that a worker or a short command need not spend."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """An empty `matplotlib.figure.Figure` of a size in inches, laid out to fit what is drawn; it belongs to no window."""
    figure: Figure = importlib.import_module("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    return figure
