"""Minima of MMFF94 and GFN2-xTB: known shapes, symmetry, both ways to the bonds, reasons for failure, processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from numpy.typing import NDArray
from samples import find_formula, random_rotation

from qmprop import minima, qm9
from qmprop.datasets import Dataset
from qmprop.errors import DataError
from qmprop.geometries import rmsd
from qmprop.minima import Minimum, Task, minimize, mmff_minimum, xtb_minimum
from qmprop.molecule import Molecule

WATER = np.array([8, 1, 1]), np.array([[0.0, 0.0, 0.0], [1.1, 0.0, 0.0], [-0.3, 0.8, 0.0]])
METHYL = np.array([6, 1, 1, 1]), np.array([[0, 0, 0], [1.08, 0, 0], [-0.54, 0.935, 0], [-0.54, -0.935, 0.0]])
#: Molecules of QM9 so narrow that atoms without a bond are as near as in one; their SMILES are needed.
NARROW = {105: "C1C2CC1C2", 316: "CC12CC(C1)C2", 319: "OC12CC(C1)C2", 650: "C1C2CCC1O2", 697: "C1C2C3OC2C13"}


def expect(minimum: Minimum) -> NDArray[np.float64]:
    assert not isinstance(minimum, str), minimum
    return minimum


def distance(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Return the root mean square distance in Å of two geometries of a molecule."""
    return float(rmsd(first, second, np.array([0, len(first)]))[0])


def angle(positions: NDArray[np.float64]) -> float:
    """Return the angle at the first of three atoms in degrees."""
    first, second = positions[1:] - positions[0]
    return float(np.degrees(np.arccos(first @ second / np.linalg.norm(first) / np.linalg.norm(second))))


def pick(full: Dataset, gdb: int) -> Molecule:
    """Return the molecule of QM9 with this number."""
    return full.molecule(int(np.searchsorted(full.ids, gdb)))


@pytest.mark.parametrize(("method", "length", "degrees"), [("mmff", 0.969, 103.98), ("xtb", 0.959, 107.2)])
def test_water_has_the_method_s_shape(method: str, length: float, degrees: float) -> None:
    minimum = expect(mmff_minimum(*WATER, None) if method == "mmff" else xtb_minimum(*WATER))
    assert np.linalg.norm(minimum[1:] - minimum[0], axis=1) == pytest.approx([length] * 2, abs=2e-3)
    assert angle(minimum) == pytest.approx(degrees, abs=0.2)


def test_methane_becomes_tetrahedral() -> None:
    molecule = find_formula("CH4")
    bent = molecule.positions + np.random.default_rng(0).normal(scale=0.05, size=(5, 3))
    bonds = np.diff(expect(mmff_minimum(molecule.numbers, bent, None))[[0, 1, 0, 2, 0, 3, 0, 4]], axis=0)[::2]
    assert bonds @ bonds.T == pytest.approx(1.092**2 * (np.eye(4) * 4 / 3 - 1 / 3), abs=2e-3)


def test_a_minimum_stays_where_it_is(molecules: list[Molecule]) -> None:
    for molecule in molecules:
        minimum = expect(mmff_minimum(molecule.numbers, molecule.positions, None))
        assert distance(expect(mmff_minimum(molecule.numbers, minimum, None)), minimum) < 5e-3


@pytest.mark.parametrize("gdb", [*NARROW, 21, 5005])
def test_turned_and_renumbered_atoms_have_the_same_minimum(full: Dataset, gdb: int) -> None:
    molecule, smiles = pick(full, gdb), NARROW.get(gdb)
    order = np.random.default_rng(gdb).permutation(len(molecule.numbers))
    turned = molecule.positions[order] @ random_rotation(gdb).T + 3.0
    plain = expect(mmff_minimum(molecule.numbers, molecule.positions, smiles))
    moved = expect(mmff_minimum(molecule.numbers[order], turned, smiles))
    assert 0 < distance(plain, molecule.positions) < 0.5
    assert distance(moved, plain[order]) < 5e-3


def test_narrow_bicycles_need_their_smiles(full: Dataset) -> None:
    for gdb, smiles in NARROW.items():
        molecule = pick(full, gdb)
        assert mmff_minimum(molecule.numbers, molecule.positions, None) == "no bonds found"
        expect(mmff_minimum(molecule.numbers, molecule.positions, smiles))


