"""What the weights say about themselves, as `info` shows it: training, errors, calibration, limits."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Final

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from qmprop.figures import format_share
from qmprop.tables import Style, new_table, printable
from qmprop.targets import TARGETS, unit_factor

#: Kinds of geometries, as people call them.
GEOMETRY_NAMES: Final = {"dft": "DFT", "file": "given", "mmff": "MMFF94", "xtb": "GFN2-xTB"}
_KINDS: Final = ("dft", "mmff", "xtb")
#: Where older weights keep their errors, and what those are errors of.
_OLDER_ERRORS: Final = {"test_mae": "test split", "validation_mae": "validation"}
#: Metadata that the card tells in words, a table or not at all.
_TOLD: Final = frozenset(
    {"data", "data_sha256", "split_sha256", "training_molecules", "training", "version", "properties"}
    | {"architecture", "others", "shares", "calibration", "accuracy", "limits", *_OLDER_ERRORS}
)
_COUNT: Final = "molecules"
_INDENT: Final = 3
#: Columns that the table of errors needs in full.
_WIDE: Final = 78


def facts_parts(title: str, facts: Mapping[str, object], style: Style) -> list[RenderableType]:
    """Return a titled list of names and values; a long value goes on below itself."""
    return [Text(f" {printable(title)}", style="bold", no_wrap=True, overflow="ignore"), *_lines(facts, style), Text()]


def model_parts(name: str, metadata: Mapping[str, Any], style: Style) -> list[RenderableType]:
    """Return the card of the weights; what they do not tell is left out.

    Args:
        name: Name and hash of the weights.
        metadata: What the file says about itself; anybody can write into it, so nothing is taken for granted.
        style: How to draw.
    """
    parts = facts_parts(f"Weights {name}", _describe_training(metadata), style)
    parts += _accuracy_parts(metadata, style)
    if trust := _describe_trust(metadata):
        parts += [*_lines(trust, style), Text()]
    return parts


def known_errors(metadata: Mapping[str, Any]) -> dict[str, float]:
    """Return the weights' error by key, in default units: on the test split, else on the validation molecules."""
    columns = _error_columns(metadata)
    errors = next(iter(columns.values()), {})
    return {key: error * unit_factor(key, TARGETS[key].evaluation_unit) for key, error in errors.items()}


def _describe_training(metadata: Mapping[str, Any]) -> dict[str, str]:
    settings = dict(_mapping(metadata.get("training")))
    settings.pop("model", None)  # the architecture
    counts = [
        f"{count:,} {noun}"
        for count, noun in ((metadata.get("training_molecules"), "molecules"), (settings.pop("epochs", None), "epochs"))
        if type(count) is int
    ]
    facts = {
        "trained on": ": ".join(filter(None, (_plain(metadata.get("data")), ", ".join(counts)))),
        "made by": "qmprop " + _plain(metadata["version"]) if "version" in metadata else "",
        "data hash": _plain(metadata.get("data_sha256")),
        "split hash": _plain(metadata.get("split_sha256")),
        "network": _plain(metadata.get("architecture")),
        "others": _describe_others(metadata),
        "settings": _plain(settings),
    }
    facts |= {key.replace("_", " "): _plain(value) for key, value in metadata.items() if key not in _TOLD}
    return {key: text for key, text in facts.items() if text}


def _describe_others(metadata: Mapping[str, Any]) -> str:
    """Say how many further members an ensemble has, and in what their shapes differ from that of the first."""
    others = metadata.get("others")
    shapes = [_mapping(shape) for shape in others] if isinstance(others, list) else []
    first = _mapping(metadata.get("architecture"))
    changes = dict.fromkeys(
        _plain({key: shape[key] for key in shape if shape[key] != first.get(key)}) for shape in shapes
    )
    different = "; ".join(filter(None, changes))
    shares = metadata.get("shares")
    known = [f"{share:.3g}" for share in shares if type(share) is float] if isinstance(shares, list) else []
    averaged = f"{len(shapes)} more, averaged" + (f" with shares of {_join(known)}" if known else "")
    return averaged + (f"; with {different}" if different else "") if shapes else ""


