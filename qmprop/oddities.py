"""What a chemist would find odd about a geometry: missing hydrogens, fragments, drawings, strain, close contacts.

One defect gives one message: a stretched bond is not a missing hydrogen, and a drawing has no strained bonds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from qmprop.limits import MOST_NEIGHBORS, PAIRS, ROWS, SINGLE_BONDS, Limits, Surroundings, look_around
from qmprop.records import Message
from qmprop.targets import ELEMENTS
from qmprop.topology import COVALENT_RADII, Bonds, label_fragments

_Ints = NDArray[np.int64]
_Floats = NDArray[np.float64]
_Mask = NDArray[np.bool_]

# By element: H, C, N, O, F.
_FULL: Final = np.array([1, 4, 3, 2, 1])  # neighbors of an atom without multiple bonds
_MOST: Final = np.array([1, 4, 4, 3, 1])  # neighbors
#: Valences that occur outside the training molecules, by Pauling's bond orders: nitro groups, ozone, carbon monoxide.
_HIGHEST_VALENCES: Final = np.array([1.2, 4.6, 5.4, 3.6, 1.4])
#: Valences that show that nothing is missing, by element and number of neighbors, whatever the training molecules say:
#: isonitriles; imines without their hydrogen are below; acids without theirs are below, their anions are not.
_ENOUGH: Final = {(6, 1): 2.4, (7, 1): 1.95, (8, 1): 1.3}
_ENOUGH_IN_LINE: Final = 2.8  # for a carbon with two neighbors in a line
_LINE: Final = -0.8  # cosine of the angle
_WEAK: Final = 3.75  # the valence of a carbon with a multiple bond is higher
_DOUBLE: Final = 1.5  # bond order
_FLAT_CARBON: Final = 0.15  # Å, height above its three neighbors; half of that of a carbon that lacks a fourth

# How far beyond the training molecules is odd.
_LENGTH_MARGIN: Final = 0.10  # Å
_CONTACT_MARGIN: Final = 0.15  # Å
_VALENCE_MARGIN: Final = 0.5
_UNSATURATED_MARGIN: Final = 0.05
_UNKNOWN_LENGTHS: Final = (0.72, 1.05)  # in single bonds, where the training molecules have no such bond
_UNKNOWN_CONTACT: Final = 1.5  # in sums of covalent radii
_COLLAPSED: Final = 0.8  # of the shortest bond: no bond any more
_TORN: Final = 1.6  # in sums of covalent radii: a bond stretched farther is none

_FLAT: Final = 0.02  # Å, root mean square distance of the atoms from their plane
_FEWEST_FLAT: Final = 4  # atoms
_EQUAL: Final = 1e-3  # Å; a drawing's bonds are all of one length
_FEWEST_EQUAL: Final = 3  # bonds
_NAMED: Final = 3  # atoms in a message

_BOND_RULE: Final = "such a bond is {least:.2f} to {most:.2f} Å long"
_ANGLE_RULE: Final = "two neighbors of one atom keep {least:.2f} Å or more"
_CONTACT_RULE: Final = "without a bond they keep {least:.2f} Å or more"


@dataclass(frozen=True, slots=True, eq=False)
class _Case:
    """M molecules of N atoms with what was perceived of them."""

    numbers: _Ints
    positions: _Floats
    offsets: _Ints
    molecules: _Ints  # of each atom
    bonds: Bonds
    around: Surroundings
    limits: Limits

    def name(self, atom: int) -> str:
        """Return element and place in its molecule, from 1."""
        return name_atom(int(self.numbers[atom]), atom - int(self.offsets[self.molecules[atom]]))

    def count(self, atoms: NDArray[np.bool_] | _Ints) -> _Ints:
        """Return how many of these atoms each molecule owns [M]."""
        return np.bincount(self.molecules[atoms], minlength=len(self.offsets) - 1).astype(np.int64)


def name_atom(number: int, place: int) -> str:
    """Return element and place in the molecule, which is given from 0 and told from 1: "C3"."""
    return f"{ELEMENTS[number]}{place + 1}"


@dataclass(frozen=True, slots=True, eq=False)
class _Finds:
    """Pairs of atoms at odd distances."""

    first: _Ints
    second: _Ints
    lengths: _Floats  # Å
    excess: _Floats  # Å beyond what is usual
    rule: str  # what is usual, with the places {least} and {most}
    least: _Floats  # Å
    most: _Floats  # Å

    def select(self, chosen: _Mask) -> _Finds:
        """Return some of the pairs."""
        return _Finds(
            self.first[chosen],
            self.second[chosen],
            self.lengths[chosen],
            self.excess[chosen],
            self.rule,
            self.least[chosen],
            self.most[chosen],
        )


def find_oddities(
    numbers: _Ints,
    positions: _Floats,
    offsets: _Ints,
    bonds: Bonds,
    first: _Ints,
    second: _Ints,
    limits: Limits,
) -> list[tuple[Message, ...]]:
    """Return what is odd about each molecule, at most one message of each code.

    Args:
        numbers: Atomic numbers (H, C, N, O, F) [N].
        positions: In Å [N, 3].
        offsets: Of the molecules' atoms [M + 1].
        bonds: What `topology.find_bonds` found.
        first: Atom i of each pair of atoms of one molecule closer than 5 Å [P].
        second: Atom j > i of each pair [P].
        limits: What occurs in the training molecules.

    Returns:
        For each molecule warnings with the codes missing-hydrogens, several-fragments, flat-geometry,
        strained-geometry and close-contact, in this order.
    """
    molecules = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    around = look_around(numbers, positions, bonds, first, second)
    case = _Case(numbers, positions, offsets, molecules, bonds, around, limits)
    unsaturated = _find_unsaturated(case)
    torn = _find_torn(case, unsaturated)
    stretched = _find_stretched(case, unsaturated)
    unsaturated &= ~stretched
    unsaturated[np.concatenate([torn.first, torn.second])] = False
    fragments = label_fragments(
        len(numbers), np.concatenate([bonds.first, torn.first]), np.concatenate([bonds.second, torn.second])
    )
    strained = _find_strain(case, stretched, torn)
    close = _find_contacts(case, torn)
    doubtful = case.count(unsaturated) > 0
    doubtful[list(strained)] = True
    flat = _find_flat(case, unsaturated, torn, doubtful)
    for molecule in flat:
        strained.pop(molecule, None)
        close.pop(molecule, None)
    strays = (numbers == 1) & (np.bincount(fragments, minlength=len(numbers))[fragments] == 1)
    explained = case.count(strays) > 0
    explained[list(strained)] |= case.count(numbers == 1)[list(strained)] > 0
    missing = _describe_unsaturated(case, unsaturated & ~explained[molecules])
    texts = {
        "missing-hydrogens": missing,
        "several-fragments": _describe_fragments(case, fragments),
        "flat-geometry": flat,
        "strained-geometry": strained,
        "close-contact": close,
    }
    return [
        tuple(Message(code, found[molecule]) for code, found in texts.items() if molecule in found)
        for molecule in range(len(offsets) - 1)
    ]


def _find_unsaturated(case: _Case) -> _Mask:
    """Return the atoms whose bonds are too few and too long for their element, bool [N].

    As many oxygen atoms with one single bond are let pass as there are nitrogen atoms with four: zwitterions.
    """
    numbers, neighbors, valences = case.numbers, case.around.neighbors, case.around.valences
    rows = ROWS[numbers]
    least = case.limits.valences[..., 0] - _UNSATURATED_MARGIN
    for (number, count), valence in _ENOUGH.items():
        least[ROWS[number], count] = valence
    least[1:, 0] = np.inf  # a heavy atom by itself
    unsaturated: _Mask = (neighbors < _FULL[rows]) & (valences < least[rows, np.minimum(neighbors, MOST_NEIGHBORS)])
    pairs = np.flatnonzero(unsaturated & (numbers == 6) & (neighbors == 2) & (valences > _ENOUGH_IN_LINE))
    unsaturated[pairs[_are_in_line(case, pairs)]] = False
    unsaturated &= numbers > 1
    unsaturated |= (numbers == 6) & (neighbors == 1) & _bears_nothing(case)
    anions = unsaturated & (numbers == 8) & (neighbors == 1)
    cations = case.count((numbers == 7) & (neighbors == 4))
    unsaturated &= ~(anions & (case.count(anions) <= cations)[case.molecules])
    return unsaturated


def _bears_nothing(case: _Case) -> _Mask:
    """Return the atoms with one neighbor that is a carbon or has no other neighbor but is no oxygen, bool [N]."""
    bonds, numbers = case.bonds, case.numbers
    partner = np.zeros(len(numbers), dtype=np.int64)
    partner[bonds.first], partner[bonds.second] = bonds.second, bonds.first
    alone = (case.around.neighbors[partner] == 1) & (numbers[partner] != 8)
    bare: _Mask = (numbers[partner] == 6) | alone
    return bare


def _are_in_line(case: _Case, atoms: _Ints) -> _Mask:
    """Return which of these atoms with two neighbors lie on the line between them."""
    arms = case.positions[case.around.table[atoms, :2]] - case.positions[atoms][:, None]
    arms /= np.linalg.norm(arms, axis=2, keepdims=True)
    in_line: _Mask = np.einsum("ak,ak->a", arms[:, 0], arms[:, 1]) < _LINE
    return in_line


def _are_flat(case: _Case, atoms: _Ints) -> _Mask:
    """Return which of these atoms with three neighbors lie in the plane of them."""
    arms = case.positions[case.around.table[atoms, :3]] - case.positions[atoms][:, None]
    normals = np.cross(arms[:, 1] - arms[:, 0], arms[:, 2] - arms[:, 0])
    heights = np.einsum("ak,ak->a", arms[:, 0], normals)
    flat: _Mask = np.abs(heights) < _FLAT_CARBON * np.linalg.norm(normals, axis=1)
    return flat


def _find_stretched(case: _Case, unsaturated: _Mask) -> _Mask:
    """Return the unsaturated atoms that lack no hydrogen but have a long bond, bool [N].

    A carbon that has the shape of one with multiple bonds, but bonds that are too weak for that, explains itself and
    its unsaturated neighbors.
    """
    numbers, neighbors, bonds = case.numbers, case.around.neighbors, case.bonds
    weak = np.zeros(len(numbers), dtype=bool)
    for count, test in ((2, _are_in_line), (3, _are_flat)):
        atoms = np.flatnonzero((numbers == 6) & (neighbors == count) & (case.around.valences < _WEAK))
        weak[atoms[test(case, atoms)]] = True
    stretched: _Mask = unsaturated & weak & ((neighbors == 2) | (case.around.strongest > _DOUBLE))
    for one, other in ((bonds.first, bonds.second), (bonds.second, bonds.first)):
        pairs = unsaturated[one] & weak[other]
        stretched[one[pairs]] = True
        stretched[other[pairs]] |= unsaturated[other[pairs]]
    return stretched


def _find_torn(case: _Case, unsaturated: _Mask) -> _Finds:
    """Return bonds stretched too far to be found as such.

    A hydrogen without a bond belongs to an atom near it, an unsaturated atom to one of another fragment, and two
    unsaturated atoms belong together where they are closer than atoms without a bond come.
    """
    around, bonds = case.around, case.bonds
    first, second = around.first, around.second
    lone = (case.numbers == 1) & (around.neighbors == 0)
    hydrogens = np.where(case.numbers[first] == 1, 1, 0) + (case.numbers[second] == 1)
    fragments = label_fragments(len(case.numbers), bonds.first, bonds.second)
    apart = fragments[first] != fragments[second]
    close = around.lengths < _least_contacts(case)
    one, two = unsaturated[first], unsaturated[second]
    torn: _Mask = np.where(hydrogens == 1, lone[first] | lone[second], (one | two) & apart | one & two & close)
    torn &= around.lengths < _TORN * (COVALENT_RADII[case.numbers[first]] + COVALENT_RADII[case.numbers[second]])
    least, most = _usual_lengths(case.limits, around.pairs)
    chosen = _keep_nearest(np.flatnonzero(torn), np.where(lone[first], first, second), hydrogens == 1, around.lengths)
    lengths, least, most = around.lengths[chosen], least[chosen], most[chosen]
    return _Finds(first[chosen], second[chosen], lengths, lengths - most, _BOND_RULE, least, most)


def _keep_nearest(pairs: _Ints, hydrogens: _Ints, mixed: _Mask, lengths: _Floats) -> _Ints:
    """Return the pairs without those in which a hydrogen has a nearer partner."""
    own = pairs[mixed[pairs]]
    order = own[np.lexsort((lengths[own], hydrogens[own]))]
    nearest = order[np.unique(hydrogens[order], return_index=True)[1]]
    return np.sort(np.concatenate([pairs[~mixed[pairs]], nearest]))


def _find_strain(case: _Case, stretched: _Mask, torn: _Finds) -> dict[int, str]:
    """Return what to say about molecules with odd bond lengths, angles or valences."""
    around, bonds = case.around, case.bonds
    least, most = _usual_lengths(case.limits, around.bond_pairs)
    excess = np.maximum(least - bonds.lengths, bonds.lengths - most)
    found = _Finds(bonds.first, bonds.second, bonds.lengths, excess, _BOND_RULE, least, most)
    odd = (excess > _LENGTH_MARGIN) & (bonds.lengths > _COLLAPSED * least)
    least = _least_contacts(case)
    bent = around.angles & (around.lengths < least) & ~_among(case, torn)
    angles = _Finds(
        *(around.first, around.second, around.lengths, least - around.lengths),
        *(_ANGLE_RULE, least + _CONTACT_MARGIN, least),
    )
    texts = _describe_valences(case, stretched)
    return (
        texts
        | _describe_pairs(case, angles.select(bent))
        | _describe_pairs(case, found.select(odd))
        | _describe_pairs(case, torn.select(torn.excess > 0))
    )


def _find_contacts(case: _Case, torn: _Finds) -> dict[int, str]:
    """Return what to say about molecules with atoms that are too close, or have too many neighbors."""
    around, bonds = case.around, case.bonds
    least, most = _usual_lengths(case.limits, around.bond_pairs)
    collapsed = _Finds(bonds.first, bonds.second, bonds.lengths, least - bonds.lengths, _BOND_RULE, least, most).select(
        bonds.lengths <= _COLLAPSED * least
    )
    least = _least_contacts(case)
    lone = (case.numbers == 1) & (around.neighbors == 0)
    near: _Mask = (
        ~around.angles & (around.lengths < least) & ~_among(case, torn) & ~lone[around.first] & ~lone[around.second]
    )
    contacts = _Finds(
        *(around.first, around.second, around.lengths, least - around.lengths),
        *(_CONTACT_RULE, least + _CONTACT_MARGIN, least),
    ).select(near)
    crowded = np.flatnonzero(around.neighbors > _MOST[ROWS[case.numbers]])
    texts = {
        int(case.molecules[atom]): f"{case.name(atom)} has {around.neighbors[atom]} neighbors at the distance of bonds."
        for atom in crowded[::-1].tolist()
    }
    return texts | _describe_pairs(case, contacts) | _describe_pairs(case, collapsed)


def _find_flat(case: _Case, unsaturated: _Mask, torn: _Finds, doubtful: _Mask) -> dict[int, str]:
    """Return what to say about molecules that lie in a plane although they cannot, or with the bonds of a drawing.

    Benzene without its hydrogens may lie in a plane, and so may butane; cyclohexane without them is a drawing by its
    equal bonds.

    Args:
        case: Molecules.
        unsaturated: Atoms that lack hydrogens [N].
        torn: Bonds that are too long to be bonds.
        doubtful: Molecules that are odd in another way [M].
    """
    neighbors = case.around.neighbors + np.bincount(
        np.concatenate([torn.first, torn.second]), minlength=len(case.numbers)
    )
    lacking = np.where(unsaturated & (case.numbers == 6), np.round(4.0 - case.around.valences), 0.0)
    spatial = (case.numbers > 1) & (neighbors >= 3) & (neighbors + lacking >= 4)
    saturated = case.count((case.numbers == 6) & (neighbors + lacking >= 4)) > 0
    lengths = _find_equal(case, torn, saturated) * doubtful
    least, _ = _usual_lengths(case.limits, case.around.bond_pairs)
    short = case.count(case.bonds.first[case.bonds.lengths < least - _LENGTH_MARGIN])
    shrunk = (short > 0) & (2 * short >= case.count(case.bonds.first))
    flat = _lie_in_plane(case.positions, case.offsets) & ((case.count(spatial) > 0) | (lengths > 0) | shrunk)
    texts = {}
    for molecule in np.flatnonzero(flat).tolist():
        atoms = np.arange(case.offsets[molecule], case.offsets[molecule + 1])
        if spatial[atoms].any():
            atom = int(atoms[spatial[atoms]][0])
            reason = f"{case.name(atom)} {'has' if neighbors[atom] > 3 else 'should have'} four neighbors or more"
        else:
            reason = (
                f"all bonds are {lengths[molecule]:.2f} Å long" if lengths[molecule] else "most bonds are too short"
            )
        texts[molecule] = f"All atoms lie in one plane, yet {reason}; is this a 2D drawing?"
    return texts


def _find_equal(case: _Case, torn: _Finds, saturated: _Mask) -> _Floats:
    """Return the one length in Å of all bonds of a molecule, where they are of two kinds or it is saturated; else 0."""
    bonds, numbers, count = case.bonds, case.numbers, len(case.offsets) - 1
    first, second = np.concatenate([bonds.first, torn.first]), np.concatenate([bonds.second, torn.second])
    lengths = np.concatenate([bonds.lengths, torn.lengths])
    kinds = PAIRS[ROWS[numbers[first]], ROWS[numbers[second]]].astype(np.float64)
    owners = case.molecules[first]
    ranges = []
    for values in (lengths, kinds):
        least, most = np.full(count, np.inf), np.full(count, -np.inf)
        np.minimum.at(least, owners, values)
        np.maximum.at(most, owners, values)
        ranges.append((least, most))
    (shortest, longest), (low, high) = ranges
    several = np.bincount(owners, minlength=count) >= _FEWEST_EQUAL
    equal = several & (longest - np.where(several, shortest, 0.0) < _EQUAL) & ((low < high) | saturated)
    return np.where(equal, longest, 0.0)


def _lie_in_plane(positions: _Floats, offsets: _Ints) -> _Mask:
    """Return which molecules of four or more atoms lie in a plane, bool [M]."""
    counts = np.diff(offsets)
    large = counts >= _FEWEST_FLAT
    flat = np.zeros(len(counts), dtype=bool)
    if not large.any():
        return flat
    starts, sizes = offsets[:-1], np.maximum(counts, 1)[:, None]
    centered = positions - np.repeat(np.add.reduceat(positions, starts) / sizes, counts, axis=0)
    products = np.add.reduceat(centered[:, :, None] * centered[:, None, :], starts)
    smallest = np.linalg.eigvalsh(products / sizes[:, :, None])[:, 0]
    return large & (smallest < _FLAT**2)


def _describe_unsaturated(case: _Case, unsaturated: _Mask) -> dict[int, str]:
    texts = {}
    atoms = np.flatnonzero(unsaturated)
    for molecule in np.unique(case.molecules[atoms]).tolist():
        names = [case.name(atom) for atom in atoms[case.molecules[atoms] == molecule].tolist()]
        texts[molecule] = f"Too few bonds: {_list_names(names)}; are hydrogen atoms missing?"
    return texts


def _list_names(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _describe_fragments(case: _Case, fragments: _Ints) -> dict[int, str]:
    roots = np.flatnonzero(fragments == np.arange(len(fragments)))
    counts = case.count(roots)
    texts = {}
    for molecule in np.flatnonzero(counts > 1).tolist():
        names = [case.name(atom) for atom in roots[case.molecules[roots] == molecule].tolist()]
        texts[molecule] = f"{len(names)} fragments that no bond connects; they begin at {_list_names(names)}."
    return texts


def _describe_valences(case: _Case, stretched: _Mask) -> dict[int, str]:
    """Return what to say about molecules with atoms whose bonds are odd in sum only."""
    neighbors, valences = case.around.neighbors, case.around.valences
    rows = ROWS[case.numbers]
    places = (rows, np.minimum(neighbors, MOST_NEIGHBORS))
    least, most = (case.limits.valences[..., k][places] for k in (0, 1))
    excess = valences - np.fmax(most, _HIGHEST_VALENCES[rows]) - _VALENCE_MARGIN
    lack = np.where((neighbors >= _FULL[rows]) & np.isfinite(least), least - _VALENCE_MARGIN - valences, -1.0)
    odd = np.flatnonzero(((excess > 0) | (lack > 0)) & (neighbors <= _MOST[rows]) | stretched)
    return {
        int(case.molecules[atom]): f"The bonds of {case.name(atom)} are too {'short' if excess[atom] > 0 else 'long'}."
        for atom in odd[::-1].tolist()
    }


def _describe_pairs(case: _Case, finds: _Finds) -> dict[int, str]:
    """Return for each molecule a sentence about the oddest of its pairs."""
    owners = case.molecules[finds.first]
    order = np.lexsort((-finds.excess, owners))
    texts = {}
    for k in order[np.unique(owners[order], return_index=True)[1]].tolist():
        names = [case.name(int(atoms[k])) for atoms in (finds.first, finds.second)]
        rule = finds.rule.format(least=finds.least[k], most=finds.most[k])
        texts[int(owners[k])] = f"{names[0]} and {names[1]} are {finds.lengths[k]:.2f} Å apart; {rule}."
    return texts


def _usual_lengths(limits: Limits, pairs: _Ints) -> tuple[_Floats, _Floats]:
    """Return the least and largest usual length in Å of bonds by their pairs of elements."""
    usual = np.where(np.isnan(limits.lengths), SINGLE_BONDS[:, None] * _UNKNOWN_LENGTHS, limits.lengths)
    return usual[pairs, 0], usual[pairs, 1]


def _least_contacts(case: _Case) -> _Floats:
    """Return how close in Å each near pair may be without a bond [Q]."""
    around = case.around
    radii = COVALENT_RADII[case.numbers[around.first]] + COVALENT_RADII[case.numbers[around.second]]
    learned = case.limits.contacts[around.pairs, np.where(around.angles, 0, 1)] - _CONTACT_MARGIN
    unknown = np.where(around.angles, 0.0, _UNKNOWN_CONTACT * radii)
    return np.where(np.isnan(learned), unknown, learned)


def _among(case: _Case, torn: _Finds) -> _Mask:
    """Return which near pairs are torn bonds, bool [Q]."""
    size = len(case.numbers)
    found: _Mask = np.isin(case.around.first * size + case.around.second, torn.first * size + torn.second)
    return found
