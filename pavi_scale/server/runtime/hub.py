"""The driver's side: a listener whose messages become events, and whose replies carry the state machine's instructions out."""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any

import cloudpickle
import numpy as np
from distributed import Client, Future
from distributed.comm import Comm, get_address_host, listen, unparse_host_port
from distributed.comm.addressing import parse_address

from pavi_scale.errors import InputError, PaviError, WorkerError
from pavi_scale.server.meter import Meter
from pavi_scale.server.protocol import (
    Assign,
    CompleteRound,
    Event,
    ExpireWorker,
    FailRound,
    Heartbeat,
    Ignore,
    Instruction,
    Ready,
    RoundCancelled,
    RoundStarted,
    TaskDone,
    TaskFailed,
    Tick,
    WorkerFailed,
    WorkerJoined,
    WorkerLeft,
)
from pavi_scale.server.runtime import page
from pavi_scale.server.runtime.desk import Desk
from pavi_scale.server.runtime.wire import Message, pack_object, rebuild, unpack
from pavi_scale.server.runtime.worker import Contact, worker_loop
from pavi_scale.server.state import ServerState

logger = logging.getLogger(__name__)
cloudpickle.register_pickle_by_value(page)
Inbox = SimpleQueue[tuple[int, dict[str, np.ndarray]] | PaviError]  # of a round: its answers with their tasks' numbers as they come, or what it failed of
HURRY = 0.25  # seconds between looks for new workers while there is none, and for a while after one was lost
HURRIED = 60.0  # seconds of that while
STARTING = 6.0  # seconds that closing waits for loops that just start: a fresh worker imports the package first


@dataclass(frozen=True)
class Order:
    """A round as it is sent: the machine only knows its number of tasks. Its number is the version of its state."""

    kind: str
    state: Message
    tasks: Sequence[Message]
    inbox: Inbox


@dataclass(frozen=True)
class Parked:
    """A worker's question that waits for a task: no polling, no delay."""

    reply: asyncio.Future[Message]
    holds: int


def listen_address(client: Client) -> str:
    """Where to listen: the interface by which the client reaches its scheduler, any port; never all interfaces."""
    local = client.scheduler_comm.comm.local_address
    scheme, _ = parse_address(local)
    return f"{scheme}://" if scheme == "inproc" else f"{scheme}://{unparse_host_port(get_address_host(local), 0)}"


def packed(spec: object) -> Message:
    """The computation's description as a message, code of the model with it.

    Raises:
        InputError: It cannot be pickled.
    """
    try:
        return pack_object(spec, cloudpickle.dumps)
    except Exception as error:  # the border to foreign code: whatever the laws hold is pickled
        got = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise InputError(
            "the model cannot be sent to workers", where="its laws", expected="laws that hold numbers, arrays, tensors and functions", got=got,
            remedy="take open files, locks, connections and generators out of the laws, or fit without a client",
        ) from error


