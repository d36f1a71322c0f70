"""The text of .xyz and MDL files to molecules, one record at a time."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from qmprop.molecule import Molecule
from qmprop.records import Message
from qmprop.streams import Lines, ParseError

if TYPE_CHECKING:
    from rdkit.Chem import Mol

#: A record of more characters is taken for a file without record ends. A line counts as `MIN_LINE` at least, for each
#: needs memory of its own.
MAX_RECORD: Final = 16_000_000
MIN_LINE: Final = 64
#: Longer MDL records (characters) do not keep their text.
MAX_ORIGIN: Final = 1_000_000
#: A frame of more atoms is a damaged count, or nothing the network could take.
MAX_FRAME: Final = 1_000_000
#: A longer comment is prose, not the name of the molecule.
MAX_NAME: Final = 100
_CHUNK: Final = 256  # atom lines taken at once, so that a wrong atom count cannot fill the memory

_QM9_COMMENT: Final = re.compile(r"(gdb)\s+(\d+)(?:\s+[-+.\d]\S*){3}")
_QM9_TRAILER: Final = 3  # lines after the atoms: frequencies, SMILES, InChI
_V3000_ATOM: Final = re.compile(r"^(M  V30 +\d+ +[A-Za-z]\w* +)[-+.\deE]+ +[-+.\deE]+ +[-+.\deE]+(?= )")
_INTEGER: Final = re.compile(r"[+-]?\d{1,3}(\.0*)?", re.ASCII)
_LABEL: Final = re.compile(r"([A-Za-z]{1,3})\d*")
#: key=value, value plain, quoted or in brackets; an open quote or bracket extends to the end, as in ASE.
_PAIR: Final = re.compile(
    r"""(?<![^\s,;])([A-Za-z_][\w.-]*+)\s*+=\s*+
    ("(?:[^"\\]|\\.)*+(?:"|\\?$) | '[^']*+(?:'|$) | \{[^}]*+(?:\}|$)
    | \[(?:[^][]|\[[^][]*+(?:\]|$))*+(?:\]|$) | [^\s"'{[]\S*+)""",
    re.VERBOSE,
)


@dataclass(frozen=True, slots=True)
class Failure:
    """One input record, or a whole input, that could not be read.

    Attributes:
        source: The path as given or found; "-" for stdin.
        index: Position within the source at which reading failed, from 0.
        message: What is wrong.
        name: The record's own name, as far as it is known.
    """

    source: str
    index: int
    message: Message
    name: str | None = None


def read_xyz(lines: Lines, source: str) -> Iterator[Molecule | Failure]:
    """Yield every frame of an .xyz, extended .xyz or raw QM9 .xyz text; positions in Å.

    A frame with a symbol that is no element is a `Failure` of its own; at any other damage reading ends.

    Raises:
        ParseError: The text is damaged; what came before has been yielded.
    """
    trailer = 0
    for index in itertools.count():
        count = _read_atom_count(lines, trailer)
        if count is None:
            return
        comment = lines.next()
        trailer = _QM9_TRAILER if _QM9_COMMENT.match(comment) else 0
        yield _read_frame(lines, count, _Comment.parse(comment), source, index)


def read_mdl(lines: Lines, source: str) -> Iterator[Molecule | Failure]:
    """Yield every record of an .sdf or .mol text, V2000 or V3000; positions in Å, no hydrogen added.

    Damage stays within its record: that one is a `Failure`, the next is read.

    Raises:
        ParseError: The text is damaged beyond the record; what came before has been yielded.
    """
    for index, block in enumerate(_split_mdl(lines)):
        name = clean_name(block.lines[0]) if block.lines else None
        found = _parse_molblock(block, source, index, name) if not block.error else block.error
        yield found if isinstance(found, Molecule) else Failure(source, index, Message(*found), name)


def from_rdkit(mol: Mol, *, source: str, index: int) -> Molecule | Failure:
    """Return the molecule in the first conformer of an RDKit `Mol`, positions in Å, no hydrogen added.

    Without a conformer, or with one that RDKit marks as a flat drawing, it is a `Failure` (no-3d-coordinates).
    """
    name = clean_name(mol.GetProp("_Name")) if mol.HasProp("_Name") else None
    if mol.GetNumAtoms() and not mol.GetNumConformers():
        return Failure(source, index, Message("no-3d-coordinates", "The molecule has no conformer."), name)
    if mol.GetNumAtoms() and not mol.GetConformer().Is3D() and _is_flat(mol):
        return Failure(source, index, Message("no-3d-coordinates", "The conformer is a 2D drawing."), name)
    return _convert_rdkit(mol, source, index, name)


def move_mdl(text: str, positions: NDArray[np.float64]) -> str | None:
    """Return an MDL record with other coordinates, in Å [n, 3], and all else as it was; None if that cannot be done."""
    lines = text.split("\n")
    kind = lines[3].rstrip()[-5:] if len(lines) > 3 else ""
    if kind == "V3000":
        around = {
            row: (found[1], line[found.end() :]) for row, line in enumerate(lines) if (found := _V3000_ATOM.match(line))
        }
        form = "{:.6f} {:.6f} {:.6f}"
    elif kind == "V2000" and lines[3][:3].strip().isdigit():
        around = {row: ("", line[30:]) for row, line in enumerate(lines[4 : 4 + int(lines[3][:3])], start=4)}
        form = "{:10.4f}{:10.4f}{:10.4f}"
    else:
        return None
    if len(around) != len(positions):
        return None
    for (row, (before, behind)), xyz in zip(around.items(), positions.tolist(), strict=True):
        lines[row] = before + form.format(*xyz) + behind
    return "\n".join(lines)


def clean_name(text: str) -> str | None:
    """Return a title on one line without control characters, or None if nothing is left."""
    name = " ".join(text.split())
    return (name if name.isprintable() else "".join(c if c.isprintable() else "\ufffd" for c in name)) or None


@functools.cache
def atomic_numbers() -> dict[str, int]:
    """Return the atomic number of every element symbol, in any case, and of every atomic number as text."""
    from ase.data import chemical_symbols

    table = {str(number): number for number in range(len(chemical_symbols))}
    for number, symbol in enumerate(chemical_symbols):
        table |= dict.fromkeys((symbol, symbol.lower(), symbol.upper()), number)
    return table


@dataclass(frozen=True, slots=True)
class _Comment:
    """What the comment line of a frame says.

    `columns` holds the column of the element and the first of the three coordinates.
    """

    name: str | None = None
    charge: int = 0
    periodic: bool = False
    columns: tuple[int, int] = (0, 1)

    @classmethod
    def parse(cls, text: str) -> _Comment:
        if qm9 := _QM9_COMMENT.match(text):
            return cls(name=f"{qm9[1]} {qm9[2]}")
        pairs = {key.lower(): _unquote(value) for key, value in _PAIR.findall(text)} if "=" in text else {}
        if not pairs:
            name = clean_name(text)  # "key: value", as xtb writes it, is no name either
            return cls(name=name if name and len(name) <= MAX_NAME and not re.match(r"\S+:\s", name) else None)
        charge = pairs.get("charge", "")
        return cls(
            name=clean_name(pairs.get("name", "")),
            charge=int(float(charge)) if _INTEGER.fullmatch(charge) else 0,
            periodic=_is_periodic(pairs.get("lattice"), pairs.get("pbc", "")),
            columns=_find_columns(pairs.get("properties", "")) or (0, 1),
        )


def _unquote(value: str) -> str:
    if value[0] == '"':
        return re.sub(r"\\(.)", r"\1", value[1:].removesuffix('"')).strip()
    return value[1:].rstrip("']}").strip() if value[0] in "'{[" else value


def _is_periodic(lattice: str | None, pbc: str) -> bool:
    """Whether nine finite numbers, not all zero, make a lattice and `pbc` does not switch all directions off."""
    if lattice is None:
        return False
    try:
        vectors = np.array([float(entry) for entry in re.findall(r"[^\s,\[\]{}]+", lattice)])
    except ValueError:
        return False
    flags = re.findall(r"[^\s,\[\]{}]+", pbc.lower())
    switched_off = bool(flags) and all(flag in ("f", "false", "0") for flag in flags)
    return len(vectors) == 9 and bool(np.isfinite(vectors).all() and vectors.any()) and not switched_off


def _find_columns(properties: str) -> tuple[int, int] | None:
    """Return the columns of element and x that `Properties=name:type:width:...` declares; None if it does not."""
    fields = properties.split(":")
    element = position = None
    column = 0
    for name, kind, width in zip(fields[::3], fields[1::3], fields[2::3], strict=False):
        if not re.fullmatch(r"[1-9]\d{0,3}", width, re.ASCII):
            return None
        match name.lower(), kind.upper(), width:
            case ("species", "S", "1") | ("z" | "numbers", "I", "1") if element is None:
                element = column
            case ("pos" | "positions", "R", "3"):
                position = column
        column += int(width)
    return None if len(fields) % 3 or element is None or position is None else (element, position)


def _read_atom_count(lines: Lines, trailer: int) -> int | None:
    """Take the next frame's atom count, skipping blank lines and up to `trailer` others; None at the end."""
    while line := lines.next():
        text = line.strip().lstrip("\ufeff")
        if text.isascii() and text.isdigit() and len(text) <= 18:
            return int(text)
        if not text:
            continue
        if trailer == 0:
            raise ParseError(f"line {lines.number}: expected the number of atoms, found {quote(text)}")
        trailer -= 1
    return None


def _read_frame(lines: Lines, count: int, comment: _Comment, source: str, index: int) -> Molecule | Failure:
    numbers: list[int | str] = []
    positions: list[float] = []
    columns = comment.columns
    while len(numbers) < count:
        first = lines.number + 1
        chunk = lines.take(min(count - len(numbers), _CHUNK))
        if len(numbers) + len(chunk) > MAX_FRAME:
            raise ParseError(f"line {lines.number}: the frame has more than {MAX_FRAME:,} atoms")
        if not chunk:
            raise ParseError(f"line {lines.number}: the text ends after {len(numbers)} of {count} atoms")
        try:
            atoms = _parse_atoms(chunk, columns, first)
        except ParseError:
            if columns == (0, 1) or numbers:
                raise
            columns = (0, 1)  # the comment is wrong about the columns; a frame is read whatever it says
            atoms = _parse_atoms(chunk, columns, first)
        numbers += atoms[0]
        positions += atoms[1]
    unknown = next((number for number in numbers if isinstance(number, str)), None)
    if unknown is not None:
        return Failure(
            source, index, Message("unsupported-element", f"{quote(unknown)} is not an element."), comment.name
        )
    return Molecule(
        np.array(numbers, dtype=np.int64),
        np.array(positions, dtype=np.float64).reshape(-1, 3),
        name=comment.name,
        source=source,
        index=index,
        charge=comment.charge,
        periodic=comment.periodic,
    )


def _parse_atoms(chunk: list[str], columns: tuple[int, int], first: int) -> tuple[list[int | str], list[float]]:
    """Return the atomic number, or the symbol if it is no element, of each line and its coordinates, flat."""
    element, x = columns
    table = atomic_numbers()
    rows = [line.split() for line in chunk]
    try:
        numbers: list[int | str] = [table[row[element]] for row in rows]
        positions = [float(entry) for row in rows for entry in row[x : x + 3]]
    except (KeyError, IndexError, ValueError):
        pass
    else:
        if len(positions) == 3 * len(rows) and "_" not in "".join(chunk):
            return numbers, positions
    numbers, positions = [], []
    for line_number, row in enumerate(rows, start=first):
        if len(row) < max(element + 1, x + 3):
            expected = max(element + 1, x + 3)
            raise ParseError(f"line {line_number}: expected {expected} columns (element x y z), found {len(row)}")
        numbers.append(_parse_element(row[element], line_number))
        positions += [parse_coordinate(entry, line_number) for entry in row[x : x + 3]]
    return numbers, positions


def _parse_element(text: str, line_number: int) -> int | str:
    table = atomic_numbers()
    if text in table:
        return table[text]
    if text.isascii() and text.isdigit() and len(text) < 5:
        return text
    label = _LABEL.fullmatch(text)  # C1 is the first carbon
    if label is None:
        raise ParseError(f"line {line_number}: expected an element, found {quote(text)}")
    return table.get(label[1].capitalize(), text)


def parse_coordinate(text: str, line_number: int) -> float:
    """Read a number; QM9 writes 1.2*^-6 for 1.2e-6, Fortran 1.2D-6.

    Raises:
        ParseError: It is none.
    """
    try:
        return float(re.sub(r"\*\^|(?<=[\d.])[dD](?=[-+\d])", "e", text).replace("_", "?"))
    except ValueError:
        raise ParseError(f"line {line_number}: expected a coordinate, found {quote(text)}") from None


def quote(text: str) -> str:
    """Return a piece of the input for a message."""
    return repr(text if len(text) <= 40 else text[:37] + "...")


@dataclass(frozen=True, slots=True)
class _Block:
    """One MDL record.

    Attributes:
        lines: Its lines up to `M  END`.
        first: Number of the first.
        fields: Its data fields; None if they are too long to be kept.
        error: Code and text of what is wrong with it, if anything.
    """

    lines: list[str]
    first: int
    fields: list[str] | None
    error: tuple[str, str] | None = None


def _split_mdl(lines: Lines) -> Iterator[_Block]:
    """Yield the records between lines of `$$$$`; text that belongs to none is an erroneous record."""
    while True:
        first, size = lines.number + 1, 0
        block: list[str] = []
        fields: list[str] = []
        ended, has_fields, stray = False, False, 0
        while (line := lines.next()) and not line.startswith("$$$$"):
            size += max(len(line), MIN_LINE)
            if not ended:
                block.append(line)
                ended = line.startswith("M  END")
                if size > MAX_RECORD:
                    raise ParseError(f"line {lines.number}: the record is too long; is its end missing?")
                continue
            has_fields = has_fields or line.startswith(">")
            if line.startswith("M  END") or not (has_fields or line.isspace()):
                stray = stray or lines.number
            if has_fields and not stray and size <= MAX_ORIGIN:
                fields.append(line)
        if not line and not "".join(block).strip():
            return
        missing = ("parse-error", f"lines {first}-{lines.number}: the record has no 'M  END' line")
        yield _Block(block, first, fields if size <= MAX_ORIGIN else None, None if ended else missing)
        if stray:
            text = f"line {stray}: text after 'M  END'; is a '$$$$' line missing?"
            yield _Block([], stray, None, ("parse-error", text))


def _parse_molblock(block: _Block, source: str, index: int, name: str | None) -> Molecule | tuple[str, str]:
    from rdkit import Chem, rdBase

    with rdBase.BlockLogs():
        try:
            mol = Chem.MolFromMolBlock("".join(block.lines), sanitize=False, removeHs=False, strictParsing=False)
        except Exception:  # RDKit's C++ errors come as RuntimeError and others
            mol = None
    if mol is None:
        last = block.first + len(block.lines) - 1
        return "parse-error", f"lines {block.first}-{last}: not a valid V2000 or V3000 record"
    if block.lines[1][20:22].upper() == "2D" and mol.GetNumAtoms() and _is_flat(mol):
        return "no-3d-coordinates", "The record is a 2D drawing."
    molecule = _convert_rdkit(mol, source, index, name)
    if block.fields is None:
        text = f"The record has more than {MAX_ORIGIN} characters: its bonds and data fields are not kept."
        return replace(molecule, remarks=(Message("fields-dropped", text),))
    return replace(molecule, origin="".join([*block.lines, *block.fields]).removesuffix("\n") + "\n")


def _is_flat(mol: Mol) -> bool:
    return not np.any(mol.GetConformer().GetPositions()[:, 2])


def _convert_rdkit(mol: Mol, source: str, index: int, name: str | None) -> Molecule:
    from rdkit.Chem import rdmolops

    return Molecule(
        np.array([atom.GetAtomicNum() for atom in mol.GetAtoms()], dtype=np.int64),
        mol.GetConformer().GetPositions() if mol.GetNumAtoms() else np.empty((0, 3)),
        name=name,
        source=source,
        index=index,
        charge=rdmolops.GetFormalCharge(mol),
    )
