"""A crash after any change of the disk, with any of the unsynced changes lost: exactly the old or the new state is found."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import xarray as xr

from pavi_scale import durable, lease
from pavi_scale.cohort import open_cohort
from pavi_scale.digests import COHORT
from pavi_scale.errors import InputError, RunError
from pavi_scale.posterior import store
from pavi_scale.posterior.groups import stored_path
from pavi_scale.posterior.integrity import verify
from pavi_scale.posterior.store import PosteriorWriter
from pavi_scale.run import Run
from tests.faults import study
from tests.faults.journal import RULES, Journal, Step, build, crashed, states
from tests.posterior import toy

STUDY = {"model": "toy", "seed": 0}


def numbered(k: int) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    return {"w": np.full(40, float(k))}, {"k": k}


def write_posterior(run: Run) -> None:
    writer = PosteriorWriter.create(run.path, toy.context(), chunks={"subject": 2})
    toy.fill(writer)
    writer.put("fit", xr.Dataset({"elbo": ("step", np.arange(3.0))}))
    writer.finish()


def small_run(journal: Journal) -> None:
    """What a fit does to the disk, without the fitting; each promise is marked when the call that gives it has returned."""
    path = journal.root / "deep" / "run"
    with journal.recording():
        run = Run.create(path)
        journal.mark("created")
        with run.lock():
            cohort = open_cohort(toy.cohort(), toy.model)
            cohort.save(path / "cohort.zarr")
            journal.mark("copied")
            run.write_study(STUDY)
            journal.mark("study")
            for k in (1, 2, 3):
                run.commit(*numbered(k))
                journal.mark(("commit", k))
            run.log("trained")
            write_posterior(run)
            journal.mark("posterior")
            run.commit(*numbered(4))
            journal.mark(("commit", 4))
            write_posterior(run)  # again, over the one that is there


def again(journal: Journal) -> None:
    """A finished run that is fitted again."""
    path = journal.root / "run"
    with journal.recording():
        run = Run.create(path)
        run.commit(*numbered(1))
        write_posterior(run)
        journal.mark("old")
        Run.create(path, overwrite=True)
        journal.mark("cleared")
        run.commit(*numbered(2))
        journal.mark("new")


def record(program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    root = tmp_path / "recorded"
    root.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(lease, "_process_start", lambda pid: "before the crash")  # the process of the lease is dead when the disk is looked at
        journal = Journal(root)
        program(journal)
    shutil.rmtree(root)
    return journal.steps


def found(call) -> object:
    """What a call returns, or None where it says that there is nothing (yet)."""
    try:
        return call()
    except InputError as error:
        nothing = ("there is no run", "no generation yet", "no stored posterior yet", "does not say what was fitted", "there is no complete")
        if any(words in str(error) for words in nothing):
            return None
        raise


def check_small(place: Path, promised: list[object]) -> None:
    """The state is the promised one or the next; and the run goes on from there."""
    path = place / "deep" / "run"
    run = found(lambda: Run.open(path))
    assert run is not None or "created" not in promised
    done = max((p[1] for p in promised if isinstance(p, tuple)), default=0)
    if run is not None:
        latest = found(run.latest)
        k = 0 if latest is None else latest[1]["k"]
        assert k in (done, done + 1)
        assert latest is None or (latest[0]["w"] == k).all()
        recorded = found(run.read_study)
        assert recorded == STUDY or (recorded is None and "study" not in promised)
        if "copied" in promised:
            COHORT.verify(path / "cohort.zarr")
        run.events()
        check_posterior(run, "posterior" in promised)
    else:
        k = 0
    if k == 0:
        run = Run.create(path)
    with run.lock():
        assert run.commit(*numbered(k + 1)) == k + 1
        open_cohort(toy.cohort(), toy.model).save(path / "cohort.zarr")
    assert run.latest()[1] == {"k": k + 1}
    COHORT.verify(path / "cohort.zarr")


def check_posterior(run: Run, promised: bool) -> None:
    store = found(lambda: stored_path(run))
    assert store is not None or not promised
    if store is None:
        if not (run.path / "posterior.zarr.partial").exists():
            return
        write_posterior(run)  # over what was left
        store = stored_path(run)
    verify(store)
    np.testing.assert_array_equal(xr.open_zarr(store, group="posterior_mean")["theta"].values, toy.mean("theta"))


def check_again(place: Path, promised: list[object]) -> None:
    """The old run, none, or the new one: never the old posterior in the new run."""
    run = found(lambda: Run.open(place / "run"))
    if run is None:
        assert "old" not in promised
        return
    latest = found(run.latest)
    k = 0 if latest is None else latest[1]["k"]
    assert k in ({"new": (2,), "cleared": (0, 2), "old": (0, 1)}[promised[-1]] if promised else (0, 1))
    if k == 2 or "cleared" in promised:
        assert found(lambda: stored_path(run)) is None
    elif promised and k == 1:
        verify(stored_path(run))
    if k == 0:  # begun anew, whatever was left is cleared away
        fresh = Run.create(run.path)
        fresh.commit(*numbered(2))
        assert found(lambda: stored_path(fresh)) is None


PROGRAMS = {"small": (small_run, check_small), "again": (again, check_again)}


def faults(steps: list[Step], check, place: Path, every: int = 1, rules=RULES) -> tuple[int, list[str]]:
    """Number of crash states looked at, and those that did not recover."""
    looked, bad = 0, []
    for i, (count, rule, tree) in enumerate(states(steps, rules, every)):
        looked += 1
        build(tree, place / str(i))
        try:
            with mock.patch.object(os, "fsync"):  # there is no second crash
                check(place / str(i), [s.mark for s in steps[:count] if s.mark is not None])
        except Exception as error:
            bad.append(f"after {count} steps, {rule}: {type(error).__name__}: {error}")
        shutil.rmtree(place / str(i))
    return looked, bad


@pytest.mark.parametrize("name", PROGRAMS)
def test_crash_states_recover(tmp_path, monkeypatch, name):
    program, check = PROGRAMS[name]
    steps = record(program, tmp_path, monkeypatch)
    assert len(steps) > 100
    looked, bad = faults(steps, check, tmp_path, every=239)
    assert looked > 10
    assert not bad, "\n".join(bad[:5])


def without_a_posterior(steps: list[Step]) -> list[int]:
    """Numbers of steps after which a crash could leave a run without the posterior that it had: many choices of what is lost, where its names change."""
    first = next(i for i, s in enumerate(steps) if s.mark == "posterior")
    counts = [i + 1 for i in range(first, len(steps)) if any(name.startswith("posterior.zarr") for _, name, _ in steps[i].names)]
    assert len(counts) > 3
    bad = []
    for count in counts:
        for seed in range(40):
            tree = crashed(steps, count, "some", seed)
            if not any(f"deep/run/posterior.zarr{end}/manifest.json" in tree for end in ("", ".partial")):
                bad.append(count)
    return bad


def test_a_posterior_that_was_there_stays_until_there_is_another(tmp_path, monkeypatch):
    steps = record(small_run, tmp_path, monkeypatch)
    assert not without_a_posterior(steps)
    monkeypatch.setattr(store, "sync_directory", lambda path: None)
    assert without_a_posterior(record(small_run, tmp_path, monkeypatch))  # it would be seen


@pytest.mark.parametrize("forgotten", ["sync_directory", "sync_file", "os.fsync"])
def test_a_forgotten_sync_would_be_seen(tmp_path, monkeypatch, forgotten):
    """Power: without one kind of fsync, crash states are found that do not recover."""
    def program(journal: Journal) -> None:
        with journal.recording():
            run = Run.create(journal.root / "deep" / "run")
            journal.mark("created")
            for k in (1, 2):
                run.commit(*numbered(k))
                journal.mark(("commit", k))

    with monkeypatch.context() as patch:
        if forgotten == "os.fsync":
            patch.setattr(durable, "os", type("os", (), {**vars(durable.os), "fsync": staticmethod(lambda handle: None)}))
        else:
            for module in (durable, __import__("pavi_scale.run", fromlist=["run"])):
                patch.setattr(module, forgotten, lambda path: None)
        steps = record(program, tmp_path, monkeypatch)
    _, bad = faults(steps, check_small, tmp_path, every=7, rules=("only what was synced", "names without data"))
    assert bad


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_every_crash_state_recovers(tmp_path, monkeypatch, say, name):
    program, check = PROGRAMS[name]
    steps = record(program, tmp_path, monkeypatch)
    looked, bad = faults(steps, check, tmp_path)
    say(f"{name}: {len(steps)} steps, {looked} different crash states, {looked - len(bad)} recovered")
    assert not bad, "\n".join(bad[:10])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "rows"])
def test_fits_resume_from_crash_states(tmp_path, monkeypatch, say, kind):
    """A real fit: from each of many crash states it goes on to the bits of the undisturbed run."""
    study.begin(tmp_path / "whole", kind)
    wanted = study.digest(tmp_path / "whole")
    steps = record(lambda journal: run_recorded(journal, kind), tmp_path, monkeypatch)
    found_states = list(states(steps))
    rng, bad = np.random.default_rng(0), []
    chosen = rng.choice(len(found_states), size=min(60, len(found_states)), replace=False)
    for i in chosen:
        count, rule, tree = found_states[i]
        build(tree, tmp_path / str(i))
        try:
            study.go_on(tmp_path / str(i) / "run", kind)
            assert study.digest(tmp_path / str(i) / "run") == wanted
        except Exception as error:
            bad.append(f"after {count} steps, {rule}: {type(error).__name__}: {error}")
        shutil.rmtree(tmp_path / str(i))
    say(f"{kind} fit: {len(steps)} steps, {len(found_states)} different crash states, of {len(chosen)} tried {len(chosen) - len(bad)} resumed to the same bits")
    assert not bad, "\n".join(bad[:10])


def run_recorded(journal: Journal, kind: str) -> None:
    with journal.recording():
        study.begin(journal.root / "run", kind)


def test_found_does_not_hide_damage():
    with pytest.raises(RunError):
        found(lambda: (_ for _ in ()).throw(RunError("a generation is damaged")))
