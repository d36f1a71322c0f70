"""Training: it learns, it can be interrupted anywhere, and it stops clearly when something is wrong."""

from __future__ import annotations

import csv
import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from samples import QM9_20, TINY, read_dataset

from qmprop import datasets, learning, qm9
from qmprop.baseline import Baseline, center, compose
from qmprop.config import ModelConfig, TrainConfig
from qmprop.datasets import Dataset
from qmprop.errors import ConfigError, DataError, OutputError, TrainingError
from qmprop.model import load_model
from qmprop.targets import DEFAULT_KEYS
from qmprop.training import EpochResult, TrainResult, train

#: Sixteen training molecules: four steps an epoch.
CONFIG = TrainConfig(epochs=3, batch_size=4, warmup_steps=2, seed=5, model=TINY)
STEPS = 4


@dataclasses.dataclass(frozen=True)
class Run:
    result: TrainResult
    epochs: list[EpochResult]
    steps: list[tuple[int, int, float]]


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


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An uninterrupted run."""
    return run(tmp_path_factory.mktemp("run") / "whole")


def test_network_learns_32_molecules_by_heart(full: Dataset, tmp_path: Path) -> None:
    dataset = full.select(np.arange(40))
    datasets.write_cache(dataset, tmp_path / "forty.cache")
    shape = ModelConfig(node_width=64, message_width=32, layers=2, radial=16)
    config = TrainConfig(
        epochs=600, batch_size=8, lr=2e-3, warmup_steps=20, ema_decay=0.98, weight_decay=0.0, model=shape
    )
    result = train(config, data=tmp_path / "forty.cache", out_dir=tmp_path / "run", device="cpu")

    learned = dataset.select(qm9.split_other(40)["train"])
    composition = compose(learned.numbers, center(learned.numbers, learned.positions, learned.offsets), learned.offsets)
    plain = Baseline.fit(learned.targets, composition).restore(np.zeros((32, 10)), composition)
    model = load_model(result.weights, device="cpu")
    found = np.concatenate(list(model.predict_arrays(learned.numbers, learned.positions, learned.offsets)))
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
    assert float(rows[-1]["lr"]) == 0.0


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
    found = np.concatenate(list(model.predict_arrays(dataset.numbers, dataset.positions, dataset.offsets)))
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
        (dataclasses.replace(CONFIG, epochs=4), "epochs was 3, is 4"),
        (dataclasses.replace(CONFIG, limit=10), "limit was None, is 10"),
        (other_model, "layers was 2, is 3"),
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
    module = learning.Learner(config, dataset, qm9.split_other(20), None, None)
    chosen = module.configure_optimizers()
    optimizer, schedule = chosen["optimizer"], chosen["lr_scheduler"]["scheduler"]
    rates = [schedule.get_last_lr()[0]]
    for _ in range(50 * STEPS):
        optimizer.step()
        schedule.step()
        rates += schedule.get_last_lr()
    module.pool.shutdown()
    warmup = 50 * STEPS // 20
    assert np.argmax(rates) == warmup
    assert rates[0] == pytest.approx(config.lr / (warmup + 1))
    assert np.diff(rates[: warmup + 1]).min() > 0.0
    assert np.diff(rates[warmup:]).max() < 0.0
    assert max(rates) == pytest.approx(config.lr, rel=0.01)
    assert rates[-1] == 0.0
    assert rates[50 * STEPS // 2] == pytest.approx(config.lr / 2)


def test_every_molecule_is_seen_once_an_epoch_in_a_new_order() -> None:
    batches = learning.Batches(103, 10, seed=0)
    orders = []
    for epoch in (0, 1, 1):
        batches.set_epoch(epoch)
        parts = list(batches)
        assert len(parts) == len(batches) == 10
        assert {len(part) for part in parts} == {10, 11}
        orders.append(np.concatenate(parts).tolist())
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(103))
    assert orders[0] != orders[1] == orders[2]


def test_a_loss_that_explodes_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError, match=r"the loss is not finite in epoch 1 for the molecules with ids [0-9]+"
    ) as caught:
        run(tmp_path, dataclasses.replace(CONFIG, lr=1e30))
    assert "--lr" in caught.value.hint
    assert not (tmp_path / "weights.safetensors").exists()


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
