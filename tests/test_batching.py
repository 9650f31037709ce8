"""Selections, shards and random batches: what they hold and how often."""

from itertools import combinations, islice, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pavi_scale.batching import batches, closure, leaves, shards, split_plate, splittable, upward
from pavi_scale.guide import make_blocks, make_components
from pavi_scale.plates import Layout, Plate
from tests.guide import oracle

PLATES = {
    p.name: p
    for p in (Plate("region"), Plate("county", within="region"), Plate("house", within="county"), Plate("year"), Plate("visit", within=("house", "year")))
}


@st.composite
def layouts(draw):
    n = {
        "region": draw(st.integers(1, 4)),
        "county": draw(st.integers(1, 5)),
        "house": draw(st.integers(1, 6)),
        "year": draw(st.integers(1, 4)),
        "visit": draw(st.integers(1, 8)),
    }
    index = {(c, p): np.array(draw(st.lists(st.integers(0, n[p] - 1), min_size=n[c], max_size=n[c])), dtype=np.int64) for c in PLATES for p in PLATES[c].within}
    return Layout(PLATES, n, index)


def _subset(draw, n):
    return np.array(sorted(draw(st.sets(st.integers(0, n - 1), min_size=1))))


@given(layouts(), st.data())
def test_a_closure_holds_all_and_only_what_lies_below(layout, data):
    region, year = (_subset(data.draw, layout.cardinality[p]) for p in ("region", "year"))
    selection = closure(layout, {"region": region, "year": year}, {"region": 3.0, "year": 0.5})
    county = [c for c in range(layout.cardinality["county"]) if layout.index["county", "region"][c] in region]
    house = [h for h in range(layout.cardinality["house"]) if layout.index["house", "county"][h] in county]
    visit = [v for v in range(layout.cardinality["visit"]) if layout.index["visit", "house"][v] in house and layout.index["visit", "year"][v] in year]
    for plate, expected in {"region": region, "year": year, "county": county, "house": house, "visit": visit}.items():
        assert selection.units[plate].tolist() == list(expected)
    for plate, weight in {"region": 3.0, "year": 0.5, "county": 3.0, "house": 3.0, "visit": 1.5}.items():
        assert (selection.weight[plate] == weight).all()
        assert len(selection.weight[plate]) == len(selection.units[plate])


@settings(max_examples=60)
@given(layouts(), st.data())
def test_every_unit_counts_once_on_average_over_closures(layout, data):
    take = {p: data.draw(st.integers(1, layout.cardinality[p])) for p in ("region", "year")}
    weight = {p: layout.cardinality[p] / b for p, b in take.items()}
    total = {p: np.zeros(n) for p, n in layout.cardinality.items()}
    every = list(product(*(combinations(range(layout.cardinality[p]), b) for p, b in take.items())))
    for region, year in every:
        selection = closure(layout, {"region": np.array(region), "year": np.array(year)}, weight)
        for p, units in selection.units.items():
            total[p][units] += selection.weight[p] / len(every)
    for p in total:
        np.testing.assert_allclose(total[p], 1.0, rtol=1e-12)


@settings(max_examples=60)
@given(layouts(), st.data())
def test_every_unit_counts_once_on_average_over_leaf_selections(layout, data):
    n = layout.cardinality["visit"]
    size = data.draw(st.integers(1, n))
    total = {p: np.zeros(m) for p, m in layout.cardinality.items()}
    every = list(combinations(range(n), size))
    for picked in every:
        selection = upward(layout, "visit", np.array(picked))
        for child in ("visit", "house", "county"):
            for parent in PLATES[child].within:
                # every selected unit finds its ancestors in the selection
                expected = layout.index[child, parent][selection.units[child]]
                if child == "visit":
                    assert set(expected) <= set(selection.units[parent].tolist())
        for p, units in selection.units.items():
            total[p][units] += selection.weight[p] / len(every)
    for p in total:
        np.testing.assert_allclose(total[p], 1.0, rtol=1e-12)


@given(layouts(), st.integers(1, 9))
def test_shards_partition_the_cohort(layout, per_shard):
    found = shards(layout, "region", per_shard)
    assert [s.first for s in found] == [True] + [False] * (len(found) - 1)
    assert all(s.stop - s.start <= per_shard for s in found)
    for p in ("region", "county", "house", "visit"):
        units = np.concatenate([s.selection(layout).units[p] for s in found])
        assert sorted(units.tolist()) == list(range(layout.cardinality[p]))
    for s in found:
        assert s.selection(layout).units["year"].tolist() == list(range(layout.cardinality["year"]))
    (whole,) = shards(layout, None, per_shard)
    assert {p: len(u) for p, u in whole.selection(layout).units.items()} == dict(layout.cardinality)


SPLITS = {
    "ragged": ({"county", "extra"}, "county"),
    "two_latents": ({"group"}, "group"),
    "three_levels": ({"region"}, "region"),
    "dense_events": ({"subject"}, "subject"),
    "crossed": (set(), None),
    "crossed_events": ({"g"}, "g"),
    "swapped_axes": ({"county", "year"}, "year"),
}


@pytest.mark.parametrize("name", SPLITS)
def test_only_plates_over_which_nothing_is_pooled_are_split(name):
    study, model = oracle.computation(name), oracle.case(name).model
    components = make_components(study.graph, make_blocks(study.graph))
    expected, best = SPLITS[name]
    assert set(splittable(model, components)) == expected
    if name != "swapped_axes":  # there both plates have as much below them
        assert split_plate(model, study.layout, components) == best


def test_leaves_are_the_plates_that_no_block_pools_over():
    study, model = oracle.computation("crossed"), oracle.case("crossed").model
    pooled = make_components(study.graph, make_blocks(study.graph))
    free = frozenset({frozenset({"student"}), frozenset({"lecturer"})})
    assert leaves(model, pooled) == ()
    assert leaves(model, make_components(study.graph, make_blocks(study.graph, free))) == ("rating",)


def test_batches_visit_every_unit_equally_often_and_are_fixed_by_the_seed():
    layout = Layout({p: PLATES[p] for p in ("region", "year")}, {"region": 12, "year": 5})
    first = list(islice(batches(layout, {"region": 4, "year": 2}, 0), 30))
    again = list(islice(batches(layout, {"region": 4, "year": 2}, 0), 30))
    other = list(islice(batches(layout, {"region": 4, "year": 2}, 1), 30))
    for a, b in zip(first, again, strict=True):
        for p in a:
            np.testing.assert_array_equal(a[p], b[p])
            assert len(set(a[p].tolist())) == len(a[p])
            assert (np.diff(a[p]) > 0).all()
    assert any((a["region"] != b["region"]).any() for a, b in zip(first, other, strict=True))
    for epoch in range(10):  # three batches of four are one epoch of twelve
        assert sorted(np.concatenate([b["region"] for b in first[3 * epoch : 3 * epoch + 3]]).tolist()) == list(range(12))


def test_inclusion_is_uniform_where_the_batch_does_not_divide_the_plate():
    layout = Layout({"year": PLATES["year"]}, {"year": 5})
    count = np.zeros(5)
    for b in islice(batches(layout, {"year": 3}, 0), 4000):
        count[b["year"]] += 1
    # each unit with probability 3/5; 4.5 standard errors
    assert np.abs(count / 4000 - 0.6).max() < 4.5 * np.sqrt(0.6 * 0.4 / 4000)


def test_more_than_there_is_takes_everything():
    layout = Layout({"year": PLATES["year"]}, {"year": 5})
    assert next(batches(layout, {"year": 9}, 0))["year"].tolist() == [0, 1, 2, 3, 4]
