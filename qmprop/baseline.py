"""What physics and composition explain before the network: fitted on the training split, removed, restored, in float64.

Removed are, per property, a linear function of the element counts (and a constant where the property does not add up
over fragments; of the shares of the elements where it does not grow with the molecule) and, for R2, the second moment
of the nuclear charges. What is left is divided by its spread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from qmprop.egnn import LATENTS
from qmprop.targets import (
    ATOM_ENERGIES_HARTREE,
    ATOMIC_MASSES,
    BOHR_ANGSTROM,
    DEFAULT_KEYS,
    ELEMENTS,
    HARTREE_EV,
    RT_EV,
)

Array = NDArray[np.float64]

#: Latents whose linear function has no constant, so that far-apart fragments add up exactly.
_ADDITIVE: Final = ("alpha", "r2", "zpve", "u0")
#: Latents that do not grow with the molecule: a linear function of the shares of the elements.
_INTENSIVE: Final = ("homo", "lumo")
#: Smallest values (default units) below which a positive quantity bends towards zero instead of crossing it.
_SOFTNESS: Final = {"alpha": 0.05, "r2": 0.5, "zpve": 0.005, "thermal": 0.002, "entropy": 0.01, "cv": 0.05, "gap": 0.02}
_ROW: Final = {key: row for row, key in enumerate(LATENTS)}


@dataclass(frozen=True, slots=True, eq=False)
class Composition:
    """What the baseline needs to know of M molecules.

    Attributes:
        counts: Atoms of H, C, N, O, F and a column of ones [M, 6].
        nuclear_r2: sum_i Z_i |r_i - c|^2 about the center of mass c, in a0^2 [M].
    """

    counts: Array
    nuclear_r2: Array

    @property
    def shares(self) -> Array:
        """Share of each element among the atoms, and a column of zeros [M, 6]."""
        elements = self.counts[:, :-1]
        shares = elements / elements.sum(axis=1, keepdims=True)
        return np.concatenate([shares, np.zeros((len(shares), 1))], axis=1)


def center(numbers: NDArray[np.integer], positions: NDArray[np.floating], offsets: NDArray[np.int64]) -> Array:
    """Move every molecule's center of mass, about which QM9 gives R2, to the origin.

    Args:
        numbers: Atomic numbers [N].
        positions: In Å [N, 3].
        offsets: Molecule k owns the atoms offsets[k]:offsets[k + 1] [M + 1].

    Returns:
        Positions in Å, float64 [N, 3].
    """
    weights = np.zeros(max(ATOMIC_MASSES) + 1)
    weights[list(ATOMIC_MASSES)] = list(ATOMIC_MASSES.values())
    mass = weights[numbers]
    moved = np.asarray(positions, dtype=np.float64)
    centers = np.add.reduceat(mass[:, None] * moved, offsets[:-1]) / np.add.reduceat(mass, offsets[:-1])[:, None]
    return moved - np.repeat(centers, np.diff(offsets), axis=0)


def compose(numbers: NDArray[np.integer], centered: Array, offsets: NDArray[np.int64]) -> Composition:
    """Count elements and sum the nuclear second moment; arguments as for `center`, positions after it."""
    starts = offsets[:-1]
    counts = [np.add.reduceat((numbers == z).astype(np.float64), starts) for z in ELEMENTS]
    squares = np.square(centered).sum(axis=1) / BOHR_ANGSTROM**2
    return Composition(np.stack([*counts, np.ones(len(starts))], axis=1), np.add.reduceat(numbers * squares, starts))


@dataclass(frozen=True, slots=True, eq=False)
class Baseline:
    """The fitted baseline.

    Attributes:
        coefficients: Per latent, default units per atom of H, C, N, O, F and the constant; per share of
            H, C, N, O, F for HOMO and LUMO [10, 6].
        scales: Spread of what the linear function leaves, per latent, default units [10].
    """

    coefficients: Array
    scales: Array

    @classmethod
    def fit(cls, targets: Array, composition: Composition) -> Baseline:
        """Fit by least squares.

        Args:
            targets: The twelve properties in default units [M, 12].
            composition: Of the same molecules.
        """
        latents = _latents(targets, composition)
        coefficients = np.zeros((len(LATENTS), composition.counts.shape[1]))
        for key, row in _ROW.items():
            if key != "mu":  # composition says little about a dipole moment, and zero must stay zero
                columns = slice(None, -1) if key in (*_ADDITIVE, *_INTENSIVE) else slice(None)
                known = composition.shares if key in _INTENSIVE else composition.counts
                coefficients[row, columns] = np.linalg.lstsq(known[:, columns], latents[:, row], rcond=None)[0]
        rest = latents - _explain(coefficients, composition)
        scales = rest.std(axis=0)
        return cls(coefficients, np.where(scales > 0.0, scales, 1.0))

    def remove(self, targets: Array, composition: Composition) -> Array:
        """Return what the network has to learn: the twelve properties [M, 12] to normalized latents [M, 10]."""
        rest = _latents(targets, composition) - _explain(self.coefficients, composition)
        return rest / self.scales

    def restore(self, outputs: Array, composition: Composition) -> Array:
        """Return the twelve properties.

        By construction gap = LUMO - HOMO, H = U + RT, U0 < U < H and G < H, and alpha, gap, R2, ZPVE and Cv are
        positive.

        Args:
            outputs: Normalized latents, as `forward` gives them [M, 10].
            composition: Of the same molecules.

        Returns:
            Properties in default units, in the order of `DEFAULT_KEYS` [M, 12].
        """
        latents = outputs * self.scales + _explain(self.coefficients, composition)
        y = {key: latents[:, row] for key, row in _ROW.items()}
        gap = _positive(y["lumo"] - y["homo"], "gap")
        u = y["u0"] + _positive(y["thermal"], "thermal")
        h = u + RT_EV
        values = {
            "mu": np.abs(y["mu"]),
            "alpha": _positive(y["alpha"], "alpha"),
            "homo": y["homo"],
            "lumo": y["homo"] + gap,
            "gap": gap,
            "r2": _positive(y["r2"] + composition.nuclear_r2, "r2"),
            "zpve": _positive(y["zpve"], "zpve"),
            "u0": y["u0"],
            "u": u,
            "h": h,
            "g": h - _positive(y["entropy"], "entropy"),
            "cv": _positive(y["cv"], "cv"),
        }
        return np.stack([values[key] for key in DEFAULT_KEYS], axis=1)


def atomization(key: str, total: Array, composition: Composition) -> Array:
    """Return the atomization part of a total energy: the total minus QM9's free atoms, in eV [M].

    Args:
        key: "u0", "u", "h" or "g".
        total: Total energies in eV [M].
        composition: Of the same molecules.
    """
    free_atoms = np.array([ATOM_ENERGIES_HARTREE[key][z] for z in ELEMENTS]) * HARTREE_EV
    return total - composition.counts[:, :-1] @ free_atoms


def _explain(coefficients: Array, composition: Composition) -> Array:
    """Return what the composition explains of each latent [M, 10]."""
    explained: Array = composition.counts @ coefficients.T
    rows = [_ROW[key] for key in _INTENSIVE]
    explained[:, rows] = composition.shares @ coefficients[rows].T
    return explained


def _latents(targets: Array, composition: Composition) -> Array:
    y = dict(zip(DEFAULT_KEYS, targets.T, strict=True))
    values = {key: y[key] for key in ("mu", "alpha", "homo", "lumo", "zpve", "u0", "cv")}
    values["r2"] = y["r2"] - composition.nuclear_r2
    values["thermal"] = y["u"] - y["u0"]
    values["entropy"] = y["h"] - y["g"]
    return np.stack([values[key] for key in LATENTS], axis=1)


def _positive(values: Array, key: str) -> Array:
    """Softplus with a knee of `_SOFTNESS`: the identity, to float64's last digit, for values well above it."""
    softness = _SOFTNESS[key]
    return softness * np.logaddexp(0.0, values / softness)
