"""Labeled molecules as flat arrays; the compact cache file that keeps them; extxyz files with labels.

A cache file is a magic line, the SHA-256 of the body, and a compressed npz body. Nothing in it is ever unpickled, and
reading it needs numpy only.
"""

from __future__ import annotations

import hashlib
import io
import os
import secrets
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qmprop.errors import DataError, OutputError
from qmprop.molecule import Molecule, find_error
from qmprop.targets import (
    ATOM_ENERGIES_HARTREE,
    ATOMIZATION_KEYS,
    DEFAULT_KEYS,
    ELEMENTS,
    HARTREE_EV,
    TARGETS,
    parse_units,
    unit_factor,
)

_MAGIC: Final = b"qmprop-dataset-1\n"
_DIGEST_SIZE: Final = hashlib.sha256().digest_size
_DAMAGED_HINT: Final = "Copy it again, or delete it to have it built again."
_ARRAYS: Final = ("ids", "offsets", "numbers", "positions", "targets")


@dataclass(frozen=True, eq=False)
class Dataset:
    """Molecules with reference values, as flat arrays: m molecules, N atoms in all.

    Attributes:
        ids: gdb numbers, int64 [m]; 0 to m - 1 for other data.
        offsets: Atoms of molecule k are `offsets[k]:offsets[k + 1]`, int64 [m + 1].
        numbers: Atomic numbers, uint8 [N].
        positions: Positions in Å, float32 [N, 3].
        targets: Reference values, float64 [m, 12], in the order and default units of `targets.DEFAULT_KEYS`; NaN where
            a label is absent, which happens in users' files only.
        name: "qm9", or the path of the file.
    """

    ids: NDArray[np.int64]
    offsets: NDArray[np.int64]
    numbers: NDArray[np.uint8]
    positions: NDArray[np.float32]
    targets: NDArray[np.float64]
    name: str

    def __post_init__(self) -> None:
        """Check shapes and values; raise ValueError where they do not fit."""
        for field, dtype in zip(_ARRAYS, (np.int64, np.int64, np.uint8, np.float32, np.float64), strict=True):
            object.__setattr__(self, field, np.ascontiguousarray(getattr(self, field), dtype=dtype))
        m, n = len(self.ids), len(self.numbers)
        expected = {"ids": (m,), "offsets": (m + 1,), "numbers": (n,), "positions": (n, 3), "targets": (m, 12)}
        for field, shape in expected.items():
            if getattr(self, field).shape != shape:
                raise ValueError(f"{field} must have shape {list(shape)}, not {list(getattr(self, field).shape)}")
        if self.offsets[0] != 0 or self.offsets[-1] != n or (np.diff(self.offsets) <= 0).any():
            raise ValueError(f"offsets must rise from 0 to the number of atoms, {n}")
        if not np.isfinite(self.positions).all():
            raise ValueError("positions must be finite")
        if not np.isin(self.numbers, list(ELEMENTS)).all():
            raise ValueError(f"numbers must be among {list(ELEMENTS)}")

    def __len__(self) -> int:
        """Return the number of molecules."""
        return len(self.ids)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the content (ids, offsets, numbers, positions, targets), hexadecimal; the name does not count."""
        digest = hashlib.sha256()
        for field in _ARRAYS:
            digest.update(getattr(self, field).tobytes())
        return digest.hexdigest()

    @cached_property
    def heavy_atoms(self) -> NDArray[np.int64]:
        """Number of atoms other than hydrogen in each molecule [m]."""
        return np.add.reduceat(self.numbers > 1, self.offsets[:-1], dtype=np.int64)

    def select(self, indices: ArrayLike | slice) -> Dataset:
        """Return the molecules at `indices` (integers, a mask or a slice), in that order."""
        if not isinstance(indices, slice):
            indices = np.asarray(indices, dtype=np.int64 if np.size(indices) == 0 else None)
        chosen = np.arange(len(self))[indices]
        atoms, offsets = self.locate(chosen)
        return Dataset(
            self.ids[chosen], offsets, self.numbers[atoms], self.positions[atoms], self.targets[chosen], self.name
        )

    def locate(self, rows: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the indices of the atoms of the molecules at `rows` [n], and their offsets among these [rows + 1]."""
        counts = np.diff(self.offsets)[rows]
        offsets = np.concatenate([[0], np.cumsum(counts)])
        return np.repeat(self.offsets[rows] - offsets[:-1], counts) + np.arange(offsets[-1]), offsets

    def molecule(self, k: int) -> Molecule:
        """Return molecule `k` (negative `k` counts from the end)."""
        k = range(len(self))[k]
        atoms = slice(int(self.offsets[k]), int(self.offsets[k + 1]))
        name = f"gdb_{self.ids[k]}" if self.name == "qm9" else None
        return Molecule(
            self.numbers[atoms].astype(np.int64),
            self.positions[atoms].astype(np.float64),
            name=name,
            source=self.name,
            index=k,
        )


