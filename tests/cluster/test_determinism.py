"""SHA-256 of weights, tables and posterior: the same in process, on any number of workers, and after a kill in the middle."""

import os
import signal
import threading

import pytest
from distributed import Client, LocalCluster

import pavi_scale as ps
from pipelines import gre, hcp

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")]


def fit(model, cohort, run, tools, client=None, seed=3):
    ps.fit(model, cohort, run=run, seed=seed, client=client, progress=False)
    return tools.digest(run)


def kill_in_the_middle(client, run, tools, after):
    """A thread that kills a worker some answered rounds after the fit began."""

    def kill():
        tools.wait_for(lambda: tools.events(run, "first round done"), 300, 0.01)
        stop.wait(after)
        os.kill(victim, signal.SIGKILL)

    victim, stop = next(iter(client.run(os.getpid).values())), threading.Event()
    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    return thread


@pytest.fixture(autouse=True)
def _watched_closely(monkeypatch):
    monkeypatch.setattr("pavi_scale.watching.LOOK_SECONDS", 0.01)


def compare(model, cohort, folder, tools, workers, after):
    expected = fit(model, cohort, folder / "here", tools)
    assert fit(model, cohort, folder / "other", tools, seed=4) != expected, "the digest sees nothing"
    with LocalCluster(n_workers=workers[0], threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0") as cluster, Client(cluster) as client:
        for count in workers:
            cluster.scale(count)
            client.wait_for_workers(count, timeout=300)
            assert fit(model, cohort, folder / f"workers{count}", tools, client) == expected, f"{count} workers: other bits"
        thread = kill_in_the_middle(client, folder / "killed", tools, after)
        assert fit(model, cohort, folder / "killed", tools, client) == expected, "after a kill: other bits"
        thread.join()
        assert tools.events(folder / "killed", "worker left"), "nobody was killed"


def test_gaussian_random_effects(gre_cohort, tmp_path, tools):
    compare(gre.model, str(gre_cohort), tmp_path, tools, (1, 2), 0.02)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_gaussian_random_effects_on_four_workers(gre_cohort, tmp_path, tools):
    compare(gre.model, str(gre_cohort), tmp_path, tools, (4,), 0.02)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_model_without_conjugacy_and_with_free_rows(hcp_cohort, tmp_path, tools):
    compare(hcp.model, str(hcp_cohort), tmp_path, tools, (1, 2), 3.0)
    assert [e for e in tools.events(tmp_path / "killed") if e["event"] == "worker left"]
