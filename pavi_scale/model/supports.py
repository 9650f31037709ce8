"""What the support of an observed variable's law says of data, whatever the law's parents are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

_INTEGERS = type(constraints.nonnegative_integer)  # torch has no public name for it
_PIECE = 1 << 20  # values compared at once: in double precision they fit in a processor's cache


@dataclass(frozen=True)
class Support:
    """The values that a law can take.

    Args:
        constraint: As torch describes them.
    """

    constraint: Constraint

    def __str__(self) -> str:
        return str(self.constraint)

    def outside(self, values: np.ndarray) -> np.ndarray | None:
        """Which of some finite values, `[*sizes, *event]`, are outside; NaN stands for an observation that is missing.

        Returns:
            Booleans of shape `values.shape` less the support's own event dimensions (those of a simplex, say); None where none is outside.
        """
        base = self.constraint
        while hasattr(base, "base_constraint"):
            base = base.base_constraint
        if type(base) is type(constraints.real):
            return None
        # Where the elements of an event stand alone, so do the missing ones.
        check = base if base.event_dim == 0 else self.constraint
        rank = values.ndim - check.event_dim
        bad: np.ndarray | None = None
        for at in _pieces(values.shape, rank):
            numbers = np.array(values[at], dtype=np.float64)
            # A tenth of the time of torch's remainders, where all is well.
            if type(check) is _INTEGERS and bool(((np.trunc(numbers) == numbers) & (numbers >= np.asarray(check.lower_bound))).all()):  # type: ignore[attr-defined]
                continue
            x = torch.from_numpy(numbers)
            missing = torch.isnan(x)
            good = check.check(x) | (missing.flatten(rank).any(-1) if check.event_dim else missing)
            if not bool(good.all()):
                bad = np.zeros(values.shape[:rank], bool) if bad is None else bad
                bad[at] = ~good.numpy()
        return bad


def _pieces(shape: tuple[int, ...], rank: int) -> Iterator[tuple[slice, ...]]:
    """Slices along the longest of the first `rank` axes that cover an array."""
    if rank == 0:
        yield ()
        return
    axis = int(np.argmax(shape[:rank]))
    step = max(1, _PIECE * shape[axis] // max(1, math.prod(shape)))
    for start in range(0, shape[axis], step):
        yield (*[slice(None)] * axis, slice(start, start + step))


def common(first: Constraint, second: Constraint) -> Constraint:
    """What two supports of a law demand, had at different parents: a bound that moves with them is none for all units.

    Example:
        >>> common(constraints.integer_interval(0, 3), constraints.integer_interval(0, 9))
        IntegerGreaterThan(lower_bound=0)
    """
    bounds = [name for name in ("lower_bound", "upper_bound") if hasattr(first, name)]
    # One that has lost a bound already is compared with another that has both.
    if type(first) is not type(second) and not (bounds and first.is_discrete == second.is_discrete and first.event_dim == second.event_dim):
        return constraints.real
    if hasattr(first, "base_constraint") and hasattr(second, "base_constraint"):
        inner = common(first.base_constraint, second.base_constraint)
        if inner is first.base_constraint or type(inner) is type(constraints.real):
            return first if inner is first.base_constraint else inner
        depth = getattr(first, "reinterpreted_batch_ndims", None)
        return type(first)(inner) if depth is None else constraints.independent(inner, depth)  # type: ignore[call-arg]
    still = {n: getattr(first, n) for n in bounds if torch.equal(torch.as_tensor(getattr(first, n)), torch.as_tensor(getattr(second, n, math.nan)))}
    if len(still) == len(bounds):
        return first
    if type(first) is constraints.multinomial:
        return constraints.independent(constraints.nonnegative_integer, 1)
    if first.is_discrete:
        return _INTEGERS(still.get("lower_bound", -math.inf))  # type: ignore[call-arg]
    return constraints.greater_than_eq(still["lower_bound"]) if "lower_bound" in still else constraints.real
