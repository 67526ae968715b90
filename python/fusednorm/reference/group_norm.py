"""Group normalization (Wu & He, arXiv 1803.08494, equations 1-7): one cell a sample and group.

    mu_ng, var_ng over the C/G channels of group g and all positions of sample n
    y = gamma_c * (x - mu_ng) / sqrt(var_ng + eps) + beta_c

G = 1 is layer normalization over (C, H, W), G = C instance normalization.
"""

from __future__ import annotations

from torch import Tensor

from fusednorm.reference.cells import normalize


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """(N, C, *) -> y of the same shape, mean (N, G), biased variance (N, G)."""
    return normalize(x, weight, bias, None, num_groups, True, eps)
