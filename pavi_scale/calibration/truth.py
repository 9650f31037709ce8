"""Calibration of a posterior against the truth that its cohort was simulated from."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from pavi_scale.posterior.posterior import Posterior


@dataclass(frozen=True)
class Calibration:
    """Where true values fall in their posterior.

    Args:
        ranks: Latent -> for each value looked at, the share of draws below the truth, in (0, 1); uniform if calibrated.
    """

    ranks: dict[str, np.ndarray]

    def coverage(self, name: str, levels: np.ndarray) -> np.ndarray:
        """Share of true values inside the central intervals of probability `levels`, same shape.

        Example:
            >>> Calibration({"mu": np.array([0.1, 0.5, 0.6, 0.97])}).coverage("mu", np.array([0.5, 0.9])).tolist()
            [0.5, 0.75]
        """
        distance = np.sort(np.abs(2 * self.ranks[name] - 1))
        return np.searchsorted(distance, levels, side="right") / len(distance)


def calibrate(posterior: Posterior, truth: Any, draws: int = 100, values: int = 500, seed: int = 0) -> Calibration:
    """Rank true values among posterior draws.

    Args:
        posterior: The posterior.
        truth: Dataset of true values; latents that it lacks, or holds with other dimensions, are left out.
        draws: Draws to rank among.
        values: Values looked at per latent, about: units of the largest plates are chosen at random.
        seed: Of that choice.
    """
    group = posterior.datatree["posterior"].dataset
    rng = np.random.default_rng(seed)
    ranks: dict[str, np.ndarray] = {}
    for v in posterior.model.latents:
        if v.name not in truth or dict(truth[v.name].sizes) != {d: group.sizes[d] for d in (*v.plates, *v.dims)}:
            continue
        units = choose(rng, {p: group.sizes[p] for p in v.plates}, values // max(1, prod(group.sizes[d] for d in v.dims)))
        true = truth[v.name].transpose(*v.plates, *v.dims).isel(units).values
        drawn = group[v.name].isel(units | {"draw": slice(draws)}).values[0]
        # A value between two draws stands in the middle of its gap: ranks never touch 0 or 1.
        ranks[v.name] = (((drawn < true).sum(0) + 0.5) / (len(drawn) + 1)).ravel()
    return Calibration(ranks)


def choose(rng: np.random.Generator, sizes: dict[str, int], most: int) -> dict[str, np.ndarray]:
    """Random sorted positions of each plate, at most about `most` combinations; the largest plates are thinned first."""
    kept = dict(sizes)
    for plate in sorted(sizes, key=lambda p: -sizes[p]):
        others = prod(n for p, n in kept.items() if p != plate)
        kept[plate] = max(1, min(sizes[plate], max(most // others, 8)))
    return {p: np.sort(rng.choice(n, kept[p], replace=False)) for p, n in sizes.items()}
