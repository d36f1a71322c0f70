"""Training: it learns, it can be interrupted anywhere, and it stops clearly when something is wrong."""

from __future__ import annotations

import csv
import dataclasses
import json
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from samples import QM9_20, TINY, make_graph, read_dataset
from torch._dynamo.exc import TorchDynamoException

from qmprop import datasets, learning, qm9, training
from qmprop.auxiliary import KNOTS, Auxiliary
from qmprop.baseline import Baseline, center, compose
from qmprop.config import ModelConfig, TrainConfig
from qmprop.datasets import Dataset
from qmprop.egnn import LATENTS
from qmprop.errors import ConfigError, DataError, OutputError, TrainingError, WeightsError
from qmprop.evaluation import measure
from qmprop.geometries import Geometries, minimize_dataset, rmsd, superpose
from qmprop.model import Model, load_model
from qmprop.molecule import Molecule
from qmprop.targets import BOHR_ANGSTROM, DEFAULT_KEYS
from qmprop.training import EpochResult, TrainResult, train

#: Sixteen training molecules: four steps an epoch.
CONFIG = TrainConfig(epochs=3, batch_size=4, lr=1e-3, warmup_steps=2, seed=5, model=TINY)
STEPS = 4


@dataclasses.dataclass(frozen=True)
class Run:
    result: TrainResult
    epochs: list[EpochResult]
    steps: list[tuple[int, int, float]]


def predict_all(model: Model, dataset: Dataset) -> NDArray[np.float64]:
    outcomes = model.run_arrays(dataset.numbers, dataset.positions, dataset.offsets)
    return np.concatenate([outcome.values for outcome in outcomes])


def run(folder: Path, config: TrainConfig = CONFIG, **options) -> Run:
    epochs: list[EpochResult] = []
    steps: list[tuple[int, int, float]] = []
    options = {"data": QM9_20, "device": "cpu", "on_step": lambda *step: steps.append(step)} | options
    return Run(train(config, out_dir=folder, on_epoch=epochs.append, **options), epochs, steps)


def interrupt_after(step: int):
    """Return a callback that stands in for Ctrl-C."""

    def on_step(done: int, to_do: int, loss: float) -> None:
        if done == step:
            raise KeyboardInterrupt

    return on_step


