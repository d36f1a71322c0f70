"""What composition and physics explain: facts of QM9, and what holds whatever the network says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from samples import SPREAD, alkane, random_rotation, read_dataset

from qmprop.baseline import Baseline, Composition, atomization, center, compose
from qmprop.datasets import Dataset
from qmprop.egnn import LATENTS
from qmprop.graph import concatenate
from qmprop.qm9 import split_qm9
from qmprop.targets import BOHR_ANGSTROM, DEFAULT_KEYS, HARTREE_EV, RT_EV, TARGETS

COLUMN = {key: index for index, key in enumerate(DEFAULT_KEYS)}
DATASET = read_dataset()


def find_composition(dataset: Dataset, positions: NDArray | None = None) -> Composition:
    positions = dataset.positions if positions is None else positions
    return compose(dataset.numbers, center(dataset.numbers, positions, dataset.offsets), dataset.offsets)


COMPOSITION = find_composition(DATASET)
BASELINE = Baseline.fit(DATASET.targets, COMPOSITION)


def split(values: NDArray) -> dict[str, NDArray]:
    return dict(zip(DEFAULT_KEYS, values.T, strict=True))


@pytest.fixture(scope="module")
def parts(full: Dataset) -> tuple[Dataset, Dataset]:
    """QM9's training and test molecules."""
    indices = split_qm9(len(full))
    return full.select(indices["train"]), full.select(indices["test"])


@pytest.fixture(scope="module")
def fitted(parts: tuple[Dataset, Dataset]) -> Baseline:
    return Baseline.fit(parts[0].targets, find_composition(parts[0]))


def test_composition_alone_predicts_qm9_as_well_as_is_known(parts: tuple[Dataset, Dataset], fitted: Baseline) -> None:
    test = parts[1]
    predicted = fitted.restore(np.zeros((len(test), len(LATENTS))), find_composition(test))
    mae = split(np.abs(predicted - test.targets).mean(axis=0)[None])
    known = {
        **{"alpha": 2.21, "homo": 0.408, "lumo": 0.766, "gap": 0.843, "zpve": 0.0384, "cv": 1.75},
        **{"u0": 0.861, "u": 0.859, "h": 0.859, "g": 0.866},
    }
    for key, value in known.items():
        assert mae[key][0] == pytest.approx(value, rel=0.03), key
    assert mae["r2"][0] < 3.5, "the nuclear second moment explains all but 2 % of R2's 168 a0^2"


def test_scales_are_the_spread_that_is_left(parts: tuple[Dataset, Dataset], fitted: Baseline) -> None:
    rest = fitted.remove(parts[0].targets, find_composition(parts[0]))
    assert rest.shape == (100_000, len(LATENTS))
    np.testing.assert_allclose(rest.std(axis=0), 1.0, rtol=1e-9)


def test_remove_and_restore_give_qm9_back(parts: tuple[Dataset, Dataset], fitted: Baseline) -> None:
    test = parts[1]
    composition = find_composition(test)
    back, targets = split(fitted.restore(fitted.remove(test.targets, composition), composition)), split(test.targets)
    for key in ("mu", "alpha", "homo", "lumo", "r2", "zpve", "u0", "u", "cv"):
        np.testing.assert_allclose(back[key], targets[key], rtol=1e-9, atol=1e-12, err_msg=key)
    np.testing.assert_allclose(back["gap"], targets["gap"], atol=1.01e-4 * HARTREE_EV)  # orbital energies have 4 digits
    for key in ("h", "g"):  # H - U = RT, which QM9 rounds to 1e-6 Hartree
        np.testing.assert_allclose(back[key], targets[key], rtol=0.0, atol=3e-5, err_msg=key)


def test_spreads_used_in_tests_are_those_of_qm9(full: Dataset) -> None:
    composition = compose(full.numbers, full.positions.astype(float), full.offsets)
    values = split(full.targets)
    values |= {f"{key}_atom": atomization(key, values[key], composition) for key in ("u0", "u", "h", "g")}
    for key, spread in SPREAD.items():
        assert values[key].std() == pytest.approx(spread, rel=0.01), key


def outputs(limit: float) -> st.SearchStrategy[NDArray]:
    shape = (len(DATASET), len(LATENTS))
    return arrays(np.float64, shape, elements=st.floats(-limit, limit, allow_subnormal=False), fill=st.nothing())


@settings(deadline=None, max_examples=50)
@given(outputs(4.0))
def test_order_of_energies(values: NDArray) -> None:
    y = split(BASELINE.restore(values, COMPOSITION))
    assert (y["u0"] < y["u"]).all()
    assert (y["u"] < y["h"]).all()
    assert (y["g"] < y["h"]).all()
    np.testing.assert_allclose(y["h"] - y["u"], RT_EV, atol=1e-11)
    np.testing.assert_allclose(y["lumo"] - y["homo"], y["gap"], atol=1e-12)
    for key in ("alpha", "gap", "r2", "zpve", "cv"):
        assert (y[key] > 0.0).all(), key


