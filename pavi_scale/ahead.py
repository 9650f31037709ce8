"""Reading ahead: what a task looks at next is fetched from the disk while it computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pavi_scale.batching import Shard, closure
from pavi_scale.cohort import Cohort
from pavi_scale.holding import Holding, Key

LARGE = 256 << 20  # bytes of a cohort that is read ahead: a smaller one is soon in memory


def key_of(piece: Any) -> Key:
    """Under which a piece of the split plate is kept: a shard `(plate, start, stop, ...)`, or any units."""
    return ("shard", *piece[:3]) if isinstance(piece, tuple) else ("units", piece.tobytes())


class Ahead:
    """Has pieces of the split plate fetched that are not kept.

    Args:
        cohort: The data.
        split: The plate.
        holding: What is kept.
    """

    def __init__(self, cohort: Cohort, split: str | None, holding: Holding) -> None:
        self._cohort, self._split, self._holding = cohort, split, holding
        self._worth = split is not None and cohort.nbytes >= LARGE

    def each(self, pieces: Sequence[Any]) -> Iterator[Any]:
        """The pieces in their order; of each the next one is asked for first."""
        for number, piece in enumerate(pieces):
            if number + 1 < len(pieces):
                self._fetch(pieces[number + 1])
            yield piece

    def after(self, shard: Shard) -> None:
        """Ask for the two shards after one: the first may be another's, who will be there at about the same time."""
        if self._worth and shard.plate is not None:
            stop = min(shard.stop + 2 * (shard.stop - shard.start), self._cohort.layout.cardinality[shard.plate])
            self._fetch((shard.plate, shard.stop, stop))

    def _fetch(self, piece: Any) -> None:
        if not self._worth or self._holding.get(key_of(piece)) is not None:
            return
        units = np.arange(piece[1], piece[2]) if isinstance(piece, tuple) else piece
        layout = self._cohort.layout
        self._cohort.will_need({p: u for p, u in closure(layout, {str(self._split): units}).units.items() if len(u) < layout.cardinality[p]})
