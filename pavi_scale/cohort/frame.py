"""Cohorts from long tables: one row per unit, labels factorised, parent-level columns checked and lifted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pavi_scale.cohort.schema import INSTANCE, index_name
from pavi_scale.errors import CohortError
from pavi_scale.later import Later

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
else:
    pd, xr = Later("pandas"), Later("xarray")

Within = str | Sequence[str] | Mapping[str, str | Sequence[str] | None]


def from_table(frame: pd.DataFrame, plate: str, within: Within | None = None, dims: Mapping[str, tuple[str, Sequence[str]]] | None = None) -> xr.Dataset:
    """Build a cohort from a long table: one row per unit of `plate`.

    - Each plate of `within` is a column of labels. They are factorised in sorted order and kept as the plate's coordinate; `plate`
      gets an index variable with attribute `instance_dimension`. Where the labels of one parent plate determine those of another
      (each school in one district), the index variable between these two plates is stored as well.
    - Columns listed for a parent plate must be constant within each of its units, and are stored on it.
    - Other numeric and boolean columns become variables on `plate`; text, categories and times become coordinates on it (missing text becomes "").
    - A column, or row index, named `plate` holds the labels of the units themselves.

    Args:
        frame: The table.
        plate: Plate of the rows.
        within: Plates that the rows belong to: a name, names, or a mapping from name to the columns of that level.
        dims: Variable -> (event dimension, columns): columns to stack into one variable on `plate` and that dimension.

    Raises:
        CohortError: Unknown or doubled column, no rows, missing label, label repeated for a unit, column that varies within its level.

    Example:
        >>> frame = pd.DataFrame({"county": ["b", "a", "b"], "log_uppm": [0.5, 0.1, 0.5], "log_radon": [1.0, 2.0, 3.0]})
        >>> cohort = from_table(frame, plate="house", within={"county": ["log_uppm"]})
        >>> cohort["house_county"].values.tolist(), cohort["log_uppm"].values.tolist()
        ([1, 0, 1], [0.1, 0.5])
    """
    levels = _levels(within)
    stacks = dict(dims or {})
    _check_table(frame, plate, levels, stacks)
    variables: dict[str, xr.Variable] = {}
    coords: dict[str, xr.Variable] = {}
    codes = {parent: _factorise(frame, parent, coords) for parent in levels}
    for parent, code in codes.items():
        variables[index_name(plate, parent)] = xr.Variable((plate,), code, {INSTANCE: parent})
        for column in levels[parent]:
            _store(column, parent, _lift(frame, column, parent, code), variables, coords)
    for child, parent in ((c, p) for c in codes for p in codes if c != p):
        _link(child, parent, codes, variables)
    for name, (dim, columns) in stacks.items():
        variables[name] = xr.Variable((plate, dim), np.stack([_numeric(frame, c) for c in columns], axis=1))
        coords.setdefault(dim, xr.Variable((dim,), _labels(pd.Series(list(columns)))))
    _unit_labels(frame, plate, coords)
    used = {plate, *levels, *(c for columns in levels.values() for c in columns), *(c for _, columns in stacks.values() for c in columns)}
    for column in (c for c in frame.columns if c not in used):
        _store(column, plate, frame[column], variables, coords)
    return xr.Dataset(variables, coords)


def _levels(within: Within | None) -> dict[str, list[str]]:
    if within is None:
        return {}
    if isinstance(within, str):
        return {within: []}
    if not isinstance(within, Mapping):
        return {parent: [] for parent in within}
    return {parent: [columns] if isinstance(columns, str) else list(columns or ()) for parent, columns in within.items()}


def _check_table(frame: pd.DataFrame, plate: str, levels: Mapping[str, list[str]], stacks: Mapping[str, tuple[str, Sequence[str]]]) -> None:
    if not isinstance(frame, pd.DataFrame):
        raise CohortError("from_table takes a pandas table", where="from_table(frame)", expected="pandas.DataFrame", got=type(frame).__name__)
    if len(frame) == 0:
        raise CohortError("plate is empty", where=f"from_table, plate {plate!r}", expected="one row or more", got="no rows")
    names = list(frame.columns)
    odd = [c for c in names if not isinstance(c, str)]
    if odd:
        raise CohortError(
            "column names must be text", where="from_table(frame)", got=repr(odd[0]), remedy="frame.rename(columns=str), or flatten the MultiIndex"
        )
    doubled = sorted({c for c in names if names.count(c) > 1})
    if doubled:
        raise CohortError("column is there twice", where=f"column {doubled[0]!r}", expected="one column per name", remedy="drop or rename one")
    if plate in levels:
        raise CohortError("a plate cannot lie within itself", where=f"from_table, plate {plate!r}", remedy="name the plate of the rows differently")
    wanted = [c for parent, columns in levels.items() for c in (parent, *columns)] + [c for _, columns in stacks.values() for c in columns]
    for column in wanted:
        if column not in names:
            raise CohortError("table lacks a column", where=f"column {column!r}", expected=f"one of {sorted(names)}", remedy="correct `within` or `dims`")
        if wanted.count(column) > 1:
            raise CohortError(
                "column is used twice", where=f"column {column!r}", expected="one level or stack per column", remedy="list it once in `within` or `dims`"
            )
    made = {index_name(a, b) for a in (plate, *levels) for b in levels if a != b} | {*stacks} | {dim for dim, _ in stacks.values()}
    for column in names:
        if column in made:
            raise CohortError("column has a name that from_table gives", where=f"column {column!r}", remedy="rename the column")


def _factorise(frame: pd.DataFrame, parent: str, coords: dict[str, xr.Variable]) -> np.ndarray:
    """Positions of the rows' labels among the sorted labels; stores the coordinate."""
    column = frame[parent]
    missing = np.flatnonzero(column.isna().to_numpy())
    if len(missing):
        raise CohortError(
            "label is missing",
            where=f"column {parent!r}, row {frame.index[missing[0]]!r}",
            expected=f"the {parent} of each row",
            got=f"{len(missing)} missing",
            remedy="drop these rows or give them a label",
        )
    plain = column.astype(column.cat.categories.dtype) if isinstance(column.dtype, pd.CategoricalDtype) else column
    kind = pd.api.types.infer_dtype(plain)
    if kind.startswith("mixed"):
        raise CohortError(
            "labels are of several types",
            where=f"column {parent!r}",
            expected="labels of one type, to sort them",
            got=kind,
            remedy=f"frame[{parent!r}].astype(str)",
        )
    code, labels = pd.factorize(plain, sort=True)
    coords[parent] = xr.Variable((parent,), _labels(pd.Series(labels)))
    return np.asarray(code, dtype=np.int64)


