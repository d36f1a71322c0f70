"""Fixtures that several test files share."""

from __future__ import annotations

import pytest
from samples import make_model, read_molecules

from qmprop import qm9
from qmprop.config import ModelConfig
from qmprop.datasets import Dataset
from qmprop.model import Model
from qmprop.molecule import Molecule


@pytest.fixture(scope="session")
def full() -> Dataset:
    """All of QM9."""
    return qm9.load_qm9()


@pytest.fixture(scope="session")
def molecules() -> list[Molecule]:
    """Twenty molecules of QM9."""
    return read_molecules()


@pytest.fixture(scope="session")
def random_model() -> Model:
    """A model of the shipped size with random weights."""
    return make_model(ModelConfig())
