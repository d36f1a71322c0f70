"""What the terminal shows besides records: errors, notes, progress, and the tables of `eval` and `info`."""

from __future__ import annotations

import math
import os
import sys
import textwrap
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from qmprop.card import GEOMETRY_NAMES, significant_decimals
from qmprop.errors import QmpropError
from qmprop.monitor import TrainingMonitor
from qmprop.outputs import Output
from qmprop.records import Record
from qmprop.tables import Style, draw, label, new_table, printable

#: So many failed records are told one by one; a million lines about a damaged archive would help nobody.
LISTED_ERRORS: Final = 10
_WIDE: Final = 64  # columns of a terminal that has room for what is least needed
_SHARPNESS: Final = "MAE where\nnarrowest /\nMAE of all"
_REDRAW: Final = 0.1  # seconds between two looks at what has been done
#: The console of what is shown on stderr at the moment; lines must not break it.
_LIVE: Final[list[Console]] = []


def print_error(error: QmpropError) -> None:
    """Print an error as one line on stderr: what is wrong, and what to do."""
    hint = f" {error.hint}" if error.hint else ""
    end = "." if hint and not error.message.endswith((".", "?", "!")) else ""
    _print_line("error", "bold red", f"{error.message}{end}{hint}")


def print_bug(error: BaseException) -> None:
    """Print an error nobody foresaw as one line; with its traceback if QMPROP_DEBUG is set."""
    if os.environ.get("QMPROP_DEBUG"):
        traceback.print_exception(error)
    advice = "This is a bug in qmprop; QMPROP_DEBUG=1 shows where."
    _print_line("error", "bold red", f"unexpected {type(error).__name__}: {error}. {advice}")


def print_note(text: str) -> None:
    """Print a remark on stderr."""
    _print_line("note", "bold", text)


@dataclass(slots=True)
class Notes:
    """Tells on stderr which records failed, as they come, and sums up at the end.

    Attributes:
        total: Records so far, with those of an earlier run that this one continues.
        errors: How many of them failed.
        talkative: Whether a run of several records is summed up even if all is well.
        clock: Seconds since any point in time.
    """

    total: int = 0
    errors: int = 0
    talkative: bool = False
    clock: Callable[[], float] = time.monotonic
    statuses: Counter[str] = field(default_factory=Counter)
    codes: Counter[tuple[str, str]] = field(default_factory=Counter)
    started: float = field(init=False)

    def __post_init__(self) -> None:
        """Take the time."""
        self.started = self.clock()

    def add(self, record: Record) -> None:
        """Count the record; print why it failed unless `LISTED_ERRORS` others have been listed already."""
        self.total += 1
        self.statuses[record.status] += 1
        self.codes.update({(record.status, message.code) for message in record.messages})
        if record.status != "error":
            return
        self.errors += 1
        failed = self.statuses["error"]
        if failed <= LISTED_ERRORS:
            where = label(record, numbered=record.formula is not None and record.index > 0)
            for message in record.messages:
                _print_line("error", "bold red", f"{where}: {message.code}: {message.text}")
        elif failed == LISTED_ERRORS + 1:
            print_note("further errors are counted, not listed; the records tell them all")

    def close(self, *, stopped: bool = False) -> None:
        """Print the summary, if there is anything to tell."""
        if self.errors or self.statuses["warning"] or (self.talkative and self.total > 1):
            print_note(self._summary() + ("; stopped at the first error." if stopped else "."))

    def _summary(self) -> str:
        """Return counts by status and code, the time and the speed, of the records of this run."""
        count, seconds = self.statuses.total(), self.clock() - self.started
        parts = [f"{self.statuses['ok']:,} ok"]
        for status, name in (("warning", "with warnings"), ("error", "failed")):
            codes = sorted((-number, code) for (kind, code), number in self.codes.items() if kind == status)
            if codes:
                listed = ", ".join(f"{code} {-number:,}" for number, code in codes)
                parts.append(f"{self.statuses[status]:,} {name} ({listed})")
        text = f"{_records(count)}: {', '.join(parts)}"
        if count > 1 and seconds > 0.0:
            text += f" in {seconds:,.1f} s, {count / seconds:,.0f} molecules/s"
        if earlier := self.errors - self.statuses["error"]:
            text += f"; {earlier:,} had failed in the run before"
        return text


