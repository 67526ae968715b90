"""Memorized BN with Double Forward (Guo et al., arXiv 2010.04947): decayed moments of past batches.

No code was published; weights, variance rule and replacement are those of this package's design.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .base import RunningNorm, channels, wide


class MemorizedBatchNorm(RunningNorm):
    """The live batch and up to `memory` past ones, weighted by decay**age, total variance.

    Evaluation normalizes by the memory alone. Inside `double_forward` a call replaces the newest
    entry by its own batch's moments and changes nothing else.
    """

    memory_mean: Tensor
    memory_var: Tensor
    fill: Tensor

    def __init__(
        self,
        num_features: int,
        act: str | None = None,
        eps: float = 1e-5,
        momentum: float = 0.1,
        memory: int = 3,
        decay: float = 0.9,
        total_variance: bool = True,
    ) -> None:
        super().__init__(num_features, act, eps, momentum)
        self.decay, self.total_variance, self.second = decay, total_variance, False
        # Newest first. On the device, fill count included, so that a CUDA graph can replay it.
        self.register_buffer("memory_mean", torch.zeros(memory, num_features))
        self.register_buffer("memory_var", torch.zeros(memory, num_features))
        self.register_buffer("fill", torch.zeros((), dtype=torch.int64))

    def pool(self, means: Tensor, variances: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted mean and variance of the first `entries` rows."""
        age = torch.arange(len(means), device=means.device)
        weights = torch.where(age < entries, self.decay ** age.to(means.dtype), 0.0)
        weights = (weights / weights.sum()).view(-1, 1)
        mean = (weights * means).sum(0)
        if self.total_variance:
            variances = variances + (means - mean) ** 2
        return mean, (weights * variances).sum(0)

    def eval_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and variance that evaluation normalizes by, each (C,)."""
        return self.pool(self.memory_mean, self.memory_var, self.fill)

    def normalize(self, x: Tensor) -> Tensor:
        values = wide(x)
        if self.training or self.second:
            axes = [0, *range(2, x.dim())]
            mean, var = values.mean(axes), values.var(axes, unbiased=False)
            # A second forward stands in for the newest entry, a first one comes before it.
            replaced = 1 if self.second else 0
            means = torch.cat([mean[None], self.memory_mean[replaced:]])
            variances = torch.cat([var[None], self.memory_var[replaced:]])
            pooled = self.pool(means, variances, self.fill + 1 - replaced)
            self._remember(means, variances, x.numel() // x.shape[1])
            mean, var = pooled
        else:
            mean, var = self.eval_statistics()
        z = (values - channels(mean, x)) / torch.sqrt(channels(var, x) + self.eps)
        return z * channels(self.weight, x) + channels(self.bias, x)

    @torch.no_grad()
    def _remember(self, means: Tensor, variances: Tensor, count: int) -> None:
        self.memory_mean.copy_(means[: len(self.memory_mean)])
        self.memory_var.copy_(variances[: len(self.memory_var)])
        if not self.second:
            self.update(means[0], variances[0] * (count / max(count - 1, 1)))
            self.fill.add_(1).clamp_(max=len(self.memory_mean))


@contextmanager
def double_forward(model: nn.Module) -> Iterator[None]:
    """Calls inside are second forwards: without gradient, their moments replace the newest ones."""
    norms = [module for module in model.modules() if isinstance(module, MemorizedBatchNorm)]
    for norm in norms:
        norm.second = True
    try:
        with torch.no_grad():
            yield
    finally:
        for norm in norms:
            norm.second = False
