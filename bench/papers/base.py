"""What the papers' compositions share: how they are called, and a few torch words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda z: z,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "leaky_relu": F.leaky_relu,
}


def wide(x: Tensor) -> Tensor:
    """x in the type its statistics are taken in: none of the papers' codes knows half precision,
    and moments of half-precision sums would be refused by the gate."""
    return x if x.dtype == torch.float64 else x.float()


def channels(vector: Tensor, x: Tensor) -> Tensor:
    """A vector (C,) or (N, C) shaped to broadcast over x (N, C, *)."""
    rows = 1 if vector.dim() == 1 else len(vector)
    return vector.view(rows, -1, *(1,) * (x.dim() - 2))


class Paper(nn.Module):
    """A norm called as ``module(x, *extras, residual)``; the residual may be left out.

    ``extras`` counts what the method needs beside x (see `fusednorm.bench.papers.EXTRAS`). The
    residual and the activation are separate ops after the norm, as in the networks of the papers.
    """

    extras = 0

    def __init__(self, act: str | None = None) -> None:
        super().__init__()
        self.act = ACTIVATIONS[act]

    def normalize(self, x: Tensor, *extras: Any) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        residual = rest[self.extras] if len(rest) > self.extras else None
        z = self.normalize(x, *rest[: self.extras])
        return self.act(z if residual is None else z + residual).to(x.dtype)


class RunningNorm(Paper):
    """BatchNorm's parameters and buffers under BatchNorm's names."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self, num_features: int, act: str | None, eps: float, momentum: float, num_cells: int = 0
    ) -> None:
        super().__init__(act)
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_cells or num_features))
        self.register_buffer("running_var", torch.ones(num_cells or num_features))

    @torch.no_grad()
    def update(self, mean: Tensor, unbiased_var: Tensor) -> None:
        self.running_mean.mul_(1 - self.momentum).add_(self.momentum * mean)
        self.running_var.mul_(1 - self.momentum).add_(self.momentum * unbiased_var)
