"""The four operators: canonical layout, plan, workspace, launches.

    norm_forward    moments, combine, apply                   3 launches, 3T bytes (+1T residual)
    norm_apply      apply                                     1 launch,   2T
    norm_backward   backward_reduce, combine, backward_apply  3 launches, 5T
    update_running  one small launch

T is the bytes of x. Nothing is read back to the host, so all of it captures into a CUDA graph.
Arguments are checked by the callers; only the device is checked here.
"""

from __future__ import annotations

import contextlib
import functools
import struct
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusednorm.layout import canonical, is_nhwc, like

from . import columns, combine, runs
from .geometry import Geometry
from .plan import Plan, Sweep, ceil_div, combine_steps, make_plan

# Read when kernels are decorated, as Triton does: later changes of the variable have no effect.
INTERPRETED = triton.knobs.runtime.interpret

# What a plan is made for where there is no device: small, but enough to split.
INTERPRETER_SMS = 4

# Triton 3.10 turns multiply-adds off unless asked; forward and backward must agree on z.
OPTIONS = {"enable_fp_fusion": True}

_KERNELS = {
    ("runs", "moments"): runs.moments_runs_kernel,
    ("runs", "apply"): runs.apply_runs_kernel,
    ("runs", "backward_reduce"): runs.backward_reduce_runs_kernel,
    ("runs", "backward_apply"): runs.backward_apply_runs_kernel,
    ("columns", "moments"): columns.moments_columns_kernel,
    ("columns", "apply"): columns.apply_columns_kernel,
    ("columns", "backward_reduce"): columns.backward_reduce_columns_kernel,
    ("columns", "backward_apply"): columns.backward_apply_columns_kernel,
}


@functools.lru_cache
def num_sms(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETER_SMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def check_device(name: str, t: Tensor) -> None:
    if not (t.is_cuda or INTERPRETED):
        raise RuntimeError(
            f"backend 'triton' takes CUDA tensors, got {name} on {t.device}; other devices are "
            "allowed only where Triton interprets (TRITON_INTERPRET=1 set before the import)"
        )


def launch(kernel: Any, grid: int, args: tuple[Any, ...], num_warps: int, **constants: Any) -> None:
    """One kernel on the device of its first tensor. Every launch goes through here."""
    device = next(a for a in args if isinstance(a, Tensor)).device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(grid,)](*args, num_warps=num_warps, **OPTIONS, **constants)


def _sweep(
    verb: str,
    plan: Plan,
    sweep: Sweep,
    geometry: Geometry,
    args: tuple[Any, ...],
    last_size: int | None = None,
    **constants: Any,
) -> None:
    """Launch one of the four sweeps; ``last_size`` is the one a kernel has beyond its geometry."""
    g = geometry
    if plan.pattern == "columns":
        owners = g.sets * plan.ranges * ceil_div(g.channels, sweep.block_cols)
        sizes = [g.rows, g.channels, g.spatial, g.group, plan.ranges, sweep.splits]
        constants["WHOLE"] = plan.ranges == 1
    else:
        owners = g.sets * g.pieces
        sizes = [g.rows, g.channels, g.spatial, g.group, g.unit, g.pieces, sweep.splits]
        constants["REGULAR"] = g.regular
        constants["STRIDED"] = plan.strided
    if last_size is not None:
        sizes.append(last_size)
    launch(
        _KERNELS[plan.pattern, verb],
        owners * sweep.splits,
        (*args, *sizes),
        sweep.num_warps,
        BLOCK_ROWS=sweep.block_rows,
        BLOCK_COLS=sweep.block_cols,
        VEC=sweep.vec,
        **constants,
    )


def _accumulation(x: Tensor) -> tuple[torch.dtype, tl.dtype]:
    wide = x.dtype == torch.float64
    return (torch.float64, tl.float64) if wide else (torch.float32, tl.float32)


def _number(value: float) -> tuple[float, float]:
    """The nearest float32 and the rest: what ``pointwise.number`` puts together again."""
    (high,) = struct.unpack("f", struct.pack("f", value))
    return high, value - high


