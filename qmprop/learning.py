"""What a training run repeats: batches, the step, the averaged weights and their validation."""

from __future__ import annotations

import copy
import dataclasses
import os
import shutil
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.utils.data import Sampler
from torch.utils.flop_counter import FlopCounterMode

from qmprop.auxiliary import Auxiliary
from qmprop.baseline import Baseline, center, compose
from qmprop.config import TrainConfig
from qmprop.datasets import Dataset as Molecules
from qmprop.egnn import EGNN, LATENTS, sum_atoms
from qmprop.errors import TrainingError
from qmprop.evaluation import measure
from qmprop.geometries import Geometries
from qmprop.graph import Graph, build_graph
from qmprop.model import Model, prepare_thread
from qmprop.muon import Muon, group_by_shape
from qmprop.targets import BOHR_ANGSTROM, ELEMENTS

#: Molecules that make it worth a thread's while.
_PART_SIZE: Final = 8
#: Learning rate of what AdamW trains, in that of the matrices.
_REST_RATE: Final = 1 / 3
#: Molecules of a size that makes up less of the training split come several times an epoch, but not more than so often:
#: QM9 has few molecules of one to four heavy atoms, and they are the first that people try.
_SIZE_SHARE: Final = 0.004
_MOST_REPEATS: Final = 40
#: How often the geometry of a cheaper method takes the place of those before it, where there are several.
_LATER_SHARE: Final = 0.75
#: Rows and columns that make a matrix worth Muon's while.
_MATRIX_SIZE: Final = 16
#: Distances in Å below which an atom that is not where it should be matters less and less: in the first quarter of a
#: run from random weights, in which a sharper loss would have everything stay where it is, and after it.
_TOLERANCES: Final = (0.03, 0.005)
#: Muon optimizers that the matrices are dealt out to; a checkpoint holds the state of each.
_MUONS: Final = 2
#: How a checkpoint lays out the state of the optimizers; another one cannot be resumed.
_LAYOUT: Final = 2
#: Batches made ready ahead, and steps after which a GPU tells its loss, for which it has to be waited for.
_STEPS_AHEAD: Final = 4
_STEPS_BETWEEN_REPORTS: Final = 50
#: Spread of charges (e) and modes below which there is nothing to learn.
_LEAST_SPREAD: Final = 1e-3
#: Molecules to pass through the network that make it worth the minutes that compiling it takes.
_COMPILE_FROM: Final = 300_000
#: How: for one thread each, and free of the lock that lets only one thread at a time run Python.
_COMPILER: Final[dict[str, str | int | bool | Callable[..., Any]]] = {"cpp.threads": 1, "cpp_wrapper": True}
#: How long the device's peak is measured.
_PEAK_SECONDS: Final = 0.3
_HOMO, _LUMO, _R2 = (LATENTS.index(key) for key in ("homo", "lumo", "r2"))

_T = TypeVar("_T")
_R = TypeVar("_R")


class Prepared(NamedTuple):
    """What a step needs of a batch: M molecules, N atoms.

    Attributes:
        graph: The given geometries.
        labels: Normalized labels [M, 10].
        minima: DFT positions in Å [N, 3].
        charges: Normalized atomic charges [N]; none where they are not learned.
        modes: Normalized numbers of vibrational modes [M, K]; none where they are not learned.
    """

    graph: Graph
    labels: Tensor
    minima: Tensor
    charges: Tensor
    modes: Tensor

    def pin(self) -> Prepared:
        """Return the same in memory from which a GPU can fetch it by itself."""
        graph, *targets = self
        return Prepared(graph.pin(), *(target.pin_memory() for target in targets))

    def to(self, device: torch.device) -> Prepared:
        """Return the same on a device."""
        graph, *targets = self
        return Prepared(graph.to(device), *(target.to(device, non_blocking=True) for target in targets))


class Part(NamedTuple):
    """What one thread takes of a batch.

    Attributes:
        rows: Positions of its molecules in the training split [M].
        prepared: What a step needs of them.
    """

    rows: NDArray[np.int64]
    prepared: Prepared


