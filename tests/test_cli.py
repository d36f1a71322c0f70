import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest
from ase.io import iread
from fakes import SILANE_XYZ, WATER_XYZ, FakeModel
from pyarrow import parquet
from rdkit import Chem

import qmprop
from qmprop import __version__, console, inference, model
from qmprop.__main__ import run
from qmprop.config import TrainConfig
from qmprop.errors import DeviceError, WeightsError
from qmprop.records import RECORD_SCHEMA
from qmprop.targets import DEFAULT_KEYS, EA0_DEBYE
from qmprop.writers import FORMATS

EXAMPLES = Path(__file__).parent.parent / "examples"
WATER = str(EXAMPLES / "water.xyz")
FULL = "error: cannot write standard output: No space left on device. Name another place with -o FILE.\n"
#: Run the command line with a model that answers at once; "slow" makes every molecule take a while.
FAKE_COMMAND = """
import sys, time
sys.path.insert(0, {tests!r})
from fakes import FakeModel
import qmprop.model
class Slow(FakeModel):
    def run(self, *arrays):
        time.sleep({delay})
        return super().run(*arrays)
qmprop.model.load_model = lambda *args, **options: Slow()
from qmprop.__main__ import main
main()
"""


@pytest.fixture
def fake(monkeypatch):
    """The command line's model answers at once."""
    loaded = FakeModel()
    monkeypatch.setattr(model, "load_model", lambda name, *, device: loaded)
    return loaded


