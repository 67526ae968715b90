"""The operators composed from ATen: every device's fallback, and what CPU users run.

Each operator works on *pieces*, the parts of equal size into which channels and groups cut a
sample, in one of two views that need no copy of x:

* ``_Runs``: a piece is a virtual channel of ATen's batch norm, the one kernel that sweeps a CPU
  tensor once a pass. NCHW with any nested groups, NHWC with whole channels. Groups that straddle
  channels are virtual channels themselves, and the affine is a pass of its own.
* ``_Rows``: NHWC memory as (sets, samples, ranges, positions, C), plain sums over rows.

The moments of pieces are merged into cells by Chan's rule.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusednorm.ops.layout import canonical, is_nhwc, like
from fusednorm.reference import cells
from fusednorm.reference.cells import NONE, accumulation_dtype


class _Runs(NamedTuple):
    """x as (samples, sets*pieces, run); vectors "per piece" have sets*pieces entries."""

    view: tuple[int, ...]
    sets: int  # sample sets: N with per_sample, else 1
    per_channel: int  # pieces a channel, 0 where pieces are groups that straddle channels
    per_group: int  # pieces a group

    @property
    def size(self) -> int:
        """Elements of a piece."""
        return self.view[0] * self.view[2]

    def of(self, x: Tensor) -> Tensor:
        # NHWC comes here with whole channels only: ATen reads it as it is.
        return x if is_nhwc(x) else x.view(self.view)

    def back(self, t: Tensor, x: Tensor) -> Tensor:
        """t in x's shape, as a tensor of its own: views may not be modified in place later on."""
        return t if t.shape == x.shape else torch.ops.aten._unsafe_view(t, x.shape)

    def from_channels(self, v: Tensor | None) -> Tensor | None:
        if v is None or (self.per_channel == 1 and self.sets == 1):
            return v
        return v.repeat_interleave(self.per_channel).repeat(self.sets)

    def from_cells(self, v: Tensor) -> Tensor:
        v = v.reshape(-1)
        return v if self.per_group == 1 else v.repeat_interleave(self.per_group)

    def to_channels(self, v: Tensor) -> Tensor:
        return v.view(self.sets, -1, self.per_channel).sum((0, 2))

    def to_cells(self, v: Tensor) -> Tensor:
        """(sets, G, pieces a group)"""
        return v.view(self.sets, -1, self.per_group)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = torch.batch_norm_update_stats(self.of(x), None, None, 0.0)
        return mean, var

    def affine(
        self,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """weight*(x - mean)*rstd + bias, all per piece: batch norm with running statistics."""
        xv = self.of(x)
        y = torch.native_batch_norm(xv, weight, bias, mean, rstd.pow(-2), False, 0.0, 0.0)[0]
        return self.back(y, x)

    def sums(self, h: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
        """sum h*xhat and sum h per piece: batch norm's backward for its parameters only."""
        _, hx, h = torch.ops.aten.native_batch_norm_backward(
            self.of(h), self.of(x), None, mean, rstd.pow(-2), None, None, False, 0.0,
            [False, True, True],
        )  # fmt: skip
        return hx, h

    def gradient(
        self, h: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dx, sum h*xhat and sum h where every piece is a cell with live statistics."""
        dx, hx, h = torch.ops.aten.native_batch_norm_backward(
            self.of(h), self.of(x), weight, None, None, mean, rstd, True, 0.0, [True] * 3
        )
        return self.back(dx, x), hx, h

    def addcmul_(self, out: Tensor, h: Tensor, scale: Tensor) -> Tensor:
        scale = scale.view(1, -1, *([1] * (self.of(h).dim() - 2)))
        self.of(out).addcmul_(self.of(h), scale)
        return out


class _Rows(_Runs):
    """NHWC memory as (sets, samples, ranges, positions, C); per piece means (set, channel, range)."""

    @property
    def size(self) -> int:
        return self.view[1] * self.view[3]

    def of(self, x: Tensor) -> Tensor:
        return x.movedim(1, -1).view(self.view)

    def spread(self, v: Tensor) -> Tensor:
        sets, _, ranges, _, channels = self.view
        return v.view(sets, 1, channels, ranges, 1).transpose(2, 4).transpose(2, 3)

    def total(self, rows: Tensor) -> Tensor:
        # Positions first: an inner loop over contiguous channels.
        return rows.sum(3).sum(1).transpose(1, 2).reshape(-1)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.of(x)
        mean = self.total(rows) / self.size
        return mean, self.total((rows - self.spread(mean)).square_()) / self.size

    def affine(
        self,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        y = torch.empty_like(x)
        rows = torch.sub(self.of(x), self.spread(mean), out=self.of(y))
        scale = self.spread(rstd if weight is None else rstd * weight)
        if bias is None:
            rows.mul_(scale)
        else:
            torch.addcmul(self.spread(bias), rows, scale, out=rows)
        return y

    def sums(self, h: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
        hv = self.of(h)
        return self.total((self.of(x) - self.spread(mean)).mul_(hv)) * rstd, self.total(hv)

    def addcmul_(self, out: Tensor, h: Tensor, scale: Tensor) -> Tensor:
        self.of(out).addcmul_(self.of(h), self.spread(scale))
        return out


def _seen_as_pieces(x: Tensor, num_groups: int, per_sample: bool) -> tuple[Tensor, _Runs]:
    """x in the accumulation dtype, dense in a layout its pieces can be read in, and the view."""
    n, c = x.shape[:2]
    sets, wide = n if per_sample else 1, canonical(x).to(accumulation_dtype(x.dtype))
    straddling = bool(num_groups % c and c % num_groups)
    pieces = num_groups if straddling else max(c, num_groups)
    per_channel = 0 if straddling else pieces // c
    run = x.numel() // (n * pieces)
    shape = (sets, per_channel, pieces // num_groups)
    if straddling:
        wide = wide.contiguous()
    elif is_nhwc(wide) and (sets > 1 or per_channel > 1):
        return wide, _Rows((sets, n // sets, per_channel, run, c), *shape)
    return wide, _Runs((n // sets, sets * pieces, run), *shape)


def _merge(p: _Runs, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Moments of cells, (sets, G), from those of their pieces, all of one size."""
    pieces = p.to_cells(mean)
    if p.per_group == 1:
        return pieces[..., 0], p.to_cells(var)[..., 0]
    merged = pieces.mean(2)
    between = (pieces - merged.unsqueeze(2)).square().mean(2)
    return merged, p.to_cells(var).mean(2) + between


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
    shape = (x.shape[0], num_groups) if per_sample else (num_groups,)
    if x.numel() == 0:
        mean, var = x.new_zeros((2, *shape), dtype=accumulation_dtype(x.dtype)).unbind()
        return torch.empty_like(canonical(x)), mean.clone(), (var + eps).rsqrt(), var.clone()
    wide, p = _seen_as_pieces(x, num_groups, per_sample)
    if type(p) is _Runs and p.per_channel == 1 and p.sets == p.per_group == 1 and p.size > 1:
        # Plain batch norm: one call. Its running variance, which is unbiased, tells the variance.
        mean, unbiased = wide.new_zeros(2, num_groups).unbind()
        z, mean, rstd = torch.native_batch_norm(
            p.of(wide), weight, bias, mean, unbiased, True, 1.0, eps
        )
        z, var = p.back(z, wide), unbiased * ((p.size - 1) / p.size)
    else:
        mean, var = _merge(p, *p.moments(wide))
        rstd = (var + eps).rsqrt()
        z = _affine(wide, p, mean, rstd, weight, bias)
    y = _finish(z, x, residual, act, slope)
    return y, mean.reshape(shape), rstd.reshape(shape), var.reshape(shape)


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
    if x.numel() == 0:
        return torch.empty_like(canonical(x))
    wide, p = _seen_as_pieces(x, num_groups, per_sample)
    return _finish(_affine(wide, p, mean, rstd, weight, bias), x, residual, act, slope)


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
        dweight, dbias = (x.new_zeros(x.shape[1], dtype=mean.dtype) for _ in range(2))
        dresidual = torch.empty_like(out) if wants_dresidual else x.new_empty(0)
        return torch.empty_like(out), dweight, dbias, dresidual
    wide, p = _seen_as_pieces(x, num_groups, per_sample)
    h = like(dy.to(mean.dtype), wide)
    if act != NONE:
        z = _affine(wide, p, mean, rstd, weight, bias)
        if residual is not None:
            z.add_(residual)
        h = _activation_backward(h, z, act, slope)
    grad = _nested_backward if p.per_channel else _straddling_backward
    dx, dweight, dbias = grad(h, wide, p, p.from_cells(mean), p.from_cells(rstd), weight, live)
    dresidual = like(h.to(x.dtype), out) if wants_dresidual else x.new_empty(0)
    return like(dx.to(x.dtype), out), dweight, dbias, dresidual


def _affine(
    x: Tensor, p: _Runs, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """weight[c]*(x - mean)*rstd + bias[c] from statistics of cells, in fresh memory."""
    mean, rstd = p.from_cells(mean), p.from_cells(rstd)
    if p.per_channel:
        return p.affine(x, mean, rstd, p.from_channels(weight), p.from_channels(bias))
    z = p.affine(x, mean, rstd)
    if weight is not None:
        z.mul_(cells.per_channel(weight, x))
    return z if bias is None else z.add_(cells.per_channel(bias, x))


def _finish(z: Tensor, x: Tensor, residual: Tensor | None, act: int, slope: float) -> Tensor:
    """act(z + residual) in x's dtype and layout; z is fresh memory."""
    if residual is not None:
        z.add_(residual)
    return like(cells.activate(z, act, slope).to(x.dtype), canonical(x))


def _activation_backward(h: Tensor, z: Tensor, act: int, slope: float) -> Tensor:
    if act == cells.RELU:
        return torch.ops.aten.threshold_backward(h, z, 0)
    if act == cells.SILU:
        return torch.ops.aten.silu_backward(h, z)
    if act == cells.GELU:
        return torch.ops.aten.gelu_backward(h, z)
    return torch.ops.aten.leaky_relu_backward(h, z, slope, False)


def _nested_backward(
    h: Tensor, x: Tensor, p: _Runs, mean: Tensor, rstd: Tensor, weight: Tensor | None, live: float
) -> tuple[Tensor, Tensor, Tensor]:
    """mean and rstd are per piece; one sweep for the sums, two for dx."""
    w = p.from_channels(weight)
    if live == 1 and p.per_group == 1 and type(p) is _Runs:
        dx, sum_hx, sum_h = p.gradient(h, x, mean, rstd, w)
        return dx, p.to_channels(sum_hx), p.to_channels(sum_h)
    sum_hx, sum_h = p.sums(h, x, mean, rstd)
    scale = rstd if w is None else rstd * w
    if live:
        # The part in x first, -rstd*(m0 + xhat*m1): it is an affine sweep itself.
        share = -live / (p.size * p.per_group)
        m0, m1 = (
            p.from_cells(p.to_cells(s if w is None else s * w).sum(2)) * share
            for s in (sum_h, sum_hx)
        )
        dx = p.addcmul_(p.affine(x, mean, rstd, rstd * m1, rstd * m0), h, scale)
    else:
        dx = p.addcmul_(torch.zeros_like(x), h, scale)
    return dx, p.to_channels(sum_hx), p.to_channels(sum_h)


def _straddling_backward(
    h: Tensor, x: Tensor, p: _Runs, mean: Tensor, rstd: Tensor, weight: Tensor | None, live: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Pieces are groups: the weight, which changes inside them, goes into the gradient."""
    over = [d for d in range(x.dim()) if d != 1]
    dbias = h.sum(over)
    dweight = p.affine(x, mean, rstd).mul_(h).sum(over)
    g = h if weight is None else h * cells.per_channel(weight, x)
    dx = p.addcmul_(torch.zeros_like(x), g, rstd)
    if live:
        dx = torch.lerp(dx, p.gradient(g, x, mean, rstd, None)[0], live)
    return dx, dweight, dbias


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
    unbias = count / (count - 1)
    if momentum is not None:
        running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
        running_var.mul_(1 - momentum).add_(var, alpha=momentum * unbias)
    elif num_batches_tracked is not None:
        factor = num_batches_tracked.to(mean.dtype).reciprocal()
        running_mean.add_((mean - running_mean) * factor)
        running_var.add_((var * unbias - running_var) * factor)
    else:
        raise ValueError("momentum=None needs num_batches_tracked")