class Hub:
    """Runs in the client's event loop; all its methods but the constructor are called there.

    Args:
        client: A synchronous client.
        spec: The computation, sent to each worker that joins.
        heartbeat: Seconds between a worker's heartbeats.
        timeout: Seconds of silence after which a worker is dead.
        startup: Seconds that a round waits for the very first worker.
        patience: Seconds that a round waits with no worker left.
    """

    def __init__(self, client: Client, spec: object, heartbeat: float, timeout: float, startup: float, patience: float) -> None:
        self.machine = ServerState(timeout=timeout, startup=startup, patience=patience)
        self.meter = Meter()
        self.address = self.page = ""
        self._client, self._desk, self._spec = client, Desk(client), packed(spec)
        self._heartbeat, self._timeout = heartbeat, timeout
        self._key = secrets.token_hex(16)
        self._loops: dict[str, Future] = {}
        self._call: Future | None = None  # for a worker, while there is none
        self._comms: set[Comm] = set()
        self._met: set[str] = set()
        self._told: set[str] = set()
        self._lifelines: dict[str, Comm] = {}
        self._parked: dict[str, Parked] = {}
        self._orders: dict[int, Order] = {}  # of open rounds, by number
        self._joins = self._starts = 0
        self._lost = -math.inf  # when a worker left
        self._closing = self._page_asked = False
        self._background: list[asyncio.Task[None]] = []

    @property
    def enlisted(self) -> int:
        """Workers of the cluster that have a loop, or will have one soon."""
        return len(self._loops)

    async def start(self) -> None:
        """Open the listener and start a loop on each worker."""
        self._listener = await listen(listen_address(self._client), self._serve, deserialize=False, **self._client.security.get_listen_args("client"))
        self.address = self._listener.contact_address
        if self.address.startswith("tcp://") and not get_address_host(self.address).startswith(("127.", "::1")):
            logger.warning("The client speaks plain TCP beyond this machine, and so must %s: anybody on the way can read and change a fit", self.address)
        await self._enlist()
        self._background = [
            asyncio.create_task(self._repeat(self._tick, lambda: self._heartbeat / 2)),
            asyncio.create_task(self._repeat(self._enlist, self._pace)),
        ]

    def begin(self, kind: str, state: Message, tasks: Sequence[Message], inbox: Inbox) -> None:
        """Start a round.

        Args:
            kind: What is asked.
            state: The packed state.
            tasks: The packed tasks.
            inbox: Where the answers, or the error, go.
        """
        if self._closing:
            inbox.put(WorkerError("the engine is closed", where="DaskEngine.round", remedy="make a new one"))
            return
        number = self.machine.rounds + 1
        self._orders[number] = Order(kind, state, tasks, inbox)
        self._handle(RoundStarted(kind, number, len(tasks)))

    async def publish(self, figures: dict[str, Any]) -> None:
        """Tell the scheduler's record of events, where its page finds them; adds the page first. A scheduler that is away misses them."""
        try:
            if not self._page_asked:
                self._page_asked = True
                self.page = await self._client.run_on_scheduler(page.install)
            await self._client.log_event(page.TOPIC, figures)
        except (OSError, ImportError, AttributeError, TypeError, ValueError, RuntimeError) as error:
            # An older Dask, or one that runs no foreign functions: the log and the terminal tell as much.
            logger.debug("no page on the scheduler: %r", error)

    def cancel(self) -> None:
        """Give the open rounds up."""
        for order in self._orders.values():
            order.inbox.put(WorkerError("the round was given up", where=f"round {order.kind!r}", remedy="make a new engine"))
        self._orders.clear()
        self._handle(RoundCancelled())

    async def close(self) -> None:
        """Stop the worker loops, then the listener. A loop in the middle of a task hears of it with its next heartbeat."""
        if self._closing:
            return
        self._closing = True
        self.cancel()
        for name in list(self._parked):
            self._reply(name, {"op": "stop"})
        # Loops that just start, or that are connecting again, are waited for: told nothing, they would look for the driver for a while.
        until = time.monotonic() + max(2 * self._heartbeat + 1.0, STARTING)
        while time.monotonic() < until and (self._lifelines or not all(loop.done() for label, loop in self._loops.items() if label not in self._told)):
            await asyncio.sleep(0.01)
        for task in self._background:
            task.cancel()
        self._listener.stop()
        for comm in list(self._comms):
            comm.abort()
        for future in self._loops.values():
            future.release()
        self._loops.clear()
        self._call = None
        await self._desk.close()

    async def _serve(self, comm: Comm) -> None:
        self._comms.add(comm)
        try:
            while True:
                message = await comm.read()
                reply = await self._answer(comm, message)
                await comm.write(reply)
                if reply["op"] == "refused":
                    break
        except OSError as error:  # CommClosedError is one: the worker died, or left
            logger.debug("connection from %s closed: %s", comm.peer_address, error)
        except (KeyError, TypeError, ValueError, AttributeError, WorkerError) as error:
            logger.warning("dropped the connection from %s: malformed message (%s: %s)", comm.peer_address, type(error).__name__, error)
        finally:
            self._comms.discard(comm)
            comm.abort()
            for name in [name for name, life in self._lifelines.items() if life is comm]:
                self._forget(name, "its connection closed")

    async def _answer(self, comm: Comm, message: Message) -> Message:
        op = message.get("op")
        if op == "heartbeat" and self._lifelines.get(message.get("worker", "")) is comm:
            self._handle(Heartbeat(message["worker"]))
            if self._closing:
                self._told.add(message["worker"].rpartition("#")[0])
            return {"op": "stop" if self._closing else "go"}
        if op == "heartbeat":
            return {"op": "rejoin"}
        if message.get("key") != self._key:
            logger.warning("refused a message from %s: it does not know this engine's key", comm.peer_address)
            return {"op": "refused"}
        if self._closing:
            self._told.add(message.get("label", ""))
            return {"op": "stop"}
        if op == "join":
            self._joins += 1
            name = f"{message['label']}#{self._joins}"
            self._met.add(message["label"])
            self._lifelines[name] = comm
            self._handle(WorkerJoined(name, message["process"]))
            return {"op": "joined", "worker": name}
        if op == "spec":
            return {"op": "spec", "spec": self._spec}
        if op == "broken":
            self._handle(WorkerFailed(message["worker"], rebuild(message["error"], f"worker {message['worker']}: building the computation")))
            return {"op": "stop"}
        if op == "exchange":
            return await self._exchange(message)
        return {"op": "refused"}

    async def _exchange(self, message: Message) -> Message:
        worker, push = message["worker"], message["push"]
        if push is not None:
            self._take(worker, push)
        if worker not in self.machine.workers:
            return {"op": "rejoin"}
        self._reply(worker, {"op": "rejoin"})  # an older question of the same worker is nobody's any more
        reply: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._parked[worker] = Parked(reply, message["holds"])
        self._handle(Ready(worker, message["seq"]))
        return await reply

    def _take(self, worker: str, push: Message) -> None:
        place = (worker, push["round"], push["index"], push["token"])
        if "error" in push:
            where = f"task {push['index']} of round {push['round']}, on {worker}"
            self._handle(TaskFailed(*place, error=rebuild(push["error"], where)))
        else:
            order, found = self._orders.get(push["round"]), unpack(push["result"])
            # The machine decides whether an answer counts; the answer itself goes to whoever waits for it, and is kept nowhere else.
            if self._handle(TaskDone(*place, result=None)) and order is not None:
                order.inbox.put((push["index"], found))

    def _handle(self, event: Event) -> bool:
        """Whether the event had an effect."""
        now = time.monotonic()
        out = self.machine.handle(event, now)
        self.meter.observe(event, out, now)
        for instruction in out:
            self._execute(instruction)
        return not any(isinstance(instruction, Ignore) for instruction in out)

    def _execute(self, instruction: Instruction) -> None:
        match instruction:
            case Assign():
                self._assign(instruction)
            case CompleteRound(round=number):
                self._orders.pop(number, None)
            case FailRound(round=number, error=error):
                if number in self._orders:
                    self._orders.pop(number).inbox.put(error)
            case ExpireWorker(worker=worker):
                if worker in self._lifelines:
                    self._lifelines.pop(worker).abort()
                self._lost = time.monotonic()
                self._reply(worker, {"op": "rejoin"})

    def _assign(self, lease: Assign) -> None:
        order, parked = self._orders.get(lease.round), self._parked.get(lease.worker)
        if order is None or parked is None:
            return
        message = {"op": "task", "round": lease.round, "index": lease.index, "token": lease.token, "kind": order.kind}
        if parked.holds != lease.round:  # each round has a state of its own
            message |= {"version": lease.round, "state": order.state}
        self._reply(lease.worker, message | {"task": order.tasks[lease.index]})

    def _reply(self, worker: str, message: Message) -> None:
        parked = self._parked.pop(worker, None)
        if parked is not None and not parked.reply.done():
            parked.reply.set_result(message)

    def _forget(self, worker: str, reason: str) -> None:
        self._lifelines.pop(worker, None)
        self._lost = time.monotonic()
        self._reply(worker, {"op": "rejoin"})
        self._handle(WorkerLeft(worker, reason))

    async def _repeat(self, what: Callable[[], Coroutine[Any, Any, None]], seconds: Callable[[], float]) -> None:
        while True:
            await asyncio.sleep(seconds())
            try:
                await what()
            except OSError as error:  # the scheduler is away: rounds go on without it
                logger.debug("no word from the scheduler: %s", error)

    async def _tick(self) -> None:
        self._handle(Tick(expected=len(set(self._loops) - self._met)))

    def _pace(self) -> float:
        """Seconds to the next look for workers: one that takes a lost one's place should not have to wait for work."""
        missed = not self.machine.workers or time.monotonic() - self._lost < HURRIED
        return min(HURRY, self._heartbeat) if missed else self._heartbeat

    async def _enlist(self) -> None:
        """Start a loop on each worker that has none; forget the loops of workers that the scheduler lost."""
        client = await self._desk.client()
        addresses = set(await client.scheduler.ncores())
        contact = Contact(self.address, self._key, self._heartbeat, self._timeout, 4 * self._timeout)
        for address in addresses - set(self._loops) if self.machine.broken is None else ():
            self._starts += 1
            # A new key each time: Dask would answer a known one with the old loop's result.
            key = f"pavi-loop-{self._key[:8]}-{self._starts}-{address}"
            loop = client.submit(worker_loop, contact, key=key, workers=[address], allow_other_workers=False, pure=False, retries=0)
            self._loops[address] = loop
            loop.add_done_callback(partial(self._loop_done, address))
        for address in set(self._loops) - addresses:
            self._loops.pop(address).release()
        if addresses:
            self._call = None
        elif self._call is None or self._call.status != "pending":  # an adaptive cluster starts workers for tasks that wait: loops wait for workers
            self._call = client.submit(int, key=f"pavi-call-{self._key[:8]}-{time.monotonic()}", pure=False)

    def _loop_done(self, address: str, loop: Future) -> None:
        # Called in a thread of Dask's; a loop that ended early is started again by the next `_enlist`.
        reason = f"{address}: its loop failed: {loop.exception()!r}" if loop.status == "error" else None
        self._client.loop.add_callback(self._retire, address, loop, reason)

    def _retire(self, address: str, loop: Future, reason: str | None) -> None:
        if not self._closing and self._loops.get(address) is loop:
            del self._loops[address]
            if reason is not None:
                logger.warning("%s", reason)
                self.machine.journal.append(reason)
