"""SIGKILL at seeded moments: what is resumed is bit for bit the undisturbed run."""

import contextlib
import os
import signal
import time
from unittest import mock

import numpy as np
import pytest

from pavi_scale.errors import RunError
from pavi_scale.run import Run
from tests.faults import study


def inside(zygote, undisturbed, path, kind, rng, kills=1):
    """Kill at random calls on the disk, as often as asked, then go on to the end; returns where it was killed."""
    places = []
    for _ in range(kills):
        at = int(rng.integers(1, undisturbed[kind][1] + 1))
        code = zygote.run(path, kind, kill_at=at)
        assert code in (-signal.SIGKILL, 0), path.with_suffix(".error").read_text()
        places.append(at)
    assert zygote.run(path, kind) == 0, path.with_suffix(".error").read_text()
    assert study.digest(path) == undisturbed[kind][0], f"{kind} killed at calls {places}"


def at_a_time(zygote, undisturbed, path, kind, rng, seconds):
    pid = zygote.start(path, kind)
    time.sleep(rng.uniform(0, seconds))
    with contextlib.suppress(ProcessLookupError):  # on a fast machine the fit may have ended: nothing is lost then either
        os.kill(pid, signal.SIGKILL)
    zygote.wait()
    assert zygote.run(path, kind) == 0, path.with_suffix(".error").read_text()
    assert study.digest(path) == undisturbed[kind][0]


@pytest.mark.parametrize("kind", ["plain", "rows"])
def test_killed_inside_commits(zygote, undisturbed, tmp_path, kind):
    rng = np.random.default_rng(1)
    inside(zygote, undisturbed, tmp_path / "run", kind, rng, kills=3)


def test_killed_at_any_time(zygote, undisturbed, tmp_path):
    rng = np.random.default_rng(2)
    for i, kind in enumerate(["plain", "rows"]):
        at_a_time(zygote, undisturbed, tmp_path / str(i), kind, rng, 2.0)


def test_a_different_result_would_be_seen(zygote, undisturbed, tmp_path):
    """Power: the digest tells two seeds, and two runs that differ by one unit in the last place, apart."""
    assert undisturbed["plain"][0] != undisturbed["rows"][0]
    assert zygote.run(tmp_path / "run", "plain") == 0
    assert study.digest(tmp_path / "run") == undisturbed["plain"][0]
    chunk = next((tmp_path / "run" / "posterior.zarr" / "posterior_mean" / "theta").rglob("c/*"))
    data = bytearray(chunk.read_bytes())
    data[0] ^= 1
    chunk.write_bytes(bytes(data))
    assert study.digest(tmp_path / "run") != undisturbed["plain"][0]


def test_a_settled_fit_that_was_cut_before_it_said_so(tmp_path):
    study.begin(tmp_path / "whole", study.SETTLING)
    real = Run.commit

    def commit(run, tensors, state):
        if state["phase"] == "trained":
            raise RunError("cut")
        return real(run, tensors, state)

    with mock.patch.object(Run, "commit", commit), pytest.raises(RunError, match="cut"):
        study.begin(tmp_path / "cut", study.SETTLING)
    study.go_on(tmp_path / "cut", study.SETTLING)
    assert study.digest(tmp_path / "cut") == study.digest(tmp_path / "whole")


@pytest.mark.slow
def test_fifty_kills(zygote, undisturbed, tmp_path, say):
    rng, kills = np.random.default_rng(3), 0
    for i in range(30):
        kind = ("plain", "rows")[i % 2]
        inside(zygote, undisturbed, tmp_path / f"inside{i}", kind, rng)
        at_a_time(zygote, undisturbed, tmp_path / f"time{i}", kind, rng, 2.0) if i < 20 else None
        kills += 1 + (i < 20)
    say(f"{kills} of {kills} killed runs resumed to the bits of the undisturbed one")
