"""An evaluation as one HTML page that needs nothing else: to read, to send and to print."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from importlib.metadata import version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from qmprop import __version__, findings
from qmprop.errors import QmpropError, UsageError
from qmprop.evaluation import PAPER_MAE
from qmprop.figures import decimals, format_value
from qmprop.outputs import Output, is_same_file
from qmprop.records import Value
from qmprop.tables import printable
from qmprop.targets import DEFAULT_KEYS, TARGETS, unit_factor

if TYPE_CHECKING:
    from qmprop.evaluation import Details, Errors, Report
    from qmprop.findings import Array, Group, Miss

#: How many of the worst molecules are drawn.
WORST: Final = 10
_LEVEL: Final = 90.0  # per cent, of the intervals
_GEOMETRIES: Final = {"dft": "DFT", "file": "as given", "mmff": "MMFF94", "xtb": "GFN2-xTB"}
_UNITS: Final = {"a0^3": "a₀³", "a0^2": "a₀²"}
_SPLITS: Final = {
    "train": ("training", "what the network learned from"),
    "valid": ("validation", "used to choose the network and to calibrate its intervals"),
    "test": ("test", "kept out of training"),
}
_FRAME: Final = 0.985  # share of the errors that a histogram shows at least
_NARROW: Final = 6.0  # times the frame that the first geometry needs, a histogram's frame at most
_SHADES: Final = 4  # of the table of groups, either way
_ACCURACY: Final = ("mae", "rmse", "max", "bias")
_INTERVALS: Final = ("coverage", "half_width", "sharpness")


def check_report(path: str, inputs: Sequence[str]) -> None:
    """Refuse a report that could not be written, before the evaluation begins.

    Args:
        path: The page to write.
        inputs: Files that must not be overwritten.

    Raises:
        QmpropError: A package of the extra `report` is missing.
        UsageError: The page would be standard output or one of the inputs.
    """
    for name in ("matplotlib", "jinja2"):
        if find_spec(name) is None:
            raise QmpropError(f"the report needs {name}", "Install it with: pip install 'qmprop[report]'.")
    if path == "-":
        raise UsageError("the report cannot be standard output", "Name a file with --report.")
    for name in inputs:
        if is_same_file(path, name):
            raise UsageError(f"report '{path}' is one of the inputs", "Name another file with --report.")


def write_report(reports: Sequence[Report], path: str | Path, *, command: str | None = None) -> None:
    """Write evaluations of the same weights on the same data as one HTML page, whole or not at all.

    Args:
        reports: What `evaluate` found, one for each kind of geometry; the first is shown in most detail.
        path: The page; replaced if it exists.
        command: What repeats the evaluation in a shell; by default made up from the reports.

    Raises:
        QmpropError: A package of the extra `report` is missing.
        UsageError: There are no reports, or they lack their details.
        OutputError: The page cannot be written.
    """
    check_report(str(path), ())
    with Output(str(path), option="--report") as page:
        page.write(render_report(reports, command=command))


def render_report(reports: Sequence[Report], *, command: str | None = None) -> str:
    """Return the page of `write_report`; the same evaluations give the same text."""
    from jinja2 import Environment, StrictUndefined

    pairs = [(report, report.details) for report in reports if report.details is not None]
    if not pairs or len(pairs) < len(reports):
        raise UsageError("a report needs evaluations with their details", "Give it what evaluate() returned.")
    main, details = pairs[0]
    kept = [part for _, part in pairs]
    names = [_GEOMETRIES[report.geometry] for report in reports]
    calibrated = any(part.half_widths is not None for part in kept)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("qmprop").joinpath("report.html.j2").read_text(encoding="utf-8"))
    return template.render(
        weights=printable(main.weights),
        place=_place(main),
        geometries=names,
        several=len(names) > 1,
        summary=_summarize(reports),
        key_figures=_key_figures(main),
        places=_list_geometries(reports),
        tables=_tabulate(reports),
        skipped=[_explain_skipped(report) for report in reports if report.skipped],
        properties=[_show_property(key, main, kept, names) for key in main.properties],
        calibrated=calibrated,
        intervals=_show_intervals(kept, names) if calibrated else [],
        domain=_describe_domain(main, details),
        groups=_compare(main, details),
        enough=findings.ENOUGH,
        worst=[_show_miss(miss, main, details) for miss in findings.find_worst(details, WORST)],
        command=printable(command or _guess_command(main)),
        versions={"qmprop": __version__, "torch": version("torch"), "weights": printable(main.weights)},
    )


def _place(report: Report) -> str:
    data = "QM9" if report.data == "qm9" else printable(report.data)
    return data if report.split == "all" else f"{data}, {_SPLITS[report.split][0]} split"


def _summarize(reports: Sequence[Report]) -> str:
    """Return what is measured in two sentences."""
    main = reports[0]
    where = "QM9" if main.data == "qm9" else printable(main.data)
    if main.split in _SPLITS:
        name, role = _SPLITS[main.split]
        where += f"’s {name} split ({role})"
    reference = "B3LYP/6-31G(2df,p)" if main.data == "qm9" else "the values in that file"
    text = f"The properties of {_count(main.molecules)} of {where} are predicted and compared with {reference}."
    moved = [_GEOMETRIES[report.geometry] for report in reports if report.geometry in ("mmff", "xtb")]
    start = "at their DFT geometries" if main.geometry == "dft" else "at the geometries of the file"
    if main.geometry in ("mmff", "xtb"):
        return f"{text} The molecules are seen at their {' and '.join(moved)} minima."
    if moved:
        return f"{text} The molecules are seen {start}, and at the {' and '.join(moved)} minima a user would have."
    return f"{text} The molecules are seen {start}."


def _key_figures(report: Report) -> list[dict[str, str]]:
    """Return the numbers to see first."""
    figures = [{"value": f"{report.molecules:,}", "unit": "", "label": "molecule" + "s" * (report.molecules != 1)}]
    for key in [key for key in ("gap", "u0", "mu") if key in report.properties] or list(report.properties)[:3]:
        errors = report.properties[key]
        value = _fix(errors.mae, _decimals(errors.mae))
        label = f"{key}, mean absolute error"
        figures.append({"value": value, "unit": _unit(errors.unit), "label": label})
    shares = [errors.coverage for errors in report.properties.values() if errors.coverage is not None]
    if shares:
        value = f"{100 * sum(shares) / len(shares):.1f}"
        figures.append({"value": value, "unit": "%", "label": "inside their 90 % interval"})
    if report.outside is not None:
        figures.append({"value": f"{100 * report.outside:.2g}", "unit": "%", "label": "judged outside the domain"})
    return figures


def _list_geometries(reports: Sequence[Report]) -> list[dict[str, str]]:
    """Return where the molecules are seen: how many, how far from DFT's geometries, and how many outside the domain."""
    return [
        {
            "name": _GEOMETRIES[report.geometry],
            "molecules": f"{report.molecules:,}",
            "skipped": f"{report.skipped:,}",
            "given": "" if report.rmsd is None else f"{report.rmsd['given']:.3f}",
            "refined": "" if report.rmsd is None else f"{report.rmsd['refined']:.3f}",
            "outside": "" if report.outside is None else f"{100 * report.outside:.2g}",
        }
        for report in reports
    ]


