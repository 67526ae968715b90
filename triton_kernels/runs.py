"""Sweeps over runs: NCHW, where a piece is contiguous, or any layout that gives it one stride.

    moments          partials (count, mean, M2) of x                            reads x
    apply            y = act((x - mean)*(rstd*w) + b (+ residual))              reads x, writes y
    backward_reduce  partials (sum h, sum h*xhat), h = act'(z)*dy               reads dy, x
    backward_apply   dx = rstd*(w*h - m0 - xhat*m1)
                        = scale*h - shift - (x - mean)*slant             reads dy, x, writes dx

each also reads residual where act needs z, and backward_apply then writes dresidual = h. With T
the bytes of x that is 3T forward in two sweeps and 5T backward.

A block owns (a, p, t): of sample set a and piece p, the t-th contiguous range of tiles, where a
tile is BLOCK_ROWS samples x BLOCK_COLS elements of the run and tiles go down the samples first.
So the lanes of a tile keep their columns for a while, and statistics stay one value a lane until
the columns change. The other sweeps number the tiles in one loop: two nested ones make the
compiler keep an address per element, tensor and loop, up to all 255 registers in scalar code.
Every block writes its own partial, ((a*P + p)*T + t): no atomics, and the same bits every time.
Offsets are 64-bit. STRIDED reads NHWC with a stride of C elements: the way for groups that
straddle channels, correct and slow.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pointwise import NONE, activate, activate_backward, load_affine, load_normalized, number
from .welford import chan, merge_lanes, push

SIZES = ["rows", "channels", "spatial", "group", "unit", "pieces", "splits"]


@triton.jit
def piece_start(piece, spatial, group, unit, REGULAR: tl.constexpr):
    """First element of a piece; the derivation is in geometry.py."""
    if REGULAR:
        return piece * unit
    else:
        s = spatial // unit
        g = group // unit
        period = piece // (s + g - 1)
        r = piece - period * (s + g - 1)
        i = (r * g + s + g - 1) // (s + g)
        j = (r * s + s + g - 1) // (s + g)
        start = tl.where(i * (s + g) < (r + 1) * g, i * spatial, j * group)
        return period * s * group + start


@triton.jit
def multiple(n, VEC: tl.constexpr):
    """n, which the plan knows to be a multiple of VEC, in a form that the compiler sees as one."""
    return n // VEC * VEC


@triton.jit
def locate(
    rows,
    channels,
    spatial,
    group,
    unit,
    pieces,
    splits,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    VEC: tl.constexpr,
    REGULAR: tl.constexpr,
    STRIDED: tl.constexpr,
):
    """This block's place.

    Returns (base, jump, stride, length): element (row, col) of the piece is base + row*jump +
    col*stride, col < length; (channel, cell): where its parameters and statistics are;
    (row_tiles, first, last): the tiles down the samples, and the block's range of tiles.
    """
    pid = tl.program_id(0)
    t = pid % splits
    owner = pid // splits
    sample_set = (owner // pieces).to(tl.int64)
    piece = (owner % pieces).to(tl.int64)

    start = piece_start(piece, spatial, group, unit, REGULAR)
    length = piece_start(piece + 1, spatial, group, unit, REGULAR) - start
    channel = start // spatial
    sample = spatial * channels.to(tl.int64)
    cell = sample_set * (sample // group) + start // group
    base = sample_set * rows * sample
    if STRIDED:
        base += (start - channel * spatial) * channels + channel
        stride = channels.to(tl.int64)
    else:
        base += start
        stride = 1
    row_tiles = tl.cdiv(rows, BLOCK_ROWS)
    tiles = row_tiles * tl.cdiv(length, BLOCK_COLS)
    first = (tiles * t // splits).to(tl.int32)
    last = (tiles * (t + 1) // splits).to(tl.int32)
    jump = multiple(sample, VEC)
    length = multiple(length, VEC)
    return multiple(base, VEC), jump, stride, length, channel, cell, row_tiles, first, last


@triton.jit
def tile(
    row,
    col,
    base,
    jump,
    stride,
    rows,
    length,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """(offsets, mask) of one tile's elements; row and col are 64-bit."""
    o_row = row * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    o_col = col * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
    return base + o_row * jump + o_col * stride, (o_row < rows) & (o_col < length)


