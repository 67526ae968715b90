"""The operators composed from ATen: every device's fallback, and what CPU users run.

ATen's batch norm kernels are the only ones that sweep a CPU tensor once per pass in either
layout, so each operator is phrased as batch norm over *virtual channels*: the pieces of equal
size into which groups and channels cut a sample. Their moments are merged into cells (Chan) and
handed back to an evaluation-mode batch norm. Groups that straddle channels have no such pieces:
there the groups themselves are the virtual channels, and the affine is a pass of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusednorm.ops.layout import canonical, is_nhwc, like
from fusednorm.reference import cells
from fusednorm.reference.cells import NONE, accumulation_dtype


class _Pieces(NamedTuple):
    """How (N, C, *) is seen as (samples, channels, run) with one virtual channel a piece."""

    view: tuple[int, int, int]
    sets: int  # sample sets: N with per_sample, else 1
    per_channel: int  # pieces a channel, 0 where pieces are not parts of channels
    per_group: int  # pieces a group

    def of(self, x: Tensor) -> Tensor:
        # NHWC reaches here only where pieces are whole channels: ATen reads it as it is.
        return x if is_nhwc(x) else x.view(self.view)

    def back(self, t: Tensor, x: Tensor) -> Tensor:
        """t in x's shape, as a tensor of its own: views may not be modified in place later on."""
        return t if t.shape == x.shape else torch.ops.aten._unsafe_view(t, x.shape)

    def from_channels(self, v: Tensor | None) -> Tensor | None:
        if v is None or (self.per_channel == 1 and self.sets == 1):
            return v
        return v.repeat_interleave(self.per_channel).repeat(self.sets)

    def from_cells(self, v: Tensor) -> Tensor:
        return v.reshape(-1).repeat_interleave(self.per_group)

    def to_channels(self, v: Tensor) -> Tensor:
        return v.view(self.sets, -1, self.per_channel).sum((0, 2))

    def to_cells(self, v: Tensor) -> Tensor:
        """(sets * pieces,) as (sets, G, pieces a group)."""
        return v.view(self.sets, -1, self.per_group)