def _tabulate(reports: Sequence[Report]) -> dict[str, list[dict[str, Any]]]:
    """Return the errors, a line a property, by geometry side by side: accuracy, then what is known of the rest."""
    rows: dict[str, list[dict[str, Any]]] = {"accuracy": [], "intervals": [], "shifts": []}
    for key, first in reports[0].properties.items():
        found = [report.properties.get(key) for report in reports]
        digits = _decimals(first.mae)
        cells = {name: [_cell(errors, name, digits) for errors in found] for name in (*_ACCURACY, *_INTERVALS, "shift")}
        cells["paper"] = [f"{PAPER_MAE[key]:g}", f"{first.mae / PAPER_MAE[key]:.2f}"]
        named = _name(key, first.unit)
        rows["accuracy"].append({**named, "cells": [cells[name] for name in ("mae", "paper", *_ACCURACY[1:])]})
        if any(errors is not None and errors.coverage is not None for errors in found):
            rows["intervals"].append({**named, "cells": [cells[name] for name in _INTERVALS]})
        if any(cells["shift"]):
            rows["shifts"].append({**named, "cells": [cells["shift"]]})
    return rows


def _cell(errors: Errors | None, name: str, digits: int) -> str:
    value = None if errors is None else getattr(errors, name)
    if value is None:
        return ""
    if name == "coverage":
        return f"{100 * value:.1f}"
    if name == "max":
        digits = min(digits, _decimals(value))
    return f"{value:.2f}" if name == "sharpness" else _fix(value, digits, sign=name == "bias")