class Readouts(nn.Module):
    """Reads charges and vibrations from what the layers make of the atoms, while the network is trained.

    That is not needed to predict. It makes the layers know more of the electrons than twelve numbers teach them.
    """

    def __init__(self, width: int, modes: int) -> None:
        super().__init__()
        self.charges = nn.Linear(width, 1)
        self.modes = nn.Linear(width, modes)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


@dataclass(frozen=True, slots=True, eq=False)
class _Trainees:
    """What one optimizer trains.

    Attributes:
        parameters: Those that it trains.
        places: Where their gradients are among all.
        averaged: Averaged weights.
        followed: The parameters that these follow.
    """

    parameters: list[nn.Parameter]
    places: list[int]
    averaged: list[Tensor]
    followed: list[Tensor]

    @torch.no_grad()
    def collect(self, shares: Sequence[float], parts: Sequence[Sequence[Tensor]]) -> Tensor:
        """Take the gradients of the parts of a batch together; return their norm []."""
        total, taken = [parts[0][place] for place in self.places], shares[0]
        for share, part in zip(shares[1:], parts[1:], strict=True):
            taken += share
            torch._foreach_lerp_(total, [part[place] for place in self.places], share / taken)
        for parameter, gradient in zip(self.parameters, total, strict=True):
            parameter.grad = gradient
        return nn.utils.get_total_norm(total, foreach=True)

    @torch.no_grad()
    def average(self, decay: float) -> None:
        """Let the averaged weights follow."""
        torch._foreach_lerp_(self.averaged, self.followed, 1.0 - decay)


@dataclass(frozen=True, slots=True)
class EpochResult:
    """What one epoch did.

    Attributes:
        epoch: From 1.
        epochs: Of the whole run.
        loss: Mean training loss.
        mae: Validation MAE of the averaged weights, property key to value in its evaluation unit.
        others: The same from the geometries of cheaper methods, by their kind ("mmff", "xtb"), where there are any.
        molecules_per_second: Of training, validation left out.
        peak_share: Floating-point operations of the matrix products, over what the device can do at most.
        seconds: Of the epoch.
        seconds_left: Estimated for the rest of the run.
    """

    epoch: int
    epochs: int
    loss: float
    mae: dict[str, float]
    others: dict[str, dict[str, float]]
    molecules_per_second: float
    peak_share: float
    seconds: float
    seconds_left: float


class Batches(Sampler[NDArray[np.int64]]):
    """Batches of positions in the training split, in an order that depends on seed and epoch only."""

    def __init__(self, molecules: NDArray[np.int64], size: int, seed: int) -> None:
        self.molecules, self.size, self.seed, self.epoch = molecules, size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return max(1, len(self.molecules) // self.size)

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.molecules)
        return iter(np.array_split(order, len(self)))


