"""Whatever is named as input, each record comes out as a molecule or as a failure that says why."""

from __future__ import annotations

import builtins
import bz2
import csv
import gzip
import importlib.util
import io
import itertools
import lzma
import os
import sqlite3
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import ase
import ase.io
import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from rdkit import Chem
from rdkit.Chem import AllChem

from qmprop.errors import UsageError
from qmprop.formats import read_xyz
from qmprop.molecule import Molecule, find_error
from qmprop.readers import Failure, from_ase, from_rdkit, read_file, read_paths
from qmprop.streams import Lines

EXAMPLES = Path(__file__).parents[1] / "examples"
WATER = (EXAMPLES / "water.xyz").read_text()
SDF = (EXAMPLES / "three_molecules.sdf").read_text()
QM9_RAW = (EXAMPLES / "dsgdb9nsd_000212.xyz").read_text()
HYDROGEN = "H 0 0 0\nH 0 0 0.74\n"


def read_text(folder: Path, text: str | bytes, name: str = "input.xyz") -> list[Molecule | Failure]:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return list(read_paths([path]))


def read_comment(folder: Path, comment: str) -> Molecule:
    (molecule,) = read_text(folder, f"2\n{comment}\n{HYDROGEN}")
    assert isinstance(molecule, Molecule)
    assert molecule.numbers.tolist() == [1, 1]
    assert molecule.positions[1].tolist() == [0.0, 0.0, 0.74]
    return molecule


def codes(found: list[Molecule | Failure]) -> list[str]:
    return [item.message.code if isinstance(item, Failure) else item.formula for item in found]


# ---------------------------------------------------------------- examples


def test_examples_hold_the_molecules_they_name() -> None:
    found = {(Path(item.source).name, item.name): item for item in read_paths(str(EXAMPLES))}
    assert {key: codes([item])[0] for key, item in found.items()} == {
        ("benzamide.xyz", "benzamide"): "C7H7NO",
        ("dsgdb9nsd_000212.xyz", "gdb 212"): "C5H7N",
        ("formamide.pdb", None): "CH3NO",
        ("indole_v3000.sdf", "indole"): "C8H7N",
        ("small_molecules.xyz", "methane"): "CH4",
        ("small_molecules.xyz", "ammonia"): "H3N",
        ("small_molecules.xyz", "methanol"): "CH4O",
        ("small_molecules.xyz", "ethanol"): "C2H6O",
        ("small_molecules.xyz", "benzene"): "C6H6",
        ("three_molecules.sdf", "acetaldehyde"): "C2H4O",
        ("three_molecules.sdf", "acetonitrile"): "C2H3N",
        ("three_molecules.sdf", "cyclopropane"): "C3H6",
        ("water.xyz", "water"): "H2O",
    }
    assert all(isinstance(item, Molecule) and find_error(item) is None for item in found.values())


def test_water_has_the_geometry_of_gdb_3() -> None:
    package = importlib.util.find_spec("qm9pack")  # importing it fails: it needs the removed pkg_resources
    assert package is not None
    assert package.origin is not None
    with (Path(package.origin).parent / "data" / "qm9_part1.csv").open() as file:
        row = next(itertools.islice(csv.DictReader(file), 2, None))
    (water,) = read_paths(EXAMPLES / "water.xyz")
    assert isinstance(water, Molecule)
    positions = np.fromstring(row["XYZ_Ang"].replace("[", "").replace("]", ""), sep=",").reshape(-1, 3)
    np.testing.assert_array_equal(water.positions, positions)
    assert water.numbers.tolist() == [8, 1, 1]


def test_sdf_examples_have_the_bonds_of_their_names() -> None:
    smiles = {"acetaldehyde": "CC=O", "acetonitrile": "CC#N", "cyclopropane": "C1CC1", "indole": "c1ccc2[nH]ccc2c1"}
    for path in (EXAMPLES / "three_molecules.sdf", EXAMPLES / "indole_v3000.sdf"):
        for mol in Chem.SDMolSupplier(str(path)):
            assert Chem.MolToSmiles(mol) == Chem.CanonSmiles(smiles[mol.GetProp("_Name")])


# ---------------------------------------------------------------- xyz


def test_raw_qm9_files_may_follow_each_other(tmp_path: Path) -> None:
    first, second, third = read_text(tmp_path, QM9_RAW + QM9_RAW + WATER)
    assert isinstance(first, Molecule)
    assert isinstance(second, Molecule)
    assert (first.name, second.name, third.name) == ("gdb 212", "gdb 212", "water")
    assert first.positions[0].tolist() == [2.1997e-6, 1.4462618059, 0.0098312216]
    np.testing.assert_array_equal(first.positions, second.positions)


