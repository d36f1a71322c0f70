"""How much of the inputs has been read: of files, of folders, of what is piped in."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from fakes import WATER_XYZ

from qmprop.progress import Meter


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two files of 100 and 300 bytes in a folder, with company that is no input."""
    monkeypatch.chdir(tmp_path)
    Path("in/deep").mkdir(parents=True)
    Path("in/a.xyz").write_bytes(b"a" * 100)
    Path("in/deep/b.xyz").write_bytes(b"b" * 300)
    Path("in/notes.txt").write_bytes(b"n" * 5000)
    Path("in/.hidden.xyz").write_bytes(b"h" * 5000)
    return tmp_path


@pytest.mark.parametrize("inputs", [["in"], ["in/a.xyz", "in/deep/b.xyz"], ["in/**/*.xyz"], ["in", "absent.xyz"]])
def test_the_share_grows_with_every_byte_read(folder: Path, inputs: list[str]) -> None:
    meter = Meter(inputs)
    assert meter.share() is None
    with open("in/a.xyz", "rb", buffering=0) as first:
        meter.follow(first)
        assert meter.share() == 0.0
        first.read(50)
        assert meter.share() == 0.125
    assert meter.share() == 0.25
    with open("in/deep/b.xyz", "rb", buffering=0) as second:
        meter.follow(second)
        second.read(150)
        assert meter.share() == 0.625
    assert meter.share() == 1.0


def test_a_pattern_or_a_compressed_suffix_decides_what_counts_in_a_folder(folder: Path) -> None:
    for patterns, total in (([], 450), (["*.txt"], 5000), (["a.*", "b.*"], 400)):
        Path("in/c.xyz.gz").write_bytes(b"c" * 50)
        meter = Meter(["in"], patterns=patterns)
        with open("in/a.xyz", "rb", buffering=0) as stream:
            meter.follow(stream)
            stream.read(50)
            assert meter.share() == 50 / total


def test_redirected_standard_input_is_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open("in/a.xyz", "rb", buffering=0) as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        meter = Meter(["-"])
        meter.follow(stream)
        stream.read(10)
        assert meter.share() == 0.1


def test_nobody_knows_how_much_comes_through_a_pipe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    with os.fdopen(read, "rb") as stream, os.fdopen(write, "wb"):
        monkeypatch.setattr(sys, "stdin", stream)
        meter = Meter(["in", "-"])
        meter.follow(stream)
        assert meter.share() is None


def test_no_standard_input_is_no_obstacle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    meter = Meter(["-", "in/a.xyz"])
    with open("in/a.xyz", "rb") as stream:
        meter.follow(stream)
        assert meter.share() == 0.0


def test_counting_gives_up_rather_than_delay_the_start(folder: Path) -> None:
    meter = Meter(["in"], patience=-1.0)
    with open("in/a.xyz", "rb") as stream:
        meter.follow(stream)
        assert meter.share() is None


def test_a_file_that_grows_is_never_more_than_read(folder: Path) -> None:
    meter = Meter(["in/a.xyz"])
    Path("in/a.xyz").write_text(WATER_XYZ * 100)
    with open("in/a.xyz", "rb") as stream:
        meter.follow(stream)
        stream.read()
        assert meter.share() == 1.0
