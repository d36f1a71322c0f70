"""The training molecules with their DFT values: the bundled file, what is not in it, and what is done without it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from samples import make_model, read_dataset

from qmprop import inference, library
from qmprop.calibration import fit_trust
from qmprop.datasets import Dataset, read_arrays, write_arrays
from qmprop.errors import DataError
from qmprop.library import LIBRARY_FILE, Library, load_library, read_library, write_library
from qmprop.model import Model
from qmprop.qm9 import TRAIN_SIZE, split_other, split_qm9
from qmprop.targets import ATOM_ENERGIES_HARTREE, ATOMIZATION_KEYS, DEFAULT_KEYS, HARTREE_EV, TARGETS, unit_factor

WEIGHTS = Path(__file__).parents[1] / "weights"
#: Methane in QM9's units: Bohr and hartree.
METHANE = {
    **{"alpha": 13.21, "homo": -0.3877, "lumo": 0.1171, "r2": 35.3641, "zpve": 0.044749, "u0": -40.47893},
    **{"u": -40.476062, "h": -40.475117, "g": -40.498597, "cv": 6.469},
}


@pytest.fixture(scope="module")
def bundled() -> Library:
    found = load_library({"data": "qm9"})
    assert found is not None
    return found


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A library of the even ones of the twenty molecules."""
    data = dataclasses.replace(read_dataset(), ids=np.arange(100, 120), name="qm9")
    path = tmp_path / LIBRARY_FILE
    write_library(path, data, np.arange(0, 20, 2)[::-1], {number: f"C{number}" for number in range(100, 120)})
    return path


def test_the_bundled_file_has_the_training_molecules(bundled: Library) -> None:
    assert len(bundled) == TRAIN_SIZE == 100_000


def test_methane_has_the_values_of_qm9(bundled: Library) -> None:
    methane = bundled.get(1)
    assert methane is not None
    assert methane.smiles == "C"
    assert set(methane.values) == set(TARGETS)
    for key, value in METHANE.items():
        factor = unit_factor(key, TARGETS[key].qm9_unit)
        assert methane.values[key] / factor == pytest.approx(value, rel=1e-12), key


def test_atomization_energies_are_those_without_the_free_atoms(bundled: Library) -> None:
    """Methane's -17.17 eV: its energy without that of one carbon and four hydrogen atoms."""
    methane = bundled.get(1)
    assert methane is not None
    for key in ATOMIZATION_KEYS:
        total = str(TARGETS[key].total)
        atoms = ATOM_ENERGIES_HARTREE[total][6] + 4 * ATOM_ENERGIES_HARTREE[total][1]
        assert methane.values[key] == pytest.approx((METHANE[total] - atoms) * HARTREE_EV, abs=1e-9), key
    assert methane.values["u0_atom"] == pytest.approx(-17.17, abs=0.01)


def test_every_value_is_that_of_the_data(bundled: Library, full: Dataset) -> None:
    """To the last decimal that QM9 gives, for a thousand molecules of all sizes."""
    for row in split_qm9()["train"][:1000].tolist():
        known = bundled.get(int(full.ids[row]))
        assert known is not None
        values = [known.values[key] for key in DEFAULT_KEYS]
        np.testing.assert_allclose(values, full.targets[row], rtol=1e-12, atol=1e-9)
        assert known.smiles


def test_no_validation_or_test_molecule_is_in_it(bundled: Library, full: Dataset) -> None:
    splits = split_qm9()
    assert all(bundled.get(number) is not None for number in full.ids[splits["train"]].tolist())
    for name in ("valid", "test"):
        assert all(bundled.get(number) is None for number in full.ids[splits[name]].tolist())


@pytest.mark.parametrize("number", [-1, 0, 58, 133_886, 10**9])
def test_an_absent_number_is_not_known(bundled: Library, number: int) -> None:
    """Among them 58, which QM9 lists among those that rearranged, and what lies before and behind all."""
    assert bundled.get(number) is None


