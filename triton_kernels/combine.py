"""From partials to cells and channels, and from cells to running statistics.

    finish_moments   cell:     mean, var = M2/count, rstd = 1/sqrt(var + eps), running statistics
    finish_sums      cell:     m0 = live*sum(w*h)/count,  m1 = live*sum(w*h*xhat)/count
    finish_channels  channel:  dbias = sum h,  dweight = sum h*xhat, over all samples

Partials are laid ((a*P + p)*T + t) and the pieces of a cell are neighbours, so a cell is one
contiguous stretch of them, and a channel one stretch a sample set. They are merged by index,
CELLS x STEP at a time, first to last: a fixed order whoever does it, no float atomics, the same
bits every time. rstd is rounded correctly (sqrt and division of the cell's few numbers cost
nothing), as a factor that is off by an ulp is multiplied by every element.

Who does it: the block of the first sweep that arrives last at the counter of its cells (``last``),
and for channels, whose partials may lie anywhere, the blocks of the second sweep. The kernels here
do it in a launch of their own where there are no counters: a plan that would need too many.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .indexing import piece_of, piece_start, stretch
from .pointwise import load_affine, number
from .welford import chan, merge_lanes

SIZES = ["spatial", "group", "unit", "groups", "pieces", "splits", "planes"]


@triton.jit
def last(counter_ptr, expected):
    """Whether this block is the last of ``expected`` to arrive; then the counter is 0 again.

    The hazard is a partial that its reader does not see. All threads of a block have stored theirs
    before the barrier; thread 0 then adds with release, which covers what the barrier ordered
    before it, and acquire, after which the last block sees what every earlier one released. Its
    loads are .cg nevertheless: an L1 line of partials cannot be stale if there is none. The reset
    races with nobody: all have arrived, and the next launch of the stream begins after this one.
    """
    tl.debug_barrier()
    is_last = expected == 1
    if expected > 1:
        arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
        is_last = arrived.to(expected.dtype) == expected - 1
        if is_last:
            tl.store(counter_ptr, 0)
        # No thread reads partials before thread 0 has acquired.
        tl.debug_barrier()
    return is_last


@triton.jit
def divide(a, b):
    """Correctly rounded; a plain / of float32 is not."""
    if b.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def square_root(a):
    if a.dtype == tl.float32:
        return tl.sqrt_rn(a)
    else:
        return tl.sqrt(a)


@triton.jit
def store_statistics(
    count,
    mean,
    m2,
    o_cell,
    m_cell,
    mean_ptr,
    rstd_ptr,
    var_ptr,
    running_mean_ptr,  # or None: no running statistics
    running_var_ptr,
    tracked_ptr,  # num_batches_tracked, or None
    eps,
    eps_low,
    momentum,
    momentum_low,
    ACC: tl.constexpr,
):
    var = divide(m2, count)
    std = square_root(var + number(eps, eps_low, ACC))
    rstd = divide(tl.full(std.shape, 1.0, ACC), std)
    tl.store(mean_ptr + o_cell, mean, m_cell)
    tl.store(rstd_ptr + o_cell, rstd, m_cell)
    tl.store(var_ptr + o_cell, var, m_cell)
    if running_mean_ptr is not None:
        factor = number(momentum, momentum_low, ACC)
        var = divide(m2, count - 1.0)
        old_mean = tl.load(running_mean_ptr + o_cell, m_cell, 0.0)
        old_var = tl.load(running_var_ptr + o_cell, m_cell, 0.0)
        mean = (1.0 - factor) * old_mean + factor * mean
        var = (1.0 - factor) * old_var + factor * var
        tl.store(running_mean_ptr + o_cell, mean, m_cell)
        tl.store(running_var_ptr + o_cell, var, m_cell)
        if tracked_ptr is not None:
            # Whoever has cell 0 counts; atomic, so that no warp reads what another has written.
            first = tl.min(tl.where(m_cell, o_cell, 1)) == 0
            tl.atomic_add(tracked_ptr, 1, mask=first, sem="relaxed")
    return rstd


@triton.jit
def finish_moments(
    partials_ptr,
    planes,
    first,  # cells first, first + jump, ...: ``many``
    jump,
    many,
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
    spatial,
    group,
    unit,
    groups,
    pieces,
    splits,
    ACC: tl.constexpr,
    CELLS: tl.constexpr,
    STEP: tl.constexpr,
    REGULAR: tl.constexpr,
):
    base, _ = stretch(first, spatial, group, unit, groups, pieces, splits, REGULAR)
    partials_ptr += base
    planes = planes.to(tl.int64)
    for chunk in range(0, many, CELLS):
        o_number = chunk + tl.arange(0, CELLS)
        m_cell = o_number < many
        o_cell = first + o_number * jump
        begin, end = stretch(o_cell, spatial, group, unit, groups, pieces, splits, REGULAR)
        # Relative to the first cell, 32 bits do, and half of the registers.
        begin = (begin - base).to(tl.int32)
        end = tl.where(m_cell, (end - base).to(tl.int32), begin)
        count = tl.zeros([CELLS], ACC)
        mean = count
        m2 = count
        for i in range(0, tl.max(end - begin, 0), STEP):
            o_partial = begin[:, None] + i + tl.arange(0, STEP)[None, :]
            m_partial = o_partial < end[:, None]
            lane_ptr = partials_ptr + o_partial
            lane_count = tl.load(lane_ptr, m_partial, 0.0, cache_modifier=".cg")
            lane_mean = tl.load(lane_ptr + planes, m_partial, 0.0, cache_modifier=".cg")
            lane_m2 = tl.load(lane_ptr + 2 * planes, m_partial, 0.0, cache_modifier=".cg")
            count, mean, m2 = chan(count, mean, m2, *merge_lanes(lane_count, lane_mean, lane_m2, 1))
        count = tl.where(m_cell, count, 2.0)
        store_statistics(
            count, mean, m2, o_cell, m_cell, mean_ptr, rstd_ptr, var_ptr,
            running_mean_ptr, running_var_ptr, tracked_ptr,
            eps, eps_low, momentum, momentum_low, ACC,
        )  # fmt: skip


@triton.jit
def finish_sums(
    partials_ptr,  # (2, A*P*T): sum h, sum h*xhat
    planes,
    first,
    jump,
    many,
    weight_ptr,  # or None
    means_ptr,  # (2, K)
    cells,
    live,
    live_low,
    rows,
    spatial,
    group,
    unit,
    groups,
    pieces,
    splits,
    ACC: tl.constexpr,
    CELLS: tl.constexpr,
    STEP: tl.constexpr,
    REGULAR: tl.constexpr,
):
    factor = divide(number(live, live_low, ACC), (rows * group.to(tl.int64)).to(ACC))
    base, _ = stretch(first, spatial, group, unit, groups, pieces, splits, REGULAR)
    partials_ptr += base
    # Pieces from the first of the first cell's sample set on.
    before = (base - (first // groups).to(tl.int64) * pieces * splits).to(tl.int32)
    planes = planes.to(tl.int64)
    for chunk in range(0, many, CELLS):
        o_number = chunk + tl.arange(0, CELLS)
        m_cell = o_number < many
        o_cell = first + o_number * jump
        begin, end = stretch(o_cell, spatial, group, unit, groups, pieces, splits, REGULAR)
        begin = (begin - base).to(tl.int32)
        end = tl.where(m_cell, (end - base).to(tl.int32), begin)
        sum_h = tl.zeros([CELLS, STEP], ACC)
        sum_hx = tl.zeros([CELLS, STEP], ACC)
        for i in range(0, tl.max(end - begin, 0), STEP):
            o_partial = begin[:, None] + i + tl.arange(0, STEP)[None, :]
            m_partial = o_partial < end[:, None]
            piece = ((before + o_partial) // splits % pieces).to(tl.int64)
            o_channel = piece_start(piece, spatial, group, unit, REGULAR) // spatial
            weight = load_affine(weight_ptr, o_channel, m_partial, sum_h, 1.0)
            lane_ptr = partials_ptr + o_partial
            h = tl.load(lane_ptr, m_partial, 0.0, cache_modifier=".cg")
            hx = tl.load(lane_ptr + planes, m_partial, 0.0, cache_modifier=".cg")
            # A masked weight is undefined, and could be NaN.
            sum_h += tl.where(m_partial, weight * h, 0.0)
            sum_hx += tl.where(m_partial, weight * hx, 0.0)
        tl.store(means_ptr + o_cell, tl.sum(sum_h, 1) * factor, m_cell)
        tl.store(means_ptr + cells + o_cell, tl.sum(sum_hx, 1) * factor, m_cell)


@triton.jit
def finish_channels(
    partials_ptr,
    planes,
    dweight_ptr,
    dbias_ptr,
    sets,
    channels,
    spatial,
    group,
    unit,
    pieces,
    splits,
    ACC: tl.constexpr,
    CHANNELS: tl.constexpr,
    STEP: tl.constexpr,
    REGULAR: tl.constexpr,
):
    """The CHANNELS channels of this block, and of every grid's length after it."""
    for chunk in range(tl.program_id(0) * CHANNELS, channels, tl.num_programs(0) * CHANNELS):
        o_channel = chunk + tl.arange(0, CHANNELS)
        m_channel = o_channel < channels
        if REGULAR:
            length = tl.full([CHANNELS], 1, tl.int32) * (pieces // channels * splits)
            begin = o_channel.to(tl.int64) * length
        else:
            start = o_channel * spatial.to(tl.int64)
            begin = piece_of(start, spatial, group, unit) * splits
            length = piece_of(start + spatial, spatial, group, unit) * splits - begin
        end = tl.where(m_channel, sets * length, 0)
        sum_h = tl.zeros([CHANNELS, STEP], ACC)
        sum_hx = tl.zeros([CHANNELS, STEP], ACC)
        for i in range(0, tl.max(end, 0), STEP):
            o_lane = i + tl.arange(0, STEP)[None, :]
            m_partial = o_lane < end[:, None]
            sample_set = o_lane // length[:, None]
            within = begin[:, None] + (o_lane - sample_set * length[:, None])
            lane_ptr = partials_ptr + (sample_set.to(tl.int64) * pieces * splits + within)
            sum_h += tl.load(lane_ptr, m_partial, 0.0, cache_modifier=".cg")
            sum_hx += tl.load(lane_ptr + planes, m_partial, 0.0, cache_modifier=".cg")
        tl.store(dbias_ptr + o_channel, tl.sum(sum_h, 1), m_channel)
        tl.store(dweight_ptr + o_channel, tl.sum(sum_hx, 1), m_channel)


@triton.jit(do_not_specialize=["cells", *SIZES])
def moments_combine_kernel(
    partials_ptr,  # (3, A*P*T): count, mean, M2
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
    cells,
    spatial,
    group,
    unit,
    groups,
    pieces,
    splits,
    planes,
    ACC: tl.constexpr,
    CELLS: tl.constexpr,
    STEP: tl.constexpr,
    REGULAR: tl.constexpr,
):
    first = tl.program_id(0) * CELLS
    finish_moments(
        partials_ptr, planes, first, 1, tl.minimum(cells - first, CELLS),
        mean_ptr, rstd_ptr, var_ptr, running_mean_ptr, running_var_ptr, tracked_ptr,
        eps, eps_low, momentum, momentum_low,
        spatial, group, unit, groups, pieces, splits, ACC, CELLS, STEP, REGULAR,
    )  # fmt: skip


@triton.jit(do_not_specialize=["cells", "rows", *SIZES])
def sums_combine_kernel(
    partials_ptr,
    weight_ptr,
    means_ptr,
    live,
    live_low,
    cells,
    rows,
    spatial,
    group,
    unit,
    groups,
    pieces,
    splits,
    planes,
    ACC: tl.constexpr,
    CELLS: tl.constexpr,
    STEP: tl.constexpr,
    REGULAR: tl.constexpr,
):
    first = tl.program_id(0) * CELLS
    finish_sums(
        partials_ptr, planes, first, 1, tl.minimum(cells - first, CELLS),
        weight_ptr, means_ptr, cells, live, live_low, rows,
        spatial, group, unit, groups, pieces, splits, ACC, CELLS, STEP, REGULAR,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count", "groups"])
def update_running_kernel(
    running_mean_ptr,
    running_var_ptr,
    tracked_ptr,  # num_batches_tracked, or None
    mean_ptr,
    var_ptr,
    momentum,
    momentum_low,
    count,
    groups,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    CUMULATIVE: tl.constexpr,
):
    """One program for all groups, so that the counter is read and written by the same block."""
    factor = number(momentum, momentum_low, ACC)
    if tracked_ptr is not None:
        tracked = tl.load(tracked_ptr) + 1
        if CUMULATIVE:
            factor = divide(tl.full([], 1.0, ACC), tracked.to(ACC))
        # The store must not overtake the load of another warp.
        tl.debug_barrier()
        tl.store(tracked_ptr, tracked)
    unbiased = divide(count.to(ACC), (count - 1).to(ACC))
    for first in range(0, groups, BLOCK):
        o_group = first + tl.arange(0, BLOCK)
        m_group = o_group < groups
        mean = tl.load(mean_ptr + o_group, m_group, 0.0).to(ACC)
        var = tl.load(var_ptr + o_group, m_group, 0.0).to(ACC) * unbiased
        running_mean = tl.load(running_mean_ptr + o_group, m_group, 0.0).to(ACC)
        running_var = tl.load(running_var_ptr + o_group, m_group, 0.0).to(ACC)
        running_mean = (1.0 - factor) * running_mean + factor * mean
        running_var = (1.0 - factor) * running_var + factor * var
        tl.store(running_mean_ptr + o_group, running_mean, m_group)
        tl.store(running_var_ptr + o_group, running_var, m_group)