def read_log(folder: Path) -> list[dict[str, str]]:
    with (folder / "logs" / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def change_labels(path: Path, changes: dict[int, str]) -> Path:
    """Write the twenty molecules, of some without the label of that name."""
    lines, molecule = [], -1
    for line in QM9_20.read_text().splitlines():
        if line.startswith("Properties"):
            molecule += 1
            key = changes.get(molecule)
            line = " ".join(word for word in line.split(" ") if key is None or not word.startswith(f"{key}="))
        lines.append(line)
    path.write_text("\n".join(lines) + "\n")
    return path


def perturb(dataset: Dataset, *, by: float = 0.1, seed: int = 0) -> Geometries:
    """Return geometries with every coordinate moved at random, laid on those of the data set."""
    noise = np.random.default_rng(seed).normal(scale=by, size=dataset.positions.shape)
    moved = superpose(dataset.positions + noise, dataset.positions, dataset.offsets)
    return Geometries("mmff", moved.astype(np.float32), np.ones(len(dataset), dtype=bool), {})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An uninterrupted run."""
    return run(tmp_path_factory.mktemp("run") / "whole")


def test_network_learns_32_molecules_by_heart(full: Dataset, tmp_path: Path) -> None:
    dataset = full.select(np.arange(40))
    datasets.write_cache(dataset, tmp_path / "forty.cache")
    shape = ModelConfig(node_width=64, message_width=32, refine_layers=1, layers=2, radial=16)
    config = TrainConfig(
        **{"epochs": 200, "batch_size": 8, "lr": 5e-3, "warmup_steps": 20, "ema_decay": 0.98, "weight_decay": 0.0},
        force_field_share=0.0,
        model=shape,
    )
    result = train(config, data=tmp_path / "forty.cache", out_dir=tmp_path / "run", device="cpu")

    learned = dataset.select(qm9.split_other(40)["train"])
    composition = compose(learned.numbers, center(learned.numbers, learned.positions, learned.offsets), learned.offsets)
    plain = Baseline.fit(learned.targets, composition).restore(np.zeros((32, 10)), composition)
    model = load_model(result.weights, device="cpu")
    found = predict_all(model, learned)
    before, after = (np.abs(values - learned.targets).mean(axis=0) for values in (plain, found))
    shrunk = dict(zip(DEFAULT_KEYS, before / after, strict=True))
    assert len(learned) == 32
    assert shrunk["u0"] > 100.0, shrunk
    assert min(shrunk.values()) > 10.0, shrunk


def test_run_folder_holds_what_the_run_was(finished: Run) -> None:
    folder, dataset = finished.result.folder, read_dataset()
    assert TrainConfig.from_toml(folder / "config.toml") == CONFIG
    split = json.loads((folder / "split.json").read_text())
    expected = qm9.split_other(20)
    assert split["ids"] == {key: expected[key].tolist() for key in ("train", "test", "choose", "calibrate")}
    assert split["data_sha256"] == dataset.sha256
    assert list((folder / "logs").glob("events.out.tfevents.*"))
    assert (folder / "last.ckpt").is_file()


def test_log_has_a_row_for_every_epoch(finished: Run) -> None:
    rows = read_log(finished.result.folder)
    assert [int(row["epoch"]) for row in rows] == [0, 1, 2]
    for row, epoch in zip(rows, finished.epochs, strict=True):
        assert float(row["loss"]) == pytest.approx(epoch.loss, rel=1e-5)
        for key in DEFAULT_KEYS:
            assert float(row[f"valid_{key}"]) == pytest.approx(epoch.mae[key], rel=1e-5)
        assert float(row["molecules_per_second"]) == pytest.approx(epoch.molecules_per_second, rel=1e-5)
        assert float(row["peak_share"]) == pytest.approx(epoch.peak_share, rel=1e-5)
        assert not [name for name in row if name.startswith("mmff_")], "there are no force-field geometries"
        assert epoch.others == {}
    assert float(rows[-1]["lr"]) == 0.0


def test_share_of_the_devices_peak_is_a_share(finished: Run) -> None:
    for epoch in finished.epochs:
        assert 0.0 < epoch.peak_share < 1.5


def test_a_moment_in_which_other_work_slows_the_device_does_not_lower_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = iter((1e10, 3e10, 2e10))
    module = learning.Learner(CONFIG, read_dataset(), qm9.split_other(20))
    module.pool, module.threads = ThreadPoolExecutor(1), 1
    monkeypatch.setattr(learning, "_measure_matmul", lambda device: next(measured))
    peaks, operations = [], set()
    for _ in range(3):
        module._measure_peak()
        peaks.append(module.peak)
        operations.add(module.operations)
    assert peaks == [1e10, 3e10, 3e10]
    assert len(operations) == 1
    assert operations.pop() > 1e5


def test_both_geometries_are_validated_every_epoch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    dataset, split = read_dataset(), qm9.split_other(20)
    geometries = minimize_dataset("mmff", dataset, processes=1)
    split |= {"choose": np.concatenate([split["choose"], split["calibrate"], split["test"]])}
    lost = split["choose"][-1]
    geometries.found[lost] = False
    monkeypatch.setattr(training, "split_data", lambda molecules: split)
    monkeypatch.setattr(training, "_load_others", lambda *arguments: (geometries,))
    finished = run(tmp_path, dataclasses.replace(CONFIG, epochs=2))
    for row, epoch in zip(read_log(tmp_path), finished.epochs, strict=True):
        for key in DEFAULT_KEYS:
            assert float(row[f"valid_{key}"]) == pytest.approx(epoch.mae[key], rel=1e-5)
            assert float(row[f"mmff_{key}"]) == pytest.approx(epoch.others["mmff"][key], rel=1e-5)
            assert epoch.mae[key] != epoch.others["mmff"][key]
    moved = dataclasses.replace(dataset, positions=geometries.positions).select(split["choose"][:-1])
    expected = measure(load_model(finished.result.weights, device="cpu"), moved)
    for key, error in expected.items():
        assert finished.epochs[-1].others["mmff"][key] == pytest.approx(error.mae, rel=1e-5), key


def test_geometries_of_the_molecules_to_learn_from_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(training, "load_cheap", lambda molecules, rows, **options: asked.append(rows))
    molecules, splits = read_dataset(), qm9.split_other(20)
    training._load_others(CONFIG, molecules, splits, None)
    assert sorted(asked[0]) == sorted([*splits["train"], *splits["choose"]])
    assert training._load_others(dataclasses.replace(CONFIG, force_field_share=0.0), molecules, splits, None) == ()
    assert len(asked) == 1


def draw(*, epoch: int = 0, geometries: bool = True, threads: int = 1, **settings: object) -> learning.Learner:
    """Return a learner with the geometries of an epoch drawn for 2,000 molecules."""
    dataset = read_dataset()
    dataset = dataclasses.replace(dataset, ids=np.arange(20)).select(np.tile(np.arange(20), 100))
    known = torch.get_num_threads()
    torch.set_num_threads(threads)
    module = learning.Learner(
        dataclasses.replace(CONFIG, **settings),
        dataset,
        {"train": np.arange(2000), "choose": np.arange(20)},
        (perturb(dataset),) if geometries else (),
    )
    torch.set_num_threads(known)
    module.batches.set_epoch(epoch)
    module._draw_geometries()
    module.pool.shutdown()
    return module


def test_drawn_geometries_are_of_three_kinds() -> None:
    """Half are DFT's, a third the force field's, a sixth on the line through both, which ends a fifth behind it."""
    module = draw(jitter=0.0)
    moves, lines = module.inputs - module.positions, module.others[0][0] - module.positions
    starts = module.training_set.offsets[:-1]
    lengths = np.add.reduceat(np.square(lines).sum(axis=1), starts)
    steps = np.add.reduceat((moves * lines).sum(axis=1), starts) / lengths
    rest = moves - np.repeat(steps, np.diff(module.training_set.offsets))[:, None] * lines
    assert np.abs(rest).max() < 1e-5, "everything is on the line"
    exact = np.add.reduceat(np.abs(moves).sum(axis=1), starts) == 0.0
    force_field = np.abs(steps - 1.0) < 1e-5
    between = steps[~exact & ~force_field]
    assert exact.mean() == pytest.approx(1 / 2, abs=0.04)
    assert force_field.mean() == pytest.approx(1 / 3, abs=0.04)
    assert len(between) / 2000 == pytest.approx(1 / 6, abs=0.04)
    assert between.min() > 0.0
    assert 1.1 < between.max() < 1.2
    assert between.mean() == pytest.approx(0.6, abs=0.07)


def test_only_geometries_between_are_jittered() -> None:
    plain, jittered = (draw(jitter=jitter) for jitter in (0.0, 0.05))
    changes = jittered.inputs - plain.inputs
    changed = np.add.reduceat(np.abs(changes).sum(axis=1), plain.training_set.offsets[:-1]) > 0.0
    assert changed.mean() == pytest.approx(1 / 6, abs=0.04)
    atoms = np.repeat(changed, np.diff(plain.training_set.offsets))
    assert changes[atoms].std() == pytest.approx(0.05, rel=0.05)
    assert abs(changes[atoms].mean()) < 2e-3
    still = np.add.reduceat(np.abs(plain.inputs - plain.positions).sum(axis=1), plain.training_set.offsets[:-1]) == 0.0
    assert not (still & changed).any(), "DFT geometries are exact"


def test_share_of_force_field_geometries() -> None:
    none = draw(force_field_share=0.0)
    assert np.array_equal(none.inputs, none.positions)
    everything = draw(force_field_share=1.0)
    assert (np.abs(everything.inputs - everything.positions).max(axis=1) > 0.0).all()
    alone = draw(geometries=False, jitter=0.0)
    np.testing.assert_allclose(alone.inputs, alone.positions, atol=1e-5)


def test_where_two_methods_know_a_molecule_the_second_comes_more_often() -> None:
    dataset = dataclasses.replace(read_dataset(), ids=np.arange(20)).select(np.tile(np.arange(20), 200))
    first, second = perturb(dataset), dataclasses.replace(perturb(dataset, seed=1), kind="xtb")
    second.found[2000:] = False
    first.found[-1000:] = False
    config = dataclasses.replace(CONFIG, force_field_share=1.0)
    splits = {"train": np.arange(4000), "choose": np.arange(20)}
    module = learning.Learner(config, dataset, splits, (first, second))
    module.pool.shutdown()
    drawn = module._draw_others(np.random.default_rng(0))
    taken = {}
    for name, positions in (
        ("dft", module.positions),
        *zip(("mmff", "xtb"), (x for x, _ in module.others), strict=True),
    ):
        same = np.add.reduceat(np.abs(drawn - positions).max(axis=1), module.training_set.offsets[:-1]) == 0.0
        taken[name] = [same[:2000].mean(), same[2000:3000].mean(), same[3000:].mean()]
    assert taken["mmff"] == [pytest.approx(0.25, abs=0.03), 1.0, 0.0]
    assert taken["xtb"] == [pytest.approx(0.75, abs=0.03), 0.0, 0.0]
    assert taken["dft"] == [0.0, 0.0, 1.0]
    assert list(module.other_validation_sets) == ["mmff", "xtb"]


def test_the_draw_depends_on_seed_and_epoch_only() -> None:
    first = draw(epoch=1).inputs
    assert np.array_equal(draw(epoch=1, threads=3).inputs, first)
    assert not np.array_equal(draw(epoch=2).inputs, first)
    assert not np.array_equal(draw(epoch=1, seed=6).inputs, first)


@pytest.mark.parametrize("refine_layers", [0, 1])
def test_loss_of_r2_is_that_of_the_prediction(refine_layers: int) -> None:
    """R2's nuclear part is that of the refined geometry, while the label's is that of DFT's."""
    dataset, row = read_dataset(), LATENTS.index("r2")
    config = dataclasses.replace(
        CONFIG, shift_weight=0.0, force_field_share=1.0, model=dataclasses.replace(TINY, refine_layers=refine_layers)
    )
    module = learning.Learner(config, dataset, {"train": np.arange(20), "choose": np.arange(1)}, (perturb(dataset),))
    module.pool.shutdown()
    module.inputs = module.others[0][0]
    module.loss_weights = torch.eye(len(LATENTS))[row]
    prepared = module._look_up(np.arange(20))
    labels = prepared.labels
    with torch.no_grad():
        outputs, refined = module.network(*prepared.graph.arguments())
        orbitals = [LATENTS.index("homo"), LATENTS.index("lumo")]
        labels[:, orbitals] = outputs[:, orbitals]  # so that the gap is right
        loss = 2.0 * float(module._loss(prepared))
    given = dataclasses.replace(dataset, positions=module.inputs)
    predicted = predict_all(Model(module.network, module.baseline), given)
    errors = (predicted - dataset.targets)[:, DEFAULT_KEYS.index("r2")]
    assert loss == pytest.approx(np.abs(errors).mean() / module.baseline.scales[row], rel=1e-3)
    plain = float((outputs - labels)[:, row].abs().mean())
    assert abs(loss - plain) > 0.01 * plain, "the geometry matters"
    if refine_layers == 0:
        assert 2.0 * module._loss(prepared._replace(minima=refined)).item() == pytest.approx(plain, rel=1e-5)


def test_loss_of_r2_for_a_stretched_hydrogen_molecule() -> None:
    """Nuclei 0.40 instead of 0.37 Å from the middle add 2 (0.40^2 - 0.37^2) Å^2 to R2."""
    row = LATENTS.index("r2")
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(TINY, refine_layers=0))
    module = learning.Learner(config, read_dataset(), qm9.split_other(20))
    module.pool.shutdown()
    given, minima = (np.array([[x, 0.0, 0.0], [-x, 0.0, 0.0]]) for x in (0.40, 0.37))
    graph = make_graph(Molecule(np.array([1, 1]), given))
    labels = module.network(*graph.arguments())[0].detach()
    surplus = 2.0 * (0.40**2 - 0.37**2) / BOHR_ANGSTROM**2 / float(module.network.scales[row])
    total = (float(module.loss_weights.sum()) + config.loss.gap) / config.loss.r2
    prepared = learning.Prepared(graph, labels, torch.from_numpy(minima).float(), torch.empty(0), torch.empty(1, 0))
    found = module._loss(prepared)
    assert found.item() * total == pytest.approx(surplus, rel=1e-4)
    labels[:, row] += surplus
    assert module._loss(prepared).item() == pytest.approx(0.0, abs=1e-6)


