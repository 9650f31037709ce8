"""Values on the cortical surface, read from CIFTI-2 and GIFTI files through nibabel and written to CIFTI-2."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from xml.parsers.expat import ExpatError

import nibabel as nib
import numpy as np
from nibabel.cifti2 import BrainModelAxis, Cifti2HeaderError, Cifti2Image, LabelAxis, ScalarAxis, SeriesAxis
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from pavi_scale.errors import CohortError, PaviError

CORTEX = ("CIFTI_STRUCTURE_CORTEX_LEFT", "CIFTI_STRUCTURE_CORTEX_RIGHT", "CIFTI_STRUCTURE_CORTEX")
HEMISPHERE = {"L": CORTEX[0], "R": CORTEX[1]}
_GIFTI_NAME = {"CortexLeft": CORTEX[0], "CortexRight": CORTEX[1]}
# What nibabel, and the XML and zip parsers below it, raise for a file that is absent, torn or not understood.
_TROUBLES = (
    OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, MemoryError, AssertionError,
    zlib.error, ExpatError, Cifti2HeaderError, ImageFileError, HeaderDataError,
)  # fmt: skip


@dataclass(frozen=True)
class Surface:
    """The vertices that values are given at.

    Args:
        structure: CIFTI name of each vertex' structure, (vertex,), vertices of one structure together.
        index: Its number on that structure's surface mesh, from 0, (vertex,).
        sizes: Structure -> number of vertices of its whole mesh, medial wall included.
    """

    structure: np.ndarray
    index: np.ndarray
    sizes: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.index)

    def differs(self, other: Surface) -> str | None:
        """What the other has that this has not, in words; None where they are the same."""
        if dict(self.sizes) != dict(other.sizes):
            return f"meshes {dict(other.sizes)}"
        if len(self) != len(other):
            return f"{len(other):,} vertices"
        same = (self.structure == other.structure) & (self.index == other.index)
        return None if same.all() else f"{(~same).sum():,} other vertices"

    def keep(self, mask: np.ndarray) -> Surface:
        """Some of the vertices."""
        return Surface(self.structure[mask], self.index[mask], self.sizes)

    @cached_property
    def axis(self) -> BrainModelAxis:
        """The same as an axis of a CIFTI file."""
        return BrainModelAxis(name=self.structure.astype(str), vertex=self.index, nvertices=dict(self.sizes))

    @classmethod
    def plain(cls, vertices: int) -> Surface:
        """One structure of that many vertices: where nothing is known about the mesh."""
        return cls(np.full(vertices, CORTEX[2], dtype=object), np.arange(vertices), {CORTEX[2]: vertices})


@dataclass(frozen=True)
class Form:
    """What all files of a cohort have in common.

    Args:
        surface: The vertices.
        features: Name of each map, or the time of each point.
        unit: Unit of `features` where they are times.
    """

    surface: Surface
    features: np.ndarray
    unit: str | None = None


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except PaviError:
        raise
    except _TROUBLES as error:
        raise CohortError(
            "a surface file cannot be read", where=path, expected="a whole CIFTI-2 or GIFTI file", got=f"{type(error).__name__}: {error}",
            remedy="look at it with wb_command -file-information, and copy it again",
        ) from error  # fmt: skip


def form_of(files: Sequence[Path]) -> Form:
    """Vertices and maps of one recording, from headers where the format has them.

    Args:
        files: One CIFTI file, or the GIFTI files of its hemispheres.

    Raises:
        CohortError: Not such a file, torn, without cortical surface, or hemispheres that differ.
    """
    return _cifti_form(files[0]) if files[0].name.endswith(".nii") else _gifti_form(files)


def values_of(files: Sequence[Path]) -> np.ndarray:
    """Values of one recording, float32, (vertex, feature), at the vertices that `form_of` says.

    Raises:
        CohortError: The files cannot be read.
    """
    if files[0].name.endswith(".nii"):
        with _reading(files[0]):
            image = nib.load(files[0])
            data = np.asarray(image.dataobj)
            with np.errstate(over="ignore"):  # what is too large for the type is found as infinite
                return np.concatenate([data[:, m.index_offset : m.index_offset + m.index_count].T.astype(np.float32) for m in _cortex(image, files[0])])
    return np.concatenate([_gifti(path)[1] for path in files])


def _cortex(image: Any, path: Path) -> list[Any]:
    """The brain models of the cortical surfaces of a CIFTI file (read as they are: as an axis, each vertex would be handled by itself)."""
    columns = image.header.get_index_map(1)
    if columns.indices_map_to_data_type != "CIFTI_INDEX_TYPE_BRAIN_MODELS":
        got = columns.indices_map_to_data_type
        raise CohortError("the file is not dense: its columns are no vertices", where=path, expected="CIFTI_INDEX_TYPE_BRAIN_MODELS", got=got)
    models = list(columns.brain_models)
    found = [m for m in models if m.brain_structure in CORTEX and m.model_type == "CIFTI_MODEL_TYPE_SURFACE"]
    if not found:
        raise CohortError("the file has no cortical surface", where=path, expected=f"one of {CORTEX}", got=sorted({str(m.brain_structure) for m in models}))
    for m in found:
        index = np.asarray(m.vertex_indices)
        ends = 0 <= m.index_offset <= m.index_offset + m.index_count <= image.shape[1]
        if len(index) != m.index_count or not ends or not ((index >= 0) & (index < m.surface_number_of_vertices)).all():
            where = f"{path}, {m.brain_structure}"
            raise CohortError("the file contradicts itself", where=where, expected="a column, and a vertex of the mesh, for each index")
    return found


def _cifti_form(path: Path) -> Form:
    with _reading(path):
        image = nib.load(path)
        if not isinstance(image, Cifti2Image):
            raise CohortError("the file is no CIFTI-2 file", where=path, expected="a NIfTI-2 header with a CIFTI extension", got=type(image).__name__)
        cortex, rows = _cortex(image, path), image.header.get_axis(0)
        proxy = image.dataobj
        needed, there = proxy.offset + proxy.dtype.itemsize * int(np.prod(proxy.shape)), path.stat().st_size
    if there < needed:
        raise CohortError("the file is cut short", where=path, expected=f"{needed:,} bytes", got=f"{there:,} bytes", remedy="copy it again")
    surface = Surface(
        np.concatenate([np.full(m.index_count, m.brain_structure, dtype=object) for m in cortex]),
        np.concatenate([np.asarray(m.vertex_indices) for m in cortex]).astype(np.int32),
        {m.brain_structure: int(m.surface_number_of_vertices) for m in cortex},
    )
    if isinstance(rows, SeriesAxis):
        return Form(surface, np.asarray(rows.time, dtype=np.float64), str(rows.unit).lower())
    if isinstance(rows, ScalarAxis):
        return Form(surface, _names(list(rows.name)))
    raise CohortError("the file's rows are neither maps nor time points", where=path, expected="ScalarAxis or SeriesAxis", got=type(rows).__name__)


def _names(names: Sequence[str | None]) -> np.ndarray:
    """Names of maps; numbers from 1 where they do not tell the maps apart."""
    usable = all(names) and len(set(names)) == len(names)
    return np.asarray(list(map(str, names)) if usable else [str(i + 1) for i in range(len(names))], dtype=object)


def _gifti(path: Path) -> tuple[str | None, np.ndarray, np.ndarray]:
    """Structure as the file says it, values (vertex, map), names of maps."""
    with _reading(path):
        image = nib.load(path)
        if not isinstance(image, nib.GiftiImage):
            raise CohortError("the file is no GIFTI file", where=path, got=type(image).__name__)
        with np.errstate(over="ignore"):
            arrays = [np.asarray(a.data).astype(np.float32) for a in image.darrays]
        if not arrays or any(a.ndim not in (1, 2) or len(a) != len(arrays[0]) for a in arrays) or arrays[0].size == 0:
            got = f"shapes {[a.shape for a in arrays]}"
            raise CohortError("the file's arrays are not maps of one surface", where=path, expected="arrays of one value for each vertex", got=got)
        metas = [dict(image.meta), *(dict(a.meta) for a in image.darrays)]
    said = next((m["AnatomicalStructurePrimary"] for m in metas if m.get("AnatomicalStructurePrimary")), None)
    values = np.column_stack(arrays)
    names = [m.get("Name") for m in metas[1:]] if len(arrays) == values.shape[1] else [None] * values.shape[1]
    return _GIFTI_NAME.get(said or "", said), values, _names(names)


def _gifti_form(files: Sequence[Path]) -> Form:
    parts = []
    for path in files:
        structure = next(HEMISPHERE[h] for h in HEMISPHERE if f"_hemi-{h}" in path.name)
        said, values, names = _gifti(path)
        if said is not None and said != structure:
            raise CohortError("the file holds another hemisphere than its name says", where=path, expected=structure, got=said)
        parts.append((structure, len(values), names))
        if not np.array_equal(names, parts[0][2]):
            raise CohortError("the hemispheres have different maps", where=f"{files[0]} and {path}", expected=_few(parts[0][2]), got=_few(names))
    surface = Surface(
        np.concatenate([np.full(n, s, dtype=object) for s, n, _ in parts]),
        np.concatenate([np.arange(n, dtype=np.int32) for _, n, _ in parts]),
        {s: n for s, n, _ in parts},
    )
    return Form(surface, parts[0][2])


def _few(names: np.ndarray) -> str:
    return f"{len(names)}: {', '.join(map(str, names[:3]))}{', ...' if len(names) > 3 else ''}"


def check_same(first: Form, other: Form, paths: tuple[object, object]) -> None:
    """Refuse a recording that cannot lie in one array with the first.

    Raises:
        CohortError: Other vertices, or other maps.
    """
    where = f"{paths[1]}, beside {paths[0]}"
    if what := first.surface.differs(other.surface):
        raise CohortError(
            "the files have different vertices", where=where, expected=f"{len(first.surface):,} vertices of meshes {dict(first.surface.sizes)}", got=what,
            remedy="resample them to one mesh (wb_command -cifti-resample), with one medial wall",
        )  # fmt: skip
    a, b = first.features, other.features
    same = len(a) == len(b) and (np.array_equal(a, b) if first.unit is None else first.unit == other.unit and np.allclose(a - a[0], b - b[0], atol=1e-4))
    if not same:
        what = "maps" if first.unit is None else "time points"
        raise CohortError(f"the files have different {what}", where=where, expected=_few(a), got=_few(b), remedy=f"give files with the same {what}")


def write_scalars(path: Path, surface: Surface, maps: Mapping[str, np.ndarray], about: str = "") -> None:
    """A `.dscalar.nii` file of named maps, each (vertex,), which all carry the description `about`."""
    rows = ScalarAxis(list(maps), [{"Description": about} for _ in maps])
    _write(path, rows, np.stack([np.asarray(m, dtype=np.float32) for m in maps.values()]), surface, "SCALARS")


def write_labels(path: Path, surface: Surface, name: str, keys: np.ndarray, table: Mapping[int, tuple[str, tuple[float, ...]]], about: str = "") -> None:
    """A `.dlabel.nii` file of one map.

    Args:
        path: The file.
        surface: The vertices.
        name: Of the map.
        keys: Label of each vertex, (vertex,), keys of `table`.
        table: Key -> (name, red-green-blue-alpha in [0, 1]).
        about: Description of the map.
    """
    rows = LabelAxis([name], [dict(table)], [{"Description": about}])
    _write(path, rows, np.asarray(keys, dtype=np.int32)[None], surface, "LABELS")


def _write(path: Path, rows: Any, data: np.ndarray, surface: Surface, intent: str) -> None:
    image = Cifti2Image(data, header=(rows, surface.axis))
    image.nifti_header.set_intent(f"NIFTI_INTENT_CONNECTIVITY_DENSE_{intent}")
    image.to_filename(path)
