"""The worker's side: one long task that asks the driver for work, computes, and pushes answers until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
from distributed import Status, Worker, get_worker, secede
from distributed.comm import Comm, connect

from pavi_scale.errors import InputError
from pavi_scale.server.answer import answer, blas_threads, taking_turns, torch_threads
from pavi_scale.server.protocol import Computation, Spec
from pavi_scale.server.runtime.wire import Message, ask, describe, pack, unpack, unpack_object

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Contact:
    """How a worker reaches the driver.

    Args:
        address: The driver's listener.
        key: Secret of this engine; messages without it are refused.
        heartbeat: Seconds between heartbeats.
        timeout: Seconds without an answer after which a connection counts as lost.
        patience: Seconds without any contact after which the driver counts as gone.
    """

    address: str
    key: str
    heartbeat: float
    timeout: float
    patience: float


class Link:
    """Two connections to the driver, on an event loop in a thread of their own: one for heartbeats, one for work.

    Compute and the Dask worker's own event loop cannot hold heartbeats up, nor can a large answer under way.
    When either connection breaks, both are opened again and the worker joins under a new name.
    """

    def __init__(self, contact: Contact, name: str, connection_args: dict[str, Any]) -> None:
        self._contact, self._label, self._args = contact, name, connection_args
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="pavi-link", daemon=True)
        self._life: Comm | None = None
        self._work: Comm | None = None
        self._name, self._process = "", secrets.token_hex(8)
        self._seq = 0
        self._finished = False
        self._joined, self._wake, self._ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    def __enter__(self) -> Link:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._finish)
        self._wait(self._ended.wait())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def spec(self) -> Message | None:
        """The computation's description, packed; None when told to stop."""
        reply = self._wait(self._call("spec"))
        return None if reply is None else reply["spec"]

    def exchange(self, holds: int, push: Message | None) -> Message | None:
        """Hand in an answer and wait for the next task; None when told to stop.

        Args:
            holds: Version of the state that this worker has.
            push: The answer to the task before, if any. Sent again when the connection breaks; the driver takes it once.
        """
        self._seq += 1
        return self._wait(self._call("exchange", seq=self._seq, holds=holds, push=push))

    def broken(self, error: Exception) -> None:
        """Say that the computation cannot be built here."""
        self._wait(self._call("broken", error=describe(error)))

    def _wait(self, call: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(call, self._loop).result()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        live = self._loop.create_task(self._live())  # held here: the loop itself only keeps weak references
        live.add_done_callback(self._live_ended)
        self._loop.run_forever()

    def _live_ended(self, live: asyncio.Task[None]) -> None:
        self._finish()
        self._ended.set()

    async def _live(self) -> None:
        contact = time.monotonic()
        while not self._finished:
            try:
                # Dask's handshake has no time limit of its own: a stopped driver's socket still accepts connections.
                life = await asyncio.wait_for(self._join(), self._contact.timeout)
                while not self._finished:
                    reply = await asyncio.wait_for(ask(life, op="heartbeat", worker=self._name), self._contact.timeout)
                    contact = time.monotonic()
                    if reply["op"] == "stop":
                        self._finish()
                    elif reply["op"] == "rejoin":
                        break
                    else:
                        await self._pause(self._contact.heartbeat)
            except OSError as error:  # CommClosedError and TimeoutError are among them
                silent = time.monotonic() - contact
                if silent > self._contact.patience:
                    logger.warning("No contact with the driver at %s for %.0f s (%s): the worker loop ends", self._contact.address, silent, error)
                    self._finish()
            finally:
                self._reset()
            await self._pause(min(0.1, self._contact.heartbeat))

    async def _pause(self, seconds: float) -> None:
        # Ends early when the link is finished or a connection was found broken.
        self._wake.clear()
        if not self._finished:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), seconds)

    async def _join(self) -> Comm:
        timeout = self._contact.timeout
        self._life = life = await connect(self._contact.address, timeout=timeout, deserialize=False, **self._args)
        self._work = await connect(self._contact.address, timeout=timeout, deserialize=False, **self._args)
        reply = await asyncio.wait_for(ask(life, op="join", key=self._contact.key, label=self._label, process=self._process), timeout)
        if reply["op"] == "joined":
            self._name = reply["worker"]
            self._joined.set()
        else:
            self._finish()
        return life

    def _reset(self) -> None:
        if not self._finished:
            self._joined.clear()
        for comm in (self._life, self._work):
            if comm is not None:
                comm.abort()
        self._life = self._work = None

    def _finish(self) -> None:
        self._finished = True
        self._joined.set()
        self._wake.set()
        if self._work is not None:
            self._work.abort()

    async def _call(self, op: str, **message: Any) -> Message | None:
        while True:
            await self._joined.wait()
            comm = self._work
            if self._finished or comm is None:
                return None
            try:
                reply = await ask(comm, op=op, key=self._contact.key, worker=self._name, **message)
            except OSError:
                # Both connections go; `_live` opens them again and the same message is sent under the new name.
                self._lost(comm)
                continue
            if reply["op"] == "stop":
                self._finish()
                return None
            if reply["op"] == "rejoin":
                self._lost(comm)
                continue
            return reply

    def _lost(self, comm: Comm) -> None:
        if comm is self._work and not self._finished:
            self._joined.clear()
            self._wake.set()
            for open_comm in (self._life, comm):
                if open_comm is not None:
                    open_comm.abort()


def worker_loop(contact: Contact) -> int:
    """Answer tasks until the driver says stop or is gone.

    Args:
        contact: How to reach the driver.

    Returns:
        Number of tasks that were computed.
    """
    worker = get_worker()
    # A task of the whole run's length must not hold the worker's only slot.
    secede()
    with Link(contact, worker.address, worker.connection_args) as link:
        packed = link.spec()
        if packed is None:
            return 0
        try:
            spec: Spec = unpack_object(packed)
        except Exception as error:  # the border to foreign code: the model's own modules are imported now
            if not _ending(worker):
                link.broken(_unknown(error, worker.address))
            return 0
        threads = getattr(spec, "threads", None)
        with torch_threads(threads), blas_threads(threads), taking_turns():
            try:
                computation = spec.build()
            except Exception as error:  # the border to foreign code: the driver raises it
                if not _ending(worker):
                    link.broken(error)
                return 0
            return _work(link, computation, lambda: _ending(worker))


def _unknown(error: Exception, address: str) -> InputError:
    got = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return InputError(
        "a worker cannot load the model", where=address, expected="the modules that define its laws, importable there as they are here", got=got,
        remedy="install them on the workers, start those in a folder that holds them, or client.upload_file(...); laws written as lambdas travel by themselves",
    )


def _ending(worker: Worker) -> bool:
    """Whether the process is about to end, as it does when its scheduler is gone: threads and executors fail by then, and that is no fault of the task."""
    return worker.status in (Status.closing, Status.closed, Status.failed)


def _work(link: Link, computation: Computation, ending: Callable[[], bool] = lambda: False) -> int:
    state: dict[str, np.ndarray] = {}
    version, done = 0, 0
    push: Message | None = None
    while (order := link.exchange(version, push)) is not None:
        if "state" in order:
            version, state = order["version"], unpack(order["state"])
        push = {name: order[name] for name in ("round", "index", "token")}
        try:
            push["result"] = pack(answer(computation, order["kind"], state, unpack_object(order["task"])))
        except Exception as error:  # the border to foreign code: the driver raises it
            if ending():  # the connection goes with the link, and the task to another worker
                break
            push["error"] = describe(error)
        done += 1
    return done
