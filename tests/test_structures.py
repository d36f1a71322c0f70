import io
import itertools
from dataclasses import replace

import numpy as np
import pytest
from ase.io import iread
from fakes import water
from hypothesis import given, settings
from hypothesis import strategies as st
from rdkit import Chem
from rdkit.Chem import PandasTools
from samples import alkane

from qmprop.datasets import load_labeled
from qmprop.molecule import Molecule
from qmprop.readers import read_paths
from qmprop.records import Domain, Message, Record, Value
from qmprop.rows import Layout
from qmprop.structures import MAX_BOND_ORDER_ATOMS, MAX_BONDED_ATOMS, ExtxyzWriter, SdfWriter
from qmprop.targets import parse_units

UNITS = {"mu": "D", "u0": "eV", "cv": "cal/(mol K)"}
LAYOUT = Layout(UNITS)
VALUES = {"mu": 1.8500000000000001, "u0": -2079.1234567890123, "cv": 6.0}
UNREAD = Record("gone.xyz", 0, status="error", messages=(Message("missing-file", "No such file."),), model="m@1")
WRITERS = {"extxyz": ExtxyzWriter, "sdf": SdfWriter}

METHANE = """methane
  made by hand

  5  4  0  0  0  0  0  0  0  0999 V2000
    0.0000    0.0000    0.0000 C   0  0  0  0  0  0  0  0  0  0  0  0
    0.6291    0.6291    0.6291 H   0  0  0  0  0  0  0  0  0  0  0  0
   -0.6291   -0.6291    0.6291 H   0  0  0  0  0  0  0  0  0  0  0  0
   -0.6291    0.6291   -0.6291 H   0  0  0  0  0  0  0  0  0  0  0  0
    0.6291   -0.6291   -0.6291 H   0  0  0  0  0  0  0  0  0  0  0  0
  1  2  1  0
  1  3  1  0
  1  4  1  0
  1  5  1  0
M  END
> <CAS number> (1)
74-82-8

> <two lines>
first
second

$$$$
"""


def answer(molecule, name="water", layout=LAYOUT, **fields):
    properties = {key: Value(VALUES[key], unit) for key, unit in layout.units.items()}
    fields = {"model": "m@1", "properties": properties} | fields
    return Record(molecule.source, molecule.index, name, molecule.formula, len(molecule.numbers), **fields)


def write(kind, pairs, layout=LAYOUT):
    writer = WRITERS[kind](layout)
    return writer.begin() + "".join(itertools.starmap(writer.write, pairs)) + writer.end()


def read_sdf(text):
    supplier = Chem.SDMolSupplier()
    supplier.SetData(text, sanitize=False, removeHs=False, strictParsing=False)
    return list(supplier)


def read_extxyz(text):
    return list(iread(io.StringIO(text), index=":", format="extxyz"))


