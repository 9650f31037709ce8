"""Laws of the run directory: old or new, never between; damage is noticed; one writer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from pavi_scale import durable, lease
from pavi_scale.errors import NumericalError, RunError
from pavi_scale.run import Run, is_run

TENSORS = {
    "w": np.arange(6.0).reshape(2, 3),
    "scalar": np.array(2.5, dtype=np.float32),
    "none": np.zeros((0, 4)),
    "rows": np.arange(3),
    "on": np.array([True, False]),
}


def numbered(k: int) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    return {"w": np.full(50, float(k))}, {"k": k}


def test_commit_and_latest_round_trip(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run")
    assert run.generation is None
    with pytest.raises(RunError, match="no generation yet"):
        run.latest()
    state = {"step": 3, "elbo": -1.25, "names": ["a", "ö"], "nested": {"x": None, "seed": np.int64(2**53 + 1)}, "trace": np.array([0.1, 0.2])}
    assert run.commit(TENSORS, state) == 1
    tensors, back = Run.open(tmp_path / "run").latest()
    assert set(tensors) == set(TENSORS)
    for name, value in TENSORS.items():
        assert tensors[name].dtype == value.dtype
        assert tensors[name].shape == value.shape
        np.testing.assert_array_equal(tensors[name], value)
    assert back == {"step": 3, "elbo": -1.25, "names": ["a", "ö"], "nested": {"x": None, "seed": 2**53 + 1}, "trace": [0.1, 0.2]}
    assert run.state() == back


def test_two_generations_are_kept(tmp_path: Path) -> None:
    run = Run.create(tmp_path)
    for k in range(1, 6):
        run.commit(*numbered(k))
    assert sorted(p.name for p in (tmp_path / "generations").iterdir()) == ["000004", "000005"]
    assert run.kept == (4, 5)
    assert run.latest()[1] == {"k": 5}
    assert run.latest(4)[1] == {"k": 4}
    with pytest.raises(RunError, match="not kept"):
        run.latest(3)


def test_create_open_and_paths(tmp_path: Path) -> None:
    temporary = Run.create()
    temporary.commit(*numbered(1))
    assert temporary.path.is_dir()
    run = Run.create(tmp_path / "deep" / "run")
    assert Run.create(tmp_path / "deep" / "run").generation is None  # nothing committed: nothing to lose
    run.commit(*numbered(1))
    run.log("started")
    with pytest.raises(RunError, match="holds a run already"):
        Run.create(run.path)
    again = Run.create(run.path, overwrite=True)
    assert again.generation is None
    assert again.events() == []
    assert Run.open(run.path.as_uri()).path == run.path
    assert is_run(run.path)
    assert not is_run(tmp_path)


def test_bad_paths_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for bad, match in [
        ("s3://bucket/run", "local directory"),
        ("memory://run", "local directory"),
        (tmp_path / "file" / "run", "cannot be written"),
        ("", "empty"),
        ("/proc/run", "cannot be written"),
    ]:
        with pytest.raises(RunError, match=match):
            Run.create(bad)
    with pytest.raises(RunError, match="there is no run"):
        Run.open(tmp_path / "nowhere")
    with pytest.raises(RunError, match="cannot be read|there is no run"):
        Run.open(tmp_path / "file")


def test_unknown_formats_are_refused(tmp_path: Path) -> None:
    Run.create(tmp_path)
    pointer = {"generation": None, "manifests": {}}
    for document, match in [({"format": "other", "version": 1}, "not a run"), ({"format": "pavi-scale-run", "version": 99}, "does not read")]:
        (tmp_path / "run.json").write_bytes(durable.seal({**pointer, **document}, where="test"))
        with pytest.raises(RunError, match=match):
            Run.open(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({**pointer, "format": "pavi-scale-run", "version": 1}))
    with pytest.raises(RunError, match="no digest"):
        Run.open(tmp_path)


def test_only_plain_finite_values_are_recorded(tmp_path: Path) -> None:
    run = Run.create(tmp_path)
    with pytest.raises(NumericalError, match=r"'w', index \[1, 2\]"):
        run.commit({"w": np.array([[0, 0, 0], [0, 0, np.nan]])}, {})
    with pytest.raises(NumericalError, match="not finite"):
        run.commit({}, {"elbo": float("-inf")})
    with pytest.raises(RunError, match="type that is not stored"):
        run.commit({"w": np.array([object()])}, {})
    with pytest.raises(RunError, match="JSON"):
        run.commit({}, {"law": lambda: 0})
    assert run.generation is None
    assert list((tmp_path / "generations").iterdir()) == []


def test_study_and_events(tmp_path: Path) -> None:
    run = Run.create(tmp_path)
    with pytest.raises(RunError, match="does not say"):
        run.read_study()
    study = {"model": "pipelines.radon:model", "fingerprint": "00ff", "config": {"seed": 0}}
    run.write_study(study)
    assert run.read_study() == study
    run.log("step", elbo=np.float64(-3.0), k=1)
    with (tmp_path / "events.jsonl").open("a") as stream:
        stream.write('{"event": "to')  # a line torn by a crash
    run.log("step", k=2)
    assert [(e["event"], e["k"]) for e in run.events()] == [("step", 1), ("step", 2)]


def test_every_flipped_bit_and_truncation_is_noticed(tmp_path: Path) -> None:
    run = Run.create(tmp_path)
    for k in (1, 2):
        run.commit(TENSORS, {"k": k, "text": "abc", "x": 1.5})
    run.write_study({"model": "m:m"})
    rng = np.random.default_rng(0)
    current = tmp_path / "generations" / "000002"
    for file in [*current.iterdir(), tmp_path / "run.json", tmp_path / "study.json"]:
        whole = file.read_bytes()

        def read() -> None:
            run.latest()
            run.read_study()

        for position in rng.choice(len(whole), size=min(60, len(whole)), replace=False):
            broken = bytearray(whole)
            broken[position] ^= 1 << int(rng.integers(8))
            file.write_bytes(bytes(broken))
            with pytest.raises(RunError):
                read()
        for length in (0, 1, len(whole) // 2, len(whole) - 2):
            file.write_bytes(whole[:length])
            with pytest.raises(RunError):
                read()
        file.unlink()
        with pytest.raises(RunError):
            read()
        file.write_bytes(whole)
        read()
    (current / "weights.safetensors").write_bytes(b"")
    with pytest.raises(RunError, match=r"generation 1 is kept: run\.latest\(1\)"):
        run.latest()
    assert run.latest(1)[1]["k"] == 1


def test_symbolic_links_do_not_lead_out(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run")
    run.commit(*numbered(1))
    weights = run.path / "generations" / "000001" / "weights.safetensors"
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="symbolic link"):
        run.latest()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@settings(max_examples=30)
@given(st.dictionaries(st.text().filter(lambda k: k != "sha256"), json_values))
def test_seal_and_unseal_are_inverse(document: dict[str, object]) -> None:
    try:
        data = durable.seal(document, where="test")
    except NumericalError:
        return  # lone surrogates and integers too long for text
    assert durable.unseal(data, where="test") == document


@given(st.binary() | json_values.map(lambda v: json.dumps(v).encode()))
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
def test_foreign_bytes_give_typed_errors(data: bytes) -> None:
    with pytest.raises(RunError):
        durable.unseal(data, where="test")


# -- crashes --------------------------------------------------------------------------------------------------------


class Crash(BaseException):
    """Stands for the process ending here."""


OPERATIONS = ["mkdir", "open", "write", "fsync", "rename", "replace", "rmdir", "unlink", "save_file"]


def _crash_at(monkeypatch: pytest.MonkeyPatch, count: int) -> list[str]:
    """Let `count` operations on the disk happen, then crash, and do nothing any more."""
    done: list[str] = []

    def wrap(name: str, real: object) -> object:
        def operation(*args: object, **kwargs: object) -> object:
            if len(done) >= count:
                raise Crash(name)
            done.append(name)
            return real(*args, **kwargs)  # type: ignore[operator]

        return operation

    for name in OPERATIONS[:-1]:
        monkeypatch.setattr(os, name, wrap(name, getattr(os, name)))
    monkeypatch.setattr("pavi_scale.run.save_file", wrap("save_file", save_file))
    return done


def test_a_crash_after_any_operation_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    seen = set()
    for count in range(200):
        run = Run.create(tmp_path / str(count))
        run.commit(*numbered(1))
        run.commit(*numbered(2))
        with pytest.MonkeyPatch.context() as patch:
            done = _crash_at(patch, count)
            try:
                run.commit(*numbered(3))
                crashed = False
            except Crash:
                crashed = True
        tensors, state = Run.open(run.path).latest()
        assert state["k"] in (2, 3)
        np.testing.assert_array_equal(tensors["w"], np.full(50, float(state["k"])))
        seen.add(state["k"])
        # The next process goes on as if nothing had been.
        after = Run.open(run.path)
        with after.lock():
            assert after.commit(*numbered(4)) == state["k"] + 1
        assert after.latest()[1] == {"k": 4}
        assert len(list((run.path / "generations").iterdir())) == 2
        if not crashed:
            assert {"fsync", "rename", "replace", "save_file"} <= set(done)
            break
    assert not crashed
    assert seen == {2, 3}


# The run directory needs neither torch nor the rest of the package: children that skip its `__init__` start in a fraction of a second.
LEAN = """
import sys, types
package = types.ModuleType("pavi_scale")
package.__path__ = ["pavi_scale"]
sys.modules["pavi_scale"] = package
"""

CHILD = (
    LEAN
    + """
