"""Refined geometries: from the model through `predict` onto the molecules that are written."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from rdkit import Chem
from samples import make_model, move, random_rotation, read_molecules

from qmprop.baseline import center
from qmprop.formats import move_mdl
from qmprop.inference import predict_pairs
from qmprop.molecule import Molecule
from qmprop.readers import Failure
from qmprop.records import Message

MODEL = make_model(seed=4)


def _block(molecule: Molecule, *, v3000: bool) -> str:
    mol = Chem.RWMol()
    for number in molecule.numbers.tolist():
        mol.AddAtom(Chem.Atom(number))
    conformer = Chem.Conformer(len(molecule.numbers))
    conformer.SetPositions(molecule.positions)
    mol.AddConformer(conformer)
    block = Chem.MolToV3KMolBlock(mol) if v3000 else Chem.MolToMolBlock(mol)
    return block + ">  <kept>\n1.0 2.0 3.0\n\n"


def test_the_center_of_mass_stays_and_the_geometry_turns_with_the_molecule():
    molecules = read_molecules()
    refined = MODEL.refine(molecules)
    turn = random_rotation(3)
    turned = MODEL.refine([move(molecule, turn=turn, by=(3.0, -2.0, 9.0)) for molecule in molecules])
    for molecule, positions, other in zip(molecules, refined, turned, strict=True):
        offsets = np.array([0, len(positions)])
        moved = center(molecule.numbers, positions, offsets) - positions
        np.testing.assert_allclose(
            moved, center(molecule.numbers, molecule.positions, offsets) - molecule.positions, atol=1e-6
        )
        expected = move(dataclasses.replace(molecule, positions=positions), turn=turn, by=(3.0, -2.0, 9.0))
        np.testing.assert_allclose(other, expected.positions, atol=1e-5)
        assert len(positions) < 3 or np.abs(positions - molecule.positions).max() > 1e-6


def test_nothing_is_refined_of_nothing():
    assert MODEL.refine([]) == []


def test_predict_hands_out_refined_molecules_and_leaves_failures_alone():
    molecules = read_molecules()
    failure = Failure("gone.xyz", 0, Message("missing-file", "No such file."))
    charged = dataclasses.replace(molecules[1], numbers=np.full_like(molecules[1].numbers, 30))
    items = [molecules[0], failure, charged, *molecules[2:]]
    plain, refined = (list(predict_pairs(items, weights=MODEL, refined=choice)) for choice in (False, True))
    assert [record for _, record in plain] == [record for _, record in refined]
    assert refined[1][0] is failure
    assert refined[2][0] is charged
    for (item, record), positions in zip(refined[3:], MODEL.refine(molecules[2:]), strict=True):
        assert record.properties
        np.testing.assert_allclose(item.positions, positions, atol=1e-5)


@pytest.mark.parametrize("v3000", [False, True])
def test_an_mdl_record_keeps_all_but_its_coordinates(v3000):
    molecule = read_molecules()[3]
    text = _block(molecule, v3000=v3000)
    positions = molecule.positions[:, ::-1] + 0.25
    moved = move_mdl(text, positions)
    assert moved.endswith(">  <kept>\n1.0 2.0 3.0\n\n")
    mol = Chem.MolFromMolBlock(moved, sanitize=False, removeHs=False)
    np.testing.assert_allclose(mol.GetConformer().GetPositions(), positions, atol=1e-4)
    assert [atom.GetAtomicNum() for atom in mol.GetAtoms()] == molecule.numbers.tolist()
    back = move_mdl(moved, molecule.positions)
    assert [line.split() for line in back.splitlines()] == [line.split() for line in text.splitlines()]


def test_an_mdl_record_with_other_atoms_is_not_moved():
    molecule = read_molecules()[3]
    for v3000 in (False, True):
        assert move_mdl(_block(molecule, v3000=v3000), molecule.positions[1:]) is None
    assert move_mdl("title", molecule.positions) is None
    assert move_mdl("a\nb\nc\n 99  0 V2000\n", np.zeros((99, 3))) is None


def test_predict_moves_the_block_of_an_mdl_record():
    molecule = read_molecules()[3]
    molecule = dataclasses.replace(molecule, origin=_block(molecule, v3000=False))
    ((item, _),) = predict_pairs([molecule], weights=MODEL, refined=True)
    mol = Chem.MolFromMolBlock(item.origin, sanitize=False, removeHs=False)
    np.testing.assert_allclose(mol.GetConformer().GetPositions(), item.positions, atol=1e-4)
