"""Where searches start: prior draws, and centres found in the data for the components of mixtures."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy.cluster.vq import ClusterError, kmeans2
from scipy.optimize import linear_sum_assignment

from pavi_scale.batching import closure, splittable
from pavi_scale.computation import StudyComputation
from pavi_scale.guide.blocks import lies_below
from pavi_scale.marginal import Bound
from pavi_scale.plates import Layout, Selection, ancestors
from pavi_scale.rng import stream

SAMPLE = 6_000  # observed vectors that are clustered
MIXTURE_STARTS, POOLED_STARTS = 5, 4  # sets of centres; of them from pooled vectors at most
CLUSTERINGS = 10
SHIFTED = 1_000  # observed vectors that are clustered by groups
GROUPED = 32  # groups they come from at most
SHIFTED_STARTS = 3  # of them kept, and tried before those of the pooled vectors
HOPELESS = 30.0  # nats below the best start at which a start is not followed
ATTEMPTS, ROUNDS = 96, 60  # starts of such a clustering, and steps of EM
WORK = 2_000_000  # numbers of one such step at most


def start_points(study: StudyComputation, draws: np.ndarray, seed: int) -> np.ndarray:
    """Root points `[N, R]` to start from: prior draws in which the centres of mixtures, if any, come from the data.

    A root latent of dims (k, *d) over an observed variable of dims d is taken for the k centres of a mixture: its rows are the centres of
    clusterings of a sample of the observed vectors. Where units have centres of their own about the root's (a latent of the same dims
    between the two), clusterings that allow for it come first (`shifted_clusterings`), then k-means of the pooled vectors (`clusterings`).
    """
    found = [c for c in (centres(study, name, seed) for name in study.space.names) if c is not None]
    if not found:
        return draws[:0]
    points = np.repeat(np.median(draws, 0)[None], max(len(rows) for _, rows in found), 0)
    for name, rows in found:
        start = sum(s for n, s in zip(study.space.names, study.space.sizes, strict=True) if study.space.names.index(n) < study.space.names.index(name))
        for i in range(len(points)):
            centre = rows[i % len(rows)]
            points[i, start : start + centre.size] = centre.ravel()
    return points


def highest(points: np.ndarray, bound: Bound, explore: Callable[[np.ndarray], None], count: int) -> np.ndarray:
    """The points where the bound is highest once the local modes of each have been looked for: at most `count`, and none far below the best."""
    value = np.empty(len(points))
    for i, point in enumerate(points):
        explore(point)
        value[i] = bound(point[None], False)[0][0]
    value = np.nan_to_num(value, nan=-np.inf)
    order = np.argsort(-value, kind="stable")[:count]
    return points[order[value[order] >= value[order[0]] - HOPELESS]]


def centres(study: StudyComputation, name: str, seed: int) -> tuple[str, list[np.ndarray]] | None:
    """Centres for one root latent: some sets of `[k, *d]`, the most promising first; None if it does not look like the centres of a mixture."""
    model, graph = study.graph.model, study.graph
    v = model.variables[name]
    if len(v.dims) < 1 or not graph.links[name].identity:
        return None
    for x in model.of_kind("observed"):
        above = _ancestry(study, x.name)
        if x.plates and x.dims == v.dims[1:] and x.dims and name in above:
            shifted = [o for o in model.latents if o.name in above and o.plates and o.dims == v.dims and name in _ancestry(study, o.name)]
            sample, group = observed_sample(study, x.name, min((o.plates for o in shifted), key=len, default=()), seed)
            k = graph.shape(v)[0]
            if len(sample) < 4 * k:
                return None
            sets = clusterings(sample, k, stream(seed, name))
            if (group != group[0]).any():
                sets = shifted_clusterings(sample, group, k, stream(seed, name, "groups")) + sets
            return (name, [s.reshape(graph.shape(v)) for s in sets[:MIXTURE_STARTS]]) if sets else None
    return None


def clusterings(sample: np.ndarray, k: int, seed: int) -> list[np.ndarray]:
    """The tightest of several k-means clusterings of `[m, d]`, each `[k, d]`, all different: single ones often merge two clusters.

    k-means++ seeding (Arthur & Vassilvitskii 2007).
    """
    found = []
    for attempt in range(CLUSTERINGS):
        try:
            rows, label = kmeans2(sample, k, iter=20, minit="++", seed=np.random.default_rng(stream(seed, attempt) % 2**63), missing="raise")
        except ClusterError:
            continue  # a cluster ran empty
        found.append((float(((sample - rows[label]) ** 2).sum()), attempt, rows))
    found.sort(key=lambda f: f[:2])
    different = [f for i, f in enumerate(found) if i == 0 or f[0] > found[i - 1][0] * (1 + 1e-6)]
    return [rows for _, _, rows in different[:POOLED_STARTS]]


def shifted_clusterings(sample: np.ndarray, group: np.ndarray, k: int, seed: int) -> list[np.ndarray]:
    """Clusterings of groups whose centres are shifted about common ones: the common centres `[k, d]` of the best different ones.

    EM from many starts at once, for x_i ~ sum_j w_gj N(c_gj, s^2), c_gj ~ N(mu_j, t^2), with w, c, mu, s and t estimated. Clusters that lie
    apart in each group but overlap once the groups are pooled are told apart. Ranked by the log joint with the volumes of c and mu (Laplace).

    Args:
        sample: Observed vectors, `[m, d]`.
        group: Group of each.
        k: Number of centres.
        seed: Seed of the starts.
    """
    rng = np.random.default_rng(seed % 2**63)
    present, counts = np.unique(group, return_counts=True)
    present = present[np.argsort(-counts, kind="stable")[:GROUPED]]
    parts = [sample[group == g][: max(8 * k, SHIFTED // len(present))] for g in present]
    total, d = sum(map(len, parts)), sample.shape[1]
    pooled = np.concatenate(parts)
    middle, wide = pooled.mean(0), float(pooled.var(0).mean() + 1e-12 * (1.0 + np.square(pooled).max()))
    attempts = int(np.clip(WORK // (total * k * d), 8, ATTEMPTS))
    centre = np.stack([_seeded(parts, k, attempt, rng) for attempt in range(attempts)])  # [a, g, k, d]
    mu = centre.mean(1)
    share = np.full(centre.shape[:3], 1.0 / k)
    noise, shift = np.full((attempts, 1, 1), wide / 4), np.full((attempts, 1, 1), wide / 4)
    for _ in range(ROUNDS):
        count, pull, square, fit = (np.empty(centre.shape[: 4 if of else 3]) for of in (0, 1, 0, 0))
        for g, x in enumerate(parts):
            apart = (x**2).sum(1)[None, :, None] - 2 * x @ centre[:, g].transpose(0, 2, 1) + (centre[:, g] ** 2).sum(-1)[:, None]
            apart = np.maximum(apart, 0.0)
            term = np.log(share[:, g])[:, None] - 0.5 * apart / noise
            highest_term = term.max(2, keepdims=True)  # scipy's logsumexp takes as long as all else together
            weight = np.exp(term - highest_term)
            whole = weight.sum(2, keepdims=True)
            top, weight = highest_term + np.log(whole), weight / whole
            count[:, g], pull[:, g], square[:, g] = weight.sum(1), weight.transpose(0, 2, 1) @ x, (weight * apart).sum(1)
            fit[:, g] = top.sum((1, 2))[:, None] / k
        precision = count / noise + 1 / shift
        off = ((centre - mu[:, None]) ** 2).sum(-1)
        score = fit.sum((1, 2)) - 0.5 * total * d * np.log(noise[:, 0, 0]) - 0.5 * (off / shift + d * np.log(shift * precision)).sum((1, 2))
        score = score - 0.5 * (((mu - middle) ** 2).sum(-1) / wide + d * np.log(wide * len(parts) / shift[:, :, 0] + 1)).sum(1)
        centre = (pull / noise[..., None] + mu[:, None] / shift[..., None]) / precision[..., None]
        mu = (centre.sum(1) / shift + middle / wide) / (len(parts) / shift + 1 / wide)
        share = (count + 1 / k) / (count + 1 / k).sum(2, keepdims=True)
        noise = np.maximum((square + d * count / precision).sum((1, 2)) / (total * d), 1e-9 * wide)[:, None, None]
        shift = np.maximum((off / d + 1 / precision).mean((1, 2)), 1e-6 * wide)[:, None, None]
    order = [int(i) for i in np.argsort(-score, kind="stable")]
    different = [i for n, i in enumerate(order) if n == 0 or score[order[n - 1]] - score[i] > 1e-2]
    return [mu[i] for i in different[:SHIFTED_STARTS]]


def _seeded(parts: list[np.ndarray], k: int, attempt: int, rng: np.random.Generator) -> np.ndarray:
    """Starting centres of all groups, `[g, k, d]`: k-means++ seeds of one group for all, or of each group, matched to those of one."""
    def seeds(x: np.ndarray) -> np.ndarray:
        chosen = [x[rng.integers(len(x))]]
        for _ in range(k - 1):
            apart = np.min([((x - c) ** 2).sum(1) for c in chosen], axis=0)
            chosen.append(x[rng.choice(len(x), p=apart / apart.sum())] if apart.sum() > 0 else x[rng.integers(len(x))])
        return np.stack(chosen)

    first = seeds(parts[attempt % len(parts)])
    if attempt // len(parts) % 2:
        return np.repeat(first[None], len(parts), 0)
    out = []
    for x in parts:
        own = seeds(x)
        out.append(own[linear_sum_assignment(((first[:, None] - own) ** 2).sum(-1))[1]])
    return np.stack(out)


def _ancestry(study: StudyComputation, name: str) -> set[str]:
    found: set[str] = set()
    todo = list(study.graph.model.variables[name].parents)
    while todo:
        parent = todo.pop()
        if parent not in found:
            found.add(parent)
            todo.extend(study.graph.model.variables[parent].parents)
    return found


def _few(layout: Layout, plates: list[str]) -> dict[str, int]:
    """Units of each plate, so that there are at most `GROUPED` groups: many vectors of few groups show more than few of many."""
    sizes = {p: layout.cardinality[p] for p in plates}
    while sizes and math.prod(sizes.values()) > GROUPED and max(sizes.values()) > 1:
        largest = max(sizes, key=lambda p: sizes[p])
        sizes[largest] = max(1, min(sizes[largest] - 1, sizes[largest] * GROUPED // math.prod(sizes.values())))
    return sizes


def observed_sample(study: StudyComputation, name: str, grouped: tuple[str, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Some observed vectors, `[m, d]`, from a few units of each splittable plate; and the unit on plates `grouped` that each lies below, `[m]`."""
    model, layout = study.graph.model, study.layout
    v = model.variables[name]
    rng = np.random.default_rng(stream(seed, "sample", name) % 2**63)
    chosen = {}
    few = _few(layout, [p for p in grouped if p in v.plates and not model.plates[p].within and not any(p in ancestors(model.plates, q) for q in v.plates)])
    total = int(np.prod([few.get(p, layout.cardinality[p]) for p in v.plates]))
    for top in splittable(model, study.guide.components):
        if lies_below(model.plates, v.plates, (top,)):
            n = layout.cardinality[top]
            count = max(1, min(n, int(np.ceil(n * SAMPLE / total))))
            chosen[top] = np.sort(rng.choice(n, count, replace=False))
    whole = closure(layout, chosen)
    units = {**whole.units, **{p: np.sort(rng.choice(layout.cardinality[p], n, replace=False)) for p, n in few.items() if p not in chosen}}
    selection = Selection(layout, units, {p: np.ones(len(u)) for p, u in units.items()})
    x = np.asarray(study.cohort.read(name, {p: selection.units[p] for p in v.plates}), dtype=np.float64)
    x = x.reshape(-1, int(np.prod(study.graph.shape(v))))
    above = study.reduced(selection, [name]).unit_index(v.plates, grouped) if grouped else None
    group = np.zeros(len(x), int) if above is None else above.numpy()
    known = np.isfinite(x).all(1)
    x, group = x[known], group[known]
    order = rng.permutation(len(x))[:SAMPLE]
    return x[order], group[order]
