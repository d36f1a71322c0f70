"""Records of .mol2 and .pdb texts: atoms, charges, and damage that stays where it is."""

from __future__ import annotations

import io

import pytest

from qmprop.blocks import read_mol2, read_pdb
from qmprop.formats import Failure
from qmprop.molecule import Molecule
from qmprop.streams import Lines, ParseError

METHANOL = """# written by hand
@<TRIPOS>MOLECULE
methanol
 6 5 1 0 0
SMALL
GASTEIGER

@<TRIPOS>ATOM
      1 C1  -0.0465  0.6589  0.0000 C.3  1 MOL  0.1500
      2 O1  -0.0465 -0.7582  0.0000 O.3  1 MOL -0.4000
      3 H1   0.8759 -1.0700  0.0000 H    1 MOL  0.2100
      4 H2   0.9864  0.9900  0.0000 H    1 MOL  0.0200
      5 H3  -0.5500  1.0300  0.8900 H    1 MOL  0.0100
      6 H4  -0.5500  1.0300 -0.8900 H    1 MOL  0.0100
@<TRIPOS>BOND
     1 1 2 1
"""
AMMONIUM = """@<TRIPOS>MOLECULE
*****
 5 0
SMALL
USER_CHARGES
@<TRIPOS>ATOM
1 N  0.0  0.0  0.0 n4 1 MOL -0.8
2 H1 0.6  0.6  0.6 hn 1 MOL 0.45
3 H2 -0.6 -0.6 0.6 hn 1 MOL 0.45
4 H3 -0.6 0.6 -0.6 hn 1 MOL 0.45
5 H4 0.6 -0.6 -0.6 hn 1 MOL 0.45
"""


def read(text: str, reader=read_mol2) -> list[Molecule | Failure]:  # type: ignore[no-untyped-def]
    return list(reader(Lines(io.StringIO(text)), "text"))


def codes(found: list[Molecule | Failure]) -> list[str]:
    return [item.message.code if isinstance(item, Failure) else item.formula for item in found]


def test_mol2_records() -> None:
    methanol, ammonium, again = read(METHANOL + AMMONIUM + METHANOL)
    assert isinstance(methanol, Molecule)
    assert isinstance(ammonium, Molecule)
    assert (methanol.name, methanol.formula, methanol.charge, methanol.index) == ("methanol", "CH4O", 0, 0)
    assert (ammonium.name, ammonium.formula, ammonium.charge, ammonium.index) == (None, "H4N", 1, 1)
    assert methanol.positions[1].tolist() == [-0.0465, -0.7582, 0.0]
    assert (again.index, methanol.periodic) == (2, False)


@pytest.mark.parametrize(
    ("kind", "name", "symbol"),
    [
        ("C.ar", "C1", "C"),
        ("Cl", "CL", "Cl"),
        ("ca", "C7", "C"),
        ("cl", "X", "Cl"),
        ("hc", "H", "H"),
        ("XX.y", "O2", "O"),
    ],
)
def test_mol2_atom_types(kind: str, name: str, symbol: str) -> None:
    text = f"@<TRIPOS>MOLECULE\nx\n1\nSMALL\nNO_CHARGES\n@<TRIPOS>ATOM\n1 {name} 0 0 0 {kind} 1 M 5.0\n"
    (atom,) = read(text)
    assert isinstance(atom, Molecule), atom.message
    assert (atom.formula, atom.charge) == (symbol, 0)


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        (" 6 5 1", " 7 5 1", "lines 2-16: 7 atoms are announced, 6 are there"),
        ("0.8759", "O.8759", "line 11: expected a coordinate, found 'O.8759'"),
        (
            "H1   0.8759 -1.0700  0.0000 H    1 MOL  0.2100",
            "H1 0 0",
            "line 11: expected 6 columns (id name x y z type), found 4",
        ),
        (" C1 ", " ?? ", None),
        ("C.3", "?", None),
    ],
)
def test_damage_stays_within_its_mol2_record(old: str, new: str, text: str | None) -> None:
    first, second = read(METHANOL.replace(old, new, 1) + AMMONIUM)
    assert isinstance(second, Molecule)
    if text is not None:
        assert isinstance(first, Failure)
        assert (first.message.code, first.message.text, first.name) == ("parse-error", text, "methanol")


def test_mol2_of_a_crystal_and_text_that_is_none() -> None:
    (crystal,) = read(METHANOL + "@<TRIPOS>CRYSIN\n5 5 5 90 90 90 1 1\n")
    assert isinstance(crystal, Molecule)
    assert crystal.periodic
    assert read("") == []
    with pytest.raises(ParseError, match="line 1: expected"):
        read("buy milk\n")


def atom(symbol: str, x: float, charge: str = "") -> str:
    return f"HETATM    1  {symbol}   MOL     1    {x:8.3f}   0.000   0.000  1.00  0.00          {symbol:>2}{charge}\n"


HF = atom("H", 0.0) + atom("F", 0.917)
CELL = "CRYST1   10.000   10.000   10.000  90.00  90.00  90.00 P 1\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (HF, ["FH"]),
        (HF + "END\n", ["FH"]),
        (f"MODEL        1\n{HF}ENDMDL\nMODEL        2\n{HF}ENDMDL\nMASTER\nEND\n", ["FH", "FH"]),
        (f"{HF}END\n{HF}END\n", ["FH", "FH"]),
        (f"MODEL        1\n{HF.replace('0.917', '0.9x7')}ENDMDL\nMODEL        2\n{HF}ENDMDL\n", ["parse-error", "FH"]),
        ("HEADER    nothing\nEND\n", ["no-molecules"]),
    ],
    ids=["plain", "end", "models", "frames", "damage", "empty"],
)
def test_pdb_models(text: str, expected: list[str]) -> None:
    found = read(text, read_pdb)
    assert codes(found) == expected
    assert [item.index for item in found] == list(range(len(expected)))


@pytest.mark.parametrize(
    ("cell", "periodic"),
    [(CELL, True), ("", False), (CELL.replace("10.000", " 1.000"), False)],
    ids=["cell", "none", "unit"],
)
def test_cell_of_a_pdb_text_holds_for_all_models(cell: str, periodic: bool) -> None:
    found = read(f"{cell}MODEL        1\n{HF}ENDMDL\nMODEL        2\n{HF}ENDMDL\n", read_pdb)
    assert [item.periodic for item in found if isinstance(item, Molecule)] == [periodic, periodic]


def test_charges_of_a_pdb_text() -> None:
    (ion,) = read(atom("O", 0.0, "1-") + atom("H", 0.96), read_pdb)
    assert isinstance(ion, Molecule)
    assert ion.charge == -1
