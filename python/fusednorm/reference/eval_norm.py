"""EvalNorm (arXiv 1904.06031): the statistics that a sample would have met in a training batch.

A layer trained in batches of B normalized each sample by moments it was itself 1/B of; running
statistics alone leave its own share out. With the sample's moments (m, v) and the running ones,

    mean = a*m + (1 - a)*mu_run
    var  = a*v + (1 - a)*v_run + a*(1 - a)*(m - mu_run)^2,   a = 1/B

which are the expectations of the batch's first two moments over the other B - 1 samples. (The
paper's code and exact text are not public; a = 1/B is derived, not quoted.) a = 0 is batch norm's
evaluation, a = 1 instance normalization, what training in batches of one does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusednorm.reference import cells


def expected_statistics(
    mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor, alpha: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Of the samples' moments (N, C): what evaluation normalizes with, (N, C)."""
    shift = mean - running_mean
    # Without E[x^2] - E[x]^2: the spread between the two means is written out.
    return (
        running_mean + alpha * shift,
        alpha * var + (1 - alpha) * running_var + alpha * (1 - alpha) * shift.square(),
    )


def eval_norm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    alpha: Tensor | float,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    act: int = cells.NONE,
    slope: float = 0.01,
) -> Tensor:
    """(N, C, *) -> y of the same shape and dtype, by each sample's own expected statistics."""
    acc = cells.accumulation_dtype(x.dtype)
    wide = x.to(acc)
    running = running_mean.to(acc), running_var.to(acc)
    alpha = alpha.to(acc) if isinstance(alpha, Tensor) else alpha
    mean, var = cells.moments(wide, x.shape[1], per_sample=True)
    mean, var = expected_statistics(mean, var, *running, alpha)
    weight, bias, residual = (None if t is None else t.to(acc) for t in (weight, bias, residual))
    y = cells.apply(wide, mean, (var + eps).rsqrt(), weight, bias, residual, act, slope)
    return y.to(x.dtype)


def matching_loss(
    mean: Tensor,
    var: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    alpha: Tensor | float,
    eps: float,
) -> Tensor:
    """Mean square between x normalized by the batch and by the expected statistics, a scalar.

    From the samples' moments (N, C) alone: with u = x - mean of zero mean and variance v,
    mean (u*(r - r') + d)^2 = (r - r')^2*v + d^2.
    """
    batch_mean = mean.mean(0)
    batch_var = var.mean(0) + (mean - batch_mean).square().mean(0)
    expected_mean, expected_var = expected_statistics(mean, var, running_mean, running_var, alpha)
    trained, evaluated = (torch.rsqrt(v + eps) for v in (batch_var, expected_var))
    offset = (mean - batch_mean) * trained - (mean - expected_mean) * evaluated
    return ((trained - evaluated).square() * var + offset.square()).mean()
