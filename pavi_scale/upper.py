"""Root, free blocks and what is coupled to them, once sites stand for the data: a small problem, in memory.

The blocks are eliminated (Gaussian, exact for linear-Gaussian laws), and the root's marginal is searched for its mode, its mean and its curvature.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from pavi_scale.ambient import precision
from pavi_scale.batching import closure, flat_positions, splittable
from pavi_scale.computation import StudyComputation
from pavi_scale.guide.alike import Alike, alike
from pavi_scale.guide.blocks import Block
from pavi_scale.guide.curvature import LocalModel
from pavi_scale.guide.joined import with_roots
from pavi_scale.guide.local import Core, fit_core, weights
from pavi_scale.guide.root import RootSpace
from pavi_scale.moments import conditional_moments
from pavi_scale.plates import ancestors
from pavi_scale.reduced import Reading, Reduced, Value
from pavi_scale.rng import stream
from pavi_scale.scores import speaks_of, upper
from pavi_scale.sites import Centre, Sites

POINTS = 1 << 21  # coordinates x root points looked at together
CURVATURE = 20_000_000  # the same for one curvature of the root
LEAST_UNITS = 8
DIRECTIONS = 4  # random ones, from which the search of the root's mode takes its scales
REFITTED = 40  # root coordinates up to which their whole curvature is looked at, and the root is refitted by importance
GRADIENT = 2e-2  # posterior sds off its mode at which a search of the root ends
EVALUATIONS = 60  # of the root's marginal in one search at most
AVERAGED = 3  # Newton steps from the root's mode to its mean
NEAR = 0.01  # sds of the last of them at which they end


class Upper:
    """Root, free blocks and what is coupled to them, in memory and in double precision.

    Root latents that are linear-Gaussian given the others join the components that they are parents of, and are eliminated with them: `rest` are the
    root coordinates that are searched.

    Args:
        study: The study.
        scale: Spread of the prior of each root coordinate, `[R]`.
    """

    def __init__(self, study: StudyComputation, scale: np.ndarray) -> None:
        self.study, self.scale = study, scale
        self._known: tuple[Sites, Reduced, list[Alike]] | None = None  # what was made of the sites that were looked at last
        self.components = upper(study.guide)
        self.blocks: list[Block] = [b for c in self.components for b in c.blocks if b.free]
        model = study.graph.model
        laws = [model.variables[f.variable] for c in self.components for f in c.factors]
        tops = [p for p in model.plates.values() if not p.within]
        used = {q for v in laws for p in v.plates for q in (p, *ancestors(model.plates, p))}
        selection = closure(study.layout, {p.name: np.arange(1) for p in tops if p.name not in used})
        named = {n for v in laws for n in (v.name, *v.parents)} | {p for v in model.latents if not v.plates for p in v.parents}
        names = [n for n in model.variables if n in named and model.variables[n].kind != "latent"]
        with precision(torch.float64):
            self.reduced = Reduced(study.graph, selection, Reading(study.graph, selection, names, study.cohort), dtype=torch.float64)
            self.space = RootSpace(study.graph, self.reduced)
        self.told = speaks_of(study.guide, study.space)
        few, part, coarse = self._part(names, 0), self._part(names, CURVATURE), self._part(names, CURVATURE // 10)
        self.components = [with_roots(c, few, self.space, self.told) for c in self.components]
        self.joined = [n for c in self.components for b in c.blocks if not b.plates for n in b.latents]
        owner = np.repeat(np.arange(len(self.space.names)), self.space.sizes)
        self.rest = np.flatnonzero(~np.isin(owner, [self.space.names.index(n) for n in self.joined]))
        # Units of a part count for others: a joined root would have to be told.
        self.part, self.coarse = self.reduced if self.joined else part, coarse

    def _part(self, names: list[str], values: int) -> Reduced:
        """Some units, weighted to stand for all: enough for a curvature, of which a few thousandths do not matter."""
        study = self.study
        size = self.size(self.reduced) * 2 * max(1, len(self.scale))
        tops = [p for p in splittable(study.graph.model, self.components) if any(p in self.reduced.graph.model.variables[n].plates for n in self.latents)]
        if size <= values or not tops:
            return self.reduced
        top = max(tops, key=lambda p: study.layout.cardinality[p])
        n = study.layout.cardinality[top]
        count = max(min(n, LEAST_UNITS), n * values // size)
        units = np.unique(np.linspace(0, n - 1, count).astype(np.int64))
        unused = {p: u for p, u in self.reduced.selection.units.items() if len(u) < study.layout.cardinality[p] and not study.layout.plates[p].within}
        selection = closure(study.layout, {**unused, top: units}, {top: n / len(units)})
        with precision(torch.float64):
            return Reduced(study.graph, selection, Reading(study.graph, selection, names, study.cohort), dtype=torch.float64)

    @property
    def latents(self) -> list[str]:
        """The latents of its blocks."""
        return [n for c in self.components for b in c.blocks for n in b.latents]

    def size(self, reduced: Reduced) -> int:
        """Coordinates of its blocks."""
        return sum(reduced.count(b.plates) * b.dim for c in self.components for b in c.blocks)

    def cores(self, sites: Sites, z: Tensor, reduced: Reduced) -> tuple[Tensor, list[Core]]:
        """Log marginal of the root, `[K]`, and the Gaussian core of each component given it."""
        total, values = self._above(sites, z)
        rows, cores = self._rows(sites, reduced), []
        for component in self.components:
            local = LocalModel(component, reduced, values, rows, len(z))
            core = fit_core(local, differentiable=z.requires_grad)
            total = total + core.log_marginal(weights(core))
            values.update(local.values(core.mode))
            cores.append(core)
        return total, cores

    def marginal(self, sites: Sites, z: Tensor, reduced: Reduced) -> Tensor:
        """Log marginal of the root, `[K]`: from a few numbers of each law where these are the same for all units."""
        if not all(alike(c, reduced) for c in self.components):
            return self.cores(sites, z, reduced)[0]
        if self._known is None or self._known[0] is not sites or self._known[1] is not reduced:
            rows = self._rows(sites, reduced)
            self._known = sites, reduced, [Alike(c, reduced, {b.name: rows[b.name] for b in c.blocks if b.name in rows}) for c in self.components]
        total, values = self._above(sites, z)
        for component in self._known[2]:
            total = total + component.log_marginal(values, len(z))
        return total

    def _above(self, sites: Sites, z: Tensor) -> tuple[Tensor, dict[str, Value]]:
        """What the root's laws and its own site say, `[K]`, and its values."""
        away = z - torch.from_numpy(sites.root)
        total = away @ torch.from_numpy(sites.pull) - 0.5 * (away @ torch.from_numpy(sites.root_precision) * away).sum(1)
        return total + self.space.log_prior(z, self.joined), dict(self.space.values(z))  # the joined ones' laws are their components'

    def _rows(self, sites: Sites, reduced: Reduced) -> dict[str, tuple[Tensor, Tensor]]:
        """Location and log precision of the blocks' sites at the units of a reduced model."""
        at = {b.name: slice(None) if reduced is self.reduced else flat_positions(self.study.layout, reduced.selection, b) for b in self.blocks}
        return {b: (torch.from_numpy(sites.loc[b][rows]), torch.from_numpy(np.log(sites.precision[b][rows]))) for b, rows in at.items()}

    def bound(self, sites: Sites, points: np.ndarray, reduced: Reduced | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Log marginal of the root at `[K, R]`, and its gradient."""
        reduced = reduced or self.reduced
        found, grads = [], []
        size = max(1, POINTS // max(1, self.size(reduced)))
        with precision(torch.float64):
            for start in range(0, len(points), size):
                z = torch.tensor(points[start : start + size], requires_grad=True)
                value = self.marginal(sites, z, reduced)
                found.append(value.detach().numpy())
                (grad,) = torch.autograd.grad(value.sum(), z, allow_unused=True, materialize_grads=True)
                grads.append(grad.numpy())
        return np.concatenate(found), np.concatenate(grads)

    def value(self, sites: Sites, points: np.ndarray) -> np.ndarray:
        """`bound` without the gradient."""
        size = max(1, POINTS // max(1, self.size(self.reduced)))
        with precision(torch.float64), torch.no_grad():
            found = [self.marginal(sites, torch.tensor(points[a : a + size]), self.reduced).numpy() for a in range(0, len(points), size)]
        return np.concatenate(found)

    def covariance(self, sites: Sites, root: np.ndarray, reduced: Reduced | None = None) -> np.ndarray:
        """Inverse curvature of the searched coordinates at a root point; directions of less curvature than a quarter of the prior's are given that."""
        r, scale = len(self.rest), self.scale[self.rest]
        move = np.zeros((r, len(root)))
        move[np.arange(r), self.rest] = 1e-3 * scale
        _, grad = self.bound(sites, np.concatenate([root + move, root - move]), reduced or self.part)
        h = (grad[r:, self.rest] - grad[:r, self.rest]) / (2e-3 * scale[:, None])
        h = 0.5 * (h + h.T) * scale[:, None] * scale
        values, vectors = np.linalg.eigh(h)
        return np.asarray((vectors / np.maximum(np.abs(values), 0.25)) @ vectors.T * scale[:, None] * scale)

    def metric(self, sites: Sites, root: np.ndarray) -> np.ndarray:
        """A matrix W for which W^T H W is about the identity, H the curvature of the searched coordinates at a root point, `[len(rest), len(rest)]`.

        From a part of the units, since a search only needs about the right lengths: H itself where there are few coordinates, else the diagonal of it
        by a few random directions (Bekas, Kokiopoulou & Saad 2007).
        """
        scale, rest = self.scale[self.rest], self.rest
        known = sites.root_precision[np.ix_(rest, rest)]  # of the root's own site: no unit's
        stands_for = self.size(self.reduced) / self.size(self.coarse) if self.joined else 1.0
        random = np.random.default_rng(stream(0, "directions") % 2**63).choice([-1.0, 1.0], (DIRECTIONS, len(rest)))
        signs = np.eye(len(rest)) if len(rest) <= REFITTED else random
        move = np.zeros((len(signs), len(root)))
        move[:, rest] = 1e-3 * scale * signs
        _, grad = self.bound(sites, np.concatenate([root + move, root - move]), self.coarse)
        change = (grad[len(signs) :] - grad[: len(signs)])[:, rest]
        if len(rest) <= REFITTED:
            h = change / (2e-3 * scale[:, None])
            h = stands_for * (0.5 * (h + h.T) - known) + known
            values, vectors = np.linalg.eigh(h * scale[:, None] * scale)
            return np.asarray(scale[:, None] * vectors / np.sqrt(np.maximum(np.abs(values), 0.25)))
        own = stands_for * ((change * signs).mean(0) / (2e-3 * scale) - known.diagonal()) + known.diagonal()
        return np.diag(1 / np.sqrt(np.maximum(np.abs(own), 0.25 / scale**2)))

    def solve(self, sites: Sites, start: np.ndarray, evaluations: int = EVALUATIONS) -> Centre:
        """Mode of the root's marginal from a start, and the free blocks there; where so many evaluations lead, if that is nearer."""
        if not len(self.rest):
            return self.centre(sites, start)
        # The sites' precision grows by orders of magnitude over the rounds: the search is whitened.
        metric = self.metric(sites, start)

        def at(y: np.ndarray) -> np.ndarray:
            point = start.copy()
            point[self.rest] += metric @ y
            return point

        def objective(y: np.ndarray) -> tuple[float, np.ndarray]:
            value, grad = self.bound(sites, at(y)[None])
            if not (np.isfinite(value[0]) and np.isfinite(grad).all()):
                return 1e300, np.zeros_like(y)
            return -float(value[0]), -grad[0, self.rest] @ metric

        options = {"maxfun": evaluations, "maxiter": evaluations, "ftol": 1e-13, "gtol": GRADIENT}
        found = minimize(objective, np.zeros(len(self.rest)), jac=True, method="L-BFGS-B", options=options)
        return self.centre(sites, at(found.x))

    def average(self, sites: Sites, root: np.ndarray, normals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Location and covariance of the Gaussian that fits the marginal of the searched coordinates best on average (E[gradient] = 0), from its mode.

        A mode of locations and log scales together puts the scales too low, by a factor sqrt(1 - 1/n) for n units about an unknown mean.

        Args:
            sites: What stands for the data.
            root: Where to start, `[R]`.
            normals: Standard normals, `[P, len(rest)]`, used with both signs.

        Returns:
            `[R]`, `[len(rest), len(rest)]`.
        """
        covariance = self.covariance(sites, root)
        for _ in range(AVERAGED):
            move = np.zeros((len(normals), len(root)))
            move[:, self.rest] = normals @ np.linalg.cholesky(covariance).T
            _, grad = self.bound(sites, np.concatenate([root + move, root - move]))
            step = covariance @ grad[:, self.rest].mean(0)
            length = float(np.abs(step / np.sqrt(np.diagonal(covariance))).max())
            root = root.copy()
            root[self.rest] += step * min(1.0, 1.0 / max(length, 1e-12))
            if length < NEAR:
                break
        return root, self.covariance(sites, root)

    def complete(self, sites: Sites, points: np.ndarray, each: bool) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the joined root coordinates given the others, in place in `[P, R]`; zero sd elsewhere.

        Args:
            sites: What stands for the data.
            points: Root points.
            each: Whether at each point, or at the first for all.
        """
        mean, sd = points.copy(), np.zeros_like(points)
        size = max(1, POINTS // max(1, self.size(self.reduced))) if each else 1
        with precision(torch.float64), torch.no_grad():
            for start in range(0, len(points) if each else 1, size):
                at = slice(start, start + size) if each else slice(None)
                _, cores = self.cores(sites, torch.tensor(points[start : start + size]), self.reduced)
                for where, loc, scale in self._joined_moments(cores):
                    mean[at, where], sd[at, where] = loc, scale
        return mean, sd

    def _joined_moments(self, cores: list[Core]) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """Positions of joined root coordinates, their means and standard deviations `[K, size]`."""
        for component, core in zip(self.components, cores, strict=True):
            for block in component.blocks:
                if block.plates:
                    continue
                loc, variance = conditional_moments(core, core.mode, block.name)
                for name in block.latents:
                    index = self.space.names.index(name)
                    where = slice(sum(self.space.sizes[:index]), sum(self.space.sizes[: index + 1]))
                    mean, square = (LocalModel.columns_of(component, block, name, t)[:, 0].numpy() for t in (loc, variance))
                    yield where, mean, np.sqrt(square)

    def centre(self, sites: Sites, root: np.ndarray) -> Centre:
        """The free blocks at a root point, its joined coordinates put where they belong."""
        loc, sd, root = {}, {}, root.copy()
        with precision(torch.float64), torch.no_grad():
            value, cores = self.cores(sites, torch.tensor(root[None]), self.reduced)
            for where, mean, _ in self._joined_moments(cores):
                root[where] = mean[0]
            for component, core in zip(self.components, cores, strict=True):
                for block in component.blocks:
                    if block.free:
                        centred, variance = conditional_moments(core, core.mode, block.name)
                        loc[block.name], scale = (
                            torch.cat([LocalModel.columns_of(component, block, n, t) for n in block.latents], -1)[0].numpy() for t in (centred, variance)
                        )
                        sd[block.name] = np.sqrt(scale)
        root_sd = np.zeros(len(root))
        move = np.zeros((len(self.told), len(root)))
        move[np.arange(len(self.told)), self.told] = 1e-3 * self.scale[self.told]
        if len(self.told):
            _, grad = self.bound(sites, np.concatenate([root + move, root - move]), self.part)
            own = (grad[len(move) :] - grad[: len(move)])[np.arange(len(move)), self.told] / (2e-3 * self.scale[self.told])
            root_sd[self.told] = 1 / np.sqrt(np.maximum(own, 0.25 / self.scale[self.told] ** 2))
        return Centre(root, root_sd, float(value[0]), loc, sd)

    def initial(self, root: np.ndarray, loc: Mapping[str, np.ndarray]) -> Sites:
        """Sites that say next to nothing."""
        return Sites(
            dict(loc), {b: np.full_like(x, 1e-4) for b, x in loc.items()}, root.copy(), np.zeros(len(root)), np.zeros((len(root), len(root)))
        )
