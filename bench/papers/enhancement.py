"""Instance Enhancement BN (Liang et al., arXiv 1908.04008): BN whose scale is gated per sample."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import RunningNorm, channels


class InstanceEnhancementBatchNorm(RunningNorm):
    """sigmoid(spatial mean * w + b) gates the scale per sample and channel, not the shift."""

    def __init__(
        self, num_features: int, act: str | None = None, eps: float = 1e-5, momentum: float = 0.1
    ) -> None:
        super().__init__(num_features, act, eps, momentum)
        self.weight_readjust = nn.Parameter(torch.zeros(num_features))
        self.bias_readjust = nn.Parameter(torch.full((num_features,), -1.0))

    def normalize(self, x: Tensor) -> Tensor:
        pooled = x.flatten(2).mean(2) if x.dim() != 4 else F.adaptive_avg_pool2d(x, 1).flatten(1)
        gate = torch.sigmoid(pooled * self.weight_readjust + self.bias_readjust)
        z = F.batch_norm(
            x, self.running_mean, self.running_var, None, None,
            self.training, self.momentum, self.eps,
        )  # fmt: skip
        return z * channels(self.weight * gate, x) + channels(self.bias, x)
