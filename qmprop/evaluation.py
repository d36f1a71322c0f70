"""Errors against reference values, on molecules the network was not trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qmprop.datasets import Dataset
from qmprop.errors import DataError, UsageError
from qmprop.geometries import XTB_SIZE, Geometries, load_geometries, minimize_dataset, rmsd
from qmprop.model import Model, load_model
from qmprop.qm9 import is_whole_qm9, load_data, read_smiles, split_data
from qmprop.records import Domain
from qmprop.targets import DEFAULT_KEYS, TARGETS, unit_factor
from qmprop.trust import load_trust

#: Test MAE of the EGNN paper (Satorras et al. 2021, table 3; one network per property), in evaluation units.
PAPER_MAE: Final[Mapping[str, float]] = {
    "mu": 0.029,
    "alpha": 0.071,
    "homo": 29.0,
    "lumo": 25.0,
    "gap": 48.0,
    "r2": 0.106,
    "zpve": 1.55,
    "u0": 11.0,
    "u": 12.0,
    "h": 12.0,
    "g": 12.0,
    "cv": 0.031,
}
SPLITS: Final = ("train", "valid", "test")
GEOMETRIES: Final = ("dft", "mmff", "xtb")


@dataclass(frozen=True, slots=True)
class Errors:
    """Prediction minus reference over M molecules, in `unit`.

    Attributes:
        mae: Mean absolute error.
        rmse: Root of the mean squared error.
        max: Largest absolute error.
        bias: Mean error.
        coverage: Share of references inside the 90 % interval; None without calibration.
        half_width: Mean half-width of those intervals; None without calibration.
        sharpness: Mean absolute error of the tenth of the molecules with the narrowest intervals, over that of all;
            None without calibration.
        shift: Mean absolute difference from the predictions for the DFT geometries, or those of the file, of the same
            molecules; None where `compare_geometries` has not filled it in.
        unit: D, a0^3, meV (all energies), a0^2 or cal/(mol K).
    """

    mae: float
    rmse: float
    max: float
    bias: float
    coverage: float | None
    unit: str
    half_width: float | None = None
    sharpness: float | None = None
    shift: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Details:
    """Predictions beside reference values, of M molecules one by one.

    Attributes:
        names: "gdb_123" in QM9, else the number in the file.
        counts: Atoms of H, C, N, O, F [M, 5].
        predictions: In default units, in the order of `DEFAULT_KEYS` [M, 12].
        references: The same of the reference values, NaN where there is none [M, 12].
        half_widths: Of the 90 % intervals [M, 12]; None without calibration.
        scores: Of the verdicts on the domain [M]; None without calibration.
        outside: Which verdicts are "out" [M]; None without calibration.
        smiles: None where it is not known, or was not asked for.
        levels: Level from which on the interval holds the reference, see `Trust.find_levels` [M, 12]; None without
            calibration.
    """

    names: list[str]
    counts: NDArray[np.int64]
    predictions: NDArray[np.float64]
    references: NDArray[np.float64]
    half_widths: NDArray[np.float64] | None
    scores: NDArray[np.float64] | None
    outside: NDArray[np.bool_] | None
    smiles: list[str | None]
    levels: NDArray[np.float64] | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What `evaluate` found.

    Attributes:
        data: "qm9" or the path of the file.
        split: "train", "valid" or "test"; "all" for a file that the weights were not trained on.
        geometry: Where the geometries come from: "dft", or "file" for a file as it is; "mmff", "xtb".
        molecules: How many were predicted.
        weights: Name and hash of the weights.
        properties: Property key to errors, for the properties that have reference values.
        rmsd: Median RMSD from the DFT geometry in Å of the geometries "given" and as "refined" by the network; None for
            a file, whose DFT geometries are not known.
        skipped_reasons: Why molecules have no such geometry and were left out, and how many for each reason.
        outside: Share of the molecules that the network does not know; None without calibration.
        mix: Property key to errors over the DFT and the MMFF94 geometries taken together; None where
            `compare_geometries` has not filled it in, as it does in the report of DFT's.
        details: The molecules one by one; not part of `to_dict`.
    """

    data: str
    split: str
    geometry: str
    molecules: int
    weights: str
    properties: Mapping[str, Errors]
    rmsd: Mapping[str, float] | None = None
    skipped_reasons: Mapping[str, int] = field(default_factory=dict)
    outside: float | None = None
    mix: Mapping[str, Errors] | None = None
    details: Details | None = field(default=None, compare=False, repr=False)

    @property
    def skipped(self) -> int:
        """How many molecules were left out because they have no such geometry."""
        return sum(self.skipped_reasons.values())

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return {
            "data": self.data,
            "split": self.split,
            "geometry": self.geometry,
            "molecules": self.molecules,
            "skipped": self.skipped,
            "skipped_reasons": dict(self.skipped_reasons),
            "rmsd": None if self.rmsd is None else dict(self.rmsd),
            "weights": self.weights,
            "outside": self.outside,
            "properties": {key: asdict(errors) for key, errors in self.properties.items()},
            "mix": None if self.mix is None else {key: asdict(errors) for key, errors in self.mix.items()},
        }


