"""1,000 files, 100 of them damaged: `python -m tests.benchmarks.damaged` predicts them and checks every record."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from damaged import WARNINGS, make_folder


def main() -> int:
    """Return 1 if a record is missing, out of order, or gives another reason than it should."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="files (default: 1000)")
    parser.add_argument("--damaged", type=int, default=100, help="damaged ones among them (default: 100)")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        expected = make_folder(Path(folder, "in"), asked.count, asked.damaged)
        command = [sys.executable, "-m", "qmprop", "predict", str(Path(folder, "in")), "-f", "jsonl"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    records = [json.loads(line) for line in result.stdout.splitlines()]
    print(result.stderr, end="")
    found = [(record["source"], [message["code"] for message in record["messages"]][:1]) for record in records]
    wanted = [(path, [code] if code else []) for path, code in expected.items()]
    for got, want in zip(found, wanted, strict=False):
        if got[0] != want[0] or (want[1] and got[1] != want[1]):
            print(f"FAIL  {got} where {want} was expected")
    failed = {path for path, code in expected.items() if code and code not in WARNINGS}
    checks = {
        "a record for every file, in order": [path for path, _ in found] == list(expected),
        "exit status 3": result.returncode == 3,
        "the damaged ones failed, the others did not": failed
        == {record["source"] for record in records if record["status"] == "error"},
        "for the right reasons": all(got == want for got, want in zip(found, wanted, strict=False) if want[1]),
        "ten errors are told, then counted": sum(line.startswith("error: ") for line in result.stderr.splitlines())
        == 10,
    }
    for what, holds in checks.items():
        print(f"{'ok  ' if holds else 'FAIL'}  {what}")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
