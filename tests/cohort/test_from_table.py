"""Tables to cohorts: against a brute-force groupby, bad tables, and a real panel with missing values."""

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.datasets import fertility
from torch.distributions import Normal

from pavi_scale.cohort import from_table, index_name, open_cohort
from pavi_scale.errors import CohortError
from pavi_scale.model import Model, covariate, latent, observed
from pavi_scale.plates import Plate


def school_frame(rows=60, seed=0):
    rng = np.random.default_rng(seed)
    school = rng.integers(0, 7, rows)
    return pd.DataFrame(
        {
            "score": rng.normal(size=rows),
            "girl": rng.integers(0, 2, rows).astype(bool),
            "name": [f"n{i}" for i in range(rows)],
            "school": np.array(["Zoo", "Elm", "Oak", "Ash", "Fir", "Yew", "Bay"])[school],
            "size": np.array([3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0])[school],
            "kind": np.array(["a", "b", "a", "b", "b", "a", "b"])[school],
            "district": np.array([20, 10, 20, 30, 10, 10, 30])[school],
        }
    )


LABELS = st.one_of(st.lists(st.integers(-5, 5), min_size=1, max_size=30), st.lists(st.text("abcä ", max_size=3), min_size=1, max_size=30))


@given(LABELS, st.integers(0, 99))
def test_against_groupby(labels, seed):
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame({"group": labels, "x": rng.normal(size=len(labels)), "n": rng.integers(0, 9, len(labels))})
    level = {label: float(rng.normal()) for label in labels}
    frame["u"] = [level[label] for label in labels]
    frame.index = frame.index[::-1] * 3
    data = from_table(frame, plate="unit", within={"group": ["u"]})
    assert data["group"].values.tolist() == sorted(set(labels))
    assert data["unit_group"].attrs == {"instance_dimension": "group"}
    assert data["unit_group"].dtype.kind == "i"
    for g, (label, rows) in enumerate(frame.groupby("group", sort=True)):
        assert data["group"].values[g] == label
        assert float(data["u"][g]) == level[label]
        np.testing.assert_array_equal(data["x"].values[data["unit_group"].values == g], rows["x"])
        np.testing.assert_array_equal(data["n"].values[data["unit_group"].values == g], rows["n"])
    assert data["n"].dtype.kind == "i"


def test_nested_levels_are_linked():
    frame = school_frame()
    data = from_table(frame, plate="student", within={"school": ["size", "kind"], "district": []})
    for child, parent in (("student", "school"), ("student", "district"), ("school", "district")):
        assert data[index_name(child, parent)].attrs["instance_dimension"] == parent
    assert index_name("district", "school") not in data
    for s, label in enumerate(data["school"].values):
        rows = frame[frame["school"] == label]
        assert data["district"].values[data["school_district"].values[s]] == rows["district"].iloc[0]
        assert float(data["size"][s]) == rows["size"].iloc[0]
        assert data["kind"].values[s] == rows["kind"].iloc[0]
    assert data["kind"].dims == ("school",)
    assert "kind" in data.coords
    assert "name" in data.coords
    assert data["girl"].dtype == bool


def test_crossed_levels_are_not_linked():
    frame = pd.DataFrame({"y": np.arange(6.0), "a": [0, 0, 1, 1, 2, 2], "b": [0, 1, 0, 1, 0, 1]})
    for within in (("a", "b"), ["a", "b"], {"a": None, "b": ()}):
        data = from_table(frame, plate="rating", within=within)
        assert set(data.data_vars) == {"rating_a", "rating_b", "y"}


@pytest.mark.parametrize("nested", [True, False])
def test_model_takes_the_levels_that_it_names(nested):
    data = from_table(school_frame(), plate="student", within={"school": "size", "district": None})
    model = Model(
        Plate("district"),
        Plate("school", within="district" if nested else None),
        Plate("student", within="school" if nested else ("school", "district")),
        d=latent(lambda: Normal(0.0, 1.0), plates="district"),
        size=covariate(plates="school"),
        girl=covariate(plates="student"),
        score=observed(lambda d, size, girl: Normal(d + size * girl, 1.0), plates="student"),
    )
    layout = open_cohort(data, model).layout
    frame = school_frame()
    districts = sorted(frame["district"].unique())
    np.testing.assert_array_equal(layout.path("student", "district"), [districts.index(d) for d in frame["district"]])


