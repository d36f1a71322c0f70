import io
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from qmprop import parquet as qmprop_parquet
from qmprop.errors import QmpropError
from qmprop.parquet import ParquetWriter
from qmprop.records import SCHEMA_ID, Domain, Message, Record, Value
from qmprop.rows import Layout
from qmprop.targets import TARGETS, UNITS, parse_units

LAYOUT = Layout({"mu": "D", "cv": "J/(mol K)"})
GOOD = Record(
    "a.xyz", 3, "wet", "H2O", 3, model="m@1", properties={"mu": Value(1.85, "D"), "cv": Value(27.1, "J/(mol K)")}
)
BAD = Record("b.xyz", 0, status="error", messages=(Message("missing-file", "No such file."),), model="m@1")


def write(records, layout=LAYOUT, **options):
    writer = ParquetWriter(layout, **options)
    return b"".join([writer.begin(), *map(writer.write, records), writer.end()])


def read(data):
    return parquet.read_table(io.BytesIO(data))


def test_a_table_has_a_row_for_every_record():
    assert read(write([GOOD, BAD])).to_pylist() == [
        {"source": "a.xyz", "index": 3, "name": "wet", "formula": "H2O", "natoms": 3, "status": "ok", "messages": None}
        | {"model": "m@1", "mu [D]": 1.85, "cv [J/(mol K)]": 27.1},
        {"source": "b.xyz", "index": 0, "name": None, "formula": None, "natoms": None, "status": "error"}
        | {"messages": "missing-file: No such file.", "model": "m@1", "mu [D]": None, "cv [J/(mol K)]": None},
    ]
    assert read(write([])).num_rows == 0


def test_columns_have_types_and_units():
    schema = read(write([GOOD], metadata={"qmprop_model": "m@1"})).schema
    types = {"index": "int64", "natoms": "int64", "mu [D]": "double", "cv [J/(mol K)]": "double"}
    assert {name: str(schema.field(name).type) for name in schema.names} == dict.fromkeys(
        schema.names, "string"
    ) | types
    assert not schema.field("source").nullable
    assert schema.field("natoms").nullable
    assert schema.field("cv [J/(mol K)]").metadata[b"unit"] == b"J/(mol K)"
    assert schema.field("mu [D]").metadata[b"description"] == TARGETS["mu"].description.encode()
    assert schema.metadata[b"qmprop_model"] == b"m@1"
    assert schema.metadata[b"qmprop_record"] == SCHEMA_ID.encode()


def test_intervals_the_domain_and_seen_molecules_are_columns_where_the_weights_are_calibrated():
    record = Record(
        "a",
        0,
        domain=Domain("in", 0.2),
        properties={"mu": Value(1.85, "D", (1.8, 1.9))},
        interval_level=0.95,
        seen=("gdb_4", "gdb_9"),
    )
    table = read(write([record, BAD], Layout({"mu": "D"}, 0.95, judged=True)))
    first, second = table.to_pylist()
    expected = {"domain": "in", "domain_score": 0.2, "seen": "gdb_4 gdb_9", "interval_level": 0.95}
    expected |= {"mu [D]": 1.85, "mu low [D]": 1.8, "mu high [D]": 1.9}
    assert expected.items() <= first.items()
    assert {second[name] for name in expected} == {None}
    assert table.schema.field("mu high [D]").metadata == {
        b"unit": b"D",
        b"description": b"high end of the 95 % interval of mu",
    }


def test_a_long_stream_leaves_in_compressed_row_groups(monkeypatch):
    monkeypatch.setattr(qmprop_parquet, "GROUP_ROWS", 100)
    writer = ParquetWriter(LAYOUT)
    parts = [writer.begin(), *(writer.write(GOOD) for _ in range(250)), writer.end()]
    assert [index for index, part in enumerate(parts) if part] == [0, 100, 200, 251]
    file = parquet.ParquetFile(io.BytesIO(b"".join(parts)))
    assert [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)] == [100, 100, 50]
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"


@given(
    st.text(st.characters(codec=None)),
    st.sampled_from(list(TARGETS)),
    st.floats(allow_nan=False, allow_subnormal=False),
    st.data(),
)
@settings(max_examples=30, deadline=None)
def test_any_text_and_number_comes_back(text, key, value, data):
    unit = data.draw(st.sampled_from(list(UNITS[TARGETS[key].dimension])))
    record = Record(text, 0, text, properties={key: Value(value, unit)})
    (row,) = read(write([record], Layout({key: unit}))).to_pylist()
    assert row[f"{key} [{unit}]"] == value
    if text.isprintable():
        assert (row["source"], row["name"]) == (text, text)


def test_the_same_records_give_the_same_bytes():
    layout = Layout(parse_units("kj"))
    assert write([GOOD, BAD], layout) == write([GOOD, BAD], layout)


def test_a_missing_pyarrow_is_told_with_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(QmpropError, match="pyarrow") as caught:
        ParquetWriter(LAYOUT)
    assert "pip install 'qmprop[io]'" in caught.value.hint


def test_a_parquet_file_is_not_continued():
    with pytest.raises(ValueError, match="cannot be continued"):
        ParquetWriter(LAYOUT).begin(3)
