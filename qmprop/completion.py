"""What the shell is offered when Tab is pressed behind an option; file names are the shell's own business."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from typing import Final

from qmprop.bundled import bundled_folders
from qmprop.targets import PRESETS, TARGETS, UNITS

#: The variable with which the shell's script asks.
VARIABLE: Final = "_QMPROP_COMPLETE"
_SPECIAL: Final = re.compile(r"""([\s()'"\\|&;<>*?$`])""")


def complete_properties(incomplete: str) -> list[str]:
    """Return the lists of property keys, "mu,homo", that begin so."""
    before, comma, _ = incomplete.rpartition(",")
    return [before + comma + key for key in TARGETS if key not in before.split(",")]


def complete_units(incomplete: str) -> list[str]:
    """Return the presets and `key=unit` assignments that begin so, behind those already there."""
    before, comma, _ = incomplete.rpartition(",")
    assignments = (f"{target.key}={unit}" for target in TARGETS.values() for unit in UNITS[target.dimension])
    return [before + comma + text for text in (*PRESETS, *assignments)]


def complete_formats() -> list[str]:
    """Return the output formats."""
    from qmprop.writers import FORMATS

    return list(FORMATS)


def complete_input_formats() -> list[str]:
    """Return the input formats a folder is searched for; ASE reads more."""
    from qmprop.readers import FOLDER_SUFFIXES

    return sorted(suffix.removeprefix(".") for suffix in FOLDER_SUFFIXES)


def complete_levels() -> list[str]:
    """Return levels of intervals that people use; others are fine."""
    return ["0.68", "0.8", "0.9", "0.95", "0.99", "none"]


def complete_weights() -> list[str]:
    """Return the names of the bundled weights."""
    return sorted({file.stem for folder in bundled_folders() for file in folder.glob("*.safetensors")})


def complete_devices() -> list[str]:
    """Return the kinds of devices; whether they are here shows when one is used."""
    return ["auto", "cpu", "cuda", "mps"]


def answer(complete: Callable[[], int]) -> int:
    """Let `complete` print the completions; for bash, in bash's way."""
    os.environ["COLUMNS"] = "10000"  # typer breaks the help of an option into lines, which fish takes for options
    return _answer_bash(complete) if os.environ[VARIABLE] == "complete_bash" else complete()


def _answer_bash(complete: Callable[[], int]) -> int:
    """Print the completions as bash wants them.

    Bash takes "homo=meV" for three words, of which only the last is replaced, and inserts text as it is, so that
    blanks and parentheses need a backslash.
    """
    words = os.environ.get("COMP_WORDS", "").split("\n")
    current = int(os.environ.get("COMP_CWORD", "0"))
    joined = list(_join(words[: current + 1]))
    prefix = ""
    if len(joined) <= current < len(words):
        value = joined[-1].partition("=")[2] if joined[-1].startswith("--") else joined[-1]
        prefix = value[: value.rfind("=") + 1]
        os.environ["COMP_WORDS"], os.environ["COMP_CWORD"] = "\n".join(joined), str(len(joined) - 1)
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            return complete()
    finally:
        lines = (line.removeprefix(prefix) for line in printed.getvalue().splitlines())
        sys.stdout.write("".join(_SPECIAL.sub(r"\\\1", line) + "\n" for line in lines))


def _join(words: Iterable[str]) -> Iterator[str]:
    """Put together what bash has parted at "="."""
    whole = ""
    for word in words:
        if whole and word != "=" and not whole.endswith("="):
            yield whole
            whole = ""
        whole += word
    yield whole
