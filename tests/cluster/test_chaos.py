"""SIGKILL of a worker, of the driver (the hub lives in it) and of the scheduler at seeded moments: every run ends with the same bits."""

import os
import queue
import random
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pipelines import gre

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")]

TOGETHER = max(1, (os.cpu_count() or 1) // 2)  # fits under kills at the same time, each on two workers of its own: one worker a core
RECOVERY = 30.0  # seconds to the next answer, in 95 of 100 kills
TARGETS = ("worker", "driver", "scheduler", "worker and driver")


class Farm:
    """A scheduler and two workers in processes of their own; `mend` starts again what has died, as a batch system would."""

    def __init__(self, folder, tools):
        self.folder, self.tools = folder, tools
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.parts = {}
        self.file = f"farm{self.port}.yaml"
        (folder / self.file).write_text(f"{{kind: scheduler, address: 'tcp://127.0.0.1:{self.port}', workers: 1, patience: 120}}\n")
        self.mend()

    def mend(self):
        address = f"tcp://127.0.0.1:{self.port}"
        quiet = ["--dashboard-address", "127.0.0.1:0"]
        calls = {"scheduler": ["dask_scheduler", "--host", "127.0.0.1", "--port", str(self.port), *quiet]}
        work = ["dask_worker", address, "--no-nanny", "--nthreads", "1", "--host", "127.0.0.1", "--death-timeout", "60", *quiet]
        calls |= {f"worker {n}": work for n in range(2)}
        for name, (module, *arguments) in calls.items():
            if name not in self.parts or self.parts[name].poll() is not None:
                call = [sys.executable, "-m", f"distributed.cli.{module}", *arguments]
                with (self.folder / f"{name} {self.port}.log").open("ab") as out:
                    self.parts[name] = subprocess.Popen(call, env=self.tools.environment, stdout=out, stderr=out, cwd=self.folder)

    def close(self):
        for part in self.parts.values():
            part.kill()
        for part in self.parts.values():
            part.wait()


@pytest.fixture(scope="module")
def ground(tools, tmp_path_factory):
    """Folder with the study, the farm, the digest and the duration of the undisturbed run."""
    folder = tmp_path_factory.mktemp("chaos")
    gre.make_cohort(str(folder / "gre.zarr"), groups=100_000, observations=2, features=4)
    farm = Farm(folder, tools)
    calm = tools.write_study(folder, "gre", folder / "gre.zarr", folder / "calm", progress=False)
    try:
        done = tools.call(folder, "fit", calm)  # in process
        assert done.returncode == 0, done.stderr
        yield folder, farm, tools.digest(folder / "calm")
    finally:
        farm.close()


def moment(run, tools, driver, after):
    """Wait for `after` seconds of work of the run's workers, or its end."""
    tools.wait_for(lambda: driver.poll() is not None or tools.events(run, "worker joined"), 600, 0.02)
    until = time.monotonic() + after
    while time.monotonic() < until and driver.poll() is None:
        time.sleep(0.01)


def storm(ground, tools, seed, target):
    """One fit under one kill; seconds from the kill to the next answer (None if the kill came too late), and how often it was resumed."""
    folder, farm, expected = ground
    rng = random.Random(f"{seed} {target}")
    run = folder / f"run-{seed}-{target}".replace(" ", "-")
    study = tools.write_study(folder, "gre", folder / "gre.zarr", run, farm.file, progress=False)
    driver, resumed = tools.spawn(folder, "fit", study), 0
    killed = None
    try:
        moment(run, tools, driver, rng.uniform(0.0, 4.0))
        if driver.poll() is None:
            killed = time.time()
            for part in target.split(" and "):
                victim = driver if part == "driver" else farm.parts[part if part == "scheduler" else f"worker {rng.randrange(2)}"]
                victim.send_signal(signal.SIGKILL)
                victim.wait()
        while True:
            farm.mend()
            try:
                code = driver.wait(timeout=0.25)
            except subprocess.TimeoutExpired:
                continue
            if code == 0:
                break
            assert code in (75, -signal.SIGKILL), (folder / "driver.log").read_text()[-3000:]
            assert (resumed := resumed + 1) < 4, "the run does not come to an end"
            begun = (run / "study.json").exists()
            driver = tools.spawn(folder, "resume" if begun else "fit", study)
    finally:
        driver.kill()
        driver.wait()
    assert tools.digest(run) == expected, f"seed {seed}, {target}: other bits"
    after = [e["time"] for e in tools.events(run, "task recovered", "first round done", "done") if killed and e["time"] > killed]
    return (min(after) - killed if after else None), resumed


def report(found):
    seconds = sorted(s for s, _ in found if s is not None)
    if seconds:
        print(f"\n{len(found)} kills, {len(seconds)} in time; {sum(r for _, r in found)} resumes; seconds to the next answer: "
              f"median {np.median(seconds):.1f}, p95 {np.quantile(seconds, 0.95):.1f}, most {seconds[-1]:.1f}")
    return seconds


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("target", TARGETS)
def test_a_kill_changes_no_bit(ground, tools, target, seed):
    storm(ground, tools, -seed, target)


@pytest.mark.slow
@pytest.mark.timeout(36_000)
def test_many_kills_change_no_bit(ground, tools, request):
    kills = request.config.getoption("--kills")
    folder, farm, expected = ground
    free = queue.SimpleQueue()

    def one(seed):
        mine = free.get()
        try:
            found = storm((folder, mine, expected), tools, seed, TARGETS[seed % len(TARGETS)])
        finally:
            free.put(mine)
        print(seed, TARGETS[seed % len(TARGETS)], found, flush=True)
        return found

    farms = [farm, *(Farm(folder, tools) for _ in range(TOGETHER - 1))]
    try:
        for each in farms:
            free.put(each)
        with ThreadPoolExecutor(TOGETHER) as pool:
            found = list(pool.map(one, range(1, kills + 1)))
    finally:
        for each in farms[1:]:
            each.close()
    seconds = report(found)
    assert len(seconds) > kills / 2, "most kills came after the end"
    assert np.quantile(seconds, 0.95) <= RECOVERY
