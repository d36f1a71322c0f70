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
    }
)


@dataclass(frozen=True, slots=True)
class Message:
    """Something to know about a record: a stable code of `MESSAGE_CODES` and a sentence for people."""

    code: str
    text: str


@dataclass(frozen=True, slots=True)
class Value:
    """A predicted property: value and 90 % interval (None without calibration), both in `unit`."""

    value: float
    unit: str
    interval: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Domain:
    """Whether the network knows molecules like this one."""

    verdict: Literal["in", "out"]
    score: float


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
            "domain": None if self.domain is None else {"verdict": self.domain.verdict, "score": self.domain.score},
            "properties": {
                key: {
                    "value": value.value,
                    "unit": value.unit,
                    "interval": None if value.interval is None else list(value.interval),
                }
                for key, value in self.properties.items()
            },
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Record:
        """Rebuild the record `to_dict` described; unknown keys are ignored."""
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
            domain=None if domain is None else Domain(domain["verdict"], domain["score"]),
            properties={
                key: Value(item["value"], item["unit"], None if item["interval"] is None else tuple(item["interval"]))
                for key, item in data["properties"].items()
            },
        )


#: Names the record's JSON Schema; the number changes when a reader of records would have to.
SCHEMA_ID: Final = "urn:qmprop:record:1"


def _nullable(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"anyOf": [{"type": "null"}, schema]}


def _object(properties: Mapping[str, Any], **rest: Any) -> dict[str, Any]:
    """Return the schema of an object that has all these keys, and may have more."""
    return {"type": "object", "required": list(properties), "properties": properties, **rest}


def _value_schema(target: Target) -> dict[str, Any]:
    interval = {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}
    properties = {
        "value": {"type": "number"},
        "unit": {"enum": list(UNITS[target.dimension])},
        "interval": {"description": "Low and high end of the 90 % interval.", **_nullable(interval)},
    }
    return _object(properties, title=target.key, description=target.description)


_MESSAGE_SCHEMA: Final = _object(
    {
        "code": {"enum": list(MESSAGE_CODES), "description": "Stays the same from version to version."},
        "text": {"type": "string", "description": "A sentence for people."},
    }
)
_DOMAIN_SCHEMA: Final = _object(
    {"verdict": {"enum": ["in", "out"]}, "score": {"type": "number", "description": "The larger, the stranger."}}
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
            "properties": {
                "type": "object",
                "description": "What was predicted; empty if the status is error.",
                "additionalProperties": False,
                "properties": {key: _value_schema(target) for key, target in TARGETS.items()},
            },
        }
    ),
    "if": {"properties": {"status": {"const": "error"}}},
    "then": {"properties": {"properties": {"maxProperties": 0}, "messages": {"minItems": 1}}},
}
