"""The Dask engine on real worker processes and real connections."""

import asyncio
import os
import signal
import threading
import time
from importlib.util import find_spec
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest
from distributed import Client, LocalCluster, Security
from distributed.comm import connect

from pavi_scale.errors import CohortError, InputError, NumericalError, WorkerError
from pavi_scale.server.local import LocalEngine
from pavi_scale.server.runtime import DaskEngine
from pavi_scale.server.runtime.wire import ask, pack, pack_object
from pavi_scale.server.runtime.worker import _ending, _work

pytestmark = [
    pytest.mark.cluster,
    # Worker processes that die by design leave sockets of Dask's own behind.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


def make_cluster(**more):
    # With dashboard_address=None Dask still opens its HTTP server, on port 8787, and warns when that is taken.
    return LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0", host="127.0.0.1", **more)


@pytest.fixture(scope="module")
def client():
    with make_cluster() as cluster, Client(cluster) as client:
        yield client


@pytest.fixture
def engine(client, make_spec):
    with DaskEngine(client, make_spec(), heartbeat=0.2, timeout=3.0) as engine:
        yield engine


def same(left, right):
    """Equal names, dtypes, shapes and bits, in the same order."""
    return [{k: (a.dtype, a.shape, a.tobytes()) for k, a in r.items()} for r in left] == [
        {k: (a.dtype, a.shape, a.tobytes()) for k, a in r.items()} for r in right
    ]


def test_equals_the_local_engine_bit_for_bit(engine, make_spec, state, tasks):
    local = LocalEngine(make_spec())
    assert engine.parallelism == 2
    for _ in range(3):
        state = {"w": state["w"] + 1.0}
        assert same(engine.round("numeric", state, tasks), local.round("numeric", state, tasks))
    assert engine.round("numeric", state, []) == []


def test_answers_are_handed_over_in_task_order_once(engine, make_spec, state, tasks):
    expected = LocalEngine(make_spec()).round("numeric", state, tasks)
    asked = engine.submit("numeric", state, tasks)
    assert same(asked, expected)
    with pytest.raises(WorkerError, match="handed over already"):
        asked.result()
    assert [float(r["slept"]) for r in engine.stream("who", {}, [{"sleep": s} for s in (0.4, 0.0, 0.2, 0.0)])] == [0.4, 0.0, 0.2, 0.0]
    failing = engine.submit("fail", state, [{}, {"bad": True}])
    for _ in range(2):
        with pytest.raises(WorkerError, match="deliberate"):
            failing.result()


def all_pids(engine, seconds=30):
    """Processes that take part, once there are two."""
    until = time.monotonic() + seconds
    pids = set()
    while len(pids) < 2 and time.monotonic() < until:
        results = engine.round("who", {}, [{"sleep": 0.05}] * 4)
        assert {int(r["threads"]) for r in results} == {1}
        pids = {int(r["pid"]) for r in results}
    return pids


def test_both_workers_take_part_with_the_specs_threads(engine):
    assert len(all_pids(engine)) == 2


def test_listens_on_loopback_only(engine):
    host = urlsplit(engine.address)
    assert host.hostname == "127.0.0.1"
    listening = [c.laddr for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert host.port in {address.port for address in listening}
    assert {address.ip for address in listening} <= {"127.0.0.1"}


def test_messages_without_the_key_are_refused(engine, caplog):
    async def intrude(**message):
        comm = await connect(engine.address)
        try:
            return await ask(comm, **message)
        finally:
            await comm.close()

    for message in ({"op": "join", "key": "guess", "label": "x"}, {"op": "spec"}, {"op": "exchange", "worker": "x"}, {"nonsense": 1}):
        assert asyncio.run(intrude(**message)) == {"op": "refused"}
    assert asyncio.run(intrude(op="heartbeat", worker="x")) == {"op": "rejoin"}
    with pytest.raises(OSError, match="."):
        asyncio.run(intrude(op="exchange", key=engine._hub._key, worker="x", push={"round": 1}))


@pytest.mark.parametrize("bad", [0, 2])
def test_an_error_of_the_package_keeps_its_type(engine, state, tasks, make_spec, bad):
    failing = [{"bad": index == bad} for index in range(4)]
    with pytest.raises(NumericalError, match="value is not finite") as caught:
        engine.round("refuse", state, failing)
    assert caught.value.where == "alpha[3]"
    assert same(engine.round("numeric", state, tasks), LocalEngine(make_spec()).round("numeric", state, tasks))


def test_any_other_error_brings_its_traceback(engine, state):
    with pytest.raises(WorkerError, match="ValueError: deliberate") as caught:
        engine.round("fail", state, [{}, {"bad": True}])
    assert "task 1 of round" in str(caught.value)
    assert "in compute" in str(caught.value)


@pytest.mark.parametrize("ending", [False, True])
def test_an_error_of_a_process_that_ends_is_not_the_task_s(make_spec, ending):
    pushed = []

    class Link:
        def exchange(self, holds, push):
            pushed.append(push)
            return None if push else {"round": 1, "index": 0, "token": 1, "kind": "fail", "version": 1, "state": pack({}), "task": pack_object({"bad": True})}

    assert _work(Link(), make_spec(), lambda: ending) == (0 if ending else 1)
    assert [push and "error" in push for push in pushed] == ([None] if ending else [None, True])


def test_a_worker_that_is_told_to_close_is_ending():
    async def use():
        async with Client(processes=False, asynchronous=True, dashboard_address="127.0.0.1:0", n_workers=1) as client:
            (worker,) = client.cluster.workers.values()
            assert not _ending(worker)
            await worker.close()
            assert _ending(worker)

    asyncio.run(use())


def test_a_computation_that_cannot_be_built(client, make_spec, state):
    with DaskEngine(client, make_spec(broken=True), heartbeat=0.2) as engine, pytest.raises(CohortError, match="cannot be read"):
        engine.round("numeric", state, [{}])


def test_a_loop_that_ended_is_started_again(engine, client, make_spec, state, tasks):
    all_pids(engine)
    client.cancel(list(engine._hub._loops.values()), force=True)
    client.loop.add_callback(lambda: [engine._hub._reply(name, {"op": "stop"}) for name in list(engine._hub._parked)])
    assert same(engine.round("numeric", state, tasks), LocalEngine(make_spec()).round("numeric", state, tasks))
    assert len(all_pids(engine)) == 2


def test_a_closed_client_is_noticed(client, make_spec):
    with Client(client.scheduler.address) as other:
        engine = DaskEngine(other, make_spec(), heartbeat=0.2, timeout=1.0)
        engine.round("who", {}, [{}])
    with pytest.raises(WorkerError, match="the client was closed"):
        engine.round("who", {}, [{}])
    engine.close()


def test_cut_connections_are_mended(engine, client, make_spec, state, tasks):
    def cut():
        for comm in list(engine._hub._comms):
            comm.abort()

    timers = [threading.Timer(delay, client.loop.add_callback, [cut]) for delay in (0.02, 0.1)]
    for timer in timers:
        timer.start()
    expected = LocalEngine(make_spec()).round("numeric", state, tasks * 3)
    until = time.monotonic() + 0.4
    while time.monotonic() < until:
        assert same(engine.round("numeric", state, tasks * 3), expected)


def test_killed_worker(client, make_spec, state, tmp_path):
    tasks = [{"seed": i, "marker": str(tmp_path / ("dies" if i == 3 else "lives"))} for i in range(8)]
    (tmp_path / "lives").touch()
    with DaskEngine(client, make_spec(), heartbeat=0.2, timeout=5.0) as engine:
        results = engine.round("die once", state, tasks)
        assert (tmp_path / "dies").exists()
        for i, result in enumerate(results):
            np.testing.assert_array_equal(result["y"], state["w"] + i)
        # The nanny starts another process; it joins the run.
        assert len(all_pids(engine)) == 2


def test_no_worker_left(make_spec, state, tasks):
    with make_cluster() as cluster, Client(cluster) as client, DaskEngine(client, make_spec(), heartbeat=0.1, timeout=1.0) as engine:
        engine.round("numeric", state, tasks)
        cluster.scale(0)
        with pytest.raises(WorkerError, match="no worker is left") as caught:
            [engine.round("who", {}, [{"sleep": 0.05}] * 4) for _ in range(1000)]
        assert "of round" in caught.value.where
        cluster.scale(1)
        client.wait_for_workers(1)
        time.sleep(0.3)  # the engine looks for new workers with each heartbeat
        assert same(engine.round("numeric", state, tasks), LocalEngine(make_spec()).round("numeric", state, tasks))


def test_an_adaptive_cluster_without_workers_starts_one(make_spec, state, tasks):
    with (
        LocalCluster(n_workers=0, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster, set_as_default=False) as client,
        DaskEngine(client, make_spec(), heartbeat=0.2, startup=20.0) as engine,
    ):
        cluster.adapt(minimum=0, maximum=1, interval="100ms")
        assert same(engine.round("numeric", state, tasks), LocalEngine(make_spec()).round("numeric", state, tasks))


def test_interrupt_ends_the_loops(client, make_spec):
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals reach the main thread only")
    engine = DaskEngine(client, make_spec(), heartbeat=0.1)
    timer = threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        engine.round("who", {}, [{"sleep": 1.0}] * 20)
    until = time.monotonic() + 10
    while any(client.run(running_links).values()) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(client.run(running_links).values())
    with pytest.raises(WorkerError, match="closed"):
        engine.round("who", {}, [{}])
    engine.close()


def running_links():
    return sum(thread.name == "pavi-link" for thread in threading.enumerate())


def test_closed_or_asynchronous_client_is_refused(make_spec):
    async def use():
        async with Client(processes=False, asynchronous=True, dashboard_address="127.0.0.1:0", n_workers=0) as client:
            with pytest.raises(InputError, match="synchronous"):
                DaskEngine(client, make_spec())

    asyncio.run(use())


@pytest.mark.skipif(find_spec("cryptography") is None, reason="temporary certificates need the package `cryptography`: pip install cryptography")
def test_tls(make_spec, state, tasks):
    security = Security.temporary()
    with make_cluster(security=security) as cluster, Client(cluster, security=security) as client, DaskEngine(client, make_spec(), heartbeat=0.2) as engine:
        assert engine.address.startswith("tls://127.0.0.1:")
        assert same(engine.round("numeric", state, tasks), LocalEngine(make_spec()).round("numeric", state, tasks))
        foreign = Security.temporary().get_connection_args("client")
        with pytest.raises(OSError, match="."):
            asyncio.run(connect(engine.address, timeout=1, **foreign))
        with pytest.raises(OSError, match="."):
            asyncio.run(connect(engine.address.replace("tls", "tcp"), timeout=1))


def test_threads_as_workers(make_spec, state, tasks):
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
        DaskEngine(client, make_spec(), heartbeat=0.2) as engine,
    ):
        assert same(engine.round("numeric", state, tasks), LocalEngine(make_spec()).round("numeric", state, tasks))
