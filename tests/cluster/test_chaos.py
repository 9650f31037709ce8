"""SIGKILL of a worker, of the driver (the hub lives in it) and of the scheduler at seeded moments: every run ends with the same bits."""

import os
import queue
import random
import shutil
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
EACH = 10  # kills of one fit, at most: few fits have few starts and ends that nobody disturbs
GAP = 4.0  # seconds of work before the first kill of a fit, and between a recovery and the next kill, at most
GROUPS = 800_000  # a dozen tasks a round, and work for longer than kills are apart


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
        # As cluster/README.md advises: the package is imported while a worker starts.
        ready = ["--preload", "pavi_scale.spec", "--death-timeout", "60", *quiet]
        work = ["dask_worker", address, "--no-nanny", "--nthreads", "1", "--host", "127.0.0.1", *ready]
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
    gre.make_cohort(str(folder / "gre.zarr"), groups=GROUPS, observations=2, features=4)
    farm = Farm(folder, tools)
    calm = tools.write_study(folder, "gre", folder / "gre.zarr", folder / "calm", progress=False)
    try:
        done = tools.call(folder, "fit", calm)  # in process
        assert done.returncode == 0, done.stderr
        yield folder, farm, tools.digest(folder / "calm")
    finally:
        farm.close()


class Fit:
    """One fit under kills, each at a seeded moment of work after the one before was got over; what has died is started again."""

    def __init__(self, ground, tools, name):
        self.folder, self.farm, self.expected = ground
        self.tools, self.run = tools, self.folder / name
        self.study = tools.write_study(self.folder, "gre", self.folder / "gre.zarr", self.run, self.farm.file, progress=False)
        self.driver, self.resumed, self.killed = tools.spawn(self.folder, "fit", self.study), 0, 0

    def over(self):
        """Whether the run is done; resumes it when its driver is gone, and starts again what else has died."""
        self.farm.mend()
        code = self.driver.poll()
        if code is not None and code != 0:
            log = (self.folder / "driver.log").read_text()[-3000:]
            assert code in (75, -signal.SIGKILL), log
            assert self.resumed < self.killed + 3, f"the run does not come to an end: {log}"
            self.resumed += 1
            begun = (self.run / "study.json").exists()
            self.driver = self.tools.spawn(self.folder, "resume" if begun else "fit", self.study)
        return code == 0

    def wait(self, what, seconds=300.0):
        """The first true value of `what()`; None if the run was over before."""
        until = time.monotonic() + seconds
        while True:
            over = self.over()  # before the look: the last events of a run that is over count
            if (found := what()) or over:
                return found or None
            assert time.monotonic() < until, (self.folder / "driver.log").read_text()[-3000:]
            time.sleep(0.02)

    def work(self, seconds):
        """Let it work; whether it is still at it after that."""
        until = time.monotonic() + seconds
        return bool(self.wait(lambda: time.monotonic() >= until)) and self.driver.poll() is None

    def kill(self, target, rng):
        """Seconds from the kill to the next answer; None if the run ended without another one: the kill came too late."""
        killed, resumed = time.time(), self.resumed
        self.killed += 1
        for part in target.split(" and "):
            victim = self.driver if part == "driver" else self.farm.parts[part if part == "scheduler" else f"worker {rng.randrange(2)}"]
            victim.send_signal(signal.SIGKILL)
            victim.wait()
        answered = self.wait(lambda: self.answered(killed, self.resumed > resumed))
        return answered - killed if answered else None

    def answered(self, killed, resumed):
        """When a task that the kill took was answered after all; where it took none, or a new driver asks anew: when a worker gave its first answer."""
        after = [e for e in self.tools.events(self.run) if e["time"] > killed]
        lost = not resumed and any(e["event"] == "worker left" and e["task"] is not None for e in after)
        names = ("task recovered" if lost else "worker answered", "done")
        return next((e["time"] for e in after if e["event"] in names), None)

    def close(self):
        self.driver.kill()
        self.driver.wait()


def storm(ground, tools, name, targets):
    """One fit under kills of `targets` in turn, while it works; of each kill its target and the seconds to the next answer, and how often it was resumed."""
    rng, found = random.Random(f"storm {name}"), []
    fit = Fit(ground, tools, f"run-{name}")
    try:
        assert fit.wait(lambda: tools.events(fit.run, "worker joined")), "the run was over before a worker joined"
        while len(found) < len(targets) and fit.work(rng.uniform(0.0, GAP)):
            found.append((targets[len(found)], fit.kill(targets[len(found)], rng)))
        fit.wait(lambda: False)
    finally:
        fit.close()
    assert found, "the run was over before its first kill"
    assert tools.digest(fit.run) == fit.expected, f"fit {name}, {targets}: other bits"
    shutil.rmtree(fit.run)
    return found, fit.resumed


def storms(ground, tools, seed, targets):
    """As many fits as these kills take: what is left over when one ends is for the next."""
    found, resumes, fits = [], 0, 0
    while len(found) < len(targets):
        more, resumed = storm(ground, tools, f"{seed}-{fits}", targets[len(found) :])
        found, resumes, fits = found + more, resumes + resumed, fits + 1
    return found, resumes, fits


def deal(kills, seed):
    """Targets of that many kills, as many of each, shuffled and dealt."""
    deck = [TARGETS[n % len(TARGETS)] for n in range(kills)]
    random.Random(f"deal {seed}").shuffle(deck)
    return [deck[n : n + EACH] for n in range(0, kills, EACH)]


def report(found, resumes, fits):
    """Print a table by target; seconds of all kills that came in time."""
    print(f"\n{len(found)} kills of {fits} fits, {resumes} resumes; seconds to the next answer:")
    for name in (*TARGETS, "all"):
        of = [seconds for target, seconds in found if name in (target, "all")]
        seconds = [s for s in of if s is not None]
        figures = [np.median(seconds), np.quantile(seconds, 0.95), max(seconds)] if seconds else [np.nan] * 3
        print(f"{name:<18} {len(seconds):4d} of {len(of):4d} before the end   median {figures[0]:5.1f}   p95 {figures[1]:5.1f}   most {figures[2]:5.1f}")
    return [s for _, s in found if s is not None]


@pytest.mark.parametrize("hand", range(2))
def test_a_kill_changes_no_bit(ground, tools, hand):
    report(*storms(ground, tools, -1 - hand, deal(2 * EACH, 0)[hand]))


@pytest.mark.slow
@pytest.mark.timeout(36_000)
def test_many_kills_change_no_bit(ground, tools, request):
    kills = request.config.getoption("--kills")
    folder, farm, expected = ground
    free = queue.SimpleQueue()

    def one(seed, targets):
        mine = free.get()
        try:
            found, resumes, fits = storms((folder, mine, expected), tools, seed, targets)
        finally:
            free.put(mine)
        told = ", ".join(f"{target} {'late' if seconds is None else round(seconds, 1)}" for target, seconds in found)
        print(f"{seed}: {fits} fits, {resumes} resumes: {told}", flush=True)
        return found, resumes, fits

    farms = [farm, *(Farm(folder, tools) for _ in range(TOGETHER - 1))]
    try:
        for each in farms:
            free.put(each)
        with ThreadPoolExecutor(TOGETHER) as pool:
            done = list(pool.map(one, range(1, kills + 1), deal(kills, 1)))
    finally:
        for each in farms[1:]:
            each.close()
    seconds = report([kill for found, _, _ in done for kill in found], sum(resumes for _, resumes, _ in done), sum(fits for _, _, fits in done))
    assert len(seconds) > kills / 2, "most kills came after the end"
    assert np.quantile(seconds, 0.95) <= RECOVERY
