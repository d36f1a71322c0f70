"""A molecule as the network sees it, and the checks that decide whether it may be predicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from qmprop.records import Message
from qmprop.targets import ELEMENTS

#: Two nuclei closer than this (Å) are a damaged file, not a molecule.
MIN_DISTANCE: Final = 0.3
#: No molecule is larger (Å).
MAX_EXTENT: Final = 1e4
#: Farther from the origin (Å) even float64 does not keep a molecule's shape.
MAX_COORDINATE: Final = 1e9
#: Heavy atoms of the largest molecules in QM9.
MAX_HEAVY_ATOMS: Final = 9
_DENSE: Final = 256  # up to this many atoms all pairs are cheaper than a tree, whose import alone takes half a second


@dataclass(frozen=True, slots=True, eq=False)
class Molecule:
    """Nuclei in space.

    Attributes:
        numbers: Atomic numbers, int64 [n].
        positions: Positions in Å, float64 [n, 3].
        name: The record's own name, if it has one.
        source: Where it was read from; "-" for stdin.
        index: Position within the source, from 0.
        charge: Net charge in units of e.
        periodic: Whether the input declared a periodic cell.
        remarks: What the reader has to say about it; its record repeats them.
        origin: For an MDL record its own text: the molblock up to `M  END` and the data fields, without `$$$$`.
    """

    numbers: NDArray[np.int64]
    positions: NDArray[np.float64]
    name: str | None = None
    source: str = "-"
    index: int = 0
    charge: int = 0
    periodic: bool = False
    remarks: tuple[Message, ...] = ()
    origin: str | None = None

    def __post_init__(self) -> None:
        """Give both arrays their types and check their shapes."""
        numbers = np.asarray(self.numbers, dtype=np.int64)
        positions = np.asarray(self.positions, dtype=np.float64)
        if numbers.ndim != 1 or positions.shape != (len(numbers), 3):
            raise ValueError(
                f"numbers must be [n] and positions [n, 3], not {list(numbers.shape)} and {list(positions.shape)}"
            )
        object.__setattr__(self, "numbers", numbers)
        object.__setattr__(self, "positions", positions)

    @property
    def heavy_atoms(self) -> int:
        """Number of atoms other than hydrogen."""
        return int((self.numbers > 1).sum())

    @property
    def formula(self) -> str:
        """Hill formula: C, H, then the rest by symbol; all by symbol where there is no carbon."""
        from ase.data import chemical_symbols

        values, counts = np.unique(self.numbers, return_counts=True)
        symbols = {
            (chemical_symbols[z] if 0 <= z < len(chemical_symbols) else f"#{z}"): int(count)
            for z, count in zip(values.tolist(), counts.tolist(), strict=True)
        }
        first = [symbol for symbol in ("C", "H") if "C" in symbols and symbol in symbols]
        ordered = first + sorted(symbol for symbol in symbols if symbol not in first)
        return "".join(symbol + (str(symbols[symbol]) if symbols[symbol] > 1 else "") for symbol in ordered)


def find_error(molecule: Molecule) -> Message | None:
    """Return the reason why the molecule cannot be predicted, or None if it can."""
    numbers, positions = molecule.numbers, molecule.positions
    if len(numbers) == 0:
        return Message("no-atoms", "The record has no atoms.")
    if molecule.periodic:
        return Message("periodic", "The structure is periodic; only isolated molecules can be predicted.")
    unsupported = sorted(set(numbers.tolist()) - set(ELEMENTS))
    if unsupported:
        names = ", ".join(_symbol(number) for number in unsupported)
        return Message("unsupported-element", f"Unsupported element: {names}; only H, C, N, O and F are known.")
    finite = np.isfinite(positions).all(axis=1)
    if not finite.all():
        atom = int(np.argmin(finite))
        return Message(
            "non-finite-coordinates",
            f"Atom {atom + 1} ({_symbol(int(numbers[atom]))}) has a NaN or infinite coordinate.",
        )
    if np.abs(positions).max() > MAX_COORDINATE or np.ptp(positions, axis=0).max() > MAX_EXTENT:
        return Message(
            "coordinates-out-of-range",
            f"A coordinate is beyond {MAX_COORDINATE:.0e} Å, or the atoms spread over more than {MAX_EXTENT:,.0f} Å.",
        )
    return _find_clash(molecule)


def find_flaws(molecule: Molecule) -> tuple[Message, ...]:
    """Return what makes a prediction for this molecule doubtful: its charge, its electrons and its size."""
    messages = []
    if molecule.charge:
        messages.append(
            Message("charged", f"Net charge {molecule.charge:+d}: predicted as if neutral, which is what was trained.")
        )
    electrons = int(molecule.numbers.sum()) - molecule.charge
    if electrons % 2:
        messages.append(
            Message("odd-electrons", f"{electrons} electrons: not a closed shell. Is a hydrogen atom missing?")
        )
    heavy = molecule.heavy_atoms
    if heavy > MAX_HEAVY_ATOMS:
        messages.append(
            Message("too-large", f"{heavy} heavy atoms; the training molecules have at most {MAX_HEAVY_ATOMS}.")
        )
    return tuple(messages)


def find_warnings(molecule: Molecule) -> tuple[Message, ...]:
    """Return its reader's remarks on the molecule, and its flaws."""
    return (*molecule.remarks, *find_flaws(molecule))


def _find_clash(molecule: Molecule) -> Message | None:
    if len(molecule.numbers) < 2:
        return None
    positions = molecule.positions
    if (positions == positions[0]).all():
        return Message("no-3d-coordinates", "All atoms lie in one point; 3D coordinates are needed.")
    first, second, distance = _find_closest_pair(positions)
    if distance >= MIN_DISTANCE:
        return None
    pair = " and ".join(f"{i + 1} ({_symbol(int(molecule.numbers[i]))})" for i in sorted((first, second)))
    return Message(
        "atoms-too-close", f"Atoms {pair} are {distance:.3f} Å apart, closer than {MIN_DISTANCE} Å. Are the units Å?"
    )


def _find_closest_pair(positions: NDArray[np.float64]) -> tuple[int, int, float]:
    """Return the indices of the two atoms closest to each other and their distance."""
    if len(positions) <= _DENSE:
        with np.errstate(over="ignore"):
            distances = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
        np.fill_diagonal(distances, np.inf)
        first, second = divmod(int(np.argmin(distances)), len(positions))
        return first, second, float(distances[first, second])
    from scipy.spatial import cKDTree

    nearest, neighbors = cKDTree(positions).query(positions, k=2)
    first = int(np.argmin(nearest[:, 1]))
    second = next(int(neighbor) for neighbor in neighbors[first] if neighbor != first)
    return first, second, float(nearest[first, 1])


def _symbol(number: int) -> str:
    from ase.data import chemical_symbols

    return chemical_symbols[number] if 0 < number < len(chemical_symbols) else f"atomic number {number}"
