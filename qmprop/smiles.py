"""SMILES to molecules: their lines in .smi and .csv texts, and the geometry that a force field gives them."""

from __future__ import annotations

import csv
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from qmprop.formats import Failure, clean_name
from qmprop.molecule import Molecule
from qmprop.records import Message
from qmprop.streams import Lines, ParseError
from qmprop.targets import ELEMENTS

if TYPE_CHECKING:
    from rdkit.Chem import Mol

#: A longer SMILES (characters) is not even parsed.
MAX_SMILES: Final = 2_000
#: With more atoms, hydrogen included, embedding takes too long or fails.
MAX_ATOMS: Final = 200
#: Seconds an attempt at embedding may take.
EMBEDDING_TIME: Final = 15
#: Distance between the fragments of a SMILES with dots, Å.
FRAGMENT_GAP: Final = 10.0
_SEED: Final = 0xC0FFEE
_ATTEMPTS: Final = 50  # at embedding, from either kind of start
_STEPS: Final = 2_000  # of the force field's minimization
_SMILES_COLUMNS: Final = ("smiles", "canonical_smiles", "isomeric_smiles", "smi")
_NAME_COLUMNS: Final = ("name", "title", "id", "identifier", "compound_id", "molecule_id", "mol_id")
_HEADER: Final = re.compile(r"(canonical_|isomeric_)?smiles\b", re.IGNORECASE)
_EXTENSION: Final = re.compile(r"\|[^|]*\|")  # of a CXSMILES


@dataclass(frozen=True, slots=True)
class SmilesLine:
    """A SMILES as it stands in an input.

    Attributes:
        text: The SMILES.
        name: The record's name; None for the SMILES itself.
        source: Where it was read from.
        index: Position within the source, from 0.
        line: Number of its line, from 1; None where there are no lines.
    """

    text: str
    name: str | None
    source: str
    index: int
    line: int | None = None

    def fail(self, code: str, text: str) -> Failure:
        """Return the failure of this record."""
        where = "" if self.line is None else f"line {self.line}: "
        return Failure(self.source, self.index, Message(code, where + text), self.name or clean_name(self.text))


class _EmbeddingError(Exception):
    """There is no geometry; `args` are a message's code and text."""


def from_smiles(text: str, *, source: str, index: int) -> Molecule | Failure:
    """Return the molecule of a SMILES, with a geometry made by ETKDGv3 and MMFF94 (UFF where MMFF94 has no parameters).

    The same SMILES gives the same geometry always. A name may follow the SMILES, behind a blank; else the SMILES is
    the name. Hydrogen atoms are added; charge and radicals stay as they are written.
    """
    smiles, name = split_line(text)
    return build_molecule(SmilesLine(smiles, name, source, index))


def build_molecule(line: SmilesLine) -> Molecule | Failure:
    """Return the molecule of a SMILES as `from_smiles` does."""
    from rdkit.rdBase import BlockLogs

    with BlockLogs():
        try:
            return _build(line)
        except _EmbeddingError as error:
            return line.fail(*error.args)
        except (RuntimeError, ValueError, MemoryError) as error:  # of RDKit's C++ code
            return line.fail("embedding-failed", f"RDKit gives up: {' '.join(str(error).split())[:200]}")


def read_smi(lines: Lines, source: str) -> Iterator[SmilesLine]:
    """Yield every line of a .smi text: a SMILES and, behind blanks, its name.

    Blank lines and those that begin with # are skipped, as is a header.

    Raises:
        ParseError: A line is too long.
    """
    index = 0
    is_first = True
    while line := lines.next():
        text = line.strip().lstrip("\ufeff")
        if not text or text.startswith("#"):
            continue
        if not (is_first and _HEADER.match(text)):
            yield SmilesLine(*split_line(text), source, index, lines.number)
            index += 1
        is_first = False


def read_smiles_table(lines: Lines, source: str) -> Iterator[SmilesLine]:
    """Yield every row of a .csv or .tsv text that has a column with SMILES.

    The columns may be parted by commas, semicolons or tabs; "name", "id" and the like give the name.

    Raises:
        ParseError: There is no such column, or the text is no table.
    """
    header = lines.next().lstrip("\ufeff")
    while header and not header.strip():
        header = lines.next()
    if not header:
        return
    delimiter = max(",;\t", key=lambda mark: len(_columns(header, mark) & set(_SMILES_COLUMNS)))
    names = [name.strip().lower() for name in next(csv.reader([header], delimiter=delimiter))]
    column = next((names.index(name) for name in _SMILES_COLUMNS if name in names), None)
    if column is None:
        raise ParseError(f"line {lines.number}: the table has no column 'smiles'")
    name_column = next((names.index(name) for name in _NAME_COLUMNS if name in names), None)
    index = 0
    rows = csv.reader(iter(lines.next, ""), delimiter=delimiter)
    try:
        for row in rows:
            if not any(row):
                continue
            text = row[column].strip() if column < len(row) else ""
            name = row[name_column] if name_column is not None and name_column < len(row) else ""
            yield SmilesLine(text, clean_name(name), source, index, lines.number)
            index += 1
    except csv.Error as error:
        raise ParseError(f"line {lines.number}: {error}") from error


def split_line(text: str) -> tuple[str, str | None]:
    """Return the SMILES at the beginning of a line, and the name behind it."""
    smiles, _, rest = text.strip().replace("\t", " ").partition(" ")
    return smiles, clean_name(_EXTENSION.sub("", rest, count=1) if rest.lstrip().startswith("|") else rest)