def is_cache(path: str | Path) -> bool:
    """Return whether the file begins as a cache file does."""
    try:
        with open(path, "rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def read_cache(path: str | Path) -> Dataset:
    """Return the data set in a cache file.

    Raises:
        DataError: The file cannot be read, is not a cache file, or is damaged.
    """
    arrays = read_arrays(path, _MAGIC)
    try:
        name = str(arrays.pop("name"))
        arrays["positions"] = join_bytes(arrays["positions"], np.float32, 3)
        arrays["targets"] = join_bytes(arrays["targets"], np.float64, len(DEFAULT_KEYS))
        return Dataset(**arrays, name=name)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"the cache file '{path}' is damaged: {error}", _DAMAGED_HINT) from error


def write_cache(dataset: Dataset, path: str | Path) -> None:
    """Write the data set to a cache file, whole or not at all.

    Raises:
        OutputError: The file cannot be written; what was there before is still there.
    """
    arrays = {field: getattr(dataset, field) for field in _ARRAYS}
    arrays |= {field: split_bytes(arrays[field]) for field in ("positions", "targets")}
    write_arrays(path, _MAGIC, name=np.array(dataset.name), **arrays)


def read_arrays(path: str | Path, magic: bytes) -> dict[str, NDArray[Any]]:
    """Return the arrays by name in a file that `write_arrays` wrote with this magic line.

    Raises:
        DataError: The file cannot be read, is no such file, or is damaged.
    """
    try:
        content = memoryview(Path(path).read_bytes())
    except OSError as error:
        raise DataError(f"cannot read the cache file '{path}': {error.strerror or error}") from error
    if bytes(content[: len(magic)]) != magic:
        raise DataError(f"'{path}' is not a cache file of this version of qmprop")
    body = content[len(magic) + _DIGEST_SIZE :]
    if hashlib.sha256(body).digest() != content[len(magic) : len(magic) + _DIGEST_SIZE]:
        raise DataError(f"the cache file '{path}' is damaged: its checksum is wrong", _DAMAGED_HINT)
    try:
        with np.load(io.BytesIO(body), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (ValueError, KeyError, IndexError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"the cache file '{path}' is damaged: {error}", _DAMAGED_HINT) from error


def write_arrays(path: str | Path, magic: bytes, **arrays: NDArray[Any]) -> None:
    """Write arrays to a cache file: to a temporary file beside it, read back, then moved into place.

    Raises:
        OutputError: The file cannot be written; what was there before is still there.
    """
    path = Path(path)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]  # a keyword of its own may not be an array
    content = magic + hashlib.sha256(buffer.getbuffer()).digest() + buffer.getvalue()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if temporary.read_bytes() != content:
                raise OSError("what was read back is not what was written")
            os.replace(temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write the cache file '{path}': {error.strerror or error}") from error


def load_labeled(path: str | Path, *, units: str | Iterable[str] | Mapping[str, str] | None = None) -> Dataset:
    """Return the molecules of an extxyz file whose info entries carry reference values: `mu=1.85 u0=-2079.1`.

    Any subset of the property keys will do. Atomization energies, `u0_atom` and so on, are turned into totals where the
    total is absent.

    Args:
        path: The file.
        units: Units of the labels, as for `targets.parse_units`.

    Raises:
        DataError: The file cannot be read, has no labels at all, or a frame is not a molecule the network knows.
        UsageError: A unit is unknown.
    """
    factors = {key: unit_factor(key, unit) for key, unit in parse_units(units).items()}
    molecules: list[Molecule] = []
    targets: list[NDArray[np.float64]] = []
    for frame, (molecule, info) in enumerate(_read_extxyz(Path(path)), start=1):
        if problem := find_error(molecule):
            raise DataError(f"frame {frame} of '{path}': {problem.text}", "Remove that frame.")
        for key in factors.keys() & info.keys():
            if isinstance(info[key], bool) or not isinstance(info[key], Real) or not np.isfinite(info[key]):
                hint = "Leave out labels that are not known."
                raise DataError(f"frame {frame} of '{path}': {key} = {info[key]} is not a finite number", hint)
        molecules.append(molecule)
        targets.append(_read_labels(molecule, info, factors))
    if not np.isfinite(targets).any():
        hint = f"Give at least one of these as an info entry, such as mu=1.85: {', '.join(TARGETS)}."
        raise DataError(f"'{path}' has {len(molecules)} molecules and no labels", hint)
    return Dataset(
        np.arange(len(molecules)),
        np.cumsum([0, *(len(molecule.numbers) for molecule in molecules)]),
        np.concatenate([molecule.numbers for molecule in molecules]),
        np.concatenate([molecule.positions for molecule in molecules]),
        np.stack(targets),
        str(path),
    )


def split_bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    """Return bytes [itemsize, size] of `array`, column by column: like bytes side by side compress better."""
    columns = np.ascontiguousarray(array.T).reshape(-1)
    return np.ascontiguousarray(columns.view(np.uint8).reshape(len(columns), columns.itemsize).T)


def join_bytes(split: NDArray[np.uint8], dtype: type[np.number[Any]], columns: int) -> NDArray[Any]:
    """Undo `split_bytes`."""
    return np.ascontiguousarray(np.ascontiguousarray(split.T).view(dtype).reshape(columns, -1).T)


def _read_extxyz(path: Path) -> Iterator[tuple[Molecule, Mapping[str, Any]]]:
    """Yield the molecule and the info entries of every frame."""
    from ase.io import iread

    try:
        with path.open(encoding="utf-8") as file:  # a file object, because ase splits names at "@"
            for index, atoms in enumerate(iread(file, index=":", format="extxyz")):
                periodic = bool(atoms.pbc.any())
                molecule = Molecule(atoms.numbers, atoms.positions, source=str(path), index=index, periodic=periodic)
                yield molecule, atoms.info
    except Exception as error:  # ase raises whatever a damaged file makes it stumble over
        raise DataError(
            f"cannot read '{path}' as extxyz: {error}", "Give a cache file or a whole extxyz file."
        ) from error


def _read_labels(molecule: Molecule, info: Mapping[str, Any], factors: Mapping[str, float]) -> NDArray[np.float64]:
    """Return the labels [12] in default units, NaN where absent."""
    labels = {key: float(info[key]) * factors[key] for key in factors.keys() & info.keys()}
    for key in ATOMIZATION_KEYS:
        total = TARGETS[key].total
        if key in labels and total is not None and total not in labels:
            atoms = sum(ATOM_ENERGIES_HARTREE[total][number] for number in molecule.numbers.tolist())
            labels[total] = labels[key] + atoms * HARTREE_EV
    return np.array([labels.get(key, np.nan) for key in DEFAULT_KEYS])
