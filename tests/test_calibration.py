"""`calibrate` and the end of `train`: the weights file gets error bars, and its predictions stay what they were."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from samples import QM9_20, TINY, judge_distance, make_model, read_dataset

from qmprop import calibration, datasets, training
from qmprop.__main__ import run
from qmprop.calibration import FEWEST, calibrate, load_others
from qmprop.config import TrainConfig
from qmprop.datasets import Dataset
from qmprop.errors import DataError, OutputError, WeightsError
from qmprop.evaluation import evaluate
from qmprop.geometries import Geometries
from qmprop.model import Model, load_model, save_model
from qmprop.qm9 import split_other
from qmprop.targets import DEFAULT_KEYS
from qmprop.training import train
from qmprop.trust import LEVEL, LEVELS, load_trust

#: The smallest set whose split keeps enough molecules to calibrate on: half of a tenth.
COUNT = 20 * FEWEST
CONFIG = TrainConfig(
    **{"epochs": 1, "batch_size": 100, "lr": 2e-3, "warmup_steps": 2, "seed": 5, "force_field_share": 0.0}, model=TINY
)


@dataclass(frozen=True)
class Trained:
    """A run on many copies of the twenty molecules, each a little distorted, and its weights with and without trust."""

    data: Path
    molecules: Dataset
    bare: Path
    calibrated: Path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    rng = np.random.default_rng(0)
    data = read_dataset().select(np.arange(COUNT) % 20)
    noise = 0.03 * rng.standard_normal(data.positions.shape).astype(np.float32)
    data = dataclasses.replace(data, ids=np.arange(COUNT), positions=data.positions + noise)
    path, bare = folder / "many.cache", folder / "bare.safetensors"
    datasets.write_cache(data, path)
    result = train(CONFIG, data=path, out_dir=folder / "run", device="cpu")
    model = load_model(result.weights, device="cpu")
    added = ("accuracy", "limits", "calibration")
    metadata = {key: value for key, value in model.metadata.items() if key not in added}
    save_model(bare, model.replace(metadata=metadata, extras={}))
    return Trained(path, data, bare, result.weights)


@pytest.fixture
def bare(trained: Trained, tmp_path: Path) -> Path:
    """A copy of the weights without calibration."""
    path = tmp_path / "bare.safetensors"
    path.write_bytes(trained.bare.read_bytes())
    return path


def half_widths(model: Model, molecules: Dataset) -> np.ndarray:
    trust = load_trust(model)
    assert trust is not None
    outcomes = model.run_arrays(molecules.numbers, molecules.positions, molecules.offsets)
    traits = np.concatenate([outcome.traits for outcome in outcomes])
    return trust.half_widths(traits, judge_distance(trust, traits))


def test_training_ends_calibrated(trained: Trained) -> None:
    model = load_model(trained.calibrated, device="cpu")
    splits = split_other(COUNT)
    known = {"molecules": FEWEST, "geometries": ["dft"], "level": LEVEL}
    assert known.items() <= model.metadata["calibration"].items()
    assert 0.0 <= model.metadata["calibration"]["false_alarms"]["dft"] <= 0.01
    assert model.metadata["limits"] == {"heavy_atoms": 9, "elements": ["H", "C", "N", "O", "F"]}
    found = evaluate(weights=model, data=trained.molecules)
    accuracy = model.metadata["accuracy"]
    assert list(accuracy) == ["dft"]
    assert accuracy["dft"]["molecules"] == found.molecules == len(splits["test"])
    assert accuracy["dft"]["outside"] == found.outside
    for name in ("mae", "coverage"):
        assert list(accuracy["dft"][name]) == list(DEFAULT_KEYS)
        for key, errors in found.properties.items():
            assert accuracy["dft"][name][key] == pytest.approx(getattr(errors, name), rel=1e-4), key


def test_the_training_molecules_are_known_afterwards(trained: Trained) -> None:
    trust = load_trust(load_model(trained.calibrated, device="cpu"))
    assert trust is not None
    np.testing.assert_array_equal(trust.ids, split_other(COUNT)["train"])
    assert trust.name(0) == str(trust.ids[0]), "gdb numbers are QM9's alone"


def test_calibrating_gives_what_training_gave_and_does_so_again(
    trained: Trained, bare: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """To the last byte: what `train` wrote, from the file and from the calibrated file, in place and beside it."""
    expected, before = trained.calibrated.read_bytes(), bare.read_bytes()
    out = bare.with_name("out.safetensors")
    command = ["calibrate", "--data", str(trained.data), "--device", "cpu", "-w", str(bare)]
    assert run([*command, "-o", str(out)]) == 0
    digest = load_model(out, device="cpu").digest[:8]
    assert capfd.readouterr() == ("", f"note: calibrated weights out@{digest} are in {out}\n")
    assert out.read_bytes() == expected
    assert bare.read_bytes() == before
    assert run(command) == 0
    assert bare.read_bytes() == expected
    calibrate(bare, data=trained.data, device="cpu")
    assert bare.read_bytes() == expected
    assert sorted(file.name for file in bare.parent.iterdir()) == ["bare.safetensors", "out.safetensors"]


def test_predictions_stay_the_same_and_the_hash_does_not(trained: Trained) -> None:
    before, after = (load_model(path, device="cpu") for path in (trained.bare, trained.calibrated))
    assert before.digest != after.digest
    molecules = [trained.molecules.molecule(k) for k in range(20)]
    found = after.predict(molecules)
    for key, values in before.predict(molecules).items():
        np.testing.assert_array_equal(values, found[key])
    new = after.metadata.keys() - before.metadata.keys()
    assert new == {"accuracy", "calibration", "limits"}
    assert before.metadata.items() <= after.metadata.items()


def test_several_weights_make_an_ensemble(trained: Trained, bare: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, other = load_model(bare, device="cpu"), bare.with_name("other.safetensors")
    with torch.no_grad():
        for parameter in model.network.sums.parameters():
            parameter.mul_(1.1)
    save_model(other, model)
    command = ["calibrate", "--data", trained.data, "--device", "cpu", "-w", bare, "-w", other]
    assert refuse(*command[1:], capfd=capfd, status=2) == (
        "error: an ensemble needs a file of its own. Name it with -o.\n"
    )
    both = bare.with_name("both.safetensors")
    assert refuse(*command[1:], "-o", both, "--share", 2, capfd=capfd, status=2) == (
        "error: the shares 2 do not fit 2 weights. Give a positive number for each of them, or none at all.\n"
    )
    assert run([*map(str, command), "-o", str(both), "--share", "3", "--share", "1"]) == 0
    first, second, ensemble = (load_model(path, device="cpu") for path in (bare, other, both))
    assert ensemble.metadata["members"] == [first.id, second.id]
    test = trained.molecules.select(split_other(COUNT)["test"])
    arrays = test.numbers, test.positions, test.offsets
    found, one, two = (next(each.run_arrays(*arrays)).values for each in (ensemble, first, second))
    np.testing.assert_allclose(found, 0.75 * one + 0.25 * two, rtol=1e-9)
    report = evaluate(weights=ensemble, data=trained.molecules)
    for key, errors in report.properties.items():
        assert ensemble.metadata["accuracy"]["dft"]["mae"][key] == pytest.approx(errors.mae, rel=1e-4)
        assert 0.7 < errors.coverage <= 1.0, key


def test_the_number_of_threads_hardly_changes_the_intervals(trained: Trained, bare: Path) -> None:
    threads = "2" if torch.get_num_threads() == 1 else "1"
    command = [sys.executable, "-m", "qmprop", "calibrate", "-w", bare, "--data", trained.data, "--device", "cpu"]
    settings = {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive"}
    subprocess.run([*map(str, command)], env=os.environ | settings, check=True, timeout=300)
    molecules = trained.molecules.select(split_other(COUNT)["test"])
    widths = [half_widths(load_model(path, device="cpu"), molecules) for path in (bare, trained.calibrated)]
    np.testing.assert_allclose(widths[0], widths[1], rtol=0.01)


def refuse(*options: object, capfd: pytest.CaptureFixture[str], status: int = 1) -> str:
    """Return what `qmprop calibrate` says when it refuses."""
    assert run(["calibrate", *map(str, options)]) == status
    out, error = capfd.readouterr()
    assert out == ""
    return error


def test_other_data_are_refused(trained: Trained, bare: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = bare.read_bytes()
    said = refuse("-w", bare, "--data", QM9_20, capfd=capfd)
    assert said == f"error: {bare} was not trained on {QM9_20}. Give the training data with --data.\n"
    assert bare.read_bytes() == before
    assert refuse(capfd=capfd, status=2).startswith("error: Missing option '-w'")
    missing = bare.with_name("none.safetensors")
    assert f"no weights '{missing}'" in refuse("-w", missing, "--data", trained.data, capfd=capfd)


def test_too_few_molecules_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, path = make_model(), tmp_path / "few.safetensors"
    save_model(path, model.replace(metadata={"data_sha256": read_dataset().sha256}))
    before = path.read_bytes()
    assert f"has 1 molecules to calibrate on, {FEWEST} are needed" in refuse("-w", path, "--data", QM9_20, capfd=capfd)
    assert path.read_bytes() == before


def test_a_place_that_cannot_be_written_is_told_before_the_work(
    trained: Trained, bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "fit_trust", None)
    with pytest.raises(OutputError, match=r"cannot write weights .*folder/out"):
        calibrate(bare, data=trained.data, out=bare.parent / "folder" / "out.safetensors")


def test_a_failed_write_leaves_the_file_as_it_was(
    trained: Trained, bare: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*paths: object) -> None:
        raise OSError(28, "No space left on device")

    before = bare.read_bytes()
    monkeypatch.setattr(os, "replace", fail)
    said = refuse("-w", bare, "--data", trained.data, "--device", "cpu", capfd=capfd)
    assert said == f"error: cannot write weights {bare}: No space left on device. Choose another place.\n"
    assert bare.read_bytes() == before
    assert [file.name for file in bare.parent.iterdir()] == [bare.name]


def test_few_molecules_leave_the_weights_uncalibrated(tmp_path: Path) -> None:
    result = train(dataclasses.replace(CONFIG, batch_size=4), data=QM9_20, out_dir=tmp_path / "run", device="cpu")
    model = load_model(result.weights, device="cpu")
    assert model.extras == {}
    assert "calibration" not in model.metadata
    accuracy = model.metadata["accuracy"]["dft"]
    assert accuracy["molecules"] == 2
    assert accuracy["outside"] is None
    assert list(accuracy["mae"]) == list(DEFAULT_KEYS)
    assert accuracy["coverage"] == {}
    with pytest.raises(DataError, match=f"{FEWEST} are needed"):
        calibrate(result.weights, data=QM9_20, device="cpu")


@pytest.mark.parametrize("limit", [FEWEST - 1, FEWEST])
def test_a_limited_run_limits_what_follows(trained: Trained, tmp_path: Path, limit: int) -> None:
    """Below what a calibration needs there is none, and no error; else `calibrate` finds what `train` found."""
    config = dataclasses.replace(CONFIG, limit=limit, batch_size=33)
    weights = train(config, data=trained.data, out_dir=tmp_path, device="cpu").weights
    model, before = load_model(weights, device="cpu"), weights.read_bytes()
    assert bool(model.extras) == (limit == FEWEST)
    assert model.metadata["training_molecules"] == model.metadata["accuracy"]["dft"]["molecules"] == limit
    if limit == FEWEST:
        assert model.metadata["calibration"]["molecules"] == limit
        calibrate(weights, data=trained.data, device="cpu")
        assert weights.read_bytes() == before


def test_an_interrupted_calibration_leaves_usable_weights(trained: Trained, tmp_path: Path) -> None:
    """And resuming the run does what is left: the calibration."""

    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(CONFIG, data=trained.data, out_dir=tmp_path, device="cpu", on_calibrate=interrupt)
    weights = tmp_path / training.WEIGHTS_FILE
    model = load_model(weights, device="cpu")
    assert load_trust(model) is None
    assert np.isfinite(model.predict([trained.molecules.molecule(0)])["u0"]).all()
    calls: list[tuple[int, int]] = []
    measured: list[tuple[int, int]] = []
    train(
        CONFIG,
        **{"data": trained.data, "out_dir": tmp_path, "resume": True, "device": "cpu"},
        on_calibrate=lambda *call: calls.append(call),
        on_measure=lambda *call: measured.append(call),
    )
    count = len(split_other(COUNT)["test"])
    assert measured[-1] == (count, count)
    assert weights.read_bytes() == trained.calibrated.read_bytes()
    assert calls[-1][0] == calls[-1][1], "all that was announced has been done"
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})


def test_a_damaged_calibration_can_be_made_anew(trained: Trained, tmp_path: Path) -> None:
    model = load_model(trained.calibrated, device="cpu")
    path = tmp_path / "damaged.safetensors"
    save_model(path, model.replace(extras=model.extras | {"least": np.zeros(7)}))
    with pytest.raises(WeightsError, match="least") as caught:
        load_trust(load_model(path, device="cpu"))
    assert caught.value.hint == "Calibrate them again."
    calibrate(path, data=trained.data, device="cpu")
    assert path.read_bytes() == trained.calibrated.read_bytes()


def test_geometries_to_calibrate_on_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(calibration, "load_cheap", lambda molecules, rows: asked.append(rows))
    splits = split_other(20)
    load_others(read_dataset(), splits)
    assert sorted(asked[0]) == sorted(np.concatenate([splits[name] for name in ("train", "choose", "calibrate")]))


def test_the_error_scale_learns_from_training_molecules_that_are_not_known_by_heart() -> None:
    rng = np.random.default_rng(0)
    traits = rng.standard_normal((50, 4)).astype(np.float32)
    errors = rng.exponential(1.0, (50, 12)) * np.arange(1, 13)
    others = [calibration._Sample(traits, errors, "dft"), calibration._Sample(traits, 5.0 * errors, "mmff")]
    known = [
        *(calibration._Sample(traits, errors[::-1] * share, kind) for kind, share in (("dft", 0.7), ("mmff", 2.0))),
        calibration._Sample(traits, errors, "xtb"),
        calibration._Sample(traits[:0], errors[:0], "dft"),
    ]
    (enlarged,) = calibration._enlarge(known, others)
    assert enlarged.kind == "dft", "5 is more than twice 2, nobody else has xtb geometries, and none teach nothing"
    np.testing.assert_allclose(enlarged.errors, errors[::-1])


def test_groups_of_moves_are_as_large_and_never_empty() -> None:
    moves = np.random.default_rng(0).standard_normal(3 * FEWEST)
    edges = calibration._choose_edges(moves)
    assert np.bincount(np.searchsorted(edges, moves)).tolist() == [FEWEST] * 3
    assert len(calibration._choose_edges(moves[1:])) == 0, "too few for three"
    assert len(calibration._choose_edges(np.full(3 * FEWEST, -9.0))) == 0, "a network that refines nothing"
    halves = calibration._choose_edges(np.where(moves > 0.0, moves, -1.0))
    assert np.bincount(np.searchsorted(halves, np.where(moves > 0.0, moves, -1.0)), minlength=len(halves) + 1).min() > 0


def test_a_network_that_refines_nothing_can_be_calibrated(trained: Trained) -> None:
    shape = dataclasses.replace(TINY, refine_layers=0)
    trust, _ = calibration.fit_trust(make_model(shape), trained.molecules, split_other(COUNT))
    assert len(trust.edges) == 0
    assert np.isfinite(trust.quantiles).all()


def test_rare_sizes_have_parts_with_enough_molecules() -> None:
    sizes = np.repeat([3, 4, 5, 6, 7, 8], [FEWEST - 1, 1, FEWEST - 1, FEWEST, 5, 1000])
    assert calibration._choose_sizes(sizes, np.array([8, 9])).tolist() == [5, 7], "7 is too rare, and joins no part"
    assert calibration._choose_sizes(sizes, np.array([3, 8])).tolist() == [], "none is smaller than common ones"
    assert calibration._choose_sizes(sizes, np.zeros(0, dtype=np.int64)).tolist() == [], "none is common"


def test_a_rare_size_has_the_quantiles_of_its_own_where_they_are_larger() -> None:
    rng = np.random.default_rng(0)
    by_move, by_size = rng.integers(0, 2, 4000), (rng.random(4000) < 0.9).astype(int)
    scales = rng.uniform(1.0, 2.0, (4000, 12)) * np.where(by_size, 1.0, 2.0)[:, None]
    errors = scales * rng.exponential(1.0, (4000, 12))
    errors[by_size == 0, :6] *= 3.0  # of what the scale expects
    errors[by_size == 0, 6:] /= 3.0
    quantiles, large = calibration._find_quantiles(errors, scales, by_move, by_size, 1)
    assert quantiles.shape == (4, 12, len(LEVELS))
    rare, common = quantiles[::2], quantiles[1::2]
    moved = [calibration._conformal((errors / scales)[by_move == group]) for group in range(2)]
    np.testing.assert_array_equal(common, moved)
    np.testing.assert_array_equal(rare[:, 6:], common[:, 6:])
    own = calibration._conformal((errors / scales)[by_size == 0])
    np.testing.assert_array_equal(rare[:, :6], np.stack([own[:6]] * 2))
    assert (large[::2] > large[1::2]).all()


def test_geometries_that_some_molecules_have_calibrate_with_those(trained: Trained) -> None:
    """The force field knows all but one to choose, the other method a few to choose and to calibrate, a third none."""
    molecules, splits = trained.molecules, split_other(COUNT)
    found = np.ones(COUNT, dtype=bool), np.zeros(COUNT, dtype=bool), np.zeros(COUNT, dtype=bool)
    found[0][splits["choose"][0]] = False
    few = np.concatenate([splits["choose"][:30], splits["calibrate"][:20]])
    found[1][few] = True
    moved = (molecules.positions * 1.02).astype(np.float32)
    others = [Geometries(kind, moved, known, {}) for kind, known in zip(("mmff", "xtb", "none"), found, strict=True)]
    model = load_model(trained.bare, device="cpu")
    told: list[tuple[int, int]] = []
    trust, facts = calibration.fit_trust(model, molecules, splits, others, lambda *numbers: told.append(numbers))
    assert facts["geometries"] == ["dft", "mmff"], "most molecules have these"
    assert list(facts["false_alarms"]) == ["dft", "mmff", "xtb"]
    sizes = molecules.heavy_atoms[splits["train"]]
    common = int((np.bincount(sizes)[sizes] >= 0.1 * len(sizes)).sum())
    assert 0 < common < len(sizes)
    samples = [3 * FEWEST - 1 + 30, 2 * FEWEST + 20, len(sizes), common]  # distorted ones to choose, too
    assert told[-1] == (sum(samples), sum(samples))
    alone, _ = calibration.fit_trust(model, molecules, splits)
    assert not np.array_equal(trust.quantiles, alone.quantiles[: len(trust.quantiles)])
