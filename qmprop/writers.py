"""Records to text: csv, json and jsonl; and the output they go to."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import stat
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, BinaryIO, Final, Protocol, Self

from qmprop.errors import OutputError, UsageError
from qmprop.records import Record

FORMATS: Final = ("table", "csv", "json", "jsonl")
#: Formats that have a name already, but no writer yet.
PLANNED_FORMATS: Final = ("parquet", "extxyz", "sdf")
_SUFFIXES: Final = {
    "": "table",
    ".txt": "table",
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".extxyz": "extxyz",
    ".sdf": "sdf",
}
#: Columns of the flat formats before the properties.
RECORD_COLUMNS: Final = ("source", "index", "name", "formula", "natoms", "status", "messages", "model")


class ClosedPipeError(Exception):
    """Whoever read the output has had enough."""


class Writer(Protocol):
    """Turns records into text, one `write` per record; each returned text consists of whole lines."""

    def begin(self) -> str:
        """Return what stands before the first record."""
        ...

    def write(self, record: Record) -> str:
        """Return the text of one record, or "" to keep it for later."""
        ...

    def end(self) -> str:
        """Return what stands behind the last record."""
        ...


class JsonlWriter:
    """One JSON object a line."""

    def begin(self) -> str:
        """Return nothing: the format has no head."""
        return ""

    def write(self, record: Record) -> str:
        """Return the record's line."""
        return _json(record) + "\n"

    def end(self) -> str:
        """Return nothing: the format has no foot."""
        return ""


class JsonWriter:
    """One JSON array, a record a line."""

    def __init__(self) -> None:
        self._first = True

    def begin(self) -> str:
        """Return the opening bracket."""
        return "[\n"

    def write(self, record: Record) -> str:
        """Return the record's object, with the comma that parts it from the one before."""
        comma = "" if self._first else ","
        self._first = False
        return f"{comma}{_json(record)}\n"

    def end(self) -> str:
        """Return the closing bracket."""
        return "]\n"


class CsvWriter:
    """One row a record; the unit stands in the column's name.

    Args:
        units: Unit of every property to write, by key, in the order of the columns.
    """

    def __init__(self, units: Mapping[str, str]) -> None:
        self._units = dict(units)

    def begin(self) -> str:
        """Return the header."""
        return _csv([*RECORD_COLUMNS, *(f"{key} [{unit}]" for key, unit in self._units.items())])

    def write(self, record: Record) -> str:
        """Return the record's row; what it does not have is left empty."""
        messages = "; ".join(f"{message.code}: {message.text}" for message in record.messages)
        row: list[Any] = [record.source, record.index, record.name, record.formula, record.natoms, record.status]
        row += [messages, record.model]
        row += [record.properties[key].value if key in record.properties else None for key in self._units]
        return _csv(row)

    def end(self) -> str:
        """Return nothing: the format has no foot."""
        return ""


def choose_format(name: str | None, output: str | None) -> str:
    """Return the format asked for by name or, without a name, by the output file's suffix.

    Raises:
        UsageError: There is no such format.
    """
    if name is None:
        suffix = "" if output is None else Path(output).suffix.lower()
        if suffix not in _SUFFIXES:
            raise UsageError(f"cannot tell the format from '{output}'", f"Add -f with one of: {', '.join(FORMATS)}.")
        name = _SUFFIXES[suffix]
    name = name.lower()
    if name in PLANNED_FORMATS:
        raise UsageError(f"format '{name}' is not available in this version", f"Use one of: {', '.join(FORMATS)}.")
    if name not in FORMATS:
        raise UsageError(f"unknown format '{name}'", f"Use one of: {', '.join(FORMATS)}.")
    return name


def create_writer(name: str, units: Mapping[str, str]) -> Writer:
    """Return the writer of a text format; the table's is `qmprop.tables.TableWriter`."""
    writers: dict[str, Writer] = {"csv": CsvWriter(units), "json": JsonWriter(), "jsonl": JsonlWriter()}
    return writers[name]


