"""SMILES come out as molecules, always with the same geometry, or say why not; in order, whatever befalls a process."""

from __future__ import annotations

import io
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from rdkit import Chem
from rdkit.Chem import rdDetermineBonds

from qmprop import smiles as smiles_module
from qmprop import workers
from qmprop.formats import Failure
from qmprop.molecule import Molecule, find_error, find_warnings
from qmprop.readers import read_list, read_paths, read_smiles
from qmprop.smiles import MAX_ATOMS, MAX_SMILES, SmilesLine, from_smiles, read_smi, read_smiles_table
from qmprop.streams import Lines, ParseError
from qmprop.workers import Embedder


def convert(text: str) -> Molecule | Failure:
    return from_smiles(text, source="text", index=3)


def build(text: str) -> Molecule:
    molecule = convert(text)
    assert isinstance(molecule, Molecule), molecule.message
    return molecule


def describe(found: Iterable[Molecule | Failure]) -> list[tuple[int, str]]:
    return [(item.index, item.message.code if isinstance(item, Failure) else item.formula) for item in found]


# ---------------------------------------------------------------- one SMILES


@pytest.mark.parametrize(
    ("text", "formula", "charge", "method"),
    [
        ("CCO", "C2H6O", 0, "MMFF94"),
        ("O", "H2O", 0, "MMFF94"),
        ("C[NH3+]", "CH6N", 1, "MMFF94"),
        ("CC(=O)[O-]", "C2H3O2", -1, "MMFF94"),
        ("[CH3]", "CH3", 0, "MMFF94"),
        ("[2H]C([2H])[2H]", "CH4", 0, "MMFF94"),
        ("[C-]#[O+]", "CO", 0, "UFF"),
        ("[H][H]", "H2", 0, "UFF"),
    ],
)
def test_atoms_and_charge_are_those_of_the_smiles(text: str, formula: str, charge: int, method: str) -> None:
    molecule = build(text)
    assert (molecule.formula, molecule.charge, molecule.name) == (formula, charge, text)
    assert (molecule.source, molecule.index, molecule.origin) == ("text", 3, None)
    assert find_error(molecule) is None
    (remark,) = molecule.remarks
    assert remark.code == "generated-geometry"
    assert f"(ETKDGv3, {method})" in remark.text
    assert remark in find_warnings(molecule)


@pytest.mark.parametrize("text", ["CC(=O)OC", "c1ccccc1F", "C#CC1CC1", "C[C@H](O)C#N", "N[C@@H](C)C=O", "F/C=C/F"])
def test_geometry_has_the_bonds_and_the_handedness_of_the_smiles(text: str) -> None:
    molecule = build(text)
    symbols = [Chem.GetPeriodicTable().GetElementSymbol(int(number)) for number in molecule.numbers]
    rows = [f"{s} {x} {y} {z}" for s, (x, y, z) in zip(symbols, molecule.positions.tolist(), strict=True)]
    mol = Chem.MolFromXYZBlock("\n".join([str(len(rows)), "", *rows]))
    rdDetermineBonds.DetermineBonds(mol, charge=0)
    Chem.AssignStereochemistryFrom3D(mol)
    assert Chem.MolToSmiles(Chem.RemoveHs(mol)) == Chem.CanonSmiles(text)


@pytest.mark.parametrize(
    ("text", "distance"),
    [("N#N", 1.098), ("FF", 1.412), ("F", 0.917), ("[H][H]", 0.741), ("O=O", 1.208), ("[C-]#[O+]", 1.128)],
)
def test_diatomic_molecules_have_sensible_bonds(text: str, distance: float) -> None:
    positions = build(text).positions
    assert np.linalg.norm(positions[0] - positions[1]) == pytest.approx(distance, abs=0.08)


def test_fragments_stand_apart() -> None:
    pair = build("CCO.O")
    water = np.array([2, 9 + 1, 9 + 2])
    assert pair.formula == "C2H8O2"
    assert "its 2 fragments stand 10 Å apart" in pair.remarks[0].text
    distances = np.linalg.norm(pair.positions[:, None] - pair.positions[None], axis=-1)
    near = distances < 6
    assert sorted(near.sum(axis=0).tolist()) == [3] * 3 + [9] * 9
    assert distances[near == 0].min() >= 10 - 1e-9
    assert not near[water[1], water[0]]
    assert build("CC(=O)[O-].[NH4+]").charge == 0


