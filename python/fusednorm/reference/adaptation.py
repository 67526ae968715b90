"""Batch-norm statistics at test time: pooled moments, and their mix with those of training.

Moments are (size, mean, M2), M2 the sum of squares about the mean, and merge by Chan's rule. With
source statistics (mu_s, v_s), target moments of n images (mu_t, v_t) and a prior strength N,

    w    = n/(N + n)
    mean = (1 - w)*mu_s + w*mu_t
    var  = (1 - w)*v_s + w*v_t (+ w*(1 - w)*(mu_s - mu_t)^2, the spread between the two)

N = 0 is full replacement (Benz et al., arXiv 2010.03630), N = inf the source; Schneider et al.
(arXiv 2006.16971) count n in images, not pixels, and leave the spread out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fusednorm.reference.cells import accumulation_dtype, as_cells

Statistics = tuple[Tensor, Tensor]


class Moments(NamedTuple):
    """Of ``size`` values a statistic: mean (G,) and m2 (G,)."""

    size: int
    mean: Tensor
    m2: Tensor

    def variance(self, unbiased: bool) -> Tensor:
        """(G,); needs two values for either kind: the spread of one value is not known."""
        if self.size < 2:
            raise ValueError(
                f"expected at least 2 values a statistic to take a variance of, got {self.size}"
            )
        return self.m2 / (self.size - 1 if unbiased else self.size)


def wide(t: Tensor) -> Tensor:
    """For merging: a few floats a channel, so float64 costs nothing where the device has it."""
    return t.to(torch.float32 if t.device.type == "mps" else torch.float64)


def moments(x: Tensor, num_groups: int) -> Moments:
    """Of x (N, C, *) over the batch, for each of G contiguous runs of its flattened (C, *) axes."""
    x = x.detach().to(accumulation_dtype(x.dtype))
    if num_groups == x.shape[1]:
        over = [0, *range(2, x.dim())]
    else:
        x, over = as_cells(x, num_groups), [0, 2]
    size = x.numel() // num_groups
    if not size:
        zeros = wide(x.new_zeros(num_groups))
        return Moments(0, zeros, zeros)
    var, mean = torch.var_mean(x, over, correction=0)
    return Moments(size, wide(mean), wide(var) * size)


def merge(parts: Iterable[Moments]) -> Moments:
    """The moments of all values together (Chan, Golub & LeVeque 1979), in the order given."""
    parts = iter(parts)
    size, mean, m2 = next(parts)
    for part in parts:
        if part.size:
            total = size + part.size
            delta = part.mean - mean
            mean = mean + delta * (part.size / total)
            m2 = m2 + part.m2 + delta.square() * (size * part.size / total)
            size = total
    return Moments(size, mean, m2)


def mix(
    source: Statistics, target: Statistics, strength: float, images: int, total_variance: bool
) -> Statistics:
    """Mean and variance (G,) of the formula above; exactly source or target at its two ends."""
    w = 0.0 if math.isinf(strength) else images / (strength + images)
    mean, var = ((1 - w) * s + w * t for s, t in zip(source, target, strict=True))
    if total_variance:
        var = var + w * (1 - w) * (source[0] - target[0]).square()
    return mean, var


def wasserstein2(a: Statistics, b: Statistics) -> Tensor:
    """Squared 2-Wasserstein distance of two Gaussians in each statistic, (G,): its sum is that of
    the diagonal Gaussians."""
    return (a[0] - b[0]).square() + (a[1].sqrt() - b[1].sqrt()).square()
