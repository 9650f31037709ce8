"""A scheduler that was killed and is started again, and the engine's way back to it."""

import asyncio
import signal
import socket
import subprocess
import sys
import time

import pytest
from distributed import Client, LocalCluster

from pavi_scale.server.clusters import SchedulerCluster
from pavi_scale.server.runtime import DaskEngine
from pavi_scale.server.runtime.clusters import open_cluster
from pavi_scale.server.runtime.desk import Desk
from pavi_scale.server.runtime.hub import HURRY

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")]


@pytest.fixture
def scheduler():
    """Address of a scheduler in a process of its own, and a function that kills it and starts it again."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    call = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", port, "--dashboard-address", "127.0.0.1:0"]
    lives = [subprocess.Popen(call, stderr=subprocess.DEVNULL)]

    def again(begin):
        if begin:
            lives.append(subprocess.Popen(call, stderr=subprocess.DEVNULL))
        else:
            lives[-1].send_signal(signal.SIGKILL)
            lives[-1].wait()

    yield f"tcp://127.0.0.1:{port}", again
    for life in lives:
        life.kill()
        life.wait()


async def soon(what, seconds=30.0):
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until
        await asyncio.sleep(0.01)


def test_a_second_client_finds_a_scheduler_that_is_back(scheduler):
    address, again = scheduler

    async def use():
        async with Client(address, asynchronous=True, set_as_default=False) as client:
            desk = Desk(client)
            assert await desk.client() is client
            again(False)
            await soon(lambda: client.status == "connecting")
            with pytest.raises(OSError, match="."):
                await desk.client()
            again(True)
            second = None
            while second is None:
                try:
                    second = await desk.client()
                except OSError:
                    continue
            assert second is not client or client.status == "running"
            assert await second.scheduler.ncores() == {}
            assert await desk.client() in (second, client)
            await desk.close()
            assert second is client or second.status == "closed"

    asyncio.run(use())


def test_workers_are_looked_for_more_often_after_a_loss(scheduler, make_spec):
    with Client(scheduler[0], set_as_default=False) as client, DaskEngine(client, make_spec(), heartbeat=2.0) as engine:
        hub = engine._hub
        assert hub._pace() == HURRY  # there is none
        hub.machine.workers["w"] = None
        try:
            assert hub._pace() == 2.0
            hub._lost = time.monotonic()
            assert hub._pace() == HURRY
        finally:
            del hub.machine.workers["w"]


def test_the_patience_of_a_cluster_file_holds_in_the_fit(make_spec):
    quiet = {"processes": False, "protocol": "tcp", "host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}
    with LocalCluster(n_workers=1, **quiet) as cluster:
        options = SchedulerCluster(kind="scheduler", address=cluster.scheduler_address, workers=1, patience=77.0)
        with open_cluster(options) as client, DaskEngine(client, make_spec()) as engine:
            assert engine._hub.machine.patience == 77.0
