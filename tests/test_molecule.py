"""The checks that decide whether a molecule may be predicted."""

from __future__ import annotations

import ase.build
import numpy as np
import pytest

from qmprop.molecule import MIN_DISTANCE, Molecule, find_error, find_warnings


def build(name: str, **changes: object) -> Molecule:
    atoms = ase.build.molecule(name)
    return Molecule(atoms.numbers, atoms.positions, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "formula"),
    [("H2O", "H2O"), ("CH3CH2OH", "C2H6O"), ("NH3", "H3N"), ("C6H6", "C6H6"), ("CO", "CO"), ("CH3Cl", "CH3Cl")],
)
def test_formula_follows_hill(name: str, formula: str) -> None:
    assert build(name).formula == formula
    assert ase.build.molecule(name).get_chemical_formula("hill") == formula


def test_formula_names_what_is_no_element() -> None:
    assert Molecule(np.array([6, 0, 200]), np.eye(3)).formula == "C#200X"


def test_arrays_take_their_types_and_wrong_shapes_are_refused() -> None:
    molecule = Molecule([8, 1, 1], [[0, 0, 0], [0, 0, 1], [0, 1, 0]])  # type: ignore[arg-type]
    assert (molecule.numbers.dtype, molecule.positions.dtype) == (np.int64, np.float64)
    with pytest.raises(ValueError, match=r"not \[2\] and \[3, 3\]"):
        Molecule(np.array([1, 1]), np.zeros((3, 3)))


@pytest.mark.parametrize("name", ["H2O", "CH4", "C6H6", "CO2", "HF", "N2"])
def test_molecules_at_equilibrium_pass(name: str) -> None:
    assert find_error(build(name)) is None
    assert find_warnings(build(name)) == ()


@pytest.mark.parametrize(
    ("numbers", "positions", "code", "text"),
    [
        ([], np.empty((0, 3)), "no-atoms", "no atoms"),
        ([6, 17, 35], np.eye(3), "unsupported-element", "Cl, Br"),
        ([0], np.zeros((1, 3)), "unsupported-element", "atomic number 0"),
        ([1, 1], [[0, 0, 0], [0, 0, np.nan]], "non-finite-coordinates", "Atom 2 (H)"),
        ([8, 1], [[-np.inf, 0, 0], [0, 0, 1]], "non-finite-coordinates", "Atom 1 (O)"),
        ([8, 1, 1], np.ones((3, 3)), "no-3d-coordinates", "one point"),
        ([8, 1, 1], [[0, 0, 0], [5, 0, 0], [5, 0, 0]], "atoms-too-close", "2 (H) and 3 (H) are 0.000 Å"),
        ([6, 1, 8], [[0, 0, 0], [9, 9, 9], [0.2, 0, 0]], "atoms-too-close", "1 (C) and 3 (O) are 0.200 Å"),
    ],
)
def test_errors_name_the_atoms(numbers: list[int], positions: object, code: str, text: str) -> None:
    error = find_error(Molecule(np.array(numbers), np.asarray(positions, dtype=float)))
    assert error is not None
    assert error.code == code
    assert text in error.text


def test_periodic_structures_are_refused() -> None:
    error = find_error(build("H2O", periodic=True))
    assert error is not None
    assert error.code == "periodic"


@pytest.mark.parametrize("size", [2, 256, 257, 1000])
def test_closest_pair_is_found_in_small_and_large_molecules(size: int) -> None:
    positions = np.stack([np.arange(size), np.zeros(size), np.zeros(size)], axis=1) * 1.1
    assert find_error(Molecule(np.ones(size), positions)) is None
    for distance in (0.0, 0.99 * MIN_DISTANCE):
        close = positions.copy()
        close[-1] = close[0] + [0.0, distance, 0.0]
        error = find_error(Molecule(np.ones(size), close))
        assert error is not None
        assert size == 2 or f"Atoms 1 (H) and {size} (H)" in error.text
    barely = positions.copy()
    barely[-1] = barely[0] + [0.0, 1.01 * MIN_DISTANCE, 0.0]
    assert find_error(Molecule(np.ones(size), barely)) is None


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("shift", "distance"), [(1e12, 1.0), (-1e12, 1.0), (0.0, 2e4), (-1e308, 1.5e308)])
def test_coordinates_that_lose_their_precision_are_refused(shift: float, distance: float) -> None:
    error = find_error(Molecule(np.array([1, 1]), np.array([[shift, 0, 0], [shift + distance, 0, 0]])))
    assert error is not None
    assert error.code == "coordinates-out-of-range"


def test_a_molecule_far_from_the_origin_is_fine() -> None:
    assert find_error(Molecule(np.array([1, 1]), np.array([[1e8, 0, 0], [1e8 + 0.75, 0, 0]]))) is None
    assert find_error(Molecule(np.array([6]), np.zeros((1, 3)))) is None


@pytest.mark.parametrize(
    ("molecule", "codes"),
    [
        (build("CH3"), ["odd-electrons"]),
        (build("OH", charge=-1), ["charged"]),
        (build("H2O", charge=1), ["charged", "odd-electrons"]),
        (Molecule(np.full(9, 6), np.arange(27).reshape(9, 3)), []),
        (Molecule(np.full(10, 6), np.arange(30).reshape(10, 3)), ["too-large"]),
    ],
)
def test_warnings(molecule: Molecule, codes: list[str]) -> None:
    assert [message.code for message in find_warnings(molecule)] == codes
