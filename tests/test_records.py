import json

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmprop.records import MESSAGE_CODES, RECORD_SCHEMA, SCHEMA_ID, Domain, Message, Neighbor, Record, Value
from qmprop.targets import TARGETS, UNITS

VALIDATOR = jsonschema.Draft202012Validator(RECORD_SCHEMA)
# No subnormal numbers: loading weights turns them off for the whole process.
NUMBERS = st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False)
MESSAGES = st.builds(Message, st.sampled_from(sorted(MESSAGE_CODES)), st.text())


@st.composite
def values(draw, key):
    interval = st.none() | st.tuples(NUMBERS, NUMBERS)
    return Value(draw(NUMBERS), draw(st.sampled_from(sorted(UNITS[TARGETS[key].dimension]))), draw(interval))


@st.composite
def domains(draw):
    reasons = draw(st.lists(st.sampled_from(sorted(MESSAGE_CODES)), unique=True, max_size=2))
    return Domain("out" if reasons else "in", draw(NUMBERS), tuple(reasons))


@st.composite
def neighbors(draw):
    keys = draw(st.lists(st.sampled_from(list(TARGETS)), unique=True, max_size=2))
    properties = {key: Value(draw(NUMBERS), TARGETS[key].unit) for key in keys}
    return Neighbor(draw(st.text()), draw(st.text()), abs(draw(NUMBERS)), properties)


@st.composite
def records(draw):
    status = draw(st.sampled_from(["ok", "warning", "error"]))
    failed = status == "error"
    keys = [] if failed else draw(st.lists(st.sampled_from(list(TARGETS)), unique=True, max_size=4))
    return Record(
        source=draw(st.text()),
        index=draw(st.integers(0)),
        name=draw(st.none() | st.text()),
        formula=draw(st.none() | st.text()),
        natoms=draw(st.none() | st.integers(0)),
        status=status,
        messages=tuple(draw(st.lists(MESSAGES, min_size=int(failed), max_size=2))),
        model=draw(st.none() | st.text()),
        domain=draw(st.none() | domains()),
        properties={key: draw(values(key)) for key in keys},
        interval_level=draw(st.none() | st.floats(0.5, 0.999)),
        seen=tuple(draw(st.lists(st.text(), max_size=2))),
        neighbors=tuple(draw(st.lists(neighbors(), max_size=2))),
    )


@given(records())
@settings(max_examples=50, deadline=None)
def test_a_record_survives_json_and_fits_the_schema(record):
    data = json.loads(json.dumps(record.to_dict(), allow_nan=False))
    VALIDATOR.validate(data)
    assert Record.from_dict(data) == record


def test_a_reader_ignores_keys_that_later_versions_add():
    record = Record("a.xyz", 0)
    assert Record.from_dict(record.to_dict() | {"added": 1}) == record


def test_a_record_of_an_earlier_version_is_read():
    value = {"value": 1.85, "unit": "D", "interval": [1.8, 1.9]}
    later = {"seen", "interval_level", "neighbors"}
    data = {key: value for key, value in Record("a.xyz", 0).to_dict().items() if key not in later}
    data |= {"domain": {"verdict": "in", "score": 0.2}, "properties": {"mu": value}}
    properties = {"mu": Value(1.85, "D", (1.8, 1.9))}
    assert Record.from_dict(data) == Record("a.xyz", 0, domain=Domain("in", 0.2), properties=properties)


def test_the_schema_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(RECORD_SCHEMA)
    assert RECORD_SCHEMA["$id"] == SCHEMA_ID


def test_the_schema_says_what_everything_is():
    fields = RECORD_SCHEMA["properties"]
    assert list(fields) == RECORD_SCHEMA["required"] == list(Record("a", 0).to_dict())
    assert all(field["description"] for field in fields.values())
    values = fields["properties"]["properties"]
    assert {key: value["description"] for key, value in values.items()} == {
        key: target.description for key, target in TARGETS.items()
    }


@pytest.mark.parametrize(
    "change",
    [
        {"status": "fine"},
        {"index": -1},
        {"status": "error"},
        {"messages": [{"code": "made-up", "text": ""}]},
        {"properties": {"mu": {"value": 1.0, "unit": "eV", "interval": None}}},
        {"properties": {"mass": {"value": 1.0, "unit": "D", "interval": None}}},
        {"status": "error", "messages": [{"code": "periodic", "text": ""}], "properties": {"mu": {}}},
        {"domain": {"verdict": "out", "score": 2.0, "reasons": []}},
        {"domain": {"verdict": "in", "score": 2.0, "reasons": ["flat-geometry"]}},
        {"domain": {"verdict": "out", "score": 2.0, "reasons": ["made-up"]}},
        {"interval_level": 90},
        {"seen": None},
        {"neighbors": [{"id": "gdb_1", "smiles": "C", "distance": -1.0, "properties": {}}]},
        {"neighbors": [{"id": "gdb_1", "smiles": "C", "distance": 0.0, "properties": {"mu": {"value": 1.0}}}]},
    ],
)
def test_the_schema_refuses_what_a_record_must_not_be(change):
    with pytest.raises(jsonschema.ValidationError):
        VALIDATOR.validate(Record("a.xyz", 0).to_dict() | change)


def test_the_record_of_the_documentation():
    methane = Neighbor("gdb_1", "C", 0.8, {"mu": Value(0.0, "D")})
    record = Record(
        "water.xyz",
        0,
        None,
        "H2O",
        3,
        model="egnn-qm9@1f3a5c7e",
        domain=Domain("out", 1.2, ("far-from-training",)),
        properties={"mu": Value(1.85, "D", (1.80, 1.90))},
        interval_level=0.9,
        seen=("gdb_3",),
        neighbors=(methane,),
    )
    expected = {
        "source": "water.xyz",
        "index": 0,
        "name": None,
        "formula": "H2O",
        "natoms": 3,
        "status": "ok",
        "messages": [],
        "model": "egnn-qm9@1f3a5c7e",
        "domain": {"verdict": "out", "score": 1.2, "reasons": ["far-from-training"]},
        "seen": ["gdb_3"],
        "interval_level": 0.9,
        "properties": {"mu": {"value": 1.85, "unit": "D", "interval": [1.80, 1.90]}},
        "neighbors": [
            {"id": "gdb_1", "smiles": "C", "distance": 0.8, "properties": {"mu": {"value": 0.0, "unit": "D"}}}
        ],
    }
    assert record.to_dict() == expected
    assert list(record.to_dict()) == list(expected)
