"""Every bad cohort gives one clear error that names the place, what was expected and what was found."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributions import Bernoulli, Normal

from pavi_scale.cohort import open_cohort
from pavi_scale.errors import CohortError
from pavi_scale.model import Model, covariate, latent, observed
from pavi_scale.plates import Plate

COUNTIES, HOUSES, FEATURES = 4, 12, 3


def radon(missing=None, sizes=None):
    return Model(
        Plate("county"),
        Plate("house", within="county"),
        sizes=sizes,
        mu=latent(lambda: Normal(0.0, 1.0), dims="feature"),
        alpha=latent(lambda mu: Normal(mu, 1.0), plates="county", dims="feature"),
        uranium=covariate(plates="county"),
        floor=covariate(plates="house"),
        y=observed(lambda alpha, floor, uranium: Normal(alpha + floor + uranium, 1.0), plates="house", dims="feature", missing=missing),
    )


def good():
    rng = np.random.default_rng(0)
    index = xr.Variable("house", np.arange(HOUSES) % COUNTIES, {"instance_dimension": "county"})
    return xr.Dataset(
        {
            "y": (("house", "feature"), rng.normal(size=(HOUSES, FEATURES))),
            "floor": ("house", 1.0 + rng.uniform(size=HOUSES)),
            "uranium": ("county", rng.normal(size=COUNTIES)),
            "of_county": index,
        },
        coords={"county": ["a", "b", "c", "d"], "house": np.arange(100, 100 + HOUSES)},
    )


def put(name, where, value):
    """The good cohort with one value replaced."""
    data = good()
    data[name].values[where] = value
    return data


def index_as(values, dims="house", **attrs):
    data = good().drop_vars("of_county")
    data["of_county"] = xr.Variable(dims, np.asarray(values), attrs or {"instance_dimension": "county"})
    return data


def second_index():
    data = good()
    data["again"] = data["of_county"].copy()
    return data


def misaligned():
    """Labels of one level attached twice, shifted by one: xarray's alignment makes holes."""
    data = good()
    shifted = data["floor"].assign_coords(house=data["house"] + 1)
    return data.drop_vars("floor").merge({"floor": shifted}, join="outer")


