"""Whatever comes in, a record comes out: damaged files of every kind, and text that nobody would write."""

from __future__ import annotations

import json
import math
from collections import Counter
from contextlib import suppress
from pathlib import Path

import fuzz
import pytest
from damaged import DAMAGES, WARNINGS, make_folder
from fakes import FakeModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qmprop import model
from qmprop.__main__ import run
from qmprop.errors import UsageError
from qmprop.inference import predict
from qmprop.readers import read_file
from qmprop.records import MESSAGE_CODES
from qmprop.targets import parse_properties, parse_units


def test_a_folder_with_damaged_files_loses_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """`python -m tests.benchmarks.damaged` does the same with 1,000 files and the bundled weights."""
    monkeypatch.setattr(model, "load_model", lambda *args, **options: FakeModel())
    expected = make_folder(tmp_path / "in", 200, len(DAMAGES))
    assert run(["predict", str(tmp_path / "in"), "-f", "jsonl", "-j", "1"]) == 3
    captured = capfd.readouterr()
    records = [json.loads(line) for line in captured.out.splitlines()]
    assert [record["source"] for record in records] == list(expected)
    found = {record["source"]: [message["code"] for message in record["messages"]][:1] for record in records}
    assert found == {path: [code] if code else [] for path, code in expected.items()}
    failed = Counter(code for code in expected.values() if code and code not in WARNINGS)
    assert {record["status"] for record in records} == {"ok", "warning", "error"}
    assert sum(record["status"] == "error" for record in records) == failed.total()
    summary = captured.err.splitlines()[-1]
    assert all(f"{code} {count}" in summary for code, count in failed.items())


def test_inputs_damaged_at_random() -> None:
    count, failures = fuzz.run(300, patience=60.0)
    assert (count, failures) == (300, [])


@pytest.mark.parametrize(
    ("suffix", "content"), [(".mol2", b"@<TRIPOS>MOLECULEX\n"), ("", b"\xef\xbb\xbf"), (".xyz", b"\xef\xbb\xbf")]
)
def test_inputs_that_went_wrong_once(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    assert [record.status for record in predict(path, weights=FakeModel())] == ["error"]


def test_the_same_number_is_the_same_input() -> None:
    assert fuzz.make_case(7) == fuzz.make_case(7)
    assert len({fuzz.make_case(number).content for number in range(50)}) > 40


numbers = (
    st.floats(allow_subnormal=False)
    | st.floats(-3, 3, allow_subnormal=False)
    | st.sampled_from(["nan", "-", "1d5", "1.2*^-6", "", "1_0", "٣"])
)
rows = st.tuples(st.sampled_from(["C", "H", "O", "6", "1", "Xx", "C1", ""]), numbers, numbers, numbers)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(rows, max_size=6), st.text(max_size=40), st.integers(-1, 7))
def test_xyz_text_of_any_content(tmp_path: Path, atoms: list[tuple[str, ...]], comment: str, count: int) -> None:
    path = tmp_path / "x.xyz"
    lines = [str(count), comment.replace("\n", " "), *(" ".join(map(str, row)) for row in atoms)]
    path.write_text("\n".join(lines), encoding="utf-8", errors="replace")
    records = list(predict(path, weights=FakeModel()))
    assert records
    assert [record.index for record in records] == list(range(len(records)))
    for record in records:
        assert (record.status == "error") == (not record.properties)
        assert all(message.code in MESSAGE_CODES for message in record.messages)
        assert all(math.isfinite(value.value) for value in record.properties.values())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200), st.sampled_from([".xyz", ".sdf", ".mol2", ".pdb", ".gz", ""]))
def test_bytes_of_any_content(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    assert list(read_file(path))


@given(st.text(max_size=30) | st.from_regex(r"(mu|homo|kcal|ev)(=(eV|D|Ha|C m))?(,[a-z0-9=]*)?", fullmatch=True))
def test_units_and_properties_of_any_text(text: str) -> None:
    for parse in (parse_units, parse_properties):
        with suppress(UsageError):
            assert parse(text)
