"""Records to csv, json and jsonl; and the writer of every format by its name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from qmprop.errors import UsageError
from qmprop.molecule import Molecule
from qmprop.parquet import ParquetWriter
from qmprop.records import Record
from qmprop.rows import Layout, whole
from qmprop.structures import ExtxyzWriter, SdfWriter

FORMATS: Final = ("table", "csv", "json", "jsonl", "parquet", "extxyz", "sdf")
_SUFFIXES: Final = {
    "": "table",
    ".txt": "table",
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".extxyz": "extxyz",
    ".xyz": "extxyz",
    ".sdf": "sdf",
    ".sd": "sdf",
}


class Writer(Protocol):
    """Turns records into text or bytes, one `write` per record; each returned text consists of whole lines."""

    def begin(self, written: int = 0) -> str | bytes:
        """Return what stands before the next record, `written` of which are there already."""
        ...

    def write(self, record: Record, molecule: Molecule | None = None) -> str | bytes:
        """Return one record and, in the formats that hold geometries, its molecule; nothing to keep it for later."""
        ...

    def end(self) -> str | bytes:
        """Return what stands behind the last record."""
        ...


class JsonlWriter:
    """One JSON object a line."""

    def begin(self, written: int = 0) -> str:
        """Return nothing: the format has no head."""
        return ""

    def write(self, record: Record, molecule: Molecule | None = None) -> str:
        """Return the record's line."""
        return _json(record) + "\n"

    def end(self) -> str:
        """Return nothing: the format has no foot."""
        return ""


class JsonWriter:
    """One JSON array, a record a line."""

    def __init__(self) -> None:
        self._first = True

    def begin(self, written: int = 0) -> str:
        """Return the opening bracket, unless it is there."""
        self._first = not written
        return "[\n" if self._first else ""

    def write(self, record: Record, molecule: Molecule | None = None) -> str:
        """Return the record's object, with the comma that parts it from the one before."""
        comma = "" if self._first else ","
        self._first = False
        return f"{comma}{_json(record)}\n"

    def end(self) -> str:
        """Return the closing bracket."""
        return "]\n"


class CsvWriter:
    """One row a record; the unit stands in the column's name."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def begin(self, written: int = 0) -> str:
        """Return the header, unless it is there."""
        return "" if written else _csv([column.name for column in self._layout.columns()])

    def write(self, record: Record, molecule: Molecule | None = None) -> str:
        """Return the record's row; what it does not have is left empty."""
        return _csv(self._layout.row(record))

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
    if name not in FORMATS:
        raise UsageError(f"unknown format '{name}'", f"Use one of: {', '.join(FORMATS)}.")
    return name


def create_writer(name: str, layout: Layout, metadata: Mapping[str, str] | None = None) -> Writer:
    """Return the writer of a format; the table's is `qmprop.tables.TableWriter`.

    Args:
        name: One of `FORMATS`, but not "table".
        layout: What flat formats hold.
        metadata: What a file that has room for it says about itself.

    Raises:
        QmpropError: The format needs a package that is not installed.
    """
    match name:
        case "csv":
            return CsvWriter(layout)
        case "json":
            return JsonWriter()
        case "jsonl":
            return JsonlWriter()
        case "parquet":
            return ParquetWriter(layout, metadata)
        case "extxyz":
            return ExtxyzWriter(layout)
        case "sdf":
            return SdfWriter(layout)
    raise ValueError(f"no writer for '{name}'")


def _json(record: Record) -> str:
    return whole(json.dumps(record.to_dict(), ensure_ascii=False, allow_nan=False))


def _csv(row: list[Any]) -> str:
    return ",".join(map(_cell, row)) + "\n"


def _cell(value: Any) -> str:
    """Return a cell, quoted where a reader would take it for more than one.

    The standard library's writer leaves a lone carriage return bare, at which its reader ends the row.
    """
    text = "" if value is None else float.__repr__(value) if isinstance(value, float) else whole(str(value))
    if any(mark in text for mark in ',"\n\r'):
        return '"' + text.replace('"', '""') + '"'
    return text
