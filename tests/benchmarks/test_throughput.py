"""Molecules a second, predicted and trained: recorded, not judged."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from samples import make_model, read_dataset, read_molecules

from qmprop import learning
from qmprop.config import ModelConfig, TrainConfig
from qmprop.molecule import Molecule
from qmprop.qm9 import split_other


@pytest.fixture(scope="module")
def many() -> list[Molecule]:
    return read_molecules() * 10


def test_predict(benchmark: BenchmarkFixture, many: list[Molecule]) -> None:
    model = make_model(ModelConfig())
    predictions = benchmark.pedantic(model.predict, args=(many,), rounds=5, warmup_rounds=1)
    benchmark.extra_info["molecules_per_second"] = len(many) / benchmark.stats.stats.median
    assert len(predictions["u0"]) == len(many)


def test_predict_one_molecule(benchmark: BenchmarkFixture, many: list[Molecule]) -> None:
    model = make_model(ModelConfig())
    predictions = benchmark.pedantic(model.predict, args=(many[-1:],), rounds=20, warmup_rounds=2)
    assert np.isfinite(predictions["u0"]).all()


def test_gradients(benchmark: BenchmarkFixture) -> None:
    """A training step but for the optimizer, on 64 molecules."""
    torch.set_flush_denormal(True)
    dataset = read_dataset().select(np.tile(np.arange(20), 5))
    module = learning.Learner(TrainConfig(), dataset, split_other(100))
    module._draw_geometries()
    loss, gradients = benchmark.pedantic(module._gradients, args=(np.arange(64),), rounds=5, warmup_rounds=1)
    module.pool.shutdown()
    benchmark.extra_info["molecules_per_second"] = 64 / benchmark.stats.stats.median
    assert torch.isfinite(loss)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
