import io
import re
import sys
import time

import pytest

from qmprop import console
from qmprop.errors import DataError, UsageError
from qmprop.records import Message, Record
from qmprop.tables import Style, draw
from qmprop.targets import DEFAULT_KEYS, TARGETS

PAPER = dict.fromkeys(DEFAULT_KEYS, 10.0)


def report(keys=DEFAULT_KEYS, **changes):
    row = {"mae": 53.9, "rmse": 81.25, "max": 912.3, "bias": -1.5, "coverage": None}
    return {
        "data": "qm9",
        "split": "test",
        "geometry": "dft",
        "molecules": 13083,
        "weights": "egnn-qm9@1f3a5c7e",
        "properties": {key: row | {"unit": TARGETS[key].evaluation_unit} for key in keys},
    } | changes


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def test_an_error_is_one_line_that_says_what_and_what_to_do(capsys):
    console.print_error(UsageError("unknown property 'x\ny'", "Choose from: mu."))
    console.print_error(DataError("no data in [file]"))
    captured = capsys.readouterr()
    assert captured.err == "error: unknown property 'x y'. Choose from: mu.\nerror: no data in [file]\n"
    assert captured.out == ""


def test_a_long_error_is_not_broken_into_lines(capsys):
    console.print_error(UsageError("word " * 100))
    assert capsys.readouterr().err.count("\n") == 1


