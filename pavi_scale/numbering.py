"""Rows that may be renumbered, as the components of a mixture: which orders of them are the same, and one numbering to stay with."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from scipy.optimize import linear_sum_assignment

from pavi_scale.computation import StudyComputation
from pavi_scale.marginal import Bound

SYMMETRIC = 0.1  # nats by which the bound may change where two rows are exchangeable: searches that start elsewhere end in the same mode, about

FAR = 40.0  # sds between a point and its exchange beyond which no proposal reaches


def rows(study: StudyComputation) -> list[np.ndarray]:
    """Positions `[k, m]` of the root coordinates of each row, for each first event dimension that root latents have; latents that share it together."""
    found: dict[str, list[np.ndarray]] = {}
    start = 0
    for name, size in zip(study.space.names, study.space.sizes, strict=True):
        v, shape = study.graph.model.variables[name], study.graph.links[name].base_shape
        if v.dims and shape == study.graph.shape(v):
            found.setdefault(v.dims[0], []).append(np.arange(start, start + size).reshape(shape[0], -1))
        start += size
    return [np.concatenate(r, 1) for r in found.values()]


def renumbered(study: StudyComputation, mode: np.ndarray, onto: np.ndarray, sd: np.ndarray) -> np.ndarray:
    """A root point with the rows of its latents put in the order that is nearest another point.

    Latents that share their first event dimension are renumbered together: the components of a mixture are whole rows.

    Args:
        study: The study.
        mode: The point, `[R]`.
        onto: The other, `[R]`.
        sd: Unit of distance, `[R]`.
    """
    out = mode.copy()
    for at in rows(study):
        apart = (((mode[at][:, None] - onto[at][None]) / sd[at]) ** 2).sum(-1)
        mine, theirs = linear_sum_assignment(apart)
        out[at[theirs]] = mode[at[mine]]
    return out


def exchangeable(study: StudyComputation, bound: Bound, mode: np.ndarray, sd: np.ndarray) -> list[np.ndarray]:
    """Orders `[R]` of the root coordinates, each an exchange of two rows that leaves the bound at its mode as high as it was.

    Args:
        study: The study.
        bound: The marginal bound, without noise.
        mode: Its mode, `[R]`.
        sd: Unit of distance, `[R]`. Rows far apart are left out: no draw mistakes them for each other.
    """
    orders = []
    for at in rows(study):
        for i, j in combinations(range(len(at)), 2):
            order = np.arange(len(mode))
            order[at[i]], order[at[j]] = at[j], at[i]
            if np.linalg.norm((mode[order] - mode) / sd) < FAR:
                orders.append(order)
    if not orders:
        return []
    height, _ = bound(np.stack([mode, *(mode[o] for o in orders)]), False)
    return [o for o, h in zip(orders, height[1:], strict=True) if abs(h - height[0]) < SYMMETRIC]


def one_numbering(bound: Bound, orders: list[np.ndarray], mode: np.ndarray, sd: np.ndarray) -> Bound:
    """The bound, -inf where one of the exchanges leads nearer to a point.

    The posterior of a mixture has a copy for each numbering of its components; where they touch, an importance refit would find the others
    and average over them.
    """
    def numbered(points: np.ndarray, gradient: bool) -> tuple[np.ndarray, np.ndarray | None]:
        value, slope = bound(points, gradient)
        away = (((points - mode) / sd) ** 2).sum(1)
        for order in orders:
            value = np.where((((points[:, order] - mode) / sd) ** 2).sum(1) < away, -np.inf, value)
        return value, slope

    return numbered if orders else bound
