"""QM9's molecules at the minima of cheaper methods, in compact cache files.

MMFF94 minima are computed where the cache file lacks them. GFN2-xTB minima of the first molecules of each part of the
split are bundled.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qmprop.bundled import bundled_folders
from qmprop.datasets import Dataset, join_bytes, read_arrays, split_bytes, write_arrays
from qmprop.errors import DataError, OutputError
from qmprop.minima import Minimum, Task, minimize
from qmprop.qm9 import Progress, find_cache, is_whole_qm9, read_smiles, split_qm9
from qmprop.workers import usable_cores

KINDS: Final = ("mmff", "xtb")
#: So many test molecules have bundled GFN2-xTB minima.
XTB_SIZE: Final = 1000

_MAGIC: Final = b"qmprop-geometries-1\n"
_UNIT: Final = 1e-4  # Å
_SMALL: Final = np.iinfo(np.int16).max  # largest displacement in units that is stored in two bytes
_TASK_SIZE: Final[Mapping[str, int]] = {"mmff": 32, "xtb": 1}  # molecules
_SAVE_INTERVAL: Final = 30.0  # seconds
_NOT_TRIED: Final = -1
_FOUND: Final = 0  # higher: 1 + index of the reason


@dataclass(frozen=True, eq=False)
class Geometries:
    """Minima of a cheaper method for the molecules of a data set, m of them with N atoms in all.

    Attributes:
        kind: "mmff" or "xtb".
        positions: Positions in Å, float32 [N, 3]; every molecule lies on its DFT geometry as well as it can (see
            `superpose`). A molecule without a minimum has its DFT geometry.
        found: Which molecules have a minimum, bool [m].
        failures: gdb number to reason, for the molecules for which none was found.
    """

    kind: str
    positions: NDArray[np.float32]
    found: NDArray[np.bool_]
    failures: Mapping[int, str]

    def move(self, dataset: Dataset, rows: NDArray[np.int64]) -> Dataset:
        """Return those of the data set's molecules at `rows` that have a minimum, at it."""
        chosen = rows[self.found[rows]]
        return replace(dataset.select(chosen), positions=self.positions[dataset.locate(chosen)[0]])


def load_geometries(
    kind: str,
    dataset: Dataset,
    *,
    rows: ArrayLike | None = None,
    progress: Progress | None = None,
    cache_file: Path | None = None,
    processes: int | None = None,
) -> Geometries:
    """Return minima of QM9's molecules: those in the cache file and those bundled; what is missing is computed.

    An interrupted computation keeps what it has found and goes on from there the next time.

    Args:
        kind: "mmff" (MMFF94) or "xtb" (GFN2-xTB).
        dataset: QM9.
        rows: Indices of the molecules that are needed. Default: all for "mmff", the first 1,000 of the test split for
            "xtb". The others come along as far as they are known.
        progress: Called with (molecules done, molecules in all) while minima are computed.
        cache_file: Default: `qm9-mmff.cache` or `qm9-xtb.cache` in the folder of QM9's own cache file.
        processes: How many at once; default: one per core.

    Raises:
        DataError: `dataset` is not QM9, or minima are missing and what computes them is not installed.
    """
    _check_kind(kind)
    if not is_whole_qm9(dataset):
        raise DataError(
            f"there are {kind} geometries of the whole of QM9 only, not of {dataset.name}", "Use --data qm9."
        )
    cache_file = cache_file or find_cache(f"qm9-{kind}.cache")
    store = _Store(dataset)
    notes = [note for file in (*_bundled_files(kind), cache_file) if (note := store.read(file))]
    if rows is None:
        rows = np.arange(len(dataset)) if kind == "mmff" else split_qm9()["test"][:XTB_SIZE]
    wanted = np.unique(np.asarray(rows, dtype=np.int64))
    missing = wanted[store.status[wanted] == _NOT_TRIED]
    if len(missing):
        _check_installed(kind, notes[-1] if notes else f"'{cache_file}' lacks {len(missing):,} molecules")
        _compute(kind, store, missing, cache_file, progress, processes)
    return store.to_geometries(kind)


