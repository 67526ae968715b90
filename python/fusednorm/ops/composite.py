"""The operators composed from ATen: every device's fallback, and what CPU users run.

ATen's batch norm kernels are the only ones that sweep a CPU tensor once a pass, so x is brought
before them with one *virtual channel* a piece, the parts of equal size into which channels and
groups cut a sample; the moments of pieces are then merged into cells by Chan's rule.

* NCHW, any nested groups: a view. NHWC, whole channels: x as it is.
* NHWC otherwise: one copy that moves rows of C contiguous values, cheap beside a transposition.
* Groups that straddle channels are virtual channels themselves, in NCHW, and the affine, which
  changes inside them, is a pass of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fusednorm.layout import canonical, is_nhwc, like
from fusednorm.ops.mask import keep, no_mask, pack, unpack
from fusednorm.reference import cells
from fusednorm.reference.cells import NONE, accumulation_dtype


class _Pieces(NamedTuple):
    """How ATen sees x; vectors "per piece" have one entry a virtual channel, in ATen's order."""

    samples: int  # of one set
    sets: int  # sample sets: N with per_sample, else 1
    channels: int
    run: int  # elements of a piece in a sample
    per_channel: int  # pieces a channel, 0 where pieces are groups that straddle channels
    per_group: int  # pieces a group
    layout: str  # "view" for (samples, pieces, run), "same" for x itself, or "rows"

    @property
    def size(self) -> int:
        """Elements of a piece."""
        return self.samples * self.run

    def of(self, x: Tensor, scratch: Tensor | None = None) -> Tensor:
        """x (dense) with a virtual channel a piece; a copy goes into ``scratch``, if given."""
        if self.layout == "same":
            return x
        if self.layout == "view":
            return x.view(self.samples, -1, self.run)
        # Rows (sample, position), columns (set, range, channel): NHWC with more channels.
        source = self._memory(x).permute(1, 3, 0, 2, 4)
        scratch = torch.empty_like(x) if scratch is None else scratch
        rows = scratch.movedim(1, -1).view(source.shape).copy_(source)
        return rows.view(self.samples, self.run, 1, -1).permute(0, 3, 1, 2)

    def scratch(self, x: Tensor) -> Tensor | None:
        """Fresh memory that first serves a copy of x and then takes the result: on the CPU the
        page faults of a large allocation cost more than a sweep."""
        return torch.empty_like(x) if self.layout == "rows" else None

    def back(self, v: Tensor, x: Tensor, scratch: Tensor | None = None) -> Tensor:
        """The inverse of ``of``, never a view: those may not be modified in place later on."""
        if self.layout == "same":
            return v
        if self.layout == "view":
            return v if v.shape == x.shape else torch.ops.aten._unsafe_view(v, x.shape)
        out = torch.empty_like(x) if scratch is None else scratch
        memory = self._memory(out)
        sets, samples, ranges, run, channels = memory.shape
        rows = v.permute(0, 2, 3, 1).view(samples, run, sets, ranges, channels)
        memory.copy_(rows.permute(2, 0, 3, 1, 4))
        return out

    def _memory(self, x: Tensor) -> Tensor:
        """NHWC memory as (sets, samples, ranges, positions, channels)."""
        shape = (self.sets, self.samples, self.per_channel, self.run, self.channels)
        return x.movedim(1, -1).view(shape)

    def _to_aten(self, v: Tensor) -> Tensor:
        """(set, channel, range), the order of pieces, to (set, range, channel)."""
        if self.layout != "rows" or self.per_channel == 1:
            return v
        return v.view(self.sets, self.channels, -1).transpose(1, 2).reshape(-1)

    def _from_aten(self, v: Tensor) -> Tensor:
        if self.layout != "rows" or self.per_channel == 1:
            return v
        return v.view(self.sets, -1, self.channels).transpose(1, 2).reshape(-1)

    def from_channels(self, v: Tensor | None) -> Tensor | None:
        if v is None or (self.per_channel == 1 and self.sets == 1):
            return v
        v = _repeated(v, self.per_channel)
        return self._to_aten(v if self.sets == 1 else v.repeat(self.sets))

    def from_cells(self, v: Tensor) -> Tensor:
        v = v.reshape(-1)
        return self._to_aten(_repeated(v, self.per_group))

    def to_channels(self, v: Tensor) -> Tensor:
        return self._from_aten(v).view(self.sets, -1, self.per_channel).sum((0, 2))

    def to_cells(self, v: Tensor) -> Tensor:
        """(sets, G, pieces a group)"""
        return self._from_aten(v).view(self.sets, -1, self.per_group)


def _repeated(v: Tensor, times: int) -> Tensor:
    """v.repeat_interleave(times), which takes twice the time of a small one."""
    return v if times == 1 else v.unsqueeze(1).expand(-1, times).contiguous().view(-1)


