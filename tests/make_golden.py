"""Write golden.json: what the bundled weights say of a few molecules, to notice when their predictions change.

Run from the repository: python -m tests.make_golden
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden.json"
#: File and records in it.
CHOSEN = {
    "examples/water.xyz": (0,),
    "examples/benzamide.xyz": (0,),
    "examples/dsgdb9nsd_000212.xyz": (0,),
    "examples/three_molecules.sdf": (0, 1),
    "tests/data/qm9_20.extxyz": (0, 3, 10, 14, 19),
}


def predict() -> dict[str, Any]:
    """Return the digest of the bundled weights, their values and half-widths in default units, and their verdicts."""
    from qmprop import load_model
    from qmprop.graph import concatenate
    from qmprop.molecule import Molecule
    from qmprop.readers import read_paths
    from qmprop.targets import DEFAULT_KEYS
    from qmprop.trust import load_trust

    model = load_model(device="cpu")
    trust = load_trust(model)
    records = []
    for name, indices in CHOSEN.items():
        found = list(read_paths(str(ROOT / name)))
        molecules = [found[index] for index in indices]
        if not all(isinstance(molecule, Molecule) for molecule in molecules):
            raise ValueError(f"{name} has a record that is not a molecule")
        outcome = model.run(*concatenate(molecules))
        predictions, judged = outcome.properties(), trust.judge(molecules, outcome.traits)
        widths = trust.half_widths(outcome.traits, [judgment.domain for judgment in judged])
        for row, (index, judgment) in enumerate(zip(indices, judged, strict=True)):
            record = {"source": name, "index": index, "formula": molecules[row].formula}
            record |= {"reasons": list(judgment.domain.reasons), "seen": list(judgment.seen)}
            record["half_widths"] = dict(zip(DEFAULT_KEYS, widths[row].tolist(), strict=True))
            record["properties"] = {key: float(column[row]) for key, column in predictions.items()}
            records.append(record)
    return {"digest": model.digest, "records": records}


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(predict(), indent=1) + "\n", encoding="utf-8")