@settings(deadline=None, max_examples=50)
@given(outputs(1e6))
def test_nothing_is_negative_or_out_of_order_whatever_the_network_says(values: NDArray) -> None:
    y = split(BASELINE.restore(values, COMPOSITION))
    assert all(np.isfinite(column).all() for column in y.values())
    for key in ("mu", "alpha", "gap", "r2", "zpve", "cv"):
        assert (y[key] >= 0.0).all(), key
    assert (y["u0"] <= y["u"]).all()
    assert (y["u"] <= y["h"]).all()
    assert (y["g"] <= y["h"]).all()


def test_linear_functions_add_up() -> None:
    """Doubling every count doubles what composition says of a property that adds up over fragments."""
    twice = Composition(COMPOSITION.counts * [2, 2, 2, 2, 2, 1], COMPOSITION.nuclear_r2 * 2)
    zeros = np.zeros((len(DATASET), len(LATENTS)))
    once, double = split(BASELINE.restore(zeros, COMPOSITION)), split(BASELINE.restore(zeros, twice))
    for key in ("alpha", "r2", "zpve", "u0"):
        np.testing.assert_allclose(double[key], 2 * once[key], rtol=1e-12, err_msg=key)

    for key in ("homo", "lumo", "gap"):
        np.testing.assert_allclose(double[key], once[key], rtol=1e-12, err_msg=key)


def test_orbital_energies_do_not_drift_with_the_length_of_a_chain(fitted: Baseline) -> None:
    """QM9 ends at nine heavy atoms: a linear function of the counts would leave the range of orbital energies."""
    numbers, positions, offsets = concatenate([alkane(carbons) for carbons in (9, 40, 1000)])
    composition = compose(numbers, center(numbers, positions, offsets), offsets)
    y = split(fitted.restore(np.zeros((3, len(LATENTS))), composition))
    for key in ("homo", "lumo", "gap"):
        nine, forty, thousand = y[key]
        assert forty == pytest.approx(nine, abs=0.25), key  # eV; the share of hydrogen changes from 20/29 to 82/122
        assert thousand == pytest.approx(forty, abs=0.1), key
    assert y["u0"][1] < 4.0 * y["u0"][0]


def test_shares_are_those_of_the_elements() -> None:
    water = Composition(np.array([[2.0, 0.0, 0.0, 1.0, 0.0, 1.0], [4.0, 1.0, 0.0, 0.0, 0.0, 1.0]]), np.zeros(2))
    np.testing.assert_allclose(water.shares, [[2 / 3, 0, 0, 1 / 3, 0, 0], [0.8, 0.2, 0, 0, 0, 0]])


def test_a_property_that_never_varies_has_scale_one() -> None:
    targets = DATASET.targets.copy()
    targets[:, COLUMN["mu"]] = 0.0
    assert Baseline.fit(targets, COMPOSITION).scales[LATENTS.index("mu")] == 1.0


def test_center_moves_the_center_of_mass_to_the_origin() -> None:
    from ase.data import atomic_masses

    moved = center(DATASET.numbers, DATASET.positions + np.array([700.0, -3.0, 20.0]), DATASET.offsets)
    moments = atomic_masses[DATASET.numbers][:, None] * moved
    mass = np.add.reduceat(atomic_masses[DATASET.numbers], DATASET.offsets[:-1])
    assert np.abs(np.add.reduceat(moments, DATASET.offsets[:-1]) / mass[:, None]).max() < 1e-4
    inside = np.diff(moved, axis=0) - np.diff(DATASET.positions.astype(float), axis=0)
    same_molecule = np.delete(np.arange(len(moved) - 1), DATASET.offsets[1:-1] - 1)
    assert np.abs(inside[same_molecule]).max() < 1e-6, "shapes are kept"


def test_nuclear_second_moment_ignores_place_and_orientation() -> None:
    moved = DATASET.positions.astype(float) @ random_rotation(1).T + [300.0, -200.0, 100.0]
    np.testing.assert_allclose(find_composition(DATASET, moved).nuclear_r2, COMPOSITION.nuclear_r2, rtol=1e-9)


def test_nuclear_second_moment_of_hydrogen() -> None:
    numbers, positions = np.array([1, 1]), np.array([[0.0, 0.0, 0.0], [0.74, 0.0, 0.0]])
    offsets = np.array([0, 2])
    composition = compose(numbers, center(numbers, positions, offsets), offsets)
    assert composition.nuclear_r2[0] == pytest.approx(2 * (0.37 / BOHR_ANGSTROM) ** 2)
    assert composition.counts.tolist() == [[2, 0, 0, 0, 0, 1]]


def test_atomization_energy_of_methane() -> None:
    """QM9's U0 of methane, -40.47893, less carbon's -37.846772 and four times hydrogen's -0.500273 Hartree."""
    methane = Composition(np.array([[4.0, 1.0, 0.0, 0.0, 0.0, 1.0]]), np.zeros(1))
    u0 = np.array([-40.47893 * HARTREE_EV])
    assert atomization("u0", u0, methane)[0] == pytest.approx(-0.631066 * HARTREE_EV)
    assert TARGETS["u0_atom"].total == "u0"
