"""GroupNorm with a proxy-normalized activation (Labatie et al., arXiv 2106.03743)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Paper, channels, wide


class ProxyNorm(Paper):
    """The activation is part of the norm, so a residual has no place before it and is refused.

    The published code is TensorFlow's; step for step it is this.
    """

    quantiles: Tensor

    def __init__(
        self,
        num_features: int,
        num_groups: int,
        act: str | None = "relu",
        eps: float = 1e-5,
        num_quantiles: int = 200,
        eps_proxy: float = 0.03,
    ) -> None:
        super().__init__(act)
        self.num_groups, self.eps, self.eps_proxy = num_groups, eps, eps_proxy
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.weight_proxy = nn.Parameter(torch.zeros(num_features))
        self.bias_proxy = nn.Parameter(torch.zeros(num_features))
        middles = (torch.arange(num_quantiles, dtype=torch.float64) + 0.5) / num_quantiles
        quantiles = math.sqrt(2) * torch.erfinv(2 * middles - 1)
        self.register_buffer("quantiles", quantiles, persistent=False)

    def activate(self, y: Tensor) -> Tensor:
        """phi(weight * y + bias), less and over the moments its Gaussian proxy would have."""
        weight, bias = self.weight, self.bias
        z = self.act(y * channels(weight, y) + channels(bias, y))
        quantiles = self.quantiles.to(weight.dtype)
        proxy = (1 + self.weight_proxy[:, None]) * quantiles + self.bias_proxy[:, None]
        proxy = self.act(weight[:, None] * proxy + bias[:, None])
        mean, var = proxy.mean(1), proxy.var(1, unbiased=False)
        return (z - channels(mean, y)) / torch.sqrt(channels(var, y) + self.eps_proxy)

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        if any(each is not None for each in rest):
            raise ValueError("residual: expected None, since proxy norm owns the activation")
        y = F.group_norm(wide(x), self.num_groups, eps=self.eps)
        return self.activate(y).to(x.dtype)
