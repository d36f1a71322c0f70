"""Train the network: one run folder, resumable after every epoch, ending in one weights file."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

import qmprop
from qmprop.baseline import Baseline, center, compose
from qmprop.config import TrainConfig
from qmprop.datasets import Dataset as Molecules
from qmprop.egnn import EGNN, LATENTS
from qmprop.errors import ConfigError, DataError, OutputError, TrainingError
from qmprop.evaluation import evaluate
from qmprop.graph import Graph, build_graph
from qmprop.model import Model, choose_device, save_model
from qmprop.qm9 import load_data, split_data
from qmprop.targets import DEFAULT_KEYS, TARGETS, unit_factor

WEIGHTS_FILE: Final = "weights.safetensors"
CHECKPOINT_FILE: Final = "last.ckpt"
CONFIG_FILE: Final = "config.toml"
SPLIT_FILE: Final = "split.json"
_HOMO, _LUMO, _U0 = (LATENTS.index(key) for key in ("homo", "lumo", "u0"))


@dataclass(frozen=True, slots=True)
class EpochResult:
    """What one epoch did.

    Attributes:
        epoch: From 1.
        epochs: Of the whole run.
        loss: Mean training loss.
        mae: Validation MAE of the averaged weights, property key to value in its evaluation unit.
        molecules_per_second: Of training, validation left out.
        seconds: Of the epoch.
        seconds_left: Estimated for the rest of the run.
    """

    epoch: int
    epochs: int
    loss: float
    mae: dict[str, float]
    molecules_per_second: float
    seconds: float
    seconds_left: float


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
) -> TrainResult:
    """Train a network and write its weights file.

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

    Raises:
        ConfigError: `resume` with a configuration or data other than the run's, or a folder that holds no run.
        DataError: The data cannot be read or have too few molecules.
        TrainingError: The loss is not finite.
        OutputError: The run folder cannot be written, or holds a run already.
    """
    torch.set_flush_denormal(True)  # tails of Gaussians: denormal floats make the backward pass three times slower
    chosen = choose_device(device)
    folder = Path(out_dir)
    molecules = load_data(data, progress=on_load)
    splits = _limited_splits(molecules, config)
    _open_folder(folder, config, molecules, splits, resume)
    pl.seed_everything(config.seed, workers=False, verbose=False)
    module = _Module(config, molecules, splits, on_epoch, on_step)
    _run(module, folder, chosen, resume)
    if module.last is None:
        raise TrainingError(f"the run in {folder} has no finished epoch", f"Continue with --resume {folder}.")
    weights = folder / WEIGHTS_FILE
    metadata = module.describe()
    model = Model(copy.deepcopy(module.averaged), module.baseline, metadata=metadata, device=chosen)
    if len(splits["test"]):
        report = evaluate(weights=model, data=data, split="test")
        metadata["test_mae"] = {key: _shorten(errors.mae) for key, errors in report.properties.items()}
    save_model(weights, module.averaged, module.baseline, metadata)
    return TrainResult(folder, weights, module.last)


class _Arrays(Dataset[NDArray[np.int64]]):
    """Hands the sampler's batches of indices on; the molecules themselves are looked up where they are used."""

    def __getitem__(self, batch: NDArray[np.int64]) -> NDArray[np.int64]:
        return batch


class _Batches(Sampler[NDArray[np.int64]]):
    """Batches of positions in the training split, in an order that depends on seed and epoch only."""

    def __init__(self, count: int, size: int, seed: int) -> None:
        self.count, self.size, self.seed, self.epoch = count, size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return max(1, self.count // self.size)

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.count)
        return iter(np.array_split(order, len(self)))


