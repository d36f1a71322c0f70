"""QM9: the real data, the cache file that holds it, EGNN's split, and users' labeled files."""

from __future__ import annotations

import ast
import csv
import re
import resource
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qmprop import datasets, qm9
from qmprop.datasets import Dataset
from qmprop.errors import DataError, OutputError, UsageError
from qmprop.targets import ATOM_ENERGIES_HARTREE, DEFAULT_KEYS, HARTREE_EV, TARGETS, convert, unit_factor

COLUMN = {key: index for index, key in enumerate(DEFAULT_KEYS)}
WATER = "O 0 0 0\nH 0.96 0 0\nH -0.24 0.93 0\n"


@pytest.fixture(scope="session")
def full_cache(full: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qm9") / "full.cache"
    datasets.write_cache(full, path)
    return path


@pytest.fixture
def small(full: Dataset) -> Dataset:
    return full.select(range(0, len(full), 6000))


def write_slice(path: Path, rows: int, changes: dict[str, str] | None = None) -> list[dict[str, str]]:
    """Write the first rows of the real CSV file to `path`, with cells of the last one changed; return the rows."""
    source = qm9._find_qm9pack_files("")[0]
    with source.open(newline="") as file:
        reader = csv.DictReader(file)
        table = [next(reader) for _ in range(rows)]
    table[-1] |= changes or {}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    return table


def same(first: Dataset, second: Dataset) -> bool:
    fields = ("ids", "offsets", "numbers", "positions", "targets")
    return all(
        getattr(first, field).dtype == getattr(second, field).dtype
        and np.array_equal(getattr(first, field), getattr(second, field), equal_nan=True)
        for field in fields
    )


class TestQm9:
    def test_is_the_published_set_without_the_rearranged_molecules(self, full: Dataset) -> None:
        assert len(full) == 130_831
        assert full.name == "qm9"
        assert full.offsets[-1] == len(full.numbers) == 2_359_210
        assert 58 not in full.ids
        assert 59 in full.ids
        assert full.ids[0] == 1
        assert full.ids[-1] == 133_885
        assert set(full.numbers.tolist()) == {1, 6, 7, 8, 9}
        heavy = np.add.reduceat(full.numbers > 1, full.offsets[:-1], dtype=np.int64)
        assert heavy.max() == 9
        assert np.diff(full.offsets).max() == 29

    @pytest.mark.parametrize(
        ("row", "formula", "values"),
        [
            (0, "CH4", {"mu": 0, "alpha": 13.21, "homo": -0.3877, "lumo": 0.1171, "r2": 35.3641, "zpve": 0.044749}),
            (0, "CH4", {"u0": -40.47893, "u": -40.476062, "h": -40.475117, "g": -40.498597, "cv": 6.469}),
            (2, "H2O", {"mu": 1.8511, "alpha": 6.31, "u0": -76.404702}),
        ],
    )
    def test_known_rows(self, full: Dataset, row: int, formula: str, values: dict[str, float]) -> None:
        molecule = full.molecule(row)
        assert molecule.formula == formula
        assert molecule.name == f"gdb_{row + 1}"
        assert (molecule.source, molecule.index) == ("qm9", row)
        for key, value in values.items():
            stored = convert(full.targets[row, COLUMN[key]], key, TARGETS[key].qm9_unit)
            assert stored == pytest.approx(value, rel=1e-12), key

    def test_methane_is_tetrahedral(self, full: Dataset) -> None:
        positions = full.molecule(0).positions
        bonds = positions[1:] - positions[0]
        assert np.linalg.norm(bonds, axis=1) == pytest.approx([1.0919] * 4, abs=1e-4)
        assert bonds[0] @ bonds[1] / 1.0919**2 == pytest.approx(-1 / 3, abs=1e-3)

    def test_thermochemistry_is_ordered(self, full: Dataset) -> None:
        u0, u, h, g = (full.targets[:, COLUMN[key]] for key in ("u0", "u", "h", "g"))
        assert (u0 < u).all()
        assert (u < h).all()
        assert (g < h).all()

    def test_wrong_column_order_or_rows_are_noticed(self, full: Dataset) -> None:
        def swapped(a: str, b: str) -> Dataset:
            order = list(range(12))
            order[COLUMN[a]], order[COLUMN[b]] = COLUMN[b], COLUMN[a]
            return replace(full, targets=full.targets[:, order])

        qm9._verify_qm9(full)
        for a, b, text in [
            ("homo", "lumo", "gap"),
            ("u", "h", "H - U"),
            ("h", "g", "H - U"),
            ("u0", "zpve", "gdb 1 "),
            ("mu", "alpha", "gdb 1 "),
            ("r2", "cv", "gdb 1 "),
        ]:
            with pytest.raises(DataError, match=text):
                qm9._verify_qm9(swapped(a, b))
        with pytest.raises(DataError, match="130831 molecules"):
            qm9._verify_qm9(full.select(slice(1, None)))
        with pytest.raises(DataError, match="order"):
            qm9._verify_qm9(full.select(np.r_[1, 0, 2 : len(full)]))
        with pytest.raises(DataError, match="order"):
            qm9._verify_qm9(replace(full, ids=np.where(full.ids == 59, 58, full.ids)))


class TestParsing:
    def test_agrees_with_a_slow_parser_on_real_rows(self, tmp_path: Path) -> None:
        path = tmp_path / "slice.csv"
        rows = write_slice(path, 210)
        text = "".join(row["XYZ_Ang"] for row in rows)
        assert re.search(r"\d\.[,\]]", text), "no number such as 1. among these rows"
        assert re.search(r"E-", text), "no number such as 7.E-6 among these rows"
        seen: list[tuple[int, int]] = []
        dataset = qm9._parse_qm9([path], lambda done, total: seen.append((done, total)))
        assert seen == [(210, 130_831)]
        assert dataset.ids.tolist() == [int(row["Index"]) for row in rows]
        symbols = {"H": 1, "C": 6, "N": 7, "O": 8, "F": 9}
        for k, row in enumerate(rows):
            molecule = dataset.molecule(k)
            assert molecule.numbers.tolist() == [symbols[symbol] for symbol in ast.literal_eval(row["Elements"])]
            np.testing.assert_array_equal(molecule.positions, np.float32(ast.literal_eval(row["XYZ_Ang"])))
            expected = [
                float(row[TARGETS[key].qm9_column]) * unit_factor(key, TARGETS[key].qm9_unit) for key in DEFAULT_KEYS
            ]
            assert dataset.targets[k].tolist() == expected

    def test_number_forms(self) -> None:
        values = qm9.parse_numbers(["[[1.,-.5,7.E-6],[-1.25e1,.5,0.]]", "3"], 7)
        assert values.tolist() == [1.0, -0.5, 7e-6, -12.5, 0.5, 0.0, 3.0]

    @pytest.mark.parametrize(
        ("column", "value", "text"),
        [
            ("Elements", "['O','H']", "gdb 3 has not three coordinates"),
            ("Elements", "['C','H','X']", "gdb 1 to 3 is none of H, C, N, O, F"),
            ("XYZ_Ang", "[[0,0,0],[1,0,0],[0,1,0*^-6]]", "could not convert"),
            ("XYZ_Ang", "[[0,0,0],[1,0,0],[0,1,]]", "could not convert"),
            ("XYZ_Ang", "[[0,0,0],[1,0,0],[0,1,nan]]", "finite"),
            ("HOMO_au", "", "could not convert"),
            ("HOMO_au", "inf", "finite"),
            ("Index", "three", "invalid literal"),
        ],
    )
    def test_damaged_cells_are_refused(self, tmp_path: Path, column: str, value: str, text: str) -> None:
        path = tmp_path / "slice.csv"
        write_slice(path, 3, {column: value})
        with pytest.raises(DataError, match=text):
            qm9._parse_qm9([path])

    def test_missing_column_and_empty_file_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "slice.csv"
        write_slice(path, 3)
        path.write_text(path.read_text().replace("XYZ_Ang", "XYZ"))
        with pytest.raises(DataError, match="XYZ_Ang"):
            qm9._parse_qm9([path])
        path.write_text("")
        with pytest.raises(DataError, match="Index"):
            qm9._parse_qm9([path])


class TestDataset:
    def test_select_keeps_atoms_with_their_molecule(self, full: Dataset) -> None:
        order = [1000, 2, 0, 130_830]
        chosen = full.select(order)
        assert chosen.ids.tolist() == full.ids[order].tolist()
        for k, row in enumerate(order):
            np.testing.assert_array_equal(chosen.molecule(k).numbers, full.molecule(row).numbers)
            np.testing.assert_array_equal(chosen.molecule(k).positions, full.molecule(row).positions)
            np.testing.assert_array_equal(chosen.targets[k], full.targets[row])
        assert chosen.molecule(-1).name == "gdb_133885"
        with pytest.raises(IndexError):
            chosen.molecule(4)

    def test_select_takes_masks_slices_and_nothing(self, small: Dataset) -> None:
        mask = np.arange(len(small)) < 3
        assert same(small.select(mask), small.select(slice(3)))
        assert same(small.select([0, 1, 2]), small.select(slice(3)))
        assert len(small.select([])) == 0
        assert len(small.select(slice(0))) == 0
        with pytest.raises(IndexError):
            small.select([len(small)])

    def test_hash_is_of_the_content(self, small: Dataset) -> None:
        assert small.sha256 == replace(small, name="other").sha256
        assert len(small.sha256) == 64
        positions = small.positions.copy()
        positions[0, 0] += 1e-4
        targets = small.targets.copy()
        targets[0, 0] = np.nan
        others = [replace(small, positions=positions), replace(small, targets=targets), small.select(slice(1, None))]
        assert len({small.sha256, *(other.sha256 for other in others)}) == 4

    @pytest.mark.parametrize(
        "changes",
        [
            {"ids": np.arange(3)},
            {"targets": np.zeros((22, 11))},
            {"numbers": np.array([14], dtype=np.uint8)},
            {"offsets": np.zeros(23, dtype=np.int64)},
        ],
    )
    def test_arrays_that_do_not_fit_are_refused(self, small: Dataset, changes: dict[str, np.ndarray]) -> None:
        assert len(small) == 22
        with pytest.raises(ValueError, match="must"):
            replace(small, **changes)


class TestCache:
    def test_round_trip_is_exact_and_small(self, full: Dataset, full_cache: Path) -> None:
        assert full_cache.stat().st_size < 40e6
        assert datasets.is_cache(full_cache)
        loaded = qm9.load_data(full_cache)
        assert same(loaded, full)
        assert loaded.name == "qm9"
        assert loaded.sha256 == full.sha256

    def test_labels_may_be_absent(self, small: Dataset, tmp_path: Path) -> None:
        targets = small.targets.copy()
        targets[3:, 5] = np.nan
        partial = replace(small, targets=targets, name="mine.xyz")
        datasets.write_cache(partial, tmp_path / "cache")
        loaded = qm9.load_data(tmp_path / "cache")
        assert same(loaded, partial)
        assert loaded.name == "mine.xyz"

    def test_every_truncation_and_bit_flip_is_noticed(self, small: Dataset, tmp_path: Path) -> None:
        path = tmp_path / "cache"
        datasets.write_cache(small.select(slice(5)), path)
        content = path.read_bytes()
        for length in range(0, len(content), 97):
            path.write_bytes(content[:length])
            with pytest.raises(DataError):
                datasets.read_cache(path)
        for place in range(0, len(content), 97):
            path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
            with pytest.raises(DataError):
                datasets.read_cache(path)

    def test_missing_and_foreign_files(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="No such file"):
            datasets.read_cache(tmp_path / "missing")
        assert not datasets.is_cache(tmp_path / "missing")
        assert not datasets.is_cache(tmp_path)
        (tmp_path / "foreign").write_text("3\nwater\n")
        assert not datasets.is_cache(tmp_path / "foreign")
        with pytest.raises(DataError, match="not a cache file"):
            datasets.read_cache(tmp_path / "foreign")

    def test_a_pickle_inside_is_never_loaded(self, tmp_path: Path) -> None:
        path = tmp_path / "cache"
        np.savez(tmp_path / "evil.npz", ids=np.array([print], dtype=object))
        body = (tmp_path / "evil.npz").read_bytes()
        path.write_bytes(datasets._MAGIC + datasets.hashlib.sha256(body).digest() + body)
        with pytest.raises(DataError, match="allow_pickle"):
            datasets.read_cache(path)

    def test_a_full_disk_leaves_the_old_file_and_nothing_else(self, small: Dataset, tmp_path: Path) -> None:
        path = tmp_path / "cache"
        datasets.write_cache(small, path)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
        try:
            with pytest.raises(OutputError, match="cannot write"):
                datasets.write_cache(small.select(slice(10)), path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert same(datasets.read_cache(path), small)
        assert list(tmp_path.iterdir()) == [path]

    def test_writers_at_the_same_time_never_show_half_a_file(self, small: Dataset, tmp_path: Path) -> None:
        path = tmp_path / "deep" / "folder" / "cache"
        datasets.write_cache(small, path)
        with ThreadPoolExecutor(4) as pool:
            writers = [pool.submit(datasets.write_cache, small, path) for _ in range(20)]
            reads = [same(datasets.read_cache(path), small) for _ in range(20)]
            for writer in writers:
                writer.result()
        assert all(reads)
        assert list(path.parent.iterdir()) == [path]

    def test_a_damaged_cache_is_rebuilt_from_the_package(self, full: Dataset, full_cache: Path, tmp_path: Path) -> None:
        path = tmp_path / "qm9.cache"
        path.write_bytes(full_cache.read_bytes()[:-1000])
        seen: list[tuple[int, int]] = []
        rebuilt = qm9.load_qm9(cache_file=path, progress=lambda done, total: seen.append((done, total)))
        assert rebuilt.sha256 == full.sha256
        assert path.read_bytes() == full_cache.read_bytes()
        assert len(seen) > 20
        assert seen == sorted(seen)
        assert seen[-1] == (130_831, 130_831)

    def test_a_folder_that_cannot_be_written_costs_a_warning(
        self, full: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(qm9, "_parse_qm9", lambda files, progress: full)
        (tmp_path / "file").touch()
        with pytest.warns(RuntimeWarning, match="cannot write the cache file"):
            assert qm9.load_qm9(cache_file=tmp_path / "file" / "qm9.cache") is full

    def test_the_folder_of_the_environment_variable_is_used(
        self, full: Dataset, full_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shutil.copy(full_cache, tmp_path / "qm9.cache")
        monkeypatch.setenv("QMPROP_CACHE", str(tmp_path))
        monkeypatch.setitem(sys.modules, "qm9pack", None)
        monkeypatch.setitem(sys.modules, "platformdirs", None)
        assert same(qm9.load_data("qm9"), full)
        monkeypatch.delenv("QMPROP_CACHE")
        with pytest.raises(DataError, match="platformdirs") as caught:
            qm9.load_qm9()
        assert "QMPROP_CACHE" in caught.value.hint

    def test_without_qm9pack_the_error_says_what_to_do(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "qm9pack", None)
        with pytest.raises(DataError, match="qm9pack, which is not installed") as caught:
            qm9.load_qm9(cache_file=tmp_path / "qm9.cache")
        assert "pip install 'qmprop[train]'" in caught.value.hint
        assert "--data FILE" in caught.value.hint

    def test_a_cache_file_needs_numpy_only(self, full: Dataset, full_cache: Path) -> None:
        code = f"""
import sys
for name in ("torch", "ase", "rdkit", "pandas", "scipy", "platformdirs", "qm9pack"):
    sys.modules[name] = None
from qmprop import qm9
dataset = qm9.load_data({str(full_cache)!r})
print(dataset.sha256, len(dataset.select(qm9.split_data(dataset)["test"])), dataset.molecule(0).name)
"""
        run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
        assert run.stderr == ""
        assert run.stdout.split() == [full.sha256, "13083", "gdb_1"]


class TestSplit:
    def test_is_exactly_that_of_egnn(self) -> None:
        split = qm9.split_qm9()
        assert {key: len(indices) for key, indices in split.items()} == {
            **{"train": 100_000, "valid": 17_748, "test": 13_083},
            **{"choose": 7_748, "calibrate": 10_000},
        }
        assert split["train"][:3].tolist() == [130195, 68784, 7957]
        assert split["valid"][:3].tolist() == [68751, 123554, 28669]
        assert split["test"][:3].tolist() == [115839, 90242, 66405]
        order = np.concatenate([split[part] for part in ("train", "valid", "test")])
        assert np.array_equal(np.sort(order), np.arange(130_831))
        assert np.array_equal(np.concatenate([split["choose"], split["calibrate"]]), split["valid"])
        assert np.array_equal(order, np.random.RandomState(0).permutation(130_831))

    def test_of_less_than_all_of_qm9_is_refused(self) -> None:
        with pytest.raises(DataError, match="not of 1000"):
            qm9.split_qm9(1000)

    @pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 10, 25, 1000])
    def test_of_other_data_is_a_partition(self, n: int) -> None:
        split = qm9.split_other(n)
        order = np.concatenate([split[part] for part in ("train", "valid", "test")])
        assert np.array_equal(order, np.random.RandomState(0).permutation(n))
        assert np.array_equal(np.concatenate([split["choose"], split["calibrate"]]), split["valid"])
        assert min(len(split["valid"]), len(split["test"])) == (max(n // 10, 1) if n > 2 else 0)

    def test_data_get_their_own(self, full: Dataset, small: Dataset) -> None:
        assert np.array_equal(qm9.split_data(full)["test"], qm9.split_qm9()["test"])
        assert len(qm9.split_data(small)["train"]) == 18


class TestLabeled:
    def write(self, path: Path, *comments: str, atoms: str = WATER) -> Path:
        path.write_text("".join(f"{atoms.count(chr(10))}\n{comment}\n{atoms}" for comment in comments))
        return path

    def test_any_subset_of_labels(self, tmp_path: Path) -> None:
        path = self.write(tmp_path / "w@1.xyz", "mu=1.85 note=abc", "homo=-7 cv=6 h=-2", "nothing here", "alpha=6.3")
        path.write_text(path.read_text() + "\n\n")
        dataset = qm9.load_data(path)
        assert len(dataset) == 4
        assert dataset.name == str(path)
        assert dataset.ids.tolist() == [0, 1, 2, 3]
        expected = [{"mu": 1.85}, {"homo": -7.0, "h": -2.0, "cv": 6.0}, {}, {"alpha": 6.3}]
        for row, labels in zip(dataset.targets, expected, strict=True):
            assert {key: row[COLUMN[key]] for key in DEFAULT_KEYS if np.isfinite(row[COLUMN[key]])} == labels
        molecule = dataset.molecule(3)
        assert molecule.formula == "H2O"
        assert (molecule.source, molecule.index) == (str(path), 3)
        np.testing.assert_allclose(molecule.positions[2], [-0.24, 0.93, 0], rtol=1e-6)

    def test_units(self, tmp_path: Path) -> None:
        path = self.write(tmp_path / "w.xyz", "mu=0.7283 homo=-0.2928 cv=6.002")
        labels = qm9.load_data(path, units="hartree,mu=ea0").targets[0]
        assert labels[COLUMN["mu"]] == pytest.approx(1.8511, abs=1e-4)
        assert labels[COLUMN["homo"]] == pytest.approx(-0.2928 * HARTREE_EV)
        assert labels[COLUMN["cv"]] == 6.002
        with pytest.raises(UsageError, match="unknown unit"):
            datasets.load_labeled(path, units="mu=meter")

    @pytest.mark.parametrize("key", ["u0", "u", "h", "g"])
    def test_atomization_energies_become_totals(self, full: Dataset, tmp_path: Path, key: str) -> None:
        methane = full.molecule(0)
        total = full.targets[0, COLUMN[key]]
        atoms = (ATOM_ENERGIES_HARTREE[key][6] + 4 * ATOM_ENERGIES_HARTREE[key][1]) * HARTREE_EV
        lines = "".join(
            f"{'C' if number == 6 else 'H'} {x} {y} {z}\n"
            for number, (x, y, z) in zip(methane.numbers, methane.positions, strict=True)
        )
        comments = (
            f"{key}_atom={total - atoms!r}".replace("np.float64(", "").replace(")", ""),
            f"{key}_atom=-1 {key}=-5",
        )
        labels = datasets.load_labeled(self.write(tmp_path / "methane.xyz", *comments, atoms=lines)).targets
        assert labels[0, COLUMN[key]] == pytest.approx(total, abs=1e-9)
        assert labels[1, COLUMN[key]] == -5
        assert np.isfinite(labels[0]).sum() == 1

    @pytest.mark.parametrize("value", ["nan", "inf", "1e400", "abc", "T", "1,2", "6.0d0"])
    def test_labels_that_are_no_finite_numbers_are_refused(self, tmp_path: Path, value: str) -> None:
        path = self.write(tmp_path / "w.xyz", "mu=1", f"mu={value}")
        with pytest.raises(DataError, match=r"frame 2 of .*mu = .* is not a finite number"):
            qm9.load_data(path)

    @pytest.mark.parametrize(
        ("comment", "atoms", "text"),
        [
            ("mu=1", WATER.replace("O", "Si"), "frame 2 of .*Unsupported element: Si"),
            ("mu=1", WATER.replace("0.96", "nan"), "frame 2 of .*NaN"),
            ("mu=1", WATER.replace("0.96", "0.1"), "frame 2 of .*apart"),
            ('mu=1 Lattice="9 0 0 0 9 0 0 0 9"', WATER, "frame 2 of .*periodic"),
        ],
    )
    def test_frames_the_network_does_not_know_are_refused(
        self, tmp_path: Path, comment: str, atoms: str, text: str
    ) -> None:
        good = self.write(tmp_path / "good.xyz", "mu=1").read_text()
        bad = self.write(tmp_path / "bad.xyz", comment, atoms=atoms)
        bad.write_text(good + bad.read_text())
        with pytest.raises(DataError, match=text):
            qm9.load_data(bad)

    def test_a_file_without_labels_names_the_keys(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="1 molecules and no labels") as caught:
            qm9.load_data(self.write(tmp_path / "w.xyz", "water"))
        assert "mu, alpha, homo" in caught.value.hint
        with pytest.raises(DataError, match="0 molecules"):
            qm9.load_data(self.write(tmp_path / "empty.xyz"))

    def test_unreadable_files(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no data file"):
            qm9.load_data(tmp_path / "missing.xyz")
        with pytest.raises(DataError, match="no data file"):
            qm9.load_data(str(tmp_path))
        path = self.write(tmp_path / "cut.xyz", "mu=1", "mu=2")
        path.write_text(path.read_text()[:-20])
        with pytest.raises(DataError, match="as extxyz"):
            qm9.load_data(path)
        path.write_bytes(b"\xff\xfe\x00binary")
        with pytest.raises(DataError, match="as extxyz"):
            qm9.load_data(path)
