"""One launch for small slices: a block's registers hold x (and dy) between the two sweeps.

    forward    mean, then M2 about it, then y      reads x, writes y       2T bytes, 1 launch
    backward   sum h, sum h*xhat, then dx          reads dy, x, writes dx  3T bytes, 1 launch

A block owns complete cells: all rows of a tile of columns, in the sense of columns.py, loaded once
in x's own type. So the variance is the exact two-pass one at no cost in bytes; the mean is taken
twice, the second time of what the rounding of the first has left, because means of 10^4 sigma need
it. Cells span ``span`` columns, channels ``width``; both are told apart by comparing columns with
cell numbers, CELLS x BLOCK_COLS at a time. Nothing crosses blocks but the parameter gradients where
statistics are a sample's own: those go to one partial a sample and channel, and are added up by
channels_combine_kernel. Everything is in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .columns import SIZES, locate, place, tile
from .combine import divide, finish_channels, store_statistics
from .pointwise import (
    load_affine,
    number,
    store_mask,
    store_output,
    upstream,
)


@triton.jit
def numbers(start, channels, stride, span, ranges, first_cell, STATS: tl.constexpr):
    """(column, mask, cell) of the block's statistics: one a column, or one for all (STATS 1)."""
    o_local = tl.arange(0, STATS)
    o_col = start + o_local
    m_col = (o_local < stride) & (o_col < channels)
    return o_col, m_col, first_cell + o_col // span * ranges


@triton.jit
def by_segment(values, span, SEGMENTS: tl.constexpr):
    """Every column the sum of its segment's, a segment being ``span`` neighbours; 0: itself."""
    if SEGMENTS == 0:
        return values
    elif SEGMENTS == 1:
        return tl.full(values.shape, 0.0, values.dtype) + tl.sum(values, 0)
    else:
        segment = tl.arange(0, values.shape[0]) // span
        own = segment[None, :] == tl.arange(0, SEGMENTS)[:, None]
        sums = tl.sum(tl.where(own, values[None, :], 0.0), 1)
        return tl.sum(tl.where(own, sums[:, None], 0.0), 0)


@triton.jit
def total(values, STATS: tl.constexpr):
    """Sums down the columns of a tile, or of all of it."""
    if STATS == 1:
        return tl.zeros([1], values.dtype) + tl.sum(values)
    else:
        return tl.sum(values, 0)


