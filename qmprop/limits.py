"""Which lengths, contacts and valences occur in the training molecules: what `oddities` measures others by.

`numbers`, `positions`, `offsets`, `first` and `second` are those of `topology`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qmprop.targets import ELEMENTS
from qmprop.topology import Bonds, find_bonds

_Ints = NDArray[np.int64]
_Floats = NDArray[np.float64]
_Mask = NDArray[np.bool_]

_COUNT: Final = len(ELEMENTS)
#: Row of an element (H, C, N, O, F) by atomic number.
ROWS: Final = np.zeros(10, dtype=np.int64)
ROWS[list(ELEMENTS)] = np.arange(_COUNT)
#: Row of a pair of elements by their two rows.
PAIRS: Final = np.zeros((_COUNT, _COUNT), dtype=np.int64)
PAIRS[np.triu_indices(_COUNT)] = np.arange(_COUNT * (_COUNT + 1) // 2)
PAIRS[np.tril_indices(_COUNT)] = PAIRS.T[np.tril_indices(_COUNT)]
_PAIR_COUNT: Final = int(PAIRS.max()) + 1
#: Valences are told apart by element and number of neighbors, 0 to 4.
MOST_NEIGHBORS: Final = 4
#: Single bonds in Å by pair of elements, experiment (NIST CCCBDB): H2, CH4, NH3, H2O, HF; C2H6, CH3NH2, CH3OH, CH3F;
#: N2H4, NH2OH, NF3; H2O2, F2O; F2.
SINGLE_BONDS: Final = np.array(
    [0.741, 1.087, 1.012, 0.958, 0.917]
    + [1.536, 1.471, 1.427, 1.383]
    + [1.449, 1.453, 1.365]
    + [1.452, 1.405]
    + [1.412]
)
_DECAY: Final = 0.308  # Å; Pauling, J. Am. Chem. Soc. 1947, 69, 542: 0.71 Å / ln 10
_CONTACT: Final = 3.0  # Å; pairs without a bond are looked at up to here
_TABLE_WIDTHS: Final = (3, 8)  # fewest and most neighbors of an atom that are listed; no whole molecule has over four

_FEWEST: Final = 20  # values from which a limit is learned
_IGNORED: Final = 3e-4  # the share of values that may lie beyond a limit


@dataclass(frozen=True, slots=True, eq=False)
class Surroundings:
    """What is around each of N atoms: B bonds, and Q pairs of atoms that are near without a bond.

    Attributes:
        neighbors: Number of bonds of each atom, int64 [N].
        table: Its neighbors, at most eight, filled up with -1, int64 [N, 3 to 8].
        valences: Sum of Pauling's bond orders exp((R - d) / 0.308 Å) over an atom's bonds, float64 [N].
        strongest: The highest of these orders, float64 [N].
        bond_pairs: Row of each bond's pair of elements, int64 [B].
        first: Atom i of each near pair, int64 [Q].
        second: Atom j > i of each near pair, int64 [Q].
        lengths: Their distances in Å, float64 [Q].
        pairs: Row of each near pair's elements, int64 [Q].
        angles: Whether some atom is bonded to both, bool [Q].
    """

    neighbors: _Ints
    table: _Ints
    valences: _Floats
    strongest: _Floats
    bond_pairs: _Ints
    first: _Ints
    second: _Ints
    lengths: _Floats
    pairs: _Ints
    angles: _Mask


@dataclass(frozen=True, slots=True, eq=False)
class Limits:
    """Least and largest values in training molecules; NaN where there are too few to tell.

    Attributes:
        lengths: Of bonds in Å by pair of elements, float64 [15, 2].
        contacts: Smallest distances in Å without a bond by pair of elements: of two atoms bonded to a third, and of
            others, float64 [15, 2].
        valences: By element and number of neighbors, float64 [5, 5, 2].
    """

    lengths: _Floats
    contacts: _Floats
    valences: _Floats

    def __post_init__(self) -> None:
        """Check the shapes; raise ValueError where one is wrong."""
        shapes = ((_PAIR_COUNT, 2), (_PAIR_COUNT, 2), (_COUNT, MOST_NEIGHBORS + 1, 2))
        for field, shape in zip(fields(self), shapes, strict=True):
            values = np.asarray(getattr(self, field.name), dtype=np.float64)
            if values.shape != shape:
                raise ValueError(f"{field.name} must have shape {list(shape)}, not {list(values.shape)}")
            object.__setattr__(self, field.name, values)

    def join(self, other: Limits) -> Limits:
        """Return the limits that both keep: those learned from both sets of molecules."""
        ranges = (
            np.stack([np.fmin(one[..., 0], two[..., 0]), np.fmax(one[..., 1], two[..., 1])], axis=-1)
            for one, two in ((self.lengths, other.lengths), (self.valences, other.valences))
        )
        lengths, valences = ranges
        return Limits(lengths, np.fmin(self.contacts, other.contacts), valences)

    def to_arrays(self) -> dict[str, _Floats]:
        """Return the arrays by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Limits:
        """Rebuild the limits from what `to_arrays` returned.

        Raises:
            ValueError: An array is missing or has another shape.
        """
        missing = [field.name for field in fields(cls) if field.name not in arrays]
        if missing:
            raise ValueError(f"limits lack {', '.join(missing)}")
        return cls(**{field.name: arrays[field.name] for field in fields(cls)})


