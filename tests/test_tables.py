import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmprop.records import Message, Record, Value
from qmprop.tables import CHUNK_ROWS, FEW_RECORDS, Style, TableWriter, decimals, format_number, label, printable
from qmprop.targets import DEFAULT_KEYS, TARGETS, convert, parse_units

# Benzamide-like values in default units: long totals, both signs.
VALUES = dict(zip(DEFAULT_KEYS, [3.61, 81.37, -6.68, -0.94, 5.74, 1190.61, 3.392], strict=False))
VALUES |= {"u0": -10913.1284, "u": -10912.9262, "h": -10912.9004, "g": -10913.9271, "cv": 27.313}


def record(index=0, *, source="molecules/benzamide.sdf", units="ev", keys=DEFAULT_KEYS, **fields):
    chosen = parse_units(units)
    properties = {key: Value(convert(VALUES[key], key, chosen[key]), chosen[key]) for key in keys}
    return Record(source, index, None, "C7H7NO", 16, model="egnn-qm9@1f3a5c7e", properties=properties, **fields)


def failed(index=0, source="bad.xyz"):
    message = Message("unsupported-element", "Unsupported element: Si; only H, C, N, O and F are known.")
    return Record(source, index, None, "H4Si", 5, "error", (message,), "egnn-qm9@1f3a5c7e")


def render(records, *, width=80, units="ev", keys=DEFAULT_KEYS, **style):
    chosen = {key: parse_units(units)[key] for key in keys}
    writer = TableWriter(chosen, Style(width, **style))
    return writer.begin() + "".join(map(writer.write, records)) + writer.end()


def test_a_single_molecule_reads_like_this():
    assert render([record()], width=80) == (
        " molecules/benzamide.sdf  C7H7NO  16 atoms\n"
        " property       value  unit\n"
        "───────────────────────────────────────────────────────────────────────────\n"
        " mu             3.610  D            dipole moment (norm)\n"
        f" alpha          81.37  a0^3         {TARGETS['alpha'].description}\n"
        " homo          -6.680  eV           energy of the highest occupied orbital\n"
        " lumo          -0.940  eV           energy of the lowest unoccupied orbital\n"
        " gap            5.740  eV           LUMO - HOMO\n"
        " r2            1190.6  a0^2         electronic spatial extent\n"
        " zpve           3.392  eV           zero-point vibrational energy\n"
        " u0        -10913.128  eV           total internal energy at 0 K\n"
        " u         -10912.926  eV           total internal energy at 298.15 K\n"
        " h         -10912.900  eV           total enthalpy at 298.15 K\n"
        " g         -10913.927  eV           total free energy at 298.15 K\n"
        " cv             27.31  cal/(mol K)  heat capacity at 298.15 K\n"
        "\n"
        " model egnn-qm9@1f3a5c7e   u0, u, h, g: total energy\n"
    )


def test_many_molecules_share_a_table_with_one_row_each():
    lines = render([record(index) for index in range(6)], width=200).splitlines()
    assert lines[1].split()[:2] == ["molecule", "formula"]
    rows = [line for line in lines if "C7H7NO" in line]
    assert [row.split()[0] for row in rows] == [f"molecules/benzamide.sdf[{index}]" for index in range(6)]
    assert all(
        row.split()[2:] == [format_number(VALUES[k], decimals(k, TARGETS[k].unit)) for k in VALUES] for row in rows
    )


@pytest.mark.parametrize("units", ["ev", "hartree", "kcal", "kj", "mu=C m", "homo=meV"])
@pytest.mark.parametrize("count", [1, 3, 7])
@pytest.mark.parametrize("width", [40, 60, 80, 120, 300])
def test_no_number_is_cut_and_no_line_is_too_long(width, count, units):
    text = render([record(index, units=units) for index in range(count)], width=width, units=units)
    chosen = parse_units(units)
    for key in DEFAULT_KEYS:
        number = format_number(convert(VALUES[key], key, chosen[key]), decimals(key, chosen[key]))
        assert len(re.findall(rf"(?<![\d.-]){re.escape(number)}(?!\d)", text)) >= count, key
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text


def test_a_terminal_too_narrow_for_a_number_gets_it_all_the_same():
    text = render([record(index) for index in range(5)], width=20)
    assert text.count("-10913.128") == 5


def test_each_property_appears_in_one_of_the_stacked_tables():
    text = render([record(index) for index in range(5)], width=80)
    headings = itertools.chain.from_iterable(line.split() for line in text.splitlines() if "[" not in line)
    assert [word for word in headings if word in DEFAULT_KEYS] == list(DEFAULT_KEYS)


