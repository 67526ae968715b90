"""From partials to cells and channels, and from cells to running statistics.

    moments_combine    cell:     mean, var = M2/count, rstd = 1/sqrt(var + eps)
    backward_combine   cell:     m0 = live*sum(w*h)/count,  m1 = live*sum(w*h*xhat)/count
                       channel:  dbias = sum h,  dweight = sum h*xhat, over all samples
    update_running     running = (1 - f)*running + f*batch, the variance unbiased

Partials are laid ((a*P + p)*T + t) and the pieces of a cell are neighbours, so a cell is one
contiguous stretch of them, and a channel one stretch a sample set. One program each, which reads
its stretch in steps of BLOCK, first to last: a fixed order, no atomics. rstd is rounded correctly
(sqrt and division of the cell's few numbers cost nothing), as a mean that is off by an ulp is
multiplied by every element.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pointwise import load_affine, number
from .runs import piece_start
from .welford import chan, merge_lanes

SIZES = ["spatial", "group", "unit", "groups", "pieces", "splits", "planes"]


@triton.jit
def piece_of(d, spatial, group, unit):
    """The piece of element d of a sample; geometry.py has the formula."""
    return d // spatial + d // group - d // (spatial // unit * group)


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


@triton.jit(do_not_specialize=SIZES)
def moments_combine_kernel(
    partials_ptr,  # (3, A*P*T): count, mean, M2
    mean_ptr,
    rstd_ptr,
    var_ptr,
    eps,
    eps_low,
    spatial,
    group,
    unit,
    groups,
    pieces,
    splits,
    planes,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    cell = tl.program_id(0)
    sample_set = (cell // groups).to(tl.int64)
    start = (cell % groups) * group.to(tl.int64)
    begin = (sample_set * pieces + piece_of(start, spatial, group, unit)) * splits
    end = (sample_set * pieces + piece_of(start + group, spatial, group, unit)) * splits
    count = tl.zeros([], ACC)
    mean = count
    m2 = count
    for first in range(begin, end, BLOCK):
        o_partial = first + tl.arange(0, BLOCK)
        m_partial = o_partial < end
        lane_count = tl.load(partials_ptr + o_partial, m_partial, 0.0)
        lane_mean = tl.load(partials_ptr + planes + o_partial, m_partial, 0.0)
        lane_m2 = tl.load(partials_ptr + 2 * planes.to(tl.int64) + o_partial, m_partial, 0.0)
        count, mean, m2 = chan(count, mean, m2, *merge_lanes(lane_count, lane_mean, lane_m2, 0))
    var = divide(m2, count)
    std = square_root(var + number(eps, eps_low, ACC))
    tl.store(mean_ptr + cell, mean)
    tl.store(rstd_ptr + cell, divide(tl.full([], 1.0, ACC), std))
    tl.store(var_ptr + cell, var)


@triton.jit(do_not_specialize=["cells", "channels", "rows", *SIZES])
def backward_combine_kernel(
    partials_ptr,  # (2, A*P*T): sum h, sum h*xhat
    weight_ptr,  # or None
    means_ptr,  # (2, K)
    dweight_ptr,
    dbias_ptr,
    live,
    live_low,
    cells,
    channels,
    rows,
    spatial,
    group,
    unit,
    groups,
    pieces,
    splits,
    planes,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    REGULAR: tl.constexpr,
):
    pid = tl.program_id(0)
    sum_h = tl.zeros([BLOCK], ACC)
    sum_hx = tl.zeros([BLOCK], ACC)
    if pid < cells:
        base = (pid // groups).to(tl.int64) * pieces
        start = (pid % groups) * group.to(tl.int64)
        begin = (base + piece_of(start, spatial, group, unit)) * splits
        end = (base + piece_of(start + group, spatial, group, unit)) * splits
        for first in range(begin, end, BLOCK):
            o_partial = first + tl.arange(0, BLOCK)
            m_partial = o_partial < end
            piece = o_partial // splits - base
            o_channel = piece_start(piece, spatial, group, unit, REGULAR) // spatial
            weight = load_affine(weight_ptr, o_channel, m_partial, sum_h, 1.0)
            sum_h += weight * tl.load(partials_ptr + o_partial, m_partial, 0.0)
            sum_hx += weight * tl.load(partials_ptr + planes + o_partial, m_partial, 0.0)
        factor = divide(number(live, live_low, ACC), (rows * group.to(tl.int64)).to(ACC))
        tl.store(means_ptr + pid, tl.sum(sum_h, 0) * factor)
        tl.store(means_ptr + cells + pid, tl.sum(sum_hx, 0) * factor)
    else:
        channel = pid - cells
        start = channel * spatial.to(tl.int64)
        begin = piece_of(start, spatial, group, unit) * splits
        length = piece_of(start + spatial, spatial, group, unit) * splits - begin
        end = cells // groups * length
        for first in range(0, end, BLOCK):
            o_lane = first + tl.arange(0, BLOCK)
            m_partial = o_lane < end
            sample_set = o_lane // length
            o_partial = begin + sample_set * pieces * splits + (o_lane - sample_set * length)
            sum_h += tl.load(partials_ptr + o_partial, m_partial, 0.0)
            sum_hx += tl.load(partials_ptr + planes + o_partial, m_partial, 0.0)
        tl.store(dbias_ptr + channel, tl.sum(sum_h, 0))
        tl.store(dweight_ptr + channel, tl.sum(sum_hx, 0))


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