# (id, cohort, model, what, where, expected, got) -- fragments that the message has to hold.
SCHEMA = [
    ("missing variable", good().drop_vars("floor"), radon(), "lacks a variable", "'floor'", "(house)", "uranium"),
    ("missing, near miss", good().rename(floor="flor"), radon(), "lacks a variable", "'floor'", "(house)", "did you mean 'flor'"),
    ("extra dim", good().assign(floor=good()["y"]), radon(), "wrong dimensions", "'floor'", "(house)", "(house, feature)"),
    ("lacking dim", good().assign(y=good()["floor"]), radon(), "wrong dimensions", "'y'", "(house, feature)", "(house)"),
    ("other plate", good().assign(uranium=good()["floor"]), radon(), "wrong dimensions", "'uranium'", "(county)", "(house)"),
    ("text", good().assign(floor=("house", np.array(["x"] * HOUSES))), radon(), "wrong dtype", "'floor'", "float, integer or boolean", "<U1"),
    ("objects", good().assign(floor=("house", np.array([1, "x"] * 6, object))), radon(), "wrong dtype", "'floor'", "float, integer or boolean", "object"),
    ("times", good().assign(floor=("house", np.zeros(HOUSES, "M8[ns]"))), radon(), "wrong dtype", "'floor'", "float", "datetime64"),
    ("complex", good().assign(floor=("house", np.zeros(HOUSES, complex))), radon(), "wrong dtype", "'floor'", "float", "complex"),
    ("long doubles", good().assign(floor=good()["floor"].astype("longdouble")), radon(), "wrong dtype", "'floor'", "at most 64 bits", "float128"),
    ("no index", good().drop_vars("of_county"), radon(), "index variable is missing", "'house' within 'county'", "instance_dimension", "uranium"),
    (
        "unknown plate",
        index_as(np.zeros(12, int), instance_dimension="contry"),
        radon(),
        "names an unknown plate",
        "'house' within 'county'",
        "county",
        "contry",
    ),
    ("two indices", second_index(), radon(), "several index variables", "'house' within 'county'", "one", "['again', 'of_county']"),
    ("2-d index", index_as(np.zeros((12, 3), int), ("house", "feature")), radon(), "wrong dimensions", "'of_county'", "(house)", "(house, feature)"),
    ("index elsewhere", index_as(np.zeros(4, int), "county"), radon(), "wrong dimensions", "'of_county'", "(house)", "(county)"),
    ("boolean index", index_as(np.zeros(12, bool)), radon(), "wrong dtype", "'of_county'", "integer", "bool"),
    ("text index", index_as(["a"] * 12), radon(), "wrong dtype", "'of_county'", "integer", "<U1"),
    ("fractional index", index_as(np.r_[0.0, 0.5, np.zeros(10)]), radon(), "not integral", "'of_county' of plate 'house', position 1", "0-based", "0.5"),
    ("index with NaN", index_as(np.r_[np.zeros(7), np.nan, np.zeros(4)]), radon(), "not integral", "position 7", "0-based", "nan"),
    ("index too large", put("of_county", 5, 4), radon(), "index out of range", "position 5", "0 to 3", "4 (1 such)"),
    ("one-based index", index_as(np.arange(12) % 4 + 1), radon(), "index out of range", "position 3", "0 to 3", "4 (3 such)"),
    ("negative index", put("of_county", 2, -1), radon(), "index out of range", "position 2", "0 to 3", "-1"),
    ("fewer parents than indices", good().isel(county=slice(3)), radon(), "index out of range", "position 3", "0 to 2", "3 (3 such)"),
    ("empty plate", good().isel(house=slice(0)), radon(), "plate is empty", "'house'", "1 or more", "cardinality 0"),
    ("empty parent", good().isel(county=slice(0)), radon(), "plate is empty", "'county'", "1 or more", "cardinality 0"),
    ("empty event", good().isel(feature=slice(0)), radon(), "event dimension is empty", "'feature'", "1 or more", "size 0"),
    ("event size", good(), radon(sizes={"feature": 7}), "size of an event dimension disagrees", "'feature'", "7", "3 in the cohort"),
    ("cardinality", good(), radon(sizes={"county": 9}), "cardinality disagrees", "'county'", "9", "4 in the cohort"),
    ("same label", good().assign_coords(county=["a", "b", "b", "d"]), radon(), "same label", "'county', position 2", "unique", "'b'"),
    ("not a cohort", {"y": np.zeros(3)}, radon(), "xarray.Dataset", "cohort", "xarray.Dataset", "dict"),
]


@pytest.mark.parametrize(("source", "model", "fragments"), [pytest.param(s, m, f, id=i) for i, s, m, *f in SCHEMA])
def test_schema(source, model, fragments):
    with pytest.raises(CohortError) as caught:
        open_cohort(source, model)
    assert caught.value.exit_code == 2
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_the_good_cohort_is_accepted():
    cohort = open_cohort(good(), radon())
    cohort.check_values()
    assert cohort.layout.cardinality == {"county": COUNTIES, "house": HOUSES}
    assert cohort.event_sizes == {"feature": FEATURES}


def test_size_of_an_event_dimension_that_nothing_tells():
    model = Model(Plate("g"), w=latent(lambda: Normal(0.0, 1.0), dims="network"), x=observed(lambda w: Normal(w.sum(), 1.0), plates="g"))
    with pytest.raises(CohortError, match="size of an event dimension is unknown; where: event dimension 'network'; expected: .*sizes.*; got: .*'g'"):
        open_cohort(xr.Dataset({"x": ("g", np.zeros(2))}), model)


def test_size_of_a_plate_that_nothing_tells():
    model = Model(Plate("g"), Plate("h"), t=latent(lambda: Normal(0.0, 1.0), plates="h"), x=observed(lambda: Normal(0.0, 1.0), plates="g"))
    with pytest.raises(CohortError, match="size of a plate is unknown; where: plate 'h'; expected: a dimension 'h'.*; got: .*'g'"):
        open_cohort(xr.Dataset({"x": ("g", np.zeros(2))}), model)