@pytest.mark.parametrize(
    "text",
    [
        WATER.replace("\n", "\r\n"),
        WATER.replace("   ", "\t"),
        WATER + "\n  \n\n",
        "\n\n" + WATER,
        "\ufeff" + WATER,
        WATER.rstrip(),
        WATER.replace("water", ""),
        WATER.replace("O  ", "8  ").replace("H  ", "1  "),
        WATER.replace("O  ", "o  "),
        WATER.replace("O  ", "O1 ").replace("H  ", "H22"),
        WATER.replace("0.9775395708", "9.775395708D-01"),
        WATER.replace("\n", " 0.5 label_1\n").replace("3 0.5 label_1", "3"),
    ],
    ids=[
        "crlf",
        "tabs",
        "trailing",
        "leading",
        "bom",
        "no-newline",
        "no-comment",
        "numbers",
        "case",
        "labels",
        "fortran",
        "extra",
    ],
)
def test_water_is_water_however_it_is_written(tmp_path: Path, text: str) -> None:
    (water,) = read_text(tmp_path, text)
    (reference,) = read_paths(EXAMPLES / "water.xyz")
    assert isinstance(water, Molecule)
    assert isinstance(reference, Molecule)
    np.testing.assert_array_equal(water.positions, reference.positions)
    assert water.numbers.tolist() == [8, 1, 1]


@pytest.mark.parametrize(
    ("comment", "periodic"),
    [
        ('Lattice="5 0 0 0 5 0 0 0 5"', True),
        ('Lattice="5 0 0 0 5 0 0 0 5" pbc="T F F"', True),
        ("Lattice=[[5, 0, 0], [0, 5, 0], [0, 0, 5]]", True),
        ('pbc="F F F" Lattice="5 0 0 0 5 0 0 0 5"', False),
        ('pbc=[False, False, False] Lattice="5 0 0 0 5 0 0 0 5"', False),
        ('Lattice="5 0 0 0 5 0 0 0"', False),
        ('Lattice="5 0 0 0 5 0 0 0 nan"', False),
        ('Lattice="0 0 0 0 0 0 0 0 0"', False),
        ('Lattice="a b c d e f g h i"', False),
        ('Lattice="5 0 0 0 5', False),
        ('note="no Lattice=5 here" E=-1', False),
        ('pbc="T T T"', False),
        ("Lattice constants 5 0 0 0 5 0 0 0 5", False),
        ("a={a={a={ \" ' [ = == Properties= pbc", False),
    ],
)
def test_only_a_well_formed_lattice_makes_a_frame_periodic(tmp_path: Path, comment: str, periodic: bool) -> None:
    assert read_comment(tmp_path, comment).periodic is periodic


@pytest.mark.parametrize(
    ("comment", "name", "charge"),
    [
        ("  methanol, conformer 2 ", "methanol, conformer 2", 0),
        ("", None, 0),
        ("E=-1.17 charge=1", None, 1),
        ('name="acetic acid" charge=-1', "acetic acid", -1),
        ("charge=+2.0", None, 2),
        ("charge=0.5", None, 0),
        ("charge=99999999999999999999", None, 0),
        ("energy: -1.03 gnorm: 0.0001 xtb: 6.7.1", None, 0),
        ("long " * 100, None, 0),
        ("bell\x07", "bell\ufffd", 0),
    ],
)
def test_comment_gives_name_and_charge(tmp_path: Path, comment: str, name: str | None, charge: int) -> None:
    molecule = read_comment(tmp_path, comment)
    assert (molecule.name, molecule.charge) == (name, charge)


