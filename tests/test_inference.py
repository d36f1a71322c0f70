import itertools
from pathlib import Path

import ase
import numpy as np
import pytest
import torch
from fakes import SILANE_XYZ, WATER_XYZ, FakeModel, water
from hypothesis import given
from hypothesis import strategies as st
from rdkit import Chem
from rdkit.Chem import rdDistGeom

from qmprop import inference
from qmprop.errors import UsageError, WeightsError
from qmprop.graph import to_pyg
from qmprop.inference import CPU_BATCH, GPU_BATCH, predict, predict_pairs
from qmprop.molecule import Molecule
from qmprop.readers import Failure
from qmprop.records import Message
from qmprop.targets import DEFAULT_KEYS, TARGETS, convert

EXAMPLES = Path(__file__).parent.parent / "examples"
KEYS = list(TARGETS)
FAILURE = Failure("bad.xyz", 2, Message("parse-error", "Line 3 has 2 columns."))


def silane(index: int) -> Molecule:
    return Molecule(np.array([14, 1]), np.array([[0.0, 0, 0], [0, 0, 1.5]]), index=index)


def test_a_record_tells_where_it_came_from_and_what_was_predicted():
    molecule = Molecule(np.array([8, 1, 1]), water().positions, name="wet", source="w.sdf", index=7)
    (record,) = predict(molecule, weights=FakeModel())
    assert (record.source, record.index, record.name, record.formula, record.natoms) == ("w.sdf", 7, "wet", "H2O", 3)
    assert (record.status, record.messages, record.model) == ("ok", (), "fake@00000000")
    assert tuple(record.properties) == DEFAULT_KEYS
    assert record.properties["homo"].value == 10.0 + KEYS.index("homo")


@given(st.lists(st.sampled_from("mbf"), max_size=40), st.none() | st.integers(1, 9))
def test_every_record_comes_out_once_and_in_order(kinds, batch_size):
    make = {"m": lambda i: water(index=i), "b": silane, "f": lambda i: Failure("-", i, FAILURE.message)}
    items = [make[kind](index) for index, kind in enumerate(kinds)]
    records = list(predict(items, weights=FakeModel(), batch_size=batch_size))
    assert [record.index for record in records] == list(range(len(kinds)))
    expected = {"m": (), "b": ("unsupported-element",), "f": ("parse-error",)}
    assert [tuple(message.code for message in record.messages) for record in records] == [expected[k] for k in kinds]
    assert all((record.status == "error") == (record.properties == {}) for record in records)


def test_an_endless_stream_is_answered_batch_by_batch():
    model = FakeModel()
    drawn = []
    stream = (drawn.append(index) or water(index=index) for index in itertools.count())
    records = predict(stream, weights=model, batch_size=4)
    assert [next(records).index for _ in range(6)] == [0, 1, 2, 3, 4, 5]
    assert len(drawn) == 8
    assert model.batches == [4, 4]


@pytest.mark.parametrize(("device", "limits"), [("cpu", CPU_BATCH), ("cuda:0", GPU_BATCH)])
def test_batches_are_bounded_by_molecules_and_by_atoms(device, limits):
    most_molecules, most_atoms = limits
    atom = Molecule(np.array([1]), np.zeros((1, 3)))
    model = FakeModel(device=device)
    list(predict([atom] * (most_molecules + 1), weights=model))
    assert model.batches == [most_molecules, 1]
    half = most_atoms // 2 + 1
    grid = 1.5 * np.stack(np.meshgrid(*[np.arange(26.0)] * 3), axis=-1).reshape(-1, 3)[:half]
    model = FakeModel(device=device)
    list(predict([Molecule(np.full(half, 6), grid)] * 3 + [atom], weights=model))
    assert model.batches == [1, 1, 2]


def test_units_convert_values_and_travel_with_them():
    (record,) = predict(water(), properties="homo,mu,u0_atom", units=["kcal", "mu=ea0"], weights=FakeModel())
    assert list(record.properties) == ["homo", "mu", "u0_atom"]
    for key, unit in (("homo", "kcal/mol"), ("mu", "ea0"), ("u0_atom", "kcal/mol")):
        assert record.properties[key].unit == unit
        assert record.properties[key].value == pytest.approx(convert(10.0 + KEYS.index(key), key, unit), rel=1e-14)


def test_numbers_are_plain_python_floats():
    (record,) = predict(water(), weights=FakeModel())
    assert {type(value.value) for value in record.properties.values()} == {float}


def test_doubtful_molecules_are_predicted_with_a_warning():
    (record,) = predict(water(charge=1), weights=FakeModel())
    assert record.status == "warning"
    assert [message.code for message in record.messages] == ["charged", "odd-electrons"]
    assert len(record.properties) == 12