VALUES = [
    (
        "NaN without a mask",
        put("y", (5, 2), np.nan),
        None,
        "missing (NaN)",
        "'y' at (house=105 (position 5), county=b (position 1), feature=2)",
        "finite",
        "1 NaN",
        "missing='mask'",
    ),
    ("NaN in a covariate", put("floor", 3, np.nan), "mask", "missing (NaN)", "'floor' at (house=103", "finite", "1 NaN", "covariate must be known"),
    ("Inf", put("y", (0, 1), np.inf), None, "infinite", "'y' at (house=100 (position 0), county=a (position 0), feature=1)", "finite", "1 infinite"),
    ("Inf under a mask", put("y", (11, 0), -np.inf), "mask", "infinite", "'y' at (house=111", "finite", "1 infinite"),
    ("Inf in a covariate", put("uranium", 1, np.inf), None, "infinite", "'uranium' at (county=b (position 1))", "finite", "1 infinite"),
    ("many", put("y", slice(2, 9), np.nan), None, "missing (NaN)", "(house=102 (position 2), county=c (position 2), feature=0), ", "and 18 more", "21 NaN"),
    ("misaligned labels", misaligned(), "mask", "", "house", "integer", "nan"),
]


@pytest.mark.parametrize("stored", [False, True], ids=["memory", "zarr"])
@pytest.mark.parametrize(("data", "missing", "fragments"), [pytest.param(d, m, f, id=i) for i, d, m, *f in VALUES])
def test_values(data, missing, fragments, stored, tmp_path):
    source = data
    if stored:
        source = tmp_path / "c.zarr"
        data.to_zarr(source, zarr_format=3, encoding={"y": {"chunks": (HOUSES + 1, FEATURES)}})
    with pytest.raises(CohortError) as caught:
        open_cohort(source, radon(missing)).check_values()
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_masked_values_are_accepted():
    open_cohort(put("y", (5, 2), np.nan), radon("mask")).check_values()


def test_small_blocks_name_the_position_in_the_whole_cohort():
    with pytest.raises(CohortError, match=r"house=107 \(position 7\), county=d \(position 3\), feature=1"):
        open_cohort(put("y", (7, 1), np.nan), radon()).check_values(budget_bytes=8)


@pytest.fixture
def store(tmp_path):
    path = tmp_path / "cohort.zarr"
    good().to_zarr(path, zarr_format=3, encoding={"y": {"chunks": (5, 2)}, "of_county": {"chunks": (6,)}})
    return path


def damaged(path: Path, how: str) -> None:
    chunk = path / "y" / "c" / "1" / "0"
    if how == "missing":
        chunk.unlink()
    if how == "truncated":
        chunk.write_bytes(chunk.read_bytes()[:-7])
    if how == "emptied":
        chunk.write_bytes(b"")


def test_missing_chunk(store):
    damaged(store, "missing")
    with pytest.raises(CohortError) as caught:
        open_cohort(store, radon("mask")).check_values()
    for fragment in ("chunk is missing", "'y', house[5:10], feature[0:2]", "every chunk stored", "got: 1 missing", "write_empty_chunks=True"):
        assert fragment in str(caught.value)


def test_missing_chunk_that_the_writer_vouches_for(store):
    damaged(store, "missing")
    zarr.open_array(store / "y", mode="r+").attrs["_empty_chunks_ok"] = True
    zarr.consolidate_metadata(store)
    open_cohort(store, radon("mask")).check_values()


def test_missing_chunk_of_positions_is_found_on_opening(store):
    (store / "of_county" / "c" / "1").unlink()
    with pytest.raises(CohortError, match=r"chunk is missing.*'of_county' of plate 'house', house\[6:12\]"):
        open_cohort(store, radon())


@pytest.mark.parametrize("how", ["truncated", "emptied"])
def test_torn_chunk(store, how):
    damaged(store, how)
    with pytest.raises(CohortError, match="data cannot be read; where: .*'y'"):
        open_cohort(store, radon()).check_values()


