"""QM9: parse, verify, cache and split it.

QM9 comes from the CSV files of the PyPI package `qm9pack`. Parsing takes a while, so it is done once and kept in a
compact cache file.
"""

from __future__ import annotations

import csv
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qmprop.datasets import Dataset, is_cache, load_labeled, read_cache, write_cache
from qmprop.errors import DataError, OutputError
from qmprop.targets import DEFAULT_KEYS, ELEMENTS, HARTREE_EV, RT_EV, TARGETS, unit_factor

#: Molecules in QM9 without the 3,054 that rearranged during optimization.
QM9_SIZE: Final = 130_831
#: EGNN's split.
TRAIN_SIZE: Final = 100_000
VALID_SIZE: Final = 17_748
#: Of the validation molecules the first ones choose epochs and settings, the last ones calibrate and choose nothing.
CHOOSE_SIZE: Final = 7_748
CALIBRATE_SIZE: Final = VALID_SIZE - CHOOSE_SIZE

Progress = Callable[[int, int], None]

_CHUNK: Final = 4096  # molecules per parsing step
_FILES: Final = ("qm9_part1.csv", "qm9_part2.csv", "qm9_part3.csv")
_NUMBER_OF: Final = np.zeros(128, dtype=np.uint8)  # atomic number of a one-letter symbol by its ASCII code
_NUMBER_OF[[ord(symbol) for symbol in ELEMENTS.values()]] = list(ELEMENTS)
_BRACKETS: Final = str.maketrans("", "", "[] '\"")
_QM9_FACTORS: Final = np.array([unit_factor(key, TARGETS[key].qm9_unit) for key in DEFAULT_KEYS])
_TRAIN_HINT: Final = (
    "Install it with: pip install 'qmprop[train]'; or give a cache file made on another machine with --data FILE."
)
#: Rows of QM9 in the file's units: gdb number, then property values.
_KNOWN_ROWS: Final[Mapping[int, Mapping[str, float]]] = {
    1: {
        **{"alpha": 13.21, "homo": -0.3877, "lumo": 0.1171, "r2": 35.3641, "zpve": 0.044749, "u0": -40.47893},
        **{"u": -40.476062, "h": -40.475117, "g": -40.498597, "cv": 6.469},
    },
    3: {"mu": 1.8511, "alpha": 6.31, "u0": -76.404702},
}


def is_whole_qm9(dataset: Dataset) -> bool:
    """Return whether a data set is QM9, all of it, whose geometries by other methods are known."""
    return dataset.name == "qm9" and len(dataset) == QM9_SIZE


def load_data(
    data: str | Path, *, units: str | Iterable[str] | Mapping[str, str] | None = None, progress: Progress | None = None
) -> Dataset:
    """Return the data set named by `data`: "qm9", a cache file, or an extxyz file with labels.

    Args:
        data: "qm9" or a path; a file that is called qm9 is given as ./qm9.
        units: Units of an extxyz file's labels, as for `targets.parse_units`.
        progress: Called with (molecules done, molecules in all) while QM9 is parsed.

    Raises:
        DataError: The data are missing, damaged, or not what they should be.
    """
    if data == "qm9":
        return load_qm9(progress=progress)
    path = Path(data)
    if not path.is_file():
        raise DataError(f"there is no data file '{path}'", "Give qm9, a cache file, or an extxyz file with labels.")
    if not is_cache(path):
        return load_labeled(path, units=units)
    dataset = read_cache(path)
    if is_whole_qm9(dataset):
        _verify_qm9(dataset)
    return dataset


def load_qm9(*, cache_file: Path | None = None, progress: Progress | None = None) -> Dataset:
    """Return QM9 from its cache file, which is built from `qm9pack` where it is missing or damaged.

    Args:
        cache_file: Default: `qm9.cache` in the folder of the environment variable QMPROP_CACHE, else in the user's
            cache folder.
        progress: Called with (molecules done, molecules in all) while the files are parsed.

    Raises:
        DataError: There is no usable cache file and `qm9pack` is missing or not what it should be.
    """
    cache_file = cache_file or find_cache("qm9.cache")
    try:
        dataset = read_cache(cache_file)
        _verify_qm9(dataset)
        return dataset
    except DataError as error:  # missing, damaged, or of an older format
        files = _find_qm9pack_files(error.message)
    dataset = _parse_qm9(files, progress)
    _verify_qm9(dataset)
    try:
        write_cache(dataset, cache_file)
    except OutputError as error:
        warnings.warn(f"QM9 will be parsed again next time: {error.message}", RuntimeWarning, stacklevel=2)
    return dataset