def test_loss_of_the_geometry() -> None:
    """Two bonded atoms, each 0.04 Å too far out; and both shifted, which leaves their distance right."""
    minima = torch.tensor([[0.5, 0.0, 0.0], [-0.5, 0.0, 0.0]])
    graph = make_graph(Molecule(np.array([1, 1]), minima.double().numpy()))
    tolerance = 0.02

    def soft(distance: float) -> float:
        return (distance**2 + tolerance**2) ** 0.5 - tolerance

    stretched = learning._misplacement(1.08 * minima, minima, graph, tolerance)
    assert float(stretched) == pytest.approx(soft(0.04) + soft(0.08), rel=1e-4)
    shifted = learning._misplacement(minima + torch.tensor([0.0, 0.3, 0.4]), minima, graph, tolerance)
    assert float(shifted) == pytest.approx(soft(0.5), rel=1e-4)
    exact = minima.clone().requires_grad_()
    learning._misplacement(exact, minima, graph, tolerance).backward()
    assert exact.grad is not None
    assert exact.grad.abs().max() == 0.0, "nothing pulls where all is right"


def test_loss_of_the_geometry_has_its_weight() -> None:
    dataset = read_dataset()
    losses = []
    for weight in (0.0, 1.0, 3.0):
        torch.manual_seed(0)
        config = dataclasses.replace(CONFIG, shift_weight=weight)
        module = learning.Learner(
            config, dataset, {"train": np.arange(20), "choose": np.arange(1)}, (perturb(dataset),)
        )
        module.pool.shutdown()
        module.inputs = module.others[0][0]
        losses.append(module._loss(module._look_up(np.arange(20))).item())
    assert losses[1] > losses[0] + 0.05
    assert losses[2] - losses[0] == pytest.approx(3.0 * (losses[1] - losses[0]), rel=1e-4)