def _explain_skipped(report: Report) -> str:
    reasons = ", ".join(f"{printable(reason)} {count:,}" for reason, count in report.skipped_reasons.items())
    return f"{_GEOMETRIES[report.geometry]}: {_count(report.skipped)} without such a geometry left out ({reasons})."


def _show_property(key: str, main: Report, details: Sequence[Details], names: Sequence[str]) -> dict[str, Any]:
    """Return the two charts of a property: predictions against references, and errors by geometry."""
    from markupsafe import Markup

    from qmprop import charts

    column = DEFAULT_KEYS.index(key)
    unit = main.properties[key].unit
    first = details[0]
    known = np.isfinite(first.references[:, column])
    errors = [findings.find_errors(part)[:, column] / unit_factor(key, unit) for part in details]
    errors = [part[np.isfinite(part)] for part in errors]
    few = max(map(len, errors)) < charts.FEW
    limits = [float(np.quantile(np.abs(part), 1.0 if few else _FRAME)) for part in errors if len(part)]
    limit = max(min(max(limits), _NARROW * limits[0]) if not few else 1.15 * max(limits), 1e-12)
    beyond = [100.0 * float((np.abs(part) > limit).mean()) if len(part) else 0.0 for part in errors]
    heads = [f"{name} " if len(names) > 1 else "" for name in names]
    told = ", ".join(f"{head}{share:.1f} %" for head, share in zip(heads, beyond, strict=True))
    parity = charts.draw_parity(
        first.references[known, column],
        first.predictions[known, column],
        unit=_unit(TARGETS[key].unit),
        label=f"{key}: predictions against references",
    )
    histogram = charts.draw_errors(errors, limit=limit, unit=_unit(unit), label=f"{key}: distribution of errors")
    return {
        **_name(key, unit),
        "mae": _fix(main.properties[key].mae, _decimals(main.properties[key].mae)),
        "labels": "" if known.all() else f"{_count(int(known.sum()))} with a reference value.",
        "charts": [Markup(parity), Markup(histogram)],
        "beyond": "" if few else f"Beyond the frame: {told}.",
    }


