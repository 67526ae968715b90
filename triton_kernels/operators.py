"""The five operators: canonical layout, plan, workspace, launches.

    norm_forward    on chip                     1 launch,   2T bytes (+1T residual)
                    moments, apply              2 launches, 3T
    norm_train      the same, and the running statistics in the launch that finishes cells
    norm_apply      apply                       1 launch,   2T
    norm_backward   on chip                     1 launch,   3T; 2 where statistics are per sample
                    backward_reduce, _apply     2 launches, 5T
    update_running  one small launch

T is the bytes of x. What a CUDA graph captures has counters of its own (counters.py), cleared by a
node: one more where the table says 2 and cells have several partials. Nothing is read back to the
host. Arguments are checked by the callers; only the device is checked here.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from fusednorm.layout import canonical, is_nhwc, like

from . import combine, launch, onchip, pointwise, slices
from .geometry import Geometry
from .plan import Plan, Sweep, ceil_div, make_plan, step


def _accumulation(x: Tensor) -> tuple[torch.dtype, tl.dtype]:
    wide = x.dtype == torch.float64
    return (torch.float64, tl.float64) if wide else (torch.float32, tl.float32)


def _number(value: float) -> tuple[float, float]:
    """The nearest float32 and the rest: what ``pointwise.number`` puts together again."""
    (high,) = struct.unpack("f", struct.pack("f", value))
    return high, value - high


def _vector(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(dtype).contiguous()


def _plan(x: Tensor, num_groups: int, per_sample: bool) -> Plan:
    geometry = Geometry.of(x.shape, num_groups, per_sample)
    return make_plan(
        geometry, x.element_size(), is_nhwc(x), launch.num_sms(x.device), launch.LIMITS
    )


class _Mask:
    """The mask of a forward call: written by the kernel where its tiles hold whole bytes."""

    def __init__(self, x: Tensor, wanted: bool, s: Sweep):
        self.width = 16 // x.element_size()
        length = ceil_div(x.numel(), self.width) if wanted else 0
        self.tensor = x.new_empty(length, dtype=torch.uint8)
        self.inside = self.tensor if wanted and s.vec == self.width else None

    def finish(self, y: Tensor) -> Tensor:
        if self.inside is None and self.tensor.numel():
            block = 1024
            launch.launch(
                pointwise.mask_kernel,
                ceil_div(y.numel(), block),
                (y, self.tensor, y.numel()),
                num_warps=4,
                W=self.width,
                BLOCK=block,
            )
        return self.tensor


_Running = tuple[Tensor | None, Tensor | None, Tensor | None, float]


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running: _Running,
    num_groups: int,
    per_sample: bool,
    eps: float,
    act: int,
    slope: float,
    save_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    launch.check_device("x", x)
    x = canonical(x)
    acc, tl_acc = _accumulation(x)
    shape = (x.shape[0], num_groups) if per_sample else (num_groups,)
    if x.numel() == 0:
        mean, var = x.new_zeros(shape, dtype=acc), x.new_zeros(shape, dtype=acc)
        mask = x.new_empty(0, dtype=torch.uint8)
        return torch.empty_like(x), mean, (var + eps).rsqrt(), var, mask
    mean, rstd, var = (x.new_empty(shape, dtype=acc) for _ in range(3))
    plan = _plan(x, num_groups, per_sample)
    *buffers, momentum = running
    cells = (mean, rstd, var, *buffers, *_number(eps), *_number(momentum))
    if plan.forward is None:
        _moments(plan.moments, x, cells, acc, tl_acc)
        y, mask = _apply(plan.apply, x, mean, rstd, weight, bias, residual, act, slope, save_mask)
        return y, mean, rstd, var, mask
    s = plan.forward.sweep
    sizes, constants = launch.tiles(s)
    y, saved = torch.empty_like(x), _Mask(x, save_mask, s)
    residual = None if residual is None else like(residual, x)
    launch.launch(
        slices.forward_slices_kernel if plan.forward.looped else onchip.forward_onchip_kernel,
        s.grid,
        (x, y, residual, saved.inside, _vector(weight, acc), _vector(bias, acc), *cells)
        + (*_number(slope), *sizes),
        s.num_warps,
        ACC=tl_acc,
        ACT=act,
        W=saved.width,
        CELLS=plan.forward.cells,
        STATS=plan.forward.stats,
        **constants,
    )
    return y, mean, rstd, var, saved.finish(y)


def _moments(
    s: Sweep, x: Tensor, cells: tuple[Any, ...], acc: torch.dtype, tl_acc: tl.dtype
) -> None:
    s, zeros = launch.foldable(s, x)
    partials = x.new_empty(3 * s.partials, dtype=acc)
    sizes, constants = launch.reducing(s)
    args = (x, partials, zeros, *cells, *sizes)
    kernel = launch.KERNELS[s.pattern, "moments"]
    registers = None if acc == torch.float64 else launch.REGISTERS
    launch.launch(kernel, s.grid, args, s.num_warps, registers, ACC=tl_acc, **constants)
    if zeros is None:
        launch.combine_cells(combine.moments_combine_kernel, s, (partials, *cells), tl_acc)


def _apply(
    s: Sweep,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    act: int,
    slope: float,
    save_mask: bool,
) -> tuple[Tensor, Tensor]:
    acc, tl_acc = _accumulation(x)
    y, saved = torch.empty_like(x), _Mask(x, save_mask, s)
    residual = None if residual is None else like(residual, x)
    vectors = [_vector(v, acc) for v in (mean, rstd, weight, bias)]
    sizes, constants = launch.tiles(s)
    launch.launch(
        launch.KERNELS[s.pattern, "apply"],
        s.grid,
        (x, y, residual, saved.inside, *vectors, *_number(slope), *sizes),
        s.num_warps,
        ACC=tl_acc,
        ACT=act,
        W=saved.width,
        **constants,
    )
    return y, saved.finish(y)


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
    save_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, mean, rstd, var, mask): normalize by the moments of x's own cells."""
    running = (None, None, None, 0.0)
    return _forward(
        x, weight, bias, residual, running, num_groups, per_sample, eps, act, slope, save_mask
    )


