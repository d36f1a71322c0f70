"""Calibrate weights: fit what turns a molecule's traits into trust, on molecules the network was not trained on."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from qmprop.datasets import Dataset
from qmprop.errors import DataError, OutputError, UsageError
from qmprop.evaluation import GEOMETRIES, evaluate
from qmprop.geometries import Geometries, load_cheap
from qmprop.graph import build_graph
from qmprop.limits import Limits, learn_limits
from qmprop.model import Model, find_weights, join_models, load_model, save_model
from qmprop.qm9 import is_whole_qm9, load_data, split_data
from qmprop.targets import DEFAULT_KEYS, ELEMENTS
from qmprop.topology import find_bonds, hash_graphs, hash_surroundings
from qmprop.trust import (
    FARTHEST_STEP,
    FEW,
    GROUPS,
    KEPT,
    LATENT_SIZE,
    LEVEL,
    LEVELS,
    REACH,
    Traits,
    Trust,
    find_groups,
    find_moves,
    find_sizes,
    predict_scales,
    project,
    rescale,
    to_bytes,
)

Array = NDArray[np.float64]
Progress = Callable[[int, int], None]

#: Calibration needs this many molecules for the quantile of a level to mean anything.
FEWEST: Final = 100
#: Training molecules whose geometries teach what is usual.
_GEOMETRIES: Final = 40_000
#: Molecules of a sample that decide the range of the traits, and the axes of the latent space.
_AXES: Final = 20_000
#: Sizes of molecules with a smaller share are rare; of the others, every so many are measured from.
_RARE: Final = 0.1
_STRIDE: Final = 8
#: Share of traits that count as outliers at either end.
_OUTLIERS: Final = 5e-4
#: Share of calibration molecules, of each kind of geometry, beyond the threshold of the latent distance.
_FALSE_ALARMS: Final = 0.004
#: Largest share of calibration molecules with too many atoms of unknown surroundings.
_STRANGE: Final = 0.006
#: Spread of the first latent coordinate; the others have less.
_LATENT_SPREAD: Final = 1.5
#: Standard deviations of the noise on coordinates that shows the error scale distorted geometries, in Å.
_NOISE: Final = (0.01, 0.3)
_BLOCK: Final = 2_000  # molecules between two reports of progress
#: The network of the error scale and its training.
_WIDTH: Final = 256
_EPOCHS: Final = 30
_FEWEST_STEPS: Final = 600
_BATCH: Final = 512
_RATE: Final = 1e-3
_DECAY: Final = 1e-2
_DROPOUT: Final = 0.1
#: How much the properties whose errors are the hardest to foresee count in it; others count 1.
_WEIGHTS: Final = {"zpve": 3.0}
#: How often those kinds of geometry that few molecules have come in that training.
_REPEATS: Final = 4
#: How much larger other errors may be than those of molecules trained on, before these tell nothing of the others.
_BY_HEART: Final = 2.0


@dataclass(frozen=True, slots=True, eq=False)
class _Sample:
    """Traits [M, T] of molecules, the absolute errors of their predictions [M, 12], and their kind of geometry."""

    traits: Traits
    errors: Array
    kind: str


def calibrate(
    weights: str | Path | Sequence[str | Path],
    *,
    data: str | Path = "qm9",
    out: str | Path | None = None,
    shares: Sequence[float] | None = None,
    device: str = "auto",
    on_load: Progress | None = None,
    on_progress: Progress | None = None,
    on_measure: Progress | None = None,
) -> Model:
    """Calibrate a weights file, and measure on the test split what came of it.

    Args:
        weights: The weights file, or bundled weights by name; several make an ensemble, which is to be calibrated.
        data: What the weights were trained on: "qm9", its compact cache, or a labeled extxyz file.
        out: Where to write; None writes into the weights file itself, which an ensemble has none of.
        shares: How much each of several weights counts in the mean; None for all the same.
        device: "auto", "cpu", "cuda", ...
        on_load: Called while QM9 is parsed with the molecules done and to do.
        on_progress: Called with the molecules done and to do.
        on_measure: The same of the measurement that follows, for each kind of geometry anew.

    Returns:
        The calibrated model.

    Raises:
        DataError: The data cannot be read, are not those of the training, or are too few.
        WeightsError: The weights cannot be used, or not together.
        OutputError: The file cannot be written.
        UsageError: There is no place to write an ensemble to, or not one positive share for each of its weights.
    """
    paths = [find_weights(name) for name in ([weights] if isinstance(weights, str | Path) else weights)]
    if out is None and len(paths) > 1:
        raise UsageError("an ensemble needs a file of its own", "Name it with -o.")
    target = paths[0] if out is None else Path(out)
    if not os.access(target.parent, os.W_OK):  # known before the work is done rather than after it
        raise OutputError(f"cannot write weights {target}", "Choose a folder that exists and can be written.")
    model = join_models([load_model(path, device=device) for path in paths], shares)
    molecules = load_data(data, progress=on_load)
    if model.metadata.get("data_sha256") != molecules.sha256:
        raise DataError(f"{paths[0]} was not trained on {molecules.name}", "Give the training data with --data.")
    splits = limit_splits(split_data(molecules), _find_limit(model))
    trust, facts = fit_trust(model, molecules, splits, load_others(molecules, splits), on_progress)
    return write_calibrated(target, model, trust, facts, molecules, on_measure)


def write_calibrated(
    path: Path,
    model: Model,
    trust: Trust,
    facts: dict[str, Any],
    molecules: Dataset,
    on_measure: Progress | None = None,
) -> Model:
    """Write a model with its calibration and with its errors on the test split; return it as it can be loaded."""
    calibrated = model.replace(metadata={**model.metadata, "calibration": facts}, extras=trust.to_arrays())
    write_measured(path, calibrated, molecules, on_measure)
    return load_model(path, device=str(model.device))


def write_measured(path: Path, model: Model, molecules: Dataset, on_measure: Progress | None = None) -> None:
    """Write a model with its errors on the test split of its training data, if that has one."""
    accuracy: dict[str, Any] = {}
    for kind in GEOMETRIES if is_whole_qm9(molecules) else GEOMETRIES[:1]:
        if len(split_data(molecules)["test"]):
            limit = _find_limit(model)
            report = evaluate(weights=model, data=molecules, geometry=kind, limit=limit, on_progress=on_measure)
            accuracy[kind] = {"molecules": report.molecules, "outside": report.outside}
            for name in ("mae", "coverage"):
                numbers = {key: getattr(errors, name) for key, errors in report.properties.items()}
                accuracy[kind][name] = {key: shorten(value) for key, value in numbers.items() if value is not None}
    metadata = {**model.metadata, "accuracy": accuracy, "limits": _describe_limits(molecules)}
    save_model(path, model.replace(metadata=metadata))


def limit_splits(splits: dict[str, NDArray[np.int64]], limit: int | None) -> dict[str, NDArray[np.int64]]:
    """Return the split of a run that is limited to so many training molecules, and uses no more for the rest either."""
    return {name: rows[:limit] for name, rows in splits.items()}


def _find_limit(model: Model) -> int | None:
    """Return the limit of the run that made a model."""
    training = model.metadata.get("training")
    limit = training.get("limit") if isinstance(training, dict) else None
    return limit if isinstance(limit, int) else None


def load_others(molecules: Dataset, splits: dict[str, NDArray[np.int64]]) -> tuple[Geometries, ...]:
    """Return the geometries to calibrate on beside those of the data."""
    rows = np.concatenate([splits["train"], splits["choose"], splits["calibrate"]])
    return load_cheap(molecules, rows)


def fit_trust(
    model: Model,
    molecules: Dataset,
    splits: dict[str, NDArray[np.int64]],
    others: Sequence[Geometries] = (),
    on_progress: Progress | None = None,
) -> tuple[Trust, dict[str, Any]]:
    """Fit a calibration.

    The error scale learns from the molecules set aside for choosing, in all kinds of geometry and distorted, and from
    more that were trained on. The errors of these are brought to the size of the others' first; and molecules of rare
    sizes are left out: they come often in training, and what is known by heart would teach the scale to be too sure.
    Quantiles and the threshold come from the molecules set aside for calibration alone, the quantiles from the kinds of
    geometry that most of them have, as does the least scale of what is out of the domain.

    Args:
        model: The network.
        molecules: Labeled molecules in DFT geometries.
        splits: Their split: "train", "choose", "calibrate".
        others: Geometries of the same molecules by cheaper methods; none to calibrate on the given ones alone.
        on_progress: Called with the molecules done and to do.

    Returns:
        The calibration, and facts about it for people.

    Raises:
        DataError: There are too few molecules.
    """
    if len(splits["calibrate"]) < FEWEST:
        raise DataError(
            f"{molecules.name} has {len(splits['calibrate'])} molecules to calibrate on, {FEWEST} are needed"
        )
    choose, calibrate = (
        {"dft": molecules.select(splits[part])} | {other.kind: other.move(molecules, splits[part]) for other in others}
        for part in ("choose", "calibrate")
    )
    choose["distorted"] = _distort(molecules, splits["choose"], others)
    training = molecules.select(splits["train"])
    common = ~_find_rare(molecules, splits["train"])
    teaching = {other.kind: other.move(molecules, splits["train"][common]) for other in others}
    parts = (*choose.values(), *calibrate.values(), training, *teaching.values())
    meter = _Meter(sum(map(len, parts)), on_progress)

    learned = [_sample(model, data, kind, meter) for kind, data in choose.items() if len(data)]
    held = [_sample(model, data, kind, meter) for kind, data in calibrate.items() if len(data)]
    known = _sample(model, training, "dft", meter)
    taught = [_Sample(known.traits[common], known.errors[common], "dft")]
    taught += [_sample(model, data, kind, meter) for kind, data in teaching.items() if len(data)]

    low, high = _find_range(np.concatenate([sample.traits[:_AXES] for sample in learned]))
    features = 3 * model.config.node_width
    projection = _find_axes(low, high, known.traits[:_AXES], features)
    places = project(low, high, projection, known.traits)
    origin = places.mean(axis=0)
    farthest = np.quantile(np.abs(places - origin), 1.0 - _OUTLIERS, axis=0)
    steps = np.maximum(farthest / FARTHEST_STEP, 1e-6).astype(np.float32)
    rare = [sample for sample in learned if _REPEATS * len(sample.errors) <= len(splits["choose"])]
    weights, biases = _fit_scales(low, high, learned + rare * (_REPEATS - 1) + _enlarge(taught, learned))
    promised = [sample for sample in held if 2 * len(sample.errors) >= len(splits["calibrate"])]
    scales = [predict_scales(low, high, weights, biases, sample.traits) for sample in promised]
    told = np.concatenate([sample.traits for sample in promised])
    edges = _choose_edges(find_moves(told, features))
    sizes = _choose_sizes(find_sizes(told, features), molecules.heavy_atoms[splits["train"][common]])
    groups = find_groups(edges, sizes, told, features)
    errors = np.concatenate([sample.errors for sample in promised])
    quantiles, least = _find_quantiles(errors, np.concatenate(scales), *groups, len(sizes))
    keys, around, _ = _hash_molecules(molecules, splits["train"])
    surroundings = np.unique(around)
    unknown = _find_unknown(molecules, splits["calibrate"], surroundings)
    strange = _choose_strange(unknown)
    listed = _hash_others(molecules, splits["train"])
    order = np.argsort(keys, kind="stable")
    trust = Trust(
        low=low,
        high=high,
        weights=weights,
        biases=biases,
        edges=edges,
        sizes=sizes,
        quantiles=quantiles,
        least=least,
        projection=projection,
        origin=origin,
        steps=steps,
        latents=to_bytes(places - origin, steps),
        anchors=_choose_anchors(molecules, splits["train"]),
        threshold=1.0,
        smallest=int(np.sort(molecules.heavy_atoms[splits["train"]])[:FEW][-1]),
        surroundings=surroundings,
        strange=strange,
        listed=listed,
        limits=_learn_limits(molecules, splits["train"][:_GEOMETRIES], others),
        ids=molecules.ids[splits["train"]],
        keys=keys[order],
        order=order,
        prefix="gdb_" if molecules.name == "qm9" else "",
    )
    scores = {sample.kind: trust.scores(sample.traits) for sample in held}
    threshold = max(float(np.quantile(found, 1.0 - _FALSE_ALARMS)) for found in scores.values())
    kinds = [sample.kind for sample in promised]
    facts = {"molecules": len(splits["calibrate"]), "geometries": kinds, "level": LEVEL}
    unlike = np.zeros_like(unknown, dtype=bool) if len(listed) else unknown >= strange
    odd = {"dft": unlike} | {other.kind: unlike[other.found[splits["calibrate"]]] for other in others}
    facts["false_alarms"] = {
        kind: shorten(float(((found > threshold) | odd[kind]).mean())) for kind, found in scores.items()
    }
    return dataclasses.replace(trust, threshold=threshold), facts


class _Meter:
    """Tells how many molecules are done."""

    def __init__(self, total: int, call: Progress | None) -> None:
        self._total, self._call, self._done = total, call, 0

    def advance(self, count: int) -> None:
        self._done += count
        if self._call is not None:
            self._call(self._done, self._total)


def _sample(model: Model, molecules: Dataset, kind: str, meter: _Meter) -> _Sample:
    """Return traits and absolute errors of molecules."""
    traits, values = [], []
    for outcome in model.run_arrays(molecules.numbers, molecules.positions, molecules.offsets):
        traits.append(outcome.traits)
        values.append(outcome.values)
        meter.advance(len(outcome.values))
    return _Sample(np.concatenate(traits), np.abs(np.concatenate(values) - molecules.targets), kind)


def _distort(molecules: Dataset, rows: NDArray[np.int64], others: Sequence[Geometries]) -> Dataset:
    """Return molecules anywhere between DFT's and the force field's geometry, with noise on every coordinate."""
    rng = np.random.default_rng(0)
    given = molecules.select(rows)
    sizes = np.diff(given.offsets)
    share = np.repeat(rng.random(len(rows)), sizes)[:, None]
    size = np.repeat(_NOISE[0] * (_NOISE[1] / _NOISE[0]) ** rng.random(len(rows)), sizes)[:, None]
    positions = given.positions.astype(np.float64)
    if others:
        positions += share * (others[0].positions[molecules.locate(rows)[0]] - given.positions)
    positions += size * rng.standard_normal(positions.shape)
    return dataclasses.replace(given, positions=positions.astype(np.float32))


def _find_range(traits: Traits) -> tuple[Traits, Traits]:
    low, high = np.quantile(traits, [_OUTLIERS, 1.0 - _OUTLIERS], axis=0)
    return low.astype(np.float32), high.astype(np.float32)


def _enlarge(taught: Sequence[_Sample], learned: Sequence[_Sample]) -> list[_Sample]:
    """Return molecules that were trained on with errors as large, on average, as others have in that kind of geometry.

    Kinds of geometry are left out in which most properties' errors are so much larger for other molecules that these
    are known by heart.
    """
    usual = {sample.kind: np.nanmean(sample.errors, axis=0) for sample in learned}
    enlarged = []
    for sample in (sample for sample in taught if len(sample.errors) and sample.kind in usual):
        factors = usual[sample.kind] / np.nanmean(sample.errors, axis=0)
        if np.nanmedian(factors) < _BY_HEART:
            enlarged.append(dataclasses.replace(sample, errors=sample.errors * factors))
    return enlarged


def _find_rare(molecules: Dataset, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which molecules are of a size, in heavy atoms, that few of them have [rows]."""
    heavy = molecules.heavy_atoms[rows]
    rare: NDArray[np.bool_] = (np.bincount(heavy) < _RARE * len(rows))[heavy]
    return rare


