"""Sweeps over columns: rows of memory whose elements each belong to a fixed channel.

The same four sweeps as runs.py, with the same equations, bytes and determinism, over a matrix:

    NHWC     a row is a position of a sample, a column a channel (width 1); groups cut every
             channel alike, into Q = 1 or Q = G/C ranges, and rows are taken from one range
    frames   NCHW read as samples x C*S: a row is a sample, a channel S neighbouring columns
             (width S). 7x7 and 14x14 planes of a half type do not begin on 16 bytes, rows do

A block owns (a, q, t) and one tile of ``stride`` columns: of sample set a and range q, the t-th
contiguous range of row tiles. Every lane keeps one column, so the sums stay in their lanes until
the end; one reduction down the tile gives a value for each column, and in frames one along it, a
value for each piece, ``unit`` columns. Partials are ((a*P + p)*F + f), as everywhere.

Few channels mean few tiles and hundreds of splits t, too many for one block to merge. So ``fan``
splits that follow each other are merged by the last of them, and the F = T/fan results by the last
fan of the cells' ``bundle`` of tiles: a tree of two levels, merged by index whoever is last. The
partials of splits lie behind those of the fans, ((a*T + t)*P + p), in rows of neighbours.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .combine import finish_moments, finish_sums, last
from .indexing import multiple
from .pointwise import (
    load_affine,
    load_upstream,
    number,
)
from .welford import chan, merge_lanes, push

SIZES = ["samples", "channels", "spatial", "span", "ranges", "width", "unit", "stride", "splits"]
FOLDING = ["fan", "bundle", "planes"]

# Rows of split partials that the last of a fan loads at a time: 3 x 8 x 128 values a block.
FAN_STEP: tl.constexpr = tl.constexpr(8)

# Columns x pieces of a frame that are told apart at a time.
SEGMENT_ELEMENTS: tl.constexpr = tl.constexpr(2048)


@triton.jit
def place(pid, channels, ranges, stride, splits):
    """(sample set, range, split, column tile, column tiles) of a block."""
    col_tiles = tl.cdiv(channels, stride)
    block = pid // col_tiles
    owner = block // splits
    return owner // ranges, owner % ranges, block % splits, pid % col_tiles, col_tiles


@triton.jit
def locate(
    pid,
    samples,
    channels,
    spatial,
    span,
    ranges,
    stride,
    splits,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    VEC: tl.constexpr,
):
    """This block's columns and rows.

    Returns (start, o_col, m_col): its columns; cell: where their statistics are; (base, rows,
    first, end): the first row of the sample set's range, its rows, and the block's row tiles.
    """
    sample_set, q, t, col_tile, col_tiles = place(pid, channels, ranges, stride, splits)
    sample_set = sample_set.to(tl.int64)
    q = q.to(tl.int64)
    start = col_tile * multiple(stride, VEC)
    o_local = tl.arange(0, BLOCK_COLS)
    o_col = start + o_local
    m_col = (o_local < multiple(stride, VEC)) & (o_col < multiple(channels, VEC))
    length = spatial // ranges
    cell = sample_set * (channels // span * ranges) + (o_col // span * ranges + q)
    base = sample_set * samples * spatial + q * length
    rows = samples * length.to(tl.int64)
    tiles = tl.cdiv(rows, BLOCK_ROWS)
    first = tiles * t // splits
    end = tiles * (t + 1) // splits
    return start, o_col, m_col, cell, base, rows, first, end


@triton.jit
def tile(
    row,
    base,
    rows,
    channels,
    spatial,
    ranges,
    start,
    stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    VEC: tl.constexpr,
    WHOLE: tl.constexpr,
    DIV: tl.constexpr,
):
    """(at, offsets, mask) of one tile's elements, or of its runs of DIV along the columns.

    ``at`` is one 64-bit number, and offsets from there have 32 bits, which saves a register an
    access; the plan sees to it that a tile is short enough. But a range's rows leave gaps between
    the samples.
    """
    o_local = tl.arange(0, BLOCK_COLS // DIV)
    o_col = start // DIV + o_local
    wide = multiple(channels, VEC) // DIV
    m_col = (o_local < multiple(stride, VEC) // DIV) & (o_col < wide)
    o_row = tl.arange(0, BLOCK_ROWS)
    top = (tl.zeros([], tl.int64) + row) * BLOCK_ROWS
    m_x = (o_row < rows - top)[:, None] & m_col[None, :]
    if WHOLE:
        return (base + top) * wide, o_row[:, None] * wide + o_col[None, :], m_x
    else:
        length = spatial // ranges
        position = top + o_row
        position += position // length * (spatial - length)
        return base * wide, position[:, None] * wide + o_col[None, :], m_x


@triton.jit
def pieces_of(col_tile, o_lane, channels, unit, stride):
    """(number among the sample set's columns of pieces, mask) of a block's lanes."""
    o_piece = col_tile * (stride // unit) + o_lane
    return o_piece, (o_lane < stride // unit) & (o_piece < channels // unit)


@triton.jit
def component(sample_set, q, col_tile, col_tiles, channels, span, ranges, stride, bundle):
    """The bundle of tiles that a block's cells span: (number, tiles, first cell, cells).

    With several ranges a channel has its cells side by side, and those of one range lie Q apart.
    """
    bundles = tl.cdiv(col_tiles, bundle)
    part = col_tile // bundle
    tiles = tl.minimum(col_tiles - part * bundle, bundle)
    left = part * bundle * stride
    right = tl.minimum(left + bundle * stride, channels)
    first = sample_set * (channels // span * ranges) + left // span * ranges + q
    return (sample_set * ranges + q) * bundles + part, tiles, first, (right - left) // span


@triton.jit(do_not_specialize=[*SIZES, *FOLDING])
def moments_columns_kernel(
    x_ptr,
    partials_ptr,  # (3, A*P*F): count, mean, M2; behind them (3, A*T*P) if FANNED
    counters_ptr,  # zeros, fans of each tile and then bundles; or None: combined elsewhere
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
    samples,
    channels,
    spatial,
    span,
    ranges,
    width,
    unit,
    stride,
    splits,
    fan,
    bundle,
    planes,
    ACC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    LANES: tl.constexpr,  # pieces of a tile, as a power of two
    VEC: tl.constexpr,
    WHOLE: tl.constexpr,
    FRAMED: tl.constexpr,
    FANNED: tl.constexpr,
    CELLS: tl.constexpr,
    STEP: tl.constexpr,
):
    pid = tl.program_id(0)
    start, o_col, m_col, cell, base, rows, first, end = locate(
        pid, samples, channels, spatial, span, ranges, stride, splits, BLOCK_ROWS, BLOCK_COLS, VEC
    )
    mean = tl.zeros([BLOCK_ROWS, BLOCK_COLS], ACC)
    m2 = tl.zeros([BLOCK_ROWS, BLOCK_COLS], ACC)
    for row in range(first, end):
        at, o_x, m_x = tile(
            row, base, rows, channels, spatial, ranges, start, stride,
            BLOCK_ROWS, BLOCK_COLS, VEC, WHOLE, 1,
        )  # fmt: skip
        x = tl.load(x_ptr + at + o_x, m_x, 0.0, eviction_policy="evict_last").to(ACC)
        mean, m2 = push(mean, m2, x, m_x, 1.0 / (row - first + 1).to(ACC))
    # A lane met every row tile of the range but those that end above it.
    o_below = tl.arange(0, BLOCK_ROWS)[:, None]
    met = tl.minimum(tl.cdiv(rows - o_below, BLOCK_ROWS), end) - first
    met = tl.where(m_col[None, :], tl.maximum(met, 0), 0).to(ACC)
    count, mean, m2 = merge_lanes(met, mean, m2, 0)

    sample_set, q, t, col_tile, col_tiles = place(pid, channels, ranges, stride, splits)
    fans = tl.cdiv(splits, fan)
    fan_planes = planes.to(tl.int64)
    split_planes = fan_planes // fans * splits
    pieces = (channels // unit).to(tl.int64) * ranges
    fan_ptr = partials_ptr + (sample_set * pieces + q) * fans
    split_ptr = partials_ptr + 3 * fan_planes + sample_set * splits * pieces + q
    CHUNK: tl.constexpr = min(LANES, SEGMENT_ELEMENTS // BLOCK_COLS) if FRAMED else LANES
    for chunk in range(0, LANES, CHUNK):
        o_lane = chunk + tl.arange(0, CHUNK)
        if FRAMED:
            own = (tl.arange(0, BLOCK_COLS) // unit)[None, :] == o_lane[:, None]
            c, m, v = merge_lanes(
                tl.where(own, count[None, :], 0.0),
                tl.where(own, mean[None, :], 0.0),
                tl.where(own, m2[None, :], 0.0),
                1,
            )
        else:
            c, m, v = count, mean, m2
        o_piece, m_piece = pieces_of(col_tile, o_lane, channels, unit, stride)
        if FANNED:
            lane_ptr = split_ptr + t * pieces + o_piece * ranges
            lane_planes = split_planes
        else:
            lane_ptr = fan_ptr + t + o_piece * (ranges * fans)
            lane_planes = fan_planes
        tl.store(lane_ptr, c, m_piece)
        tl.store(lane_ptr + lane_planes, m, m_piece)
        tl.store(lane_ptr + 2 * lane_planes, v, m_piece)

    if counters_ptr is not None:
        tile_fans = (sample_set * ranges + q) * col_tiles * fans
        all_fans = tl.num_programs(0) // splits * fans if FANNED else 0
        done = splits > 0
        if FANNED:
            f = t // fan
            size = tl.minimum(splits - f * fan, fan)
            done = last(counters_ptr + tile_fans + col_tile * fans + f, size)
            if done:
                o_lane = tl.arange(0, LANES)
                o_piece, m_piece = pieces_of(col_tile, o_lane, channels, unit, stride)
                c = tl.zeros([LANES], ACC)
                m = c
                v = c
                for top in range(0, size, FAN_STEP):
                    o_row = top + tl.arange(0, FAN_STEP)
                    lane_ptr = split_ptr + (f * fan + o_row)[:, None] * pieces
                    lane_ptr += o_piece[None, :] * ranges
                    m_lane = (o_row < size)[:, None] & m_piece[None, :]
                    c, m, v = chan(
                        c, m, v,
                        *merge_lanes(
                            tl.load(lane_ptr, m_lane, 0.0, cache_modifier=".cg"),
                            tl.load(lane_ptr + split_planes, m_lane, 0.0, cache_modifier=".cg"),
                            tl.load(lane_ptr + 2 * split_planes, m_lane, 0.0, cache_modifier=".cg"),
                            0,
                        ),
                    )  # fmt: skip
                lane_ptr = fan_ptr + f + o_piece * (ranges * fans)
                tl.store(lane_ptr, c, m_piece)
                tl.store(lane_ptr + fan_planes, m, m_piece)
                tl.store(lane_ptr + 2 * fan_planes, v, m_piece)
        if done:
            part, tiles, first_cell, many = component(
                sample_set, q, col_tile, col_tiles, channels, span, ranges, stride, bundle
            )
            if last(counters_ptr + all_fans + part, tiles * fans):
                group = span.to(tl.int64) * (spatial // ranges)
                finish_moments(
                    partials_ptr, planes, first_cell, ranges, many,
                    mean_ptr, rstd_ptr, var_ptr, running_mean_ptr, running_var_ptr, tracked_ptr,
                    eps, eps_low, momentum, momentum_low,
                    spatial, group, unit, channels // span * ranges,
                    channels // unit * ranges, fans,
                    ACC, CELLS, STEP, True,
                )  # fmt: skip


@triton.jit(do_not_specialize=[*SIZES, *FOLDING, "cells"])
def backward_reduce_columns_kernel(
    dy_ptr,
    x_ptr,
    residual_ptr,  # or None
    mask_ptr,  # or None
    mean_ptr,
    rstd_ptr,
    weight_ptr,  # or None
    bias_ptr,  # or None
    partials_ptr,  # (2, A*P*F): sum h, sum h*xhat; behind them (2, A*T*P) if FANNED
    counters_ptr,
    means_ptr,  # (2, K): m0, m1
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
    fan,
    bundle,
    planes,
    cells,
    ACC: tl.constexpr,
    ACT: tl.constexpr,
    W: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    WHOLE: tl.constexpr,
    FRAMED: tl.constexpr,
    FANNED: tl.constexpr,
    CELLS: tl.constexpr,
    STEP: tl.constexpr,
):
    pid = tl.program_id(0)
    start, o_col, m_col, cell, base, rows, first, end = locate(
        pid, samples, channels, spatial, span, ranges, stride, splits, BLOCK_ROWS, BLOCK_COLS, VEC
    )
    slope = number(slope, slope_low, ACC)
    mean = tl.load(mean_ptr + cell, m_col, 0.0)
    rstd = tl.load(rstd_ptr + cell, m_col, 0.0)
    scale = rstd * load_affine(weight_ptr, o_col // width, m_col, rstd, 1.0)
    bias = load_affine(bias_ptr, o_col // width, m_col, rstd, 0.0)
    PACKED: tl.constexpr = VEC == W
    sum_h = tl.zeros([BLOCK_ROWS, BLOCK_COLS], ACC)
    sum_hx = tl.zeros([BLOCK_ROWS, BLOCK_COLS], ACC)
    for row in range(first, end):
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
        sum_h += h
        sum_hx += tl.where(m_x, h * (centred * rstd), 0.0)
    total_h = tl.sum(sum_h, 0)
    total_hx = tl.sum(sum_hx, 0)

    sample_set, q, t, col_tile, col_tiles = place(pid, channels, ranges, stride, splits)
    fans = tl.cdiv(splits, fan)
    fan_planes = planes.to(tl.int64)
    split_planes = fan_planes // fans * splits
    pieces = (channels // unit).to(tl.int64) * ranges
    fan_ptr = partials_ptr + (sample_set * pieces + q) * fans
    split_ptr = partials_ptr + 2 * fan_planes + sample_set * splits * pieces + q
    CHUNK: tl.constexpr = min(LANES, SEGMENT_ELEMENTS // BLOCK_COLS) if FRAMED else LANES
    for chunk in range(0, LANES, CHUNK):
        o_lane = chunk + tl.arange(0, CHUNK)
        if FRAMED:
            own = (tl.arange(0, BLOCK_COLS) // unit)[None, :] == o_lane[:, None]
            h = tl.sum(tl.where(own, total_h[None, :], 0.0), 1)
            hx = tl.sum(tl.where(own, total_hx[None, :], 0.0), 1)
        else:
            h, hx = total_h, total_hx
        o_piece, m_piece = pieces_of(col_tile, o_lane, channels, unit, stride)
        if FANNED:
            lane_ptr = split_ptr + t * pieces + o_piece * ranges
            lane_planes = split_planes
        else:
            lane_ptr = fan_ptr + t + o_piece * (ranges * fans)
            lane_planes = fan_planes
        tl.store(lane_ptr, h, m_piece)
        tl.store(lane_ptr + lane_planes, hx, m_piece)

    if counters_ptr is not None:
        tile_fans = (sample_set * ranges + q) * col_tiles * fans
        all_fans = tl.num_programs(0) // splits * fans if FANNED else 0
        done = splits > 0
        if FANNED:
            f = t // fan
            size = tl.minimum(splits - f * fan, fan)
            done = last(counters_ptr + tile_fans + col_tile * fans + f, size)
            if done:
                o_lane = tl.arange(0, LANES)
                o_piece, m_piece = pieces_of(col_tile, o_lane, channels, unit, stride)
                h = tl.zeros([FAN_STEP, LANES], ACC)
                hx = tl.zeros([FAN_STEP, LANES], ACC)
                for top in range(0, size, FAN_STEP):
                    o_row = top + tl.arange(0, FAN_STEP)
                    lane_ptr = split_ptr + (f * fan + o_row)[:, None] * pieces
                    lane_ptr += o_piece[None, :] * ranges
                    m_lane = (o_row < size)[:, None] & m_piece[None, :]
                    h += tl.load(lane_ptr, m_lane, 0.0, cache_modifier=".cg")
                    hx += tl.load(lane_ptr + split_planes, m_lane, 0.0, cache_modifier=".cg")
                lane_ptr = fan_ptr + f + o_piece * (ranges * fans)
                tl.store(lane_ptr, tl.sum(h, 0), m_piece)
                tl.store(lane_ptr + fan_planes, tl.sum(hx, 0), m_piece)
        if done:
            part, tiles, first_cell, many = component(
                sample_set, q, col_tile, col_tiles, channels, span, ranges, stride, bundle
            )
            if last(counters_ptr + all_fans + part, tiles * fans):
                group = span.to(tl.int64) * (spatial // ranges)
                finish_sums(
                    partials_ptr, planes, first_cell, ranges, many, weight_ptr, means_ptr,
                    cells, live, live_low, samples, spatial * width, group,
                    spatial // ranges * unit, channels // span * ranges,
                    channels // unit * ranges, fans,
                    ACC, CELLS, STEP, True,
                )  # fmt: skip
