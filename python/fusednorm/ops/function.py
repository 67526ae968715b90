"""Autograd over the operators: one Function forward, one for its backward.

The backward pass is a Function of its own so that it can be differentiated again: its gradient
is the vector-Jacobian product of the reference's closed form.

``Normalize`` and ``Apply`` compose with torch.compile and torch.func, for which they have to
define ``setup_context``; torch then binds their arguments by inspection, and the running
statistics are updated by a call of their own. ``Train`` is Normalize for plain eager calls, at a
third of the time on the host.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fusednorm.ops import composite
from fusednorm.ops.mask import unpack
from fusednorm.ops.schema import NAMESPACES
from fusednorm.reference import cells


class Config(NamedTuple):
    """What an operator call is about besides its tensors."""

    num_groups: int
    per_sample: bool
    eps: float
    act: int
    slope: float
    backend: str
    save_mask: bool = True  # of relu with a residual, instead of the residual


# What a training step updates: running_mean, running_var, num_batches_tracked, momentum. No
# buffers, no update.
Running: TypeAlias = "tuple[Tensor | None, Tensor | None, Tensor | None, float | None]"

_OPS = {backend: getattr(torch.ops, namespace) for backend, namespace in NAMESPACES.items()}

# The composition needs no operator around it, and autograd is off where these are called.
_TRAIN = {backend: ops.norm_train.default for backend, ops in _OPS.items()}
_TRAIN["reference"] = composite.norm_train
_BACKWARD = {backend: ops.norm_backward.default for backend, ops in _OPS.items()}
_BACKWARD["reference"] = composite.norm_backward
_is_batched = torch._C._functorch.is_legacy_batchedtensor


def _cast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(dtype)


def _signed(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """Keeps the signature of forward at hand: ``apply`` asks inspect for it at every call, which
    builds it anew, for tens of microseconds, unless it finds one ready."""
    function.forward.__signature__ = inspect.signature(function.forward)  # type: ignore[attr-defined]
    return function


def _masked(config: Config, residual: Tensor | None) -> bool:
    """Whether forward leaves a mask and the residual is not kept."""
    return config.save_mask and residual is not None and config.act == cells.RELU


@_signed
class Normalize(torch.autograd.Function):
    """(x, weight, bias, residual) -> y, mean, rstd, var, mask with statistics of x itself."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        config: Config,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        acc = cells.accumulation_dtype(x.dtype)
        num_groups, per_sample, eps, act, slope, backend, _ = config
        return _OPS[backend].norm_forward(
            x, _cast(weight, acc), _cast(bias, acc), residual,
            num_groups, per_sample, eps, act, slope, _masked(config, residual),
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, residual, ctx.config = inputs
        _, mean, rstd, var, mask = output
        ctx.mark_non_differentiable(mean, rstd, var, mask)
        _save(ctx, x, weight, bias, residual, mean, rstd, mask)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return (*_gradients(ctx, dy, 1.0), None)


class Train(torch.autograd.Function):
    """(x, weight, bias, residual) -> y with statistics of x itself, running ones updated.

    Plain eager calls only: not under torch.compile, nor inside a torch.func transform. Parameters
    are of the accumulation dtype.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running: Running,
        config: Config,
    ) -> Tensor:
        running_mean, running_var, tracked, momentum = running
        num_groups, per_sample, eps, act, slope, backend, save_mask = config
        y, mean, rstd, mask = _TRAIN[backend](
            x, weight, bias, residual, running_mean, running_var, tracked,
            num_groups, per_sample, eps, momentum, act, slope,
            save_mask and residual is not None and act == cells.RELU,
        )  # fmt: skip
        ctx.config = config
        if residual is None:
            ctx.has_residual = False
            ctx.save_for_backward(x, weight, bias, None, None, mean, rstd)
        else:
            _save(ctx, x, weight, bias, residual, mean, rstd, mask)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        # To be differentiated again, or with a batch of dy (is_grads_batched): as Normalize does.
        if torch.is_grad_enabled() or _is_batched(dy):
            return (*_gradients(ctx, dy, 1.0), None, None)
        x, weight, bias, residual, mask, mean, rstd = ctx.saved_tensors
        num_groups, per_sample, _, act, slope, backend, _ = ctx.config
        dx, dweight, dbias, dresidual = _BACKWARD[backend](
            dy, x, mean, rstd, weight, bias, residual, mask,
            num_groups, per_sample, 1.0, act, slope,
        )  # fmt: skip
        if not ctx.has_residual:
            dresidual = None
        elif act == cells.NONE:
            dresidual = dy
        return (
            dx,
            None if weight is None else dweight,
            None if bias is None else dbias,
            dresidual,
            None,
            None,
        )


# Function.apply also unwraps tensors that outlived a torch.func transform and looks for running
# ones, in Python; callers of Train have done the latter.
train_with_gradient = super(torch.autograd.Function, Train).apply


class _NothingKept:
    """The context of a call that nobody will differentiate."""

    def save_for_backward(self, *_: Tensor | None) -> None:
        pass


def train_without_gradient(*args: Any) -> Tensor:
    """The same of Train's arguments where none requires a gradient."""
    y: Tensor = Train.forward(_NothingKept(), *args)
    return y


@_signed
class Apply(torch.autograd.Function):
    """(x, weight, bias, residual) -> y with frozen statistics."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        config: Config,
    ) -> Tensor:
        acc = cells.accumulation_dtype(x.dtype)
        num_groups, per_sample, _, act, slope, backend, _ = config
        y: Tensor = _OPS[backend].norm_apply(
            x, mean, rstd, _cast(weight, acc), _cast(bias, acc), residual,
            num_groups, per_sample, act, slope,
        )  # fmt: skip
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, residual, mean, rstd, config = inputs
        ctx.config = config._replace(save_mask=False)
        _save(ctx, x, weight, bias, residual, mean, rstd, None)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return (*_gradients(ctx, dy, 0.0), None, None, None)


def _save(
    ctx: Any,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    mask: Tensor | None,
) -> None:
    ctx.has_residual = residual is not None
    masked = _masked(ctx.config, residual)
    # Without an activation the gradient does not depend on the residual: keep nothing of it.
    kept = None if masked or ctx.config.act == cells.NONE else residual
    ctx.save_for_backward(x, weight, bias, kept, mask if masked else None, mean, rstd)


def _gradients(ctx: Any, dy: Tensor, live: float) -> tuple[Tensor | None, ...]:
    x, weight, bias, residual, mask, mean, rstd = ctx.saved_tensors
    dx, dweight, dbias, dresidual = NormalizeBackward.apply(
        dy, x, weight, bias, residual, mask, mean, rstd, live, ctx.config
    )
    if not ctx.has_residual:
        dresidual = None
    elif ctx.config.act == cells.NONE:
        dresidual = dy
    return (
        dx,
        None if weight is None else dweight.to(weight.dtype),
        None if bias is None else dbias.to(bias.dtype),
        dresidual,
    )


@_signed
class NormalizeBackward(torch.autograd.Function):
    """(dy, x, weight, bias, residual) -> dx, dweight, dbias, dresidual."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        live: float,
        config: Config,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        num_groups, per_sample, _, act, slope, backend, _ = config
        return _OPS[backend].norm_backward(
            dy, x, mean, rstd, _cast(weight, mean.dtype), _cast(bias, mean.dtype), residual, mask,
            num_groups, per_sample, live, act, slope,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.live, ctx.config = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy, x, weight, bias, residual, mask, mean, rstd = ctx.saved_tensors
        num_groups, per_sample, eps, act, slope, *_ = ctx.config
        primals = [dy, x] + [t for t in (weight, bias, residual) if t is not None]
        # relu has no second derivative, so that the mask is as good as a constant.
        positive = None if mask is None else unpack(mask, x)
        with_residual = residual is not None or mask is not None

        def closed_form(dy: Tensor, x: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
            rest = iter(given)
            w, b, r = (None if t is None else next(rest) for t in (weight, bias, residual))
            w, b = _cast(w, mean.dtype), _cast(b, mean.dtype)
            mu, rs = mean, rstd
            if ctx.live:
                mu, var = cells.moments(x.to(mean.dtype), num_groups, per_sample)
                rs = (var + eps).rsqrt()
            gradients = cells.backward(
                dy, x, mu, rs, w, b, r, num_groups, per_sample, ctx.live, act, slope, positive
            )
            return gradients if with_residual else gradients[:3]

        pullback: Any = torch.func.vjp(closed_form, *primals)[1]
        given = iter(pullback(tuple(grads if with_residual else grads[:3])))
        into = (None if t is None else next(given) for t in (dy, x, weight, bias, residual))
        return (*into, None, None, None, None, None)