@triton.jit(do_not_specialize=SIZES)
def forward_onchip_kernel(
    x_ptr,
    y_ptr,
    residual_ptr,  # or None
    mask_ptr,  # or None; VEC is W if given
    weight_ptr,  # or None
    bias_ptr,  # or None
    mean_ptr,
    rstd_ptr,
    var_ptr,
    running_mean_ptr,  # or None
    running_var_ptr,
    tracked_ptr,
    eps,
    eps_low,
    momentum,
    momentum_low,
    slope,
    slope_low,
    samples,
    channels,
    spatial,
    span,
    ranges,
    width,
    unit,
    stride,
    splits,
    ACC: tl.constexpr,
    ACT: tl.constexpr,
    W: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    VEC: tl.constexpr,
    WHOLE: tl.constexpr,
    CELLS: tl.constexpr,
    STATS: tl.constexpr,
):
    pid = tl.program_id(0)
    start, _, _, _, base, rows, _, _ = locate(
        pid, samples, channels, spatial, span, ranges, stride, splits, BLOCK_ROWS, BLOCK_COLS, VEC
    )
    sample_set, q, _, _, _ = place(pid, channels, ranges, stride, splits)
    first_cell = sample_set.to(tl.int64) * (channels // span * ranges) + q
    o_col, m_col, cell = numbers(start, channels, stride, span, ranges, first_cell, STATS)
    at, o_x, m_x = tile(
        0, base, rows, channels, spatial, ranges, start, stride,
        BLOCK_ROWS, BLOCK_COLS, VEC, WHOLE, 1,
    )  # fmt: skip
    x = tl.load(x_ptr + at + o_x, m_x, 0.0, eviction_policy="evict_first")
    count = (samples * span.to(tl.int64) * (spatial // ranges)).to(ACC)
    part = divide(tl.full([], 1.0, ACC), count)
    # Each value is divided before it is added, so that no finite x overflows.
    guess = by_segment(total(x.to(ACC) * part, STATS), span, CELLS)
    left = tl.where(m_x, x.to(ACC) - guess, 0.0)
    mean = guess + by_segment(total(left * part, STATS), span, CELLS)
    centred = tl.where(m_x, x.to(ACC) - mean, 0.0)
    m2 = by_segment(total(centred * centred, STATS), span, CELLS)
    m_cell = m_col & (tl.arange(0, STATS) % span == 0)
    rstd = store_statistics(
        tl.zeros([STATS], ACC) + count, mean, m2, cell, m_cell,
        mean_ptr, rstd_ptr, var_ptr, running_mean_ptr, running_var_ptr, tracked_ptr,
        eps, eps_low, momentum, momentum_low, ACC,
    )  # fmt: skip
    scale = rstd * load_affine(weight_ptr, o_col // width, m_col, rstd, 1.0)
    bias = load_affine(bias_ptr, o_col // width, m_col, rstd, 0.0)
    y = store_output(
        y_ptr, residual_ptr, at, o_x, m_x, centred, scale, bias, number(slope, slope_low, ACC), ACT
    )
    if mask_ptr is not None:
        byte_at, o_byte, m_byte = tile(
            0, base, rows, channels, spatial, ranges, start, stride,
            BLOCK_ROWS, BLOCK_COLS, VEC, WHOLE, W,
        )  # fmt: skip
        store_mask(mask_ptr, byte_at, o_byte, m_byte, y, W)


@triton.jit(do_not_specialize=SIZES)
def backward_onchip_kernel(
    dy_ptr,
    x_ptr,
    residual_ptr,  # or None
    mask_ptr,  # or None
    dx_ptr,
    dresidual_ptr,  # or None
    mean_ptr,
    rstd_ptr,
    weight_ptr,  # or None
    bias_ptr,  # or None
    dweight_ptr,  # (A, C)
    dbias_ptr,
    slope,
    slope_low,
    live,
    live_low,
    samples,
    channels,
    spatial,
    span,
    ranges,
    width,
    unit,
    stride,
    splits,
    ACC: tl.constexpr,
    ACT: tl.constexpr,
    W: tl.constexpr,
    LIVE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    VEC: tl.constexpr,
    WHOLE: tl.constexpr,
    CELLS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STATS: tl.constexpr,
):
    pid = tl.program_id(0)
    start, _, _, _, base, rows, _, _ = locate(
        pid, samples, channels, spatial, span, ranges, stride, splits, BLOCK_ROWS, BLOCK_COLS, VEC
    )
    sample_set, q, _, _, _ = place(pid, channels, ranges, stride, splits)
    sample_set = sample_set.to(tl.int64)
    first_cell = sample_set * (channels // span * ranges) + q
    o_col, m_col, cell = numbers(start, channels, stride, span, ranges, first_cell, STATS)
    PACKED: tl.constexpr = VEC == W
    at, o_x, m_x = tile(
        0, base, rows, channels, spatial, ranges, start, stride,
        BLOCK_ROWS, BLOCK_COLS, VEC, WHOLE, 1,
    )  # fmt: skip
    byte_at, o_byte, m_byte = tile(
        0, base, rows, channels, spatial, ranges, start, stride,
        BLOCK_ROWS, BLOCK_COLS, VEC, WHOLE, W if PACKED else 1,
    )  # fmt: skip
    dy = tl.load(dy_ptr + at + o_x, m_x, 0.0, eviction_policy="evict_first").to(ACC)
    x = tl.load(x_ptr + at + o_x, m_x, 0.0, eviction_policy="evict_first").to(ACC)
    o_channel = o_col // width
    mean = tl.load(mean_ptr + cell, m_col, 0.0)
    rstd = tl.load(rstd_ptr + cell, m_col, 0.0)
    weight = load_affine(weight_ptr, o_channel, m_col, rstd, 1.0)
    bias = load_affine(bias_ptr, o_channel, m_col, rstd, 0.0)
    scale = rstd * weight
    centred = x - mean
    h = upstream(
        dy, centred, residual_ptr, mask_ptr, at, o_x, m_x, byte_at, o_byte, m_byte, scale, bias,
        number(slope, slope_low, ACC), ACT, W, PACKED, "evict_first",
    )  # fmt: skip
    h = tl.where(m_x, h, 0.0)
    if dresidual_ptr is not None:
        tl.store(dresidual_ptr + at + o_x, h, m_x, cache_modifier=".cs")
    sum_h = total(h, STATS)
    sum_hx = total(tl.where(m_x, h * (centred * rstd), 0.0), STATS)
    o_out = sample_set * (channels // width) + o_channel
    m_out = m_col & (tl.arange(0, STATS) % width == 0)
    tl.store(dbias_ptr + o_out, by_segment(sum_h, width, CHANNELS), m_out)
    tl.store(dweight_ptr + o_out, by_segment(sum_hx, width, CHANNELS), m_out)
    dx = scale * h
    if LIVE:
        # Masked columns have undefined weights; their sums are zeros.
        count = (samples * span.to(tl.int64) * (spatial // ranges)).to(ACC)
        factor = divide(number(live, live_low, ACC), count)
        m0 = by_segment(tl.where(m_col, weight * sum_h, 0.0), span, CELLS) * factor
        m1 = by_segment(tl.where(m_col, weight * sum_hx, 0.0), span, CELLS) * factor
        dx -= rstd * m0 + centred * (rstd * rstd * m1)
    tl.store(dx_ptr + at + o_x, dx, m_x, cache_modifier=".cs")


@triton.jit(do_not_specialize=["sets", "channels"])
def channels_combine_kernel(
    partials_ptr,  # (2, A, C): sum h, sum h*xhat
    dweight_ptr,
    dbias_ptr,
    sets,
    channels,
    ACC: tl.constexpr,
    CHANNELS: tl.constexpr,
    STEP: tl.constexpr,
):
    finish_channels(
        partials_ptr, sets * channels, dweight_ptr, dbias_ptr,
        sets, channels, 1, 1, 1, channels, 1, ACC, CHANNELS, STEP, True,
    )  # fmt: skip
