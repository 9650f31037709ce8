"""What the driver, the engines and the server's state machine say to each other: protocols, events, instructions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pavi_scale.errors import PaviError


class Computation(Protocol):
    """Answers one task. The answer depends on (kind, state, task) alone; it must not write into the state."""

    def compute(self, kind: str, state: Mapping[str, np.ndarray], task: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The named arrays that answer `task`."""


class Spec(Protocol):
    """Picklable description of a computation; travels to each worker once. An attribute `threads: int` fixes torch's thread count."""

    def build(self) -> Computation:
        """The computation, with whatever it opens or holds."""


class Asked(Protocol):
    """A round that was asked for; its answers are handed over once."""

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """Its answers, in task order: each once it and all before it are there."""

    def result(self) -> list[dict[str, np.ndarray]]:
        """Its answers, in task order; blocks until they are there."""


class Engine(Protocol):
    """Answers rounds."""

    @property
    def parallelism(self) -> int:
        """Tasks that run at the same time."""

    @property
    def processes(self) -> int:
        """Computations, each with memory of its own."""

    def round(self, kind: str, state: Mapping[str, np.ndarray], tasks: Sequence[Mapping[str, Any]]) -> list[dict[str, np.ndarray]]:
        """The answers to `tasks`, in their order."""

    def submit(self, kind: str, state: Mapping[str, np.ndarray], tasks: Sequence[Mapping[str, Any]]) -> Asked:
        """Ask, and wait later: rounds that are open at the same time share the workers, the oldest first. `state` must not change before its end."""

    def stream(self, kind: str, state: Mapping[str, np.ndarray], tasks: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, np.ndarray]]:
        """The answers to `tasks`, in their order, one by one: whoever adds up large ones holds a few of them."""

    def close(self) -> None:
        """Give everything back; can be called twice."""


@dataclass(frozen=True, slots=True)
class RoundStarted:
    """The driver asks for `tasks` answers with state `version`."""

    kind: str
    version: int
    tasks: int


@dataclass(frozen=True, slots=True)
class RoundCancelled:
    """The driver gives the open rounds up."""


@dataclass(frozen=True, slots=True)
class WorkerJoined:
    """A worker under a name never used before (a worker that comes back has a new name, and the same `process`, where that is known)."""

    worker: str
    process: str = ""


@dataclass(frozen=True, slots=True)
class WorkerLeft:
    """A worker said goodbye, or its connection closed."""

    worker: str
    reason: str


@dataclass(frozen=True, slots=True)
class WorkerFailed:
    """A worker could not build the computation: no round can succeed."""

    worker: str
    error: PaviError


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A worker is alive."""

    worker: str


@dataclass(frozen=True, slots=True)
class Ready:
    """A worker asks for a task. `seq` grows with each new question; a repeated question repeats its number."""

    worker: str
    seq: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; `expected` workers were started but have not joined yet."""

    expected: int = 0


@dataclass(frozen=True, slots=True)
class TaskDone:
    """A worker answered a task; `result` is an opaque reference."""

    worker: str
    round: int
    index: int
    token: int
    result: Any


@dataclass(frozen=True, slots=True)
class TaskFailed:
    """A worker's computation raised."""

    worker: str
    round: int
    index: int
    token: int
    error: PaviError


Event = RoundStarted | RoundCancelled | WorkerJoined | WorkerLeft | WorkerFailed | Heartbeat | Ready | Tick | TaskDone | TaskFailed


@dataclass(frozen=True, slots=True)
class Assign:
    """Hand task `index` to `worker`, which must return `token` with the answer."""

    worker: str
    round: int
    index: int
    token: int


@dataclass(frozen=True, slots=True)
class CompleteRound:
    """All answers are there, in task order."""

    round: int
    results: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class FailRound:
    """The round cannot be completed; its other tasks are cancelled."""

    round: int
    error: PaviError


@dataclass(frozen=True, slots=True)
class ExpireWorker:
    """Forget a silent worker; if it comes back it must join under a new name."""

    worker: str
    reason: str


@dataclass(frozen=True, slots=True)
class Ignore:
    """An event had no effect, and why: repeated, late, or from an unknown worker."""

    event: Event
    reason: str


Instruction = Assign | CompleteRound | FailRound | ExpireWorker | Ignore
