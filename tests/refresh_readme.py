"""The parts of README.md and weights/README.md that come from the tool: `python -m tests.refresh_readme` rewrites them.

A part stands between `<!-- kind:begin argument -->` and `<!-- kind:end -->`. With `--evaluate`, the bundled weights are
first evaluated on QM9's test split, and what `qmprop eval --geometry all -f json` prints is kept in
weights/eval-test.json.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
CARD = ROOT / "weights" / "README.md"
EVALUATION = ROOT / "weights" / "eval-test.json"
#: The log of the run that made the bundled weights, `logs/metrics.csv`.
CURVE = ROOT / "weights" / "validation-curve.csv"
_REGION = re.compile(r"(<!-- (\w+):begin(?: (.*?))? -->\n)(.*?)(<!-- \2:end -->)", re.DOTALL)
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def refresh(text: str) -> str:
    """Return the page with every generated part made anew."""
    return _REGION.sub(lambda found: found[1] + render(found[2], found[3] or "") + found[5], text)


def regions(text: str) -> Iterator[tuple[str, str, str]]:
    """Yield kind, argument and content of the generated parts of a page."""
    for found in _REGION.finditer(text):
        yield found[2], found[3] or "", found[4]


def without_regions(text: str) -> str:
    """Return what people wrote themselves."""
    return _REGION.sub("", text)


def blocks(text: str, language: str) -> list[str]:
    """Return the code blocks in a language."""
    return [content for name, content in _BLOCK.findall(text) if name == language]


def commands(block: str) -> list[str]:
    """Return the lines of a shell block without comments; what stands between `<<'END'` and `END` is kept as it is."""
    lines, inside = [], False
    for line in block.splitlines():
        if inside or (line and not line.startswith("#")):
            lines.append(line)
        inside = line != "END" if inside else line.endswith("<<'END'")
    return lines


def render(kind: str, argument: str) -> str:
    """Return what belongs into a generated part."""
    if kind == "output":
        return _fence("text", shell(argument, ROOT).stdout)
    if kind == "accuracy":
        return _fence("text", _accuracy())
    if kind == "geometries":
        return _fence("text", _geometries())
    tables = {"properties": _properties, "units": _units, "codes": _codes, "record": _record, "curve": _curve}
    return tables[kind]()


def environment(**extra: str) -> dict[str, str]:
    """Return an environment in which this Python's scripts come first and tables are 80 columns wide."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
    return os.environ | {"PATH": path, "COLUMNS": "80", "NO_COLOR": "1", "PYTHONUTF8": "1"} | extra


def shell(script: str, folder: Path, *, check: bool = True, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run a script as a reader would paste it, but stop at the first command that fails; `extra` is environment."""
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=environment(**extra),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=check,
    )


def stored_reports() -> list[dict[str, Any]]:
    """Return the stored outcome of `qmprop eval --geometry all -f json`."""
    reports: list[dict[str, Any]] = json.loads(EVALUATION.read_text(encoding="utf-8"))
    return reports


def stored_report(geometry: str = "dft") -> dict[str, Any]:
    """Return the stored outcome for one kind of geometry."""
    (report,) = (report for report in stored_reports() if report["geometry"] == geometry)
    return report


def _accuracy() -> str:
    from qmprop.console import report_parts
    from qmprop.evaluation import PAPER_MAE
    from qmprop.tables import Style, draw

    return draw(report_parts(stored_report(), PAPER_MAE, Style(80)), Style(80))


def _geometries() -> str:
    from qmprop.console import comparison_parts
    from qmprop.evaluation import PAPER_MAE
    from qmprop.tables import Style, draw

    return draw(comparison_parts(stored_reports(), PAPER_MAE, Style(80)), Style(80))


def _properties() -> str:
    from qmprop.targets import TARGETS

    rows = [[f"`{target.key}`", target.description, target.unit] for target in TARGETS.values()]
    return _table(["key", "property", "default unit"], rows)


def _units() -> str:
    from qmprop.targets import TARGETS, UNITS

    rows = []
    for dimension, units in UNITS.items():
        keys = [f"`{target.key}`" for target in TARGETS.values() if target.dimension == dimension]
        name = "all energies" if dimension == "energy" else ", ".join(keys)
        rows.append([name, ", ".join(f"`{unit}`" for unit in units)])
    return _table(["properties", "units, the default first"], rows)


def _codes() -> str:
    from qmprop.records import MESSAGE_CODES

    rows = []
    for code, meaning in MESSAGE_CODES.items():
        status = "warning" if meaning.startswith("warning: ") else "error"
        rows.append([f"`{code}`", status, meaning.removeprefix("warning: ")])
    return _table(["code", "status", "meaning"], rows)


def _record() -> str:
    import qmprop

    (record,) = qmprop.predict(str(ROOT / "examples" / "water.xyz"), properties="mu,gap")
    data = record.to_dict() | {"source": "examples/water.xyz"}
    if data["domain"] is not None:
        data["domain"]["score"] = round(data["domain"]["score"], 2)
    for value in data["properties"].values():
        value["value"] = round(value["value"], 3)
        value["interval"] = value["interval"] and [round(bound, 3) for bound in value["interval"]]
    properties = ",\n".join(f'    "{key}": {json.dumps(value)}' for key, value in data["properties"].items())
    texts = {key: json.dumps(value) for key, value in data.items()} | {"properties": f"{{\n{properties}\n  }}"}
    lines = ",\n".join(f'  "{key}": {text}' for key, text in texts.items())
    return _fence("json", f"{{\n{lines}\n}}\n")


def _curve() -> str:
    """Every fifth epoch and the last; columns other than the epoch and the validation errors are left out."""
    from qmprop.targets import DEFAULT_KEYS, TARGETS

    with CURVE.open(encoding="utf-8", newline="") as file:
        epochs = list(csv.DictReader(file))
    first = int(epochs[0]["epoch"])  # the log may count from 0
    rows = []
    for epoch in epochs:
        number = int(epoch["epoch"]) - first + 1
        if number == 1 or number % 5 == 0 or epoch is epochs[-1]:
            rows.append([str(number), *(f"{float(epoch[f'valid_{key}']):.3g}" for key in DEFAULT_KEYS)])
    return _table(["epoch", *(f"{key} [{TARGETS[key].evaluation_unit}]" for key in DEFAULT_KEYS)], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _fence(language: str, text: str) -> str:
    lines = "\n".join(line.rstrip() for line in text.splitlines()).strip("\n")
    return f"```{language}\n{lines}\n```\n"


def main() -> None:
    """Rewrite the generated parts of both pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluate", action="store_true", help="first evaluate the bundled weights; takes minutes")
    if parser.parse_args().evaluate:
        EVALUATION.write_text(shell("qmprop eval --geometry all -f json", ROOT).stdout, encoding="utf-8")
    for page in (README, CARD):
        page.write_text(refresh(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