def load_cheap(dataset: Dataset, rows: ArrayLike, *, progress: Progress | None = None) -> tuple[Geometries, ...]:
    """Return the geometries of cheaper methods to learn and to calibrate from, those of the force field first.

    They are the MMFF94 minima of the molecules at `rows` and the bundled GFN2-xTB minima, whatever else may be in a
    cache file, so that a run repeats. Of data other than the whole of QM9 there are none.

    Args:
        dataset: Molecules.
        rows: Indices of those whose MMFF94 minima are needed.
        progress: Called with (molecules done, molecules in all) while minima are computed.

    Raises:
        DataError: MMFF94 minima are missing and what computes them is not installed.
    """
    if not is_whole_qm9(dataset):
        return ()
    store = _Store(dataset)
    for file in _bundled_files("xtb"):
        store.read(file)
    return load_geometries("mmff", dataset, rows=rows, progress=progress), store.to_geometries("xtb")


def minimize_dataset(
    kind: str, dataset: Dataset, *, progress: Progress | None = None, processes: int | None = None
) -> Geometries:
    """Return minima reached from the geometries of any data set; nothing is read from or kept in a file.

    Args:
        kind: "mmff" (MMFF94) or "xtb" (GFN2-xTB).
        dataset: Molecules.
        progress: Called with (molecules done, molecules in all).
        processes: How many at once; default: one per core.

    Raises:
        DataError: What computes them is not installed.
    """
    _check_kind(kind)
    _check_installed(kind, f"{dataset.name} needs them")
    store = _Store(dataset)
    _compute(kind, store, np.arange(len(dataset)), None, progress, processes)
    return store.to_geometries(kind)


def superpose(moving: NDArray[Any], fixed: NDArray[Any], offsets: NDArray[np.int64]) -> NDArray[np.float64]:
    """Shift and turn every molecule so that it lies on another geometry of it with the least squared distance.

    Kabsch's algorithm with proper rotations only, all atoms of equal weight: a mirror image stays one.

    Args:
        moving: Positions [N, 3] of the molecules that are moved.
        fixed: Positions [N, 3] to lie on.
        offsets: Atoms of molecule k are `offsets[k]:offsets[k + 1]`, [m + 1].
    """
    counts = np.diff(offsets)
    moving, _ = _center(moving, offsets)
    fixed, centers = _center(fixed, offsets)
    covariance = np.add.reduceat(moving[:, :, None] * fixed[:, None, :], offsets[:-1])
    left, _, right = np.linalg.svd(covariance)
    right[:, 2] *= np.sign(np.linalg.det(left) * np.linalg.det(right))[:, None]
    turned = np.einsum("ni,nij->nj", moving, np.repeat(left @ right, counts, axis=0))
    superposed: NDArray[np.float64] = turned + np.repeat(centers, counts, axis=0)
    return superposed


