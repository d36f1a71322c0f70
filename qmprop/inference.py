"""`predict()`: a stream of molecules in, a stream of records out, one for one and in order."""

from __future__ import annotations

import dataclasses
import glob
import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qmprop.errors import UsageError
from qmprop.formats import move_mdl
from qmprop.model import Model, load_model
from qmprop.molecule import Molecule, find_error, find_warnings
from qmprop.readers import FOLDER_SUFFIXES, Failure, from_ase, from_rdkit, read_paths
from qmprop.records import Message, Record, Value
from qmprop.targets import parse_properties, parse_units, unit_factor

#: Molecules and atoms of a batch where the caller names no batch size. On a CPU what fits its caches is fastest.
CPU_BATCH: Final = (128, 1_024)
GPU_BATCH: Final = (2_048, 32_768)
#: Source of molecules that come as Python objects.
MEMORY_SOURCE: Final = "<memory>"

Predictions = Mapping[str, NDArray[np.float64]]
Pair = tuple[Molecule | Failure, Record]


@dataclass(frozen=True, slots=True)
class _Entry:
    """One input record on its way through a batch: a molecule, or the reason why there is none."""

    item: Molecule | Failure
    error: Message | None


def predict(
    molecules: Any,
    *,
    properties: str | Iterable[str] | None = None,
    units: str | Iterable[str] | Mapping[str, str] | None = "ev",
    weights: str | os.PathLike[str] | Model = "egnn-qm9",
    device: str = "auto",
    batch_size: int | None = None,
) -> Iterator[Record]:
    """Predict the properties of a stream of molecules.

    The arguments are checked and the weights loaded at once; molecules are read as the records are asked for, so that
    a stream of any length needs the memory of one batch.

    Args:
        molecules: A path, a SMILES, an `ase.Atoms`, an RDKit `Mol`, a PyTorch Geometric `Data` or `Batch` with `z`
            and `pos` in Å, a `Molecule`, a reader's `Failure`, or any iterable of those. A path stands for all records
            of its file, folder or glob, "-" for those of standard input. A string is a path if something has that
            name, if it has the suffix of a molecule file or stands in a folder that exists, or if files match it as a
            pattern; otherwise it is a SMILES if RDKit can parse it, and else the path of a missing file. A
            `pathlib.Path` is never a SMILES.
        properties: Property keys, "mu,homo" or an iterable; None for the twelve of QM9.
        units: A preset, "key=unit" assignments, several of those, or a mapping of key to unit.
        weights: Name of bundled weights, path of a weights file, or a loaded `Model`.
        device: "auto", "cpu", "cuda" or "cuda:1"; ignored where `weights` is a loaded model.
        batch_size: Molecules in a batch; None chooses by the number of molecules and atoms.

    Yields:
        One record per input record, in order, errors included.

    Raises:
        UsageError: A property, unit, batch size or kind of molecule is not known.
        WeightsError: The weights cannot be loaded.
        DeviceError: The device does not exist here.
    """
    pairs = predict_pairs(
        molecules, properties=properties, units=units, weights=weights, device=device, batch_size=batch_size
    )
    return (record for _, record in pairs)


def predict_pairs(
    molecules: Any,
    *,
    properties: str | Iterable[str] | None = None,
    units: str | Iterable[str] | Mapping[str, str] | None = "ev",
    weights: str | os.PathLike[str] | Model = "egnn-qm9",
    device: str = "auto",
    batch_size: int | None = None,
    skip: int = 0,
    refined: bool = False,
) -> Iterator[Pair]:
    """Predict as `predict` does, and hand each record out together with what it answers.

    Writers that put geometries beside the predictions need both. Arguments and errors are those of `predict`, and:

    Args:
        skip: First records to leave out. They are read and count for the batches, so that the others come out as they
            would without: to the last digit.
        refined: Hand each predicted molecule out in the geometry that the network read its properties from: the DFT
            minimum that it expects near the given geometry.

    Yields:
        The molecule, or the reader's failure, and its record; one pair per input record, in order.
    """
    keys = parse_properties(properties)
    wanted = parse_units(units)
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise UsageError(f"the batch size must be a whole number of 1 or more, not {batch_size!r}")
    items = _iterate(molecules)
    model = load_model(os.fspath(weights), device=device) if isinstance(weights, str | os.PathLike) else weights
    return _stream(items, model, {key: wanted[key] for key in keys}, batch_size, skip, refined)


