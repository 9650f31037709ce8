"""Between driver and workers, a proxy that repeats, holds back, delays and cuts: the answers are those of a sequential oracle, bit for bit."""

import asyncio
import contextlib
import threading
import time
from collections import deque

import numpy as np
import pytest
from distributed import Client, LocalCluster
from distributed.comm import connect, listen
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from pavi_scale.server.local import LocalEngine
from pavi_scale.server.runtime import DaskEngine
from pavi_scale.server.runtime.wire import unpack_object
from pavi_scale.server.runtime.worker import Contact, Link, _work
from pavi_scale.server.state import ServerState

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning"),
]
FAULTS = ("pass", "delay", "cut before", "cut after", "cut acknowledgement", "repeat", "hold back")


class Proxy:
    """Forwards messages between workers and the driver; each message that passes takes the next fault of `plan`."""

    def __init__(self, target):
        self.target, self.plan, self.done = target, deque(), deque(maxlen=10**6)
        self.held = deque(maxlen=50)
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.listener = asyncio.run_coroutine_threadsafe(self.open(), self.loop).result(10)
        self.address = self.listener.contact_address
        self.replays = set()

    async def open(self):
        return await listen("tcp://127.0.0.1:0", self.serve, deserialize=False)

    async def serve(self, below):
        above = None
        try:
            above = await connect(self.target, timeout=5, deserialize=False)
            while True:
                question = await below.read()
                fault = self.plan.popleft() if self.plan else "pass"
                self.done.append(fault)
                if fault == "cut before":
                    break
                if fault == "delay":
                    await asyncio.sleep(0.03)
                if fault == "hold back":  # sent again later, after others
                    self.held.append(question)
                if fault == "repeat":
                    await self.replay(question)
                await above.write(question)
                if fault == "cut after":
                    break
                answer = await above.read()
                if fault == "cut acknowledgement":
                    break
                await below.write(answer)
                if self.held and self.done[-1] != "hold back":
                    task = asyncio.create_task(self.replay(self.held.popleft()))
                    self.replays.add(task)
                    task.add_done_callback(self.replays.discard)
        except OSError:
            pass
        finally:
            for comm in (below, above):
                if comm is not None:
                    comm.abort()

    async def replay(self, message):
        """The same message once more, on a connection of its own; nobody reads the answer."""
        with contextlib.suppress(OSError):
            comm = await connect(self.target, timeout=5, deserialize=False)
            await comm.write(message)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(comm.read(), 0.02)
            comm.abort()

    def close(self):
        self.loop.call_soon_threadsafe(self.listener.stop)
        self.loop.call_soon_threadsafe(self.loop.stop)


class Bench:
    """A driver, the proxy, and worker loops in threads of this process, over real connections."""

    def __init__(self, client, spec):
        self.engine = DaskEngine(client, spec, heartbeat=0.02, timeout=1.0, patience=30.0)
        self.hub = self.engine._hub
        self.proxy = Proxy(self.engine.address)
        self.oracle = LocalEngine(spec)
        self.links, self.asked = [], 0

    def join(self):
        contact = Contact(self.proxy.address, self.hub._key, 0.02, 1.0, 60.0)
        link = Link(contact, f"thread{len(self.links)}", {})
        link.dead = False
        thread = threading.Thread(target=self.work, args=[link], daemon=True)
        self.links.append((link, thread))
        thread.start()
        return link

    @staticmethod
    def work(link):
        with link:
            packed = link.spec()
            if packed is not None:
                _work(link, unpack_object(packed).build())

    def alive(self):
        return [link for link, thread in self.links if thread.is_alive() and not link.dead]

    @staticmethod
    def kill(link):
        """As SIGKILL would: no goodbye, both connections cut, whatever was computed is lost."""
        link.dead = True

        def cut():
            link._finish()
            for comm in (link._life, link._work):
                if comm is not None:
                    comm.abort()

        link._loop.call_soon_threadsafe(cut)

    def round(self, tasks, scale):
        before, self.asked = self.asked, None  # of a round that fails nobody knows how many answers were taken
        state = {"w": np.linspace(-scale, scale, 37 * 5).reshape(37, 5)}
        found, expected = self.engine.round("numeric", state, tasks), self.oracle.round("numeric", state, tasks)
        assert [{k: (a.dtype.str, a.shape, a.tobytes()) for k, a in r.items()} for r in found] == [
            {k: (a.dtype.str, a.shape, a.tobytes()) for k, a in r.items()} for r in expected
        ]
        # Neither lost nor doubled: as many answers were taken as were asked for.
        self.asked = self.engine.meter.tasks
        assert before is None or self.asked == before + len(tasks)

    def close(self):
        self.proxy.plan.clear()
        self.engine.close()
        until = time.monotonic() + 10
        for link, thread in self.links:
            if thread.is_alive():
                self.kill(link)
            thread.join(max(0.0, until - time.monotonic()))
        self.proxy.close()


