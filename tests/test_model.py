"""A model: weights files that are whole or refused, and predictions that do not depend on how they are asked for."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import pickle
import resource
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase.data import atomic_masses
from make_golden import GOLDEN, predict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from samples import (
    SPREAD,
    TINY,
    alkane,
    find_formula,
    join,
    make_graph,
    make_model,
    move,
    random_rotation,
    read_dataset,
)
from torch import Tensor

import qmprop.model
from qmprop.baseline import Baseline
from qmprop.config import ModelConfig
from qmprop.egnn import LATENTS
from qmprop.errors import DeviceError, OutputError, UsageError, WeightsError
from qmprop.graph import concatenate
from qmprop.model import Model, choose_device, find_weights, join_models, load_model, save_model
from qmprop.molecule import Molecule
from qmprop.targets import BOHR_ANGSTROM, DEFAULT_KEYS, TARGETS
from qmprop.trust import FARTHEST_STEP, count_traits, load_trust

WATER = find_formula("H2O")


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model()


@pytest.fixture
def weights(model: Model, tmp_path: Path) -> Path:
    """A good weights file."""
    path = tmp_path / "good.safetensors"
    save_model(path, model.replace(metadata={"training": {"epochs": 1}, "version": "0"}))
    return path


@pytest.fixture(scope="module")
def bundled() -> Model:
    return load_model(device="cpu")


def rewrite(
    path: Path, *, tensors: Callable[[dict[str, Tensor]], object] | None = None, header: dict[str, str] | None = None
) -> Path:
    """Change tensors (in place) or metadata of a weights file."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() | (header or {})
    content = load_file(path)
    if tensors is not None:
        tensors(content)
    save_file(content, path, metadata)
    return path


def architecture(**changes: object) -> dict[str, str]:
    values = {name: getattr(TINY, name) for name in TINY.__dataclass_fields__} | changes
    return {"architecture": json.dumps(values)}


def refuse(path: Path, problem: str) -> None:
    """Check that loading names the file and the problem."""
    with pytest.raises(WeightsError) as caught:
        load_model(path, device="cpu")
    assert str(path) in caught.value.message
    assert problem in caught.value.message
    assert caught.value.hint


def test_a_saved_model_predicts_the_same(model: Model, weights: Path, molecules: list[Molecule]) -> None:
    loaded = load_model(weights, device="cpu")
    before, after = model.predict(molecules), loaded.predict(molecules)
    assert list(before) == list(TARGETS)
    for key in TARGETS:
        assert np.array_equal(before[key], after[key]), key
    assert loaded.config == model.config
    assert loaded.metadata["training"] == {"epochs": 1}
    assert loaded.name == "good"
    assert loaded.id == f"good@{loaded.digest[:8]}"
    assert not loaded.network.training


@pytest.fixture(scope="module")
def ensemble(model: Model) -> Model:
    plain = dataclasses.replace(TINY, vectors=2, angles=False)
    return join_models([model, make_model(seed=1), make_model(plain, seed=2)])


def test_an_ensemble_predicts_the_means_of_its_members(ensemble: Model, molecules: list[Molecule]) -> None:
    arrays = concatenate(molecules)
    outcome = ensemble.run(*arrays)
    members = [Model(network, ensemble.baseline).run(*arrays) for network in ensemble.networks]
    for name in ("values", "refined", "moves"):
        mean = np.mean([getattr(member, name) for member in members], axis=0)
        np.testing.assert_allclose(getattr(outcome, name), mean, rtol=1e-9, atol=1e-9, err_msg=name)
    known = members[0].traits.shape[1]
    assert known == count_traits(Model(ensemble.network, ensemble.baseline))
    assert outcome.traits.shape[1] == count_traits(ensemble) == known + len(LATENTS)
    features = 3 * TINY.node_width
    np.testing.assert_array_equal(outcome.traits[:, :features], members[0].traits[:, :features])
    outputs = np.stack([member.traits[:, features + 2 :][:, : len(LATENTS)] for member in members])
    np.testing.assert_allclose(outcome.traits[:, known:], np.log(outputs.std(axis=0) + 1e-3), atol=1e-3)
    gaps = dict(zip(DEFAULT_KEYS, outcome.values.T, strict=True))
    np.testing.assert_allclose(gaps["gap"], gaps["lumo"] - gaps["homo"], atol=1e-9)


