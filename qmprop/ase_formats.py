"""What ASE reads to molecules: its many file formats and its databases."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import sqlite3
import tempfile
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, Final
from urllib.parse import quote as quote_uri

import numpy as np

from qmprop.formats import Failure, clean_name
from qmprop.molecule import Molecule
from qmprop.records import Message
from qmprop.streams import MAX_LINE, ParseError

if TYPE_CHECKING:
    from ase import Atoms

#: ASE formats that are no files: databases over the network and folders.
_NOT_FILES: Final = frozenset(["mysql", "postgresql", "bundletrajectory"])
_DATABASES: Final = frozenset(["db", "json"])
#: Bytes of a text that ASE reads as a whole.
MAX_TEXT: Final = 1 << 27
#: Bytes of a pipe or of compressed data that are copied to a file for ASE, and of volumetric data, which are not kept.
MAX_SPOOL: Final = 1 << 30
_MAX_ENDS: Final = 10_000  # lines read past the end before a reader is taken to be in an endless loop
_BLOCK: Final = 1 << 16  # bytes
_PAGE: Final = 100  # rows of a database taken at once
_SQLITE: Final = b"SQLite format 3\0"


class TooLargeError(Exception):
    """The input is larger than what can be read."""


def from_ase(atoms: Atoms, *, source: str, index: int) -> Molecule:
    """Return the molecule of an `ase.Atoms`, positions in Å.

    The charge is `info["charge"]`, or else the sum of the initial charges, rounded.
    """
    name = atoms.info.get("name")
    charge = atoms.info.get("charge", atoms.get_initial_charges().sum())
    finite = isinstance(charge, int | float | np.number) and bool(np.isfinite(charge))
    return Molecule(
        atoms.numbers.astype(np.int64),
        atoms.positions.astype(np.float64),
        name=clean_name(name) if isinstance(name, str) else None,
        source=source,
        index=index,
        charge=round(float(charge)) if finite else 0,
        periodic=bool((atoms.pbc & atoms.cell.array.any(axis=1)).any()),
    )


def find_ase_format(name: str) -> str | None:
    """Return ASE's name of the readable file format with this name or suffix."""
    from ase.io.formats import UnknownFileTypeError, extension2format, ioformats

    ase_format = ioformats.get(name) or extension2format.get(name)
    try:
        is_readable = ase_format is not None and ase_format.can_read and ase_format.name not in _NOT_FILES
    except UnknownFileTypeError:
        return None
    return ase_format.name if is_readable else None


def guess_ase_format(head: bytes, path: str | None, name: str | None) -> str | None:
    """Return the ASE format of an input by its first bytes, its file if it has one, or its name."""
    from ase.io.formats import filetype, match_magic

    try:
        # An absolute path, as ASE takes a file called postgres... for the address of a database.
        found = filetype(os.path.abspath(path)) if path and os.path.isfile(path) else match_magic(head).name
    except Exception:  # ASE has no common base class for its errors
        found = os.path.splitext(name or "")[1][1:].lower()
    return find_ase_format(found)


def is_ase_database(path: str) -> bool:
    """Return whether the file is an SQLite database of ASE; it is not changed, as ASE itself would an empty one."""
    try:
        with open(path, "rb") as file:
            if file.read(len(_SQLITE)) != _SQLITE:
                return False
        with contextlib.closing(_open_sqlite(path)) as database:
            return bool(database.execute("SELECT count(*) FROM sqlite_master WHERE name = 'systems'").fetchone()[0])
    except (OSError, ValueError, sqlite3.Error):
        return False