def find_cache(name: str) -> Path:
    """Return the path of the cache file of this name, whether it exists or not.

    Raises:
        DataError: QMPROP_CACHE is not set and the user's cache folder cannot be found.
    """
    folder = os.environ.get("QMPROP_CACHE")
    if folder:
        return Path(folder) / name
    try:
        from platformdirs import user_cache_path
    except ImportError as error:
        hint = "Install platformdirs, set QMPROP_CACHE to a folder, or give a cache file with --data FILE."
        raise DataError("the user's cache folder cannot be found without platformdirs", hint) from error
    return user_cache_path("qmprop") / name


def read_smiles(ids: Iterable[int]) -> dict[int, str]:
    """Return SMILES of QM9's molecules by gdb number, from the files of `qm9pack`, as far as these have them.

    Raises:
        DataError: `qm9pack` is missing or not what it should be.
    """
    wanted = set(ids)
    smiles: dict[int, str] = {}
    for number, (text,) in read_cells(["SMILES"], "it has the SMILES"):
        if number in wanted:
            smiles[number] = text
            if len(smiles) == len(wanted):
                break
    return smiles


def read_cells(columns: Sequence[str], reason: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the gdb number of each molecule in the files of `qm9pack`, and what these columns say of it.

    Args:
        columns: Names of the columns.
        reason: What `qm9pack` is needed for, said where it is missing.

    Raises:
        DataError: `qm9pack` is missing or not what it should be.
    """
    for file in _find_qm9pack_files(reason):
        try:
            with file.open(encoding="utf-8", newline="") as lines:
                reader = csv.reader(lines)
                header = next(reader, [])
                index, *places = (header.index(name) for name in ("Index", *columns))
                for row in reader:
                    yield int(row[index]), [row[place] for place in places]
        except (ValueError, IndexError, OSError, csv.Error) as error:
            raise _unexpected(file, error) from error


def split_qm9(n: int = QM9_SIZE) -> dict[str, NDArray[np.int64]]:
    """Return the indices of EGNN's split of QM9 (molecules in order of their gdb number).

    Args:
        n: Number of molecules at hand, which must be all of QM9.

    Returns:
        "train" [100000], "valid" [17748] and "test" [13083], which do not overlap; and of "valid" the first part
        "choose" [7748], which chooses epochs and settings, and the last "calibrate" [10000], which chooses nothing.

    Raises:
        DataError: `n` is not the size of QM9.
    """
    if n != QM9_SIZE:
        raise DataError(f"EGNN's split is one of QM9's {QM9_SIZE} molecules, not of {n}")
    return _split(n, TRAIN_SIZE, VALID_SIZE, CHOOSE_SIZE)


def split_other(n: int) -> dict[str, NDArray[np.int64]]:
    """Return a fixed random split of `n` molecules, 80/10/10, with the same keys as `split_qm9`."""
    tenth = max(n // 10, 1) if n >= 3 else 0
    return _split(n, n - 2 * tenth, tenth, (tenth + 1) // 2)


def split_data(dataset: Dataset) -> dict[str, NDArray[np.int64]]:
    """Return EGNN's split for the whole of QM9 and `split_other` for anything else."""
    if is_whole_qm9(dataset):
        return split_qm9()
    return split_other(len(dataset))


def _split(n: int, train: int, valid: int, choose: int) -> dict[str, NDArray[np.int64]]:
    order = np.random.RandomState(0).permutation(n).astype(np.int64)  # the published split
    validation = order[train : train + valid]
    return {
        "train": order[:train],
        "valid": validation,
        "test": order[train + valid :],
        "choose": validation[:choose],
        "calibrate": validation[choose:],
    }


def _find_qm9pack_files(reason: str) -> list[Path]:
    """Return QM9's CSV files, without importing `qm9pack`, which needs the removed pkg_resources."""
    spec = find_spec("qm9pack")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"QM9 comes from the package qm9pack, which is not installed ({reason})", _TRAIN_HINT)
    folder = Path(spec.submodule_search_locations[0]) / "data"
    files = [folder / name for name in _FILES]
    for file in files:
        if not file.is_file():
            raise DataError(f"the installed package qm9pack lacks '{file}'", _TRAIN_HINT)
    return files


def _unexpected(file: Path, error: Exception) -> DataError:
    return DataError(f"'{file}' is not a QM9 file as expected: {error}", "Install qm9pack again.")


