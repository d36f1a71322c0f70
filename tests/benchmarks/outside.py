"""What the bundled weights make of molecules that QM9 does not have: `python -m tests.benchmarks.outside`.

Their references are of QM9's own level of theory, see `tests.make_outside`. Prints, for each molecule and kind of
geometry, the verdict, how many of the twelve values lie inside their 90 % intervals, and some errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import ase.io
import numpy as np
from numpy.typing import NDArray

from qmprop.evaluation import Details, evaluate
from qmprop.targets import DEFAULT_KEYS

DATA: Final = Path(__file__).parents[1] / "data" / "outside.extxyz"
SHOWN: Final = {"mu": 1.0, "alpha": 1.0, "homo": 1e3, "lumo": 1e3, "zpve": 1e3, "u0": 1e3}  # factor to the unit


def main() -> None:
    """Print the table."""
    names = [atoms.info["smiles"] for atoms in ase.io.iread(DATA, ":")]
    for geometry, details in judge():
        inside = find_inside(details)
        print(f"{geometry} geometries: error of mu [D], alpha [a0^3], homo, lumo, zpve, u0 [meV]")
        for row, name in enumerate(names):
            errors = details.predictions[row] - details.references[row]
            shown = "".join(f"{errors[DEFAULT_KEYS.index(key)] * factor:10.3g}" for key, factor in SHOWN.items())
            verdict = "out" if details.outside[row] else "in"
            print(f"{name:16} {verdict:3} {details.scores[row]:5.2f}  inside {inside[row].sum():2} of 12 {shown}")
        known = ~details.outside
        for text, chosen in (("in the domain", known), ("out of it", ~known)):
            print(f"{chosen.sum()} {text}, {inside[chosen].sum()} of their {inside[chosen].size} values inside")
        print()


def judge() -> Iterator[tuple[str, Details]]:
    """Yield "DFT" and "MMFF94" and what the weights make of the molecules in these geometries."""
    for kind, name in (("dft", "DFT"), ("mmff", "MMFF94")):
        details = evaluate(data=DATA, geometry=kind).details
        assert details is not None
        yield name, details


def find_inside(details: Details) -> NDArray[np.bool_]:
    """Return which references lie inside their intervals [M, 12]."""
    inside: NDArray[np.bool_] = np.abs(details.predictions - details.references) <= details.half_widths
    return inside


if __name__ == "__main__":
    main()
