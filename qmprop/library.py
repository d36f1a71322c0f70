"""The training molecules of QM9 with their DFT values, in a compact file that comes with the weights.

It is optional: without it the nearest training molecules are named, but their values are not told.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qmprop.bundled import bundled_folders
from qmprop.datasets import Dataset, join_bytes, read_arrays, split_bytes, write_arrays
from qmprop.errors import DataError
from qmprop.targets import ATOM_ENERGIES_HARTREE, ATOMIZATION_KEYS, DEFAULT_KEYS, HARTREE_EV, TARGETS

LIBRARY_FILE: Final = "qm9-train.cache"
_MAGIC: Final = b"qmprop-library-1\n"


@dataclass(frozen=True, slots=True)
class Known:
    """A molecule with its SMILES and its reference values by key, in default units."""

    smiles: str
    values: Mapping[str, float]


class Library:
    """Molecules of QM9 by their gdb number.

    Args:
        ids: gdb numbers, ascending [n].
        targets: Reference values in default units, in the order of `DEFAULT_KEYS` [n, 12].
        atoms: What the free atoms contribute to u0, u, h and g, in eV [n, 4].
        smiles: One for each.
    """

    def __init__(
        self, ids: NDArray[np.int64], targets: NDArray[np.float64], atoms: NDArray[np.float64], smiles: list[str]
    ) -> None:
        self._ids, self._targets, self._atoms, self._smiles = ids, targets, atoms, smiles

    def __len__(self) -> int:
        """Return the number of molecules."""
        return len(self._ids)

    def get(self, number: int) -> Known | None:
        """Return the molecule with a gdb number, None if it is not among these."""
        row = int(np.searchsorted(self._ids, number))
        if row == len(self._ids) or self._ids[row] != number:
            return None
        values = dict(zip(DEFAULT_KEYS, self._targets[row].tolist(), strict=True))
        for key, atoms in zip(ATOMIZATION_KEYS, self._atoms[row].tolist(), strict=True):
            values[key] = values[str(TARGETS[key].total)] - atoms
        return Known(self._smiles[row], values)


def load_library(metadata: Mapping[str, Any]) -> Library | None:
    """Return the library of the data that weights were trained on, as their metadata tells; None if there is none.

    Raises:
        DataError: The file is damaged.
    """
    for folder in bundled_folders():
        path = folder / LIBRARY_FILE
        if metadata.get("data") == "qm9" and path.is_file():
            return read_library(path)
    return None


def read_library(path: str | Path) -> Library:
    """Return the library in a file.

    Raises:
        DataError: The file cannot be read or is damaged.
    """
    arrays = read_arrays(path, _MAGIC)
    try:
        ids = np.cumsum(arrays["steps"].astype(np.int64))
        targets = join_bytes(arrays["targets"], np.int32, len(DEFAULT_KEYS)) * _units()
        smiles = arrays["smiles"].tobytes().decode("ascii").split("\n")
        atoms = arrays["counts"].astype(np.float64) @ _free_atoms()
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"the file '{path}' is damaged: {error}", "Install qmprop again.") from error
    if not len(ids) == len(targets) == len(smiles) == len(atoms):
        raise DataError(f"the file '{path}' is damaged: its parts differ in length", "Install qmprop again.")
    return Library(ids, targets, atoms, smiles)


def write_library(path: str | Path, molecules: Dataset, rows: ArrayLike, smiles: Mapping[int, str]) -> None:
    """Write the library of the molecules at `rows` of a data set.

    Raises:
        OutputError: The file cannot be written.
    """
    chosen = molecules.select(np.sort(np.asarray(rows)))
    counts = [np.add.reduceat(chosen.numbers == z, chosen.offsets[:-1], dtype=np.uint8) for z in _ELEMENTS]
    write_arrays(
        path,
        _MAGIC,
        steps=np.diff(chosen.ids, prepend=0).astype(np.int32),
        targets=split_bytes(np.rint(chosen.targets / _units()).astype(np.int32)),
        counts=np.stack(counts, axis=1),
        smiles=np.frombuffer("\n".join(smiles[number] for number in chosen.ids.tolist()).encode("ascii"), np.uint8),
    )


_ELEMENTS: Final = tuple(ATOM_ENERGIES_HARTREE["u0"])


def _units() -> NDArray[np.float64]:
    """Return what one unit of a stored number is worth: the last decimal that QM9 gives, in default units [12]."""
    energies = [TARGETS[key].dimension == "energy" for key in DEFAULT_KEYS]
    return np.where(energies, 1e-6 * HARTREE_EV, 1e-4)


def _free_atoms() -> NDArray[np.float64]:
    """Return the energies of the free atoms in eV, by element and total [5, 4]."""
    totals = [str(TARGETS[key].total) for key in ATOMIZATION_KEYS]
    return np.array([[ATOM_ENERGIES_HARTREE[total][z] * HARTREE_EV for total in totals] for z in _ELEMENTS])
