"""Network, baseline and units as one thing: load weights, predict physical numbers.

A weights file is one safetensors file: the tensors of the network (`network.*`), those of the baseline
(`baseline.*`), and metadata that says what they are. Nothing in it is ever unpickled.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from qmprop.baseline import Baseline, Composition, atomization, center, compose
from qmprop.bundled import bundled_folders
from qmprop.config import ModelConfig
from qmprop.egnn import EGNN, LATENTS
from qmprop.errors import ConfigError, DeviceError, OutputError, UsageError, WeightsError
from qmprop.graph import build_graph, concatenate
from qmprop.molecule import Molecule
from qmprop.targets import ATOMIZATION_KEYS, DEFAULT_KEYS, ELEMENTS, TARGETS

Array = NDArray[np.float64]

BUNDLED: Final = "egnn-qm9"
_FORMAT: Final = "qmprop-weights-1"
#: Traits after the pooled features: logarithms of two lengths of moves, the outputs, and the composition.
OTHER_TRAITS: Final = 2 + len(LATENTS) + len(ELEMENTS) + 1
_EXTRA: Final = "calibration."  # what the names of a calibration's tensors begin with
_MAX_FILE_SIZE: Final = 1 << 30
_BATCH_ATOMS: Final = 1024
_PART_ATOMS: Final = 128  # that make it worth a thread's while
_SMALL_MOVE: Final = 1e-4  # Å, below which all moves of atoms look alike
_SMALL_SPREAD: Final = 1e-3  # the same of the normalized outputs of an ensemble's members
#: Entries of the header that decide the predictions, besides the tensors.
_DECISIVE: Final = ("architecture", "others", "shares")
_MEMBER: Final = re.compile(r"member([1-9][0-9]*)\.")  # what the names of a further member's tensors begin with


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What the network makes of M molecules of N atoms.

    Attributes:
        values: The twelve properties in default units, in the order of `DEFAULT_KEYS` [M, 12].
        composition: Of the molecules, in the refined geometry.
        refined: The geometry that the properties were read from, in Å, centers of mass at the origin [N, 3].
        moves: From the given geometry to the refined one, in Å [N, 3].
        traits: What tells how well the network knows each molecule: mean, largest and smallest of its atoms' final
            features, logarithms of the root mean square and of the largest move of its atoms, the network's outputs,
            and the composition [M, 3 F + `OTHER_TRAITS`]; of an ensemble also the logarithms of the spread of its
            members' outputs [10 more]. The features are those of its first member.
    """

    values: Array
    composition: Composition
    refined: Array
    moves: Array
    traits: NDArray[np.float32]

    def properties(self) -> dict[str, Array]:
        """Return property key to values in the property's default unit [M], for every key of `TARGETS`."""
        properties = dict(zip(DEFAULT_KEYS, self.values.T, strict=True))
        for key in ATOMIZATION_KEYS:
            total = TARGETS[key].total
            assert total is not None
            properties[key] = atomization(total, properties[total], self.composition)
        return properties