def _lift(frame: pd.DataFrame, column: str, parent: str, code: np.ndarray) -> pd.Series:
    """One value per unit of `parent`, all rows agreeing (missing agrees with missing only)."""
    _, first = np.unique(code, return_index=True)
    series = frame[column].reset_index(drop=True)
    value = pd.factorize(series, use_na_sentinel=False)[0]
    bad = np.flatnonzero(value != value[first][code])
    if len(bad):
        row = bad[np.argmin(code[bad])]
        unit = code[row]
        got = f"{series.iloc[first[unit]]!s} and {series.iloc[row]!s}"
        where = f"column {column!r}, {parent}={frame[parent].iloc[row]!s}"
        raise CohortError(
            "column varies within its level",
            where=where,
            expected=f"one value per {parent}",
            got=got,
            remedy=f"leave {column!r} out of `within` to keep it per row, or correct it",
        )
    return series.iloc[first]


def _link(child: str, parent: str, codes: Mapping[str, np.ndarray], variables: dict[str, xr.Variable]) -> None:
    """Store the index variable child -> parent if each unit of `child` lies in one unit of `parent`."""
    _, first = np.unique(codes[child], return_index=True)
    of_unit = codes[parent][first]
    if bool((of_unit[codes[child]] == codes[parent]).all()):
        variables[index_name(child, parent)] = xr.Variable((child,), of_unit, {INSTANCE: parent})


def _unit_labels(frame: pd.DataFrame, plate: str, coords: dict[str, xr.Variable]) -> None:
    labels = frame[plate] if plate in frame.columns else frame.index.to_series() if frame.index.name == plate else None
    if labels is None:
        return
    repeated = np.flatnonzero(labels.duplicated().to_numpy() | labels.isna().to_numpy())
    if len(repeated):
        where = f"column {plate!r}, row {frame.index[repeated[0]]!r}"
        raise CohortError(
            "two units of a plate have the same label, or one has none",
            where=where,
            expected="unique labels",
            got=repr(labels.iloc[repeated[0]]),
            remedy=f"rename the column, or aggregate to one row per {plate}",
        )
    coords[plate] = xr.Variable((plate,), _labels(labels))


def _store(name: str, plate: str, series: pd.Series, variables: dict[str, xr.Variable], coords: dict[str, xr.Variable]) -> None:
    """Numbers become a variable on `plate`, anything else a coordinate."""
    if _is_numeric(series):
        variables[name] = xr.Variable((plate,), _to_numpy(series))
    else:
        coords[name] = xr.Variable((plate,), _labels(series))


def _is_numeric(series: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(series) and not pd.api.types.is_complex_dtype(series)


def _to_numpy(series: pd.Series) -> np.ndarray:
    """Plain NumPy numbers; pandas' nullable types become float with NaN where a value is missing."""
    if isinstance(series.dtype, np.dtype):
        return np.array(series.to_numpy())
    missing = bool(series.isna().any())
    if pd.api.types.is_bool_dtype(series.dtype) and not missing:
        return series.to_numpy(dtype=bool, copy=True)
    if pd.api.types.is_integer_dtype(series.dtype) and not missing:
        return series.to_numpy(dtype=np.int64, copy=True)
    return series.to_numpy(dtype=np.float64, na_value=np.nan, copy=True)


def _numeric(frame: pd.DataFrame, column: str) -> np.ndarray:
    if not _is_numeric(frame[column]):
        raise CohortError("column is not numeric", where=f"column {column!r} of `dims`", expected="numbers", got=str(frame[column].dtype))
    return _to_numpy(frame[column])


def _labels(series: pd.Series) -> np.ndarray:
    """Labels as numbers, times or objects; text stays text of any length, which Zarr v3 specifies (fixed-width text it does not)."""
    if isinstance(series.dtype, pd.CategoricalDtype):
        series = series.astype(series.cat.categories.dtype)
    if isinstance(series.dtype, np.dtype) and series.dtype.kind in "biufmM":
        return np.array(series.to_numpy())
    if _is_numeric(series) and not bool(series.isna().any()):
        return _to_numpy(series)
    if isinstance(series.dtype, pd.DatetimeTZDtype):
        return np.array(series.dt.tz_convert("UTC").dt.tz_localize(None).to_numpy())
    return np.array(["" if pd.isna(v) else str(v) for v in series], dtype=object)
