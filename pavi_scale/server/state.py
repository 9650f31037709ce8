"""The parameter server as a state machine without I/O: events in, instructions out.

A **round** is a kind, a state version and a number of tasks. Each task is leased to one worker under a fencing token; a lease lives as
long as its worker sends heartbeats. Whatever the order, loss or repetition of messages, a task's result is taken exactly once: under the
token of its present lease. A dead worker's lease goes back to the queue. Several rounds may be open, as many as the driver has asked for without
waiting: tasks of the oldest are leased first, and a worker that would wait for its end begins with the next. The machine holds
no payloads and no clock: `now` comes with each event, results are opaque references. So the same machine runs under Dask, in a simulation and in a
property test.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from pavi_scale.errors import ClusterLost, PaviError, WorkerError
from pavi_scale.server.protocol import (
    Assign,
    CompleteRound,
    Computation,
    Engine,
    Event,
    ExpireWorker,
    FailRound,
    Heartbeat,
    Ignore,
    Instruction,
    Ready,
    RoundCancelled,
    RoundStarted,
    Spec,
    TaskDone,
    TaskFailed,
    Tick,
    WorkerFailed,
    WorkerJoined,
    WorkerLeft,
)

__all__ = ["Computation", "Engine", "ServerState", "Spec"]


SLOW_START = 5
CUTS = 10  # broken connections that are borne for each death
BARREN = 10  # workers that may leave one after another before any asked for a task: each may be starved of memory by what it builds


@dataclass(frozen=True, slots=True)
class Lease:
    """The right of one worker to answer one task of an open round."""

    token: int
    worker: str
    round: int
    index: int


@dataclass(slots=True)
class Worker:
    """What the machine knows of a live worker; `rank` is its position in order of joining."""

    name: str
    rank: int
    seen: float
    process: str = ""
    asked: int = -1
    ready: bool = False
    lease: Lease | None = None


@dataclass(slots=True)
class Round:
    """An open round. Every task is in exactly one of `queues`, `leases`, `results`."""

    number: int
    kind: str
    version: int
    size: int
    started: float
    queues: list[deque[int]] = field(default_factory=list)
    leases: dict[int, Lease] = field(default_factory=dict)
    results: dict[int, Any] = field(default_factory=dict)
    deaths: dict[int, list[str]] = field(default_factory=dict)
    losses: dict[int, int] = field(default_factory=dict)
    stories: dict[int, list[str]] = field(default_factory=dict)

    def share(self, tasks: list[int], workers: int) -> None:
        """Queue `tasks` by preference: task i prefers worker i mod n, next to the data that it read in the round before."""
        self.queues = [deque() for _ in range(max(workers, 1))]
        for index in sorted(tasks):
            self.queues[index % len(self.queues)].append(index)

    def queued(self) -> list[int]:
        """Tasks that nobody works on."""
        return [index for queue in self.queues for index in queue]

    def take(self, rank: int, steal: bool) -> int | None:
        """The next task of worker `rank`'s own queue; or, if it may steal, the last one of the longest queue."""
        if self.queues[rank]:
            return self.queues[rank].popleft()
        longest = max(self.queues, key=len)
        return longest.pop() if steal and longest else None

    def tell(self, index: int, now: float, text: str) -> None:
        """Add a line to a task's story."""
        self.stories.setdefault(index, []).append(f"{now - self.started:.3f} s {text}")

    def story(self, index: int) -> str:
        """What happened to a task so far."""
        return f"task {index} of round {self.number} ({self.kind!r}, state {self.version}): " + ", ".join(self.stories.get(index, ["never leased"]))


