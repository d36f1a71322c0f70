"""How many digits are shown."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmprop.errors import UsageError
from qmprop.figures import Figure, decimals, format_number, format_share, format_value, half_width, parse_level
from qmprop.records import Value

NUMBERS = st.floats(-1e6, 1e6, allow_subnormal=False)
HALF_WIDTHS = st.floats(1e-7, 1e3)


@pytest.mark.parametrize(
    ("key", "unit", "error", "expected"),
    [
        ("mu", "D", 0.029, 3),
        ("mu", "D", 0.05, 3),
        ("mu", "D", 0.1, 2),
        ("homo", "eV", 0.029, 3),
        ("homo", "meV", 0.029, 0),
        ("homo", "Ha", 0.029, 4),
        ("u0", "kJ/mol", 0.011, 1),
        ("r2", "a0^2", 1.0, 1),
        ("zpve", "eV", 0.00155, 4),
        ("cv", "cal/(mol K)", None, 2),
        ("cv", "cal/(mol K)", 0.0, 2),
    ],
)
def test_the_last_digit_lies_one_below_the_error(key, unit, error, expected):
    assert decimals(key, unit, error) == expected


def test_tiny_units_are_written_in_scientific_notation():
    digits = decimals("mu", "C m")
    assert [format_number(value, digits) for value in (6.1754e-30, -1.2345e-31, 0.0)] == [
        "6.18e-30",
        "-1.2e-31",
        "0e+00",
    ]


def around(value, half, unit="D"):
    return Value(value, unit, (value - half, value + half))


@pytest.mark.parametrize(
    ("value", "half", "number", "width"),
    [
        (1.2653, 0.2134, "1.27", "0.21"),
        (-11178.9661, 0.0213, "-11178.966", "0.021"),
        (-410.81512, 0.00078, "-410.8151", "0.0008"),
        (-410.81512, 0.000354, "-410.81512", "0.00035"),
        (-410.81512, 0.000355, "-410.8151", "0.0004"),
        (0.5, 0.0949, "0.50", "0.09"),
        (0.5, 0.0996, "0.50", "0.10"),
        (0.02, 0.35, "0.02", "0.35"),
        (-0.001, 0.4, "0.0", "0.4"),
        (3.0, 12.3, "3", "12"),
        (3.0, 42.0, "0", "40"),
        (-2079.266, 954.0, "-2100", "1000"),
        (-2079.266, 1e3, "-2100", "1000"),
        (1.85, 1e-7, "1.85000000", "0.00000010"),
    ],
)
def test_a_value_and_its_half_width_are_cut_at_the_same_place(value, half, number, width):
    assert format_value(around(value, half), 3) == Figure(number, width)


@pytest.mark.parametrize(
    ("value", "half", "expected"),
    [
        (6.1754e-30, 7e-31, Figure("6.2", "0.7", "e-30")),
        (9.96e-30, 3.6e-31, Figure("1.00", "0.04", "e-29")),
        (6.17e-31, 7e-30, Figure("1", "7", "e-30")),
        (0.0, 1e-31, Figure("0.0", "1.0", "e-31")),
    ],
)
def test_both_share_a_power_of_ten_in_tiny_units(value, half, expected):
    assert format_value(around(value, half, "C m"), 31) == expected


@given(NUMBERS, HALF_WIDTHS)
def test_no_digit_is_shown_that_the_half_width_does_not_justify(value, half):
    figure = format_value(around(value, half), 3)
    assert figure.power == "" or abs(value) < 1e-3
    number, width = float(figure.number + figure.power), float(figure.half_width + figure.power)
    assert 1 <= len(figure.half_width.replace(".", "").strip("0")) <= 2
    exact = half_width(around(value, half))
    assert width == pytest.approx(exact, rel=0.15)
    assert abs(number - value) <= 0.51 * exact
    assert len(figure.number.partition(".")[2]) == len(figure.half_width.partition(".")[2])


def test_the_farther_end_of_a_lopsided_interval_decides():
    assert half_width(Value(0.1, "eV", (0.0, 0.5))) == pytest.approx(0.4)
    assert math.isnan(half_width(Value(0.1, "eV")))


def test_without_a_half_width_the_property_decides():
    assert format_value(Value(1.23456, "D"), 3) == Figure("1.235")
    assert format_value(Value(1.23456, "D", (-math.inf, math.inf)), 3) == Figure("1.235")
    assert format_value(around(1.23456, 0.0), 3) == Figure("1.235", "0")


def test_a_cell_is_split_at_its_sign():
    assert Figure("1.27", "0.21").split("±") == ("1.27", " ± 0.21")
    assert Figure("6.2", "0.7", "e-30").split("+-") == ("(6.2", " +- 0.7)e-30")
    assert Figure("6.18e-30").split("±") == ("6.18e-30", "")


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("0.95", 0.95),
        ("95", 0.95),
        ("95%", 0.95),
        (" 95 % ", 0.95),
        ("99.9", 0.999),
        ("0.999", 0.999),
        (".68", 0.68),
        ("0.5", 0.5),
    ]
    + [("none", None), ("None", None)],
)
def test_a_level_is_a_share_or_a_percentage(text, level):
    assert parse_level(text) == level


@pytest.mark.parametrize(
    "text", ["", "0.49", "1", "0", "-0.9", "0.9991", "49", "100", "0.95%", "95%%", "95% x", "nan", "inf"]
)
def test_other_levels_are_refused(text):
    with pytest.raises(UsageError, match="intervals cannot have the level") as caught:
        parse_level(text)
    assert "none" in caught.value.hint


def test_a_share_is_shown_in_percent():
    assert [format_share(share) for share in (0.9, 0.995, 0.57, 0.008)] == ["90 %", "99.5 %", "57 %", "0.8 %"]
