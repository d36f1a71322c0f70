import itertools
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmprop.figures import decimals, format_number
from qmprop.records import Domain, Message, Neighbor, Record, Value
from qmprop.tables import CHUNK_ROWS, FEW_RECORDS, Style, TableWriter, label, printable
from qmprop.targets import DEFAULT_KEYS, TARGETS, convert, parse_units

# Benzamide-like values in default units: long totals, both signs.
VALUES = dict(zip(DEFAULT_KEYS, [3.61, 81.37, -6.68, -0.94, 5.74, 1190.61, 3.392], strict=False))
VALUES |= {"u0": -10913.1284, "u": -10912.9262, "h": -10912.9004, "g": -10913.9271, "cv": 27.313}


#: Half-widths of their 90 % intervals.
HALF_WIDTHS = dict(zip(DEFAULT_KEYS, [0.21, 0.44, 0.13, 0.099, 0.17, 13.2, 0.0052], strict=False))
HALF_WIDTHS |= {"u0": 0.021, "u": 0.0213, "h": 0.0213, "g": 0.0216, "cv": 0.14}
INSIDE = {"domain": Domain("in", 0.2), "interval_level": 0.9}
OUTSIDE = {"domain": Domain("out", 3.4, ("missing-hydrogens",)), "interval_level": 0.9}


def record(index=0, *, source="molecules/benzamide.sdf", units="ev", keys=DEFAULT_KEYS, **fields):
    chosen = parse_units(units)
    properties = {key: Value(convert(VALUES[key], key, chosen[key]), chosen[key]) for key in keys}
    return Record(source, index, None, "C7H7NO", 16, model="egnn-qm9@1f3a5c7e", properties=properties, **fields)


def sure(index=0, *, units="ev", keys=DEFAULT_KEYS, scale=1.0, **fields):
    """A record with intervals, `scale` times as wide as those above."""
    chosen = parse_units(units)
    properties = {}
    for key in keys:
        half = scale * HALF_WIDTHS[key]
        low, value, high = (convert(VALUES[key] + shift, key, chosen[key]) for shift in (-half, 0.0, half))
        properties[key] = Value(value, chosen[key], (low, high))
    return replace(record(index, keys=(), **(INSIDE | fields)), properties=properties)


def neighbor(index=0, smiles="NC(=O)c1ccccc1", units="ev"):
    chosen = parse_units(units)
    values = {key: Value(convert(VALUES[key], key, chosen[key]), chosen[key]) for key in DEFAULT_KEYS}
    return Neighbor(f"gdb_{index}", smiles, 0.0123 * index, values)


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
        "─────────────────────────────────────────────────────────────────────\n"
        " mu             3.610  D            dipole moment (norm)\n"
        f" alpha          81.37  a0^3         {TARGETS['alpha'].description}\n"
        " homo          -6.680  eV           highest occupied orbital\n"
        " lumo          -0.940  eV           lowest unoccupied orbital\n"
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


def test_a_single_molecule_with_intervals_reads_like_this():
    assert render([sure(seen=("gdb_4", "gdb_9"))], width=80) == (
        " molecules/benzamide.sdf  C7H7NO  16 atoms\n"
        " in the training set: gdb_4, gdb_9 (± is too wide for it)\n"
        " property       value  ± 90 %  unit\n"
        "─────────────────────────────────────────────────────────────────────────────\n"
        " mu              3.61    0.21  D            dipole moment (norm)\n"
        " alpha           81.4     0.4  a0^3         isotropic polarizability\n"
        " homo           -6.68    0.13  eV           highest occupied orbital\n"
        " lumo           -0.94    0.10  eV           lowest unoccupied orbital\n"
        " gap             5.74    0.17  eV           LUMO - HOMO\n"
        " r2              1191      13  a0^2         electronic spatial extent\n"
        " zpve           3.392   0.005  eV           zero-point vibrational energy\n"
        " u0        -10913.128   0.021  eV           total internal energy at 0 K\n"
        " u         -10912.926   0.021  eV           total internal energy at 298.15 K\n"
        " h         -10912.900   0.021  eV           total enthalpy at 298.15 K\n"
        " g         -10913.927   0.022  eV           total free energy at 298.15 K\n"
        " cv             27.31    0.14  cal/(mol K)  heat capacity at 298.15 K\n"
        "\n"
        " model egnn-qm9@1f3a5c7e   u0, u, h, g: total energy\n"
        " ± holds the true value for 90 % of in-domain molecules\n"
    )


