"""README.md and the model card: commands run, code runs, tables are the tool's own, numbers are what `eval` prints."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib

import jsonschema
import pytest
import standins
import typer
from refresh_readme import (
    CARD,
    README,
    ROOT,
    blocks,
    commands,
    environment,
    regions,
    render,
    shell,
    stored_report,
    stored_reports,
    without_regions,
)

import qmprop
from qmprop import __main__, cli
from qmprop.config import TrainConfig
from qmprop.evaluation import PAPER_MAE, evaluate
from qmprop.model import load_model
from qmprop.records import MESSAGE_CODES, RECORD_SCHEMA
from qmprop.targets import DEFAULT_KEYS, PRESETS, TARGETS, UNITS
from qmprop.writers import FORMATS

TEXT = README.read_text(encoding="utf-8")
BLOCKS = blocks(TEXT, "sh")
PAGES = {"README.md": TEXT, "weights/README.md": CARD.read_text(encoding="utf-8") if CARD.exists() else ""}

#: Commands that the test does not run, and why.
NOT_RUN = {
    "pip install -c constraints.txt . && qmprop predict examples/water.xyz": ".ci/run runs it",
    "pip install -c constraints.txt -e '.[dev]' && pytest": ".ci/run runs it",
    "qmprop train --epochs 100 --out runs/long": "takes hours",
    "qmprop train --resume runs/long": "needs the run that takes hours; test_training.py resumes a short one",
    "python -m tests.refresh_readme": "changes this page; the tests below compare what it would write",
}
#: Commands that the test runs on fewer molecules.
SHORTENED = {
    "qmprop eval": "qmprop eval --limit 200",
    "qmprop train --epochs 1 --limit 2000 --out runs/try": "qmprop train --epochs 1 --limit 200 --out runs/try",
}


@pytest.fixture
def folder(tmp_path):
    """A folder with the examples, as in a checkout."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    return tmp_path


def id_of(block):
    return next(iter(commands(block)))[:40]


#: Blocks whose outcome has a test of its own, which runs them.
CHECKED_BELOW = re.compile(r"parallel -0|sbatch --wait|cat > Makefile|jq -r|--install-completion")


def run_block(block, folder):
    """Run the commands of a block, all of which have to succeed, with stand-ins for the tools this machine lacks."""
    lines = [SHORTENED.get(line, line) for line in commands(block) if line not in NOT_RUN]
    standins.install(folder / ".tools")
    extra = {"PATH": os.pathsep.join([environment()["PATH"], str(folder / ".tools")])}
    if "--install-completion" in block:
        extra["HOME"] = str(folder)
    result = shell("\n".join([*lines, ":"]), folder, check=False, **extra)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    return result


@pytest.mark.parametrize("block", [block for block in BLOCKS if not CHECKED_BELOW.search(block)], ids=id_of)
def test_the_commands_run(block, folder):
    run_block(block, folder)
    for path in folder.glob("*.jsonl"):
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert records
        for record in records:
            jsonschema.validate(record, RECORD_SCHEMA)


def block_with(text):
    (found,) = [block for block in BLOCKS if text in block]
    return found


def sources(folder):
    """Return where the records in results.jsonl come from, sorted."""
    return sorted({json.loads(line)["source"] for line in (folder / "results.jsonl").read_text().splitlines()})


@pytest.mark.parametrize("text", ["parallel -0", "sbatch --wait"])
def test_shared_work_is_done_whole_and_once(folder, text):
    run_block(block_with(text), folder)
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert sources(folder) == sorted(f"examples/{path.name}" for path in (folder / "examples").glob("*.xyz"))
    assert len({(record["source"], record["index"]) for record in records}) == len(records)


def test_the_makefile_makes_a_result_of_every_molecule(folder):
    (folder / "examples" / "broken.xyz").write_text("2\n\nH 0 0 0\n")
    run_block(block_with("cat > Makefile"), folder)
    assert {path.stem for path in (folder / "examples").glob("*.csv")} == {
        path.stem for path in (folder / "examples").glob("*.xyz")
    }
    assert "parse-error" in (folder / "examples" / "broken.csv").read_text()


def test_what_failed_and_what_has_the_smallest_gap_are_found(folder):
    (folder / "examples" / "broken.xyz").write_text("2\n\nH 0 0 0\n")
    result = run_block(block_with("jq -r").replace("> results.jsonl", "> results.jsonl || [ $? -eq 3 ]"), folder)
    failed, *ranked = result.stdout.splitlines()
    assert failed == "examples/broken.xyz\t0\tparse-error"
    gaps = [float(line.split("\t")[0]) for line in ranked]
    assert gaps == sorted(gaps)
    assert len(gaps) > 5


def test_completion_is_installed_for_the_shell_at_hand(folder):
    run_block(block_with("--install-completion"), folder)
    assert "_QMPROP_COMPLETE" in (folder / ".bash_completions" / "qmprop.sh").read_text()


