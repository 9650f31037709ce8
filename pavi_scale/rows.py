"""Training of free rows: growing selections of the cohort, then whole passes until the data agree with the sites.

Each round looks at a selection *as if it were the cohort* (weights of one), at the centre of the posterior so far, and replaces every site by what
the selection says (`sites.updated`). Widths are then right for the data seen, whatever the round, and a selection four times as large starts within
about two of its predecessor's sds from its own answer: one averaged-Newton step each. Rounds over less than the whole cost a third of a pass
together; the passes over the whole end when no score is left: the step that would follow is small against every posterior sd.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import zip_longest
from typing import Any

import numpy as np
import torch

from pavi_scale.ambient import precision
from pavi_scale.batching import most_units, shards, spread_out
from pavi_scale.diagnosing import LOST
from pavi_scale.errors import NumericalError
from pavi_scale.guide.blocks import lies_below
from pavi_scale.guide.student import StudentT
from pavi_scale.marginal import refit, whitening
from pavi_scale.miniature import first_selection
from pavi_scale.rng import stream
from pavi_scale.sampling import shard_length
from pavi_scale.scores import ROOT, Scores, summed
from pavi_scale.server.answer import torch_threads
from pavi_scale.sites import LONGEST, Centre, Sites, refreshed, residual, updated
from pavi_scale.starts import start_points
from pavi_scale.training import POOL, Fitted, Trainer
from pavi_scale.upper import EVALUATIONS, REFITTED, Upper

GROWTH = 4
LOOK = 3  # rounds over the smallest selection from each start
HASTY = 20  # evaluations of the root's marginal in each of these
SEARCH = 12  # and then at most from the best one
NEAR = 0.5  # sds of the last step at which a larger selection is taken
PASSES = 8  # over the whole cohort at most
CALM = 0.1  # sds that an update moves the rows' coordinates at most (root mean square) when the passes end
WORST = 1.0  # the same of all but one in a thousand: what a step leaves is a few hundredths of it
ROOT_ERROR = 0.02  # of the root's last step, that its curvature is taken to be off by
REFRESH = 500_000
ATTEMPTS = 3  # looks at a selection whose scores are not finite, each from nearer by
APART = 4  # root coordinates up to which each is probed by itself
SHARES = 12  # tasks that half of what is left of a round is divided into, again and again, whoever computes them
LEAST_PIECES = 4  # of a round
POWERS = 4  # rounds that look for lost couplings
LOOKED = 16  # share of the cohort that they look at first, at most
LOST_ROUND = 1_000_000
CELLS = 256  # runs of neighbouring units that selections are made of
PRIOR_STARTS = 3
CENTRED_STARTS = 3  # where the data show centres, the best of them are few
PAIRS = 16  # draws of the root, with both signs, that its Gaussian is averaged over
REFIT_POINTS = 4096
REFIT_VALUES = 100_000_000  # points x coordinates that a refit may take: the driver computes them alone
STANDARD = 100  # effective points of a pool from which noise is standardised: of very few, it would be blown up
BARE, BARE_ROUND, BARE_UNITS = 30, 500, 4_000  # rounds before rows move, at most; their first number; ground units that they look at
NARROW = 0.05  # share of the sd at which a start is looked at

Checkpoint = Callable[[dict[str, np.ndarray], int], None]


@dataclass(frozen=True)
class Found:
    """Where a start has led: sites, root, bound, and where coarse blocks below were found."""

    sites: Sites
    root: np.ndarray
    value: float
    starts: dict[str, np.ndarray]


@dataclass
class Rows:
    """Trains the free rows of a study.

    Args:
        trainer: Engine, seed, deadline, and what is told of progress.
        least: Pieces of a round, at least.
        prior: Draws of the root's prior, `[256, R]`, where they are known.
    """

    trainer: Trainer
    least: int = LEAST_PIECES
    prior: np.ndarray | None = None

    def __post_init__(self) -> None:
        study, seed = self.trainer.study, self.trainer.seed
        self.starts: dict[str, np.ndarray] = {}  # where coarse blocks below were found, or about where they should be
        self.split = study.settings.split
        self.count = study.layout.cardinality.get(self.split or "", 1)
        first = first_selection(study)
        sizes = [] if self.split is None else [min(first, self.count) * GROWTH**i for i in range(40)]
        self.sizes = [s for s in sizes if s <= self.count // GROWTH] + [self.count]
        length, chunk = max(1, min(shard_length(study), self.count // CELLS)), study.cohort.chunk(self.split or "") or 1
        length -= length % chunk if length > chunk else 0  # whole rows of chunks
        self.order = spread_out(self.count, length, max(length, chunk), stream(seed, "cells"))

    # Not made before they are asked for: meanwhile workers read.

    @cached_property
    def draws(self) -> np.ndarray:
        """Draws of the root's prior, `[256, R]`."""
        with precision(torch.float32):
            return self.trainer.study.space.prior_draws(256, stream(self.trainer.seed, "prior") % 2**31) if self.prior is None else self.prior

    @cached_property
    def upper(self) -> Upper:
        """Root, free blocks and what is coupled to them."""
        return Upper(self.trainer.study, whitening(self.draws)[1] if self.trainer.study.space.dim else np.zeros(0))

    def fit(
        self, on_checkpoint: Checkpoint, resumed: tuple[Mapping[str, np.ndarray], int] | None = None,
        begin: Callable[[], tuple[Sites, np.ndarray]] | None = None,
    ) -> Fitted:
        """Sites and root posterior; `begin` finds the first of them, if not `search`."""
        if resumed is None:
            sites, root, step = *(begin or self.search)(), 1
            settled = False
            sites = self.save(on_checkpoint, sites, root, step, settled)
        else:
            sites, root, step = Sites.of(resumed[0]), np.array(resumed[0]["root/loc"]), resumed[1]
            self.starts = {k: np.array(v) for k, v in resumed[0].items() if k.startswith("start/")}
            settled = bool(resumed[0]["rows/settled"])
        last = len(self.sizes) - 1
        while not settled and step < last + PASSES and time.monotonic() < self.trainer.deadline:
            if step >= last:
                self.fetch_pass()
            centre = self.upper.solve(sites, root)
            # What more units will leave of the widths is known beforehand; scales of noise would follow widths a pass late.
            spread = math.sqrt(self.sizes[min(step, last) - 1] / self.sizes[min(step, last)]) if 0 < step <= last else 1.0
            scores = self.round(self.sizes[min(step, last)], centre, step, spread)
            left = residual(sites, centre, scores)
            sites, root = updated(sites, centre, scores, self.upper.scale), centre.root
            self.tell("sites" if step < last else "pass", centre, sites, scores)
            if 0 < step <= last and len(self.upper.told):
                sites, root = self.refresh(sites, root, step)
            step += 1
            settled = step > last + 1 and left.typical < CALM and left.worst < WORST and ROOT_ERROR * left.root < CALM
            sites = self.save(on_checkpoint, sites, root, step, settled)
        return self.fitted(sites, self.upper.solve(sites, root), settled)

    @property
    def room(self) -> float:
        """Bytes of the cohort that each process may keep beside the growing selections."""
        study, engine = self.trainer.study, self.trainer.engine
        return study.settings.cache_bytes - study.cohort.nbytes / (GROWTH - 1) / engine.processes

    def fetch_pass(self) -> None:
        """Have the disk fetch what a whole pass looks at, from now on, where one process does so and does not keep it."""
        if self.trainer.engine.processes == 1 and self.room <= 0:
            self.trainer.engine.submit("fetch", {}, [{"pieces": self.pieces(self.count), "room": 0.0, "share": 1.0, "on": True}])

    def refresh(self, sites: Sites, root: np.ndarray, step: int) -> tuple[Sites, np.ndarray]:
        """The root's site once the rows have moved: as their fit improves, less is left as noise, which a pass at the old rows does not know."""
        centre = self.upper.solve(sites, root)
        scores = self.round(self.sizes[step - 1], centre, REFRESH + step)
        return refreshed(sites, centre, scores, self.upper.scale, self.sizes[step] / self.sizes[step - 1]), centre.root

    def search(self, follow: Callable[[np.ndarray], list[Found]] | None = None) -> tuple[Sites, np.ndarray]:
        """From each start, rounds over the smallest selection; the best goes on (mixtures have poor local optima).

        Args:
            follow: Who follows the starts, if not this process.
        """
        study = self.trainer.study
        centred = start_points(study, self.draws, self.trainer.seed)[:CENTRED_STARTS] if study.space.dim else np.zeros((1, 0))
        starts = centred if len(centred) else self.bare()
        found = (follow(starts) if follow is not None else []) or self.follow_each(starts)
        best = max(found, key=lambda f: f.value)
        self.starts = best.starts
        return self.follow(best.sites, self.upper.solve(best.sites, best.root), SEARCH, 1000 * (1 + len(found)))[:2]

    def bare(self) -> np.ndarray:
        """Where the prior's middle leads while rows, which would take up what it has wrong, stay at theirs; prior draws beside, if not to rest. `[K, R]`."""
        root, model, layout = np.median(self.draws, 0), self.trainer.study.graph.model, self.trainer.study.layout
        few = min(self.sizes[0], math.ceil(BARE_UNITS * self.count / most_units(model, layout, self.split)) if self.split else 1)
        sites = self.upper.initial(root, self.rows_at(root, 0))
        for i in range(BARE):
            centre = replace(self.upper.centre(sites, root), root=root, loc=self.rows_at(root, 0))
            try:
                scores = self.round(few, centre, BARE_ROUND + i, NARROW)
            except NumericalError:  # the prior's middle may lie where nothing is finite
                break
            self.tell("start", centre, sites, scores)
            left, sites = residual(sites, centre, scores), refreshed(sites, centre, scores, self.upper.scale, 1.0)
            root = self.upper.solve(sites, root, HASTY).root
            if left.root < NEAR:
                return root[None]
        return np.concatenate([root[None], self.draws[: PRIOR_STARTS - 1]])

    def follow_each(self, starts: np.ndarray, first: int = 0) -> list[Found]:
        """What some rounds lead to from each root point, `[K, R]`, of which the first is the search's start number `first`.

        Raises:
            NumericalError: No start has led to anything finite.
        """
        found: list[Found] = []
        for attempt, point in enumerate(starts, first):
            if found and time.monotonic() > self.trainer.deadline:
                break
            rows = self.rows_at(point, attempt)
            sites = self.upper.initial(point, rows)
            centre = replace(self.upper.centre(sites, point), loc=rows)
            self.starts = {}  # labels are numbered differently
            try:
                # A start is a guess to be followed, not a posterior to be averaged over: it is looked at from near by.
                with torch_threads(self.trainer.study.settings.threads):  # here as on a worker
                    sites, root, value = self.follow(sites, centre, LOOK, 1000 * (1 + attempt), NARROW)
                found.append(Found(sites, root, value, self.starts))
            except NumericalError:
                if not found and attempt == first + len(starts) - 1:  # a start may lie where nothing is finite, but not each of them
                    raise
        return found

    def rows_at(self, root: np.ndarray, attempt: int) -> dict[str, np.ndarray]:
        """Rows near their prior means at a root point."""
        study, seed = self.trainer.study, stream(self.trainer.seed, "start", attempt) % 2**31
        count = {b.name: math.prod(study.layout.cardinality[p] for p in b.plates) for b in self.upper.blocks}
        return {b.name: study.prior_rows(b, root, count[b.name], seed)[:, : b.dim] for b in self.upper.blocks}

    def follow(self, sites: Sites, centre: Centre, rounds: int, step: int, spread: float = 1.0) -> tuple[Sites, np.ndarray, float]:
        """Rounds over the smallest selection until they change little: sites, root and bound."""
        value, longest = -math.inf, LONGEST
        for i in range(rounds):
            scores = self.round(self.sizes[0], centre, step + i, spread if i == 0 else 1.0)
            left = residual(sites, centre, scores)
            before, value = value, float(np.nan_to_num(self.tell("start", centre, sites, scores), nan=-math.inf))
            longest = 2 * longest if value > before > -math.inf else LONGEST  # many data leave sds that are small against the way
            sites = updated(sites, centre, scores, self.upper.scale, longest)
            centre = self.upper.solve(sites, centre.root, HASTY if rounds == LOOK else EVALUATIONS)
            if max(left.typical, left.root) < NEAR:
                break
        return sites, centre.root, value

    def round(self, size: int, centre: Centre, step: int, spread: float = 1.0) -> Scores:
        """Scores of a selection of the split plate, or of the whole cohort; looked at from nearer by where they are not finite."""
        names = [b.name for b in self.upper.blocks]
        for attempt in range(ATTEMPTS):
            total = self.ask(size, centre, step, spread * NARROW**attempt, {})
            value, root, bend = float(total["value"]), total["root"], total["root_curvature"]
            found = Scores(value, root, bend, {b: total[f"score/{b}"] for b in names}, {b: total[f"curvature/{b}"] for b in names})
            finite = all(np.isfinite(x).all() for x in (np.asarray(value), root, bend, *found.score.values(), *found.curvature.values()))
            self.trainer.skips.saw(np.array([finite]), partial(self.trainer.nowhere_finite, centre.root))
            if finite:
                return found
        raise self.trainer.nowhere_finite(centre.root)

    def pieces(self, size: int) -> list[Any]:
        """What a round looks at, piece by piece: shards of the whole, or the first units of the order."""
        length = max(1, min(shard_length(self.trainer.study), -(-size // self.least)))
        if size == self.count:
            return [(s.plate, s.start, s.stop, s.first) for s in shards(self.trainer.study.layout, self.split, length)]
        units = np.sort(self.order[:size])
        return [units[a : a + length] for a in range(0, size, length)]

    def parts(self, pieces: list[Any]) -> list[list[Any]]:
        """Pieces by task: long ones first, for what a task costs; short ones last, so that all workers end at about the same time.

        Half of what is left goes into tasks of one length, then half of the rest ("factoring": Hummel, Schonberg & Flynn, CACM 35(8), 1992).
        """
        out, left = [], pieces
        while left:
            each = math.ceil(len(left) / (2 * SHARES))
            for _ in range(SHARES):
                out.append(left[:each])
                left = left[each:]
        return [part for part in out if part]

    def ask(self, size: int, centre: Centre, step: int, spread: float, more: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One round of scores, summed in the order of its tasks."""
        parts, apart = self.parts(self.pieces(size)), 1 < len(self.upper.told) <= APART and not more
        ahead = [part[0] for part in parts[self.trainer.engine.parallelism :]]  # who ends a task takes the one that nobody has begun
        tasks = [
            {"pieces": pieces, "then": then, "first": i == 0, "apart": apart, "seed": stream(self.trainer.seed, "score", step, i * len(parts[0])) % 2**62}
            for i, (pieces, then) in enumerate(zip_longest(parts, ahead))
        ]
        state = {f"centre/{b}": x for b, x in centre.loc.items()} | {f"spread/{b}": spread * x for b, x in centre.sd.items()}
        state |= {**self.starts, **more, "root/centre": centre.root, "root/spread": spread * centre.root_sd}
        counts = {b.name: math.prod(self.trainer.study.layout.cardinality[p] for p in b.plates) for b in self.trainer.study.guide.blocks}
        total = summed(self.trainer.engine.stream("score", state, tasks), counts)
        for key in [k for k in total if k.startswith("start/")]:
            modes, seen = total.pop(key), total.pop(key.replace("start/", "seen/"))
            average = (modes.sum(0) / np.maximum(seen.sum(0), 1.0)) * np.ones_like(modes)  # where none looked yet
            self.starts[key] = np.where(seen > 0, modes / np.maximum(seen, 1.0), self.starts.get(key, average))
        return total

    def lost(self, sites: Sites, centre: Centre) -> float:
        """Largest share of its precision that a direction loses if the sites' couplings are accounted for: 1 - 1/x for a variance that is x times ours.

        Looked at on a part of the units, whose chance differences from the whole can only add to it: an alarm is looked into on a larger part.
        """
        share, part = 0.0, max([s for s in self.sizes if s <= self.count // LOOKED], default=self.sizes[0])
        for size in [s for s in self.sizes if s >= part]:
            share = self.coupling(sites, centre, size)
            if share <= LOST or time.monotonic() > self.trainer.deadline:
                break
        return round(share, 6)  # what is below depends on the point at which a law was first summed up

    def coupling(self, sites: Sites, centre: Centre, size: int) -> float:
        """The largest eigenvalue of S (K - H) S by power iteration: K the sites' precision, H the data's curvature, S posterior sds given all else."""
        blocks, plates = self.upper.blocks, self.trainer.study.layout.plates
        rng = np.random.default_rng(stream(self.trainer.seed, "lost") % 2**63)
        scale = {b.name: 1.0 if self.split and lies_below(plates, b.plates, (self.split,)) else self.count / size for b in blocks} | {ROOT: self.count / size}
        sd = {**centre.sd, ROOT: centre.root_sd}
        towards = {n: rng.choice([-1.0, 1.0], x.shape) * (x > 0) for n, x in sd.items()}
        share = 0.0
        for i in range(POWERS):
            total = self.ask(size, centre, LOST_ROUND + i, 1.0, {f"towards/{n}": u for n, u in towards.items()})
            away = {}
            for n, u in towards.items():
                seen = total[f"along/{n}"]
                held = sites.root_precision @ (sd[n] * u) if n == ROOT else sites.precision[n] * sd[n] * u
                away[n] = np.where(seen == 0, 0.0, sd[n] * (held - scale[n] * seen))
            share = math.sqrt(sum((w**2).sum() for w in away.values()) / sum((u**2).sum() for u in towards.values()))
            size_of = max(max(np.abs(w).max(initial=0.0) for w in away.values()), 1e-12)
            towards = {n: w / size_of for n, w in away.items()}
        return share

    def tell(self, stage: str, centre: Centre, sites: Sites, scores: Scores) -> float:
        """Report the bound: the data's at the centre, and the laws' above it less what the sites took for the data."""
        stood = sum(-0.5 * (k * ((sites.loc[b] - centre.loc[b]) ** 2 + centre.sd[b] ** 2)).sum() for b, k in sites.precision.items())
        away = centre.root - sites.root
        stood += float(away @ sites.pull - 0.5 * away @ sites.root_precision @ away)
        value = scores.value + centre.value - float(stood)
        self.trainer.tell(stage, value)
        return value

    def save(self, on_checkpoint: Checkpoint, sites: Sites, root: np.ndarray, step: int, settled: bool) -> Sites:
        """Hand over everything that the next round needs; go on with the sites as they will be read, rounded as those of a resumed run."""
        kept = sites.arrays()
        on_checkpoint({**kept, **self.starts, "root/loc": root, "rows/settled": np.asarray(float(settled))}, step)
        return Sites.of(kept)

    def fitted(self, sites: Sites, centre: Centre, settled: bool) -> Fitted:
        """The guide's state: rows, and the root given them - refitted by importance where it is small, else its best Gaussian."""
        trainer, dim = self.trainer, self.trainer.study.space.dim
        trainer.state = {k: v for k, v in sites.arrays().items() if k.startswith("site/")}
        with ThreadPoolExecutor(1, "pavi-lost") as aside:  # workers look for lost couplings while the driver looks at the root
            lost = aside.submit(self.lost, sites, centre)
            if dim:
                fitted = self._root(sites, centre, settled)
            else:
                fitted = trainer._fitted(np.zeros((1, 0)), np.ones(1), StudentT(np.zeros(0), np.zeros((0, 0))), settled, math.nan)
            return replace(fitted, lost=lost.result(), state=fitted.state | self.starts)

    def _root(self, sites: Sites, centre: Centre, settled: bool) -> Fitted:
        """Pool and Gaussian of the root: the searched coordinates, then the joined ones given them."""
        trainer, upper = self.trainer, self.upper
        dim, rest = trainer.study.space.dim, upper.rest
        mean, cov = upper.average(sites, centre.root, trainer._normals("average", PAIRS, len(rest))) if len(rest) else (centre.root, np.zeros((0, 0)))
        small = upper.size(upper.reduced) * REFIT_POINTS <= REFIT_VALUES
        below = trainer.trace[-1][1] - centre.value if trainer.trace else 0.0  # what the data say, beside the laws above them
        khat = math.nan

        def whole(points: np.ndarray) -> np.ndarray:
            out = np.repeat(mean[None], len(points), 0)
            out[:, rest] = points
            return out

        if 0 < len(rest) <= REFITTED and small:
            pool = refit(
                lambda points, _: (upper.value(sites, whole(points)), None), mean[rest], cov, seed=trainer.seed, per_round=256, target=1000.0,
                max_points=REFIT_POINTS, deadline=trainer.deadline, on_step=lambda stage, value: trainer.tell(stage, value + below),
            )
            points, weight, loc, chol, khat = whole(pool.points), pool.weight, pool.gaussian.loc, pool.gaussian.chol, pool.khat
        else:
            loc, chol = mean[rest], np.linalg.cholesky(cov)
            points = whole(StudentT(loc, chol).sample(trainer._normals("pool", POOL, len(rest)), np.full(POOL, 0.5)))
            weight = np.full(POOL, 1.0 / POOL)
        joint, factor = whole(loc[None])[0], np.zeros((dim, dim))
        factor[np.ix_(rest, rest)] = chol
        if upper.joined:
            middle, sd = upper.complete(sites, points, each=small)
            noise = np.random.default_rng(stream(trainer.seed, "joined") % 2**63).standard_normal(points.shape)
            if weight @ weight < 1 / STANDARD:  # the pool's mean and spread are then about what `complete` found, not those of a sample of it
                noise -= weight @ noise
                noise /= np.sqrt(weight @ noise**2)
            points = middle + sd * noise
            held = np.setdiff1d(np.arange(dim), rest)
            joint[held] = weight @ middle[:, held]
            factor[held, held] = np.sqrt(weight @ (sd[:, held] ** 2 + (middle[:, held] - joint[held]) ** 2))
        return trainer._fitted(points, weight, StudentT(joint, factor), settled, khat)
