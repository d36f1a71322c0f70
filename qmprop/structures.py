"""Predictions written back onto the molecules: extended xyz and MDL's sdf, one record for each that came in."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from qmprop.molecule import Molecule
from qmprop.records import Record
from qmprop.rows import Layout, one_line

if TYPE_CHECKING:
    from rdkit.Chem import RWMol

#: What the names of the data fields in an sdf begin with.
FIELD_PREFIX: Final = "qmprop_"
#: Up to so many atoms bond orders are determined; beyond, bonds are those that the distances tell.
MAX_BOND_ORDER_ATOMS: Final = 200
_MAX_BOND_ORDER_TRIALS: Final = 1000
#: Up to so many atoms an sdf gets bonds at all, and up to so many rings times atoms: RDKit, writing and reading, looks
#: for the rings, and for a crystal of 500 atoms that takes seconds.
MAX_BONDED_ATOMS: Final = 2000
_MAX_RING_WORK: Final = 20_000
#: What no line of a title or field may begin with, for it would end the record or begin a field.
_MARKS: Final = ("$$$$", "M  END", ">", "$MDL", "$RXN")
_OWN_FIELD: Final = re.compile(rf">.*<{FIELD_PREFIX}\w+>")
_EMPTY_BLOCK: Final = "     qmprop         3D\n\n  0  0  0  0  0  0  0  0  0  0999 V2000\nM  END\n"


class ExtxyzWriter:
    """One frame a record, as ASE reads it: predictions are info entries under the properties' keys.

    A record without a molecule is a frame without atoms. The entry `units` names the units of the others.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def begin(self, written: int = 0) -> str:
        """Return nothing: the format has no head."""
        return ""

    def write(self, record: Record, molecule: Molecule | None = None) -> str:
        """Return the record's frame; positions in Å and predictions with all their digits."""
        entries: dict[str, Any] = {"name": one_line(record.name or "")} if record.name else {}
        entries |= self._layout.entries(record)
        if molecule is not None:
            entries["charge"] = molecule.charge
        periodic = molecule is not None and molecule.periodic
        head = f'Properties=species:S:1:pos:R:3 pbc="{"T T T" if periodic else "F F F"}"'
        comment = " ".join([head, *(f"{key}={_entry(value)}" for key, value in entries.items())])
        atoms = [] if molecule is None else _atom_lines(molecule)
        return "".join(f"{line}\n" for line in (len(atoms), comment, *atoms))

    def end(self) -> str:
        """Return nothing: the format has no foot."""
        return ""


class SdfWriter:
    """One MDL record a record; predictions are data fields named qmprop_mu and so on.

    A molecule that came as an MDL record is written as it came, with its own data fields; one of another format gets a
    block made from its positions. A record without a molecule is a block without atoms.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def begin(self, written: int = 0) -> str:
        """Return nothing: the format has no head."""
        return ""

    def write(self, record: Record, molecule: Molecule | None = None) -> str:
        """Return the record's block and fields."""
        origin = None if molecule is None else molecule.origin
        text = _make_block(record.name, molecule) if origin is None else _without_own_fields(origin)
        entries = self._layout.entries(record)
        if molecule is not None and molecule.charge:
            entries["charge"] = molecule.charge
        fields = [f">  <{FIELD_PREFIX}{key}>\n{_safe(str(value))}\n\n" for key, value in entries.items()]
        return "".join([text, *fields, "$$$$\n"])

    def end(self) -> str:
        """Return nothing: the format has no foot."""
        return ""


def _entry(value: Any) -> str:
    """Return the value of an info entry; text is quoted, so that any of it comes back."""
    if not isinstance(value, str):
        return float.__repr__(value) if isinstance(value, float) else str(value)
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _atom_lines(molecule: Molecule) -> list[str]:
    symbols = _symbols(molecule)
    return [f"{s:<2} {x!r} {y!r} {z!r}" for s, (x, y, z) in zip(symbols, molecule.positions.tolist(), strict=True)]


def _symbols(molecule: Molecule) -> list[str]:
    """Return the element symbols; X, as ASE has it, for what is no element."""
    from ase.data import chemical_symbols

    return [chemical_symbols[z] if 0 <= z < len(chemical_symbols) else "X" for z in molecule.numbers.tolist()]


def _make_block(name: str | None, molecule: Molecule | None) -> str:
    """Return an MDL block with its title; without atoms where there are none, or no coordinates for them."""
    title = _safe(one_line(name or "")) + "\n"
    if molecule is None or len(molecule.numbers) == 0 or not np.isfinite(molecule.positions).all():
        return title + _EMPTY_BLOCK
    from rdkit import Chem, rdBase

    with rdBase.BlockLogs():
        block = Chem.MolToMolBlock(_find_bonds(molecule), includeStereo=False)
    return title + block.partition("\n")[2]


def _find_bonds(molecule: Molecule) -> RWMol:
    """Return the molecule for RDKit with bonds as good as can be had soon: with their orders, single, or none."""
    from rdkit.Chem import GetMolFrags, rdDetermineBonds

    count = len(molecule.numbers)
    mol = _to_rdkit(molecule)
    if count > MAX_BONDED_ATOMS:
        return mol
    try:
        rdDetermineBonds.DetermineConnectivity(mol)
    except Exception:  # RDKit's C++ errors have no common class
        return _to_rdkit(molecule)
    rings = mol.GetNumBonds() - count + len(GetMolFrags(mol))
    if rings * count > _MAX_RING_WORK:
        return _to_rdkit(molecule)
    if count > MAX_BOND_ORDER_ATOMS:
        return mol
    ordered = _to_rdkit(molecule)
    try:
        rdDetermineBonds.DetermineBonds(
            ordered, charge=molecule.charge, embedChiral=False, maxIterations=_MAX_BOND_ORDER_TRIALS
        )
    except Exception:  # no sensible orders: a radical, a torn bond
        return mol
    return ordered


def _to_rdkit(molecule: Molecule) -> RWMol:
    from rdkit import Chem

    mol = Chem.RWMol()
    for symbol in _symbols(molecule):
        mol.AddAtom(Chem.Atom(symbol if symbol != "X" else 0))
    conformer = Chem.Conformer(len(molecule.numbers))
    conformer.Set3D(True)
    conformer.SetPositions(np.ascontiguousarray(molecule.positions))
    mol.AddConformer(conformer)
    return mol


def _without_own_fields(origin: str) -> str:
    """Return the text of an MDL record without its end and without the fields of an earlier run."""
    kept: list[str] = []
    is_own = False
    for line in origin.rstrip("\n").split("\n"):
        if line.startswith("$$$$"):
            break
        if line.startswith(">"):
            is_own = _OWN_FIELD.match(line) is not None
        if not is_own:
            kept.append(line)
    text = "".join(f"{line}\n" for line in kept)
    has_fields = any(line.startswith(">") for line in kept)
    return text + "\n" if has_fields and kept[-1].strip() else text


def _safe(text: str) -> str:
    """Return the text so that as a line of its own it is neither blank space nor a mark of the format."""
    return f" {text}" if text.startswith(_MARKS) else text
