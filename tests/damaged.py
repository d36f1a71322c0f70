"""A folder of molecule files, some of them damaged in known ways: what `predict` has to say of each."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

from fakes import SILANE_XYZ
from rdkit import Chem
from samples import read_molecules

from qmprop.molecule import Molecule

SYMBOLS = {1: "H", 6: "C", 7: "N", 8: "O", 9: "F"}
#: Makes something of a good .xyz and a good .sdf text, or a link, at a path.
Make = Callable[[Path, str, str], object]


def _text(change: Callable[[str, str], str]) -> Make:
    return lambda path, xyz, sdf: path.write_text(change(xyz, sdf), encoding="utf-8")


def _bytes(change: Callable[[bytes], bytes]) -> Make:
    return lambda path, xyz, sdf: path.write_bytes(change(xyz.encode()))


def _row(change: Callable[[list[str]], list[str]]) -> Make:
    """Change the columns of the last atom."""

    def apply(xyz: str, sdf: str) -> str:
        *lines, last = xyz.splitlines()
        return "\n".join([*lines, " ".join(change(last.split())), ""])

    return _text(apply)


def _comment(text: str) -> Make:
    return _text(lambda xyz, sdf: "\n".join([xyz.splitlines()[0], text, *xyz.splitlines()[2:], ""]))


def _zip(content: str, cut: int = 0) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("molecule.xyz", content)
    return archive.getvalue()[: len(archive.getvalue()) - cut]


def _replace(old: str, new: str) -> Make:
    return _text(lambda xyz, sdf: sdf.replace(old, new))


#: Ways to damage a file: a name, the suffix, what is done, and the code of the one record that has to come out.
DAMAGES: tuple[tuple[str, str, Make, str], ...] = (
    ("cut in an atom", ".xyz", _text(lambda xyz, sdf: xyz[: xyz.rindex(" ")]), "parse-error"),
    ("cut between atoms", ".xyz", _text(lambda xyz, sdf: xyz[: xyz[:-1].rindex("\n") + 1]), "parse-error"),
    ("cut behind the count", ".xyz", _text(lambda xyz, sdf: xyz[: xyz.index("\n") + 1]), "parse-error"),
    ("empty", ".xyz", _text(lambda xyz, sdf: ""), "empty-file"),
    ("empty sdf", ".sdf", _text(lambda xyz, sdf: ""), "empty-file"),
    ("blank", ".xyz", _text(lambda xyz, sdf: "\n\n\n"), "empty-file"),
    ("noise", ".xyz", _bytes(lambda xyz: random.Random(0).randbytes(500)), "parse-error"),
    ("noise sdf", ".sdf", _bytes(lambda xyz: random.Random(1).randbytes(500)), "parse-error"),
    ("null bytes", ".xyz", _bytes(lambda xyz: bytes(400)), "parse-error"),
    ("too large a count", ".xyz", _text(lambda xyz, sdf: "9" + xyz), "parse-error"),
    ("absurd count", ".xyz", _text(lambda xyz, sdf: "9" * 15 + xyz), "parse-error"),
    ("negative count", ".xyz", _text(lambda xyz, sdf: "-" + xyz), "parse-error"),
    ("count in words", ".xyz", _text(lambda xyz, sdf: "three" + xyz[xyz.index("\n") :]), "parse-error"),
    ("no atoms", ".xyz", _text(lambda xyz, sdf: "0\n\n"), "no-atoms"),
    ("missing element", ".xyz", _row(lambda row: row[1:]), "parse-error"),
    ("missing coordinate", ".xyz", _row(lambda row: row[:-1]), "parse-error"),
    ("decimal comma", ".xyz", _row(lambda row: [row[0], *(x.replace(".", ",") for x in row[1:])]), "parse-error"),
    ("nan", ".xyz", _row(lambda row: [*row[:-1], "nan"]), "non-finite-coordinates"),
    ("infinity", ".xyz", _row(lambda row: [*row[:-1], "-inf"]), "non-finite-coordinates"),
    ("overflow", ".xyz", _row(lambda row: [*row[:-1], "1e999"]), "non-finite-coordinates"),
    ("huge number", ".xyz", _row(lambda row: [*row[:-1], "1e30"]), "coordinates-out-of-range"),
    ("far atom", ".xyz", _row(lambda row: [*row[:-1], "20000"]), "coordinates-out-of-range"),
    ("no element", ".xyz", _row(lambda row: ["Qq", *row[1:]]), "unsupported-element"),
    ("iron", ".xyz", _row(lambda row: ["Fe", *row[1:]]), "unsupported-element"),
    ("silane", ".xyz", _text(lambda xyz, sdf: SILANE_XYZ), "unsupported-element"),
    ("doubled atom", ".xyz", _text(lambda xyz, sdf: _double(xyz)), "atoms-too-close"),
    ("all in one point", ".xyz", _text(lambda xyz, sdf: "3\n\nO 0 0 0\nH 0 0 0\nH 0 0 0\n"), "no-3d-coordinates"),
    ("periodic", ".xyz", _comment('Lattice="9 0 0 0 9 0 0 0 9" pbc="T T T"'), "periodic"),
    ("charged", ".xyz", _comment("charge=1"), "charged"),
    ("utf-16", ".xyz", _bytes(lambda xyz: xyz.decode().encode("utf-16")), "parse-error"),
    ("an sdf called xyz", ".xyz", _text(lambda xyz, sdf: sdf), "parse-error"),
    ("an xyz called sdf", ".sdf", _text(lambda xyz, sdf: xyz), "parse-error"),
    ("html", ".xyz", _text(lambda xyz, sdf: "<html><body>404 Not Found</body></html>\n"), "parse-error"),
    ("sdf without end", ".sdf", _replace("M  END\n", ""), "parse-error"),
    ("sdf cut", ".sdf", _text(lambda xyz, sdf: sdf[: len(sdf) // 2]), "parse-error"),
    ("sdf without counts", ".sdf", _text(lambda xyz, sdf: re.sub(r"(?m)^.*V2000$", "V2000", sdf)), "parse-error"),
    ("sdf drawing", ".sdf", _text(lambda xyz, sdf: _flatten(sdf)), "no-3d-coordinates"),
    ("gzip cut", ".xyz.gz", _bytes(lambda xyz: gzip.compress(xyz)[:-12]), "unreadable"),
    ("gzip damaged", ".xyz.gz", _bytes(lambda xyz: gzip.compress(xyz)[:30] + b"\xff" * 40), "unreadable"),
    ("bzip2 cut", ".xyz.bz2", _bytes(lambda xyz: bz2.compress(xyz)[:-12]), "unreadable"),
    ("xz cut", ".xyz.xz", _bytes(lambda xyz: lzma.compress(xyz)[:-60]), "unreadable"),
    ("gzip twice", ".xyz.gz", _bytes(lambda xyz: gzip.compress(gzip.compress(xyz))), "unknown-format"),
    ("zip cut", ".xyz", _bytes(lambda xyz: _zip(xyz.decode(), cut=30)), "unreadable"),
    ("pdb without atoms", ".pdb", _text(lambda xyz, sdf: "REMARK nothing\nEND\n"), "no-molecules"),
    ("mol2 without atoms", ".mol2", _text(lambda xyz, sdf: "# nothing\n"), "empty-file"),
    ("bad cif", ".cif", _text(lambda xyz, sdf: "data_x\nloop_\n_atom_site_x\n"), "no-molecules"),
    ("bad smiles", ".smi", _text(lambda xyz, sdf: "C1CC(\n"), "bad-smiles"),
    ("dangling link", ".xyz", lambda path, xyz, sdf: path.symlink_to("nowhere.xyz"), "missing-file"),
    ("link to itself", ".xyz", lambda path, xyz, sdf: path.symlink_to(path.name), "unreadable"),
)
#: Of those, damage that does not keep a molecule from being predicted.
WARNINGS = frozenset(["charged"])


def make_folder(folder: Path, count: int, damaged: int) -> dict[str, str | None]:
    """Fill a folder with `count` files, `damaged` of them damaged; return the code to expect by path, sorted."""
    molecules = read_molecules()
    rng = random.Random(0)
    chosen = dict(zip(rng.sample(range(count), damaged), range(damaged), strict=True))
    folder.mkdir(parents=True, exist_ok=True)
    expected: dict[str, str | None] = {}
    for number in range(count):
        molecule = molecules[number % len(molecules)]
        xyz, sdf = to_xyz(molecule), to_sdf(molecule)
        _, suffix, make, code = DAMAGES[chosen[number] % len(DAMAGES)] if number in chosen else GOOD[number % len(GOOD)]
        path = folder / f"{number:05d}{suffix}"
        make(path, xyz, sdf)
        expected[str(path)] = code
    return expected


def to_xyz(molecule: Molecule) -> str:
    """Return the molecule as .xyz text."""
    rows = [
        f"{SYMBOLS[number]} {x:.6f} {y:.6f} {z:.6f}"
        for number, (x, y, z) in zip(molecule.numbers.tolist(), molecule.positions.tolist(), strict=True)
    ]
    return "\n".join([str(len(rows)), "molecule", *rows, ""])


def to_sdf(molecule: Molecule) -> str:
    """Return the molecule as .sdf text."""
    mol: Chem.Mol = Chem.MolFromXYZBlock(to_xyz(molecule))
    mol.SetProp("_Name", "molecule")
    return str(Chem.MolToMolBlock(mol)) + "$$$$\n"


def _double(xyz: str) -> str:
    lines = xyz.splitlines()
    return "\n".join([*lines[:-1], lines[-1].split()[0] + " " + lines[2].partition(" ")[2], ""])


def _flatten(sdf: str) -> str:
    lines = sdf.splitlines()
    count = int(lines[3][:3])
    lines[1] = lines[1][:20].ljust(20) + "2D"
    lines[4 : 4 + count] = [f"{line[:20]}{0.0:10.4f}{line[30:]}" for line in lines[4 : 4 + count]]
    return "\n".join([*lines, ""])


GOOD: tuple[tuple[str, str, Make, str | None], ...] = (
    ("xyz", ".xyz", _text(lambda xyz, sdf: xyz), None),
    ("sdf", ".sdf", _text(lambda xyz, sdf: sdf), None),
    ("gzip", ".xyz.gz", _bytes(gzip.compress), None),
    ("windows", ".xyz", _text(lambda xyz, sdf: xyz.replace("\n", "\r\n")), None),
)