def rmsd(first: NDArray[Any], second: NDArray[Any], offsets: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the root mean square distance [m] of the molecules' atoms in two geometries [N, 3], superposed."""
    squares = np.square(superpose(first, second, offsets) - second).sum(axis=1)
    distances: NDArray[np.float64] = np.sqrt(np.add.reduceat(squares, offsets[:-1]) / np.diff(offsets))
    return distances


def _center(positions: NDArray[Any], offsets: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the positions about the molecules' centroids, and the centroids [m, 3]."""
    positions = np.asarray(positions, dtype=np.float64)
    counts = np.diff(offsets)
    centers = np.add.reduceat(positions, offsets[:-1]) / counts[:, None]
    return positions - np.repeat(centers, counts, axis=0), centers


class _Store:
    """What is known about the minima of a data set, in memory and in a file."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.status = np.full(len(dataset), _NOT_TRIED, dtype=np.int16)
        self.reasons: list[str] = []
        self.moves = np.zeros((len(dataset.numbers), 3), dtype=np.int32)  # from the DFT geometry, in _UNIT

    def add(self, row: int, minimum: Minimum) -> None:
        """Take in the result for molecule `row`."""
        if isinstance(minimum, str):
            self.status[row] = self._code(minimum)
            return
        atoms = slice(*self.dataset.offsets[row : row + 2])
        reference = self.dataset.positions[atoms]
        on_top = superpose(minimum, reference, np.array([0, len(reference)]))
        self.moves[atoms] = np.rint((on_top - reference) / _UNIT)
        self.status[row] = _FOUND

    def read(self, path: Path) -> str:
        """Take in what a file knows; return what is wrong with the file, if anything."""
        try:
            arrays = read_arrays(path, _MAGIC)
        except DataError as error:
            return error.message
        if str(arrays["dataset"]) != self.dataset.sha256:
            return f"'{path}' belongs to other data"
        rows, status = arrays["rows"], arrays["status"]
        atoms = self.dataset.locate(rows[status == _FOUND])[0]
        moves = join_bytes(arrays["moves"], np.int16, 3).astype(np.int32)
        moves.reshape(-1)[arrays["far"]] = arrays["far_moves"]
        self.moves[atoms] = moves
        codes = np.array([_FOUND, *(self._code(str(reason)) for reason in arrays["reasons"])], dtype=np.int16)
        self.status[rows] = codes[status]
        return ""

    def write(self, path: Path) -> None:
        """Write all that is known, whole or not at all.

        Raises:
            OutputError: The file cannot be written.
        """
        rows = np.flatnonzero(self.status != _NOT_TRIED)
        moves = self.moves[self.dataset.locate(rows[self.status[rows] == _FOUND])[0]].reshape(-1)
        far = np.flatnonzero(np.abs(moves) > _SMALL)
        write_arrays(
            path,
            _MAGIC,
            dataset=np.array(self.dataset.sha256),
            rows=rows.astype(np.int32),
            status=self.status[rows].astype(np.uint8),
            reasons=np.array(self.reasons, dtype=np.str_),
            moves=split_bytes(np.clip(moves, -_SMALL, _SMALL).astype(np.int16).reshape(-1, 3)),
            far=far.astype(np.int32),
            far_moves=moves[far],
        )

    def to_geometries(self, kind: str) -> Geometries:
        """Return the positions."""
        failed = np.flatnonzero(self.status > _FOUND)
        return Geometries(
            kind,
            (self.dataset.positions + self.moves * _UNIT).astype(np.float32),
            self.status == _FOUND,
            {int(self.dataset.ids[row]): self.reasons[self.status[row] - 1] for row in failed},
        )

    def _code(self, reason: str) -> int:
        if reason not in self.reasons:
            self.reasons.append(reason)
        return 1 + self.reasons.index(reason)


def _compute(
    kind: str,
    store: _Store,
    rows: NDArray[np.int64],
    path: Path | None,
    progress: Progress | None,
    processes: int | None,
) -> None:
    """Fill the store's gaps, and write it to its file now and then and at the end, however that comes."""
    done, saved = 0, time.monotonic()
    size = _TASK_SIZE[kind]
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    results = minimize(_tasks(kind, store.dataset, parts), min(processes or usable_cores(), len(parts)))
    try:
        for part, task in zip(parts, results, strict=True):
            for row, minimum in zip(part.tolist(), task.minima, strict=True):
                store.add(row, minimum)
            done += len(part)
            if progress is not None:
                progress(done, len(rows))
            if path is not None and time.monotonic() - saved > _SAVE_INTERVAL:
                _save(store, path)
                saved = time.monotonic()
    finally:
        results.close()
        if path is not None and done:
            _save(store, path)


def _tasks(kind: str, dataset: Dataset, parts: list[NDArray[np.int64]]) -> Iterator[Task]:
    smiles = read_smiles(dataset.ids[np.concatenate(parts)]) if kind == "mmff" and dataset.name == "qm9" else {}
    for part in parts:
        atoms = [slice(*dataset.offsets[row : row + 2]) for row in part]
        ids = dataset.ids[part].tolist()
        yield Task(
            kind,
            tuple((dataset.numbers[a], dataset.positions[a], smiles.get(k)) for a, k in zip(atoms, ids, strict=True)),
        )


def _save(store: _Store, path: Path) -> None:
    store.read(path)  # another process may have added to it meanwhile
    try:
        store.write(path)
    except OutputError as error:
        warnings.warn(f"these geometries will be computed again: {error.message}", RuntimeWarning, stacklevel=2)


def _bundled_files(kind: str) -> list[Path]:
    files = [folder / f"qm9-{kind}.cache" for folder in bundled_folders()]
    return [file for file in files if file.is_file()][:1]


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind}")


def _check_installed(kind: str, reason: str) -> None:
    module, extra = {"mmff": ("rdkit", ""), "xtb": ("tblite", "[xtb]")}[kind]
    if find_spec(module) is None:
        hint = f"Install it with: pip install 'qmprop{extra}'."
        raise DataError(f"{kind} geometries are computed with {module}, which is not installed ({reason})", hint)