class Machine(RuleBasedStateMachine):
    """Any order of rounds, faults, deaths and births."""

    bench: Bench

    @initialize(workers=st.integers(1, 2))
    def begin(self, workers):
        self.bench.proxy.plan.clear()
        for link in self.bench.alive():  # of the sequence before
            self.bench.kill(link)
        self.living = [self.bench.join() for _ in range(workers)]

    @rule(faults=st.lists(st.sampled_from(FAULTS), min_size=1, max_size=8))
    def disturb(self, faults):
        self.bench.proxy.plan.extend(faults)

    @rule(size=st.integers(0, 5), seed=st.integers(0, 99), scale=st.floats(0.1, 2.0))
    def ask(self, size, seed, scale):
        self.bench.round([{"seed": seed + i, "units": np.arange(i, i + 3)} for i in range(size)], scale)

    @precondition(lambda self: len(self.living) < 3)
    @rule()
    def join(self):
        self.living.append(self.bench.join())

    @precondition(lambda self: len(self.living) > 1)
    @rule()
    def die(self):
        self.bench.kill(self.living.pop(0))

    @rule(seed=st.integers(0, 99))
    def die_at_work(self, seed):
        victim = self.living.pop(0)
        self.living.append(self.bench.join())
        timer = threading.Timer(0.003, self.bench.kill, [victim])
        timer.start()
        self.ask(4, seed, 1.0)
        timer.join()

    def teardown(self):
        self.ask(3, 7, 1.0)


@pytest.fixture(scope="module")
def bench(make_spec):
    with (
        LocalCluster(n_workers=0, host="127.0.0.1", dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        found = Bench(client, make_spec())
        yield found
        found.close()


def run(bench, sequences):
    kind = type("BenchMachine", (Machine,), {"bench": bench})
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    run_state_machine_as_test(kind, settings=settings(max_examples=sequences, stateful_step_count=8, deadline=None, suppress_health_check=checks))
    assert set(FAULTS) <= set(bench.proxy.done), "some faults never happened"


def test_answers_equal_the_oracle_s(bench):
    run(bench, 40)


def test_a_server_that_takes_an_answer_twice_is_found_out(bench, monkeypatch):
    def careless(self, worker, event):
        if event.round in self.open and event.index in self.open[event.round].results:
            return []  # an honest server says that it ignores this
        return honest(self, worker, event)

    def repeat_everything():
        for seed in range(50):
            bench.proxy.plan.extend(["repeat"] * 10)
            bench.round([{"seed": seed + i, "units": np.arange(3)} for i in range(3)], 1.0)

    honest = ServerState._finish
    monkeypatch.setattr(ServerState, "_finish", careless)
    # One worker: it goes on only when its answer, sent again, has come too. Several could end a round before any repetition does.
    for link in bench.alive():
        bench.kill(link)
    bench.join()
    try:
        with pytest.raises(AssertionError):
            repeat_everything()
    finally:
        bench.proxy.plan.clear()
        bench.asked = bench.engine.meter.tasks


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_answers_equal_the_oracle_s_in_a_thousand_sequences(bench, request):
    run(bench, request.config.getoption("--sequences"))
