"""Compressed data come out as they went in, damage is an error, and nothing fills the memory."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import subprocess
import sys
import zlib
from collections.abc import Callable
from functools import partial
from typing import BinaryIO

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from qmprop import streams
from qmprop.streams import MAX_BLANK, MAX_LINE, Lines, MissingCodecError, ParseError, decompress

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": partial(lzma.compress, preset=0),
    "zstd": zstandard.ZstdCompressor().compress,
}
#: Text that does not shrink much, so that its compressed form has many blocks' worth of bytes.
TEXT = b"".join(b"C %d.%d 0 0\n" % (k, zlib.crc32(b"%d" % k)) for k in range(20_000))


def read(data: bytes) -> tuple[bytes, str | None]:
    stream, name = decompress(io.BytesIO(data))
    return stream.read(), name


@pytest.mark.parametrize("name", COMPRESS)
def test_text_survives(name: str) -> None:
    for text in (TEXT, b"", b"H"):
        assert read(COMPRESS[name](text)) == (text, name)


@given(st.binary(max_size=30))
def test_what_is_not_compressed_is_left_alone(data: bytes) -> None:
    if streams.find_compression(data) is None:
        assert read(data) == (data, None)


@pytest.mark.parametrize("name", COMPRESS)
def test_joined_streams_are_one_text(name: str) -> None:
    part = COMPRESS[name]
    padding = b"\0" * 8 if name in ("gzip", "xz") else b""
    assert read(part(TEXT) + part(b"") + part(b"end\n") + padding)[0] == TEXT + b"end\n"


@pytest.mark.parametrize("name", COMPRESS)
@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda data: data[: len(data) // 2], "end too early"),
        (lambda data: data[:-1], "end too early"),
        (lambda data: data + b"and more", "stands something else"),
    ],
    ids=["half", "last-byte", "garbage"],
)
def test_damage_is_an_error_behind_the_whole_text(name: str, damage: Callable[[bytes], bytes], text: str) -> None:
    stream, _ = decompress(io.BytesIO(damage(COMPRESS[name](TEXT))))
    got = b""
    with pytest.raises(OSError, match=f"{name} data .*{text}|Behind the {name} data"):  # noqa: PT012
        while piece := stream.read1():  # type: ignore[attr-defined]
            got += piece
    assert TEXT.startswith(got)
    assert name == "bzip2" or len(got) > len(TEXT) // 4  # bzip2 has blocks of 900 kB


@pytest.mark.parametrize("name", ["gzip", "bzip2", "xz"])
def test_a_changed_byte_is_noticed(name: str) -> None:
    data = bytearray(COMPRESS[name](TEXT))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(OSError, match="damaged"):
        read(bytes(data))


@pytest.mark.parametrize("name", COMPRESS)
def test_text_comes_as_its_compressed_form_does(name: str) -> None:
    """A pipe is read no further than the text that is asked for."""

    class Pipe(io.RawIOBase):
        taken = 0

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
            piece = data[self.taken : self.taken + min(1_000, len(buffer))]
            self.taken += len(piece)
            buffer[: len(piece)] = piece
            return len(piece)

    part = COMPRESS[name](TEXT)
    data = part * 3
    pipe = Pipe()
    stream, _ = decompress(io.BufferedReader(pipe, 1_000))
    assert stream.read(len(TEXT)) == TEXT
    assert pipe.taken < 2 * len(part)
    assert stream.read() == TEXT * 2


MEMORY = """
import io, resource, sys, zstandard
from qmprop.streams import Lines, ParseError, decompress
class Zeros(io.RawIOBase):
    left = 4 << 30
    def readable(self): return True
    def readinto(self, buffer):
        size = min(len(buffer), self.left)
        self.left -= size
        buffer[:size] = bytes(size)
        return size
frame = zstandard.ZstdCompressor().compress(bytes(1 << 27)) * 32
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for stream in (io.BytesIO(frame), io.BufferedReader(Zeros())):
    text, _ = decompress(stream)
    try:
        Lines(io.TextIOWrapper(text)).next()
    except ParseError as error:
        print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_endless_lines_need_little_memory() -> None:
    result = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    first, second, growth = result.stdout.splitlines()
    assert first == second == f"line 1: longer than {MAX_LINE} characters"
    assert int(growth) < 64 << 10  # KiB


def test_zstd_without_its_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    with pytest.raises(MissingCodecError, match=r"qmprop\[io\]"):
        decompress(io.BytesIO(COMPRESS["zstd"](TEXT)))


def test_lines_are_counted_and_bounded() -> None:
    lines = Lines(io.StringIO("a\n" + "b" * (MAX_LINE - 2) + "\n" + "c" * MAX_LINE))
    assert lines.next() == "a\n"
    assert len(lines.take(1)[0]) == MAX_LINE - 1
    assert lines.number == 2
    with pytest.raises(ParseError, match="line 3: longer than"):
        lines.next()
    assert Lines(io.StringIO("")).next() == ""


def test_endless_blank_lines_end() -> None:
    class Blank(io.StringIO):
        def readline(self, size: int = -1, /) -> str:  # type: ignore[override]
            return "\n"

    lines = Lines(Blank())
    with pytest.raises(ParseError, match=f"line {MAX_BLANK + 1}: more than"):
        list(iter(lines.next, ""))


def test_closing_the_text_leaves_the_stream_open() -> None:
    stream: BinaryIO = io.BytesIO(gzip.compress(TEXT))
    text, _ = decompress(stream)
    text.close()
    assert not stream.closed