def norm_train(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    num_groups: int,
    per_sample: bool,
    eps: float,
    momentum: float | None,
    act: int,
    slope: float,
    save_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, mean, rstd, mask), the batch folded into the running statistics where they are given.

    The launch that finishes cells does it, unless every cell must know the number of batches
    (momentum None), which one block alone may change, or buffers are not float32 or float64.
    """
    running: _Running = (None, None, None, 0.0)
    buffers: list[Tensor] = []
    dense: list[Tensor] = []
    if running_mean is not None and running_var is not None and x.numel() > 0:
        # Kernels step through buffers one by one; columns of something else go by way of a copy.
        buffers = [running_mean, running_var]
        dense = [b.contiguous() for b in buffers]
    inside = bool(dense) and momentum is not None and dense[0].dtype == _accumulation(x)[0]
    if inside:
        running = (dense[0], dense[1], num_batches_tracked, momentum or 0.0)
    y, mean, rstd, var, mask = _forward(
        x, weight, bias, residual, running, num_groups, per_sample, eps, act, slope, save_mask
    )
    if dense and not inside:
        count = x.numel() // mean.numel()
        update_running(dense[0], dense[1], num_batches_tracked, mean, var, momentum, count)
    for buffer, written in zip(buffers, dense, strict=True):
        if written is not buffer:
            buffer.copy_(written)
    return y, mean, rstd, mask


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
    launch.check_device("x", x)
    x = canonical(x)
    if x.numel() == 0:
        return torch.empty_like(x)
    s = _plan(x, num_groups, per_sample).apply
    return _apply(s, x, mean, rstd, weight, bias, residual, act, slope, False)[0]


def norm_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    num_groups: int,
    per_sample: bool,
    live: float,
    act: int,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias, dresidual); the last is empty where it would be dy, or nothing."""
    launch.check_device("x", x)
    x = canonical(x)
    acc, tl_acc = _accumulation(x)
    dx = torch.empty_like(x)
    wants_dresidual = (residual is not None or mask is not None) and act != 0
    dresidual = torch.empty_like(x) if wants_dresidual else x.new_empty(0)
    if x.numel() == 0:
        zeros = x.new_zeros((2, x.shape[1]), dtype=acc)
        return dx, zeros[0], zeros[1].clone(), dresidual
    dweight, dbias = (x.new_empty(x.shape[1], dtype=acc) for _ in range(2))
    # Without an activation h is dy, and nothing else reads the residual or the bias.
    residual = like(residual, x) if residual is not None and act != 0 else None
    inputs = (like(dy, x), x, residual, mask if act != 0 else None)
    outputs = (dx, dresidual if wants_dresidual else None)
    vectors = tuple(_vector(v, acc) for v in (mean, rstd, weight, bias))
    plan = _plan(x, num_groups, per_sample)
    constants = {"ACC": tl_acc, "ACT": act, "W": 16 // x.element_size()}
    if plan.backward is not None:
        _backward_onchip(plan, inputs, outputs, vectors, dweight, dbias, live, slope, constants)
        return dx, dweight, dbias, dresidual

    s, zeros = launch.foldable(plan.reduce, x)
    g, planes = s.geometry, s.planes
    partials = x.new_empty(2 * s.partials, dtype=acc)
    means = x.new_empty(2 * g.cells, dtype=acc)
    sizes, tiles = launch.reducing(s)
    args = (*inputs, *vectors, partials, zeros, means, *_number(slope), *_number(live), *sizes)
    kernel = launch.KERNELS[s.pattern, "backward_reduce"]
    heavy = acc == torch.float64 or residual is not None or s.vec == 1
    registers = None if heavy else launch.REGISTERS
    launch.launch(kernel, s.grid, (*args, g.cells), s.num_warps, registers, **constants, **tiles)
    if zeros is None:
        args = (partials, vectors[2], means, *_number(live))
        launch.combine_cells(combine.sums_combine_kernel, s, args, tl_acc, g.rows)

    a = plan.apply
    sizes, tiles = launch.tiles(a)
    sizes += (planes, g.cells, g.sets)
    if a.pattern == "columns":
        sizes += (g.unit, g.pieces)
        tiles["REGULAR"] = g.regular
    tiles["CHANNELS"], tiles["STEP"] = step(ceil_div(g.channels, a.grid))
    args = (*inputs, *outputs, *vectors, partials, means, dweight, dbias, *_number(slope))
    launch.launch(
        launch.KERNELS[a.pattern, "backward_apply"],
        a.grid,
        (*args, *sizes, s.fans),
        a.num_warps,
        LIVE=live != 0,
        **constants,
        **tiles,
    )
    return dx, dweight, dbias, dresidual


def _backward_onchip(
    plan: Plan,
    inputs: tuple[Any, ...],
    outputs: tuple[Any, ...],
    vectors: tuple[Any, ...],
    dweight: Tensor,
    dbias: Tensor,
    live: float,
    slope: float,
    constants: dict[str, Any],
) -> None:
    assert plan.backward is not None
    s, g = plan.backward.sweep, plan.backward.sweep.geometry
    sums = (dweight, dbias)
    if g.sets > 1:
        partials = dweight.new_empty(2, g.sets, g.channels)
        sums = (partials[1], partials[0])
    sizes, tiles = launch.tiles(s)
    launch.launch(
        slices.backward_slices_kernel if plan.backward.looped else onchip.backward_onchip_kernel,
        s.grid,
        (*inputs, *outputs, *vectors, *sums, *_number(slope), *_number(live), *sizes),
        s.num_warps,
        LIVE=live != 0,
        CELLS=plan.backward.cells,
        CHANNELS=plan.backward.channels,
        STATS=plan.backward.stats,
        **constants,
        **tiles,
    )
    if g.sets > 1:
        channels, steps = step(min(8, g.channels))
        launch.launch(
            onchip.channels_combine_kernel,
            ceil_div(g.channels, channels),
            (partials, dweight, dbias, g.sets, g.channels),
            num_warps=4,
            ACC=constants["ACC"],
            CHANNELS=channels,
            STEP=steps,
        )


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
    launch.check_device("running_mean", running_mean)
    _, tl_acc = _accumulation(mean)
    groups = running_mean.numel()
    if groups == 0:
        return
    launch.launch(
        combine.update_running_kernel,
        1,
        (running_mean, running_var, num_batches_tracked, mean.contiguous(), var.contiguous())
        + (*_number(momentum or 0.0), count, groups),
        num_warps=4,
        ACC=tl_acc,
        BLOCK=1024,
        CUMULATIVE=momentum is None,
    )
