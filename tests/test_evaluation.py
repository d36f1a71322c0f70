"""What `eval` tells: errors, the worth of intervals and verdicts, and how far predictions move with the geometry."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import ArrayLike
from samples import QM9_20, make_model, read_dataset

from qmprop import console, evaluation
from qmprop.__main__ import run
from qmprop.calibration import fit_trust
from qmprop.datasets import Dataset
from qmprop.evaluation import PAPER_MAE, Details, Report, compare_geometries, measure, summarize, summarize_mix
from qmprop.geometries import Geometries
from qmprop.model import Model, load_model, save_model
from qmprop.qm9 import split_other
from qmprop.tables import Style, draw
from qmprop.targets import DEFAULT_KEYS, TARGETS

COUNT = 2000
#: Two molecules with narrow intervals and small errors; nine whose interval is too narrow, nine whose is wide enough.
ERRORS = np.array([0.1, -0.1] + [1.0, -1.0] * 9)
WIDTHS = np.array([0.2] * 2 + [0.5] * 9 + [2.0] * 9)


def make_details(errors: ArrayLike, half_widths: ArrayLike | None = None, names: list[str] | None = None) -> Details:
    """Return predictions that are off by the same number of default units in all properties."""
    column = np.asarray(errors, dtype=float)[:, None]
    references = np.tile(np.arange(12.0), (len(column), 1))
    widths = None if half_widths is None else np.tile(np.asarray(half_widths, dtype=float)[:, None], 12)
    return Details(
        names=names or [f"gdb_{k}" for k in range(len(column))],
        counts=np.ones((len(column), 5), dtype=np.int64),
        predictions=references + column,
        references=references,
        half_widths=widths,
        scores=None if widths is None else np.full(len(column), 0.5),
        outside=None if widths is None else np.zeros(len(column), dtype=bool),
        smiles=[None] * len(column),
    )


def make_report(details: Details, *, geometry: str = "dft", data: str = "qm9") -> Report:
    return Report(
        data=data,
        split="test" if data == "qm9" else "all",
        geometry=geometry,
        molecules=len(details.names),
        weights="egnn-qm9@1f3a5c7e",
        properties=summarize(details),
        rmsd={"given": 0.1234, "refined": 0.0567} if data == "qm9" else None,
        outside=None if details.outside is None else float(details.outside.mean()),
        details=details,
    )


@pytest.mark.parametrize(("key", "factor"), [("mu", 1.0), ("homo", 1000.0), ("u0", 1000.0), ("cv", 1.0)])
def test_errors_and_intervals_by_hand(key: str, factor: float) -> None:
    """In evaluation units: energies, which come in eV, are told in meV."""
    found = summarize(make_details(ERRORS, WIDTHS))[key]
    mae = (2 * 0.1 + 18 * 1.0) / 20
    assert found.unit == TARGETS[key].evaluation_unit
    assert found.mae == pytest.approx(factor * mae)
    assert found.rmse == pytest.approx(factor * ((2 * 0.01 + 18) / 20) ** 0.5)
    assert found.max == pytest.approx(factor)
    assert found.bias == pytest.approx(0.0, abs=1e-9)
    assert found.coverage == pytest.approx(11 / 20)
    assert found.half_width == pytest.approx(factor * (2 * 0.2 + 9 * 0.5 + 9 * 2.0) / 20)
    assert found.sharpness == pytest.approx(0.1 / mae)
    assert found.shift is None


@pytest.mark.parametrize(("count", "narrowest"), [(1, 1), (10, 1), (11, 2), (20, 2)])
def test_sharpness_looks_at_a_tenth_rounded_up(count: int, narrowest: int) -> None:
    errors, widths = np.arange(1.0, count + 1), np.arange(count, 0.0, -1.0)
    found = summarize(make_details(errors, widths))["mu"]
    assert found.sharpness == pytest.approx(errors[-narrowest:].mean() / errors.mean())


def test_a_reference_at_the_end_of_its_interval_is_inside() -> None:
    """Errors and widths that are powers of two, so that no rounding decides."""
    assert summarize(make_details([0.5, -0.5, 0.625], [0.5, 0.5, 0.5]))["mu"].coverage == pytest.approx(2 / 3)


def test_only_known_references_count() -> None:
    details = make_details(ERRORS, WIDTHS)
    column = DEFAULT_KEYS.index("gap")
    details.references[2:, column] = np.nan
    details.references[:, DEFAULT_KEYS.index("r2")] = np.nan
    found = summarize(details)
    assert set(found) == set(DEFAULT_KEYS) - {"r2"}
    assert found["gap"].coverage == 1.0
    assert found["gap"].half_width == pytest.approx(200.0)
    assert found["gap"].mae == pytest.approx(100.0)


def test_without_calibration_nothing_is_said_of_intervals() -> None:
    for errors in summarize(make_details(ERRORS)).values():
        assert (errors.coverage, errors.half_width, errors.sharpness) == (None, None, None)


def test_perfect_predictions_have_no_sharpness() -> None:
    found = summarize(make_details(np.zeros(5), np.ones(5)))["mu"]
    assert (found.mae, found.coverage, found.sharpness) == (0.0, 1.0, None)


def test_shift_is_between_predictions_for_the_same_molecule() -> None:
    """Whatever their order, and without those that have no such geometry; the reference plays no part in it."""
    dft = make_details([0.0, 1.0, 2.0], names=["gdb_1", "gdb_2", "gdb_3"])
    mmff = make_details([2.5, -1.0], names=["gdb_3", "gdb_1"])
    mmff.references[:] += 100.0
    first, second = compare_geometries([make_report(dft), make_report(mmff, geometry="mmff")])
    assert {errors.shift for errors in first.properties.values()} == {0.0}
    assert second.properties["mu"].shift == pytest.approx((0.5 + 1.0) / 2)
    assert second.properties["gap"].shift == pytest.approx(1000.0 * (0.5 + 1.0) / 2)
    assert second.properties["mu"].mae == make_report(mmff).properties["mu"].mae


def test_shift_from_the_geometries_of_a_file() -> None:
    given, mmff = make_details([0.0, 1.0], names=["0", "1"]), make_details([1.5], names=["1"])
    reports = [
        make_report(details, geometry=geometry, data="my.extxyz")
        for details, geometry in ((given, "file"), (mmff, "mmff"))
    ]
    assert compare_geometries(reports)[1].properties["mu"].shift == pytest.approx(0.5)


def test_a_mix_counts_every_molecule_once() -> None:
    reports = [make_report(make_details(errors, widths)) for errors, widths in (([1.0] * 3, [2.0] * 3), ([3.0], [2.0]))]
    mix = summarize_mix(reports)["mu"]
    assert mix.mae == pytest.approx(1.5)
    assert mix.coverage == pytest.approx(0.75)
    assert mix.half_width == pytest.approx(2.0)
    bare = make_report(make_details([3.0]))
    assert summarize_mix([reports[0], bare])["mu"].coverage is None
    assert summarize_mix([reports[0], bare])["mu"].mae == pytest.approx(1.5)


def make_reports(*, calibrated: bool, data: str = "qm9") -> list[dict[str, Any]]:
    """Return reports of three kinds of geometry, the numbers of each larger than those before."""
    kinds = ("dft" if data == "qm9" else "file", "mmff", "xtb")
    reports = [
        make_report(make_details(scale * ERRORS, scale * WIDTHS if calibrated else None), geometry=geometry, data=data)
        for geometry, scale in zip(kinds, (1.0, 1.37, 13.3), strict=True)
    ]
    return [report.to_dict() for report in compare_geometries(reports)]


anyway = pytest.mark.parametrize("calibrated", [True, False])
widths = pytest.mark.parametrize("width", [60, 80, 120])


def draw_lines(parts: list[Any], style: Style) -> list[str]:
    """Return the lines, none of which may be too long or have been cut."""
    text = draw(parts, style)
    assert max(map(len, text.splitlines())) <= style.width
    assert "…" not in text
    return text.splitlines()


@anyway
@widths
@pytest.mark.parametrize("data", ["qm9", "my.extxyz"])
def test_the_tables_of_one_geometry_fit(width: int, calibrated: bool, data: str) -> None:
    for report in make_reports(calibrated=calibrated, data=data):
        report |= {"skipped": 12, "molecules": 13071}
        lines = draw_lines(console.report_parts(report, PAPER_MAE, Style(width)), Style(width))
        words = " ".join(lines).split()
        assert words.count("gap") == (2 if calibrated else 1)
        assert ("intervals" in words) == calibrated
        if calibrated:
            row = next(line for line in lines[20:] if line.startswith(" gap "))
            assert row.split()[-3:] == ["55.0", "%", "0.11"]
        assert "egnn-qm9@1f3a5c7e" in lines[-1]


@anyway
@widths
@pytest.mark.parametrize("data", ["qm9", "my.extxyz"])
def test_the_tables_of_several_geometries_fit(width: int, calibrated: bool, data: str) -> None:
    reports = make_reports(calibrated=calibrated, data=data)
    lines = draw_lines(console.comparison_parts(reports, PAPER_MAE, Style(width)), Style(width))
    rows = [line.split() for line in lines if line.startswith(" gap ")]
    assert len(rows) == (3 if calibrated else 2), "errors, shifts, and what is in the intervals"
    assert rows[0][:5] == ["gap", "meV", "910", "1247", "12103"]
    assert rows[1] == ["gap", "meV", "337", "11193"]
    if calibrated:
        assert rows[2][:7] == ["gap", "55.0", "%", "55.0", "%", "55.0", "%"]
        assert any(line.split()[:3] == ["out", "of", "domain"] for line in lines)
    text = " ".join(" ".join(lines).split())
    assert f"predictions for {'DFT' if data == 'qm9' else 'given'} geometries" in text


def test_a_table_with_perfect_predictions_and_missing_labels() -> None:
    details = make_details(np.zeros(3), np.ones(3))
    fewer = dataclasses.replace(details, references=details.references.copy())
    fewer.references[:, 0] = np.nan
    pair = compare_geometries([make_report(details), make_report(fewer, geometry="mmff")])
    reports = [report.to_dict() for report in pair]
    lines = draw_lines(console.comparison_parts(reports, PAPER_MAE, Style()), Style())
    assert not [line for line in lines if line.startswith(" mu ")], "a property that only one of them has"
    assert len([line for line in lines if line.startswith(" gap ")]) == 3
    draw_lines(console.report_parts(reports[0], PAPER_MAE, Style()), Style())


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, never trained, with a calibration on distorted copies of the twenty molecules."""
    rng = np.random.default_rng(0)
    data = read_dataset().select(np.arange(COUNT) % 20)
    noise = 0.03 * rng.standard_normal(data.positions.shape).astype(np.float32)
    data = dataclasses.replace(data, ids=np.arange(COUNT), positions=data.positions + noise)
    model = make_model()
    trust, _ = fit_trust(model, data, split_other(COUNT))
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_model(path, model.replace(extras=trust.to_arrays()))
    return path


