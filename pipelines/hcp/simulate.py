"""Simulation of the cohort, out of core, with parcels that are contiguous on the sphere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import zarr
from scipy.special import ndtri
from zarr.codecs import Crc32cCodec

from pipelines.hcp.study import LOGIT_SCALE, NETWORKS

VERTICES = 59_412  # cortical vertices of the 32k mesh, both hemispheres
BETWEEN_SUBJECTS, BETWEEN_SESSIONS, NOISE, TAU = 0.15, 0.1, 1.0, 1.0


def sphere(vertices: int) -> np.ndarray:
    """Evenly spread points on the unit sphere (Fibonacci lattice), shape (vertices, 3), float32."""
    z = 1 - (2 * np.arange(vertices) + 1) / vertices
    angle = np.pi * (3 - np.sqrt(5)) * np.arange(vertices)
    radius = np.sqrt(1 - z**2)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle), z], axis=1).astype(np.float32)


def smooth_fields(points: np.ndarray, fields: int, rng: np.random.Generator, bumps: int = 300, width: float = 0.3) -> np.ndarray:
    """Smooth random fields on the sphere, shape (points, fields): sums of bumps at random places, each field mapped to standard normal quantiles.

    Over the points a field is then distributed as the prior says, so that intervals of an exact posterior hold what they should on average.
    """
    centres = rng.standard_normal((bumps, 3)).astype(np.float32)
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    height = rng.standard_normal((bumps, fields)).astype(np.float32)
    blocks = np.array_split(points, max(1, len(points) // 8192))
    out = np.concatenate([np.exp((block @ centres.T - 1) / width**2) @ height for block in blocks])
    rank = out.argsort(0, kind="stable").argsort(0, kind="stable")
    return ndtri((rank + 0.5) / len(out)).astype(np.float32)


def make_cohort(store: str, subjects: int = 20, vertices: int = VERTICES, sessions: int = 2, features: int = 32, seed: int = 0) -> None:
    """Write a synthetic cohort: `x` in the store's root group, the latents it was made from in its group `truth`.

    x is (subject, session, vertex, feature), float32, in checksummed chunks of one subject and 1,024 vertices (256 KiB). One subject is in memory at a time.
    """
    rng = np.random.default_rng(seed)
    mu = rng.standard_normal((NETWORKS, features)).astype(np.float32)
    rho = (LOGIT_SCALE * smooth_fields(sphere(vertices), NETWORKS, rng)).astype(np.float32)
    root = zarr.create_group(Path(store), zarr_format=3)
    truth = root.create_group("truth")
    step = min(vertices, 1024)
    x = _array(root, "x", (subjects, sessions, vertices, features), ("subject", "session", "vertex", "feature"), (1, sessions, step, features))
    of_subject = _array(truth, "mu_subject", (subjects, NETWORKS, features), ("subject", "network", "feature"))
    of_session = _array(truth, "mu_session", (subjects, sessions, NETWORKS, features), ("subject", "session", "network", "feature"))
    logits = _array(truth, "label_logits", (subjects, vertices, NETWORKS), ("subject", "vertex", "network"), (1, step, NETWORKS))
    small = {"mu": (("network", "feature"), mu), "rho": (("vertex", "network"), rho), "kappa": ((), np.asarray(NOISE))}
    small |= {"eps": (("network",), np.full(NETWORKS, BETWEEN_SUBJECTS)), "sigma": (("network",), np.full(NETWORKS, BETWEEN_SESSIONS))}
    for name, (dims, value) in small.items():
        _array(truth, name, value.shape, dims)[...] = value
    for subject in range(subjects):
        own = np.random.default_rng([seed, subject])  # a subject's data do not depend on how many others there are
        own_logits = rho + TAU * own.standard_normal(rho.shape, dtype=np.float32)
        mean = mu + BETWEEN_SUBJECTS * own.standard_normal(mu.shape, dtype=np.float32)
        means = mean + BETWEEN_SESSIONS * own.standard_normal((sessions, *mu.shape), dtype=np.float32)
        of_subject[subject], of_session[subject], logits[subject] = mean, means, own_logits
        x[subject] = np.stack([_session(own_logits, m, own) for m in means])


def _session(logits: np.ndarray, means: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One session of one subject, shape (vertex, feature): a label from the softmax of the logits (Gumbel's way), its mean, and noise."""
    label = (logits - np.log(rng.standard_exponential(logits.shape, dtype=np.float32))).argmax(1)
    return means[label] + NOISE * rng.standard_normal((len(label), means.shape[1]), dtype=np.float32)


def _array(group: zarr.Group, name: str, shape: tuple[int, ...], dims: tuple[str, ...], chunks: tuple[int, ...] | None = None) -> zarr.Array:
    # Not-a-number is never plausible data: a chunk that was lost does not go unnoticed.
    return group.create_array(
        name, shape=shape, chunks=chunks or shape, dtype="float32", dimension_names=dims, compressors=[Crc32cCodec()], fill_value=np.nan
    )
