"""Muon: momentum whose every step of a matrix is made orthogonal.

K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024), with steps scaled to the size of
AdamW's (J. Liu et al., "Muon is scalable for LLM training", 2025). PyTorch's own does the products in bfloat16, which
takes many times as long on a CPU that has no instructions for it, and one polynomial five times, which leaves more
singular values small: how many, decides how much a run learns. Here a GPU multiplies by other polynomials, and a CPU
solves equations, which takes it less time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Final

import torch
from torch import Tensor, nn

#: Coefficients of the odd polynomials a x + b x^3 + c x^5 that, one after the other, bring singular values from 0.0008
#: to 1 as near to 1 as five can: within 0.2. Each is the best for what the one before leaves, and all but the last
#: forgive a value that is 1 % too large, as rounding leaves it (N. Amsel et al., "The Polar Express: optimal matrix
#: sign methods and their application to the Muon algorithm", 2025).
_COEFFICIENTS: Final = (
    (8.3951, -24.4032, 17.7513),
    (4.1559, -3.0271, 0.5535),
    (3.9769, -2.9047, 0.5398),
    (3.3964, -2.4958, 0.4942),
    (2.4071, -1.7629, 0.4290),
)
#: Singular values, in the largest, from which the rational functions bring all near to 1, and how many they are.
_LEAST: Final = 4e-4
_SOLUTIONS: Final = 2
_SMALL: Final = 1e-7


class Muon(torch.optim.Optimizer):
    """Optimizer of matrices, those of a shape at once.

    Args:
        parameters: Matrices. One that has a gradient in one step has one in all.
        lr: Learning rate; the root mean square of a step's entries is about 0.2 of it.
        weight_decay: Decoupled weight decay.
        momentum: Decay of the moving average of gradients, which Nesterov's step runs ahead of.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95
    ) -> None:
        groups = [{"params": alike} for alike in group_by_shape(parameters)]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step with the gradients at hand."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:  # one for each shape: as few calls as there can be
            matrices = [matrix for matrix in group["params"] if matrix.grad is not None]
            if not matrices:
                continue
            gradients = torch.stack([matrix.grad for matrix in matrices])
            state = self.state[matrices[0]]  # holds the momentum of all
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(gradients)
            state["momentum"].lerp_(gradients, 1.0 - group["momentum"])
            steps = orthogonalize(gradients.lerp_(state["momentum"], group["momentum"]))
            size = 0.2 * max(steps.shape[1:]) ** 0.5
            torch._foreach_mul_(matrices, 1.0 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(matrices, steps.unbind(), alpha=-group["lr"] * size)
        return loss


def group_by_shape(matrices: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Return matrices in lists of those that have the same shape."""
    groups: dict[torch.Size, list[nn.Parameter]] = {}
    for matrix in matrices:
        groups.setdefault(matrix.shape, []).append(matrix)
    return list(groups.values())


def orthogonalize(matrices: Tensor) -> Tensor:
    """Return about U V^T of matrices U S V^T: singular values, if not tiny, come out between 0.8 and 1.2.

    Args:
        matrices: Matrices of one shape [k, m, n].

    Returns:
        The same of each [k, m, n].
    """
    x = matrices.mT if (tall := matrices.shape[1] > matrices.shape[2]) else matrices
    x = multiply(x.bfloat16()) if x.is_cuda else solve(x.float())
    return (x.mT if tall else x).to(matrices.dtype)


def multiply(matrices: Tensor) -> Tensor:
    """Return about U V^T of matrices U S V^T by products alone.

    Newton-Schulz iteration X <- a X + (b A + c A A) X with A = X X^T. It begins with the matrix over the root of order
    eight of the sum of s^8, which no singular value s exceeds, nor is the largest of them far below: the fourth root of
    the norm of A A.

    Args:
        matrices: Matrices of one shape [k, m, n], m <= n.

    Returns:
        The same of each, with singular values between 0.8 and 1.2 where they are not below 0.001 of the largest
        [k, m, n].
    """
    x = (matrices / _norm(matrices)).contiguous()
    other = torch.empty_like(x)
    squares, factors = (x.new_empty(x.shape[0], x.shape[1], x.shape[1]) for _ in range(2))
    for number, (a, b, c) in enumerate(_COEFFICIENTS):
        torch.bmm(x, x.mT, out=squares)
        if number == 0:
            torch.bmm(squares, squares, out=factors)
            largest = _norm(factors) ** 0.25
            x.div_(largest)
            squares.div_(largest**2)
            factors.mul_(c / largest**4).add_(squares, alpha=b)
        else:
            torch.baddbmm(squares, squares, squares, beta=b, alpha=c, out=factors)
        factors.diagonal(dim1=1, dim2=2).add_(a)
        torch.bmm(factors, x, out=other)
        x, other = other, x
    return x


def solve(matrices: Tensor) -> Tensor:
    """Return about U V^T of matrices U S V^T by systems of equations.

    Dynamically weighted Halley iteration X <- (b / c) X + (a - b / c) (1 + c X X^T)^-1 X (Y. Nakatsukasa, Z. Bai and
    F. Gygi, "Optimizing Halley's iteration for computing the matrix polar decomposition", 2010), by Cholesky
    factors. It begins with the matrix over the root of order four of the sum of s^4 of its singular values s.

    Args:
        matrices: Matrices of one shape [k, m, n], m <= n.

    Returns:
        The same of each, with singular values between 0.9 and 1 where they are not below 0.001 of the largest
        [k, m, n].
    """
    x = (matrices / _norm(matrices)).contiguous()
    solved = torch.empty_like(x)
    squares, lower = (x.new_empty(x.shape[0], x.shape[1], x.shape[1]) for _ in range(2))
    lower, failed = lower.mT, x.new_empty(x.shape[0], dtype=torch.int32)
    least = _LEAST
    for number in range(_SOLUTIONS):
        a, b, c, least = _weigh(least)
        torch.bmm(x, x.mT, out=squares)
        if number == 0:
            largest = _norm(squares) ** 0.5
            x.div_(largest)
            squares.div_(largest**2)
        squares.mul_(c).diagonal(dim1=1, dim2=2).add_(1.0)
        torch.linalg.cholesky_ex(squares, out=(lower, failed))
        # from the right, as that is the order in which rows lie in memory
        torch.linalg.solve_triangular(lower.mT, x.mT, upper=True, left=False, out=solved.mT)
        torch.linalg.solve_triangular(lower, solved.mT, upper=False, left=False, out=solved.mT)
        x.mul_(b / c).add_(solved, alpha=a - b / c)
    return x


@functools.cache
def _weigh(least: float) -> tuple[float, float, float, float]:
    """Return a, b, c of what brings x from `least` to 1 nearest to 1, x (a + b x^2) / (1 + c x^2), and its least.

    The closed form is that of Nakatsukasa, Bai and Gygi.
    """
    d = (4.0 * (1.0 - least**2) / least**4) ** (1.0 / 3.0)
    root = math.sqrt(1.0 + d)
    a = root + 0.5 * math.sqrt(8.0 - 4.0 * d + 8.0 * (2.0 - least**2) / (least**2 * root))
    b = (a - 1.0) ** 2 / 4.0
    c = a + b - 1.0
    return a, b, c, least * (a + b * least**2) / (1.0 + c * least**2)


def _norm(matrices: Tensor) -> Tensor:
    """Return the root of the sum of squares of each matrix, never quite zero [k, 1, 1]."""
    norms: Tensor = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True)
    return norms.clamp(min=_SMALL)
