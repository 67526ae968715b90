"""Sandwich BN (Gong et al., arXiv 2102.11382): one shared affine, then one of K others.

The four published forms: class-conditional, auxiliary branches, architecture search, and adaptive
instance norm. Each builds on torch's own BatchNorm layers and makes one pass an affine.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Paper, channels


def _affine_table(rows: int, num_features: int) -> nn.Parameter:
    """Scales N(1, 0.02), then shifts 0: (rows, 2C)."""
    table = torch.zeros(rows, 2 * num_features)
    table[:, :num_features].normal_(1, 0.02)
    return nn.Parameter(table)


def _look_up(table: Tensor, index: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift of each sample, shaped to broadcast over x."""
    scale, shift = F.embedding(index, table).chunk(2, 1)
    return channels(scale, x), channels(shift, x)


def _bns(count: int, num_features: int, eps: float, momentum: float) -> nn.ModuleList:
    return nn.ModuleList(
        nn.BatchNorm2d(num_features, eps, momentum, affine=False) for _ in range(count)
    )


class SandwichBatchNorm(Paper):
    """Class-conditional (GAN): statistics shared, an affine a class; called with index (N,)."""

    extras = 1

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        act: str | None = None,
        eps: float = 1e-5,
        momentum: float = 0.1,
    ) -> None:
        super().__init__(act)
        self.bn = nn.BatchNorm2d(num_features, eps, momentum)
        self.embed = _affine_table(num_classes, num_features)

    def normalize(self, x: Tensor, index: Tensor) -> Tensor:
        scale, shift = _look_up(self.embed, index, x)
        return scale * self.bn(x) + shift


class SandwichAuxBatchNorm(Paper):
    """Auxiliary (adversarial): a branch a call, each with its own statistics."""

    extras = 1

    def __init__(
        self,
        num_features: int,
        num_branches: int = 2,
        act: str | None = None,
        eps: float = 1e-5,
        momentum: float = 0.1,
    ) -> None:
        super().__init__(act)
        self.bns = _bns(num_branches, num_features, eps, momentum)
        # Its last row is the shared affine.
        self.embed = _affine_table(num_branches + 1, num_features)

    def normalize(self, x: Tensor, branch: int) -> Tensor:
        z = self.bns[branch](x)
        for row in (len(self.bns), branch):
            scale, shift = _look_up(self.embed, torch.full((len(x),), row, device=x.device), x)
            z = scale * z + shift
        return z


class SandwichNASBatchNorm(Paper):
    """Architecture search: statistics and affine chosen by the previous nodes' operations."""

    extras = 1

    def __init__(
        self,
        num_features: int,
        num_ops: int,
        num_nodes: int = 1,
        act: str | None = None,
        eps: float = 1e-5,
        momentum: float = 0.1,
    ) -> None:
        super().__init__(act)
        self.num_ops = num_ops
        self.bns = _bns(num_ops**num_nodes, num_features, eps, momentum)
        self.shared_weight = nn.Parameter(torch.ones(num_features))
        self.shared_bias = nn.Parameter(torch.zeros(num_features))
        self.embed = _affine_table(num_ops**num_nodes, num_features)

    def normalize(self, x: Tensor, ops: Sequence[int], skip_embed: bool = False) -> Tensor:
        row = sum(self.num_ops**node * op for node, op in enumerate(ops))
        z = self.bns[row](x)
        z = z * channels(self.shared_weight, x) + channels(self.shared_bias, x)
        if skip_embed:
            return z
        scale, shift = _look_up(self.embed, torch.full((len(x),), row, device=x.device), x)
        return scale * z + shift


def _mean_std(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Spatial mean and standard deviation, unbiased, each (N, C, 1, 1)."""
    flat = x.reshape(*x.shape[:2], -1)
    return channels(flat.mean(2), x), channels((flat.var(2) + eps).sqrt(), x)


class SandwichAdaIN(Paper):
    """Style transfer: the style's moments are the second affine; called with the style."""

    extras = 1

    def __init__(self, num_features: int, act: str | None = None, eps: float = 1e-5) -> None:
        super().__init__(act)
        self.eps = eps
        self.shared_weight = nn.Parameter(torch.ones(num_features))
        self.shared_bias = nn.Parameter(torch.zeros(num_features))

    def normalize(self, content: Tensor, style: Tensor) -> Tensor:
        style_mean, style_std = _mean_std(style, self.eps)
        mean, std = _mean_std(content, self.eps)
        z = (content - mean) / std
        z = z * channels(self.shared_weight, content) + channels(self.shared_bias, content)
        return z * style_std + style_mean
