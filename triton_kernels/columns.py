"""Sweeps over columns: NHWC, where the channels of a position lie side by side.

The same four sweeps as runs.py, with the same equations, bytes and determinism:

    moments, apply, backward_reduce, backward_apply

for groups that cut every channel alike: whole channels to a group (Q = 1), or Q = G/C groups to a
channel. Then piece p = c*Q + q is the q-th range of S/Q positions of channel c.

A block owns (a, q, t) and BLOCK_COLS channels: of sample set a and range q, the t-th contiguous
range of row tiles, a row being one position of one sample. Loads run along the channels; every
lane keeps one channel, so the sums stay in their lanes until the end, and one reduction down the
tile makes a partial for each channel, ((a*P + p)*T + t).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pointwise import NONE, activate, activate_backward, load_affine, load_normalized, number
from .runs import multiple
from .welford import merge_lanes, push

SIZES = ["samples", "channels", "spatial", "group", "ranges", "splits"]


@triton.jit
def locate(
    samples,
    channels,
    spatial,
    group,
    ranges,
    splits,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    VEC: tl.constexpr,
):
    """This block's place.

    Returns (o_col, m_col): its channels; (cell, partial): where their statistics and partials are;
    (base, rows, first, last): the first row of the sample set's range, its rows, and the row tiles
    of the block.
    """
    col_tiles = tl.cdiv(channels, BLOCK_COLS)
    pid = tl.program_id(0)
    block = pid // col_tiles
    t = block % splits
    q = ((block // splits) % ranges).to(tl.int64)
    sample_set = (block // splits // ranges).to(tl.int64)

    o_col = (pid % col_tiles) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    m_col = o_col < multiple(channels, VEC)
    length = spatial // ranges
    groups = channels.to(tl.int64) * spatial // group
    cell = sample_set * groups + (o_col.to(tl.int64) * spatial + q * length) // group
    piece = (sample_set * channels + o_col) * ranges + q
    base = sample_set * samples * spatial + q * length
    rows = samples * length.to(tl.int64)
    tiles = tl.cdiv(rows, BLOCK_ROWS)
    first = tiles * t // splits
    last = tiles * (t + 1) // splits
    return o_col, m_col, cell, piece * splits + t, base, rows, first, last


@triton.jit
def tile(
    row,
    base,
    rows,
    channels,
    spatial,
    ranges,
    o_col,
    m_col,
    BLOCK_ROWS: tl.constexpr,
    VEC: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """(offsets, mask) of one tile's elements; a range's rows leave gaps between the samples."""
    o_row = row * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    position = base + o_row
    if not WHOLE:
        length = spatial // ranges
        position += o_row // length * (spatial - length)
    o_x = position[:, None] * multiple(channels, VEC) + o_col[None, :]
    return o_x, (o_row < rows)[:, None] & m_col[None, :]


@triton.jit(do_not_specialize=[*SIZES, "planes"])
def moments_columns_kernel(
    x_ptr,
    partials_ptr,  # (3, A*P*T): count, mean, M2
    samples,
    channels,
    spatial,
    group,
    ranges,
    splits,
    planes,
    ACC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    VEC: tl.constexpr,
    WHOLE: tl.constexpr,
):
    o_col, m_col, cell, partial, base, rows, first, last = locate(
        samples, channels, spatial, group, ranges, splits, BLOCK_ROWS, BLOCK_COLS, VEC
    )
    mean = tl.zeros([BLOCK_ROWS, BLOCK_COLS], ACC)
    m2 = tl.zeros([BLOCK_ROWS, BLOCK_COLS], ACC)
    for row in range(first, last):
        o_x, m_x = tile(
            row, base, rows, channels, spatial, ranges, o_col, m_col, BLOCK_ROWS, VEC, WHOLE
        )
        x = tl.load(x_ptr + o_x, m_x, 0.0).to(ACC)
        mean, m2 = push(mean, m2, x, m_x, 1.0 / (row - first + 1).to(ACC))
    # A lane met every row tile of the range but those that end above it.
    o_lane = tl.arange(0, BLOCK_ROWS)[:, None]
    met = tl.minimum(tl.cdiv(rows - o_lane, BLOCK_ROWS), last) - first
    met = tl.where(m_col[None, :], tl.maximum(met, 0), 0).to(ACC)
    count, mean, m2 = merge_lanes(met, mean, m2, 0)
    tl.store(partials_ptr + partial, count, m_col)
    tl.store(partials_ptr + planes + partial, mean, m_col)
    tl.store(partials_ptr + 2 * planes.to(tl.int64) + partial, m2, m_col)


@triton.jit(do_not_specialize=SIZES)
def apply_columns_kernel(
    x_ptr,
    y_ptr,
    residual_ptr,  # or None
    mean_ptr,
    rstd_ptr,
    weight_ptr,  # or None
    bias_ptr,  # or None
    slope,
    slope_low,
    samples,
    channels,
    spatial,
    group,
    ranges,
    splits,
    ACC: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    VEC: tl.constexpr,
    WHOLE: tl.constexpr,
):
    o_col, m_col, cell, partial, base, rows, first, last = locate(
        samples, channels, spatial, group, ranges, splits, BLOCK_ROWS, BLOCK_COLS, VEC
    )
    slope = number(slope, slope_low, ACC)
    mean = tl.load(mean_ptr + cell, m_col, 0.0)
    rstd = tl.load(rstd_ptr + cell, m_col, 0.0)
    scale = rstd * load_affine(weight_ptr, o_col, m_col, rstd, 1.0)
    bias = load_affine(bias_ptr, o_col, m_col, rstd, 0.0)
    for row in range(first, last):
        o_x, m_x = tile(
            row, base, rows, channels, spatial, ranges, o_col, m_col, BLOCK_ROWS, VEC, WHOLE
        )
        _, z = load_normalized(x_ptr, residual_ptr, o_x, m_x, mean, scale, bias, ACC, NEEDED=True)
        tl.store(y_ptr + o_x, activate(z, slope, ACT), m_x)


@triton.jit(do_not_specialize=[*SIZES, "planes"])
def backward_reduce_columns_kernel(
    dy_ptr,
    x_ptr,
    residual_ptr,  # or None
    mean_ptr,
    rstd_ptr,
    weight_ptr,  # or None
    bias_ptr,  # or None
    partials_ptr,  # (2, A*P*T): sum h, sum h*xhat
    slope,
    slope_low,
    samples,
    channels,
    spatial,
    group,
    ranges,
    splits,
    planes,
    ACC: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    VEC: tl.constexpr,
    WHOLE: tl.constexpr,
):
    o_col, m_col, cell, partial, base, rows, first, last = locate(
        samples, channels, spatial, group, ranges, splits, BLOCK_ROWS, BLOCK_COLS, VEC
    )
    slope = number(slope, slope_low, ACC)
    mean = tl.load(mean_ptr + cell, m_col, 0.0)
    rstd = tl.load(rstd_ptr + cell, m_col, 0.0)
    scale = rstd * load_affine(weight_ptr, o_col, m_col, rstd, 1.0)
    bias = load_affine(bias_ptr, o_col, m_col, rstd, 0.0)
    sum_h = tl.zeros([BLOCK_ROWS, BLOCK_COLS], ACC)
    sum_hx = tl.zeros([BLOCK_ROWS, BLOCK_COLS], ACC)
    for row in range(first, last):
        o_x, m_x = tile(
            row, base, rows, channels, spatial, ranges, o_col, m_col, BLOCK_ROWS, VEC, WHOLE
        )
        centred, z = load_normalized(
            x_ptr, residual_ptr, o_x, m_x, mean, scale, bias, ACC, NEEDED=ACT != NONE
        )
        dy = tl.load(dy_ptr + o_x, m_x, 0.0).to(ACC)
        h = tl.where(m_x, activate_backward(dy, z, slope, ACT), 0.0)
        sum_h += h
        sum_hx += tl.where(m_x, h * (centred * rstd), 0.0)
    tl.store(partials_ptr + partial, tl.sum(sum_h, 0), m_col)
    tl.store(partials_ptr + planes + partial, tl.sum(sum_hx, 0), m_col)


@triton.jit(do_not_specialize=[*SIZES, "cells"])
def backward_apply_columns_kernel(
    dy_ptr,
    x_ptr,
    residual_ptr,  # or None
    dx_ptr,
    dresidual_ptr,  # or None
    mean_ptr,
    rstd_ptr,
    weight_ptr,  # or None
    bias_ptr,  # or None
    means_ptr,  # (2, K): m0, m1; read if LIVE
    slope,
    slope_low,
    samples,
    channels,
    spatial,
    group,
    ranges,
    splits,
    cells,
    ACC: tl.constexpr,
    ACT: tl.constexpr,
    LIVE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    VEC: tl.constexpr,
    WHOLE: tl.constexpr,
):
    o_col, m_col, cell, partial, base, rows, first, last = locate(
        samples, channels, spatial, group, ranges, splits, BLOCK_ROWS, BLOCK_COLS, VEC
    )
    slope = number(slope, slope_low, ACC)
    mean = tl.load(mean_ptr + cell, m_col, 0.0)
    rstd = tl.load(rstd_ptr + cell, m_col, 0.0)
    scale = rstd * load_affine(weight_ptr, o_col, m_col, rstd, 1.0)
    bias = load_affine(bias_ptr, o_col, m_col, rstd, 0.0)
    shift = rstd * tl.load(means_ptr + cell, m_col, 0.0)
    slant = rstd * rstd * tl.load(means_ptr + cells + cell, m_col, 0.0)
    for row in range(first, last):
        o_x, m_x = tile(
            row, base, rows, channels, spatial, ranges, o_col, m_col, BLOCK_ROWS, VEC, WHOLE
        )
        centred, z = load_normalized(
            x_ptr,
            residual_ptr,
            o_x,
            m_x,
            mean,
            scale,
            bias,
            ACC,
            NEEDED=ACT != NONE,
        )
        dy = tl.load(dy_ptr + o_x, m_x, 0.0).to(ACC)
        h = activate_backward(dy, z, slope, ACT)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + o_x, h, m_x)
        dx = scale * h
        if LIVE:
            dx -= shift + centred * slant
        tl.store(dx_ptr + o_x, dx, m_x)
