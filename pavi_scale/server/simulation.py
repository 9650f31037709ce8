"""Scale on paper: a discrete-event simulation of driver, links and workers around the very state machine that runs them.

Three things of the driver are scarce: its event loop (one core), its outgoing link (states, tasks) and its incoming link (answers). Each serves one message
at a time. Workers compute for log-normal times, some are stragglers, some are preempted and come back. Who does what is decided by `ServerState`.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from pavi_scale.errors import PaviError
from pavi_scale.server.meter import Meter
from pavi_scale.server.protocol import Assign, CompleteRound, Event, FailRound, Heartbeat, Ready, RoundStarted, TaskDone, Tick, WorkerJoined, WorkerLeft
from pavi_scale.server.state import ServerState

LATENCY = 1e-4  # seconds of one message on its way
HEARTBEAT = 2.0


@dataclass(frozen=True)
class Costs:
    """What a round asks of everybody.

    Args:
        tasks: Tasks of a round.
        task_seconds: Of one task on one worker, on average.
        state_bytes: Of the state, which each worker pulls once a round.
        answer_bytes: Of one answer.
        exchange_seconds: Of the driver's event loop, for one question with its answer.
        byte_seconds: Of the driver's event loop, for one byte in or out.
        reduce_seconds: Of the driver between rounds, for each task.
        spread: Standard deviation of the logarithm of a task's time.
        lengths: Of each task, in averages; none where all are alike.
    """

    tasks: int
    task_seconds: float
    state_bytes: float = 1e5
    answer_bytes: float = 1e4
    exchange_seconds: float = 5e-4
    byte_seconds: float = 1e-9
    reduce_seconds: float = 1e-5
    spread: float = 0.1
    lengths: tuple[float, ...] = ()


@dataclass(frozen=True)
class Fleet:
    """Who computes.

    Args:
        workers: How many.
        gigabits: A second, of the driver's link, each way.
        stragglers: Share of the workers that are slow.
        slowness: How many times slower they are.
        preemptions: Workers killed a minute, in all.
        absence: Seconds until a killed one is back.
    """

    workers: int
    gigabits: float = 10.0
    stragglers: float = 0.0
    slowness: float = 4.0
    preemptions: float = 0.0
    absence: float = 30.0


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Args:
        round_seconds: Of one round, on average.
        efficiency: Share of the workers' time that went into tasks of which the answer was taken.
        busy: Share of the time that each scarce thing was busy: "event loop", "link out", "link in", "reduction", "workers".
        lost: Tasks lost with their workers.
    """

    round_seconds: float
    efficiency: float
    busy: dict[str, float]
    lost: int

    @property
    def saturated(self) -> str:
        """What was busiest."""
        return max(self.busy, key=lambda name: self.busy[name])


@dataclass(slots=True)
class _Worker:
    """A simulated worker: its name changes with each life, its speed does not."""

    number: int
    slowness: float
    life: int = 0
    seq: int = 0
    holds: int = 0

    @property
    def name(self) -> str:
        return f"w{self.number}#{self.life}"


