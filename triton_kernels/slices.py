"""One launch for slices that fit a multiprocessor's L1 cache, if not a block's registers.

    forward    moments, then y                        reads x twice, writes y
    backward   sum h, sum h*xhat, then dx             reads dy and x twice, writes dx

onchip.py's blocks, complete cells each, with a loop over row tiles in either sweep; the second one
goes back over what the first has just read. Meant for small tensors, where a launch costs more
than reading again from a cache. Where one cell fills the tiles (STATS 1) every tile is reduced at
once, by the exact two-pass moments; else a lane keeps its column, as in columns.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .columns import SIZES, locate, place, tile
from .combine import divide, store_statistics
from .onchip import by_segment, numbers, total
from .pointwise import (
    load_affine,
    load_upstream,
    number,
    store_gradients,
    store_mask,
    store_output,
)
from .welford import chan, merge_lanes, push


@triton.jit(do_not_specialize=SIZES)
def forward_slices_kernel(
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
    start, _, m_tile, _, base, rows, _, tiles = locate(
        pid, samples, channels, spatial, span, ranges, stride, splits, BLOCK_ROWS, BLOCK_COLS, VEC
    )
    sample_set, q, _, _, _ = place(pid, channels, ranges, stride, splits)
    first_cell = sample_set.to(tl.int64) * (channels // span * ranges) + q
    o_col, m_col, cell = numbers(start, channels, stride, span, ranges, first_cell, STATS)

    all_count = (samples * span.to(tl.int64) * (spatial // ranges)).to(ACC)
    if STATS == 1:
        count = tl.zeros([1], ACC)
        mean = count
        m2 = count
        for row in range(0, tiles):
            at, o_x, m_x = tile(
                row, base, rows, channels, spatial, ranges, start, stride,
                BLOCK_ROWS, BLOCK_COLS, VEC, WHOLE, 1,
            )  # fmt: skip
            x = tl.load(x_ptr + at + o_x, m_x, 0.0, eviction_policy="evict_last").to(ACC)
            live = tl.minimum(rows - row * BLOCK_ROWS, BLOCK_ROWS) * tl.minimum(stride, channels)
            live = tl.zeros([1], ACC) + live.to(ACC)
            part = divide(tl.full([1], 1.0, ACC), live)
            guess = total(x * part, STATS)
            guess += total(tl.where(m_x, x - guess, 0.0) * part, STATS)
            centred = tl.where(m_x, x - guess, 0.0)
            count, mean, m2 = chan(count, mean, m2, live, guess, total(centred * centred, STATS))
    else:
        lane_mean = tl.zeros([BLOCK_ROWS, BLOCK_COLS], ACC)
        lane_m2 = tl.zeros([BLOCK_ROWS, BLOCK_COLS], ACC)
        for row in range(0, tiles):
            at, o_x, m_x = tile(
                row, base, rows, channels, spatial, ranges, start, stride,
                BLOCK_ROWS, BLOCK_COLS, VEC, WHOLE, 1,
            )  # fmt: skip
            x = tl.load(x_ptr + at + o_x, m_x, 0.0, eviction_policy="evict_last").to(ACC)
            lane_mean, lane_m2 = push(
                lane_mean, lane_m2, x, m_x, 1.0 / (tl.zeros([], ACC) + (row + 1))
            )
        o_row = tl.arange(0, BLOCK_ROWS)[:, None]
        met = tl.minimum(tl.cdiv(rows - o_row, BLOCK_ROWS), tiles)
        met = tl.where(m_tile[None, :], tl.maximum(met, 0), 0).to(ACC)
        count, col_mean, m2 = merge_lanes(met, lane_mean, lane_m2, 0)
        part = count * divide(tl.full([], 1.0, ACC), all_count)
        guess = by_segment(part * col_mean, span, CELLS)
        mean = guess + by_segment(part * (col_mean - guess), span, CELLS)
        m2 = by_segment(m2 + count * (col_mean - mean) * (col_mean - mean), span, CELLS)
    m_cell = m_col & (tl.arange(0, STATS) % span == 0)
    rstd = store_statistics(
        tl.zeros([STATS], ACC) + all_count, mean, m2, cell, m_cell,
        mean_ptr, rstd_ptr, var_ptr, running_mean_ptr, running_var_ptr, tracked_ptr,
        eps, eps_low, momentum, momentum_low, ACC,
    )  # fmt: skip

    scale = rstd * load_affine(weight_ptr, o_col // width, m_col, rstd, 1.0)
    bias = load_affine(bias_ptr, o_col // width, m_col, rstd, 0.0)
    slope = number(slope, slope_low, ACC)
    for back in range(0, tiles):
        row = tiles - 1 - back
        at, o_x, m_x = tile(
            row, base, rows, channels, spatial, ranges, start, stride,
            BLOCK_ROWS, BLOCK_COLS, VEC, WHOLE, 1,
        )  # fmt: skip
        x = tl.load(x_ptr + at + o_x, m_x, 0.0, eviction_policy="evict_first").to(ACC)
        y = store_output(y_ptr, residual_ptr, at, o_x, m_x, x - mean, scale, bias, slope, ACT)
        if mask_ptr is not None:
            byte_at, o_byte, m_byte = tile(
                row, base, rows, channels, spatial, ranges, start, stride,
                BLOCK_ROWS, BLOCK_COLS, VEC, WHOLE, W,
            )  # fmt: skip
            store_mask(mask_ptr, byte_at, o_byte, m_byte, y, W)


@triton.jit(do_not_specialize=SIZES)
def backward_slices_kernel(
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
    start, _, _, _, base, rows, _, tiles = locate(
        pid, samples, channels, spatial, span, ranges, stride, splits, BLOCK_ROWS, BLOCK_COLS, VEC
    )
    sample_set, q, _, _, _ = place(pid, channels, ranges, stride, splits)
    sample_set = sample_set.to(tl.int64)
    first_cell = sample_set * (channels // span * ranges) + q
    o_col, m_col, cell = numbers(start, channels, stride, span, ranges, first_cell, STATS)
    PACKED: tl.constexpr = VEC == W
    o_channel = o_col // width
    mean = tl.load(mean_ptr + cell, m_col, 0.0)
    rstd = tl.load(rstd_ptr + cell, m_col, 0.0)
    weight = load_affine(weight_ptr, o_channel, m_col, rstd, 1.0)
    bias = load_affine(bias_ptr, o_channel, m_col, rstd, 0.0)
    scale = rstd * weight
    slope = number(slope, slope_low, ACC)
    LANES: tl.constexpr = 1 if STATS == 1 else BLOCK_ROWS
    lane_h = tl.zeros([LANES, STATS], ACC)
    lane_hx = tl.zeros([LANES, STATS], ACC)
    for row in range(0, tiles):
        at, o_x, m_x = tile(
            row, base, rows, channels, spatial, ranges, start, stride,
            BLOCK_ROWS, BLOCK_COLS, VEC, WHOLE, 1,
        )  # fmt: skip
        byte_at, o_byte, m_byte = tile(
            row, base, rows, channels, spatial, ranges, start, stride,
            BLOCK_ROWS, BLOCK_COLS, VEC, WHOLE, W if PACKED else 1,
        )  # fmt: skip
        centred, h = load_upstream(
            dy_ptr, x_ptr, mean, residual_ptr, mask_ptr, at, o_x, m_x, byte_at, o_byte, m_byte,
            scale, bias, slope, ACC, ACT, W, PACKED, "evict_last",
        )  # fmt: skip
        h = tl.where(m_x, h, 0.0)
        hx = tl.where(m_x, h * (centred * rstd), 0.0)
        if STATS == 1:
            lane_h += tl.sum(h)
            lane_hx += tl.sum(hx)
        else:
            lane_h += h
            lane_hx += hx
    sum_h = tl.sum(lane_h, 0)
    sum_hx = tl.sum(lane_hx, 0)
    o_out = sample_set * (channels // width) + o_channel
    m_out = m_col & (tl.arange(0, STATS) % width == 0)
    tl.store(dbias_ptr + o_out, by_segment(sum_h, width, CHANNELS), m_out)
    tl.store(dweight_ptr + o_out, by_segment(sum_hx, width, CHANNELS), m_out)
    # Masked columns have undefined weights; their sums are zeros.
    count = (samples * span.to(tl.int64) * (spatial // ranges)).to(ACC)
    factor = divide(number(live, live_low, ACC), count)
    shift = rstd * by_segment(tl.where(m_col, weight * sum_h, 0.0), span, CELLS) * factor
    slant = by_segment(tl.where(m_col, weight * sum_hx, 0.0), span, CELLS) * factor
    slant *= rstd * rstd
    for back in range(0, tiles):
        row = tiles - 1 - back
        at, o_x, m_x = tile(
            row, base, rows, channels, spatial, ranges, start, stride,
            BLOCK_ROWS, BLOCK_COLS, VEC, WHOLE, 1,
        )  # fmt: skip
        byte_at, o_byte, m_byte = tile(
            row, base, rows, channels, spatial, ranges, start, stride,
            BLOCK_ROWS, BLOCK_COLS, VEC, WHOLE, W if PACKED else 1,
        )  # fmt: skip
        centred, h = load_upstream(
            dy_ptr, x_ptr, mean, residual_ptr, mask_ptr, at, o_x, m_x, byte_at, o_byte, m_byte,
            scale, bias, slope, ACC, ACT, W, PACKED, "evict_first",
        )  # fmt: skip
        store_gradients(dx_ptr, dresidual_ptr, at, o_x, m_x, centred, h, scale, shift, slant, LIVE)