@pytest.mark.parametrize("count", [1, FEW_RECORDS, FEW_RECORDS + 1])
def test_a_failed_record_has_its_place_among_the_others(count):
    text = render([record(index) for index in range(count - 1)] + [failed()], width=200)
    assert "bad.xyz" in text
    assert "H4Si" in text
    assert "error" in text
    assert text.count("molecules/benzamide.sdf") == count - 1


def test_a_warning_is_shown_with_its_molecule():
    message = Message("too-large", "12 heavy atoms; the training molecules have at most 9.")
    text = render([record(status="warning", messages=(message,))])
    assert " warning: 12 heavy atoms; the training molecules have at most 9.\n" in text
    assert "warning" in render([record(i, status="warning", messages=(message,)) for i in range(9)])


def test_nothing_to_show():
    assert render([]) == ""


def test_a_long_stream_is_shown_piece_by_piece():
    writer = TableWriter(parse_units("ev"), Style(200))
    shown = [writer.write(record(index)) for index in range(2 * CHUNK_ROWS)]
    assert [index for index, text in enumerate(shown) if text] == [CHUNK_ROWS - 1, 2 * CHUNK_ROWS - 1]
    text = "".join(shown) + writer.end()
    assert [int(number) for number in re.findall(r"sdf\[(\d+)\]", text)] == list(range(2 * CHUNK_ROWS))


def test_total_and_atomization_energies_are_told_apart():
    properties = {"u0": Value(-10913.1, "eV"), "u0_atom": Value(-84.2, "eV")}
    text = render([Record("a", 0, model="m", properties=properties)], keys=("u0", "u0_atom"))
    assert "u0: total energy" in text
    assert "u0_atom: atomization energy" in text


def test_plain_characters_where_the_terminal_knows_no_others():
    assert render([record()], unicode=False).isascii()
    assert render([record(index) for index in range(6)], unicode=False).isascii()
    assert "-----" in render([record()], unicode=False)


def test_color_only_where_it_is_asked_for(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[" not in render([record(), failed()])
    assert "\x1b[1;31m" in render([record(), failed()], color="standard")


def test_no_color_is_obeyed(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", render([record(), failed()], color="standard"))


def test_a_long_name_loses_its_front():
    long = "a/very/long/path/to/some/where/molecule.xyz"
    text = render([record(source=f"{long}{index}") for index in range(6)], width=60)
    assert [f"molecule.xyz{index}" in text for index in range(6)] == [True] * 6
    assert "..." in text
    assert max(map(len, text.splitlines())) <= 60


def test_names_of_records_are_shown_where_there_is_room():
    records = [Record("a.sdf", i, "caffeine", "CH4", 5, properties={"mu": Value(1.0, "D")}) for i in range(6)]
    assert "caffeine" in render(records, keys=("mu",), width=120)


def test_a_name_cannot_garble_the_terminal():
    text = render([Record("\x1b[2Jx", 0, "a\nb", "H2", 2, properties={"mu": Value(0.0, "D")})], keys=("mu",))
    assert "\x1b" not in text
    assert "?[2Jx  a?b  H2" in text


def test_wide_letters_keep_the_columns_straight():
    records = [record(source=source) for source in ("水.xyz", "water.xyz", "x", "y", "z")]
    text = render(records, width=200, keys=("mu",))
    from rich.cells import cell_len

    assert len({cell_len(line) for line in text.splitlines() if "C7H7NO" in line}) == 1


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


def test_an_interval_decides_the_digits_of_its_value():
    properties = {
        "mu": Value(3.614159, "D", (3.6131, 3.6152)),
        "gap": Value(5.741, "eV", (4.2, 7.3)),
        "cv": Value(27.313, "cal/(mol K)"),
    }
    text = render([Record("a", 0, model="m", properties=properties)], keys=tuple(properties))
    assert " mu        3.6142  3.6131 to 3.6152  D " in text
    assert " gap          5.7  4.2 to 7.3        eV " in text
    assert " cv         27.31                    cal/(mol K)" in text
    for width in (40, 60, 80):
        assert "4.2 to 7.3" in render(
            [Record("a", 0, model="m", properties=properties)], keys=tuple(properties), width=width
        )


def test_an_interval_of_no_width_is_shown_all_the_same():
    assert "3.610 to 3.610" in render(
        [Record("a", 0, model="m", properties={"mu": Value(3.61, "D", (3.61, 3.61))})], keys=("mu",)
    )


@given(st.text())
def test_printable_text_has_no_control_characters(text):
    assert printable(text).isprintable()
    assert len(printable(text)) == len(text)


def test_an_index_stands_behind_a_source_of_several_records():
    assert label(Record("a.xyz", 0)) == "a.xyz"
    assert label(Record("a.xyz", 0), numbered=True) == "a.xyz[0]"
    assert label(Record("a.xyz", 3)) == "a.xyz[3]"
