"""Random samples of a cohort's units that stand for the whole: where a large fit does its first work.

A sample of m of N units, each weighted N / m, has a posterior of the root whose location is about sqrt(N / m) posterior sds off and whose
curvature is about 1 / sqrt(m) off: near enough to find the mode and the curvature there at a cost that does not grow with N, so that the
full cohort is asked for a few gradients only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pavi_scale.computation import StudyComputation
from pavi_scale.rng import stream
from pavi_scale.sampling import shard_length

FIRST_SECONDS = 4e-3  # modelled, of one root point on the first sample
CURVATURE_SECONDS = 5e-2  # the same on the sample that the curvature comes from
LEAST_UNITS = 1000
UNITS_PER_ROOT = 100  # of the first sample, for each root coordinate
WORTH = 4  # how many times smaller a sample must be
PARTS = 4  # tasks of a round over the second sample; the first is too small to be divided
RUNS = 4  # runs of neighbours that a sample from a store is made of, at least


@dataclass(frozen=True)
class Sample:
    """A sample of the split plate's units.

    Args:
        units: Sorted positions.
        total: Units of the whole cohort.
        parts: Tasks of a round.
    """

    units: np.ndarray
    total: int
    parts: int = 1

    def tasks(self) -> list[dict[str, Any]]:
        """The sample in contiguous parts."""
        scale = self.total / len(self.units)
        parts = np.array_split(self.units, self.parts)
        return [{"sample": part, "scale": scale, "first": i == 0, "size": len(self.units)} for i, part in enumerate(parts)]


def sample_sizes(total: int, cost: float, dim: int) -> list[int]:
    """Units of the samples to go through before the whole: one to find the mode on, one for its curvature; none if the whole is small.

    Args:
        total: Units of the whole cohort.
        cost: Modelled seconds of one root point on it.
        dim: Root coordinates.

    Example:
        >>> sample_sizes(2_000_000, 5.0, 8), sample_sizes(20_000, 0.05, 8), sample_sizes(300, 0.001, 8)
        ([1600, 20000], [1600], [])
    """
    per_unit = cost / max(total, 1)
    first = max(int(FIRST_SECONDS / per_unit), LEAST_UNITS, UNITS_PER_ROOT * dim)
    second = max(int(CURVATURE_SECONDS / per_unit), WORTH * first)
    return [size for size in (first, second) if size * WORTH <= total]


def draw_sample(study: StudyComputation, size: int, seed: int) -> Sample:
    """About `size` units at random: one by one in memory; from a store in runs of neighbours within chunks, so that few chunks are read."""
    split = str(study.settings.split)
    total = study.layout.cardinality[split]
    rng = np.random.default_rng(stream(seed, "sample", size) % 2**63)
    chunk = study.cohort.chunk(split)
    if not chunk:
        return Sample(np.sort(rng.choice(total, size, replace=False)), total)
    per_chunk = max(1, chunk * RUNS // size)  # runs that a chunk is divided into
    length = min(chunk, total) // per_chunk
    starts = np.asarray([c + k * length for c in range(0, total, chunk) for k in range(per_chunk) if c + k * length < total])
    picked = np.sort(rng.choice(starts, min(len(starts), -(-size // length)), replace=False))
    units = (picked[:, None] + np.arange(length)).ravel()
    return Sample(units[units < total], total)


def stages(study: StudyComputation, cost: float, seed: int) -> Sequence[Sample]:
    """The samples to go through before the whole cohort."""
    split = study.settings.split
    if split is None or study.space.dim == 0:
        return []
    sizes, most = sample_sizes(study.layout.cardinality[split], cost, study.space.dim), shard_length(study)
    return [replace(draw_sample(study, size, seed), parts=max(parts, -(-size // most))) for size, parts in zip(sizes, (1, PARTS), strict=False)]
