"""Does a long pipe stay flat? `python -m tests.benchmarks.pipeline --count 100000` measures it and judges.

Molecules of QM9 are written as an .sdf file, which goes through `cat FILE | qmprop predict - -f jsonl` twice: its
first tenth, then all of it. Memory and speed of the two runs are compared, and the long run is once cut by `head -1`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase.data import chemical_symbols, covalent_radii

from qmprop.datasets import Dataset
from qmprop.molecule import Molecule

MAX_GROWTH = 1.10
MIN_SPEED = 0.90
#: Seconds from the first line `head` has seen to the end of all processes.
MAX_CUT = 5.0
COMMAND = [sys.executable, "-m", "qmprop", "predict", "-", "-f", "jsonl"]


@dataclass(frozen=True)
class Run:
    """What one pipe did.

    Attributes:
        records: Lines that came out.
        errors: Records with the status "error".
        in_order: Whether each had the index that was its turn.
        startup: Seconds until the first line.
        seconds: From the first line to the last.
        resident: Largest resident memory of the process while the lines came, MiB.
        status: Exit status of qmprop.
    """

    records: int
    errors: int
    in_order: bool
    startup: float
    seconds: float
    resident: float
    status: int

    @property
    def rate(self) -> float:
        """Molecules a second, without the start of the program."""
        return self.records / self.seconds


def write_sdf(dataset: Dataset, count: int, path: Path) -> None:
    """Write `count` molecules, from the beginning again if there are fewer, as V2000 records with bonds."""
    with path.open("w", encoding="ascii") as file:
        for number in range(count):
            k = number % len(dataset)
            file.write(format_record(dataset.molecule(k), f"gdb {dataset.ids[k]}"))


def format_record(molecule: Molecule, name: str) -> str:
    """Return one V2000 record; atoms closer than 1.2 times the sum of their covalent radii share a single bond."""
    radii = covalent_radii[molecule.numbers]
    distances = np.linalg.norm(molecule.positions[:, None] - molecule.positions, axis=2)
    bonds = np.argwhere(np.triu(distances < 1.2 * (radii[:, None] + radii), 1)) + 1
    atoms = "".join(
        f"{x:10.4f}{y:10.4f}{z:10.4f} {chemical_symbols[number]:<3} 0  0  0  0  0  0  0  0  0  0  0  0\n"
        for number, (x, y, z) in zip(molecule.numbers.tolist(), molecule.positions.tolist(), strict=True)
    )
    lines = "".join(f"{first:3d}{second:3d}  1  0\n" for first, second in bonds.tolist())
    counts = f"{len(molecule.numbers):3d}{len(bonds):3d}  0  0  0  0  0  0  0  0999 V2000\n"
    return f"{name}\n  qmprop            3D\n\n{counts}{atoms}{lines}M  END\n$$$$\n"


def head(path: Path, count: int) -> Iterator[bytes]:
    """Yield the lines of the first `count` records."""
    with path.open("rb") as file:
        for line in file:
            yield line
            count -= line == b"$$$$\n"
            if count == 0:
                return


def run(path: Path) -> Run:
    """Send a file through the pipe; count what comes out and watch the memory."""
    started = time.monotonic()
    cat = subprocess.Popen(["cat", path], stdout=subprocess.PIPE)
    qmprop = subprocess.Popen(COMMAND, stdin=cat.stdout, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert cat.stdout is not None
    assert qmprop.stdout is not None
    cat.stdout.close()
    samples: list[float] = []
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(qmprop.pid, samples, done))
    records, errors, in_order = 0, 0, True
    first = last = started
    for line in qmprop.stdout:
        last = time.monotonic()
        if records == 0:
            first = last
            watcher.start()
        in_order = in_order and f'"index": {records}, '.encode() in line
        records += 1
        errors += b'"status": "error"' in line
    done.set()
    status = qmprop.wait()
    cat.wait()
    if records:
        watcher.join()
    return Run(records, errors, in_order, first - started, last - first, max(samples, default=0.0), status)


def cut(path: Path) -> tuple[float, str, str]:
    """Return the seconds that `| head -1` takes after its line, that line, and what appeared on stderr."""
    script = 'cat "$1" | { shift; "$@"; } | { head -1; date +%s.%N; }'
    result = subprocess.run(["bash", "-c", script, "bash", path, *COMMAND], capture_output=True, text=True, timeout=600)
    ended = time.time()
    line, _, stamp = result.stdout.strip().rpartition("\n")
    return ended - float(stamp), line, result.stderr


def main() -> int:
    """Measure, print, and return 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000, help="molecules of the long run (default: 100000)")
    count = parser.parse_args().count
    from qmprop.qm9 import load_qm9

    dataset = load_qm9()
    with tempfile.TemporaryDirectory() as folder:
        long, short = Path(folder, "long.sdf"), Path(folder, "short.sdf")
        order = np.random.default_rng(0).permutation(len(dataset))[:count]  # QM9's own order is by size
        write_sdf(dataset.select(order), count, long)
        short.write_bytes(b"".join(head(long, count // 10)))
        runs = {count // 10: run(short), count: run(long)}
        delay, line, errors = cut(long)
    for asked, found in runs.items():
        print(
            f"{asked:>8,} in  {found.records:>8,} out  {found.errors} errors  status {found.status}  "
            f"first record after {found.startup:.1f} s  {found.rate:,.0f} molecules/s  {found.resident:.0f} MiB"
        )
    few, many = runs.values()
    print(f"memory {many.resident / few.resident:.3f}, speed {many.rate / few.rate:.3f} of the short run's")
    print(f"'| head -1' ended {delay:.2f} s after its line")
    checks = {
        "as many records out as in, in order": all(
            found.records == asked and found.in_order for asked, found in runs.items()
        ),
        "every record predicted": all(found.status == 0 and found.errors == 0 for found in runs.values()),
        f"memory within {MAX_GROWTH} of the short run's": many.resident <= MAX_GROWTH * few.resident,
        f"speed at least {MIN_SPEED} of the short run's": many.rate >= MIN_SPEED * few.rate,
        f"'| head -1' gives one whole record, silently, within {MAX_CUT} s": (
            delay < MAX_CUT and errors == "" and json.loads(line)["index"] == 0
        ),
    }
    for what, holds in checks.items():
        print(f"{'ok  ' if holds else 'FAIL'}  {what}")
    return 0 if all(checks.values()) else 1


def _watch(pid: int, samples: list[float], done: threading.Event) -> None:
    while not done.wait(0.1):
        try:
            with open(f"/proc/{pid}/statm") as file:
                samples.append(int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20)
        except OSError:
            return


if __name__ == "__main__":
    sys.exit(main())
