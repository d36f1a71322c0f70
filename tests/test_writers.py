import csv
import io
import json
import os

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmprop.errors import UsageError
from qmprop.records import RECORD_SCHEMA, Domain, Message, Record, Value
from qmprop.rows import RECORD_COLUMNS, Layout
from qmprop.writers import FORMATS, CsvWriter, JsonlWriter, JsonWriter, choose_format, create_writer

UNITS = {"mu": "D", "u0": "kcal/mol"}
GOOD = Record(
    "a b,c.xyz",
    0,
    'the "wet" one',
    "H2O",
    3,
    model="egnn-qm9@1f3a5c7e",
    properties={"mu": Value(1.8500000000000001, "D"), "u0": Value(-47944.1234567891, "kcal/mol")},
)
BAD = Record("é\n.xyz", 1, status="error", messages=(Message("parse-error", "Line 2: ';', not a number."),))


def write(writer, records):
    return writer.begin() + "".join(map(writer.write, records)) + writer.end()


@pytest.mark.parametrize("records", [[], [GOOD], [GOOD, BAD], [BAD, GOOD, GOOD]])
def test_json_is_one_array_whatever_its_length(records):
    data = json.loads(write(JsonWriter(), records))
    assert [Record.from_dict(item) for item in data] == records
    jsonschema.validate(data, {"type": "array", "items": RECORD_SCHEMA})


def test_jsonl_is_one_object_a_line():
    lines = write(JsonlWriter(), [GOOD, BAD]).splitlines()
    assert [Record.from_dict(json.loads(line)) for line in lines] == [GOOD, BAD]


@pytest.mark.parametrize("writer", [JsonWriter, JsonlWriter])
def test_json_never_holds_nan(writer):
    with pytest.raises(ValueError, match="JSON"):
        write(writer(), [Record("a", 0, properties={"mu": Value(float("nan"), "D")})])


def test_csv_has_units_in_its_header_and_leaves_out_what_is_not_there():
    header, good, bad = csv.reader(io.StringIO(write(CsvWriter(Layout(UNITS)), [GOOD, BAD])))
    assert header == [*RECORD_COLUMNS, "mu [D]", "u0 [kcal/mol]"]
    assert good[:8] == ["a b,c.xyz", "0", 'the "wet" one', "H2O", "3", "ok", "", "egnn-qm9@1f3a5c7e"]
    assert [float(text) for text in good[8:]] == [value.value for value in GOOD.properties.values()]
    assert bad == ["é\n.xyz", "1", "", "", "", "error", "parse-error: Line 2: ';', not a number.", "", "", ""]


def test_csv_has_intervals_the_domain_and_seen_molecules_where_the_weights_are_calibrated():
    properties = {"mu": Value(1.85, "D", (1.8, 1.9)), "u0": Value(-3.5, "kcal/mol")}
    domain = Domain("out", 2.5, ("far-from-training",))
    known = Record("a", 0, domain=domain, properties=properties, interval_level=0.9, seen=("gdb_4", "gdb_9"))
    text = write(CsvWriter(Layout(UNITS, 0.9, judged=True)), [known, BAD])
    first, second = csv.DictReader(io.StringIO(text))
    added = {"domain": "out", "domain_score": "2.5", "seen": "gdb_4 gdb_9", "interval_level": "0.9"}
    numbers = {"mu [D]": "1.85", "mu low [D]": "1.8", "mu high [D]": "1.9"}
    numbers |= {"u0 [kcal/mol]": "-3.5", "u0 low [kcal/mol]": "", "u0 high [kcal/mol]": ""}
    assert list(first) == [*RECORD_COLUMNS, *added, *numbers]
    assert {name: first[name] for name in [*added, *numbers]} == added | numbers
    assert {second[name] for name in [*added, *numbers]} == {""}


