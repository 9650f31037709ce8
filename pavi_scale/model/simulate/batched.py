"""Draws from a law of one ground unit for many units at once.

torch samplers mostly do not run under `vmap` (in-place randomness, rejection loops). So only the *construction* of the law runs
under nested `vmap`; the distribution's parameters are captured there with their plate axes, one batched distribution is
built from them outside, and that one is sampled. A law that cannot be captured is sampled unit by unit.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution, RelaxedOneHotCategorical, TransformedDistribution
from torch.distributions import transforms as tt

from pavi_scale.errors import ModelError
from pavi_scale.model.promote import Promote
from pavi_scale.model.protocol import VariableLike

Law = Callable[..., Distribution]
LAW_ERRORS = (ArithmeticError, AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)

# Constructor arguments that torch stores under another name, and arguments that exclude each other.
_STORED_AS = {"base_distribution": "base_dist"}
_ALTERNATIVES = (("probs", "logits"), ("scale_tril", "covariance_matrix", "precision_matrix"))
_PLAIN = (int, float, bool, str, type(None))


class _Opaque(Exception):
    """The distribution cannot be rebuilt from its constructor arguments."""


@dataclass(frozen=True)
class _Leaf:
    """Position of a captured tensor among the outputs of `vmap`."""

    position: int


@dataclass(frozen=True)
class _Node:
    """A distribution or transform as what rebuilds it: a callable, and arguments that are leaves, nodes, lists or plain values."""

    build: Callable[..., Any]
    arguments: Mapping[str, Any]


@contextlib.contextmanager
def unvalidated() -> Iterator[None]:
    """Argument validation of torch distributions off inside (it costs, and cannot run under vmap); restored after."""
    global _unvalidated, _validated_before
    with _lock:  # the switch is one for the process: the first to enter remembers it, the last to leave puts it back
        if _unvalidated == 0:
            _validated_before = Distribution._validate_args
            Distribution.set_default_validate_args(False)
        _unvalidated += 1
    try:
        yield
    finally:
        with _lock:
            _unvalidated -= 1
            if _unvalidated == 0:
                Distribution.set_default_validate_args(_validated_before)


_lock = threading.Lock()
_unvalidated = 0
_validated_before = True


def expanded(law: Distribution, shape: tuple[int, ...], where: str) -> Distribution:
    """The law of one ground unit broadcast to its variable's event shape.

    Raises:
        ModelError: The law's own shape does not broadcast to `shape`.
    """
    own = tuple(law.batch_shape) + tuple(law.event_shape)
    inner = len(law.event_shape)
    batch = shape[: len(shape) - inner]
    fits = len(own) <= len(shape) and tuple(shape[len(shape) - inner :]) == tuple(law.event_shape)
    fits = fits and all(a in (1, b) for a, b in zip(reversed(law.batch_shape), reversed(batch), strict=False))
    if not fits:
        raise ModelError(
            "law returns a distribution of the wrong shape",
            where=where,
            expected=f"a shape that broadcasts to {shape}",
            got=str(own),
            remedy="return one ground unit's law; name its event dimensions in dims=",
        )
    return law if tuple(law.batch_shape) == batch else law.expand(torch.Size(batch))


def draw(v: VariableLike, parents: Mapping[str, tuple[Tensor, tuple[int, ...]]], sizes: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """One independent draw of `v` for each of `sizes` ground units, `[*sizes, *shape]`, from torch's global generator.

    Args:
        v: A variable with a law.
        parents: Name -> (value, plate axes of `v` that the value's leading axes stand for, ascending).
        sizes: Units along each plate axis.
        shape: Event shape of one unit.

    Raises:
        ModelError: The law fails, or returns something that is not a distribution or has the wrong shape.
    """
    if v.law is None:
        raise ModelError("variable has no law", where=f"variable {v.name!r}")
    values = [parents[p][0] for p in v.parents]
    axes = [parents[p][1] for p in v.parents]
    full = (*sizes, *shape)
    with unvalidated(), Promote():
        try:
            law = _capture(v, v.law, values, axes, len(sizes), shape)
            batch = torch.Size(full[: len(full) - len(law.event_shape)])
            out = (law if law.batch_shape == batch else law.expand(batch)).sample()
            if tuple(out.shape) == full:
                return out
        except ModelError:
            raise
        except (_Opaque, *LAW_ERRORS):
            pass  # the loop below repeats a genuine error on one unit, where it can be told to the user
        return _one_by_one(v, v.law, values, axes, tuple(sizes), shape)


def captured(
    v: VariableLike, parents: Mapping[str, tuple[Tensor, tuple[int, ...]]], sizes: Sequence[int], shape: tuple[int, ...]
) -> Distribution | None:
    """The law of `sizes` ground units at once, its batch shape led by `sizes`; None where it cannot be captured. Arguments as for `draw`."""
    if v.law is None:
        raise ModelError("variable has no law", where=f"variable {v.name!r}")
    with unvalidated(), Promote():
        try:
            law = _capture(v, v.law, [parents[p][0] for p in v.parents], [parents[p][1] for p in v.parents], len(sizes), shape)
            full = (*sizes, *shape)
            return law.expand(torch.Size(full[: len(full) - len(law.event_shape)]))
        except ModelError:
            raise
        except (_Opaque, *LAW_ERRORS):
            return None


def _one_by_one(v: VariableLike, law_of: Law, values: list[Tensor], axes: list[tuple[int, ...]], sizes: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    out: list[Tensor] = []
    for unit in np.ndindex(*sizes):
        given = [value[tuple(unit[a] for a in on)] for value, on in zip(values, axes, strict=True)]
        try:
            law = _law(v, law_of, given, shape)
            out.append(law.sample())
        except ModelError:
            raise
        except LAW_ERRORS as error:
            raise ModelError(
                "law fails on one ground unit",
                where=f"law of {v.name!r}",
                got=f"{type(error).__name__}: {error}",
                remedy=f"parents arrive with event shapes {dict(zip(v.parents, (tuple(g.shape) for g in given), strict=True))}, no plate axis",
            ) from error
    return torch.stack(out).reshape(sizes + shape) if out else torch.empty(sizes + shape)


def _law(v: VariableLike, law_of: Law, given: Sequence[Tensor], shape: tuple[int, ...]) -> Distribution:
    law = law_of(**dict(zip(v.parents, given, strict=True)))
    if not isinstance(law, Distribution):
        raise ModelError("law does not return a distribution", where=f"law of {v.name!r}", expected="torch.distributions.Distribution", got=type(law).__name__)
    return expanded(law, shape, f"law of {v.name!r}")


def _capture(v: VariableLike, law_of: Law, values: list[Tensor], axes: list[tuple[int, ...]], depth: int, shape: tuple[int, ...]) -> Distribution:
    """The law with all plate axes in its batch shape (size one along plates that no parent has)."""
    trees: list[_Node] = []

    def unit(*given: Tensor) -> tuple[Tensor, ...]:
        leaves: list[Tensor] = []
        trees.append(_take(_law(v, law_of, given, shape), leaves))
        return tuple(leaves)

    function: Callable[..., tuple[Tensor, ...]] = unit
    unmapped: list[int] = []
    for axis in reversed(range(depth)):  # an input's leading axes are consumed from the left: the first plate is outermost
        in_dims = tuple(0 if axis in on else None for on in axes)
        if any(d == 0 for d in in_dims):
            function = torch.func.vmap(function, in_dims=in_dims)
        else:
            unmapped.append(axis)
    leaves = function(*values)
    for axis in sorted(unmapped):
        leaves = tuple(leaf.unsqueeze(axis) for leaf in leaves)
    law = _build(trees[-1], leaves)
    if not isinstance(law, Distribution):
        raise _Opaque
    return law


def _take(law: Distribution, leaves: list[Tensor]) -> _Node:
    """Constructor and arguments of `law`; tensors go to `leaves`, padded to batch rank so that plate axes prepended later line up."""
    if isinstance(law, RelaxedOneHotCategorical):  # its temperature does not broadcast over a batch
        raise _Opaque
    cls = type(law)
    names = [n for n in inspect.signature(cls).parameters if n != "validate_args"]
    for group in _ALTERNATIVES:
        present = [n for n in group if n in names]
        if len(present) > 1:
            chosen = present[0] if present[0] == "scale_tril" or present[0] in law.__dict__ else present[1]
            names = [n for n in names if n not in present or n == chosen]
    rank, event = len(law.batch_shape), len(law.event_shape)
    arguments: dict[str, Any] = {}
    for name in names:
        stored = _STORED_AS.get(name, name)
        if not hasattr(law, stored):
            if cls.__module__.startswith("torch.distributions") and inspect.signature(cls).parameters[name].default is not inspect.Parameter.empty:
                continue
            raise _Opaque
        value = getattr(law, stored)
        if isinstance(value, Tensor):
            if name not in law.arg_constraints:
                raise _Opaque
            arguments[name] = _leaf(value, rank + law.arg_constraints[name].event_dim, leaves)
        elif isinstance(value, Distribution):
            arguments[name] = _take(value, leaves)
        elif name == "transforms" and cls is TransformedDistribution:
            arguments[name] = [_take_transform(t, rank + event, leaves) for t in value]
        elif isinstance(value, _PLAIN):
            arguments[name] = value
        else:
            raise _Opaque
    return _Node(cls, arguments)


def _take_transform(transform: tt.Transform, rank: int, leaves: list[Tensor]) -> _Node:
    arguments: dict[str, Any] = {}
    for name, value in transform.__dict__.items():
        if isinstance(value, Tensor):
            if not isinstance(transform, (tt.AffineTransform, tt.PowerTransform)):
                raise _Opaque
            arguments[name] = _leaf(value, rank, leaves)
        elif isinstance(value, tt.Transform):
            arguments[name] = _take_transform(value, rank, leaves)
        elif name == "parts":
            arguments[name] = [_take_transform(t, rank, leaves) for t in value]
        elif name not in ("_inv", "_cached_x_y") and not isinstance(value, _PLAIN):
            raise _Opaque

    def build(**replaced: Any) -> tt.Transform:
        out = copy.copy(transform)
        out.__dict__.update(replaced, _inv=None, _cached_x_y=(None, None))
        return out

    return _Node(build, arguments)


def _leaf(value: Tensor, rank: int, leaves: list[Tensor]) -> _Leaf:
    if value.ndim > rank:
        raise _Opaque
    leaves.append(value.reshape((1,) * (rank - value.ndim) + tuple(value.shape)))
    return _Leaf(len(leaves) - 1)


def _build(tree: Any, leaves: Sequence[Tensor]) -> Any:
    if isinstance(tree, _Leaf):
        return leaves[tree.position]
    if isinstance(tree, list):
        return [_build(item, leaves) for item in tree]
    if isinstance(tree, _Node):
        return tree.build(**{name: _build(value, leaves) for name, value in tree.arguments.items()})
    return tree


def blocks(sizes: Sequence[int], lengths: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Slices of the blocks of `lengths` that tile an array of `sizes`, in C order.

    Example:
        >>> list(blocks([3], [2]))
        [(slice(0, 2, None),), (slice(2, 3, None),)]
    """
    for corner in np.ndindex(*(-(-n // c) for n, c in zip(sizes, lengths, strict=True))):
        yield tuple(slice(i * c, min((i + 1) * c, n)) for i, c, n in zip(corner, lengths, sizes, strict=True))
