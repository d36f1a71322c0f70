"""Where data goes: standard output, or a file that appears whole or not at all."""

from __future__ import annotations

import os
import signal
import stat
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, BinaryIO, Final, Self

from qmprop.errors import OutputError, UsageError

#: Behind the name of a file while it is being written with the prospect of being resumed.
PARTIAL_SUFFIX: Final = ".partial"


class ClosedPipeError(Exception):
    """Whoever read the output has had enough."""


class Output:
    """Where data goes: standard output, or a file that takes its name only when it is complete.

    A file that exists is replaced at the end, in one step; until then, and if anything goes wrong, it stays as it was.
    Devices and pipes are written as the data comes. Use as a context manager.

    Args:
        path: The file; None or "-" for standard output.
        encoding: Of text; what it cannot hold is written as "?".
        option: The command line's option that names it, for advice.
        resumable: Write to `path` + ".partial", after what an earlier run left there, and leave it there if anything
            goes wrong. One run at a time may write it.

    Attributes:
        partial: The path of the partial file; None if the output is not resumable.

    Raises:
        OutputError: It cannot be written.
        UsageError: It is to be resumable but is not a file.
    """

    def __init__(
        self, path: str | None = None, *, encoding: str = "utf-8", option: str = "-o", resumable: bool = False
    ) -> None:
        self._is_ours = path is not None and path != "-"
        self.name = f"'{path}'" if self._is_ours else "standard output"
        self.partial: str | None = None
        self._encoding = encoding
        self._option = option
        self._temporary: str | None = None
        self._target = ""
        self._direct = True
        with self._explain():
            if path is None or path == "-":
                if resumable:
                    raise _not_a_file(self.name)
                self._stream = _stdout()
            else:
                self._stream = self._open(path, resumable=resumable)

    def write(self, data: str | bytes) -> None:
        """Write whole lines, or bytes; an interrupt waits until they are out.

        Raises:
            OutputError: There is no room, or no permission.
            ClosedPipeError: The reader has gone.
        """
        if not data:
            return
        if isinstance(data, str):
            data = data.encode(self._encoding, "replace")
        with self._explain(), _interrupts_held():
            self._stream.write(data)
            if self._direct:
                self._stream.flush()

    def cut(self, size: int) -> None:
        """Keep the first `size` bytes of what an earlier run left, and continue after them.

        Raises:
            OutputError: It cannot be done.
        """
        with self._explain():
            self._stream.truncate(size)
            self._stream.seek(size)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give the file its name if all went well; otherwise remove what there is of it, or leave it to be resumed."""
        try:
            if kind is None:
                with self._explain():
                    self._commit()
        finally:
            self._discard()

    def _open(self, path: str, *, resumable: bool) -> BinaryIO:
        mode = None
        with suppress(FileNotFoundError):
            mode = os.stat(path).st_mode
        if mode is not None and not stat.S_ISREG(mode):
            if resumable:
                raise _not_a_file(self.name)
            return open(path, "wb")
        self._target = os.path.realpath(path)
        if mode is not None and not os.access(self._target, os.W_OK):
            raise PermissionError(13, os.strerror(13))
        if resumable:
            self._temporary = self._target + PARTIAL_SUFFIX
            self.partial = self._temporary if os.path.islink(path) else path + PARTIAL_SUFFIX
            stream = _open_partial(self._temporary)
        else:
            folder, name = os.path.split(self._target)
            handle, self._temporary = tempfile.mkstemp(prefix=f".{name[:40]}.", suffix=".tmp", dir=folder)
            stream = os.fdopen(handle, "wb")
            self._direct = False
        with suppress(OSError):
            os.chmod(self._temporary, 0o666 & ~_umask() if mode is None else stat.S_IMODE(mode))
        return stream

    def _commit(self) -> None:
        self._stream.flush()
        if self._temporary is not None:
            os.fsync(self._stream.fileno())
            if self.partial is None:
                self._stream.close()
            os.replace(self._temporary, self._target)  # a partial file stays locked until it has its name
            self._temporary = None
            self._stream.close()

    def _discard(self) -> None:
        if self._is_ours:
            with suppress(OSError):
                self._stream.close()
        if self._temporary is not None:
            with suppress(OSError):
                if self.partial is None or os.path.getsize(self._temporary) == 0:
                    os.unlink(self._temporary)
            self._temporary = None

    @contextmanager
    def _explain(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError as error:
            raise ClosedPipeError from error
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            advice = f"Name another place with {self._option} FILE."
            raise OutputError(f"cannot write {self.name}: {reason}", advice) from error


def is_same_file(path: str, other: str) -> bool:
    """Return whether two names, "-" for standard input among them, stand for one regular file."""
    try:
        mine = os.stat(path)
        theirs = os.fstat(0) if other == "-" else os.stat(other)
    except (OSError, ValueError):
        return False
    return stat.S_ISREG(mine.st_mode) and os.path.samestat(mine, theirs)


def _open_partial(path: str) -> BinaryIO:
    """Open a partial file for reading and writing, made if need be, and keep every other run away from it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
    stream = os.fdopen(handle, "r+b")
    try:
        with suppress(ImportError):  # Windows
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.stat(path), os.fstat(handle)):  # the other run finished just now
            raise FileNotFoundError
    except (BlockingIOError, FileNotFoundError) as error:
        stream.close()
        raise OutputError(f"another run is writing '{path}'", "Wait for it, or name another file with -o.") from error
    except BaseException:
        stream.close()
        raise
    return stream


def _not_a_file(name: str) -> UsageError:
    return UsageError(f"{name} cannot be resumed: it is not a file", "Leave out --resume, or name a file with -o.")


def _stdout() -> BinaryIO:
    stream: Any = getattr(sys, "stdout", None)  # None where the caller closed it
    if stream is None:
        raise ValueError("it is closed")
    stream.flush()
    buffer: BinaryIO = stream.buffer
    return buffer


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold back the first Ctrl-C or SIGTERM until the block ends; a second one acts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[tuple[int, FrameType | None]] = []
    handlers: dict[int, Any] = {}

    def hold(number: int, frame: FrameType | None) -> None:
        held.append((number, frame))
        signal.signal(number, handlers[number])

    for wanted in (signal.SIGINT, signal.SIGTERM):
        if callable(handler := signal.getsignal(wanted)):
            handlers[wanted] = handler
            signal.signal(wanted, hold)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if held:
            number, frame = held[0]
            handlers[number](number, frame)
