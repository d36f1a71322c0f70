"""What Tab offers, asked as the shells' scripts ask and in a bash that has loaded the script; and what --help tells."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from qmprop import cli, completion
from qmprop.__main__ import run
from qmprop.targets import DEFAULT_KEYS, PRESETS, TARGETS
from qmprop.writers import FORMATS

#: Puts a line into readline's variables as bash does, calls the function the script registered, prints what it offers.
ASK = """
source {script}
COMP_WORDS=({words})
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
$(complete -p qmprop | sed 's/.*-F \\([^ ]*\\).*/\\1/') qmprop
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def ask(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], line: str) -> list[str]:
    """Return what is offered at the end of the line, one word per blank, as fish asks."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("_QMPROP_COMPLETE", "complete_fish")
    monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", line)
    assert run([]) == 0
    return [found.partition("\t")[0] for found in capfd.readouterr().out.splitlines() if found]


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("qmprop pre", ["predict"]),
        ("qmprop predict --prop", ["--properties"]),
        ("qmprop predict -p z", ["zpve"]),
        ("qmprop predict -p mu,h", ["mu,homo", "mu,h", "mu,h_atom"]),
        ("qmprop predict -p u0_atom,homo,u0", ["u0_atom,homo,u0"]),
        ("qmprop predict -u k", ["kcal", "kj"]),
        ("qmprop predict -u gap=k", ["gap=kcal/mol", "gap=kJ/mol"]),
        ("qmprop predict -u kcal,mu=", ["kcal,mu=D", "kcal,mu=ea0", "kcal,mu=C m"]),
        ("qmprop predict -f json", ["json", "jsonl"]),
        ("qmprop predict -i sd", ["sd", "sdf"]),
        ("qmprop predict -w egnn", ["egnn-qm9"]),
        ("qmprop predict --device c", ["cpu", "cuda"]),
        ("qmprop predict --interval 0.9", ["0.9", "0.95", "0.99"]),
        ("qmprop predict --interval n", ["none"]),
        ("qmprop predict --nei", ["--neighbors"]),
        ("qmprop eval --split t", ["train", "test"]),
        ("qmprop eval --geometry d", ["dft"]),
        ("qmprop predict ex", []),
        ("qmprop predict -o ex", []),
    ],
)
def test_what_is_offered(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], line: str, offered: list[str]
) -> None:
    assert ask(monkeypatch, capfd, line) == offered


def test_everything_is_offered_where_nothing_is_typed() -> None:
    assert completion.complete_properties("") == list(TARGETS)
    assert set(PRESETS) < set(completion.complete_units(""))
    assert completion.complete_formats() == list(FORMATS)
    assert set(DEFAULT_KEYS) <= set(completion.complete_properties(""))
    assert {"xyz", "sdf", "pdb"} <= set(completion.complete_input_formats())
    assert "egnn-qm9" in completion.complete_weights()


def test_a_property_is_not_offered_twice() -> None:
    assert "mu,homo,mu" not in completion.complete_properties("mu,homo,")


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script for bash, as the tool prints it."""
    path = tmp_path_factory.mktemp("completion") / "qmprop.bash"
    path.write_text(print_script("bash"))
    return path


def print_script(shell: str) -> str:
    command = [sys.executable, "-m", "qmprop", "--show-completion", shell]
    variables = os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=variables)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("qmprop predict -p mu,zp", ["mu,zpve"]),
        ("qmprop predict -u homo = m", ["meV"]),
        ("qmprop predict -u homo =", ["eV", "meV", "Ha", "kcal/mol", "kJ/mol"]),
        ("qmprop predict --units = cv = J", ["J/\\(mol\\ K\\)"]),
        ("qmprop predict exam", [""]),
    ],
)
def test_bash_completes(script: Path, words: str, offered: list[str]) -> None:
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    result = subprocess.run(
        ["bash", "--norc", "-c", ASK.format(script=script, words=words)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PATH": path},
    )
    assert (result.stdout.split("\n")[:-1], result.stderr) == (offered, "")


def test_bash_completes_file_names_itself(script: Path) -> None:
    assert "-o default" in script.read_text()


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_scripts_for_other_shells(shell: str) -> None:
    assert f"complete_{shell}" in print_script(shell)


def test_completion_loads_nothing_heavy() -> None:
    code = "import sys; from qmprop.__main__ import run; run([]); print(*sys.modules, file=sys.stderr)"
    variables = {"_QMPROP_COMPLETE": "complete_bash", "COMP_WORDS": "qmprop predict -u homo=m", "COMP_CWORD": "3"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=os.environ | variables
    )
    assert result.stdout == "homo=meV\n"
    assert not {"torch", "rdkit", "ase", "pandas", "pyarrow", "rich"} & set(result.stderr.split())


# --- help -------------------------------------------------------------------------------------------------------------


def parameters() -> Iterator[tuple[str, Any]]:
    command: Any = typer.main.get_command(cli.app)
    for name, sub in [("", command), *command.commands.items()]:
        for parameter in sub.params:
            yield name, parameter


def test_every_option_tells_its_default() -> None:
    """By itself or, where it has none that could be shown, in words; flags, repeated and required values need none."""
    for name, parameter in parameters():
        if parameter.param_type_name != "option" or parameter.is_flag or parameter.multiple or parameter.default:
            continue
        if parameter.required:
            continue
        if parameter.name in ("files_from", "resume", "config", "install_completion", "show_completion"):
            continue  # their absence needs no words
        assert "default" in parameter.help.lower(), (name, parameter.name)


def test_help_fits_80_columns_and_its_examples_parse(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    known: dict[str, Any] = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    for name in ["", *known]:
        assert run([*([name] if name else []), "--help"]) == 0
        lines = capfd.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 80
        examples = [line.strip() for line in lines if re.match(r" {2,3}\S.*qmprop |   qmprop ", line)]
        assert len(examples) >= (name not in ("", "info")), name
        for example in examples:
            words = shlex.split(re.sub(r"^.*?\| (?=qmprop)|\s[|>] .*$", "", example))
            assert words[0] == "qmprop", example
            known[words[1]].make_context(words[1], words[2:])


def test_predict_tells_every_exit_status(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["predict", "--help"]) == 0
    found = re.findall(r"^ {3}(\d+) {2}", capfd.readouterr().out, re.MULTILINE)
    assert found == ["0", "1", "2", "3", "130", "141"]
