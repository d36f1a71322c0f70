import csv
import io
import json
import os
import signal
import stat
import threading

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmprop.errors import OutputError, UsageError
from qmprop.records import RECORD_SCHEMA, Message, Record, Value
from qmprop.writers import (
    RECORD_COLUMNS,
    ClosedPipeError,
    CsvWriter,
    JsonlWriter,
    JsonWriter,
    Output,
    choose_format,
    is_same_file,
)

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
    header, good, bad = csv.reader(io.StringIO(write(CsvWriter(UNITS), [GOOD, BAD])))
    assert header == [*RECORD_COLUMNS, "mu [D]", "u0 [kcal/mol]"]
    assert good[:8] == ["a b,c.xyz", "0", 'the "wet" one', "H2O", "3", "ok", "", "egnn-qm9@1f3a5c7e"]
    assert [float(text) for text in good[8:]] == [value.value for value in GOOD.properties.values()]
    assert bad == ["é\n.xyz", "1", "", "", "", "error", "parse-error: Line 2: ';', not a number.", "", "", ""]


@given(st.text(st.characters(codec=None), max_size=20))
def test_any_file_name_gives_valid_text(name):
    record = Record(name, 0)
    write(CsvWriter(UNITS), [record]).encode("utf-8")
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
        ("parquet", None, "not available in this version"),
        (None, "out.extxyz", "not available in this version"),
        (None, "out.cvs", "cannot tell the format from 'out.cvs'"),
    ],
)
def test_formats_that_do_not_exist_are_refused_with_those_that_do(name, output, message):
    with pytest.raises(UsageError, match=message) as caught:
        choose_format(name, output)
    assert "jsonl" in caught.value.hint


def test_a_file_is_replaced_when_it_is_complete(tmp_path):
    path = tmp_path / "out.csv"
    path.write_text("old")
    with Output(str(path)) as output:
        output.write("néw\n")
        assert path.read_text() == "old"
    assert path.read_text(encoding="utf-8") == "néw\n"
    assert os.listdir(tmp_path) == ["out.csv"]


@pytest.mark.parametrize("before", [None, "old"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_things_as_they_were(tmp_path, before, error):
    path = tmp_path / "out.csv"
    if before:
        path.write_text(before)

    def fail_halfway():
        with Output(str(path)) as output:
            output.write("half")
            raise error

    with pytest.raises(error):
        fail_halfway()
    assert [(name, (tmp_path / name).read_text()) for name in os.listdir(tmp_path)] == (
        [("out.csv", "old")] if before else []
    )


def test_a_new_file_obeys_the_umask_and_an_old_one_keeps_its_mode(tmp_path):
    umask = os.umask(0o027)
    try:
        for name, mode in (("new", None), ("old", 0o600)):
            path = tmp_path / name
            if mode is not None:
                path.touch()
                path.chmod(mode)
            with Output(str(path)) as output:
                output.write("text")
            assert stat.S_IMODE(path.stat().st_mode) == (0o640 if mode is None else mode)
    finally:
        os.umask(umask)


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "data").mkdir()
    link = tmp_path / "latest.csv"
    link.symlink_to("data/real.csv")
    with Output(str(link)) as output:
        output.write("text")
    assert link.is_symlink()
    assert (tmp_path / "data" / "real.csv").read_text() == "text"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda folder: folder / "nowhere" / "out.csv", "No such file"),
        (lambda folder: folder, "directory"),
        (lambda folder: folder / "x\0y", "null byte"),
        (lambda folder: folder / ("x" * 300), "too long"),
    ],
)
def test_what_cannot_be_written_is_said_at_once(tmp_path, make, reason):
    path = str(make(tmp_path))
    with pytest.raises(OutputError, match=reason) as caught:
        Output(path)
    assert path in caught.value.message


def test_a_full_disk_is_an_output_error():
    with pytest.raises(OutputError, match=r"/dev/full.*No space left"), Output("/dev/full") as output:
        output.write("text\n")


def test_a_pipe_nobody_reads_is_not_an_error_message(tmp_path):
    read, write = os.pipe()
    os.close(read)
    with pytest.raises(ClosedPipeError), Output(f"/dev/fd/{write}") as output:
        output.write("text\n")
    os.close(write)


def test_an_interrupt_waits_until_the_line_is_out(tmp_path):
    """The signal comes while the write is blocked by a full pipe; what was begun still arrives whole."""
    read, write = os.pipe()
    size = 1 << 20
    received = []

    def interrupt_then_read():
        os.kill(os.getpid(), signal.SIGINT)
        while chunk := os.read(read, 1 << 16):
            received.append(chunk)

    reader = threading.Timer(0.2, interrupt_then_read)
    reader.daemon = True
    reader.start()
    output = Output(f"/dev/fd/{write}")
    os.close(write)
    with pytest.raises(KeyboardInterrupt), output:
        output.write("x" * size + "\n")
    reader.join(10)
    os.close(read)
    assert b"".join(received) == b"x" * size + b"\n"


def test_letters_the_terminal_lacks_become_question_marks(capfd):
    with Output(encoding="ascii") as output:
        output.write("naïve\n")
    assert capfd.readouterr().out == "na?ve\n"


def test_names_of_one_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.xyz").touch()
    (tmp_path / "b.xyz").touch()
    os.link("a.xyz", "hard.csv")
    os.symlink("a.xyz", "soft.csv")
    for name in ("a.xyz", "./a.xyz", "hard.csv", "soft.csv"):
        assert is_same_file(name, "a.xyz")
    assert not is_same_file("b.xyz", "a.xyz")
    assert not is_same_file("new.csv", "a.xyz")
    assert not is_same_file("/dev/null", "/dev/null")
