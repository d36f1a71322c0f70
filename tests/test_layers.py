"""The layers: who may import whom, and what is not imported until it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "qmprop"
WATER = PACKAGE.parent / "examples" / "water.xyz"

#: From the bottom up: a module imports only modules that stand before it.
LAYERS = (
    ["errors", "bundled", "targets", "config", "records", "molecule"]
    + ["topology", "limits", "oddities", "egnn", "baseline", "graph", "model"]
    + ["streams", "formats", "blocks", "ase_formats", "smiles", "workers", "readers"]
    + [
        "figures",
        "rows",
        "tables",
        "card",
        "outputs",
        "structures",
        "parquet",
        "writers",
        "partials",
        "trust",
        "datasets",
        "library",
        "inference",
        "qm9",
        "auxiliary",
        "minima",
        "geometries",
        "evaluation",
        "calibration",
        "charts",
        "findings",
        "report",
        "muon",
        "learning",
        "training",
    ]
    + ["progress", "frames", "completion", "monitor", "console", "cli", "__main__"]
)
HEAVY = ("torch", "torch_geometric", "ase", "rdkit", "pytorch_lightning", "scipy", "pyarrow")


def _imports(path: Path) -> Iterator[str]:
    """Yield the qmprop modules a file imports, at its top or anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "qmprop" and rest.split(".")[0] in LAYERS:
                yield rest.split(".")[0]


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_a_module_imports_only_those_below_it(path):
    if path.stem == "__init__":
        assert list(_imports(path)) == []
        return
    assert path.stem in LAYERS
    below = LAYERS[: LAYERS.index(path.stem)]
    assert [name for name in _imports(path) if name not in below] == []


def test_imports_are_found_wherever_they_stand(tmp_path):
    path = tmp_path / "x.py"
    path.write_text("import qmprop.cli\ndef f():\n    from qmprop import model\n    from qmprop.egnn import EGNN\n")
    assert list(_imports(path)) == ["cli", "model", "egnn"]


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_only_the_console_prints(path):
    if path.stem == "console":
        return
    calls = [node.func for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    assert not [call.lineno for call in calls if isinstance(call, ast.Name) and call.id == "print"]


def _loaded(code: str) -> set[str]:
    """Return which heavy packages a fresh process holds after running the code."""
    check = f"\nimport sys; print('LOADED', *[name for name in {HEAVY!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code + check], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.splitlines()[-1].split()[1:])


RUN = "from qmprop.__main__ import run; assert run({arguments!r}) == {status}"


def test_importing_the_package_loads_nothing_heavy():
    assert _loaded("import qmprop; qmprop.__version__; dir(qmprop)") == set()


@pytest.mark.parametrize("arguments", [["--help"], ["predict", "--help"], ["train", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(arguments):
    assert _loaded(RUN.format(arguments=arguments, status=0)) == set()


def test_wrong_usage_is_reported_before_anything_heavy_is_loaded():
    assert _loaded(RUN.format(arguments=["predict", "x.xyz", "-p", "mass"], status=2)) == set()


def test_predicting_an_xyz_file_needs_torch_but_no_training_library():
    loaded = _loaded(RUN.format(arguments=["predict", str(WATER)], status=0))
    assert "torch" in loaded
    assert not loaded & {"torch_geometric", "pytorch_lightning", "rdkit"}