def _choose_anchors(molecules: Dataset, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the places in `rows` of all molecules of rare sizes, and of every few of the others."""
    rare = _find_rare(molecules, rows)
    others = np.flatnonzero(~rare)
    return np.sort(np.concatenate([np.flatnonzero(rare), others[:: _STRIDE if len(others) > _AXES else 1]]))


def _find_axes(low: Traits, high: Traits, traits: Traits, features: int) -> Traits:
    """Return the projection to the principal components, each divided by the root of its spread [features, K].

    That stands between plain and whitened components: rare directions count more than they vary, but not as much as
    the common ones.
    """
    rescaled = project(low, high, np.eye(features, dtype=np.float32), traits).astype(np.float64)
    variances, axes = np.linalg.eigh(np.cov(rescaled, rowvar=False))
    count = min(LATENT_SIZE, features)
    spreads = np.sqrt(np.maximum(variances[::-1][:count], 1e-12))
    projection = np.zeros((features, LATENT_SIZE), dtype=np.float32)
    projection[:, :count] = axes[:, ::-1][:, :count] * _LATENT_SPREAD / np.sqrt(spreads[0] * spreads)
    return projection


def _fit_scales(low: Traits, high: Traits, samples: Sequence[_Sample]) -> tuple[tuple[Traits, ...], tuple[Traits, ...]]:
    """Fit the network of the error scale: the likeliest scale of a Laplace distribution of the errors.

    Its loss is log s + |error| / s. Errors that are not known (NaN) count nothing.

    Returns:
        Weights and biases.
    """
    traits = torch.from_numpy(np.concatenate([rescale(low, high, sample.traits) for sample in samples]))
    errors = np.concatenate([sample.errors for sample in samples])
    usual = np.nanmean(errors, axis=0)
    usual = np.where(np.isfinite(usual) & (usual > 0.0), usual, 1.0)
    known = torch.from_numpy(np.isfinite(errors))
    ratios = torch.from_numpy(np.nan_to_num(errors / usual).astype(np.float32))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = _train_scales(traits, ratios, known)
    layers = [layer for layer in network if isinstance(layer, nn.Linear)]
    matrices = [layer.weight.detach().numpy().T.astype(KEPT) for layer in layers]  # nothing is told from more digits
    weights = [matrix.astype(np.float32, order="C") for matrix in matrices]
    biases = [layer.bias.detach().numpy().copy() for layer in layers]
    biases[-1] += np.log(usual).astype(np.float32)
    return tuple(weights), tuple(biases)


def _train_scales(traits: torch.Tensor, ratios: torch.Tensor, known: torch.Tensor) -> nn.Sequential:
    readout = nn.Linear(_WIDTH, len(DEFAULT_KEYS))
    nn.init.zeros_(readout.weight)
    nn.init.zeros_(readout.bias)
    network = nn.Sequential(
        *(nn.Linear(traits.shape[1], _WIDTH), nn.SiLU(), nn.Dropout(_DROPOUT)),
        *(nn.Linear(_WIDTH, _WIDTH), nn.SiLU(), nn.Dropout(_DROPOUT)),
        readout,
    )
    optimizer = torch.optim.AdamW(network.parameters(), _RATE, weight_decay=_DECAY)
    counts = known * torch.tensor([_WEIGHTS.get(key, 1.0) for key in DEFAULT_KEYS])
    batches = max(1, len(traits) // _BATCH)
    epochs = max(_EPOCHS, _FEWEST_STEPS // batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=epochs * batches)
    for _ in range(epochs):
        for rows in torch.randperm(len(traits)).chunk(batches)[:batches]:
            logarithms = network(traits[rows]).clamp(-8.0, 8.0)
            losses = logarithms + ratios[rows] * torch.exp(-logarithms)
            optimizer.zero_grad()
            (losses * counts[rows]).mean().backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return network.eval()


def _choose_edges(moves: Array) -> Array:
    """Return what parts the moves into groups of about as many molecules, none of them empty, see `Trust.edges`."""
    groups = GROUPS if len(moves) >= GROUPS * FEWEST else 1
    quantiles = np.unique(np.quantile(moves, np.arange(1, groups) / groups, method="lower"))
    edges: Array = quantiles[quantiles < moves.max()]
    return edges


def _choose_sizes(sizes: NDArray[np.int64], common: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return what parts the rare sizes, each part of molecules enough for a quantile, see `Trust.sizes`.

    Args:
        sizes: Those of molecules to calibrate on.
        common: Those of the training molecules of sizes that are not rare.
    """
    smallest = int(common.min()) if len(common) else 0
    found: list[int] = []
    for size in (np.unique(sizes[sizes < smallest]) + 1).tolist():
        if ((sizes < size) & (sizes >= (found[-1] if found else 0))).sum() >= FEWEST:
            found.append(size)
    return np.array(found, dtype=np.int64)


def _find_quantiles(
    errors: Array, scales: Array, by_move: NDArray[np.int64], by_size: NDArray[np.int64], rare: int
) -> tuple[Array, Array]:
    """Return quantiles of |error| / scale in each group of moves and sizes [G, 12, L], and a scale large in it [G, 12].

    With n errors in a group the quantile of a level is the ceil((n + 1) level)-th smallest, which holds at least that
    share of new ones. A large scale is one that a share `LEVEL` of the group does not reach. As few molecules are of
    the `rare` first groups of sizes, theirs are those of all that move as far, or of all as large where these are more.
    """

    def find(members: NDArray[np.bool_]) -> tuple[Array, Array]:
        own = scales[members]
        return _conformal(errors[members] / own), np.quantile(own, LEVEL, axis=0)

    moved = [find(by_move == group) for group in range(by_move.max() + 1)]
    sized = [find(by_size == group) for group in range(rare)]
    quantiles = [[*(np.maximum(table, other) for other, _ in sized), table] for table, _ in moved]
    large = [[*(np.maximum(scale, other) for _, other in sized), scale] for _, scale in moved]
    return np.concatenate(quantiles), np.concatenate(large)


def _conformal(ratios: Array) -> Array:
    """Return the conformal quantiles of the ratios of each property that are known [12, L]."""
    table = np.ones((ratios.shape[1], len(LEVELS)))
    for row, column in enumerate(ratios.T):
        known = np.sort(column[np.isfinite(column)])
        if len(known):
            ranks = np.ceil((len(known) + 1) * LEVELS).astype(int)
            table[row] = known[np.minimum(ranks, len(known)) - 1]
    return table


def _learn_limits(molecules: Dataset, rows: NDArray[np.int64], others: Sequence[Geometries]) -> Limits:
    """Return the limits that molecules keep in all kinds of geometry."""
    blocks = list(_blocks(rows, 5 * _BLOCK))
    parts = [molecules.select(block) for block in blocks]
    parts += [other.move(molecules, block) for other in others for block in blocks]
    return functools.reduce(Limits.join, (learn_limits(*_with_pairs(part)) for part in parts if len(part)))


def _hash_molecules(
    molecules: Dataset, rows: NDArray[np.int64]
) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.int64]]:
    """Return hashes of molecules [rows] and of the surroundings of their heavy atoms [H], and whose each is [H]."""
    graphs, surroundings = [], []
    for part in _blocks(rows):
        block = molecules.select(part)
        numbers, positions, offsets, first, second = _with_pairs(block)
        bonds = find_bonds(numbers, positions, first, second)
        graphs.append(hash_graphs(numbers, offsets, bonds))
        surroundings.append(hash_surroundings(numbers, bonds)[numbers > 1])
    owners = np.repeat(np.arange(len(rows)), molecules.heavy_atoms[rows])
    return np.concatenate(graphs), np.concatenate(surroundings), owners


