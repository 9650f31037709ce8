"""What a worker computes: bounds, gradients and posterior moments of one task, from weights and data.

A task names ground units; a `StudyComputation` reads their data (and keeps them while memory allows), builds the reduced model and answers.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pavi_scale.ahead import Ahead, key_of
from pavi_scale.ambient import precision, seeded
from pavi_scale.batching import Shard, closure, flat_positions, splittable
from pavi_scale.cohort import Cohort, CohortSpec
from pavi_scale.device import PROCESSOR, doubles, on
from pavi_scale.elbo import Weights, correctors, local_elbo
from pavi_scale.errors import CohortError, NumericalError
from pavi_scale.guide.blocks import Block, Component, dense_units, inputs_of
from pavi_scale.guide.correction import Corrections
from pavi_scale.guide.curvature import LocalModel
from pavi_scale.guide.exploring import explore
from pavi_scale.guide.gaussian import Tree
from pavi_scale.guide.guide import Guide
from pavi_scale.guide.local import Core, candidates, context, fit_core
from pavi_scale.guide.root import RootSpace
from pavi_scale.guide.terms import spent
from pavi_scale.holding import Holding, Key
from pavi_scale.memory import release_freed_memory
from pavi_scale.model.density import Graph
from pavi_scale.model.template import Model
from pavi_scale.moments import Moments, Passed, answers_for, points_of
from pavi_scale.noise import generator_noise, shared_noise
from pavi_scale.plates import Layout, Selection
from pavi_scale.posterior.sampler import storage_dtype
from pavi_scale.posterior.store import PosteriorWriter
from pavi_scale.ratios import local_ratios
from pavi_scale.reduced import Reading, Reduced, Value
from pavi_scale.rng import stream
from pavi_scale.scores import gather
from pavi_scale.settings import Settings, make_graph
from pavi_scale.weighing import FEW_CANDIDATES, groups_of

Arrays = Mapping[str, np.ndarray]
TIDY_EVERY = 32  # tasks: the pages given back must be zeroed again when they are used
ATTEMPTS = 16  # searches for the best local mode


class StudyComputation:
    """Answers the tasks of one study.

    Args:
        graph: The model with its links.
        cohort: Where the data are.
        settings: How to compute.
        device: Where data are kept and tasks computed.
    """

    def __init__(self, graph: Graph, cohort: Cohort, settings: Settings, device: torch.device = torch.device(PROCESSOR)) -> None:  # noqa: B008 (immutable)
        self.device, self.graph, self.cohort, self.settings = device, graph, cohort, settings
        self.layout: Layout = cohort.layout
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        self.guide = Guide(graph, frozenset(frozenset(f) for f in settings.free), settings.structure)
        self._holding = Holding(settings.cache_bytes)
        self._ahead = Ahead(cohort, settings.split, self._holding)
        self._used, self._passed, self._answered = threading.local(), Passed(), 0
        self._spent = spent(self.guide.components, graph.model)
        plateless = [v for v in graph.model.of_kind("observed", "covariate") if not v.plates]
        data = {v.name: torch.as_tensor(np.asarray(cohort.read(v.name, {}))) for v in plateless}
        self.space = RootSpace(graph, Reduced(graph, Selection(self.layout, {}, {}), data, dtype=self.dtype, device=device))

    def __reduce__(self) -> tuple[Any, ...]:
        """Elsewhere the cohort is opened anew, and computed on the processor; what is kept here stays here."""
        return reopened, (self.graph.model, self.cohort.spec(), self.settings)

    # -- data -------------------------------------------------------------------------------------------------------------------

    def reduced(self, selection: Selection, names: Sequence[str] | None = None, key: Key | None = None) -> Reduced:
        """The reduced model of a selection; data are read when they are needed, and kept under `key` while memory allows."""
        if key is not None:
            held = self._holding.get(key)
            found = held if isinstance(held, Reduced) else self.reduced(selection, names)
            found.absorbed.update(held if isinstance(held, Mapping) else {})
            self._used.last = key, found
            return found
        wanted = names if names is not None else [v.name for v in self.graph.model.of_kind("observed", "covariate")]
        return Reduced(self.graph, selection, Reading(self.graph, selection, wanted, self.cohort), dtype=self.dtype, device=self.device)

    def _settle(self) -> None:
        """After a task: let go of data whose laws are summed up, and keep the rest while memory allows."""
        last: tuple[Key, Reduced] | None = getattr(self._used, "last", None)
        if last is None:
            return
        self._used.last, (key, reduced) = None, last
        reduced.forget(name for name, laws in self._spent.items() if all(law in reduced.absorbed for law in laws))
        self._holding.keep(key, reduced)
        self._answered += 1
        if self._answered % TIDY_EVERY == 0:
            release_freed_memory()

    def shard(self, task: Mapping[str, Any]) -> tuple[Reduced, Shard]:
        """The reduced model of a task's shard, or of its part of a random sample that stands for the whole cohort."""
        if "sample" in task:
            units, split = np.asarray(task["sample"]), str(self.settings.split)
            shard = Shard(split, int(units[0]), int(units[-1]) + 1, bool(task["first"]))
            return self.reduced(closure(self.layout, {split: units}, {split: float(task["scale"])}), key=("sample", task["size"], shard.start)), shard
        shard = Shard(*task["shard"])
        return self.reduced(shard.selection(self.layout), key=key_of(tuple(task["shard"]))), shard

    def _piece(self, piece: Any, first: bool, state: Arrays) -> tuple[Reduced, bool]:
        self._settle()
        units = closure(self.layout, {str(self.settings.split): piece}) if isinstance(piece, np.ndarray) else None
        reduced = self.shard({"shard": piece})[0] if units is None else self.reduced(units, key=key_of(piece))
        self.search_from(state, reduced)
        return reduced, bool(piece[3]) if units is None else first

    def per_chunk(self, reduced: Reduced) -> int:
        """Particles computed at once; laws that are summed up are not computed again."""
        units = max((reduced.count(v.plates) for v in self.graph.model.of_kind("observed", "latent") if v.name not in self._spent), default=1)
        return max(1, self.settings.chunk // max(units, dense_units(self.guide.components, self.layout.cardinality), 1))

    # -- weights ----------------------------------------------------------------------------------------------------------------

    def corrections(self, state: Arrays, reduced: Reduced) -> Corrections | None:
        """The corrections, loaded with the state's weights; None if there are none."""
        stored = {k.removeprefix("correction/"): v for k, v in state.items() if k.startswith("correction/")}
        if not stored:
            return None
        mine: Corrections | None = getattr(self._used, "corrections", None)  # each thread loads its own
        if mine is None:
            mine = self._used.corrections = Corrections(self.guide.components, self.settings.schemes, self.settings.seen, reduced).to(self.device, self.dtype)
        mine.load_state_dict({k: torch.tensor(v, dtype=self.dtype) for k, v in stored.items()})
        return mine

    def fresh_corrections(self, reduced: Reduced, points: np.ndarray, seed: int) -> dict[str, np.ndarray]:
        """Untrained corrections (the identity) as state, their inputs standardised on a reduced model; empty if no block can have one."""
        with precision(self.dtype), seeded(seed % 2**63):
            made = Corrections(self.guide.components, self.settings.schemes, self.settings.seen, reduced).to(self.dtype)
            root = self.space.values(torch.tensor(points, dtype=self.dtype))
            for component in self.guide.components:
                mine = [b for b in component.blocks if b.name in made.names()]
                if not mine:
                    continue
                core = fit_core(LocalModel(component, reduced, root, {}, len(points)), differentiable=False)
                gaussian = core.expansion.gaussian
                if not isinstance(gaussian, Tree):
                    continue  # the blocks of a dense component are not resampled, and have no correction
                for block in mine:
                    part = made.part(block.name)
                    part.standardise(context(core, gaussian, block.name))
                    if part.encoder is not None:
                        part.encoder.standardise(part.observations(reduced)[0])
        out = {f"correction/{k}": doubles(v).copy() for k, v in made.state_dict().items()}
        for name in made.names():
            if self.settings.schemes[name] in ("hybrid", "free"):
                block = self.block(name)
                out[f"residual/{name}"] = np.zeros((math.prod(self.layout.cardinality[p] for p in block.plates), 2 * block.dim))
        return out

    def kept_core(self, component: Component, reduced: Reduced, root: Mapping[str, Value], points: np.ndarray, *, keep: bool) -> Core:
        """The Gaussian core of a component at root points; kept with the reduced model where the same ones come back."""
        key = ("core", component.name, points.tobytes())
        core: Core = reduced.absorbed.get(key) or fit_core(LocalModel(component, reduced, root, {}, len(points)), differentiable=False)
        if keep:
            reduced.absorbed[key] = core
        return core

    def draws_per_unit(self, state: Arrays) -> int:
        """Candidates of one draw: fewer where those at hand are close to the posterior, or where a trained correction brings them close."""
        few = any(k.startswith("correction/") for k in state)
        return min(self.guide.candidates, FEW_CANDIDATES if few else int(state.get("draws", self.guide.candidates)))

    def prior_rows(self, block: Block, root: np.ndarray, count: int, seed: int) -> np.ndarray:
        """Initial free rows `[count, 2 d]`: near the conditional prior mean at a root point, with unit precision."""
        component = next(c for c in self.guide.components if block in c.blocks)
        selection = closure(self.layout, {p: np.arange(1) for p in splittable(self.graph.model, self.guide.components)})
        selection = Selection(self.layout, selection.units, selection.weight)
        with precision(self.dtype):
            values = self.space.values(torch.tensor(root[None], dtype=self.dtype))
            start = LocalModel(component, self.reduced(selection, inputs_of(self.graph.model, component)), values, {}, 1).start()[block.name]
            flat = torch.cat([LocalModel.columns_of(component, block, n, start) for n in block.latents], -1)[0, 0]
        noise = np.random.default_rng(seed).normal(size=(count, block.dim))
        return np.concatenate([doubles(flat) + 0.05 * noise, np.zeros((count, block.dim))], 1)

    def rows(self, state: Arrays, selection: Selection, kind: str, *, grad: bool = False) -> dict[str, Tensor]:
        """Rows of the selected units: from a task's or state's `kind/block` table, sliced where it is whole."""
        out = {}
        for block in self.guide.blocks:
            table = state.get(f"{kind}/{block.name}")
            if table is not None:
                out[block.name] = torch.tensor(table[flat_positions(self.layout, selection, block)], dtype=self.dtype, requires_grad=grad)
        return out

    def weights(self, state: Arrays, reduced: Reduced) -> Weights:
        """All weights of a state, for the units of a reduced model."""
        self.search_from(state, reduced)
        sites = {b: tuple(t.chunk(2, -1)) for b, t in self.rows(state, reduced.selection, "site").items()}
        loc = torch.tensor(state.get("root/loc", np.zeros(0)), dtype=self.dtype)
        raw = torch.tensor(state.get("root/raw", np.zeros((0, 0))), dtype=self.dtype)
        return Weights(loc, raw, sites, self.rows(state, reduced.selection, "residual"), self.corrections(state, reduced))  # type: ignore[arg-type]

    def search_from(self, state: Arrays, reduced: Reduced) -> None:
        """Have the searches on a reduced model start from the modes that a state remembers, too."""
        reduced.starts, reduced.modes = (self.rows(state, reduced.selection, kind) for kind in ("start", "modes"))

    # -- tasks ------------------------------------------------------------------------------------------------------------------

    def compute(self, kind: str, state: Arrays, task: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Answer one task of a round."""
        with on(self.device), precision(self.dtype) if kind != "fetch" else contextlib.nullcontext():  # which computes nothing, beside whoever does
            answer = getattr(self, f"task_{kind}", None)
            if answer is None:
                raise NumericalError("unknown kind of task", got=kind)
            found: dict[str, np.ndarray] = answer(state, task)
            self._settle()
            return found

    def task_bound(self, state: Arrays, task: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """sum_n L_n(root_k) of a shard at `state["points"]` `[K, R]`, with gradients if the task asks for them."""
        reduced, shard = self.shard(task)
        points, gradient, samples = state["points"], bool(task.get("gradient")), self.draws_per_unit(state) if task.get("weighted") else 0
        corrections = correctors(self.weights(state, reduced), reduced)
        size = self.per_chunk(reduced)
        bounds, grads = [], []
        for start in range(0, len(points), size):
            z = torch.tensor(points[start : start + size], dtype=self.dtype, requires_grad=gradient)
            noise = shared_noise(stream(int(task.get("seed", 0)), "bound", shard.start), self.dtype, self.guide.finest)
            value = self.guide.local_bound(
                reduced, self.space.values(z), len(z), split=shard.plate, first=shard.first, differentiable=gradient,
                samples=0 if gradient else samples, noise=noise, corrections=corrections, together=max(1, size // max(1, samples)), groups=groups_of(state),
            )
            bounds.append(doubles(value))
            if gradient:
                moved = torch.autograd.grad(value.sum(), z, allow_unused=True, materialize_grads=True)[0] if value.requires_grad else torch.zeros_like(z)
                grads.append(doubles(moved))
        out = {"bound": np.concatenate(bounds)}
        return {**out, "gradient": np.concatenate(grads)} if gradient else out

    def task_starts(self, state: Arrays, task: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Local modes at one root point, `state["points"]` `[1, R]`: `modes/<block>` `[n, S, 1 + d]` (log volume, coordinates), `at/<block>` `[n]`.

        `odds/<component>` `[n_top, S]`: log mass of each less that of the first; `missed/<component>` `[n_top]`: what the first one leaves out.
        """
        reduced, shard = self.shard(task)
        root = self.space.values(torch.tensor(state["points"], dtype=self.dtype))
        noise = generator_noise(stream(int(task["seed"]), "starts", shard.start), self.dtype)
        out: dict[str, np.ndarray] = {}
        for component in self.guide.components:
            if not component.remembered or not self.guide.counted(reduced, component.blocks[-1].plates, shard.plate, shard.first):
                continue
            found = explore(LocalModel(component, reduced, root, {}, 1), noise, ATTEMPTS if component.tree else 0)
            out[f"odds/{component.name}"], out[f"missed/{component.name}"] = (doubles(t) for t in (found.odds.T, found.missed))
            for block in component.blocks:
                out[f"modes/{block.name}"] = doubles(found.table(block.name))
                out[f"at/{block.name}"] = flat_positions(self.layout, reduced.selection, block)
        return out

    def task_ratios(self, state: Arrays, task: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """log p - log q of M draws per unit of each finest block at a root point: `ratio/<block>` `[M, n]`, `units/<block>/<plate>` (`local_ratios`)."""
        reduced, shard = self.shard(task)
        noise = generator_noise(stream(int(task["seed"]), "ratios", shard.start), self.dtype)
        root = self.space.values(torch.tensor(state["points"][[int(task.get("at", 0))]], dtype=self.dtype))
        held = {b.name: state[f"held/{b.name}"][flat_positions(self.layout, reduced.selection, b)] for b in self.guide.blocks if f"held/{b.name}" in state}
        mine = [b.name for b in self.guide.blocks if self.guide.counted(reduced, b.plates, shard.plate, shard.first)]
        out: dict[str, np.ndarray] = {}
        for name, ratio in local_ratios(self.guide, reduced, root, self.weights(state, reduced), held, noise, int(task["samples"]), mine).items():
            out[f"ratio/{name}"] = doubles(ratio)
            out.update({f"units/{name}/{p}": reduced.selection.units[p] for p in self.block(name).plates})
        return out

    def task_correct(self, state: Arrays, task: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Gradient of the local ELBO with respect to the corrections, root points given: `state["points"]` `[K, R]`."""
        selection = closure(self.layout, task["units"], task["weight"])
        reduced = self.reduced(selection, key=("whole",) if not task["units"] else None)
        corrections = self.corrections(state, reduced)
        if corrections is None:
            raise NumericalError("no corrections to train")
        self.search_from(state, reduced)
        residuals = self.rows(state, selection, "residual", grad=True)
        weights = Weights(torch.zeros(0), torch.zeros(0, 0), {}, residuals, corrections)
        root = self.space.values(torch.tensor(state["points"], dtype=self.dtype))
        noise = generator_noise(stream(int(task["seed"]), "correct"), self.dtype)
        total = torch.zeros(())
        for component in self.guide.components:
            if not any(name in corrections.names() for name in component.resampled):
                continue
            core = self.kept_core(component, reduced, root, state["points"], keep=not task["units"])
            for name, ratio in candidates(core, noise, 2, correctors(weights, reduced)).log_weight.items():
                total = total + (ratio.mean((0, 1, 2)) * reduced.weights(self.block(name).plates).flatten()).sum()
        tensors = [p for p in corrections.parameters() if p.requires_grad] + list(residuals.values())
        grads = torch.autograd.grad(total, tensors, allow_unused=True, materialize_grads=True)
        keys = [f"correction/{n}" for n, p in corrections.named_parameters() if p.requires_grad] + [f"residual/{b}" for b in residuals]
        out = {f"grad/{k}": doubles(g) for k, g in zip(keys, grads, strict=True)}
        out.update({f"at/residual/{b}": flat_positions(self.layout, selection, self.block(b)) for b in residuals})
        return {"elbo": np.asarray(float(total.detach())), **out}

    def task_score(self, state: Arrays, task: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """What the data say of root and free blocks (`scores.gather`), summed over shards or arrays of units of the split plate."""
        each = enumerate(self._ahead.each(task["pieces"], task["then"]))
        pieces = (self._piece(piece, bool(task["first"]) and number == 0, state) for number, piece in each)
        return gather(self.guide, self.space, self.settings.split, state, pieces, flat_positions, bool(task["apart"]), int(task["seed"]))

    def task_fetch(self, state: Arrays, task: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Read shards into what is kept, up to `task["room"]` bytes: later rounds find them there, and say what cannot be read.

        Where there is no such room, the operating system is asked to have them at hand, in this process's `task["share"]` of the memory nobody uses.
        """
        if task["room"] <= 0:
            self._ahead.beforehand(task["pieces"], float(task["share"]), bool(task["on"]))
        with contextlib.suppress(CohortError):
            for piece in task["pieces"] if self._holding.nbytes < task["room"] else ():
                self._piece(piece, False, state)[0].load()
                self._settle()
                if self._holding.get(key_of(piece)) is None:
                    break
        return {}

    def task_elbo(self, state: Arrays, task: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Local part of the ELBO on a shard at root points `state["points"]`, one draw each: `[K]`."""
        reduced, shard = self.shard(task)
        weights = self.weights(state, reduced)
        corrections = correctors(weights, reduced)
        points, size = state["points"], max(1, self.per_chunk(reduced) // max(1, self.draws_per_unit(state)))
        noise = generator_noise(stream(int(task["seed"]), "elbo", shard.start), self.dtype)
        parts = []
        with torch.no_grad():
            for start in range(0, len(points), size):
                z = torch.tensor(points[start : start + size], dtype=self.dtype)
                if self.guide.free:
                    value = local_elbo(
                        self.guide, reduced, self.space.values(z), weights, noise,
                        particles=len(z), differentiable=False, split=shard.plate, first=shard.first,
                    )
                else:
                    value = self.guide.local_bound(
                        reduced, self.space.values(z), len(z), split=shard.plate, first=shard.first, bound=True,
                        samples=max(1, self.draws_per_unit(state)), noise=noise, corrections=corrections, groups=groups_of(state),
                    )
                parts.append(doubles(value))
        return {"bound": np.concatenate(parts)}

    def task_moments(self, state: Arrays, task: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Posterior mean and sd of a shard's latents over root points `state["points"]`: written to the store, or returned.

        The components of `task["limits"]` look at that many of the points only. The shard is computed in parts of `task["length"]` units. A latent is
        written here, at once, if the shard is a region of its array; others come back as `mean/<latent>`, `sd/<latent>`, `units/<plate>` (positions).
        """
        whole = Shard(*task["shard"])
        parts = [self._moments(state, task, part) for part in whole.parts(int(task["length"]))]
        for name in parts[0][0]:
            axis = self.graph.model.variables[name].plates.index(str(whole.plate))
            mean, sd = (np.concatenate([written[name][i] for written, _ in parts], axis) for i in (0, 1))
            PosteriorWriter.open(task["run"]).write(name, {str(whole.plate): slice(whole.start, whole.stop)}, mean, sd)
        # All parts return `held/*` and `at/*`, the first one what does not depend on the shard, and ragged units have shards of one part.
        return {key: np.concatenate([returned[key] for _, returned in parts if key in returned]) for key in parts[0][1]}

    def _moments(self, state: Arrays, task: Mapping[str, Any], shard: Shard) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], dict[str, np.ndarray]]:
        self._settle()
        reduced, _ = self.shard({"shard": (shard.plate, shard.start, shard.stop, shard.first)})
        self._ahead.after(shard)
        points, most = state["points"], self.draws_per_unit(state)
        noise = generator_noise(stream(int(task["seed"]), "moments", shard.start), self.dtype)
        own, passed = answers_for(self.guide, reduced, shard), self._passed.of(state)
        moments = Moments(self.guide, reduced, self.weights(state, reduced), noise, int(task["repeats"]), most, groups_of(state), own, passed)
        limits = points_of(self.guide, reduced, shard, task.get("limits", {}), len(points))
        moments.over(points, lambda some: self.space.values(torch.tensor(some, dtype=self.dtype)), limits, max(1, self.per_chunk(reduced) // max(1, most)))
        written: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        out = {f"held/{b}": table for b, table in moments.held.items()}
        out |= {f"at/{b}": flat_positions(self.layout, reduced.selection, self.block(b)) for b in moments.held}
        for name, (mean, sd) in moments.result().items():
            plates = self.graph.model.variables[name].plates
            if not self.guide.counted(reduced, plates, shard.plate, shard.first):
                continue
            moments.check(name, mean, sd)
            if shard.plate in plates:
                kind = storage_dtype(math.prod(self.layout.cardinality[p] for p in plates) * math.prod(mean.shape[len(plates) :]))
                written[name] = mean.astype(kind), sd.astype(kind)  # as they will lie in the store: parts wait for each other
                continue
            out[f"mean/{name}"], out[f"sd/{name}"] = mean, sd
            out.update({f"units/{p}": reduced.selection.units[p] for p in plates})
        return written, out

    def block(self, name: str) -> Block:
        """A block by name."""
        return next(b for b in self.guide.blocks if b.name == name)


def reopened(model: Model, cohort: CohortSpec, settings: Settings) -> StudyComputation:
    """The computation of a pickled study."""
    opened = cohort.open(model)
    return StudyComputation(make_graph(opened), opened, settings)