class CrampedModel(FakeModel):
    """Has memory for few atoms; fails as torch does on a CPU or a GPU."""

    def __init__(self, atoms: int, error: Exception) -> None:
        super().__init__()
        self.atoms, self.error = atoms, error

    def run(self, numbers, positions, offsets):
        if len(numbers) > self.atoms:
            raise self.error
        return super().run(numbers, positions, offsets)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_a_batch_that_does_not_fit_is_split(error):
    model = CrampedModel(7, error)
    molecules = [water(index=index) for index in range(5)]
    molecules[3] = Molecule(np.full(10, 6), np.arange(30.0).reshape(10, 3), index=3)
    records = list(predict(molecules, weights=model))
    assert [record.status for record in records] == ["ok", "ok", "ok", "error", "ok"]
    assert records[3].messages[0].code == "out-of-memory"
    assert "10 atoms" in records[3].messages[0].text
    assert max(model.batches) == 2


def test_another_failure_of_the_network_is_not_taken_for_lack_of_memory():
    with pytest.raises(RuntimeError, match="shape"):
        list(predict(water(), weights=CrampedModel(0, RuntimeError("shape mismatch"))))


class HollowModel(FakeModel):
    """Gives no finite HOMO for the second molecule of a batch."""

    def run(self, numbers, positions, offsets):
        outcome = super().run(numbers, positions, offsets)
        outcome.values["homo"][1] = np.nan
        return outcome


def test_a_non_finite_prediction_is_an_error_of_that_record_alone():
    records = list(predict([water(index=index) for index in range(3)], weights=HollowModel()))
    assert [record.status for record in records] == ["ok", "error", "ok"]
    assert records[1].messages[0].code == "non-finite-prediction"
    assert "homo" in records[1].messages[0].text
    assert records[1].properties == {}


def test_a_non_finite_number_nobody_asked_for_does_no_harm():
    records = list(predict([water(), water()], properties="mu", weights=HollowModel()))
    assert [record.status for record in records] == ["ok", "ok"]


def test_paths_atoms_and_molecules_mix(tmp_path):
    path = tmp_path / "two.xyz"
    path.write_text(WATER_XYZ + SILANE_XYZ)
    mol = Chem.AddHs(Chem.MolFromSmiles("C"))
    rdDistGeom.EmbedMolecule(mol, randomSeed=1)
    atoms = ase.Atoms("OH2", positions=water().positions)
    records = list(predict([path, atoms, mol, water(), str(path), FAILURE], weights=FakeModel()))
    assert [record.formula for record in records] == ["H2O", "H4Si", "H2O", "CH4", "H2O", "H2O", "H4Si", None]
    assert [record.index for record in records] == [0, 1, 0, 1, 0, 0, 1, 2]
    assert [record.source for record in records][::7] == [str(path), "bad.xyz"]


@pytest.mark.parametrize("alone", [ase.Atoms("OH2", positions=water().positions), water(), str(EXAMPLES / "water.xyz")])
def test_one_object_need_not_be_wrapped(alone):
    assert [record.formula for record in predict(alone, weights=FakeModel())] == ["H2O"]