def _vector(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(dtype).contiguous()


def _plan(x: Tensor, num_groups: int, per_sample: bool) -> tuple[Geometry, Plan]:
    geometry = Geometry.of(x.shape, num_groups, per_sample)
    return geometry, make_plan(geometry, x.element_size(), is_nhwc(x), num_sms(x.device))


def norm_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    num_groups: int,
    per_sample: bool,
    eps: float,
    act: int,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, mean, rstd, var): normalize by the moments of x's own cells."""
    check_device("x", x)
    x = canonical(x)
    acc, tl_acc = _accumulation(x)
    shape = (x.shape[0], num_groups) if per_sample else (num_groups,)
    if x.numel() == 0:
        mean, var = x.new_zeros(shape, dtype=acc), x.new_zeros(shape, dtype=acc)
        return torch.empty_like(x), mean, (var + eps).rsqrt(), var
    mean, rstd, var = (x.new_empty(shape, dtype=acc) for _ in range(3))
    geometry, plan = _plan(x, num_groups, per_sample)
    g, splits = plan.moments, plan.reduce_moments.splits
    planes = g.sets * g.pieces * splits
    partials = x.new_empty(3 * planes, dtype=acc)
    _sweep("moments", plan, plan.reduce_moments, g, (x, partials), planes, ACC=tl_acc)
    block, num_warps = combine_steps(planes // g.cells)
    launch(
        combine.moments_combine_kernel,
        g.cells,
        (partials, mean, rstd, var, *_number(eps))
        + (g.spatial, g.group, g.unit, g.groups, g.pieces, splits, planes),
        num_warps=num_warps,
        ACC=tl_acc,
        BLOCK=block,
    )
    y = _apply(plan, geometry, x, mean, rstd, weight, bias, residual, act, slope)
    return y, mean, rstd, var


def norm_apply(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    num_groups: int,
    per_sample: bool,
    act: int,
    slope: float,
) -> Tensor:
    """y: normalize by given statistics."""
    check_device("x", x)
    x = canonical(x)
    if x.numel() == 0:
        return torch.empty_like(x)
    geometry, plan = _plan(x, num_groups, per_sample)
    return _apply(plan, geometry, x, mean, rstd, weight, bias, residual, act, slope)


def _apply(
    plan: Plan,
    geometry: Geometry,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    act: int,
    slope: float,
) -> Tensor:
    acc, tl_acc = _accumulation(x)
    y = torch.empty_like(x)
    residual = None if residual is None else like(residual, x)
    vectors = [_vector(v, acc) for v in (mean, rstd, weight, bias)]
    args = (x, y, residual, *vectors, *_number(slope))
    _sweep("apply", plan, plan.apply, geometry, args, ACC=tl_acc, ACT=act)
    return y


def norm_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    num_groups: int,
    per_sample: bool,
    live: float,
    act: int,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias, dresidual); the last is empty where it would be dy, or nothing."""
    check_device("x", x)
    x = canonical(x)
    acc, tl_acc = _accumulation(x)
    dx = torch.empty_like(x)
    wants_dresidual = residual is not None and act != 0
    dresidual = torch.empty_like(x) if wants_dresidual else x.new_empty(0)
    if x.numel() == 0:
        zeros = x.new_zeros((2, x.shape[1]), dtype=acc)
        return dx, zeros[0], zeros[1].clone(), dresidual
    dweight, dbias = (x.new_empty(x.shape[1], dtype=acc) for _ in range(2))
    # Without an activation h is dy, and nothing else reads the residual or the bias.
    residual = like(residual, x) if wants_dresidual else None
    dy = like(dy, x)
    statistics = [_vector(v, acc) for v in (mean, rstd, weight, bias)]
    geometry, plan = _plan(x, num_groups, per_sample)
    g, splits = geometry, plan.reduce.splits
    planes = g.sets * g.pieces * splits
    partials = x.new_empty(2 * planes, dtype=acc)
    means = x.new_empty(2 * g.cells, dtype=acc)

    args = (dy, x, residual, *statistics, partials, *_number(slope))
    _sweep("backward_reduce", plan, plan.reduce, g, args, planes, ACC=tl_acc, ACT=act)
    block, num_warps = combine_steps(planes // min(g.cells, g.channels))
    launch(
        combine.backward_combine_kernel,
        g.cells + g.channels,
        (partials, statistics[2], means, dweight, dbias, *_number(live))
        + (g.cells, g.channels, g.rows, g.spatial, g.group, g.unit, g.groups, g.pieces)
        + (splits, planes),
        num_warps=num_warps,
        ACC=tl_acc,
        BLOCK=block,
        REGULAR=g.regular,
    )
    written = dresidual if wants_dresidual else None
    args = (dy, x, residual, dx, written, *statistics, means, *_number(slope))
    _sweep(
        "backward_apply", plan, plan.apply, g, args, g.cells, ACC=tl_acc, ACT=act, LIVE=live != 0
    )
    return dx, dweight, dbias, dresidual


def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    var: Tensor,
    momentum: float | None,
    count: int,
) -> None:
    """Fold a batch's statistics into the running ones, in place; the variance unbiased."""
    check_device("running_mean", running_mean)
    _, tl_acc = _accumulation(mean)
    groups = running_mean.numel()
    if groups == 0:
        return
    launch(
        combine.update_running_kernel,
        1,
        (running_mean, running_var, num_batches_tracked, mean.contiguous(), var.contiguous())
        + (*_number(momentum or 0.0), count, groups),
        num_warps=4,
        ACC=tl_acc,
        BLOCK=1024,
        CUMULATIVE=momentum is None,
    )
