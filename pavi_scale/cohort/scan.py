"""Full scans of a variable: absent chunks and values that no law can take."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from pavi_scale.cohort.readers import EMPTY_OK, Block, Index, Reader, reading
from pavi_scale.errors import CohortError
from pavi_scale.model.supports import Support

_SHOWN = 3


def blocks(shape: tuple[int, ...], chunks: tuple[int, ...] | None, itemsize: int, budget_bytes: int) -> Iterator[Block]:
    """Blocks that cover an array once, aligned to its chunks and within a budget where one chunk is.

    A block starts as one chunk and grows along the last axes first, so that each chunk is read exactly once.

    Example:
        >>> list(blocks((4, 2), None, 8, 32))
        [(slice(0, 2, None), slice(0, 2, None)), (slice(2, 4, None), slice(0, 2, None))]
    """
    size = [min(c, n) for c, n in zip(chunks or (1,) * len(shape), shape, strict=True)]
    for axis in reversed(range(len(shape))):
        room = budget_bytes // max(1, itemsize * int(np.prod(size, dtype=np.int64)))
        size[axis] = min(shape[axis], size[axis] * max(1, room))
        if size[axis] < shape[axis]:
            break
    for start in itertools.product(*(range(0, n, s) for n, s in zip(shape, size, strict=True))):
        yield tuple(slice(a, min(a + s, n)) for a, s, n in zip(start, size, shape, strict=True))


def check_chunks(reader: Reader, axes: tuple[str, ...], where: str) -> None:
    """Refuse a store that lacks a chunk: Zarr would read it as fill values without a word.

    Raises:
        CohortError: With the block that the first missing chunk covers.
    """
    with reading(where):
        missing = list(itertools.islice(reader.absent(), 1000))
    if missing:
        at = ", ".join(f"{axis}[{b.start}:{b.stop}]" for axis, b in zip(axes, missing[0], strict=True)) or "the scalar"
        raise CohortError(
            "chunk is missing from the store",
            where=f"{where}, {at}",
            expected="every chunk stored",
            got=f"{len(missing)}{'+' if len(missing) == 1000 else ''} missing",
            remedy="restore it; if the writer left out chunks of fill values, write with to_zarr(..., write_empty_chunks=True)"
            f" or set the array's attribute {EMPTY_OK!r} to true",
        )


def check_finite(
    reader: Reader, axes: tuple[str, ...], describe: Callable[[str, int], str], where: str, *, nan_ok: bool, kind: str, budget_bytes: int,
    support: Support | None = None,
) -> None:  # fmt: skip
    """Read a whole array in blocks and refuse what `check_block` and `check_support` refuse.

    Args:
        reader: The array.
        axes: Names of its axes.
        describe: `(axis, position)` -> the position in words, with its labels.
        where: The variable, in words.
        nan_ok: Whether NaN means "not observed".
        kind: "observed" or "covariate".
        budget_bytes: Bytes of a block.
        support: What the law can take, where that is known.

    Raises:
        CohortError: With the coordinates of the first ones of the first block that has any.
    """
    for block in blocks(reader.shape, reader.chunks, reader.dtype.itemsize, budget_bytes):
        with reading(where):
            values = reader.read(block)
        check_block(values, block, axes, describe, where, nan_ok=nan_ok, kind=kind)
        if support is not None:
            check_support(values, block, axes, describe, where, support)


def check_block(
    values: np.ndarray, index: Sequence[Index], axes: tuple[str, ...], describe: Callable[[str, int], str], where: str, *, nan_ok: bool, kind: str
) -> None:
    """Refuse infinities, and NaN unless `nan_ok`, in the values read at `index`.

    Raises:
        CohortError: With the coordinates of the first ones.
    """
    # A sum that is finite has finite terms, and is had at the speed of memory.
    if values.dtype.kind != "f" or bool(np.isfinite(values.sum())) or bool(np.isfinite(values).all()):
        return
    infinite = np.isinf(values)
    if infinite.any():
        raise CohortError(
            "value is infinite",
            where=f"{where} at {_named(infinite, index, axes, describe)}",
            expected="finite values",
            got=f"{int(infinite.sum())} infinite",
            remedy="correct or drop these units",
        )
    if not nan_ok:
        unknown = "fill in or drop these units: a covariate must be known"
        remedy = "declare observed(..., missing='mask'), or drop these units" if kind == "observed" else unknown
        raise CohortError(
            "value is missing (NaN)",
            where=f"{where} at {_named(np.isnan(values), index, axes, describe)}",
            expected="a finite value",
            got=f"{int(np.isnan(values).sum())} NaN",
            remedy=remedy,
        )


def check_support(
    values: np.ndarray, index: Sequence[Index], axes: tuple[str, ...], describe: Callable[[str, int], str], where: str, support: Support
) -> None:
    """Refuse values, read at `index`, that the variable's law cannot take.

    Raises:
        CohortError: With the coordinates of the first ones.
    """
    bad = support.outside(values)
    if bad is not None:
        raise CohortError(
            "observation outside the support of its law",
            where=f"{where} at {_named(bad, index[: bad.ndim], axes[: bad.ndim], describe)}",
            expected=str(support),
            got=np.asarray(values[tuple(np.argwhere(bad)[0])]).tolist(),
            remedy="choose another law, or correct the data",
        )


def _named(bad: np.ndarray, index: Sequence[Index], axes: tuple[str, ...], describe: Callable[[str, int], str]) -> str:
    """Coordinates of the first bad entries, as `(house=3, county=AITKIN, feature=0)`."""
    entries = []
    for local in np.argwhere(bad)[:_SHOWN]:
        places = (int(at) + (part.start or 0) if isinstance(part, slice) else int(part[at]) for at, part in zip(local, index, strict=True))
        entries.append("(" + ", ".join(describe(axis, place) for axis, place in zip(axes, places, strict=True)) + ")")
    more = int(bad.sum()) - len(entries)
    return ", ".join(entries) + (f" and {more} more" if more > 0 else "")