def looks_like_smiles(text: str) -> bool:
    """Return whether a line begins with a SMILES."""
    from rdkit import Chem, rdBase

    smiles = split_line(text)[0]
    if not smiles or len(smiles) > MAX_SMILES:
        return False
    with rdBase.BlockLogs():
        return Chem.MolFromSmiles(smiles, sanitize=False) is not None


def looks_like_table(text: str) -> bool:
    """Return whether a line is the header of a table with a column of SMILES."""
    return any(_columns(text, mark) & set(_SMILES_COLUMNS) for mark in ",;\t")


def _columns(header: str, delimiter: str) -> set[str]:
    return {name.strip().strip('"').lower() for name in header.split(delimiter)}


def _build(line: SmilesLine) -> Molecule:
    from rdkit import Chem

    mol = _parse(line.text)
    unknown = sorted({atom.GetSymbol() for atom in mol.GetAtoms() if atom.GetAtomicNum() not in ELEMENTS})
    if unknown:
        names = ", ".join(unknown)
        raise _EmbeddingError("unsupported-element", f"Unsupported element: {names}; only H, C, N, O and F are known.")
    mol = Chem.AddHs(mol)
    if mol.GetNumAtoms() > MAX_ATOMS:
        text = f"{mol.GetNumAtoms()} atoms; geometries are generated for molecules with up to {MAX_ATOMS}."
        raise _EmbeddingError("too-large-input", text)
    fragments: list[tuple[int, ...]] = []
    parts = Chem.GetMolFrags(mol, asMols=True, fragsMolAtomMapping=fragments)
    positions = np.empty((mol.GetNumAtoms(), 3))
    fields = dict[str, None]()
    edge = 0.0
    for part, atoms in zip(parts, fragments, strict=True):
        placed, field = _generate(part)
        placed = placed + [edge - placed[:, 0].min(), 0.0, 0.0]
        edge = placed[:, 0].max() + FRAGMENT_GAP
        positions[list(atoms)] = placed
        fields[field] = None
    return Molecule(
        np.array([atom.GetAtomicNum() for atom in mol.GetAtoms()], dtype=np.int64),
        positions,
        name=line.name or clean_name(line.text),
        source=line.source,
        index=line.index,
        charge=Chem.GetFormalCharge(mol),
        remarks=(Message("generated-geometry", _describe(mol, list(fields), len(parts))),),
    )


def _parse(text: str) -> Mol:
    """Return the molecule without added hydrogen atoms."""
    from rdkit import Chem

    shown = repr(text if len(text) <= 60 else text[:57] + "...")
    if not text:
        raise _EmbeddingError("bad-smiles", "There is no SMILES.")
    if len(text) > MAX_SMILES:
        raise _EmbeddingError("too-large-input", f"The SMILES is longer than {MAX_SMILES} characters.")
    mol = Chem.MolFromSmiles(text, sanitize=False)
    if mol is None:
        raise _EmbeddingError("bad-smiles", f"{shown} is not a SMILES.")
    try:
        Chem.SanitizeMol(mol)
        Chem.AssignStereochemistry(mol, cleanIt=True, force=True)
    except Exception as error:
        raise _EmbeddingError("bad-smiles", f"{shown}: {' '.join(str(error).split())[:200]}.") from error
    if mol.GetNumAtoms() == 0:
        raise _EmbeddingError("no-atoms", "The record has no atoms.")
    return mol


def _generate(mol: Mol) -> tuple[NDArray[np.float64], str]:
    """Return positions (Å) of a connected molecule with all hydrogen atoms, and the force field they come from."""
    from rdkit.Chem import rdDistGeom, rdForceFieldHelpers

    parameters: Any = rdDistGeom.ETKDGv3()
    parameters.randomSeed = _SEED
    parameters.timeout = EMBEDDING_TIME
    parameters.maxIterations = _ATTEMPTS
    begin = time.monotonic()
    for use_random_coordinates in (False, True):
        parameters.useRandomCoords = use_random_coordinates
        if rdDistGeom.EmbedMolecule(mol, parameters) == 0:
            break
        if time.monotonic() - begin > EMBEDDING_TIME - 1:
            raise _EmbeddingError("time-out", f"No geometry was found within {EMBEDDING_TIME} s.")
    else:
        raise _EmbeddingError("embedding-failed", "No geometry satisfies the bonds and stereochemistry of the SMILES.")
    field = "no force field"
    # MMFF94 has a guess only for the bond of N2 and F2.
    if mol.GetNumAtoms() > 2 and rdForceFieldHelpers.MMFFHasAllMoleculeParams(mol):
        field = "MMFF94"
        rdForceFieldHelpers.MMFFOptimizeMolecule(mol, maxIters=_STEPS)
    elif rdForceFieldHelpers.UFFHasAllMoleculeParams(mol):
        field = "UFF"
        rdForceFieldHelpers.UFFOptimizeMolecule(mol, maxIters=_STEPS)
    return np.array(mol.GetConformer().GetPositions()), field


def _describe(mol: Mol, fields: list[str], fragments: int) -> str:
    """Return what there is to say about the geometry."""
    from rdkit import Chem

    text = f"The geometry was generated from the SMILES (ETKDGv3, {' and '.join(fields)})"
    unspecified = sum(
        item.specified == Chem.StereoSpecified.Unspecified for item in Chem.FindPotentialStereo(mol, cleanIt=False)
    )
    if unspecified:
        text += f"; stereo that it leaves open was chosen (up to {unspecified} atoms or bonds)"
    if fragments > 1:
        text += f"; its {fragments} fragments stand {FRAGMENT_GAP:.0f} Å apart"
    return text + "."
