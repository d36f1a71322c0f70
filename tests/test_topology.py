"""Which atoms are bonded, and whether two molecules are the same."""

from __future__ import annotations

from dataclasses import replace

import ase.build
import numpy as np
import pytest
from samples import alkane, embed, join, move, pair_up, random_rotation, read_molecules

from qmprop.molecule import Molecule
from qmprop.topology import Bonds, find_bonds, hash_graphs, hash_surroundings, label_fragments


def build(name: str) -> Molecule:
    atoms = ase.build.molecule(name)
    return Molecule(atoms.numbers, atoms.positions)


def bonds_of(molecule: Molecule) -> set[frozenset[int]]:
    numbers, positions, _, first, second = pair_up(molecule)
    bonds = find_bonds(numbers, positions, first, second)
    lengths = np.linalg.norm(positions[bonds.first] - positions[bonds.second], axis=1)
    np.testing.assert_allclose(bonds.lengths, lengths)
    pairs = [frozenset(pair) for pair in zip(bonds.first.tolist(), bonds.second.tolist(), strict=True)]
    assert len(set(pairs)) == len(pairs)
    return set(pairs)


def hashes(*molecules: Molecule) -> list[int]:
    numbers, positions, offsets, first, second = pair_up(*molecules)
    return hash_graphs(numbers, offsets, find_bonds(numbers, positions, first, second)).tolist()


def hash_of(smiles: str) -> int:
    """Return the hash of a constitution given without a geometry."""
    from rdkit import Chem

    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    ends = np.array([(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()) for bond in mol.GetBonds()]).reshape(-1, 2)
    numbers = np.array([atom.GetAtomicNum() for atom in mol.GetAtoms()])
    bonds = Bonds(ends[:, 0], ends[:, 1], np.ones(len(ends)))
    return int(hash_graphs(numbers, np.array([0, len(numbers)]), bonds)[0])


@pytest.mark.parametrize(
    ("name", "count"),
    [("H2", 1), ("H2O", 2), ("CH4", 4), ("C6H6", 12), ("HCN", 2), ("CO2", 2), ("N2", 1), ("F2", 1), ("H2O2", 3)]
    + [("O2", 1), ("CO", 1), ("NF3", 3), ("N2H4", 5), ("C2F4", 5), ("bicyclobutane", 11), ("CH3NO2", 6), ("HF", 1)],
)
def test_bonds_of_small_molecules(name, count):
    assert len(bonds_of(build(name))) == count


@pytest.mark.parametrize(
    "smiles",
    ["CC(=O)Oc1ccccc1C(=O)O", "C1CC2CCC1CC2", "C12C3C4C1C5C2C3C45", "C1C2CC1C2", "N#CC1=CC=CO1", "OC1CN1C1OC1"]
    + ["CN1C=NC2=C1C(=O)N(C)C(=O)N2C", "FC(F)(F)C#C", "[NH3+]CC([O-])=O", "CC1(C)C2CC1O2", "NC(=O)C1CN1N=O"],
)
def test_bonds_at_force_field_minima_are_those_of_the_smiles(smiles):
    molecule, bonds = embed(smiles)
    assert bonds_of(molecule) == bonds


def test_carbons_across_a_small_cage_are_not_bonded():
    """Bicyclo[1.1.1]pentane: 1.87 Å, and 1.76 Å in the tightest cages of QM9, are within the reach of long bonds."""
    molecule, bonds = embed("C1C2CC1C2")
    carbons = molecule.positions[1], molecule.positions[4 - 1]
    axis = carbons[1] - carbons[0]
    distance = np.linalg.norm(axis)
    along = molecule.positions @ (axis / distance)
    squeezed = molecule.positions + np.outer(along * (1.76 / distance - 1.0), axis / distance)
    assert bonds_of(replace(molecule, positions=squeezed)) == bonds


def test_a_hydrogen_has_one_bond():
    """In the Zundel cation the proton belongs to the nearer oxygen."""
    water = build("H2O")
    other = replace(move(water, turn=np.diag([1.0, -1.0, -1.0])), positions=-water.positions + [0.0, 0.0, 2.69])
    proton = Molecule([1], [[0.0, 0.0, water.positions[0, 2] + 1.15]])
    assert frozenset({0, 6}) in bonds_of(join(water, other, proton))
    assert len(bonds_of(join(water, other, proton))) == 5


def test_hydrogens_are_bonded_in_their_own_molecule_only():
    assert len(bonds_of(join(build("CH4"), move(build("H2"), by=(4.0, 0.0, 0.0))))) == 5
    crowded = Molecule([8, 1, 1], [[0.0, 0.0, 0.0], [0.95, 0.0, 0.0], [0.8, 0.6, 0.0]])
    assert bonds_of(crowded) == {frozenset({0, 1}), frozenset({0, 2})}