@pytest.mark.parametrize(
    ("properties", "row"),
    [
        ("species:S:1:pos:R:3", "C 1 2 3"),
        ("species:S:1:pos:R:3:forces:R:3", "C 1 2 3 7 8 9"),
        ("pos:R:3:species:S:1", "1 2 3 C"),
        ("id:I:1:Z:I:1:pos:R:3", "5 6 1 2 3"),
        ("species:S:1:forces:R:3:pos:R:3", "C 7 8 9 1 2 3"),
        ("pos:R:3:species:S:1", "C 1 2 3"),  # the comment is wrong about its columns
        ("species:S:1:pos:R", "C 1 2 3"),
        ("species:S:1:pos:R:-3", "C 1 2 3"),
        ("forces:R:3", "C 1 2 3"),
    ],
)
def test_properties_give_the_columns(tmp_path: Path, properties: str, row: str) -> None:
    (molecule,) = read_text(tmp_path, f"1\nProperties={properties}\n{row}\n")
    assert isinstance(molecule, Molecule)
    assert molecule.numbers.tolist() == [6]
    assert molecule.positions.tolist() == [[1.0, 2.0, 3.0]]


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        ("3\nx\nO 0 0 0\nH 0 0 1\n", "line 9: the text ends after 2 of 3 atoms"),
        ("2\nx\nH 0 0\nH 0 0 1\n", "line 8: expected 4 columns (element x y z), found 3"),
        ("2\nx\nH 0 0 0\nH 0 zero 1\n", "line 9: expected a coordinate, found 'zero'"),
        ("2\nx\nH 0 0 0\nH 0 1_0 1\n", "line 9: expected a coordinate, found '1_0'"),
        ("2\nx\n# 0 0 0\nH 0 0 1\n", "line 8: expected an element, found '#'"),
        ("1\nx\nH 0 0 0\nH 0 0 1\n", "line 9: expected the number of atoms, found 'H 0 0 1'"),
        ("-2\nx\nH 0 0 0\nH 0 0 1\n", "line 6: expected the number of atoms, found '-2'"),
        ("99999999999\nx\nH 0 0 0\n", "line 8: the text ends after 1 of 99999999999 atoms"),
        ("2.0\nx\nH 0 0 0\n", "line 6: expected the number of atoms, found '2.0'"),
        ("2\n", "line 6: the text ends after 0 of 2 atoms"),
    ],
)
def test_whole_frames_before_the_damage_are_kept(tmp_path: Path, damage: str, line: str) -> None:
    water, *rest = read_text(tmp_path, WATER + damage)
    failure = rest[-1]
    assert isinstance(water, Molecule)
    assert isinstance(failure, Failure)
    assert (failure.message.code, failure.message.text) == ("parse-error", line)
    assert [item.index for item in rest] == list(range(1, len(rest) + 1))
    assert len(rest) == (2 if "number of atoms" in line and damage.startswith("1") else 1)


def test_unknown_element_costs_its_own_frame_only(tmp_path: Path) -> None:
    found = read_text(tmp_path, WATER + WATER.replace("O  ", "Qq ") + WATER)
    assert codes(found) == ["H2O", "unsupported-element", "H2O"]
    assert [item.index for item in found] == [0, 1, 2]
    assert find_error(next(iter(read_text(tmp_path, "1\n\nX 0 0 0\n")))).code == "unsupported-element"  # type: ignore


def test_frame_without_atoms_and_nan_are_left_to_the_checks(tmp_path: Path) -> None:
    empty, nan = read_text(tmp_path, "0\n\n1\n\nH 0 nan 0\n")
    assert isinstance(empty, Molecule)
    assert isinstance(nan, Molecule)
    assert (find_error(empty).code, find_error(nan).code) == (  # type: ignore[union-attr]
        "no-atoms",
        "non-finite-coordinates",
    )


def test_bytes_that_are_not_utf8_spoil_only_the_comment(tmp_path: Path) -> None:
    (molecule,) = read_text(tmp_path, WATER.replace("water", "eau de Köln").encode("latin-1"))
    assert molecule.name == "eau de K\ufffdln"


finite = st.floats(-1e6, 1e6, allow_subnormal=False)
atoms = st.lists(st.tuples(st.sampled_from(["H", "C", "N", "O", "F", "Cl"]), finite, finite, finite), max_size=9)


@given(frames=st.lists(st.tuples(atoms, st.text(st.characters(exclude_categories=["C", "Z"]))), max_size=4))
def test_xyz_round_trip(frames: list[tuple[list[tuple[str, float, float, float]], str]]) -> None:
    text = "".join(
        f"{len(rows)}\n#{comment}\n" + "".join(f"{s} {x!r} {y!r} {z!r}\n" for s, x, y, z in rows)
        for rows, comment in frames
    )
    found = list(read_xyz(Lines(io.StringIO(text)), "text"))
    assert len(found) == len(frames)
    for molecule, (rows, _) in zip(found, frames, strict=True):
        assert isinstance(molecule, Molecule)
        assert molecule.numbers.tolist() == ase.Atoms([row[0] for row in rows]).numbers.tolist()
        assert molecule.positions.tolist() == [list(row[1:]) for row in rows]


def test_extended_xyz_written_by_ase_is_read_back(tmp_path: Path) -> None:
    atoms = ase.Atoms("CO", [[0, 0, 0], [0, 0, 1.13]], info={"name": "carbon monoxide", "charge": 1})
    atoms.arrays["forces"] = np.ones((2, 3))
    ase.io.write(tmp_path / "co.extxyz", [atoms, ase.Atoms("C", cell=[2, 2, 2], pbc=True)])
    molecule, crystal = read_paths(tmp_path)
    assert isinstance(molecule, Molecule)
    assert isinstance(crystal, Molecule)
    assert (molecule.name, molecule.charge, molecule.periodic) == ("carbon monoxide", 1, False)
    assert crystal.periodic


