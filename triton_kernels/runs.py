"""Sweeps over runs: NCHW, where a piece is contiguous, or any layout that gives it one stride.

    moments          partials (count, mean, M2) of x                            reads x
    apply            y = act((x - mean)*(rstd*w) + b (+ residual))              reads x, writes y
    backward_reduce  partials (sum h, sum h*xhat), h = act'(z)*dy               reads dy, x
    backward_apply   dx = rstd*(w*h - m0 - xhat*m1)
                        = scale*h - shift - (x - mean)*slant             reads dy, x, writes dx

each also reads residual (or the mask) where act needs z, and backward_apply then writes
dresidual = h. With T the bytes of x that is 3T forward in two sweeps and 5T backward.

A block owns (a, p, t): of sample set a and piece p, the t-th contiguous range of tiles, where a
tile is BLOCK_ROWS samples x BLOCK_COLS elements of the run and tiles go down the samples first.
So the lanes of a tile keep their columns for a while, and statistics stay one value a lane until
the columns change. The other sweeps number the tiles in one loop: two nested ones make the
compiler keep an address per element, tensor and loop, up to all 255 registers in scalar code.
Every block writes its own partial, ((a*P + p)*T + t), and the last one of a cell combines them
(combine.py). The second sweeps go the other way, over the blocks and in each, and so begin with
what the first ones have left in the L2 cache. Offsets are 64-bit. STRIDED reads NHWC with a stride
of C elements: the way for groups that straddle channels, correct and slow.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .combine import finish_channels, finish_moments, finish_sums, last
from .indexing import multiple, piece_start, stretch
from .pointwise import (
    load_affine,
    load_upstream,
    number,
    store_gradients,
    store_mask,
    store_output,
)
from .welford import chan, merge_lanes, push

SIZES = ["rows", "channels", "spatial", "group", "unit", "groups", "pieces", "splits"]


@triton.jit
def locate(
    pid,
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
    (row_tiles, begin, end): the tiles down the samples, and the block's range of tiles.
    """
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
    begin = (tiles * t // splits).to(tl.int32)
    end = (tiles * (t + 1) // splits).to(tl.int32)
    jump = multiple(sample, VEC)
    length = multiple(length, VEC)
    return multiple(base, VEC), jump, stride, length, channel, cell, row_tiles, begin, end


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
    STRIDED: tl.constexpr,
    DIV: tl.constexpr,
):
    """(at, offsets, mask) of one tile's elements, or of its runs of DIV; row and col are 64-bit.

    Offsets from ``at`` have 32 bits where a tile is one row of neighbours.
    """
    o_row = tl.arange(0, BLOCK_ROWS)[:, None]
    o_col = tl.arange(0, BLOCK_COLS // DIV)[None, :]
    top = row * BLOCK_ROWS
    left = col * (BLOCK_COLS // DIV)
    mask = (o_row < rows - top) & (o_col < length // DIV - left)
    at = base // DIV + top * (jump // DIV) + left * stride
    if BLOCK_ROWS == 1 and not STRIDED:
        return at, o_row + o_col, mask
    else:
        return at, o_row * (jump // DIV) + o_col * stride, mask


@triton.jit(do_not_specialize=[*SIZES, "planes"])
def moments_runs_kernel(
    x_ptr,
    partials_ptr,  # (3, A*P*T): count, mean, M2
    counters_ptr,  # a zero for each cell, or None: the partials are combined elsewhere
    mean_ptr,
    rstd_ptr,
    var_ptr,
    running_mean_ptr,
    running_var_ptr,
    tracked_ptr,
    eps,
    eps_low,
    momentum,
    momentum_low,
    rows,
    channels,
    spatial,
    group,
    unit,
    groups,
    pieces,
    splits,
    planes,
    ACC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    VEC: tl.constexpr,
    REGULAR: tl.constexpr,
    STRIDED: tl.constexpr,
    STEP: tl.constexpr,
):
    pid = tl.program_id(0)
    base, jump, stride, length, channel, cell, row_tiles, first, end = locate(
        pid, rows, channels, spatial, group, unit, pieces, splits,
        BLOCK_ROWS, BLOCK_COLS, VEC, REGULAR, STRIDED,
    )  # fmt: skip
    count = tl.zeros([], ACC)
    mean = count
    m2 = count
    first = first.to(tl.int64)
    end = end.to(tl.int64)
    for col in range(first // row_tiles, tl.cdiv(end, row_tiles)):
        top = tl.maximum(first - col * row_tiles, 0)
        bottom = tl.minimum(end - col * row_tiles, row_tiles)
        lane_mean = tl.zeros([BLOCK_ROWS, BLOCK_COLS], ACC)
        lane_m2 = tl.zeros([BLOCK_ROWS, BLOCK_COLS], ACC)
        for row in range(top, bottom):
            at, o_x, m_x = tile(
                row, col, base, jump, stride, rows, length, BLOCK_ROWS, BLOCK_COLS, STRIDED, 1
            )
            x = tl.load(x_ptr + at + o_x, m_x, 0.0, eviction_policy="evict_last").to(ACC)
            lane_mean, lane_m2 = push(lane_mean, lane_m2, x, m_x, 1.0 / (row - top + 1).to(ACC))
        # A lane met every row tile of the range but those that end above it.
        o_row = tl.arange(0, BLOCK_ROWS)[:, None]
        o_col = tl.arange(0, BLOCK_COLS)[None, :]
        met = tl.minimum(tl.cdiv(rows - o_row, BLOCK_ROWS), bottom) - top
        m_col = o_col < length - col * BLOCK_COLS
        met = tl.where(m_col, tl.maximum(met, 0), 0).to(ACC)
        count, mean, m2 = chan(count, mean, m2, *merge_lanes(met, lane_mean, lane_m2, None))
    partial_ptr = partials_ptr + pid
    tl.store(partial_ptr, count)
    tl.store(partial_ptr + planes, mean)
    tl.store(partial_ptr + 2 * planes.to(tl.int64), m2)
    if counters_ptr is not None:
        begin, stop = stretch(cell, spatial, group, unit, groups, pieces, splits, REGULAR)
        if last(counters_ptr + cell, stop - begin):
            finish_moments(
                partials_ptr, planes, cell, 1, 1,
                mean_ptr, rstd_ptr, var_ptr, running_mean_ptr, running_var_ptr, tracked_ptr,
                eps, eps_low, momentum, momentum_low,
                spatial, group, unit, groups, pieces, splits, ACC, 1, STEP, REGULAR,
            )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def apply_runs_kernel(
    x_ptr,
    y_ptr,
    residual_ptr,  # or None
    mask_ptr,  # or None; W divides VEC if given
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
    groups,
    pieces,
    splits,
    ACC: tl.constexpr,
    ACT: tl.constexpr,
    W: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    VEC: tl.constexpr,
    REGULAR: tl.constexpr,
    STRIDED: tl.constexpr,
):
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    base, jump, stride, length, channel, cell, row_tiles, first, end = locate(
        pid, rows, channels, spatial, group, unit, pieces, splits,
        BLOCK_ROWS, BLOCK_COLS, VEC, REGULAR, STRIDED,
    )  # fmt: skip
    slope = number(slope, slope_low, ACC)
    mean = tl.load(mean_ptr + cell)
    rstd = tl.load(rstd_ptr + cell)
    scale = rstd * load_affine(weight_ptr, channel, None, rstd, 1.0)
    bias = load_affine(bias_ptr, channel, None, rstd, 0.0)
    for back in range(first, end):
        i = first + end - 1 - back
        row, col = (i % row_tiles).to(tl.int64), (i // row_tiles).to(tl.int64)
        at, o_x, m_x = tile(
            row, col, base, jump, stride, rows, length, BLOCK_ROWS, BLOCK_COLS, STRIDED, 1
        )
        x = tl.load(x_ptr + at + o_x, m_x, 0.0, eviction_policy="evict_first").to(ACC)
        y = store_output(y_ptr, residual_ptr, at, o_x, m_x, x - mean, scale, bias, slope, ACT)
        if mask_ptr is not None:
            byte_at, o_byte, m_byte = tile(
                row, col, base, jump, stride, rows, length, BLOCK_ROWS, BLOCK_COLS, STRIDED, W
            )
            store_mask(mask_ptr, byte_at, o_byte, m_byte, y, W)


@triton.jit(do_not_specialize=[*SIZES, "planes", "cells"])
def backward_reduce_runs_kernel(
    dy_ptr,
    x_ptr,
    residual_ptr,  # or None
    mask_ptr,  # or None
    mean_ptr,
    rstd_ptr,
    weight_ptr,  # or None
    bias_ptr,  # or None
    partials_ptr,  # (2, A*P*T): sum h, sum h*xhat
    counters_ptr,  # a zero for each cell, or None: the partials are combined elsewhere
    means_ptr,  # (2, K): m0, m1
    slope,
    slope_low,
    live,
    live_low,
    rows,
    channels,
    spatial,
    group,
    unit,
    groups,
    pieces,
    splits,
    planes,
    cells,
    ACC: tl.constexpr,
    ACT: tl.constexpr,
    W: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    VEC: tl.constexpr,
    REGULAR: tl.constexpr,
    STRIDED: tl.constexpr,
    STEP: tl.constexpr,
):
    pid = tl.program_id(0)
    base, jump, stride, length, channel, cell, row_tiles, first, end = locate(
        pid, rows, channels, spatial, group, unit, pieces, splits,
        BLOCK_ROWS, BLOCK_COLS, VEC, REGULAR, STRIDED,
    )  # fmt: skip
    slope = number(slope, slope_low, ACC)
    mean = tl.load(mean_ptr + cell)
    rstd = tl.load(rstd_ptr + cell)
    scale = rstd * load_affine(weight_ptr, channel, None, rstd, 1.0)
    bias = load_affine(bias_ptr, channel, None, rstd, 0.0)
    PACKED: tl.constexpr = VEC == W
    sum_h = tl.zeros([BLOCK_ROWS, BLOCK_COLS], ACC)
    sum_hx = tl.zeros([BLOCK_ROWS, BLOCK_COLS], ACC)
    for i in range(first, end):
        row, col = (i % row_tiles).to(tl.int64), (i // row_tiles).to(tl.int64)
        at, o_x, m_x = tile(
            row, col, base, jump, stride, rows, length, BLOCK_ROWS, BLOCK_COLS, STRIDED, 1
        )
        byte_at, o_byte, m_byte = tile(
            row,
            col,
            base,
            jump,
            stride,
            rows,
            length,
            BLOCK_ROWS,
            BLOCK_COLS,
            STRIDED,
            W if PACKED else 1,
        )
        centred, h = load_upstream(
            dy_ptr, x_ptr, mean, residual_ptr, mask_ptr, at, o_x, m_x, byte_at, o_byte, m_byte,
            scale, bias, slope, ACC, ACT, W, PACKED, "evict_last",
        )  # fmt: skip
        h = tl.where(m_x, h, 0.0)
        sum_h += h
        sum_hx += tl.where(m_x, h * (centred * rstd), 0.0)
    partial_ptr = partials_ptr + pid
    tl.store(partial_ptr, tl.sum(sum_h))
    tl.store(partial_ptr + planes, tl.sum(sum_hx))
    if counters_ptr is not None:
        begin, stop = stretch(cell, spatial, group, unit, groups, pieces, splits, REGULAR)
        if last(counters_ptr + cell, stop - begin):
            finish_sums(
                partials_ptr, planes, cell, 1, 1, weight_ptr, means_ptr, cells, live, live_low,
                rows, spatial, group, unit, groups, pieces, splits, ACC, 1, STEP, REGULAR,
            )  # fmt: skip


@triton.jit(do_not_specialize=[*SIZES, "planes", "cells", "sets", "part_splits"])
def backward_apply_runs_kernel(
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
    rows,
    channels,
    spatial,
    group,
    unit,
    groups,
    pieces,
    splits,
    planes,
    cells,
    sets,
    part_splits,
    ACC: tl.constexpr,
    ACT: tl.constexpr,
    W: tl.constexpr,
    LIVE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    VEC: tl.constexpr,
    REGULAR: tl.constexpr,
    STRIDED: tl.constexpr,
    CHANNELS: tl.constexpr,
    STEP: tl.constexpr,
):
    finish_channels(
        partials_ptr, planes, dweight_ptr, dbias_ptr,
        sets, channels, spatial, group, unit, pieces, part_splits, ACC, CHANNELS, STEP, REGULAR,
    )  # fmt: skip
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    base, jump, stride, length, channel, cell, row_tiles, first, end = locate(
        pid, rows, channels, spatial, group, unit, pieces, splits,
        BLOCK_ROWS, BLOCK_COLS, VEC, REGULAR, STRIDED,
    )  # fmt: skip
    slope = number(slope, slope_low, ACC)
    mean = tl.load(mean_ptr + cell)
    rstd = tl.load(rstd_ptr + cell)
    scale = rstd * load_affine(weight_ptr, channel, None, rstd, 1.0)
    bias = load_affine(bias_ptr, channel, None, rstd, 0.0)
    shift = rstd * tl.load(means_ptr + cell)
    slant = rstd * rstd * tl.load(means_ptr + cells + cell)
    PACKED: tl.constexpr = VEC == W
    for back in range(first, end):
        i = first + end - 1 - back
        row, col = (i % row_tiles).to(tl.int64), (i // row_tiles).to(tl.int64)
        at, o_x, m_x = tile(
            row, col, base, jump, stride, rows, length, BLOCK_ROWS, BLOCK_COLS, STRIDED, 1
        )
        byte_at, o_byte, m_byte = tile(
            row,
            col,
            base,
            jump,
            stride,
            rows,
            length,
            BLOCK_ROWS,
            BLOCK_COLS,
            STRIDED,
            W if PACKED else 1,
        )
        centred, h = load_upstream(
            dy_ptr, x_ptr, mean, residual_ptr, mask_ptr, at, o_x, m_x, byte_at, o_byte, m_byte,
            scale, bias, slope, ACC, ACT, W, PACKED, "evict_first",
        )  # fmt: skip
        store_gradients(dx_ptr, dresidual_ptr, at, o_x, m_x, centred, h, scale, shift, slant, LIVE)
