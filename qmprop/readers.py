"""Paths, folders, globs and stdin to one stream of molecules and failures."""

from __future__ import annotations

import contextlib
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
from typing import TYPE_CHECKING, BinaryIO, Final

import numpy as np

from qmprop.errors import UsageError
from qmprop.formats import MAX_LINE, Failure, Lines, ParseError, clean_name, from_rdkit, read_mdl, read_xyz
from qmprop.molecule import Molecule
from qmprop.records import Message

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer
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
_HEAD: Final = 4  # lines that tell the format
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


class _UnknownFormatError(Exception):
    """Neither name nor content tells how to read the input."""


class _Rejoined(io.RawIOBase):
    """A binary stream with bytes put back before it; closing it leaves the stream open."""

    def __init__(self, head: bytes, rest: BinaryIO) -> None:
        self._head = head
        self._rest = rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer)
        data = self._head[: len(view)] or self._rest.read1(len(view))  # type: ignore[attr-defined]
        self._head = self._head[len(data) :]
        view[: len(data)] = data
        return len(data)


def _read_input(path: str, input_format: str | None) -> Iterator[Found]:
    if path == "-":
        return _read_stdin(input_format)
    try:
        is_folder = stat.S_ISDIR(os.stat(path).st_mode)
    except (OSError, ValueError) as error:  # ValueError: a null byte
        if glob.has_magic(path) and not isinstance(error, PermissionError):
            return _read_glob(path, input_format)
        return iter([_fail_os(path, error)])
    return _read_folder(path, input_format) if is_folder else read_file(path, input_format=input_format)


def _read_glob(pattern: str, input_format: str | None) -> Iterator[Found]:
    found: dict[tuple[str, str], str] = {}
    with contextlib.suppress(ValueError):  # a null byte
        for path in sorted(glob.iglob(pattern, recursive=True), key=lambda path: path.count(os.sep)):
            if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
                continue  # a pipe or device is read only when named
            folder, name = os.path.split(path)
            found.setdefault((os.path.realpath(folder), name), path)  # once, even through a loop of links
    if not found:
        yield _fail(pattern, "no-molecules", "No file matches the pattern.")
    for path in sorted(found.values()):
        yield from _read_input(path if path != "-" else "./-", input_format)


def _read_folder(folder: str, input_format: str | None) -> Iterator[Found]:
    """Walk the folder in the order of the sorted paths; links are followed, a folder is entered once."""
    stack, entered, is_empty = [Path(folder)], set[str](), True
    while stack:
        path = stack.pop()
        is_known = path.suffix.lower() in FOLDER_SUFFIXES
        try:
            mode = os.stat(path).st_mode
            if stat.S_ISDIR(mode):
                if (real := os.path.realpath(path)) not in entered:
                    entered.add(real)
                    names = (name for name in os.listdir(path) if not name.startswith("."))
                    stack += [path / name for name in sorted(names, reverse=True)]
                continue
        except OSError as error:
            if is_known or not os.path.islink(path):  # a dangling link is reported if a molecule was meant
                is_empty = False
                yield _fail_os(str(path), error)
            continue
        if is_known and stat.S_ISREG(mode):
            is_empty = False
            yield from read_file(path, input_format=input_format)
    if is_empty:
        yield _fail(folder, "no-molecules", "The folder holds no molecule files.")


def _read_stdin(input_format: str | None) -> Iterator[Found]:
    if sys.stdin is None or sys.stdin.closed:
        yield _fail("-", "unreadable", "There is no standard input.")
        return
    stream = getattr(sys.stdin, "buffer", None) or io.BytesIO(sys.stdin.read().encode("utf-8", "replace"))
    yield from _read_stream(stream, "-", input_format, None)


def _read_file(path: str, source: str, input_format: str | None) -> Iterator[Found]:
    try:
        stream = open(path, "rb")  # noqa: SIM115
    except (OSError, ValueError) as error:
        yield _fail_os(source, error)
        return
    with stream:
        yield from _read_stream(stream, source, input_format, path)


def _read_stream(stream: BinaryIO, source: str, input_format: str | None, path: str | None) -> Iterator[Found]:
    """Yield the records of an open stream, then one failure if it breaks off or holds none."""
    index = 0
    try:
        head = b"".join(itertools.takewhile(bool, (stream.readline(MAX_LINE) for _ in range(_HEAD))))
        data = io.BufferedReader(_Rejoined(head, stream))
        name = _choose_format(head, input_format, path)
        if name in OWN_FORMATS:
            text = io.TextIOWrapper(data, encoding="utf-8", errors="replace")
            records = OWN_FORMATS[name](Lines(text), source)
        else:
            records = _read_ase(data, name, source, path)
        for found in records:
            yield found
            index += 1
    except _UnknownFormatError as error:
        yield _fail(source, "unknown-format", str(error))
    except ParseError as error:
        yield _fail(source, "parse-error", str(error), index)
    except OSError as error:
        yield _fail_os(source, error, index)
    else:
        if index == 0:
            yield _fail(source, "empty-file", "The input holds no data.")


