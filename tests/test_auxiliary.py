"""Charges and vibrations of QM9: they belong to their molecules, and the cache file keeps them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from samples import read_dataset

from qmprop import auxiliary
from qmprop.auxiliary import KNOTS, Auxiliary, load_auxiliary
from qmprop.datasets import Dataset
from qmprop.errors import DataError
from qmprop.qm9 import read_cells

WAVENUMBER_EV = 1.239841984e-4  # h c in eV cm


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("auxiliary") / "qm9-auxiliary.cache"


@pytest.fixture(scope="module")
def parsed(full: Dataset, cache: Path) -> Auxiliary:
    found = load_auxiliary(full, cache_file=cache)
    assert found is not None
    return found


def test_known_molecules(full: Dataset, parsed: Auxiliary) -> None:
    """Water and methane, as the file has them."""
    modes = np.concatenate([[0], np.cumsum(parsed.counts)])
    charges = {3: [-0.589706, 0.294853, 0.294853], 1: [-0.535689] + [0.133921] * 4}
    for gdb, expected in charges.items():
        row = int(np.searchsorted(full.ids, gdb))
        atoms = slice(*full.offsets[row : row + 2])
        assert parsed.charges[atoms] == pytest.approx(expected, abs=1e-3)
        assert parsed.counts[row] == 3 * len(expected) - 6
    row = int(np.searchsorted(full.ids, 3))
    found = parsed.wavenumbers[modes[row] : modes[row + 1]]
    assert found == pytest.approx([1671.42, 3803.63, 3907.70], abs=1e-2)


def test_modes_are_those_of_the_molecules(full: Dataset, parsed: Auxiliary) -> None:
    """Half their sum is the zero-point energy: of all molecules but a few, and of those that QM9 lists two sets of."""
    owners = np.repeat(np.arange(len(full)), parsed.counts)
    zpve = np.bincount(owners, parsed.wavenumbers) / 2.0 * WAVENUMBER_EV
    labels = full.targets[:, 6]
    assert (np.abs(zpve - labels) < 2e-5).mean() > 0.9999
    lacking = 3 * np.diff(full.offsets) - parsed.counts
    assert np.isin(lacking, [5, 6]).all()
    assert (lacking == 5).sum() < 20, "linear ones"


def test_charges_are_neutral(full: Dataset, parsed: Auxiliary) -> None:
    sums = np.add.reduceat(parsed.charges.astype(float), full.offsets[:-1])
    assert np.abs(sums).max() < 0.02


def test_cache_file_keeps_them(full: Dataset, parsed: Auxiliary, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auxiliary, "_parse", None)
    again = load_auxiliary(full, cache_file=cache)
    assert again is not None
    assert np.abs(again.charges - parsed.charges).max() < 1e-3
    assert np.abs(again.wavenumbers - parsed.wavenumbers).max() < 1.0
    assert np.array_equal(again.counts, parsed.counts)
    assert cache.stat().st_size < 10e6


@pytest.mark.parametrize("damage", ["cut", "other data"])
def test_a_useless_cache_file_is_built_again(
    full: Dataset, parsed: Auxiliary, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    path = tmp_path / "some.cache"
    if damage == "cut":
        path.write_bytes(cache.read_bytes()[:-10])
    else:
        auxiliary._write(path, read_dataset(), parsed)
    monkeypatch.setattr(auxiliary, "_parse", lambda dataset, reason: parsed)
    assert load_auxiliary(full, cache_file=path) is parsed
    assert path.read_bytes() == cache.read_bytes()


def test_a_cache_file_that_cannot_be_written_is_no_failure(
    full: Dataset, parsed: Auxiliary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auxiliary, "_parse", lambda dataset, reason: parsed)
    (tmp_path / "file").touch()
    with pytest.warns(RuntimeWarning, match="parsed again"):
        assert load_auxiliary(full, cache_file=tmp_path / "file" / "some.cache") is parsed


def test_other_data_have_none() -> None:
    assert load_auxiliary(read_dataset()) is None


def test_molecules_in_another_order_are_refused(full: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def swap(columns: list[str], reason: str):
        rows = list(read_cells(columns, reason))
        yield from (*rows[1:], rows[0])

    monkeypatch.setattr(auxiliary, "read_cells", swap)
    with pytest.raises(DataError, match="do not fit"):
        auxiliary._parse(full, "")


def test_without_qm9pack_the_error_says_what_to_do(
    full: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "qm9pack", None)
    with pytest.raises(DataError, match="qm9pack, which is not installed") as caught:
        load_auxiliary(full, cache_file=tmp_path / "some.cache")
    assert "copy some.cache" in caught.value.hint
    assert "charge_weight" in caught.value.hint


def test_modes_are_shared_out_between_the_knots() -> None:
    middle = (KNOTS[4] + KNOTS[5]) / 2.0
    wavenumbers = np.array([KNOTS[1], middle, middle, KNOTS[-1] + 100.0, -50.0, KNOTS[7]], dtype=np.float32)
    table = Auxiliary(np.zeros(3, np.float32), wavenumbers, np.array([3, 2, 1])).count_modes()
    expected = np.zeros((3, len(KNOTS)))
    expected[0, [1, 4, 5]] = 1.0
    expected[1, [0, -1]] = 1.0
    expected[2, 7] = 1.0
    np.testing.assert_allclose(table, expected, atol=1e-6)