def evaluate(
    *,
    weights: str | Path | Model = "egnn-qm9",
    data: str | Path | Dataset = "qm9",
    split: str = "test",
    geometry: str = "dft",
    device: str = "auto",
    limit: int | None = None,
    units: str | None = None,
    smiles: bool = False,
    on_load: Callable[[int, int], None] | None = None,
    on_minimize: Callable[[int, int], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Measure the errors of a network.

    Args:
        weights: Bundled weights by name, a weights file, or a loaded model.
        data: "qm9", its compact cache file, a labeled extxyz file, or molecules. A file is evaluated whole, unless the
            weights were trained on it: then only its `split`.
        split: "train", "valid" or "test".
        geometry: "dft" for the geometries as they are; "mmff" or "xtb" for the MMFF94 or GFN2-xTB minima reached from
            them, of QM9 kept in a cache file. "xtb" takes the first 1,000 molecules of a split of QM9. Molecules
            without such a minimum are left out.
        device: "auto", "cpu", "cuda", ...
        limit: The first so many molecules only.
        units: Units of a labeled file's entries, as for `predict`.
        smiles: Whether the details are to have the SMILES of QM9's molecules.
        on_load: Called while QM9 is parsed with the molecules done and to do.
        on_minimize: Called while minima are computed with the molecules done and to do.
        on_progress: Called with the molecules done and to do.

    Raises:
        UsageError: An argument has a value that is not allowed.
        DataError: The data cannot be read, or what computes the geometries is not installed.
        WeightsError: The weights cannot be used.
        DeviceError: The device does not exist here.
    """
    _check(split, SPLITS, "split")
    _check(geometry, GEOMETRIES, "geometry")
    if limit is not None and limit < 1:
        raise UsageError(f"limit {limit} is not allowed", "It must be 1 or more.")
    model = weights if isinstance(weights, Model) else load_model(weights, device=device)
    molecules = data if isinstance(data, Dataset) else load_data(data, units=units, progress=on_load)
    is_qm9 = molecules.name == "qm9"
    known = is_qm9 or model.metadata.get("data_sha256") == molecules.sha256
    rows = (split_data(molecules)[split] if known else np.arange(len(molecules)))[:limit]
    if len(rows) == 0:
        raise DataError(f"{molecules.name} has no {split} molecules", "Use a larger file or another --split.")
    skipped: Mapping[str, int] = {}
    if geometry == "dft":
        chosen = molecules.select(rows)
    else:
        chosen, rows, skipped = _move(molecules, rows, geometry, on_minimize)
    predicted = _predict(model, chosen, on_progress)
    details = _detail(predicted, chosen, smiles=smiles)
    return Report(
        data=molecules.name,
        split=split if known else "all",
        geometry=geometry if is_qm9 or geometry != "dft" else "file",
        molecules=len(chosen),
        weights=model.id,
        properties=summarize(details),
        rmsd=_compare(predicted.refined, chosen, molecules.select(rows)) if is_qm9 else None,
        skipped_reasons=skipped,
        outside=None if details.outside is None else float(details.outside.mean()),
        details=details,
    )


def _move(
    molecules: Dataset, rows: NDArray[np.int64], kind: str, on_minimize: Callable[[int, int], None] | None
) -> tuple[Dataset, NDArray[np.int64], dict[str, int]]:
    """Return the molecules at `rows` that have a minimum, at it; their rows; and why the others have none."""
    geometries: Geometries
    if is_whole_qm9(molecules):
        rows = rows[:XTB_SIZE] if kind == "xtb" else rows
        geometries = load_geometries(kind, molecules, rows=rows, progress=on_minimize)
    else:
        molecules = molecules.select(rows)
        rows = np.arange(len(rows))
        geometries = minimize_dataset(kind, molecules, progress=on_minimize)
    reasons = Counter(geometries.failures[int(number)] for number in molecules.ids[rows[~geometries.found[rows]]])
    if not geometries.found[rows].any():
        raise DataError(f"no molecule of {molecules.name} has a minimum: {reasons.most_common(1)[0][0]}")
    return geometries.move(molecules, rows), rows[geometries.found[rows]], dict(reasons.most_common())


def _compare(refined: NDArray[np.float64], given: Dataset, dft: Dataset) -> dict[str, float]:
    """Return the median RMSD in Å of the given and of the refined geometries from those of DFT."""
    pairs: dict[str, NDArray[Any]] = {"given": given.positions, "refined": refined}
    return {name: float(np.median(rmsd(moved, dft.positions, dft.offsets))) for name, moved in pairs.items()}


@dataclass(frozen=True, slots=True, eq=False)
class _Predicted:
    """What a model says of M molecules of N atoms: arrays as in `model.Outcome`, and trust if it is calibrated."""

    values: NDArray[np.float64]
    counts: NDArray[np.int64]
    refined: NDArray[np.float64]
    half_widths: NDArray[np.float64] | None
    scores: NDArray[np.float64] | None
    outside: NDArray[np.bool_] | None
    levels: NDArray[np.float64] | None


def _predict(model: Model, molecules: Dataset, on_progress: Callable[[int, int], None] | None) -> _Predicted:
    trust = load_trust(model)
    outcomes, widths, levels = [], [], []
    domains: list[Domain] = []
    done = 0
    for outcome in model.run_arrays(molecules.numbers, molecules.positions, molecules.offsets):
        last = done + len(outcome.values)
        if trust is not None:
            judged = trust.judge([molecules.molecule(k) for k in range(done, last)], outcome.traits)
            verdicts = [judgment.domain for judgment in judged]
            widths.append(trust.half_widths(outcome.traits, verdicts))
            levels.append(trust.find_levels(outcome.traits, outcome.values - molecules.targets[done:last], verdicts))
            domains += verdicts
        outcomes.append(outcome)
        done = last
        if on_progress is not None:
            on_progress(done, len(molecules))
    return _Predicted(
        np.concatenate([outcome.values for outcome in outcomes]),
        np.concatenate([outcome.composition.counts[:, :-1] for outcome in outcomes]).astype(np.int64),
        np.concatenate([outcome.refined for outcome in outcomes]),
        np.concatenate(widths) if widths else None,
        np.array([domain.score for domain in domains]) if trust is not None else None,
        np.array([domain.verdict == "out" for domain in domains]) if trust is not None else None,
        np.concatenate(levels) if levels else None,
    )


def _detail(predicted: _Predicted, molecules: Dataset, *, smiles: bool = False) -> Details:
    is_qm9, ids = molecules.name == "qm9", molecules.ids.tolist()
    known = read_smiles(ids) if is_qm9 and smiles else {}
    return Details(
        names=[f"gdb_{number}" if is_qm9 else str(number) for number in ids],
        counts=predicted.counts,
        predictions=predicted.values,
        references=molecules.targets,
        half_widths=predicted.half_widths,
        scores=predicted.scores,
        outside=predicted.outside,
        smiles=[known.get(number) for number in ids],
        levels=predicted.levels,
    )


def summarize(details: Details) -> dict[str, Errors]:
    """Return errors by key, for the properties that have a reference value."""
    properties = {}
    for column, key in enumerate(DEFAULT_KEYS):
        known = np.isfinite(details.references[:, column])
        if not known.any():
            continue
        unit = TARGETS[key].evaluation_unit
        factor = unit_factor(key, unit)
        errors = (details.predictions - details.references)[known, column] / factor
        trust = {}
        if details.half_widths is not None:
            trust = _summarize_trust(np.abs(errors), details.half_widths[known, column] / factor)
        properties[key] = Errors(
            mae=float(np.abs(errors).mean()),
            rmse=float(np.sqrt(np.square(errors).mean())),
            max=float(np.abs(errors).max()),
            bias=float(errors.mean()),
            unit=unit,
            **{"coverage": None, **trust},
        )
    return properties


def compare_geometries(reports: Sequence[Report]) -> list[Report]:
    """Return the reports with the shift of each property filled in, and the mix of DFT and MMFF94 in DFT's.

    Args:
        reports: With details, of the same weights and split for several geometries, DFT's or a file's own among them.
    """
    base = next(report.details for report in reports if report.geometry in ("dft", "file"))
    assert base is not None
    pair = [report for report in reports if report.geometry in ("dft", "mmff")]
    mix = summarize_mix(pair) if len(pair) == 2 else None
    rows = {name: row for row, name in enumerate(base.names)}
    compared = []
    for report in reports:
        assert report.details is not None
        matching = np.array([rows[name] for name in report.details.names])
        shifts = np.abs(report.details.predictions - base.predictions[matching]).mean(axis=0)
        properties = {
            key: replace(errors, shift=float(shifts[DEFAULT_KEYS.index(key)]) / unit_factor(key, errors.unit))
            for key, errors in report.properties.items()
        }
        compared.append(replace(report, properties=properties, mix=mix if report.geometry == "dft" else None))
    return compared


def summarize_mix(reports: Sequence[Report]) -> dict[str, Errors]:
    """Return the errors over the molecules of several reports with details, taken together."""
    parts = [report.details for report in reports if report.details is not None]
    widths = [part.half_widths for part in parts if part.half_widths is not None]
    joined = Details(
        names=[name for part in parts for name in part.names],
        counts=np.concatenate([part.counts for part in parts]),
        predictions=np.concatenate([part.predictions for part in parts]),
        references=np.concatenate([part.references for part in parts]),
        half_widths=np.concatenate(widths) if len(widths) == len(parts) else None,
        scores=None,
        outside=None,
        smiles=[text for part in parts for text in part.smiles],
    )
    return summarize(joined)


def _summarize_trust(errors: NDArray[np.float64], half_widths: NDArray[np.float64]) -> dict[str, float | None]:
    """Return what the intervals are worth, given absolute errors and half-widths."""
    narrowest = np.argsort(half_widths, kind="stable")[: -(-len(errors) // 10)]
    mae = float(errors.mean())
    return {
        "coverage": float((errors <= half_widths).mean()),
        "half_width": float(half_widths.mean()),
        "sharpness": float(errors[narrowest].mean()) / mae if mae > 0.0 else None,
    }


def measure(model: Model, molecules: Dataset) -> dict[str, Errors]:
    """Predict molecules and compare with their reference values.

    Args:
        model: The network.
        molecules: Molecules with reference values, some of which may be NaN.

    Returns:
        Errors by key, for the properties that have a reference value.
    """
    return summarize(_detail(_predict(model, molecules, None), molecules))


def _check(value: str, allowed: tuple[str, ...], name: str) -> None:
    if value not in allowed:
        raise UsageError(f"unknown {name} '{value}'", f"Use one of: {', '.join(allowed)}.")
