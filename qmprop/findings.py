"""What the errors of single molecules tell: by size, by element, by predicted width, and which are the worst."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from qmprop.targets import DEFAULT_KEYS, ELEMENTS

if TYPE_CHECKING:
    from qmprop.evaluation import Details

Array = NDArray[np.float64]

#: A mean over fewer molecules says little.
ENOUGH: Final = 20
_BINS: Final = 10
_LEVELS: Final = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
_SYMBOLS: Final = tuple(ELEMENTS.values())  # the columns of `Details.counts`


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Some of the molecules.

    Attributes:
        name: What they have in common.
        rows: Which they are, bool [M].
    """

    name: str
    rows: NDArray[np.bool_]

    def __len__(self) -> int:
        """Return how many they are."""
        return int(self.rows.sum())


@dataclass(frozen=True, slots=True)
class Miss:
    """A molecule and the property that is most wrong about it.

    Attributes:
        row: Which molecule.
        column: Which property of `DEFAULT_KEYS`.
        ratio: Its absolute error, relative to the mean absolute error of the property.
    """

    row: int
    column: int
    ratio: float


def find_errors(details: Details) -> Array:
    """Return prediction minus reference in default units [M, 12]; NaN where there is no label."""
    return np.asarray(details.predictions - details.references, dtype=np.float64)


def group_by_size(details: Details) -> list[Group]:
    """Return the molecules by number of heavy atoms; neighboring numbers together until there are `ENOUGH`."""
    heavy = details.counts[:, 1:].sum(axis=1)
    found: list[tuple[int, int, int]] = []
    for size, count in zip(*map(np.ndarray.tolist, np.unique(heavy, return_counts=True)), strict=True):
        if found and found[-1][2] < ENOUGH:
            first, _, known = found.pop()
            found.append((first, size, known + count))
        else:
            found.append((size, size, count))
    if len(found) > 1 and found[-1][2] < ENOUGH:
        (first, _, _), (_, last, _) = found[-2:]
        found[-2:] = [(first, last, 0)]
    return [
        Group(str(low) if low == high else f"{low}–{high}", (heavy >= low) & (heavy <= high)) for low, high, _ in found
    ]


def group_by_element(details: Details) -> list[Group]:
    """Return the molecules that hold each element besides C and H, and those of C and H alone; `ENOUGH` of each."""
    holds = details.counts > 0
    groups = [Group("C and H only", np.logical_not(holds[:, 2:].any(axis=1)))]
    groups += [Group(f"with {symbol}", holds[:, k]) for k, symbol in enumerate(_SYMBOLS) if symbol not in ("H", "C")]
    return [group for group in groups if len(group) >= ENOUGH]


def compare_groups(details: Details, groups: Sequence[Group]) -> Array:
    """Return the mean absolute error of each group relative to that of all molecules [groups, 12]."""
    errors = np.abs(find_errors(details))
    means: Array = np.array([_mean(errors[group.rows]) for group in groups]).reshape(-1, len(DEFAULT_KEYS))
    return np.asarray(means / _mean(errors))


def find_coverage(details: Details, groups: Sequence[Group]) -> Array:
    """Return the share of references inside their intervals, of all properties of each group, in per cent [groups]."""
    known, inside = _covered(details)
    return np.array([_share(inside[group.rows], known[group.rows]) for group in groups])


def find_calibration(details: Details) -> tuple[Array, Array]:
    """Return levels and the share of references inside the intervals of each, of all properties; in per cent [L]."""
    found = np.zeros(0) if details.levels is None else details.levels[np.isfinite(details.levels)]
    levels = np.array(_LEVELS)
    return 100.0 * levels, 100.0 * np.array([(found <= level).mean() if len(found) else np.nan for level in levels])


def bin_by_width(details: Details) -> tuple[Array, Array, Array]:
    """Sort every property's molecules by the width of their intervals into equally full bins.

    Returns:
        For each bin, narrow to wide, over all properties: the mean half-width and the mean absolute error, relative to
        their mean over the molecules, and the share of references inside their intervals in per cent; each [bins].
    """
    known, inside = _covered(details)
    count = int(np.clip(known.sum(axis=0).max(initial=0) // ENOUGH, 1, _BINS))
    widths = np.where(known, _half_widths(details), np.nan)
    errors = np.where(known, np.abs(find_errors(details)), np.nan)
    bins = np.full(known.shape, -1)
    for column in np.flatnonzero(known.sum(axis=0) >= count):
        order = np.argsort(widths[:, column], kind="stable")[: known[:, column].sum()]
        bins[order, column] = np.arange(len(order)) * count // len(order)
    relative = [values / _mean(values) for values in (widths, errors)]
    means = [np.array([_mean(part[bins == k]) for k in range(count)]) for part in relative]
    return means[0], means[1], np.array([_share(inside[bins == k], known[bins == k]) for k in range(count)])


def find_worst(details: Details, count: int) -> list[Miss]:
    """Return the molecules with the largest errors relative to those of the property, the worst first."""
    errors = np.abs(find_errors(details))
    ratios = np.nan_to_num(errors / _mean(errors), nan=-1.0, posinf=np.inf)
    columns = ratios.argmax(axis=1)
    worst = ratios[np.arange(len(ratios)), columns]
    chosen = [int(row) for row in np.argsort(-worst, kind="stable")[:count] if worst[row] >= 0.0]
    return [Miss(row, int(columns[row]), float(worst[row])) for row in chosen]


def compare_outside(details: Details) -> float | None:
    """Return how many times as large errors outside the domain are as inside; None where either are too few to tell."""
    if details.outside is None or min(details.outside.sum(), (~details.outside).sum()) < ENOUGH:
        return None
    errors = np.abs(find_errors(details))
    ratios = _mean(errors[details.outside]) / _mean(errors[~details.outside])
    known = ratios[np.isfinite(ratios)]
    return float(np.median(known)) if len(known) else None


def write_formula(counts: NDArray[Any]) -> str:
    """Return the formula of atoms of H, C, N, O, F [5] in Hill's order, with subscripts."""
    numbers = dict(zip(_SYMBOLS, map(int, counts), strict=True))
    order = ("C", "H", "F", "N", "O") if numbers["C"] else ("F", "H", "N", "O")
    text = "".join(f"{symbol}{numbers[symbol]}" for symbol in order if numbers[symbol])
    text = re.sub(r"(?<=[A-Z])1(?!\d)", "", text)
    return text.translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))


def _half_widths(details: Details) -> Array:
    if details.half_widths is None:
        return np.full(details.predictions.shape, np.nan)
    return np.asarray(details.half_widths, dtype=np.float64)


def _covered(details: Details) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return where there are both a label and an interval [M, 12], and where the one lies inside the other."""
    errors, widths = find_errors(details), _half_widths(details)
    known = np.isfinite(errors) & np.isfinite(widths)
    return known, known & (np.abs(errors) <= widths)


def _share(inside: NDArray[np.bool_], known: NDArray[np.bool_]) -> float:
    return 100.0 * float(inside.sum()) / float(known.sum()) if known.any() else float("nan")


def _mean(values: Array) -> Any:
    """Return the mean over the first axis of the numbers that are finite; NaN where there are none or all are zero."""
    known = np.isfinite(values)
    counts = known.sum(axis=0)
    means = np.where(known, values, 0.0).sum(axis=0) / np.where(counts > 0, counts, 1)
    return np.where((counts > 0) & (means != 0.0), means, np.nan)