def test_both_ways_to_the_bonds_lead_to_the_same_minimum(full: Dataset) -> None:
    rows = np.random.default_rng(3).choice(20_000, 40, replace=False)
    smiles = qm9.read_smiles(full.ids[rows].tolist())
    compared = 0
    for molecule, gdb in zip(map(full.molecule, rows.tolist()), full.ids[rows].tolist(), strict=True):
        first = minima._from_perceived_bonds(molecule.numbers, molecule.positions)
        second = minima._from_smiles(molecule.numbers, molecule.positions, smiles[gdb])
        if not isinstance(first, str) and not isinstance(second, str):
            compared += distance(first, second) < 1e-2
    assert compared >= 35


def test_double_bonds_are_where_the_geometry_has_them() -> None:
    from rdkit import Chem
    from rdkit.Chem import AllChem

    mol = Chem.AddHs(Chem.MolFromSmiles("N=C1C=CC(=O)N1"))
    AllChem.EmbedMolecule(mol, randomSeed=1)
    AllChem.MMFFOptimizeMolecule(mol)
    numbers = np.array([atom.GetAtomicNum() for atom in mol.GetAtoms()])
    order = minima._match(mol, numbers, mol.GetConformer().GetPositions())
    assert order is not None
    assert order[:8] == list(range(8))


@pytest.mark.parametrize(
    ("molecule", "smiles", "reason"),
    [
        (METHYL, None, "no bonds found"),
        (METHYL, "C", "no bonds found; by its SMILES: other bonds"),
        ((np.array([1, 1]), np.array([[0, 0, 0], [0.74, 0, 0]])), None, "no parameters"),
        ((np.repeat(WATER[0], 2), np.concatenate([WATER[1], WATER[1]])), None, "no bonds found"),
    ],
)
def test_failures_have_a_reason(molecule: tuple[NDArray, NDArray], smiles: str | None, reason: str) -> None:
    assert mmff_minimum(*molecule, smiles) == reason


def test_bonds_that_break_or_form_are_noticed() -> None:
    numbers, positions = WATER
    bonds = np.array([[0, 1, 1], [1, 0, 0], [1, 0, 0]], dtype=bool)
    for change, reason in [
        ([0.5, 0, 0], "a bond broke"),
        ([-1.2, 0.6, 0], "a bond formed"),
        ([np.nan] * 3, "not converged"),
    ]:
        moved = positions.copy()
        moved[1] += change
        assert minima._checked(moved, numbers, positions, bonds) == reason
    assert minima._checked(positions, numbers, positions, bonds) is not None


def make_tasks(full: Dataset, count: int) -> list[Task]:
    molecules = [full.molecule(k) for k in range(100, 100 + count)]
    return [Task("mmff", ((m.numbers.astype(np.uint8), m.positions.astype(np.float32), None),)) for m in molecules]


def test_processes_answer_in_order_as_one_would(full: Dataset) -> None:
    tasks = make_tasks(full, 20)
    results = list(minimize(tasks, 3))
    assert len(results) == 20
    for task, result in zip(tasks, results, strict=True):
        (numbers, positions, smiles), (found,) = task.molecules[0], result.minima
        alone = mmff_minimum(numbers, positions, smiles)
        assert np.array_equal(found, alone) if isinstance(alone, np.ndarray) else found == alone


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_processes_end_with_the_iterator_and_a_dead_one_is_told(full: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    start = minima._start
    monkeypatch.setattr(minima, "_start", lambda: started.append(start()) or started[-1])
    results = minimize(make_tasks(full, 10), 2)
    next(results)
    results.close()
    assert [process.returncode for process in started] == [-signal.SIGKILL] * 2
    results = minimize(make_tasks(full, 10), 1)
    next(results)
    started[2].kill()
    with pytest.raises(DataError, match="died"):
        list(results)


def test_processes_end_when_their_parent_is_killed() -> None:
    script = (
        "import os, time, numpy as np\n"
        "from qmprop import minima\n"
        "start = minima._start\n"
        "def told():\n    process = start()\n    print(process.pid, flush=True)\n    return process\n"
        "minima._start = told\n"
        "task = minima.Task('mmff', ((np.array([8, 1, 1]), np.eye(3) * 0.7, None),))\n"
        "results = minima.minimize([task] * 9, 1)\nnext(results)\nprint('ready', flush=True)\ntime.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        assert parent.stdout.readline() == "ready\n"
        assert is_running(worker)
        parent.kill()
    deadline = time.monotonic() + 20
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(worker)