@dataclass
class Simulation:
    """One run of `rounds` rounds.

    Args:
        costs: Of a round.
        fleet: Who computes.
        rounds: How many.
        seed: Of times and preemptions.
        staleness: Rounds that are open ahead of the oldest one; each reads the state as it is then.
    """

    costs: Costs
    fleet: Fleet
    rounds: int = 5
    seed: int = 0
    staleness: int = 0
    server: ServerState = field(default_factory=lambda: ServerState(max_losses=10**6, patience=1e9))
    meter: Meter = field(default_factory=Meter)

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(self.seed)
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order, self._now = itertools.count(), 0.0
        self._free: defaultdict[str, float] = defaultdict(float)
        self._busy: defaultdict[str, float] = defaultdict(float)
        self._useful, self._asked, self._applied, self._lost = 0.0, 0, 0, 0
        self._answered: set[int] = set()
        slow = round(self.fleet.stragglers * self.fleet.workers)
        self._workers = {n: _Worker(n, self.fleet.slowness if n < slow else 1.0) for n in range(self.fleet.workers)}
        self._spent: dict[tuple[int, int, int], float] = {}

    def run(self) -> Outcome:
        """Play it to the end.

        Raises:
            PaviError: A round failed: a defect of the state machine.
        """
        for _ in range(1 + self.staleness):
            self._at(0.0, self._start)
        for worker in self._workers.values():
            self._at(0.0, lambda w=worker: self._join(w))  # type: ignore[misc]
        self._at(HEARTBEAT, self._beat)
        if self.fleet.preemptions > 0:
            self._at(float(self._rng.exponential(60.0 / self.fleet.preemptions)), self._preempt)
        while self._applied < self.rounds:
            self._now, _, action = heapq.heappop(self._queue)
            action()
        seconds = max(self._now, 1e-12)
        busy = {name: self._busy[name] / seconds for name in ("event loop", "link out", "link in", "reduction")}
        efficiency = self._useful / (seconds * self.fleet.workers)
        return Outcome(seconds / self.rounds, efficiency, busy | {"workers": efficiency}, self._lost)

    def _at(self, delay: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (self._now + delay, next(self._order), action))

    def _serve(self, name: str, seconds: float, after: float) -> float:
        """Occupy a scarce thing, from `after` seconds on at the earliest; returns the delay until it is done."""
        begin = max(self._now + after, self._free[name])
        self._free[name] = begin + seconds
        self._busy[name] += seconds
        return begin + seconds - self._now

    def _wire(self, size: float) -> float:
        return size * 8e-9 / self.fleet.gigabits

    def _handle(self, event: Event) -> None:
        out = self.server.handle(event, self._now)
        self.meter.observe(event, out, self._now)
        for instruction in out:
            match instruction:
                case Assign():
                    self._send(instruction)
                case CompleteRound(round=number):
                    self._answered.add(number)
                    while self._applied + 1 in self._answered:  # in the order in which they were asked for
                        self._applied += 1
                        self._at(self._serve("reduction", self.costs.reduce_seconds * self.costs.tasks, 0.0), self._start)
                case FailRound(error=error):
                    raise PaviError("a simulated round failed", where=f"round {instruction.round}", got=error)

    def _start(self) -> None:
        if self._asked < self.rounds:
            self._asked += 1
            self._handle(RoundStarted("simulated", self._asked, self.costs.tasks))

    def _join(self, worker: _Worker) -> None:
        worker.life, worker.seq, worker.holds = worker.life + 1, 0, 0
        self._handle(WorkerJoined(worker.name))
        self._ask(worker, worker.life)

    def _ask(self, worker: _Worker, life: int) -> None:
        if worker.life == life:
            worker.seq += 1
            self._handle(Ready(worker.name, worker.seq))

    def _send(self, lease: Assign) -> None:
        """The order waits for the event loop, then for the link; then the worker computes."""
        worker = self._workers[int(lease.worker[1:].partition("#")[0])]
        size = 1000.0 + (self.costs.state_bytes if worker.holds != lease.round else 0.0)
        worker.holds = lease.round
        packed = self._serve("event loop", 0.5 * self.costs.exchange_seconds + size * self.costs.byte_seconds, 0.0)
        sent = self._serve("link out", self._wire(size), packed)
        spread = self.costs.spread
        length = self.costs.lengths[lease.index] if self.costs.lengths else 1.0
        seconds = length * self.costs.task_seconds * worker.slowness * math.exp(spread * self._rng.standard_normal() - spread**2 / 2)
        self._spent[worker.number, worker.life, lease.token] = seconds
        self._at(sent + LATENCY + seconds, lambda: self._push(worker, worker.name, lease))

    def _push(self, worker: _Worker, name: str, lease: Assign) -> None:
        if worker.name != name or name not in self.server.workers:
            return  # killed meanwhile
        received = self._serve("link in", self._wire(self.costs.answer_bytes), LATENCY)
        unpacked = self._serve("event loop", 0.5 * self.costs.exchange_seconds + self.costs.answer_bytes * self.costs.byte_seconds, received)
        self._at(unpacked, lambda: self._take(worker, worker.life, lease))

    def _take(self, worker: _Worker, life: int, lease: Assign) -> None:
        before = self.meter.tasks
        self._handle(TaskDone(lease.worker, lease.round, lease.index, lease.token, None))
        if self.meter.tasks > before:
            self._useful += self._spent.pop((worker.number, life, lease.token))
        self._ask(worker, life)

    def _beat(self) -> None:
        for worker in self._workers.values():
            if worker.name in self.server.workers:
                self._handle(Heartbeat(worker.name))
        self._handle(Tick())
        self._at(HEARTBEAT, self._beat)

    def _preempt(self) -> None:
        """A worker is killed: its connection closes, and another one takes its place after a while."""
        alive = [w for w in self._workers.values() if w.name in self.server.workers]
        if alive:
            worker = alive[int(self._rng.integers(len(alive)))]
            self._lost += self.server.workers[worker.name].lease is not None
            name, worker.life = worker.name, worker.life + 1
            self._handle(WorkerLeft(name, "preempted"))
            self._at(self.fleet.absence, lambda: self._join(worker))
        self._at(float(self._rng.exponential(60.0 / self.fleet.preemptions)), self._preempt)


def simulate(costs: Costs, fleet: Fleet, rounds: int = 5, seed: int = 0, staleness: int = 0) -> Outcome:
    """Play some rounds.

    Args:
        costs: What a round asks of everybody.
        fleet: Who computes.
        rounds: How many.
        seed: Of times and preemptions.
        staleness: Rounds that are open ahead of the oldest one.

    Example:
        >>> alone = simulate(Costs(tasks=64, task_seconds=0.1), Fleet(workers=1))
        >>> many = simulate(Costs(tasks=64, task_seconds=0.1), Fleet(workers=8))
        >>> 7.0 < alone.round_seconds / many.round_seconds < 8.0
        True
    """
    return Simulation(costs, fleet, rounds, seed, staleness).run()