def make_auxiliary(dataset: Dataset) -> Auxiliary:
    """Return charges and wavenumbers made up of the elements and of noise; all modes lie between two knots."""
    rng = np.random.default_rng(3)
    counts = 3 * np.diff(dataset.offsets) - 6
    charges = 0.1 * dataset.numbers + 0.05 * rng.standard_normal(len(dataset.numbers))
    wavenumbers = rng.uniform(KNOTS[1], KNOTS[2], size=counts.sum())
    return Auxiliary(charges.astype(np.float32), wavenumbers.astype(np.float32), counts)


def test_charges_and_modes_are_those_of_the_molecules_less_what_elements_tell() -> None:
    dataset, rows = read_dataset(), np.array([7, 3, 11, 12, 13, 14, 15, 16, 17])
    auxiliary = make_auxiliary(dataset)
    module = learning.Learner(CONFIG, dataset, {"train": rows, "choose": np.arange(2)}, (), auxiliary)
    module.pool.shutdown()
    module._draw_geometries()
    prepared = module._look_up(np.array([1, 0]))
    atoms = dataset.select(rows[[1, 0]]).numbers
    assert prepared.charges.shape == (len(atoms),)
    learned = dataset.locate(rows)[0]
    numbers, charges = dataset.numbers[learned], auxiliary.charges[learned].astype(float)
    for number in np.unique(numbers):
        charges[numbers == number] -= charges[numbers == number].mean()
    expected = charges[module.training_set.locate(np.array([1, 0]))[0]] / charges.std()
    np.testing.assert_allclose(prepared.charges, expected, atol=1e-5)
    assert prepared.modes.shape == (2, 2), "at the other knots there is nothing to learn"
    assert module.modes.std(dim=0, correction=0).tolist() == pytest.approx([1.0, 1.0])
    sizes = torch.from_numpy(np.diff(module.training_set.offsets)).float()
    assert float((module.modes.T @ sizes).abs().max()) < 1e-3, "what grows with the size is gone"


@pytest.mark.parametrize("setting", ["charge_weight", "vibration_weight"])
def test_losses_of_charges_and_modes_have_their_weights(setting: str) -> None:
    """A readout of zeros is wrong by the mean of the labels; the network learns from what it is taught only."""
    dataset = read_dataset()
    losses = []
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        config = dataclasses.replace(CONFIG, **{"charge_weight": 0.0, "vibration_weight": 0.0, setting: weight})
        splits = {"train": np.arange(20), "choose": np.arange(1)}
        module = learning.Learner(config, dataset, splits, (), make_auxiliary(dataset))
        module.pool.shutdown()
        module._draw_geometries()
        losses.append(module._loss(module._look_up(np.arange(20))).item())
    labels = module.charges if setting == "charge_weight" else module.modes
    assert losses[1] - losses[0] == pytest.approx(labels.abs().mean().item(), rel=1e-4)
    names = {id(parameter): name for name, parameter in module.readouts.named_parameters()}
    gradients = module._gradients(np.arange(20))[1]
    taught = {
        names[id(parameter)]
        for parameter, gradient in zip(module.trained, gradients, strict=True)
        if id(parameter) in names and gradient.abs().max() > 0.0
    }
    part = "charges" if setting == "charge_weight" else "modes"
    assert taught == {f"{part}.weight", f"{part}.bias"}


