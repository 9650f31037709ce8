"""How far a cluster scales: the server's costs measured here over TCP, then the state machine itself in a simulated cluster of up to 1,024 workers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from distributed import Client, LocalCluster
from matplotlib.figure import Figure

from pavi_scale.server.runtime import DaskEngine
from pavi_scale.server.simulation import Costs, Fleet, Outcome, simulate
from pipelines.bench.meter import Found, Job

WORKERS = (1, 4, 16, 64, 256, 1024)
LINKS = (1.0, 10.0, 100.0)
STUDY_SECONDS = 150.0  # one pass over the cortical study's 416 million latents on one core: 36 s of arithmetic, gradients, decoding of 15 GB
TASKS = 4096  # of a study without free rows, whose tasks are as many as its shards
STATE_BYTES, ANSWER_BYTES = 2e5, 2e4  # root points and weights; bounds and gradients
# The cortical study itself, with free rows for its 2,000 sessions: pieces of 256 vertices in tasks that get shorter, locations and widths of 448,000
# coordinates and starting points of 59,412 vertices to each worker, scores and curvatures back, half a second of solving in between.
PIECES = (10,) * 12 + (5,) * 12 + (3,) * 12 + (1,) * 17
ROWS_STATE_BYTES, ROWS_ANSWER_BYTES, SOLVE_SECONDS = 1.05e7, 7.7e6, 0.5
ROUNDS = 4
STEP_SECONDS, STEPS, STALENESS, STEP_WORKERS = 0.05, 400, (0, 3, 15, 63), (1, 4, 16, 64)  # minibatch steps of one task each
SPELL_SECONDS = 90.0  # simulated, under preemption


class Echo:
    """A computation that takes no time: what is left is the server's work."""

    threads = 1

    def build(self) -> Echo:
        """Nothing to build."""
        return self

    def compute(self, kind: str, state: Mapping[str, np.ndarray], task: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """An answer of the wanted size."""
        return {"y": np.zeros(task["size"])}


def server_costs(tasks: int = 400) -> tuple[float, float]:
    """Processor seconds of the driver for one push with the next pull, and for one byte of an answer; two workers over TCP on this machine."""
    seconds = {}
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster, set_as_default=False) as client,
        DaskEngine(client, Echo()) as engine,
    ):
        client.wait_for_workers(2)
        for size in (8, 250_000, 8):  # the first time is for warming up
            began = time.process_time()
            engine.round("echo", {}, [{"size": size}] * tasks)
            seconds[size] = (time.process_time() - began) / tasks
    return seconds[8], max(0.0, (seconds[250_000] - seconds[8]) / (8 * 250_000))


def limit(outcome: Outcome) -> str:
    """What keeps the workers from working, if anything does."""
    if outcome.efficiency > 0.8:
        return "nothing"
    scarce = {name: share for name, share in outcome.busy.items() if name != "workers"}
    name = max(scarce, key=lambda n: scarce[n])
    return name if scarce[name] > 0.5 else "end of the round"


def scenarios(costs: Costs) -> dict[str, dict[int, Outcome]]:
    """Outcome of each scenario for each number of workers."""
    kinds: dict[str, dict[str, float]] = {f"{g:g} Gbit/s": {"gigabits": g} for g in LINKS}
    kinds |= {"5 % stragglers, 4 x slower": {"stragglers": 0.05}}
    found = {name: {n: simulate(costs, Fleet(n, **kind), ROUNDS if n > 4 else 1) for n in WORKERS} for name, kind in kinds.items()}  # type: ignore[arg-type]
    # Long enough for several preemptions.
    rounds = {n: max(1, round(SPELL_SECONDS / outcome.round_seconds)) for n, outcome in found["10 Gbit/s"].items()}
    found["a preemption each minute"] = {n: simulate(costs, Fleet(n, preemptions=1.0), rounds[n]) for n in WORKERS}
    larger = replace(costs, task_seconds=10 * costs.task_seconds)
    found["tasks ten times as long"] = {n: simulate(larger, Fleet(n), ROUNDS if n > 4 else 1) for n in WORKERS}
    count, bytes_added = len(PIECES), 2 * ROWS_ANSWER_BYTES
    rows = replace(
        costs, tasks=count, task_seconds=STUDY_SECONDS / count, lengths=tuple(p * count / sum(PIECES) for p in PIECES), state_bytes=ROWS_STATE_BYTES,
        answer_bytes=ROWS_ANSWER_BYTES, reduce_seconds=SOLVE_SECONDS / count + bytes_added * costs.byte_seconds,
    )  # fmt: skip
    found |= {f"free rows, {g:g} Gbit/s": {n: simulate(rows, Fleet(n, gigabits=g), ROUNDS if n > 4 else 1) for n in WORKERS} for g in LINKS[:2]}
    return found