class Ahead:
    """Batches made ready in another thread a few steps ahead, so that the step does not wait for them.

    Args:
        sampler: Batches of indices; the trainer tells it the epoch.
        begin: Called at the start of an epoch.
        prepare: Makes of a batch of indices what the step needs.
        pool: Runs `prepare`.
    """

    def __init__(
        self,
        sampler: Batches,
        begin: Callable[[], None],
        prepare: Callable[[NDArray[np.int64]], list[Part]],
        pool: ThreadPoolExecutor,
    ) -> None:
        self.sampler, self.begin, self.prepare, self.pool = sampler, begin, prepare, pool

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[list[Part]]:
        self.begin()
        waiting: deque[Future[list[Part]]] = deque()
        for batch in self.sampler:
            waiting.append(self.pool.submit(self.prepare, batch))
            if len(waiting) > _STEPS_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class Learner(pl.LightningModule):
    """The training step, the averaged weights and their validation.

    Args:
        config: The settings.
        molecules: All molecules; positions in Å, the twelve properties in default units.
        splits: Their split; "train" is learned from, "choose" validates.
        geometries: Geometries of the same molecules by cheaper methods; none to learn from the DFT geometries alone.
            Of a molecule that several of them know, the later ones come more often.
        auxiliary: Charges and vibrations of the same molecules to learn beside their properties.
        on_epoch: Called after every epoch.
        on_step: Called after every step with the steps done and to do, and the loss.

    Attributes:
        network: The network that is trained.
        readouts: What reads charges and vibrations from it.
        loss_weights: Weight of each output in the loss.
        averaged: The exponential moving average of its weights, which is validated and shipped.
        baseline: Fitted on the training molecules only.
        history: The finished epochs.
    """

    loss_weights: Tensor

    def __init__(
        self,
        config: TrainConfig,
        molecules: Molecules,
        splits: dict[str, NDArray[np.int64]],
        geometries: Sequence[Geometries] = (),
        auxiliary: Auxiliary | None = None,
        on_epoch: Callable[[EpochResult], None] | None = None,
        on_step: Callable[[int, int, float], None] | None = None,
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
        self.others: list[tuple[NDArray[np.float32], NDArray[np.bool_]]] = []
        self.other_validation_sets: dict[str, Molecules] = {}
        atoms = molecules.locate(splits["train"])[0]
        for other in geometries:
            positions = center(self.training_set.numbers, other.positions[atoms], self.training_set.offsets)
            self.others.append((positions.astype(np.float32), other.found[splits["train"]]))
            if len(moved := other.move(molecules, splits["choose"])):
                self.other_validation_sets[other.kind] = moved
        self.baseline = Baseline.fit(self.training_set.targets, composition)
        self.labels = torch.from_numpy(self.baseline.remove(self.training_set.targets, composition)).float()
        self.network = EGNN(config.model)
        self.network.scales.copy_(torch.from_numpy(self.baseline.scales))
        self.averaged = copy.deepcopy(self.network).requires_grad_(False)
        self.charges, self.modes = _normalize(auxiliary, molecules, splits["train"])
        self.readouts = Readouts(config.model.node_width, max(1, self.modes.shape[1]))
        weights = torch.tensor([getattr(config.loss, key) for key in LATENTS])
        self.register_buffer("loss_weights", weights, persistent=False)
        self.repeated = _repeat(self.training_set)
        self.sizes = np.diff(self.training_set.offsets)
        self.batches = Batches(self.repeated, config.batch_size, config.seed)
        self.threads = torch.get_num_threads()
        self.pool = ThreadPoolExecutor(self.threads, initializer=prepare_thread)
        self.helper = ThreadPoolExecutor(1, initializer=prepare_thread)
        self.history: list[EpochResult] = []
        self.losses: list[Tensor] = []
        self.trainees: list[_Trainees] = []
        self.started = 0.0
        self.operations = self.peak = 0.0
        self.find_loss: Callable[..., Tensor] = find_loss
        self.tried_to_compile = False

    def start_from(self, network: EGNN) -> None:
        """Start from the weights of a network of the same shape; the baseline stays the one of this run."""
        for own in (self.network, self.averaged):
            own.load_state_dict(network.state_dict() | {"scales": own.scales})

    @property
    def last(self) -> EpochResult | None:
        """The last finished epoch."""
        return self.history[-1] if self.history else None

    def train_dataloader(self) -> Ahead:
        """Batches whose graphs are built beside the steps before."""
        return Ahead(self.batches, self._draw_geometries, self._prepare, self.helper)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_index: int) -> Any:
        """Leave batches as they are: the step moves what it needs."""
        return batch

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Muon for the matrices between hidden features, shared out over the threads, and AdamW for the rest."""
        config = self.config
        matrices = [
            parameter
            for name, parameter in self.network.named_parameters()
            if parameter.ndim == 2 and min(parameter.shape) >= _MATRIX_SIZE and not name.startswith("embedding")
        ]
        known = {id(matrix) for matrix in matrices}
        rest = [parameter for parameter in self.trained if id(parameter) not in known]
        decay = config.weight_decay
        muons = [Muon(share, config.lr, decay) for share in _share_matrices(matrices)]
        adam = torch.optim.AdamW(rest, config.lr * _REST_RATE, weight_decay=decay, fused=True)
        self.trainees = [self._find_trainees(optimizer) for optimizer in (adam, *muons)]
        return [adam, *muons]

    def _find_trainees(self, optimizer: torch.optim.Optimizer) -> _Trainees:
        """Return what one of the optimizers trains."""
        places = {id(parameter): place for place, parameter in enumerate(self.trained)}
        averaged = dict(zip(map(id, self.network.parameters()), self.averaged.parameters(), strict=True))
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        followed: list[Tensor] = [own for own in parameters if id(own) in averaged]
        return _Trainees(
            parameters, [places[id(own)] for own in parameters], [averaged[id(own)] for own in followed], followed
        )

    def _rate(self, step: int) -> float:
        """Return the learning rate of a step: linear warm-up, then a cosine that reaches zero with the last step."""
        steps = len(self.batches) * self.config.epochs
        warmup = min(self.config.warmup_steps, steps // 20)
        rise = min(1.0, (step + 1) / (warmup + 1))
        return self.config.lr * rise * 0.5 * (1.0 + float(np.cos(np.pi * min(step, steps) / steps)))

    def on_train_epoch_start(self) -> None:
        """Start the clock."""
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32
        if self.device.type == "cpu" or self.peak == 0.0:
            self._measure_peak()
        if self.device.type == "cpu":
            torch.set_num_threads(1)  # the parts of a batch have the cores
            self._compile()
        self.losses, self.started = [], time.monotonic()

    def training_step(self, parts: list[Part], batch_index: int) -> None:
        """Find the gradients, clip, step, average."""
        losses, gradients = zip(*self._spread(lambda part: self._differentiate(part.prepared), parts), strict=True)
        sizes = [len(part.rows) for part in parts]
        shares = [size / sum(sizes) for size in sizes]
        loss = torch.stack([own * share for own, share in zip(losses, shares, strict=True)]).sum()
        on_cpu = self.device.type == "cpu"  # elsewhere, looking at the loss would have to wait for it
        if on_cpu and not torch.isfinite(loss):
            self._stop(parts, losses)
        norms = self._spread(lambda trainees: trainees.collect(shares, gradients), self.trainees)
        self._step(nn.utils.get_total_norm(norms))
        self.losses.append(loss)
        report = on_cpu or self.global_step % _STEPS_BETWEEN_REPORTS == 0
        if self.on_step_call is not None and report:
            self.on_step_call(self.global_step, len(self.batches) * self.config.epochs, float(loss))

    def _spread(self, call: Callable[[_T], _R], items: Sequence[_T]) -> list[_R]:
        """Call for each of the items, in threads where there are several."""
        return list((self.pool.map if self.workers > 1 and len(items) > 1 else map)(call, items))

    def _prepare(self, batch: NDArray[np.int64]) -> list[Part]:
        """Look up a batch in parts that go to one thread each."""
        parts = self._deal(batch, min(self.workers, -(-len(batch) // _PART_SIZE)))
        looked_up = [self._look_up(rows) for rows in parts]
        if self.device.type == "cuda":
            looked_up = [prepared.pin() for prepared in looked_up]
        return [Part(rows, prepared) for rows, prepared in zip(parts, looked_up, strict=True)]

    def _deal(self, batch: NDArray[np.int64], count: int) -> list[NDArray[np.int64]]:
        """Return a batch in parts with about as many atoms each, as the step waits for the slowest."""
        turns, places = np.divmod(np.arange(len(batch)), count)
        places = np.where(turns % 2, count - 1 - places, places)
        owners = np.empty_like(places)
        owners[np.argsort(-self.sizes[batch], kind="stable")] = places
        return [batch[owners == part] for part in range(count)]

    def _step(self, norm: Tensor) -> None:
        """Clip gradients by the norm of all, step and average, each optimizer's in its own thread."""
        optimizers = self.optimizers()
        rest, *muons = optimizers if isinstance(optimizers, list) else [optimizers]
        rate = self._rate(self.global_step)
        decay = min(self.config.ema_decay, (2 + self.global_step) / (11 + self.global_step))
        for optimizer in (rest, *muons):
            for group in optimizer.param_groups:
                group["lr"] = rate * _REST_RATE if optimizer is rest else rate
        steps = [rest.step, *(muon.optimizer.step for muon in muons)]  # the trainer counts those of the first

        def step(number: int) -> None:
            nn.utils.clip_grads_with_norm_(self.trainees[number].parameters, self.config.clip, norm, foreach=True)
            steps[number]()
            self.trainees[number].average(decay)

        self._spread(step, range(len(steps))[::-1])  # what takes long first

    @cached_property
    def trained(self) -> list[nn.Parameter]:
        """All parameters that have gradients."""
        used = [self.readouts.charges] * bool(self.charges.numel()) + [self.readouts.modes] * bool(self.modes.numel())
        return [*self.network.parameters(), *(parameter for part in used for parameter in part.parameters())]

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
        mae = self._validate(self.validation_set)
        others = {kind: self._validate(molecules) for kind, molecules in self.other_validation_sets.items()}
        if not np.isfinite([value for errors in (mae, *others.values()) for value in errors.values()]).all():
            raise TrainingError(f"the weights are not finite in epoch {self.current_epoch + 1}", "Try a smaller --lr.")
        total = time.monotonic() - self.started
        rate = len(self.repeated) / seconds
        share = rate * self.operations / self.peak
        epoch = self.current_epoch + 1
        left = total * (self.config.epochs - epoch)
        result = EpochResult(epoch, self.config.epochs, loss, mae, others, rate, share, total, left)
        self.history.append(result)
        logged = {"loss": loss, "lr": self._rate(self.global_step)}
        logged |= {"molecules_per_second": rate, "peak_share": share}
        logged |= {f"valid_{key}": value for key, value in mae.items()}
        for kind, errors in others.items():
            logged |= {f"{kind}_{key}": value for key, value in errors.items()}
        self.log_dict(logged)
        if self.on_epoch_call is not None:
            self.on_epoch_call(result)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the finished epochs with the weights."""
        fields = [field.name for field in dataclasses.fields(EpochResult)]
        checkpoint["layout"] = _LAYOUT
        checkpoint["history"] = [[getattr(result, name) for name in fields] for result in self.history]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Bring the finished epochs back."""
        if checkpoint.get("layout") != _LAYOUT:
            raise TrainingError("the run was begun by another version of qmprop", "Start a new run without --resume.")
        self.history = [EpochResult(*row) for row in checkpoint["history"]]
        self.batches.set_epoch(len(self.history))  # the trainer draws the first order before it tells the epoch

    def _compile(self) -> None:
        """Have the loss and its gradients translated to machine code where that is worth the minutes it takes."""
        worth = self.config.epochs * len(self.repeated) >= _COMPILE_FROM
        if self.tried_to_compile or not worth or not _has_compiler():
            return
        self.tried_to_compile = True
        self.find_loss = torch.compile(find_loss, dynamic=True, options=_COMPILER)
        try:
            self._gradients(np.arange(min(len(self.training_set), _PART_SIZE * 4)))
        except TorchDynamoException as error:  # no Python headers, an old compiler, a full disk, ...
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(f"training goes on without compiled code: {reason}", RuntimeWarning, stacklevel=2)
            self.find_loss = find_loss

    def _measure_peak(self) -> None:
        """Measure what the device can do, a CPU anew every epoch as other work slows it; count what a molecule takes.

        Counted are the operations of the network's matrix products, both ways; not those of the optimizer.
        """
        if self.operations == 0.0:
            batch = np.arange(min(len(self.training_set), _PART_SIZE * 4))
            self._draw_geometries()
            with FlopCounterMode(display=False) as counter:
                self._gradients(batch)
            self.operations = counter.get_total_flops() / len(batch)
        threads = self.threads if self.device.type == "cpu" else 1
        self.peak = max(self.peak, sum(self.pool.map(_measure_matmul, [self.device] * threads)))

    def _gradients(self, batch: NDArray[np.int64]) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self._differentiate(self._look_up(batch))

    def _differentiate(self, prepared: Prepared) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss = self._loss(prepared.to(self.device))
        return loss.detach(), torch.autograd.grad(loss, self.trained)

    def _draw_geometries(self) -> None:
        """Choose the geometry of every molecule for this epoch: DFT's, a cheaper one, or a jittered one between."""
        rng = np.random.default_rng([self.config.seed, self.batches.epoch, 1])
        count = len(self.training_set)
        choice = rng.random(count, dtype=np.float32)
        share = self.config.force_field_share
        steps = np.where(choice < share, np.float32(1.0), np.float32(0.0))
        between = choice < share / 3.0
        steps[between] = rng.random(int(between.sum()), dtype=np.float32) * 1.2
        factors = np.repeat(steps, self.sizes)[:, None]
        inputs = self.positions + factors * (self._draw_others(rng) - self.positions)
        jittered = np.repeat(between, self.sizes)
        inputs[jittered] += self.config.jitter * rng.standard_normal((int(jittered.sum()), 3), dtype=np.float32)
        centered = center(self.training_set.numbers, inputs, self.training_set.offsets)
        inputs[jittered] = centered[jittered]
        self.inputs = inputs

    def _draw_others(self, rng: np.random.Generator) -> NDArray[np.float32]:
        """Return a geometry by a cheaper method of every molecule, or DFT's where there is none [N, 3]."""
        drawn = self.positions
        for number, (positions, found) in enumerate(self.others):
            taken = found if number == 0 else found & (rng.random(len(found)) < _LATER_SHARE)
            drawn = np.where(np.repeat(taken, self.sizes)[:, None], positions, drawn)
        return drawn

    def _look_up(self, batch: NDArray[np.int64]) -> Prepared:
        """Return what a step needs of the training molecules at these positions."""
        atoms, offsets = self.training_set.locate(batch)
        graph = build_graph(self.training_set.numbers[atoms], self.inputs[atoms], offsets, self.config.model.cutoff)
        rows = torch.from_numpy(batch)
        charges = self.charges[torch.from_numpy(atoms)] if self.charges.numel() else self.charges
        modes = self.modes[rows] if self.modes.numel() else self.modes
        return Prepared(graph, self.labels[rows], torch.from_numpy(self.positions[atoms]), charges, modes)

    def _loss(self, prepared: Prepared) -> Tensor:
        return self.find_loss(
            self.network, self.readouts, self.loss_weights, self.config, prepared, torch.tensor(self._tolerance)
        )

    @property
    def _tolerance(self) -> float:
        begins = self.config.start is None and 4 * self.batches.epoch < self.config.epochs
        return _TOLERANCES[0 if begins else 1]

    def _validate(self, molecules: Molecules) -> dict[str, float]:
        model = Model(copy.deepcopy(self.averaged), self.baseline, device=self.device)
        return {key: errors.mae for key, errors in measure(model, molecules).items()}

    def _stop(self, parts: list[Part], losses: Sequence[Tensor]) -> None:
        """Name the molecules of a batch whose loss is not finite."""
        bad = np.concatenate([part.rows for part, loss in zip(parts, losses, strict=True) if not torch.isfinite(loss)])
        graph, labels = self._look_up(bad)[:2]
        with torch.no_grad():
            finite = torch.isfinite(self.network(*graph.arguments())[0] - labels).all(dim=1).cpu().numpy()
        ids = self.training_set.ids[bad if finite.all() else bad[~finite]]
        names = ", ".join(map(str, ids[:10])) + (", ..." if len(ids) > 10 else "")
        raise TrainingError(
            f"the loss is not finite in epoch {self.current_epoch + 1} for the molecules with ids {names}",
            "Resume with a smaller --lr in a new run, or check these molecules' labels.",
        )


