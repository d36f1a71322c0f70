"""Write the training molecules' SMILES and DFT values into weights/: python -m tests.make_library"""

from __future__ import annotations

from pathlib import Path

from qmprop.library import LIBRARY_FILE, write_library
from qmprop.qm9 import load_data, read_smiles, split_data


def main() -> None:
    data = load_data("qm9")
    rows = split_data(data)["train"]
    write_library(
        Path(__file__).parents[1] / "weights" / LIBRARY_FILE, data, rows, read_smiles(data.ids[rows].tolist())
    )


if __name__ == "__main__":
    main()