class ServerState:
    """The machine. Call `handle` with each event, then carry out the instructions that it returns.

    Args:
        timeout: Seconds of silence after which a worker is dead.
        startup: Seconds that a round waits for the very first worker; five times as long for one that was started but has not joined yet.
        max_losses: Workers that may die over one task before the round fails. One whose connection broke and that joins again did not die; of
            broken connections ten times as many are borne.
        patience: Seconds that a round waits with no worker left; None for `timeout`.

    Example:
        >>> server = ServerState()
        >>> _ = server.handle(WorkerJoined("w"), 0.0), server.handle(Ready("w", 0), 0.0)
        >>> server.handle(RoundStarted("elbo", version=1, tasks=1), 0.0)
        [Assign(worker='w', round=1, index=0, token=1)]
        >>> server.handle(TaskDone("w", round=1, index=0, token=1, result="r"), 0.1)
        [CompleteRound(round=1, results=('r',))]
    """

    def __init__(self, *, timeout: float = 15.0, startup: float = 60.0, max_losses: int = 5, patience: float | None = None) -> None:
        self.patience = timeout if patience is None else patience
        self.timeout, self.startup, self.max_losses = timeout, startup, max_losses
        self.workers: dict[str, Worker] = {}
        self.open: dict[int, Round] = {}  # by number: the oldest first
        self.rounds = 0
        self.journal: deque[str] = deque(maxlen=20)
        self._token = 0
        self._now = self._ticked = self._alone_since = -math.inf
        self._ever_joined = False
        self._barren: set[str] = set()  # processes that left before they asked for a task, since the last one that did
        self.broken: PaviError | None = None

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """Take in one event.

        Args:
            event: What happened.
            now: Seconds on any clock; a step back counts as no time.
        """
        self._now = max(self._now, now)
        match event:
            case RoundStarted():
                return self._start(event)
            case RoundCancelled():
                self._end_all()
                return []
            case Tick():
                return self._tick(event)
            case WorkerJoined():
                return self._join(event)
        worker = self.workers.get(event.worker)
        if worker is None:
            return [Ignore(event, "unknown worker: it never joined, left or expired")]
        worker.seen = self._now
        match event:
            case Heartbeat():
                return []
            case Ready():
                return self._ready(worker, event)
            case WorkerLeft():
                return self._drop(worker, event.reason)
            case WorkerFailed():
                self.broken = event.error
                return self._fail(event.error)
        return self._finish(worker, event)

    def validate(self) -> None:
        """Check the invariants.

        Raises:
            PaviError: One does not hold; a defect of this module.
        """
        broken = [w.name for rank, w in enumerate(self.workers.values()) if w.rank != rank or (w.ready and w.lease is not None)]
        held = {(w.lease.round, w.lease.index): w.lease for w in self.workers.values() if w.lease is not None}
        leases = {(r.number, index): lease for r in self.open.values() for index, lease in r.leases.items()}
        tokens = [lease.token for lease in leases.values()]
        idle = any(w.ready for w in self.workers.values())
        laws = {
            "leases are those the workers hold": leases == held and all(self.workers[lease.worker].lease is lease for lease in held.values()),
            "tokens are unique": len(set(tokens)) == len(tokens) and max(tokens, default=0) <= self._token,
            "rounds are in order": list(self.open) == sorted(self.open) and all(number == r.number for number, r in self.open.items()),
        }
        for r in self.open.values():
            laws |= {
                f"each task of round {r.number} is in one place": sorted([*r.queued(), *r.leases, *r.results]) == list(range(r.size)),
                f"round {r.number} is not complete": len(r.results) < r.size,
                f"no worker idles while tasks of round {r.number} wait": not (r.queued() and idle),
                f"round {r.number} has one queue a worker": len(r.queues) == max(len(self.workers), 1),
            }
        broken += [law for law, holds in laws.items() if not holds]
        if broken:
            raise PaviError("the server's state is inconsistent", where=f"round {self.rounds}", got=broken, remedy="report this as a defect")

    def _start(self, event: RoundStarted) -> list[Instruction]:
        self.rounds += 1
        if self.broken is not None:
            return [FailRound(self.rounds, self.broken)]
        if event.tasks == 0:
            return [CompleteRound(self.rounds, ())]
        self.open[self.rounds] = fresh = Round(self.rounds, event.kind, event.version, event.tasks, self._now)
        fresh.share(list(range(event.tasks)), len(self.workers))
        return self._dispatch(list(self.workers.values()))

    def _join(self, event: WorkerJoined) -> list[Instruction]:
        if event.worker in self.workers:
            return [Ignore(event, "joined already")]
        self.workers[event.worker] = Worker(event.worker, len(self.workers), self._now, event.process)
        for r in self.open.values() if event.process else ():
            # It lost its connection, not its life: what it worked on did not kill it.
            r.deaths = {index: [p for p in dead if p != event.process] for index, dead in r.deaths.items()}
        self._ever_joined = True
        self._note(f"{event.worker} joined")
        return self._reshare(None)

    def _ready(self, worker: Worker, event: Ready) -> list[Instruction]:
        if event.seq < worker.asked:
            return [Ignore(event, "late question")]
        worker.asked = event.seq
        self._barren.clear()
        if worker.lease is not None:
            # A worker that asks while it holds a lease never got it: the same lease again, so that nothing is leased twice.
            return [Assign(worker.name, worker.lease.round, worker.lease.index, worker.lease.token)]
        worker.ready = True
        return self._dispatch([worker])

    def _finish(self, worker: Worker, event: TaskDone | TaskFailed) -> list[Instruction]:
        r = self.open.get(event.round)
        if r is None:
            return [Ignore(event, "the round is over")]
        if event.index in r.results:
            return [Ignore(event, "answered already")]
        lease = r.leases.get(event.index)
        if lease is None or lease.token != event.token or lease.worker != worker.name:
            return [Ignore(event, "stale token: the task was leased again")]
        if isinstance(event, TaskFailed):
            return self._fail(event.error)
        del r.leases[event.index]
        worker.lease = None
        r.results[event.index] = event.result
        if len(r.results) < r.size:
            return []
        del self.open[r.number]
        return [CompleteRound(r.number, tuple(r.results[index] for index in range(r.size)))]

    def _tick(self, event: Tick) -> list[Instruction]:
        gap = self._now - self._ticked
        self._ticked = self._now
        if math.isfinite(gap) and gap > self.timeout / 2:
            # The driver itself slept (stopped, starved): heartbeats may wait unread, so the time does not count against the workers.
            for worker in self.workers.values():
                worker.seen += gap
        out: list[Instruction] = []
        for worker in [w for w in self.workers.values() if self._now - w.seen > self.timeout]:
            reason = f"silent for {self._now - worker.seen:.1f} s"
            out += [ExpireWorker(worker.name, reason), *self._drop(worker, reason)]
        if self.open and not self.workers:
            patience = self.patience if self._ever_joined else max(self.startup, self.patience)
            if event.expected:  # a process is there and imports its libraries: on a busy node or a slow file system that takes minutes
                patience = max(patience, SLOW_START * self.startup)
            if self._now - max(self._alone_since, self._oldest().started) > patience:
                out += self._fail(self._no_worker(patience))
        return out

    def _drop(self, worker: Worker, reason: str) -> list[Instruction]:
        del self.workers[worker.name]
        for rank, other in enumerate(self.workers.values()):
            other.rank = rank
        if not self.workers:
            self._alone_since = self._now
        self._note(f"{worker.name} left: {reason}")
        if worker.asked < 0:
            self._barren.add(worker.process or worker.name)
            # Each of them would begin the wait for workers anew.
            if self.open and len(self._barren) >= BARREN and all(other.asked < 0 for other in self.workers.values()):
                return self._fail(self._all_barren())
        lease = worker.lease
        if lease is None:
            return self._reshare(None)
        r, index = self.open[lease.round], lease.index
        del r.leases[index]
        r.losses[index] = r.losses.get(index, 0) + 1
        r.deaths.setdefault(index, []).append(worker.process)
        r.tell(index, self._now, f"lost with {worker.name} ({reason})")
        if len(r.deaths[index]) < self.max_losses and r.losses[index] < CUTS * self.max_losses:
            return self._reshare(lease)
        error = WorkerError(
            "a task was lost with its worker too often",
            where=r.story(index),
            expected=f"fewer than {self.max_losses} workers that did not come back, and fewer than {CUTS * self.max_losses} broken connections",
            remedy="look into the workers' logs: a task that exceeds the memory limit kills each worker that takes it",
        )
        return self._fail(error)

    def _oldest(self) -> Round:
        if not self.open:
            raise PaviError("no round is open", remedy="report this as a defect")
        return next(iter(self.open.values()))

    def _no_worker(self, patience: float) -> ClusterLost:
        r = self._oldest()
        lost = sorted(r.losses) or r.queued()[:1]
        return ClusterLost(
            "no worker is left" if self._ever_joined else "no worker joined",
            where="; ".join(r.story(index) for index in lost[:3]),
            expected=f"a worker within {patience:g} s; {len(r.results)} of {r.size} tasks were answered",
            got="; ".join(self.journal) or "no word from any worker",
            remedy="check that the cluster has workers, that they can reach the driver's address, and their logs; then resume",
        )

    def _all_barren(self) -> ClusterLost:
        count = len(self._barren)
        self._barren.clear()
        return ClusterLost(
            "workers leave before they ask for a task",
            where=f"round {self._oldest().number} ({self._oldest().kind!r})",
            expected="workers that can hold the study",
            got=f"{count} that left, one after another; " + "; ".join(self.journal),
            remedy="look into the workers' logs (a memory limit below that of the plan ends each of them), then resume",
        )

    def _reshare(self, returned: Lease | None) -> list[Instruction]:
        for r in self.open.values():
            r.share([*r.queued(), *([returned.index] if returned is not None and returned.round == r.number else [])], len(self.workers))
        return self._dispatch(list(self.workers.values()))

    def _dispatch(self, workers: list[Worker]) -> list[Instruction]:
        out: list[Instruction] = []
        # Preferred tasks first for everybody, so that nobody's own task is stolen by one that comes earlier in the list.
        idle = [worker for worker in workers if worker.ready]
        for r, steal in [(r, steal) for r in self.open.values() if any(r.queues) for steal in (False, True)]:
            for worker in idle if any(r.queues) else ():
                index = r.take(worker.rank, steal) if worker.ready else None
                if index is None:
                    continue
                self._token += 1
                worker.ready, worker.lease = False, Lease(self._token, worker.name, r.number, index)
                r.leases[index] = worker.lease
                r.tell(index, self._now, f"leased to {worker.name} (token {self._token})")
                out.append(Assign(worker.name, r.number, index, self._token))
        return out

    def _fail(self, error: PaviError) -> list[Instruction]:
        """All open rounds end: the driver, who waits for one of them, is told at once."""
        numbers = list(self.open)
        self._end_all()
        return [FailRound(number, error) for number in numbers]

    def _end_all(self) -> None:
        self.open.clear()
        for worker in self.workers.values():
            worker.lease = None

    def _note(self, text: str) -> None:
        r = next(iter(self.open.values()), None)
        since = "" if r is None else f"{self._now - r.started:.1f} s into round {r.number}: "
        self.journal.append(since + text)