def find_loss(
    network: EGNN, readouts: Readouts, weights: Tensor, config: TrainConfig, prepared: Prepared, tolerance: Tensor
) -> Tensor:
    """Return the loss of a batch: how wrong the outputs, the refined geometry and the readouts are.

    It is a function of its arguments alone, so that it can be compiled once for all epochs.

    Args:
        network: What is trained.
        readouts: What reads charges and modes from it.
        weights: Weight of each output [10].
        config: The settings, for the other weights.
        prepared: The batch.
        tolerance: Distance in Å below which misplaced atoms matter less [].

    Returns:
        The weighted mean of the absolute errors of the normalized outputs and of the gap, plus the distance to the DFT
        geometry and the mean errors of charges and modes, each times its weight [].
    """
    graph, labels, minima, charges, modes = prepared
    encoding = network.encode(*graph.arguments())
    outputs, refined = network.read(encoding, graph.molecules, graph.molecule_count), encoding.positions
    scales = network.scales
    errors = outputs - labels
    moments = graph.numbers * (refined.detach().square() - minima.square()).sum(dim=1) / BOHR_ANGSTROM**2
    surplus = sum_atoms(moments, graph.molecules, graph.molecule_count) / scales[_R2]
    errors[:, _R2] += surplus
    gaps = (errors[:, _LUMO] * scales[_LUMO] - errors[:, _HOMO] * scales[_HOMO]) / scales[_LUMO]
    total = (errors.abs() @ weights).mean() + config.loss.gap * gaps.abs().mean()
    loss: Tensor = total / (weights.sum() + config.loss.gap)
    if config.model.refine_layers:
        loss = loss + config.shift_weight * _misplacement(refined, minima, graph, tolerance)
    if charges.numel():
        read = readouts.charges(encoding.h)[:, 0]
        loss = loss + config.charge_weight * (read - charges).abs().mean()
    if modes.numel():
        counted = sum_atoms(readouts.modes(encoding.h), graph.molecules, graph.molecule_count)
        loss = loss + config.vibration_weight * (counted - modes).abs().mean()
    return loss


