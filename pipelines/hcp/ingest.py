"""Ingestion of surface data: CIFTI and GIFTI files named after BIDS become a cohort of the cortical study.

The store's `x` is (subject, session, vertex, feature): a session is one combination of entities (ses, task, run, ...), a vertex is one of the cortex, a
feature is one map of the files, or one time point. Maps must mean the same in all files: contrasts, connectivity to the same seeds, loadings of the same
components. Time points do so only where all saw the same (task, film); of data at rest, give maps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr

from pavi_scale.errors import CohortError, RunError
from pipelines.hcp.bids import Found, find
from pipelines.hcp.storing import BLOCK, PARTIAL, Block, Files, check_free, create_array, expect, file_bytes, settle, storing
from pipelines.hcp.surfaces import Form, check_same, form_of, values_of

ABOUT = "pavi_ingestion"
SCALINGS = ("maps", "vertices")
_BLOCK_BYTES = 320 << 20  # of the subjects that are written together
_CHUNK_BYTES = 4 << 20

Tell = Callable[[str, int, int], object]


@dataclass(frozen=True)
class Ingested:
    """What was written: sizes of the dimensions, and vertices left out."""

    sizes: dict[str, int]
    dropped: int


def ingest(paths: Sequence[Path], store: Path, zscore: str | None = None, tell: Tell | None = None) -> Ingested:
    """Write surface files into a new cohort, one recording in memory at a time.

    Everything is read and checked first; then the store is built aside (`STORE.partial`) and takes its name when it is whole. Called again after an
    interruption, this goes on where it stopped. Of CIFTI files, the cortical surfaces are taken, which have no medial wall; of GIFTI files, the vertices
    that are neither zero nor NaN everywhere.

    Args:
        paths: `.dscalar.nii`, `.dtseries.nii` or `.func.gii` files with BIDS names; of GIFTI both hemispheres.
        store: Path of the new Zarr store.
        zscore: "maps": each map of each recording gets mean 0 and sd 1 over its vertices. "vertices": each vertex does, over its features.
        tell: Called with what is being done, and how many recordings of how many are.

    Raises:
        CohortError: Files that cannot be read, do not belong together, or hold values that are not finite or cannot be scaled.
        PlanRefused: The disk has no room; both figures are named.
        RunError: There is something at the path already; the disk fails.
    """
    if zscore not in (None, *SCALINGS):
        raise CohortError("unknown scaling", where="--zscore", expected=f"one of {SCALINGS}", got=repr(zscore))
    if store.exists():
        raise RunError("there is something at the cohort's path already", where=store, remedy="choose another path, or delete it")
    found = find(paths)
    form = _common_form(found, tell)
    keep = _usable(found, form, zscore, tell)
    form = Form(form.surface.keep(keep), form.features, form.unit)
    sizes = {"subject": len(found.subjects), "session": len(found.sessions), "vertex": len(form.surface), "feature": len(form.features)}
    with storing("the cohort cannot be written", store):
        _write(found, form, keep, zscore, sizes, store, tell)
    return Ingested(sizes, int((~keep).sum()))


def _common_form(found: Found, tell: Tell | None) -> Form:
    """Vertices and maps that all recordings share: from headers alone, so that what does not fit is known within seconds."""
    first: tuple[Form, Path] | None = None
    for n, files in enumerate(found.files.values()):
        form = form_of(files)
        first = first or (form, files[0])
        check_same(first[0], form, (first[1], files[0]))
        if tell:
            tell("headers", n + 1, len(found.files))
    return first[0] if first else form_of(())


def _usable(found: Found, form: Form, zscore: str | None, tell: Tell | None) -> np.ndarray:
    """Read everything once; which vertices belong to the cohort, (vertex,) of bool.

    Raises:
        CohortError: At such a vertex, a value is not finite, or cannot be scaled.
    """
    recordings = list(found.files.items())
    alive = np.full(len(form.surface), found.kind != ".func.gii")
    first_bad = np.full(len(form.surface), len(recordings))
    for n, (_, files) in enumerate(recordings):
        values = values_of(files)
        finite = np.isfinite(values).all(1)
        shown = finite & (values != 0).any(1)
        alive |= np.isfinite(values).any(1) & (np.nan_to_num(values) != 0).any(1)
        bad = ~finite
        if zscore == "vertices":
            bad |= values.max(1) == values.min(1)
        first_bad = np.where(bad & (first_bad == len(recordings)), n, first_bad)
        if zscore == "maps" and shown.any() and (flat := np.ptp(values[shown], axis=0) == 0).any():
            which = form.features[int(flat.argmax())]
            raise CohortError("a map is constant and cannot be scaled", where=f"{files[0]}, map {which!s}", remedy="leave the map out, or do not scale")
        if tell:
            tell("values", n + 1, len(recordings))
    if not alive.any():
        raise CohortError("the files hold nothing but zeros", where=recordings[0][1][0], expected="values at the vertices")
    broken = alive & (first_bad < len(recordings))
    if broken.any():
        _refuse(form, recordings, int(first_bad[broken].min()), broken, first_bad)
    return alive


def _refuse(form: Form, recordings: Sequence[tuple[Any, tuple[Path, ...]]], n: int, broken: np.ndarray, first_bad: np.ndarray) -> None:
    files = recordings[n][1]
    at = int(np.flatnonzero(broken & (first_bad == n))[0])
    values = values_of(files)[at]
    where = f"{' and '.join(map(str, files))}, vertex {form.surface.index[at]} of {form.surface.structure[at]}"
    if np.isfinite(values).all():
        raise CohortError(
            "a vertex is constant and cannot be scaled", where=where, got=f"{float(values[0])} throughout, {broken.sum():,} such vertices",
            remedy="leave it out of the brain model, or scale maps instead (--zscore maps)",
        )  # fmt: skip
    feature = int((~np.isfinite(values)).argmax())
    raise CohortError(
        "a value is not finite", where=f"{where}, feature {form.features[feature]!s}", expected="finite numbers",
        got=f"{float(values[feature])}; {broken.sum():,} such vertices in all", remedy="mend the file, or leave its subject out",
    )  # fmt: skip


def _scaled(values: np.ndarray, zscore: str | None) -> np.ndarray:
    if zscore is None:
        return values
    axis = 0 if zscore == "maps" else 1
    mean, sd = values.mean(axis, dtype=np.float64, keepdims=True), values.std(axis, dtype=np.float64, keepdims=True)
    return ((values - mean) / sd).astype(np.float32)


def _grid(sizes: dict[str, int]) -> Block:
    """Blocks of subjects and vertices whose chunks are about as large as those of the simulated study."""
    row = 4 * sizes["session"] * sizes["feature"]
    subjects = max(1, min(BLOCK.subjects, sizes["subject"], _BLOCK_BYTES // (row * sizes["vertex"])))
    return Block(subjects, max(1, min(BLOCK.vertices, sizes["vertex"], _CHUNK_BYTES // (row * subjects))))


def _write(found: Found, form: Form, keep: np.ndarray, zscore: str | None, sizes: dict[str, int], store: Path, tell: Tell | None) -> None:
    partial, block = store.with_name(store.name + PARTIAL), _grid(sizes)
    settings = {"kind": found.kind, "zscore": zscore, "files": _digest(found), **sizes}
    files: Files = block.files("x", tuple(sizes), tuple(sizes.values()))
    expect(partial, ABOUT, settings)
    rows = block.parts(sizes["subject"])
    left = [row for k, row in enumerate(rows) if not files.written(partial, k)]
    check_free(store, file_bytes(files, len(left), len(rows)))
    about = {ABOUT: {**settings, "complete": False}}
    root = zarr.open_group(partial, mode="a", zarr_format=3, attributes=about)
    _coordinates(found, form).assign_attrs(about).to_zarr(partial, mode="a", zarr_format=3, consolidated=False)
    x = create_array(root, "x", tuple(sizes.values()), tuple(sizes), files.chunk)
    for row in left:
        out = np.empty((len(row), *list(sizes.values())[1:]), np.float32)
        for i, subject in enumerate(row):
            for t, session in enumerate(found.sessions):
                out[i, t] = _scaled(values_of(found.files[found.subjects[subject], session])[keep], zscore)
        if not np.isfinite(out).all():
            raise CohortError("a file changed while it was read", where=f"subject {found.subjects[row[0]]!r} or one of the {len(row) - 1} after it")
        x[row.start : row.stop] = out
        if tell:
            tell("writing", len(found.sessions) * row.stop, len(found.files))
    zarr.open_group(partial, mode="r+").attrs[ABOUT] = {**settings, "complete": True}
    settle(partial, store)


def _coordinates(found: Found, form: Form) -> xr.Dataset:
    """Labels of all dimensions; the surface's meshes are an attribute of the vertices' structure."""
    coords: dict[str, Any] = {name: ("session", np.asarray(labels, dtype=object)) for name, labels in found.entities.items()}
    coords |= {name: (name, np.asarray(labels, dtype=object)) for name, labels in {"subject": found.subjects, "session": found.sessions}.items()}
    coords["feature"] = ("feature", form.features, {"units": form.unit} if form.unit else {})
    coords["structure"] = ("vertex", form.surface.structure, {"mesh_vertices": dict(form.surface.sizes)})
    coords["surface_vertex"] = ("vertex", form.surface.index, {"long_name": "number of the vertex on its mesh, from 0"})
    return xr.Dataset(coords=coords)


def _digest(found: Found) -> str:
    """Tells whether the files are those of an interrupted call: their names, lengths and times of change."""
    lines = [f"{p.absolute()} {p.stat().st_size} {p.stat().st_mtime_ns}" for files in found.files.values() for p in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
