"""Processes that race for one run: exactly one wins, and the others say who holds it."""

import os
import subprocess
import sys
import time

import pytest

from pavi_scale.run import Run

# The run directory needs neither torch nor the rest of the package.
CONTENDER = """
import sys, time, types
package = types.ModuleType("pavi_scale")
package.__path__ = ["pavi_scale"]
sys.modules["pavi_scale"] = package
import numpy as np
from pavi_scale.errors import RunError
from pavi_scale.run import Run
print("ready", flush=True)
for line in sys.stdin:
    how, when, path = line.rstrip("\\n").split(" ", 2)
    while time.time() < float(when):
        pass
    try:
        run = Run.create(path) if how == "create" else Run.open(path)
        with run.lock():
            run.commit({"w": np.ones(3)}, {"by": __import__("os").getpid()})
            print("won", flush=True)
            sys.stdin.readline()  # holds on until the others have answered
    except RunError as error:
        print(error, flush=True)
        sys.stdin.readline()
    print("left", flush=True)
"""
COUNT = 8


@pytest.fixture(scope="module")
def contenders(root):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    made = [
        subprocess.Popen([sys.executable, "-c", CONTENDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root, env=env) for _ in range(COUNT)
    ]
    assert all(c.stdout.readline() == "ready\n" for c in made)
    yield made
    for c in made:
        c.stdin.close()
        c.stdout.close()
        c.wait(30)


def race(contenders, how, path):
    """One race; asserts that exactly one won and that the others name it."""
    if how == "open":
        Run.create(path)
    when = time.time() + 0.05
    for c in contenders:
        c.stdin.write(f"{how} {when} {path}\n")
        c.stdin.flush()
    said = {c.pid: c.stdout.readline().rstrip("\n") for c in contenders}
    winners = [pid for pid, words in said.items() if words == "won"]
    assert len(winners) == 1, said
    for pid, words in said.items():
        assert pid in winners or f"process {winners[0]} on host" in words, words
    assert Run.open(path).latest()[1] == {"by": winners[0]}
    for c in contenders:
        c.stdin.write("\n")
        c.stdin.flush()
    assert all(c.stdout.readline() == "left\n" for c in contenders)


def test_one_wins(contenders, tmp_path):
    for i in range(5):
        race(contenders, ("open", "create")[i % 2], tmp_path / str(i))


@pytest.mark.slow
def test_a_hundred_races(contenders, tmp_path, say):
    for i in range(100):
        race(contenders, ("open", "create")[i % 2], tmp_path / str(i))
    say(f"100 races of {COUNT} processes (50 for a run, 50 for a path without one): one winner in each, named by the others")