@triton.jit(do_not_specialize=[*SIZES, "planes"])
def moments_runs_kernel(
    x_ptr,
    partials_ptr,  # (3, A*P*T): count, mean, M2
    rows,
    channels,
    spatial,
    group,
    unit,
    pieces,
    splits,
    planes,
    ACC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    VEC: tl.constexpr,
    REGULAR: tl.constexpr,
    STRIDED: tl.constexpr,
):
    base, jump, stride, length, channel, cell, row_tiles, first, last = locate(
        rows, channels, spatial, group, unit, pieces, splits,
        BLOCK_ROWS, BLOCK_COLS, VEC, REGULAR, STRIDED,
    )  # fmt: skip
    count = tl.zeros([], ACC)
    mean = count
    m2 = count
    first = first.to(tl.int64)
    last = last.to(tl.int64)
    for col in range(first // row_tiles, tl.cdiv(last, row_tiles)):
        begin = tl.maximum(first - col * row_tiles, 0)
        end = tl.minimum(last - col * row_tiles, row_tiles)
        lane_mean = tl.zeros([BLOCK_ROWS, BLOCK_COLS], ACC)
        lane_m2 = tl.zeros([BLOCK_ROWS, BLOCK_COLS], ACC)
        for row in range(begin, end):
            o_x, m_x = tile(row, col, base, jump, stride, rows, length, BLOCK_ROWS, BLOCK_COLS)
            x = tl.load(x_ptr + o_x, m_x, 0.0).to(ACC)
            lane_mean, lane_m2 = push(lane_mean, lane_m2, x, m_x, 1.0 / (row - begin + 1).to(ACC))
        # A lane met every row tile of the range but those that end above it.
        o_row = tl.arange(0, BLOCK_ROWS)[:, None]
        o_col = tl.arange(0, BLOCK_COLS)[None, :]
        met = tl.minimum(tl.cdiv(rows - o_row, BLOCK_ROWS), end) - begin
        m_col = o_col < length - col * BLOCK_COLS
        met = tl.where(m_col, tl.maximum(met, 0), 0).to(ACC)
        count, mean, m2 = chan(count, mean, m2, *merge_lanes(met, lane_mean, lane_m2, None))
    partial_ptr = partials_ptr + tl.program_id(0)
    tl.store(partial_ptr, count)
    tl.store(partial_ptr + planes, mean)
    tl.store(partial_ptr + 2 * planes.to(tl.int64), m2)


@triton.jit(do_not_specialize=SIZES)
def apply_runs_kernel(
    x_ptr,
    y_ptr,
    residual_ptr,  # or None
    mean_ptr,
    rstd_ptr,
    weight_ptr,  # or None
    bias_ptr,  # or None
    slope,
    slope_low,
    rows,
    channels,
    spatial,
    group,
    unit,
    pieces,
    splits,
    ACC: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    VEC: tl.constexpr,
    REGULAR: tl.constexpr,
    STRIDED: tl.constexpr,
):
    base, jump, stride, length, channel, cell, row_tiles, first, last = locate(
        rows, channels, spatial, group, unit, pieces, splits,
        BLOCK_ROWS, BLOCK_COLS, VEC, REGULAR, STRIDED,
    )  # fmt: skip
    slope = number(slope, slope_low, ACC)
    mean = tl.load(mean_ptr + cell)
    rstd = tl.load(rstd_ptr + cell)
    weight = load_affine(weight_ptr, channel, None, rstd, 1.0)
    bias = load_affine(bias_ptr, channel, None, rstd, 0.0)
    scale = rstd * weight
    for i in range(first, last):
        row, col = (i % row_tiles).to(tl.int64), (i // row_tiles).to(tl.int64)
        o_x, m_x = tile(row, col, base, jump, stride, rows, length, BLOCK_ROWS, BLOCK_COLS)
        _, z = load_normalized(x_ptr, residual_ptr, o_x, m_x, mean, scale, bias, ACC, NEEDED=True)
        tl.store(y_ptr + o_x, activate(z, slope, ACT), m_x)


@triton.jit(do_not_specialize=[*SIZES, "planes"])
def backward_reduce_runs_kernel(
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
    rows,
    channels,
    spatial,
    group,
    unit,
    pieces,
    splits,
    planes,
    ACC: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    VEC: tl.constexpr,
    REGULAR: tl.constexpr,
    STRIDED: tl.constexpr,
):
    base, jump, stride, length, channel, cell, row_tiles, first, last = locate(
        rows, channels, spatial, group, unit, pieces, splits,
        BLOCK_ROWS, BLOCK_COLS, VEC, REGULAR, STRIDED,
    )  # fmt: skip
    slope = number(slope, slope_low, ACC)
    mean = tl.load(mean_ptr + cell)
    rstd = tl.load(rstd_ptr + cell)
    weight = load_affine(weight_ptr, channel, None, rstd, 1.0)
    bias = load_affine(bias_ptr, channel, None, rstd, 0.0)
    scale = rstd * weight
    sum_h = tl.zeros([BLOCK_ROWS, BLOCK_COLS], ACC)
    sum_hx = tl.zeros([BLOCK_ROWS, BLOCK_COLS], ACC)
    for i in range(first, last):
        row, col = (i % row_tiles).to(tl.int64), (i // row_tiles).to(tl.int64)
        o_x, m_x = tile(row, col, base, jump, stride, rows, length, BLOCK_ROWS, BLOCK_COLS)
        centred, z = load_normalized(
            x_ptr, residual_ptr, o_x, m_x, mean, scale, bias, ACC, NEEDED=ACT != NONE
        )
        dy = tl.load(dy_ptr + o_x, m_x, 0.0).to(ACC)
        h = activate_backward(dy, z, slope, ACT)
        h = tl.where(m_x, h, 0.0)
        sum_h += h
        sum_hx += tl.where(m_x, h * (centred * rstd), 0.0)
    partial_ptr = partials_ptr + tl.program_id(0)
    tl.store(partial_ptr, tl.sum(sum_h))
    tl.store(partial_ptr + planes, tl.sum(sum_hx))


@triton.jit(do_not_specialize=[*SIZES, "cells"])
def backward_apply_runs_kernel(
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
    rows,
    channels,
    spatial,
    group,
    unit,
    pieces,
    splits,
    cells,
    ACC: tl.constexpr,
    ACT: tl.constexpr,
    LIVE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    VEC: tl.constexpr,
    REGULAR: tl.constexpr,
    STRIDED: tl.constexpr,
):
    base, jump, stride, length, channel, cell, row_tiles, first, last = locate(
        rows, channels, spatial, group, unit, pieces, splits,
        BLOCK_ROWS, BLOCK_COLS, VEC, REGULAR, STRIDED,
    )  # fmt: skip
    slope = number(slope, slope_low, ACC)
    mean = tl.load(mean_ptr + cell)
    rstd = tl.load(rstd_ptr + cell)
    weight = load_affine(weight_ptr, channel, None, rstd, 1.0)
    bias = load_affine(bias_ptr, channel, None, rstd, 0.0)
    scale = rstd * weight
    shift = rstd * tl.load(means_ptr + cell)
    slant = rstd * rstd * tl.load(means_ptr + cells + cell)
    for i in range(first, last):
        row, col = (i % row_tiles).to(tl.int64), (i // row_tiles).to(tl.int64)
        o_x, m_x = tile(row, col, base, jump, stride, rows, length, BLOCK_ROWS, BLOCK_COLS)
        centred, z = load_normalized(
            x_ptr, residual_ptr, o_x, m_x, mean, scale, bias, ACC, NEEDED=ACT != NONE
        )
        dy = tl.load(dy_ptr + o_x, m_x, 0.0).to(ACC)
        h = activate_backward(dy, z, slope, ACT)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + o_x, h, m_x)
        dx = scale * h
        if LIVE:
            dx -= shift + centred * slant
        tl.store(dx_ptr + o_x, dx, m_x)
