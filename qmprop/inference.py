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
from qmprop.graph import concatenate
from qmprop.library import load_library
from qmprop.model import Model, Outcome, load_model
from qmprop.molecule import Molecule, find_error, find_flaws
from qmprop.readers import FOLDER_SUFFIXES, Failure, from_ase, from_rdkit, read_paths
from qmprop.records import Message, Neighbor, Record, Value
from qmprop.targets import DEFAULT_KEYS, TARGETS, parse_properties, parse_units, unit_factor
from qmprop.trust import LEVEL, Judgment, Trust, check_level, load_trust

#: Molecules and atoms of a batch where the caller names no batch size. On a CPU what fits its caches is fastest.
CPU_BATCH: Final = (128, 1_024)
GPU_BATCH: Final = (2_048, 32_768)
#: Source of molecules that come as Python objects.
MEMORY_SOURCE: Final = "<memory>"

Pair = tuple[Molecule | Failure, Record]


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What every record is to hold: unit by property, level of the intervals, nearest training molecules."""

    units: Mapping[str, str]
    level: float | None
    neighbors: int
    refined: bool


@dataclass(frozen=True, slots=True, eq=False)
class _Answer:
    """What there is to say about one molecule: values and half-widths in the wanted units, and the trust in them."""

    values: NDArray[np.float64]
    half_widths: NDArray[np.float64] | None
    moves: NDArray[np.float64]
    judgment: Judgment | None
    neighbors: tuple[Neighbor, ...]


class _Predictor:
    """A model and its calibration, which answer for batches of molecules."""

    def __init__(self, model: Model, wanted: _Wanted) -> None:
        self.model, self.wanted = model, wanted
        self.trust = load_trust(model)
        if wanted.neighbors and self.trust is None:
            raise UsageError(f"the weights {model.id} know no training molecules", "Calibrate them: qmprop calibrate.")
        self.library = load_library(model.metadata) if wanted.neighbors else None

    def answer(self, molecules: Sequence[Molecule]) -> list[_Answer | Message]:
        """Return for each molecule its answer, or why there is none."""
        if not molecules:
            return []
        outcome = self._attempt(molecules)
        if outcome is None and len(molecules) == 1:
            count = len(molecules[0].numbers)
            return [Message("out-of-memory", f"The molecule with {count} atoms does not fit into the device's memory.")]
        if outcome is None:
            middle = len(molecules) // 2
            return self.answer(molecules[:middle]) + self.answer(molecules[middle:])
        return self._interpret(molecules, outcome)

    def _attempt(self, molecules: Sequence[Molecule]) -> Outcome | None:
        """Run one batch; None if it did not fit into memory."""
        try:
            return self.model.run(*concatenate(molecules))
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
        # Outside the handler, so that the failed attempt's tensors are already gone.
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None

    def _interpret(self, molecules: Sequence[Molecule], outcome: Outcome) -> list[_Answer | Message]:
        factors = np.array([unit_factor(key, unit) for key, unit in self.wanted.units.items()])
        properties = outcome.properties()
        values = np.stack([properties[key] for key in self.wanted.units], axis=1) / factors
        count = len(molecules)
        widths: Sequence[NDArray[np.float64] | None] = [None] * count
        judged: Sequence[Judgment | None] = [None] * count
        neighbors: Sequence[tuple[Neighbor, ...]] = [()] * count
        if self.trust is not None:
            judgments = self.trust.judge(molecules, outcome.traits)
            judged = judgments
            if self.wanted.level is not None:
                columns = [DEFAULT_KEYS.index(TARGETS[key].total or key) for key in self.wanted.units]
                domains = [judgment.domain for judgment in judgments]
                widths = list(self.trust.half_widths(outcome.traits, domains, self.wanted.level)[:, columns] / factors)
            if self.wanted.neighbors:
                neighbors = self._find_neighbors(self.trust, outcome)
        moves = np.split(outcome.moves, np.cumsum([len(molecule.numbers) for molecule in molecules])[:-1])
        rows = zip(values, widths, moves, judged, neighbors, strict=True)
        return [self._check(_Answer(*row)) for row in rows]

    def _check(self, answer: _Answer) -> _Answer | Message:
        bad = [key for key, value in zip(self.wanted.units, answer.values, strict=True) if not np.isfinite(value)]
        if bad:
            return Message("non-finite-prediction", f"The network gave no finite number for {', '.join(bad)}.")
        return answer

    def _find_neighbors(self, trust: Trust, outcome: Outcome) -> list[tuple[Neighbor, ...]]:
        rows, distances = trust.nearest(outcome.traits, self.wanted.neighbors)
        return [
            tuple(self._describe(trust, row, distance) for row, distance in zip(*pair, strict=True))
            for pair in zip(rows.tolist(), distances.tolist(), strict=True)
        ]

    def _describe(self, trust: Trust, row: int, distance: float) -> Neighbor:
        """Return a training molecule with its reference values, as far as they are at hand."""
        known = self.library.get(int(trust.ids[row])) if self.library is not None else None
        if known is None:
            return Neighbor(trust.name(row), "", distance)
        units = self.wanted.units.items()
        values = {key: Value(known.values[key] / unit_factor(key, unit), unit) for key, unit in units}
        return Neighbor(trust.name(row), known.smiles, distance, values)


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
    interval: float | None = LEVEL,
    neighbors: int = 0,
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
        interval: Share of references that the intervals are to hold, 0.5 to 0.999; None for no intervals. Weights
            without a calibration give none.
        neighbors: How many of the nearest training molecules to name.

    Yields:
        One record per input record, in order, errors included.

    Raises:
        UsageError: A property, unit, batch size, level or kind of molecule is not known, or neighbors are asked of
            weights without a calibration.
        WeightsError: The weights cannot be loaded.
        DeviceError: The device does not exist here.
    """
    pairs = predict_pairs(
        molecules,
        properties=properties,
        units=units,
        weights=weights,
        device=device,
        batch_size=batch_size,
        interval=interval,
        neighbors=neighbors,
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
    interval: float | None = LEVEL,
    neighbors: int = 0,
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
    known = parse_units(units)
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise UsageError(f"the batch size must be a whole number of 1 or more, not {batch_size!r}")
    if isinstance(neighbors, bool) or not isinstance(neighbors, int) or neighbors < 0:
        raise UsageError(f"the number of neighbors must be a whole number of 0 or more, not {neighbors!r}")
    wanted = _Wanted({key: known[key] for key in keys}, check_level(interval), neighbors, refined)
    items = _iterate(molecules)
    model = load_model(os.fspath(weights), device=device) if isinstance(weights, str | os.PathLike) else weights
    return _stream(items, _Predictor(model, wanted), batch_size, skip)


def _stream(
    items: Iterator[Molecule | Failure], predictor: _Predictor, batch_size: int | None, skip: int
) -> Iterator[Pair]:
    molecules, atoms = CPU_BATCH if str(predictor.model.device) == "cpu" else GPU_BATCH
    if batch_size is not None:
        molecules, atoms = batch_size, sys.maxsize
    for batch in _batches(items, molecules, atoms):
        if skip < len(batch):
            yield from itertools.islice(_predict_batch(batch, predictor), skip, None)
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


def _predict_batch(batch: Sequence[_Entry], predictor: _Predictor) -> Iterator[Pair]:
    valid = [entry.item for entry in batch if entry.error is None and isinstance(entry.item, Molecule)]
    answers = iter(predictor.answer(valid))
    for entry in batch:
        item, answer = entry.item, entry.error if entry.error is not None else next(answers)
        record = _record(item, answer, predictor)
        if predictor.wanted.refined and isinstance(answer, _Answer) and isinstance(item, Molecule):
            item = _move(item, item.positions + answer.moves)
        yield item, record


def _move(molecule: Molecule, positions: NDArray[np.float64]) -> Molecule:
    """Return the molecule in another geometry, which its record's own text follows."""
    origin = move_mdl(molecule.origin, positions) if molecule.origin is not None else None
    return dataclasses.replace(molecule, positions=positions, origin=origin)


def _is_out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    phrases = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")
    return isinstance(error, MemoryError) or any(phrase in text for phrase in phrases)


def _record(item: Molecule | Failure, answer: _Answer | Message, predictor: _Predictor) -> Record:
    record = Record(item.source, item.index, item.name, model=predictor.model.id)
    if isinstance(item, Failure):
        return dataclasses.replace(record, status="error", messages=(item.message,))
    record = dataclasses.replace(record, formula=item.formula, natoms=len(item.numbers))
    if isinstance(answer, Message):
        return dataclasses.replace(record, status="error", messages=(answer,))
    judgment = answer.judgment
    messages = (*item.remarks, *(find_flaws(item) if judgment is None else judgment.messages))
    return dataclasses.replace(
        record,
        status="warning" if messages else "ok",
        messages=messages,
        domain=None if judgment is None else judgment.domain,
        seen=() if judgment is None else judgment.seen,
        interval_level=None if answer.half_widths is None else predictor.wanted.level,
        neighbors=answer.neighbors,
        properties=_values(predictor.wanted.units, answer),
    )


def _values(units: Mapping[str, str], answer: _Answer) -> dict[str, Value]:
    """Return the values by key, with their intervals if there are any."""
    numbers = answer.values.tolist()
    widths = [None] * len(numbers) if answer.half_widths is None else answer.half_widths.tolist()
    return {
        key: Value(value, unit, None if width is None else (value - width, value + width))
        for (key, unit), value, width in zip(units.items(), numbers, widths, strict=True)
    }


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
