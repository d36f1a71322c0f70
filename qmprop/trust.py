"""How far a prediction can be off, and whether the network knows the molecule.

Split conformal prediction (Lei et al. 2018) with a predicted error scale (Papadopoulos et al. 2002): the half-width of
an interval is the scale of this molecule times a quantile of |error| / scale over molecules that nothing was trained or
chosen on, taken among those whose geometry the network moves about as far.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qmprop.egnn import LATENTS
from qmprop.errors import UsageError, WeightsError
from qmprop.figures import HIGHEST_LEVEL, LOWEST_LEVEL
from qmprop.graph import build_graph, concatenate
from qmprop.limits import Limits
from qmprop.model import OTHER_TRAITS, Model
from qmprop.molecule import MAX_HEAVY_ATOMS, Molecule, find_flaws
from qmprop.oddities import find_oddities, name_atom
from qmprop.records import Domain, Message
from qmprop.targets import DEFAULT_KEYS, ELEMENTS
from qmprop.topology import find_bonds, hash_graphs, hash_surroundings

Array = NDArray[np.float64]
Traits = NDArray[np.float32]

#: Level of the intervals where the caller names none.
LEVEL: Final = 0.9
#: Levels whose quantiles a calibration keeps; those between are interpolated.
LEVELS: Final = np.concatenate([np.linspace(0.5, 0.94, 45), np.linspace(0.95, 0.999, 50)])
#: Groups of molecules, by how far the network moves their atoms, that have quantiles of their own.
GROUPS: Final = 3
#: Numbers that place a molecule in the latent space.
LATENT_SIZE: Final = 48
#: A size that fewer training molecules have, together with all smaller ones, is unknown.
FEW: Final = 10
#: Pairs of atoms closer than this (Å) are looked at for bonds and oddities.
REACH: Final = 5.0
#: Latent coordinates are kept in whole steps from -32 to 31: six bits each, four in three bytes.
FARTHEST_STEP: Final = 31
_ZERO: Final = 32
#: How files keep the matrices of the error scale.
KEPT: Final = np.float16
_BLOCK: Final = 256  # molecules whose distances are found at once
_LARGEST_LOG: Final = 12.0
_NAMED: Final = 4  # atoms
_NOT_LISTED: Final = (
    f"QM9 has all molecules of up to {MAX_HEAVY_ATOMS} heavy atoms that its rules allow, and this is not one of them."
)


class Judgment(NamedTuple):
    """The verdict on a molecule, a message for each of its reasons, and the training molecules with the same bonds."""

    domain: Domain
    messages: tuple[Message, ...]
    seen: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Trust:
    """A calibration: what turns the traits of a molecule (see `model.Outcome`; T of them) into trust.

    Attributes:
        low: Traits are taken as at least this [T].
        high: Traits are taken as at most this [T].
        weights: Matrices of the network of the error scale: [T, W], [W, W], [W, 12]; files keep half their digits.
        biases: Their constants [W], [W], [12].
        edges: Logarithms of the root mean square move that part the molecules [E].
        sizes: Numbers of heavy atoms, ascending, that part them again: those that have fewer are rare [S].
        quantiles: Of |error| / scale, by group of moves and sizes, property and level [G, 12, L]; G = (E + 1)(S + 1).
        least: Scale that a molecule out of the domain has at least, by group and property, in default units [G, 12].
        projection: Traits to latent coordinates [3 F, K].
        origin: Where the training molecules have their middle before it is moved to zero [K].
        steps: Of the latent coordinates as they are kept [K].
        latents: Latent coordinates of the training molecules in their DFT geometries, see `to_bytes` [n, 3 K / 4].
        anchors: Rows of those from which the distance is measured: all of rare sizes, some of the others [A].
        threshold: Distance from the nearest of them beyond which a molecule is unknown.
        limits: Distances and valences in the training molecules.
        smallest: With fewer heavy atoms there are fewer than `FEW` training molecules.
        surroundings: Hashes of the surroundings of the heavy atoms of the training molecules, ascending [S].
        strange: Share of heavy atoms with other surroundings that makes a molecule that is not listed unlike these.
        listed: Hashes of the bonds of the other molecules of data that has all molecules of a kind, ascending [L];
            none of other data.
        ids: Numbers of the training molecules in their data [n].
        keys: Hashes of their bonds, ascending [n].
        order: Rows of the training molecules in the order of `keys` [n].
        prefix: What their names begin with.
    """

    low: Traits
    high: Traits
    weights: tuple[Traits, ...]
    biases: tuple[Traits, ...]
    edges: Array
    sizes: NDArray[np.int64]
    quantiles: Array
    least: Array
    projection: Traits
    origin: Traits
    steps: Traits
    latents: NDArray[np.uint8]
    anchors: NDArray[np.int64]
    threshold: float
    limits: Limits
    smallest: int
    surroundings: NDArray[np.uint64]
    strange: float
    listed: NDArray[np.uint64]
    ids: NDArray[np.int64]
    keys: NDArray[np.uint64]
    order: NDArray[np.int64]
    prefix: str

    def scales(self, traits: Traits) -> Array:
        """Return the absolute error to expect, in default units [M, 12]."""
        return predict_scales(self.low, self.high, self.weights, self.biases, traits)

    def half_widths(self, traits: Traits, domains: Sequence[Domain], level: float = LEVEL) -> Array:
        """Return half-widths of intervals that hold a share `level` of the references, in default units [M, 12].

        Out of the domain there is no guarantee. The scale is at least one that is large within it, as nothing taught
        it to expect less there, and farther from the training molecules than the threshold it grows with the distance.

        Args:
            traits: Traits [M, T].
            domains: The verdicts on the molecules [M].
            level: From 0.5 to 0.999.
        """
        factors = np.stack([interpolate_levels(table, level) for table in self.quantiles])
        groups = self._find_groups(traits)
        return self._expect(traits, groups, domains) * factors[groups]

    def find_levels(self, traits: Traits, errors: Array, domains: Sequence[Domain]) -> Array:
        """Return the level from which on an interval holds the reference, 0.5 at least and 1 beyond the highest.

        Args:
            traits: Traits [M, T].
            errors: Prediction minus reference in default units; NaN, where it is not known, remains [M, 12].
            domains: The verdicts on the molecules [M].
        """
        groups = self._find_groups(traits)
        ratios = np.abs(errors) / self._expect(traits, groups, domains)
        levels = np.full(ratios.shape, np.nan)
        for group, table in enumerate(self.quantiles):
            members = groups == group
            for column, quantiles in enumerate(table):
                levels[members, column] = np.interp(ratios[members, column], quantiles, LEVELS, right=1.0)
        return levels

    def _expect(self, traits: Traits, groups: NDArray[np.int64], domains: Sequence[Domain]) -> Array:
        """Return the scales of molecules of these groups [M] with these verdicts, see `half_widths` [M, 12]."""
        scores = np.array([domain.score for domain in domains])
        outside = np.array([domain.verdict == "out" for domain in domains])
        scales = self.scales(traits)
        scales[outside] = np.maximum(scales[outside], self.least[groups[outside]])
        scales *= np.maximum(1.0, scores)[:, None]
        return scales

    def _find_groups(self, traits: Traits) -> NDArray[np.int64]:
        """Return which group each molecule belongs to [M]."""
        moves, sizes = find_groups(self.edges, self.sizes, traits, len(self.projection))
        return moves * (len(self.sizes) + 1) + sizes

    def scores(self, traits: Traits) -> Array:
        """Return the distance to the nearest training molecule over the one that is still usual [M]."""
        return np.sqrt(find_nearest(self.place(traits), self._anchored, 1)[1][:, 0]) / self.threshold

    def nearest(self, traits: Traits, count: int) -> tuple[NDArray[np.int64], Array]:
        """Return the rows of the nearest training molecules and their distances over the threshold [M, count]."""
        rows, squares = find_nearest(self.place(traits), self._known, min(count, len(self._known)))
        return rows, np.sqrt(squares) / self.threshold

    @cached_property
    def _known(self) -> Traits:
        return from_bytes(self.latents, self.steps)

    @cached_property
    def _anchored(self) -> Traits:
        return from_bytes(self.latents[self.anchors], self.steps)

    def place(self, traits: Traits) -> Traits:
        """Return latent coordinates [M, K]."""
        return project(self.low, self.high, self.projection, traits) - self.origin

    def judge(self, molecules: Sequence[Molecule], traits: Traits) -> list[Judgment]:
        """Return the verdict on each of M molecules that pass `molecule.find_error`, with traits [M, T]."""
        if not molecules:
            return []
        numbers, positions, offsets = concatenate(molecules)
        graph = build_graph(numbers, positions, offsets, REACH)
        first, second = graph.first.numpy(), graph.second.numpy()
        bonds = find_bonds(numbers, positions, first, second)
        oddities = find_oddities(numbers, positions, offsets, bonds, first, second, self.limits)
        keys = hash_graphs(numbers, offsets, bonds)
        seen = [self._find_rows(key) for key in keys]
        listed = _is_among(keys, self.listed)
        unknown = ~_is_among(hash_surroundings(numbers, bonds), self.surroundings) & (numbers > 1)
        strange = [atoms.nonzero()[0].tolist() for atoms in np.split(unknown, offsets[1:-1])]
        judged = []
        for molecule, odd, rows, other, score, atoms in zip(
            molecules, oddities, seen, listed, self._measure(traits, seen), strange, strict=True
        ):
            messages = [*find_flaws(molecule), *odd]
            known = bool(rows or other)
            if far := self._explain_distance(molecule, score, seen=bool(rows), strange=[] if known else atoms):
                messages.append(Message("far-from-training", far))
            if len(self.listed) and not (messages or known):
                messages.append(Message("far-from-training", _NOT_LISTED))
            reasons = tuple(message.code for message in messages)
            domain = Domain("out" if reasons else "in", score, reasons)
            judged.append(Judgment(domain, tuple(messages), tuple(map(self.name, rows))))
        return judged

    def _explain_distance(self, molecule: Molecule, score: float, *, seen: bool, strange: Sequence[int]) -> str | None:
        """Say in what the training molecules are unlike a molecule, whose atoms `strange` have unknown surroundings."""
        if strange and len(strange) / molecule.heavy_atoms >= self.strange:
            names = ", ".join(name_atom(int(molecule.numbers[atom]), atom) for atom in strange[:_NAMED])
            more = ", ..." if len(strange) > _NAMED else ""
            count = f"{len(strange)} of its {molecule.heavy_atoms} heavy atoms"
            return f"No training molecule has atoms with such surroundings as {count}: {names}{more}."
        if score > 1.0:
            return f"The training molecules are unlike it: {score:.1f} times as far as is usual."
        if not seen and molecule.heavy_atoms < self.smallest:
            return f"Fewer than {FEW} training molecules are as small, and it is none of them."
        return None

    def _measure(self, traits: Traits, seen: Sequence[Sequence[int]]) -> list[float]:
        """Return the scores; a molecule that was seen may be nearer to itself than to any anchor.

        The places of training molecules are kept in steps, which the strangest of them are beyond: to find itself, a
        molecule is taken in steps, too.
        """
        scores = self.scores(traits)
        for row, own in enumerate(seen):
            if own:
                known = from_bytes(self.latents[list(own)], self.steps)
                place = from_bytes(to_bytes(self.place(traits[row : row + 1]), self.steps), self.steps)
                square = find_nearest(place, known, 1)[1].item()
                scores[row] = min(scores[row], np.sqrt(square) / self.threshold)
        return [float(score) for score in scores]

    def _find_rows(self, key: np.uint64) -> list[int]:
        """Return the rows of the training molecules whose bonds have this hash."""
        first, last = (int(np.searchsorted(self.keys, key, side=side)) for side in ("left", "right"))
        return sorted(self.order[first:last].tolist())

    def name(self, row: int) -> str:
        """Return the name of a training molecule: "gdb_4" in QM9, else its number in the data."""
        return f"{self.prefix}{self.ids[row]}"

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Return plain arrays by name."""
        arrays: dict[str, NDArray[Any]] = {name: getattr(self, name) for name in _PLAIN}
        arrays |= {"threshold": np.array([self.threshold]), "strange": np.array([self.strange])}
        arrays["smallest"] = np.array([self.smallest], dtype=np.int32)
        arrays |= {"ids": self.ids.astype(np.int32), "anchors": self.anchors.astype(np.int32)}
        arrays["keys"] = np.empty_like(self.keys)
        arrays["keys"][self.order] = self.keys
        arrays["keys"] = arrays["keys"].view(np.int64)  # which every reader of safetensors knows
        arrays |= {name: getattr(self, name).view(np.int64) for name in ("surroundings", "listed")}
        for number, (matrix, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            arrays |= {f"weight{number}": matrix.astype(KEPT), f"bias{number}": bias}
        return arrays | {f"limits.{name}": array for name, array in self.limits.to_arrays().items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], traits: int, features: int, prefix: str = "") -> Trust:
        """Rebuild from `to_arrays`.

        Args:
            arrays: Plain arrays by name.
            traits: Number of traits T.
            features: Number of traits that place a molecule in the latent space.
            prefix: What names of training molecules begin with.

        Raises:
            ValueError: An array is missing or of the wrong shape or type.
        """
        limits = {name.removeprefix("limits."): value for name, value in arrays.items() if name.startswith("limits.")}
        try:
            sizes = {name: len(arrays[name]) for name in _COUNTED}
            shapes = _shapes(traits, features, *sizes.values())
            for name, (shape, kind) in shapes.items():
                if arrays[name].shape != shape or arrays[name].dtype.type is not kind:
                    raise ValueError(f"'{name}' of its calibration has a wrong shape or type")
                if not np.isfinite(arrays[name]).all():
                    raise ValueError(f"'{name}' of its calibration has a NaN or infinite number")
        except KeyError as error:
            raise ValueError(f"its calibration lacks {error}") from error
        anchors = arrays["anchors"].astype(np.int64)
        if not len(anchors) or not ((anchors >= 0) & (anchors < sizes["latents"])).all():
            raise ValueError("its calibration has no training molecules")
        if not float(arrays["threshold"][0]) > 0.0:
            raise ValueError("its calibration has no distance that is usual")
        keys = arrays["keys"].view(np.uint64)
        order = np.argsort(keys, kind="stable")
        return cls(
            **{name: arrays[name] for name in _PLAIN},
            weights=tuple(arrays[f"weight{number}"].astype(np.float32) for number in range(3)),
            biases=tuple(arrays[f"bias{number}"] for number in range(3)),
            anchors=anchors,
            threshold=float(arrays["threshold"][0]),
            limits=Limits.from_arrays(limits),
            smallest=int(arrays["smallest"][0]),
            surroundings=np.sort(arrays["surroundings"].view(np.uint64)),
            strange=float(arrays["strange"][0]),
            listed=np.sort(arrays["listed"].view(np.uint64)),
            ids=arrays["ids"].astype(np.int64),
            keys=keys[order],
            order=order,
            prefix=prefix,
        )


