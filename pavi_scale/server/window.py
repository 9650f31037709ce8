"""Bounded staleness: rounds are asked for before the answers of those before them are in, and taken in the order in which they were asked."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pavi_scale.errors import PaviError
from pavi_scale.server.protocol import Asked, Engine


@dataclass(frozen=True, slots=True)
class Order:
    """One update's round: what is asked, with the state as it is now; `note` comes back with the answers."""

    kind: str
    state: Mapping[str, np.ndarray]
    tasks: Sequence[Mapping[str, Any]]
    note: Any = None


@dataclass(frozen=True, slots=True)
class Reply:
    """Answers of one order; `age` updates were made between the state that they were computed from and the one that they change."""

    answers: list[dict[str, np.ndarray]]
    note: Any
    age: int


def lagged(engine: Engine, bound: int, orders: Iterable[Order]) -> Iterator[Reply]:
    """Replies to `orders`, in their order, while up to `bound` later ones are computed.

    Stale-synchronous parallel (Ho et al. 2013) whose clock is the driver's: nobody reads a state that is more than `bound` updates old, and a worker waits
    only when the oldest order is that far behind. Updates are made in the order of their questions, so that the numbers depend on `bound` and not on who
    computed what, how fast, or how often.

    Args:
        engine: Who answers.
        bound: Updates that a state may be behind; 0 waits for each answer.
        orders: Drawn one by one, each when its state may be read. One update, by whoever iterates, follows each reply.

    Raises:
        PaviError: A state was older than the bound: a defect of this module. Or as raised by the engine.

    Example:
        >>> from pavi_scale.server.local import LocalEngine
        >>> class Half:
        ...     def build(self): return self
        ...     def compute(self, kind, state, task): return {"y": state["x"] / 2}
        >>> x = np.array([1.0])
        >>> with LocalEngine(Half()) as engine:
        ...     for reply in lagged(engine, 1, (Order("half", {"x": x}, [{}]) for _ in range(3))):
        ...         x = x + reply.answers[0]["y"]
        ...         print(reply.age, x[0])
        0 1.5
        1 2.0
        1 2.75
    """
    waiting: deque[tuple[Asked, int, Any]] = deque()
    updates = 0

    def oldest() -> Reply:
        asked, read, note = waiting.popleft()
        reply = Reply(asked.result(), note, updates - read)
        if not 0 <= reply.age <= bound:
            told = f"at most {bound} updates"
            raise PaviError("a state was read that is too old", where="lagged", expected=told, got=reply.age, remedy="report this as a defect")
        return reply

    for order in orders:
        waiting.append((engine.submit(order.kind, order.state, order.tasks), updates, order.note))
        if len(waiting) > bound:
            yield oldest()
            updates += 1
    while waiting:
        yield oldest()
        updates += 1
