"""The second sweeps over columns (columns.py says what those are): apply and backward_apply.

They reduce nothing, so frames serve here whatever the groups are: a tile is any BLOCK_COLS columns,
each with the channel, the cell and the four numbers that its address says. They go the other way
than the first sweeps, over the blocks and in each, and so begin with what those have left in the
L2 cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .columns import SIZES, locate, tile
from .combine import finish_channels
from .pointwise import (
    load_affine,
    load_upstream,
    number,
    store_gradients,
    store_mask,
    store_output,
)


@triton.jit(do_not_specialize=SIZES)
def apply_columns_kernel(
    x_ptr,
    y_ptr,
    residual_ptr,  # or None
    mask_ptr,  # or None; VEC is W if given
    mean_ptr,
    rstd_ptr,
    weight_ptr,  # or None
    bias_ptr,  # or None
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
):
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    start, o_col, m_col, cell, base, rows, first, end = locate(
        pid, samples, channels, spatial, span, ranges, stride, splits, BLOCK_ROWS, BLOCK_COLS, VEC
    )
    slope = number(slope, slope_low, ACC)
    mean = tl.load(mean_ptr + cell, m_col, 0.0)
    rstd = tl.load(rstd_ptr + cell, m_col, 0.0)
    scale = rstd * load_affine(weight_ptr, o_col // width, m_col, rstd, 1.0)
    bias = load_affine(bias_ptr, o_col // width, m_col, rstd, 0.0)
    for back in range(first, end):
        row = first + end - 1 - back
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


@triton.jit(
    do_not_specialize=[*SIZES, "planes", "cells", "sets", "part_unit", "part_pieces", "part_splits"]
)
def backward_apply_columns_kernel(
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
    partials_ptr,
    means_ptr,  # (2, K): m0, m1; read if LIVE
    dweight_ptr,
    dbias_ptr,
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
    planes,
    cells,
    sets,
    part_unit,
    part_pieces,
    part_splits,
    ACC: tl.constexpr,
    ACT: tl.constexpr,
    W: tl.constexpr,
    LIVE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    VEC: tl.constexpr,
    WHOLE: tl.constexpr,
    REGULAR: tl.constexpr,
    CHANNELS: tl.constexpr,
    STEP: tl.constexpr,
):
    finish_channels(
        partials_ptr, planes, dweight_ptr, dbias_ptr, sets, channels // width, spatial * width,
        span * spatial // ranges, part_unit, part_pieces, part_splits, ACC, CHANNELS, STEP, REGULAR,
    )  # fmt: skip
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    start, o_col, m_col, cell, base, rows, first, end = locate(
        pid, samples, channels, spatial, span, ranges, stride, splits, BLOCK_ROWS, BLOCK_COLS, VEC
    )
    slope = number(slope, slope_low, ACC)
    mean = tl.load(mean_ptr + cell, m_col, 0.0)
    rstd = tl.load(rstd_ptr + cell, m_col, 0.0)
    scale = rstd * load_affine(weight_ptr, o_col // width, m_col, rstd, 1.0)
    bias = load_affine(bias_ptr, o_col // width, m_col, rstd, 0.0)
    shift = rstd * tl.load(means_ptr + cell, m_col, 0.0)
    slant = rstd * rstd * tl.load(means_ptr + cells + cell, m_col, 0.0)
    PACKED: tl.constexpr = VEC == W
    for back in range(first, end):
        row = first + end - 1 - back
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
