"""Diagnostics of a fit: Pareto k-hat per ground unit given its parents, and the status they amount to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pavi_scale.computation import StudyComputation
from pavi_scale.psis import khat
from pavi_scale.server.protocol import Asked, Engine
from pavi_scale.weighing import EFFECTIVE, LEAST_EFFECTIVE, groups_of

SAMPLES = 128  # draws per unit: a tail of 26
LIMIT = 0.7  # k-hat above which importance weights are not to be trusted (Vehtari et al. 2024)
EFFICIENT = 0.3  # relative effective sample size that makes a high k-hat harmless
LOST = 0.5  # share of a direction's precision that its couplings would take away: at half, the variance there is twice what the fit says
POINTS = 0.1, 0.3, 0.7, 0.9  # shares of the pool's weight, in its order, at which units are looked at beside the middle
SHIFTED = 0.1  # variance (nats squared) of log weights for each coordinate, above which a Gaussian is a third of an sd off (Pinsker's order of size)
UNITS = 20_000  # ground units up to which every k-hat is computed; of more, those of a sample (the rest is unknown: NaN)
PROBED = 2_000
PARTS = 4  # neighbourhoods that these come from
Table = tuple[tuple[str, ...], np.ndarray | float]  # dimensions and values


def ask_ratios(computation: StudyComputation, engine: Engine, state: Mapping[str, np.ndarray], seed: int, tasks: Sequence[Mapping[str, Any]]) -> Asked | None:
    """Ask for the importance weights of units at the middle of q(root), of a small study before at other points of it; None where none could vary."""
    if not any(c.finest for c in computation.guide.components):
        return None
    weight = state["pool/weight"]
    shares = [*(POINTS if finest_units(computation) <= PROBED else ()), 0.5]
    points = state["pool/points"][[int(np.searchsorted(np.cumsum(weight), share).clip(0, len(weight) - 1)) for share in shares]]
    asked = [{**task, "samples": SAMPLES, "seed": seed, "at": at} for at in range(len(points)) for task in few(computation, tasks)]
    return engine.submit("ratios", {**state, "points": points}, asked)


def diagnose(
    computation: StudyComputation, answers: Sequence[Mapping[str, np.ndarray]], state: Mapping[str, np.ndarray], facts: Mapping[str, Any]
) -> tuple[str, dict[str, Table]]:
    """Status and the arrays of the group `diagnostics`: `khat` of the finest block, `khat_<block>` of each, `khat_root`.

    Linear-Gaussian components have constant importance weights: k-hat -1, nothing is computed.

    Args:
        computation: Of the study.
        answers: To `ask_ratios`.
        state: The trained state.
        facts: What training found of itself.
    """
    guide, layout = computation.guide, computation.layout
    tables: dict[str, np.ndarray] = {}
    poor: dict[bool, list[np.ndarray]] = {True: [], False: []}  # of finest blocks, and of coarser ones
    finest = guide.finest
    plates: dict[str, tuple[str, ...]] = {}
    for component in guide.components:
        for block in component.blocks:
            name = khat_name(block.name)
            plates[name] = block.plates
            value = -1.0 if component.quadratic and not block.free else np.nan
            tables[name] = np.full([layout.cardinality[p] for p in block.plates], value)
    # A draw is one of several candidates: it is good enough if some of them carry the weight.
    enough = min(EFFICIENT, EFFECTIVE / max(1, computation.draws_per_unit(state)))
    for answer in answers:
        for key, ratios in answer.items():
            if key.startswith("ratio/"):
                name = khat_name(key.removeprefix("ratio/"))
                at = np.ix_(*(answer[f"units/{key.removeprefix('ratio/')}/{p}"] for p in plates[name]))
                tables[name][at] = np.clip(khat(ratios.T), -1.0, 10.0).reshape(tables[name][at].shape)
                w = np.exp(ratios - ratios.max(0))
                own = key.removeprefix("ratio/")
                least = enough if own in finest else groups_enough(computation, state, own, ratios)
                poor[own in finest].append((tables[name][at].ravel() > LIMIT) & (w.sum(0) ** 2 < least * len(w) * (w * w).sum(0)))
    root = facts.get("khat_root")
    found: dict[str, Table] = {n: (plates[n], v) for n, v in tables.items()}
    found["khat_root"] = (), float("nan") if root is None else float(np.clip(root, -1.0, 10.0))
    found["khat"] = found[max(tables, key=lambda n: tables[n].size)] if tables else found["khat_root"]
    status = [status_of(facts, some, root) for some in poor.values()]
    return next((s for s in status if s != "ok"), "ok"), found


def groups_enough(computation: StudyComputation, state: Mapping[str, np.ndarray], block: str, ratios: np.ndarray) -> np.ndarray | float:
    """Relative effective sample size of groups of candidates below which a coarser block's draws are not its posterior's.

    Where they are picked (`candidates`), a few of them should carry the weight. Where they are not, because of many coordinates together few would, each
    coordinate may still be right: unless log weights `[M, n]` vary by more than so many of them explain.
    """
    groups = groups_of(state)
    if groups > 1:
        return min(EFFICIENT, LEAST_EFFECTIVE / groups)
    component = next(c for c in computation.guide.components if any(b.name == block for b in c.blocks))
    cardinality, top = computation.layout.cardinality, component.top(computation.graph.model.plates)
    coarser = sum(b.dim * math.prod(cardinality[p] for p in b.plates) for b in component.blocks if b.name not in component.finest)
    each = coarser / math.prod(cardinality[p] for p in (top.plates if top else ()))
    return np.where(np.var(ratios, 0) > SHIFTED * each, EFFICIENT, 0.0)


def finest_units(computation: StudyComputation) -> int:
    """Ground units of the finest blocks."""
    finest = [b for c in computation.guide.components for b in c.blocks if b.name in c.finest]
    return sum(math.prod(computation.layout.cardinality[p] for p in b.plates) for b in finest)


def khat_name(block: str) -> str:
    """What a block's k-hat is called: by its plates, and not as the root's is."""
    return "khat_root_" if block == "root" else f"khat_{block.replace('*', '_')}"


def few(computation: StudyComputation, tasks: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """All shards of a small study; of a large one, a few that are spread over it, of about `PROBED` units together."""
    split, layout = computation.settings.split, computation.layout
    units = finest_units(computation)
    if split is None or units <= UNITS:
        return tasks
    n = layout.cardinality[split]
    count = max(1, int(n * PROBED / units))
    edges = np.linspace(0, count, min(count, PARTS) + 1).astype(np.int64)
    starts = np.linspace(0, n - count, len(edges) - 1).astype(np.int64) + edges[:-1]
    return [{**tasks[0], "shard": (split, int(a), int(a + size), bool(a == 0))} for a, size in zip(starts, np.diff(edges), strict=True)]


def status_of(facts: Mapping[str, Any], poor: Sequence[np.ndarray], root: float | None) -> str:
    """`unconverged` if a search did not meet its criterion; `unreliable` if several modes compete, or importance weights say that q is far from p.

    Weights are far if their k-hat is above `LIMIT` and, too, their effective sample size is below `EFFICIENT` of the draws: of few draws
    k-hat alone raises false alarms.
    """
    if not facts["converged"]:
        return "unconverged"
    if facts.get("modes", 1) > 1 or facts.get("lost", 0.0) > LOST:
        return "unreliable"
    if root is not None and not root <= LIMIT and facts.get("efficiency", 0.0) < EFFICIENT:
        return "unreliable"
    if poor and np.concatenate(poor).mean() > 0.1:
        return "unreliable"
    return "ok" if all(math.isfinite(v) for _, v in facts["trace"][-1:] if v is not None) else "unconverged"
