"""GroupNorm: torch's GroupNorm with num_features first, any layout, residual and activation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusednorm import functional
from fusednorm.reference.cells import activation_index


class GroupNorm(torch.nn.GroupNorm):
    r"""Group normalization over inputs (N, C, \*) (Wu & He, arXiv 1803.08494).

    The same in training and evaluation, and independent of the batch. ``num_groups=1`` is layer
    normalization over (C, \*), ``num_groups=num_features`` instance normalization. State dicts are
    those of ``torch.nn.GroupNorm``; note that ``num_features`` comes first here.

    Args:
        num_features: C.
        num_groups: a divisor of C.
        eps, affine, device, dtype: as in ``torch.nn.GroupNorm``.
        act: None, "relu", "silu", "gelu" or "leaky_relu" (slope 0.01), fused.

    Example:
        >>> norm = GroupNorm(64, num_groups=32, act="silu")
        >>> y = norm(torch.randn(2, 64, 56, 56))
    """

    def __init__(
        self,
        num_features: int,
        num_groups: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        act: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if num_groups < 1 or num_features < 1 or num_features % num_groups:
            raise ValueError(
                f"num_groups: expected a divisor of num_features {num_features}, got {num_groups}"
            )
        activation_index(act)
        super().__init__(num_groups, num_features, eps, affine, device=device, dtype=dtype)
        self.act = act

    @property
    def num_features(self) -> int:
        return self.num_channels

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """y = act(norm(input) + residual), of input's shape, dtype and memory format."""
        return functional.group_norm(
            input, self.num_groups, self.weight, self.bias, self.eps,
            act=self.act, residual=residual,
        )  # fmt: skip

    def extra_repr(self) -> str:
        act = "" if self.act is None else f", act={self.act}"
        return (
            f"{self.num_channels}, num_groups={self.num_groups}, eps={self.eps}, "
            f"affine={self.affine}{act}"
        )
