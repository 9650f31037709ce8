"""Where searches start: prior draws, and centres found in the data for the components of mixtures."""

from __future__ import annotations

import numpy as np
from scipy.cluster.vq import ClusterError, kmeans2
from scipy.optimize import linear_sum_assignment

from pavi_scale.batching import closure, splittable
from pavi_scale.computation import StudyComputation
from pavi_scale.guide.blocks import lies_below
from pavi_scale.rng import stream

SAMPLE = 6_000  # observed vectors that are clustered
MIXTURE_STARTS = 4
CLUSTERINGS = 10


def start_points(study: StudyComputation, draws: np.ndarray, seed: int) -> np.ndarray:
    """Root points `[N, R]` to start from: prior draws in which the centres of mixtures, if any, come from the data.

    A root latent of dims (k, *d) over an observed variable of dims d is taken for the k centres of a mixture: its rows are the
    centres of a k-means (k-means++ seeding, Arthur & Vassilvitskii 2007) of a sample of the observed vectors.
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


def centres(study: StudyComputation, name: str, seed: int) -> tuple[str, list[np.ndarray]] | None:
    """Centres for one root latent, at most `MIXTURE_STARTS` sets of `[k, *d]`; None if it does not look like the centres of a mixture."""
    model, graph = study.graph.model, study.graph
    v = model.variables[name]
    if len(v.dims) < 1 or not graph.links[name].identity:
        return None
    for x in model.of_kind("observed"):
        if x.plates and x.dims == v.dims[1:] and x.dims and name in _ancestry(study, x.name):
            sample = observed_sample(study, x.name, seed)
            k = graph.shape(v)[0]
            if len(sample) < 4 * k:
                return None
            sets = clusterings(sample, k, stream(seed, name))
            if not sets:
                return None
            return name, [s.reshape(graph.shape(v)) for s in sets]
    return None


def clusterings(sample: np.ndarray, k: int, seed: int) -> list[np.ndarray]:
    """The tightest of several k-means clusterings of `[m, d]`, each `[k, d]`, all different: single ones often merge two clusters."""
    found = []
    for attempt in range(CLUSTERINGS):
        try:
            rows, label = kmeans2(sample, k, iter=20, minit="++", seed=np.random.default_rng(stream(seed, attempt) % 2**63), missing="raise")
        except ClusterError:
            continue  # a cluster ran empty
        found.append((float(((sample - rows[label]) ** 2).sum()), attempt, rows))
    found.sort(key=lambda f: f[:2])
    different = [f for i, f in enumerate(found) if i == 0 or f[0] > found[i - 1][0] * (1 + 1e-6)]
    return [rows for _, _, rows in different[:MIXTURE_STARTS]]


def renumbered(study: StudyComputation, mode: np.ndarray, onto: np.ndarray, sd: np.ndarray) -> np.ndarray:
    """A root point with the rows of its latents put in the order that is nearest another point.

    Latents that share their first event dimension are renumbered together: the components of a mixture are whole rows.

    Args:
        study: The study.
        mode: The point, `[R]`.
        onto: The other, `[R]`.
        sd: Unit of distance, `[R]`.
    """
    rows: dict[str, list[np.ndarray]] = {}  # dimension -> positions `[k, m]` of the coordinates of each latent
    start = 0
    for name, size in zip(study.space.names, study.space.sizes, strict=True):
        v, shape = study.graph.model.variables[name], study.graph.links[name].base_shape
        if v.dims and shape == study.graph.shape(v):
            rows.setdefault(v.dims[0], []).append(np.arange(start, start + size).reshape(shape[0], -1))
        start += size
    out = mode.copy()
    for at in (np.concatenate(r, 1) for r in rows.values()):
        apart = (((mode[at][:, None] - onto[at][None]) / sd[at]) ** 2).sum(-1)
        mine, theirs = linear_sum_assignment(apart)
        out[at[theirs]] = mode[at[mine]]
    return out


def _ancestry(study: StudyComputation, name: str) -> set[str]:
    found: set[str] = set()
    todo = list(study.graph.model.variables[name].parents)
    while todo:
        parent = todo.pop()
        if parent not in found:
            found.add(parent)
            todo.extend(study.graph.model.variables[parent].parents)
    return found


def observed_sample(study: StudyComputation, name: str, seed: int) -> np.ndarray:
    """Some observed vectors, `[m, d]`, from a few units of each splittable plate."""
    model, layout = study.graph.model, study.layout
    v = model.variables[name]
    total = int(np.prod([layout.cardinality[p] for p in v.plates]))
    rng = np.random.default_rng(stream(seed, "sample", name) % 2**63)
    chosen = {}
    for top in splittable(model, study.guide.components):
        if lies_below(model.plates, v.plates, (top,)):
            n = layout.cardinality[top]
            count = max(1, min(n, int(np.ceil(n * SAMPLE / total))))
            chosen[top] = np.sort(rng.choice(n, count, replace=False))
    selection = closure(layout, chosen)
    x = np.asarray(study.cohort.read(name, {p: selection.units[p] for p in v.plates}), dtype=np.float64)
    x = x.reshape(-1, int(np.prod(study.graph.shape(v))))
    x = x[np.isfinite(x).all(1)]
    return x[rng.permutation(len(x))[:SAMPLE]]
