"""Simulation of the cohort, out of core, with parcels that are contiguous on the sphere."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from scipy.special import ndtri

from pavi_scale.errors import RunError
from pipelines.hcp.storing import BLOCK, PARTIAL, check_free, create_array, expect, file_bytes, settle, storing
from pipelines.hcp.study import LOGIT_SCALE, NETWORKS

VERTICES = 59_412  # cortical vertices of the 32k mesh, both hemispheres
SUBJECTS = 1000  # of the study at full size
BETWEEN_SUBJECTS, BETWEEN_SESSIONS, NOISE, TAU = 0.15, 0.1, 1.0, 1.0
THREADS = 2
ABOUT = "pavi_simulation"

Tell = Callable[[int, int], object]


@dataclass(frozen=True)
class Design:
    """What a simulated cohort is a function of."""

    subjects: int = 20
    vertices: int = VERTICES
    sessions: int = 2
    features: int = 32
    seed: int = 0

    @property
    def shapes(self) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
        """Dimensions and shape of each variable that is written block by block."""
        s, t, v, d = self.subjects, self.sessions, self.vertices, self.features
        return {
            "x": (("subject", "session", "vertex", "feature"), (s, t, v, d)),
            "truth/label_logits": (("subject", "vertex", "network"), (s, v, NETWORKS)),
            "truth/mu_subject": (("subject", "network", "feature"), (s, NETWORKS, d)),
            "truth/mu_session": (("subject", "session", "network", "feature"), (s, t, NETWORKS, d)),
        }


def sphere(vertices: int) -> np.ndarray:
    """Evenly spread points on the unit sphere (Fibonacci lattice), shape (vertices, 3), float32."""
    z = 1 - (2 * np.arange(vertices) + 1) / vertices
    angle = np.pi * (3 - np.sqrt(5)) * np.arange(vertices)
    radius = np.sqrt(1 - z**2)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle), z], axis=1).astype(np.float32)


def smooth_fields(points: np.ndarray, fields: int, rng: np.random.Generator, bumps: int = 300, width: float = 0.35) -> np.ndarray:
    """Smooth random fields on the sphere, shape (points, fields): sums of bumps at random places, made uncorrelated over the points, and standard normal.

    Over the points the fields are then distributed as the prior says, so that intervals of an exact posterior hold what they should on average. (Few
    smooth fields are correlated by chance, and no data speak of the mean over networks: its prior would be wrong for one realisation.)
    """
    centres = rng.standard_normal((bumps, 3)).astype(np.float32)
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    height = rng.standard_normal((bumps, fields)).astype(np.float32)
    blocks = np.array_split(points, max(1, len(points) // 8192))
    out = np.concatenate([np.exp((block @ centres.T - 1) / width**2) @ height for block in blocks])
    out = out.astype(np.float64)
    for _ in range(4):  # uncorrelated, then normal one by one, until both hold together
        out -= out.mean(0)
        values, vectors = np.linalg.eigh(out.T @ out / len(out))
        if len(out) > fields:
            out = out @ (vectors / np.sqrt(values)) @ vectors.T
        rank = out.argsort(0, kind="stable").argsort(0, kind="stable")
        out = ndtri((rank + 0.5) / len(out))
    return out.astype(np.float32)


class Subjects:
    """Draws the subjects of a design, each from a generator of its own: a subject's data do not depend on how many others there are.

    Holds the arrays of one block, so that memory is mapped once and not for every subject.
    """

    def __init__(self, design: Design, mu: np.ndarray, rho: np.ndarray) -> None:
        self._design, self._mu, self._rho = design, mu, rho
        held = min(BLOCK.subjects, design.subjects)
        self._out = {name: np.empty((held, *shape[1:]), np.float32) for name, (_, shape) in design.shapes.items()}
        self._race = np.empty_like(rho)
        self._signal = np.empty((design.vertices, design.features), np.float32)

    def block(self, subjects: range) -> dict[str, np.ndarray]:
        """Values of the subjects by variable; overwritten by the next call."""
        for row, subject in enumerate(subjects):
            self._draw(np.random.default_rng([self._design.seed, subject]), *(values[row] for values in self._out.values()))
        return {name: values[: len(subjects)] for name, values in self._out.items()}

    def _draw(self, rng: np.random.Generator, x: np.ndarray, logits: np.ndarray, mean: np.ndarray, means: np.ndarray) -> None:
        rng.standard_normal(out=logits, dtype=np.float32)
        logits *= TAU
        logits += self._rho
        mean[...] = self._mu + BETWEEN_SUBJECTS * rng.standard_normal(mean.shape, dtype=np.float32)
        means[...] = mean + BETWEEN_SESSIONS * rng.standard_normal(means.shape, dtype=np.float32)
        waits = np.exp(-logits)
        for session, own in zip(x, means, strict=True):
            # Of exponential waiting times with rates exp(logits), the first is a draw from the softmax.
            rng.standard_exponential(out=self._race, dtype=np.float32)
            self._race *= waits
            label = self._race.argmin(1)
            rng.standard_normal(out=session, dtype=np.float32)
            session *= NOISE
            session += np.take(own, label, 0, out=self._signal, mode="clip")


def make_cohort(
    store: str,
    subjects: int = 20,
    vertices: int = VERTICES,
    sessions: int = 2,
    features: int = 32,
    seed: int = 0,
    threads: int = THREADS,
    tell: Tell | None = None,
) -> None:
    """Write a synthetic cohort: `x` in the store's root group, the latents it was made from in its group `truth`.

    x is (subject, session, vertex, feature), float32, in checksummed chunks of 20 subjects and 128 vertices (640 KiB); as many subjects per thread are in
    memory at a time. The store is built aside (`STORE.partial`) and takes its name when it is whole; called again with the same arguments after an
    interruption, this goes on where it stopped. The numbers do not depend on `threads`, nor on interruptions.

    Args:
        store: Path of the new Zarr store.
        subjects: Cardinality of the plate.
        vertices: Cardinality of the plate; points on a sphere.
        sessions: Cardinality of the plate.
        features: Length of a fingerprint.
        seed: Of all numbers.
        threads: Blocks of subjects drawn at the same time.
        tell: Called with the number of subjects done, and that of all, after each block.

    Raises:
        PlanRefused: The disk has no room for it; both figures are named.
        RunError: There is something at the path already, or a partial store of another simulation; or the disk fails.
    """
    design = Design(subjects, vertices, sessions, features, seed)
    path = Path(store)
    if path.exists():
        raise RunError("there is something at the cohort's path already", where=path, remedy="choose another path, or delete it")
    partial = path.with_name(path.name + PARTIAL)
    files = {name: BLOCK.files(name, dims, shape) for name, (dims, shape) in design.shapes.items()}
    tasks = BLOCK.parts(subjects)
    with storing("the cohort cannot be written", path):
        expect(partial, ABOUT, asdict(design))
        left = [task for k, task in enumerate(tasks) if not all(f.written(partial, k) for f in files.values())]
        check_free(path, sum(file_bytes(f, len(left), len(tasks)) for f in files.values()) + 4 * vertices * NETWORKS)
        root = zarr.open_group(partial, mode="a", zarr_format=3, attributes={ABOUT: {**asdict(design), "complete": False}})
        arrays = {name: create_array(root, name, shape, dims, files[name].chunk) for name, (dims, shape) in design.shapes.items()}
        mu, rho = _population(root, design)
        _fill(arrays, lambda: Subjects(design, mu, rho), left, threads, lambda done: tell and tell(done + subjects - sum(map(len, left)), subjects))
        root.attrs[ABOUT] = {**asdict(design), "complete": True}
        settle(partial, path)


def _population(root: zarr.Group, design: Design) -> tuple[np.ndarray, np.ndarray]:
    """Draw and store the population's latents; returns fingerprints (network, feature) and label logits (vertex, network)."""
    rng = np.random.default_rng(design.seed)
    mu = rng.standard_normal((NETWORKS, design.features)).astype(np.float32)
    rho = (LOGIT_SCALE * smooth_fields(sphere(design.vertices), NETWORKS, rng)).astype(np.float32)
    small = {"mu": (("network", "feature"), mu), "rho": (("vertex", "network"), rho), "kappa": ((), np.asarray(NOISE))}
    small |= {"eps": (("network",), np.full(NETWORKS, BETWEEN_SUBJECTS)), "sigma": (("network",), np.full(NETWORKS, BETWEEN_SESSIONS))}
    for name, (dims, value) in small.items():
        create_array(root, f"truth/{name}", value.shape, dims, value.shape)[...] = value
    return mu, rho