# ---------------------------------------------------------------- sdf and mol


def test_damage_stays_within_its_sdf_record(tmp_path: Path) -> None:
    lines = SDF.splitlines(keepends=True)
    start = SDF[: SDF.index("acetonitrile")].count("\n")
    for broken in (
        lines[: start + 5] + lines[start + 6 :],  # an atom line is missing
        [*lines[: start + 5], lines[start + 5].replace(".", "x", 1), *lines[start + 6 :]],
        [line for i, line in enumerate(lines) if i < start or not line.startswith("M  END") or i > start + 20],
    ):
        first, second, third = read_text(tmp_path, "".join(broken), "three.sdf")
        assert (first.name, second.name, third.name) == ("acetaldehyde", "acetonitrile", "cyclopropane")
        assert isinstance(second, Failure)
        assert second.message.code == "parse-error"
        assert f"lines {start + 1}-" in second.message.text
        assert third.index == 2


def test_record_after_a_missing_separator_is_reported(tmp_path: Path) -> None:
    found = read_text(tmp_path, SDF.replace("$$$$\n", "", 1), "three.sdf")
    assert codes(found) == ["C2H4O", "parse-error", "C3H6"]
    assert [item.index for item in found] == [0, 1, 2]


def test_drawings_are_refused_and_planar_molecules_are_not(tmp_path: Path) -> None:
    planar = Chem.MolFromMolBlock(SDF[: SDF.index("$$$$")], removeHs=False)
    for atom in range(planar.GetNumAtoms()):
        x, y, _ = planar.GetConformer().GetAtomPosition(atom)
        planar.GetConformer().SetAtomPosition(atom, (x, y, 0.0))
    block = Chem.MolToMolBlock(planar)
    assert "3D" in block
    v3000 = Chem.MolToV3KMolBlock(planar)
    drawn = [block.replace("3D", "2D", 1), v3000.replace("3D", "2D", 1)]
    flat = [block, v3000, block.replace("3D", "  ", 1)]
    assert codes(read_text(tmp_path, "$$$$\n".join(flat), "flat.sdf")) == ["C2H4O"] * 3
    assert codes(read_text(tmp_path, "$$$$\n".join(drawn), "drawn.sdf")) == ["no-3d-coordinates"] * 2


def test_charges_and_hydrogens_are_as_written(tmp_path: Path) -> None:
    ammonium = Chem.AddHs(Chem.MolFromSmiles("[NH4+]"))
    AllChem.EmbedMolecule(ammonium, randomSeed=7)
    for block in (Chem.MolToMolBlock(ammonium), Chem.MolToV3KMolBlock(ammonium)):
        (molecule,) = read_text(tmp_path, block, "ammonium.mol")
        assert isinstance(molecule, Molecule)
        assert (molecule.formula, molecule.charge) == ("H4N", 1)
    (bare,) = read_text(tmp_path, Chem.MolToMolBlock(Chem.RemoveAllHs(ammonium)), "bare.mol")
    assert isinstance(bare, Molecule)
    assert bare.formula == "N"


def test_rdkit_molecules_without_coordinates_are_refused() -> None:
    mol = Chem.AddHs(Chem.MolFromSmiles("C"))
    assert codes([from_rdkit(mol, source="rdkit", index=4)]) == ["no-3d-coordinates"]
    AllChem.Compute2DCoords(mol)
    assert codes([from_rdkit(mol, source="rdkit", index=4)]) == ["no-3d-coordinates"]
    AllChem.EmbedMolecule(mol, randomSeed=7)
    molecule = from_rdkit(mol, source="rdkit", index=4)
    assert isinstance(molecule, Molecule)
    assert (molecule.formula, molecule.source, molecule.index) == ("CH4", "rdkit", 4)


def test_mdl_records_keep_their_text(tmp_path: Path) -> None:
    fields = "> <ID>\n7\n\n>  <note>  (3)\ntwo\nlines\n\n"
    blocks = [block.lstrip("\n") for block in SDF.split("$$$$\n")[:3]]
    molecules = read_text(tmp_path, "".join(f"{block}{fields}$$$$\n" for block in blocks), "three.sdf")
    bare = read_text(tmp_path, blocks[0].rstrip("\n"), "bare.mol")
    for molecule, block in zip(molecules + bare, [*blocks, ""], strict=True):
        assert isinstance(molecule, Molecule)
        assert molecule.remarks == ()
        assert molecule.origin is not None
        if block:
            assert molecule.origin.startswith(block[: block.index("M  END") + 7])
            assert molecule.origin.endswith(fields.rstrip("\n") + "\n") or molecule.origin.endswith(fields)
        mol = Chem.MolFromMolBlock(molecule.origin, removeHs=False)
        assert mol.GetNumAtoms() == len(molecule.numbers)
    long = f"{blocks[0]}> <ID>\n" + ("7" * 99 + "\n") * 20_000 + "\n$$$$\n" + blocks[1]
    first, second = read_text(tmp_path, long, "long.sdf")
    assert isinstance(first, Molecule)
    assert isinstance(second, Molecule)
    assert (first.origin, [remark.code for remark in first.remarks]) == (None, ["fields-dropped"])
    assert second.origin is not None
    (water,) = read_text(tmp_path, WATER)
    assert isinstance(water, Molecule)
    assert water.origin is None