def find_minima(kind: str, dataset: Dataset, **options: object) -> Geometries:
    """Stand in for the search for minima: atoms move a little; the second molecule has no minimum."""
    noise = np.random.default_rng(len(kind)).standard_normal(dataset.positions.shape)
    found = np.arange(len(dataset)) != 1
    positions = (dataset.positions + 0.02 * noise).astype(np.float32)
    return Geometries(kind, positions, found, {int(dataset.ids[1]): "it broke"})


@pytest.mark.parametrize("trusting", [True, False])
def test_eval_of_all_geometries_is_a_list_of_three(
    calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], trusting: bool
) -> None:
    monkeypatch.setattr(evaluation, "minimize_dataset", find_minima)
    if not trusting:
        model = load_model(calibrated, device="cpu")
        calibrated = tmp_path / "bare.safetensors"
        save_model(calibrated, model.replace(metadata={}, extras={}))
    command = ["eval", "--data", str(QM9_20), "-w", str(calibrated), "--geometry", "all", "--device", "cpu"]
    assert run([*command, "-f", "json"]) == 0
    out, err = capfd.readouterr()
    assert "1 molecules without a geometry of MMFF94 are left out: it broke 1" in err
    reports = json.loads(out)
    assert [report["geometry"] for report in reports] == ["file", "mmff", "xtb"]
    for report, molecules in zip(reports, (20, 19, 19), strict=True):
        known = {"data": str(QM9_20), "split": "all", "molecules": molecules, "skipped": 20 - molecules, "rmsd": None}
        assert known.items() <= report.items()
        assert report["skipped_reasons"] == ({} if molecules == 20 else {"it broke": 1})
        assert (report["outside"] is None) == (not trusting)
        assert list(report["properties"]) == list(DEFAULT_KEYS)
        for row in report["properties"].values():
            assert row.keys() >= {"mae", "rmse", "max", "bias", "unit", "coverage", "half_width", "sharpness", "shift"}
            assert (row["coverage"] is None) == (row["half_width"] is None) == (not trusting)
            assert (row["shift"] > 0.0) == (report["geometry"] != "file")
    assert run(command) == 0
    shown = capfd.readouterr().out
    assert shown.startswith(f" {QM9_20}")
    assert ("inside the 90 % intervals" in shown) == trusting
    assert run([*command, "--geometry", "mmff", "-f", "json"]) == 0
    alone = json.loads(capfd.readouterr().out)
    assert alone["geometry"] == "mmff"
    assert {row["shift"] for row in alone["properties"].values()} == {None}


def test_measuring_a_model_without_calibration_is_one_pass_of_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training does so every epoch: nothing is asked of a calibration, and every molecule is run once."""
    seen: list[int] = []
    plain = Model.run

    def count(self: Model, numbers: Any, positions: Any, offsets: Any) -> Any:
        seen.append(len(offsets) - 1)
        return plain(self, numbers, positions, offsets)

    monkeypatch.setattr(Model, "run", count)
    monkeypatch.setattr("qmprop.trust.find_bonds", None)
    found = measure(make_model(), read_dataset())
    assert sum(seen) == 20
    assert {errors.coverage for errors in found.values()} == {None}
