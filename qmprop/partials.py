"""What an interrupted run has left in a partial file, and whether this run may continue it."""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, Final

from qmprop.errors import OutputError, UsageError
from qmprop.figures import format_share
from qmprop.formats import Failure
from qmprop.molecule import Molecule
from qmprop.rows import LEVEL_COLUMN, Layout, one_line
from qmprop.structures import FIELD_PREFIX
from qmprop.targets import format_units

_ENTRY: Final = re.compile(r'(\w+)=("(?:[^"\\]|\\.)*"|\S+)')
_START_OVER: Final = "Give the inputs and options of the earlier run, or delete that file to start over."


@dataclass(frozen=True, slots=True)
class Written:
    """What a partial file holds.

    Attributes:
        count: Number of whole records.
        errors: How many of them have the status "error".
        size: Where the last whole record ends, in bytes.
        source: Source of the last whole record.
        index: Its index.
    """

    count: int = 0
    errors: int = 0
    size: int = 0
    source: str = ""
    index: int = 0


@dataclass(frozen=True, slots=True)
class _Found:
    """A whole record in a partial file.

    `units` are as `format_units` has them; these, `level` and `neighbors` are None where the record does not tell.
    """

    end: int
    source: str
    index: int
    status: str
    model: str
    units: str | None
    level: float | None = None
    neighbors: int | None = None


class _OtherColumnsError(Exception):
    """The header is not the one that this run would write."""


class _Lines:
    """The whole lines of a binary stream; `end` is where the last one ended."""

    def __init__(self, stream: BinaryIO) -> None:
        self.end = 0
        self._stream = stream

    def __iter__(self) -> Iterator[str]:
        for line in self._stream:
            if not line.endswith(b"\n"):
                return
            self.end += len(line)
            yield line.decode("utf-8", "replace")


def find_written(path: str, name: str, layout: Layout, model: str, neighbors: int = 0) -> Written:
    """Return what a partial file holds of the records that this run would write.

    Args:
        path: The partial file.
        name: The format, one of `RESUMABLE`.
        layout: Properties, units and intervals of this run.
        model: Name and hash of this run's weights, as records have it.
        neighbors: Training molecules that this run shows with each record.

    Raises:
        UsageError: The file was written with other properties, units, intervals, neighbors or weights.
        OutputError: The file cannot be read or is of another format.
    """
    written = Written()
    wanted = format_units(layout.units)
    try:
        with open(path, "rb") as stream:
            for found in _SCANS[name](_Lines(stream), layout):
                if found.model != model:
                    raise _differs(path, f"with the weights {found.model}, not {model}")
                if found.units not in (None, wanted):
                    raise _differs(path, f"with the units {found.units}, not {wanted}")
                if found.level != layout.level and found.status != "error":
                    raise _differs(path, f"with {_intervals(found.level)}, not {_intervals(layout.level)}")
                if found.neighbors not in (None, neighbors):
                    raise _differs(path, f"with --neighbors {found.neighbors}, not {neighbors}")
                errors = written.errors + (found.status == "error")
                written = Written(written.count + 1, errors, found.end, found.source, found.index)
    except _OtherColumnsError:
        raise _differs(path, "with other properties, units or intervals") from None
    except OSError as error:
        raise OutputError(f"cannot read '{path}': {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise OutputError(
            f"'{path}' is not what -f {name} writes, from record {written.count + 1} on",
            "Give the format of the earlier run with -f, or delete that file to start over.",
        ) from error
    return written


def check_inputs(
    items: Iterable[Molecule | Failure], written: Written, path: str | None
) -> Iterator[Molecule | Failure]:
    """Yield the items as they come.

    Raises:
        UsageError: They cannot be those that the partial file at `path` answers.
    """
    count = 0
    for count, item in enumerate(items, start=1):
        if count == written.count and (one_line(item.source), item.index) != (one_line(written.source), written.index):
            there = f"{written.source}[{written.index}]"
            raise UsageError(
                f"the inputs have changed: record {count} is {item.source}[{item.index}], in '{path}' it is {there}",
                _START_OVER,
            )
        yield item
    if count < written.count:
        raise UsageError(f"the inputs have changed: '{path}' holds {written.count} records, they {count}", _START_OVER)


def _scan_jsonl(lines: _Lines, layout: Layout) -> Iterator[_Found]:
    for line in lines:
        yield _read_json(line, lines.end)


def _scan_json(lines: _Lines, layout: Layout) -> Iterator[_Found]:
    for number, line in enumerate(lines):
        if number == 0:
            if line != "[\n":
                raise ValueError("not an array")
        elif line == "]\n":
            return
        else:
            yield _read_json(line.removeprefix(","), lines.end)


def _read_json(line: str, end: int) -> _Found:
    data = json.loads(line)
    units = {key: value["unit"] for key, value in data["properties"].items()}
    return _Found(
        end,
        data["source"],
        data["index"],
        data["status"],
        data["model"],
        units=format_units(units) if units else None,
        level=data.get("interval_level"),
        neighbors=len(data.get("neighbors", ())) if units else None,
    )


def _scan_csv(lines: _Lines, layout: Layout) -> Iterator[_Found]:
    names = [column.name for column in layout.columns()]
    rows = csv.reader(lines)
    header = next(rows, None)
    if header is None:
        return
    if header[:1] != names[:1]:
        raise ValueError("no header")
    if header != names:
        raise _OtherColumnsError
    for row in rows:
        if len(row) != len(names):  # cut within a quoted cell of several lines
            return
        cells = dict(zip(names, row, strict=True))
        level = _number(cells.get(LEVEL_COLUMN))
        yield _Found(lines.end, cells["source"], int(cells["index"]), cells["status"], cells["model"], None, level)


def _scan_extxyz(lines: _Lines, layout: Layout) -> Iterator[_Found]:
    rest = iter(lines)
    for line in rest:
        count = int(line)
        taken = list(itertools.islice(rest, count + 1))
        if len(taken) <= count:
            return
        entries = {key: _unquote(value) for key, value in _ENTRY.findall(taken[0])}
        yield _from_entries(entries, lines.end)


def _unquote(value: str) -> str:
    return re.sub(r"\\(.)", r"\1", value[1:-1]) if value.startswith('"') else value


def _scan_sdf(lines: _Lines, layout: Layout) -> Iterator[_Found]:
    field = re.compile(rf">  <{FIELD_PREFIX}(\w+)>\n")
    entries: dict[str, str] = {}
    rest = iter(lines)
    for line in rest:
        if line.startswith("$$$$"):
            yield _from_entries(entries, lines.end)
            entries = {}
        elif found := field.fullmatch(line):
            entries[found[1]] = next(rest, "").strip()


def _from_entries(entries: dict[str, str], end: int) -> _Found:
    index, status, model = int(entries["index"]), entries["status"], entries["model"]
    level = _number(entries.get(LEVEL_COLUMN))
    return _Found(end, entries.get("source", ""), index, status, model, entries.get("units"), level)


def _number(text: str | None) -> float | None:
    return float(text) if text else None


def _intervals(level: float | None) -> str:
    return "no intervals" if level is None else f"{format_share(level)} intervals"


def _differs(path: str, how: str) -> UsageError:
    return UsageError(f"'{path}' was written {how}", _START_OVER)


_SCANS: Final[dict[str, Callable[[_Lines, Layout], Iterator[_Found]]]] = {
    "csv": _scan_csv,
    "json": _scan_json,
    "jsonl": _scan_jsonl,
    "extxyz": _scan_extxyz,
    "sdf": _scan_sdf,
}
#: Formats that a run can continue.
RESUMABLE: Final = tuple(_SCANS)
