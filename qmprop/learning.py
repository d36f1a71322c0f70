"""What a training run repeats: batches, the step, the averaged weights and their validation."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from qmprop.baseline import Baseline, center, compose
from qmprop.config import TrainConfig
from qmprop.datasets import Dataset as Molecules
from qmprop.egnn import EGNN, LATENTS
from qmprop.errors import TrainingError
from qmprop.evaluation import measure
from qmprop.graph import Graph, build_graph
from qmprop.model import Model

#: Molecules that make it worth a thread's while.
_PART_SIZE: Final = 8
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


class _Indices(Dataset[NDArray[np.int64]]):
    """Hands the sampler's batches of indices on; the molecules themselves are looked up where they are used."""

    def __getitem__(self, batch: NDArray[np.int64]) -> NDArray[np.int64]:
        return batch


class Batches(Sampler[NDArray[np.int64]]):
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


class Learner(pl.LightningModule):
    """The training step, the averaged weights and their validation.

    Args:
        config: The settings.
        molecules: All molecules; positions in Å, the twelve properties in default units.
        splits: Their split; "train" is learned from, "choose" validates.
        on_epoch: Called after every epoch.
        on_step: Called after every step with the steps done and to do, and the loss.

    Attributes:
        network: The network that is trained.
        averaged: The exponential moving average of its weights, which is validated and shipped.
        baseline: Fitted on the training molecules only.
        history: The finished epochs.
    """

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
        self.batches = Batches(len(self.training_set), config.batch_size, config.seed)
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
        return DataLoader(_Indices(), batch_size=None, sampler=self.batches, collate_fn=_keep)

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
        parts = np.array_split(batch, min(self.workers, -(-len(batch) // _PART_SIZE)))
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
        model = Model(copy.deepcopy(self.averaged), self.baseline, device=self.device)
        return {key: errors.mae for key, errors in measure(model, self.validation_set).items()}

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


def _keep(batch: Any) -> Any:
    """Leave a batch of indices as it is, where the loader would make a tensor of it."""
    return batch


def _prepare_thread() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