_COUNTED: Final = ("bias0", "latents", "anchors", "edges", "sizes", "surroundings", "listed")
_PLAIN: Final = ("low", "high", "edges", "sizes", "quantiles", "least", "projection", "origin", "steps", "latents")


def _shapes(
    traits: int,
    features: int,
    width: int,
    count: int,
    anchors: int,
    edges: int,
    sizes: int,
    surroundings: int,
    listed: int,
) -> dict[str, tuple[tuple[int, ...], type[np.generic]]]:
    """Return the shape and type of every array that a calibration has, but those of the limits."""
    outputs = len(DEFAULT_KEYS)
    groups = (edges + 1) * (sizes + 1)
    shapes: dict[str, tuple[tuple[int, ...], type[np.generic]]] = {
        "low": ((traits,), np.float32),
        "high": ((traits,), np.float32),
        "edges": ((edges,), np.float64),
        "sizes": ((sizes,), np.int64),
        "quantiles": ((groups, outputs, len(LEVELS)), np.float64),
        "least": ((groups, outputs), np.float64),
        "projection": ((features, LATENT_SIZE), np.float32),
        "origin": ((LATENT_SIZE,), np.float32),
        "steps": ((LATENT_SIZE,), np.float32),
        "latents": ((count, LATENT_SIZE // 4 * 3), np.uint8),
        "anchors": ((anchors,), np.int32),
        "threshold": ((1,), np.float64),
        "smallest": ((1,), np.int32),
        "surroundings": ((surroundings,), np.int64),
        "strange": ((1,), np.float64),
        "listed": ((listed,), np.int64),
        "ids": ((count,), np.int32),
        "keys": ((count,), np.int64),
    }
    for number, (rows, columns) in enumerate(itertools.pairwise((traits, width, width, outputs))):
        shapes[f"weight{number}"] = ((rows, columns), KEPT)
        shapes[f"bias{number}"] = ((columns,), np.float32)
    return shapes


def load_trust(model: Model) -> Trust | None:
    """Return the calibration of a model, None if it has none.

    Raises:
        WeightsError: It does not fit the model.
    """
    if not model.extras:
        return None
    try:
        prefix = "gdb_" if model.metadata.get("data") == "qm9" else ""
        return Trust.from_arrays(model.extras, count_traits(model), 3 * model.config.node_width, prefix)
    except (ValueError, TypeError) as error:
        raise WeightsError(f"cannot use weights {model.name}: {error}", "Calibrate them again.") from error


def count_traits(model: Model) -> int:
    """Return the number of traits T that a model gives each molecule."""
    spreads = len(LATENTS) if len(model.networks) > 1 else 0
    return 3 * model.config.node_width + OTHER_TRAITS + spreads


def check_level(level: float | None) -> float | None:
    """Return the level of intervals as it is.

    Raises:
        UsageError: It is no number from 0.5 to 0.999.
    """
    known = level is None or (not isinstance(level, bool) and LOWEST_LEVEL <= level <= HIGHEST_LEVEL)
    if not known:
        raise UsageError(f"interval {level} is not allowed", f"Use a number from {LOWEST_LEVEL} to {HIGHEST_LEVEL}.")
    return level


def find_moves(traits: Traits, features: int) -> Array:
    """Return the logarithm of the root mean square move of each molecule's atoms, which follows the features [M]."""
    return traits[:, features].astype(np.float64)


def find_sizes(traits: Traits, features: int) -> NDArray[np.int64]:
    """Return the number of heavy atoms of each molecule, whose composition is among the traits [M]."""
    first = features + OTHER_TRAITS - len(ELEMENTS) - 1
    heavy = [first + column for column, number in enumerate(ELEMENTS) if number > 1]
    sizes: NDArray[np.int64] = np.rint(traits[:, heavy].sum(axis=1)).astype(np.int64)
    return sizes


def find_groups(
    edges: Array, sizes: NDArray[np.int64], traits: Traits, features: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the group of each molecule by how far its atoms move [M], and by its size, the common ones last [M]."""
    by_size = np.searchsorted(sizes, find_sizes(traits, features), side="right")
    return np.searchsorted(edges, find_moves(traits, features)), by_size


def predict_scales(
    low: Traits, high: Traits, weights: Sequence[Traits], biases: Sequence[Traits], traits: Traits
) -> Array:
    """Return exp of what the network of the error scale makes of traits [M, 12]."""
    x = rescale(low, high, traits)
    for matrix, bias in zip(weights[:-1], biases[:-1], strict=True):
        x = _silu(x @ matrix + bias)
    logarithms = np.clip(x @ weights[-1] + biases[-1], -_LARGEST_LOG, _LARGEST_LOG)
    scales: Array = np.exp(logarithms.astype(np.float64))
    return scales


def _silu(x: Traits) -> Traits:
    return (x / (1.0 + np.exp(-np.clip(x, -80.0, 80.0)))).astype(np.float32)


def rescale(low: Traits, high: Traits, traits: Traits) -> Traits:
    """Return traits from -1 at `low` to 1 at `high`, and not beyond [M, T]."""
    spans = np.maximum(high - low, 1e-6)
    rescaled: Traits = np.clip(2.0 * (traits - low) / spans - 1.0, -1.0, 1.0).astype(np.float32)
    return rescaled


def project(low: Traits, high: Traits, projection: Traits, traits: Traits) -> Traits:
    """Return latent coordinates before their middle is moved to zero [M, K]; traits may lie beyond the known range."""
    features = len(projection)
    spans = np.maximum(high[:features] - low[:features], 1e-6)
    placed: Traits = (2.0 * (traits[:, :features] - low[:features]) / spans - 1.0) @ projection
    return placed


def to_bytes(places: Traits, steps: Traits) -> NDArray[np.uint8]:
    """Return latent coordinates [M, K] in whole steps, four in three bytes [M, 3 K / 4]."""
    whole = np.clip(np.rint(places / steps) + _ZERO, 0.0, _ZERO + FARTHEST_STEP).astype(np.uint32)
    fours = whole.reshape(len(places), -1, 4) @ np.array([1 << 18, 1 << 12, 1 << 6, 1], dtype=np.uint32)
    return np.stack([fours >> 16, fours >> 8, fours], axis=-1).astype(np.uint8).reshape(len(places), -1)


def from_bytes(latents: NDArray[np.uint8], steps: Traits) -> Traits:
    """Undo `to_bytes`, but for the rounding."""
    threes = latents.reshape(len(latents), -1, 3).astype(np.uint32)
    fours = threes @ np.array([1 << 16, 1 << 8, 1], dtype=np.uint32)
    whole = (np.stack([fours >> 18, fours >> 12, fours >> 6, fours], axis=-1) & 63).reshape(len(latents), -1)
    places: Traits = (whole.astype(np.float32) - np.float32(_ZERO)) * steps
    return places


def _is_among(values: NDArray[np.uint64], known: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return which values are among those known, which ascend: few values need not sort them again [N]."""
    return np.searchsorted(known, values, side="right") > np.searchsorted(known, values)


def find_nearest(places: Traits, known: Traits, count: int) -> tuple[NDArray[np.int64], Array]:
    """Return rows and squared distances of the nearest of `known` [n, K] to each of `places` [M, K]: [M, count]."""
    squares = np.square(known).sum(axis=1)
    rows = np.empty((len(places), count), dtype=np.int64)
    distances = np.empty((len(places), count))
    for first in range(0, len(places), _BLOCK):
        block = places[first : first + _BLOCK]
        found = squares - 2.0 * (block @ known.T)
        nearest = found.argmin(axis=1)[:, None] if count == 1 else np.argpartition(found, count - 1, axis=1)[:, :count]
        exact = np.square(block[:, None].astype(np.float64) - known[nearest]).sum(axis=2)
        order = np.argsort(exact, axis=1, kind="stable")
        rows[first : first + _BLOCK] = np.take_along_axis(nearest, order, axis=1)
        distances[first : first + _BLOCK] = np.take_along_axis(exact, order, axis=1)
    return rows, distances


def interpolate_levels(table: Array, level: float) -> Array:
    """Return a group's quantiles at a level, from those at `LEVELS` [12, L]: [12]."""
    return np.array([np.interp(level, LEVELS, row) for row in table])
