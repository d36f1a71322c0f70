"""Paths, folders, globs and stdin to one stream of molecules and failures."""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import io
import itertools
import os
import stat
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO, Final

from qmprop.ase_formats import TooLargeError, find_ase_format, from_ase, guess_ase_format, is_ase_database, read_ase
from qmprop.blocks import read_mol2, read_pdb
from qmprop.errors import UsageError
from qmprop.formats import Failure, from_rdkit, read_mdl, read_xyz
from qmprop.molecule import Molecule
from qmprop.records import Message
from qmprop.smiles import SmilesLine, looks_like_smiles, looks_like_table, read_smi, read_smiles_table, split_line
from qmprop.streams import (
    COMPRESSED_SUFFIXES,
    MAX_BLANK,
    MAX_LINE,
    Lines,
    MissingCodecError,
    ParseError,
    Rejoined,
    decompress,
    find_compression,
)
from qmprop.workers import Embedder

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = [
    "SMILES_SOURCE",
    "Failure",
    "check_format",
    "from_ase",
    "from_rdkit",
    "read_file",
    "read_list",
    "read_paths",
    "read_smiles",
]

Found = Molecule | Failure

#: Source of SMILES that are given as such.
SMILES_SOURCE: Final = "<smiles>"
#: Formats whose text holds geometries, read without ASE's help in telling them.
STRUCTURE_FORMATS: Final[dict[str, Callable[[Lines, str], Iterator[Found]]]] = {
    "xyz": read_xyz,
    "extxyz": read_xyz,
    "sdf": read_mdl,
    "sd": read_mdl,
    "mol": read_mdl,
    "mol2": read_mol2,
    "pdb": read_pdb,
    "ent": read_pdb,
    "proteindatabank": read_pdb,
}
#: Formats whose text holds SMILES.
SMILES_FORMATS: Final[dict[str, Callable[[Lines, str], Iterator[SmilesLine]]]] = {
    "smi": read_smi,
    "smiles": read_smi,
    "csv": read_smiles_table,
    "tsv": read_smiles_table,
}
#: Suffixes that only molecule files have, compressed ones left out: what a folder stands for.
FOLDER_SUFFIXES: Final = frozenset(
    [f".{name}" for name in (*STRUCTURE_FORMATS, "smi", "smiles")]
    + [".cif", ".gen", ".xsf", ".traj", ".cube", ".gro", ".g96", ".gjf", ".com", ".cjson", ".car", ".db"]
)
_ZIP: Final = b"PK\x03\x04"
_MAX_DIRECTORY: Final = 1 << 26  # bytes of a zip archive's list of members
_HEAD: Final = 4  # lines that tell the format
_MAX_PATH: Final = 1 << 16  # bytes of a path in a list
_PDB_STARTS: Final = ("HEADER ", "TITLE  ", "COMPND ", "AUTHOR ", "REMARK ", "CRYST1", "MODEL  ", "ATOM  ", "HETATM")


def read_paths(
    inputs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    input_format: str | None = None,
    pattern: str | Iterable[str] | None = None,
    jobs: int = 1,
    on_open: Callable[[BinaryIO], object] | None = None,
) -> Iterator[Found]:
    """Yield one `Molecule` or `Failure` for each record of the inputs, in order.

    Args:
        inputs: Files, folders (their molecule files, recursively), glob patterns, or "-" for stdin.
        input_format: Read every input as this format instead of going by suffix and content.
        pattern: Names of the files that a folder stands for, such as "*.csv", instead of the known suffixes.
        jobs: Processes that generate geometries where inputs hold SMILES; none is started otherwise.
        on_open: Called with every file before it is read, and with stdin.

    Raises:
        UsageError: `input_format` is unknown.
    """
    check_format(input_format)
    paths = [inputs] if isinstance(inputs, str | os.PathLike) else inputs
    patterns = [pattern] if isinstance(pattern, str) else list(pattern or ())
    return _read_all(paths, _Options(input_format, tuple(patterns), on_open), jobs)


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
    name = os.fspath(path)
    return _with_embedder(1, lambda embedder: _Reader(_Options(input_format), embedder).read_file(name, source))


def read_smiles(texts: Iterable[str], *, jobs: int = 1) -> Iterator[Found]:
    """Yield one `Molecule` or `Failure` for each SMILES, in order, with generated geometries.

    Args:
        texts: SMILES; a name may follow each of them, behind a blank.
        jobs: Processes that generate geometries.
    """
    lines = (SmilesLine(*split_line(text), SMILES_SOURCE, index) for index, text in enumerate(texts))
    return _with_embedder(jobs, lambda embedder: embedder.embed(lines))


