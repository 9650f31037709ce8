"""Layouts and selections against loops over units."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pavi_scale.errors import ModelError
from pavi_scale.plates import Layout, Plate, Selection, ancestors

PLATES = {
    p.name: p
    for p in (
        Plate("region"),
        Plate("county", within="region"),
        Plate("house", within="county"),
        Plate("year"),
        Plate("visit", within=("house", "year")),
    )
}


@st.composite
def layouts(draw):
    """region > county > house, and visits that cross houses with years; some parents may have no children."""
    n = {p: draw(st.integers(1, 5)) for p in ("region", "county", "year")} | {"house": draw(st.integers(1, 7)), "visit": draw(st.integers(1, 9))}
    index = {}
    for child, plate in PLATES.items():
        for parent in plate.within:
            index[child, parent] = np.array(draw(st.lists(st.integers(0, n[parent] - 1), min_size=n[child], max_size=n[child])), dtype=np.int64)
    return Layout(PLATES, n, index)


def _climb(layout, child, unit, ancestor):
    """Position of a unit's ancestor, one level at a time."""
    if child == ancestor:
        return unit
    for parent in PLATES[child].within:
        if parent == ancestor or ancestor in ancestors(PLATES, parent):
            return _climb(layout, parent, int(layout.index[child, parent][unit]), ancestor)
    raise AssertionError


@given(layouts())
def test_path_climbs_the_levels(layout):
    for child in PLATES:
        for ancestor in (child, *ancestors(PLATES, child)):
            assert layout.path(child, ancestor).tolist() == [_climb(layout, child, i, ancestor) for i in range(layout.cardinality[child])]


@given(layouts(), st.data())
def test_children_are_those_whose_parent_is_asked_for(layout, data):
    for child, plate in PLATES.items():
        for parent in plate.within:
            units = np.array(sorted(data.draw(st.sets(st.integers(0, layout.cardinality[parent] - 1)))), dtype=np.int64)
            expected = [i for i in range(layout.cardinality[child]) if layout.index[child, parent][i] in set(units.tolist())]
            assert layout.children(child, parent, units).tolist() == expected


@given(layouts(), st.data())
def test_selected_paths_point_into_the_selection(layout, data):
    house = np.array(sorted(data.draw(st.sets(st.integers(0, layout.cardinality["house"] - 1), min_size=1))))
    county = np.unique(layout.path("house", "county")[house])
    region = np.unique(layout.path("house", "region")[house])
    units = {"house": house, "county": county, "region": region}
    selection = Selection(layout, units, {p: np.ones(len(u)) for p, u in units.items()})
    for ancestor in ("house", "county", "region"):
        found = units[ancestor][selection.path("house", ancestor)]
        assert found.tolist() == [_climb(layout, "house", int(i), ancestor) for i in house]


@given(layouts(), st.data())
def test_weights_multiply_over_plates_that_do_not_contain_each_other(layout, data):
    whole = Selection.whole(layout)
    weight = {p: np.array(data.draw(st.lists(st.floats(0.5, 4.0), min_size=len(u), max_size=len(u)))) for p, u in whole.units.items()}
    selection = Selection(layout, whole.units, weight)
    for plates in ((), ("region",), ("house",), ("region", "year"), ("year", "county"), ("region", "house"), ("county", "year", "region")):
        got = selection.weights(plates)
        assert got.shape == selection.sizes(plates) == tuple(layout.cardinality[p] for p in plates)
        for position in np.ndindex(*got.shape):
            expected = 1.0
            for p, i in zip(plates, position, strict=True):
                if not any(p in ancestors(PLATES, q) for q in plates):
                    expected *= weight[p][i]
            assert got[position] == pytest.approx(expected)


def test_ancestors_are_nearest_first_and_once():
    assert ancestors(PLATES, "visit") == ("house", "year", "county", "region")
    assert ancestors(PLATES, "region") == ()


def test_a_path_that_does_not_exist_is_a_model_error():
    layout = Layout(PLATES, dict.fromkeys(PLATES, 1), {(c, p): np.zeros(1, dtype=int) for c in PLATES for p in PLATES[c].within})
    with pytest.raises(ModelError, match="does not lie within"):
        layout.path("county", "house")


@pytest.mark.parametrize("name", ["", "two words", "1st", "a-b", None, 3])
def test_a_plates_name_is_an_identifier(name):
    with pytest.raises(ModelError, match="identifier"):
        Plate(name)
