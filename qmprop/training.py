"""Train the network: one run folder, resumable after every epoch, ending in one weights file."""

from __future__ import annotations

import hashlib
import json
import logging
import signal
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

import qmprop
from qmprop.auxiliary import Auxiliary, load_auxiliary
from qmprop.calibration import FEWEST, fit_trust, limit_splits, load_others, shorten, write_calibrated, write_measured
from qmprop.config import TrainConfig
from qmprop.datasets import Dataset as Molecules
from qmprop.errors import ConfigError, DataError, OutputError, TrainingError
from qmprop.geometries import Geometries, load_cheap
from qmprop.learning import EpochResult, Learner
from qmprop.model import Model, choose_device, load_model, save_model
from qmprop.qm9 import load_data, split_data
from qmprop.targets import DEFAULT_KEYS, TARGETS

WEIGHTS_FILE: Final = "weights.safetensors"
CHECKPOINT_FILE: Final = "last.ckpt"
CONFIG_FILE: Final = "config.toml"
SPLIT_FILE: Final = "split.json"


@dataclass(frozen=True, slots=True)
class TrainResult:
    """A finished run: its folder, its weights file and its last epoch."""

    folder: Path
    weights: Path
    last: EpochResult


def train(
    config: TrainConfig,
    *,
    data: str | Path = "qm9",
    out_dir: str | Path,
    resume: bool = False,
    device: str = "auto",
    on_epoch: Callable[[EpochResult], None] | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
    on_load: Callable[[int, int], None] | None = None,
    on_calibrate: Callable[[int, int], None] | None = None,
    on_measure: Callable[[int, int], None] | None = None,
) -> TrainResult:
    """Train a network, calibrate it and write its weights file.

    The file is written before the calibration, and then again with it. Fewer than `calibration.FEWEST` molecules to
    calibrate on (a twentieth of a small file, and no more than the limit of the configuration) leave it at that.

    Args:
        config: The settings.
        data: "qm9", the compact cache file, or a labeled extxyz file.
        out_dir: The run folder; it receives config.toml, split.json, logs, a checkpoint after every epoch and, at the
            end, weights.safetensors.
        resume: Continue the run in `out_dir` after its last whole epoch, or from the start if it has none.
        device: "auto", "cpu", "cuda", ...
        on_epoch: Called after every epoch.
        on_step: Called after every step with the steps done and to do, and the loss.
        on_load: Called while QM9 is parsed with the molecules done and to do.
        on_calibrate: Called with the molecules done and to do during the calibration.
        on_measure: The same of the measurement that follows, for each kind of geometry anew.

    Raises:
        ConfigError: `resume` with a configuration or data other than the run's, or a folder that holds no run; or
            weights to start from whose network has another shape.
        WeightsError: The weights to start from cannot be used.
        DataError: The data cannot be read or have too few molecules.
        TrainingError: The loss is not finite.
        OutputError: The run folder cannot be written, or holds a run already.
    """
    torch.set_flush_denormal(True)  # tails of Gaussians: denormal floats make the backward pass three times slower
    chosen = choose_device(device)
    folder = Path(out_dir)
    molecules = load_data(data, progress=on_load)
    splits = _limited_splits(molecules, config)
    start = _load_start(config)
    _open_folder(folder, config, molecules, splits, resume)
    pl.seed_everything(config.seed, workers=False, verbose=False)
    others = _load_others(config, molecules, splits, on_load)
    module = Learner(config, molecules, splits, others, _load_auxiliary(config, molecules), on_epoch, on_step)
    if start is not None:
        module.start_from(start.network)
    _run(module, folder, chosen, resume)
    if module.last is None:
        raise TrainingError(f"the run in {folder} has no finished epoch", f"Continue with --resume {folder}.")
    weights = folder / WEIGHTS_FILE
    metadata = _describe(config, molecules, splits, module.last)
    save_model(weights, Model(module.averaged, module.baseline, metadata=metadata, device=chosen))
    splits = limit_splits(splits, config.limit)
    if len(splits["calibrate"]) >= FEWEST:
        model = load_model(weights, device=str(chosen))
        trust, facts = fit_trust(model, molecules, splits, load_others(molecules, splits), on_calibrate)
        write_calibrated(weights, model, trust, facts, molecules, on_measure)
    else:
        write_measured(weights, load_model(weights, device=str(chosen)), molecules, on_measure)
    return TrainResult(folder, weights, module.last)


def _load_start(config: TrainConfig) -> Model | None:
    """Return the weights to start from, whose network must have the configured shape."""
    if config.start is None:
        return None
    model = load_model(config.start, device="cpu")
    if model.config != config.model:
        raise ConfigError(
            f"the network of {config.start} has another shape than the one to train",
            "Start from weights of the same [model] settings.",
        )
    return model


def _load_others(
    config: TrainConfig,
    molecules: Molecules,
    splits: dict[str, NDArray[np.int64]],
    on_load: Callable[[int, int], None] | None,
) -> tuple[Geometries, ...]:
    """Return the geometries of cheaper methods of the molecules to learn from and to validate with."""
    if config.force_field_share == 0.0:
        return ()
    return load_cheap(molecules, np.concatenate([splits["train"], splits["choose"]]), progress=on_load)


def _load_auxiliary(config: TrainConfig, molecules: Molecules) -> Auxiliary | None:
    return load_auxiliary(molecules) if config.charge_weight + config.vibration_weight > 0.0 else None


