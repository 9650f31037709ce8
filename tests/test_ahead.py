"""What is fetched ahead: in order, within its share of memory, before anything is computed or, by who looks at all of it alone, through the pass."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from pavi_scale import ahead
from pavi_scale.ahead import CACHED, LARGE, Ahead
from pavi_scale.holding import Holding
from pavi_scale.plates import Layout, Plate

UNITS = 100
PIECES = [("vertex", start, start + 10, start == 0) for start in range(0, UNITS, 10)]


class Disk:
    """A cohort of `LARGE` bytes that notes what it is asked to fetch, and may be made to wait."""

    def __init__(self):
        plates = {"vertex": Plate("vertex")}
        self.layout, self.nbytes, self.asked = Layout(plates, {"vertex": UNITS}, {}), LARGE, []
        self.going, self.begun = threading.Event(), threading.Event()
        self.going.set()
        self.through = []

    def will_need(self, units, aside=True, through=False):
        self.begun.set()
        assert self.going.wait(10)
        self.asked.append((int(units["vertex"][0]), aside))
        self.through.append(through)


@pytest.fixture
def disk():
    return Disk()


def available(monkeypatch, size):
    monkeypatch.setattr(ahead.psutil, "virtual_memory", lambda: SimpleNamespace(available=size))


def ended(made):
    until(lambda: not made._going)


def test_a_pass_beginning_is_fetched_in_order_up_to_the_share(disk, monkeypatch):
    available(monkeypatch, LARGE)
    made = Ahead(disk, "vertex", Holding(0))
    for some in (PIECES[:5], PIECES[5:]):  # two tasks
        made.beforehand(some, 1.0)
    ended(made)
    assert disk.asked == [(10 * i, False) for i in range(int(10 * CACHED))]


def test_workers_of_one_machine_share_its_memory(disk, monkeypatch):
    available(monkeypatch, 2 * LARGE)
    made = Ahead(disk, "vertex", Holding(0))
    made.beforehand(PIECES, 0.25)
    ended(made)
    assert len(disk.asked) == int(10 * CACHED * 2 * 0.25)


def test_what_is_computed_has_the_disk_for_itself(disk, monkeypatch):
    available(monkeypatch, 100 * LARGE)
    disk.going.clear()
    made = Ahead(disk, "vertex", Holding(0))
    made.beforehand(PIECES, 1.0)
    assert disk.begun.wait(10)
    pieces = made.each([np.arange(3)])
    next(pieces)  # a task begins
    disk.going.set()
    ended(made)
    assert disk.asked == [(0, False)]
    made.beforehand(PIECES, 1.0)  # too late
    assert disk.asked == [(0, False)]


def test_small_cohorts_are_left_alone(disk, monkeypatch):
    available(monkeypatch, 100 * LARGE)
    disk.nbytes = LARGE - 1
    made = Ahead(disk, "vertex", Holding(0))
    made.beforehand(PIECES, 1.0)
    assert not made._going


def test_who_looks_alone_is_fetched_for_all_through_the_pass(disk, monkeypatch):
    available(monkeypatch, LARGE)  # half of the pieces ahead
    made = Ahead(disk, "vertex", Holding(0))
    made.beforehand(PIECES, 1.0, on=True)

    def asked(*starts):
        until(lambda: [start for start, aside in disk.asked if not aside] == list(starts))

    asked(0, 10, 20, 30, 40)
    assert made._going
    one, two = made.each(PIECES[:3]), made.each(PIECES[6:8])
    next(one)
    asked(0, 10, 20, 30, 40, 50)
    next(two)  # another lane has reached what was not fetched yet, and asks for its next one itself
    assert (70, True) in disk.asked
    next(one)
    asked(0, 10, 20, 30, 40, 50, 70)
    assert disk.through == [True] * 5 + [False] * (len(disk.asked) - 5)  # read while nothing was computed
    for piece in (*PIECES[2:6], *PIECES[7:]):
        list(made.each([piece]))
    ended(made)
    disk.asked.clear()
    made.beforehand(PIECES, 1.0, on=True)  # the next pass
    asked(0, 10, 20, 30, 40)


def until(holds):
    for _ in range(1000):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come about")


def test_nothing_is_fetched_for_who_is_gone(disk, monkeypatch):
    available(monkeypatch, LARGE)
    monkeypatch.setattr(ahead, "PATIENCE", 0.01)
    before = threading.active_count()
    made = Ahead(disk, "vertex", Holding(0))
    made.beforehand(PIECES, 1.0, on=True)
    until(lambda: len(disk.asked) == 5)
    assert threading.active_count() == before + 1  # it waits for the pass
    del made
    until(lambda: threading.active_count() == before)


def test_a_task_of_no_pieces_is_none():
    assert list(Ahead(Disk(), "vertex", Holding(0)).each([])) == []
