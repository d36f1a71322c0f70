"""Records as tables that fit the width they are given; a number is never cut."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from rich import box
from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from qmprop.records import Record, Value
from qmprop.targets import TARGETS, unit_factor

#: Up to so many records get a table each; more share tables with one row a record.
FEW_RECORDS: Final = 4
#: Rows of a shared table before the header is repeated; what is kept in memory at most.
CHUNK_ROWS: Final = 50
#: Error, in default units, that decides how many digits mean anything where the weights do not tell their own.
_TYPICAL_ERRORS: Final[Mapping[str, float]] = {"mu": 0.03, "alpha": 0.1, "r2": 1.0, "zpve": 0.01, "cv": 0.1}
_TYPICAL_ENERGY_ERROR: Final = 0.03
_STATUS_STYLES: Final = {"ok": "green", "warning": "yellow", "error": "bold red"}
_MIN_NAME_WIDTH: Final = 12
_WIDE: Final = 80
#: The heading's rule in plain characters; the layout is that of `box.SIMPLE_HEAD`.
_ASCII_BOX: Final = box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)


@dataclass(frozen=True, slots=True)
class Style:
    """How a table is drawn.

    Attributes:
        width: Columns of the terminal or page.
        color: Color system of `rich`, or None for none.
        unicode: Whether lines and letters outside ASCII may be used.
    """

    width: int = 80
    color: Literal["auto", "standard", "256", "truecolor", "windows"] | None = None
    unicode: bool = True


class TableWriter:
    """Records to tables: one each where there are few, else one row each.

    Args:
        units: Unit of every property to show, by key, in order.
        style: How to draw.
        errors: Test error of the weights by key, in default units; decides the digits shown.
    """

    def __init__(
        self, units: Mapping[str, str], style: Style | None = None, errors: Mapping[str, float] | None = None
    ) -> None:
        self._style = style or Style()
        self._units = dict(units)
        self._digits = {key: decimals(key, unit, (errors or {}).get(key)) for key, unit in self._units.items()}
        self._kept: list[Record] = []
        self._many = False
        self._model: str | None = None

    def begin(self, written: int = 0) -> str:
        """Return nothing: the head stands above each table."""
        return ""

    def write(self, record: Record, molecule: object = None) -> str:
        """Keep the record; return a table when enough have come."""
        self._kept.append(record)
        if record.status != "error":
            self._model = record.model
        if len(self._kept) < CHUNK_ROWS:
            return ""
        self._many = True
        return self._flush()

    def end(self) -> str:
        """Return the records still kept, and what the numbers are."""
        rest = self._flush()
        if self._model is None:
            return rest
        notes = _footnotes(self._units, self._model)
        together = "   ".join(notes)
        lines = [together] if len(together) < self._style.width else notes
        parts = [Text(f" {line}", style="dim", no_wrap=True, overflow="ignore") for line in lines]
        return rest + draw(parts, self._style)

    def _flush(self) -> str:
        records, self._kept = self._kept, []
        if not records:
            return ""
        if self._many or len(records) > FEW_RECORDS:
            return draw(self._rows(records), self._style)
        parts = [
            part for record, name in zip(records, _labels(records), strict=True) for part in self._single(record, name)
        ]
        return draw(parts, self._style)

    def _single(self, record: Record, name: str) -> list[RenderableType]:
        """One record: a title, its messages, and a line for every property."""
        title = Text(f" {name}", style="bold", no_wrap=True, overflow="ignore")
        facts = [record.name, record.formula, None if record.natoms is None else _count(record.natoms, "atom")]
        known = "".join(f"  {printable(fact)}" for fact in facts if fact)
        separator = "\n" if cell_len(name) + 1 + cell_len(known) > self._style.width else ""
        title.append(separator + known, style="not bold")
        notes: list[RenderableType] = [
            Text(f" {record.status}: {printable(message.text)}", style=_STATUS_STYLES[record.status])
            for message in record.messages
        ]
        if record.status == "error":
            return [title, *notes, Text()]
        columns = {"property": list(self._units), "value": [], "90 % interval": [], "unit": list(self._units.values())}
        for key in self._units:
            value = record.properties.get(key)
            digits = self._digits[key] if value is None else self._interval_digits(key, value)
            columns["value"].append("" if value is None else format_number(value.value, digits))
            columns["90 % interval"].append("" if value is None else _format_interval(value, digits))
        if not any(columns["90 % interval"]):
            del columns["90 % interval"]
        described = columns | {"": [TARGETS[key].description for key in self._units]}
        if _measure(described) <= self._style.width:
            columns = described
        table = new_table(self._style)
        for heading in columns:
            style = {"property": "bold", "": "dim"}.get(heading, "")
            table.add_column(heading, style=style, justify="right" if heading == "value" else "left")
        for row in zip(*columns.values(), strict=True):
            table.add_row(*row)
        return [title, *notes, table, Text()]

    def _rows(self, records: Sequence[Record]) -> list[RenderableType]:
        """One row a record, in as many tables as the width needs, each beside the names."""
        width = self._style.width
        cells = {key: [self._cell(record, key) for record in records] for key in self._units}
        widths = {key: max(len(key), len(unit) + 2, *map(len, cells[key])) for key, unit in self._units.items()}
        facts = self._facts(records)
        taken = sum(2 + max(map(cell_len, (heading, *map(str, column)))) for heading, column in facts.items())
        names = _labels(records)
        room = width - 2 - taken - 2 - max(widths.values())
        name_width = min(max(map(cell_len, names)), max(_MIN_NAME_WIDTH, min(room, width // 3)))
        space = width - 1 - max(name_width, len("molecule"))
        parts: list[RenderableType] = []
        for keys in _pack(widths, space - taken, space):
            table = new_table(self._style)
            for heading in ("molecule", *facts):
                table.add_column(heading, style="bold" if heading == "molecule" else "")
            for key in keys:
                table.add_column(Text(f"{key}\n[{self._units[key]}]"), justify="right")
            for row, name in enumerate(names):
                known = [column[row] for column in facts.values()]
                table.add_row(Text(_shorten(name, name_width)), *known, *(cells[key][row] for key in keys))
            parts += [table, Text()]
            facts = {}
        return parts

    def _facts(self, records: Sequence[Record]) -> dict[str, list[Text]]:
        """What there is to say besides numbers, by heading: only where there is something, and room for it."""
        facts = {}
        if self._style.width >= _WIDE and any(record.name for record in records):
            facts["name"] = [Text(_shorten(printable(record.name or ""), 20)) for record in records]
        facts["formula"] = [Text(_shorten(record.formula or "", 20)) for record in records]
        if any(record.status != "ok" for record in records):
            facts["status"] = [Text(record.status, style=_STATUS_STYLES[record.status]) for record in records]
        return facts

    def _cell(self, record: Record, key: str) -> str:
        value = record.properties.get(key)
        return "" if value is None else format_number(value.value, self._digits[key])

    def _interval_digits(self, key: str, value: Value) -> int:
        """Return the decimals that the value's own interval justifies, else those that its property's error does."""
        if value.interval is None:
            return self._digits[key]
        low, high = value.interval
        return decimals(key, value.unit, (high - low) / 2 * unit_factor(key, value.unit))


def decimals(key: str, unit: str, error: float | None = None) -> int:
    """Return how many decimals of property `key` in `unit` carry information: one more than its error's first digit.

    Args:
        key: Property key.
        unit: Unit of the number shown.
        error: Error in the property's default unit; None for a typical one.
    """
    if error is None or not 0.0 < error < math.inf:
        error = _TYPICAL_ERRORS.get(key, _TYPICAL_ENERGY_ERROR)
    return max(0, math.ceil(-math.log10(error / unit_factor(key, unit)) - 1e-9) + 1)


def format_number(value: float, digits: int) -> str:
    """Return the number with so many decimals; in scientific notation, cut at the same place, where zeros abound."""
    if digits > 9:
        exponent = math.floor(math.log10(abs(value))) if value else -digits
        return f"{value:.{max(0, digits + exponent)}e}"
    return f"{value:.{digits}f}"


def label(record: Record, *, numbered: bool = False) -> str:
    """Return "file.sdf[3]": the source, and the index within it where there is more than one record."""
    return printable(record.source) + (f"[{record.index}]" if record.index or numbered else "")


def printable(text: str) -> str:
    """Replace control characters, which could garble a terminal."""
    return text if text.isprintable() else "".join(letter if letter.isprintable() else "?" for letter in text)


def new_table(style: Style) -> Table:
    """Return an empty table in the house style: a rule below the heading and no other lines."""
    lines = box.SIMPLE_HEAD if style.unicode else _ASCII_BOX
    return Table(box=lines, show_edge=False, padding=(0, 0, 0, 1), header_style="bold cyan")


def draw(parts: Iterable[RenderableType], style: Style) -> str:
    """Return the text of lines and tables below each other; a table wider than the style is drawn in full."""
    stream = io.StringIO()
    for part in parts:
        console = Console(
            file=stream,
            width=style.width,
            color_system=style.color,
            force_terminal=style.color is not None,
            highlight=False,
            markup=False,
            emoji=False,
            legacy_windows=False,
        )
        if isinstance(part, Table):
            for column in part.columns:
                column.no_wrap = True
            unbounded = console.options.update(max_width=10_000)
            console.width = max(style.width, console.measure(part, options=unbounded).maximum)
        line = part if isinstance(part, Text) else Text()
        console.print(part, no_wrap=line.no_wrap, overflow=line.overflow, crop=False)
    return "".join(line.rstrip() + "\n" for line in stream.getvalue().splitlines())


def _footnotes(units: Iterable[str], model: str) -> list[str]:
    """Name the weights, and say of the energies which are totals: the two differ by thousands of eV."""
    keys = list(units)
    of_totals = {target.total for target in TARGETS.values()}
    totals = ", ".join(key for key in keys if key in of_totals)
    parts = ", ".join(key for key in keys if TARGETS[key].total is not None)
    notes = [
        f"model {model}",
        f"{totals}: total energy" if totals else "",
        f"{parts}: atomization energy" if parts else "",
    ]
    return [note for note in notes if note]


def _labels(records: Sequence[Record]) -> list[str]:
    several = {record.source for record in records if record.index}
    return [label(record, numbered=record.source in several) for record in records]


def _format_interval(value: Value, digits: int) -> str:
    if value.interval is None:
        return ""
    low, high = (format_number(bound, digits) for bound in value.interval)
    return f"{low} to {high}"


def _measure(columns: Mapping[str, Sequence[str]]) -> int:
    """Return the width of a table of these columns."""
    return sum(2 + max(map(len, [heading, *cells])) for heading, cells in columns.items())


def _pack(widths: Mapping[str, int], first: int, rest: int) -> list[list[str]]:
    """Fill blocks of columns from left to right; the first has less room."""
    blocks: list[list[str]] = [[]]
    room = first
    for key, width in widths.items():
        if width + 2 > room:
            blocks.append([])
            room = rest
        blocks[-1].append(key)
        room -= width + 2
    return blocks


def _shorten(text: str, width: int) -> str:
    """Cut the front, which tells the least of a path."""
    if cell_len(text) <= width:
        return text
    while cell_len(text) > width - 3:
        text = text[1:]
    return "..." + text


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
