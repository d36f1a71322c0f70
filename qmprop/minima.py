"""Minima of cheaper methods, reached from a given geometry: of the force field MMFF94 and of GFN2-xTB.

`minimize` computes many of them in processes of their own, each of which runs `serve`.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
from numpy.typing import NDArray

from qmprop.errors import DataError

#: Positions in Å [n, 3], or the reason why there are none.
Minimum = NDArray[np.float64] | str

_BOND_ORDERS: Final = 10_000  # combinations tried for a molecule before giving up
_MMFF_ROUNDS: Final = 10
_MMFF_STEPS: Final = 1000  # per round
_XTB_STEPS: Final = 300
_XTB_FORCE: Final = 0.005  # eV/Å, largest left
#: Lengths in sums of two covalent radii: the longest bond, and how near two atoms without a bond may come.
_LONGEST_BOND: Final = 1.3
_NEW_BOND: Final = 1.15
_COVALENT_RADII: Final = np.zeros(128)  # Å; Cordero et al. 2008
_COVALENT_RADII[[1, 6, 7, 8, 9]] = 0.31, 0.76, 0.71, 0.66, 0.57
_MATCHES: Final = 1000
_AHEAD: Final = 2  # tasks at hand in a process, so that it never waits for the next


def mmff_minimum(numbers: NDArray[Any], positions: NDArray[Any], smiles: str | None) -> Minimum:
    """Return the MMFF94 minimum reached from a geometry, which is that of the same conformer.

    The bonds come from the geometry; where that fails, from the SMILES.

    Args:
        numbers: Atomic numbers [n].
        positions: Positions in Å [n, 3].
        smiles: SMILES of the neutral molecule, if known.
    """
    from rdkit.rdBase import BlockLogs

    with BlockLogs():
        minimum = _from_perceived_bonds(numbers, positions)
        if isinstance(minimum, str) and smiles is not None:
            second = _from_smiles(numbers, positions, smiles)
            minimum = f"{minimum}; by its SMILES: {second}" if isinstance(second, str) else second
    return minimum


def xtb_minimum(numbers: NDArray[Any], positions: NDArray[Any]) -> Minimum:
    """Return the GFN2-xTB minimum reached from a geometry (atomic numbers [n], positions in Å [n, 3])."""
    from ase import Atoms
    from ase.optimize import BFGS
    from tblite.ase import TBLite

    atoms = Atoms(numbers, positions)
    atoms.calc = TBLite(method="GFN2-xTB", verbosity=0)
    try:
        converged = BFGS(atoms, logfile=None).run(fmax=_XTB_FORCE, steps=_XTB_STEPS)
    except Exception as error:  # tblite and ase raise whatever a self-consistent field that diverges leads to
        return f"the calculation failed: {type(error).__name__}"
    if not converged:
        return "not converged"
    return _checked(atoms.positions, numbers, positions, _near(numbers, positions, _LONGEST_BOND))


def _from_perceived_bonds(numbers: NDArray[Any], positions: NDArray[Any]) -> Minimum:
    from rdkit.Chem import rdDetermineBonds

    mol = _place(numbers, positions)
    try:
        rdDetermineBonds.DetermineBonds(mol, charge=0, maxIterations=_BOND_ORDERS)
    except Exception:  # RDKit's exceptions have no base of their own: no neutral molecule was found
        return "no bonds found"
    return _minimize_mmff(mol, numbers, positions)


def _from_smiles(numbers: NDArray[Any], positions: NDArray[Any], smiles: str) -> Minimum:
    from rdkit import Chem

    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    order = _match(mol, numbers, positions)
    if order is None:
        return "other bonds"
    mol = Chem.RenumberAtoms(mol, order)
    mol.AddConformer(_place(numbers, positions).GetConformer())
    return _minimize_mmff(mol, numbers, positions)


def _place(numbers: NDArray[Any], positions: NDArray[Any]) -> Any:
    """Return an RDKit molecule without bonds."""
    from rdkit import Chem

    mol = Chem.RWMol()
    for number in numbers.tolist():
        mol.AddAtom(Chem.Atom(number))
    conformer = Chem.Conformer(len(numbers))
    conformer.SetPositions(np.ascontiguousarray(positions, dtype=np.float64))
    mol.AddConformer(conformer)
    return mol


def _minimize_mmff(mol: Any, numbers: NDArray[Any], positions: NDArray[Any]) -> Minimum:
    from rdkit.Chem import rdForceFieldHelpers

    parameters = rdForceFieldHelpers.MMFFGetMoleculeProperties(mol, "MMFF94")
    if parameters is None:
        return "no parameters"
    field = rdForceFieldHelpers.MMFFGetMoleculeForceField(mol, parameters)
    field.Initialize()
    if all(field.Minimize(maxIts=_MMFF_STEPS) for _ in range(_MMFF_ROUNDS)):
        return "not converged"
    bonds = np.zeros((len(numbers), len(numbers)), dtype=bool)
    for bond in mol.GetBonds():
        bonds[[bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()], [bond.GetEndAtomIdx(), bond.GetBeginAtomIdx()]] = True
    return _checked(mol.GetConformer().GetPositions(), numbers, positions, bonds)


def _checked(
    minimum: NDArray[Any], numbers: NDArray[Any], positions: NDArray[Any], bonds: NDArray[np.bool_]
) -> Minimum:
    """Return the minimum unless a bond broke or formed; atoms that were as near as in a bond before may stay so."""
    if not np.isfinite(minimum).all():
        return "not converged"
    if (bonds & ~_near(numbers, minimum, _LONGEST_BOND)).any():
        return "a bond broke"
    if (_near(numbers, minimum, _NEW_BOND) & ~bonds & ~_near(numbers, positions, _LONGEST_BOND)).any():
        return "a bond formed"
    return np.asarray(minimum, dtype=np.float64)


def _near(numbers: NDArray[Any], positions: NDArray[Any], factor: float) -> NDArray[np.bool_]:
    """Return which pairs of atoms are within `factor` sums of their covalent radii, bool [n, n]."""
    distances = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    radii = _COVALENT_RADII[numbers]
    near: NDArray[np.bool_] = distances < factor * (radii[:, None] + radii)
    np.fill_diagonal(near, False)
    return near


def _match(mol: Any, numbers: NDArray[Any], positions: NDArray[Any]) -> list[int] | None:
    """Return which atom of `mol` each atom of the geometry is; None if their bonds differ.

    Heavy atoms are matched by element, hydrogens and bonds. Where several matches differ in their double bonds only,
    the one whose double bonds are the shortest is right.
    """
    if sorted(numbers.tolist()) != sorted(atom.GetAtomicNum() for atom in mol.GetAtoms()):
        return None
    distances = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    heavy = np.flatnonzero(numbers > 1)
    hydrogens = np.flatnonzero(numbers == 1)
    owners = heavy[distances[np.ix_(hydrogens, heavy)].argmin(axis=1)]
    near = _near(numbers, positions, _LONGEST_BOND)
    target = _skeleton(
        [(int(numbers[i]), int((owners == i).sum())) for i in heavy],
        [(a, b) for a in range(len(heavy)) for b in range(a) if near[heavy[a], heavy[b]]],
    )
    atoms = [atom for atom in mol.GetAtoms() if atom.GetAtomicNum() > 1]
    rank = {atom.GetIdx(): index for index, atom in enumerate(atoms)}
    bonds = [bond for bond in mol.GetBonds() if {bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()} <= rank.keys()]
    ends = np.array([(rank[bond.GetBeginAtomIdx()], rank[bond.GetEndAtomIdx()]) for bond in bonds], int).reshape(-1, 2)
    query = _skeleton(
        [(atom.GetAtomicNum(), atom.GetTotalNumHs(includeNeighbors=True)) for atom in atoms], ends.tolist()
    )
    matches = heavy[np.array(target.GetSubstructMatches(query, uniquify=False, maxMatches=_MATCHES), int)]
    if matches.size == 0:
        return None
    orders = np.array([bond.GetBondTypeAsDouble() for bond in bonds])
    lengths = distances[matches[:, ends[:, 0]], matches[:, ends[:, 1]]] @ orders
    place = dict(zip(matches[lengths.argmin()].tolist(), (atom.GetIdx() for atom in atoms), strict=True))
    for i in heavy.tolist():
        carried = [a.GetIdx() for a in mol.GetAtomWithIdx(place[i]).GetNeighbors() if a.GetAtomicNum() == 1]
        place |= zip(hydrogens[owners == i].tolist(), carried, strict=True)
    return [place[i] for i in range(len(numbers))]


def _skeleton(atoms: Iterable[tuple[int, int]], bonds: Iterable[Sequence[int]]) -> Any:
    """Return heavy atoms (number, hydrogens) and single bonds as an RDKit molecule, hydrogens told by the isotope."""
    from rdkit import Chem

    mol = Chem.RWMol()
    for number, hydrogens in atoms:
        atom = Chem.Atom(number)
        atom.SetIsotope(100 + hydrogens)
        mol.AddAtom(atom)
    for a, b in bonds:
        mol.AddBond(a, b, Chem.BondType.SINGLE)
    return mol


@dataclass(frozen=True, slots=True)
class Task:
    """Molecules to minimize, and their minima once that is done.

    Attributes:
        kind: "mmff" or "xtb".
        molecules: Atomic numbers [n], positions in Å [n, 3] and SMILES of each.
        minima: One for each molecule.
    """

    kind: str
    molecules: tuple[tuple[NDArray[np.uint8], NDArray[np.float32], str | None], ...]
    minima: tuple[Minimum, ...] = ()


def minimize(tasks: Iterable[Task], processes: int) -> Generator[Task]:
    """Do tasks in processes of their own and yield them with their minima, in order.

    The processes end with the iterator, and when this process ends in whatever way. Ctrl-C reaches this process only.

    Raises:
        DataError: One of the processes died.
    """
    workers: list[subprocess.Popen[bytes]] = []
    waiting = iter(tasks)
    sent: deque[subprocess.Popen[bytes]] = deque()
    try:
        workers.extend(_start() for _ in range(processes))
        for worker, task in zip(workers * _AHEAD, waiting, strict=False):
            _send(worker.stdin, task)
            sent.append(worker)
        while sent:
            worker = sent.popleft()
            yield _receive(worker.stdout)
            for task in islice(waiting, 1):
                _send(worker.stdin, task)
                sent.append(worker)
    except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
        raise DataError("a process that minimizes molecules died", "Run the command again: it continues.") from error
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()


def serve() -> None:
    """Read tasks from standard input and write them with their minima to standard output, until the input ends."""
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    while True:
        try:
            task = _receive(sys.stdin.buffer)
        except EOFError:
            return
        minima = tuple(
            xtb_minimum(numbers, positions) if task.kind == "xtb" else mmff_minimum(numbers, positions, smiles)
            for numbers, positions, smiles in task.molecules
        )
        _send(output, replace(task, minima=minima))


def _start() -> subprocess.Popen[bytes]:
    paths = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-P", "-c", "from qmprop.minima import serve; serve()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | environment,
        start_new_session=True,  # so that Ctrl-C does not reach it
    )


def _send(stream: IO[bytes] | None, task: Task) -> None:
    assert stream is not None
    pickle.dump(task, stream)
    stream.flush()


def _receive(stream: IO[bytes] | None) -> Task:
    assert stream is not None
    task = pickle.load(stream)
    assert isinstance(task, Task)
    return task
