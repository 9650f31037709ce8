"""Schema checks: does a cohort have the variables, dimensions, index variables and cardinalities that a model asks for?"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping

import numpy as np

from pavi_scale.cohort.contents import Contents, Described
from pavi_scale.errors import CohortError
from pavi_scale.model.template import Model, Variable
from pavi_scale.plates import Layout

INSTANCE = "instance_dimension"
WIDEST = 8  # bytes of a number that torch can compute with
SPARSE_UNITS, SPARSE = 10_000_000, 100  # units of a plate, and times as many as lie below it, from which an index that alone tells of them is refused
_REBUILD = "build the cohort with ps.from_table, or store positions 0..size-1 as integers"


def index_name(child: str, parent: str) -> str:
    """Name given to the index variable that holds the position in `parent` of each unit of `child`.

    Only used on writing; on reading, index variables are found by their attribute `instance_dimension`.

    Example:
        >>> index_name("house", "county")
        'house_county'
    """
    return f"{child}_{parent}"


def inputs(model: Model) -> list[Variable]:
    """The variables that a cohort must hold: observed and covariates."""
    return model.of_kind("observed", "covariate")


def check_variables(cohort: Contents, model: Model) -> None:
    """Presence, dimensions and dtype of every observed variable and covariate.

    Raises:
        CohortError: On the first that does not fit.
    """
    for v in inputs(model):
        where = f"{v.kind} variable {v.name!r}"
        if v.name not in cohort.variables:
            near = difflib.get_close_matches(v.name, [*cohort.variables], n=1)
            remedy = f"did you mean {near[0]!r}? rename one of them" if near else "add it to the cohort, or drop it from the model"
            raise CohortError(
                "cohort lacks a variable of the model", where=where, expected=_shape(v.plates + v.dims), got=f"variables {_listed(cohort)}", remedy=remedy
            )
        found = cohort.variables[v.name]
        if set(found.dims) != set(v.plates + v.dims):
            extra, lacking = [d for d in found.dims if d not in v.plates + v.dims], [d for d in v.plates + v.dims if d not in found.dims]
            hint = "; ".join(f"{word} {', '.join(map(repr, names))}" for word, names in (("drop or declare", extra), ("add", lacking)) if names)
            raise CohortError("variable has the wrong dimensions", where=where, expected=_shape(v.plates + v.dims), got=_shape(found.dims), remedy=hint)
        check_numeric(found, where)


def check_numeric(variable: Described, where: str) -> None:
    """Refuse anything but real numbers and booleans."""
    dtype = variable.dtype
    if not isinstance(dtype, np.dtype) or dtype.kind not in "fiub":
        remedy = "encode text as numbers, times as durations, and give missing values as NaN in a float variable"
        raise CohortError("variable has the wrong dtype", where=where, expected="float, integer or boolean", got=str(dtype), remedy=remedy)
    if dtype.itemsize > WIDEST:
        raise CohortError(
            "variable has the wrong dtype", where=where, expected=f"numbers of at most {8 * WIDEST} bits", got=str(dtype), remedy="Dataset.astype('float64')"
        )


def event_sizes(cohort: Contents, model: Model, known: Mapping[str, int]) -> dict[str, int]:
    """Size of each event dimension, from the cohort's dimensions and the model's `sizes`.

    Raises:
        CohortError: Given by neither, disagreeing, or zero.
    """
    sizes: dict[str, int] = {}
    for dim in model.dims:
        where, told, stored = f"event dimension {dim!r}", model.sizes.get(dim), cohort.sizes.get(dim, known.get(dim))
        if told is None and stored is None:
            raise CohortError(
                "size of an event dimension is unknown",
                where=where,
                expected="a dimension of the cohort, or Model(sizes=...)",
                got=f"dimensions {sorted(cohort.sizes)}",
                remedy=f"Model(sizes={{{dim!r}: ...}})",
            )
        if told is not None and stored is not None and told != stored:
            raise CohortError(
                "size of an event dimension disagrees",
                where=where,
                expected=f"{told} as in Model(sizes=...)",
                got=f"{stored} in the cohort",
                remedy="correct one of them",
            )
        sizes[dim] = int(stored if told is None else told)  # type: ignore[arg-type]
        if sizes[dim] < 1:
            raise CohortError("event dimension is empty", where=where, expected="size 1 or more", got="size 0")
    return sizes


def find_indices(cohort: Contents, model: Model) -> dict[tuple[str, str], str]:
    """`(child, parent)` -> name of the index variable, for each `within` of the model's plates.

    Raises:
        CohortError: None or several for a pair, wrong dimensions, wrong dtype.
    """
    found: dict[tuple[str, str], str] = {}
    tagged = {n: v for n, v in cohort.variables.items() if INSTANCE in v.attrs}
    for child, plate in model.plates.items():
        for parent in plate.within:
            names = [n for n, v in tagged.items() if v.attrs[INSTANCE] == parent and child in v.dims]
            where = f"plate {child!r} within {parent!r}"
            if not names:
                raise _no_index(cohort, model, tagged, child, parent)
            if len(names) > 1:
                raise CohortError(
                    "several index variables for one parent plate",
                    where=where,
                    expected="one",
                    got=f"{sorted(names)}",
                    remedy=f"drop attribute {INSTANCE!r} from all but one",
                )
            variable = tagged[names[0]]
            where = f"index variable {names[0]!r} of {where}"
            if variable.dims != (child,):
                raise CohortError("index variable has the wrong dimensions", where=where, expected=_shape((child,)), got=_shape(variable.dims))
            if not isinstance(variable.dtype, np.dtype) or variable.dtype.kind not in "iuf":
                raise CohortError(
                    "index variable has the wrong dtype", where=where, expected="integer positions, 0-based", got=str(variable.dtype), remedy=_REBUILD
                )
            found[child, parent] = names[0]
    return found


def _no_index(cohort: Contents, model: Model, tagged: Mapping[str, Described], child: str, parent: str) -> CohortError:
    where = f"plate {child!r} within {parent!r}"
    expected = f"an integer variable on {child!r} with attribute {INSTANCE!r}: {parent!r}"
    for name, variable in tagged.items():
        target = variable.attrs[INSTANCE]
        if target == parent:
            return CohortError(
                "index variable has the wrong dimensions", where=f"index variable {name!r} of {where}", expected=_shape((child,)), got=_shape(variable.dims)
            )
        if child in variable.dims and target not in model.plates and target not in cohort.sizes:
            got = f"variable {name!r} with {INSTANCE!r}: {target!r}"
            return CohortError("index variable names an unknown plate", where=where, expected=expected, got=got, remedy=f"one of {sorted(model.plates)}")
    return CohortError("index variable is missing", where=where, expected=expected, got=f"variables {_listed(cohort)}", remedy=_REBUILD)


def build_layout(
    cohort: Contents, model: Model, names: Mapping[tuple[str, str], str], values: Callable[[str, str], np.ndarray], known: Mapping[str, int]
) -> Layout:
    """Cardinalities and parent positions.

    Args:
        cohort: What it holds.
        model: The model.
        names: Index variables, of `find_indices`.
        values: `(name, child)` -> the index variable's values.
        known: Sizes told beforehand, of dimensions that the Dataset does not hold.

    Raises:
        CohortError: Empty plate, plate of unknown size, position that is not integral or out of range.
    """
    sizes = {p: int(cohort.sizes.get(p, known.get(p, -1))) for p in model.plates}
    for plate, size in sizes.items():
        _check_size(model, plate, size)
    raw = {pair: _integral(values(name, pair[0]), f"index variable {name!r} of plate {pair[0]!r}") for pair, name in names.items()}
    for plate in model.plates:
        if sizes[plate] < 0:
            sizes[plate] = 1 + max((int(v.max()) for (_, parent), v in raw.items() if parent == plate), default=-1)
            _check_sparse({names[pair]: v for pair, v in raw.items() if pair[1] == plate}, plate)
            if sizes[plate] == 0:
                raise CohortError(
                    "size of a plate is unknown",
                    where=f"plate {plate!r}",
                    expected=f"a dimension {plate!r} of the cohort, or an index variable that points to it",
                    got=f"dimensions {sorted(cohort.sizes)}",
                    remedy=f"give a variable or coordinate the dimension {plate!r}",
                )
    for (child, parent), v in raw.items():
        _check_range(v, sizes[parent], f"index variable {names[child, parent]!r} of plate {child!r}", parent)
    return Layout(model.plates, sizes, raw)


def _check_sparse(indices: Mapping[str, np.ndarray], plate: str) -> None:
    """Refuse positions that nearly all units of the plate they tell the size of would lie between: they are identifiers."""
    for name, values in indices.items():
        largest, units = int(values.max()), sum(len(v) for v in indices.values())
        if largest >= max(SPARSE_UNITS, SPARSE * units):
            raise CohortError(
                "index variable is sparse",
                where=f"index variable {name!r} into plate {plate!r}, position {int(values.argmax())}",
                expected=f"positions 0 to size - 1 of a plate whose size, which nothing else tells, is below {max(SPARSE_UNITS, SPARSE * units):,}",
                got=f"largest index {largest:,}, of {units:,} units",
                remedy="number the units 0, 1, ... (ps.from_table does; np.unique(..., return_inverse=True)), and keep identifiers as labels of the plate",
            )


def _check_size(model: Model, plate: str, size: int) -> None:
    if size == 0:
        raise CohortError(
            "plate is empty", where=f"plate {plate!r}", expected="cardinality 1 or more", got="cardinality 0", remedy="check the filter that made the cohort"
        )
    told = model.sizes.get(plate)
    if told is not None and size > 0 and told != size:
        raise CohortError(
            "cardinality disagrees",
            where=f"plate {plate!r}",
            expected=f"{told} as in Model(sizes=...)",
            got=f"{size} in the cohort",
            remedy="drop it from sizes: the cohort tells",
        )


def _integral(values: np.ndarray, where: str) -> np.ndarray:
    if values.dtype.kind == "f":
        bad = np.flatnonzero(~(np.abs(values) < 2.0**63) | (np.trunc(values) != values))
        if len(bad):
            raise CohortError(
                "index variable is not integral",
                where=f"{where}, position {bad[0]}",
                expected="integer positions, 0-based",
                got=values[bad[0]],
                remedy=_REBUILD,
            )
    return values.astype(np.int64, copy=False)


def _check_range(values: np.ndarray, size: int, where: str, parent: str) -> None:
    # Hundreds of millions of positions are common: no masks of that length unless something is wrong.
    if values.min() < 0 or values.max() >= size:
        bad = np.flatnonzero((values < 0) | (values >= size))
        raise CohortError(
            "index out of range",
            where=f"{where}, position {bad[0]}",
            expected=f"0 to {size - 1}, the positions in plate {parent!r}",
            got=f"{values[bad[0]]} ({len(bad)} such)",
            remedy=f"positions are 0-based; the cardinality of {parent!r} is the size of its dimension",
        )


def check_stacked(levels: Callable[[str], int], model: Model) -> None:
    """Labels of a plate or event dimension are single values.

    Args:
        levels: Dimension -> number of levels of its index.
        model: The model.

    Raises:
        CohortError: It is a MultiIndex.
    """
    for dim in (*model.plates, *model.dims):
        if levels(dim) > 1:
            raise CohortError(
                "labels are a MultiIndex", where=f"coordinate {dim!r}", expected="single labels, or none", got=f"an index of {levels(dim)} levels",
                remedy=f"Dataset.reset_index({dim!r}): its levels stay as coordinates",
            )


def check_labels(repeated: Callable[[str], tuple[int, object] | None], model: Model) -> None:
    """Labels of a plate name its units: each once.

    Args:
        repeated: Plate -> position and label of the first unit whose label another had before.
        model: The model.

    Raises:
        CohortError: One is there twice.
    """
    for plate in model.plates:
        found = repeated(plate)
        if found is not None:
            raise CohortError(
                "two units of a plate have the same label",
                where=f"coordinate {plate!r}, position {found[0]}",
                expected="unique labels",
                got=repr(found[1]),
                remedy="rename or merge the units",
            )


def _shape(dims: tuple[object, ...]) -> str:
    return f"dimensions ({', '.join(map(str, dims))})"


def _listed(cohort: Contents, most: int = 12) -> str:
    names = sorted(cohort.variables)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
