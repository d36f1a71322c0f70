import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fakes import FakeModel, water
from hypothesis import given, settings
from hypothesis import strategies as st

from qmprop import model
from qmprop.__main__ import run
from qmprop.errors import OutputError, UsageError
from qmprop.formats import Failure
from qmprop.partials import RESUMABLE, Written, check_inputs, find_written
from qmprop.records import Message, Neighbor, Record, Value
from qmprop.rows import Layout
from qmprop.writers import create_writer

LAYOUT = Layout({"mu": "D", "u0": "kcal/mol"})
ODD = 'a "b", \\c\n$$$$ é'
FRAME = "3\n{name}\nO 0.0 0.0 0.119\nH 0.0 0.763 -0.477\nH 0.0 -0.763 -0.477\n"
BAD_FRAME = "1\nsilicon\nSi 0 0 0\n"


def make_records(count):
    """Good and bad ones in turn, with names that formats have to quote."""
    properties = {"mu": Value(1.85, "D"), "u0": Value(-47944.1234567891, "kcal/mol")}
    failed = {"status": "error", "messages": (Message("parse-error", ODD),)}
    for index in range(count):
        fields = failed if index % 3 == 2 else {"properties": properties}
        yield Record(ODD, index, ODD, model="m@1", **fields)


def write(name, records):
    """Return what stands before the records, then each of them."""
    writer = create_writer(name, LAYOUT)
    head = writer.begin()
    return [text.encode() for text in (head, *(writer.write(record, water()) for record in records))]


def find(tmp_path, name, data, layout=LAYOUT, weights="m@1"):
    path = tmp_path / "out.partial"
    path.write_bytes(data)
    return find_written(str(path), name, layout, weights)