def _run(module: Learner, folder: Path, device: torch.device, resume: bool) -> None:
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    checkpoint = ModelCheckpoint(
        dirpath=folder,
        filename=CHECKPOINT_FILE.removesuffix(".ckpt"),
        save_on_train_epoch_end=True,
        save_top_k=1,
        enable_version_counter=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(pytorch_lightning|lightning_fabric|lightning_utilities|torch)\.")
        trainer = pl.Trainer(
            max_epochs=module.config.epochs,
            accelerator="gpu" if device.type == "cuda" else device.type,
            devices=[device.index or 0] if device.type == "cuda" else 1,
            logger=[_open_log(folder), TensorBoardLogger(folder, name="", version="logs")],
            callbacks=[checkpoint],
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )
        try:
            last = folder / CHECKPOINT_FILE
            trainer.fit(module, ckpt_path=last if resume and last.exists() else None, weights_only=True)
        except SystemExit as error:  # how the trainer leaves after Ctrl-C
            if trainer.state.status == "interrupted":
                signal.signal(signal.SIGINT, signal.default_int_handler)
                raise KeyboardInterrupt from error
            raise
        finally:
            torch.set_num_threads(module.threads)
            for pool in (module.helper, module.pool):
                pool.shutdown(cancel_futures=True)


def _open_log(folder: Path) -> CSVLogger:
    """Return a logger that goes on with the rows of a resumed run; CSVLogger alone deletes them."""
    logger = CSVLogger(folder, name="", version="logs")
    file = Path(logger.log_dir) / "metrics.csv"
    rows = file.read_bytes() if file.exists() else None
    _ = logger.experiment  # which deletes the file
    if rows is not None:
        file.write_bytes(rows)
    return logger


def _limited_splits(molecules: Molecules, config: TrainConfig) -> dict[str, NDArray[np.int64]]:
    splits = split_data(molecules)
    if config.limit is not None:
        splits = splits | {"train": splits["train"][: config.limit]}
    if len(splits["train"]) < 2 or len(splits["choose"]) < 1:
        raise DataError(f"{molecules.name} has {len(molecules)} molecules, too few to train on", "Use ten or more.")
    unlabeled = np.flatnonzero(np.isnan(molecules.targets[splits["train"]]).any(axis=1))
    if len(unlabeled):
        raise DataError(
            f"{len(unlabeled)} training molecules of {molecules.name} lack a label, the first is "
            f"molecule {splits['train'][unlabeled[0]]}",
            f"Every training molecule needs all of: {', '.join(DEFAULT_KEYS)}.",
        )
    return splits


def _open_folder(
    folder: Path, config: TrainConfig, molecules: Molecules, splits: dict[str, NDArray[np.int64]], resume: bool
) -> None:
    """Create the run folder and write configuration and split, or check that they are the ones of the run."""
    text = config.to_toml()
    split = {
        "data": molecules.name,
        "data_sha256": molecules.sha256,
        "split_sha256": _split_hash(splits),
        "ids": {name: molecules.ids[rows].tolist() for name, rows in splits.items() if name != "valid"},
    }
    if resume:
        if not all((folder / name).is_file() for name in (CONFIG_FILE, SPLIT_FILE)):
            raise ConfigError(f"{folder} holds no run to resume", "Start a new run without --resume.")
        changed = _changes(TrainConfig.from_toml(folder / CONFIG_FILE).to_dict(), config.to_dict())
        if changed:
            raise ConfigError(
                f"the configuration differs from the run's in {folder}: {changed}",
                "Resume with the same settings, or start a new run.",
            )
        known = json.loads((folder / SPLIT_FILE).read_text(encoding="utf-8"))
        if any(known[key] != split[key] for key in ("data_sha256", "split_sha256")):
            raise ConfigError(f"the data differ from those of the run in {folder}", "Resume with the same data.")
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / CONFIG_FILE).exists():
            raise OutputError(f"{folder} holds a run already", "Choose another --out, or continue it with --resume.")
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
        (folder / SPLIT_FILE).write_text(json.dumps(split), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write run folder {folder}: {error.strerror}", "Choose another --out.") from error


def _changes(old: dict[str, Any], new: dict[str, Any]) -> str:
    flat_old, flat_new = (_flatten(config) for config in (old, new))
    keys = [key for key in {**flat_old, **flat_new} if flat_old.get(key) != flat_new.get(key)]
    return ", ".join(f"{key} was {flat_old.get(key)}, is {flat_new.get(key)}" for key in keys)


def _flatten(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings with those of a table named "table.name"."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= {f"{key}.{name}": entry for name, entry in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _describe(
    config: TrainConfig, molecules: Molecules, splits: dict[str, NDArray[np.int64]], last: EpochResult
) -> dict[str, Any]:
    """Return the metadata of the weights file."""
    return {
        "training": config.to_dict(),
        "data": molecules.name,
        "data_sha256": molecules.sha256,
        "split_sha256": _split_hash(splits),
        "training_molecules": len(splits["train"]),
        "version": qmprop.__version__,
        "properties": {key: TARGETS[key].unit for key in DEFAULT_KEYS},
        "validation_mae": {key: shorten(value) for key, value in last.mae.items()},
    }


def _split_hash(splits: dict[str, NDArray[np.int64]]) -> str:
    digest = hashlib.sha256()
    for name in ("train", "choose", "calibrate", "test"):
        digest.update(np.ascontiguousarray(splits[name], dtype="<i8").tobytes())
    return digest.hexdigest()
