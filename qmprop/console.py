"""What the terminal shows besides records: errors, notes, progress, and the tables of `eval` and `info`."""

from __future__ import annotations

import math
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from qmprop.errors import QmpropError
from qmprop.monitor import TrainingMonitor
from qmprop.records import Record
from qmprop.tables import Style, draw, label, new_table, printable
from qmprop.targets import TARGETS, unit_factor
from qmprop.writers import Output

#: Mean absolute errors in the weights' metadata, in evaluation units; the first there is decides the digits shown.
_ERRORS: Final = {
    "test_mae": "Mean absolute error on the test split",
    "validation_mae": "Mean absolute error on the validation molecules",
}


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
        with_warnings: Whether warnings get a line each, too.
    """

    with_warnings: bool = False
    total: int = 0
    errors: int = 0
    warnings: Counter[str] = field(default_factory=Counter)

    def add(self, record: Record) -> None:
        """Count the record; print a line for each of its messages that says why it failed."""
        self.total += 1
        self.errors += record.status == "error"
        if record.status == "warning":
            self.warnings.update(message.code for message in record.messages)
        if record.status == "error" or (record.status == "warning" and self.with_warnings):
            style = "bold red" if record.status == "error" else "bold yellow"
            where = label(record, numbered=record.formula is not None and record.index > 0)
            for message in record.messages:
                _print_line(record.status, style, f"{where}: {message.code}: {message.text}")

    def close(self, *, stopped: bool = False) -> None:
        """Print the summary, if there is anything to tell."""
        parts = []
        if self.errors:
            parts.append(f"{self.errors:,} of {_records(self.total)} could not be predicted")
        if self.warnings and (self.errors or not self.with_warnings):
            counts = ", ".join(f"{code} {count:,}" for code, count in sorted(self.warnings.items()))
            parts.append(f"warnings: {counts}")
        if stopped:
            parts.append("stopped at the first error")
        if parts:
            print_note("; ".join(parts) + ".")


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
def counter(*, shown: bool) -> Iterator[Callable[[], None]]:
    """Yield a function to call once a record; on a terminal, a line on stderr counts the calls."""
    if not shown or not _is_terminal(sys.stderr):
        yield lambda: None
        return
    columns = (SpinnerColumn(), TextColumn("{task.completed:,} molecules"), _SpeedColumn())
    with Progress(*columns, console=_stderr(), transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda: progress.advance(task)


@contextmanager
def bars(*titles: str) -> Iterator[list[Callable[[int, int], None]]]:
    """Yield a function per title that takes how much of how much is done; on a terminal, bars on stderr show it."""
    if not _is_terminal(sys.stderr):
        yield [lambda done, total: None for _ in titles]
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_stderr(), transient=True) as progress:
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
    if style.width < 64:
        del errors["max"]
    table = new_table(style)
    table.add_column("property", style="bold")
    table.add_column("unit", style="dim")
    for heading in (*errors.values(), "EGNN\npaper", "ratio"):
        table.add_column(heading, justify="right")
    for key, row in report["properties"].items():
        digits = _digits(row["mae"])
        numbers = [f"{row[name]:{'+' if name == 'bias' else ''}.{digits}f}" for name in errors]
        reference = [f"{paper[key]:g}", f"{row['mae'] / paper[key]:.2f}"] if key in paper else ["", ""]
        table.add_row(key, row["unit"], *numbers, *reference)
    where = str(report["data"]) + ("" if report["split"] == "all" else f" {report['split']} split")
    where += "" if report["geometry"] == "file" else f", {report['geometry'].upper()} geometries"
    title = Text(
        f" {printable(where)}: {report['molecules']:,} molecules", style="bold", no_wrap=True, overflow="ignore"
    )
    return [title, table, Text(), Text(f" model {report['weights']}", style="dim")]


def facts_parts(title: str, facts: Mapping[str, object]) -> list[RenderableType]:
    """Return a titled list of names and values."""
    width = max((len(name) for name in facts), default=0)
    lines = [f"   {name.ljust(width)}  {printable(str(value))}" for name, value in facts.items()]
    return [Text(f" {title}", style="bold"), *(Text(line, no_wrap=True, overflow="ignore") for line in lines), Text()]


def model_parts(name: str, metadata: Mapping[str, Any]) -> list[RenderableType]:
    """Return what is known about the weights, for `info`."""
    facts = {key.replace("_", " "): _plain(value) for key, value in metadata.items() if key not in _ERRORS}
    parts = facts_parts(f"Weights {name}", facts)
    for kind, title in _ERRORS.items():
        if isinstance(errors := metadata.get(kind), Mapping):
            known = {key: error for key, error in errors.items() if key in TARGETS}
            texts = {key: f"{error:.{_digits(error)}f} {TARGETS[key].evaluation_unit}" for key, error in known.items()}
            parts += facts_parts(title, texts)
    return parts


def known_errors(metadata: Mapping[str, Any]) -> dict[str, float]:
    """Return the weights' error by key, in default units: on the test split, else on the validation molecules."""
    errors: Mapping[str, float] = next(
        (metadata[kind] for kind in _ERRORS if isinstance(metadata.get(kind), Mapping)), {}
    )
    scale = {key: unit_factor(key, TARGETS[key].evaluation_unit) for key in TARGETS}
    return {key: float(error) * scale[key] for key, error in errors.items() if key in TARGETS}


class _SpeedColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        """Return records per second."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f}/s", style="dim")


def _print_line(kind: str, style: str, text: str) -> None:
    line = Text(f"{kind}: ", style=style)
    line.append(printable(" ".join(text.split())), style="not bold default")
    with suppress(OSError, ValueError):  # there is nowhere left to tell it
        _stderr().print(line, soft_wrap=True)


def _stderr() -> Console:
    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def _is_terminal(stream: Any) -> bool:
    return stream is not None and not stream.closed and bool(stream.isatty())


def _digits(error: float) -> int:
    """Return the decimals that show three digits of the error."""
    return max(0, 2 - math.floor(math.log10(error))) if error > 0.0 and math.isfinite(error) else 3


def _plain(value: object) -> str:
    """Return a value of the weights' metadata on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return f"{len(value)} values" if len(value) > 4 else ", ".join(map(_plain, value))
    return str(value)


def _records(count: int) -> str:
    return f"{count:,} record" + ("" if count == 1 else "s")