@pytest.fixture
def trained(monkeypatch):
    """Calls of `training.train`, which does nothing."""
    calls = []

    def train(config, **options):
        calls.append((config, options))
        return SimpleNamespace(folder=options["out_dir"], weights="weights.safetensors")

    fake = SimpleNamespace(train=train)
    monkeypatch.setitem(sys.modules, "qmprop.training", fake)
    monkeypatch.setattr(qmprop, "training", fake, raising=False)
    return calls


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a good, a bad and a mixed file."""
    monkeypatch.chdir(tmp_path)
    Path("water.xyz").write_text(WATER_XYZ)
    Path("silane.xyz").write_text(SILANE_XYZ)
    Path("mixed.xyz").write_text(WATER_XYZ + SILANE_XYZ + WATER_XYZ)
    return tmp_path


def start(arguments, *, delay=0.0, **options):
    command = FAKE_COMMAND.format(tests=str(Path(__file__).parent), delay=delay)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen([sys.executable, "-c", command, *arguments], text=True, **streams)


def test_version_and_help(capfd):
    assert run(["--version"]) == 0
    assert capfd.readouterr().out == f"qmprop {__version__}\n"
    for command in ("predict", "train", "eval", "info", "schema"):
        assert run([command, "--help"]) == 0
        assert "Usage: qmprop " + command in capfd.readouterr().out


def test_the_command_alone_shows_its_help(capfd):
    assert run([]) == 2
    captured = capfd.readouterr()
    assert "predict" in captured.out + captured.err
    assert "error" not in captured.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["predict"], "no input is named"),
        (["predict", "water.xyz", "-p", "mass"], "unknown property 'mass'"),
        (["predict", "water.xyz", "-p", ""], "no property"),
        (["predict", "water.xyz", "-u", "furlong"], "unknown unit preset 'furlong'"),
        (["predict", "water.xyz", "-u", "mu=eV"], "unknown unit 'eV'"),
        (["predict", "water.xyz", "-f", "xml"], "unknown format 'xml'"),
        (["predict", "water.xyz", "-i", "docx"], "unknown input format 'docx'"),
        (["predict", "water.xyz", "-o", "out.docx"], "cannot tell the format"),
        (["predict", "water.xyz", "-o", "water.xyz", "-f", "csv"], "output 'water.xyz' is one of the inputs"),
        (["predict", "water.xyz", "--batch-size", "0"], "--batch-size"),
        (["predict", "water.xyz", "--batch-size", "many"], "--batch-size"),
        (["predict", "water.xyz", "--interval", "1"], "the intervals cannot have the level '1'"),
        (["predict", "water.xyz", "--interval", ""], "the intervals cannot have the level ''"),
        (["predict", "water.xyz", "--interval", "narrow"], "0.95 or 95%, or none"),
        (["predict", "water.xyz", "--neighbors", "-1"], "--neighbors"),
        (["predict", "water.xyz", "--neighbors", "101"], "--neighbors"),
        (["predict", "water.xyz", "--neighbors", "3", "-f", "csv"], "format 'csv' holds no neighbors"),
        (["predict", "water.xyz", "--neighbors", "3", "-o", "out.sdf"], "use -f table, json or jsonl"),
        (["predict", "water.xyz", "--nonsense"], "--nonsense"),
        (["predikt"], "predikt"),
        (["eval", "--split", "all"], "--split"),
        (["eval", "--geometry", "uff"], "--geometry"),
        (["train", "--resume", "a", "--out", "b"], "exclude each other"),
        (["train", "--epochs", "0"], "epochs"),
        (["train", "--config", "nowhere.toml"], "nowhere.toml"),
        (["train", "--resume", "nowhere"], "nowhere"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(folder, capfd, arguments, said):
    assert run(arguments) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert said in captured.err
    assert sorted(os.listdir()) == ["mixed.xyz", "silane.xyz", "water.xyz"]


def test_the_table_shows_every_property_with_its_unit(folder, fake, capfd):
    assert run(["predict", "water.xyz"]) == 0
    captured = capfd.readouterr()
    assert [line.split()[0] for line in captured.out.splitlines()[3:15]] == list(DEFAULT_KEYS)
    assert "cal/(mol K)" in captured.out
    assert captured.err == ""


def test_a_record_for_every_input_and_status_3_if_one_failed(folder, fake, capfd):
    assert run(["predict", "mixed.xyz", "nowhere.xyz", "water.xyz", "-f", "jsonl"]) == 3
    captured = capfd.readouterr()
    records = [json.loads(line) for line in captured.out.splitlines()]
    for record in records:
        jsonschema.validate(record, RECORD_SCHEMA)
    assert [(record["source"], record["index"], record["status"]) for record in records] == [
        ("mixed.xyz", 0, "ok"),
        ("mixed.xyz", 1, "error"),
        ("mixed.xyz", 2, "ok"),
        ("nowhere.xyz", 0, "error"),
        ("water.xyz", 0, "ok"),
    ]
    errors = captured.err.splitlines()
    assert errors[0].startswith("error: mixed.xyz[1]: unsupported-element: ")
    assert errors[1].startswith("error: nowhere.xyz: missing-file: ")
    (summary,) = errors[2:]
    assert summary.startswith("note: 5 records: 3 ok, 2 failed (missing-file 1, unsupported-element 1) in ")
    assert summary.endswith(" molecules/s.")


def test_warnings_do_not_change_the_status(folder, fake, capfd):
    Path("radical.xyz").write_text("1\n\nH 0 0 0\n")
    assert run(["predict", "radical.xyz", "-f", "jsonl"]) == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out)["status"] == "warning"
    assert captured.err == "note: 1 record: 0 ok, 1 with warnings (odd-electrons 1).\n"


@pytest.mark.parametrize(("name", "said"), [("jsonl", "note: 2 records: 2 ok in "), ("table", "")])
def test_data_of_several_records_come_with_a_summary(folder, fake, capfd, name, said):
    assert run(["predict", "water.xyz", "water.xyz", "-f", name]) == 0
    errors = capfd.readouterr().err
    assert errors.startswith(said)
    assert bool(errors) == bool(said)


@pytest.mark.parametrize("inputs", [["water.xyz"], ["water.xyz", "mixed.xyz"], ["nowhere.xyz"]])
def test_json_is_one_array(folder, fake, capfd, inputs):
    run(["predict", *inputs, "-f", "json"])
    jsonschema.validate(json.loads(capfd.readouterr().out), {"type": "array", "items": RECORD_SCHEMA, "minItems": 1})


def read_values(name):
    """Return status and dipole moment of every record in a file that predict wrote, as its own readers have them."""
    if name.endswith("parquet"):
        return [(row["status"], row["mu [ea0]"]) for row in parquet.read_table(name).to_pylist()]
    if name.endswith("csv"):
        return [(row["status"], float(row["mu [ea0]"] or "nan")) for row in csv.DictReader(open(name, newline=""))]
    if name.endswith("sdf"):
        supplier = Chem.SDMolSupplier(name, removeHs=False)
        fields = [mol.GetPropsAsDict() for mol in supplier]
        return [(field["qmprop_status"], field.get("qmprop_mu")) for field in fields]
    if name.endswith("extxyz"):
        return [(atoms.info["status"], atoms.info.get("mu")) for atoms in iread(name, index=":")]
    text = Path(name).read_text()
    records = json.loads(text) if name.endswith("json") else [json.loads(line) for line in text.splitlines()]
    jsonschema.validate(records, {"type": "array", "items": RECORD_SCHEMA})
    return [(record["status"], record["properties"].get("mu", {}).get("value")) for record in records]


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "table"])
def test_every_format_holds_every_record_to_the_last_digit(folder, fake, capfdbinary, name):
    """As a file, and as a stream through standard output."""
    shutil.copy(EXAMPLES / "three_molecules.sdf", "three.sdf")
    arguments = ["predict", "mixed.xyz", "nowhere.xyz", "three.sdf", "-p", "mu", "-u", "mu=ea0"]
    assert run([*arguments, "-o", f"out.{name}"]) == 3
    found = read_values(f"out.{name}")
    assert [status for status, _ in found] == ["ok", "error", "ok", "error", "ok", "ok", "ok"]
    expected = [charge / EA0_DEBYE for charge in (10, 10, 24, 22, 24)]
    assert [value for status, value in found if status == "ok"] == expected
    capfdbinary.readouterr()
    assert run([*arguments, "-f", name]) == 3
    assert capfdbinary.readouterr().out == Path(f"out.{name}").read_bytes()


def test_parquet_is_kept_off_the_terminal(folder, fake, monkeypatch, capfd):
    monkeypatch.setattr(console, "writes_to_terminal", lambda: True)
    assert run(["predict", "water.xyz", "-f", "parquet"]) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "-o" in captured.err


def test_the_schema_is_printed_as_it_is(capfd):
    assert run(["schema"]) == 0
    assert json.loads(capfd.readouterr().out) == RECORD_SCHEMA


def test_properties_and_units_can_be_repeated(folder, fake, capfd):
    arguments = ["-p", "homo,mu", "-p", "u0_atom", "-u", "kcal", "-u", "homo=meV", "-f", "csv"]
    assert run(["predict", "water.xyz", *arguments]) == 0
    header, row = csv.reader(io.StringIO(capfd.readouterr().out))
    assert header[8:] == ["homo [meV]", "mu [D]", "u0_atom [kcal/mol]"]
    assert float(row[8]) == pytest.approx(12000.0)


def test_the_weights_device_and_batch_size_asked_for(folder, fake, monkeypatch, capfd):
    asked = []
    monkeypatch.setattr(model, "load_model", lambda name, *, device: asked.append((name, device)) or fake)
    assert (
        run(["predict", "mixed.xyz", "mixed.xyz", "-w", "my.safetensors", "--device", "cpu", "--batch-size", "2"]) == 3
    )
    assert asked == [("my.safetensors", "cpu")]
    assert fake.batches == [1, 2, 1]


def test_fail_fast_ends_with_the_record_that_failed(folder, fake, capfd):
    assert run(["predict", "mixed.xyz", "water.xyz", "--fail-fast", "-o", "out.jsonl"]) == 3
    statuses = [json.loads(line)["status"] for line in Path("out.jsonl").read_text().splitlines()]
    assert statuses == ["ok", "error"]
    assert "stopped at the first error" in capfd.readouterr().err


def test_the_input_format_can_be_given(folder, fake, capfd):
    Path("water.xyz").rename("water.data")
    assert run(["predict", "water.data", "-i", "xyz", "-f", "jsonl"]) == 0
    assert json.loads(capfd.readouterr().out)["formula"] == "H2O"


def test_an_output_file_appears_whole_and_stdout_stays_empty(folder, fake, capfd):
    Path("out.csv").write_text("old")
    assert run(["predict", "mixed.xyz", "-o", "out.csv"]) == 3
    assert len(Path("out.csv").read_text().splitlines()) == 4
    assert capfd.readouterr().out == ""
    assert sorted(os.listdir()) == ["mixed.xyz", "out.csv", "silane.xyz", "water.xyz"]


@pytest.mark.parametrize("inputs", [["."], ["*.xyz"], ["silane.xyz", "./mixed.xyz"]])
@pytest.mark.parametrize("name", ["mixed.xyz", "soft.csv", "hard.csv"])
def test_an_input_is_never_overwritten(folder, fake, capfd, inputs, name):
    os.symlink("mixed.xyz", "soft.csv")
    os.link("mixed.xyz", "hard.csv")
    before = sorted((path, Path(path).read_text()) for path in os.listdir())
    assert run(["predict", *inputs, "-o", name, "-f", "csv"]) == 2
    assert "is one of the inputs" in capfd.readouterr().err
    assert sorted((path, Path(path).read_text()) for path in os.listdir()) == before


@pytest.mark.parametrize("output", ["nowhere/out.csv", ".", "/dev/full"])
def test_an_output_that_cannot_be_written_is_one_line_and_status_1(folder, fake, capfd, output):
    assert run(["predict", "water.xyz", "-f", "csv", "-o", output]) == 1
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: cannot write '{output}': ")
    assert captured.err.count("\n") == 1


def test_dash_is_standard_output(folder, fake, capfd):
    assert run(["predict", "water.xyz", "-f", "jsonl", "-o", "-"]) == 0
    assert json.loads(capfd.readouterr().out)["formula"] == "H2O"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (WeightsError("no weights 'x'", "Try egnn-qm9."), "error: no weights 'x'. Try egnn-qm9.\n"),
        (DeviceError("no device 'cuda'"), "error: no device 'cuda'\n"),
        (OSError(5, "Input/output error", "w.bin"), "error: 'w.bin': Input/output error\n"),
        (MemoryError(), "error: out of memory. Try a smaller --batch-size.\n"),
        (KeyError("h"), "error: unexpected KeyError: 'h'. This is a bug in qmprop; QMPROP_DEBUG=1 shows where.\n"),
        (EOFError("x"), "error: unexpected EOFError: x. This is a bug in qmprop; QMPROP_DEBUG=1 shows where.\n"),
    ],
)
def test_a_command_that_cannot_do_its_job_says_why_in_one_line(folder, monkeypatch, capfd, error, said):
    def load(*args, **options):
        raise error

    monkeypatch.setattr(model, "load_model", load)
    Path("out.csv").write_text("old")
    assert run(["predict", "water.xyz", "-o", "out.csv"]) == 1
    assert capfd.readouterr().err.lstrip("\n") == said
    assert Path("out.csv").read_text() == "old"
    assert sorted(os.listdir()) == ["mixed.xyz", "out.csv", "silane.xyz", "water.xyz"]


def test_foreign_weights_are_refused(folder, capfd):
    assert run(["predict", "water.xyz", "-w", "mixed.xyz"]) == 1
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "mixed.xyz" in captured.err
    assert captured.err.count("\n") == 1


def test_an_interrupt_in_the_library_is_status_130(folder, fake, monkeypatch, capfd):
    def predict(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(inference, "predict_pairs", predict)
    assert run(["predict", "water.xyz"]) == 130
    assert capfd.readouterr() == ("", "")


def test_train_passes_its_options_on(folder, trained):
    Path("my.toml").write_text("epochs = 7\nseed = 3\n")
    arguments = ["--config", "my.toml", "--epochs", "2", "--limit", "100", "--lr", "1e-4", "--batch-size", "8"]
    assert run(["train", *arguments, "--data", "x.bin", "--out", "runs/a", "--device", "cpu"]) == 0
    ((config, options),) = trained
    assert config == TrainConfig(epochs=2, seed=3, limit=100, lr=1e-4, batch_size=8)
    assert (options["data"], str(options["out_dir"]), options["resume"]) == ("x.bin", "runs/a", False)


def test_train_without_options_is_the_shipped_job(folder, trained):
    assert run(["train"]) == 0
    ((config, options),) = trained
    assert config == TrainConfig()
    assert options["data"] == "qm9"
    assert Path(options["out_dir"]).parent == Path("runs")


def test_resume_takes_the_settings_of_the_run(folder, trained):
    Path("run").mkdir()
    Path("run/config.toml").write_text(TrainConfig(epochs=9, limit=50).to_toml())
    assert run(["train", "--resume", "run"]) == 0
    ((config, options),) = trained
    assert config == TrainConfig(epochs=9, limit=50)
    assert (str(options["out_dir"]), options["resume"]) == ("run", True)


class FakeReport:
    """What `evaluate` returns, as far as the command line looks at it."""

    def to_dict(self):
        row = {"mae": 0.05, "rmse": 0.08, "max": 1.2, "bias": 0.001, "coverage": None, "unit": "D"}
        return {
            "data": "qm9",
            "split": "test",
            "geometry": "dft",
            "molecules": 20,
            "weights": "fake@0",
            "properties": {"mu": row},
        }


def test_eval_shows_a_table_or_json(monkeypatch, capfd):
    calls = []
    fake = SimpleNamespace(evaluate=lambda **options: calls.append(options) or FakeReport(), PAPER_MAE={"mu": 0.029})
    monkeypatch.setitem(sys.modules, "qmprop.evaluation", fake)
    monkeypatch.setattr(qmprop, "evaluation", fake, raising=False)
    assert run(["eval", "--split", "valid", "--limit", "20", "-w", "my.safetensors"]) == 0
    assert capfd.readouterr().out.splitlines()[4].split() == [
        "mu",
        "D",
        "0.0500",
        "0.0800",
        "1.2000",
        "+0.0010",
        "0.029",
        "1.72",
    ]
    asked = {"split": "valid", "limit": 20, "weights": "my.safetensors", "geometry": "dft", "units": None}
    assert asked.items() <= calls[0].items()
    assert run(["eval", "--data", "my.extxyz", "-u", "kcal", "-u", "mu=ea0"]) == 0
    assert {"data": "my.extxyz", "units": "kcal,mu=ea0"}.items() <= calls[1].items()
    capfd.readouterr()
    assert run(["eval", "-f", "json"]) == 0
    assert json.loads(capfd.readouterr().out) == FakeReport().to_dict()


def test_info_tells_versions_devices_and_weights(fake, capfd):
    fake.metadata["split_hash"] = "0123abcd"
    assert run(["info"]) == 0
    out = capfd.readouterr().out
    for word in (f"qmprop           {__version__}", "torch_geometric", "rdkit", "cpu", "fake@00000000", "0123abcd"):
        assert word in out


def test_the_closed_pipe_is_quiet(folder):
    Path("many.xyz").write_text(WATER_XYZ * 3000)
    process = start(["predict", "many.xyz", "-f", "jsonl"])
    assert json.loads(process.stdout.readline())["index"] == 0
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(120) == 141
    process.stderr.close()


@pytest.mark.parametrize("name", ["table", "json"])
def test_a_full_disk_behind_stdout_is_one_line(name):
    with open("/dev/full", "w") as full:
        process = start(["predict", WATER, "-f", name], stdout=full)
        _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (1, FULL)


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_that_cannot_be_written_is_one_line(option):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "qmprop", option]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert result.returncode == 1
    assert "No space left on device" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_whole_lines_or_the_old_file(folder, number):
    Path("many.xyz").write_text(WATER_XYZ * 100)
    Path("out.csv").write_text("old")
    to_file = start(["predict", "many.xyz", "-o", "out.csv", "--batch-size", "1"], delay=0.2)
    to_stdout = start(["predict", "many.xyz", "-f", "jsonl", "--batch-size", "1"], delay=0.2)
    lines = [to_stdout.stdout.readline() for _ in range(2)]
    deadline = time.monotonic() + 120
    while not list(folder.glob(".out.csv.*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in (to_file, to_stdout):
        process.send_signal(number)
    rest, errors = to_stdout.communicate(timeout=120)
    assert (to_stdout.returncode, errors) == (130, "")
    assert rest == "" or rest.endswith("\n")
    assert len([json.loads(line) for line in lines + rest.splitlines()]) < 100
    assert to_file.communicate(timeout=120) == ("", "")
    assert to_file.returncode == 130
    assert Path("out.csv").read_text() == "old"
    assert not list(folder.glob(".out.csv.*"))


def test_standard_input_to_standard_output(folder):
    process = start(["predict", "-", "-f", "jsonl"], stdin=subprocess.PIPE)
    out, errors = process.communicate(WATER_XYZ + WATER_XYZ, timeout=120)
    assert process.returncode == 0
    assert errors.startswith("note: 2 records: 2 ok in ")
    assert [(record["source"], record["index"]) for record in map(json.loads, out.splitlines())] == [("-", 0), ("-", 1)]


def test_the_module_runs_as_the_command_does():
    command = [sys.executable, "-m", "qmprop", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout == f"qmprop {__version__}\n"


def test_the_examples_are_predicted_with_the_bundled_weights(capfd):
    examples = sorted(str(path) for path in EXAMPLES.iterdir() if path.suffix in (".xyz", ".sdf", ".pdb"))
    assert run(["predict", *examples, "-f", "jsonl"]) == 0
    records = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert {record["source"] for record in records} == set(examples)
    for record in records:
        jsonschema.validate(record, RECORD_SCHEMA)
        codes = [message["code"] for message in record["messages"]]
        assert codes == [] or (codes == ["far-from-training"] and record["natoms"] < 5)
        values = {key: value["value"] for key, value in record["properties"].items()}
        assert values["u0"] < values["u"] < values["h"]
        assert values["g"] < values["h"]
        assert min(values[key] for key in ("mu", "alpha", "gap", "r2", "zpve", "cv")) >= 0.0