def _pieces(x: Tensor, num_groups: int, per_sample: bool) -> _Pieces:
    n, c = x.shape[:2]
    straddling = bool(num_groups % c and c % num_groups)
    pieces, sets = num_groups if straddling else max(c, num_groups), n if per_sample else 1
    view = (n // sets, sets * pieces, x.numel() // (n * pieces))
    return _Pieces(view, sets, 0 if straddling else pieces // c, pieces // num_groups)


def _dense(x: Tensor, p: _Pieces) -> Tensor:
    """canonical(x), brought to NCHW where the pieces cannot be read in NHWC."""
    x = canonical(x)
    whole = p.per_channel == 1 and p.sets == 1
    return x if whole or not is_nhwc(x) else x.contiguous()


def _moments(x: Tensor, p: _Pieces) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per cell, (sets, G)."""
    mean, var = torch.batch_norm_update_stats(p.of(x), None, None, 0.0)
    if p.per_group == 1:
        return p.to_cells(mean)[..., 0], p.to_cells(var)[..., 0]
    pieces = p.to_cells(mean)
    merged = pieces.mean(2)
    within = p.to_cells(var).mean(2)
    return merged, within + (pieces - merged.unsqueeze(2)).square().mean(2)


def _frozen(
    x: Tensor,
    p: _Pieces,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """weight*(x - mean)*rstd + bias, all per piece, by batch norm with running statistics."""
    xv = p.of(x)
    y = torch.native_batch_norm(xv, weight, bias, mean, rstd.pow(-2), False, 0.0, 0.0)[0]
    return p.back(y, x)


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
    acc = accumulation_dtype(x.dtype)
    shape = (x.shape[0], num_groups) if per_sample else (num_groups,)
    if x.numel() == 0:
        mean, var = x.new_zeros(shape, dtype=acc), x.new_zeros(shape, dtype=acc)
        return torch.empty_like(canonical(x)), mean, (var + eps).rsqrt(), var
    p = _pieces(x, num_groups, per_sample)
    mean, var = _moments(_dense(x, p).to(acc), p)
    mean, var = mean.reshape(shape), var.reshape(shape)
    rstd = (var + eps).rsqrt()
    y = norm_apply(x, mean, rstd, weight, bias, residual, num_groups, per_sample, act, slope)
    return y, mean, rstd, var


def _preactivation(
    x: Tensor,
    p: _Pieces,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """z in the accumulation dtype; x is dense and already in it."""
    mean, rstd = p.from_cells(mean), p.from_cells(rstd)
    if p.per_channel:
        z = _frozen(x, p, mean, rstd, p.from_channels(weight), p.from_channels(bias))
    else:
        z = _frozen(x, p, mean, rstd)
        if weight is not None:
            z.mul_(cells.per_channel(weight, x))
        if bias is not None:
            z.add_(cells.per_channel(bias, x))
    return z if residual is None else z.add_(residual)


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
    out = canonical(x)
    if x.numel() == 0:
        return torch.empty_like(out)
    p = _pieces(x, num_groups, per_sample)
    wide = _dense(x, p).to(mean.dtype)
    z = _preactivation(wide, p, mean, rstd, weight, bias, residual)
    return like(cells.activate(z, act, slope).to(x.dtype), out)


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
    out = canonical(x)
    wants_dresidual = residual is not None and act != NONE
    if x.numel() == 0:
        zero = x.new_zeros(x.shape[1], dtype=mean.dtype)
        dresidual = torch.empty_like(out) if wants_dresidual else x.new_empty(0)
        return torch.empty_like(out), zero, zero.clone(), dresidual
    p = _pieces(x, num_groups, per_sample)
    wide = _dense(x, p).to(mean.dtype)
    h = like(dy.to(mean.dtype), wide)
    if act != NONE:
        z = _preactivation(wide, p, mean, rstd, weight, bias, residual)
        h = _activation_backward(h, z, act, slope)
    grad = _linear_backward if p.per_channel else _straddling_backward
    dx, dweight, dbias = grad(h, wide, p, p.from_cells(mean), p.from_cells(rstd), weight, live)
    dresidual = like(h.to(x.dtype), out) if wants_dresidual else x.new_empty(0)
    return like(dx.to(x.dtype), out), dweight, dbias, dresidual


def _activation_backward(h: Tensor, z: Tensor, act: int, slope: float) -> Tensor:
    if act == cells.RELU:
        return torch.ops.aten.threshold_backward(h, z, 0)
    if act == cells.SILU:
        return torch.ops.aten.silu_backward(h, z)
    if act == cells.GELU:
        return torch.ops.aten.gelu_backward(h, z)
    return torch.ops.aten.leaky_relu_backward(h, z, slope, False)


def _sums(
    h: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, dx: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """ATen's batch norm backward without affine: dx of live statistics, sum h*xhat, sum h."""
    frozen = (None, None) if dx else (mean, rstd.pow(-2))
    return torch.ops.aten.native_batch_norm_backward(
        h, x, None, *frozen, mean, rstd, dx, 0.0, [dx, True, True]
    )


def _linear_backward(
    h: Tensor, x: Tensor, p: _Pieces, mean: Tensor, rstd: Tensor, weight: Tensor | None, live: float
) -> tuple[Tensor, Tensor, Tensor]:
    """mean and rstd are per piece; one sweep for the sums, one or two for dx."""
    w = p.from_channels(weight)
    hv, xv = p.of(h), p.of(x)
    if live == 1 and p.per_group == 1:
        # A cell is one piece: ATen's training backward is the whole formula.
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            hv, xv, w, None, None, mean, rstd, True, 0.0, [True, True, True]
        )
        return p.back(dx, x), p.to_channels(dweight), p.to_channels(dbias)
    _, sum_hx, sum_h = _sums(hv, xv, mean, rstd, False)
    scale = (rstd if w is None else rstd * w).view(1, -1, *([1] * (hv.dim() - 2)))
    if live:
        # The part in x first, as batch norm's own sweep: -rstd*(m0 + xhat*m1).
        one = sum_h.new_ones(()) if w is None else w
        share = -live / (p.view[0] * p.view[2] * p.per_group)
        m0 = p.from_cells(p.to_cells(sum_h * one).sum(2)) * share
        m1 = p.from_cells(p.to_cells(sum_hx * one).sum(2)) * share
        dx = _frozen(x, p, mean, rstd, rstd * m1, rstd * m0)
        p.of(dx).addcmul_(hv, scale)
    else:
        dx = p.back(hv * scale, x)
    return dx, p.to_channels(sum_hx), p.to_channels(sum_h)


def _straddling_backward(
    h: Tensor, x: Tensor, p: _Pieces, mean: Tensor, rstd: Tensor, weight: Tensor | None, live: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Pieces are groups: the weight, which changes inside them, goes into the gradient."""
    over = [d for d in range(x.dim()) if d != 1]
    xhat = _frozen(x, p, mean, rstd)
    dbias = h.sum(over)
    dweight = xhat.mul_(h).sum(over)
    g = h if weight is None else h * cells.per_channel(weight, x)
    dx = p.of(g) * rstd.view(1, -1, 1)
    if live:
        dx = torch.lerp(dx, _sums(p.of(g), p.of(x), mean, rstd, True)[0], live)
    return p.back(dx, x), dweight, dbias


def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    var: Tensor,
    momentum: float | None,
    count: int,
) -> None:
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if momentum is not None:
        factor = torch.full((), momentum, dtype=mean.dtype, device=mean.device)
    elif num_batches_tracked is not None:
        factor = num_batches_tracked.to(mean.dtype).reciprocal()
    else:
        raise ValueError("momentum=None needs num_batches_tracked")
    unbiased = var * (count / (count - 1))
    for running, new in ((running_mean, mean), (running_var, unbiased)):
        running.copy_(torch.lerp(running.to(mean.dtype), new, factor))