def draw(found: Mapping[str, Mapping[int, Outcome]], title: str) -> Figure:
    """Efficiency against workers, and what the driver's parts do at 10 Gbit/s."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, outcomes in found.items():
        left.plot(list(outcomes), [100 * o.efficiency for o in outcomes.values()], marker="o", label=name)
    left.set(xscale="log", xlabel="workers", ylabel="workers' time in tasks (%)", ylim=(0, 103), title=title)
    outcomes = found["10 Gbit/s"]
    for part in ("event loop", "link out", "link in", "reduction"):
        right.plot(list(outcomes), [100 * o.busy[part] for o in outcomes.values()], marker="o", label=part)
    right.set(xscale="log", xlabel="workers", ylabel="busy (%)", ylim=(0, 103), title="the driver at 10 Gbit/s")
    for axes in (left, right):
        axes.set_xticks(WORKERS, [f"{n:,}" for n in WORKERS])
        axes.minorticks_off()
        axes.legend(fontsize=8)
    return figure


def scale(job: Job) -> Found:
    """Measure, simulate, draw."""
    exchange, per_byte = server_costs()
    costs = Costs(TASKS, STUDY_SECONDS / TASKS, STATE_BYTES, ANSWER_BYTES, exchange, per_byte)
    found = scenarios(costs)
    rows: list[dict[str, Any]] = [
        {
            "scenario": name, "workers": n, "seconds a round": o.round_seconds, "efficiency (%)": 100 * o.efficiency,
            "event loop (%)": 100 * o.busy["event loop"], "link out (%)": 100 * o.busy["link out"], "link in (%)": 100 * o.busy["link in"],
            "lost tasks": o.lost, "limited by": limit(o),
        }
        for name, outcomes in found.items() for n, o in outcomes.items()
    ]  # fmt: skip
    step = Costs(1, STEP_SECONDS, STATE_BYTES, STATE_BYTES, exchange, per_byte)
    found_steps = {(s, n): simulate(step, Fleet(n, stragglers=0.05), STEPS, staleness=s) for s in STALENESS for n in STEP_WORKERS}
    steps = ", ".join(f"s={s} with {n} workers: {1 / o.round_seconds:.0f}" for (s, n), o in found_steps.items())
    job.results.mkdir(parents=True, exist_ok=True)
    draw(found, f"one pass of {STUDY_SECONDS:.0f} core-seconds, {TASKS:,} tasks").savefig(job.results / "scale.png", dpi=120)
    notes = [
        f"server, measured over TCP: {1e3 * exchange:.2f} ms of its processor for a push with the next pull, {1e9 * per_byte:.2f} ns for a byte of an answer",
        f"simulated: rounds of {TASKS:,} tasks of {1e3 * STUDY_SECONDS / TASKS:.0f} ms; state {STATE_BYTES / 1e3:.0f} kB, answers {ANSWER_BYTES / 1e3:.0f} kB",
        f"minibatch steps a second, one task of {1e3 * STEP_SECONDS:.0f} ms each, 5 % stragglers, staleness s: {steps}",
        f"figure: {job.results / 'scale.png'}",
    ]
    return Found(rows, notes, {"exchange_seconds": exchange, "byte_seconds": per_byte})