@pytest.mark.parametrize("name", standins.TOOLS)
def test_stand_ins_know_the_tools_of_the_page(name, folder, monkeypatch):
    monkeypatch.setattr(standins.shutil, "which", lambda tool: None)
    assert set(standins.install(folder / "other")) == set(standins.TOOLS)
    assert any(re.search(rf"(^|\| ){name}\b", line) for block in BLOCKS for line in commands(block))


def test_the_exceptions_are_on_the_page():
    on_page = [line for block in BLOCKS for line in commands(block)]
    assert [line for line in (*NOT_RUN, *SHORTENED) if line not in on_page] == []


@pytest.mark.parametrize("block", blocks(TEXT, "python"), ids=lambda block: block.splitlines()[-1].strip()[:40])
def test_the_python_code_runs(block, folder):
    result = subprocess.run(
        [sys.executable, "-c", block], cwd=folder, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout


def test_the_settings_are_valid():
    for block in blocks(TEXT, "toml"):
        settings = TrainConfig.from_dict(tomllib.loads(block))
        assert settings != TrainConfig()


@pytest.mark.parametrize(
    ("page", "kind", "argument", "content"),
    [(page, *region) for page, text in PAGES.items() for region in regions(text)],
    ids=lambda value: value[:40] if "\n" not in value else "",
)
def test_generated_parts_are_the_tools_own(page, kind, argument, content):
    assert content == render(kind, argument), f"{page} is out of date: run python -m tests.refresh_readme"


def test_the_record_on_the_page_has_the_form_of_a_record():
    for block in blocks(TEXT, "json"):
        jsonschema.validate(json.loads(block), RECORD_SCHEMA)


# --- the first two commands -------------------------------------------------------------------------------------------


def test_the_first_two_commands_do_everything():
    first, second = [line for block in BLOCKS for line in commands(block)][:2]
    assert first == "pip install -c constraints.txt . && qmprop predict examples/water.xyz"
    assert second == "pip install -c constraints.txt -e '.[dev]' && pytest"


STUB = """#!/bin/sh
echo "$(basename "$0") $*" >> "$STUB_LOG"
[ -t 0 ] || read -r line && exit 99
exit ${STUB_STATUS_@NAME@:-0}
"""
PYTHON_STUB = """#!/bin/sh
echo "python3 $1 $2" >> "$STUB_LOG"
mkdir -p "$3/bin"
cp "$STUB_BIN"/* "$3/bin"
"""


@pytest.mark.parametrize(
    ("failing", "last"),
    [({}, "pytest "), ({"STUB_STATUS_pytest": "7"}, "pytest "), ({"STUB_STATUS_qmprop": "7"}, "qmprop predict")],
)
def test_ci_runs_the_first_two_commands_in_a_fresh_environment(tmp_path, failing, last):
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    shutil.copy(README, tmp_path)
    for folder, names in (("environment", ("pip", "qmprop", "pytest")), ("system", ("python3", "chromium"))):
        (tmp_path / folder).mkdir()
        for name in names:
            script = tmp_path / folder / name
            script.write_text(PYTHON_STUB if name == "python3" else STUB.replace("@NAME@", name))
            script.chmod(0o755)
    variables = {"STUB_LOG": str(tmp_path / "log"), "STUB_BIN": str(tmp_path / "environment")} | failing
    path = f"{tmp_path / 'system'}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run([tmp_path / ".ci" / "run"], env=os.environ | {"PATH": path} | variables, timeout=60)
    log = (tmp_path / "log").read_text().splitlines()
    steps = ["python3 -m venv", "pip install -c constraints.txt .", "qmprop predict examples/water.xyz"]
    steps += ["pip install -c constraints.txt -e .[dev]", "pytest "]
    assert result.returncode == int(*failing.values())
    assert log == steps[: len(log)]
    assert log[-1].startswith(last)


# --- what the page says about the tool --------------------------------------------------------------------------------


def options():
    command = typer.main.get_command(cli.app)
    for name, sub in [("qmprop", command), *command.commands.items()]:
        for parameter in sub.params:
            if parameter.param_type_name == "option":
                yield name, [*parameter.opts, *parameter.secondary_opts]


def test_every_option_is_on_the_page():
    sections = {"predict": "## Predicting", "eval": "## Evaluating", "train": "## Training"}
    for name, flags in options():
        part = TEXT[TEXT.index(sections[name]) :].split("\n## ")[0] if name in sections else TEXT
        missing = [flag for flag in flags if f"`{flag}`" not in part and flag not in ("-h", "--help", "--version")]
        assert missing == [], name
    assert "--version" in TEXT


def test_every_option_on_the_page_exists():
    known = {flag for _, flags in options() for flag in flags} | {"--evaluate"}
    assert set(re.findall(r"`(--?[a-z][a-z-]*)`", TEXT)) <= known


def test_formats_units_and_properties_are_on_the_page():
    words = [*FORMATS, *PRESETS, *TARGETS, *(unit for units in UNITS.values() for unit in units)]
    assert [word for word in words if f"`{word}`" not in TEXT] == []


def test_message_codes_are_on_the_page():
    (table,) = [content for kind, _, content in regions(TEXT) if kind == "codes"]
    assert re.findall(r"^\| `(.*?)`", table, re.MULTILINE) == list(MESSAGE_CODES)


def test_exit_statuses_are_on_the_page():
    rows = re.findall(r"^\| (\d+) \|", TEXT, re.MULTILINE)
    statuses = (cli.OK, __main__.FAILED, qmprop.errors.UsageError.exit_status, cli.SOME_RECORDS_FAILED)
    assert rows == [str(status) for status in (*statuses, __main__.INTERRUPTED, __main__.PIPE_CLOSED)]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", PAGES[page])
    for link in links:
        if not link.startswith(("https://", "#")):
            assert ((ROOT / page).parent / link.partition("#")[0]).exists(), link


def test_the_changelog_has_an_entry_for_this_version():
    assert f"## [{qmprop.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


# --- accuracy ---------------------------------------------------------------------------------------------------------


def test_the_stored_evaluation_is_of_the_bundled_weights_on_the_whole_test_split():
    weights = load_model(device="cpu").id
    assert [report["geometry"] for report in stored_reports()] == ["dft", "mmff", "xtb"]
    for report, count in zip(stored_reports(), (13083, 13083, 1000), strict=True):
        facts = {key: report[key] for key in ("data", "split", "weights")}
        assert facts == {"data": "qm9", "split": "test", "weights": weights}
        assert report["molecules"] + report["skipped"] == count
        assert sum(report["skipped_reasons"].values()) == report["skipped"] < 0.01 * count
        assert list(report["properties"]) == list(DEFAULT_KEYS)
        for key, row in report["properties"].items():
            assert row["unit"] == TARGETS[key].evaluation_unit
            assert abs(row["bias"]) <= row["mae"] <= row["rmse"] <= row["max"]


def test_refinement_brings_force_field_geometries_closer_and_leaves_those_of_dft_alone():
    assert stored_report("dft")["rmsd"]["refined"] < 0.001
    mmff = stored_report("mmff")["rmsd"]
    assert mmff["refined"] < 0.6 * mmff["given"]
    assert stored_report("xtb")["rmsd"]["refined"] < stored_report("xtb")["rmsd"]["given"]


@pytest.mark.parametrize("key", DEFAULT_KEYS)
def test_no_property_is_much_worse_than_in_the_paper(key):
    assert stored_report()["properties"][key]["mae"] < (8 if key == "r2" else 2.5) * PAPER_MAE[key]


def test_evaluating_again_agrees_with_the_stored_evaluation():
    count = 500
    again = evaluate(limit=count, device="cpu").properties
    for key, row in stored_report()["properties"].items():
        deviation = (row["rmse"] ** 2 - row["mae"] ** 2) ** 0.5  # of the absolute errors
        assert abs(again[key].mae - row["mae"]) < 6 * deviation / count**0.5, key
        assert abs(again[key].bias - row["bias"]) < 6 * row["rmse"] / count**0.5, key


def test_the_weights_state_the_same_errors():
    stated = load_model(device="cpu").metadata["accuracy"]["dft"]
    for key, row in stored_report()["properties"].items():
        for name in ("mae", "coverage"):
            assert stated[name][key] == pytest.approx(row[name], rel=1e-3), key


@pytest.mark.parametrize("key", DEFAULT_KEYS)
def test_intervals_hold_what_they_promise(key):
    dft, mmff = (stored_report(geometry) for geometry in ("dft", "mmff"))
    assert 0.89 <= dft["mix"][key]["coverage"] <= 0.91
    for report in (dft, mmff):
        assert 0.87 <= report["properties"][key]["coverage"] <= 0.93
    assert dft["mix"][key]["sharpness"] < 0.6  # half of the error of all is the aim; zpve and cv fall short of it


def test_few_molecules_like_those_of_the_training_are_called_strange():
    assert all(stored_report(geometry)["outside"] <= 0.01 for geometry in ("dft", "mmff", "xtb"))


def test_both_pages_show_the_evaluation():
    for page, text in PAGES.items():
        kinds = [kind for kind, _, _ in regions(text)]
        assert kinds.count("accuracy") == kinds.count("geometries") == 1, page


@pytest.mark.parametrize("page", PAGES)
def test_no_page_states_an_energy_error_of_its_own(page):
    assert re.findall(r"[\d.]+ ?meV", without_regions(PAGES[page])) == []
