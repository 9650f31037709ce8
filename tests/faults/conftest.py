"""Shared by the fault tests: children that can be killed, and what an undisturbed run gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults import study


class Zygote:
    """Runs fits in forked children (see `zygote`)."""

    def __init__(self, root):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=root, env=env,
        )
        assert self._read() == {"ready": True}

    def _read(self):
        return json.loads(self.process.stdout.readline())

    def start(self, path, kind, **more):
        """Process number of a child that begins, or goes on with, a run."""
        self.process.stdin.write(json.dumps({"path": str(path), "kind": kind, **more}) + "\n")
        self.process.stdin.flush()
        return self._read()["pid"]

    def wait(self):
        """Exit code of the child; negative for a signal."""
        return self._read()["code"]

    def run(self, path, kind, **more):
        self.start(path, kind, **more)
        return self.wait()

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(30)


@pytest.fixture(scope="session")
def zygote(root):
    made = Zygote(root)
    yield made
    made.close()


@pytest.fixture(scope="session")
def undisturbed(zygote, tmp_path_factory):
    """Kind -> (digest of its result, calls that changed the disk)."""
    found = {}
    for kind in study.MODELS:
        path = tmp_path_factory.mktemp("undisturbed") / kind
        assert zygote.run(path, kind) == 0, path.with_suffix(".error").read_text()
        found[kind] = study.digest(path), int(Path(path).with_suffix(".count").read_text())
    return found


@pytest.fixture
def say(capsys):
    """Print a figure past pytest's capture."""

    def print_it(text):
        with capsys.disabled():
            print(f"\n  {text}", flush=True)

    return print_it
