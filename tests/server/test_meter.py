"""What the workers do with their time, against a story told by hand."""

import json

import pytest

from pavi_scale.progress import Progress
from pavi_scale.run import Run
from pavi_scale.server.meter import Meter
from pavi_scale.server.protocol import Ready, RoundStarted, TaskDone, Tick, WorkerJoined, WorkerLeft
from pavi_scale.server.state import ServerState
from pavi_scale.watching import Watch


def play(*story):
    server, meter = ServerState(timeout=10.0), Meter()
    for now, event in story:
        meter.observe(event, server.handle(event, now), now)
    return meter


def test_shares_lost_tasks_and_late_answers():
    meter = play(
        (0.0, WorkerJoined("a")), (0.0, WorkerJoined("b")), (0.0, Ready("a", 0)), (0.0, Ready("b", 0)),
        (2.0, RoundStarted("k", 1, 2)),  # both have waited for two seconds; a takes task 0, b task 1
        (4.0, TaskDone("a", 1, 0, 1, None)), (4.0, Ready("a", 1)),
        (5.0, WorkerLeft("b", "killed")),  # a takes its task
        (5.5, TaskDone("b", 1, 1, 2, None)),  # too late
        (8.0, TaskDone("a", 1, 1, 3, None)),
    )  # fmt: skip
    assert (meter.rounds, meter.tasks, dict(meter.ignored)) == (1, 2, {"unknown worker: it never joined, left or expired": 1})
    figures = meter.snapshot(10.0)
    assert figures["waiting_of"] == {"a": 0.5}  # of ten seconds two and three were work
    assert meter.snapshot(12.0)["tasks_per_second"] == 0.0
    news = meter.news()
    assert [e["event"] for e in news] == ["worker joined", "worker joined", "worker answered", "worker left", "task recovered", "first round done"]
    assert news[2]["seconds"] == 4.0  # since it joined
    assert news[3] | {"reason": "killed", "task": 1} == news[3]
    assert news[4]["seconds"] == 3.0
    assert sorted(e["time"] for e in news) == [e["time"] for e in news]
    assert meter.news() == []


def test_a_silent_worker_leaves_once():
    meter = play((0.0, Tick()), (0.0, WorkerJoined("a")), (4.0, Tick()), (8.0, Tick()), (12.0, Tick()), (16.0, Tick()))
    assert [e["event"] for e in meter.news()] == ["worker joined", "worker left"]
    assert meter.snapshot(20.0)["workers"] == 0


def test_a_thousand_workers_have_no_line_each():
    meter = play(*((0.0, WorkerJoined(f"w{n}")) for n in range(1000)))
    figures = meter.snapshot(5.0)
    assert figures["workers"] == 1000
    assert figures["waiting"] == {"mean": 1.0, "most": 1.0}
    assert len(json.dumps(figures)) < 500


def test_a_watched_run_keeps_a_log(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("pavi_scale.watching.LOOK_SECONDS", 0.01)
    run = Run.create(tmp_path / "run")
    with Progress(True) as bar, Watch(run, bar, play((0.0, WorkerJoined("a")))) as watch:
        watch.update("search", 1.5, float("nan"))
    told = run.events()
    assert [e["event"] for e in told] == ["worker joined", "progress"]
    assert told[1]["stage"] == "search"
    assert told[1]["elbo"] == pytest.approx(1.5)
    assert told[1]["workers"] == 1
    assert "1 workers" in capsys.readouterr().err