class _Module(pl.LightningModule):
    """The training step, the averaged weights and their validation."""

    def __init__(
        self,
        config: TrainConfig,
        molecules: Molecules,
        splits: dict[str, NDArray[np.int64]],
        on_epoch: Callable[[EpochResult], None] | None,
        on_step: Callable[[int, int, float], None] | None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.config = config
        self.on_epoch_call, self.on_step_call = on_epoch, on_step
        self.identity = {"data": molecules.name, "data_sha256": molecules.sha256, "split_sha256": _split_hash(splits)}
        self.training_set = molecules.select(splits["train"])
        self.validation_set = molecules.select(splits["choose"])
        centered = center(self.training_set.numbers, self.training_set.positions, self.training_set.offsets)
        composition = compose(self.training_set.numbers, centered, self.training_set.offsets)
        self.positions = centered.astype(np.float32)
        self.baseline = Baseline.fit(self.training_set.targets, composition)
        self.labels = torch.from_numpy(self.baseline.remove(self.training_set.targets, composition)).float()
        self.network = EGNN(config.model)
        self.network.scales.copy_(torch.from_numpy(self.baseline.scales))
        self.averaged = copy.deepcopy(self.network).requires_grad_(False)
        self.loss_weights = torch.ones(len(LATENTS))
        self.loss_weights[_U0] = config.energy_weight
        self.batches = _Batches(len(self.training_set), config.batch_size, config.seed)
        self.threads = torch.get_num_threads()
        self.pool = ThreadPoolExecutor(self.threads, initializer=_prepare_thread)
        self.history: list[EpochResult] = []
        self.losses: list[Tensor] = []
        self.started = 0.0

    @property
    def last(self) -> EpochResult | None:
        """The last finished epoch."""
        return self.history[-1] if self.history else None

    def train_dataloader(self) -> DataLoader[NDArray[np.int64]]:
        """Index batches only: graphs are built in the threads of the step."""
        return DataLoader(_Arrays(), batch_size=None, sampler=self.batches, collate_fn=_keep)

    def configure_optimizers(self) -> Any:
        """AdamW under linear warm-up and a cosine that reaches zero with the last step."""
        config, steps = self.config, len(self.batches) * self.config.epochs
        optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        warmup = min(config.warmup_steps, steps // 20)

        def factor(step: int) -> float:
            rise = min(1.0, (step + 1) / (warmup + 1))
            return rise * 0.5 * (1.0 + float(np.cos(np.pi * min(step, steps) / steps)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_epoch_start(self) -> None:
        """Start the clock."""
        self.losses, self.started = [], time.monotonic()
        if self.device.type == "cpu":
            torch.set_num_threads(1)  # the parts of a batch have the cores

    def training_step(self, batch: NDArray[np.int64], batch_index: int) -> None:
        """Sum the gradients of the parts of a batch, clip, step, average."""
        parts = np.array_split(batch, self.workers)
        results = list((self.pool.map if len(parts) > 1 else map)(self._gradients, parts))
        shares = [len(part) / len(batch) for part in parts]
        loss = torch.stack([result[0] * share for result, share in zip(results, shares, strict=True)]).sum()
        if self.device.type == "cpu" and not torch.isfinite(loss):
            self._stop(parts, [result[0] for result in results])
        parameters = list(self.network.parameters())
        gradients = list(results[0][1])
        torch._foreach_mul_(gradients, shares[0])
        for result, share in zip(results[1:], shares[1:], strict=True):
            torch._foreach_add_(gradients, list(result[1]), alpha=share)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(parameters, self.config.clip, foreach=True)
        self.optimizers().step()
        self.lr_schedulers().step()
        decay = min(self.config.ema_decay, (1 + self.global_step) / (10 + self.global_step))
        torch._foreach_lerp_(list(self.averaged.parameters()), [p.detach() for p in parameters], 1.0 - decay)
        self.losses.append(loss.detach())
        if self.on_step_call is not None:
            self.on_step_call(self.global_step, len(self.batches) * self.config.epochs, float(loss))

    @property
    def workers(self) -> int:
        """Threads that share a batch: each runs whole operations on its own core, which beats splitting each one."""
        return self.threads if self.device.type == "cpu" else 1

    def on_train_epoch_end(self) -> None:
        """Validate the averaged weights on the molecules set aside for choosing, log, report."""
        seconds = time.monotonic() - self.started
        loss = float(torch.stack(self.losses).mean())
        if not np.isfinite(loss):
            raise TrainingError(f"the loss is {loss} in epoch {self.current_epoch + 1}", "Try a smaller --lr.")
        torch.set_num_threads(self.threads)
        mae = self._validate()
        if not np.isfinite(list(mae.values())).all():
            raise TrainingError(f"the weights are not finite in epoch {self.current_epoch + 1}", "Try a smaller --lr.")
        total = time.monotonic() - self.started
        rate = len(self.training_set) / seconds
        epoch = self.current_epoch + 1
        left = total * (self.config.epochs - epoch)
        result = EpochResult(epoch, self.config.epochs, loss, mae, rate, total, left)
        self.history.append(result)
        logged = {"loss": loss, "lr": self.lr_schedulers().get_last_lr()[0], "molecules_per_second": rate}
        self.log_dict(logged | {f"valid_{key}": value for key, value in mae.items()})
        if self.on_epoch_call is not None:
            self.on_epoch_call(result)

    def describe(self) -> dict[str, Any]:
        """Return the metadata of the weights file."""
        assert self.last is not None
        return {
            "training": self.config.to_dict(),
            **self.identity,
            "training_molecules": len(self.training_set),
            "version": qmprop.__version__,
            "properties": {key: TARGETS[key].unit for key in DEFAULT_KEYS},
            "validation_mae": {key: _shorten(value) for key, value in self.last.mae.items()},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the finished epochs with the weights."""
        checkpoint["history"] = [
            [r.epoch, r.epochs, r.loss, r.mae, r.molecules_per_second, r.seconds, r.seconds_left] for r in self.history
        ]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Bring the finished epochs back."""
        self.history = [EpochResult(*row) for row in checkpoint["history"]]
        self.batches.set_epoch(len(self.history))  # the trainer draws the first order before it tells the epoch

    def _gradients(self, batch: NDArray[np.int64]) -> tuple[Tensor, tuple[Tensor, ...]]:
        graph, labels = self._look_up(batch)
        loss = self._loss(self.network(*graph.arguments()), labels)
        return loss.detach(), torch.autograd.grad(loss, list(self.network.parameters()))

    def _look_up(self, batch: NDArray[np.int64]) -> tuple[Graph, Tensor]:
        """Return graph and labels of the training molecules at these positions."""
        starts, ends = self.training_set.offsets[batch], self.training_set.offsets[batch + 1]
        offsets = np.concatenate([[0], np.cumsum(ends - starts)])
        atoms = np.repeat(starts - offsets[:-1], ends - starts) + np.arange(offsets[-1])
        graph = build_graph(self.training_set.numbers[atoms], self.positions[atoms], offsets, self.config.model.cutoff)
        return graph.to(self.device), self.labels[torch.from_numpy(batch)].to(self.device)

    def _loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Weighted mean of the absolute errors of the normalized outputs and of the gap."""
        scales = self.network.scales
        errors = outputs - labels
        gaps = (errors[:, _LUMO] * scales[_LUMO] - errors[:, _HOMO] * scales[_HOMO]) / scales[_LUMO]
        weights = self.loss_weights.to(errors.device)
        return ((errors.abs() @ weights).mean() + gaps.abs().mean()) / (weights.sum() + 1.0)

    def _validate(self) -> dict[str, float]:
        data = self.validation_set
        model = Model(copy.deepcopy(self.averaged), self.baseline, device=self.device)
        predictions = np.concatenate(list(model.predict_arrays(data.numbers, data.positions, data.offsets)))
        mae = {}
        for key, found, known in zip(DEFAULT_KEYS, predictions.T, data.targets.T, strict=True):
            labeled = ~np.isnan(known)  # a user's file may lack labels here
            if labeled.any():
                error = float(np.abs(found - known)[labeled].mean())
                mae[key] = error / unit_factor(key, TARGETS[key].evaluation_unit)
        return mae

    def _stop(self, parts: list[NDArray[np.int64]], losses: list[Tensor]) -> None:
        """Name the molecules of a batch whose loss is not finite."""
        bad = np.concatenate([part for part, loss in zip(parts, losses, strict=True) if not torch.isfinite(loss)])
        graph, labels = self._look_up(bad)
        with torch.no_grad():
            finite = torch.isfinite(self.network(*graph.arguments()) - labels).all(dim=1).cpu().numpy()
        ids = self.training_set.ids[bad if finite.all() else bad[~finite]]
        names = ", ".join(map(str, ids[:10])) + (", ..." if len(ids) > 10 else "")
        raise TrainingError(
            f"the loss is not finite in epoch {self.current_epoch + 1} for the molecules with ids {names}",
            "Resume with a smaller --lr in a new run, or check these molecules' labels.",
        )


def _run(module: _Module, folder: Path, device: torch.device, resume: bool) -> None:
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
            module.pool.shutdown(cancel_futures=True)


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
    flat_old, flat_new = (config | config["model"] for config in (old, new))
    keys = [key for key in {**flat_old, **flat_new} if key != "model" and flat_old.get(key) != flat_new.get(key)]
    return ", ".join(f"{key} was {flat_old.get(key)}, is {flat_new.get(key)}" for key in keys)


def _split_hash(splits: dict[str, NDArray[np.int64]]) -> str:
    digest = hashlib.sha256()
    for name in ("train", "choose", "calibrate", "test"):
        digest.update(np.ascontiguousarray(splits[name], dtype="<i8").tobytes())
    return digest.hexdigest()


def _shorten(value: float) -> float:
    return float(f"{value:.5g}")


def _keep(batch: Any) -> Any:
    """Leave a batch of indices as it is, where the loader would make a tensor of it."""
    return batch


def _prepare_thread() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
