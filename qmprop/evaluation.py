"""Errors against reference values, on molecules the network was not trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qmprop.datasets import Dataset, is_cache
from qmprop.errors import DataError, UsageError
from qmprop.geometries import XTB_SIZE, Geometries, load_geometries, minimize_dataset, rmsd
from qmprop.model import Model, load_model
from qmprop.qm9 import QM9_SIZE, load_data, split_data
from qmprop.targets import DEFAULT_KEYS, TARGETS, unit_factor

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
        unit: D, a0^3, meV (all energies), a0^2 or cal/(mol K).
    """

    mae: float
    rmse: float
    max: float
    bias: float
    coverage: float | None
    unit: str


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
    """

    data: str
    split: str
    geometry: str
    molecules: int
    weights: str
    properties: Mapping[str, Errors]
    rmsd: Mapping[str, float] | None = None
    skipped_reasons: Mapping[str, int] = field(default_factory=dict)

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
            "properties": {
                key: {
                    "mae": errors.mae,
                    "rmse": errors.rmse,
                    "max": errors.max,
                    "bias": errors.bias,
                    "coverage": errors.coverage,
                    "unit": errors.unit,
                }
                for key, errors in self.properties.items()
            },
        }


def evaluate(
    *,
    weights: str | Path | Model = "egnn-qm9",
    data: str | Path = "qm9",
    split: str = "test",
    geometry: str = "dft",
    device: str = "auto",
    limit: int | None = None,
    units: str | None = None,
    on_load: Callable[[int, int], None] | None = None,
    on_minimize: Callable[[int, int], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Measure the errors of a network.

    Args:
        weights: Bundled weights by name, a weights file, or a loaded model.
        data: "qm9", its compact cache file, or a labeled extxyz file. Such a file is evaluated whole, unless the
            weights were trained on it: then only its `split`.
        split: "train", "valid" or "test".
        geometry: "dft" for the geometries as they are; "mmff" or "xtb" for the MMFF94 or GFN2-xTB minima reached from
            them, of QM9 kept in a cache file. "xtb" takes the first 1,000 molecules of a split of QM9. Molecules
            without such a minimum are left out.
        device: "auto", "cpu", "cuda", ...
        limit: The first so many molecules only.
        units: Units of a labeled file's entries, as for `predict`.
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
    molecules = load_data(data, units=units, progress=on_load)
    is_qm9 = str(data) == "qm9" or is_cache(data)
    known = is_qm9 or model.metadata.get("data_sha256") == molecules.sha256
    rows = (split_data(molecules)[split] if known else np.arange(len(molecules)))[:limit]
    if len(rows) == 0:
        raise DataError(f"{molecules.name} has no {split} molecules", "Use a larger file or another --split.")
    skipped: Mapping[str, int] = {}
    if geometry == "dft":
        chosen = molecules.select(rows)
    else:
        chosen, rows, skipped = _move(molecules, rows, geometry, on_minimize)
    return Report(
        data=molecules.name,
        split=split if known else "all",
        geometry=geometry if is_qm9 or geometry != "dft" else "file",
        molecules=len(chosen),
        weights=model.id,
        properties=measure(model, chosen, on_progress=on_progress),
        rmsd=_compare(model, chosen, molecules.select(rows)) if is_qm9 else None,
        skipped_reasons=skipped,
    )


def _move(
    molecules: Dataset, rows: NDArray[np.int64], kind: str, on_minimize: Callable[[int, int], None] | None
) -> tuple[Dataset, NDArray[np.int64], dict[str, int]]:
    """Return the molecules at `rows` that have a minimum, at it; their rows; and why the others have none."""
    geometries: Geometries
    if molecules.name == "qm9" and len(molecules) == QM9_SIZE:
        rows = rows[:XTB_SIZE] if kind == "xtb" else rows
        geometries = load_geometries(kind, molecules, rows=rows, progress=on_minimize)
    else:
        molecules = molecules.select(rows)
        rows = np.arange(len(rows))
        geometries = minimize_dataset(kind, molecules, progress=on_minimize)
    moved = replace(molecules, positions=geometries.positions)
    reasons = Counter(geometries.failures[int(number)] for number in molecules.ids[rows[~geometries.found[rows]]])
    if not geometries.found[rows].any():
        raise DataError(f"no molecule of {molecules.name} has a minimum: {reasons.most_common(1)[0][0]}")
    rows = rows[geometries.found[rows]]
    return moved.select(rows), rows, dict(reasons.most_common())


def _compare(model: Model, given: Dataset, dft: Dataset) -> dict[str, float]:
    """Return the median RMSD in Å of the given and of the refined geometries from those of DFT."""
    refined = np.concatenate(list(model.refine_arrays(given.numbers, given.positions, given.offsets)))
    pairs = {"given": given.positions, "refined": refined}
    return {name: float(np.median(rmsd(moved, dft.positions, dft.offsets))) for name, moved in pairs.items()}


def measure(
    model: Model, molecules: Dataset, *, on_progress: Callable[[int, int], None] | None = None
) -> dict[str, Errors]:
    """Predict molecules and compare with their reference values.

    Args:
        model: The network.
        molecules: Molecules with reference values, some of which may be NaN.
        on_progress: Called with the molecules done and to do.

    Returns:
        Errors by key, for the properties that have a reference value.
    """
    parts: list[NDArray[np.float64]] = []
    done = 0
    for part in model.predict_arrays(molecules.numbers, molecules.positions, molecules.offsets):
        parts.append(part)
        done += len(part)
        if on_progress is not None:
            on_progress(done, len(molecules))
    predictions, references = np.concatenate(parts), molecules.targets
    properties = {}
    for column, key in enumerate(DEFAULT_KEYS):
        target = TARGETS[key]
        errors = (predictions - references)[:, column] / unit_factor(key, target.evaluation_unit)
        errors = errors[np.isfinite(references[:, column])]
        if len(errors):
            properties[key] = Errors(
                mae=float(np.abs(errors).mean()),
                rmse=float(np.sqrt(np.square(errors).mean())),
                max=float(np.abs(errors).max()),
                bias=float(errors.mean()),
                coverage=None,
                unit=target.evaluation_unit,
            )
    return properties


def _check(value: str, allowed: tuple[str, ...], name: str) -> None:
    if value not in allowed:
        raise UsageError(f"unknown {name} '{value}'", f"Use one of: {', '.join(allowed)}.")