# ---------------------------------------------------------------- ase


def test_databases_are_read_in_order_and_never_changed(tmp_path: Path) -> None:
    from ase.db import connect

    names = [f"number {k}" for k in range(250)]
    for suffix in ("db", "json"):
        with connect(tmp_path / f"many.{suffix}") as database:
            for k, name in enumerate(names[: 250 if suffix == "db" else 3]):
                positions = [[0, 0, 0], [0, 0, 0.9 + k / 1000]]
                database.write(ase.Atoms("HF", positions, charges=[k % 2, 0]), name=name)
    found = list(read_paths(tmp_path))  # of .json files a folder takes none
    assert [(item.name, item.index) for item in found] == [(name, k) for k, name in enumerate(names)]
    assert [item.charge for item in found[:3] if isinstance(item, Molecule)] == [0, 1, 0]
    assert [item.name for item in read_paths(tmp_path / "many.json")] == names[:3]
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE thumbs (id)")
    before = other.read_bytes()
    assert len(list(read_paths(tmp_path))) == 250
    assert codes(list(read_paths(other))) == ["parse-error"]
    assert other.read_bytes() == before
    packed = tmp_path / "packed.db.gz"
    packed.write_bytes(gzip.compress((tmp_path / "many.db").read_bytes()))
    assert len(list(read_paths(packed))) == 250


def test_a_crystal_is_refused_with_the_reason(tmp_path: Path) -> None:
    ase.io.write(tmp_path / "salt.cif", ase.Atoms("NaCl", [[0, 0, 0], [0, 0, 2.8]], cell=[5.6] * 3, pbc=True))
    (crystal,) = read_paths(tmp_path)
    assert isinstance(crystal, Molecule)
    assert find_error(crystal).code == "periodic"  # type: ignore[union-attr]


def test_readers_of_ase_that_miss_the_end_are_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ase.io.formats import ioformats

    def read_endlessly(file: io.TextIOBase, index: object) -> None:
        while "END" not in file.readline():
            pass

    monkeypatch.setattr(type(ioformats["gen"]), "read", property(lambda self: read_endlessly))
    assert codes(read_text(tmp_path, "2 C\nH\n", "x.gen")) == ["parse-error"]


@pytest.mark.parametrize("suffix", ["json", "traj", "gen", "xsf", "pdb", "cube", "db"])
def test_formats_of_ase(tmp_path: Path, suffix: str) -> None:
    atoms = ase.Atoms("OCH2", [[0, 0, 1.2], [0, 0, 0], [0, 0.94, -0.59], [0, -0.94, -0.59]])
    path = tmp_path / f"form@aldehyde #1.{suffix}"
    with path.open("wb" if suffix == "traj" else "w") as file:
        if suffix != "db":
            ase.io.write(file, atoms, format="proteindatabank" if suffix == "pdb" else suffix)
    if suffix == "db":
        path.unlink()
        ase.io.write(path, atoms, format="db")
    (molecule,) = read_paths([path])
    assert isinstance(molecule, Molecule), molecule.message
    assert (molecule.formula, molecule.source, molecule.periodic) == ("CH2O", str(path), False)
    np.testing.assert_allclose(molecule.positions, atoms.positions, atol=1e-3)


def test_all_frames_of_an_ase_format(tmp_path: Path) -> None:
    frames = [ase.Atoms("HF", [[0, 0, 0], [0, 0, 0.9 + 0.1 * i]]) for i in range(3)]
    ase.io.write(tmp_path / "scan.traj", frames)
    found = [item for item in read_paths([tmp_path / "scan.traj"]) if isinstance(item, Molecule)]
    assert [(item.index, round(item.positions[1, 2], 6)) for item in found] == [(0, 0.9), (1, 1.0), (2, 1.1)]


def test_failure_of_ase_is_one_line(tmp_path: Path) -> None:
    for name in ("broken.json", "broken.cube", "broken.gen", "broken.cif"):
        (failure,) = read_text(tmp_path, "{ this is\nnot what the suffix says\n", name)
        assert isinstance(failure, Failure)
        assert failure.message.code in ("parse-error", "no-molecules")
        assert "\n" not in failure.message.text