def _fill(arrays: dict[str, Any], make: Callable[[], Subjects], blocks: list[range], threads: int, tell: Callable[[int], object]) -> None:
    """Draw and write blocks of subjects in a few threads: drawing and writing release the interpreter's lock."""
    stop, lock, done = threading.Event(), threading.Lock(), [0]

    def work(mine: list[range]) -> None:
        subjects = make()
        for block in mine:
            if stop.is_set():
                return
            for name, values in subjects.block(block).items():
                arrays[name][block.start : block.stop] = values
            with lock:
                done[0] += len(block)
                tell(done[0])

    count = max(1, min(threads, len(blocks)))
    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(work, blocks[k::count]) for k in range(count) if blocks]
        try:
            for future in futures:
                future.result()
        finally:
            stop.set()


def subjects_of(size: str) -> int:
    """Number of subjects of a share of the full study.

    Raises:
        RunError: Not a percentage in (0, 100].

    Example:
        >>> subjects_of("1%"), subjects_of("100%")
        (10, 1000)
    """
    try:
        share = float(size.removesuffix("%")) if size.endswith("%") else math.nan
    except ValueError:
        share = math.nan
    if not 0 < share <= 100:
        raise RunError("not a size of the study", where="--size", expected="a percentage of its 1,000 subjects, such as 1%, 10% or 100%", got=repr(size))
    return max(1, round(SUBJECTS * share / 100))