def test_zeros_that_xarray_leaves_out_are_refused_unless_written(tmp_path):
    model = Model(Plate("u"), p=latent(lambda: Normal(0.0, 1.0)), y=observed(lambda p: Bernoulli(logits=p), plates="u"))
    data = xr.Dataset({"y": ("u", np.r_[np.zeros(4, int), np.ones(4, int)])})
    data.to_zarr(tmp_path / "a.zarr", zarr_format=3, encoding={"y": {"chunks": (4,)}})
    with pytest.raises(CohortError, match="chunk is missing"):
        open_cohort(tmp_path / "a.zarr", model).check_values()
    data.to_zarr(tmp_path / "b.zarr", zarr_format=3, encoding={"y": {"chunks": (4,)}}, write_empty_chunks=True)
    open_cohort(tmp_path / "b.zarr", model).check_values()


def test_a_single_parent_may_leave_out_its_zeros(tmp_path):
    data = good().isel(county=[0]).assign(of_county=xr.Variable("house", np.zeros(HOUSES, int), {"instance_dimension": "county"}))
    data.to_zarr(tmp_path / "c.zarr", zarr_format=3)
    open_cohort(tmp_path / "c.zarr", radon()).check_values()


def test_coordinate_of_another_length(store):
    # As left behind by a writer that replaced the labels of one level alone.
    shutil.rmtree(store / "county")
    short = zarr.create_array(store / "county", shape=(3,), dtype="i8", dimension_names=["county"])
    short[:] = np.arange(3)
    zarr.consolidate_metadata(store)
    with pytest.raises(CohortError, match=r"lengths disagree.*dimension 'county'.*expected: 3 as in 'county'; got: 4 in 'uranium'"):
        open_cohort(store, radon())


def test_array_without_dimension_names(store):
    array = zarr.create_array(store / "loose", shape=(3,), dtype="i8")
    array[:] = 1
    zarr.consolidate_metadata(store)
    with pytest.raises(CohortError, match="array without dimension names; where: variable 'loose'"):
        open_cohort(store, radon())


@pytest.mark.parametrize("kind", ["absent", "plain folder", "file", "torn metadata", "unknown scheme", "absent in memory", "one array"])
def test_unreadable_store(kind, tmp_path, store):
    source = tmp_path / "x.zarr"
    if kind == "plain folder":
        source.mkdir()
        (source / "notes.txt").write_text("no store")
    if kind == "file":
        source.write_text("no store")
    if kind == "torn metadata":
        source = store
        (store / "zarr.json").write_text('{"zarr_format": 3, "node_ty')
    if kind == "unknown scheme":
        source = "nosuchscheme://bucket/x.zarr"
    if kind == "absent in memory":
        source = "memory://nothing/here.zarr"
    if kind == "one array":
        source = store / "y"
    with pytest.raises(CohortError, match="cohort store cannot be read; where: cohort .*; expected: a Zarr group") as caught:
        open_cohort(source, radon())
    assert str(source) in str(caught.value)


def test_simulation_that_was_cut_short(store):
    zarr.open_group(store, mode="r+").attrs["pavi_simulation"] = {"complete": False}
    with pytest.raises(CohortError, match="simulated cohort is incomplete; where: cohort .*; remedy: run ps.simulate again"):
        open_cohort(store, radon())


def test_options_for_a_local_path(store):
    with pytest.raises(CohortError, match="storage options are for URLs"):
        open_cohort(store, radon(), storage_options={"anon": True})


def test_read_outside(store):
    cohort = open_cohort(store, radon())
    with pytest.raises(CohortError, match="no such variable; where: variable 'z'"):
        cohort.read("z")
    for positions in ([HOUSES], [-1]):
        with pytest.raises(CohortError, match="selection out of range; where: plate 'house'; expected: positions 0 to 11"):
            cohort.read("y", {"house": np.array(positions)})


@given(st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_metadata_gives_typed_errors_or_none(store, data):
    """Any one byte of any file changed, or the file cut: the cohort opens or says what is wrong."""
    files = sorted(f for f in store.rglob("*") if f.is_file())
    file = data.draw(st.sampled_from(files))
    kept = file.read_bytes()
    at = data.draw(st.integers(0, len(kept) - 1))
    change = data.draw(st.one_of(st.none(), st.integers(0, 255)))
    file.write_bytes(kept[:at] if change is None else kept[:at] + bytes([change]) + kept[at + 1 :])
    try:
        open_cohort(store, radon("mask")).check_values()
    except CohortError:
        pass
    finally:
        file.write_bytes(kept)
