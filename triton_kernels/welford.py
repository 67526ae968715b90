"""Mean and centred second moment, merged in a fixed order (Welford 1962, Chan et al. 1979).

Three levels, each an exact identity, none of them E[x^2] - E[x]^2:

    push         one value a lane:   d = x - mean;  mean += d/k;  M2 += d*(x - mean)
    merge_lanes  lanes of a tile:    mean = sum(n*mean_l)/n, corrected once by the mean of what its
                                     rounding left;  M2 = sum(M2_l + n_l*(mean_l - mean)^2)
    chan         two partials:       the pairwise form

k is the same for all lanes of a tile, so a value costs two subtractions and two multiply-adds and
no division. Lanes and partials that saw nothing (count 0, mean 0, M2 0) drop out of every merge.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def push(mean, m2, x, m_x, weight):
    """weight is 1/k, k the values a lane has seen with this one."""
    delta = tl.where(m_x, x - mean, 0.0)
    mean += delta * weight
    m2 += delta * (x - mean)
    return mean, m2


@triton.jit
def minus(values, merged, AXIS: tl.constexpr):
    """values - merged, which the reduction over AXIS made of them."""
    return values - (merged[:, None] if AXIS == 1 else merged)


@triton.jit
def merge_lanes(count, mean, m2, AXIS: tl.constexpr):
    """AXIS 0 or 1, or None for all lanes. Means of 1e4 sigma need the corrected mean."""
    total = tl.sum(count, AXIS)
    divisor = tl.maximum(total, 1.0)
    weight = count / (divisor[:, None] if AXIS == 1 else divisor)
    guess = tl.sum(weight * mean, AXIS)
    merged = guess + tl.sum(weight * minus(mean, guess, AXIS), AXIS)
    delta = minus(mean, merged, AXIS)
    # (count*delta)*delta: an empty lane stays 0 even where delta^2 overflows.
    return total, merged, tl.sum(m2 + count * delta * delta, AXIS)


@triton.jit
def chan(count_a, mean_a, m2_a, count_b, mean_b, m2_b):
    count = count_a + count_b
    weight = count_b / tl.maximum(count, 1.0)
    delta = mean_b - mean_a
    return count, mean_a + delta * weight, m2_a + m2_b + delta * (count_a * weight) * delta