def test_the_pinned_hashes_stay():
    assert hashes(build("H2O"), build("C6H6")) == [0x547AE536BFAAAC8E, 0xCCB017651E1AA9A6]


def test_a_batch_gives_what_each_molecule_gives_by_itself():
    molecules = read_molecules()
    together = hashes(*molecules)
    assert together == [hashes(molecule)[0] for molecule in molecules]
    assert len(set(together)) == len(molecules)


def test_order_place_and_mirror_image_do_not_change_the_hash():
    random = np.random.default_rng(0)
    for molecule in read_molecules():
        order = random.permutation(len(molecule.numbers))
        shuffled = replace(molecule, numbers=molecule.numbers[order], positions=molecule.positions[order])
        moved = move(shuffled, by=(1.0, -2.0, 3.0), turn=-random_rotation())
        assert hashes(moved) == hashes(molecule)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("C1CCC2CCCCC2C1", "C1CCCC1C1CCCC1"),  # decalin and bicyclopentyl: plain refinement sees no difference
        ("C12C3C4C1C5C2C3C45", "C12C3C4C1C5C2C5C34"),  # cubane and cuneane: all atoms alike, to plain refinement
        ("C1CCCCC1", "C1CC1.C1CC1"),
        ("C1CC1CC1CC1", "C1CCC2CCC2C1"),
        ("CC(=O)C", "CC(O)=C"),
        ("C#N", "[C-]#[NH+]"),
        ("CCO", "COC"),
        ("CCCCCCCC(C)CCCCCCCC", "CCCCCCC(C)CCCCCCCCC"),
        ("O", "N"),
        ("[H][H]", "[HH].[HH]"),
    ],
)
def test_other_constitutions_have_other_hashes(one, two):
    assert hash_of(one) != hash_of(two)


@pytest.mark.parametrize(
    ("one", "two"), [("C/C=C/C", "C/C=C\\C"), ("c1ccccc1", "C1=CC=CC=C1"), ("C[C@H](N)O", "C[C@@H](N)O")]
)
def test_stereochemistry_and_bond_orders_do_not_count(one, two):
    assert hash_of(one) == hash_of(two)


def test_geometry_and_smiles_give_one_hash():
    for smiles in ("CC(=O)Oc1ccccc1C(=O)O", "NC1CC1C#C", "O=C=CC=O"):
        assert hashes(embed(smiles)[0]) == [hash_of(smiles)]


def test_there_may_be_no_bonds_and_no_molecules():
    atom = Molecule([6], [[0.0, 0.0, 0.0]])
    assert len(set(hashes(atom, Molecule([8], [[0.0, 0.0, 0.0]]), build("CH4")))) == 3
    nothing = np.zeros(0, dtype=np.int64)
    assert hash_graphs(nothing, np.zeros(1, dtype=np.int64), Bonds(nothing, nothing, np.zeros(0))).shape == (0,)


def test_large_molecules_need_little():
    (long,) = hashes(alkane(3000))
    assert hashes(alkane(2999)) != [long]


def test_fragments_are_labeled_by_their_first_atom():
    first, second = np.array([5, 1, 0, 7]), np.array([1, 3, 6, 2])
    assert label_fragments(8, first, second).tolist() == [0, 1, 2, 1, 4, 1, 0, 2]
    chain = np.random.default_rng(0).permutation(5000)
    assert not label_fragments(5000, chain[1:], chain[:-1]).any()


def test_surroundings_are_an_atom_its_neighbors_and_theirs() -> None:
    """Ketene's carbons are of a kind of their own; those of a ring of three differ from those of a chain."""

    def look(symbols: str, *pairs: tuple[int, int]) -> list[int]:
        numbers = np.array([{"H": 1, "C": 6, "O": 8}[symbol] for symbol in symbols])
        ends = np.array(pairs).T
        return hash_surroundings(numbers, Bonds(ends[0], ends[1], np.ones(len(pairs)))).tolist()

    ketene = look("CCOHH", (0, 1), (1, 2), (0, 3), (0, 4))
    turned = look("HHOCC", (4, 3), (4, 0), (1, 4), (3, 2))
    assert ketene == turned[::-1][:2] + turned[2:3] + turned[:2]
    assert ketene[3] == ketene[4]
    assert len(set(ketene)) == 4
    ring = look("CCC", (0, 1), (1, 2), (2, 0))
    square = look("CCCC", (0, 1), (1, 2), (2, 3), (3, 0))
    assert len(set(ring)) == len(set(square)) == 1
    assert ring[0] != square[0]
    chains = [look("C" * count, *((k, k + 1) for k in range(count - 1))) for count in (6, 7)]
    assert chains[0][:3] == chains[1][:3], "what is four bonds away does not count"
    assert chains[0][3] != chains[1][3]