def test_many_molecules_with_intervals_have_the_signs_below_each_other():
    records = [sure(0), sure(1, scale=20), failed(), sure(3, **OUTSIDE), record(4, **INSIDE), record(5)]
    text = render(records, width=80, keys=("mu", "r2"))
    assert text == (
        "                                                                mu            r2\n"
        " molecule                    formula  status  domain           [D]        [a0^2]\n"
        "────────────────────────────────────────────────────────────────────────────────\n"
        " molecules/benzamide.sdf[0]  C7H7NO   ok      in       3.61 ± 0.21    1191 ± 13\n"
        " molecules/benzamide.sdf[1]  C7H7NO   ok      in          4 ± 4       1190 ± 260\n"
        " bad.xyz                     H4Si     error\n"
        " molecules/benzamide.sdf[3]  C7H7NO   ok      out      3.61 ± 0.21    1191 ± 13\n"
        " molecules/benzamide.sdf[4]  C7H7NO   ok      in      3.610         1190.6\n"
        " molecules/benzamide.sdf[5]  C7H7NO   ok              3.610         1190.6\n"
        "\n"
        " model egnn-qm9@1f3a5c7e\n"
        " ± holds the true value for 90 % of in-domain molecules\n"
    )


@pytest.mark.parametrize(("units", "unicode"), [("ev", True), ("hartree", False), ("kj", True), ("mu=C m", False)])
@pytest.mark.parametrize("count", [1, 6])
@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_no_interval_is_cut_and_no_line_is_too_long(width, count, units, unicode):
    records = [sure(index, units=units, scale=10.0 ** (index - 3)) for index in range(count)]
    text = render([*records, failed()], width=width, units=units, unicode=unicode)
    sign = "±" if unicode else "+-"
    assert max(map(len, text.splitlines())) <= width
    assert text.isascii() != unicode
    assert "…" not in text
    shown = text.count(f" {sign} ") - 1  # the footnote begins with one
    assert shown == (1 if count == 1 else count * len(DEFAULT_KEYS))
    assert (f" {sign} 90 % " in text) == (count == 1)


@pytest.mark.parametrize("count", [1, 6])
def test_without_intervals_there_is_no_sign(count):
    text = render([record(index, domain=Domain("in", 0.2), seen=("gdb_4",)) for index in range(count)])
    assert "±" not in text
    assert ("in the training set: gdb_4\n" in text) == (count == 1)


def test_the_level_of_the_intervals_stands_above_and_below_them():
    text = render([sure(interval_level=0.995)])
    assert "± 99.5 %" in text.splitlines()[1]
    assert "for 99.5 % of" in text.splitlines()[-1]


def test_out_of_the_domain_the_values_are_a_guess():
    message = Message("missing-hydrogens", "C1 has 3 neighbors.")
    fields = {"status": "warning", "messages": (message,)} | OUTSIDE
    assert render([sure(**fields)]).splitlines()[1:3] == [
        " warning: C1 has 3 neighbors.",
        " out of the domain: the values are a guess, and ± promises nothing",
    ]
    assert " out of the domain: the values are a guess\n" in render([record(**(fields | {"interval_level": None}))])


def test_many_training_molecules_with_the_same_bonds_are_counted():
    text = render([sure(seen=tuple(f"gdb_{index}" for index in range(7)))])
    assert "in the training set: gdb_0, gdb_1, gdb_2 and 4 more (± is too wide for it)" in text


def test_neighbors_come_with_their_own_values():
    text = render([sure(neighbors=(neighbor(1), neighbor(12)), keys=("mu", "u0"))], keys=("mu", "u0"), width=100)
    assert text.splitlines()[5:11] == [
        "",
        " nearest training molecules, with their reference values",
        "                                        mu          u0",
        " neighbor  distance  SMILES            [D]        [eV]",
        "──────────────────────────────────────────────────────",
        " gdb_1     0.012     NC(=O)c1ccccc1  3.610  -10913.128",
    ]


def test_neighbors_of_whom_only_the_name_is_known_are_named():
    text = render(
        [sure(neighbors=(Neighbor("gdb_3", "", 0.5), Neighbor("gdb_7", "", 11.25)), keys=("mu",))], keys=("mu",)
    )
    assert text.splitlines()[5:10] == [
        " nearest training molecules",
        " neighbor  distance",
        "───────────────────",
        " gdb_3      0.500",
        " gdb_7     11.250",
    ]


@pytest.mark.parametrize("width", [60, 80, 200])
def test_neighbors_fit_and_strange_ones_do_no_harm(width):
    near = (neighbor(1, "C" * 200), neighbor(2, "\x1b[2J"), Neighbor("gdb_3", "C", 100.0))
    text = render([sure(neighbors=near)], width=width)
    assert max(map(len, text.splitlines())) <= width
    assert "\x1b" not in text
    assert "CCC..." in text
    assert text.count("gdb_3") == text.count("gdb_1") > 0


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


@given(st.text())
def test_printable_text_has_no_control_characters(text):
    assert printable(text).isprintable()
    assert len(printable(text)) == len(text)


def test_an_index_stands_behind_a_source_of_several_records():
    assert label(Record("a.xyz", 0)) == "a.xyz"
    assert label(Record("a.xyz", 0), numbered=True) == "a.xyz[0]"
    assert label(Record("a.xyz", 3)) == "a.xyz[3]"