class Output:
    """Where data goes: standard output, or a file that takes its name only when it is complete.

    A file that exists is replaced at the end, in one step; until then, and if anything goes wrong, it stays as it was.
    Devices and pipes are written as the text comes. Use as a context manager.

    Args:
        path: The file; None or "-" for standard output.
        encoding: Of the text; what it cannot hold is written as "?".

    Raises:
        OutputError: It cannot be written.
    """

    def __init__(self, path: str | None = None, *, encoding: str = "utf-8") -> None:
        self._is_ours = path is not None and path != "-"
        self.name = f"'{path}'" if self._is_ours else "standard output"
        self._encoding = encoding
        self._temporary: str | None = None
        self._target = ""
        self._direct = True
        with self._explain():
            self._stream = _stdout() if path is None or path == "-" else self._open(path)

    def write(self, text: str) -> None:
        """Write whole lines; an interrupt waits until they are out.

        Raises:
            OutputError: There is no room, or no permission.
            ClosedPipeError: The reader has gone.
        """
        if not text:
            return
        data = text.encode(self._encoding, "replace")
        with self._explain(), _interrupts_held():
            self._stream.write(data)
            if self._direct:
                self._stream.flush()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give the file its name if all went well; otherwise remove what there is of it."""
        try:
            if kind is None:
                with self._explain():
                    self._commit()
        finally:
            self._discard()

    def _open(self, path: str) -> BinaryIO:
        mode = None
        with suppress(FileNotFoundError):
            mode = os.stat(path).st_mode
        if mode is not None and not stat.S_ISREG(mode):
            return open(path, "wb")
        self._target = os.path.realpath(path)
        if mode is not None and not os.access(self._target, os.W_OK):
            raise PermissionError(13, os.strerror(13))
        folder, name = os.path.split(self._target)
        handle, self._temporary = tempfile.mkstemp(prefix=f".{name[:40]}.", suffix=".tmp", dir=folder)
        self._direct = False
        with suppress(OSError):
            os.chmod(self._temporary, 0o666 & ~_umask() if mode is None else stat.S_IMODE(mode))
        return os.fdopen(handle, "wb")

    def _commit(self) -> None:
        self._stream.flush()
        if self._temporary is not None:
            os.fsync(self._stream.fileno())
            self._stream.close()
            os.replace(self._temporary, self._target)
            self._temporary = None

    def _discard(self) -> None:
        if self._is_ours:
            with suppress(OSError):
                self._stream.close()
        if self._temporary is not None:
            with suppress(OSError):
                os.unlink(self._temporary)
            self._temporary = None

    @contextmanager
    def _explain(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError as error:
            raise ClosedPipeError from error
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise OutputError(f"cannot write {self.name}: {reason}", "Name another place with -o FILE.") from error


def is_same_file(path: str, other: str) -> bool:
    """Return whether two names, "-" for standard input among them, stand for one regular file."""
    try:
        mine = os.stat(path)
        theirs = os.fstat(0) if other == "-" else os.stat(other)
    except (OSError, ValueError):
        return False
    return stat.S_ISREG(mine.st_mode) and os.path.samestat(mine, theirs)


def _json(record: Record) -> str:
    return _whole(json.dumps(record.to_dict(), ensure_ascii=False, allow_nan=False))


def _csv(row: list[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(row)
    return _whole(text.getvalue())


def _whole(text: str) -> str:
    """Replace the halves of characters that stand for undecodable bytes in a file's name."""
    return text if text.isascii() else text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def _stdout() -> BinaryIO:
    stream: Any = getattr(sys, "stdout", None)  # None where the caller closed it
    if stream is None:
        raise ValueError("it is closed")
    stream.flush()
    buffer: BinaryIO = stream.buffer
    return buffer


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold back the first Ctrl-C or SIGTERM until the block ends; a second one acts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[tuple[int, FrameType | None]] = []
    handlers: dict[int, Any] = {}

    def hold(number: int, frame: FrameType | None) -> None:
        held.append((number, frame))
        signal.signal(number, handlers[number])

    for wanted in (signal.SIGINT, signal.SIGTERM):
        if callable(handler := signal.getsignal(wanted)):
            handlers[wanted] = handler
            signal.signal(wanted, hold)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if held:
            number, frame = held[0]
            handlers[number](number, frame)
