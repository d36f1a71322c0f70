"""QM9 at cheaper minima: superposition, the cache file, what is computed and kept, and `eval` on them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_minima import find_rows
from numpy.typing import NDArray
from samples import QM9_20, make_model, random_rotation, read_dataset
from scipy.spatial.transform import Rotation

from qmprop import evaluation, geometries, qm9
from qmprop.__main__ import run
from qmprop.datasets import Dataset
from qmprop.errors import DataError
from qmprop.geometries import load_cheap, load_geometries, minimize_dataset, rmsd, superpose
from qmprop.model import save_model

#: Rows of QM9 that the tests minimize; the second needs its SMILES.
ROWS = [20, 104, 300, 301, 5000]
#: Four different atoms' places that no rotation turns into their mirror image.
CHIRAL = np.array([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 3.0]])
seeds = st.integers(0, 2**32 - 1)


def make_molecules(seed: int) -> tuple[NDArray[np.float64], NDArray[np.int64], np.random.Generator]:
    """Return positions and offsets of a few clouds of 1 to 9 points, some of them flat or on a line."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 10, size=4)
    positions = rng.normal(scale=3.0, size=(counts.sum(), 3))
    positions[: counts[0], 1:] = 0.0
    positions[counts[0] : counts[:2].sum(), 2] = 0.0
    return positions, np.concatenate([[0], np.cumsum(counts)]), rng