def output_style(path: str | None) -> Style:
    """Return how tables look on standard output or in a file."""
    console = Console()
    if path is not None:
        return Style(console.width)
    return Style(console.width, console.color_system, output_encoding().lower().startswith("utf"))  # type: ignore[arg-type]


def output_encoding() -> str:
    """Return the encoding the terminal expects."""
    return getattr(sys.stdout, "encoding", None) or "utf-8"


def print_parts(parts: list[RenderableType]) -> None:
    """Print tables and lines on standard output."""
    with Output(encoding=output_encoding()) as output:
        output.write(draw(parts, output_style(None)))


@contextmanager
def counter(*, shown: bool, share: Callable[[], float | None] | None = None) -> Iterator[Callable[[], None]]:
    """Yield a function to call once a record; on a terminal, a line on stderr counts the calls.

    Args:
        shown: Whether there is to be a line at all.
        share: Tells which share of the work is done, as far as that is known; gives the line a bar and the time left.
    """
    if not shown or not _is_terminal(sys.stderr):
        yield lambda: None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), _DoneColumn(), _LeftColumn())
    with _live(Progress(*columns, console=_stderr(), transient=True)) as progress:
        task = progress.add_task("", total=None)
        count, started, shown_at = 0, time.monotonic(), -math.inf

        def advance() -> None:
            nonlocal count, shown_at
            count += 1
            if (now := time.monotonic()) < shown_at + _REDRAW:
                return
            shown_at = now
            done = share() if share is not None else None
            text = f"{count:,} molecules  {count / max(now - started, 1e-3):,.0f}/s"
            progress.update(task, description=text, completed=done or 0.0, total=1.0 if done else None)

        yield advance


@contextmanager
def bars(*titles: str) -> Iterator[list[Callable[[int, int], None]]]:
    """Yield a function per title that takes how much of how much is done; on a terminal, bars on stderr show it."""
    if not _is_terminal(sys.stderr):
        yield [lambda done, total: None for _ in titles]
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with _live(Progress(*columns, console=_stderr(), transient=True)) as progress:
        tasks = [progress.add_task(title, total=None, visible=False) for title in titles]

        def follow(task: TaskID) -> Callable[[int, int], None]:
            return lambda done, total: progress.update(task, completed=done, total=total, visible=True)

        yield [follow(task) for task in tasks]


def training_monitor() -> TrainingMonitor:
    """Return a view of a training run on stderr."""
    return TrainingMonitor(_stderr())


def writes_to_terminal() -> bool:
    """Return whether standard output is a terminal."""
    return _is_terminal(sys.stdout)


def report_parts(report: Mapping[str, Any], paper: Mapping[str, float], style: Style) -> list[RenderableType]:
    """Return `eval`'s table: the errors beside those of the EGNN paper.

    Args:
        report: `Report.to_dict()`.
        paper: The paper's mean absolute errors by key, in evaluation units.
        style: How to draw.
    """
    errors = {"mae": "MAE", "rmse": "RMSE", "max": "max", "bias": "bias"}
    if style.width < _WIDE:
        del errors["max"]
    table = new_table(style)
    table.add_column("property", style="bold")
    table.add_column("unit", style="dim")
    for heading in (*errors.values(), "EGNN\npaper", "ratio"):
        table.add_column(heading, justify="right")
    for key, row in report["properties"].items():
        digits = significant_decimals(row["mae"])
        numbers = [f"{row[name]:{'+' if name == 'bias' else ''}.{digits}f}" for name in errors]
        reference = [f"{paper[key]:g}", f"{row['mae'] / paper[key]:.2f}"] if key in paper else ["", ""]
        table.add_row(key, row["unit"], *numbers, *reference)
    skipped = report.get("skipped", 0)
    where = _place(report)
    where += "" if report["geometry"] == "file" else f", {GEOMETRY_NAMES[report['geometry']]} geometries"
    where += f": {report['molecules']:,} molecules" + (f", {skipped:,} without one" if skipped else "")
    notes = [_paragraph(f"model {report['weights']}", style)]
    if distances := report.get("rmsd"):
        text = (
            f"median RMSD to the DFT geometry: {distances['given']:.3f} Å given, {distances['refined']:.3f} Å refined"
        )
        notes.insert(0, _paragraph(text, style))
    return [_title(where, style), table, Text(), *_interval_parts(report, style), *notes]