def _stream(
    items: Iterator[Molecule | Failure],
    model: Model,
    units: Mapping[str, str],
    batch_size: int | None,
    skip: int,
    refined: bool,
) -> Iterator[Pair]:
    molecules, atoms = CPU_BATCH if str(model.device) == "cpu" else GPU_BATCH
    if batch_size is not None:
        molecules, atoms = batch_size, sys.maxsize
    for batch in _batches(items, molecules, atoms):
        if skip < len(batch):
            pairs = itertools.islice(_predict_batch(batch, model, units), skip, None)
            yield from _refine(list(pairs), model) if refined else pairs
        skip = max(0, skip - len(batch))


def _batches(items: Iterator[Molecule | Failure], max_records: int, max_atoms: int) -> Iterator[list[_Entry]]:
    """Group the stream; a molecule with more atoms than a batch may have gets a batch to itself."""
    batch: list[_Entry] = []
    atoms = 0
    for item in items:
        error = item.message if isinstance(item, Failure) else find_error(item)
        size = len(item.numbers) if isinstance(item, Molecule) and error is None else 0
        if batch and atoms + size > max_atoms:
            yield batch
            batch, atoms = [], 0
        batch.append(_Entry(item, error))
        atoms += size
        if len(batch) >= max_records:
            yield batch
            batch, atoms = [], 0
    if batch:
        yield batch


def _predict_batch(batch: Sequence[_Entry], model: Model, units: Mapping[str, str]) -> Iterator[Pair]:
    valid = [entry.item for entry in batch if entry.error is None and isinstance(entry.item, Molecule)]
    rows = iter(_rows(valid, model, units))
    for entry in batch:
        outcome = entry.error if entry.error is not None else next(rows)
        yield entry.item, _record(entry.item, outcome, model, units)


def _refine(pairs: list[Pair], model: Model) -> list[Pair]:
    """Give the molecules that were predicted their refined geometries."""
    chosen = [row for row, (_, record) in enumerate(pairs) if record.properties]
    molecules = [item for item, record in pairs if record.properties and isinstance(item, Molecule)]
    for row, molecule, positions in zip(chosen, molecules, model.refine(molecules), strict=True):
        origin = move_mdl(molecule.origin, positions) if molecule.origin is not None else None
        pairs[row] = (dataclasses.replace(molecule, positions=positions, origin=origin), pairs[row][1])
    return pairs


def _rows(molecules: Sequence[Molecule], model: Model, units: Mapping[str, str]) -> list[NDArray[np.float64] | Message]:
    """Return per molecule its values in the wanted units, or why there are none."""
    if not molecules:
        return []
    predictions = _attempt(molecules, model)
    if predictions is not None:
        columns = [
            np.asarray(predictions[key], dtype=np.float64) / unit_factor(key, unit) for key, unit in units.items()
        ]
        return list(np.stack(columns, axis=1))
    if len(molecules) == 1:
        count = len(molecules[0].numbers)
        return [Message("out-of-memory", f"The molecule with {count} atoms does not fit into the device's memory.")]
    middle = len(molecules) // 2
    return _rows(molecules[:middle], model, units) + _rows(molecules[middle:], model, units)


def _attempt(molecules: Sequence[Molecule], model: Model) -> Predictions | None:
    """Predict one batch; None if it did not fit into memory."""
    try:
        return model.predict(molecules)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
    # Outside the handler, so that the failed attempt's tensors are already gone.
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def _is_out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    phrases = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")
    return isinstance(error, MemoryError) or any(phrase in text for phrase in phrases)


