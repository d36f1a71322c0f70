"""Binary streams made safe to read: decompressed as they come, in lines of bounded length."""

from __future__ import annotations

import functools
import importlib
import io
import itertools
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Protocol, TextIO

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

#: A longer line (characters) is no text file; reading on could fill the memory.
MAX_LINE: Final = 1_000_000
#: More blank lines than this on end are no text file, either.
MAX_BLANK: Final = 1_000_000
#: What ends the names of files that are compressed.
COMPRESSED_SUFFIXES: Final = frozenset([".gz", ".bz2", ".xz", ".zst"])
_MAGIC: Final = 10  # bytes that tell the compression
_CHUNK: Final = 1 << 14
_MAX_WINDOW: Final = 1 << 28  # bytes a decompressor may keep; `xz -9` needs a quarter of it
_ZSTD_PIECE: Final = 256  # compressed bytes taken at once: at most a few MB come out of them


class ParseError(Exception):
    """The text breaks its format's rules; what follows cannot be trusted."""


class MissingCodecError(Exception):
    """The package that decompresses the data is not installed."""


class Lines:
    """The lines of a text stream, counted and of bounded length.

    Attributes:
        number: How many lines have been taken.
    """

    def __init__(self, stream: TextIO) -> None:
        """Start at the next line of the open stream, which is read no further than asked for."""
        self.number = 0
        self._blank = 0
        self._stream = iter(functools.partial(stream.readline, MAX_LINE), "")

    def take(self, count: int) -> list[str]:
        """Take the next `count` lines; fewer where the stream ends.

        Raises:
            ParseError: A line is longer than `MAX_LINE`.
        """
        lines = list(itertools.islice(self._stream, count))
        for line in lines:
            self.number += 1
            if len(line) >= MAX_LINE:
                raise ParseError(f"line {self.number}: longer than {MAX_LINE} characters")
        return lines

    def next(self) -> str:
        """Take the next line; "" where the stream ends.

        Raises:
            ParseError: The line is longer than `MAX_LINE`, or it is one blank line too many.
        """
        line = next(self._stream, "")
        if line:
            self.number += 1
            self._blank = self._blank + 1 if line.isspace() else 0
            if len(line) >= MAX_LINE:
                raise ParseError(f"line {self.number}: longer than {MAX_LINE} characters")
            if self._blank > MAX_BLANK:
                raise ParseError(f"line {self.number}: more than {MAX_BLANK} blank lines")
        return line


class Rejoined(io.RawIOBase):
    """A binary stream with bytes put back before it; closing it leaves the stream open."""

    def __init__(self, head: bytes, rest: BinaryIO) -> None:
        self._head = head
        self._rest = rest

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Read what is there, at most as much as the buffer holds."""
        view = memoryview(buffer)
        data = self._head[: len(view)] or self._rest.read1(len(view))  # type: ignore[attr-defined]
        self._head = self._head[len(data) :]
        view[: len(data)] = data
        return len(data)


def decompress(stream: BinaryIO) -> tuple[BinaryIO, str | None]:
    """Return the stream's data, decompressed if its first bytes say so, and the name of the compression or None.

    The data come as they are read; the returned stream raises an `OSError` where the compressed data are damaged or
    end too early. Closing it leaves `stream` open.

    Raises:
        MissingCodecError: The data are compressed with zstd and no package for it is installed.
        OSError: The stream cannot be read.
    """
    head = stream.readline(_MAGIC)  # waits for no more than a line
    joined = Rejoined(head, stream)
    name = find_compression(head)
    raw = joined if name is None else _Decompressed(joined, _CODECS[name])
    return io.BufferedReader(raw), name


def find_compression(head: bytes) -> str | None:
    """Return the name of the compression of data that begin like this; None if they are not compressed."""
    return next((name for name, codec in _CODECS.items() if codec.magic.match(head)), None)


class _Decompressor(Protocol):
    """What the decompressors of `bz2` and `lzma` have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = ...) -> bytes: ...


