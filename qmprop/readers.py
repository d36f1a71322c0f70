"""Paths, folders, globs and stdin to one stream of molecules and failures."""

from __future__ import annotations

import contextlib
import functools
import glob
import io
import itertools
import os
import stat
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, cast

import numpy as np

from qmprop.errors import UsageError
from qmprop.formats import Failure, Lines, ParseError, clean_name, from_rdkit, read_mdl, read_xyz
from qmprop.molecule import Molecule
from qmprop.records import Message

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["Failure", "check_format", "from_ase", "from_rdkit", "read_file", "read_paths"]

Found = Molecule | Failure

#: Formats read without ASE.
OWN_FORMATS: Final = {"xyz": read_xyz, "extxyz": read_xyz, "sdf": read_mdl, "sd": read_mdl, "mol": read_mdl}
#: Suffixes that only molecule files have: what a folder stands for.
FOLDER_SUFFIXES: Final = frozenset(
    [f".{name}" for name in OWN_FORMATS]
    + [".pdb", ".cif", ".gen", ".xsf", ".traj", ".cube", ".gro", ".g96", ".gjf", ".com", ".cjson", ".car"]
)
#: ASE formats that are no files: databases over the network and folders.
_NOT_FILES: Final = frozenset(["mysql", "postgresql", "bundletrajectory"])
_COMPRESSED: Final = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")
_PEEK: Final = 50_000  # bytes in which ASE looks for a format's signature
_MAX_SPOOL: Final = 1 << 30  # bytes of a pipe that are copied to a file for ASE


def read_paths(
    inputs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], *, input_format: str | None = None
) -> Iterator[Found]:
    """Yield one `Molecule` or `Failure` for each record of the inputs, in order.

    Args:
        inputs: Files, folders (their molecule files, recursively), glob patterns, or "-" for stdin.
        input_format: Read every input as this format instead of going by suffix and content.

    Raises:
        UsageError: `input_format` is unknown.
    """
    check_format(input_format)
    paths = [inputs] if isinstance(inputs, str | os.PathLike) else inputs
    return itertools.chain.from_iterable(_read_input(os.fspath(path), input_format) for path in paths)


def read_file(
    path: str | os.PathLike[str], *, source: str | None = None, input_format: str | None = None
) -> Iterator[Found]:
    """Yield one `Molecule` or `Failure` for each record of a file, which may be a pipe or device.

    Args:
        path: The file.
        source: What the records call it; the path itself by default.
        input_format: Read it as this format instead of going by suffix and content.

    Raises:
        UsageError: `input_format` is unknown.
    """
    check_format(input_format)
    return _read_file(os.fspath(path), source or _printable(os.fspath(path)), input_format)


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


def check_format(input_format: str | None) -> None:
    """Check the name of an input format; None and ASE's file formats and suffixes are fine, too.

    Raises:
        UsageError: There is no such format.
    """
    if input_format is not None and input_format not in OWN_FORMATS and _find_ase_format(input_format) is None:
        raise UsageError(
            f"unknown input format '{input_format}'",
            f"Use one of: {', '.join(OWN_FORMATS)}; or any that ASE reads, for instance pdb, gen or cube.",
        )


def _read_input(path: str, input_format: str | None) -> Iterator[Found]:
    if path == "-":
        yield from _read_stdin(input_format)
        return
    try:
        is_folder = stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        yield from _read_glob(path, input_format)
    except OSError as error:
        yield _fail(path, "unreadable", f"{error.strerror}.")
    else:
        yield from _read_folder(path, input_format) if is_folder else read_file(path, input_format=input_format)


def _read_glob(pattern: str, input_format: str | None) -> Iterator[Found]:
    if not glob.has_magic(pattern):
        yield _fail(pattern, "missing-file", "No such file or folder.")
        return
    found = {}
    with contextlib.suppress(ValueError):  # a null byte
        for path in sorted(glob.iglob(pattern, recursive=True)):
            folder, name = os.path.split(path)
            found.setdefault((os.path.realpath(folder), name), path)  # once, even through a loop of links
    if not found:
        yield _fail(pattern, "no-molecules", "No file matches the pattern.")
    for path in found.values():
        yield from _read_input(path if path != "-" else "./-", input_format)