def test_single_level_by_name_and_none():
    frame = pd.DataFrame({"y": [1.0, 2.0], "g": ["b", "a"]})
    assert from_table(frame, plate="u", within="g")["u_g"].values.tolist() == [1, 0]
    plain = from_table(frame[["y"]], plate="u")
    assert plain["y"].dims == ("u",)
    assert not plain.coords


def test_labels_of_the_units():
    frame = pd.DataFrame({"y": [1.0, 2.0], "house": ["h7", "h3"]})
    assert from_table(frame, plate="house")["house"].values.tolist() == ["h7", "h3"]
    assert from_table(frame.set_index("house"), plate="house")["house"].values.tolist() == ["h7", "h3"]


def test_columns_stacked_into_an_event_dimension():
    frame = pd.DataFrame({"a": [1, 2], "b": [3.0, np.nan], "z": [5, 6]})
    data = from_table(frame, plate="unit", dims={"x": ("feature", ["b", "a"])})
    np.testing.assert_array_equal(data["x"].values, [[3.0, 1.0], [np.nan, 2.0]])
    assert data["x"].dims == ("unit", "feature")
    assert data["feature"].values.tolist() == ["b", "a"]
    assert set(data.data_vars) == {"x", "z"}


def test_pandas_types():
    frame = pd.DataFrame(
        {
            "whole": pd.array([1, 2, 3], dtype="Int64"),
            "holes": pd.array([1, None, 3], dtype="Int64"),
            "flag": pd.array([True, False, True], dtype="boolean"),
            "real": pd.array([0.5, None, 1.5], dtype="Float64"),
            "group": pd.Categorical(["b", "a", "b"], categories=["z", "b", "a"]),
            "when": pd.to_datetime(["2020-01-01", "2020-01-02", "2020-01-03"]),
            "what": ["p", None, "q"],
        }
    )
    data = from_table(frame, plate="u", within="group")
    assert data["whole"].dtype == np.int64
    np.testing.assert_array_equal(data["holes"].values, [1.0, np.nan, 3.0])
    assert data["flag"].dtype == bool
    np.testing.assert_array_equal(data["real"].values, [0.5, np.nan, 1.5])
    assert data["group"].values.tolist() == ["a", "b"]
    assert data["when"].dtype.kind == "M"
    assert data["what"].values.tolist() == ["p", "", "q"]
    assert set(data.coords) == {"group", "when", "what"}


def test_survives_the_store_without_unspecified_dtypes(tmp_path, recwarn):
    data = from_table(school_frame(), plate="student", within={"school": ["size", "kind"], "district": []})
    data.to_zarr(tmp_path / "c.zarr", zarr_format=3, consolidated=False)
    back = xr.open_zarr(tmp_path / "c.zarr", consolidated=False).load()
    assert not recwarn.list
    assert back["school"].values.tolist() == data["school"].values.tolist()
    assert back["name"].values.tolist() == data["name"].values.tolist()


