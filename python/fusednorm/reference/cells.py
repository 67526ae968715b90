"""The algebra all methods share: moments of cells, apply, and its closed-form gradient.

A sample is the flat run d = c*S + s of its D = C*S elements in NCHW order. ``num_groups`` G cuts
it into G contiguous runs of L = D/G elements; a cell is one run over all samples, or over one
sample with ``per_sample``. With the cell's biased moments,

    xhat = (x - mean) * rstd,   rstd = (var + eps)^(-1/2)
    z    = weight[c]*xhat + bias[c] (+ residual),   y = act(z)

and, for an upstream gradient dy, h = act'(z)*dy, g = weight[c]*h,

    dx = rstd * (g - a*mean_cell(g) - a*xhat*mean_cell(g*xhat))

where the live weight a is 1 if the statistics depend on x and 0 if they are frozen.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

NONE, RELU, SILU, GELU, LEAKY_RELU = range(5)
ACTIVATIONS = {None: NONE, "relu": RELU, "silu": SILU, "gelu": GELU, "leaky_relu": LEAKY_RELU}


def activation_index(act: str | None) -> int:
    """The number operators know an activation by; ValueError for a name that is none."""
    if act is None or (isinstance(act, str) and act in ACTIVATIONS):
        return ACTIVATIONS[act]
    known = ", ".join(repr(name) for name in ACTIVATIONS)
    raise ValueError(f"act: expected one of {known}, got {act!r}")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def activate(z: Tensor, act: int, slope: float) -> Tensor:
    if act == RELU:
        return F.relu(z)
    if act == SILU:
        return F.silu(z)
    if act == GELU:
        return F.gelu(z)
    if act == LEAKY_RELU:
        return F.leaky_relu(z, slope)
    return z


def activation_derivative(z: Tensor, act: int, slope: float) -> Tensor:
    """act'(z), itself differentiable; at z = 0 the value torch's own backward uses."""
    if act == RELU:
        return (z > 0).to(z.dtype)
    if act == SILU:
        s = torch.sigmoid(z)
        return s * (1 + z * (1 - s))
    if act == GELU:
        cdf = 0.5 * (1 + torch.erf(z * math.sqrt(0.5)))
        return cdf + z * torch.exp(-0.5 * z * z) * (1 / math.sqrt(2 * math.pi))
    if act == LEAKY_RELU:
        return torch.where(z > 0, 1.0, slope).to(z.dtype)
    return torch.ones_like(z)


def as_cells(x: Tensor, num_groups: int) -> Tensor:
    """(N, C, *) as (N, G, L): runs of the flattened (C, *) axes."""
    return x.reshape(x.shape[0], num_groups, -1)


def spread(cells: Tensor, like: Tensor) -> Tensor:
    """A value per cell, shape (G,) or (N, G), to one per element of ``like`` (N, C, *)."""
    n, run = like.shape[0], like[0].numel() // cells.shape[-1]
    return cells.unsqueeze(-1).expand(n, cells.shape[-1], run).reshape(like.shape)


def per_channel(v: Tensor, like: Tensor) -> Tensor:
    return v.view(1, -1, *([1] * (like.dim() - 2)))


def moments(x: Tensor, num_groups: int, per_sample: bool) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every cell, by two passes."""
    cells = as_cells(x, num_groups)
    dims = (2,) if per_sample else (0, 2)
    mean = cells.mean(dims, keepdim=True)
    var = (cells - mean).square().mean(dims)
    return mean.view_as(var), var


def apply(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    act: int = NONE,
    slope: float = 0.0,
) -> Tensor:
    """y = act(weight*(x - mean)*rstd + bias + residual)."""
    z = (x - spread(mean, x)) * spread(rstd, x)
    if weight is not None:
        z = z * per_channel(weight, x)
    if bias is not None:
        z = z + per_channel(bias, x)
    if residual is not None:
        z = z + residual
    return activate(z, act, slope)


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    num_groups: int,
    per_sample: bool,
    eps: float,
    act: int = NONE,
    slope: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean, var, in x's dtype for float32/float64 and computed in float32 below that."""
    acc = accumulation_dtype(x.dtype)
    wide = x.to(acc)
    mean, var = moments(wide, num_groups, per_sample)
    weight, bias, residual = (None if t is None else t.to(acc) for t in (weight, bias, residual))
    y = apply(wide, mean, (var + eps).rsqrt(), weight, bias, residual, act, slope)
    return y.to(x.dtype), mean, var


def backward(
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
    positive: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias, dresidual by the formula above; differentiable in every argument.

    Parameter gradients come in the accumulation dtype, also where there is no parameter.
    ``positive``, where y > 0, settles relu's derivative instead of the residual.
    """
    acc = accumulation_dtype(x.dtype)
    wide, h = x.to(acc), dy.to(acc)
    centered_rstd = spread(rstd, x)
    xhat = (wide - spread(mean, x)) * centered_rstd
    if positive is not None:
        h = h * positive
    elif act != NONE:
        z = apply(wide, mean, rstd, weight, bias, None if residual is None else residual.to(acc))
        h = h * activation_derivative(z, act, slope)
    over = [d for d in range(x.dim()) if d != 1]
    g = h if weight is None else h * per_channel(weight, x)
    dx = g
    if live:
        dims = (2,) if per_sample else (0, 2)
        m0 = as_cells(g, num_groups).mean(dims)
        m1 = as_cells(g * xhat, num_groups).mean(dims)
        dx = g - live * spread(m0, x) - live * xhat * spread(m1, x)
    return (
        (dx * centered_rstd).to(x.dtype),
        (h * xhat).sum(over),
        h.sum(over),
        h.to(x.dtype),
    )
