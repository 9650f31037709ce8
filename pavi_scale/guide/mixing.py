"""Anderson mixing: the fixed points of many small iterations at once."""

from __future__ import annotations

import numpy as np

NEAR, MIXED = 0.5, 3.0  # longest step, in units of the most, that is mixed with the one before; share of that one at most


class Mixing:
    """Newton steps of many units towards a fixed point, each with the slowest direction of its error taken out.

    The curvature at hand leaves out how the leaves' skewness moves with their parent, so that plain steps converge linearly. Anderson mixing with
    one earlier step (Walker & Ni 2011): x + s - c (dx + ds) with c = s.ds / ds.ds, where dx and ds are the last changes of point and step.

    Args:
        top: Coordinates, `[E, n]`.
        longest: Of one step.
    """

    def __init__(self, top: np.ndarray, longest: float) -> None:
        self.most, self.longest = longest, np.full(top.shape[1], longest)
        self.step, self.point = np.zeros_like(top), np.full_like(top, np.nan)

    def move(self, top: np.ndarray, at: np.ndarray, step: np.ndarray) -> None:
        """Move the units `at` by about `step` `[E, len(at)]`, in place."""
        here, before = top[:, at], self.step[:, at]
        turned = (step * before).sum(0) < 0
        # A step that turns back was too long: curvature far out says little of what lies between.
        self.longest[at] = np.where(turned, 0.5 * self.longest[at], np.minimum(1.2 * self.longest[at], self.most))
        away, change = here - self.point[:, at], step - before
        square = (change**2).sum(0)
        near = np.isfinite(away).all(0) & (np.abs(step).max(0) < NEAR * self.most) & (square > 0)
        share = np.where(near, (step * change).sum(0) / np.where(square > 0, square, 1.0), 0.0).clip(-MIXED, MIXED)
        move = step - np.where(near, share * (np.nan_to_num(away) + change), 0.0)
        move = move * np.minimum(1.0, self.longest[at] / np.maximum(np.abs(move).max(0), 1e-12))
        self.point[:, at], self.step[:, at] = here, step
        top[:, at] = here + move
