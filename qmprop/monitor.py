"""The live view of a training run: progress, time left, and the validation errors of the last epochs."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from qmprop.targets import TARGETS

if TYPE_CHECKING:
    from qmprop.learning import EpochResult

_COLUMN_WIDTH: Final = 9
_LABEL_WIDTH: Final = 26


class TrainingMonitor:
    """Shows a run on a console: redrawn in place on a terminal, a line an epoch elsewhere.

    Use it as a context manager and hand `load`, `step`, `epoch`, `calibrate` and `measure` to `training.train`.
    """

    def __init__(self, console: Console) -> None:
        """Show nothing yet."""
        self._console = console
        self._results: list[EpochResult] = []
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._task = self._progress.add_task("Loading data", total=None, note="")
        self._live = Live(self._progress, console=console, refresh_per_second=4) if console.is_terminal else None

    def __enter__(self) -> Self:
        """Start drawing."""
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last state on the terminal."""
        if self._live is not None:
            self._progress.stop_task(self._task)
            self._live.stop()

    def load(self, done: int, total: int) -> None:
        """Show how much of the data is parsed."""
        self._progress.update(self._task, completed=done, total=total)

    def step(self, done: int, total: int, loss: float) -> None:
        """Show the steps done and to do, and the loss of the last."""
        self._progress.update(
            self._task, description="Training", completed=done, total=total, note=f"steps, loss {loss:.4f}"
        )

    def calibrate(self, done: int, total: int) -> None:
        """Show the molecules done and to do in the calibration that follows."""
        self._progress.update(self._task, description="Calibrating", completed=done, total=total, note="molecules")

    def measure(self, done: int, total: int) -> None:
        """Show the molecules done and to do in the measurement after that."""
        self._progress.update(self._task, description="Measuring", completed=done, total=total, note="molecules")

    def epoch(self, result: EpochResult) -> None:
        """Add a finished epoch."""
        self._results.append(result)
        if self._live is None:
            self._console.print(describe(result), soft_wrap=True)
            return
        columns = max(1, (self._console.width - _LABEL_WIDTH) // _COLUMN_WIDTH)
        left = Text(f"\n {result.molecules_per_second:,.0f} molecules/s, {_duration(result.seconds_left)} left")
        self._live.update(Group(draw(self._results[-columns:]), left, self._progress))


def draw(results: list[EpochResult]) -> Table:
    """Return a table with a column per epoch: training loss and validation MAE of every property in its unit."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="Validation MAE", title_justify="left", title_style="bold")
    table.add_column("epoch", no_wrap=True)
    table.add_column("", no_wrap=True, style="dim")
    for result in results:
        table.add_column(f"{result.epoch}/{result.epochs}", justify="right", no_wrap=True)
    for key in results[-1].mae:
        table.add_row(key, TARGETS[key].evaluation_unit, *(_short(result.mae[key]) for result in results))
    table.add_section()
    table.add_row("loss", "", *(_short(result.loss) for result in results))
    return table


def describe(result: EpochResult) -> str:
    """Return an epoch as one line."""
    errors = ", ".join(f"{key} {_short(value)} {TARGETS[key].evaluation_unit}" for key, value in result.mae.items())
    return (
        f"epoch {result.epoch}/{result.epochs}: loss {_short(result.loss)}; validation MAE {errors}; "
        f"{result.molecules_per_second:,.0f} molecules/s, {_duration(result.seconds_left)} left"
    )


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 1000.0 else f"{value:,.0f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