def _interval_parts(report: Mapping[str, Any], style: Style) -> list[RenderableType]:
    """Return a table of what the 90 % intervals are worth, and how many molecules are outside; nothing without them."""
    rows = {key: row for key, row in report["properties"].items() if row.get("coverage") is not None}
    if not rows:
        return []
    table = new_table(style)
    table.add_column("property", style="bold")
    table.add_column("unit", style="dim")
    for heading in ("mean\n±", "true value\ninside", _SHARPNESS):
        table.add_column(heading if style.unicode else heading.replace("±", "+-"), justify="right")
    for key, row in rows.items():
        width = f"{row['half_width']:.{significant_decimals(row['half_width'])}f}"
        table.add_row(key, row["unit"], width, f"{100 * row['coverage']:.1f} %", _ratio(row["sharpness"]))
    note = f"out of the domain: {100 * report['outside']:.2f} % of the molecules; narrowest: a tenth of them"
    return [_title("90 % intervals", style), table, Text(), _paragraph(note, style)]


def comparison_parts(
    reports: Sequence[Mapping[str, Any]], paper: Mapping[str, float], style: Style
) -> list[RenderableType]:
    """Return `eval`'s tables for several geometries: errors, shifts and intervals side by side.

    Args:
        reports: `Report.to_dict()` of each.
        paper: The paper's mean absolute errors by key, in evaluation units.
        style: How to draw.
    """
    table = new_table(style)
    table.add_column("property", style="bold")
    table.add_column("unit", style="dim")
    for report in reports:
        table.add_column(f"{GEOMETRY_NAMES[report['geometry']]}\n{report['molecules']:,}", justify="right")
    table.add_column("EGNN\npaper", justify="right")
    for key, first in _shared(reports).items():
        errors = [report["properties"][key]["mae"] for report in reports]
        texts = [f"{error:.{significant_decimals(errors[0])}f}" for error in errors]
        table.add_row(key, first["unit"], *texts, f"{paper[key]:g}" if key in paper else "")
    title = _title(f"{_place(reports[0])}: mean absolute error, by geometry and molecules", style)
    notes = [f"model {reports[0]['weights']}"]
    if all(report["rmsd"] for report in reports):
        for name in ("given", "refined"):
            table.add_row(f"rmsd {name}", "Å", *(f"{report['rmsd'][name]:.3f}" for report in reports), "")
        notes.insert(0, "rmsd: median distance of the given and the refined geometry from that of DFT")
    parts = [title, table, Text(), *_shift_parts(reports, style), *_coverage_parts(reports, style)]
    return [*parts, *(_paragraph(note, style) for note in notes)]


def _shift_parts(reports: Sequence[Mapping[str, Any]], style: Style) -> list[RenderableType]:
    """Return a table of how far predictions move with the geometry; nothing where that is not known."""
    base, *others = sorted(reports, key=lambda report: report["geometry"] not in ("dft", "file"))
    if any(row.get("shift") is None for report in others for row in report["properties"].values()):
        return []
    table = new_table(style)
    table.add_column("property", style="bold")
    table.add_column("unit", style="dim")
    for report in others:
        table.add_column(GEOMETRY_NAMES[report["geometry"]], justify="right")
    for key, first in _shared(reports).items():
        shifts = [report["properties"][key]["shift"] for report in others]
        table.add_row(key, first["unit"], *(f"{shift:.{significant_decimals(shift)}f}" for shift in shifts))
    title = f"Mean absolute change from the predictions for {GEOMETRY_NAMES[base['geometry']]} geometries"
    return [_title(title, style), table, Text()]