def _seen_as_pieces(x: Tensor, num_groups: int, per_sample: bool) -> tuple[Tensor, _Pieces]:
    """x in the accumulation dtype, dense in a layout its pieces can be read in, and how."""
    n, c = x.shape[:2]
    sets, wide = n if per_sample else 1, canonical(x).to(accumulation_dtype(x.dtype))
    straddling = bool(num_groups % c and c % num_groups)
    pieces = num_groups if straddling else max(c, num_groups)
    per_channel = 0 if straddling else pieces // c
    if straddling:
        wide = wide.contiguous()
    layout = "view"
    if is_nhwc(wide):
        layout = "same" if sets == per_channel == 1 else "rows"
    run = x.numel() // (n * pieces)
    return wide, _Pieces(n // sets, sets, c, run, per_channel, pieces // num_groups, layout)


def _moments(x: Tensor, xv: Tensor, p: _Pieces) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of cells, (sets, G)."""
    if p.layout == "view":
        # A group is one run, whatever channels it covers.
        groups = x.view(p.samples, -1, p.run * p.per_group)
        mean, var = torch.batch_norm_update_stats(groups, None, None, 0.0)
        return mean.view(p.sets, -1), var.view(p.sets, -1)
    # In NHWC ATen adds up in float32 row by row; sum() cascades. Its second moment about an inexact
    # mean is too large by the square of the error.
    inexact, var = torch.batch_norm_update_stats(xv, None, None, 0.0)
    mean = xv.mean([d for d in range(xv.dim()) if d != 1])
    var = (var - (mean - inexact).square()).clamp_min_(0)
    # Chan's rule for pieces of one size.
    pieces = p.to_cells(mean)
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
    save_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape = (x.shape[0], num_groups) if per_sample else (num_groups,)
    if x.numel() == 0:
        mean, var = x.new_zeros((2, *shape), dtype=accumulation_dtype(x.dtype)).unbind()
        y, rstd = torch.empty_like(canonical(x)), (var + eps).rsqrt()
        return y, mean.clone(), rstd, var.clone(), no_mask(x)
    wide, p = _seen_as_pieces(x, num_groups, per_sample)
    scratch = p.scratch(wide)
    xv = p.of(wide, scratch)
    if p.per_channel == p.per_group == p.sets == 1 and p.size > 1:
        # Plain batch norm: one call. Its running variance, which is unbiased, tells the variance.
        mean, unbiased = wide.new_zeros(2, num_groups).unbind()
        zv, mean, rstd = torch.native_batch_norm(xv, weight, bias, mean, unbiased, True, 1.0, eps)
        z, var = p.back(zv, wide), unbiased * ((p.size - 1) / p.size)
    else:
        mean, var = _moments(wide, xv, p)
        rstd = (var + eps).rsqrt()
        z = _preactivation(wide, xv, p, mean, rstd, weight, bias, scratch)
    y = _finish(z, x, residual, act, slope)
    mask = pack(y) if save_mask else no_mask(x)
    return y, mean.reshape(shape), rstd.reshape(shape), var.reshape(shape), mask


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
    scratch = p.scratch(wide)
    z = _preactivation(wide, p.of(wide, scratch), p, mean, rstd, weight, bias, scratch)
    return _finish(z, x, residual, act, slope)


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
    out = canonical(x)
    wants_dresidual = (residual is not None or mask is not None) and act != NONE
    if x.numel() == 0:
        dweight, dbias = (x.new_zeros(x.shape[1], dtype=mean.dtype) for _ in range(2))
        dresidual = torch.empty_like(out) if wants_dresidual else x.new_empty(0)
        return torch.empty_like(out), dweight, dbias, dresidual
    wide, p = _seen_as_pieces(x, num_groups, per_sample)
    scratch = p.scratch(wide)
    xv, h = p.of(wide, scratch), like(dy.to(mean.dtype), wide)
    if mask is not None:
        h = keep(h, unpack(mask, out))
    elif act != NONE:
        z = _preactivation(wide, xv, p, mean, rstd, weight, bias)
        if residual is not None:
            z.add_(residual)
        h = _activation_backward(h, z, act, slope)
    backward = _nested_backward if p.per_channel else _straddling_backward
    dxv, dweight, dbias = backward(h, xv, p, p.from_cells(mean), p.from_cells(rstd), weight, live)
    dresidual = like(h.to(x.dtype), out) if wants_dresidual else x.new_empty(0)
    return like(p.back(dxv, wide, scratch).to(x.dtype), out), dweight, dbias, dresidual


def _frozen(
    xv: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """weight*(x - mean)*rstd + bias, all per piece: batch norm with running statistics."""
    return torch.native_batch_norm(xv, weight, bias, mean, rstd.pow(-2), False, 0.0, 0.0)[0]


def _preactivation(
    x: Tensor,
    xv: Tensor,
    p: _Pieces,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scratch: Tensor | None = None,
) -> Tensor:
    """weight[c]*(x - mean)*rstd + bias[c] from statistics of cells, in scratch or fresh memory."""
    mean, rstd = p.from_cells(mean), p.from_cells(rstd)
    if p.per_channel:
        zv = _frozen(xv, mean, rstd, p.from_channels(weight), p.from_channels(bias))
        return p.back(zv, x, scratch)
    z = p.back(_frozen(xv, mean, rstd, None, None), x)
    if weight is not None:
        z.mul_(cells.per_channel(weight, x))
    return z if bias is None else z.add_(cells.per_channel(bias, x))


def _finish(z: Tensor, x: Tensor, residual: Tensor | None, act: int, slope: float) -> Tensor:
    """act(z + residual) in x's dtype and layout; z is fresh memory."""
    if residual is not None:
        z.add_(residual)
    return like(_activated(z, act, slope).to(x.dtype), canonical(x))


def _activated(z: Tensor, act: int, slope: float) -> Tensor:
    """cells.activate in z's own memory: on the CPU fresh pages cost as much as the arithmetic."""
    if act == cells.RELU:
        return z.relu_()
    if act == cells.SILU:
        return F.silu(z, inplace=True)
    if act == cells.GELU:
        return torch.ops.aten.gelu_(z)
    return F.leaky_relu_(z, slope) if act == cells.LEAKY_RELU else z


def _activation_backward(h: Tensor, z: Tensor, act: int, slope: float) -> Tensor:
    if act == cells.RELU:
        return torch.ops.aten.threshold_backward(h, z, 0)
    if act == cells.SILU:
        return torch.ops.aten.silu_backward(h, z)
    if act == cells.GELU:
        return torch.ops.aten.gelu_backward(h, z)
    return torch.ops.aten.leaky_relu_backward(h, z, slope, False)


def _sums(
    hv: Tensor, xv: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, dx: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx of live statistics (if asked for), sum h*xhat and sum h, per virtual channel."""
    if weight is None and xv.is_cuda:
        # ATen's CUDA kernels give no sums without a weight to shape them after.
        weight = torch.ones_like(mean)
    frozen = (None, None) if dx else (mean, rstd.pow(-2))
    return torch.ops.aten.native_batch_norm_backward(
        hv, xv, weight, *frozen, mean, rstd, dx, 0.0, [dx, True, True]
    )


def _nested_backward(
    h: Tensor,
    xv: Tensor,
    p: _Pieces,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    live: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """mean and rstd are per piece; one sweep for the sums, two for dx."""
    hv, w = p.of(h), p.from_channels(weight)
    whole = live == 1 and p.per_group == 1  # ATen's training backward is then all there is to do
    dxv, sum_hx, sum_h = _sums(hv, xv, mean, rstd, w, whole)
    if not whole:
        scale = (rstd if w is None else rstd * w).view(1, -1, *([1] * (hv.dim() - 2)))
        if live:
            # The part in x first, -rstd*(m0 + xhat*m1): it is an affine sweep itself.
            share = -live / (p.size * p.per_group)
            m0, m1 = (
                p.from_cells(p.to_cells(s if w is None else s * w).sum(2)) * share
                for s in (sum_h, sum_hx)
            )
            dxv = _frozen(xv, mean, rstd, rstd * m1, rstd * m0).addcmul_(hv, scale)
        else:
            dxv = hv * scale
    return dxv, p.to_channels(sum_hx), p.to_channels(sum_h)


def _straddling_backward(
    h: Tensor,
    xv: Tensor,
    p: _Pieces,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    live: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pieces are groups: the weight, which changes inside them, goes into the gradient."""
    over = [d for d in range(h.dim()) if d != 1]
    dbias = h.sum(over)
    dweight = p.back(_frozen(xv, mean, rstd, None, None), h).mul_(h).sum(over)
    gv = p.of(h if weight is None else h * cells.per_channel(weight, h))
    dxv = gv * rstd.view(1, -1, 1)
    if live:
        dxv = torch.lerp(dxv, _sums(gv, xv, mean, rstd, None, True)[0], live)
    return dxv, dweight, dbias


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
    plain = num_groups == x.shape[1] and not per_sample and x.dtype.itemsize >= 4
    mean, var = running_mean, running_var
    if plain and (mean is None or (momentum is not None and mean.dtype is x.dtype)):
        # ATen moves the running statistics of batch norm itself.
        move = momentum or 0.0
        z, mean, rstd = torch.native_batch_norm(x, weight, bias, mean, var, True, move, eps)
        if running_mean is not None and num_batches_tracked is not None:
            num_batches_tracked.add_(1)
        y = _finish(z, x, residual, act, slope)
        return y, mean, rstd, pack(y) if save_mask else no_mask(x)
    y, mean, rstd, var, mask = norm_forward(
        x, weight, bias, residual, num_groups, per_sample, eps, act, slope, save_mask
    )
    if running_mean is not None and running_var is not None:
        running = running_mean, running_var, num_batches_tracked
        update_running(*running, mean, var, momentum, x.numel() // num_groups)
    return y, mean, rstd, mask
