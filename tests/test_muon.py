"""Steps of a matrix that are orthogonal, of the size of AdamW's."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from qmprop.muon import Muon, multiply, orthogonalize, solve


@pytest.mark.parametrize("shape", [(64, 192), (192, 64), (48, 48)])
def test_orthogonal_part_keeps_singular_vectors(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    found = orthogonalize(matrix[None])[0]
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.3
    assert values.max() < 1.25
    # U S' V^T commutes with U S V^T: their product is symmetric.
    product = found @ matrix.T
    torch.testing.assert_close(product, product.T, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(orthogonalize(1e-4 * matrix[None])[0], found, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("count", [1, 2, 40])
@pytest.mark.parametrize("smallest", [1.0, 0.1, 0.0015])
@pytest.mark.parametrize(("call", "least", "most"), [(multiply, 0.79, 1.21), (solve, 0.92, 1.01)])
def test_singular_values_come_out_near_one(
    call: Callable[[torch.Tensor], torch.Tensor], least: float, most: float, smallest: float, count: int
) -> None:
    """However many of them are as large as the largest."""
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(64, 64))[0] for _ in range(2))
    values = torch.cat([torch.ones(count), torch.logspace(0.0, math.log10(smallest), 64 - count)])
    found = torch.linalg.svdvals(call(7.0 * (left @ torch.diag(values) @ right)[None])[0])
    assert found.min() > least
    assert found.max() < most


@pytest.mark.parametrize("call", [multiply, solve])
@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 64, 192)])
def test_nothing_and_one_direction_are_no_trouble(
    call: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...]
) -> None:
    assert bool((call(torch.zeros(shape)) == 0.0).all())
    torch.manual_seed(0)
    column, row = torch.randn(*shape[:2], 1), torch.randn(shape[0], 1, shape[2])
    unit = column * row / (column.norm(dim=1, keepdim=True) * row.norm(dim=2, keepdim=True))
    for size in (1e-12, 1.0, 1e12):
        found = call(size * column * row)
        assert bool(found.isfinite().all())
        if size > 1e-6:
            torch.testing.assert_close((found * unit).sum(dim=(1, 2)), torch.ones(shape[0]), atol=0.21, rtol=0.0)


def test_steps_go_where_those_of_pytorch_go() -> None:
    torch.manual_seed(0)
    own = nn.Parameter(torch.randn(32, 96))
    theirs = nn.Parameter(own.detach().clone())
    before = own.detach().clone()
    exact = before.clone()
    average = torch.zeros(32, 96)
    pairs = [(own, Muon([own], 1e-2, 0.1))]
    pairs += [(theirs, torch.optim.Muon([theirs], 1e-2, 0.1, adjust_lr_fn="match_rms_adamw"))]
    for _ in range(10):
        gradient = torch.randn(32, 96)
        average = average.lerp(gradient, 0.05)
        left, _, right = torch.linalg.svd(gradient.lerp(average, 0.95), full_matrices=False)
        exact = (1.0 - 1e-2 * 0.1) * exact - 1e-2 * 0.2 * 96**0.5 * left @ right
        for matrix, optimizer in pairs:
            matrix.grad = gradient.clone()
            optimizer.step()
    moved = (exact - before).norm()
    assert (own - exact).norm() < 0.15 * moved
    assert (own - exact).norm() < 0.6 * (theirs - exact).norm(), "which brings them between 0.7 and 1.2"


def test_root_mean_square_of_a_step_is_a_fifth_of_the_rate() -> None:
    torch.manual_seed(0)
    for shape in ((32, 64), (64, 32), (64, 64)):
        matrix = nn.Parameter(torch.zeros(shape))
        matrix.grad = torch.randn(shape)
        Muon([matrix], 1e-2, 0.0).step()
        assert float(matrix.square().mean().sqrt()) == pytest.approx(0.2e-2, rel=0.3)


def test_weight_decay_is_apart_from_the_gradient() -> None:
    matrix = nn.Parameter(torch.ones(16, 16))
    matrix.grad = torch.zeros(16, 16)
    Muon([matrix], 0.1, 0.5).step()
    torch.testing.assert_close(matrix.detach(), torch.full((16, 16), 0.95))


def test_matrices_without_gradient_stay() -> None:
    matrix = nn.Parameter(torch.ones(16, 16))
    Muon([matrix], 0.1, 0.5).step()
    assert bool((matrix == 1.0).all())


def test_it_finds_the_nearest_matrix() -> None:
    torch.manual_seed(0)
    wanted = torch.randn(24, 40)
    matrix = nn.Parameter(torch.zeros(24, 40))
    optimizer = Muon([matrix], 0.1, 0.0)
    steps = 400
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.1 * (1.0 - step / steps)
        optimizer.zero_grad()
        loss = (matrix - wanted).square().sum()
        loss.backward()
        optimizer.step(lambda: float((matrix - wanted).square().sum()))
    assert float((matrix - wanted).norm() / wanted.norm()) < 0.02


def test_matrices_of_a_shape_step_as_they_do_alone() -> None:
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in ((16, 32), (24, 24), (16, 32), (32, 16), (16, 32))]
    together, alone = ([nn.Parameter(matrix.clone()) for matrix in start] for _ in range(2))
    optimizers = [Muon(together, 1e-2, 0.1), *(Muon([matrix], 1e-2, 0.1) for matrix in alone)]
    for _ in range(3):
        for one, other in zip(together, alone, strict=True):
            one.grad = torch.randn(one.shape)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_state_goes_on_from_where_it_was_saved() -> None:
    torch.manual_seed(0)
    matrices, others = ([nn.Parameter(torch.zeros(16, 24)) for _ in range(2)] for _ in range(2))
    gradients = [torch.randn(2, 16, 24) for _ in range(4)]
    first, second = Muon(matrices, 1e-2, 0.0), Muon(others, 1e-2, 0.0)
    for number, gradient in enumerate(gradients):
        for matrix, one in zip(matrices, gradient, strict=True):
            matrix.grad = one.clone()
        first.step()
        if number == 1:
            second.load_state_dict(copy.deepcopy(first.state_dict()))
            for matrix, other in zip(matrices, others, strict=True):
                other.data.copy_(matrix.data)
        elif number > 1:
            for other, one in zip(others, gradient, strict=True):
                other.grad = one.clone()
            second.step()
    for matrix, other in zip(matrices, others, strict=True):
        torch.testing.assert_close(matrix, other)
