"""Write the GFN2-xTB minima that come with the package into weights/: python -m tests.make_minima

Those of the first molecules of each part of the split, and of the small ones to learn and to calibrate from. What the
cache file lacks is computed, a second of one core for each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from qmprop import geometries
from qmprop.datasets import Dataset
from qmprop.qm9 import find_cache, load_data, split_qm9

#: So many molecules of each part of the split.
SIZES: Final = {"train": 3000, "choose": 800, "calibrate": 1000, "test": geometries.XTB_SIZE}
#: Most heavy atoms of a molecule that is small.
SMALL: Final = 5


def find_rows(data: Dataset) -> NDArray[np.int64]:
    """Return which molecules they are."""
    splits = split_qm9()
    small = [splits[part][data.heavy_atoms[splits[part]] <= SMALL] for part in SIZES if part != "test"]
    return np.unique(np.concatenate([*small, *(splits[part][:size] for part, size in SIZES.items())]))


def main() -> None:
    data = load_data("qm9")
    rows = find_rows(data)
    geometries.load_geometries("xtb", data, rows=rows, progress=lambda done, total: print(f"{done} of {total}"))
    known = geometries._Store(data)
    for file in (*geometries._bundled_files("xtb"), find_cache("qm9-xtb.cache")):
        known.read(file)
    others = np.setdiff1d(np.arange(len(data)), rows)
    known.status[others] = geometries._NOT_TRIED
    known.write(Path(__file__).parents[1] / "weights" / "qm9-xtb.cache")


if __name__ == "__main__":
    main()
