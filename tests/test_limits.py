"""What occurs in the training molecules."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from samples import alkane, pair_up, read_molecules

from qmprop.limits import PAIRS, ROWS, SINGLE_BONDS, Limits, learn_limits, look_around
from qmprop.molecule import Molecule
from qmprop.topology import find_bonds

CH, CC, HH = (int(PAIRS[ROWS[one], ROWS[two]]) for one, two in ((6, 1), (6, 6), (1, 1)))


def learn(*molecules: Molecule) -> Limits:
    return learn_limits(*pair_up(*molecules))


def assert_same(one: Limits, two: Limits) -> None:
    for field in fields(Limits):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(two, field.name))


def test_pairs_of_elements_are_numbered_once():
    assert (PAIRS == PAIRS.T).all()
    assert sorted(set(PAIRS.ravel().tolist())) == list(range(15))
    assert (SINGLE_BONDS[CH], SINGLE_BONDS[CC], SINGLE_BONDS[HH]) == (1.087, 1.536, 0.741)


def test_limits_are_those_of_the_molecules():
    """In an all-trans alkane every C-C bond is 1.53 Å long and every C-H bond 1.09 Å."""
    limits = learn(alkane(30))
    assert limits.lengths[CC] == pytest.approx([np.hypot(1.27, 0.84)] * 2)
    assert limits.lengths[CH] == pytest.approx([1.09, 1.09], abs=0.01)
    assert limits.contacts[CC] == pytest.approx([2.54, np.nan], nan_ok=True)
    assert limits.valences[ROWS[6], 4] == pytest.approx([4.0, 4.0], abs=0.15)
    assert np.isnan(limits.valences[ROWS[6], 3]).all()
    assert np.isnan(limits.lengths[PAIRS[ROWS[7]]]).all()


def test_few_values_teach_nothing_and_few_outliers_little():
    assert np.isnan(learn(alkane(20)).lengths[CC]).all()
    long = alkane(3)
    long = replace(long, positions=long.positions + np.outer(np.arange(11) == 0, [-0.15, 0.0, 0.0]))
    assert learn(*[alkane(30)] * 5, long).lengths[CC, 1] > 1.6
    assert learn(*[alkane(30)] * 120, long).lengths[CC, 1] == pytest.approx(1.523, abs=1e-3)


def test_joined_limits_are_the_wider_ones():
    wide, other = learn(*read_molecules()), learn(alkane(30))
    joined = wide.join(other)
    assert joined.lengths[CC, 0] == wide.lengths[CC, 0] < other.lengths[CC, 0]
    assert joined.contacts[CC, 0] == min(wide.contacts[CC, 0], other.contacts[CC, 0])
    assert joined.valences[ROWS[6], 4, 1] == max(wide.valences[ROWS[6], 4, 1], other.valences[ROWS[6], 4, 1])
    assert_same(other.join(wide), joined)
    assert_same(joined.join(wide), joined)


def test_arrays_go_and_come_back_small():
    limits = learn(*read_molecules())
    arrays = limits.to_arrays()
    assert sum(array.nbytes for array in arrays.values()) < 2000
    assert_same(Limits.from_arrays(arrays), limits)


@pytest.mark.parametrize(
    ("change", "text"),
    [({"lengths": np.zeros((3, 2))}, r"lengths must have shape \[15, 2\]"), ({"valences": None}, "lack valences")],
)
def test_other_arrays_are_refused(change, text):
    arrays = {**learn(alkane(5)).to_arrays(), **change}
    with pytest.raises(ValueError, match=text):
        Limits.from_arrays({name: array for name, array in arrays.items() if array is not None})


def test_valences_are_the_chemical_ones():
    """By Pauling's bond orders atoms have about the valence that the textbook gives them."""
    numbers, positions, _, first, second = pair_up(*read_molecules())
    around = look_around(numbers, positions, find_bonds(numbers, positions, first, second), first, second)
    usual = np.array([1.0, 4.0, 3.0, 2.0, 1.0])[ROWS[numbers]]
    assert np.abs(around.valences - usual).max() < 1.0
    assert np.abs(around.valences - usual).mean() < 0.2


def test_near_pairs_are_those_without_a_bond():
    """Propane: three carbons, of which the outer two share a neighbor."""
    numbers, positions, _, first, second = pair_up(alkane(3))
    bonds = find_bonds(numbers, positions, first, second)
    around = look_around(numbers, positions, bonds, first, second)
    carbons = (numbers[around.first] == 6) & (numbers[around.second] == 6)
    assert list(zip(around.first[carbons], around.second[carbons], around.angles[carbons], strict=True)) == [
        (0, 2, True)
    ]
    bonded = set(zip(bonds.first.tolist(), bonds.second.tolist(), strict=True))
    assert not bonded & set(zip(around.first.tolist(), around.second.tolist(), strict=True))
    assert around.neighbors.tolist() == [4, 4, 4] + [1] * 8
    for atom in range(3):
        listed = set(around.table[atom].tolist()) - {-1}
        assert listed == {j for pair in bonded if atom in pair for j in pair} - {atom}