def _hash_others(molecules: Dataset, train: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return hashes of QM9's molecules that were not trained on, ascending; none of other data."""
    if not is_whole_qm9(molecules):
        return np.zeros(0, dtype=np.uint64)
    return np.unique(_hash_molecules(molecules, np.setdiff1d(np.arange(len(molecules)), train))[0])


def _find_unknown(molecules: Dataset, rows: NDArray[np.int64], surroundings: NDArray[np.uint64]) -> Array:
    """Return the share of the heavy atoms of each molecule that have surroundings other than these [rows]."""
    _, found, owners = _hash_molecules(molecules, rows)
    counts = np.bincount(owners, weights=~np.isin(found, surroundings), minlength=len(rows))
    shares: Array = counts / np.maximum(molecules.heavy_atoms[rows], 1)
    return shares


def _choose_strange(unknown: Array) -> float:
    """Return the least share of atoms of unknown surroundings that few enough molecules reach."""
    shares = [*np.unique(unknown), unknown.max() + 1e-6]  # none reaches the last
    return next(float(share) for share in shares if share > 0.0 and (unknown >= share).mean() <= _STRANGE)


def _with_pairs(block: Dataset) -> tuple[NDArray[np.int64], Array, NDArray[np.int64], Any, Any]:
    """Return what `topology` reads of molecules."""
    graph = build_graph(block.numbers, block.positions.astype(np.float64), block.offsets, REACH)
    positions = block.positions.astype(np.float64)
    return block.numbers.astype(np.int64), positions, block.offsets, graph.first.numpy(), graph.second.numpy()


def _blocks(rows: NDArray[np.int64], size: int = _BLOCK) -> Iterator[NDArray[np.int64]]:
    for first in range(0, len(rows), size):
        yield rows[first : first + size]


def _describe_limits(molecules: Dataset) -> dict[str, Any]:
    """Return the largest size and the elements among the molecules, for people."""
    return {
        "heavy_atoms": int(molecules.heavy_atoms.max()),
        "elements": [symbol for number, symbol in ELEMENTS.items() if (molecules.numbers == number).any()],
    }


def shorten(value: float) -> float:
    """Return the value with five digits, as metadata keep it."""
    return float(f"{value:.5g}")