class _GzipDecompressor:
    """One gzip member."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def needs_input(self) -> bool:
        return not self._inner.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: bytes, max_length: int = 0) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail + data, max_length)


class _ZstdDecompressor:
    """One frame of zstd, through the package zstandard, whose own objects have no bound on what comes out at once."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._input = b""
        self._output = io.BytesIO()

    @property
    def eof(self) -> bool:
        return bool(self._inner.eof) and self._output.tell() == len(self._output.getbuffer())

    @property
    def needs_input(self) -> bool:
        return not self._input

    @property
    def unused_data(self) -> bytes:
        return bytes(self._inner.unused_data) + self._input

    def decompress(self, data: bytes, max_length: int = 0) -> bytes:
        self._input += data
        while not (text := self._output.read(max_length)) and self._input and not self._inner.eof:
            piece, self._input = self._input[:_ZSTD_PIECE], self._input[_ZSTD_PIECE:]
            self._output = io.BytesIO(self._inner.decompress(piece))
        return text


def _create_bzip2() -> _Decompressor:
    import bz2

    return bz2.BZ2Decompressor()


def _create_xz() -> _Decompressor:
    import lzma

    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MAX_WINDOW)


def _create_zstd() -> _Decompressor:
    try:
        own: Any = importlib.import_module("compression.zstd")  # Python 3.14
        return own.ZstdDecompressor(options={own.DecompressionParameter.window_log_max: 28})  # type: ignore[no-any-return]
    except ModuleNotFoundError:
        pass
    try:
        import zstandard
    except ModuleNotFoundError as error:
        raise MissingCodecError("reading zstd needs the package zstandard: pip install 'qmprop[io]'") from error
    return _ZstdDecompressor(zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).decompressobj())


@dataclass(frozen=True, slots=True)
class _Codec:
    """A compression: the bytes it begins with and what undoes it."""

    name: str
    magic: re.Pattern[bytes]
    create: Callable[[], _Decompressor]


_CODECS: Final = {
    codec.name: codec
    for codec in (
        _Codec("gzip", re.compile(rb"\x1f\x8b\x08"), _GzipDecompressor),
        _Codec("bzip2", re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"), _create_bzip2),
        _Codec("xz", re.compile(rb"\xfd7zXZ\x00"), _create_xz),
        _Codec("zstd", re.compile(rb"\x28\xb5\x2f\xfd"), _create_zstd),
    )
}


class _Decompressed(io.RawIOBase):
    """The data of one or more compressed streams that follow each other."""

    def __init__(self, source: io.RawIOBase, codec: _Codec) -> None:
        self._source = source
        self._codec = codec
        self._decompressor = codec.create()
        self._pending = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer)
        data = self._take(len(view))
        view[: len(data)] = data
        return len(data)

    def _take(self, size: int) -> bytes:
        while not self._decompressor.eof or self._begin_next():
            data, ended = self._pending, False
            self._pending = b""
            if not data and self._decompressor.needs_input:
                data = self._source.read(_CHUNK) or b""
                ended = not data
            try:
                text = self._decompressor.decompress(data, size)
            except Exception as error:  # every codec has errors of its own
                raise OSError(f"The {self._codec.name} data are damaged") from error
            if text:
                return text
            if ended and not self._decompressor.eof:
                raise OSError(f"The {self._codec.name} data end too early")
        return b""

    def _begin_next(self) -> bool:
        """Go to the next of several joined streams; return whether there is one."""
        rest = self._decompressor.unused_data.lstrip(b"\0")
        while len(rest) < _MAGIC and (more := self._source.read(_CHUNK)):
            rest = (rest + more).lstrip(b"\0")
        if not rest:
            return False
        if not self._codec.magic.match(rest):
            raise OSError(f"Behind the {self._codec.name} data stands something else")
        self._decompressor = self._codec.create()
        self._pending = rest
        return True