def read_list(path: str) -> Iterator[str]:
    """Return an iterator over the paths that a file, or stdin for "-", lists: one a line, or ended by null bytes.

    The list is read as it is asked for. Empty entries are left out; "-" is the file of that name.

    Raises:
        UsageError: The list cannot be opened.
    """
    if path == "-":
        return _split_list(_open_stdin() or io.BufferedReader(io.BytesIO()))
    try:
        stream = open(path, "rb")  # noqa: SIM115
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"cannot read the list of files '{path}': {reason}") from error
    return _split_list(stream)


def check_format(input_format: str | None) -> None:
    """Check the name of an input format; None and ASE's file formats and suffixes are fine, too.

    Raises:
        UsageError: There is no such format.
    """
    own = {**STRUCTURE_FORMATS, **SMILES_FORMATS}
    if input_format is not None and input_format not in own and find_ase_format(input_format) is None:
        raise UsageError(
            f"unknown input format '{input_format}'",
            f"Use one of: {', '.join(own)}; or any that ASE reads, for instance cif, gen or cube.",
        )


class _UnknownFormatError(Exception):
    """Neither name nor content tells how to read the input."""


@dataclass(frozen=True, slots=True)
class _Options:
    """How to read: a format for everything, the names of files that count in folders, and who watches."""

    input_format: str | None = None
    patterns: tuple[str, ...] = ()
    on_open: Callable[[BinaryIO], object] | None = None

    def takes(self, path: str) -> bool:
        """Return whether a folder stands for the file with this path, among others."""
        name = os.path.basename(path)
        if self.patterns:
            return any(fnmatch.fnmatch(name, pattern) for pattern in self.patterns)
        return _suffix(name) in FOLDER_SUFFIXES


def _read_all(paths: Iterable[str | os.PathLike[str]], options: _Options, jobs: int) -> Iterator[Found]:
    def read(embedder: Embedder) -> Iterator[Found]:
        reader = _Reader(options, embedder)
        return itertools.chain.from_iterable(reader.read(os.fspath(path)) for path in paths)

    return _with_embedder(jobs, read)


def _with_embedder(jobs: int, read: Callable[[Embedder], Iterator[Found]]) -> Iterator[Found]:
    with Embedder(jobs) as embedder:
        yield from read(embedder)


