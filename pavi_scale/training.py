"""The driver's loops: what is asked of the engine, round after round, and what is done with the answers.

Two ways lead to a root posterior. If every block's pool is local, the marginal bound is maximised and the root refitted to it (`marginal`).
Blocks with free rows are trained by `rows`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.special import ndtri

from pavi_scale.ambient import precision
from pavi_scale.batching import batches, shards, splittable
from pavi_scale.computation import StudyComputation
from pavi_scale.diagnosing import EFFICIENT, LIMIT
from pavi_scale.errors import NumericalError
from pavi_scale.guide.blocks import coordinates, dense_rest
from pavi_scale.guide.exploring import rivals
from pavi_scale.guide.student import StudentT
from pavi_scale.guide.terms import absorbable
from pavi_scale.marginal import ascend, find_mode, near_order, nearest, other_modes, polish, refit, whitening
from pavi_scale.moments import MOST_CANDIDATES
from pavi_scale.noise import quasi_random
from pavi_scale.nonfinite import Skips, shards_without, where_from
from pavi_scale.numbering import exchangeable, one_numbering, renumbered
from pavi_scale.optimizers import Adam
from pavi_scale.rng import stream
from pavi_scale.samples import Sample, stages
from pavi_scale.sampling import shard_length
from pavi_scale.server.protocol import Engine
from pavi_scale.server.window import Order, lagged
from pavi_scale.starts import highest, start_points
from pavi_scale.weighing import EFFECTIVE, FEW_CANDIDATES, Weighed, weighed

Report = Callable[[str, float, float], None]  # (stage, bound, share done)
POOL = 2048
SEARCH_SECONDS = 10.0  # modelled, of looking for one mode of the root
REFIT_SECONDS = 20.0  # modelled, of the importance refit
SECONDS_PER_VALUE = 1e-7  # of one value, column of its Hessian and particle; one thread
SECONDS_PER_FLOP = 5e-11
TYPICAL_ITERATIONS = 6  # Newton steps to a mode
RESTART_STEPS = 25
PRIOR_STARTS = 4
RUNS = 4  # runs of neighbouring units in one selection from a store
FULL_RANK = 40  # root coordinates up to which free-row training couples them
CHECK_SECONDS = 1.0  # modelled, of comparing a normal q(root) with L
ALIKE = 0.05  # spread of log p - log q below which a normal q(root) is kept: an importance refit would move it by less than that many sds
ALIGNMENTS = 3  # times that a normal q(root) is brought nearer to log p where points are dear
DEAR = 500  # points of a refit that time allows for, below which they are: the effective ones that a refit aims at
LEAST_POINTS = 192  # of a refit, whatever it takes: a good one makes more than ENOUGH effective ones of them
ENOUGH = 100  # effective points of a refit about a mode that was reached, at which it counts as converged
ASCENTS = 8  # gradients of the whole that a mode may take
WORTH_SHARING = 2e-3  # modelled seconds of one point above which a round is divided at all
LEAST_SHARDS = 4
REFIT_POINTS = 1000  # that a refit needs, so that candidates above `MOST_CANDIDATES` must leave time for them
MISSED = 0.25  # share of a unit's posterior in modes that the guide does not follow, above which it counts as multimodal
MANY = 0.1  # share of such units that makes the fit so
REMEMBERED = 1_000_000  # local coordinates up to which modes are kept as starts


@dataclass
class Fitted:
    """What training leaves behind.

    Args:
        state: Named arrays: pool, q(root), rows, corrections.
        trace: (stage, bound) per round.
        converged: Whether every search met its criterion.
        khat: Pareto k-hat of the root's importance weights.
        modes: Distinct modes of comparable height that were found.
        efficiency: Effective sample size of the root's weights over their number.
        seconds: Of each entry of the trace, since `began`.
        history: q(root) on the way: (entry of the trace, location, standard deviation), unconstrained.
        lost: Largest share of its precision that a direction has only because free rows are not coupled.
    """

    state: dict[str, np.ndarray]
    trace: list[tuple[str, float]]
    converged: bool
    khat: float
    modes: int = 1
    efficiency: float = 0.0
    seconds: list[float] = field(default_factory=list)
    history: list[tuple[int, np.ndarray, np.ndarray]] = field(default_factory=list)
    lost: float = 0.0


@dataclass
class Trainer:
    """Runs one study's rounds.

    Args:
        study: The driver's own computation (small things only: prior draws, sizes).
        engine: Who answers rounds.
        seed: Seed of everything.
        deadline: `time.monotonic()` by which training should end.
        report: Told of progress.
        began: `time.monotonic()` that the trace's seconds count from.
        staleness: Updates of learned corrections that the weights which a step reads may be behind; 0 waits for each step.
    """

    study: StudyComputation
    engine: Engine
    seed: int
    deadline: float
    report: Report
    began: float = field(default_factory=time.monotonic)
    staleness: int = 0
    trace: list[tuple[str, float]] = field(default_factory=list)
    state: dict[str, np.ndarray] = field(default_factory=dict)
    modes: int = 1
    missed: float = 0.0
    oldest: int = 0
    explored: dict[bytes, tuple[dict[str, np.ndarray], float]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    history: list[tuple[int, np.ndarray, np.ndarray]] = field(default_factory=list)
    skips: Skips = field(default_factory=Skips)

    def tasks(self, **extra: Any) -> list[dict[str, Any]]:
        """One task per shard of the cohort."""
        length = shard_length(self.study)
        n = self.study.layout.cardinality.get(self.study.settings.split or "", 1)
        if self.cost(weighted=False) > WORTH_SHARING:
            length = min(length, max(1, math.ceil(n / LEAST_SHARDS)))  # whoever computes, the shards are the same
        found = shards(self.study.layout, self.study.settings.split, length)
        return [{"shard": (s.plate, s.start, s.stop, s.first), "seed": self.seed, **extra} for s in found]

    def bound(self, points: np.ndarray, gradient: bool, weighted: bool = False, sample: Sample | None = None) -> tuple[np.ndarray, np.ndarray | None]:
        """L at root points `[K, R]`, over all shards or a sample; `weighted` for the importance-weighted value where cores are not exact."""
        state = {**self.state, "points": np.ascontiguousarray(points)}
        asked = {"gradient": gradient, "weighted": weighted}
        tasks = self.tasks(**asked) if sample is None else [{**t, "seed": self.seed, **asked} for t in sample.tasks()]
        answers = self.engine.round("bound", state, tasks)
        z = torch.tensor(points, dtype=torch.float64, requires_grad=gradient)
        with precision(torch.float32):  # torch's own: whatever another thread computes in meanwhile
            prior = self.study.space.log_prior(z)
        value = prior.detach().numpy() + sum(a["bound"] for a in answers)
        if not gradient:
            self.skips.saw(np.isfinite(value), partial(self.nowhere_finite, points[0]))
            return value, None
        (own,) = torch.autograd.grad(prior.sum(), z, allow_unused=True, materialize_grads=True) if prior.requires_grad else (torch.zeros_like(z),)
        slope = own.numpy() + sum(a["gradient"] for a in answers)
        self.skips.saw(np.isfinite(value) & np.isfinite(slope).all(-1), partial(self.nowhere_finite, points[0]))
        return value, slope

    def nowhere_finite(self, point: np.ndarray) -> NumericalError:
        """The error of a bound that is not finite at a root point `[R]` and others: with the variable and plate indices."""
        if not np.isfinite(point).all():
            return NumericalError("the bound is not finite", where="root variables", expected="finite values", remedy="report this, with the model")
        tasks = self.tasks(gradient=True, weighted=False)
        state = {**self.state, "points": np.ascontiguousarray(point[None])}
        # Of free rows the scores were not finite: any shard may be the one.
        bad = range(len(tasks)) if self.study.guide.free else shards_without(self.engine.round("bound", state, tasks))[:1]
        with precision(torch.float64):
            where = where_from(self.study, [tasks[i] for i in bad], point) if bad else "the laws of the root variables"
        return NumericalError(
            "the bound is not finite", where=where, expected="a finite log-density", got=f"{self.skips.total} evaluations that are not",
            remedy="check the law's parameters and support against the data and covariates of these units",
        )

    def tell(self, stage: str, value: float) -> None:
        """Record one step."""
        self.trace.append((stage, value))
        self.seconds.append(time.monotonic() - self.began)
        self.report(stage, value, math.nan)

    def mark(self, loc: np.ndarray, cov: np.ndarray) -> None:
        """Record q(root) as it stands after the last step."""
        self.history.append((len(self.trace) - 1, loc.copy(), np.sqrt(np.diagonal(cov))))

    # -- every pool local ---------------------------------------------------------------------------------------------------

    def marginal(self, trained: tuple[str, ...]) -> Fitted:
        """Mode, curvature, corrections where the cores are not exact, and the importance refit."""
        space = self.study.space
        if space.dim == 0:
            value, _ = self.bound(np.zeros((1, 0)), False)
            self.tell("bound", float(value[0]))
            self._improve(np.zeros((1, 0)), trained)
            return self._fitted(np.zeros((1, 0)), np.ones(1), StudentT(np.zeros(0), np.zeros((0, 0))), True, -1.0)
        with precision(torch.float32):
            draws = space.prior_draws(64, stream(self.seed, "prior") % 2**31)
        mode, cov, converged = self._search(draws)
        gaussian = StudentT(mode, np.linalg.cholesky(cov))
        points = gaussian.sample(self._normals("correct", 64, space.dim), np.full(64, 0.5))
        self._improve(points, trained)
        limit = int(np.clip(REFIT_SECONDS / self.cost(weighted=True), 32, 8192))
        gaussian, spread = nearest(self._check, gaussian, ALIKE, ALIGNMENTS if limit < DEAR else 0)
        mode, cov, done = gaussian.loc, gaussian.chol @ gaussian.chol.T, self._gaussian(gaussian)
        if spread < ALIKE or space.dim > 40 or limit < 20 * space.dim:
            # Too few points for a Pareto fit: a log-normal spread of s has about s / 3 of tail shape at these sizes.
            return self._fitted(*done, gaussian, converged, spread / 3.0)
        sd = np.sqrt(np.diagonal(cov))
        bound = one_numbering(partial(self.bound, weighted=True), exchangeable(self.study, self.bound, mode, sd), mode, sd)
        try:
            pool = refit(
                bound, mode, cov, seed=self.seed, per_round=min(256, max(32, limit // 8)),
                target=min(1500.0, max(500.0, limit / 4)), max_points=max(limit, LEAST_POINTS), deadline=self.deadline, on_step=self.tell,
            )
        except NumericalError as error:
            raise self.nowhere_finite(mode) from error
        far = pool.khat > LIMIT and pool.ess < EFFICIENT * len(pool.weight)  # then the fit is unreliable, however long one goes on
        return self._fitted(pool.points, pool.weight, pool.gaussian, far or pool.ess > 400 or (converged and pool.ess > ENOUGH), pool.khat)

    def _search(self, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
        """Mode of L and covariance there: found on a sample where the cohort is large, and carried to the whole by a few gradients."""
        cost, (_, scale) = self.cost(weighted=False), whitening(draws)
        samples: list[Sample | None] = [*stages(self.study, cost, self.seed), None]
        first = samples[0]
        cost = cost if first is None else cost * len(first.units) / first.total
        centres = start_points(self.study, draws, self.seed)
        followed = 3 if cost < 0.02 else 2 if cost < 0.2 else 1
        explore = self._explore if first is None else lambda point: None
        starts = draws[: 64 if cost < 0.05 else 16]
        if len(centres):
            starts = highest(centres[: 1 + followed], partial(self.bound, sample=first), explore, min(2, followed))
        try:
            found = find_mode(
                partial(self.bound, sample=first), starts, starts=followed, max_evaluations=int(np.clip(SEARCH_SECONDS / cost, 30, 200)),
                deadline=self.deadline, on_step=self.tell, on_start=explore, unit=scale if len(centres) else None,
            )
        except NumericalError as error:
            raise self.nowhere_finite(starts[0]) from error
        explore(found[0][0])
        self.explored.clear()
        mode, cov, converged = polish(partial(self.bound, sample=first), found[0][0], scale, 4)
        self.modes = 1 + other_modes(found, cov, lambda other, sd: renumbered(self.study, other, found[0][0], sd)) + (self.missed > MANY)
        for sample in samples[1:]:
            self.mark(mode, cov)
            if time.monotonic() > self.deadline:
                return mode, cov, False
            bound = partial(self.bound, sample=sample)
            mode, converged = ascend(bound, mode, cov, ASCENTS, self.tell)
            if not converged or sample is samples[1]:  # the first sample's curvature is good enough to climb by, not to report
                mode, cov, converged = polish(bound, mode, scale, 4)
        self.mark(mode, cov)
        return mode, cov, converged

    def _explore(self, point: np.ndarray) -> None:
        """Remember the best local modes at a root point: later searches start there."""
        layout, remembered = self.study.layout, [c for c in self.study.guide.components if c.remembered]
        total = sum(coordinates(c, layout.cardinality) for c in remembered)
        if not remembered or total > REMEMBERED:
            return
        key = point.tobytes()
        if key not in self.explored:
            answers, tables = self.engine.round("starts", {"points": point[None]}, self.tasks()), {}
            for component in remembered:
                modes = min(max(rivals(a[f"odds/{component.name}"]) for a in answers if f"odds/{component.name}" in a), REMEMBERED // total)
                for block in component.blocks:
                    table = np.zeros((math.prod(layout.cardinality[p] for p in block.plates), modes, 1 + block.dim))
                    for answer in answers:
                        if f"modes/{block.name}" in answer:
                            found = answer[f"modes/{block.name}"]
                            # A shard whose units have fewer modes repeats the first, which has the volume of itself.
                            table[answer[f"at/{block.name}"]] = found[:, [s if s < found.shape[1] else 0 for s in range(modes)]]
                    tables[f"modes/{block.name}"] = table
            missed = [(np.concatenate([a[f"missed/{c.name}"] for a in answers if f"missed/{c.name}" in a]) > MISSED).mean() for c in remembered]
            self.explored[key] = tables, float(max(missed))
        tables, self.missed = self.explored[key]
        self.state.update(tables)

    def cost(self, weighted: bool) -> float:
        """Modelled seconds of L at one point: a function of sizes alone, so that the same seed does the same work on any machine."""
        study, total = self.study, 0.0
        for component in study.guide.components:
            for factor in component.factors:
                v = study.graph.model.variables[factor.variable]
                values = math.prod(study.layout.cardinality[p] for p in v.plates) * math.prod(study.graph.shape(v))
                if absorbable(component, factor, study.graph.model):
                    continue  # summed up once
                columns = sum(len(component.columns(b, n)) for b in component.blocks for n in dict(factor.touches).get(b.name, ()))
                draws = min(component.candidates, study.draws_per_unit(self.state)) if weighted else 0
                total += values * ((2 + columns) * (1 if component.quadratic else TYPICAL_ITERATIONS) + draws) * SECONDS_PER_VALUE
            if not component.tree:
                copies, columns = dense_rest(component, study.layout.cardinality)
                total += copies * columns**3 * SECONDS_PER_FLOP * (1 if component.quadratic else TYPICAL_ITERATIONS)
        for v in study.guide.plain:
            total += math.prod(study.layout.cardinality[p] for p in v.plates) * math.prod(study.graph.shape(v)) * SECONDS_PER_VALUE
        return max(total, 1e-5)

    def _normals(self, name: str, count: int, dim: int) -> np.ndarray:
        return np.asarray(ndtri(quasi_random(stream(self.seed, name), count, dim)))

    def _check(self, gaussian: StudentT, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Draws of a normal q(root), others for each number, and log p - log q there: its standard deviation is what importance weights would vary by."""
        dim = len(gaussian.loc)
        count = int(np.clip(CHECK_SECONDS / self.cost(weighted=True), 16, 64))
        z = gaussian.sample(self._normals(f"check {number}" if number else "check", count, dim), np.full(count, 0.5))
        value, _ = self.bound(z, False, weighted=True)
        ratio = value - gaussian.log_prob(z)
        self.tell("check", float(ratio.mean()))
        return z, ratio

    def _gaussian(self, gaussian: StudentT) -> tuple[np.ndarray, np.ndarray]:
        """Equally weighted points of a normal q(root)."""
        return gaussian.sample(self._normals("pool", POOL, len(gaussian.loc)), np.full(POOL, 0.5)), np.full(POOL, 1.0 / POOL)

    def _fitted(self, points: np.ndarray, weight: np.ndarray, gaussian: StudentT, converged: bool, khat: float) -> Fitted:
        order = near_order(points)
        points, weight = points[order], weight[order]
        raw = np.tril(gaussian.chol, -1) + np.diag(np.log(np.maximum(np.diagonal(gaussian.chol), 1e-300)))
        state = {**self.state, "pool/points": points, "pool/weight": weight, "root/loc": gaussian.loc, "root/raw": raw}
        self.mark(gaussian.loc, gaussian.chol @ gaussian.chol.T)
        return Fitted(state, self.trace, converged, khat, self.modes, float(1.0 / np.sum(weight**2) / len(weight)), self.seconds, self.history)

    # -- learned corrections ------------------------------------------------------------------------------------------------

    def _improve(self, points: np.ndarray, trained: tuple[str, ...]) -> None:
        """Train the corrections of resampled blocks where asked for, or where too few candidates would carry the weight."""
        if not self.study.guide.candidates:
            return
        found = self._efficiency(points[:1])
        self.tell("efficiency", found.share)
        enough, groups = found.numbers(FEW_CANDIDATES, min(self.study.guide.candidates, self._affordable()))
        self.state.update(draws=np.asarray(enough), groups=np.asarray(groups))
        close = found.share * enough >= EFFECTIVE
        if trained or not close:
            self._correct(points, 100 if close else 300)

    def _affordable(self) -> int:
        """Candidates that leave a refit the points that it needs."""
        least = self.cost(weighted=False)
        self.state["draws"] = np.asarray(1)
        each = self.cost(weighted=True) - least
        return max(MOST_CANDIDATES, int((REFIT_SECONDS / REFIT_POINTS - least) / max(each, 1e-12)))

    def _efficiency(self, point: np.ndarray) -> Weighed:
        """What weights of the candidates of the first shards' units say."""
        tasks, finest = self.tasks(), self.study.guide.finest
        asked = [{**t, "samples": 64, "seed": self.seed} for t in tasks[:LEAST_SHARDS]]
        return weighed(self.engine.round("ratios", {**self.state, "points": point}, asked), finest, len(tasks) / len(asked))

    def _correct(self, points: np.ndarray, steps: int) -> None:
        study = self.study
        task = self.tasks()[0]
        with torch.no_grad():
            reduced, _ = study.shard(task)
            initial = study.fresh_corrections(reduced, points[:4], self.seed)
        if not initial:
            return
        self.state.update(initial)
        adam = Adam(rate=5e-3)
        for reply in lagged(self.engine, self.staleness, self._steps(points, steps)):
            (answer,), (point, share) = reply.answers, reply.note
            self.oldest = max(self.oldest, reply.age)
            self._ascend(adam, answer, point, 5e-3 * 0.5 * (1 + math.cos(math.pi * share)))
            self.tell("correct", float(answer["elbo"]))

    def _steps(self, points: np.ndarray, steps: int) -> Iterator[Order]:
        """Gradients of the corrections on random selections, at the weights as they are when each is asked for."""
        source = self._batches(40_000)
        for step in range(steps):
            if time.monotonic() > self.deadline:
                break
            at = (np.arange(4) + 4 * (step % 4)) % len(points)  # sixteen root points take turns, so that their cores can be kept
            units, weight = next(source)
            task = {"units": units, "weight": weight, "seed": stream(self.seed, "correct", step) % 2**62}
            yield Order("correct", {**self.state, "points": points[at]}, [task], (points[at[0]], step / steps))

    def _ascend(self, adam: Adam, answer: Mapping[str, np.ndarray], point: np.ndarray, rate: float) -> None:
        adam.rate = rate
        grads = {k.removeprefix("grad/"): v for k, v in answer.items() if k.startswith("grad/")}
        finite = np.array(all(np.isfinite(g).all() for g in grads.values()))
        self.skips.saw(finite, partial(self.nowhere_finite, point))
        if not finite:
            self.state.update(self.skips.back() or {})
            return
        self.skips.keep({k: v for k, v in self.state.items() if k.startswith("correction/")})
        norm_all = math.sqrt(sum(float((g * g).sum()) for k, g in grads.items() if k.startswith("correction/")))
        for name, g in grads.items():
            rows = answer.get(f"at/{name}")
            value = self.state[name] = np.array(self.state[name], dtype=np.float64)
            adam.update(name, value, g / max(1.0, norm_all) if name.startswith("correction/") else g, rows)

    def _batches(self, units: int) -> Any:
        """Random selections of about `units` observed units, with their inverse inclusion probabilities."""
        layout, study = self.study.layout, self.study
        total = max((math.prod(layout.cardinality[p] for p in v.plates) for v in study.graph.model.of_kind("observed")), default=1)
        tops = splittable(study.graph.model, study.guide.components)
        if total <= units or not tops:
            while True:
                yield {}, {}
        share = (units / total) ** (1 / len(tops))
        sizes = {p: max(1, min(layout.cardinality[p], math.ceil(share * layout.cardinality[p]))) for p in tops}
        # Units in memory are selected one by one; in a store, in a few runs.
        cells = {p: max(1, size // RUNS) if study.cohort.chunk(p) else 1 for p, size in sizes.items()}
        weight = {p: -(-layout.cardinality[p] // cells[p]) / max(1, size // cells[p]) for p, size in sizes.items()}
        for chosen in batches(layout, sizes, self.seed, cells):
            yield chosen, weight