def test_charges_are_learned_beside_the_properties(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The readouts are trained, resumed with the run, and left out of the weights file."""
    monkeypatch.setattr(training, "load_auxiliary", make_auxiliary)
    config = dataclasses.replace(CONFIG, epochs=4)
    whole = run(tmp_path / "whole", config)
    state = torch.load(tmp_path / "whole" / "last.ckpt", weights_only=True)["state_dict"]
    assert state["readouts.charges.weight"].abs().max() > 0.0
    assert state["readouts.modes.weight"].abs().max() > 0.0
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", config, on_step=interrupt_after(5))
    resumed = run(tmp_path / "parts", config, resume=True)
    assert resumed.result.weights.read_bytes() == whole.result.weights.read_bytes()
    monkeypatch.undo()
    assert run(tmp_path / "alone", config).result.weights.read_bytes() != whole.result.weights.read_bytes()
    model = load_model(whole.result.weights, device="cpu")
    assert not [name for name in model.network.state_dict() if "readout" in name]


def test_network_learns_to_undo_a_perturbation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    dataset = read_dataset()
    geometries = perturb(dataset)
    monkeypatch.setattr(training, "_load_others", lambda *arguments: (geometries,))
    config = dataclasses.replace(
        CONFIG,
        **{"epochs": 60, "lr": 1e-2, "ema_decay": 0.9, "force_field_share": 1.0, "shift_weight": 10.0},
        model=dataclasses.replace(TINY, message_width=32, radial=16, vectors=8, layers=1),
    )
    model = load_model(run(tmp_path, config).result.weights, device="cpu")
    rows = qm9.split_other(20)["train"]
    learned, given = (
        each.select(rows) for each in (dataset, dataclasses.replace(dataset, positions=geometries.positions))
    )
    refined = model.network(*make_graph(*(given.molecule(k) for k in range(len(rows)))).arguments())[1].detach().numpy()
    before, after = (rmsd(x, learned.positions, learned.offsets) for x in (given.positions, refined))
    assert after.mean() < 0.75 * before.mean()
    assert (after < before).all()


def test_batches_made_ahead_are_those_of_the_sampler_in_their_order() -> None:
    batches, begun = learning.Batches(np.arange(103), 10, seed=0), []
    with ThreadPoolExecutor(3) as pool:
        ahead = learning.Ahead(batches, lambda: begun.append(batches.epoch), lambda batch: batch.tolist(), pool)
        for epoch in (0, 1):
            batches.set_epoch(epoch)
            assert list(ahead) == [batch.tolist() for batch in batches]
            assert len(ahead) == 10
        assert begun == [0, 1]
        failing = learning.Ahead(batches, lambda: None, lambda batch: batch[1000], pool)
        with pytest.raises(IndexError):
            list(failing)


def test_batches_made_ahead_train_the_same_network(
    finished: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As those that are made when they are asked for."""
    monkeypatch.setattr(learning, "_STEPS_AHEAD", 0)
    unhurried = load_file(run(tmp_path).result.weights)
    for key, tensor in load_file(finished.result.weights).items():
        torch.testing.assert_close(unhurried[key], tensor, rtol=0.0, atol=1e-6, msg=key)


def test_a_run_starts_from_given_weights(finished: Run, tmp_path: Path) -> None:
    weights, limited = finished.result.weights, dataclasses.replace(CONFIG, epochs=1, lr=1e-9, limit=10)
    config = dataclasses.replace(limited, start=str(weights))
    started = load_model(run(tmp_path / "started", config).result.weights, device="cpu")
    given, other = (
        load_model(path, device="cpu") for path in (weights, run(tmp_path / "other", limited).result.weights)
    )
    for key, tensor in given.network.named_parameters():
        torch.testing.assert_close(started.network.get_parameter(key), tensor, rtol=0.0, atol=1e-6, msg=key)
    np.testing.assert_array_equal(started.baseline.scales, other.baseline.scales)
    np.testing.assert_allclose(started.network.scales, other.baseline.scales, rtol=1e-6)
    assert not np.allclose(started.baseline.scales, given.baseline.scales), (
        "the baseline is that of the run's molecules"
    )
    assert TrainConfig.from_toml(tmp_path / "started" / "config.toml") == config


def test_weights_that_a_run_cannot_start_from_are_refused(finished: Run, tmp_path: Path) -> None:
    larger = dataclasses.replace(TINY, refine_layers=2)
    config = dataclasses.replace(CONFIG, start=str(finished.result.weights), model=larger)
    with pytest.raises(ConfigError, match="another shape"):
        run(tmp_path / "run", config)
    with pytest.raises(WeightsError, match="absent"):
        run(tmp_path / "run", dataclasses.replace(CONFIG, start="absent"))
    assert not (tmp_path / "run").exists()


def test_callbacks_hear_of_every_step_and_epoch(finished: Run) -> None:
    assert [step[:2] for step in finished.steps] == [(k, 3 * STEPS) for k in range(1, 3 * STEPS + 1)]
    assert [(epoch.epoch, epoch.epochs) for epoch in finished.epochs] == [(1, 3), (2, 3), (3, 3)]
    assert finished.epochs[-1].seconds_left == 0.0
    assert finished.result.last == finished.epochs[-1]
    losses = [step[2] for step in finished.steps]
    for k, epoch in enumerate(finished.epochs):
        assert epoch.loss == pytest.approx(np.mean(losses[STEPS * k : STEPS * (k + 1)]), rel=1e-5)


def test_weights_say_how_they_were_made_and_predict(finished: Run) -> None:
    model = load_model(finished.result.weights, device="cpu")
    assert finished.result.weights == finished.result.folder / "weights.safetensors"
    assert TrainConfig.from_dict(model.metadata["training"]) == CONFIG
    assert model.metadata["data_sha256"] == read_dataset().sha256
    assert model.metadata["training_molecules"] == 16
    assert model.metadata["validation_mae"] == pytest.approx(finished.epochs[-1].mae, rel=1e-4)
    dataset = read_dataset().select(qm9.split_other(20)["choose"])
    found = predict_all(model, dataset)
    mae = np.abs(found - dataset.targets).mean(axis=0)
    assert mae[0] == pytest.approx(finished.epochs[-1].mae["mu"], rel=1e-4), "what was validated is what is shipped"


def test_baseline_is_fitted_on_training_molecules_only(finished: Run) -> None:
    dataset = read_dataset().select(qm9.split_other(20)["train"])
    positions = center(dataset.numbers, dataset.positions, dataset.offsets)
    expected = Baseline.fit(dataset.targets, compose(dataset.numbers, positions, dataset.offsets))
    found = load_model(finished.result.weights, device="cpu").baseline
    np.testing.assert_allclose(found.coefficients, expected.coefficients)
    np.testing.assert_allclose(found.scales, expected.scales)


def test_the_same_seed_trains_the_same_network(finished: Run, tmp_path: Path) -> None:
    again = load_file(run(tmp_path / "again").result.weights)
    for key, tensor in load_file(finished.result.weights).items():
        assert torch.equal(tensor, again[key]), key
    other = load_file(run(tmp_path / "other", dataclasses.replace(CONFIG, epochs=1, seed=6)).result.weights)
    assert not torch.equal(other["network.norm.weight"], again["network.norm.weight"])


@pytest.mark.parametrize("step", [2, STEPS + 1, 2 * STEPS + 3])
def test_an_interrupted_run_resumes_to_the_same_weights(finished: Run, tmp_path: Path, step: int) -> None:
    threads = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, on_step=interrupt_after(step))
    assert torch.get_num_threads() == threads
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not (tmp_path / "weights.safetensors").exists()
    whole = (step - 1) // STEPS
    assert len(read_log(tmp_path)) == whole if whole else not (tmp_path / "last.ckpt").exists()

    resumed = run(tmp_path, resume=True)
    assert [epoch.epoch for epoch in resumed.epochs] == list(range(whole + 1, 4))
    assert resumed.steps == finished.steps[whole * STEPS :]
    expected = load_file(finished.result.weights)
    for key, tensor in load_file(resumed.result.weights).items():
        torch.testing.assert_close(tensor, expected[key], rtol=0.0, atol=1e-7, msg=key)
    rows = read_log(tmp_path)
    assert [int(row["epoch"]) for row in rows] == [0, 1, 2]
    assert rows[-1]["valid_u0"] == read_log(finished.result.folder)[-1]["valid_u0"]