class _Reader:
    """Reads inputs of every kind."""

    def __init__(self, options: _Options, embedder: Embedder) -> None:
        self._options = options
        self._embedder = embedder

    def read(self, path: str) -> Iterator[Found]:
        """Yield the records of a file, folder, glob, or of stdin for "-"."""
        if path == "-":
            return self._read_stdin()
        try:
            is_folder = stat.S_ISDIR(os.stat(path).st_mode)
        except (OSError, ValueError) as error:  # ValueError: a null byte
            if glob.has_magic(path) and not isinstance(error, PermissionError):
                return self._read_glob(path)
            return iter([_fail_os(path, error)])
        return self._read_folder(path) if is_folder else self.read_file(path)

    def read_file(self, path: str, source: str | None = None) -> Iterator[Found]:
        """Yield the records of a file, pipe or device."""
        source = source or _printable(path)
        try:
            stream = open(path, "rb")  # noqa: SIM115
        except (OSError, ValueError) as error:
            yield _fail_os(source, error)
            return
        with stream:
            self._tell(stream)
            yield from self._read_stream(stream, source, path, path)

    def _read_stdin(self) -> Iterator[Found]:
        stream = _open_stdin()
        if stream is None:
            yield _fail("-", "unreadable", "There is no standard input.")
            return
        self._tell(stream)
        yield from self._read_stream(stream, "-", None, None)

    def _tell(self, stream: BinaryIO) -> None:
        if self._options.on_open is not None:
            self._options.on_open(stream)

    def _read_glob(self, pattern: str) -> Iterator[Found]:
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
            yield from self.read(path if path != "-" else "./-")

    def _read_folder(self, folder: str) -> Iterator[Found]:
        """Walk the folder in the order of the sorted paths; links are followed, a folder is entered once."""
        stack, entered, is_empty = [Path(folder)], set[str](), True
        while stack:
            path = stack.pop()
            is_wanted = self._options.takes(str(path))
            try:
                mode = os.stat(path).st_mode
                if stat.S_ISDIR(mode):
                    if (real := os.path.realpath(path)) not in entered:
                        entered.add(real)
                        names = (name for name in os.listdir(path) if not name.startswith("."))
                        stack += [path / name for name in sorted(names, reverse=True)]
                    continue
            except OSError as error:
                if is_wanted or not os.path.islink(path):  # a dangling link is reported if a molecule was meant
                    is_empty = False
                    yield _fail_os(str(path), error)
                continue
            if path.suffix == ".db" and not self._options.patterns and not is_ase_database(str(path)):
                continue
            if is_wanted and stat.S_ISREG(mode):
                is_empty = False
                yield from self.read_file(str(path))
        if is_empty:
            what = "no file that matches the pattern" if self._options.patterns else "no molecule files"
            yield _fail(folder, "no-molecules", f"The folder holds {what}.")

    def _read_stream(self, stream: BinaryIO, source: str, name: str | None, path: str | None) -> Iterator[Found]:
        """Yield the records of an open stream, then one failure if it breaks off or holds none.

        Args:
            stream: The data, perhaps compressed.
            source: What the records call it.
            name: A file name, whose suffix may tell the format.
            path: The file that holds the data, if it may be opened once more.
        """
        index = 0
        try:
            for found in self._read_data(stream, source, name, path):
                yield found
                index += 1
        except _UnknownFormatError as error:
            yield _fail(source, "unknown-format", str(error), index)
        except ParseError as error:
            yield _fail(source, "parse-error", str(error), index)
        except TooLargeError as error:
            yield _fail(source, "too-large-input", str(error), index)
        except MissingCodecError as error:
            yield _fail(source, "unreadable", f"The data are compressed; {error}.", index)
        except OSError as error:
            yield _fail_os(source, error, index)
        else:
            if index == 0:
                yield _fail(source, "empty-file", "The input holds no data.")

    def _read_data(self, stream: BinaryIO, source: str, name: str | None, path: str | None) -> Iterator[Found]:
        plain, compression = decompress(stream)
        form = _known_format(self._options.input_format, name)
        head = b"".join(plain.readline(MAX_LINE) for _ in range(_HEAD if form is None else 1))
        data = io.BufferedReader(Rejoined(head, plain))
        if path is not None and (compression is not None or not os.path.isfile(path)):
            path = None
        if head.startswith(_ZIP):
            return self._read_zip(stream, source, path)
        if find_compression(head):
            raise _UnknownFormatError("The data are compressed more than once; decompress them first.")
        form = form or _find_format(head, name, path)
        if form not in STRUCTURE_FORMATS and form not in SMILES_FORMATS:
            return read_ase(data, form, source, path) if head else iter(())
        lines = Lines(io.TextIOWrapper(data, encoding="utf-8", errors="replace"))
        if form in STRUCTURE_FORMATS:
            return STRUCTURE_FORMATS[form](lines, source)
        return self._embedder.embed(SMILES_FORMATS[form](lines, source))

    def _read_zip(self, stream: BinaryIO, source: str, path: str | None) -> Iterator[Found]:
        """Yield the records of the molecule files in an archive, each with a source of its own; none is nested."""
        if path is None:
            raise _UnknownFormatError("A zip archive can only be read from a file of its own; unpack it first.")
        try:
            _check_zip(stream)
            archive = zipfile.ZipFile(stream)
        except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            raise OSError(f"The zip archive cannot be read: {error}") from error
        with archive:
            members = [info for info in archive.infolist() if self._options.takes(info.filename) and not info.is_dir()]
            if not members:
                raise _UnknownFormatError("The zip archive holds no molecule files.")
            for info in sorted(members, key=lambda info: info.filename):
                where = f"{source}/{_printable(info.filename)}"
                try:
                    member = io.BufferedReader(_Member(archive.open(info)))
                except Exception as error:  # encrypted, an unknown compression, or damaged
                    yield _fail(where, "unreadable", f"The member of the archive cannot be read: {error}.")
                else:
                    with member:
                        yield from self._read_stream(member, where, info.filename, None)


class _Member(io.RawIOBase):
    """A member of a zip archive, whose damage is an `OSError`."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer)
        try:
            data = self._stream.read(len(view))
        except Exception as error:  # zipfile.BadZipFile, zlib.error and others
            raise OSError(f"The member of the archive is damaged: {error}") from error
        view[: len(data)] = data
        return len(data)


def _check_zip(stream: BinaryIO) -> None:
    """Refuse an archive whose list of members, which is read as a whole, is too long."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, size - (1 << 16) - 22))
    tail = stream.read()
    end = tail.rfind(b"PK\x05\x06")
    if end >= 0 and int.from_bytes(tail[end + 12 : end + 16], "little") > _MAX_DIRECTORY:
        raise TooLargeError("The zip archive has too many members; unpack it first.")
    stream.seek(0)