def test_a_saved_ensemble_predicts_the_same(ensemble: Model, molecules: list[Molecule], tmp_path: Path) -> None:
    path = tmp_path / "ensemble.safetensors"
    save_model(path, ensemble)
    loaded = load_model(path, device="cpu")
    assert len(loaded.networks) == 3
    assert loaded.metadata["members"] == ["unsaved@00000000"] * 3
    before, after = ensemble.predict(molecules), loaded.predict(molecules)
    for key in TARGETS:
        assert np.array_equal(before[key], after[key]), key
    save_model(tmp_path / "two.safetensors", Model(ensemble.network, ensemble.baseline, others=ensemble.networks[1:2]))
    assert load_model(tmp_path / "two.safetensors", device="cpu").digest != loaded.digest
    rewrite(path, tensors=lambda found: [found.pop(key) for key in list(found) if key.startswith("member1.")])
    refuse(path, "a member of its ensemble is missing")
    path = tmp_path / "two.safetensors"
    rewrite(path, tensors=lambda found: found.pop("member1.norm.bias"))
    refuse(path, "'network.norm.bias'")


def test_members_count_by_their_shares(ensemble: Model, molecules: list[Molecule], tmp_path: Path) -> None:
    members = [Model(network, ensemble.baseline) for network in ensemble.networks]
    weighted = join_models([join_models(members[:2], [3.0, 1.0]), members[2]], [8.0, 2.0])
    assert weighted.shares == pytest.approx([0.6, 0.2, 0.2])
    expected = sum(
        share * member.predict(molecules)["gap"] for share, member in zip(weighted.shares, members, strict=True)
    )
    np.testing.assert_allclose(weighted.predict(molecules)["gap"], expected, rtol=1e-9)
    path = tmp_path / "weighted.safetensors"
    save_model(path, weighted)
    loaded = load_model(path, device="cpu")
    assert loaded.shares == weighted.shares
    np.testing.assert_array_equal(loaded.predict(molecules)["gap"], weighted.predict(molecules)["gap"])
    save_model(tmp_path / "even.safetensors", join_models(members))
    even = load_model(tmp_path / "even.safetensors", device="cpu")
    assert even.digest != loaded.digest
    assert even.shares == pytest.approx([1 / 3] * 3)
    for shares in ([1.0], [1.0, 0.0], [1.0, math.nan], [1.0, -2.0]):
        with pytest.raises(UsageError, match="do not fit 2 weights"):
            join_models(members[:2], shares)
    for wrong in ("[1.0]", "[0.5, 0.5, -1.0]", '["a", 1.0, 1.0]', "3", "[true, 1.0, 1.0]"):
        rewrite(path, header={"shares": wrong})
        refuse(path, "shares of its networks")
        save_model(path, weighted)


def test_what_has_another_cutoff_or_other_data_is_no_ensemble(model: Model) -> None:
    other_cutoff = make_model(dataclasses.replace(TINY, cutoff=TINY.cutoff + 1.0))
    other_data = Model(model.network, model.baseline, metadata={"data_sha256": "0"})
    scaled = Baseline(model.baseline.coefficients * 1.01, model.baseline.scales)
    for other in (other_cutoff, other_data, Model(model.network, scaled)):
        with pytest.raises(WeightsError, match="make no ensemble"):
            join_models([model, other])