@pytest.mark.parametrize(("text", "count"), [("CC(F)C(O)C=CC", 3), ("CC(O)F", 1), ("C[C@H](O)F", 0)])
def test_stereo_that_had_to_be_chosen_is_told(text: str, count: int) -> None:
    remark = build(text).remarks[0].text
    assert (f"stereo that it leaves open was chosen (up to {count} atoms or bonds)" in remark) == bool(count)


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("C(C", "bad-smiles", "'C(C' is not a SMILES"),
        ("c1cccc1", "bad-smiles", "kekulize"),
        ("C(C)(C)(C)(C)C", "bad-smiles", "valence"),
        ("", "bad-smiles", "no SMILES"),
        ("ethanol", "bad-smiles", "'ethanol' is not"),
        ("CC\x00C", "bad-smiles", "is not a SMILES"),
        ("[Na+].[Cl-]", "unsupported-element", "Cl, Na"),
        ("C*", "unsupported-element", "*"),
        ("C" * (MAX_SMILES + 1), "too-large-input", "longer than"),
        ("C" * MAX_ATOMS, "too-large-input", f"{3 * MAX_ATOMS + 2} atoms"),
    ],
)
def test_smiles_that_make_no_molecule_say_why(text: str, code: str, words: str) -> None:
    found = convert(text)
    assert isinstance(found, Failure)
    assert (found.message.code, found.source, found.index) == (code, "text", 3)
    assert words in found.message.text
    assert "\n" not in found.message.text


def test_impossible_stereo_fails_to_embed() -> None:
    found = convert("C1C[C@H]2C[C@@H]1[C@@H]1[C@H]3CC[C@@]([H])(C3)[C@]12[H]")
    assert isinstance(found, Failure)
    assert found.message.code == "embedding-failed"


def test_time_limit_of_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smiles_module, "EMBEDDING_TIME", 1)
    found = convert("C" * 66)
    assert isinstance(found, Failure)
    assert found.message.code == "time-out"


# ---------------------------------------------------------------- texts


def read_text(text: str, reader=read_smi) -> list[tuple[str, str | None, int, int | None]]:  # type: ignore[no-untyped-def]
    return [(line.text, line.name, line.index, line.line) for line in reader(Lines(io.StringIO(text)), "text")]


def test_smi_lines() -> None:
    text = "\ufeffSMILES Name\n\n# a comment\nCCO\tethyl alcohol\r\n  C1CC1  \nC |$foo$| methane\nnot-a-smiles x\nN"
    assert read_text(text) == [
        ("CCO", "ethyl alcohol", 0, 4),
        ("C1CC1", None, 1, 5),
        ("C", "methane", 2, 6),
        ("not-a-smiles", "x", 3, 7),
        ("N", None, 4, 8),
    ]


@pytest.mark.parametrize(
    "text",
    [
        'id,SMILES,name\n7,CCO,"ethanol, 96 %"\n\n8,C,\n9\n',
        "id;SMILES;name\n7;CCO;ethanol, 96 %\n\n8;C;\n9\n",
        "\ufeff\nid\tCanonical_Smiles\tName\n7\tCCO\tethanol, 96 %\n\n8\tC\t\n9\n",
    ],
    ids=["comma", "semicolon", "tab"],
)
def test_tables(text: str) -> None:
    rows = read_text(text, read_smiles_table)
    assert [row[:3] for row in rows] == [("CCO", "ethanol, 96 %", 0), ("C", None, 1), ("", None, 2)]


def test_tables_without_smiles_are_refused() -> None:
    with pytest.raises(ParseError, match="line 1: the table has no column 'smiles'"):
        read_text("name,mass\nwater,18\n", read_smiles_table)
    assert read_text("", read_smiles_table) == []
    rows = read_smiles_table(Lines(io.StringIO('smiles,name\nC,methane\nN,"' + "x\n" * 100_000)), "text")
    assert next(rows).text == "C"
    with pytest.raises(ParseError, match=r"line \d+: field larger than"):
        next(rows)


# ---------------------------------------------------------------- processes


MIXED = ["CCO ethanol", "C(C", "C1CC1", "[Na]", "O", "CC(=O)O", "c1ccccc1", "N#C", "CC(C)=O", "C=C"]


def test_processes_give_the_same_geometries_in_order() -> None:
    inline = [from_smiles(text, source="<smiles>", index=index) for index, text in enumerate(MIXED)]
    found = list(read_smiles(MIXED, jobs=2))
    assert describe(found) == describe(inline)
    for one, other in zip(found, inline, strict=True):
        assert one.name == other.name
        if isinstance(one, Molecule):
            assert isinstance(other, Molecule)
            np.testing.assert_array_equal(one.positions, other.positions)
    reverse = list(read_smiles(MIXED[::-1], jobs=1))[::-1]
    for one, other in zip(found, reverse, strict=True):
        if isinstance(one, Molecule):
            np.testing.assert_array_equal(one.positions, other.positions)  # type: ignore[union-attr]


