"""Two hosts (network namespaces) joined by a link that goes down or is slow: noticed in time, late answers fenced off, nothing lost or doubled."""

import json
import os
import shutil
import subprocess
import sys

import pytest

SETUP = """
ip netns add pv-a
ip netns add pv-b
ip link add pv0 netns pv-a type veth peer name pv0 netns pv-b
ip -n pv-a addr add 10.77.0.1/24 dev pv0
ip -n pv-b addr add 10.77.0.2/24 dev pv0
ip -n pv-a link set pv0 up
ip -n pv-b link set pv0 up
ip -n pv-a link set lo up
ip -n pv-b link set lo up
"""


def shell(line, **more):
    return subprocess.run(line.split(), capture_output=True, text=True, timeout=30, check=False, **more)


pytestmark = [
    pytest.mark.slow,
    pytest.mark.cluster,
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("tc"), reason="needs root, ip and tc: apt-get install iproute2"),
]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """A cluster file of two hosts; `ip netns exec` stands for ssh."""
    for name in ("pv-a", "pv-b"):
        shell(f"ip netns del {name}")
    try:
        for line in SETUP.strip().splitlines():
            done = shell(line)
            if done.returncode:
                pytest.skip(f"network namespaces are not permitted here: {line}: {done.stderr}")
        folder = tmp_path_factory.mktemp("network")
        (folder / "netns-ssh").write_text('#!/bin/sh\nexec ip netns exec "$1" sh -c "$2"\n')
        (folder / "netns-ssh").chmod(0o755)
        (folder / "ssh.yaml").write_text(
            f"kind: ssh\nhosts: [pv-a, pv-b]\ncommand: [{folder}/netns-ssh]\ninterface: pv0\npython: {sys.executable}\n"
            "workers: 2\npatience: 300\nlost_after: 5\n"
        )
        yield folder / "ssh.yaml"
    finally:
        for name in ("pv-a", "pv-b"):
            shell(f"ip netns del {name}")


def drive(hosts, tools, mode, seconds):
    call = ["ip", "netns", "exec", "pv-a", sys.executable, str(tools.root / "tests/cluster/partition.py"), str(hosts), mode, str(seconds)]
    done = subprocess.run(call, env=tools.environment, capture_output=True, text=True, timeout=seconds + 500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(mode, seconds, found)
    assert found["taken"] == found["asked"], "tasks were lost or doubled"
    assert found["rounds"] >= 5
    return found


@pytest.mark.parametrize("seconds", [1, 20, 120])
def test_a_link_that_goes_down(hosts, tools, seconds):
    found = drive(hosts, tools, "down", seconds)
    assert found["workers"] == 2, "the worker did not come back"
    if seconds > 15:
        assert found["left"], "nobody noticed"
        assert found["left"][0] <= 15.0
        assert sum(found["ignored"].values()) >= (seconds == 20), "a worker that was cut off for a while comes back with its old name, and is told so"
    else:
        assert not found["left"], "a second is not worth a word"


def test_a_slow_link(hosts, tools):
    found = drive(hosts, tools, "slow", 30)
    assert found["workers"] == 2
