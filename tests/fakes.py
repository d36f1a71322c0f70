"""A model that answers at once, with numbers a test can predict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from qmprop.molecule import Molecule
from qmprop.targets import TARGETS


class FakeModel:
    """Answers (sum of atomic numbers) + (position of the property in the table) and remembers the batches."""

    id = "fake@00000000"

    def __init__(self, metadata: dict[str, Any] | None = None, device: str = "cpu") -> None:
        self.device = device
        self.metadata = metadata or {}
        self.extras: dict[str, np.ndarray] = {}
        self.batches: list[int] = []

    def run(self, numbers: np.ndarray, positions: np.ndarray, offsets: np.ndarray) -> FakeOutcome:
        self.batches.append(len(offsets) - 1)
        charge = np.add.reduceat(numbers, offsets[:-1]).astype(float)
        return FakeOutcome({key: charge + position for position, key in enumerate(TARGETS)}, np.zeros(positions.shape))


@dataclass
class FakeOutcome:
    values: dict[str, np.ndarray]
    moves: np.ndarray

    def properties(self) -> dict[str, np.ndarray]:
        return self.values


def water(*, x: float = 0.0, source: str = "-", index: int = 0, charge: int = 0) -> Molecule:
    """QM9's water, moved along x."""
    positions = np.array([[0.0, 0.0, 0.119], [0.0, 0.763, -0.477], [0.0, -0.763, -0.477]])
    return Molecule(np.array([8, 1, 1]), positions + [x, 0, 0], source=source, index=index, charge=charge)


WATER_XYZ = """3
water
O 0.0 0.0 0.119
H 0.0 0.763 -0.477
H 0.0 -0.763 -0.477
"""
SILANE_XYZ = """5
silane
Si 0.0 0.0 0.0
H 0.85 0.85 0.85
H -0.85 -0.85 0.85
H -0.85 0.85 -0.85
H 0.85 -0.85 -0.85
"""
