"""Damaged inputs of every format: `python -m tests.fuzz --count 20000` sends them through the whole of `predict`.

Real molecules, written in every format that can be read, are damaged as transfers, editors and scripts damage files.
Whatever comes in: no exception, no wait over ten seconds, one record or more for every file and in order, every record
valid, no NaN in one that claims to be good, and each molecule before the damage predicted as if there were none.
Each input depends on its number and the seed alone; `--first N --count 1 --keep FOLDER` shows a single one again.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import io
import json
import lzma
import math
import random
import resource
import select
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms
from rdkit import Chem

from qmprop.datasets import load_labeled
from qmprop.formats import Failure
from qmprop.inference import predict_pairs
from qmprop.model import Model, load_model
from qmprop.molecule import Molecule
from qmprop.readers import read_file, read_paths
from qmprop.records import MESSAGE_CODES, Record
from qmprop.rows import Layout
from qmprop.targets import PRESETS
from qmprop.writers import create_writer

HERE = Path(__file__).resolve().parent
#: Seconds without a record that count as a hang, and MiB that no input may make the process need.
PATIENCE = 10.0
MAX_MEMORY = 2048
_CHUNK = 50  # inputs of one call
_FORMATS = ("json", "jsonl", "csv", "extxyz", "sdf")
_ASE_FORMATS = {
    "gen": "gen",
    "xsf": "xsf",
    "cif": "cif",
    "traj": "traj",
    "cube": "cube",
    "gro": "gromacs",
    "db": "json",
}
_TOKENS = (
    *(b"nan", b"NaN", b"inf", b"-inf", b"1e400", b"-1e308", b"9" * 30, b"-1", b"0", b"1e", b"1.2*^-6", b"1.5D+02"),
    *(b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xc3", "é".encode(), "\u2028".encode(), b"\t", b"\r", b"\x1a", b"\x1b[2J"),
    *(b"$$$$\n", b"M  END\n", b"V3000", b"V2000", b"@<TRIPOS>ATOM\n", b"ENDMDL\n", b"HETATM", b"Xx", b"Fe", b"C"),
    *(b'Lattice="1 0 0 0 1 0 0 0 1"', b"charge=1", b"Properties=pos:R:3", b'"', b"[", b"{", b"=", b"%", b"#", b","),
)


@dataclass(frozen=True)
class Seed:
    """A good file.

    Attributes:
        suffix: Of its name.
        content: What it holds.
        ends: Where each record ends, for text whose records can be told apart so; empty otherwise.
    """

    suffix: str
    content: bytes
    ends: tuple[int, ...] = ()


@dataclass(frozen=True)
class Case:
    """A damaged file and how many records at its beginning are whole."""

    name: str
    content: bytes
    seed: Seed
    whole: int


@cache
def make_seeds() -> tuple[Seed, ...]:
    """Return good files in every format, from twenty molecules of QM9."""
    dataset = load_labeled(HERE / "data" / "qm9_20.extxyz")
    molecules = [dataset.molecule(k) for k in range(0, 20, 5)]
    frames = [Atoms(m.numbers, m.positions, info={"name": m.name or f"molecule {k}"}) for k, m in enumerate(molecules)]
    mols = [_to_rdkit(molecule, f"molecule {k}") for k, molecule in enumerate(molecules)]
    smiles = [f"{text} {name}\n".encode() for text, name in (("CCO", "ethanol"), ("c1ccoc1", "furan"), ("C#N", "hcn"))]
    seeds = [
        _join(".xyz", (_to_xyz(atoms, atoms.info["name"]) for atoms in frames)),
        _join(".extxyz", (_write(atoms, "extxyz") for atoms in frames)),
        _join(".sdf", (Chem.MolToMolBlock(mol).encode() + b"> <id>\n7\n\n$$$$\n" for mol in mols)),
        _join(".sdf", (Chem.MolToV3KMolBlock(mol).encode() + b"$$$$\n" for mol in mols)),
        _join(".smi", smiles),
        Seed(".mol", Chem.MolToMolBlock(mols[1]).encode()),
        Seed(".csv", b"id,smiles\n" + b"".join(b"%d,%s\n" % (k, line.split()[0]) for k, line in enumerate(smiles))),
        Seed(".pdb", Chem.MolToPDBBlock(mols[2]).encode()),
        Seed(".mol2", _to_mol2(molecules[1])),
    ]
    seeds += [Seed(f".{suffix}", _write(frames[-1], name)) for suffix, name in _ASE_FORMATS.items()]
    packed = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    seeds += [Seed(seed.suffix + ending, pack(seed.content)) for ending, pack in packed.items() for seed in seeds[:3]]
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for number, seed in enumerate(seeds[:4]):
            file.writestr(f"{number}{seed.suffix}", seed.content)
    return (*seeds, Seed(".zip", archive.getvalue()))


def make_case(number: int, seed: int = 0) -> Case:
    """Return an input; the same number and seed give the same one."""
    rng = random.Random(f"{seed} {number}")
    good = rng.choice(make_seeds())
    content, first = good.content, len(good.content)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        content, position = rng.choice(_MUTATIONS)(rng, content)
        first = min(first, position)
    suffix = good.suffix
    if rng.random() < 0.1:
        suffix, first = rng.choice(["", ".xyz", ".sdf", ".log", ".pdb", ".smi", ".gz", ".out", ".csv"]), 0
    return Case(f"{number:06d}{suffix}", content, good, sum(end <= first for end in good.ends))


def check_inputs(numbers: Iterable[int], seed: int, folder: Path, model: Model, on_record: Callable[[], None]) -> None:
    """Predict the inputs as one stream; raise AssertionError where the outcome is not what it has to be."""
    cases = [make_case(number, seed) for number in numbers]
    for case in cases:
        (folder / case.name).write_bytes(case.content)
    paths = [str(folder / case.name) for case in cases]
    try:
        answers = _predict(paths, model, on_record)
    finally:
        for path in paths:
            Path(path).unlink()
    found: dict[str, list[tuple[Molecule | Failure, Record]]] = {path: [] for path in paths}
    order = []
    for item, record in answers:
        path = record.source if record.source in found else _archive_of(record.source, paths)
        found[path].append((item, record))
        order.append(paths.index(path))
    assert order == sorted(order), "records are out of order"
    problems = []
    for case, path in zip(cases, paths, strict=True):
        try:
            _check_records(case, [record for _, record in found[path]])
        except AssertionError as error:
            problems.append(f"{case.name}: {error}")
    assert not problems, "; ".join(problems)


def run(
    count: int, *, first: int = 0, seed: int = 0, patience: float = PATIENCE, keep: Path | None = None
) -> tuple[int, list[str]]:
    """Check inputs in a process that is ended when it hangs; return how many were checked and what went wrong."""
    failures: list[str] = []
    number, last = first, first + count
    while number < last:
        number, failure = _watch(number, last, seed, patience)
        if failure:
            failures.append(failure)
            print(failure, flush=True)
        if failure and keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            for case in (make_case(k, seed) for k in range(number - _CHUNK, min(number, last))):
                (keep / case.name).write_bytes(case.content)
    return count, failures


def _predict(paths: list[str], model: Model, on_record: Callable[[], None]) -> list[tuple[Molecule | Failure, Record]]:
    def read() -> Iterator[Molecule | Failure]:
        for item in read_paths(paths):
            on_record()
            yield item

    layout = Layout(PRESETS["ev"])
    writers = {name: create_writer(name, layout) for name in _FORMATS}
    for writer in writers.values():
        writer.begin()
    answers = []
    for item, record in predict_pairs(read(), weights=model):
        on_record()
        for name, writer in writers.items():
            text = writer.write(record, item if isinstance(item, Molecule) else None)
            (text if isinstance(text, bytes) else text.encode()).decode()
            if name == "jsonl":
                assert json.loads(text) == record.to_dict(), f"{record.source}: jsonl is not the record"
        answers.append((item, record))
    return answers


def _check_records(case: Case, records: list[Record]) -> None:
    assert records, "no record"
    sources = dict.fromkeys(record.source for record in records)
    for source in sources:
        indices = [record.index for record in records if record.source == source]
        assert indices == list(range(len(indices))), f"indices {indices}"
    for record in records:
        assert record.status in ("ok", "warning", "error"), record.status
        assert (record.status == "error") == (not record.properties), f"{record.status} with {record.properties}"
        assert (record.status == "ok") == (not record.messages), f"{record.status} with {record.messages}"
        for message in record.messages:
            assert message.code in MESSAGE_CODES, message.code
            assert message.text, message.code
            assert message.text.isprintable(), repr(message.text)
        for key, value in record.properties.items():
            assert math.isfinite(value.value), f"{key} is {value.value}"
    expected = _read_seed(case.seed)[: case.whole]
    got = [(record.name, record.natoms) for record in records[: case.whole] if record.status != "error"]
    assert got == expected, f"before the damage were {expected}, not {got}: {records[: case.whole]}"


@cache
def _read_seed(seed: Seed) -> list[tuple[str | None, int]]:
    """Return name and size of the records in a good file whose records can be told apart."""
    if not seed.ends:
        return []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"seed{seed.suffix}")
        path.write_bytes(seed.content)
        found = list(read_file(path))
    assert all(isinstance(item, Molecule) for item in found), found
    assert len(found) == len(seed.ends)
    return [(item.name, len(item.numbers)) for item in found if isinstance(item, Molecule)]


def _archive_of(source: str, paths: list[str]) -> str:
    return next(path for path in paths if source == path or source.startswith(f"{path}/"))


# --- damage -----------------------------------------------------------------------------------------------------------

Mutation = Callable[[random.Random, bytes], tuple[bytes, int]]


def _cut(rng: random.Random, content: bytes) -> tuple[bytes, int]:
    position = rng.randint(0, len(content))
    return content[:position], position


def _flip(rng: random.Random, content: bytes) -> tuple[bytes, int]:
    if not content:
        return content, 0
    position = rng.randrange(len(content))
    return content[:position] + bytes([content[position] ^ 1 << rng.randrange(8)]) + content[position + 1 :], position


def _remove(rng: random.Random, content: bytes) -> tuple[bytes, int]:
    position = rng.randint(0, len(content))
    return content[:position] + content[position + rng.choice((1, 2, 10, 100, 500)) :], position


def _insert(rng: random.Random, content: bytes) -> tuple[bytes, int]:
    position = rng.randint(0, len(content))
    return content[:position] + rng.choice(_TOKENS) + content[position:], position


def _insert_noise(rng: random.Random, content: bytes) -> tuple[bytes, int]:
    position = rng.randint(0, len(content))
    return content[:position] + rng.randbytes(rng.choice((1, 4, 50, 1000))) + content[position:], position


def _replace_word(rng: random.Random, content: bytes) -> tuple[bytes, int]:
    words = content.split(b" ")
    k = rng.randrange(len(words))
    position = len(b" ".join(words[:k]))
    return b" ".join([*words[:k], rng.choice(_TOKENS), *words[k + 1 :]]), position


def _damage_line(rng: random.Random, content: bytes) -> tuple[bytes, int]:
    lines = content.splitlines(keepends=True)
    if len(lines) < 2:
        return content, 0
    first, second = sorted(rng.sample(range(len(lines)), 2))
    position = len(b"".join(lines[:first]))
    match rng.randrange(5):
        case 0:
            lines[first], lines[second] = lines[second], lines[first]
        case 1:
            del lines[first]
        case 2:
            lines[first:first] = [lines[second]] * rng.choice((1, 2, 50))
        case 3:
            lines[first] = lines[first].rstrip(b"\r\n")
        case 4:
            lines[first] = lines[first].replace(b" ", b"\t") + b"\n" * rng.choice((1, 5, 200))
    return b"".join(lines), position


def _recode(rng: random.Random, content: bytes) -> tuple[bytes, int]:
    """The same text with other line ends or in another encoding, or twice."""
    match rng.randrange(6):
        case 0:
            return content.replace(b"\n", b"\r\n"), 0
        case 1:
            return content.replace(b"\n", b"\r"), 0
        case 2:
            return b"\xef\xbb\xbf" + content, 0
        case 3:
            return content.decode("latin-1").encode("utf-16"), 0
        case 4:
            return gzip.compress(content), 0
    return content + content, len(content)


def _replace_all(rng: random.Random, content: bytes) -> tuple[bytes, int]:
    return rng.choice((b"", b"\n", b"0\n\n", b" " * 5000, rng.randbytes(300), b"3\n", b"9" * 5000, b"{" * 5000)), 0


_MUTATIONS: tuple[Mutation, ...] = (
    *(_cut, _flip, _flip, _remove, _insert, _insert, _insert_noise),
    *(_replace_word, _replace_word, _damage_line, _damage_line, _recode, _replace_all),
)


# --- good files -------------------------------------------------------------------------------------------------------


def _join(suffix: str, parts: Iterable[bytes]) -> Seed:
    texts = list(parts)
    return Seed(suffix, b"".join(texts), tuple(np.cumsum([len(text) for text in texts]).tolist()))


def _to_xyz(atoms: Atoms, title: str) -> bytes:
    lines = [f"{s} {x:.6f} {y:.6f} {z:.6f}" for s, (x, y, z) in zip(atoms.symbols, atoms.positions, strict=True)]
    return "\n".join([str(len(atoms)), title, *lines, ""]).encode()


def _write(atoms: Atoms, name: str) -> bytes:
    if name in ("gromacs", "cif"):
        atoms = atoms.copy()
        atoms.cell = [9.0, 9.0, 9.0]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ase.io.write(Path(folder, "x"), atoms, format=name)
        return Path(folder, "x").read_bytes()


def _to_rdkit(molecule: Molecule, title: str) -> Chem.Mol:
    mol = Chem.RWMol()
    conformer = Chem.Conformer(len(molecule.numbers))
    for k, (number, position) in enumerate(zip(molecule.numbers.tolist(), molecule.positions.tolist(), strict=True)):
        mol.AddAtom(Chem.Atom(number))
        conformer.SetAtomPosition(k, position)
    mol.AddConformer(conformer)
    mol.SetProp("_Name", title)
    return mol.GetMol()


def _to_mol2(molecule: Molecule) -> bytes:
    symbols = [Chem.GetPeriodicTable().GetElementSymbol(number) for number in molecule.numbers.tolist()]
    rows = [
        f"{k} {symbol}{k} {x:.4f} {y:.4f} {z:.4f} {symbol}"
        for k, (symbol, (x, y, z)) in enumerate(zip(symbols, molecule.positions.tolist(), strict=True), start=1)
    ]
    head = ["@<TRIPOS>MOLECULE", "molecule", f"{len(rows)} 0", "SMALL", "NO_CHARGES", "", "@<TRIPOS>ATOM"]
    return "\n".join([*head, *rows, ""]).encode()


# --- the process that is watched --------------------------------------------------------------------------------------


def _watch(first: int, last: int, seed: int, patience: float) -> tuple[int, str]:
    """Run a worker; return where it stopped and why, or `last` and "" if all went well."""
    command = [sys.executable, __file__, "--worker", "--first", str(first), "--count", str(last - first)]
    worker = subprocess.Popen([*command, "--seed", str(seed)], stdout=subprocess.PIPE, bufsize=0)
    assert worker.stdout is not None
    reached, rest, allowed = first, b"", 120.0  # until the first sign of life: imports
    try:
        while True:
            if not select.select([worker.stdout], [], [], allowed)[0]:
                return reached + _CHUNK, f"{reached} to {reached + _CHUNK - 1}: no record for {patience:.0f} s"
            data = worker.stdout.read(65536)
            if not data:
                break
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if line.startswith(b"failed "):
                    return reached + _CHUNK, f"{reached} to {reached + _CHUNK - 1}: {line[7:].decode()}"
                if line.startswith(b"done "):
                    reached = int(line[5:])
            allowed = patience
    finally:
        worker.kill()
        status = worker.wait()
    if reached < last:
        return reached + _CHUNK, f"{reached} to {reached + _CHUNK - 1}: the process died with status {status}"
    return last, ""


def _work(first: int, count: int, seed: int) -> int:
    model = load_model(device="cpu")
    said = 0.0

    def report() -> None:
        nonlocal said
        if time.monotonic() > said + 0.5:
            said = time.monotonic()
            print(".", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        for start in range(first, first + count, _CHUNK):
            numbers = range(start, min(start + _CHUNK, first + count))
            try:
                check_inputs(numbers, seed, Path(folder), model, report)
                memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
                assert memory < MAX_MEMORY, f"{memory} MiB of memory"
            except Exception as error:
                traceback.print_exc()
                print(f"failed {type(error).__name__}: {' '.join(str(error).split())[:500]}", flush=True)
                return 1
            print(f"done {numbers.stop}", flush=True)
    return 0


def main() -> int:
    """Check inputs and return 1 if one was not answered as it has to be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000, help="how many inputs (default: 20000)")
    parser.add_argument("--first", type=int, default=0, help="number of the first input (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (default: 0)")
    parser.add_argument("--patience", type=float, default=PATIENCE, help="seconds that count as a hang (default: 10)")
    parser.add_argument("--keep", type=Path, help="write the inputs of failed calls into this folder")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        return _work(asked.first, asked.count, asked.seed)
    started = time.monotonic()
    count, failures = run(asked.count, first=asked.first, seed=asked.seed, patience=asked.patience, keep=asked.keep)
    print(f"{count:,} inputs in {time.monotonic() - started:,.0f} s: {len(failures)} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
