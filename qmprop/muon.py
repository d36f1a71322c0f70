"""Muon: momentum whose every step of a matrix is made orthogonal.

K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024), with steps scaled to the size of
AdamW's (J. Liu et al., "Muon is scalable for LLM training", 2025). PyTorch's own does the products in bfloat16, which
takes many times as long on a CPU that has no instructions for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

import torch
from torch import Tensor, nn

#: Coefficients of the odd polynomial a x + b x^3 + c x^5 that drives singular values towards 1, and its repetitions.
_COEFFICIENTS: Final = (3.4445, -4.7750, 2.0315)
_STEPS: Final = 5
_SMALL: Final = 1e-7


class Muon(torch.optim.Optimizer):
    """Optimizer of matrices.

    Args:
        parameters: Matrices.
        lr: Learning rate; the root mean square of a step's entries is about 0.2 of it.
        weight_decay: Decoupled weight decay.
        momentum: Decay of the moving average of gradients, which Nesterov's step runs ahead of.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step with the gradients at hand."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(matrix)
                average = state["momentum"].lerp_(matrix.grad, 1.0 - group["momentum"])
                ahead = matrix.grad.lerp(average, group["momentum"])
                size = 0.2 * max(matrix.shape) ** 0.5
                matrix.mul_(1.0 - group["lr"] * group["weight_decay"])
                matrix.add_(orthogonalize(ahead), alpha=-group["lr"] * size)
        return loss


def orthogonalize(matrix: Tensor) -> Tensor:
    """Return about U V^T of a matrix U S V^T: its singular values, if not tiny, come out between 0.7 and 1.2.

    Newton-Schulz iteration X <- a X + (b A + c A A) X with A = X X^T; in bfloat16 on a GPU, else in float32.
    """
    x = matrix.bfloat16() if matrix.is_cuda else matrix.float()
    if tall := x.shape[0] > x.shape[1]:
        x = x.T
    x = x / x.norm().clamp(min=_SMALL)
    a, b, c = _COEFFICIENTS
    for _ in range(_STEPS):
        squares = x @ x.T
        x = torch.addmm(x, torch.addmm(squares, squares, squares, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)
