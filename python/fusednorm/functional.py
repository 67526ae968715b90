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

import math

import torch
import torch.fx
from torch import Tensor
from torch.nn import functional as F

from fusednorm.layout import canonical, like
from fusednorm.ops import NAMESPACES, Apply, Config, Normalize, resolve
from fusednorm.reference import cells

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

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
    num_groups = _checked_input(input).shape[1]
    return batch_group_norm(
        input, num_groups, running_mean, running_var, weight, bias, training, momentum, eps,
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
    x = _checked_input(input)
    _check_groups(x, num_groups)
    _check_running(
        running_mean, running_var, num_batches_tracked, momentum, num_groups, training, x
    )
    count = _check_count(x, num_groups, x.shape[0]) if training else 0
    act_index = cells.activation_index(act)
    x, residual = _dense_operands(x, weight, bias, residual, eps)
    config = Config(num_groups, False, float(eps), act_index, float(negative_slope), resolve(x))
    if training:
        y, mean, _, var = Normalize.apply(x, weight, bias, residual, config)
        if running_mean is not None and running_var is not None:
            _update(running_mean, running_var, num_batches_tracked, mean, var, momentum, count)
        return y
    assert running_mean is not None and running_var is not None  # _check_running
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
    x = _checked_input(input)
    channels = x.shape[1]
    if not _is_int(num_groups) or num_groups < 1 or channels % num_groups:
        raise ValueError(
            f"num_groups: expected a divisor of the {channels} channels of input, "
            f"got {num_groups!r}"
        )
    if x.shape[0]:
        _check_count(x, num_groups, 1)
    act_index = cells.activation_index(act)
    x, residual = _dense_operands(x, weight, bias, residual, eps)
    config = Config(num_groups, True, float(eps), act_index, float(negative_slope), resolve(x))
    if torch.compiler.is_exporting():
        acc = cells.accumulation_dtype(x.dtype)
        w, b, r = (None if t is None else t.to(acc) for t in (weight, bias, residual))
        z = F.group_norm(x.to(acc), num_groups, w, b, config.eps)
        z = cells.activate(z if r is None else z + r, config.act, config.slope)
        return like(z.to(x.dtype), x)
    return Normalize.apply(x, weight, bias, residual, config)[0]


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


def _update(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    var: Tensor,
    momentum: float | None,
    count: int,
) -> None:
    # Kernels take dense buffers as wide as the statistics, or narrower in a .half() module.
    plain = cells.accumulation_dtype(running_mean.dtype) == mean.dtype
    plain = plain and running_mean.is_contiguous() and running_var.is_contiguous()
    backend = resolve(mean) if plain else "reference"
    update = getattr(torch.ops, NAMESPACES[backend]).update_running
    update(running_mean, running_var, num_batches_tracked, mean, var, momentum, count)


def _checked_input(input: Tensor) -> Tensor:
    if input.dim() < 2:
        raise ValueError(f"input: expected at least 2 dimensions (N, C, *), got {input.dim()}")
    if input.dtype not in _FLOATS:
        raise TypeError(f"input: expected float16, bfloat16, float32 or float64, got {input.dtype}")
    return input


def _check_groups(x: Tensor, num_groups: int) -> None:
    sizes = math.prod(x.shape[1:])
    if not _is_int(num_groups) or num_groups < 1 or sizes % num_groups:
        raise ValueError(
            f"num_groups: expected a divisor of {sizes}, the channels times the spatial size of "
            f"input {tuple(x.shape)}, got {num_groups!r}"
        )


def _check_vector(name: str, v: Tensor | None, size: int, what: str, x: Tensor) -> None:
    if v is None:
        return
    if v.dim() != 1 or v.shape[0] != size:
        raise ValueError(f"{name}: expected shape ({size},), {what}, got {tuple(v.shape)}")
    if not v.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {v.dtype}")
    if v.device != x.device:
        raise RuntimeError(f"{name}: expected device {x.device}, that of input, got {v.device}")


def _dense_operands(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    """x and the residual dense in one layout, once all these arguments have been checked."""
    _check_vector("weight", weight, x.shape[1], "the channels of input", x)
    _check_vector("bias", bias, x.shape[1], "the channels of input", x)
    if eps < 0:
        raise ValueError(f"eps: expected at least 0, got {eps}")
    if residual is None:
        return canonical(x), None
    if residual.shape != x.shape:
        raise ValueError(
            f"residual: expected the shape of input {tuple(x.shape)}, got {tuple(residual.shape)}"
        )
    if residual.dtype != x.dtype and torch.is_autocast_enabled(x.device.type):
        # A float32 skip connection beside a half branch is ordinary there.
        residual = residual.to(x.dtype)
    if residual.dtype != x.dtype:
        raise TypeError(f"residual: expected the dtype of input {x.dtype}, got {residual.dtype}")
    if residual.device != x.device:
        raise RuntimeError(f"residual: expected device {x.device}, got {residual.device}")
    x = canonical(x)
    return x, like(residual, x)


def _check_running(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    num_groups: int,
    training: bool,
    x: Tensor,
) -> None:
    """Everything an update could fail at, before anything is launched."""
    if running_mean is None or running_var is None:
        if running_mean is not running_var:
            raise ValueError("running_mean and running_var: expected both or neither")
        if not training:
            raise ValueError("running_mean and running_var must be given when not training")
        return
    for name, v in (("running_mean", running_mean), ("running_var", running_var)):
        _check_vector(name, v, num_groups, "num_groups", x)
        if v.requires_grad:
            raise ValueError(f"{name}: expected a buffer, got a tensor that requires grad")
    if running_mean.dtype != running_var.dtype:
        raise TypeError(
            f"running_var: expected the dtype of running_mean {running_mean.dtype}, "
            f"got {running_var.dtype}"
        )
    if not training:
        return
    if momentum is None and num_batches_tracked is None:
        raise ValueError("momentum=None needs num_batches_tracked")
    if momentum is not None and not isinstance(momentum, (int, float)):
        raise TypeError(f"momentum: expected a float or None, got {momentum!r}")
    if num_batches_tracked is None:
        return
    counter = num_batches_tracked
    if counter.numel() != 1 or counter.dtype != torch.int64:
        raise ValueError(
            "num_batches_tracked: expected one int64, "
            f"got shape {tuple(counter.shape)} of {counter.dtype}"
        )
    if counter.device != x.device:
        raise RuntimeError(f"num_batches_tracked: expected device {x.device}, got {counter.device}")


def _is_int(n: object) -> bool:
    # A symbol where the channels are traced as one.
    return isinstance(n, (int, torch.SymInt))


def _check_count(x: Tensor, num_groups: int, samples: int) -> int:
    """Elements a cell: at least 2, or there is no variance."""
    count = samples * (math.prod(x.shape[1:]) // num_groups)
    if count < 2:
        raise ValueError(
            "input: expected more than 1 value per cell when training, got "
            f"{count} for size {tuple(x.shape)} and num_groups {num_groups}"
        )
    return count
