"""A record as one flat row: the columns of csv and parquet, the entries of extxyz and the fields of sdf."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from qmprop.figures import format_share
from qmprop.records import Record
from qmprop.targets import TARGETS, format_units

#: Columns of the flat formats before the properties.
RECORD_COLUMNS: Final = ("source", "index", "name", "formula", "natoms", "status", "messages", "model")
#: Columns after those, where the weights have a calibration.
DOMAIN_COLUMNS: Final = ("domain", "domain_score", "seen")
#: The column after those, where there are intervals.
LEVEL_COLUMN: Final = "interval_level"
_INTEGERS: Final = ("index", "natoms")
_NUMBERS: Final = ("domain_score", LEVEL_COLUMN)


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a flat format.

    Attributes:
        name: Its heading, with the unit if there is one: "mu [D]", "mu low [D]".
        kind: What its cells hold.
        unit: Unit of the cells.
        description: What a property's column holds, in a few words.
    """

    name: str
    kind: Literal["text", "integer", "number"]
    unit: str | None = None
    description: str | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """What a flat row holds.

    Attributes:
        units: Unit of every property to write, by key, in order.
        level: The intervals' level, such as 0.9: each property then has the bounds of its interval beside it. None
            without intervals.
        judged: Whether the weights give a verdict on the domain and know their training molecules.
    """

    units: Mapping[str, str]
    level: float | None = None
    judged: bool = False

    def columns(self) -> list[Column]:
        """Return the columns in order."""
        names = [*RECORD_COLUMNS, *(DOMAIN_COLUMNS if self.judged else ())]
        names += [] if self.level is None else [LEVEL_COLUMN]
        columns = [Column(name, _kind(name)) for name in names]
        for key, unit in self.units.items():
            columns.append(Column(f"{key} [{unit}]", "number", unit, TARGETS[key].description))
            if self.level is None:
                continue
            for bound in ("low", "high"):
                description = f"{bound} end of the {format_share(self.level)} interval of {key}"
                columns.append(Column(f"{key} {bound} [{unit}]", "number", unit, description))
        return columns

    def row(self, record: Record) -> list[Any]:
        """Return the cells of a record, None where it has nothing."""
        row: list[Any] = [record.source, record.index, record.name, record.formula, record.natoms, record.status]
        row += [join_messages(record) or None, record.model]
        if self.judged:
            row += [record.domain.verdict, record.domain.score] if record.domain else [None, None]
            row.append(" ".join(record.seen) or None)
        if self.level is not None:
            row.append(record.interval_level)
        for key in self.units:
            value = record.properties.get(key)
            row.append(None if value is None else value.value)
            if self.level is not None:
                row += (None, None) if value is None or value.interval is None else value.interval
        return row

    def entries(self, record: Record) -> dict[str, Any]:
        """Return what a record says beside its geometry: short keys, only what there is, each text on one line.

        `units` tells the properties' units in the syntax of `targets.parse_units`.
        """
        entries: dict[str, Any] = {"source": one_line(record.source), "index": record.index, "status": record.status}
        entries |= {"messages": one_line(join_messages(record)), "model": one_line(record.model or "")}
        if self.judged and record.domain is not None:
            entries |= {"domain": record.domain.verdict, "domain_score": record.domain.score}
            entries["seen"] = one_line(" ".join(record.seen))
        if self.level is not None and record.interval_level is not None:
            entries[LEVEL_COLUMN] = record.interval_level
        for key in self.units:
            value = record.properties.get(key)
            if value is not None:
                entries[key] = value.value
            if self.level is not None and value is not None and value.interval is not None:
                entries[f"{key}_low"], entries[f"{key}_high"] = value.interval
        if record.properties:
            entries["units"] = format_units(self.units)
        return {key: value for key, value in entries.items() if value != ""}


def _kind(name: str) -> Literal["text", "integer", "number"]:
    return "integer" if name in _INTEGERS else "number" if name in _NUMBERS else "text"


def join_messages(record: Record) -> str:
    """Return the record's messages as one text: "code: text; code: text"."""
    return "; ".join(f"{message.code}: {message.text}" for message in record.messages)


def one_line(text: str) -> str:
    """Return the text with runs of white space turned into one blank and control characters into "?"."""
    text = " ".join(whole(text).split())
    return text if text.isprintable() else "".join(letter if letter.isprintable() else "?" for letter in text)


def whole(text: str) -> str:
    """Replace the halves of characters that stand for undecodable bytes in a file's name."""
    return text if text.isascii() else text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
