"""A record as one flat row: the columns of csv and parquet, the entries of extxyz and the fields of sdf."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from qmprop.records import Record
from qmprop.targets import TARGETS, format_units

#: Columns of the flat formats before the properties.
RECORD_COLUMNS: Final = ("source", "index", "name", "formula", "natoms", "status", "messages", "model")
#: Columns after those, where the weights have a calibration.
DOMAIN_COLUMNS: Final = ("domain", "domain_score")
_INTEGERS: Final = ("index", "natoms")


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
        calibrated: Whether the weights give intervals and a verdict on the domain: each property then has the bounds
            of its interval beside it.
    """

    units: Mapping[str, str]
    calibrated: bool = False

    def columns(self) -> list[Column]:
        """Return the columns in order."""
        columns = [Column(name, "integer" if name in _INTEGERS else "text") for name in RECORD_COLUMNS]
        if self.calibrated:
            columns += [Column("domain", "text"), Column("domain_score", "number")]
        for key, unit in self.units.items():
            columns.append(Column(f"{key} [{unit}]", "number", unit, TARGETS[key].description))
            for bound in ("low", "high") if self.calibrated else ():
                description = f"{bound} end of the 90 % interval of {key}"
                columns.append(Column(f"{key} {bound} [{unit}]", "number", unit, description))
        return columns

    def row(self, record: Record) -> list[Any]:
        """Return the cells of a record, None where it has nothing."""
        row: list[Any] = [record.source, record.index, record.name, record.formula, record.natoms, record.status]
        row += [join_messages(record) or None, record.model]
        if self.calibrated:
            row += [record.domain.verdict, record.domain.score] if record.domain else [None, None]
        for key in self.units:
            value = record.properties.get(key)
            row.append(None if value is None else value.value)
            if self.calibrated:
                row += (None, None) if value is None or value.interval is None else value.interval
        return row

    def entries(self, record: Record) -> dict[str, Any]:
        """Return what a record says beside its geometry: short keys, only what there is, each text on one line.

        `units` tells the properties' units in the syntax of `targets.parse_units`.
        """
        entries: dict[str, Any] = {"source": one_line(record.source), "index": record.index, "status": record.status}
        entries |= {"messages": one_line(join_messages(record)), "model": one_line(record.model or "")}
        if self.calibrated and record.domain is not None:
            entries |= {"domain": record.domain.verdict, "domain_score": record.domain.score}
        for key in self.units:
            value = record.properties.get(key)
            if value is not None:
                entries[key] = value.value
            if value is not None and value.interval is not None:
                entries[f"{key}_low"], entries[f"{key}_high"] = value.interval
        if record.properties:
            entries["units"] = format_units(self.units)
        return {key: value for key, value in entries.items() if value != ""}


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