def _parse_qm9(files: Iterable[Path], progress: Progress | None = None) -> Dataset:
    chunks: list[tuple[NDArray[Any], ...]] = []
    done = 0
    for file in files:
        try:
            for chunk in _read_csv(file):
                chunks.append(chunk)
                done += len(chunk[0])
                if progress is not None:
                    progress(done, QM9_SIZE)
        except (ValueError, KeyError, IndexError, OSError, csv.Error) as error:
            raise _unexpected(file, error) from error
    ids, counts, numbers, positions, targets = (np.concatenate(parts) for parts in zip(*chunks, strict=True))
    return Dataset(ids, np.concatenate([[0], np.cumsum(counts)]), numbers, positions, targets, "qm9")


def _read_csv(file: Path) -> Iterator[tuple[NDArray[Any], ...]]:
    """Yield ids [b], atom counts [b], numbers [n], positions [n, 3] in Å and targets [b, 12], b molecules at a time."""
    with file.open(encoding="utf-8", newline="") as lines:
        reader = csv.reader(lines)
        column = {name: index for index, name in enumerate(next(reader, []))}
        index, elements, coordinates = (column[name] for name in ("Index", "Elements", "XYZ_Ang"))
        labels = [column[TARGETS[key].qm9_column] for key in DEFAULT_KEYS]
        while rows := list(islice(reader, _CHUNK)):
            ids = np.array([int(row[index]) for row in rows], dtype=np.int64)
            symbols = [row[elements].translate(_BRACKETS).replace(",", "") for row in rows]
            counts = np.array([len(text) for text in symbols], dtype=np.int64)
            numbers = _NUMBER_OF[np.frombuffer("".join(symbols).encode("ascii"), dtype=np.uint8)]
            if not numbers.all():
                raise ValueError(
                    f"an element among gdb {ids[0]} to {ids[-1]} is none of {', '.join(ELEMENTS.values())}"
                )
            sizes = np.array([row[coordinates].count(",") + 1 for row in rows])
            if (sizes != 3 * counts).any():
                raise ValueError(f"gdb {ids[np.argmax(sizes != 3 * counts)]} has not three coordinates per element")
            positions = parse_numbers([row[coordinates] for row in rows], int(sizes.sum())).reshape(-1, 3)
            targets = parse_numbers([",".join(row[label] for label in labels) for row in rows], 12 * len(rows))
            yield ids, counts, numbers, positions.astype(np.float32), targets.reshape(-1, 12) * _QM9_FACTORS


def parse_numbers(cells: Sequence[str], count: int) -> NDArray[np.float64]:
    """Return the `count` numbers in cells such as "[[1.,-.5],[7.E-6,2]]", which are no valid JSON."""
    text = ",".join(cells).translate(_BRACKETS)
    values = np.array(text.split(","), dtype=np.float64)
    if len(values) != count or not np.isfinite(values).all():
        raise ValueError(f"expected {count} finite numbers, found {int(np.isfinite(values).sum())}")
    return values


def _verify_qm9(dataset: Dataset) -> None:
    """Check that the data set is QM9 with its columns in order.

    Raises:
        DataError: A fact about QM9 does not hold.
    """
    hint = "Install qm9pack again, or delete the cache file."
    ids = dataset.ids
    if len(ids) != QM9_SIZE or (np.diff(ids) <= 0).any() or 58 in ids or 59 not in ids:
        raise DataError(f"these are not QM9's {QM9_SIZE} molecules in order of their gdb number", hint)
    column = {key: dataset.targets[:, index] for index, key in enumerate(DEFAULT_KEYS)}
    if not np.isfinite(dataset.targets).all():
        raise DataError("QM9 lacks a reference value", hint)
    if np.abs(column["lumo"] - column["homo"] - column["gap"]).max() > 1.5e-4 * HARTREE_EV:
        raise DataError("gap = lumo - homo does not hold for every molecule of QM9", hint)
    if np.abs(column["h"] - column["u"] - RT_EV).max() > 5e-5 * HARTREE_EV:
        raise DataError("H - U = RT does not hold for every molecule of QM9", hint)
    for gdb, values in _KNOWN_ROWS.items():
        row = int(np.searchsorted(ids, gdb))
        for key, value in values.items():
            factor = unit_factor(key, TARGETS[key].qm9_unit)
            if abs(column[key][row] / factor - value) > 1e-9 * abs(value):
                raise DataError(f"gdb {gdb} of QM9 has {key} = {column[key][row] / factor}, not {value}", hint)