def _known_format(input_format: str | None, name: str | None) -> str | None:
    """Return the format that is given, or that the suffix of one of our own formats tells."""
    own = {**STRUCTURE_FORMATS, **SMILES_FORMATS}
    if input_format is not None:
        return input_format if input_format in own else find_ase_format(input_format)
    suffix = _suffix(name or "")[1:]
    return suffix if suffix in own else None


def _find_format(head: bytes, name: str | None, path: str | None) -> str:
    """Return the format that content, or else the name, tells."""
    if not head or head.isspace():
        return "xyz"  # whose reader finds nothing, either
    form = _sniff(head) or guess_ase_format(head, path, _stem(name or ""))
    if form is None and _is_smiles(head):
        form = "smi"
    if form is None:
        raise _UnknownFormatError(
            "Neither suffix nor content tells the format; is it .xyz, .sdf, .smi, or one that ASE reads?"
        )
    return form


def _sniff(head: bytes) -> str | None:
    """Return which of our own formats the first lines are in."""
    lines = head.decode("utf-8", "replace").lstrip("\ufeff").splitlines()
    if len(lines) >= 4 and lines[3].rstrip().endswith(("V2000", "V3000")):
        return "sdf"
    first = next((line.strip() for line in lines if line.strip()), "")
    top = lines[0].strip() if lines else ""
    is_count = top.isascii() and top.isdigit()
    if is_count and (len(lines) < 3 or len(lines[2].split()) >= 4):
        return "xyz"
    if any(line.startswith("@<TRIPOS>") for line in lines):
        return "mol2"
    if first.startswith(_PDB_STARTS):
        return "pdb"
    if first.startswith("data_"):
        return "cif"
    if looks_like_table(first):
        return "csv"
    return None


def _is_smiles(head: bytes) -> bool:
    """Return whether at least half of the first lines begin with a SMILES."""
    lines = [line for line in head.decode("utf-8", "replace").splitlines() if line.strip() and line[0] != "#"]
    return bool(lines) and 2 * sum(map(looks_like_smiles, lines)) >= len(lines)


def _stem(name: str) -> str:
    """Return the file's name without the suffix of a compression."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in COMPRESSED_SUFFIXES else name


def _suffix(name: str) -> str:
    """Return the suffix that tells the format, in lower case, with its dot."""
    return os.path.splitext(_stem(name))[1].lower()


def _open_stdin() -> BinaryIO | None:
    if sys.stdin is None or sys.stdin.closed:
        return None
    return getattr(sys.stdin, "buffer", None) or io.BytesIO(sys.stdin.read().encode("utf-8", "replace"))


def _split_list(stream: BinaryIO) -> Iterator[str]:
    data = stream.read1(_MAX_PATH)  # type: ignore[attr-defined]
    end = b"\0" if b"\0" in data else b"\n"
    entry, empty = b"", 0
    while data:
        *whole, rest = data.split(end)
        for piece in whole:
            path = os.fsdecode(entry + piece).removesuffix("" if end == b"\0" else "\r")
            entry = b""
            empty = 0 if path.strip() else empty + 1
            if path.strip():
                yield path if path != "-" else "./-"
        if empty > MAX_BLANK:
            raise UsageError(f"the list of files has more than {MAX_BLANK} empty entries on end")
        entry = (entry + rest)[:_MAX_PATH]  # no path is longer: the system will say so
        data = stream.read1(_MAX_PATH)  # type: ignore[attr-defined]
    path = os.fsdecode(entry).strip("\r")
    if path.strip():
        yield path if path != "-" else "./-"


def _fail_os(source: str, error: OSError | ValueError, index: int = 0) -> Failure:
    if isinstance(error, FileNotFoundError | NotADirectoryError | ValueError):
        return _fail(source, "missing-file", "No such file or folder.", index)
    return _fail(source, "unreadable", f"{error.strerror or error}.", index)


def _fail(source: str, code: str, text: str, index: int = 0) -> Failure:
    return Failure(_printable(source), index, Message(code, text))


def _printable(path: str) -> str:
    """Return the path with bytes that are not UTF-8 replaced, so that it can be written."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