@pytest.mark.parametrize(
    ("change", "charge", "periodic"),
    [
        ({}, 0, False),
        ({"charges": [0.6, 0.4]}, 1, False),
        ({"charges": [0.6, 0.4], "info": {"charge": -1}}, -1, False),
        ({"info": {"charge": "much"}}, 0, False),
        ({"cell": [9, 9, 9]}, 0, False),
        ({"cell": [9, 9, 9], "pbc": [True, False, False]}, 0, True),
        ({"pbc": True}, 0, False),
    ],
)
def test_from_ase(change: dict[str, object], charge: int, periodic: bool) -> None:
    molecule = from_ase(ase.Atoms("HF", [[0, 0, 0], [0, 0, 0.9]], **change), source="ase", index=2)
    assert (molecule.charge, molecule.periodic, molecule.index) == (charge, periodic, 2)


# ---------------------------------------------------------------- paths


def test_folder_is_walked_in_order_without_hidden_files_and_loops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data"
    (folder / "b" / ".hidden").mkdir(parents=True)
    for name in ("b/2.XYZ", "b/10.xyz", "a.xyz", "c.xyz", ".secret.xyz", "b/.hidden/x.xyz", "notes.txt"):
        (folder / name).write_text(WATER)
    (folder / "b" / "up").symlink_to(folder, target_is_directory=True)
    (folder / "dangling.xyz").symlink_to("nowhere")
    (folder / "dangling.txt").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.xyz")
    monkeypatch.chdir(tmp_path)
    found = list(read_paths(["./data/"]))
    assert [item.source for item in found] == [
        str(Path("data") / name) for name in ("a.xyz", "b/10.xyz", "b/2.XYZ", "c.xyz", "dangling.xyz")
    ]
    assert codes(found) == ["H2O"] * 4 + ["missing-file"]
    assert [item.source for item in read_paths(["data/**/*.xyz"])] == [
        "data/a.xyz", "data/b/10.xyz", "data/c.xyz", "data/dangling.xyz"
    ]  # fmt: skip


def test_existing_names_win_over_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["a b.xyz", "x@1.xyz", "#1.xyz", "[1].xyz", "wat*r.xyz", "água.xyz", "-"]
    for name in names:
        Path(name).write_text(WATER)
    assert [(item.source, item.name) for item in read_paths(names[:-1])] == [(name, "water") for name in names[:-1]]
    assert [item.source for item in read_paths(["[12].xyz", "x?1.xyz"])] == ["[12].xyz", "x@1.xyz"]
    assert codes(list(read_paths(["[12].xyz"]))) == ["no-molecules"]
    assert codes(list(read_paths(["./-"]))) == ["H2O"]
    assert codes(list(read_paths(["?"]))) == ["H2O"]  # a matched "-" is that file, not stdin


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("empty.xyz", b"", "empty-file"),
        ("blank.sdf", b"\n \n\n", "empty-file"),
        ("blank", b"\n \n\n\n\n\n", "empty-file"),
        ("water.xyz.gz", gzip.compress(WATER.encode()), "H2O"),
        ("picture.png", b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", "unknown-format"),
        ("noise", bytes(range(256)) * 100, "unknown-format"),
        ("noise.xyz", bytes(range(256)) * 100, "parse-error"),
        ("utf16.xyz", WATER.encode("utf-16"), "parse-error"),
        ("notes.txt", b"buy milk\n", "unknown-format"),
        ("postgresql:x", b"buy milk\n", "unknown-format"),
        ("line.xyz", b"1\n" + b"x" * 2_000_000 + b"\nH 0 0 0\n", "parse-error"),
        ("line.sdf", b"x" * 2_000_000, "parse-error"),
        ("water", WATER.encode(), "H2O"),
        ("water.log", WATER.encode(), "H2O"),
        ("three.txt", SDF[: SDF.index("$$$$")].encode(), "C2H4O"),
        ("2244", ("2244" + SDF[12 : SDF.index("$$$$")]).encode(), "C2H4O"),  # PubChem's titles are numbers
    ],
)
def test_content_decides_where_the_suffix_does_not(tmp_path: Path, name: str, content: bytes, code: str) -> None:
    found = read_text(tmp_path, content, name)
    assert codes(found) == [code]
    assert found[0].index == 0


def test_inputs_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "water.xyz").write_text(WATER)
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop.xyz").symlink_to("loop.xyz")
    inputs = ["nowhere.xyz", "", "nul\0.xyz", "x" * 5000, "empty", "loop.xyz", "water.xyz/x", "nul\0[1]"]
    monkeypatch.chdir(tmp_path)
    assert codes(list(read_paths(inputs))) == [
        "missing-file", "missing-file", "missing-file", "unreadable", "no-molecules", "unreadable", "missing-file",
        "no-molecules",
    ]  # fmt: skip
    assert codes(list(read_file("nowhere.xyz"))) == ["missing-file"]

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(builtins, "open", refuse)
    (failure,) = read_paths("water.xyz")
    assert isinstance(failure, Failure)
    assert (failure.message.code, failure.message.text) == ("unreadable", "Permission denied.")


