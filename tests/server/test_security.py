"""What listens, and who is let in: a fit on this machine, and a cluster over TLS."""

import asyncio
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from distributed.comm import connect

from pavi_scale.config import load_cluster
from pavi_scale.server.local import LocalEngine
from pavi_scale.server.runtime import DaskEngine
from pavi_scale.server.runtime.clusters import open_cluster
from pavi_scale.server.runtime.credentials import Credentials

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.skipif(shutil.which("ss") is None, reason="needs ss: apt-get install iproute2"),
]


def listeners():
    """Addresses on which this process and its children listen, as `ss -ltn` tells them."""
    own = {psutil.Process().pid, *(p.pid for p in psutil.Process().children(recursive=True))}
    out = subprocess.run(["ss", "-H", "-ltnp"], capture_output=True, text=True, check=True, timeout=20).stdout
    return {line.split()[3] for line in out.splitlines() if own & set(map(int, re.findall(r"pid=(\d+)", line)))}


def knock(address, **arguments):
    """Try to connect."""

    async def attempt():
        comm = await connect(address, timeout=2, **arguments)
        comm.abort()

    asyncio.run(attempt())


def test_a_fit_on_this_machine_listens_on_loopback_only(root, make_spec, state, tasks):
    with open_cluster(load_cluster(root / "cluster/local.yaml")) as client, DaskEngine(client, make_spec(), heartbeat=0.2) as engine:
        answers = engine.round("numeric", state, tasks)
        found = listeners()
    # The scheduler, its HTTP server, the hub, and of each worker the worker itself, its nanny and their HTTP servers.
    assert len(found) >= 7, found
    assert {address.rpartition(":")[0] for address in found} == {"127.0.0.1"}
    assert answers[0]["product"].tobytes() == LocalEngine(make_spec()).round("numeric", state, tasks)[0]["product"].tobytes()


@pytest.fixture
def ssh_file(tmp_path):
    """A cluster file whose hosts are this machine: a shell in place of ssh."""
    shell = tmp_path / "shell"
    shell.write_text('#!/bin/sh\necho "$1" >> "$(dirname "$0")/reached"\nexec sh -c "$2"\n')
    shell.chmod(0o755)
    text = f"kind: ssh\nhosts: [one, two]\ninterface: lo\nworkers: 2\npatience: 300\nlost_after: 1\ncommand: [{shell}]\npython: {sys.executable}\n"
    (tmp_path / "ssh.yaml").write_text(text)
    return tmp_path / "ssh.yaml"


def of_workers(state):
    return [p for p in psutil.Process().children(recursive=True) if "distributed.cli.dask_worker" in " ".join(p.cmdline())]


def test_plain_and_foreign_clients_are_refused_and_lost_workers_replaced(ssh_file, root, monkeypatch, make_spec, state, tasks):
    monkeypatch.setenv("PYTHONPATH", str(root))
    expected = LocalEngine(make_spec()).round("numeric", state, tasks)
    with open_cluster(load_cluster(ssh_file)) as client, DaskEngine(client, make_spec(), heartbeat=0.2, timeout=5.0) as engine:
        client.wait_for_workers(2, timeout=300)
        assert sorted((ssh_file.parent / "reached").read_text().split()) == ["one", "two"]
        assert engine.round("numeric", state, tasks)[3]["product"].tobytes() == expected[3]["product"].tobytes()
        workers = of_workers(client)
        assert len(workers) == 2
        secret = next(line for line in client.security.tls_worker_key.splitlines() if "-" not in line)
        everything = " ".join(" ".join(p.cmdline()) for p in psutil.Process().children(recursive=True))
        assert secret not in everything, "the key is on a command line"
        addresses = [client.scheduler.address, engine.address, *client.scheduler_info(n_workers=-1)["workers"]]
        for address in addresses:
            assert address.startswith("tls://127.0.0.1:")
            with pytest.raises(OSError, match="."):
                knock(address.replace("tls", "tcp"))
            with pytest.raises(OSError, match="."):
                knock(address, **Credentials.make().security().get_connection_args("client"))
            knock(address, **client.security.get_connection_args("client"))
        assert {a.rpartition(":")[0] for a in listeners()} == {"127.0.0.1"}
        workers[0].kill()
        pids, until = set(), time.monotonic() + 300
        while len(pids) < 2 and time.monotonic() < until:  # the other one goes on alone, until another one has taken the place
            pids |= {int(r["pid"]) for r in engine.round("who", {}, [{"sleep": 0.02}] * 4)} - {workers[0].pid}
        assert len(pids) == 2
        assert np.array_equal(engine.round("numeric", state, tasks)[5]["total"], expected[5]["total"])
    assert not of_workers(client), "workers are left behind"
    assert Path(ssh_file).exists()
