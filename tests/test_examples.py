"""Every file in examples/ is read whole and predicted, and the predictions are about right."""

from pathlib import Path

import pytest
from refresh_readme import stored_report

import qmprop
from qmprop.targets import ATOM_ENERGIES_HARTREE, DEFAULT_KEYS, HARTREE_EV, TARGETS, convert, unit_factor

EXAMPLES = Path(__file__).parent.parent / "examples"
#: The molecules of every file.
CONTENT = {
    "benzamide.xyz": ["C7H7NO"],
    "dsgdb9nsd_000212.xyz": ["C5H7N"],
    "formamide.pdb": ["CH3NO"],
    "indole_v3000.sdf": ["C8H7N"],
    "small_molecules.xyz": ["CH4", "H3N", "CH4O", "C2H6O", "C6H6"],
    "three_molecules.sdf": ["C2H4O", "C2H3N", "C3H6"],
    "water.xyz": ["H2O"],
}


@pytest.fixture(scope="module")
def records():
    return list(qmprop.predict(str(EXAMPLES), properties=(*DEFAULT_KEYS, "u0_atom")))


def test_the_folder_stands_for_all_its_files_in_order(records):
    assert sorted(CONTENT) == sorted(path.name for path in EXAMPLES.iterdir())
    found = [(Path(record.source).name, record.index, record.formula) for record in records]
    assert found == [(name, i, formula) for name in sorted(CONTENT) for i, formula in enumerate(CONTENT[name])]


def test_every_molecule_is_predicted_without_a_complaint(records):
    for record in records:
        codes = [message.code for message in record.messages]
        assert codes == [] or (codes == ["far-from-training"] and record.natoms < 5), "only the smallest may be strange"
    assert all(len(record.properties) == len(DEFAULT_KEYS) + 1 for record in records)


def test_a_file_alone_gives_what_it_gives_in_the_folder(records):
    name = "three_molecules.sdf"
    alone = list(qmprop.predict(str(EXAMPLES / name)))
    beside = [record for record in records if Path(record.source).name == name]
    assert [record.name for record in alone] == [record.name for record in beside]
    for one, other in zip(alone, beside, strict=True):
        for key in ("mu", "gap", "r2", "cv"):
            assert one.properties[key].value == pytest.approx(other.properties[key].value, abs=1e-3)


def test_names_come_with_the_molecules(records):
    names = {record.name for record in records}
    assert {"water", "benzamide", "acetaldehyde", "indole", "gdb 212"} <= names


def test_energies_hang_together(records):
    for record in records:
        value = {key: item.value for key, item in record.properties.items()}
        assert value["gap"] == pytest.approx(value["lumo"] - value["homo"], abs=1e-6)
        assert value["g"] < value["u0"] < value["u"] < value["h"]
        assert value["u0_atom"] < 0 < value["zpve"]  # all of them are bound


def test_qm9s_own_file_is_predicted_close_to_the_values_it_carries(records):
    line = (EXAMPLES / "dsgdb9nsd_000212.xyz").read_text().splitlines()[1].split()
    assert line[:2] == ["gdb", "212"]
    (record,) = [record for record in records if record.name == "gdb 212"]
    mae = {key: row["mae"] for key, row in stored_report()["properties"].items()}
    for key, text in zip(DEFAULT_KEYS, line[5:], strict=True):
        reference = convert(float(text), key, TARGETS[key].unit, source_unit=TARGETS[key].qm9_unit)
        error = (record.properties[key].value - reference) / unit_factor(key, TARGETS[key].evaluation_unit)
        assert abs(error) < 10 * mae[key], key


def test_water_has_about_the_energy_of_its_atoms_and_bonds(records):
    (water,) = [record for record in records if record.formula == "H2O"]
    atoms = (2 * ATOM_ENERGIES_HARTREE["u0"][1] + ATOM_ENERGIES_HARTREE["u0"][8]) * HARTREE_EV
    assert water.properties["u0"].value - atoms == pytest.approx(-9.24, abs=0.4)  # QM9: -76.404702 Ha
    assert water.properties["mu"].value == pytest.approx(1.85, abs=0.75)  # no training molecule is like it