def test_file_names_that_are_not_utf8_give_printable_sources(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/w\xff.xyz"
    Path(os.fsdecode(path)).write_text(WATER)
    (water,) = read_paths(tmp_path)
    assert water.source.encode("utf-8").endswith("/w\ufffd.xyz".encode())


@pytest.mark.parametrize("input_format", [None, "xyz", "sdf", "pdb"])
def test_endless_devices_end_with_a_failure(input_format: str | None) -> None:
    found = list(read_paths(["/dev/zero"], input_format=input_format))
    assert codes(found) == [{None: "unknown-format"}.get(input_format, "parse-error")]


def test_pipe_is_read_like_a_file(tmp_path: Path) -> None:
    for content, formula in ((WATER, "H2O"), (SDF[: SDF.index("$$$$")], "C2H4O")):
        pipe = tmp_path / f"pipe-{formula}"
        os.mkfifo(pipe)
        writer = threading.Thread(target=pipe.write_text, args=(content,))
        writer.start()
        assert codes(list(read_paths(pipe))) == [formula]
        writer.join()


@pytest.mark.parametrize("input_format", ["mol3", "", "postgresql", "bundletrajectory"])
def test_unknown_input_format_is_wrong_usage_at_once(input_format: str) -> None:
    with pytest.raises(UsageError, match="unknown input format"):
        read_paths(["-"], input_format=input_format)


def test_input_format_overrides_the_suffix(tmp_path: Path) -> None:
    (tmp_path / "water.pdb").write_text(WATER)
    assert codes(list(read_paths([tmp_path / "water.pdb"], input_format="extxyz"))) == ["H2O"]
    assert codes(list(read_paths([EXAMPLES / "formamide.pdb"], input_format="proteindatabank"))) == ["CH3NO"]


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "zst"])
def test_compressed_files_take_their_format_from_the_inner_suffix(tmp_path: Path, suffix: str) -> None:
    compress = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    compress["zst"] = zstandard.ZstdCompressor().compress
    (tmp_path / f"three.SDF.{suffix}").write_bytes(compress[suffix](SDF.encode()))
    (tmp_path / "named otherwise.mol").write_bytes(compress[suffix](SDF.encode()))
    (tmp_path / f"cut.xyz.{suffix}").write_bytes(compress[suffix]((WATER * 9).encode())[:-2])
    (tmp_path / f"results.json.{suffix}").write_bytes(compress[suffix](b"[]"))
    found = list(read_paths(tmp_path))
    three = ["C2H4O", "C2H3N", "C3H6"]
    cut = codes(found)[: -2 * len(three)]
    assert codes(found) == [*["H2O"] * (len(cut) - 1), "unreadable", *three * 2]
    assert [item.index for item in found[: len(cut)]] == list(range(len(cut)))