def test_an_interrupt_between_epochs_resumes(finished: Run, tmp_path: Path) -> None:
    def on_epoch(epoch: EpochResult) -> None:
        if epoch.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(CONFIG, data=QM9_20, out_dir=tmp_path, device="cpu", on_epoch=on_epoch)
    resumed = run(tmp_path, resume=True)
    assert [epoch.epoch for epoch in resumed.epochs] == [2, 3]
    expected = load_file(finished.result.weights)
    for key, tensor in load_file(resumed.result.weights).items():
        torch.testing.assert_close(tensor, expected[key], rtol=0.0, atol=1e-7, msg=key)


def test_a_finished_run_resumes_to_its_end(tmp_path: Path) -> None:
    first = run(tmp_path, dataclasses.replace(CONFIG, epochs=1))
    before = load_model(first.result.weights, device="cpu")
    first.result.weights.unlink()
    again = run(tmp_path, dataclasses.replace(CONFIG, epochs=1), resume=True)
    after = load_model(again.result.weights, device="cpu")
    assert again.steps == []
    assert again.result.last == first.result.last
    assert after.metadata == before.metadata
    assert all(
        torch.equal(tensor, after.network.state_dict()[key]) for key, tensor in before.network.state_dict().items()
    )


def test_resuming_with_other_settings_or_data_is_refused(finished: Run, tmp_path: Path) -> None:
    folder = finished.result.folder
    other_model = dataclasses.replace(CONFIG, model=dataclasses.replace(TINY, layers=3))
    for config, difference in (
        (dataclasses.replace(CONFIG, lr=5e-4), "lr was 0.001, is 0.0005"),
        (dataclasses.replace(CONFIG, jitter=0.03), "jitter was 0.02, is 0.03"),
        (dataclasses.replace(CONFIG, epochs=4), "epochs was 3, is 4"),
        (dataclasses.replace(CONFIG, limit=10), "limit was None, is 10"),
        (other_model, "model.layers was 2, is 3"),
    ):
        with pytest.raises(ConfigError, match=difference):
            run(folder, config, resume=True)
    lines = QM9_20.read_text().replace("mu=1.8511", "mu=1.8512")
    (tmp_path / "other.extxyz").write_text(lines)
    with pytest.raises(ConfigError, match="data differ"):
        run(folder, resume=True, data=tmp_path / "other.extxyz")
    with pytest.raises(ConfigError, match="empty"):
        run(tmp_path / "empty", resume=True)


def test_a_folder_with_a_run_is_not_used_again(finished: Run, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in finished.result.folder.rglob("*") if path.is_file()}
    with pytest.raises(OutputError, match="holds a run already"):
        run(finished.result.folder)
    assert before == {path: path.read_bytes() for path in finished.result.folder.rglob("*") if path.is_file()}
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write run folder"):
        run(tmp_path / "file" / "run")


