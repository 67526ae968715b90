"""Batch Group Normalization (Zhou et al., arXiv 2012.02782): one cell a run of (C, H, W).

    D = C*H*W,  S = D/G;  x viewed as (N, G, S)
    mu_g = mean over (n, s),  var_g = biased variance over (n, s)
    y    = gamma_c * (x - mu_g) / sqrt(var_g + eps) + beta_c

G = C is batch normalization; N = 1 with G | C is group normalization.
"""

from __future__ import annotations

from torch import Tensor

from fusednorm.reference.cells import normalize


def batch_group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """(N, C, *) -> y of the same shape, mean (G,), biased variance (G,)."""
    return normalize(x, weight, bias, None, num_groups, False, eps)
