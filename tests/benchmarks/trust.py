"""What intervals and verdicts are worth where they matter most: `python -m tests.benchmarks.trust`.

Prints how errors, intervals and flags grow as geometries of test molecules are distorted. With `--unknown FILE`, it
judges the test molecules of nine heavy atoms by weights that never saw one (`--train FILE` makes such weights first).
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
from numpy.typing import NDArray

from qmprop.calibration import fit_trust, load_others
from qmprop.config import TrainConfig
from qmprop.datasets import Dataset
from qmprop.evaluation import Details, evaluate
from qmprop.geometries import load_cheap
from qmprop.learning import Learner
from qmprop.model import Model, load_model, save_model
from qmprop.qm9 import load_data, split_data
from qmprop.targets import DEFAULT_KEYS

SIZES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3)
LARGE = 0.1  # share of the errors that count as large


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-w", "--weights", default="egnn-qm9", help="calibrated weights to distort geometries for")
    parser.add_argument("--limit", type=int, default=2000, help="test molecules (default: 2000)")
    parser.add_argument("--train", metavar="FILE", help="train weights without molecules of nine heavy atoms into FILE")
    parser.add_argument("--epochs", type=int, default=6, help="of that training (default: 6)")
    parser.add_argument("--unknown", metavar="FILE", help="weights trained without molecules of nine heavy atoms")
    asked = parser.parse_args()
    data = load_data("qm9")
    if asked.train:
        train_without_nine(data, Path(asked.train), asked.epochs)
    elif asked.unknown:
        judge_unknown(data, load_model(asked.unknown), asked.limit)
    else:
        distort(data, load_model(asked.weights), asked.limit)


def distort(data: Dataset, model: Model, limit: int) -> None:
    """Print how errors, intervals and flags grow with noise on every coordinate."""
    test = data.select(split_data(data)["test"][:limit])
    noise = np.random.default_rng(0).standard_normal(test.positions.shape).astype(np.float32)
    usual = None
    print(
        f"{len(test):,} test molecules, DFT geometries with Gaussian noise on every coordinate, means over properties"
    )
    print("noise [Å]  MAE over that without noise  ± over that without noise  true values inside  out of domain")
    for size in SIZES:
        moved = dataclasses.replace(test, name="distorted", positions=test.positions + size * noise)
        details = evaluate(weights=model, data=moved).details
        errors, widths = np.abs(details.predictions - details.references), details.half_widths
        usual = usual or (errors.mean(axis=0), widths.mean(axis=0))
        ratios = [np.mean(values.mean(axis=0) / known) for values, known in zip((errors, widths), usual, strict=True)]
        inside, outside = (errors <= widths).mean(), details.outside.mean()
        print(f"{size:9.2f}  {ratios[0]:27.2f}  {ratios[1]:25.2f}  {inside:18.1%}  {outside:13.1%}")


def train_without_nine(data: Dataset, path: Path, epochs: int) -> None:
    """Train on the training molecules with eight heavy atoms or fewer."""
    splits = without_nine(data)
    others = load_cheap(data, np.concatenate([splits["train"], splits["choose"]]))
    pl.seed_everything(0, verbose=False)
    learner = Learner(TrainConfig(epochs=epochs, batch_size=64), data, splits, others, lambda result: print(result.mae))
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, num_sanity_val_steps=0
    )
    trainer.fit(learner)
    metadata = {"data": data.name, "data_sha256": data.sha256}
    save_model(path, Model(learner.averaged, learner.baseline, metadata=metadata))


def judge_unknown(data: Dataset, model: Model, limit: int) -> None:
    """Print how well the score finds large errors among molecules larger than any trained on."""
    splits = without_nine(data)
    trust, facts = fit_trust(model, data, splits, load_others(data, splits))
    calibrated = Model(model.network, model.baseline, metadata={"data": data.name}, extras=trust.to_arrays())
    details = evaluate(weights=calibrated, data=data, limit=limit).details
    nine = details.counts[:, 1:].sum(axis=1) == 9
    errors = np.abs(details.predictions - details.references)
    relative = errors / errors[~nine].mean(axis=0)
    print(f"{(~nine).sum():,} test molecules of up to eight heavy atoms, {nine.sum():,} of nine; false alarms {facts}")
    for name, chosen in (("up to eight", ~nine), ("nine", nine)):
        inside = (errors <= details.half_widths)[chosen].mean()
        far = (details.scores[chosen] > 1.0).mean()
        print(f"{name:12} error {relative[chosen].mean():.2f}, inside {inside:.1%}, far from training {far:.1%}")
    print("AUROC for the largest tenth of the errors of nine heavy atoms, of the score, of the predicted error:")
    for name, large in find_large(relative, nine).items():
        widths = details.half_widths[:, DEFAULT_KEYS.index(name)] if name in DEFAULT_KEYS else mean_width(details)
        print(f"{name:6} {rank(details.scores[nine], large):.3f} {rank(widths[nine], large):.3f}")
    print(f"AUROC of the score for nine heavy atoms against fewer: {rank(details.scores, nine):.3f}")


def without_nine(data: Dataset) -> dict[str, NDArray[np.int64]]:
    """Return the split without molecules of nine heavy atoms, but for the test molecules."""
    return {
        name: rows if name == "test" else rows[data.heavy_atoms[rows] < 9] for name, rows in split_data(data).items()
    }


def find_large(relative: NDArray[np.float64], nine: NDArray[np.bool_]) -> dict[str, NDArray[np.bool_]]:
    """Return which errors of nine heavy atoms are large: in the mean over the properties, and of each of them."""
    columns = {"mean": relative.mean(axis=1)} | dict(zip(DEFAULT_KEYS, relative.T, strict=True))
    return {name: column[nine] > np.quantile(column[nine], 1.0 - LARGE) for name, column in columns.items()}


def mean_width(details: Details) -> NDArray[np.float64]:
    """Return the half-widths, each over its property's mean, in the mean over the properties."""
    return (details.half_widths / details.half_widths.mean(axis=0)).mean(axis=1)


def rank(scores: NDArray[np.float64], positive: NDArray[np.bool_]) -> float:
    """Return the probability that a positive has a higher score than a negative: the area under the ROC curve."""
    ranks = np.empty(len(scores))
    ranks[np.argsort(scores, kind="stable")] = np.arange(1, len(scores) + 1)
    count = positive.sum()
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * (len(scores) - count)))


if __name__ == "__main__":
    main()
