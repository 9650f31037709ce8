"""Layouts of dense, ragged, crossed and three-level cohorts; reads against plain indexing; the kinds of store."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Independent, Normal

from pavi_scale.cohort import index_name, open_cohort
from pavi_scale.cohort.readers import as_index
from pavi_scale.cohort.scan import blocks
from pavi_scale.model import Model, covariate, latent, observed
from pavi_scale.plates import Plate

SIZES = {"subject": 9, "session": 2, "vertex": 150, "feature": 3}


def dense_model():
    return Model(
        Plate("subject"),
        Plate("session"),
        Plate("vertex"),
        sizes={"network": 7},
        mu=latent(lambda: Normal(0.0, 1.0), dims=("network", "feature")),
        age=covariate(plates=("subject", "session")),
        area=covariate(plates="vertex"),
        x=observed(lambda mu, age, area: Independent(Normal(mu[0] + age + area, 1.0), 1), plates=("subject", "session", "vertex"), dims="feature"),
    )


def dense_data(dtype="f4"):
    rng = np.random.default_rng(1)
    shape = tuple(SIZES.values())
    return xr.Dataset(
        {
            # The axes lie in another order than the model's, and further variables lie around.
            "x": (("vertex", "subject", "feature", "session"), rng.normal(size=shape).transpose(2, 0, 3, 1).astype(dtype)),
            "age": (("session", "subject"), rng.integers(20, 80, (SIZES["session"], SIZES["subject"])).astype("i2")),
            "area": ("vertex", rng.uniform(size=SIZES["vertex"]) > 0.5),
            "mu": ("feature", np.zeros(SIZES["feature"])),
            "unrelated": (("vertex", "other"), np.zeros((SIZES["vertex"], 2))),
        },
        coords={"subject": [f"s{i}" for i in range(SIZES["subject"])], "hemisphere": ("vertex", np.arange(SIZES["vertex"]) % 2), "other": [0, 1]},
    )


def ragged(*levels, cardinality, coords=None):
    """Model and cohort of nested plates `levels`, outermost first, with random index variables."""
    rng = np.random.default_rng(2)
    plates = [Plate(levels[0])] + [Plate(child, within=parent) for parent, child in zip(levels, levels[1:], strict=False)]
    model = Model(*plates, m=latent(lambda: Normal(0.0, 1.0), plates=levels[0]), y=observed(lambda m: Normal(m, 1.0), plates=levels[-1]))
    data = {"y": (levels[-1], rng.normal(size=cardinality[levels[-1]]))}
    for parent, child in zip(levels, levels[1:], strict=False):
        data[f"any_{child}"] = xr.Variable(child, rng.integers(0, cardinality[parent], cardinality[child]), {"instance_dimension": parent})
    return model, xr.Dataset(data, coords)


def test_dense_layout():
    cohort = open_cohort(dense_data(), dense_model())
    assert cohort.layout.cardinality == {k: SIZES[k] for k in ("subject", "session", "vertex")}
    assert cohort.event_sizes == {"network": 7, "feature": 3}
    assert cohort.dataset["x"].dims == ("subject", "session", "vertex", "feature")
    assert set(cohort.dataset.variables) == {"x", "age", "area", "subject", "hemisphere"}
    assert cohort.coordinate("subject").tolist() == [f"s{i}" for i in range(9)]
    assert cohort.coordinate("vertex") is None
    assert cohort.chunk("vertex") is None
    assert cohort.source is None
    assert cohort.nbytes == 9 * 2 * 150 * 3 * 4 + 18 * 2 + 150


def test_ragged_parent_with_a_dimension_may_have_childless_units():
    model, data = ragged("county", "house", cardinality={"county": 5, "house": 12}, coords={"county": list("abcdefgh")})
    layout = open_cohort(data, model).layout
    assert layout.cardinality == {"county": 8, "house": 12}
    np.testing.assert_array_equal(layout.index["house", "county"], data["any_house"].values)
    assert layout.index["house", "county"].dtype == np.int64


def test_parent_without_a_dimension_has_the_largest_index_plus_one():
    model, data = ragged("county", "house", cardinality={"county": 5, "house": 60})
    assert open_cohort(data, model).layout.cardinality["county"] == int(data["any_house"].max()) + 1


def test_three_levels_compose():
    cardinality = {"district": 3, "school": 6, "student": 50}
    model, data = ragged("district", "school", "student", cardinality=cardinality)
    layout = open_cohort(data, model).layout
    expected = [int(data["any_school"][int(s)]) for s in data["any_student"]]
    np.testing.assert_array_equal(layout.path("student", "district"), expected)


def test_crossed_takes_the_indices_that_the_model_asks_for():
    rng = np.random.default_rng(3)
    cards = {"student": 7, "lecturer": 4, "room": 3}
    data = xr.Dataset({"y": ("rating", rng.normal(size=40))})
    for parent, n in cards.items():
        data[index_name("rating", parent)] = xr.Variable("rating", rng.integers(0, n, 40).astype("u1"), {"instance_dimension": parent})
    model = Model(
        Plate("student"),
        Plate("lecturer"),
        Plate("rating", within=("student", "lecturer")),
        a=latent(lambda: Normal(0.0, 1.0), plates="student"),
        b=latent(lambda: Normal(0.0, 1.0), plates="lecturer"),
        y=observed(lambda a, b: Normal(a + b, 1.0), plates="rating"),
    )
    cohort = open_cohort(data, model)
    assert set(cohort.layout.index) == {("rating", "student"), ("rating", "lecturer")}
    assert "rating_room" not in cohort.dataset
    np.testing.assert_array_equal(cohort.read("rating_student", {"rating": np.array([0, 3, 39])}), data["rating_student"].values[[0, 3, 39]])


def test_integral_floats_are_positions():
    model, data = ragged("county", "house", cardinality={"county": 5, "house": 12})
    exact = open_cohort(data, model).layout.index["house", "county"]
    data["any_house"] = data["any_house"].astype("f8", keep_attrs=True)
    np.testing.assert_array_equal(open_cohort(data, model).layout.index["house", "county"], exact)


KINDS = ["memory", "dask", "lazy", "chunked", "sharded", "packed", "url"]


@pytest.fixture(scope="module")
def cohorts(tmp_path_factory):
    """The same cohort from every kind of source."""
    folder, data, model = tmp_path_factory.mktemp("kinds"), dense_data(), dense_model()
    layouts = {
        "chunked": {"chunks": (40, 4, 3, 1)},
        "sharded": {"chunks": (16, 3, 3, 1), "shards": (48, 3, 3, 2)},
        # Decoded by xarray on reading; exact for these powers of two.
        "packed": {"chunks": (64, 9, 3, 2), "scale_factor": np.float32(0.5), "add_offset": np.float32(0.0), "dtype": "f4"},
    }
    for kind, encoding in layouts.items():
        data.to_zarr(folder / kind, zarr_format=3, encoding={"x": encoding}, write_empty_chunks=True)
    data.to_zarr("memory://kinds/cohort.zarr", zarr_format=3, consolidated=False)
    sources = {kind: folder / kind for kind in layouts} | {"url": "memory://kinds/cohort.zarr", "memory": data}
    sources |= {"dask": data.chunk({"vertex": 32}), "lazy": xr.open_zarr(folder / "chunked", chunks=None)}
    return {kind: open_cohort(source, model) for kind, source in sources.items()}


def positions(size):
    """Sorted positions: scattered ones, a range, blocks, all, none."""
    scattered = st.sets(st.integers(0, size - 1)).map(lambda s: np.array(sorted(s), dtype=np.int64))
    ranges = st.tuples(st.integers(0, size), st.integers(0, size)).map(lambda p: np.arange(min(p), max(p)))
    runs = st.sets(st.integers(0, max(0, size // 70 - 1)), min_size=1).map(
        lambda s: np.concatenate([np.arange(70 * i, min(70 * i + 65, size)) for i in sorted(s)])
    )
    return st.one_of(scattered, ranges, runs, st.none())


@pytest.mark.parametrize("kind", KINDS)
@given(st.fixed_dictionaries({p: positions(SIZES[p]) for p in ("subject", "session", "vertex")}))
def test_read_equals_plain_indexing(cohorts, kind, units):
    cohort = cohorts[kind]
    units = {plate: p for plate, p in units.items() if p is not None}
    for name, axes in {"x": ("subject", "session", "vertex", "feature"), "age": ("subject", "session"), "area": ("vertex",)}.items():
        truth = dense_data()[name].transpose(*axes).values
        for axis, plate in enumerate(axes):
            truth = truth[(slice(None),) * axis + (units.get(plate, slice(None)),)]
        got = cohort.read(name, units)
        assert got.dtype == truth.dtype
        assert got.flags.writeable
        np.testing.assert_array_equal(got, truth)


@pytest.mark.parametrize("kind", KINDS)
def test_dataset_is_lazy_view_of_the_same_numbers(cohorts, kind):
    cohort = cohorts[kind]
    np.testing.assert_array_equal(cohort.dataset["x"].isel(vertex=slice(3, 9)).values, cohort.read("x", {"vertex": np.arange(3, 9)}))
    cohort.check_values(budget_bytes=4096)


def test_looking_at_the_dataset_keeps_it_lazy(cohorts):
    cohort = cohorts["chunked"]
    assert float(cohort.dataset["x"].sum()) == pytest.approx(float(cohorts["memory"].read("x").sum()), abs=1e-2)
    assert not cohort.dataset["x"].variable._in_memory


def test_text_labels_from_a_store_are_plain_objects(tmp_path):
    model, data = ragged("county", "house", cardinality={"county": 3, "house": 12}, coords={"county": np.array(["ä", "bb", "c"], dtype=object)})
    data.to_zarr(tmp_path / "c.zarr", zarr_format=3, write_empty_chunks=True)
    cohort = open_cohort(tmp_path / "c.zarr", model)
    assert cohort.coordinate("county").dtype == object
    assert cohort.coordinate("county").tolist() == ["ä", "bb", "c"]
    assert "county=ä (position 0)" in cohort.describe("house", int(np.flatnonzero(data["any_house"].values == 0)[0]))


def test_chunk_is_the_shard(cohorts):
    assert {kind: (cohorts[kind].chunk("vertex"), cohorts[kind].chunk("subject")) for kind in KINDS} == {
        "memory": (None, None),
        "dask": (32, 9),
        "lazy": (40, 4),
        "chunked": (40, 4),
        "sharded": (48, 3),
        "packed": (64, 9),
        "url": (150, 9),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_spec_opens_the_same_cohort_elsewhere(cohorts, kind):
    cohort = cohorts[kind]
    spec = pickle.loads(pickle.dumps(cohort.spec()))
    again = spec.open(dense_model())
    np.testing.assert_array_equal(again.read("x"), cohort.read("x"))
    assert again.source == cohort.source
    assert len(again.fingerprint) == 32
    if kind in {"chunked", "sharded", "packed"}:
        assert len(pickle.dumps(spec)) < 2000
        assert again.fingerprint == cohort.fingerprint


def test_spec_keeps_cardinalities_that_only_dropped_variables_tell():
    model, data = ragged("county", "house", cardinality={"county": 5, "house": 12})
    data["note"] = ("county", np.zeros(9))
    cohort = open_cohort(data, model)
    assert "note" not in cohort.dataset
    assert cohort.spec().open(model).layout.cardinality == cohort.layout.cardinality == {"county": 9, "house": 12}


def test_threads_read_the_same(cohorts):
    cohort = cohorts["chunked"]
    wanted = [np.arange(i, 150, 7) for i in range(7)] * 6
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda p: cohort.read("x", {"vertex": p}), wanted))
    whole = cohorts["memory"].read("x")
    assert all((g == whole[:, :, p]).all() for g, p in zip(got, wanted, strict=True))


def test_fingerprint_tells_data_schema_and_index_apart():
    model, data = ragged("county", "house", cardinality={"county": 5, "house": 12}, coords={"county": list("abcde")})
    value, index, label, attribute = (data.copy(deep=True) for _ in range(4))
    value["y"].values[3] += 1e-9
    index["any_house"].values[0] = (index["any_house"].values[0] + 1) % 5
    label = label.assign_coords(county=list("abcdf"))
    attribute["y"].attrs["units"] = "pCi/L"
    prints = [open_cohort(d, model).fingerprint for d in (data, value, index, label, attribute)]
    assert len(set(prints)) == 5
    assert prints[0] == open_cohort(data.assign(noise=("house", np.zeros(12))), model).fingerprint


def test_big_endian_data_arrives_native():
    cohort = open_cohort(dense_data(">f4"), dense_model())
    assert cohort.read("x").dtype.isnative
    np.testing.assert_array_equal(cohort.read("x"), open_cohort(dense_data(), dense_model()).read("x"))


@pytest.mark.parametrize("lazy", [False, True])
def test_reversed_data_arrive_as_torch_can_share_them(lazy):
    model, data = ragged("county", "house", cardinality={"county": 5, "house": 12})
    data = data.isel(house=slice(None, None, -1))
    cohort = open_cohort(data.chunk() if lazy else data, model)
    for name, values in data.variables.items():
        got = cohort.read(str(name))
        assert all(step > 0 for step in got.strides)
        np.testing.assert_array_equal(got, values)
    assert all(step > 0 for index in cohort.layout.index.values() for step in index.strides)


def test_read_only_memory_is_copied_before_it_is_handed_out():
    data = dense_data()
    data["area"].values.flags.writeable = False
    assert open_cohort(data, dense_model()).read("area").flags.writeable


def test_truth_group_is_ignored(tmp_path):
    data = dense_data()
    data.to_zarr(tmp_path / "c.zarr", zarr_format=3)
    xr.Dataset({"mu": ("feature", np.ones(9))}).to_zarr(tmp_path / "c.zarr", group="truth", zarr_format=3)
    open_cohort(tmp_path / "c.zarr", dense_model()).check_values()


def test_relative_path_survives_a_change_of_folder(tmp_path, monkeypatch):
    dense_data().to_zarr(tmp_path / "c.zarr", zarr_format=3)
    monkeypatch.chdir(tmp_path)
    spec = open_cohort("c.zarr", dense_model()).spec()
    monkeypatch.chdir("/")
    assert spec.open(dense_model()).layout.cardinality["vertex"] == 150


def test_repr_shows_sizes_and_chunks(cohorts):
    text = repr(cohorts["chunked"])
    assert "subject=9" in text
    assert "x[subject, session, vertex, feature] float32 in chunks of 4x1x40x3" in text


def test_zarr_format_2_opens_too(tmp_path):
    dense_data().to_zarr(tmp_path / "c.zarr", zarr_format=2, write_empty_chunks=True)
    cohort = open_cohort(tmp_path / "c.zarr", dense_model())
    cohort.check_values()
    np.testing.assert_array_equal(cohort.read("x"), open_cohort(dense_data(), dense_model()).read("x"))


def test_stored_array_without_coordinates_of_one_chunk_each(tmp_path):
    group = zarr.create_group(tmp_path / "c.zarr")
    array = group.create_array("y", shape=(4,), chunks=(2,), dtype="f8", dimension_names=["house"])
    array[:] = [1.0, 2.0, 3.0, 4.0]
    model = Model(Plate("house"), m=latent(lambda: Normal(0.0, 1.0)), y=observed(lambda m: Normal(m, 1.0), plates="house"))
    cohort = open_cohort(tmp_path / "c.zarr", model)
    cohort.check_values()
    assert cohort.read("y", {"house": np.array([0, 3])}).tolist() == [1.0, 4.0]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.data())
def test_blocks_cover_the_array_once_and_split_no_chunk(shape, data):
    chunks = tuple(data.draw(st.integers(1, n)) for n in shape)
    budget = data.draw(st.integers(1, 400))
    seen = np.zeros(shape, int)
    for block in blocks(tuple(shape), chunks, 8, budget):
        seen[block] += 1
        size = [b.stop - b.start for b in block]
        assert np.prod(size) * 8 <= max(budget, 8 * np.prod(chunks))
        assert all(b.start % c == 0 for b, c in zip(block, chunks, strict=True))
    assert (seen == 1).all()


@given(st.lists(st.integers(0, 20), unique=True).map(sorted))
def test_as_index_selects_the_same(positions):
    values = np.arange(21)
    np.testing.assert_array_equal(values[as_index(np.array(positions, dtype=int))], values[np.array(positions, dtype=int)])