def test_a_process_that_dies_or_hangs_costs_its_molecule_only(monkeypatch: pytest.MonkeyPatch) -> None:
    code = textwrap.dedent(
        """
        import os, sys, time
        sys.path[:] = sys.argv[1:]
        from qmprop import workers
        build = workers.build_molecule
        def evil(line):
            if line.name == "die":
                os.kill(os.getpid(), 11)
            if line.name == "hang":
                time.sleep(1000)
            print("noise on standard output", flush=True)
            return build(line)
        workers.build_molecule = evil
        workers.serve()
        """
    )
    monkeypatch.setattr(workers, "_SERVE", code)
    texts = ["C", "N die", "O", "CC hang", "CO", "CN"]
    with Embedder(2, time_limit=15) as embedder:
        found = list(embedder.embed(SmilesLine(*smiles_module.split_line(t), "x", i) for i, t in enumerate(texts)))
    assert describe(found) == [
        (0, "CH4"),
        (1, "embedding-failed"),
        (2, "H2O"),
        (3, "time-out"),
        (4, "CH4O"),
        (5, "CH5N"),
    ]
    assert "died (status -11)" in found[1].message.text  # type: ignore[union-attr]


def children(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1]) == pid:
                    found.append(int(entry.name))
            except OSError:
                pass
    return found


def test_leaving_early_ends_the_processes() -> None:
    found = read_smiles(itertools.repeat("CCO"), jobs=2)
    assert isinstance(next(found), Molecule)
    assert len(children(os.getpid())) >= 1
    begin = time.monotonic()
    found.close()  # type: ignore[attr-defined]
    assert time.monotonic() - begin < 5
    assert children(os.getpid()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_the_program(number: int) -> None:
    code = (
        "import itertools, qmprop.readers as r\n"
        "for k, _ in enumerate(r.read_smiles(itertools.repeat('CCO'), jobs=2)): k or print(k, flush=True)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"0\n"
        orphans = children(process.pid)
        assert orphans
        process.send_signal(number)
        process.communicate(timeout=20)
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in orphans) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [pid for pid in orphans if Path(f"/proc/{pid}").exists()] == []


def test_damage_in_a_file_comes_behind_the_molecules_before_it(tmp_path: Path) -> None:
    (tmp_path / "a.smi").write_text("C\nCC\n" + "C" * 1_000_000 + "\nO\n")
    (tmp_path / "b.smi").write_text("# nothing\n")
    (tmp_path / "c.csv").write_text("smiles\nO\n")
    found = list(read_paths([tmp_path, tmp_path / "c.csv"]))
    assert describe(found) == [(0, "CH4"), (1, "C2H6"), (2, "parse-error"), (0, "empty-file"), (0, "H2O")]
    assert found[2].message.text == "line 3: longer than 1000000 characters"  # type: ignore[union-attr]


def test_reading_geometries_starts_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "h2.xyz").write_text("2\n\nH 0 0 0\nH 0 0 0.74\n")
    monkeypatch.setattr(workers, "_Worker", None)
    assert describe(read_paths(tmp_path, jobs=4)) == [(0, "H2")]


# ---------------------------------------------------------------- lists of files


@pytest.mark.parametrize(
    ("content", "paths"),
    [
        (b"a b.xyz\n\nc@1.xyz\r\n#d.xyz", ["a b.xyz", "c@1.xyz", "#d.xyz"]),
        (b"a\nb.xyz\0c.xyz\0", ["a\nb.xyz", "c.xyz"]),
        (b"-\n", ["./-"]),
        ("é.xyz\n".encode(), ["é.xyz"]),
        (b"\xff.xyz\n", ["\udcff.xyz"]),
        (b"", []),
    ],
)
def test_lists_of_paths(tmp_path: Path, content: bytes, paths: list[str]) -> None:
    (tmp_path / "list").write_bytes(content)
    assert list(read_list(str(tmp_path / "list"))) == paths


def test_a_long_entry_and_a_missing_file_are_records(tmp_path: Path) -> None:
    (tmp_path / "list").write_bytes(b"x" * 3_000_000 + b"\nnowhere.xyz\n")
    found = read_paths(read_list(str(tmp_path / "list")))
    assert describe(found) == [(0, "unreadable"), (0, "missing-file")]
