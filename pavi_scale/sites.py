"""The model above the data: root, free blocks and what is coupled to them, with Gaussian sites in the place of all data below.

A site on a coordinate z is exp(h z - k z^2 / 2), its location h / k and precision k kept as rows. Score g and curvature c of the data's bound L,
averaged over q about its centre m, give the site of the next round,

    k <- c,    h <- c m + g,

one Newton step of E_q[log p] in natural parameters: conjugate-computation variational inference (Khan & Lin 2017) with step one, equivalently
variational online Newton. Given the sites, root and blocks are a small problem of their own (`upper`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from pavi_scale.scores import Scores

LONGEST = 3.0  # posterior sds that one update may move a coordinate
LEAST = 1e-6  # least precision of a site, in units of the prior's and the other sites' together


@dataclass
class Sites:
    """What stands for the data.

    Args:
        loc: Free block -> location, `[n, d]`.
        precision: Free block -> precision, `[n, d]`.
        root: Where the root's site is centred, `[R]`.
        pull: Its gradient there, `[R]`.
        root_precision: Its precision, `[R, R]`.
    """

    loc: dict[str, np.ndarray]
    precision: dict[str, np.ndarray]
    root: np.ndarray
    pull: np.ndarray
    root_precision: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        """As named arrays; the blocks' sites as the rows that the guide reads."""
        rows = {f"site/{b}": np.concatenate([loc, np.log(self.precision[b])], 1) for b, loc in self.loc.items()}
        return {**rows, "rootsite/loc": self.root, "rootsite/pull": self.pull, "rootsite/precision": self.root_precision}

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> Sites:
        """The inverse of `arrays`."""
        rows = {k.removeprefix("site/"): np.split(v, 2, axis=1) for k, v in arrays.items() if k.startswith("site/")}
        return cls(
            {b: r[0] for b, r in rows.items()}, {b: np.exp(r[1]) for b, r in rows.items()},
            *(np.array(arrays[f"rootsite/{k}"]) for k in ("loc", "pull", "precision")),
        )


@dataclass
class Centre:
    """The posterior given the sites: mode of the root, and of each free block the mean and the sd given all above it."""

    root: np.ndarray
    root_sd: np.ndarray
    value: float
    loc: dict[str, np.ndarray]
    sd: dict[str, np.ndarray]


@dataclass(frozen=True)
class Residual:
    """How far the sites were from what the data say at the centre, in posterior sds.

    Args:
        typical: Root mean square over the rows' coordinates.
        worst: What all but one in a thousand of them are below.
        root: Largest of the root's coordinates.
    """

    typical: float
    worst: float
    root: float


def residual(sites: Sites, centre: Centre, scores: Scores) -> Residual:
    """Score of the data less that of the sites, times the posterior sd: how far the next update moves each coordinate."""
    away = [np.abs(scores.score[b] - sites.precision[b] * (sites.loc[b] - centre.loc[b])) * centre.sd[b] for b in sites.loc]
    held = sites.pull - sites.root_precision @ (centre.root - sites.root)
    root = np.abs(scores.root - held) * centre.root_sd
    rows = np.concatenate([a.ravel() for a in away])
    return Residual(float(np.sqrt(np.mean(rows**2))), float(np.quantile(rows, 0.999)), float(root.max(initial=0.0)))


def updated(sites: Sites, centre: Centre, scores: Scores, scale: np.ndarray, longest: float = LONGEST) -> Sites:
    """The sites of the next round; no coordinate moves by more than a few of its sds."""
    loc, found = {}, {}
    for b, old in sites.precision.items():
        other = np.maximum(1 / centre.sd[b] ** 2 - old, 1e-12)  # what the laws above say
        held = old * (sites.loc[b] - centre.loc[b])
        k = np.maximum(np.abs(scores.curvature[b]), LEAST * other)
        change = scores.score[b] - held
        limit = longest * centre.sd[b] * (other + k)
        change = np.clip(change, -limit, limit)
        pull = held + change
        # A pull without the precision that belongs to it would drag the scales above to infinity: no site lies further off than its own sds.
        far = np.abs(pull) / longest
        k = np.maximum(k, np.minimum(far**2, far / centre.sd[b]))
        loc[b], found[b] = centre.loc[b] + pull / k, k
    return Sites(loc, found, *_root_site(sites, centre, scores, scale))


def refreshed(sites: Sites, centre: Centre, scores: Scores, scale: np.ndarray, stands_for: float) -> Sites:
    """The sites with the root's alone brought up to date, from scores of a part of the units."""
    whole = replace(scores, root=stands_for * scores.root, root_curvature=stands_for * scores.root_curvature)
    return Sites(sites.loc, sites.precision, *_root_site(sites, centre, whole, scale))


def _root_site(sites: Sites, centre: Centre, scores: Scores, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The root's site: gradient and a positive definite precision; no step is longer than a quarter of the prior's scale."""
    told = np.flatnonzero(centre.root_sd)
    k = np.zeros_like(sites.root_precision)
    held = sites.pull - sites.root_precision @ (centre.root - sites.root)
    change = scores.root - held
    if len(told):
        sd = centre.root_sd[told]
        values, vectors = np.linalg.eigh(scores.root_curvature[np.ix_(told, told)] * sd[:, None] * sd)
        k[np.ix_(told, told)] = (vectors * np.maximum(np.abs(values), LEAST)) @ vectors.T / (sd[:, None] * sd)
        limit = np.maximum(LONGEST * sd, 0.25 * scale[told]) * np.maximum(k.diagonal()[told], 1 / scale[told] ** 2)
        change[told] = np.clip(change[told], -limit, limit)
    return centre.root.copy(), held + change, k
