"""Bounded staleness: ages stay below the bound, updates are those of a sequential oracle, whoever computes and whatever is lost."""

import os
import signal
import time
from collections import deque

import numpy as np
import pytest
from distributed import Client, LocalCluster
from hypothesis import given
from hypothesis import strategies as st

from pavi_scale.server.local import LocalEngine
from pavi_scale.server.runtime import DaskEngine
from pavi_scale.server.window import Order, lagged

STEPS = 24


def descend(engine, bound, steps=STEPS, more=lambda step: {}):
    """Gradient steps by noisy gradients of a quadratic, with memory: order and age of each state that is read leave their mark on the weights."""
    w, ages = np.linspace(-1.0, 1.0, 12).reshape(3, 4), []

    def orders():
        for step in range(steps):
            yield Order("numeric", {"w": w}, [{"seed": step, "units": np.arange(2), **more(step)}], step)

    for reply in lagged(engine, bound, orders()):
        assert reply.note == len(ages), "updates in another order"
        w = 0.9 * w - 0.01 * reply.answers[0]["product"].sum(1, keepdims=True)
        ages.append(reply.age)
    return w, ages


def oracle(bound, steps=STEPS):
    """The same updates by a delayed loop without any engine."""
    states, waiting, w = [], deque(), np.linspace(-1.0, 1.0, 12).reshape(3, 4)
    for step in range(steps + bound):
        if step < steps:
            waiting.append((step, w))
        if step >= bound:
            seed, read = waiting.popleft()
            noise = np.random.default_rng(seed).standard_normal(read.shape)
            w = 0.9 * w - 0.01 * (read @ noise.T).sum(1, keepdims=True)
            states.append(w)
    return w


@given(bound=st.integers(0, 30), lanes=st.integers(1, 3))
def test_updates_are_those_of_a_delayed_loop(make_spec, bound, lanes):
    with LocalEngine(make_spec(), lanes) as engine:
        w, ages = descend(engine, bound)
    assert ages == [min(step, bound) for step in range(STEPS)]
    np.testing.assert_allclose(w, oracle(bound), rtol=1e-12)


def test_the_bound_is_felt(make_spec):
    with LocalEngine(make_spec()) as engine:
        found = [descend(engine, bound)[0] for bound in (0, 1, 4)]
    assert not np.allclose(found[0], found[1])
    assert not np.allclose(found[1], found[2])


class Slow:
    """Answers a round when the third one after it has been asked for, unless nothing more comes."""

    def __init__(self, engine):
        self.engine, self.most, self.waiting = engine, 0, 0

    def submit(self, kind, state, tasks):
        outer, asked = self, self.engine.submit(kind, state, tasks)
        self.waiting += 1
        self.most = max(self.most, self.waiting)

        class Later:
            def result(self):
                outer.waiting -= 1
                return asked.result()

        return Later()


@pytest.mark.parametrize("bound", [0, 1, 5])
def test_no_more_rounds_are_open_than_the_bound_allows(make_spec, bound):
    with LocalEngine(make_spec()) as engine:
        slow = Slow(engine)
        descend(slow, bound)
    assert slow.most == bound + 1
    assert slow.waiting == 0


@pytest.mark.cluster
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_workers_share_the_steps_and_a_kill_changes_no_bit(make_spec):
    class Naps(make_spec().__class__):
        def compute(self, kind, state, task):
            time.sleep(task.get("nap", 0.0))
            return super().compute(kind, state, task)

    def naps(step):
        return {"nap": 0.2 if step % 5 == 0 else 0.05}

    with LocalEngine(Naps()) as engine:
        expected, _ = descend(engine, 3)
    quiet = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}
    with LocalCluster(n_workers=2, threads_per_worker=1, **quiet) as cluster, Client(cluster, set_as_default=False) as client:
        with DaskEngine(client, Naps(), heartbeat=0.2, timeout=3.0, patience=60.0) as engine:
            engine.round("who", {}, [{"sleep": 0.3}] * 2)  # both are there
            seconds = []
            for bound in (0, 3):
                began = time.monotonic()
                w, _ = descend(engine, bound, more=naps)
                seconds.append(time.monotonic() - began)
            assert w.tobytes() == expected.tobytes()
            # Steps of one task each: with no staleness a second worker has nothing to do.
            assert seconds[1] < 0.8 * seconds[0]

            pids = client.run(os.getpid)

            def strike(step):
                if step == 9:
                    os.kill(next(iter(pids.values())), signal.SIGKILL)
                return naps(step)

            again, ages = descend(engine, 3, more=strike)
    assert again.tobytes() == expected.tobytes()
    assert max(ages) == 3