def _coverage_parts(reports: Sequence[Mapping[str, Any]], style: Style) -> list[RenderableType]:
    """Return a table of the share of true values in the 90 % intervals; nothing without calibration."""
    if any(row.get("coverage") is None for report in reports for row in report["properties"].values()):
        return []
    mix: Mapping[str, Any] = next((report["mix"] for report in reports if report.get("mix")), {})
    table = new_table(style)
    table.add_column("property", style="bold")
    for report in reports:
        table.add_column(GEOMETRY_NAMES[report["geometry"]], justify="right")
    if mix:
        table.add_column("DFT and\nMMFF94", justify="right")
    sharp = bool(mix) and style.width >= _WIDE
    if sharp:
        table.add_column(_SHARPNESS, justify="right")
    for key in _shared(reports):
        cells = [f"{100 * report['properties'][key]['coverage']:.1f} %" for report in reports]
        cells += [f"{100 * mix[key]['coverage']:.1f} %"] if mix else []
        cells += [_ratio(mix[key]["sharpness"])] if sharp else []
        table.add_row(key, *cells)
    alarms = [f"{100 * report['outside']:.2f} %" for report in reports]
    table.add_row("out of domain", *alarms)
    return [_title("True values inside the 90 % intervals", style), table, Text()]


def note_skipped(report: Mapping[str, Any]) -> None:
    """Print on stderr how many molecules `eval` left out for want of a geometry, and why."""
    if report.get("skipped"):
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in report["skipped_reasons"].items())
        name = GEOMETRY_NAMES[report["geometry"]]
        print_note(f"{report['skipped']:,} molecules without a geometry of {name} are left out: {reasons}")


class _DoneColumn(BarColumn):
    def render(self, task: Task) -> Any:
        """Return the bar, or nothing where the end is unknown."""
        return Text() if task.total is None else super().render(task)


class _LeftColumn(TimeRemainingColumn):
    def render(self, task: Task) -> Text:
        """Return the time left, or nothing where the end is unknown."""
        return Text() if task.total is None else super().render(task) + " left"


@contextmanager
def _live(progress: Progress) -> Iterator[Progress]:
    """Show the progress; lines printed meanwhile go above it."""
    with progress:
        _LIVE.append(progress.console)
        try:
            yield progress
        finally:
            _LIVE.pop()


def _print_line(kind: str, style: str, text: str) -> None:
    line = Text(f"{kind}: ", style=style)
    line.append(printable(" ".join(text.split())), style="not bold default")
    with suppress(OSError, ValueError):  # there is nowhere left to tell it
        _stderr().print(line, soft_wrap=True)


def _stderr() -> Console:
    return _LIVE[-1] if _LIVE else Console(stderr=True, highlight=False, markup=False, emoji=False)


def _is_terminal(stream: Any) -> bool:
    return stream is not None and not stream.closed and bool(stream.isatty())


def _place(report: Mapping[str, Any]) -> str:
    return str(report["data"]) + ("" if report["split"] == "all" else f" {report['split']} split")


def _title(text: str, style: Style) -> Text:
    return _paragraph(text, style, "bold")


def _paragraph(text: str, style: Style, look: str = "dim") -> Text:
    """Return text in lines that fit between words; a word longer than a line is kept whole."""
    lines = textwrap.wrap(printable(text), style.width - 1, break_long_words=False, break_on_hyphens=False)
    return Text("\n".join(f" {line}" for line in lines), style=look, no_wrap=True, overflow="ignore")


def _shared(reports: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return the first report's errors by key, of the properties that every report has."""
    first, *others = (report["properties"] for report in reports)
    return {key: row for key, row in first.items() if all(key in other for other in others)}


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _records(count: int) -> str:
    return f"{count:,} record" + ("" if count == 1 else "s")
