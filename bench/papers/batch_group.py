"""Batch Group Normalization (Zhou et al., arXiv 2012.02782): one view, one mean, one variance.

No code was published; this is the formula as anybody writes it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import RunningNorm, channels, wide


class BatchGroupNorm(RunningNorm):
    """Statistics over the batch and a run of the flattened (C, *) axes; affine per channel."""

    def __init__(
        self,
        num_features: int,
        num_groups: int,
        act: str | None = None,
        eps: float = 1e-5,
        momentum: float = 0.1,
    ) -> None:
        super().__init__(num_features, act, eps, momentum, num_groups)
        self.num_groups = num_groups

    def normalize(self, x: Tensor) -> Tensor:
        flat = wide(x).reshape(len(x), self.num_groups, -1)
        if self.training:
            mean, var = flat.mean((0, 2)), flat.var((0, 2), unbiased=False)
            count = flat.numel() // self.num_groups
            self.update(mean.detach(), var.detach() * (count / max(count - 1, 1)))
        else:
            mean, var = self.running_mean, self.running_var
        flat = (flat - mean.view(1, -1, 1)) / torch.sqrt(var + self.eps).view(1, -1, 1)
        return flat.view(x.shape) * channels(self.weight, x) + channels(self.bias, x)