def reread(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return list(read_paths(str(tmp_path / name)))


def test_a_frame_carries_the_predictions_as_ase_has_them():
    molecule = replace(
        water(source="my file.xyz", index=2, charge=-1), positions=np.random.default_rng(0).normal(size=(3, 3))
    )
    (atoms,) = read_extxyz(write("extxyz", [(answer(molecule), molecule)]))
    assert atoms.get_chemical_formula() == "H2O"
    assert (atoms.positions == molecule.positions).all()
    assert not atoms.pbc.any()
    units = "mu=D,u0=eV,cv=cal/(mol K)"
    assert atoms.info == VALUES | {
        "name": "water",
        "source": "my file.xyz",
        "index": 2,
        "status": "ok",
        "model": "m@1",
        "charge": -1,
        "units": units,
    }
    assert parse_units(atoms.info["units"])["cv"] == "cal/(mol K)"


def test_eval_takes_the_file_that_predict_wrote(tmp_path):
    path = tmp_path / "out.extxyz"
    path.write_text(write("extxyz", [(answer(water()), water())] * 2))
    targets = load_labeled(path).targets
    assert targets[1, [0, 7, 11]].tolist() == list(VALUES.values())
    assert np.isnan(targets[1, 1])


@pytest.mark.parametrize("kind", ["extxyz", "sdf"])
def test_there_are_as_many_records_as_came_in(kind, tmp_path):
    """Whatever became of them: readers of others find the same number in the same order."""
    silane = Molecule(np.array([14, 1]), np.array([[0.0, 0, 0], [0, 0, 1.5]]), index=1)
    broken = Molecule(np.array([1, 1]), np.array([[np.nan, 0, 0], [0, 0, 1e12]]), index=2)
    empty = Molecule(np.array([], dtype=int), np.empty((0, 3)), index=3)
    far = Molecule(np.array([1, 1]), np.array([[123456.789, 0, 0], [123457.5, 0, -98765.4]]), index=4)
    strange = Molecule(np.array([0, 200, 1]), np.arange(9.0).reshape(3, 3), index=5)
    failed = {"status": "error", "messages": (Message("atoms-too-close", 'Something; "odd".'),), "properties": {}}
    molecules = [silane, broken, empty, far, strange]
    pairs = [(UNREAD, None), *((answer(molecule, None, **failed), molecule) for molecule in molecules), (UNREAD, None)]
    text = write(kind, pairs)
    if kind == "extxyz":
        found = read_extxyz(text)
        assert [len(atoms) for atoms in found] == [0, 2, 2, 0, 2, 3, 0]
        assert [atoms.info["status"] for atoms in found] == ["error"] * 7
        assert found[0].info["messages"] == "missing-file: No such file."
        assert found[1].info["messages"] == 'atoms-too-close: Something; "odd".'
    else:
        found = read_sdf(text)
        assert [mol.GetNumAtoms() for mol in found] == [0, 2, 0, 0, 2, 3, 0]
        assert [mol.GetProp("qmprop_status") for mol in found] == ["error"] * 7
        assert found[4].GetConformer().GetAtomPosition(0).x == pytest.approx(123456.789, abs=1e-3)
    assert len(reread(tmp_path, f"out.{kind}", text)) == 7


def test_an_mdl_record_is_passed_on_with_its_own_fields():
    (molecule,) = (replace(water(), origin=METHANE),)
    text = write("sdf", [(answer(molecule, "methane"), molecule)])
    assert text.startswith(METHANE.removesuffix("$$$$\n"))
    (mol,) = read_sdf(text)
    fields = mol.GetPropsAsDict()
    assert (fields["CAS number"], fields["two lines"]) == ("74-82-8", "first\nsecond")
    assert fields["qmprop_mu"] == VALUES["mu"]
    assert fields["qmprop_units"] == "mu=D,u0=eV,cv=cal/(mol K)"
    assert mol.GetNumBonds() == 4


@pytest.mark.parametrize(
    "origin", [METHANE, METHANE.partition(">")[0], METHANE.removesuffix("\n$$$$\n"), METHANE + "\n\n"]
)
def test_the_fields_of_an_earlier_run_are_replaced(origin):
    molecule = replace(water(), origin=origin)
    once = write("sdf", [(answer(molecule, "methane"), molecule)])
    other = Layout({"cv": "J/(mol K)"})
    again = write("sdf", [(answer(molecule, "methane", other), replace(molecule, origin=once))], other)
    assert again == write("sdf", [(answer(molecule, "methane", other), molecule)], other)
    assert len(read_sdf(again + once)) == 2
    assert again.count("qmprop_") == 6


def test_a_file_read_and_written_keeps_all_its_records(tmp_path):
    molecules = reread(tmp_path, "in.sdf", METHANE + METHANE.replace("methane", "other") + METHANE)
    text = write("sdf", [(answer(molecule, molecule.name), molecule) for molecule in molecules])
    assert [mol.GetProp("_Name") for mol in read_sdf(text)] == ["methane", "other", "methane"]
    assert [mol.GetProp("CAS number") for mol in read_sdf(text)] == ["74-82-8"] * 3


def test_pandas_tools_reads_the_predictions_as_columns():
    frame = PandasTools.LoadSDF(io.BytesIO(write("sdf", [(answer(water()), water())] * 3).encode()), removeHs=False)
    assert frame["qmprop_mu"].astype(float).tolist() == [VALUES["mu"]] * 3
    assert frame["ID"].tolist() == ["water"] * 3


def test_bonds_come_from_the_distances(molecules):
    """Bond orders, charges of zwitterions included: every molecule of QM9 is sane to RDKit."""
    text = write("sdf", [(answer(molecule), molecule) for molecule in molecules])
    for mol, molecule in zip(read_sdf(text), molecules, strict=True):
        Chem.SanitizeMol(mol)
        assert [atom.GetAtomicNum() for atom in mol.GetAtoms()] == molecule.numbers.tolist()
        assert len(Chem.GetMolFrags(mol)) == 1
        assert not any(atom.GetNumRadicalElectrons() for atom in mol.GetAtoms())
        assert np.abs(mol.GetConformer().GetPositions() - molecule.positions).max() < 1e-4
        assert mol.GetConformer().Is3D()


def test_a_radical_has_single_bonds_and_an_ion_its_charge():
    radical = Molecule(np.array([8, 1]), np.array([[0.0, 0, 0], [0, 0, 0.97]]))
    ion = replace(radical, charge=-1)
    first, second = read_sdf(write("sdf", [(answer(radical), radical), (answer(ion), ion)]))
    assert (first.GetNumBonds(), second.GetNumBonds()) == (1, 1)
    assert Chem.GetFormalCharge(second) == -1
    assert second.GetIntProp("qmprop_charge") == -1
    assert not first.HasProp("qmprop_charge")


@pytest.mark.parametrize("count", [MAX_BOND_ORDER_ATOMS + 1, 1001, MAX_BONDED_ATOMS + 1])
def test_a_large_molecule_is_written_soon(count):
    chain = alkane(count // 3 + 1)
    molecule = Molecule(chain.numbers[:count], chain.positions[:count])
    (mol,) = read_sdf(text := write("sdf", [(answer(molecule), molecule)]))
    assert mol.GetNumAtoms() == count
    assert ("V3000" in text) == (count > 999)
    assert (mol.GetNumBonds() > 0) == (count <= MAX_BONDED_ATOMS)


def test_a_crystal_is_written_soon():
    """Looking for its rings would take RDKit hours."""
    grid = np.stack(np.unravel_index(np.arange(1000), (10, 10, 10)), axis=1) * 1.5
    molecule = Molecule(np.full(1000, 6), grid)
    (mol,) = read_sdf(write("sdf", [(answer(molecule), molecule)]))
    assert (mol.GetNumAtoms(), mol.GetNumBonds()) == (1000, 0)


@pytest.mark.parametrize("name", ["$$$$", "M  END", "> <x>", "$MDL", "a\nb\t c", "  ", "é" * 300])
def test_no_name_breaks_the_file(name, tmp_path):
    molecule = water(source=name)
    pairs = [(answer(molecule, name), molecule), (replace(UNREAD, name=name), None)] * 2
    for kind in WRITERS:
        found = reread(tmp_path, f"out.{kind}", write(kind, pairs))
        assert [len(item.numbers) for item in found] == [3, 0, 3, 0]
        assert {item.name for item in found} == {" ".join(name.split()) or None}
    assert len(read_sdf(write("sdf", pairs))) == 4
    assert len(read_extxyz(write("extxyz", pairs))) == 4


@given(st.text(max_size=12), st.text(max_size=12))
@settings(max_examples=50, deadline=None)
def test_any_text_leaves_the_file_readable(name, text):
    record = Record(text, 0, name, status="error", messages=(Message("parse-error", text),), model="m@1")
    for kind, read in (("extxyz", read_extxyz), ("sdf", read_sdf)):
        found = read(write(kind, [(record, water()), (UNREAD, None)]))
        assert len(found) == 2
    assert found[0].GetProp("qmprop_status") == "error"


def test_intervals_the_domain_and_seen_molecules_stand_beside_the_values():
    fields = {"domain": Domain("out", 2.5, ("flat-geometry",)), "interval_level": 0.9, "seen": ("gdb_4", "gdb_9")}
    record = Record("a", 0, properties={"mu": Value(1.85, "D", (1.8, 1.9))}, **fields)
    expected = {"mu": 1.85, "mu_low": 1.8, "mu_high": 1.9, "domain": "out", "domain_score": 2.5}
    expected |= {"seen": "gdb_4 gdb_9", "interval_level": 0.9}
    layout = Layout({"mu": "D"}, 0.9, judged=True)
    (atoms,) = read_extxyz(write("extxyz", [(record, water())], layout))
    (mol,) = read_sdf(write("sdf", [(record, water())], layout))
    assert expected.items() <= atoms.info.items()
    assert {f"qmprop_{key}": value for key, value in expected.items()}.items() <= mol.GetPropsAsDict().items()


def test_what_there_is_not_leaves_no_entry():
    record = Record("a", 0, properties={"mu": Value(1.85, "D")})
    (atoms,) = read_extxyz(write("extxyz", [(record, water())], Layout({"mu": "D"}, 0.9, judged=True)))
    assert set(atoms.info) == {"source", "index", "status", "mu", "units", "charge"}
