"""Sizes in bytes as users write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pavi_scale.errors import InputError
from pavi_scale.memory import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4 GiB", 4 * 2**30),
        ("500MB", 500 * 10**6),
        ("1.5 kib", 1536),
        (".5 GB", 5 * 10**8),
        ("12", 12),
        ("12 b", 12),
        (" 2TiB ", 2 * 2**40),
        (1000, 1000),
        (2.0, 2),
    ],
)
def test_sizes_are_read(text, value):
    assert parse_bytes(text) == value


@pytest.mark.parametrize("bad", ["", "GiB", "4 parsecs", "-1 GiB", "0", 0, -5, True, None, "1 GiB 2", "1e3", "nan", [], float("nan"), float("inf")])
def test_anything_else_is_an_input_error(bad):
    with pytest.raises(InputError, match="not a size"):
        parse_bytes(bad)


@given(st.integers(1, 2**55))
def test_what_is_written_is_read_back_within_rounding(size):
    assert parse_bytes(format_bytes(size)) == pytest.approx(size, rel=0.06)


def test_no_figure_shows_1024_of_a_unit():
    assert [format_bytes(x) for x in (0, 1023, 1024, 2**20, 2**30, 2**40)] == ["0 B", "1023 B", "1.0 KiB", "1.0 MiB", "1.0 GiB", "1.0 TiB"]