@pytest.mark.parametrize(
    ("text", "formula"),
    [("CCO", "C2H6O"), ("F/C=C/F", "C2H2F2"), ("[H]O[H]", "H2O"), ("C*", None), ("O water", "H2O"), ("C.O", "CH6O")],
)
def test_a_string_that_is_no_path_is_a_smiles(text, formula, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (record,) = predict(text, weights=FakeModel())
    assert (record.source, record.index) == ("<memory>", 0)
    assert (record.formula == formula) if formula else (record.status == "error")


@pytest.mark.parametrize("text", ["CO", "C.O", "in/C", "C*", "./CO"])
def test_a_string_that_names_something_is_a_path(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    for name in ("CO", "C.O", "in/C"):
        Path(name).write_text(WATER_XYZ)
    records = list(predict(text, weights=FakeModel()))
    assert {record.formula for record in records} == {"H2O"}
    assert "<memory>" not in {record.source for record in records}


@pytest.mark.parametrize(
    "text", ["CO.xyz", "in/C", "nonsense", "CC(", "", " ", "C\0O", "C.xyz.gz", Path("CO"), "C?.sdf"]
)
def test_a_string_that_is_neither_is_a_missing_file(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    (record,) = predict(text, weights=FakeModel())
    assert record.messages[0].code in ("missing-file", "no-molecules")


def test_smiles_and_other_objects_are_counted_together():
    atoms = ase.Atoms("OH2", positions=water().positions)
    records = list(predict(["C", atoms, "O", "not a smiles", "N"], weights=FakeModel()))
    assert [(record.formula, record.index) for record in records] == [
        *(("CH4", 0), ("H2O", 1), ("H2O", 2), (None, 0), ("H3N", 3))
    ]


def test_pyg_graphs_alone_in_a_list_and_in_a_batch():
    from torch_geometric import data

    one = to_pyg(water(), 5.0)
    other = data.Data(z=torch.tensor([14, 1]), pos=torch.tensor([[0.0, 0, 0], [0, 0, 1.5]]), name="half")
    (alone,) = predict(one, weights=FakeModel())
    assert (alone.formula, alone.source) == ("H2O", "<memory>")
    for molecules in ([one, other], data.Batch.from_data_list([data.Data(z=d.z, pos=d.pos) for d in (one, other)])):
        records = list(predict(molecules, weights=FakeModel()))
        assert [(record.formula, record.index, record.status) for record in records] == [
            *(("H2O", 0, "ok"), ("HSi", 1, "error"))
        ]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"z": torch.tensor([1])},
        {"z": torch.tensor([1, 1]), "pos": torch.zeros(1, 3)},
        {"z": torch.tensor([[1, 0]]), "pos": torch.zeros(1, 3)},
        {"z": 1, "pos": torch.zeros(1, 3)},
    ],
)
def test_a_graph_that_is_no_molecule_is_a_record_all_the_same(fields):
    from torch_geometric.data import Data

    records = list(predict([water(), Data(**fields), to_pyg(water(), 5.0)], weights=FakeModel()))
    assert [record.status for record in records] == ["ok", "error", "ok"]
    assert records[1].messages[0].code == "parse-error"


def test_pairs_hold_what_each_record_answers():
    items = [water(index=0), FAILURE, silane(1)]
    pairs = list(predict_pairs(items, weights=FakeModel(), properties="mu"))
    assert [item for item, _ in pairs] == items
    assert [record for _, record in pairs] == list(predict(items, weights=FakeModel(), properties="mu"))


def test_skipped_records_count_for_the_batches():
    model = FakeModel()
    items = [water(index=index) for index in range(10)]
    pairs = list(predict_pairs(items, weights=model, batch_size=4, skip=5))
    assert [record.index for _, record in pairs] == [5, 6, 7, 8, 9]
    assert model.batches == [4, 2]


def test_a_missing_file_is_a_record():
    (record,) = predict("nowhere.xyz", weights=FakeModel())
    assert (record.source, record.status, record.messages[0].code) == ("nowhere.xyz", "error", "missing-file")
    assert (record.formula, record.natoms) == (None, None)


def test_nothing_in_nothing_out():
    assert list(predict([], weights=FakeModel())) == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"properties": "mass"}, "'mass'"),
        ({"units": "furlong"}, "'furlong'"),
        ({"batch_size": 0}, "0"),
        ({"batch_size": True}, "True"),
        ({"batch_size": 2.5}, "2.5"),
    ],
)
def test_wrong_arguments_are_refused_before_the_first_record(arguments, named):
    with pytest.raises(UsageError) as caught:
        predict(water(), weights=FakeModel(), **arguments)
    assert named in caught.value.message


@pytest.mark.parametrize("molecules", [None, 3, b"water.xyz", {"a": 1}])
def test_what_is_no_molecule_is_refused_at_once(molecules):
    with pytest.raises(UsageError, match=type(molecules).__name__):
        predict(molecules, weights=FakeModel())


def test_what_is_no_molecule_in_a_stream_is_refused_when_it_comes():
    records = predict([water(), 3], weights=FakeModel(), batch_size=1)
    assert next(records).formula == "H2O"
    with pytest.raises(UsageError, match="int"):
        next(records)


def test_missing_weights_are_reported_at_once():
    with pytest.raises(WeightsError):
        predict(water(), weights="/nowhere/weights.safetensors")


def test_weights_are_loaded_by_name_on_the_device_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(inference, "load_model", lambda name, *, device: asked.append((name, device)) or FakeModel())
    list(predict(water(), weights="some", device="cpu"))
    assert asked == [("some", "cpu")]


def test_the_bundled_weights_know_water():
    (record,) = predict(EXAMPLES / "water.xyz")
    assert record.properties
    assert record.seen == (), "it is not among the training molecules"
    assert record.properties["u0"].value == pytest.approx(-76.404702 * 27.211386245988, abs=0.5)
    assert record.properties["mu"].value == pytest.approx(1.8511, abs=0.75)  # no training molecule is like it
    low, high = record.properties["mu"].interval
    assert 0.2 < high - low < 3.0, "the network knows that it does not know"
    assert record.properties["gap"].value == pytest.approx(
        record.properties["lumo"].value - record.properties["homo"].value, abs=1e-9
    )
