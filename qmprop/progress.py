"""How much of the inputs has been read, in bytes: what tells the time left where nobody knows the number of records."""

from __future__ import annotations

import glob
import os
import stat
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from fnmatch import fnmatch
from functools import cached_property
from typing import BinaryIO, Final

from qmprop.readers import FOLDER_SUFFIXES
from qmprop.streams import COMPRESSED_SUFFIXES

#: Seconds that adding up the sizes of the inputs may take.
PATIENCE: Final = 0.5


class Meter:
    """Bytes read, of all there are.

    Args:
        inputs: Files, folders, glob patterns, or "-" for stdin, as `readers.read_paths` takes them.
        patterns: Names of the files that a folder stands for; none for those with the known suffixes.
        patience: Seconds for adding up their sizes, which happens when the share is first asked for.
    """

    def __init__(self, inputs: Iterable[str], *, patterns: Sequence[str] = (), patience: float = PATIENCE) -> None:
        self._inputs, self._patterns, self._patience = inputs, patterns, patience
        self._finished = 0
        self._size = 0
        self._stream: BinaryIO | None = None

    @cached_property
    def _total(self) -> int | None:
        return _add_up(self._inputs, self._patterns, time.monotonic() + self._patience)

    def follow(self, stream: BinaryIO) -> None:
        """Watch the file that is read from now on; the one before it is taken for finished."""
        self._finished += self._size
        self._stream, self._size = stream, 0
        with suppress(OSError, ValueError):  # not every stream is a file
            self._size = os.fstat(stream.fileno()).st_size

    def share(self) -> float | None:
        """Return the share of the inputs that has been read, from 0 to 1; None where that is unknown."""
        if not self._total or self._stream is None:
            return None
        position = self._size
        with suppress(OSError, ValueError):  # closed: it has been read
            position = min(position, os.lseek(self._stream.fileno(), 0, os.SEEK_CUR))
        return min(1.0, (self._finished + position) / self._total)


def _add_up(inputs: Iterable[str], patterns: Sequence[str], deadline: float) -> int | None:
    """Return the bytes of all files; None if one of them has no size or the time is over."""
    total = 0
    for status in _find(inputs, patterns):
        if status is None or time.monotonic() > deadline:
            return None
        total += status.st_size
    return total


def _find(inputs: Iterable[str], patterns: Sequence[str]) -> Iterator[os.stat_result | None]:
    """Yield what is known of each file the inputs stand for; None for a pipe or device, nothing for what is missing."""
    for name in inputs:
        try:
            found = os.fstat(sys.stdin.fileno()) if name == "-" else os.stat(name)
        except (OSError, ValueError, AttributeError):  # AttributeError: there is no stdin
            if glob.has_magic(name):
                with suppress(ValueError):
                    yield from _find(glob.iglob(name, recursive=True), patterns)
            continue
        if stat.S_ISDIR(found.st_mode):
            yield from _find(_files(name, patterns), patterns)
        else:
            yield found if stat.S_ISREG(found.st_mode) else None


def _files(folder: str, patterns: Sequence[str]) -> Iterator[str]:
    for path, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and _counts(name, patterns):
                yield os.path.join(path, name)


def _counts(name: str, patterns: Sequence[str]) -> bool:
    if patterns:
        return any(fnmatch(name, pattern) for pattern in patterns)
    stem, suffix = os.path.splitext(name.lower())
    return (os.path.splitext(stem)[1] if suffix in COMPRESSED_SUFFIXES else suffix) in FOLDER_SUFFIXES