def _read_folder(folder: str, input_format: str | None) -> Iterator[Found]:
    """Walk the folder in the order of the sorted paths; links are followed, a folder is entered once."""
    stack, entered, is_empty = [Path(folder)], set(), True
    while stack:
        path = stack.pop()
        try:
            mode = os.stat(path).st_mode
            if not stat.S_ISDIR(mode):
                if stat.S_ISREG(mode) and path.suffix.lower() in FOLDER_SUFFIXES:
                    is_empty = False
                    yield from read_file(path, input_format=input_format)
                continue
            if os.path.realpath(path) in entered:
                continue
            entered.add(os.path.realpath(path))
            names = sorted((name for name in os.listdir(path) if not name.startswith(".")), reverse=True)
            stack += [path / name for name in names]
        except OSError as error:
            if os.path.islink(path) and path.suffix.lower() not in FOLDER_SUFFIXES:
                continue  # a dangling link to something that is not our business
            is_empty = False
            yield _fail(str(path), "unreadable", f"{error.strerror}.")
    if is_empty:
        yield _fail(folder, "no-molecules", "The folder holds no molecule files.")


def _read_stdin(input_format: str | None) -> Iterator[Found]:
    if sys.stdin is None:
        yield _fail("-", "unreadable", "There is no standard input.")
        return
    stream = getattr(sys.stdin, "buffer", None) or io.BytesIO(sys.stdin.read().encode())
    yield from _read_stream(stream, "-", input_format, None)


def _read_file(path: str, source: str, input_format: str | None) -> Iterator[Found]:
    try:
        stream = open(path, "rb")  # noqa: SIM115
    except (FileNotFoundError, ValueError):
        yield _fail(source, "missing-file", "No such file or folder.")
    except OSError as error:
        yield _fail(source, "unreadable", f"{error.strerror}.")
    else:
        with stream:
            yield from _read_stream(stream, source, input_format, path)


def _read_stream(stream: BinaryIO, source: str, input_format: str | None, path: str | None) -> Iterator[Found]:
    """Yield the records of an open stream, then one failure if it breaks off or holds none."""
    index = 0
    text = io.TextIOWrapper(stream, encoding="utf-8", errors="replace")
    try:
        for index, found in enumerate(_parse(text, stream, source, input_format, path), start=1):
            yield found
    except _UnknownFormatError as error:
        yield _fail(source, "unknown-format", str(error))
    except ParseError as error:
        yield _fail(source, "parse-error", str(error), index)
    except OSError as error:
        yield _fail(source, "unreadable", f"{error.strerror or error}.", index)
    else:
        if index == 0:
            yield _fail(source, "empty-file", "The input holds no data.")
    finally:
        with contextlib.suppress(OSError, ValueError):
            text.detach()  # leave stdin open


def _parse(
    text: io.TextIOWrapper, stream: BinaryIO, source: str, input_format: str | None, path: str | None
) -> Iterator[Found]:
    peek = getattr(stream, "peek", None)
    start: bytes = peek(_PEEK) if peek else cast(io.BytesIO, stream).getvalue()
    if start.startswith(_COMPRESSED):
        raise _UnknownFormatError("The data is compressed; decompress it first.")
    lines = Lines(text)
    suffix = Path(path).suffix.lower().removeprefix(".") if path else ""
    name = input_format or (suffix if suffix in OWN_FORMATS else _sniff(lines.peek(4)))
    if name is None and start and not start.isspace():
        name = _guess_ase_format(start, path)
    if name is None:
        return iter(())
    if name in OWN_FORMATS:
        return OWN_FORMATS[name](lines, source)
    ase_format = _find_ase_format(name)
    if ase_format is None:
        raise _UnknownFormatError(f"The format is not known ('{name}').")
    if path and os.path.isfile(path):
        return _read_ase(path, ase_format, source)
    return _spool_ase(itertools.chain(), ase_format, source)