def _describe_trust(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Say in words what the intervals were calibrated on, how often the verdict is wrong, and what is in the domain."""
    calibration, limits = _mapping(metadata.get("calibration")), _mapping(metadata.get("limits"))
    facts = {}
    kinds = [GEOMETRY_NAMES[kind] for kind in _texts(calibration.get("geometries")) if kind in GEOMETRY_NAMES]
    if type(count := calibration.get("molecules")) is int:
        geometries = f", in {_join(kinds)} geometries" if kinds else ""
        facts["intervals"] = f"calibrated on {count:,} molecules that were never trained on{geometries}"
    alarms = _numbers(calibration.get("false_alarms"), GEOMETRY_NAMES, high=1.0)
    if alarms:
        rates = _join([f"{format_share(rate, 2)} ({GEOMETRY_NAMES[kind]})" for kind, rate in alarms.items()])
        facts["false alarms"] = f"of molecules like these, {rates} are called out of the domain"
    elements, heavy = _texts(limits.get("elements")), limits.get("heavy_atoms")
    bounds = [f"molecules of {_join(elements)}"] if elements else []
    bounds += [f"up to {heavy} heavy atoms"] if type(heavy) is int else []
    if bounds:
        facts["limits"] = ", ".join([*bounds, "neutral and closed-shell, alone in vacuum, at or near a minimum"])
    return facts


def _accuracy_parts(metadata: Mapping[str, Any], style: Style) -> list[RenderableType]:
    """Return the table of errors and of true values inside ±, a column a kind of geometry; two where it is narrow."""
    errors, coverage, counts = _error_columns(metadata), _coverage_columns(metadata), _counts(metadata)
    if not errors:
        return []
    digits = {key: significant_decimals(error) for column in reversed(errors.values()) for key, error in column.items()}
    texts = {
        heading: {key: f"{error:.{digits[key]}f}" for key, error in column.items()} | {_COUNT: counts.get(heading, "")}
        for heading, column in errors.items()
    }
    shares = {
        heading: {key: f"{100 * share:.1f} %" for key, share in column.items()} for heading, column in coverage.items()
    }
    groups = {"MAE": texts, f"in {'±' if style.unicode else '+-'} 90 %": shares}
    blocks = [groups] if style.width >= _WIDE else [{heading: group} for heading, group in groups.items() if group]
    title = " Accuracy on molecules never trained on" if counts else " Accuracy"
    tables = [_accuracy_table(block, style) for block in blocks]
    return [Text(title, style="bold"), *(part for table in tables for part in (table, Text()))]


def _accuracy_table(groups: Mapping[str, Mapping[str, Mapping[str, str]]], style: Style) -> Table:
    """Return a line for every property that has a text in one of the groups' columns."""
    table = new_table(style)
    table.add_column("property", style="bold")
    table.add_column("unit", style="dim")
    for group, headings in groups.items():
        for number, heading in enumerate(headings):
            table.add_column(f"{'' if number else group}\n{heading}", justify="right")
    columns = [column for group in groups.values() for column in group.values()]
    for key in (*TARGETS, _COUNT):
        cells = [column.get(key, "") for column in columns]
        if any(cells):
            table.add_row(key, TARGETS[key].evaluation_unit if key in TARGETS else "", *cells)
    return table


def significant_decimals(error: float) -> int:
    """Return the decimals that show three digits of the error."""
    return max(0, 2 - math.floor(math.log10(error))) if error > 0.0 and math.isfinite(error) else 3


def _error_columns(metadata: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return mean absolute errors in evaluation units by heading and key: by geometry, or as older weights do."""
    accuracy = _mapping(metadata.get("accuracy"))
    columns = {GEOMETRY_NAMES[kind]: _errors(_mapping(accuracy.get(kind)).get("mae")) for kind in _KINDS}
    if not columns["DFT"]:
        columns = {heading: _errors(metadata.get(key)) for key, heading in _OLDER_ERRORS.items()}
    return {heading: errors for heading, errors in columns.items() if errors}


def _coverage_columns(metadata: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    accuracy = _mapping(metadata.get("accuracy"))
    found = {kind: _numbers(_mapping(accuracy.get(kind)).get("coverage"), TARGETS, high=1.0) for kind in _KINDS}
    return {GEOMETRY_NAMES[kind]: shares for kind, shares in found.items() if shares}


def _counts(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return how many molecules the errors are of, by heading."""
    accuracy = _mapping(metadata.get("accuracy"))
    counts = {GEOMETRY_NAMES[kind]: _mapping(accuracy.get(kind)).get("molecules") for kind in _KINDS}
    return {heading: f"{count:,}" for heading, count in counts.items() if type(count) is int}


def _lines(facts: Mapping[str, object], style: Style) -> list[Text]:
    """Return aligned lines; the value is wrapped at the style's width, but a word longer than that is kept whole."""
    width = max((len(name) for name in facts), default=0)
    room = max(20, style.width - _INDENT - width - 2)
    lines = []
    for name, value in facts.items():
        text = textwrap.wrap(printable(str(value)), room, break_long_words=False, break_on_hyphens=False) or [""]
        for number, line in enumerate(text):
            label = printable(name) if number == 0 else ""
            shown = Text(" " * _INDENT + label.ljust(width), style="cyan", no_wrap=True, overflow="ignore")
            lines.append(shown.append(f"  {line}", style="default"))
    return lines


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _texts(value: object) -> list[str]:
    return [text for text in value if isinstance(text, str)] if isinstance(value, list | tuple) else []


def _numbers(value: object, keys: Mapping[str, object], *, high: float) -> dict[str, float]:
    """Return what stands under the keys and is a number from 0 to `high`."""
    known = {key: number for key, number in _mapping(value).items() if key in keys and type(number) in (int, float)}
    return {key: float(number) for key, number in known.items() if 0 <= number <= high}


def _errors(value: object) -> dict[str, float]:
    return {key: error for key, error in _numbers(value, TARGETS, high=1e12).items() if error > 0.0}


def _join(words: Sequence[str]) -> str:
    """Return "a, b and c"."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def _plain(value: object) -> str:
    """Return a value of the weights' metadata on one line."""
    if value is None:
        return ""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return f"{len(value)} values" if len(value) > 4 else ", ".join(map(_plain, value))
    return str(value)