class Model:
    """A network with its weights, ready to predict.

    Attributes:
        name: File name without suffix.
        digest: SHA-256 of all that decides its predictions, hexadecimal.
        config: Shape of the network; of an ensemble that of the first.
        network: The network, in evaluation mode; of an ensemble the first.
        networks: All networks, whose predictions are averaged.
        shares: How much each of them counts in the mean, 1 in sum.
        baseline: What is removed before and restored after it.
        metadata: What the file says about itself (training data, configuration, errors).
        extras: Further arrays of the file, by name: its calibration.
        device: Where the network runs.
    """

    def __init__(
        self,
        network: EGNN,
        baseline: Baseline,
        *,
        others: Sequence[EGNN] = (),
        shares: Sequence[float] | None = None,
        name: str = "unsaved",
        digest: str = "0" * 64,
        metadata: Mapping[str, Any] | None = None,
        extras: Mapping[str, NDArray[Any]] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.name = name
        self.digest = digest
        self.config = network.config
        self.device = torch.device(device)
        self.networks = tuple(member.to(self.device).eval() for member in (network, *others))
        self.network = self.networks[0]
        counts = np.ones(len(self.networks)) if shares is None else np.array(shares, dtype=np.float64)
        self.shares = tuple((counts / counts.sum()).tolist())
        self.baseline = baseline
        self.metadata = dict(metadata or {})
        self.extras = dict(extras or {})

    def replace(
        self, *, metadata: Mapping[str, Any] | None = None, extras: Mapping[str, NDArray[Any]] | None = None
    ) -> Model:
        """Return the same networks with other metadata or further arrays."""
        other = copy.copy(self)
        other.metadata = dict(self.metadata if metadata is None else metadata)
        other.extras = dict(self.extras if extras is None else extras)
        return other

    @property
    def id(self) -> str:
        """Name and the first eight digits of the hash, as records carry it."""
        return f"{self.name}@{self.digest[:8]}"

    def predict(self, molecules: Sequence[Molecule]) -> dict[str, Array]:
        """Predict M molecules in one batch.

        Args:
            molecules: Molecules that pass `molecule.find_error`.

        Returns:
            Property key to values in the property's default unit [M], for every key of `TARGETS`.
        """
        return self.run(*concatenate(molecules)).properties() if molecules else {key: np.zeros(0) for key in TARGETS}

    def refine(self, molecules: Sequence[Molecule]) -> list[Array]:
        """Return each molecule's geometry at the DFT minimum that the network expects near the given one.

        Args:
            molecules: Molecules that pass `molecule.find_error`.

        Returns:
            Positions in Å [n, 3] for each molecule; its center of mass stays where it was.
        """
        if not molecules:
            return []
        numbers, positions, offsets = concatenate(molecules)
        return np.split(positions + self.run(numbers, positions, offsets).moves, offsets[1:-1])

    def run(self, numbers: NDArray[Any], positions: NDArray[Any], offsets: NDArray[np.int64]) -> Outcome:
        """Run the network over M molecules of N atoms in one batch.

        Args:
            numbers: Atomic numbers [N].
            positions: In Å [N, 3].
            offsets: Molecule k owns the atoms offsets[k]:offsets[k + 1] [M + 1].
        """
        parts = _share_out(offsets, torch.get_num_threads() if self.device.type == "cpu" else 1)
        if len(parts) == 1:
            return self._run(numbers, positions, offsets)
        atoms = [slice(part[0], part[-1]) for part in parts]
        tasks = [(numbers[own], positions[own], part - part[0]) for own, part in zip(atoms, parts, strict=True)]
        return _join(list(_threads(len(parts)).map(lambda task: self._run(*task), tasks)))

    def _run(self, numbers: NDArray[Any], positions: NDArray[Any], offsets: NDArray[np.int64]) -> Outcome:
        centered = center(numbers, positions, offsets)
        graph = build_graph(numbers, centered, offsets, self.config.cutoff).to(self.device)
        with torch.inference_mode():
            encodings = [network.encode(*graph.arguments()) for network in self.networks]
            read = [
                network.read(encoding, graph.molecules, graph.molecule_count).cpu().double().numpy()
                for network, encoding in zip(self.networks, encodings, strict=True)
            ]
        geometries = [encoding.positions.cpu().double().numpy() for encoding in encodings]
        compositions = [compose(numbers, geometry, offsets) for geometry in geometries]
        restored = [self.baseline.restore(*pair) for pair in zip(read, compositions, strict=True)]
        values, outputs, refined = (
            np.average(parts, axis=0, weights=self.shares) for parts in (restored, read, geometries)
        )
        composition = compositions[0] if len(self.networks) == 1 else compose(numbers, refined, offsets)
        moves = refined - centered
        traits = _pool(encodings[0].h.cpu().numpy(), moves, outputs, composition, offsets)
        if len(self.networks) > 1:
            spreads = np.log(np.std(read, axis=0) + _SMALL_SPREAD).astype(np.float32)
            traits = np.concatenate([traits, spreads], axis=1)
        return Outcome(values, composition, refined, moves, traits)

    def run_arrays(
        self, numbers: NDArray[Any], positions: NDArray[Any], offsets: NDArray[np.int64]
    ) -> Iterator[Outcome]:
        """Run the network over many molecules, a batch at a time; arguments as for `run`."""
        for atoms, parts in _batches(offsets):
            yield self.run(numbers[atoms], positions[atoms], parts)

    def embed(self, molecules: Sequence[Molecule]) -> NDArray[np.float32]:
        """Return the mean of each molecule's final atom features, its place in the network's latent space [M, F]."""
        return self.run(*concatenate(molecules)).traits[:, : self.config.node_width]


def _pool(
    h: NDArray[np.float32], moves: Array, outputs: Array, composition: Composition, offsets: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Return the traits of M molecules, see `Outcome` [M, 3 F + `OTHER_TRAITS`]."""
    starts, sizes = offsets[:-1], np.diff(offsets)[:, None]
    lengths = np.linalg.norm(moves, axis=1)
    root = np.sqrt(np.add.reduceat(np.square(lengths), starts) / sizes[:, 0])
    farthest = np.maximum.reduceat(lengths, starts)
    parts = [np.add.reduceat(h, starts) / sizes, np.maximum.reduceat(h, starts), np.minimum.reduceat(h, starts)]
    parts += [np.log(np.stack([root, farthest], axis=1) + _SMALL_MOVE), outputs, composition.counts]
    return np.concatenate(parts, axis=1).astype(np.float32)


def _share_out(offsets: NDArray[np.int64], count: int) -> list[NDArray[np.int64]]:
    """Return the offsets of up to `count` runs of molecules with about as many atoms each.

    A thread that computes a part alone beats threads that share every operation, if the part is not too small.
    """
    count = min(count, int(offsets[-1] - offsets[0]) // _PART_ATOMS, len(offsets) - 1)
    goals = offsets[0] + (offsets[-1] - offsets[0]) * np.arange(1, count) / max(count, 1)
    edges = np.unique([0, *np.searchsorted(offsets, goals), len(offsets) - 1])
    return [offsets[first : last + 1] for first, last in itertools.pairwise(edges.tolist())]


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, "qmprop", initializer=prepare_thread)


def prepare_thread() -> None:
    """Set up a thread that is to run whole operations by itself."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def _join(outcomes: Sequence[Outcome]) -> Outcome:
    """Return what was found of several runs of molecules as of one."""
    compositions = [outcome.composition for outcome in outcomes]
    composition = Composition(
        np.concatenate([part.counts for part in compositions]),
        np.concatenate([part.nuclear_r2 for part in compositions]),
    )
    values, refined, moves = (
        np.concatenate([getattr(outcome, name) for outcome in outcomes]) for name in ("values", "refined", "moves")
    )
    return Outcome(values, composition, refined, moves, np.concatenate([outcome.traits for outcome in outcomes]))


def _batches(offsets: NDArray[np.int64]) -> Iterator[tuple[slice, NDArray[np.int64]]]:
    """Yield the atoms of the next molecules that make a batch, and their own offsets."""
    first = 0
    while first < len(offsets) - 1:
        last = max(first + 1, int(np.searchsorted(offsets, offsets[first] + _BATCH_ATOMS, side="right")) - 1)
        yield slice(offsets[first], offsets[last]), offsets[first : last + 1] - offsets[first]
        first = last


def load_model(name_or_path: str | Path = BUNDLED, *, device: str = "auto") -> Model:
    """Load weights.

    Args:
        name_or_path: The name of bundled weights ("egnn-qm9") or the path of a weights file.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", "mps".

    Raises:
        WeightsError: The file is missing, cannot be read, is damaged, or is not one of qmprop's.
        DeviceError: The device does not exist here.
    """
    torch.set_flush_denormal(True)  # tails of Gaussians: denormal floats are many times slower
    chosen = choose_device(device)
    path = find_weights(name_or_path)
    try:
        size = path.stat().st_size
        content = path.read_bytes() if path.is_file() and size <= _MAX_FILE_SIZE else None
    except OSError as error:
        raise WeightsError(f"cannot read weights {path}: {error.strerror}", "Check the path and its rights.") from error
    if content is None:
        raise WeightsError(f"{path} is not a weights file", "Give a .safetensors file written by `qmprop train`.")
    header = _read_header(content, path)
    try:
        tensors = load_tensors(content)
        config = ModelConfig(**json.loads(header["architecture"]))
        shapes = [ModelConfig(**shape) for shape in json.loads(header.get("others", "[]"))]
        shares = _check_shares(json.loads(header.get("shares", "null")), 1 + len(shapes))
        metadata = {key: json.loads(text) for key, text in header.items() if key != "format"}
    except (SafetensorError, ConfigError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    digest = _digest("".join(header.get(key, "") for key in _DECISIVE), tensors)
    extras = {key: tensors.pop(key).numpy() for key in sorted(tensors) if key.startswith(_EXTRA)}
    members = _split_members(tensors, path)
    if len(members) != len(shapes):
        raise _damaged(path, f"its ensemble has {len(members)} further members where it describes {len(shapes)}")
    others = [_assemble(shape, member, path)[0] for shape, member in zip(shapes, members, strict=True)]
    network, baseline = _assemble(config, tensors, path)
    if metadata.pop("sha256", None) != digest:
        raise _damaged(path, "its checksum is wrong")
    extras = {key.removeprefix(_EXTRA): array for key, array in extras.items()}
    return Model(
        *(network, baseline),
        others=others,
        shares=shares,
        name=path.stem,
        digest=digest,
        metadata=metadata,
        extras=extras,
        device=chosen,
    )


def join_models(models: Sequence[Model], shares: Sequence[float] | None = None) -> Model:
    """Return an ensemble of all the networks of models, with the metadata of the first and no calibration.

    Args:
        models: The models.
        shares: How much each counts in the mean; None for all the same.

    Raises:
        UsageError: There is not one share for each model, or one that is no positive number.
        WeightsError: They differ in cut-off, in baseline or in the data and the split that they were trained on.
    """
    counts = [1.0] * len(models) if shares is None else list(shares)
    if len(counts) != len(models) or not all(0.0 < count < math.inf for count in counts):
        raise UsageError(
            f"the shares {', '.join(f'{count:g}' for count in counts)} do not fit {len(models)} weights",
            "Give a positive number for each of them, or none at all.",
        )
    first, *others = models
    for other in others:
        same = other.config.cutoff == first.config.cutoff and all(
            other.metadata.get(key) == first.metadata.get(key) for key in ("data_sha256", "split_sha256")
        )
        same &= np.allclose(other.baseline.coefficients, first.baseline.coefficients, rtol=1e-6)
        if not (same and np.allclose(other.baseline.scales, first.baseline.scales, rtol=1e-6)):
            raise WeightsError(
                f"{first.id} and {other.id} make no ensemble: they differ in cut-off, data or split",
                "Join weights of the same cut-off, trained on the same molecules.",
            )
    networks = [network for model in models for network in model.networks]
    parts = [count * share for model, count in zip(models, counts, strict=True) for share in model.shares]
    told = {"accuracy", "calibration", "limits"}
    metadata = {key: value for key, value in first.metadata.items() if key not in told}
    if others:
        metadata["members"] = [model.id for model in models]
    return Model(
        *(networks[0], first.baseline), others=networks[1:], shares=parts, metadata=metadata, device=first.device
    )


def save_model(path: str | Path, model: Model) -> None:
    """Write a weights file, whole or not at all.

    Args:
        path: Where to; replaced if it exists.
        model: What to write; its metadata have to be plain values.

    Raises:
        OutputError: The file cannot be written.
    """
    path = Path(path)
    others = model.networks[1:]
    names = ["network", *(f"member{number}" for number in range(1, len(model.networks)))]
    tensors = {
        f"{name}.{key}": value.detach().cpu().contiguous()
        for name, member in zip(names, model.networks, strict=True)
        for key, value in member.state_dict().items()
    }
    tensors["baseline.coefficients"] = torch.from_numpy(model.baseline.coefficients.copy())
    tensors["baseline.scales"] = torch.from_numpy(model.baseline.scales.copy())
    for key, array in model.extras.items():
        tensors[_EXTRA + key] = torch.from_numpy(np.array(array))
    header = {key: json.dumps(value, allow_nan=False) for key, value in model.metadata.items() if key not in _DECISIVE}
    header |= {"format": _FORMAT, "architecture": json.dumps(dataclasses.asdict(model.config))}
    if others:
        header["others"] = json.dumps([dataclasses.asdict(other.config) for other in others])
    if len(set(model.shares)) > 1:
        header["shares"] = json.dumps(model.shares)
    header["sha256"] = json.dumps(_digest("".join(header.get(key, "") for key in _DECISIVE), tensors))
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.write_bytes(_sort_header(save_tensors(tensors, metadata=header)))
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OutputError(f"cannot write weights {path}: {error.strerror}", "Choose another place.") from error


def find_weights(name_or_path: str | Path) -> Path:
    """Return the path of bundled weights by name, or the given path.

    Raises:
        WeightsError: Neither exists.
    """
    path = Path(name_or_path)
    if path.exists():
        return path
    for folder in bundled_folders():
        bundled = folder / f"{name_or_path}.safetensors"
        if os.sep not in str(name_or_path) and bundled.is_file():
            return bundled
    names = sorted(file.stem for folder in bundled_folders() for file in folder.glob("*.safetensors"))
    raise WeightsError(
        f"no weights '{name_or_path}'",
        f"Give the path of a .safetensors file, or one of: {', '.join(names) or 'none'}.",
    )


def choose_device(name: str) -> torch.device:
    """Return the named device; "auto" is a GPU if there is one.

    Raises:
        DeviceError: It does not exist here.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device("cuda" if available["cuda"] else "cpu")
    kinds = ", ".join(kind for kind, there in available.items() if there)
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"unknown device '{name}'", f"Use auto or one of: {kinds}.") from error
    there = available.get(device.type, False)
    if not there or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        raise DeviceError(f"device '{name}' is not available here", f"Use auto or one of: {kinds}.")
    return device


def _read_header(content: bytes, path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file: 8 bytes of length, then JSON."""
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > len(content) - 8:
        raise _damaged(path, "it is cut short or of another format")
    try:
        header = json.loads(content[8 : 8 + length])
        metadata = header.get("__metadata__", {})
    except (ValueError, AttributeError, RecursionError) as error:
        raise _damaged(path, "it is not a safetensors file") from error
    if not isinstance(metadata, dict) or metadata.get("format") != _FORMAT:
        raise WeightsError(
            f"{path} holds weights of something else: its format is not '{_FORMAT}'",
            "Give a .safetensors file written by `qmprop train`.",
        )
    return metadata


def _sort_header(content: bytes) -> bytes:
    """Return a safetensors file with its header in alphabetical order; safetensors itself leaves that to chance."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:start]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the tensors' bytes are aligned
    return len(header).to_bytes(8, "little") + header + content[start:]


def _digest(shapes: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over what says the networks' shapes and every tensor's name, shape and bytes, hexadecimal."""
    digest = hashlib.sha256(shapes.encode())
    for key in sorted(tensors):
        digest.update(f"{key} {list(tensors[key].shape)}".encode())
        if tensors[key].numel():  # torch cannot view the bytes of nothing
            digest.update(tensors[key].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check_shares(value: object, count: int) -> list[float] | None:
    """Return what a file says of how much its networks count; raise ValueError where it makes no sense."""
    if value is None:
        return None
    numbers = value if isinstance(value, list) else []
    if len(numbers) != count or not all(type(number) is float and 0.0 < number < math.inf for number in numbers):
        raise ValueError("the shares of its networks are not a positive number each")
    return numbers


def _split_members(tensors: dict[str, Tensor], path: Path) -> list[dict[str, Tensor]]:
    """Take the tensors of an ensemble's further members out, and return those of each as a file of its own has them."""
    found: dict[int, dict[str, Tensor]] = {}
    for key in list(tensors):
        if match := _MEMBER.match(key):
            found.setdefault(int(match[1]), {})[f"network.{key[match.end() :]}"] = tensors.pop(key)
    if sorted(found) != list(range(1, len(found) + 1)):
        raise _damaged(path, "a member of its ensemble is missing")
    baseline = {key: value for key, value in tensors.items() if key.startswith("baseline.")}
    return [found[number] | baseline for number in sorted(found)]


def _assemble(config: ModelConfig, tensors: Mapping[str, Tensor], path: Path) -> tuple[EGNN, Baseline]:
    """Put tensors into a network and a baseline; every name, shape and number has to be right."""
    for part, name, layers in (
        ("layers", "layers", config.layers),
        ("refiner", "refining layers", config.refine_layers),
    ):
        count = len({key.split(".")[2] for key in tensors if key.startswith(f"network.{part}.")})
        if count != layers:  # before a network is built that may be far larger than the file
            raise _damaged(path, f"it has {count} {name} where its architecture says {layers}")
    with torch.device("meta"):
        network = EGNN(config)
    expected = {f"network.{key}": (value.shape, value.dtype) for key, value in network.state_dict().items()}
    expected["baseline.coefficients"] = (torch.Size([len(LATENTS), 6]), torch.float64)
    expected["baseline.scales"] = (torch.Size([len(LATENTS)]), torch.float64)
    found = {key: (value.shape, value.dtype) for key, value in tensors.items()}
    for key in sorted(expected.keys() | found.keys()):
        if expected.get(key) != found.get(key):
            wanted, got = (
                f"{list(item[0])} {item[1]}" if item else "nothing" for item in (expected.get(key), found.get(key))
            )
            raise _damaged(path, f"tensor '{key}' should be {wanted} but is {got}")
        if not bool(torch.isfinite(tensors[key]).all()):
            raise _damaged(path, f"tensor '{key}' has a NaN or infinite number")
    network = EGNN(config)
    network.load_state_dict(
        {key.removeprefix("network."): tensors[key] for key in expected if key.startswith("network.")}
    )
    baseline = Baseline(tensors["baseline.coefficients"].numpy(), tensors["baseline.scales"].numpy())
    return network, baseline


def _damaged(path: Path, reason: str) -> WeightsError:
    return WeightsError(f"cannot use weights {path}: {reason}", "Copy the file again, or use another one.")
