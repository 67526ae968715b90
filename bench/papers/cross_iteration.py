"""Cross-Iteration BN (Yao et al., arXiv 2002.05712) as it was published, costs and all.

Every training forward differentiates the batch's mean and mean square by the convolution's weight,
two weight gradients through autograd, and keeps both with a copy of the weight for the window's
length. Entries whose expanded variance is negative are dropped channel by channel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .base import RunningNorm, wide


class Entry(NamedTuple):
    """One past batch: moments (C,), and their gradients and the weight, of the weight's shape."""

    mean: Tensor
    mean_square: Tensor
    mean_grad: Tensor
    mean_square_grad: Tensor
    weight: Tensor


class CrossIterationBatchNorm(RunningNorm):
    """Called with y, the convolution's input and the convolution; y must be in its graph.

    Plain batch statistics, with the unbiased variance, where y requires no gradient and during
    `burn_in`. The history is a Python list, as published: no CUDA graph can rotate it.
    """

    extras = 2

    def __init__(
        self,
        num_features: int,
        act: str | None = None,
        eps: float = 1e-5,
        momentum: float = 0.1,
        window: int = 4,
        rho: float = 1.0,
        burn_in: int = 0,
        eps_outside: bool = False,
    ) -> None:
        super().__init__(num_features, act, eps, momentum)
        self.past, self.rho, self.burn_in = window - 1, rho, burn_in
        self.eps_outside = eps_outside
        self.iteration = 0
        self.history: list[Entry] = []

    def normalize(self, y: Tensor, conv_input: Tensor, conv: nn.Conv2d) -> Tensor:
        swapped = wide(y).transpose(0, 1)
        rows = swapped.contiguous().view(y.shape[1], -1)
        if self.training:
            self.iteration += 1
            active = self.past > 0 and self.iteration > self.burn_in and rows.requires_grad
            mean, var = rows.mean(1), rows.var(1)
            self.update(mean.detach(), var.detach())
            if active:
                mean, var = self._pool(rows, mean, conv.weight)
        else:
            mean, var = self.running_mean, self.running_var
        std = var.sqrt() + self.eps if self.eps_outside else (var + self.eps).sqrt()
        z = (rows - mean.view(-1, 1)) / std.view(-1, 1)
        z = self.weight.view(-1, 1) * z + self.bias.view(-1, 1)
        return z.view(swapped.shape).transpose(0, 1)

    def _pool(self, rows: Tensor, mean: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance over the window's valid entries; pushes the live batch."""
        mean_square = rows.pow(2).mean(1)
        ones = torch.ones_like(mean)
        grads = [
            torch.autograd.grad(moment, weight, ones, retain_graph=True)[0]
            for moment in (mean, mean_square)
        ]
        now = weight.detach()

        def expand(moment: Tensor, grad: Tensor, then: Tensor) -> Tensor:
            return moment + (self.rho * grad * (now - then)).sum(1).sum(1).sum(1)

        means = torch.stack([mean, *(expand(e.mean, e.mean_grad, e.weight) for e in self.history)])
        squares = torch.stack(
            [
                mean_square,
                *(expand(e.mean_square, e.mean_square_grad, e.weight) for e in self.history),
            ]
        )
        invalid = squares - means.pow(2) < 0
        count = (~invalid).sum(0).to(mean.dtype)
        pooled = means.masked_fill(invalid, 0).sum(0) / count
        var = squares.masked_fill(invalid, 0).sum(0) / count - pooled.pow(2)
        live = Entry(mean.detach(), mean_square.detach(), grads[0], grads[1], now.clone())
        self.history = [live, *self.history[: self.past - 1]]
        return pooled, var
