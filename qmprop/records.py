"""One `Record` per input molecule: what goes in, what comes out, and what there is to say about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Literal

from qmprop.targets import TARGETS, UNITS, Target

Status = Literal["ok", "warning", "error"]

#: Every message code and what it means; README lists the same.
MESSAGE_CODES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "missing-file": "the input does not exist",
        "empty-file": "the input holds no data",
        "no-molecules": "the folder or pattern holds no molecule file, or the file no molecule",
        "unreadable": "the operating system or the decoder refused to read the input",
        "unknown-format": "the file is of no known format",
        "parse-error": "the file breaks its format's rules at the place named",
        "too-large-input": "a line, record, file or molecule beyond what can be read or generated",
        "bad-smiles": "the text is no SMILES of a real molecule, or a row has none",
        "embedding-failed": "no geometry could be generated from the SMILES",
        "time-out": "generating a geometry took too long",
        "no-atoms": "the record has no atoms",
        "no-3d-coordinates": "all atoms lie in one point, or the record says that it is a 2D drawing",
        "non-finite-coordinates": "a coordinate is NaN or infinite",
        "coordinates-out-of-range": "a coordinate is beyond 10⁹ Å, or the atoms spread over more than 10,000 Å",
        "atoms-too-close": "two atoms are closer than 0.3 Å",
        "unsupported-element": "an element other than H, C, N, O, F",
        "periodic": "the structure is periodic; the network knows isolated molecules only",
        "out-of-memory": "the molecule does not fit into memory",
        "non-finite-prediction": "the network gave no finite number",
        "generated-geometry": "warning: the geometry was generated from a SMILES; force-field geometries cost accuracy",
        "fields-dropped": "warning: the record's bonds and data fields are too long to be handed on",
        "charged": "warning: the molecule is charged; the network knows neutral molecules only",
        "odd-electrons": "warning: an odd number of electrons; the network knows closed shells only",
        "too-large": "warning: more than nine heavy atoms, the largest size in the training data",
        "missing-hydrogens": "warning: an atom has too few neighbors for its element; are hydrogen atoms missing?",
        "several-fragments": "warning: several molecules in one record: atoms that no bond connects",
        "flat-geometry": "warning: all atoms lie in one plane where they cannot; it looks like a 2D drawing",
        "strained-geometry": "warning: a bond has a length that no bond of its kind has in the training molecules",
        "close-contact": "warning: two atoms are closer than any such two in the training molecules",
        "far-from-training": "warning: no training molecule is like this one to the network",
    }
)


@dataclass(frozen=True, slots=True)
class Message:
    """Something to know about a record: a stable code of `MESSAGE_CODES` and a sentence for people."""

    code: str
    text: str


@dataclass(frozen=True, slots=True)
class Value:
    """A property: its value and, if predicted with one, the interval around it, both in `unit`.

    The record's `interval_level` tells which share of the molecules has its true value inside.
    """

    value: float
    unit: str
    interval: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Domain:
    """Whether the network knows molecules like this one.

    Attributes:
        verdict: "out" exactly when there are reasons: the values are a guess, and their intervals promise nothing.
        score: The larger, the stranger; at most 1 where the network knows such molecules.
        reasons: Message codes of what puts the molecule outside.
    """

    verdict: Literal["in", "out"]
    score: float
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Neighbor:
    """A training molecule like the one predicted, with its own DFT values.

    Attributes:
        id: Its name in the training data, such as "gdb_4".
        smiles: Its SMILES.
        distance: How far it is in what the network sees; 0 is the same.
        properties: Property key to its reference value, in the record's units.
    """

    id: str
    smiles: str
    distance: float
    properties: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Record:
    """The answer for one input record.

    Attributes:
        source: The path as given or found; "-" for stdin.
        index: Position within the source, from 0.
        name: The record's own name, if it has one.
        formula: Hill formula; None if the record could not be read.
        natoms: Number of atoms; None if the record could not be read.
        status: "ok", "warning" (predicted; read the messages) or "error" (not predicted).
        messages: What there is to say.
        model: Name and hash of the weights; None if no weights were involved.
        domain: None where the weights have no calibration.
        properties: Property key to `Value`; empty if status is "error".
        interval_level: The share of molecules whose true value the intervals hold, such as 0.9; None without intervals.
        seen: Training molecules with the same bonds, such as "gdb_4".
        neighbors: The nearest training molecules, the nearest first; empty unless asked for.
    """

    source: str
    index: int
    name: str | None = None
    formula: str | None = None
    natoms: int | None = None
    status: Status = "ok"
    messages: tuple[Message, ...] = ()
    model: str | None = None
    domain: Domain | None = None
    properties: Mapping[str, Value] = field(default_factory=dict)
    interval_level: float | None = None
    seen: tuple[str, ...] = ()
    neighbors: tuple[Neighbor, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists, numbers and strings, ready for JSON."""
        return {
            "source": self.source,
            "index": self.index,
            "name": self.name,
            "formula": self.formula,
            "natoms": self.natoms,
            "status": self.status,
            "messages": [{"code": message.code, "text": message.text} for message in self.messages],
            "model": self.model,
            "domain": None if self.domain is None else _domain_to_dict(self.domain),
            "seen": list(self.seen),
            "interval_level": self.interval_level,
            "properties": {
                key: {
                    "value": value.value,
                    "unit": value.unit,
                    "interval": None if value.interval is None else list(value.interval),
                }
                for key, value in self.properties.items()
            },
            "neighbors": [_neighbor_to_dict(neighbor) for neighbor in self.neighbors],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Record:
        """Rebuild the record `to_dict` described; unknown keys are ignored, and later ones may be missing."""
        domain = data.get("domain")
        return cls(
            source=data["source"],
            index=data["index"],
            name=data["name"],
            formula=data["formula"],
            natoms=data["natoms"],
            status=data["status"],
            messages=tuple(Message(item["code"], item["text"]) for item in data["messages"]),
            model=data["model"],
            domain=None if domain is None else _domain_from_dict(domain),
            properties={
                key: Value(item["value"], item["unit"], None if item["interval"] is None else tuple(item["interval"]))
                for key, item in data["properties"].items()
            },
            interval_level=data.get("interval_level"),
            seen=tuple(data.get("seen", ())),
            neighbors=tuple(_neighbor_from_dict(item) for item in data.get("neighbors", ())),
        )


def _domain_to_dict(domain: Domain) -> dict[str, Any]:
    return {"verdict": domain.verdict, "score": domain.score, "reasons": list(domain.reasons)}


def _domain_from_dict(data: Mapping[str, Any]) -> Domain:
    return Domain(data["verdict"], data["score"], tuple(data.get("reasons", ())))


def _neighbor_to_dict(neighbor: Neighbor) -> dict[str, Any]:
    properties = {key: {"value": value.value, "unit": value.unit} for key, value in neighbor.properties.items()}
    return {
        "id": neighbor.id,
        "smiles": neighbor.smiles,
        "distance": neighbor.distance,
        "properties": properties,
    }


def _neighbor_from_dict(data: Mapping[str, Any]) -> Neighbor:
    properties = {key: Value(item["value"], item["unit"]) for key, item in data["properties"].items()}
    return Neighbor(data["id"], data["smiles"], data["distance"], properties)


#: Names the record's JSON Schema; the number changes when a reader of records would have to.
SCHEMA_ID: Final = "urn:qmprop:record:1"


def _nullable(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"anyOf": [{"type": "null"}, schema]}


def _object(properties: Mapping[str, Any], **rest: Any) -> dict[str, Any]:
    """Return the schema of an object that has all these keys, and may have more."""
    return {"type": "object", "required": list(properties), "properties": properties, **rest}


def _value_schema(target: Target, *, predicted: bool = True) -> dict[str, Any]:
    properties: dict[str, Any] = {"value": {"type": "number"}, "unit": {"enum": list(UNITS[target.dimension])}}
    if predicted:
        interval = {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}
        properties["interval"] = {"description": "Low and high end of the interval.", **_nullable(interval)}
    return _object(properties, title=target.key, description=target.description)


_MESSAGE_SCHEMA: Final = _object(
    {
        "code": {"enum": list(MESSAGE_CODES), "description": "Stays the same from version to version."},
        "text": {"type": "string", "description": "A sentence for people."},
    }
)
_REASONS_SCHEMA: Final = {
    "type": "array",
    "items": {"enum": list(MESSAGE_CODES)},
    "description": "Codes of the messages that tell why the verdict is out.",
}
_DOMAIN_SCHEMA: Final = _object(
    {
        "verdict": {
            "enum": ["in", "out"],
            "description": "out: the values are a guess, the intervals promise nothing.",
        },
        "score": {
            "type": "number",
            "description": "The larger, the stranger; at most 1 where such molecules are known.",
        },
        "reasons": _REASONS_SCHEMA,
    },
    **{
        "if": {"properties": {"verdict": {"const": "out"}}},
        "then": {"properties": {"reasons": {"minItems": 1}}},
        "else": {"properties": {"reasons": {"maxItems": 0}}},
    },
)
_NEIGHBOR_SCHEMA: Final = _object(
    {
        "id": {"type": "string", "description": "Name in the training data."},
        "smiles": {"type": "string"},
        "distance": {"type": "number", "minimum": 0, "description": "In what the network sees; 0 is the same."},
        "properties": {
            "type": "object",
            "description": "Its reference values, in the record's units.",
            "additionalProperties": False,
            "properties": {key: _value_schema(target, predicted=False) for key, target in TARGETS.items()},
        },
    }
)

#: JSON Schema (draft 2020-12) of `Record.to_dict()`.
RECORD_SCHEMA: Final[Mapping[str, Any]] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "$id": SCHEMA_ID,
    "title": "qmprop record",
    "description": "What `qmprop predict` answers for one input record: a line of jsonl, an item of json's array.",
    **_object(
        {
            "source": {"type": "string", "description": "The input as given or found; - for standard input."},
            "index": {"type": "integer", "minimum": 0, "description": "Position within the source, from 0."},
            "name": {"type": ["string", "null"], "description": "The input record's own name."},
            "formula": {"type": ["string", "null"], "description": "Hill formula; null if it could not be read."},
            "natoms": {"type": ["integer", "null"], "minimum": 0, "description": "Number of atoms."},
            "status": {
                "enum": ["ok", "warning", "error"],
                "description": "warning: predicted, but read the messages; error: not predicted.",
            },
            "messages": {"type": "array", "items": _MESSAGE_SCHEMA, "description": "What there is to say about it."},
            "model": {"type": ["string", "null"], "description": "Name of the weights, and how their SHA-256 begins."},
            "domain": {
                "description": "Whether the network knows such molecules; null where the weights cannot tell.",
                **_nullable(_DOMAIN_SCHEMA),
            },
            "seen": {
                "type": "array",
                "items": {"type": "string"},
                "description": "Training molecules with the same bonds; the network knows their values.",
            },
            "interval_level": {
                "description": "Share of molecules whose true value the intervals hold; null without intervals.",
                **_nullable({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}),
            },
            "properties": {
                "type": "object",
                "description": "What was predicted; empty if the status is error.",
                "additionalProperties": False,
                "properties": {key: _value_schema(target) for key, target in TARGETS.items()},
            },
            "neighbors": {
                "type": "array",
                "items": _NEIGHBOR_SCHEMA,
                "description": "The nearest training molecules, the nearest first; empty unless asked for.",
            },
        }
    ),
    "if": {"properties": {"status": {"const": "error"}}},
    "then": {"properties": {"properties": {"maxProperties": 0}, "messages": {"minItems": 1}}},
}
