"""Pictures of the cortical study: fingerprints and parcellation, recovered against truth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.image import imread
from scipy.optimize import linear_sum_assignment

from pipelines.hcp.simulate import sphere

COLOURS = ListedColormap(["#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#edc948", "#76b7b2"])


def match(recovered: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Recovered network of each true one: the numbering that correlates most, for networks are numbered arbitrarily.

    Args:
        recovered: Fingerprints, (network, feature).
        true: Same shape.
    """
    correlation = np.corrcoef(true, recovered)[: len(true), len(true) :]
    return np.asarray(linear_sum_assignment(-correlation)[1])


def fingerprints(axes: Axes, recovered: np.ndarray, true: np.ndarray) -> None:
    """Each feature of each network, recovered against true; a perfect fit lies on the line."""
    for network, (x, y) in enumerate(zip(true, recovered, strict=True)):
        axes.scatter(x, y, s=12, color=COLOURS(network), label=f"network {network + 1}")
    low, high = true.min(), true.max()
    axes.plot([low, high], [low, high], color="0.6", lw=1, zorder=0)
    correlation = np.corrcoef(true.ravel(), recovered.ravel())[0, 1]
    axes.set(xlabel="true fingerprint", ylabel="posterior mean", title=f"fingerprints, r = {correlation:.4f}", aspect="equal")


def parcellation(axes: Axes, label: np.ndarray, title: str) -> None:
    """Labels on the sphere, seen from two opposite sides."""
    points = sphere(len(label))
    for side in (1, -1):
        seen = side * points[:, 1] < 0
        axes.scatter(side * (points[seen, 0] + 1.1), points[seen, 2], color=COLOURS(label[seen]), s=1.5e5 / len(label), lw=0, rasterized=True)
    axes.set(title=title, aspect="equal")
    axes.set_axis_off()


def collage(folder: Path, names: Sequence[str], out: Path) -> None:
    """Pictures of a report, joined into one: the last one across the page, the others in a row above it."""
    pictures = [imread(folder / f"{name}.png") for name in names]
    figure = Figure(figsize=(11, 9), layout="constrained")
    grid = figure.add_gridspec(2, len(names) - 1, height_ratios=(3, 5))
    for column, picture in enumerate(pictures[:-1]):
        figure.add_subplot(grid[0, column]).imshow(picture)
    figure.add_subplot(grid[1, :]).imshow(pictures[-1])
    for axes in figure.axes:
        axes.set_axis_off()
    figure.savefig(out, dpi=110)


def maps(labels: dict[str, np.ndarray]) -> Figure:
    """Parcellations, two in a row."""
    rows = -(-len(labels) // 2)
    figure = Figure(figsize=(11, 2.9 * rows), layout="constrained")
    for axes, (title, label) in zip(figure.subplots(rows, 2).ravel(), labels.items(), strict=False):
        parcellation(axes, label, title)
    return figure
