"""`predict --interval` and `--neighbors`, from the command line to every format."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
from ase.io import iread
from fakes import WATER_XYZ
from pyarrow import parquet
from rdkit import Chem

from qmprop import inference, model
from qmprop.__main__ import run
from qmprop.molecule import Molecule
from qmprop.records import RECORD_SCHEMA, Domain, Message, Neighbor, Record, Value

FAR = Message("far-from-training", "The training molecules are unlike it.")
#: What a flat row holds besides the values, with intervals.
TRUST = {"domain": "out", "domain_score": 1.5, "seen": "gdb_3 gdb_7", "interval_level": 0.95}


def answer(
    items: Iterable[Molecule], *, units: dict[str, str], interval: float | None, neighbors: int, **rest: Any
) -> Iterator[tuple[Molecule, Record]]:
    """Answer 1 ± level with as many neighbors as asked for; the second of three records fails."""
    for item in items:
        known = {"source": item.source, "index": item.index, "formula": "H2O", "natoms": 3, "model": "m@1"}
        if item.index == 1:
            yield item, Record(**known, status="error", messages=(Message("periodic", "It is."),))
            continue
        bounds = None if interval is None else (1.0 - interval, 1.0 + interval)
        near = tuple(Neighbor(f"gdb_{k}", "O", 0.1, {"mu": Value(1.8, "D")}) for k in range(neighbors))
        yield (
            item,
            Record(
                **known,
                status="warning",
                messages=(FAR,),
                domain=Domain("out", 1.5, ("far-from-training",)),
                seen=("gdb_3", "gdb_7"),
                interval_level=interval,
                neighbors=near,
                properties={key: Value(1.0, unit, bounds) for key, unit in units.items()},
            ),
        )


@pytest.fixture
def calibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A working folder with three records, and weights that know how far to trust themselves."""
    monkeypatch.chdir(tmp_path)
    Path("in.xyz").write_text(WATER_XYZ * 3)
    loaded = SimpleNamespace(id="m@1", metadata={}, extras={"threshold": [1.0]}, device="cpu")
    monkeypatch.setattr(model, "load_model", lambda *args, **options: loaded)
    monkeypatch.setattr(inference, "predict_pairs", answer)
    return loaded


def predict(output: str, *options: str) -> int:
    return run(["predict", "in.xyz", "-p", "mu", "-o", output, *options])


@pytest.mark.parametrize(
    ("option", "level"), [((), 0.9), (("--interval", "95%"), 0.95), (("--interval", "none"), None)]
)
def test_the_level_asked_for_is_that_of_the_records(calibrated: SimpleNamespace, option: Any, level: Any) -> None:
    assert predict("out.jsonl", *option) == 3
    first, failed, last = (json.loads(line) for line in Path("out.jsonl").read_text().splitlines())
    assert first["interval_level"] == last["interval_level"] == level
    assert failed["interval_level"] is None
    assert first["properties"]["mu"]["interval"] == (None if level is None else [1.0 - level, 1.0 + level])
    assert first["domain"] == {"verdict": "out", "score": 1.5, "reasons": ["far-from-training"]}
    jsonschema.validate(first, RECORD_SCHEMA)
    jsonschema.validate(failed, RECORD_SCHEMA)


def test_flat_formats_hold_intervals_verdict_and_seen_molecules(calibrated: SimpleNamespace) -> None:
    for name in ("csv", "parquet", "extxyz", "sdf"):
        assert predict(f"out.{name}", "--interval", "0.95") == 3
    with open("out.csv", newline="") as file:
        row = next(csv.DictReader(file))
    bounds = {"mu low [D]": 1.0 - 0.95, "mu high [D]": 1.95}
    assert {name: row[name] for name in TRUST | bounds} == {
        name: str(value) for name, value in (TRUST | bounds).items()
    }
    assert (TRUST | bounds).items() <= parquet.read_table("out.parquet").to_pylist()[0].items()
    entries = TRUST | {"mu": 1.0, "mu_low": 1.0 - 0.95, "mu_high": 1.95}
    first, failed, _ = iread("out.extxyz", index=":")
    assert entries.items() <= first.info.items()
    assert not failed.info.keys() & entries.keys()
    fields = next(iter(Chem.SDMolSupplier("out.sdf", sanitize=False))).GetPropsAsDict()
    assert {f"qmprop_{key}": value for key, value in entries.items()}.items() <= fields.items()


def test_without_intervals_the_verdict_stays(calibrated: SimpleNamespace) -> None:
    assert predict("out.csv", "--interval", "none") == 3
    header = Path("out.csv").read_text().splitlines()[0]
    assert header.endswith("model,domain,domain_score,seen,mu [D]")


def test_neighbors_are_shown_in_tables_and_json(calibrated: SimpleNamespace, capfd: pytest.CaptureFixture[str]) -> None:
    assert predict("out.json", "--neighbors", "2") == 3
    first, failed, _ = json.loads(Path("out.json").read_text())
    assert [neighbor["id"] for neighbor in first["neighbors"]] == ["gdb_0", "gdb_1"]
    assert failed["neighbors"] == []
    assert run(["predict", "in.xyz", "-p", "mu", "--neighbors", "2"]) == 3
    shown = capfd.readouterr().out
    assert shown.count(" nearest training molecules") == 2
    assert shown.count(" gdb_1 ") == 2


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ((), ("--interval", "0.95"), "was written with 90 % intervals, not 95 % intervals"),
        (("--interval", "none"), (), "was written with no intervals, not 90 % intervals"),
        ((), ("--neighbors", "2"), "was written with --neighbors 0, not 2"),
    ],
)
def test_other_intervals_and_neighbors_are_not_resumed(
    calibrated: SimpleNamespace, capfd: pytest.CaptureFixture[str], before: Any, now: Any, said: str
) -> None:
    predict("out.jsonl", *before)
    Path("out.jsonl").rename("out.jsonl.partial")
    capfd.readouterr()
    assert predict("out.jsonl", "--resume", *now) == 2
    assert said in capfd.readouterr().err
    assert predict("out.jsonl", "--resume", *before) == 3
    assert "continuing after 3 records" in capfd.readouterr().err


def test_weights_without_a_calibration_give_no_intervals(
    calibrated: SimpleNamespace, capfd: pytest.CaptureFixture[str]
) -> None:
    calibrated.extras = {}
    assert predict("out.csv") == 3
    assert Path("out.csv").read_text().splitlines()[0].endswith("model,mu [D]")
    assert predict("out.csv", "--interval", "none") == 3
    capfd.readouterr()
    assert predict("out.csv", "--interval", "0.9") == 2
    assert "the weights m@1 have no calibration for intervals. Leave --interval out." in capfd.readouterr().err