def test_the_digest_names_what_decides_the_predictions(model: Model, weights: Path) -> None:
    digest = load_model(weights, device="cpu").digest
    copy = weights.with_name("copy.safetensors")
    save_model(copy, model.replace(metadata={"note": "another note"}))
    assert load_model(copy, device="cpu").digest == digest
    with torch.no_grad():
        model.network.norm.bias.add_(1.0)
        save_model(copy, model)
        model.network.norm.bias.sub_(1.0)
    assert load_model(copy, device="cpu").digest != digest


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 1.0])
def test_a_flipped_bit_among_the_numbers_is_refused(weights: Path, share: float) -> None:
    content = bytearray(weights.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    position = start + int((len(content) - start - 1) * share)
    content[position] ^= 0x01
    weights.write_bytes(content)
    refuse(weights, "checksum")


@pytest.mark.parametrize("share", [0.0, 1e-5, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused(weights: Path, share: float) -> None:
    content = weights.read_bytes()
    weights.write_bytes(content[: int(len(content) * share)])
    refuse(weights, "")


def test_a_flipped_byte_in_the_header_never_changes_a_prediction(model: Model, weights: Path) -> None:
    def predict_water() -> float | None:
        with suppress(WeightsError):
            return float(load_model(weights, device="cpu").predict([WATER])["u0"][0])
        return None

    content = weights.read_bytes()
    length = int.from_bytes(content[:8], "little")
    expected, found = model.predict([WATER])["u0"][0], []
    for position in [*range(8), *range(8, 8 + length, 97)]:
        damaged = bytearray(content)
        damaged[position] ^= 0x15
        weights.write_bytes(damaged)
        found.append(predict_water())
    assert set(found) <= {None, expected}
    assert found[:8] == [None] * 8
    assert found.count(None) > 0.8 * len(found)


def test_tensors_have_to_be_exactly_the_networks(weights: Path) -> None:
    good, name = weights.read_bytes(), "network.layers.1.gate.weight"
    changes: dict[str, Callable[[dict[str, Tensor]], object]] = {
        f"tensor '{name}' should be [1, 16] torch.float32 but is nothing": lambda content: content.pop(name),
        "tensor 'extra' should be nothing but is [2]": lambda content: content.update(extra=torch.zeros(2)),
        f"tensor '{name}' should be [1, 16]": lambda content: content.update({name: torch.zeros(16, 1)}),
        "but is [1, 16] torch.float64": lambda content: content.update({name: content[name].double()}),
        f"tensor '{name}' has a NaN": lambda content: content[name].fill_(torch.nan),
        "tensor 'baseline.scales' has a NaN or infinite": lambda content: content["baseline.scales"][0].fill_(
            torch.inf
        ),
        "'baseline.coefficients' should be [10, 6]": lambda content: content.pop("baseline.coefficients"),
        "it has 3 layers where its architecture says 2": lambda content: content.update(
            {key.replace(".1.", ".2."): value.clone() for key, value in content.items() if ".layers.1." in key}
        ),
        "it has 2 refining layers where its architecture says 1": lambda content: content.update(
            {key.replace(".0.", ".1."): value.clone() for key, value in content.items() if ".refiner.0." in key}
        ),
        "it has 0 refining layers where its architecture says 1": lambda content: [
            content.pop(key) for key in list(content) if ".refiner." in key
        ],
        "tensor 'network.shift.weight' should be [4, 32] torch.float32 but is nothing": lambda content: content.pop(
            "network.shift.weight"
        ),
    }
    for problem, change in changes.items():
        weights.write_bytes(good)
        refuse(rewrite(weights, tensors=change), problem)


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        ({"format": "other-weights-1"}, "weights of something else"),
        ({"architecture": "{"}, "cannot use"),
        ({"architecture": "[]"}, "cannot use"),
        ({"architecture": "3"}, "cannot use"),
        ({"architecture": "[" * 100_000}, "cannot use"),
        ({"version": "not json"}, "cannot use"),
        ({"others": "3"}, "cannot use"),
        ({"others": "[3]"}, "cannot use"),
        ({"others": "[{}]"}, "0 further members where it describes 1"),
        (architecture(unknown=3), "unknown"),
        (architecture(cutoff=float("nan")), "cutoff"),
        (architecture(layers=1), "2 layers where its architecture says 1"),
        (architecture(refine_layers=2), "1 refining layers where its architecture says 2"),
        (architecture(refine_layers=0), "1 refining layers where its architecture says 0"),
        (architecture(refine_layers=-1), "refine_layers"),
        (architecture(node_width=64), "should be"),
        (architecture(node_width=2**40), "node_width"),
        (architecture(cutoff=TINY.cutoff - 0.1), "checksum"),
    ],
)
def test_metadata_has_to_describe_the_tensors(weights: Path, header: dict[str, str], problem: str) -> None:
    refuse(rewrite(weights, header=header), problem)


def test_an_absurd_architecture_is_refused_without_building_it(weights: Path) -> None:
    wide = architecture(layers=2, node_width=4096, message_width=4096, vectors=4096, invariants=4096, flows=4096)
    deep = [architecture(**{name: 4096}, node_width=4096, message_width=4096) for name in ("layers", "refine_layers")]
    for header in (wide, *deep):
        before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        refuse(rewrite(weights, header=header), "architecture says 4096" if header is not wide else "should be")
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
        assert time.monotonic() - started < 5.0


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (tmp_path / "exploded",)

    path = tmp_path / "other.safetensors"
    for content in (
        b"",
        b"{}",
        pickle.dumps(Bomb()),
        b"PK\x03\x04" + b"\0" * 1000,
        (2**63).to_bytes(8, "little") + b"{}",
        (2**40).to_bytes(8, "little") + b"{}" * 100,
        (4).to_bytes(8, "little") + b"null",
        (2).to_bytes(8, "little") + b"{}",
        (10**5).to_bytes(8, "little") + b"[" * 10**5,
        (20).to_bytes(8, "little") + b'{"__metadata__": 1 }',
        b"3\nwater\nO 0 0 0\nH 0 0 1\nH 0 1 0\n",
    ):
        path.write_bytes(content)
        refuse(path, "")
    torch.save({"state_dict": Bomb()}, path)
    refuse(path, "")
    assert not (tmp_path / "exploded").exists()
    save_file({"weight": torch.zeros(3)}, path)
    refuse(path, "weights of something else")


def forge(path: Path, change: Callable[[dict[str, Any]], object], *, duplicate: bool = False) -> Path:
    """Change the JSON in front of the numbers of a weights file, whatever becomes of it."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header)
    if duplicate:
        text = '{"network.norm.bias": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, ' + text[1:]
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + content[8 + length :])
    return path


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "a tensor larger than the file": lambda header: header["network.norm.bias"].update(
        shape=[2**20, 2**20], data_offsets=[0, 2**42]
    ),
    "a tensor larger than any memory": lambda header: header["network.norm.bias"].update(
        shape=[2**62, 2**62], data_offsets=[0, 2**63]
    ),
    "tensors on top of each other": lambda header: header["network.norm.bias"].update(
        data_offsets=header["network.norm.weight"]["data_offsets"]
    ),
    "offsets backwards": lambda header: header["network.norm.bias"]["data_offsets"].reverse(),
    "a negative shape": lambda header: header["network.norm.bias"].update(shape=[-32]),
    "no shape": lambda header: header["network.norm.bias"].pop("shape"),
    "a dtype nobody knows": lambda header: header["network.norm.bias"].update(dtype="Q7"),
    "integers": lambda header: header["network.norm.bias"].update(dtype="I32"),
    "no tensors": lambda header: [header.pop(key) for key in list(header) if key != "__metadata__"],
    "no metadata": lambda header: header.pop("__metadata__"),
    "metadata that is no text": lambda header: header["__metadata__"].update(epochs=3),
    "no architecture": lambda header: header["__metadata__"].pop("architecture"),
    "no checksum": lambda header: header["__metadata__"].pop("sha256"),
    "a checksum of another kind": lambda header: header["__metadata__"].update(sha256="[1]"),
    "metadata nested a million deep": lambda header: header["__metadata__"].update(note="[" * 10**6),
    "metadata nested and closed": lambda header: header["__metadata__"].update(note="[" * 10**5 + "]" * 10**5),
    "a number of a million digits": lambda header: header["__metadata__"].update(note="9" * 10**6),
    "an architecture of infinite width": lambda header: header["__metadata__"].update(
        architecture=header["__metadata__"]["architecture"].replace("32", "1e400")
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_forged_header_is_refused(weights: Path, what: str) -> None:
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    refuse(forge(weights, HOSTILE[what]), "")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
    assert time.monotonic() - started < 10.0


def test_a_name_that_comes_twice_never_changes_a_prediction(model: Model, weights: Path) -> None:
    forge(weights, lambda header: None, duplicate=True)
    with suppress(WeightsError):
        assert load_model(weights, device="cpu").predict([WATER])["u0"] == model.predict([WATER])["u0"]


def test_bits_flipped_anywhere_never_change_a_prediction(model: Model, weights: Path) -> None:
    content, rng = weights.read_bytes(), np.random.default_rng(0)
    expected = model.predict([WATER])["u0"][0]
    for position in rng.integers(0, len(content), 60):
        damaged = bytearray(content)
        damaged[position] ^= 1 << int(rng.integers(8))
        weights.write_bytes(damaged)
        with suppress(WeightsError):
            assert load_model(weights, device="cpu").predict([WATER])["u0"][0] == expected


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    refuse(tmp_path, "is not a weights file")
    refuse(tmp_path / "absent.safetensors", "no weights")


def test_a_file_that_cannot_be_read_is_refused(monkeypatch: pytest.MonkeyPatch, weights: Path) -> None:
    def fail(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", fail)
    refuse(weights, "Permission denied")


def test_an_unknown_name_lists_the_bundled_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("small", "large"):
        (tmp_path / f"{name}.safetensors").touch()
    monkeypatch.setattr("qmprop.model.bundled_folders", lambda: [tmp_path])
    assert find_weights("small") == tmp_path / "small.safetensors"
    for name in ("medium", "../small", str(tmp_path / "small")):
        with pytest.raises(WeightsError) as caught:
            find_weights(name)
        assert name in caught.value.message
        assert "large, small" in caught.value.hint


@pytest.mark.parametrize("name", ["warp", "", "cuda:99", "meta", "cpu gpu", "xpu"])
def test_a_device_that_is_not_there_is_refused(weights: Path, name: str) -> None:
    with pytest.raises(DeviceError) as caught:
        load_model(weights, device=name)
    assert f"'{name}'" in caught.value.message
    assert "cpu" in caught.value.hint


def test_auto_is_a_device_that_works() -> None:
    assert torch.zeros(1, device=choose_device("auto")).item() == 0.0
    assert choose_device("cpu").type == "cpu"


def test_a_failed_write_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, model: Model, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here before")
    (tmp_path / "folder.safetensors").mkdir()
    for path in (tmp_path / "absent" / "w", tmp_path / "file" / "w", tmp_path / "folder.safetensors"):
        with pytest.raises(OutputError, match=path.name):
            save_model(path, model)
    before = sorted(tmp_path.rglob("*"))

    def fill_disk(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[:1000])
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", fill_disk)
    with pytest.raises(OutputError, match="No space left"):
        save_model(tmp_path / "file", model)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_text() == "here before"


def test_metadata_that_is_no_json_writes_nothing(model: Model, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_model(tmp_path / "w", model.replace(metadata={"mae": float("nan")}))
    assert not list(tmp_path.iterdir())


def test_no_molecules_have_no_predictions(model: Model) -> None:
    predictions = model.predict([])
    assert list(predictions) == list(TARGETS)
    assert all(values.shape == (0,) for values in predictions.values())


def test_arrays_and_molecules_give_the_same(model: Model, molecules: list[Molecule]) -> None:
    dataset = read_dataset().select(np.tile(np.arange(20), 30))
    outcomes = model.run_arrays(dataset.numbers, dataset.positions, dataset.offsets)
    batches = [outcome.values for outcome in outcomes]
    assert len(batches) > 1, "more atoms than fit into one batch"
    found = dict(zip(DEFAULT_KEYS, np.concatenate(batches).T, strict=True))
    expected = model.predict(molecules)
    for key in DEFAULT_KEYS:
        spread = SPREAD.get(key) or SPREAD[f"{key}_atom"]
        np.testing.assert_allclose(found[key], np.tile(expected[key], 30), rtol=0.0, atol=1e-5 * spread, err_msg=key)


def test_r2_has_the_nuclear_part_of_the_refined_geometry(model: Model, molecules: list[Molecule]) -> None:
    found = model.predict(molecules)["r2"]
    row = LATENTS.index("r2")
    for molecule, value in zip(molecules, found, strict=True):
        masses = atomic_masses[molecule.numbers][:, None]
        centered = molecule.positions - (masses * molecule.positions).sum(axis=0) / masses.sum()
        outputs, refined = model.network(*make_graph(Molecule(molecule.numbers, centered)).arguments())
        counts = [np.sum(molecule.numbers == z) for z in (1, 6, 7, 8, 9)]
        electrons = float(outputs[0, row]) * model.baseline.scales[row] + model.baseline.coefficients[row, :5] @ counts
        nuclei, given = (
            float(np.sum(molecule.numbers * np.square(positions / BOHR_ANGSTROM).sum(axis=1)))
            for positions in (refined.numpy(), centered)
        )
        assert value == pytest.approx(max(electrons + nuclei, 0.0), abs=1.0, rel=1e-4), molecule.formula
        assert len(molecule.numbers) < 4 or abs(nuclei - given) > 0.1, "the geometry does change"


def test_a_molecule_larger_than_a_batch_is_a_batch_of_its_own(model: Model) -> None:
    chain = alkane(1500)
    numbers = np.concatenate([WATER.numbers, chain.numbers, WATER.numbers])
    positions = np.concatenate([WATER.positions, chain.positions, WATER.positions])
    batches = [outcome.values for outcome in model.run_arrays(numbers, positions, np.array([0, 3, 4505, 4508]))]
    assert [len(batch) for batch in batches] == [1, 1, 1]
    np.testing.assert_allclose(batches[0], batches[2], rtol=1e-6)


def test_threads_share_a_batch_without_a_trace(monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    dataset = read_dataset()
    arguments = (dataset.numbers, dataset.positions, dataset.offsets)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    alone = model.run(*arguments)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(qmprop.model, "_PART_ATOMS", 50)
    shared = model.run(*arguments)
    np.testing.assert_allclose(shared.values, alone.values, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(shared.traits, alone.traits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(shared.moves, alone.moves, atol=1e-6)
    np.testing.assert_allclose(shared.refined, alone.refined, atol=1e-6)
    np.testing.assert_array_equal(shared.composition.counts, alone.composition.counts)
    np.testing.assert_allclose(shared.composition.nuclear_r2, alone.composition.nuclear_r2, rtol=1e-6)


@pytest.mark.parametrize("sizes", [[300], [200, 1, 1, 200, 3], [1] * 400, [18] * 57, [5000, 2], [2, 5000], [3]])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_parts_are_whole_molecules_in_order(sizes: list[int], count: int) -> None:
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    parts = qmprop.model._share_out(offsets, count)
    assert 1 <= len(parts) <= count
    assert np.concatenate([parts[0][:1], *(part[1:] for part in parts)]).tolist() == offsets.tolist()
    assert all(len(part) > 1 for part in parts)
    if max(sizes) < 20 and len(parts) > 1:
        atoms = [part[-1] - part[0] for part in parts]
        assert max(atoms) - min(atoms) <= 36
    assert len(parts) > 1 or count == 1 or sum(sizes) < 256 or len(sizes) == 1 or max(sizes) > 256


def test_identities_hold_to_the_last_digit(model: Model, molecules: list[Molecule]) -> None:
    y = model.predict([*molecules, alkane(333)])
    assert all(np.isfinite(values).all() for values in y.values())
    np.testing.assert_allclose(y["gap"], y["lumo"] - y["homo"], atol=1e-12)
    np.testing.assert_allclose(y["h"] - y["u"], 0.025693, atol=1e-6)
    assert (y["u0"] < y["u"]).all()
    assert (y["g"] < y["h"]).all()
    assert y["u0"][-1] < -350_000.0, "333 carbon and 668 hydrogen atoms, to full precision"
    shift = model.predict([alkane(333)])["u0"] - y["u0"][-1]
    assert abs(shift[0]) < 1e-2, "float32 would step by 0.03 eV"


def test_embedding_is_invariant(model: Model, molecules: list[Molecule]) -> None:
    embedded = model.embed(molecules)
    assert embedded.shape == (20, TINY.node_width)
    assert embedded.dtype == np.float32
    moved = model.embed([move(molecule, by=(500.0, 0.0, -9.0), turn=random_rotation(3)) for molecule in molecules])
    np.testing.assert_allclose(moved, embedded, atol=1e-4)
    pair = model.embed([join(WATER, move(WATER, by=(60.0, 0.0, 0.0)))])
    np.testing.assert_allclose(pair[0], model.embed([WATER])[0], atol=1e-4)
    assert np.linalg.norm(embedded[:, None] - embedded, axis=2)[np.triu_indices(20, 1)].min() > 1e-3


def test_bundled_weights_predict_what_they_did() -> None:
    """Written by `python -m tests.make_golden`, to be run again only when the weights change."""
    expected, found = json.loads(GOLDEN.read_text()), predict()
    assert found["digest"] == expected["digest"]
    assert len(found["records"]) == 10
    for ours, golden in zip(found["records"], expected["records"], strict=True):
        label = {key: golden[key] for key in ("source", "index", "formula", "reasons", "seen")}
        assert {key: ours[key] for key in label} == label
        for key, value in golden["properties"].items():
            assert ours["properties"][key] == pytest.approx(value, abs=1e-3 if key == "r2" else 1e-4), (label, key)
        assert ours["half_widths"] == pytest.approx(golden["half_widths"], rel=1e-3), label


def test_bundled_weights_are_invariant(bundled: Model, molecules: list[Molecule]) -> None:
    before = bundled.predict(molecules)
    for turn in (random_rotation(11), np.diag([1.0, -1.0, 1.0])):
        moved = bundled.predict([move(molecule, by=(30.0, 5.0, -80.0), turn=turn) for molecule in molecules])
        for key, spread in SPREAD.items():
            assert np.abs(moved[key] - before[key]).max() < 1e-5 * spread, key


def test_bundled_weights_find_seen_molecules_nearest_to_themselves(bundled: Model, molecules: list[Molecule]) -> None:
    trust = load_trust(bundled)
    assert trust is not None
    traits = bundled.run(*concatenate(molecules)).traits
    rows, distances = trust.nearest(traits, 1)
    judged = trust.judge(molecules, traits)
    seen = np.array([bool(judgment.seen) for judgment in judged])
    within = (np.abs(trust.place(traits)) <= FARTHEST_STEP * trust.steps).all(axis=1)
    assert (seen & within).sum() >= 5
    for judgment, row in zip(judged, rows[:, 0], strict=True):
        assert not judgment.seen or trust.name(row) in judgment.seen
    assert (distances[seen & within, 0] < 0.1).all(), "but for the rounding to steps"


def test_bundled_weights_know_known_molecules(bundled: Model) -> None:
    """Twenty molecules of QM9, most of them seen in training: errors far below what composition alone gives."""
    dataset = read_dataset()
    predictions = bundled.predict([dataset.molecule(k) for k in range(len(dataset))])
    known = {"mu": 0.971, "alpha": 2.21, "homo": 0.413, "lumo": 0.762, "gap": 0.811, "zpve": 0.0384, "u0": 0.861}
    for key, composition in known.items():
        errors = np.abs(predictions[key] - dataset.targets[:, DEFAULT_KEYS.index(key)])
        assert np.median(errors) < composition / 4, key
    assert bundled.config == ModelConfig()
