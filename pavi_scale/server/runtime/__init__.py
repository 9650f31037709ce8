"""The engine for a Dask cluster: a thin runtime that feeds the server's state machine and carries its instructions out."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any

import dask.config
import numpy as np
from distributed import Client

from pavi_scale.errors import ClusterLost, InputError, PaviError, WorkerError
from pavi_scale.server.answer import align_all
from pavi_scale.server.meter import Meter
from pavi_scale.server.protocol import Spec
from pavi_scale.server.runtime.hub import Hub, Inbox
from pavi_scale.server.runtime.wire import pack, pack_object

__all__ = ["Client", "DaskEngine"]


@dataclass(frozen=True, slots=True)
class Pending:
    """A round that workers answer."""

    engine: DaskEngine
    kind: str
    count: int
    inbox: Inbox

    def result(self) -> list[dict[str, np.ndarray]]:
        """Its answers, in task order; blocks."""
        return list(self)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """Its answers, in task order; blocks until the next one is there, and keeps only those that are ahead of it."""
        early: dict[int, dict[str, np.ndarray]] = {}
        for index in range(self.count):
            while index not in early:
                early.update([self.engine.wait(self.kind, self.inbox)])
            yield early.pop(index)
        self.inbox.put(WorkerError("the answers were handed over already", where=f"round {self.kind!r}", remedy="keep them"))


class DaskEngine:
    """Answers rounds on the workers of a Dask cluster.

    The driver listens next to its client (same interface, same TLS); one long Dask task per worker pulls tasks from it. Nothing passes through
    the scheduler but the start of these loops and, every few seconds, the figures of its page, so a round goes on while the scheduler is away.
    Workers may come and go at any time.

    Args:
        client: A synchronous `distributed.Client`.
        spec: The computation; pickled to each worker once.
        heartbeat: Seconds between a worker's heartbeats.
        timeout: Seconds of silence after which a worker is dead and its tasks go to others.
        startup: Seconds that a round waits for the very first worker.
        patience: Seconds that a round waits with no worker left; None for `timeout`, or for what the cluster that `pavi-scale` started says.

    Raises:
        InputError: The client is asynchronous or closed.
    """

    def __init__(
        self, client: Client, spec: Spec, *, heartbeat: float = 2.0, timeout: float = 12.0, startup: float = 60.0, patience: float | None = None
    ) -> None:
        if client.asynchronous or client.status != "running":
            raise InputError("the client cannot be used", where="DaskEngine(client=...)", expected="a running, synchronous Client", got=repr(client))
        self._client = client
        if patience is None:
            patience = float(dask.config.get("pavi-scale.patience", timeout))
        self._hub = Hub(client, spec, heartbeat, timeout, startup, patience)
        client.sync(self._hub.start)

    @property
    def address(self) -> str:
        """Where the driver listens."""
        return self._hub.address

    @property
    def meter(self) -> Meter:
        """What the workers do with their time."""
        return self._hub.meter

    def publish(self, figures: dict[str, Any]) -> str:
        """Show figures of this fit on the page of the scheduler's HTTP server; returns its address, empty while it is not known, at once."""
        if self._alive():
            self._client.loop.add_callback(self._hub.publish, figures)
        return self._hub.page

    @property
    def parallelism(self) -> int:
        """Tasks that run at the same time: one per worker of the cluster."""
        return max(1, self._hub.enlisted)

    @property
    def processes(self) -> int:
        """Computations, each with memory of its own: one per worker."""
        return self.parallelism

    @property
    def ignored(self) -> dict[str, int]:
        """Messages that had no effect, by reason: repeated, late, from expired workers."""
        return dict(self._hub.meter.ignored)

    def round(self, kind: str, state: Mapping[str, np.ndarray], tasks: Sequence[Mapping[str, Any]]) -> list[dict[str, np.ndarray]]:
        """The answers to `tasks`, in their order; blocks.

        Args:
            kind: What is asked.
            state: Named arrays that all tasks share; sent to each worker once. Must not change before the round ends.
            tasks: One picklable mapping per task.

        Raises:
            PaviError: As raised by the computation on a worker (same type, the package's own).
            WorkerError: The computation raised anything else.
            ClusterLost: No worker is left, or the client was closed.
        """
        return self.submit(kind, state, tasks).result()

    def submit(self, kind: str, state: Mapping[str, np.ndarray], tasks: Sequence[Mapping[str, Any]]) -> Pending:
        """Ask, and wait later; arguments and errors as those of `round`."""
        if not self._alive() or self._client.status in ("closing", "closed"):
            raise ClusterLost("the client was closed", where=f"round {kind!r}", remedy="keep the client open while the engine is used")
        inbox: Inbox = SimpleQueue()
        self._client.loop.add_callback(self._hub.begin, kind, pack(align_all(state)), [pack_object(dict(task)) for task in tasks], inbox)
        return Pending(self, kind, len(tasks), inbox)

    def stream(self, kind: str, state: Mapping[str, np.ndarray], tasks: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, np.ndarray]]:
        """The answers one by one, in task order; arguments and errors as those of `round`."""
        return iter(self.submit(kind, state, tasks))

    def wait(self, kind: str, inbox: Inbox) -> tuple[int, dict[str, np.ndarray]]:
        """The next answer that comes in a round of that kind, with its task's number; an interrupt ends the engine."""
        try:
            while True:
                try:
                    found = inbox.get(timeout=5.0)
                except Empty:
                    if not self._alive():
                        raise ClusterLost("the client was closed", where=f"round {kind!r}", remedy="keep the client open while the engine is used") from None
                    continue
                if isinstance(found, PaviError):
                    inbox.put(found)  # whoever asks again is told again
                    raise found
                return found
        except KeyboardInterrupt:
            self.close()
            raise

    def _alive(self) -> bool:
        loop = self._client.loop
        return bool(loop is not None and loop.asyncio_loop.is_running())

    def close(self) -> None:
        """End the worker loops and the listener."""
        if self._alive():  # also when the client has lost its scheduler
            asyncio.run_coroutine_threadsafe(self._hub.close(), self._client.loop.asyncio_loop).result()

    def __enter__(self) -> DaskEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