class TestSuperposition:
    @settings(max_examples=30, deadline=None)
    @given(seeds)
    def test_takes_back_any_motion(self, seed: int) -> None:
        positions, offsets, rng = make_molecules(seed)
        moved = positions.copy()
        for first, last in pairwise(offsets):
            moved[first:last] = positions[first:last] @ random_rotation(seed + int(first)).T + rng.normal(size=3)
        assert superpose(moved, positions, offsets) == pytest.approx(positions, abs=1e-9)
        assert rmsd(moved, positions, offsets) == pytest.approx(0.0, abs=1e-9)

    @pytest.mark.filterwarnings("ignore:Optimal rotation is not uniquely")  # a line of points may turn about itself
    @settings(max_examples=30, deadline=None)
    @given(seeds)
    def test_finds_the_least_distance_and_keeps_every_shape(self, seed: int) -> None:
        positions, offsets, rng = make_molecules(seed)
        other = positions + rng.normal(size=positions.shape)
        on_top = superpose(other, positions, offsets)
        for k, (first, last) in enumerate(pairwise(offsets)):
            a, b = (x[first:last] - x[first:last].mean(axis=0) for x in (positions, other))
            _, distance = Rotation.align_vectors(a, b) if last - first > 1 else (None, 0.0)
            assert rmsd(other, positions, offsets)[k] == pytest.approx(distance / np.sqrt(last - first), abs=1e-7)
            before, after = (x[first:last] - x[first] for x in (other, on_top))
            assert after @ after.T == pytest.approx(before @ before.T, abs=1e-9)

    def test_leaves_a_mirror_image_one(self) -> None:
        mirrored = superpose(CHIRAL * [-1, 1, 1], CHIRAL, np.array([0, 4]))
        assert np.linalg.det(mirrored[1:] - mirrored[0]) == pytest.approx(-6.0)
        assert rmsd(mirrored, CHIRAL, np.array([0, 4]))[0] > 0.3


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("QMPROP_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def filled(full: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache file with the rows the tests use."""
    path = tmp_path_factory.mktemp("filled") / "qm9-mmff.cache"
    load_geometries("mmff", full, rows=ROWS, cache_file=path, processes=1)
    return path


@pytest.fixture(scope="module")
def bundled(full: Dataset) -> geometries.Geometries:
    """The GFN2-xTB minima that come with the package."""
    store = geometries._Store(full)
    (file,) = geometries._bundled_files("xtb")
    assert store.read(file) == ""
    return store.to_geometries("xtb")


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts of the molecules in every computation, which is done."""
    counts: list[int] = []
    compute = geometries._compute
    monkeypatch.setattr(geometries, "_compute", lambda *args: counts.append(len(args[2])) or compute(*args))
    return counts


class TestCache:
    def test_holds_minima_near_the_dft_geometries(self, full: Dataset, filled: Path, computed: list[int]) -> None:
        known = load_geometries("mmff", full, rows=ROWS, cache_file=filled)
        assert not computed
        assert known.found.sum() == len(ROWS)
        assert known.found[ROWS].all()
        assert not known.failures
        near, dft = (replace(full, positions=x).select(ROWS) for x in (known.positions, full.positions))
        distances = rmsd(near.positions, dft.positions, dft.offsets)
        assert (distances > 0.005).all()
        assert (distances < 0.6).all()
        plain = np.square(near.positions - dft.positions).sum(axis=1)
        plain = np.sqrt(np.add.reduceat(plain, dft.offsets[:-1]) / np.diff(dft.offsets))
        assert plain == pytest.approx(distances, abs=1e-4)
        rest = np.repeat(~known.found, np.diff(full.offsets))
        assert np.array_equal(known.positions[rest], full.positions[rest])

    def test_agrees_with_a_computation_without_it_in_more_processes(self, full: Dataset, filled: Path) -> None:
        known = load_geometries("mmff", full, rows=ROWS, cache_file=filled)
        again = minimize_dataset("mmff", full.select(ROWS), processes=2)
        assert np.array_equal(again.positions, replace(full, positions=known.positions).select(ROWS).positions)

    def test_only_what_is_missing_is_computed(
        self, full: Dataset, filled: Path, tmp_path: Path, computed: list[int]
    ) -> None:
        path = tmp_path / "more.cache"
        path.write_bytes(filled.read_bytes())
        known = load_geometries("mmff", full, rows=[*ROWS, 7, 20], cache_file=path)
        assert computed == [1]
        assert known.found.sum() == len(ROWS) + 1

    @pytest.mark.parametrize("damage", ["flipped byte", "truncated", "other data", "not a cache"])
    def test_damage_is_noticed_and_repaired(
        self, full: Dataset, filled: Path, tmp_path: Path, computed: list[int], damage: str
    ) -> None:
        content = filled.read_bytes()
        path = tmp_path / "damaged.cache"
        if damage == "other data":
            other = geometries._Store(full.select(range(10)))
            other.add(3, "no reason")
            other.write(path)
        else:
            flipped = bytearray(content)
            flipped[len(content) // 2] ^= 1
            path.write_bytes({"flipped byte": flipped, "truncated": content[:-9], "not a cache": b"x"}[damage])
        load_geometries("mmff", full, rows=ROWS[:1], cache_file=path)
        load_geometries("mmff", full, rows=ROWS[:1], cache_file=path)
        assert computed == [1]

    def test_an_interrupted_computation_goes_on(self, full: Dataset, cache: Path, computed: list[int]) -> None:
        def interrupt(done: int, total: int) -> None:
            raise KeyboardInterrupt

        rows = np.arange(50, 90)
        with pytest.raises(KeyboardInterrupt):
            load_geometries("mmff", full, rows=rows, progress=interrupt, processes=1)
        assert [file.name for file in cache.iterdir()] == ["qm9-mmff.cache"]
        seen: list[tuple[int, int]] = []
        known = load_geometries("mmff", full, rows=rows, progress=lambda *step: seen.append(step), processes=1)
        assert computed == [40, 8]
        assert seen == [(8, 8)]
        assert known.found[rows].all()

    def test_what_another_process_found_meanwhile_is_kept(self, full: Dataset, cache: Path) -> None:
        load_geometries("mmff", full, rows=[2], progress=lambda *_: load_geometries("mmff", full, rows=[3]))
        known = load_geometries("mmff", full, rows=[])
        assert np.flatnonzero(known.found).tolist() == [2, 3]

    def test_reading_needs_no_chemistry(self, filled: Path) -> None:
        code = (
            "import sys, pathlib\n"
            "from qmprop import geometries, qm9\n"
            f"file = pathlib.Path({str(filled)!r})\n"
            f"known = geometries.load_geometries('mmff', qm9.load_qm9(), rows={ROWS}, cache_file=file)\n"
            "heavy = {'rdkit', 'ase', 'tblite', 'torch', 'scipy'} & set(sys.modules)\n"
            "print(known.found.sum(), sorted(heavy))\n"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
        assert result.stdout == f"{len(ROWS)} []\n"

    def test_a_folder_that_cannot_be_written_only_warns(self, full: Dataset, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.warns(RuntimeWarning, match="computed again"):
            known = load_geometries("mmff", full, rows=[2], cache_file=tmp_path / "file" / "x.cache")
        assert known.found[2]


class TestStore:
    @settings(max_examples=10, deadline=None)
    @given(seed=seeds, scale=st.sampled_from([0.1, 2.0, 100.0]))
    def test_keeps_every_displacement_and_reason(
        self, tmp_path_factory: pytest.TempPathFactory, seed: int, scale: float
    ) -> None:
        rng = np.random.default_rng(seed)
        dataset = read_dataset()
        store = geometries._Store(dataset)
        for row in rng.permutation(len(dataset))[:15].tolist():
            positions = dataset.positions[slice(*dataset.offsets[row : row + 2])]
            reason = ["not converged", "a bond broke"][row % 2]
            store.add(row, reason if rng.random() < 0.3 else positions + rng.normal(scale=scale, size=positions.shape))
        path = tmp_path_factory.getbasetemp() / "store.cache"
        store.write(path)
        copy = geometries._Store(dataset)
        copy.add(0, "a bond broke")
        assert copy.read(path) == ""
        first, second = store.to_geometries("mmff"), copy.to_geometries("mmff")
        assert np.array_equal(store.moves, copy.moves)
        assert np.array_equal(first.positions, second.positions)
        assert first.failures.items() <= second.failures.items()
        assert np.array_equal(first.found, second.found)

    def test_is_exact_to_its_unit(self) -> None:
        dataset = read_dataset()
        store = geometries._Store(dataset)
        positions = dataset.positions[: dataset.offsets[1]].astype(float)
        stretched = positions + (positions - positions.mean(axis=0)) * 9
        store.add(0, stretched)
        assert np.abs(stretched - positions).max() > 5
        assert store.to_geometries("mmff").positions[: len(positions)] == pytest.approx(stretched, abs=1e-4)


class TestCheap:
    def test_force_field_minima_are_those_asked_for_and_xtb_minima_those_bundled(
        self, full: Dataset, cache: Path, filled: Path, bundled: geometries.Geometries, computed: list[int]
    ) -> None:
        """Whatever the cache files know beside that."""
        (cache / "qm9-mmff.cache").write_bytes(filled.read_bytes())
        row = int(np.flatnonzero(~bundled.found)[-1])
        store = geometries._Store(full)
        store.add(row, full.positions[slice(*full.offsets[row : row + 2])] * 1.01)
        store.write(cache / "qm9-xtb.cache")
        mmff, xtb = load_cheap(full, ROWS)
        assert not computed
        assert (mmff.kind, xtb.kind) == ("mmff", "xtb")
        assert mmff.found[ROWS].any()
        assert np.array_equal(xtb.found, bundled.found)
        assert np.array_equal(xtb.positions, bundled.positions)

    def test_other_data_have_none(self, full: Dataset) -> None:
        for dataset in (read_dataset(), full.select(range(100))):
            assert load_cheap(dataset, [0]) == ()


class TestRefusals:
    def test_other_data(self, full: Dataset, cache: Path) -> None:
        for dataset in (read_dataset(), full.select(range(100))):
            with pytest.raises(DataError, match="whole of QM9"):
                load_geometries("mmff", dataset)

    def test_an_unknown_kind(self, full: Dataset) -> None:
        with pytest.raises(ValueError, match="mmff, xtb"):
            load_geometries("uff", full)

    def test_missing_packages(
        self, full: Dataset, cache: Path, bundled: geometries.Geometries, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        row = np.flatnonzero(~bundled.found)[0]
        monkeypatch.setattr(geometries, "find_spec", lambda name: None)
        with pytest.raises(DataError, match="tblite, which is not installed") as caught:
            load_geometries("xtb", full, rows=[row])
        assert "qmprop[xtb]" in caught.value.hint

    def test_failures_are_listed(self, full: Dataset, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(geometries, "minimize", fail_odd_molecules)
        known = load_geometries("mmff", full, rows=[10, 11, 12])
        assert known.failures == {int(full.ids[11]): "a bond broke"}
        assert known.found[10:13].tolist() == [True, False, True]


class fail_odd_molecules:  # noqa: N801  # stands for a function whose iterator can be closed
    """`minima.minimize` with answers known beforehand: molecules at their geometry, every second without."""

    def __init__(self, tasks, processes) -> None:
        self.tasks = tasks
        self.count = 0

    def __iter__(self):
        for task in self.tasks:
            answers = []
            for _, positions, _ in task.molecules:
                answers.append("a bond broke" if self.count % 2 else positions.astype(float))
                self.count += 1
            yield replace(task, minima=tuple(answers))

    def close(self) -> None:
        pass


class TestXtb:
    def test_first_molecules_of_each_part_of_the_split_are_bundled(
        self, full: Dataset, bundled: geometries.Geometries
    ) -> None:
        tried = bundled.found | np.isin(full.ids, list(bundled.failures))
        assert np.array_equal(np.flatnonzero(tried), find_rows(full))
        test = qm9.split_qm9()["test"]
        assert np.array_equal(np.flatnonzero(tried[test]), np.arange(geometries.XTB_SIZE))
        assert bundled.found.sum() >= 0.99 * tried.sum()

    def test_bundled_minima_are_near_the_dft_geometries(self, full: Dataset, bundled: geometries.Geometries) -> None:
        rows = np.flatnonzero(bundled.found)
        near, dft = (replace(full, positions=x).select(rows) for x in (bundled.positions, full.positions))
        distances = rmsd(near.positions, dft.positions, dft.offsets)
        assert 0.03 < np.median(distances) < 0.12

    def test_are_used_without_a_computation(self, full: Dataset, cache: Path, computed: list[int]) -> None:
        known = load_geometries("xtb", full)
        assert not computed
        assert known.found.sum() >= 990

    def test_can_be_computed_again(self, full: Dataset, bundled: geometries.Geometries) -> None:
        rows = np.flatnonzero(bundled.found)
        rows = rows[np.argsort(np.diff(full.offsets)[rows], kind="stable")][:2]
        again = minimize_dataset("xtb", full.select(rows), processes=2)
        stored = replace(full, positions=bundled.positions).select(rows)
        assert again.found.all()
        assert (rmsd(again.positions, stored.positions, stored.offsets) < 5e-3).all()


class TestEval:
    @pytest.fixture
    def weights(self, tmp_path: Path) -> str:
        model = make_model()
        path = tmp_path / "tiny.safetensors"
        save_model(path, model)
        return str(path)

    @pytest.fixture
    def data(self, full: Dataset, monkeypatch: pytest.MonkeyPatch) -> str:
        """QM9's cache file; its SMILES take a second to find, and the molecules here do without."""
        monkeypatch.setattr(geometries, "read_smiles", lambda ids: {})
        return str(qm9.find_cache("qm9.cache"))

    def test_mmff_counts_who_is_left_out(self, full, data, cache, weights, monkeypatch, capfd) -> None:
        monkeypatch.setattr(geometries, "minimize", fail_odd_molecules)
        assert run(["eval", "--data", data, "-w", weights, "--geometry", "mmff", "--limit", "8", "-f", "json"]) == 0
        out, err = capfd.readouterr()
        report = json.loads(out)
        assert (report["geometry"], report["molecules"], report["skipped"]) == ("mmff", 4, 4)
        assert report["skipped_reasons"] == {"a bond broke": 4}
        assert "4 molecules without a geometry of MMFF94 are left out: a bond broke 4" in err

    def test_all_geometries_stand_side_by_side(self, full, data, cache, weights, capfd) -> None:
        command = ["eval", "--data", data, "-w", weights, "--geometry", "all", "--limit", "6"]
        assert run([*command, "-f", "json"]) == 0
        reports = json.loads(capfd.readouterr().out)
        assert [report["geometry"] for report in reports] == ["dft", "mmff", "xtb"]
        assert [report["molecules"] + report["skipped"] for report in reports] == [6, 6, 6]
        assert reports[0]["skipped"] == 0
        errors = [report["properties"]["r2"]["mae"] for report in reports]
        assert len(set(errors)) == 3
        assert run(command) == 0
        table = capfd.readouterr().out
        assert "MMFF94" in table
        assert "GFN2-xTB" in table
        assert next(line for line in table.splitlines() if line.split()[:1] == ["mu"]).split()[1] == "D"

    def test_the_predictions_are_those_of_the_minimum(self, full, data, cache) -> None:
        model = make_model()
        report = evaluation.evaluate(weights=model, data=data, geometry="mmff", limit=3)
        rows = qm9.split_qm9()["test"][:3]
        known = load_geometries("mmff", full, rows=rows)
        expected = evaluation.measure(model, replace(full, positions=known.positions).select(rows))
        assert report.properties == expected
        assert report.properties != evaluation.measure(model, full.select(rows))

    def test_a_file_s_own_minima(self, cache) -> None:
        model = make_model()
        as_it_is = evaluation.evaluate(weights=model, data=QM9_20)
        moved = evaluation.evaluate(weights=model, data=QM9_20, geometry="mmff")
        assert (as_it_is.geometry, moved.geometry) == ("file", "mmff")
        assert moved.molecules + moved.skipped == 20
        assert moved.skipped <= 2
        assert not list(cache.iterdir())