import numpy as np
from pavi_scale.run import Run
run = Run.open(sys.argv[1])
with run.lock():
    k = run.latest()[1]["k"]
    while True:
        k += 1
        run.commit({"w": np.full(20000, float(k))}, {"k": k})
        print(k, flush=True)
"""
)

CONTENDER = (
    LEAN
    + """
import os, time
from pathlib import Path
from pavi_scale.errors import RunError
from pavi_scale.run import Run
run = Run.open(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
try:
    with run.lock():
        print("won", flush=True)
        sys.stdin.readline()  # holds on until the others have answered
except RunError as error:
    print(error, flush=True)
"""
)


def test_sigkill_in_the_middle_of_commits(tmp_path: Path, root: Path) -> None:
    run = Run.create(tmp_path)
    run.commit({"w": np.zeros(20000)}, {"k": 0})
    rng = np.random.default_rng(0)
    for _ in range(10):
        before = run.latest()[1]["k"]
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=root)
        try:
            first = child.stdout.readline()
            assert int(first) == before + 1  # it took over the killed one's lease at once
            time.sleep(rng.uniform(0, 0.05))
        finally:
            child.kill()
            rest = child.communicate()[0]
        said = [int(line) for line in [first, *rest.split()]]
        tensors, state = run.latest()
        assert state["k"] in (said[-1], said[-1] + 1)  # what was announced is there
        np.testing.assert_array_equal(tensors["w"], np.full(20000, float(state["k"])))


def test_a_full_disk_leaves_the_last_generation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.create(tmp_path)
    run.commit(*numbered(1))
    real = os.write
    for allowed in range(3):  # state, manifest, pointer
        left = [allowed]

        def write(handle: int, data: bytes, left: list[int] = left) -> int:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(28, "No space left on device")
            return real(handle, data)

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", write)
            with pytest.raises(RunError, match="disk is full"):
                run.commit(*numbered(2))
        assert run.latest()[1] == {"k": 1}
    run.commit(*numbered(2))
    assert run.latest()[1] == {"k": 2}


# -- one writer -----------------------------------------------------------------------------------------------------


def test_the_lease_says_who_holds_it(tmp_path: Path) -> None:
    run = Run.create(tmp_path)
    with run.lock() as first:
        other = Run.open(tmp_path)
        with pytest.raises(RunError, match=rf"process {os.getpid()} on host"), other.lock():
            pass
        with pytest.raises(RunError, match="another process"):
            other.commit(*numbered(1))
        with pytest.raises(RunError, match="another process"):
            Run.create(tmp_path, overwrite=True)
        run.commit(*numbered(1))
    with other.lock() as second:
        assert second.token > first.token
        other.commit(*numbered(2))


def test_a_silent_holder_is_fenced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, other = Run.create(tmp_path), Run.open(tmp_path)
    with run.lock() as stale:
        old = time.time() - 2 * lease.STALE_AFTER
        os.utime(tmp_path / "leases" / f"{stale.token:06d}.json", (old, old))
        with other.lock() as fresh:
            assert fresh.token == stale.token + 1
            other.commit(*numbered(1))
            with pytest.raises(RunError, match="lease on the run was lost"):
                run.commit(*numbered(2))
            assert run.latest()[1] == {"k": 1}


def test_the_heartbeat_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT", 0.02)
    run = Run.create(tmp_path)
    with run.lock() as held:
        path = tmp_path / "leases" / f"{held.token:06d}.json"
        os.utime(path, (1, 1))
        deadline = time.monotonic() + 5
        while path.stat().st_mtime < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert path.stat().st_mtime > 2


def test_of_many_contenders_one_wins(tmp_path: Path, root: Path) -> None:
    for trial in range(5):
        run = Run.create(tmp_path / str(trial))
        command = [sys.executable, "-c", CONTENDER, str(run.path)]
        children = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root) for _ in range(4)]
        try:
            assert [c.stdout.readline() for c in children] == ["ready\n"] * 4
            for child in children:
                child.stdin.write("go\n")
                child.stdin.flush()
            answers = [c.stdout.readline() for c in children]
        finally:
            for child in children:
                child.communicate()
        winners = [c.pid for c, answer in zip(children, answers, strict=True) if answer == "won\n"]
        assert len(winners) == 1
        assert all(f"process {winners[0]} on host" in answer for answer in answers if answer != "won\n")
        with run.lock():  # released at the end
            pass
