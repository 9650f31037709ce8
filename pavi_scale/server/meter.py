"""What the workers of a run do with their time, told from the state machine's events and instructions alone."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pavi_scale.server.protocol import (
    Assign,
    CompleteRound,
    Event,
    ExpireWorker,
    FailRound,
    Ignore,
    Instruction,
    RoundCancelled,
    RoundStarted,
    TaskDone,
    TaskFailed,
    WorkerJoined,
    WorkerLeft,
)

NAMED = 16  # workers up to which each has its own figure in a snapshot


@dataclass(slots=True)
class Share:
    """One worker's account: seconds since `seen` of which `busy` on tasks, `tasks` of them; `lease` is the task it has now, since `leased`."""

    seen: float
    busy: float = 0.0
    tasks: int = 0
    lease: tuple[int, int] | None = None
    leased: float = 0.0


class Meter:
    """Watches a `ServerState`; `observe` is called after each of its events, in one thread, the rest in any."""

    def __init__(self) -> None:
        self.rounds = self.tasks = 0
        self._open = 0
        self.ignored: Counter[str] = Counter()
        self._workers: dict[str, Share] = {}
        self._lost: dict[tuple[int, int], float] = {}
        self._news: deque[dict[str, Any]] = deque(maxlen=4096)
        self._before = (0.0, 0, 0)

    def observe(self, event: Event, out: Sequence[Instruction], now: float) -> None:
        """Account for one event, what the machine made of it, and when."""
        ignored = any(isinstance(instruction, Ignore) for instruction in out)
        match event:
            case WorkerJoined(worker=worker) if not ignored:
                self._workers[worker] = Share(now)
                self._tell("worker joined", worker=worker)
            case WorkerLeft(worker=worker, reason=reason) if not ignored:
                self._leave(worker, reason, now)
            case TaskDone() if not ignored:
                self._done(event, now)
            case RoundStarted():
                self._open += 1
            case RoundCancelled():
                self._open = 0
        for instruction in out:
            match instruction:
                case Assign():
                    self._assign(instruction, now)
                case ExpireWorker(worker=worker, reason=reason):
                    self._leave(worker, reason, now)
                case CompleteRound():
                    self.rounds += 1
                    if self.rounds == 1:
                        self._tell("first round done")
                case Ignore(reason=reason):
                    self.ignored[reason] += 1
                case FailRound(error=error):
                    self._tell("round failed", error=str(error))
        ended = {instruction.round for instruction in out if isinstance(instruction, CompleteRound | FailRound)}
        self._open = max(0, self._open - len(ended))
        if ended:
            self._lost = {lease: since for lease, since in self._lost.items() if lease[0] not in ended}
            for share in self._workers.values():
                if share.lease is not None and share.lease[0] in ended:
                    self._release(share, now)

    def _tell(self, event: str, **fields: Any) -> None:
        # The time is that of the event, by the clock of the log: who writes it there comes by once a second, or later on a busy machine.
        self._news.append({"event": event, "time": time.time(), **fields})

    def _assign(self, lease: Assign, now: float) -> None:
        share = self._workers.get(lease.worker)
        if share is not None and share.lease != (lease.round, lease.index):
            share.lease, share.leased = (lease.round, lease.index), now

    def _release(self, share: Share, now: float) -> None:
        if share.lease is not None:
            share.busy += now - share.leased
            share.lease = None

    def _done(self, event: TaskDone | TaskFailed, now: float) -> None:
        self.tasks += 1
        share = self._workers.get(event.worker)
        if share is not None:
            self._release(share, now)
            share.tasks += 1
            if share.tasks == 1:
                self._tell("worker answered", worker=event.worker, seconds=round(now - share.seen, 3))
        since = self._lost.pop((event.round, event.index), None)
        if since is not None:
            self._tell("task recovered", round=event.round, task=event.index, worker=event.worker, seconds=round(now - since, 3))

    def _leave(self, worker: str, reason: str, now: float) -> None:
        share = self._workers.pop(worker, None)
        if share is None:
            return
        self._tell("worker left", worker=worker, reason=reason, task=None if share.lease is None else share.lease[1])
        if share.lease is not None:
            self._lost[share.lease] = now

    def news(self) -> list[dict[str, Any]]:
        """What happened since the last call, and when: workers that joined, first answered or left, lost tasks that were recovered, failed rounds."""
        found = []
        while self._news:
            found.append(self._news.popleft())
        return found

    def snapshot(self, now: float) -> dict[str, Any]:
        """Workers, rounds and tasks so far, both per second since the last snapshot, and the share of its time that each worker has waited for a task.

        `ahead` is how many rounds are open beside the oldest one, as by staleness; `ignored` counts messages that had no effect, by reason: repeated,
        late, from workers that had expired.
        """
        waiting = {name: round(self._waiting(share, now), 3) for name, share in list(self._workers.items())}
        then, tasks, rounds = self._before
        self._before = (now, self.tasks, self.rounds)
        seconds = max(now - then, 1e-9)
        found: dict[str, Any] = {"workers": len(waiting), "rounds": self.rounds, "tasks": self.tasks, "ahead": max(0, self._open - 1)}
        if self.ignored:
            found["ignored"] = dict(self.ignored)
        if then:
            found |= {"rounds_per_second": round((self.rounds - rounds) / seconds, 2), "tasks_per_second": round((self.tasks - tasks) / seconds, 2)}
        if waiting:
            found["waiting"] = {"mean": round(sum(waiting.values()) / len(waiting), 3), "most": max(waiting.values())}
        return found | ({"waiting_of": waiting} if len(waiting) <= NAMED else {})

    @staticmethod
    def _waiting(share: Share, now: float) -> float:
        busy = share.busy + (now - share.leased if share.lease is not None else 0.0)
        return min(1.0, max(0.0, 1.0 - busy / max(now - share.seen, 1e-9)))
