"""Neighbours: positional norm with its moment shortcut, batch renorm, moving-average BN."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import Paper, channels, wide


class PositionalNorm(Paper):
    """Positional norm (Li et al., NeurIPS 2019): over C at every (n, position), unbiased.

    `moments` also returns what `moment_shortcut` gives back to a later tensor.
    """

    def __init__(self, act: str | None = None, eps: float = 1e-5) -> None:
        super().__init__(act)
        self.eps = eps

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalized x, and mean and std, each (N, 1, *)."""
        x = wide(x)
        mean = x.mean(1, keepdim=True)
        std = x.var(1, keepdim=True).add(self.eps).sqrt()
        return (x - mean) / std, mean, std

    def normalize(self, x: Tensor) -> Tensor:
        return self.moments(x)[0]


def moment_shortcut(h: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return h * std + mean


class BatchRenorm(Paper):
    """Batch Renormalization (Ioffe, arXiv 1702.03275) as the PyTorch port has it.

    The bounds of r and d grow with the number of batches; the running standard deviation contains
    eps, which stands outside the root.
    """

    running_mean: Tensor
    running_std: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self, num_features: int, act: str | None = None, eps: float = 1e-3, momentum: float = 0.01
    ) -> None:
        super().__init__(act)
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_std", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))

    def normalize(self, x: Tensor) -> Tensor:
        last = wide(x).transpose(1, -1)
        if self.training:
            axes = list(range(x.dim() - 1))
            mean = last.mean(axes)
            std = last.std(axes, unbiased=False) + self.eps
            now = self.num_batches_tracked.to(mean.dtype)
            r_max = (2 / 35000 * now + 25 / 35).clamp(1, 3)
            d_max = (5 / 20000 * now - 25 / 20).clamp(0, 5)
            r = (std.detach() / self.running_std).clamp(1 / r_max, r_max)
            d = ((mean.detach() - self.running_mean) / self.running_std).clamp(-d_max, d_max)
            z = (last - mean) / std * r + d
            with torch.no_grad():
                self.running_mean += self.momentum * (mean - self.running_mean)
                self.running_std += self.momentum * (std - self.running_std)
                self.num_batches_tracked += 1
        else:
            z = (last - self.running_mean) / self.running_std
        return (self.weight * z + self.bias).transpose(1, -1)


class _MovingAverage(torch.autograd.Function):
    """The layer's own backward rule, which is not the derivative of its forward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, norm: MovingAverageBatchNorm
    ) -> Tensor:
        # A look at the device in every call, as published.
        iteration = int(norm.iters.item())
        memory = norm.buffer_x2
        square = (x * x).mean(3).mean(2).mean(0)
        memory[iteration % len(memory)].copy_(square)
        averaged = iteration > len(memory) and iteration >= norm.warm_up
        var = channels(memory.mean(0) if averaged else square, x)
        root = (var + norm.eps).sqrt()
        z = x / root
        r = root / (channels(norm.running_var, x) + norm.eps).sqrt()
        bound = 5.0 if iteration > max(1000, norm.warm_up) else 1.0
        r = r.clamp(1 / bound, bound)
        norm.running_var.copy_(
            norm.momentum * norm.running_var + (1 - norm.momentum) * var.view(-1)
        )
        ctx.save_for_backward(z, root, weight, r)
        ctx.norm, ctx.slot, ctx.averaged = norm, iteration % len(memory), averaged
        return channels(weight, x) * (r * z) + channels(bias, x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        z, root, weight, r = ctx.saved_tensors
        memory = ctx.norm.buffer_gz
        g = dy * channels(weight, dy) * r
        product = (g * z).mean(3).mean(2).mean(0)
        memory[ctx.slot].copy_(product)
        psi = channels(memory.mean(0) if ctx.averaged else product, dy)
        dweight = (dy * (r * z)).sum(3).sum(2).sum(0)
        return (g - z * psi) / root, dweight, dy.sum(3).sum(2).sum(0), None


class MovingAverageBatchNorm(Paper):
    """Moving Average BN (Yan et al., arXiv 2001.06838): no mean, second moments averaged.

    Reads its iteration counter on the host, as published, so no CUDA graph captures it.
    """

    running_var: Tensor
    iters: Tensor
    buffer_x2: Tensor
    buffer_gz: Tensor

    def __init__(
        self,
        num_features: int,
        act: str | None = None,
        eps: float = 1e-5,
        momentum: float = 0.98,
        window: int = 16,
        warm_up: int = 100,
    ) -> None:
        super().__init__(act)
        self.eps, self.momentum, self.warm_up = eps, momentum, warm_up
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("iters", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("buffer_x2", torch.zeros(window, num_features))
        self.register_buffer("buffer_gz", torch.zeros(window, num_features))

    def normalize(self, x: Tensor) -> Tensor:
        x = wide(x)
        if self.training:
            self.iters += 1
            y: Tensor = _MovingAverage.apply(x, self.weight, self.bias, self)
            return y
        z = x / (channels(self.running_var, x) + self.eps).sqrt()
        return channels(self.weight, x) * z + channels(self.bias, x)