BASE = pd.DataFrame({"y": [1.0, 2.0, 3.0], "u": [5.0, 5.0, 6.0], "g": ["a", "a", "b"]})
BAD = [
    ("varies", BASE.assign(u=[5.0, 5.5, 6.0]), {"within": {"g": ["u"]}}, "varies within its level", "'u', g=a", "5.0 and 5.5"),
    ("first offender by label", BASE.assign(g=["b", "b", "a"], u=[1.0, 2.0, 3.0]), {"within": {"g": ["u"]}}, "varies", "g=b", "1.0 and 2.0"),
    ("half missing", BASE.assign(u=[5.0, np.nan, 6.0]), {"within": {"g": ["u"]}}, "varies within its level", "'u', g=a", "nan"),
    ("text varies", BASE.assign(u=["p", "q", "r"]), {"within": {"g": ["u"]}}, "varies within its level", "'u', g=a", "p and q"),
    ("missing label", BASE.assign(g=["a", None, "b"]), {"within": "g"}, "label is missing", "'g', row 1", "1 missing"),
    ("missing number label", BASE.assign(g=[1.0, 2.0, np.nan]), {"within": "g"}, "label is missing", "'g', row 2", "1 missing"),
    ("mixed labels", BASE.assign(g=pd.Series(["a", 1, "b"], dtype=object)), {"within": "g"}, "labels are of several types", "'g'", "one type"),
    ("unknown level", BASE, {"within": "county"}, "table lacks a column", "'county'", "['g', 'u', 'y']"),
    ("unknown column", BASE, {"within": {"g": ["v"]}}, "table lacks a column", "'v'", "['g', 'u', 'y']"),
    ("used twice", BASE.assign(h=1), {"within": {"g": ["u"], "h": ["u"]}}, "used twice", "'u'", "once"),
    ("within itself", BASE, {"within": "unit"}, "within itself", "'unit'", "name"),
    ("no rows", BASE.iloc[:0], {"within": "g"}, "plate is empty", "'unit'", "no rows"),
    ("doubled", pd.concat([BASE, BASE[["y"]]], axis=1), {}, "twice", "'y'", "rename"),
    ("odd names", BASE.rename(columns={"u": 3}), {}, "must be text", "from_table", "3"),
    ("taken name", BASE.assign(unit_g=1), {"within": "g"}, "name that from_table gives", "'unit_g'", "rename"),
    ("repeated unit", BASE.assign(unit=[1, 2, 1]), {}, "same label", "'unit', row 2", "1"),
    ("text stacked", BASE, {"dims": {"x": ("f", ["y", "g"])}}, "not numeric", "'g'", "numbers"),
    ("no table", {"y": [1.0]}, {}, "pandas table", "from_table", "dict"),
]


@pytest.mark.parametrize(("frame", "options", "fragments"), [pytest.param(f, o, m, id=i) for i, f, o, *m in BAD])
def test_bad_tables(frame, options, fragments):
    with pytest.raises(CohortError) as caught:
        from_table(frame, plate="unit", **options)
    for fragment in fragments:
        assert fragment in str(caught.value)


def fertility_panel():
    """Total fertility rate, countries x years, with the holes that the World Bank's table has."""
    table = fertility.load_pandas().data
    years = [c for c in table.columns if str(c).isdigit() and 1960 <= int(c) <= 2011]
    return table.set_index("Country Name")[years].astype(float).rename(columns=int)


def panel_model(missing):
    return Model(
        Plate("country"),
        Plate("year"),
        level=latent(lambda: Normal(4.0, 2.0), plates="country"),
        trend=latent(lambda: Normal(0.0, 1.0), plates="year"),
        rate=observed(lambda level, trend: Normal(level + trend, 1.0), plates=("country", "year"), missing=missing),
    )


def test_fertility_panel_dense_with_holes_masked():
    panel = fertility_panel()
    data = xr.Dataset({"rate": (("country", "year"), panel.to_numpy(copy=True))}, coords={"country": list(panel.index), "year": list(panel.columns)})
    cohort = open_cohort(data, panel_model("mask"))
    cohort.check_values()
    holes = int(panel.isna().to_numpy().sum())
    assert holes > 100
    assert int(np.isnan(cohort.read("rate")).sum()) == holes
    country = panel.index[np.flatnonzero(panel.isna().any(axis=1))[0]]
    with pytest.raises(CohortError, match=rf"missing \(NaN\).*country={country} .*got: {holes} NaN"):
        open_cohort(data, panel_model(None)).check_values()


def test_fertility_panel_as_a_crossed_table(tmp_path):
    panel = fertility_panel()
    long = panel.rename_axis(index="country", columns="year").stack().rename("rate").dropna().reset_index()
    data = from_table(long, plate="record", within=("country", "year"))
    model = Model(
        Plate("country"),
        Plate("year"),
        Plate("record", within=("country", "year")),
        level=latent(lambda: Normal(4.0, 2.0), plates="country"),
        trend=latent(lambda: Normal(0.0, 1.0), plates="year"),
        rate=observed(lambda level, trend: Normal(level + trend, 1.0), plates="record"),
    )
    data.to_zarr(tmp_path / "panel.zarr", zarr_format=3, encoding={"rate": {"chunks": (1000,)}})
    cohort = open_cohort(tmp_path / "panel.zarr", model)
    cohort.check_values()
    country, year = (cohort.coordinate(p)[cohort.layout.index["record", p]] for p in ("country", "year"))
    rates = [panel.loc[c, y] for c, y in zip(country, year, strict=True)]
    np.testing.assert_array_equal(cohort.read("rate"), rates)
    assert len(rates) == int(panel.notna().to_numpy().sum())