def learn_limits(numbers: _Ints, positions: _Floats, offsets: _Ints, first: _Ints, second: _Ints) -> Limits:
    """Return the limits that all but a few of the bonds, contacts and atoms of many molecules keep.

    Args:
        numbers: Atomic numbers [N].
        positions: In Å [N, 3].
        offsets: Of the molecules' atoms [M + 1]; molecules of several fragments or lone atoms teach nothing wrong.
        first: Atom i of each pair closer than 5 Å [P].
        second: Atom j > i of each pair [P].
    """
    bonds = find_bonds(numbers, positions, first, second)
    around = look_around(numbers, positions, bonds, first, second)
    lengths = _find_ranges(bonds.lengths, around.bond_pairs, _PAIR_COUNT)
    contacts = [
        _find_ranges(around.lengths[mask], around.pairs[mask], _PAIR_COUNT)[:, 0]
        for mask in (around.angles, ~around.angles)
    ]
    usual = np.flatnonzero(around.neighbors <= MOST_NEIGHBORS)
    width = MOST_NEIGHBORS + 1
    valences = _find_ranges(
        around.valences[usual], ROWS[numbers[usual]] * width + around.neighbors[usual], _COUNT * width
    )
    return Limits(lengths, np.stack(contacts, axis=1), valences.reshape(_COUNT, width, 2))


def look_around(numbers: _Ints, positions: _Floats, bonds: Bonds, first: _Ints, second: _Ints) -> Surroundings:
    """Return what is around each atom, from all pairs i < j of atoms of one molecule closer than 5 Å."""
    size = len(numbers)
    rows = ROWS[numbers]
    bond_pairs = PAIRS[rows[bonds.first], rows[bonds.second]]
    orders = np.exp((SINGLE_BONDS[bond_pairs] - bonds.lengths) / _DECAY)
    orders = np.concatenate([orders, orders])
    ends = np.concatenate([bonds.first, bonds.second])
    strongest = np.zeros(size)
    np.maximum.at(strongest, ends, orders)
    neighbors = np.bincount(ends, minlength=size).astype(np.int64)
    steps = positions[first] - positions[second]
    squares = np.einsum("pk,pk->p", steps, steps)
    near = np.flatnonzero(squares < _CONTACT**2)
    near = near[~np.isin(first[near] * size + second[near], bonds.first * size + bonds.second)]
    first, second = first[near], second[near]
    table = _tabulate(bonds, neighbors)
    one, two = table[first][:, :, None], table[second][:, None, :]
    angles: _Mask = ((one == two) & (one >= 0)).any(axis=(1, 2))
    return Surroundings(
        neighbors=neighbors,
        table=table,
        valences=np.bincount(ends, orders, minlength=size).astype(np.float64),
        strongest=strongest,
        bond_pairs=bond_pairs,
        first=first,
        second=second,
        lengths=np.sqrt(squares[near]),
        pairs=PAIRS[rows[first], rows[second]],
        angles=angles,
    )


def _tabulate(bonds: Bonds, neighbors: _Ints) -> _Ints:
    """Return the neighbors of each atom, filled up with -1."""
    ends = np.concatenate([bonds.first, bonds.second])
    order = np.argsort(ends, kind="stable")
    column = np.arange(len(ends)) - np.repeat(np.cumsum(neighbors) - neighbors, neighbors)
    width = int(np.clip(neighbors.max(initial=0), *_TABLE_WIDTHS))
    table = np.full((len(neighbors), width), -1, dtype=np.int64)
    fits = column < width
    table[ends[order][fits], column[fits]] = np.concatenate([bonds.second, bonds.first])[order][fits]
    return table


def _find_ranges(values: _Floats, classes: _Ints, count: int) -> _Floats:
    """Return the least and the largest value of each class but for the few that are ignored, [count, 2]."""
    ranges = np.full((count, 2), np.nan)
    for row in range(count):
        chosen = np.sort(values[classes == row])
        if len(chosen) >= _FEWEST:
            ignored = int(_IGNORED * len(chosen))
            ranges[row] = chosen[ignored], chosen[-1 - ignored]
    return ranges
