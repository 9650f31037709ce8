"""Signals end a fit at a checkpoint; handles, threads and memory do not grow over many fits."""

import json
import os
import signal
import time

import numpy as np
import pytest

from pavi_scale.errors import Interrupted
from tests.faults import study

WITHIN = 30  # seconds


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_at_a_checkpoint(zygote, undisturbed, tmp_path, name):
    rng, stopped = np.random.default_rng(4), 0
    for i, kind in enumerate(("plain", "rows")):
        path = tmp_path / str(i)
        pid = zygote.start(path, kind)
        time.sleep(rng.uniform(0.05, 0.4))
        sent = time.monotonic()
        os.kill(pid, getattr(signal, name))
        code = zygote.wait()
        assert time.monotonic() - sent < WITHIN
        assert code in (0, Interrupted.exit_code), code
        stopped += code == Interrupted.exit_code
        assert zygote.run(path, kind) == 0, path.with_suffix(".error").read_text()
        assert study.digest(path) == undisturbed[kind][0]
    assert stopped


def check_flat(zygote, path, kind, fits):
    """After the first third, handles and threads stay the same, memory within 5 %."""
    assert zygote.run(path, kind, repeat=fits) == 0
    handles, resident, threads = np.array(json.loads(path.with_suffix(".usage").read_text())).T[:, fits // 3 :]
    assert np.ptp(handles) == 0, handles
    assert np.ptp(threads) == 0, threads
    assert resident[-1] < 1.05 * resident[0], resident
    return f"{fits} {kind} fits: {handles[-1]} handles, {threads[-1]} threads, {resident[0] / 2**20:.1f} to {resident[-1] / 2**20:.1f} MiB"


def test_nothing_grows(zygote, tmp_path):
    check_flat(zygote, tmp_path / "run", "plain", 9)


@pytest.mark.slow
def test_nothing_grows_over_many_fits(zygote, tmp_path, say):
    for kind in study.MODELS:
        say(check_flat(zygote, tmp_path / kind, kind, 60))