def _choose_format(head: bytes, input_format: str | None, path: str | None) -> str:
    """Return the key of `OWN_FORMATS` or the name of the ASE format to read the input with."""
    suffix = Path(path).suffix.lower().removeprefix(".") if path else ""
    if head.startswith(_COMPRESSED):
        raise _UnknownFormatError("The data is compressed; decompress it first.")
    if not head:
        return "xyz"  # whose reader finds nothing, either
    if input_format in OWN_FORMATS:
        return input_format
    if input_format:
        return _find_ase_format(input_format) or input_format
    if suffix in OWN_FORMATS:
        return suffix
    name = _sniff(head) or ("xyz" if head.isspace() else _guess_ase_format(head, path))
    if name is None:
        raise _UnknownFormatError(
            "Neither suffix nor content tells the format; is it .xyz, .sdf, or one that ASE reads?"
        )
    return name


def _sniff(head: bytes) -> str | None:
    lines = head.decode("utf-8", "replace").lstrip("\ufeff").splitlines()
    if len(lines) >= 4 and lines[3].rstrip().endswith(("V2000", "V3000")):
        return "sdf"
    text = lines[0].strip() if lines else ""
    is_count = text.isascii() and text.isdigit()
    return "xyz" if is_count and (len(lines) < 3 or len(lines[2].split()) >= 4) else None


def _guess_ase_format(head: bytes, path: str | None) -> str | None:
    from ase.io.formats import filetype, match_magic

    try:
        # An absolute path, as ASE takes a file called postgres... for the address of a database.
        found = filetype(os.path.abspath(path)) if path and os.path.isfile(path) else match_magic(head).name
    except Exception:  # ASE has no common base class for its errors
        return None
    return found if found in OWN_FORMATS else _find_ase_format(found)


def _find_ase_format(name: str) -> str | None:
    """Return ASE's name of the readable file format with this name or suffix."""
    from ase.io.formats import UnknownFileTypeError, extension2format, ioformats

    ase_format = ioformats.get(name) or extension2format.get(name)
    try:
        is_readable = ase_format is not None and ase_format.can_read and ase_format.name not in _NOT_FILES
    except UnknownFileTypeError:
        return None
    return ase_format.name if is_readable else None


def _read_ase(data: BinaryIO, ase_format: str, source: str, path: str | None) -> Iterator[Found]:
    """Yield all frames; what is no regular file is first copied to one, for ASE opens files by name and seeks."""
    from ase.io.formats import ioformats

    if path and os.path.isfile(path):
        yield from _iterate_ase(os.path.abspath(path), ase_format, source)
        return
    with tempfile.TemporaryDirectory(prefix="qmprop-") as folder:
        copy = os.path.join(folder, "input")
        with open(copy, "wb") as file:
            _copy(data, file, is_text=not ioformats[ase_format].isbinary)
        yield from _iterate_ase(copy, ase_format, source)


def _copy(data: BinaryIO, file: BinaryIO, *, is_text: bool) -> None:
    size = 0
    while line := data.readline(MAX_LINE):
        file.write(line)
        size += len(line)
        if is_text and len(line) == MAX_LINE:
            raise ParseError(f"a line is longer than {MAX_LINE} characters")
        if size > _MAX_SPOOL:
            raise ParseError(f"more than {_MAX_SPOOL >> 30} GiB through a pipe; read it from a file")


def _iterate_ase(path: str, ase_format: str, source: str) -> Iterator[Found]:
    from ase.io import iread

    images = iread(path, index=":", format=ase_format, do_not_split_by_at_sign=True)
    for index in itertools.count():
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                atoms = next(images, None)
            molecule = None if atoms is None else from_ase(atoms, source=source, index=index)
        except Exception as error:  # whatever the reader of the format stumbles over
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise ParseError(f"ASE cannot read it as {ase_format}: {reason}") from error
        if molecule is None:
            break
        yield molecule
    if index == 0:
        yield _fail(source, "no-molecules", f"The file holds no molecule that ASE finds as {ase_format}.")


def _fail_os(source: str, error: OSError | ValueError, index: int = 0) -> Failure:
    if isinstance(error, FileNotFoundError | NotADirectoryError | ValueError):
        return _fail(source, "missing-file", "No such file or folder.", index)
    return _fail(source, "unreadable", f"{error.strerror or error}.", index)


def _fail(source: str, code: str, text: str, index: int = 0) -> Failure:
    return Failure(_printable(source), index, Message(code, text))


def _printable(path: str) -> str:
    """Return the path with bytes that are not UTF-8 replaced, so that it can be written."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
