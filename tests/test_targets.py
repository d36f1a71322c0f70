import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmprop.errors import UsageError
from qmprop.targets import (
    ATOM_ENERGIES_HARTREE,
    ATOMIZATION_KEYS,
    DEFAULT_KEYS,
    ELEMENTS,
    HARTREE_EV,
    PRESETS,
    RT_EV,
    TARGETS,
    UNITS,
    convert,
    format_units,
    parse_properties,
    parse_units,
)

KEYS_AND_UNITS = [(key, unit) for key, target in TARGETS.items() for unit in UNITS[target.dimension]]


def test_the_twelve_properties_come_in_the_order_of_the_design():
    assert " ".join(DEFAULT_KEYS) == "mu alpha homo lumo gap r2 zpve u0 u h g cv"
    assert ATOMIZATION_KEYS == ("u0_atom", "u_atom", "h_atom", "g_atom")
    assert [TARGETS[key].total for key in ATOMIZATION_KEYS] == ["u0", "u", "h", "g"]


@pytest.mark.parametrize(("key", "unit"), KEYS_AND_UNITS)
@given(st.floats(-1e6, 1e6, allow_subnormal=False))
@settings(max_examples=20, deadline=None)
def test_a_unit_converts_forward_and_back(key, unit, value):
    there = convert(value, key, unit)
    assert convert(there, key, TARGETS[key].unit, source_unit=unit) == pytest.approx(value, rel=1e-12, abs=1e-250)


@pytest.mark.parametrize("preset", list(PRESETS))
@given(st.lists(st.floats(-1e5, 1e5, allow_subnormal=False), min_size=len(TARGETS), max_size=len(TARGETS)))
@settings(max_examples=20, deadline=None)
def test_a_preset_converts_forward_and_back(preset, values):
    units = parse_units(preset)
    for (key, unit), value in zip(units.items(), values, strict=True):
        there = convert(value, key, unit)
        assert convert(there, key, TARGETS[key].unit, source_unit=unit) == pytest.approx(value, rel=1e-12, abs=1e-250)


@given(st.permutations(KEYS_AND_UNITS).map(dict))
@settings(max_examples=50, deadline=None)
def test_units_written_as_text_are_read_back(units):
    assert parse_units(format_units(units)) == parse_units(None) | units
    assert list(format_units(units).split(",")) == [f"{key}={unit}" for key, unit in units.items()]


@pytest.mark.parametrize(
    ("value", "key", "unit", "expected"),
    [
        (HARTREE_EV, "homo", "Ha", 1.0),
        (1.0, "u0", "kcal/mol", 23.060548),
        (1.0, "u0", "kJ/mol", 96.485332),
        (1.0, "gap", "meV", 1000.0),
        (1.0, "mu", "ea0", 0.393430),
        (1.0, "mu", "C m", 3.335641e-30),
        (1.0, "alpha", "A^3", 0.148185),
        (1.0, "r2", "A^2", 0.280029),
        (1.0, "cv", "J/(mol K)", 4.184),
    ],
)
def test_units_agree_with_published_factors(value, key, unit, expected):
    assert convert(value, key, unit) == pytest.approx(expected, rel=3e-6)


def test_enthalpy_minus_energy_is_the_ideal_gas_term_of_qm9():
    assert pytest.approx(0.02569, abs=1e-5) == RT_EV
    for number in ELEMENTS:
        atom = {key: ATOM_ENERGIES_HARTREE[key][number] for key in ("u", "h")}
        assert (atom["h"] - atom["u"]) * HARTREE_EV == pytest.approx(RT_EV, abs=5e-5)


def test_presets_change_energies_and_kj_also_the_heat_capacity():
    assert parse_units("kcal")["u0"] == "kcal/mol"
    assert parse_units("hartree")["cv"] == "cal/(mol K)"
    assert parse_units("kj")["cv"] == "J/(mol K)"
    assert all(units["mu"] == "D" and units["r2"] == "a0^2" for units in PRESETS.values())


def test_units_apply_in_order():
    assert parse_units(["homo=meV", "kcal"])["homo"] == "kcal/mol"
    assert parse_units("kcal, homo=meV")["homo"] == "meV"
    assert parse_units({"mu": "C m"})["mu"] == "C m"
    assert parse_units(None) == PRESETS["ev"]


def test_properties_keep_their_order_and_lose_repeats():
    assert parse_properties("homo, MU,homo") == ("homo", "mu")
    assert parse_properties(["g_atom"]) == ("g_atom",)
    assert parse_properties(None) == DEFAULT_KEYS


@pytest.mark.parametrize(
    ("call", "argument", "named", "allowed"),
    [
        (parse_properties, "mu,foo", "'foo'", "homo"),
        (parse_properties, " , ", "no property", "mu"),
        (parse_units, "furlong", "'furlong'", "hartree"),
        (parse_units, "mu=eV", "'eV'", "ea0"),
        (parse_units, "nix=eV", "'nix'", "mu"),
    ],
)
def test_an_error_names_the_value_and_what_is_allowed(call, argument, named, allowed):
    with pytest.raises(UsageError) as caught:
        call(argument)
    assert named in caught.value.message
    assert allowed in caught.value.hint


def test_every_unit_is_a_finite_positive_size():
    sizes = [size for units in UNITS.values() for size in units.values()]
    assert all(size > 0.0 and math.isfinite(size) for size in sizes)
    assert all(next(iter(units.values())) == 1.0 for units in UNITS.values())
