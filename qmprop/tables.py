"""Records as tables that fit the width they are given; a number is never cut."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from rich import box
from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from qmprop.figures import Figure, decimals, format_number, format_share, format_value
from qmprop.records import Neighbor, Record
from qmprop.targets import TARGETS

#: Up to so many records get a table each; more share tables with one row a record.
FEW_RECORDS: Final = 4
#: Rows of a shared table before the header is repeated; what is kept in memory at most.
CHUNK_ROWS: Final = 50
_STATUS_STYLES: Final = {"ok": "green", "warning": "yellow", "error": "bold red"}
_VERDICT_STYLES: Final = {"in": "green", "out": "yellow"}
_MIN_NAME_WIDTH: Final = 12
_SMILES_WIDTH: Final = 30
#: Training molecules with the same bonds that are named; more are counted.
_NAMED: Final = 3
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
        self._level: float | None = None
        self._sign = "±" if self._style.unicode else "+-"

    def begin(self, written: int = 0) -> str:
        """Return nothing: the head stands above each table."""
        return ""

    def write(self, record: Record, molecule: object = None) -> str:
        """Keep the record; return a table when enough have come."""
        self._kept.append(record)
        if record.status != "error":
            self._model = record.model
            self._level = record.interval_level or self._level
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
        if self._level is not None:
            lines.append(f"{self._sign} holds the true value for {format_share(self._level)} of in-domain molecules")
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
        return [title, *notes, *self._remarks(record), self._values(record), *self._neighbors(record), Text()]

    def _remarks(self, record: Record) -> list[RenderableType]:
        """What the verdict on the domain, and having been seen in training, mean for the numbers."""
        has_intervals = record.interval_level is not None
        remarks: list[RenderableType] = []
        if record.domain is not None and record.domain.verdict == "out":
            promise = f", and {self._sign} promises nothing" if has_intervals else ""
            remarks.append(Text(f" out of the domain: the values are a guess{promise}", style=_VERDICT_STYLES["out"]))
        if record.seen:
            more = f" and {len(record.seen) - _NAMED} more" if len(record.seen) > _NAMED else ""
            names = printable(", ".join(record.seen[:_NAMED])) + more
            consequence = f" ({self._sign} is too wide for it)" if has_intervals else ""
            remarks.append(Text(f" in the training set: {names}{consequence}", style="cyan"))
        return remarks

    def _values(self, record: Record) -> Table:
        """A line for every property; with descriptions where there is room."""
        sign = self._sign if record.interval_level is None else f"{self._sign} {format_share(record.interval_level)}"
        columns: dict[str, list[str]] = {"property": [], "value": [], sign: [], "unit": []}
        for key, unit in self._units.items():
            value = record.properties.get(key)
            figure = Figure("") if value is None else format_value(value, self._digits[key])
            cells = (key, figure.number + figure.power, figure.half_width and figure.half_width + figure.power, unit)
            for column, cell in zip(columns.values(), cells, strict=True):
                column.append(cell)
        if not any(columns[sign]):
            del columns[sign]
        described = columns | {"": [_describe(key) for key in self._units]}
        if _measure(described) <= self._style.width:
            columns = described
        table = new_table(self._style)
        for heading in columns:
            style = {"property": "bold", "": "dim"}.get(heading, "")
            table.add_column(heading, style=style, justify="right" if heading in ("value", sign) else "left")
        for row in zip(*columns.values(), strict=True):
            table.add_row(*row)
        return table

    def _neighbors(self, record: Record) -> list[RenderableType]:
        """The nearest training molecules with their own values."""
        neighbors = record.neighbors
        if not neighbors:
            return []
        known = [key for key in self._units if any(key in neighbor.properties for neighbor in neighbors)]
        distances = [f"{neighbor.distance:.3f}" for neighbor in neighbors]
        facts = {"distance": [Text(text.rjust(len(max(distances, key=len)))) for text in distances]}
        if any(neighbor.smiles for neighbor in neighbors):
            facts["SMILES"] = [Text(_cut(printable(neighbor.smiles), _SMILES_WIDTH)) for neighbor in neighbors]
        cells = {key: [self._reference(neighbor, key) for neighbor in neighbors] for key in known}
        title = Text(f" nearest training molecules{', with their reference values' if known else ''}", style="bold")
        blocks = self._stack("neighbor", [printable(neighbor.id) for neighbor in neighbors], facts, cells)
        return [Text(), title, *blocks[:-1]]

    def _reference(self, neighbor: Neighbor, key: str) -> str:
        value = neighbor.properties.get(key)
        return "" if value is None else format_number(value.value, self._digits[key])

    def _rows(self, records: Sequence[Record]) -> list[RenderableType]:
        """One row a record."""
        cells = {key: self._column(records, key) for key in self._units}
        return self._stack("molecule", _labels(records), self._facts(records), cells)

    def _stack(
        self, heading: str, names: Sequence[str], facts: dict[str, list[Text]], cells: Mapping[str, Sequence[str]]
    ) -> list[RenderableType]:
        """Return names, facts and the properties' cells in as many tables as the width needs, each beside the names."""
        width = self._style.width
        widths = {key: max(len(key), len(self._units[key]) + 2, *map(len, cells[key])) for key in cells}
        taken = sum(2 + max(map(cell_len, (title, *map(str, column)))) for title, column in facts.items())
        room = width - 2 - taken - 2 - max(widths.values(), default=0)
        name_width = min(max(map(cell_len, names)), max(_MIN_NAME_WIDTH, min(room, width // 3)))
        space = width - 1 - max(name_width, len(heading))
        parts: list[RenderableType] = []
        for keys in _pack(widths, space - taken, space):
            table = new_table(self._style)
            for title in (heading, *facts):
                table.add_column(title, style="bold" if title == heading else "")
            for key in keys:
                table.add_column(Text(f"{key}\n[{self._units[key]}]"), justify="right")
            for row, name in enumerate(names):
                known = [column[row] for column in facts.values()]
                numbers = [Text(cells[key][row].rjust(widths[key]), justify="left") for key in keys]
                table.add_row(Text(_shorten(name, name_width)), *known, *numbers)
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
        if any(record.domain is not None for record in records):
            verdicts = [record.domain.verdict if record.domain is not None else "" for record in records]
            facts["domain"] = [Text(verdict, style=_VERDICT_STYLES.get(verdict, "")) for verdict in verdicts]
        return facts

    def _column(self, records: Sequence[Record], key: str) -> list[str]:
        """Return a property's cells, the ± below each other; each number has the digits that its own ± justifies."""
        values = [record.properties.get(key) for record in records]
        figures = [Figure("") if value is None else format_value(value, self._digits[key]) for value in values]
        halves = [figure.split(self._sign) for figure in figures]
        width = max(len(behind) for _, behind in halves)
        return [before + behind.ljust(width) if before else "" for before, behind in halves]


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


def _describe(key: str) -> str:
    """Return what a property is, short enough for a table beside an interval in 80 columns."""
    return TARGETS[key].description.removeprefix("energy of the ")


def _labels(records: Sequence[Record]) -> list[str]:
    several = {record.source for record in records if record.index}
    return [label(record, numbered=record.source in several) for record in records]


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


def _cut(text: str, width: int) -> str:
    """Cut the end."""
    return text if cell_len(text) <= width else text[: width - 3] + "..."


def _shorten(text: str, width: int) -> str:
    """Cut the front, which tells the least of a path."""
    if cell_len(text) <= width:
        return text
    while cell_len(text) > width - 3:
        text = text[1:]
    return "..." + text


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
