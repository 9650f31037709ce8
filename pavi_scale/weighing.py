"""How many candidates a draw needs, told by the importance weights of some."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

EFFECTIVE = 10.0  # candidates of a unit that should carry its weight
LEAST_EFFECTIVE = 3.0  # groups of candidates that should carry the weight of a coarser block, at least: with fewer its mode and curvature tell more
FEW_CANDIDATES = 16  # of a draw, at least
LEAST_EACH = 8  # candidates of a group
NOISE = 0.1  # variance (nats squared) of the weighted bound that its candidates may leave, were they independent


def groups_of(state: Mapping[str, np.ndarray]) -> int:
    """In how many groups the candidates of a draw are drawn (`guide.local.candidates`)."""
    return int(state.get("groups", 1))


@dataclass(frozen=True)
class Weighed:
    """What importance weights at one root point say.

    Args:
        share: Relative effective sample size of units of finest blocks, the lowest tenth.
        spread: Sum of the relative variances of their weights.
        coarser: As `share`, of units of coarser blocks; None where they are not picked.
    """

    share: float
    spread: float
    coarser: float | None

    def numbers(self, least: int, most: int) -> tuple[int, int]:
        """Candidates of a draw, and groups of them."""
        enough = int(np.clip(math.ceil(max(EFFECTIVE / max(self.share, 1e-9), self.spread / NOISE)), least, most))
        if self.coarser is None or self.coarser * (most // LEAST_EACH) < LEAST_EFFECTIVE:
            return enough, 1
        groups = int(np.clip(math.ceil(EFFECTIVE / self.coarser), 1, most // LEAST_EACH))
        return min(most, groups * max(LEAST_EACH, math.ceil(enough / groups))), groups


def weighed(answers: Iterable[Mapping[str, np.ndarray]], finest: Collection[str], scale: float) -> Weighed:
    """From the answers to "ratios".

    Args:
        answers: Of some shards.
        finest: Names of the finest blocks.
        scale: All shards over those that answered.
    """
    shares: dict[bool, list[np.ndarray]] = {True: [], False: []}
    for key, ratio in (item for answer in answers for item in answer.items()):
        if key.startswith("ratio/"):
            w = np.exp(ratio - ratio.max(0))
            shares[key.removeprefix("ratio/") in finest].append(np.nan_to_num(w.sum(0) ** 2 / (w**2).sum(0) / len(w)))
    own, above = (np.concatenate(shares[kind] or [np.ones(0)]) for kind in (True, False))
    spread = scale * float((1.0 / np.maximum(own, 1e-9) - 1.0).sum())
    return Weighed(float(np.quantile(own, 0.1)) if len(own) else 1.0, spread, float(np.quantile(above, 0.1)) if len(above) else None)