def read_ase(data: BinaryIO, ase_format: str, source: str, path: str | None) -> Iterator[Molecule | Failure]:
    """Yield all frames of an input that ASE reads.

    Args:
        data: The input, at its beginning.
        ase_format: ASE's name of the format.
        source: What the records call it.
        path: The file, if it is one that ASE can open as it is; else the data are copied to one.

    Raises:
        ParseError: ASE cannot read it further; what came before has been yielded.
        TooLargeError: The input is too large.
        OSError: It cannot be read.
    """
    from ase.io.formats import ioformats

    is_text = ase_format == "cif" or (not ioformats[ase_format].isbinary and ase_format != "db")
    limit = MAX_TEXT if is_text and ase_format != "cube" else MAX_SPOOL
    with contextlib.ExitStack() as stack:
        if path is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="qmprop-"))
            path = os.path.join(folder, "input")
            with open(path, "wb") as file:
                _copy(data, file, limit, is_text=is_text)
        elif is_text:
            _copy(data, None, limit, is_text=True)
        frames = _read_database if ase_format in _DATABASES else _read_frames
        yield from _convert(frames(os.path.abspath(path), ase_format), ase_format, source)


def _copy(data: BinaryIO, file: BinaryIO | None, limit: int, *, is_text: bool) -> None:
    """Go through the data, which must be as small as ASE needs them, and write them to the file if there is one."""
    size, line = 0, 0  # of all, and of the last line
    while block := data.read1(_BLOCK):  # type: ignore[attr-defined]
        if file is not None:
            file.write(block)
        size += len(block)
        line = line + len(block) if b"\n" not in block else len(block) - block.rindex(b"\n")
        if is_text and line > MAX_LINE:
            raise ParseError(f"a line is longer than {MAX_LINE} characters")
        if size > limit:
            raise TooLargeError(f"More than {limit >> 20} MiB, which ASE would read at once; split the file.")


def _convert(frames: Iterator[Atoms | Failure], ase_format: str, source: str) -> Iterator[Molecule | Failure]:
    for index in itertools.count():
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                atoms = next(frames, None)
            molecule = None if atoms is None else from_ase(atoms, source=source, index=index)
        except ParseError:
            raise
        except Exception as error:  # whatever the reader of the format stumbles over
            reason = str(clean_name(f"{type(error).__name__}: {error}"))[:300]
            raise ParseError(f"ASE cannot read it as {ase_format}: {reason}") from error
        if molecule is None:
            break
        yield molecule
    if index == 0:
        text = f"The file holds no molecule that ASE finds as {ase_format}."
        yield Failure(source, 0, Message("no-molecules", text))


class _EndingText(io.TextIOWrapper):
    """A text that ends a reader's loop if that does not notice the end itself."""

    _ends = 0

    def readline(self, size: int = -1, /) -> str:  # type: ignore[override]
        line = super().readline(size)
        if not line:
            self._ends += 1
            if self._ends > _MAX_ENDS:
                raise ParseError("the text ends too early")
        return line


def _read_frames(path: str, ase_format: str) -> Iterator[Atoms]:
    from ase.io import iread
    from ase.io.formats import ioformats

    options: dict[str, Any] = {"read_data": False} if ase_format == "cube" else {}
    kind = ioformats[ase_format]
    if kind.isbinary or not kind.acceptsfd:
        yield from iread(path, index=":", format=ase_format, do_not_split_by_at_sign=True, **options)
        return
    with _EndingText(open(path, "rb"), encoding="utf-8", errors="replace") as text:
        yield from iread(text, index=":", format=ase_format, **options)


def _read_database(path: str, ase_format: str) -> Iterator[Atoms]:
    """Yield the rows in order; the key "name" gives their names."""
    from ase.db import connect

    if ase_format == "db" and not is_ase_database(path):
        raise ParseError("the file is no SQLite database of ASE")
    with connect(path, type=ase_format, serial=True, use_lock_file=False) as database:
        last = 0
        while rows := list(database.select(f"id>{last}", sort="id", limit=_PAGE, include_data=False)):
            for row in rows:
                atoms = row.toatoms()
                atoms.info = {"name": row.key_value_pairs.get("name")}
                yield atoms
            last = rows[-1].id


def _open_sqlite(path: str) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{quote_uri(os.path.abspath(path))}?mode=ro", uri=True)