def test_learning_rate_warms_up_and_reaches_zero() -> None:
    dataset = read_dataset()
    config = dataclasses.replace(CONFIG, epochs=50, warmup_steps=1000)
    module = learning.Learner(config, dataset, qm9.split_other(20))
    rates = [module._rate(step) for step in range(50 * STEPS + 1)]
    module.pool.shutdown()
    warmup = 50 * STEPS // 20
    assert np.argmax(rates) == warmup
    assert rates[0] == pytest.approx(config.lr / (warmup + 1))
    assert np.diff(rates[: warmup + 1]).min() > 0.0
    assert np.diff(rates[warmup:]).max() < 0.0
    assert max(rates) == pytest.approx(config.lr, rel=0.01)
    assert rates[-1] == 0.0
    assert rates[50 * STEPS // 2] == pytest.approx(config.lr / 2)


@pytest.mark.parametrize("threads", [1, 3])
def test_every_weight_has_one_optimizer(threads: int) -> None:
    known = torch.get_num_threads()
    torch.set_num_threads(threads)
    module = learning.Learner(CONFIG, read_dataset(), qm9.split_other(20))
    torch.set_num_threads(known)
    module.pool.shutdown()
    first, *others = module.configure_optimizers()
    assert isinstance(first, torch.optim.AdamW)
    names = {id(parameter): name for name, parameter in module.network.named_parameters()}

    def owned(*optimizers: torch.optim.Optimizer) -> list[str]:
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        return [names[id(parameter)] for group in groups for parameter in group["params"]]

    assert sorted(owned(first, *others)) == sorted(names.values())
    assert {"layers.0.message.weight", "layers.0.update.2.weight"} < set(owned(*others))
    assert {"embedding.weight", "layers.0.norm.weight", "layers.0.gate.weight", "shift.bias"} < set(owned(first))


def test_matrices_of_a_shape_are_in_one_optimizer_and_the_work_is_shared() -> None:
    config = dataclasses.replace(CONFIG, model=ModelConfig())
    module = learning.Learner(config, read_dataset(), qm9.split_other(20))
    module.pool.shutdown()
    _, *muons = module.configure_optimizers()
    shapes = [[group["params"][0].shape for group in muon.param_groups] for muon in muons]
    costs = [
        sum(matrix.numel() * min(matrix.shape) for group in muon.param_groups for matrix in group["params"])
        for muon in muons
    ]
    assert len(muons) == 2
    assert len({shape for part in shapes for shape in part}) == sum(map(len, shapes))
    assert max(costs) < 1.1 * min(costs)


def test_a_network_without_large_matrices_trains(tmp_path: Path) -> None:
    shape = ModelConfig(8, 4, refine_layers=1, layers=1, radial=4, vectors=2, invariants=2, flows=2, heads=2)
    finished = run(tmp_path, dataclasses.replace(CONFIG, epochs=1, model=shape))
    assert np.isfinite(list(finished.epochs[0].mae.values())).all()


def test_a_run_of_another_version_is_not_resumed(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, on_step=interrupt_after(STEPS + 1))
    file = next(tmp_path.rglob("last.ckpt"))
    checkpoint = torch.load(file, weights_only=True)
    del checkpoint["layout"]
    torch.save(checkpoint, file)
    with pytest.raises(TrainingError, match="another version of qmprop"):
        run(tmp_path, resume=True)


def test_a_run_resumes_with_another_number_of_threads(finished: Run, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, on_step=interrupt_after(STEPS + 1))
        torch.set_num_threads(1)
        resumed = load_file(run(tmp_path, resume=True).result.weights)
    finally:
        torch.set_num_threads(threads)
    for key, tensor in load_file(finished.result.weights).items():
        torch.testing.assert_close(resumed[key], tensor, rtol=1e-3, atol=1e-4, msg=key)


def test_every_molecule_is_seen_once_an_epoch_in_a_new_order() -> None:
    batches = learning.Batches(np.arange(103), 10, seed=0)
    orders = []
    for epoch in (0, 1, 1):
        batches.set_epoch(epoch)
        parts = list(batches)
        assert len(parts) == len(batches) == 10
        assert {len(part) for part in parts} == {10, 11}
        orders.append(np.concatenate(parts).tolist())
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(103))
    assert orders[0] != orders[1] == orders[2]


def test_molecules_of_rare_sizes_come_several_times_an_epoch() -> None:
    """1,000 molecules: one atom of carbon in 1 of them, two in 3, three in the rest."""
    sizes = np.array([1] + [2] * 3 + [3] * 996)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    numbers, positions = np.full(offsets[-1], 6), np.zeros((offsets[-1], 3))
    molecules = Dataset(np.arange(1000), offsets, numbers, positions, np.zeros((1000, 12)), "made up")
    times = np.bincount(learning._repeat(molecules))
    assert times.tolist() == [4] + [1] * 999
    assert (np.bincount(learning._repeat(read_dataset())) == 1).all(), "few molecules are no reason to repeat some"
    batches = learning.Batches(learning._repeat(molecules), 100, seed=0)
    assert np.bincount(np.concatenate(list(batches))).tolist() == times.tolist()


def test_a_loss_that_explodes_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError, match=r"the loss is not finite in epoch 1 for the molecules with ids [0-9]+"
    ) as caught:
        run(tmp_path, dataclasses.replace(CONFIG, lr=1e30))
    assert "--lr" in caught.value.hint
    assert not (tmp_path / "weights.safetensors").exists()


def make_learner() -> learning.Learner:
    module = learning.Learner(CONFIG, read_dataset(), qm9.split_other(20))
    module._draw_geometries()
    return module


@pytest.mark.parametrize("count", [1, 2, 3])
def test_parts_of_a_batch_have_about_as_many_atoms(count: int) -> None:
    module = make_learner()
    batch = np.random.default_rng(0).permutation(len(module.training_set))
    parts = module._deal(batch, count)
    assert sorted(np.concatenate(parts)) == sorted(batch)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    atoms = [int(module.sizes[part].sum()) for part in parts]
    assert max(atoms) - min(atoms) <= module.sizes.max()
    module.pool.shutdown()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("clip", [0.1, 1e6])
def test_a_step_takes_the_mean_gradients_of_its_parts_clipped(
    monkeypatch: pytest.MonkeyPatch, clip: float, threads: int
) -> None:
    module = make_learner()
    module.config, module.threads = dataclasses.replace(CONFIG, clip=clip), threads
    wrapped = [SimpleNamespace(optimizer=one, step=one.step) for one in module.configure_optimizers()]
    for one in wrapped:
        one.param_groups = one.optimizer.param_groups
    monkeypatch.setattr(module, "optimizers", lambda: wrapped)
    batch = np.arange(16)
    parts = [module._gradients(part)[1] for part in module._deal(batch, threads)]
    expected = [torch.stack(gradients).mean(dim=0) for gradients in zip(*parts, strict=True)]
    norm = float(torch.nn.utils.get_total_norm(expected))
    assert 0.2 < norm < 1e5
    before = [weights.clone() for weights in module.averaged.parameters()]
    module.training_step(module._prepare(batch), 0)
    for own, gradient in zip(module.trained, expected, strict=True):
        torch.testing.assert_close(own.grad, gradient * min(1.0, clip / norm), rtol=1e-3, atol=1e-5)
    for old, now, own in zip(before, module.averaged.parameters(), module.network.parameters(), strict=True):
        torch.testing.assert_close(now, old.lerp(own.detach(), 9 / 11))
    assert any(not torch.equal(old, own) for old, own in zip(before, module.network.parameters(), strict=True))
    module.pool.shutdown()


