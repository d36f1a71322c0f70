"""The text of .mol2 and .pdb files to molecules, one record at a time."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from typing import Final

import numpy as np

from qmprop.formats import MAX_RECORD, MIN_LINE, Failure, atomic_numbers, clean_name, parse_coordinate, quote
from qmprop.molecule import Molecule
from qmprop.records import Message
from qmprop.streams import Lines, ParseError

_MOLECULE: Final = "@<TRIPOS>MOLECULE"
_SYMBOL: Final = re.compile(r"[A-Z][a-z]?")
_GAFF: Final = re.compile(r"cl|br|[a-z]")  # its atom types are in lower case and begin with the element
_PDB_CHARGE: Final = re.compile(r"(\d)([+-])")
#: The cell that stands in files of structures without one.
_NO_CELL: Final = re.compile(r"CRYST1\s+(1\.0+\s+){3}(90\.0+\s*){3}|CRYST1\s+(0\.0+\s+){3}")


def read_mol2(lines: Lines, source: str) -> Iterator[Molecule | Failure]:
    """Yield every record of a .mol2 text; positions in Å, the charge from the sum of the atoms' partial charges.

    Damage stays within its record: that one is a `Failure`, the next is read.

    Raises:
        ParseError: The text is damaged beyond the record; what came before has been yielded.
    """
    index = 0
    for first, block in _split(lines, before=re.compile(re.escape(_MOLECULE))):
        if not block[0].startswith(_MOLECULE):
            if any(line.strip() and not line.startswith("#") for line in block):
                raise ParseError(f"line {first}: expected '{_MOLECULE}'")
            continue
        name = clean_name(block[1]) if len(block) > 1 else None
        try:
            yield _parse_mol2(block, first, name, source, index)
        except ParseError as error:
            yield Failure(source, index, Message("parse-error", str(error)), name)
        index += 1


def read_pdb(lines: Lines, source: str) -> Iterator[Molecule | Failure]:
    """Yield every model of a .pdb text, parsed by ASE; positions in Å.

    A model ends with ENDMDL or END. Damage stays within its model: that one is a `Failure`, the next is read.

    Raises:
        ParseError: A line or model is too long; what came before has been yielded.
    """
    index = 0
    head: list[str] = []
    for first, block in _split(lines, after=re.compile(r"ENDMDL|END\s*$")):
        start = next((number for number, line in enumerate(block) if line.startswith("MODEL ")), None)
        if start is None and not any(line.startswith(("ATOM", "HETATM")) for line in block):
            continue
        if not any(line.startswith("CRYST1") for line in block):
            block = [*head, *block]  # the cell before the first model is that of all
        elif start is not None:
            head = [line for line in block[:start] if line.startswith(("CRYST1", "ORIGX"))]
        yield _parse_pdb(block, f"lines {first}-{lines.number}", source, index)
        index += 1
    if index == 0 and lines.number:
        yield Failure(source, 0, Message("no-molecules", "The file holds no ATOM or HETATM lines."))


def _split(
    lines: Lines, *, before: re.Pattern[str] | None = None, after: re.Pattern[str] | None = None
) -> Iterator[tuple[int, list[str]]]:
    """Yield the text in blocks, cut before or after the lines that match, and the number of their first lines."""
    block: list[str] = []
    first, size = 1, 0
    while line := lines.next():
        if before is not None and block and before.match(line):
            yield first, block
            first, block, size = lines.number, [], 0
        block.append(line)
        size += max(len(line), MIN_LINE)
        if size > MAX_RECORD:
            raise ParseError(f"line {lines.number}: the record is too long; is its end missing?")
        if after is not None and after.match(line):
            yield first, block
            first, block, size = lines.number + 1, [], 0
    if block:
        yield first, block


def _parse_mol2(block: list[str], first: int, name: str | None, source: str, index: int) -> Molecule:
    sections: dict[str, list[tuple[int, str]]] = {}
    rows: list[tuple[int, str]] = []
    for number, line in enumerate(block, start=first):
        if line.startswith("@<TRIPOS>"):
            rows = sections.setdefault(line[9:].strip(), [])
        elif sections and not line.startswith("#"):
            rows.append((number, line))
    head = [line.split() for _, line in sections.get("MOLECULE", [])]
    atoms = [(number, line.split()) for number, line in sections.get("ATOM", []) if line.strip()]
    numbers, positions, charges = [], [], [0.0]
    for number, row in atoms:
        if len(row) < 6:
            raise ParseError(f"line {number}: expected 6 columns (id name x y z type), found {len(row)}")
        numbers.append(_find_element(row[5], row[1], number))
        positions.append([parse_coordinate(entry, number) for entry in row[2:5]])
        if len(row) > 8:
            charges.append(parse_coordinate(row[8], number))
    announced = head[1][0] if len(head) > 1 and head[1] else "?"
    if announced != str(len(atoms)):
        last = first + len(block) - 1
        raise ParseError(f"lines {first}-{last}: {announced} atoms are announced, {len(atoms)} are there")
    charge = 0.0 if len(head) > 3 and head[3][:1] == ["NO_CHARGES"] else sum(charges)
    return Molecule(
        np.array(numbers, dtype=np.int64),
        np.array(positions, dtype=np.float64).reshape(-1, 3),
        name=None if name == "*****" else name,
        source=source,
        index=index,
        charge=round(charge) if abs(charge) < 1_000 else 0,
        periodic=bool(sections.get("CRYSIN")),
    )


def _find_element(kind: str, name: str, line_number: int) -> int:
    """Return the atomic number of a SYBYL (C.ar), GAFF (ca) or other atom type."""
    table = atomic_numbers()
    symbol = kind.partition(".")[0]
    if _SYMBOL.fullmatch(symbol) and symbol in table:
        return table[symbol]
    gaff = _GAFF.match(kind)
    if gaff is not None and gaff[0].capitalize() in table:
        return table[gaff[0].capitalize()]
    letters = re.match(r"[A-Za-z]*", name)
    label = letters[0].capitalize() if letters else ""
    found = table.get(label[:2], table.get(label[:1]))
    if found is None:
        raise ParseError(f"line {line_number}: expected an atom type, found {quote(kind)}")
    return found


def _parse_pdb(block: list[str], where: str, source: str, index: int) -> Molecule | Failure:
    from ase.io.proteindatabank import read_proteindatabank

    charge = 0
    kept = []
    for line in block:
        if line.startswith(("ATOM", "HETATM")):
            found = _PDB_CHARGE.fullmatch(line[78:80])
            charge += int(found[2] + found[1]) if found else 0
        if not (_NO_CELL.match(line) or line.startswith("END")):
            kept.append(line)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            atoms = read_proteindatabank(io.StringIO("".join(kept)), read_arrays=False)
    except Exception as error:  # ASE has no common base class for its errors
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return Failure(source, index, Message("parse-error", f"{where}: not valid PDB: {reason}"))
    return Molecule(
        atoms.numbers,
        atoms.positions,
        source=source,
        index=index,
        charge=charge,
        periodic=bool((atoms.pbc & atoms.cell.array.any(axis=1)).any()),
    )
