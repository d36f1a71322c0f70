"""What QM9 tells of its molecules beside the twelve properties, to learn from: atomic charges and vibrations.

Both are read from `qm9pack` once and kept in a compact cache file.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qmprop.datasets import Dataset, join_bytes, read_arrays, split_bytes, write_arrays
from qmprop.errors import DataError, OutputError
from qmprop.qm9 import find_cache, is_whole_qm9, parse_numbers, read_cells

#: Wavenumbers in 1/cm that the modes of vibration of a molecule are counted at.
KNOTS: Final = np.array(
    [0.0, 150.0, 300.0, 450.0, 600.0, 800.0, 1000.0, 1150.0, 1300.0, 1450.0, 1650.0, 1850.0, 2300.0, 2900.0, 3050.0]
    + [3200.0, 3500.0, 3800.0]
)

_MAGIC: Final = b"qmprop-auxiliary-1\n"
_CHARGE_UNIT: Final = 1e-3  # e
_WAVENUMBER_UNIT: Final = 1.0  # 1/cm
_CHUNK: Final = 4096  # molecules per parsing step
_COLUMNS: Final = ("Mulliken_pop", "Harmonic_Freq_cmi")


@dataclass(frozen=True, eq=False)
class Auxiliary:
    """Charges and vibrations of the m molecules of a data set, N atoms in all, L modes in all.

    Attributes:
        charges: Mulliken charges in e, float32 [N].
        wavenumbers: Harmonic wavenumbers of the modes in 1/cm, float32 [L].
        counts: Modes of each molecule [m].
    """

    charges: NDArray[np.float32]
    wavenumbers: NDArray[np.float32]
    counts: NDArray[np.int64]

    def count_modes(self) -> NDArray[np.float32]:
        """Return how many modes each molecule has at each of the `KNOTS`, a mode between two shared out [m, K]."""
        places = np.interp(self.wavenumbers, KNOTS, np.arange(len(KNOTS)))
        below = np.minimum(places.astype(np.int64), len(KNOTS) - 2)
        upper = places - below
        table = np.zeros((len(self.counts), len(KNOTS)), dtype=np.float32)
        owners = np.repeat(np.arange(len(self.counts)), self.counts)
        np.add.at(table, (owners, below), 1.0 - upper)
        np.add.at(table, (owners, below + 1), upper)
        return table


def load_auxiliary(dataset: Dataset, *, cache_file: Path | None = None) -> Auxiliary | None:
    """Return charges and vibrations of QM9's molecules; None for other data.

    Args:
        dataset: Molecules.
        cache_file: Default: `qm9-auxiliary.cache` in the folder of QM9's own cache file.

    Raises:
        DataError: There is no usable cache file and `qm9pack` is missing or not what it should be.
    """
    if not is_whole_qm9(dataset):
        return None
    cache_file = cache_file or find_cache("qm9-auxiliary.cache")
    try:
        return _read(cache_file, dataset)
    except DataError as error:  # missing, damaged, or of other data
        reason = error.message
    try:
        auxiliary = _parse(dataset, reason)
    except DataError as error:
        hint = (
            f"Install qm9pack, copy {cache_file.name} from elsewhere, or set charge_weight and vibration_weight to 0."
        )
        raise DataError(error.message, hint) from error
    try:
        _write(cache_file, dataset, auxiliary)
    except OutputError as error:
        warnings.warn(f"charges will be parsed again next time: {error.message}", RuntimeWarning, stacklevel=2)
    return auxiliary


def _read(path: Path, dataset: Dataset) -> Auxiliary:
    arrays = read_arrays(path, _MAGIC)
    if str(arrays["dataset"]) != dataset.sha256:
        raise DataError(f"'{path}' belongs to other data")
    charges = join_bytes(arrays["charges"], np.int16, 1)[:, 0] * np.float32(_CHARGE_UNIT)
    steps = join_bytes(arrays["wavenumbers"], np.int16, 1)[:, 0]
    wavenumbers = np.cumsum(steps, dtype=np.int64).astype(np.float32) * np.float32(_WAVENUMBER_UNIT)
    return Auxiliary(charges, wavenumbers, arrays["counts"].astype(np.int64))


def _write(path: Path, dataset: Dataset, auxiliary: Auxiliary) -> None:
    charges, wavenumbers = (
        np.rint(values / unit).astype(np.int64)
        for values, unit in ((auxiliary.charges, _CHARGE_UNIT), (auxiliary.wavenumbers, _WAVENUMBER_UNIT))
    )
    steps = np.diff(wavenumbers, prepend=0)  # they rise, so these compress better
    write_arrays(
        path,
        _MAGIC,
        dataset=np.array(dataset.sha256),
        charges=split_bytes(charges.astype(np.int16)[:, None]),
        wavenumbers=split_bytes(steps.astype(np.int16)[:, None]),
        counts=auxiliary.counts.astype(np.uint8),
    )


def _parse(dataset: Dataset, reason: str) -> Auxiliary:
    """Read charges and wavenumbers from the files of `qm9pack`, which have the molecules in the data's order."""
    parts: list[tuple[NDArray[Any], ...]] = []
    sizes = np.diff(dataset.offsets)
    done = 0
    for ids, counts, charges, wavenumbers in _read_chunks(reason):
        expected = slice(done, done + len(ids))
        if not np.array_equal(ids, dataset.ids[expected]) or len(charges) != sizes[expected].sum():
            raise DataError("charges and molecules of QM9 do not fit", "Install qm9pack again.")
        parts.append((*_take_last(counts, wavenumbers, 3 * sizes[expected]), charges))
        done += len(ids)
    if done != len(dataset):
        raise DataError(f"there are charges of {done} molecules of QM9 only", "Install qm9pack again.")
    counts, wavenumbers, charges = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Auxiliary(charges.astype(np.float32), wavenumbers.astype(np.float32), counts)


def _take_last(
    counts: NDArray[np.int64], wavenumbers: NDArray[np.float64], most: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return counts and wavenumbers of a single calculation; of a few hundred molecules, QM9 has those of two."""
    halves = np.where(counts > most, counts // 2, counts)
    ends = np.cumsum(counts)
    owners = np.repeat(np.arange(len(counts)), counts)
    return halves, wavenumbers[np.arange(len(wavenumbers)) >= (ends - halves)[owners]]


def _read_chunks(reason: str) -> Iterator[tuple[NDArray[Any], ...]]:
    """Yield gdb numbers [b], counts of modes [b], charges and wavenumbers of a few thousand molecules at a time."""
    rows = read_cells(_COLUMNS, reason)
    while chunk := list(islice(rows, _CHUNK)):
        ids = np.array([number for number, _ in chunk])
        charges, wavenumbers = zip(*(cells for _, cells in chunk), strict=True)
        counts = np.array([cell.count(",") + 1 for cell in wavenumbers])
        atoms = sum(cell.count(",") + 1 for cell in charges)
        yield ids, counts, parse_numbers(charges, atoms), parse_numbers(wavenumbers, int(counts.sum()))
