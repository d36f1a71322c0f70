"""`qmprop` and `python -m qmprop`: run a command, turn what goes wrong into one line and an exit status."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final

from qmprop import completion
from qmprop.errors import QmpropError, UsageError

FAILED: Final = 1
INTERRUPTED: Final = 130
PIPE_CLOSED: Final = 141


def main() -> None:
    """Run the command line and exit with its status."""
    sys.exit(run())


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, by default that of the process, and return its exit status."""
    try:
        with _termination_interrupts():
            return _run(arguments)
    except KeyboardInterrupt:
        status = INTERRUPTED
    except SystemExit as error:  # how typer and rich leave: done, or the pipe closed while they print help
        done = error.code if isinstance(error.code, int) else FAILED
        status = PIPE_CLOSED if isinstance(error.__context__, OSError) else done
    except Exception as error:
        status = _explain(error)
    _drop_stdout()
    return status


def _run(arguments: Sequence[str] | None) -> int:
    if completion.VARIABLE in os.environ:
        return completion.answer(lambda: _call(arguments))
    return _call(arguments)


def _call(arguments: Sequence[str] | None) -> int:
    from qmprop.cli import app
    from qmprop.outputs import Output

    status = app(args=arguments, prog_name="qmprop", standalone_mode=False)
    with Output():  # flushes: find out now, not when Python exits, whether all text has gone out
        return status if isinstance(status, int) else 0


def _explain(error: Exception) -> int:
    """Print what went wrong as one line and return the exit status."""
    from qmprop import console
    from qmprop.outputs import ClosedPipeError

    name = type(error).__name__
    if name == "Abort" and error.__cause__ is not None:  # typer's name for a few exceptions of Python
        if isinstance(error.__cause__, KeyboardInterrupt):
            return INTERRUPTED
        console.print_bug(error.__cause__)
        return FAILED
    if isinstance(error, QmpropError):
        console.print_error(error)
        return error.exit_status
    if isinstance(error, ClosedPipeError | BrokenPipeError):
        return PIPE_CLOSED
    if name == "NoArgsIsHelpError":  # typer has printed the help already
        return UsageError.exit_status
    if hasattr(error, "format_message"):  # typer's usage errors
        command = getattr(getattr(error, "ctx", None), "command_path", "qmprop")
        console.print_error(UsageError(error.format_message(), f"See '{command} --help'."))
        return UsageError.exit_status
    if isinstance(error, MemoryError):
        console.print_error(QmpropError("out of memory", "Try a smaller --batch-size."))
    elif isinstance(error, OSError) and error.strerror:
        where = f"'{error.filename}': " if error.filename else ""
        console.print_error(QmpropError(f"{where}{error.strerror}"))
    else:
        console.print_bug(error)
    return FAILED


@contextmanager
def _termination_interrupts() -> Iterator[None]:
    """Let SIGTERM end a command as Ctrl-C does, so that it cleans up behind itself."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _drop_stdout() -> None:
    """Forget text that cannot be written: Python would try again at exit, and complain."""
    if sys.stdout is None:
        return
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        return
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


if __name__ == "__main__":
    main()