def test_archives_are_read_member_by_member(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {
            "z/water.xyz": WATER, "b.sdf.gz": gzip.compress(SDF.encode()), "notes.txt": "x", "c.xyz": "2\n",
        }.items():  # fmt: skip
            archive.writestr(name, content)
    found = list(read_paths(tmp_path / "a.zip"))
    assert codes(found) == ["C2H4O", "C2H3N", "C3H6", "parse-error", "H2O"]
    assert [item.source.removeprefix(str(tmp_path)) for item in found[2:]] == [
        "/a.zip/b.sdf.gz", "/a.zip/c.xyz", "/a.zip/z/water.xyz"
    ]  # fmt: skip
    assert codes(list(read_paths(tmp_path / "a.zip", pattern="*.zip"))) == ["unknown-format"]
    data = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(data[: len(data) // 2])
    assert codes(list(read_paths(tmp_path / "cut.zip"))) == ["unreadable"]


def test_patterns_choose_the_files_of_a_folder(tmp_path: Path) -> None:
    for name in ("a.xyz", "b.log", "sub/c.log", "sub/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(WATER)
    assert [Path(item.source).name for item in read_paths(tmp_path, pattern="*.log")] == ["b.log", "c.log"]
    several = read_paths(tmp_path, pattern=["?.txt", "b*"])
    assert [Path(item.source).name for item in several] == ["b.log", "d.txt"]
    (failure,) = read_paths(tmp_path, pattern="*.sdf")
    assert isinstance(failure, Failure)
    assert failure.message.text == "The folder holds no file that matches the pattern."


def test_a_file_that_vanishes_or_is_forbidden_is_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.xyz", "b.xyz", "c.xyz"):
        (tmp_path / name).write_text(WATER)
    found = read_paths(tmp_path)
    first = next(found)
    (tmp_path / "b.xyz").unlink()
    assert codes([first, *found]) == ["H2O", "missing-file", "H2O"]
    real = builtins.open

    def refuse(path: object, *args: object, **kwargs: object) -> object:
        if str(path).endswith("a.xyz"):
            raise PermissionError(13, "Permission denied")
        return real(path, *args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(builtins, "open", refuse)
    assert codes(list(read_paths(tmp_path))) == ["unreadable", "H2O"]


# ---------------------------------------------------------------- stdin


class SlowInput(io.RawIOBase):
    """A pipe that gives one frame per read and fails the test if it is read ahead of the molecules."""

    def __init__(self, frame: str, allowed: int) -> None:
        self.frame, self.allowed = frame.encode(), allowed

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        assert self.allowed > 0, "read ahead"
        self.allowed -= 1
        buffer[: len(self.frame)] = self.frame
        return len(self.frame)


@pytest.mark.parametrize("frame", [WATER, SDF[: SDF.index("$$$$") + 5]], ids=["xyz", "sdf"])
def test_stdin_streams(monkeypatch: pytest.MonkeyPatch, frame: str) -> None:
    raw = SlowInput(frame, allowed=2)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(raw)))
    found: Iterator[Molecule | Failure] = read_paths(["-"])
    for index in range(5):
        molecule = next(found)
        assert isinstance(molecule, Molecule)
        assert (molecule.source, molecule.index) == ("-", index)
        raw.allowed += 1


@pytest.mark.parametrize(
    ("content", "input_format", "expected"),
    [
        (WATER * 2, None, ["H2O", "H2O"]),
        (SDF, None, ["C2H4O", "C2H3N", "C3H6"]),
        (SDF, "mol", ["C2H4O", "C2H3N", "C3H6"]),
        ((EXAMPLES / "formamide.pdb").read_text(), "pdb", ["CH3NO"]),
        ((EXAMPLES / "formamide.pdb").read_text(), None, ["CH3NO"]),
        ("CCO ethanol\nC(C\n", None, ["C2H6O", "bad-smiles"]),
        ("id,smiles\n1,C\n", None, ["CH4"]),
        ("", None, ["empty-file"]),
        ("", "pdb", ["empty-file"]),
        ("2\n", None, ["parse-error"]),
    ],
)
def test_stdin(monkeypatch: pytest.MonkeyPatch, content: str, input_format: str | None, expected: list[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    found = list(read_paths("-", input_format=input_format))
    assert codes(found) == expected
    assert {item.source for item in found} == {"-"}
    assert not sys.stdin.closed
    monkeypatch.setattr(sys, "stdin", io.StringIO(content))
    assert codes(list(read_paths("-", input_format=input_format))) == expected


def test_binary_format_of_ase_through_stdin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ase.io.write(tmp_path / "hf.traj", [ase.Atoms("HF", [[0, 0, 0], [0, 0, 0.9]])] * 2)
    with (tmp_path / "hf.traj").open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert codes(list(read_paths("-"))) == ["FH", "FH"]


# ---------------------------------------------------------------- whatever comes


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    original=st.sampled_from(
        [(name, (EXAMPLES / name).read_bytes()) for name in sorted(os.listdir(EXAMPLES)) if "benzamide" not in name]
    ),
)
def test_no_damage_raises(data: st.DataObject, original: tuple[str, bytes]) -> None:
    name, content = original
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(damaged)))
        damaged[start : start + data.draw(st.integers(0, 30))] = data.draw(
            st.one_of(
                st.binary(max_size=4), st.sampled_from([b"\n", b"$$$$\n", b"99999999999", b"-1", b"nan", b"M  END\n"])
            )
        )
    with tempfile.TemporaryDirectory() as folder:
        found = read_text(Path(folder), bytes(damaged), data.draw(st.sampled_from([name, "no suffix"])))
    assert found
    assert [item.index for item in found] == list(range(len(found)))
    for item in found:
        assert isinstance(item, Molecule | Failure)
        assert "\n" not in (item.name or "")


def test_reading_xyz_loads_neither_torch_nor_rdkit_nor_ase_io() -> None:
    code = (
        "import sys, qmprop.readers as r;"
        "loaded = {'ase', 'rdkit', 'torch'} & set(sys.modules); assert not loaded, loaded;"
        f"assert len(list(r.read_paths({str(EXAMPLES / 'water.xyz')!r}))) == 1;"
        "loaded = {'ase.io', 'rdkit', 'torch', 'scipy'} & set(sys.modules); assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
