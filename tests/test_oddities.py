"""What is odd about a geometry, and what is not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import ase.build
import numpy as np
import pytest
from samples import alkane, embed, join, move, pair_up, read_molecules

from qmprop.limits import Limits
from qmprop.molecule import Molecule
from qmprop.oddities import find_oddities
from qmprop.records import MESSAGE_CODES
from qmprop.topology import find_bonds

#: Learned from DFT and MMFF94 geometries of 20,000 training molecules.
LIMITS = Limits.from_arrays(
    {
        name: np.array(values, dtype=np.float64)
        for name, values in json.loads((Path(__file__).parent / "data" / "limits.json").read_text()).items()
    }
)


def build(name: str) -> Molecule:
    atoms = ase.build.molecule(name)
    return Molecule(atoms.numbers, atoms.positions)


def judge(*molecules: Molecule) -> list[tuple]:
    numbers, positions, offsets, first, second = pair_up(*molecules)
    bonds = find_bonds(numbers, positions, first, second)
    return find_oddities(numbers, positions, offsets, bonds, first, second, LIMITS)


def codes(molecule: Molecule) -> list[str]:
    return [message.code for message in judge(molecule)[0]]


def text_of(molecule: Molecule) -> str:
    ((message,),) = judge(molecule)
    return message.text


def take(molecule: Molecule, keep: object) -> Molecule:
    return replace(molecule, numbers=molecule.numbers[keep], positions=molecule.positions[keep])


def stretch(molecule: Molecule, fixed: int, moved: list[int], by: float) -> Molecule:
    """Return the molecule with atoms moved along the bond from `fixed` to the first of them (Å)."""
    positions = molecule.positions.copy()
    arm = positions[moved[0]] - positions[fixed]
    positions[moved] += by * arm / np.linalg.norm(arm)
    return replace(molecule, positions=positions)


def draw(smiles: str, *, hydrogens: bool, length: float = 1.5) -> Molecule:
    from rdkit import Chem
    from rdkit.Chem import rdDepictor

    mol = Chem.MolFromSmiles(smiles)
    mol = Chem.AddHs(mol) if hydrogens else mol
    rdDepictor.Compute2DCoords(mol)
    numbers = np.array([atom.GetAtomicNum() for atom in mol.GetAtoms()])
    return Molecule(numbers, mol.GetConformer().GetPositions() * (length / 1.5))


@pytest.mark.parametrize(
    "name",
    ["CO", "N2", "F2", "O3", "HCN", "CO2", "H2CO", "H2", "H2O", "HF", "NH3", "CH4", "C2H2", "C2F4", "C6H6", "CH3NO2"]
    + ["NF3", "F2O", "H2O2", "N2H4", "C4H4NH", "C5H5N", "H2CCO", "CH3CN", "CF4", "butadiene", "cyclobutene", "N2O"]
    + ["bicyclobutane", "methylenecyclopropane", "HCOOH", "C3H4_D2d", "CH3ONO", "C3H4_C3v", "NCCN"],
)
def test_small_molecules_are_fine(name):
    assert judge(build(name)) == [()]


@pytest.mark.parametrize(
    "smiles",
    ["CC(=O)Oc1ccccc1C(=O)O", "[C-]#[N+]C", "CN=[N+]=[N-]", "O=[N+]([O-])c1ccccc1", "[NH3+]CC(=O)[O-]"]
    + ["C12C3C4C1C5C2C3C45", "CC(C)CC(NC(=O)C(N)CO)C(=O)NCC(=O)N1CCCC1C(=O)O", "C#CC#CC#C", "C=C=C", "NC=O"]
    + ["C[N+](C)(C)[O-]", "CN1C=NC2=C1C(=O)N(C)C(=O)N2C", "OC1=C(O)C(=O)OC1C(O)CO", "FC(F)(F)C(F)(F)F"],
)
def test_force_field_minima_are_fine(smiles):
    assert judge(embed(smiles)[0]) == [()]


def test_molecules_of_qm9_are_fine_in_a_batch_and_so_is_a_long_one():
    assert judge(*read_molecules(), alkane(1000)) == [()] * 21


def test_small_noise_is_no_oddity_but_large_noise_is():
    molecules = read_molecules() * 5
    random = np.random.default_rng(0)
    odd = {}
    for size in (0.02, 0.1, 0.3):
        noisy = [replace(m, positions=m.positions + size * random.normal(size=m.positions.shape)) for m in molecules]
        odd[size] = sum(bool(messages) for messages in judge(*noisy))
    assert odd[0.02] <= 2
    assert odd[0.1] >= 60
    assert odd[0.3] >= 95


@pytest.mark.parametrize(
    "name", ["CH4", "C2H6", "C6H6", "CH3OH", "H3CNH2", "H2O", "NH3", "HCOOH", "CH3CN", "C2H4", "C2H2"]
)
def test_missing_hydrogens(name):
    """One, two or all hydrogens are gone."""
    molecule = build(name)
    hydrogens = np.flatnonzero(molecule.numbers == 1)
    for gone in (hydrogens[:1], hydrogens[-1:], hydrogens[-2:], hydrogens):
        assert codes(take(molecule, ~np.isin(np.arange(len(molecule.numbers)), gone))) == ["missing-hydrogens"]


def test_missing_hydrogens_are_said_once():
    molecule, _ = embed("CC(=O)Oc1ccccc1C(=O)O")
    assert text_of(take(molecule, molecule.numbers > 1)) == (
        "Too few bonds: C1, C6, C7 and 3 more; are hydrogen atoms missing?"
    )


@pytest.mark.parametrize("by", [0.15, 0.25, 0.4])
@pytest.mark.parametrize("name", ["CH4", "H2O", "C6H6", "HCN"])
def test_a_stretched_bond_to_hydrogen_is_strain(name, by):
    molecule = build(name)
    hydrogen = int(np.flatnonzero(molecule.numbers == 1)[0])
    distances = np.linalg.norm(molecule.positions - molecule.positions[hydrogen], axis=1)
    owner = int(np.argsort(distances)[1])
    assert codes(stretch(molecule, owner, [hydrogen], by)) == ["strained-geometry"]


def test_a_strained_bond_is_named():
    methane = build("CH4")
    arm = methane.positions[1] - methane.positions[0]
    text = text_of(stretch(methane, 0, [1], 1.5 - float(np.linalg.norm(arm))))
    assert text == "C1 and H2 are 1.50 Å apart; such a bond is 1.06 to 1.12 Å long."


@pytest.mark.parametrize(
    ("name", "by"), [("C2H6", 0.5), ("C2H6", 0.7), ("C2H4", 0.3), ("C2H4", 0.6), ("C2H2", 0.3), ("H3CNH2", 0.4)]
)
def test_a_stretched_bond_of_heavy_atoms_is_strain(name, by):
    molecule = build(name)
    heavy = np.flatnonzero(molecule.numbers > 1)
    distances = np.linalg.norm(molecule.positions[:, None] - molecule.positions[heavy], axis=2)
    half = np.flatnonzero(distances.argmin(axis=1) == 1)
    moved = [int(heavy[1])] + [int(atom) for atom in half if atom != heavy[1]]
    assert codes(stretch(molecule, int(heavy[0]), moved, by)) == ["strained-geometry"]


def test_several_fragments():
    water = build("H2O")
    dimer = join(water, move(water, by=(0.0, 0.0, 3.0)))
    assert text_of(dimer) == "2 fragments that no bond connects; they begin at O1, O4."
    many = join(*(move(water, by=(0.0, 4.0 * k, 0.0)) for k in range(6)))
    assert text_of(many) == "6 fragments that no bond connects; they begin at O1, O4, O7 and 3 more."
    far = stretch(build("CH4"), 0, [1], 3.0)
    assert codes(far) == ["several-fragments"]


def test_close_contacts():
    benzene = build("C6H6")
    stacked = join(benzene, move(benzene, by=(0.0, 0.0, 2.0)))
    found = {message.code: message.text for message in judge(stacked)[0]}
    assert list(found) == ["several-fragments", "close-contact"]
    assert "are 2.00 Å apart; without a bond they keep" in found["close-contact"]
    merged = join(build("CH4"), move(build("CH4"), by=(1.2, 0.3, 0.1)))
    assert "close-contact" in codes(merged)


@pytest.mark.parametrize("length", [0.825, 1.0, 1.5])
@pytest.mark.parametrize("hydrogens", [False, True])
@pytest.mark.parametrize("smiles", ["CC(=O)Oc1ccccc1C(=O)O", "C1CCCCC1", "CC(C)CO", "OC1CCC2CCCC2C1"])
def test_drawings_are_flat(smiles, hydrogens, length):
    found = codes(draw(smiles, hydrogens=hydrogens, length=length))
    assert "flat-geometry" in found
    assert set(found) <= {"flat-geometry", "missing-hydrogens"}


@pytest.mark.parametrize("smiles", ["C", "CCO", "C=C", "c1ccccc1"])
def test_drawings_with_hydrogens_are_flat_only(smiles):
    assert codes(draw(smiles, hydrogens=True)) == ["flat-geometry"]


def test_every_code_is_a_known_one_and_comes_once():
    random = np.random.default_rng(1)
    for molecule in read_molecules():
        keep = random.random(len(molecule.numbers)) < 0.8
        noisy = replace(molecule, positions=molecule.positions + 0.2 * random.normal(size=molecule.positions.shape))
        found = codes(take(noisy, keep))
        assert len(found) == len(set(found))
        assert set(found) <= set(MESSAGE_CODES)


def test_a_batch_says_what_each_molecule_gets_by_itself():
    random = np.random.default_rng(2)
    damaged = [
        take(replace(m, positions=m.positions + k / 100 * random.normal(size=m.positions.shape)), slice(k % 3, None))
        for k, m in enumerate(read_molecules())
    ] + [draw("CCO", hydrogens=True), build("C6H6")]
    together = judge(*damaged)
    assert together == [judge(molecule)[0] for molecule in damaged]
    assert sum(bool(messages) for messages in together) > 10


def test_lone_atoms():
    assert [codes(Molecule([z], np.zeros((1, 3)))) for z in (6, 7, 8, 9)] == [["missing-hydrogens"]] * 4
    assert judge(Molecule([1], np.zeros((1, 3)))) == [()]