def test_compiled_loss_has_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "_COMPILE_FROM", 1)
    monkeypatch.setattr(learning, "_PART_SIZE", 1)
    module = make_learner()
    epochs = (0, CONFIG.epochs)  # the tolerance is another one
    expected = {}
    for epoch in epochs:
        module.batches.set_epoch(epoch)
        expected |= {(epoch, size): module._gradients(np.arange(size)) for size in (3, 16)}
    module._compile()
    assert module.find_loss is not learning.find_loss
    monkeypatch.setattr(torch._dynamo.config, "error_on_recompile", True)
    for (epoch, size), (loss, gradients) in expected.items():
        module.batches.set_epoch(epoch)
        compiled_loss, compiled = module._gradients(np.arange(size))
        torch.testing.assert_close(compiled_loss, loss)
        for found, wanted in zip(compiled, gradients, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)
    module.pool.shutdown()


def test_short_runs_and_machines_without_compiler_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    module = make_learner()
    module._compile()
    assert module.find_loss is learning.find_loss, "not worth it"
    monkeypatch.setattr(learning, "_COMPILE_FROM", 1)
    monkeypatch.setenv("CXX", "no-such-compiler")
    module._compile()
    assert module.find_loss is learning.find_loss
    module.pool.shutdown()


def test_a_compiler_that_fails_costs_speed_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "_COMPILE_FROM", 1)

    def fail(*arguments: object) -> torch.Tensor:
        raise TorchDynamoException("Python.h: No such file or directory")

    monkeypatch.setattr(torch, "compile", lambda *arguments, **options: fail)
    module = make_learner()
    with pytest.warns(RuntimeWarning, match=r"goes on without compiled code: Python\.h"):
        module._compile()
    with warnings.catch_warnings(action="error"):
        module._compile()  # as the next epoch does
    loss, _ = module._gradients(np.arange(4))
    assert torch.isfinite(loss)
    module.pool.shutdown()


def test_a_label_that_is_no_number_names_its_molecule(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    remove = Baseline.remove
    culprit = int(qm9.split_other(20)["train"][11])

    def spoil(self: Baseline, *arguments) -> np.ndarray:
        latents = remove(self, *arguments)
        latents[11] = np.nan
        return latents

    monkeypatch.setattr(Baseline, "remove", spoil)
    with pytest.raises(TrainingError, match=rf"with ids {culprit}$"):
        run(tmp_path, CONFIG)
    assert not (tmp_path / "weights.safetensors").exists()


def test_limit_trains_on_that_many_molecules(tmp_path: Path) -> None:
    limited = run(tmp_path, dataclasses.replace(CONFIG, epochs=1, limit=8))
    assert len(limited.steps) == 2
    ids = json.loads((tmp_path / "split.json").read_text())["ids"]
    assert ids["train"] == qm9.split_other(20)["train"][:8].tolist()
    assert ids["test"] == qm9.split_other(20)["test"].tolist()
    assert load_model(limited.result.weights, device="cpu").metadata["training_molecules"] == 8


def test_unlabeled_training_molecules_are_refused(tmp_path: Path) -> None:
    molecule = int(qm9.split_other(20)["train"][3])
    data = change_labels(tmp_path / "partial.extxyz", {molecule: "cv"})
    with pytest.raises(DataError, match=f"1 training molecules .* lack a label, the first is molecule {molecule}"):
        run(tmp_path / "run", data=data)
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_validation_and_test_molecules_may_lack_labels(tmp_path: Path) -> None:
    split = qm9.split_other(20)
    missing = {int(k): "alpha" for name in ("choose", "test") for k in split[name]}
    data = change_labels(tmp_path / "partial.extxyz", missing)
    finished = run(tmp_path / "run", dataclasses.replace(CONFIG, epochs=1), data=data)
    metadata = load_model(finished.result.weights, device="cpu").metadata
    assert set(metadata["validation_mae"]) == set(DEFAULT_KEYS) - {"alpha"}


def test_too_few_molecules_are_refused(tmp_path: Path) -> None:
    data = tmp_path / "one.extxyz"
    data.write_text("\n".join(QM9_20.read_text().splitlines()[:7]) + "\n")
    with pytest.raises(DataError, match="too few"):
        run(tmp_path / "run", data=data)


def test_ctrl_c_leaves_a_run_that_resumes(tmp_path: Path) -> None:
    """The signal reaches `qmprop train` itself, which ends with status 130."""
    config = tmp_path / "config.toml"
    config.write_text(dataclasses.replace(CONFIG, epochs=8, batch_size=1).to_toml())
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "qmprop", "train", "--config", config, "--data", QM9_20, "--out", folder]
    with subprocess.Popen(
        [*map(str, command), "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        deadline = time.monotonic() + 300
        while not (folder / "last.ckpt").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert output == ""
    assert not (folder / "weights.safetensors").exists()
    resumed = run(folder, TrainConfig.from_toml(folder / "config.toml"), resume=True)
    assert 1 < resumed.epochs[0].epoch <= 8
    assert resumed.epochs[-1].epoch == 8
