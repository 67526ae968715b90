"""Functional forms, in the argument order of ``torch.nn.functional``.

x is (N, C, *) with any number of spatial axes, of dtype float16, bfloat16, float32 or float64,
dense NCHW or NHWC (other strides cost a copy); the output keeps its dtype and memory format.
Statistics, computed in float32 (float64 for float64 x), pool *cells* of x, see
``fusednorm.reference.cells``. Every function can add a ``residual`` of x's shape and apply an
activation, y = act(norm(x) + residual), in the same sweep where kernels run.

Common errors: ``ValueError`` for a rank below 2, sizes that do not match, groups that do not
divide C*H*W, an unknown activation, or cells of fewer than two values in training;
``TypeError`` for an integer dtype; ``RuntimeError`` for tensors on different devices or a
backend that is not available. They are raised before anything is launched or changed.
"""

from __future__ import annotations

import torch
import torch.fx
from torch import Tensor
from torch.nn import functional as F

from fusednorm.checks import check_input, check_operands
from fusednorm.layout import like
from fusednorm.ops import Apply, Config, resolve
from fusednorm.reference import cells
from fusednorm.training import dense, is_plain, train_eagerly, train_in_steps

__all__ = ["batch_group_norm", "batch_norm", "group_norm"]

# torch.fx records a call of these as it stands, as it does with torch's own functions.
for _name in __all__:
    torch.fx.wrap(_name)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    act: str | None = None,
    residual: Tensor | None = None,
    negative_slope: float = 0.01,
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    """Batch normalization (Ioffe & Szegedy 2015), one cell a channel.

    Args:
        input: (N, C, *).
        running_mean, running_var: (C,), updated in place when ``training``; the variance is
            unbiased. Required when not ``training``.
        weight, bias: (C,), any floating dtype.
        training: normalize with the batch's statistics instead of the running ones.
        momentum: weight of the new value in the running statistics. None: their cumulative
            average, by ``num_batches_tracked``.
        eps: added to the variance.
        act: None, "relu", "silu", "gelu" (exact) or "leaky_relu" with ``negative_slope``.
        residual: tensor of input's shape, added before the activation.
        num_batches_tracked: int64 scalar, incremented in place when statistics are updated.

    Returns:
        y of input's shape, dtype and memory format.
    """
    check_input(input)
    return batch_group_norm(
        input, input.shape[1], running_mean, running_var, weight, bias, training, momentum, eps,
        act=act, residual=residual, negative_slope=negative_slope,
        num_batches_tracked=num_batches_tracked,
    )  # fmt: skip


def batch_group_norm(
    input: Tensor,
    num_groups: int,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    act: str | None = None,
    residual: Tensor | None = None,
    negative_slope: float = 0.01,
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    """Batch Group Normalization (Zhou et al., arXiv 2012.02782).

    The flattened (C, *) axes are cut into ``num_groups`` contiguous runs in NCHW order, whatever
    the memory layout; a cell is one run over the whole batch. ``num_groups = C`` is batch norm.

    Args:
        input: (N, C, *).
        num_groups: G, a divisor of C times the spatial size; not necessarily of C.
        running_mean, running_var: (G,), as in ``batch_norm``.

    The remaining arguments and the result are those of ``batch_norm``.
    """
    act_index = cells.activation_index(act)
    running = (running_mean, running_var, num_batches_tracked, momentum)
    if training:
        # Only Python knows of buffers that require grad; the other way refuses them.
        buffers = not any(v is not None and v.requires_grad for v in running[:2])
        train = train_eagerly if buffers and is_plain(input) else train_in_steps
        return train(
            input, num_groups, False, weight, bias, residual, running, eps, act_index,
            negative_slope,
        )  # fmt: skip
    check_operands(input, num_groups, False, weight, bias, residual, running, eps, False)
    x, residual = dense(input, residual)
    config = Config(num_groups, False, float(eps), act_index, float(negative_slope), resolve(x))
    assert running_mean is not None and running_var is not None  # check_operands
    return _frozen(x, running_mean, running_var, weight, bias, residual, config)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    act: str | None = None,
    residual: Tensor | None = None,
    negative_slope: float = 0.01,
) -> Tensor:
    """Group normalization (Wu & He, arXiv 1803.08494): a cell is C/G channels of one sample.

    ``num_groups`` divides C; 1 is layer normalization over (C, *), C is instance normalization.
    ``weight`` and ``bias`` are (C,); the rest is as in ``batch_norm``.
    """
    act_index = cells.activation_index(act)
    running = (None, None, None, None)
    if torch.compiler.is_exporting():
        check_operands(input, num_groups, True, weight, bias, residual, running, eps, True)
        x, residual = dense(input, residual)
        acc = cells.accumulation_dtype(x.dtype)
        w, b, r = (None if t is None else t.to(acc) for t in (weight, bias, residual))
        z = F.group_norm(x.to(acc), num_groups, w, b, float(eps))
        z = cells.activate(z if r is None else z + r, act_index, float(negative_slope))
        return like(z.to(x.dtype), x)
    train = train_eagerly if is_plain(input) else train_in_steps
    return train(
        input, num_groups, True, weight, bias, residual, running, eps, act_index, negative_slope
    )


def _frozen(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    config: Config,
) -> Tensor:
    acc = cells.accumulation_dtype(x.dtype)
    mean = running_mean.to(acc)
    # Not divmod: the channels are a symbol under torch.compile(dynamic=True).
    per_channel, straddles = x.shape[1] // config.num_groups, x.shape[1] % config.num_groups
    exporting = torch.compiler.is_exporting()
    if straddles or not (exporting or config.backend == "reference"):
        rstd = (running_var.to(acc) + config.eps).rsqrt()
        if exporting:
            w, b, r = (None if t is None else t.to(acc) for t in (weight, bias, residual))
            y = cells.apply(x.to(acc), mean, rstd, w, b, r, config.act, config.slope)
            return y.to(x.dtype)
        return Apply.apply(x, weight, bias, residual, mean, rstd, config)
    # Whole channels: ATen's own operator, which exporters know how to fold into a convolution.
    var = running_var.to(acc)
    if per_channel > 1:
        mean, var = mean.repeat_interleave(per_channel), var.repeat_interleave(per_channel)
    weight = None if weight is None else weight.to(acc)
    bias = None if bias is None else bias.to(acc)
    y = F.batch_norm(x, mean, var, weight, bias, False, 0.0, config.eps)
    y = cells.activate(y if residual is None else y + residual, config.act, config.slope)
    return like(y, x)