def test_an_error_without_a_place_to_tell_it_is_kept_quiet(monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stderr", Full())
    console.print_error(UsageError("x"))


@pytest.mark.parametrize(("debug", "lines"), [("", 1), ("1", 4)])
def test_a_bug_is_one_line_unless_its_place_is_asked_for(capsys, monkeypatch, debug, lines):
    monkeypatch.setenv("QMPROP_DEBUG", debug)
    try:
        raise ZeroDivisionError("oops")
    except ZeroDivisionError as error:
        console.print_bug(error)
    text = capsys.readouterr().err
    assert "error: unexpected ZeroDivisionError: oops. This is a bug in qmprop" in text
    assert ("Traceback" in text) == bool(debug)
    assert text.count("\n") >= lines


def record(index, status, code):
    return Record("a.sdf", index, None, "H2", 2, status, (Message(code, "Some text."),))


def summary(notes, capsys, **options):
    capsys.readouterr()
    notes.close(**options)
    return capsys.readouterr().err


def test_failed_records_are_listed_and_summed_up(capsys):
    notes = console.Notes(clock=iter([10.0, 12.0]).__next__)
    notes.add(Record("a.sdf", 0))
    notes.add(record(1, "warning", "charged"))
    notes.add(record(2, "error", "periodic"))
    assert capsys.readouterr().err == "error: a.sdf[2]: periodic: Some text.\n"
    assert summary(notes, capsys) == (
        "note: 3 records: 1 ok, 1 with warnings (charged 1), 1 failed (periodic 1) in 2.0 s, 2 molecules/s.\n"
    )


def test_codes_are_counted_by_record_and_sorted_by_number(capsys):
    notes = console.Notes(clock=lambda: 0.0)
    for code in ("periodic", "parse-error", "parse-error"):
        notes.add(record(0, "error", code))
    twice = (Message("charged", "a"), Message("charged", "b"), Message("too-large", "c"))
    notes.add(Record("a.sdf", 3, None, "H2", 2, "warning", twice))
    assert summary(notes, capsys) == (
        "note: 4 records: 0 ok, 1 with warnings (charged 1, too-large 1), 3 failed (parse-error 2, periodic 1).\n"
    )


def test_many_errors_are_counted_rather_than_listed(capsys):
    notes = console.Notes()
    for index in range(1000):
        notes.add(record(index, "error", "periodic"))
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["error"] * console.LISTED_ERRORS + ["note"]
    assert "1,000 failed (periodic 1,000)" in summary(notes, capsys)


def test_nothing_to_sum_up(capsys):
    notes = console.Notes()
    notes.add(Record("a.sdf", 0))
    notes.add(Record("a.sdf", 1))
    assert summary(notes, capsys) == ""


def test_a_long_run_is_summed_up_where_nobody_watches(capsys):
    notes = console.Notes(talkative=True, clock=iter([0.0, 0.5]).__next__)
    notes.add(Record("a.sdf", 0))
    assert summary(notes, capsys) == ""
    notes.add(Record("a.sdf", 1))
    assert summary(notes, capsys) == "note: 2 records: 2 ok in 0.5 s, 4 molecules/s.\n"


def test_a_continued_run_tells_what_had_failed_before(capsys):
    notes = console.Notes(total=600, errors=7, clock=lambda: 0.0)
    notes.add(Record("a.sdf", 600))
    assert (notes.total, notes.errors) == (601, 7)
    assert summary(notes, capsys) == "note: 1 record: 1 ok; 7 had failed in the run before.\n"


def test_a_stop_at_the_first_error_is_mentioned(capsys):
    notes = console.Notes()
    notes.add(record(0, "error", "periodic"))
    assert summary(notes, capsys, stopped=True) == (
        "note: 1 record: 0 ok, 1 failed (periodic 1); stopped at the first error.\n"
    )


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_table_of_eval_fits_and_compares_with_the_paper(width):
    text = draw(console.report_parts(report(), PAPER, Style(width)), Style(width))
    lines = text.splitlines()
    assert lines[0] == " qm9 test split, DFT geometries: 13,083 molecules"
    maximum = [] if width == 60 else ["max"]
    assert lines[1].split() == ["EGNN"]
    assert lines[2].split() == ["property", "unit", "MAE", "RMSE", *maximum, "bias", "paper", "ratio"]
    assert [line.split()[0] for line in lines[4:16]] == list(DEFAULT_KEYS)
    assert lines[6].split() == ["homo", "meV", "53.9", "81.2", *(["912.3"] if maximum else []), "-1.5", "10", "5.39"]
    assert max(map(len, lines)) <= width
    assert "egnn-qm9@1f3a5c7e" in lines[-1]


def test_a_file_is_named_without_split_and_geometry():
    parts = console.report_parts(report(data="my.extxyz", split="all", geometry="file"), PAPER, Style())
    assert draw(parts, Style()).splitlines()[0] == " my.extxyz: 13,083 molecules"


def test_a_property_the_paper_does_not_have_has_no_ratio():
    text = draw(console.report_parts(report(["u0_atom"]), PAPER, Style()), Style())
    assert text.splitlines()[4].split() == ["u0_atom", "meV", "53.9", "81.2", "912.3", "-1.5"]


def test_a_perfect_prediction_has_an_error_of_zero():
    rows = {"mu": {"mae": 0.0, "rmse": 0.0, "max": 0.0, "bias": 0.0, "coverage": None, "unit": "D"}}
    text = draw(console.report_parts(report(properties=rows), PAPER, Style()), Style())
    assert "0.000" in text


def replace_stderr(monkeypatch, kind):
    stream = kind()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    return stream


anywhere = pytest.mark.parametrize("kind", [Terminal, io.StringIO])


@anywhere
def test_progress_shows_on_a_terminal_and_leaves_nothing_elsewhere(monkeypatch, kind):
    errors = replace_stderr(monkeypatch, kind)
    with console.counter(shown=True) as count:
        count()
    with console.bars("Reading", "Evaluating") as (_, advance):
        advance(3, 10)
    for text in ("1 molecules", "3/10"):
        assert (text in errors.getvalue()) == errors.isatty()
    assert " left" not in errors.getvalue()


@anywhere
def test_no_progress_where_the_records_themselves_show_it(monkeypatch, kind):
    errors = replace_stderr(monkeypatch, kind)
    with console.counter(shown=False) as count:
        count()
    assert errors.getvalue() == ""


@anywhere
@pytest.mark.parametrize(("share", "shown"), [(0.15, True), (None, False)])
def test_the_time_left_shows_where_the_share_of_the_work_is_known(monkeypatch, kind, share, shown):
    errors = replace_stderr(monkeypatch, kind)
    monkeypatch.setattr(console, "_REDRAW", 0.0)
    shares = iter([share and share * (k + 1) for k in range(5)])
    with console.counter(shown=True, share=shares.__next__) as count:
        for _ in range(5):
            count()
            time.sleep(0.03)
    assert ("5 molecules" in errors.getvalue()) == errors.isatty()
    assert bool(re.search(r"\d:\d\d left", errors.getvalue())) == (shown and errors.isatty())


@anywhere
def test_lines_go_above_the_progress(monkeypatch, kind):
    errors = replace_stderr(monkeypatch, kind)
    with console.counter(shown=True) as count:
        count()
        console.print_note("look")
        count()
    lines = [line.rpartition("\x1b[2K")[2] for line in errors.getvalue().splitlines()]
    assert "note: look" in [re.sub(r"\x1b\[[\d;]*m", "", line) for line in lines]


def test_the_style_follows_the_output(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "97")
    monkeypatch.setenv("TERM", "xterm")
    assert console.output_style(None).color is None
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    assert console.output_style(None) == Style(97, "standard", True)
    assert console.output_style(str(tmp_path / "out.txt")) == Style(97, None, True)