def _record(
    item: Molecule | Failure, outcome: NDArray[np.float64] | Message, model: Model, units: Mapping[str, str]
) -> Record:
    molecule = item if isinstance(item, Molecule) else None
    warnings = find_warnings(molecule) if molecule is not None and not isinstance(outcome, Message) else ()
    values: dict[str, Value] = {}
    if not isinstance(outcome, Message):
        bad = [key for key, value in zip(units, outcome, strict=True) if not np.isfinite(value)]
        if bad:
            outcome = Message("non-finite-prediction", f"The network gave no finite number for {', '.join(bad)}.")
        else:
            pairs = zip(units.items(), outcome.tolist(), strict=True)
            values = {key: Value(value, unit) for (key, unit), value in pairs}
    failed = isinstance(outcome, Message)
    return Record(
        source=item.source,
        index=item.index,
        name=item.name,
        formula=molecule.formula if molecule is not None else None,
        natoms=len(molecule.numbers) if molecule is not None else None,
        status="error" if failed else "warning" if warnings else "ok",
        messages=(outcome, *warnings) if isinstance(outcome, Message) else warnings,
        model=model.id,
        properties=values,
    )


def _iterate(molecules: Any) -> Iterator[Molecule | Failure]:
    """Turn what the caller passed into one stream; refuse at once what cannot be one."""
    if _is_single(molecules):
        return _expand([molecules])
    if isinstance(molecules, Iterable) and not isinstance(molecules, bytes | bytearray | Mapping):
        return _expand(molecules)
    raise _unknown(molecules)


def _expand(molecules: Iterable[Any]) -> Iterator[Molecule | Failure]:
    index = 0
    for item in molecules:
        if isinstance(item, Molecule | Failure):
            yield item
        elif isinstance(item, os.PathLike) or (isinstance(item, str) and not _is_smiles(item)):
            yield from read_paths([os.fspath(item)])
        else:
            for found in _convert(item, index):
                yield found
                index += 1


def _convert(item: Any, index: int) -> Iterator[Molecule | Failure]:
    """Yield the molecule of an object, or those of a batch."""
    if isinstance(item, str):
        from qmprop.smiles import from_smiles

        yield from_smiles(item, source=MEMORY_SOURCE, index=index)
    elif _is_instance(item, "ase", "Atoms"):
        yield from_ase(item, source=MEMORY_SOURCE, index=index)
    elif _is_instance(item, "rdkit.Chem", "Mol"):
        yield from_rdkit(item, source=MEMORY_SOURCE, index=index)
    elif _is_instance(item, "torch_geometric.data", "Data"):
        is_batch = _is_instance(item, "torch_geometric.data", "Batch")
        for position, data in enumerate(item.to_data_list() if is_batch else [item], start=index):
            yield _convert_pyg(data, position)
    else:
        raise _unknown(item)


def _convert_pyg(data: Any, index: int) -> Molecule | Failure:
    from qmprop.graph import from_pyg

    try:
        return from_pyg(data, source=MEMORY_SOURCE, index=index)
    except (AttributeError, TypeError, ValueError) as error:  # any tensors can be called z and pos
        return Failure(MEMORY_SOURCE, index, Message("parse-error", f"Not a molecule: {error}."))


def _is_smiles(text: str) -> bool:
    """Whether a string that could be a path is rather a SMILES: it names nothing, is like no path, and parses."""
    if text == "-" or text.isspace() or not text or "\0" in text or os.path.lexists(text):
        return False
    if FOLDER_SUFFIXES.intersection(suffix.lower() for suffix in Path(text).suffixes):
        return False
    if os.path.isdir(os.path.dirname(text)) or (any(letter in text for letter in "*?") and glob.glob(text)):
        return False
    from rdkit import Chem, rdBase

    with rdBase.BlockLogs():
        mol = Chem.MolFromSmiles(text, sanitize=False)
    return mol is not None and mol.GetNumAtoms() > 0


def _is_single(item: Any) -> bool:
    return (
        isinstance(item, str | os.PathLike | Molecule | Failure)
        or _is_instance(item, "ase", "Atoms")
        or _is_instance(item, "rdkit.Chem", "Mol")
        or _is_instance(item, "torch_geometric.data", "Data")
    )


def _is_instance(item: Any, module: str, name: str) -> bool:
    """`isinstance`, without importing the class's module: who holds an instance has imported it."""
    kind = getattr(sys.modules.get(module), name, None)
    return isinstance(kind, type) and isinstance(item, kind)


def _unknown(item: Any) -> UsageError:
    return UsageError(
        f"cannot predict from an object of type '{type(item).__name__}'",
        "Pass a path, a SMILES, an ase.Atoms, an RDKit Mol, a PyG Data, a qmprop.Molecule, or an iterable of those.",
    )