def _show_intervals(details: Sequence[Details], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the charts of the intervals: by size, by width, and the error by width."""
    from markupsafe import Markup

    from qmprop import charts

    parts = [part for part in details if part.half_widths is not None]
    groups = [findings.group_by_size(part) for part in parts]
    ticks = [group.name for group in groups[0]]
    shares = [_align(part, found, ticks) for part, found in zip(parts, groups, strict=True)]
    binned = [findings.bin_by_width(part) for part in parts]
    count = max(len(bins[2]) for bins in binned)
    found = [findings.find_calibration(part) for part in parts]
    calibration = charts.draw_calibration(
        [pair[0] for pair in found], [pair[1] for pair in found], label="coverage of intervals of several levels"
    )
    by_size = charts.draw_coverage(
        shares, ticks, level=_LEVEL, x_label="heavy atoms", label="coverage of the intervals by number of heavy atoms"
    )
    by_width = charts.draw_coverage(
        [bins[2] for bins in binned],
        [str(k + 1) for k in range(count)],
        level=_LEVEL,
        x_label="predictions, from narrow to wide interval",
        label="coverage of the intervals by their width",
    )
    trend = charts.draw_trend(
        [bins[0] for bins in binned], [bins[1] for bins in binned], label="error found against half-width given"
    )
    shared = f"{'Equal parts' if count > 1 else 'All'} of the predictions, every property alike."
    wanted = "On the dashed line, intervals of every level hold what they promise."
    return [
        {"title": "Coverage by level", "chart": Markup(calibration), "text": wanted},
        {"title": "Coverage by size", "chart": Markup(by_size), "text": "All properties together."},
        {"title": "Coverage by width", "chart": Markup(by_width), "text": shared},
        {"title": "Error against width", "chart": Markup(trend), "text": "On the dashed line, width tells the error."},
    ]


def _align(details: Details, groups: Sequence[Group], ticks: Sequence[str]) -> Array:
    """Return the coverage of the groups named by `ticks`; NaN for those that these molecules do not form."""
    found = dict(zip((group.name for group in groups), findings.find_coverage(details, groups), strict=True))
    return np.array([found.get(name, np.nan) for name in ticks])


def _describe_domain(report: Report, details: Details) -> str:
    ratio = findings.compare_outside(details)
    if report.outside is None or details.outside is None:
        return ""
    count = int(details.outside.sum())
    text = f"{_count(count)} ({100 * report.outside:.2g} %) {'is' if count == 1 else 'are'} judged outside the domain"
    return f"{text}." if ratio is None else f"{text}; errors there are {ratio:.1f} times those inside."


def _compare(report: Report, details: Details) -> dict[str, Any]:
    """Return the table of groups: mean absolute errors relative to those of all molecules, and shades for them."""
    columns = [DEFAULT_KEYS.index(key) for key in report.properties]
    parts = []
    if len(details.names) >= findings.ENOUGH:
        kinds = {"Heavy atoms": findings.group_by_size(details), "Elements": findings.group_by_element(details)}
        for title, groups in kinds.items():
            ratios = findings.compare_groups(details, groups)[:, columns]
            rows = [
                {"name": group.name, "count": f"{len(group):,}", "cells": [_shade(ratio) for ratio in line]}
                for group, line in zip(groups, ratios, strict=True)
            ]
            parts.append({"title": title, "rows": rows})
    return {"keys": list(report.properties), "parts": parts}


def _shade(ratio: float) -> dict[str, str]:
    """Return the text of a ratio and the class of its color; a shade is a fifth of a doubling."""
    if not math.isfinite(ratio) or ratio <= 0.0:
        return {"text": "", "shade": "none"}
    level = round(5 * math.log2(ratio) / 2)
    level = max(-_SHADES, min(_SHADES, level))
    return {"text": f"{ratio:.2f}", "shade": f"more{level}" if level > 0 else f"less{-level}" if level else "none"}


def _show_miss(miss: Miss, report: Report, details: Details) -> dict[str, Any]:
    """Return one of the worst molecules: its drawing, what was predicted, and what is right."""
    from markupsafe import Markup

    from qmprop import charts

    key = DEFAULT_KEYS[miss.column]
    target, errors = TARGETS[key], report.properties[key]
    predicted = float(details.predictions[miss.row, miss.column])
    reference = float(details.references[miss.row, miss.column])
    width = None if details.half_widths is None else float(details.half_widths[miss.row, miss.column])
    interval = None if width is None or not math.isfinite(width) else (predicted - width, predicted + width)
    digits = decimals(key, target.unit, errors.mae * unit_factor(key, errors.unit))
    shown = format_value(Value(predicted, target.unit, interval), digits)
    digits = len(shown.number.partition(".")[2])
    error = (predicted - reference) / unit_factor(key, errors.unit)
    name = printable(details.names[miss.row])
    drawing = charts.draw_molecule(details.smiles[miss.row], label=f"structure of {name}")
    return {
        **_name(key, target.unit),
        "molecule": name,
        "smiles": printable(details.smiles[miss.row] or ""),
        "drawing": None if drawing is None else Markup(drawing),
        "formula": findings.write_formula(details.counts[miss.row]),
        "predicted": _fix(predicted, digits),
        "half_width": shown.half_width,
        "missed": width is not None and abs(predicted - reference) > width,
        "reference": _fix(reference, digits),
        "error": f"{_fix(error, _decimals(errors.mae), sign=True)} {_unit(errors.unit)}",
        "ratio": f"{miss.ratio:,.1f}" if miss.ratio < 10.0 else f"{miss.ratio:,.0f}",
        "outside": None if details.outside is None else bool(details.outside[miss.row]),
    }


def _guess_command(report: Report) -> str:
    words = ["qmprop", "eval", "--data", report.data]
    if report.split not in ("test", "all"):
        words += ["--split", report.split]
    return shlex.join([*words, "--report", "report.html"])


def _name(key: str, unit: str) -> dict[str, str]:
    target = TARGETS[key]
    return {
        "key": key,
        "symbol": target.symbol,
        "description": target.description.replace(" - ", " − "),
        "unit": _unit(unit),
    }


def _unit(unit: str) -> str:
    return _UNITS.get(unit, unit)


def _decimals(error: float) -> int:
    """Return the decimals that show three digits of the error."""
    return max(0, 2 - math.floor(math.log10(error))) if error > 0.0 and math.isfinite(error) else 3


def _fix(value: float, digits: int, *, sign: bool = False) -> str:
    return f"{value:{'+' if sign else ''},.{digits}f}".replace("-", "−")


def _count(number: int) -> str:
    return f"{number:,} molecule" + ("" if number == 1 else "s")
