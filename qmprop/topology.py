"""What a chemist sees at a glance: which atoms are bonded, whether it is the same molecule, and what is odd about it.

Everything is perceived from elements and positions, for many molecules at once. Common to all functions: `numbers`
are atomic numbers (H, C, N, O, F) [N], `positions` are in Å [N, 3], molecule k owns the atoms
`offsets[k]:offsets[k + 1]` [M + 1], and `first`, `second` [P] are all pairs of atoms of one molecule that are closer
than 5 Å, as `graph.build_graph` finds them. Time and memory grow with the pairs, not with the square of the atoms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

_Ints = NDArray[np.int64]
_Floats = NDArray[np.float64]
_Hashes = NDArray[np.uint64]

#: In Å by atomic number; Cordero et al., Dalton Trans. 2008, 2832.
COVALENT_RADII: Final = np.zeros(10)
COVALENT_RADII[[1, 6, 7, 8, 9]] = 0.31, 0.76, 0.71, 0.66, 0.57
#: Longest bond in sums of covalent radii. Two carbons across a small cage come within 1.16 without a bond: they have
#: four others.
_LONGEST_BOND: Final = 1.28
_LONGEST_CARBON_BOND: Final = 1.2
_LONG: Final = 0.9  # of the longest bond

_REACH: Final = 6  # bonds; how far an atom sees in a round of hashing
_ROUNDS: Final = 3
_SURROUNDINGS: Final = 2  # bonds; how far those reach


@dataclass(frozen=True, slots=True, eq=False)
class Bonds:
    """Pairs of bonded atoms.

    Attributes:
        first: Atom i of each bond, int64 [B].
        second: Atom j of each bond, int64 [B].
        lengths: In Å, float64 [B].
    """

    first: _Ints
    second: _Ints
    lengths: _Floats


def find_bonds(numbers: _Ints, positions: _Floats, first: _Ints, second: _Ints) -> Bonds:
    """Return the pairs of atoms that are as close as covalent bonds are.

    A hydrogen has one bond only, to the nearest heavy atom; two hydrogens are bonded where no heavy atom is near.
    """
    longest = _LONGEST_BOND * (COVALENT_RADII[numbers[first]] + COVALENT_RADII[numbers[second]])
    longest[(numbers[first] == 6) & (numbers[second] == 6)] = _LONGEST_CARBON_BOND * 2 * COVALENT_RADII[6]
    lengths = _distances(positions, first, second)
    near = lengths < longest
    first, second, lengths = first[near], second[near], lengths[near]
    hydrogens = (numbers[first] == 1).astype(np.int64) + (numbers[second] == 1)
    mixed = np.flatnonzero(hydrogens == 1)
    hydrogen = np.where(numbers[first] == 1, first, second)[mixed]
    order = np.lexsort((lengths[mixed], hydrogen))
    bound, nearest = np.unique(hydrogen[order], return_index=True)
    keep = hydrogens == 0
    keep[mixed[order[nearest]]] = True
    alone = np.ones(len(numbers), dtype=bool)
    alone[bound] = False
    keep |= (hydrogens == 2) & alone[first] & alone[second]
    bonds = Bonds(first[keep], second[keep], lengths[keep])
    return _drop_contacts(numbers, bonds, bonds.lengths / longest[near][keep])


def _drop_contacts(numbers: _Ints, bonds: Bonds, ratios: _Floats) -> Bonds:
    """Leave out the longest bonds of carbons that would have more than four."""
    while True:
        crowded = (numbers == 6) & (_count_neighbors(bonds, len(numbers)) > 4)
        ends = np.concatenate([bonds.first, bonds.second])
        places = np.tile(np.arange(len(ratios)), 2)
        chosen = crowded[ends] & (ratios[places] > _LONG)
        if not chosen.any():
            return bonds
        order = np.lexsort((-ratios[places[chosen]], ends[chosen]))
        longest = places[chosen][order][np.unique(ends[chosen][order], return_index=True)[1]]
        keep = np.ones(len(ratios), dtype=bool)
        keep[longest] = False
        bonds, ratios = Bonds(bonds.first[keep], bonds.second[keep], bonds.lengths[keep]), ratios[keep]


def label_fragments(size: int, first: _Ints, second: _Ints) -> _Ints:
    """Return for each of `size` atoms the least atom that bonds (`first`, `second`) connect it with, int64 [size]."""
    labels = np.arange(size)
    while (labels[first] != labels[second]).any():
        lowest = np.minimum(labels[first], labels[second])
        for ends in (first, second):
            np.minimum.at(labels, labels[ends], lowest)
            np.minimum.at(labels, ends, lowest)
        labels = labels[labels]
    return labels


def hash_graphs(numbers: _Ints, offsets: _Ints, bonds: Bonds) -> _Hashes:
    """Return a hash of every molecule's constitution: elements and bonds without order; the order of atoms is nothing.

    Rounds of Weisfeiler and Lehman's refinement in which an atom sees not its neighbors only, but every atom a few
    bonds away, by that distance and by the number of ways to it: what rings there are shows.

    Args:
        numbers: Atomic numbers [N].
        offsets: Of the molecules' atoms [M + 1].
        bonds: Their bonds.

    Returns:
        uint64 [M]; the same on every machine.
    """
    degrees = _count_neighbors(bonds, len(numbers))
    leaf = (numbers == 1) & (degrees == 1)
    drop_first, drop_second = (
        leaf[a] & (numbers[b] != 1) for a, b in ((bonds.first, bonds.second), (bonds.second, bonds.first))
    )
    carried = _count(bonds.second[drop_first], len(numbers)) + _count(bonds.first[drop_second], len(numbers))
    node = np.ones(len(numbers), dtype=bool)
    node[bonds.first[drop_first]] = False
    node[bonds.second[drop_second]] = False
    rank = np.cumsum(node) - 1
    kept = ~(drop_first | drop_second)
    starts, labels, seen = _see(rank[bonds.first[kept]], rank[bonds.second[kept]], int(node.sum()))
    colors = _mix((numbers * 64 + carried)[node].astype(np.uint64))
    for _ in range(_ROUNDS):
        colors = _mix(_mix(colors) + _sum_segments(_mix(colors[seen] + labels), starts))
    return _mix(_sum_segments(_mix(colors), np.concatenate([[0], np.cumsum(node)])[offsets]))


def hash_surroundings(numbers: _Ints, bonds: Bonds) -> _Hashes:
    """Return a hash of every atom's surroundings: what it is and what the atoms up to two bonds away are [N].

    What an atom is are its element, the number of its bonds, and the number of rings of three that it is in.
    """
    count = len(numbers)
    neighbors, begins = _list_neighbors(bonds.first, bonds.second, count)
    atoms = np.repeat(np.arange(count), np.diff(begins))
    sizes, steps = _walk(neighbors, neighbors, begins)
    walkers = np.repeat(atoms, sizes)
    closed = np.isin(walkers * count + steps, atoms * count + neighbors)
    rings = _count(walkers[closed], count) // 2  # one for each way round
    hashes = _mix(((numbers * 64 + np.diff(begins)) * 64 + rings).astype(np.uint64))
    for _ in range(_SURROUNDINGS):
        hashes = _mix(_mix(hashes) + _sum_segments(_mix(hashes[neighbors]), begins))
    return hashes


def _see(first: _Ints, second: _Ints, count: int) -> tuple[_Ints, _Hashes, _Ints]:
    """Return what each of `count` atoms sees within `_REACH` bonds.

    Returns:
        Atom i sees the entries `starts[i]:starts[i + 1]` of the other two: a label of distance and number of ways
        (uint64), and which atom.
    """
    neighbors, begins = _list_neighbors(first, second, count)
    keys: list[_Ints] = [np.zeros(0, dtype=np.int64), np.arange(count) * (count + 1)]
    ways = np.zeros(0, dtype=np.int64)
    labels: list[_Hashes] = []
    for distance in range(1, _REACH + 1):
        viewers, ends = np.divmod(keys[-1], count)
        sizes, steps = _walk(ends, neighbors, begins)
        reached, ways = np.unique(np.repeat(viewers * count, sizes) + steps, return_counts=True)
        new = ~np.isin(reached, np.concatenate(keys[-2:]))
        keys.append(reached[new])
        labels.append(_mix((ways[new] * 16 + distance).astype(np.uint64)))
    found = np.concatenate(keys[2:])
    order = np.argsort(found)
    viewers, seen = np.divmod(found[order], max(count, 1))
    return np.searchsorted(viewers, np.arange(count + 1)), np.concatenate(labels)[order], seen


def _list_neighbors(first: _Ints, second: _Ints, count: int) -> tuple[_Ints, _Ints]:
    """Return the neighbors of all atoms, and where those of atom i are among them: `begins[i]:begins[i + 1]`."""
    senders = np.concatenate([first, second])
    order = np.argsort(senders, kind="stable")
    return np.concatenate([second, first])[order], np.concatenate([[0], np.cumsum(_count(senders, count))])


def _walk(ends: _Ints, neighbors: _Ints, begins: _Ints) -> tuple[_Ints, _Ints]:
    """Return to how many atoms one bond leads from each of `ends`, and to which, one after the other."""
    sizes = begins[ends + 1] - begins[ends]
    return sizes, neighbors[np.repeat(begins[ends] - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())]


def _mix(values: _Hashes) -> _Hashes:
    """Return well-mixed bits: the output function of splitmix64 (Steele, Lea and Flood 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _sum_segments(values: _Hashes, starts: _Ints) -> _Hashes:
    """Return the sums of `values[starts[k]:starts[k + 1]]` modulo 2^64."""
    sums = np.concatenate([np.zeros(1, dtype=values.dtype), np.cumsum(values, dtype=values.dtype)])
    segments: _Hashes = sums[starts[1:]] - sums[starts[:-1]]
    return segments


def _count_neighbors(bonds: Bonds, size: int) -> _Ints:
    return _count(bonds.first, size) + _count(bonds.second, size)


def _count(indices: _Ints, size: int) -> _Ints:
    return np.bincount(indices, minlength=size).astype(np.int64)


def _distances(positions: _Floats, first: _Ints, second: _Ints) -> _Floats:
    """Return |x_i - x_j| in Å."""
    steps = positions[first] - positions[second]
    distances: _Floats = np.sqrt(np.einsum("pk,pk->p", steps, steps))
    return distances