@pytest.mark.parametrize(
    ("level", "judged", "columns"),
    [
        (None, False, ["mu [D]"]),
        (None, True, ["domain", "domain_score", "seen", "mu [D]"]),
        (0.95, False, ["interval_level", "mu [D]", "mu low [D]", "mu high [D]"]),
    ],
)
def test_the_columns_are_those_that_can_hold_something(level, judged, columns):
    layout = Layout({"mu": "D"}, level, judged)
    assert [column.name for column in layout.columns()] == [*RECORD_COLUMNS, *columns]
    assert len(layout.row(GOOD)) == len(layout.columns())


def test_a_bound_says_of_which_interval_it_is():
    low = next(column for column in Layout({"mu": "D"}, 0.999).columns() if column.name == "mu low [D]")
    assert (low.description, low.unit) == ("low end of the 99.9 % interval of mu", "D")


@given(st.lists(st.text(max_size=8), min_size=3, max_size=3))
@settings(max_examples=50, deadline=None)
def test_any_text_comes_back_from_csv(texts):
    source, name, text = texts
    record = Record(source, 0, name, status="error", messages=(Message("parse-error", text),))
    _, row = csv.reader(io.StringIO(write(CsvWriter(Layout(UNITS)), [record]), newline=""))
    assert (row[0], row[2], row[6]) == (source, name, f"parse-error: {text}")


@given(st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False))
def test_no_digit_is_lost(value):
    record = Record("a", 0, properties={"mu": Value(value, "D")})
    assert float(write(CsvWriter(Layout({"mu": "D"})), [record]).split(",")[-1]) == value
    assert Record.from_dict(json.loads(write(JsonlWriter(), [record]))) == record


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("table", "parquet")])
@pytest.mark.parametrize("written", [1, 2])
def test_a_writer_continues_where_another_one_stopped(name, written):
    layout = Layout(UNITS)
    records = [GOOD, BAD, GOOD]
    first, second = create_writer(name, layout), create_writer(name, layout)
    text = first.begin() + "".join(map(first.write, records[:written]))
    text += second.begin(written) + "".join(map(second.write, records[written:])) + second.end()
    assert text == write(create_writer(name, layout), records)


@given(st.text(st.characters(codec=None), max_size=20))
def test_any_file_name_gives_valid_text(name):
    record = Record(name, 0)
    write(CsvWriter(Layout(UNITS)), [record]).encode("utf-8")
    text = write(JsonlWriter(), [record])
    text.encode("utf-8")
    if name.isprintable():
        assert json.loads(text)["source"] == name


def test_an_undecodable_file_name_is_marked():
    name = os.fsdecode(b"caf\xe9.xyz")
    assert json.loads(write(JsonlWriter(), [Record(name, 0)]))["source"].startswith("caf\ufffd")


@pytest.mark.parametrize(
    ("name", "output", "expected"),
    [
        (None, None, "table"),
        (None, "out.csv", "csv"),
        (None, "OUT.JSONL", "jsonl"),
        (None, "out.ndjson", "jsonl"),
        (None, "out.json", "json"),
        (None, "report.txt", "table"),
        (None, "/dev/stdout", "table"),
        (None, "out.xyz", "extxyz"),
        (None, "out.sdf", "sdf"),
        (None, "out.parquet", "parquet"),
        ("csv", "out.json", "csv"),
        ("JSON", None, "json"),
    ],
)
def test_the_format_comes_from_the_option_or_else_the_suffix(name, output, expected):
    assert choose_format(name, output) == expected


@pytest.mark.parametrize(
    ("name", "output", "message"),
    [
        ("xml", None, "unknown format 'xml'"),
        ("extxyz ", None, "unknown format 'extxyz '"),
        (None, "out.cvs", "cannot tell the format from 'out.cvs'"),
    ],
)
def test_formats_that_do_not_exist_are_refused_with_those_that_do(name, output, message):
    with pytest.raises(UsageError, match=message) as caught:
        choose_format(name, output)
    assert "jsonl" in caught.value.hint