def _misplacement(refined: Tensor, minima: Tensor, graph: Graph, tolerance: Tensor) -> Tensor:
    """Return how far atoms are from where they should be plus how wrong the distances of neighbors are, in Å.

    The distances are what the layers after the refinement read; they do not see how far a turn about a bond in the
    middle moves the ends.
    """
    moves = _soften((refined - minima).square().sum(dim=1), tolerance).mean()
    found, wanted = (
        torch.linalg.vector_norm(x.index_select(0, graph.first) - x.index_select(0, graph.second), dim=1)
        for x in (refined, minima)
    )
    return moves + _soften((found - wanted).square(), tolerance).mean()


def _normalize(auxiliary: Auxiliary | None, molecules: Molecules, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Return charges [N] and modes [M, K] of the molecules at `rows`, less what their elements tell, in their spreads.

    Without auxiliary data, and for what is the same everywhere, there are none: [0], [M, 0].
    """
    if auxiliary is None:
        return torch.empty(0), torch.empty(len(rows), 0)
    atoms, offsets = molecules.locate(rows)
    elements = np.equal.outer(molecules.numbers[atoms], list(ELEMENTS)).astype(np.float64)
    charges = auxiliary.charges[atoms] - elements @ (
        elements.T @ auxiliary.charges[atoms] / np.maximum(elements.sum(axis=0), 1.0)
    )
    composition = np.column_stack([np.add.reduceat(elements, offsets[:-1]), np.ones(len(rows))])
    modes = auxiliary.count_modes()[rows]
    modes = modes - composition @ np.linalg.lstsq(composition, modes, rcond=None)[0]
    modes = modes[:, modes.std(axis=0) > _LEAST_SPREAD]
    return (
        torch.from_numpy(charges / max(charges.std(), _LEAST_SPREAD)).float(),
        torch.from_numpy(modes / modes.std(axis=0)).float(),
    )


def _soften(squares: Tensor, tolerance: Tensor) -> Tensor:
    """Return square roots that are quadratic below the tolerance."""
    return (squares + tolerance**2).sqrt() - tolerance


def _share_matrices(matrices: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Deal matrices out to the optimizers, those of a shape together, so that each has about as much to do."""
    groups = [(len(alike) * alike[0].numel() * min(alike[0].shape), alike) for alike in group_by_shape(matrices)]
    shares: list[list[nn.Parameter]] = [[] for _ in range(_MUONS)]
    loads = [0] * _MUONS
    for cost, alike in sorted(groups, key=itemgetter(0), reverse=True):
        least = loads.index(min(loads))
        shares[least] += alike
        loads[least] += cost
    return [share for share in shares if share]


def _repeat(molecules: Molecules) -> NDArray[np.int64]:
    """Return the positions of the molecules, those of sizes that are rare (in heavy atoms) several times."""
    sizes = molecules.heavy_atoms
    counts = np.maximum(np.bincount(sizes), 1)
    times = np.clip(_SIZE_SHARE * len(molecules) / counts, 1, _MOST_REPEATS).astype(np.int64)
    return np.repeat(np.arange(len(molecules)), times[sizes])


def _measure_matmul(device: torch.device) -> float:
    """Return the operations per second of large matrix products in one thread."""
    size = 1024 if device.type == "cpu" else 8192
    matrix = torch.randn(size, size, device=device)
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < _PEAK_SECONDS:
        started = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # which waits for the device
        seconds.append(time.perf_counter() - started)
    return 2.0 * size**3 / min(seconds)  # the fastest, as other work may slow the rest


def _has_compiler() -> bool:
    """Return whether there is what compiles a layer for the CPU."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None