def test_what_is_written_can_be_read(small: Path) -> None:
    found, data = read_library(small), read_dataset()
    assert len(found) == 10
    for row in range(20):
        known = found.get(100 + row)
        if row % 2:
            assert known is None
            continue
        assert known is not None
        assert known.smiles == f"C{100 + row}"
        values = [known.values[key] for key in DEFAULT_KEYS]
        np.testing.assert_allclose(values, data.targets[row], rtol=0.0, atol=6e-5)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other", "short", "missing", "missing part"])
def test_a_damaged_file_is_refused(small: Path, damage: str) -> None:
    content, magic = small.read_bytes(), b"qmprop-library-1\n"
    arrays = read_arrays(small, magic)
    if damage == "cut":
        small.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        small.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    elif damage == "empty":
        small.write_bytes(b"")
    elif damage == "other":
        small.write_bytes((WEIGHTS / "qm9-xtb.cache").read_bytes())
    elif damage == "short":
        write_arrays(small, magic, **(arrays | {"steps": arrays["steps"][:-1]}))
    elif damage == "missing":
        small.unlink()
    else:
        write_arrays(small, magic, **{name: array for name, array in arrays.items() if name != "smiles"})
    with pytest.raises(DataError, match=LIBRARY_FILE):
        read_library(small)


def test_only_weights_trained_on_qm9_have_one(monkeypatch: pytest.MonkeyPatch, small: Path) -> None:
    assert load_library({"data": "my.extxyz"}) is None
    assert load_library({}) is None
    monkeypatch.setattr(library, "bundled_folders", lambda: [small.parent / "none", small.parent])
    found = load_library({"data": "qm9"})
    assert found is not None
    assert len(found) == 10
    monkeypatch.setattr(library, "bundled_folders", lambda: [small.parent / "none"])
    assert load_library({"data": "qm9"}) is None


def test_neighbors_are_named_with_values_as_far_as_these_are_known(
    monkeypatch: pytest.MonkeyPatch, small: Path
) -> None:
    """The library has the even training molecules; without a file all are named without values."""
    rng = np.random.default_rng(0)
    data = read_dataset().select(np.arange(2000) % 20)
    noise = 0.03 * rng.standard_normal(data.positions.shape).astype(np.float32)
    data = dataclasses.replace(data, ids=100 + np.arange(2000), positions=data.positions + noise, name="qm9")
    plain = make_model()
    trust, _ = fit_trust(plain, data, split_other(2000))
    model = Model(plain.network, plain.baseline, metadata={"data": "qm9"}, extras=trust.to_arrays())
    rows = split_other(2000)["train"]
    monkeypatch.setattr(library, "bundled_folders", lambda: [small.parent])
    write_library(small, data, rows[rows % 2 == 0], {number: f"C{number}" for number in range(100, 2100)})
    molecules = [data.molecule(int(row)) for row in rows[:4]]
    records = inference.predict(molecules, weights=model, properties="mu", units="mu=ea0", neighbors=3)
    for row, record in zip(rows[:4].tolist(), records, strict=True):
        assert record.neighbors[0].id == f"gdb_{100 + row}"
        for neighbor in record.neighbors:
            number = int(neighbor.id.removeprefix("gdb_"))
            if number % 2:
                assert (neighbor.smiles, neighbor.properties) == ("", {})
                continue
            assert neighbor.smiles == f"C{number}"
            expected = data.targets[number - 100, 0] / unit_factor("mu", "ea0")
            assert neighbor.properties["mu"].value == pytest.approx(expected, abs=1e-4)
            assert neighbor.properties["mu"].unit == "ea0"
    small.unlink()
    (record,) = inference.predict(molecules[0], weights=model, properties="mu", neighbors=3)
    assert {(neighbor.smiles, tuple(neighbor.properties)) for neighbor in record.neighbors} == {("", ())}
    small.write_bytes(b"damaged")
    with pytest.raises(DataError, match=LIBRARY_FILE):
        inference.predict(molecules[0], weights=model, neighbors=1)