@pytest.mark.parametrize("name", RESUMABLE)
def test_wherever_a_file_is_cut_its_whole_records_are_found(name, tmp_path):
    head, *parts = write(name, make_records(5))
    data = b"".join([head, *parts])
    ends = [len(head) + sum(map(len, parts[:count])) for count in range(1, 6)]
    for size in sorted({*range(0, len(data), 11), *ends, *(end - 1 for end in ends)}):
        count = sum(end <= size for end in ends)
        written = find(tmp_path, name, data[:size])
        assert written.count == count
        if count:
            assert (written.size, written.index, written.errors) == (ends[count - 1], count - 1, count // 3)
            assert list(check_inputs([water(source=ODD, index=index) for index in range(5)], written, "x"))


@given(st.sampled_from(RESUMABLE), st.text(max_size=10), st.text(max_size=10))
@settings(max_examples=60, deadline=None)
def test_any_name_can_be_continued(tmp_path_factory, name, source, title):
    records = [Record(source, 7, title, status="error", messages=(Message("periodic", title),), model="m@1")]
    data = b"".join(write(name, records * 2))
    written = find(tmp_path_factory.getbasetemp(), name, data)
    assert (written.count, written.size) == (2, len(data))
    assert len(list(check_inputs([water(source=source, index=7)] * 2, written, "x"))) == 2


@pytest.mark.parametrize("name", RESUMABLE)
def test_other_weights_units_and_properties_are_refused(name, tmp_path):
    data = b"".join(write(name, make_records(3)))
    for layout, weights in (
        (LAYOUT, "m@2"),
        (Layout({"mu": "ea0", "u0": "kcal/mol"}), "m@1"),
        (Layout({"mu": "D"}), "m@1"),
        (Layout({"u0": "kcal/mol", "mu": "D"}), "m@1"),
    ):
        with pytest.raises(UsageError, match=r"out\.partial' was written with") as caught:
            find(tmp_path, name, data, layout, weights)
        assert "start over" in caught.value.hint


def make_interval_records(level, neighbors=0):
    """One that failed, then two with intervals; None for none."""
    bounds = None if level is None else (1.8, 1.9)
    near = (Neighbor("gdb_1", "C", 0.5),) * neighbors
    yield Record("a", 0, status="error", messages=(Message("parse-error", ODD),), model="m@1")
    for index in (1, 2):
        properties = {"mu": Value(1.85, "D", bounds)}
        yield Record("a", index, model="m@1", properties=properties, interval_level=level, neighbors=near)


@pytest.mark.parametrize("name", RESUMABLE)
@pytest.mark.parametrize(("before", "now"), [(0.9, 0.95), (0.9, None), (None, 0.9), (0.9, 0.9), (None, None)])
def test_intervals_of_another_level_are_refused(name, before, now, tmp_path):
    layout = Layout({"mu": "D"}, before, judged=True)
    writer = create_writer(name, layout)
    text = writer.begin() + "".join(writer.write(record, water()) for record in make_interval_records(before))
    later = Layout({"mu": "D"}, now, judged=True)
    if now == before:
        assert find(tmp_path, name, text.encode(), later).count == 3
        return
    with pytest.raises(UsageError, match=r"was written with .*intervals") as caught:
        find(tmp_path, name, text.encode(), later)
    assert "start over" in caught.value.hint


@pytest.mark.parametrize("name", ["json", "jsonl"])
def test_another_number_of_neighbors_is_refused(name, tmp_path):
    path, layout = tmp_path / "out.partial", Layout({"mu": "D"}, 0.9, judged=True)
    writer = create_writer(name, layout)
    path.write_text(writer.begin() + "".join(map(writer.write, make_interval_records(0.9, neighbors=2))))
    assert find_written(str(path), name, layout, "m@1", 2).count == 3
    for neighbors in (0, 3):
        with pytest.raises(UsageError, match=f"was written with --neighbors 2, not {neighbors}"):
            find_written(str(path), name, layout, "m@1", neighbors)


@pytest.mark.parametrize("name", RESUMABLE)
def test_a_file_of_another_format_is_refused(name, tmp_path):
    for other in RESUMABLE:
        if other == name or (name, other) == ("sdf", "json"):
            continue
        data = b"".join(write(other, make_records(3)))
        if name == "sdf":
            data += b"$$$$\n"
        with pytest.raises(OutputError, match=rf"is not what -f {name} writes") as caught:
            find(tmp_path, name, data)
        assert caught.value.hint


@pytest.mark.parametrize("name", RESUMABLE)
def test_nothing_and_zeros_after_a_power_cut_hold_no_record(name, tmp_path):
    assert find(tmp_path, name, b"") == Written()
    assert find(tmp_path, name, b"\0" * 1000) == Written()


def test_changed_inputs_are_refused():
    written = Written(2, 0, 100, "a.xyz", 1)
    same = [water(source="a.xyz", index=0), Failure("a.xyz", 1, Message("periodic", "x")), water(source="b.xyz")]
    assert list(check_inputs(same, written, "x")) == same
    for items in (same[:1], [same[1], same[0]], [same[0], water(source="b.xyz", index=1)], []):
        with pytest.raises(UsageError, match="the inputs have changed") as caught:
            list(check_inputs(items, written, "out.partial"))
        assert "start over" in caught.value.hint


class BatchModel(FakeModel):
    """Its numbers depend on the batch, as those of a network do in their last digits; ends after `batches_left`."""

    batches_left = 1000
    delay = 0.0

    def run(self, numbers, positions, offsets):
        if self.batches_left == 0:
            raise KeyboardInterrupt
        self.batches_left -= 1
        time.sleep(self.delay)
        outcome = super().run(numbers, positions, offsets)
        for values in outcome.values.values():
            values += 1e-9 * (len(offsets) - 1)
        return outcome


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with 300 molecules, a third of which fail, and a model that answers at once."""
    monkeypatch.chdir(tmp_path)
    frames = [FRAME.format(name=f"m{index}") if index % 3 else BAD_FRAME for index in range(300)]
    Path("in.xyz").write_text("".join(frames))
    monkeypatch.setattr(model, "load_model", lambda *args, **options: BatchModel())
    return tmp_path


def resume_and_compare(name, left):
    """Continue after `left`, of which the last bytes are lost, and write the same in one go."""
    out, partial = Path(f"out.{name}"), Path(f"out.{name}.partial")
    assert out.read_text() == "old"
    partial.write_bytes(left[:-7])
    arguments = ["predict", "in.xyz", "--batch-size", "40"]
    assert run([*arguments, "-o", str(out), "--resume"]) == 3
    assert run([*arguments, "-o", f"whole.{name}"]) == 3
    assert out.read_bytes() == Path(f"whole.{name}").read_bytes()
    assert out.read_bytes().startswith(left[:-7])
    assert not partial.exists()


@pytest.mark.parametrize("name", RESUMABLE)
def test_an_interrupted_run_and_its_rest_are_one_run(folder, monkeypatch, capfd, name):
    """Byte for byte; the old file stays until the end."""
    Path(f"out.{name}").write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(BatchModel, "batches_left", 4)
        assert run(["predict", "in.xyz", "-o", f"out.{name}", "--resume", "--batch-size", "40"]) == 130
    resume_and_compare(name, Path(f"out.{name}.partial").read_bytes())
    assert "continuing after 159 records" in capfd.readouterr().err


#: The command line with a slow model.
COMMAND = """
import sys
sys.path.insert(0, {tests!r})
from test_partials import BatchModel
import qmprop.model
BatchModel.delay = 0.5
qmprop.model.load_model = lambda *args, **options: BatchModel()
from qmprop.__main__ import main
main()
"""


def test_a_killed_run_and_its_rest_are_one_run(folder):
    out, partial = Path("out.csv"), Path("out.csv.partial")
    out.write_text("old")
    command = [sys.executable, "-c", COMMAND.format(tests=str(Path(__file__).parent))]
    process = subprocess.Popen([*command, "predict", "in.xyz", "-o", "out.csv", "--resume", "--batch-size", "40"])
    deadline = time.monotonic() + 120
    while not (partial.exists() and partial.stat().st_size > 5000) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    resume_and_compare("csv", partial.read_bytes())


def test_a_finished_run_is_written_anew_and_an_ended_one_is_only_finished(folder, capfd):
    assert run(["predict", "in.xyz", "-o", "out.jsonl", "--resume"]) == 3
    text = Path("out.jsonl").read_text()
    assert len(text.splitlines()) == 300
    assert run(["predict", "in.xyz", "-o", "out.jsonl", "--resume"]) == 3
    assert Path("out.jsonl").read_text() == text
    assert "continuing" not in capfd.readouterr().err
    Path("out.jsonl").rename("out.jsonl.partial")
    assert run(["predict", "in.xyz", "-o", "out.jsonl", "--resume"]) == 3
    assert Path("out.jsonl").read_text() == text
    assert "continuing after 300 records" in capfd.readouterr().err
    assert sorted(os.listdir()) == ["in.xyz", "out.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-f", "jsonl", "--resume"], "standard output cannot be resumed"),
        (["-f", "jsonl", "-o", "-", "--resume"], "standard output cannot be resumed"),
        (["-o", "/dev/null", "-f", "csv", "--resume"], "it is not a file"),
        (["-o", "out.parquet", "--resume"], "format 'parquet' cannot be resumed"),
        (["-o", "out.txt", "--resume"], "format 'table' cannot be resumed"),
        (["-o", "out.csv", "--resume", "-u", "kcal"], "was written with other properties, units or intervals"),
        (["-o", "out.csv", "--resume", "-p", "mu"], "was written with other properties, units or intervals"),
        (["in.xyz", "-o", "out.csv", "--resume"], ""),
    ],
)
def test_what_cannot_be_resumed_is_refused_and_left_alone(folder, capfd, arguments, said):
    run(["predict", "in.xyz", "-o", "out.csv"])
    Path("out.csv").rename("out.csv.partial")
    before = Path("out.csv.partial").read_bytes()
    capfd.readouterr()
    if not said:  # the inputs have become more, which is fine
        assert run(["predict", *arguments]) == 3
        return
    assert run(["predict", "in.xyz", *arguments]) == 2
    assert said in capfd.readouterr().err
    assert Path("out.csv.partial").read_bytes() == before


def test_fewer_inputs_are_refused(folder, capfd):
    run(["predict", "in.xyz", "-o", "out.csv"])
    Path("out.csv").rename("out.csv.partial")
    Path("in.xyz").write_text(FRAME.format(name="one"))
    assert run(["predict", "in.xyz", "-o", "out.csv", "--resume"]) == 2
    assert "the inputs have changed" in capfd.readouterr().err
    assert sorted(os.listdir()) == ["in.xyz", "out.csv.partial"]
