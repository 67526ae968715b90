"""Autograd over the operators: one Function forward, one for its backward.

The backward pass is a Function of its own so that it can be differentiated again: its gradient
is the vector-Jacobian product of the reference's closed form.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor

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


_OPS = {backend: getattr(torch.ops, namespace) for backend, namespace in NAMESPACES.items()}


def _cast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(dtype)


def _signed(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """Keeps the signature of forward at hand: ``apply`` asks inspect for it at every call, which
    builds it anew, for tens of microseconds, unless it finds one ready."""
    function.forward.__signature__ = inspect.signature(function.forward)  # type: ignore[attr-defined]
    return function


@_signed
class Normalize(torch.autograd.Function):
    """(x, weight, bias, residual) -> y, mean, rstd, var with statistics of x itself."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        config: Config,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        acc = cells.accumulation_dtype(x.dtype)
        num_groups, per_sample, eps, act, slope, backend = config
        return _OPS[backend].norm_forward(
            x, _cast(weight, acc), _cast(bias, acc), residual,
            num_groups, per_sample, eps, act, slope,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, residual, ctx.config = inputs
        _, mean, rstd, var = output
        ctx.mark_non_differentiable(mean, rstd, var)
        _save(ctx, x, weight, bias, residual, mean, rstd)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return (*_gradients(ctx, dy, 1.0), None)


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
        num_groups, per_sample, _, act, slope, backend = config
        y: Tensor = _OPS[backend].norm_apply(
            x, mean, rstd, _cast(weight, acc), _cast(bias, acc), residual,
            num_groups, per_sample, act, slope,
        )  # fmt: skip
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, residual, mean, rstd, ctx.config = inputs
        _save(ctx, x, weight, bias, residual, mean, rstd)

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
) -> None:
    ctx.has_residual = residual is not None
    # Without an activation the gradient does not depend on the residual: keep nothing of it.
    kept = residual if ctx.config.act != cells.NONE else None
    ctx.save_for_backward(x, weight, bias, kept, mean, rstd)


def _gradients(ctx: Any, dy: Tensor, live: float) -> tuple[Tensor | None, ...]:
    x, weight, bias, residual, mean, rstd = ctx.saved_tensors
    dx, dweight, dbias, dresidual = NormalizeBackward.apply(
        dy, x, weight, bias, residual, mean, rstd, live, ctx.config
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
        mean: Tensor,
        rstd: Tensor,
        live: float,
        config: Config,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        num_groups, per_sample, _, act, slope, backend = config
        return _OPS[backend].norm_backward(
            dy, x, mean, rstd, _cast(weight, mean.dtype), _cast(bias, mean.dtype), residual,
            num_groups, per_sample, live, act, slope,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.live, ctx.config = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy, x, weight, bias, residual, mean, rstd = ctx.saved_tensors
        num_groups, per_sample, eps, act, slope, _ = ctx.config
        primals = [dy, x] + [t for t in (weight, bias, residual) if t is not None]

        def closed_form(dy: Tensor, x: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
            rest = iter(given)
            w, b, r = (None if t is None else next(rest) for t in (weight, bias, residual))
            w, b = _cast(w, mean.dtype), _cast(b, mean.dtype)
            mu, rs = mean, rstd
            if ctx.live:
                mu, var = cells.moments(x.to(mean.dtype), num_groups, per_sample)
                rs = (var + eps).rsqrt()
            dx, dw, db, dr = cells.backward(
                dy, x, mu, rs, w, b, r, num_groups, per_sample, ctx.live, act, slope
            )
            return (dx, dw, db) if r is None else (dx, dw, db, dr)

        pullback: Any = torch.func.vjp(closed_form, *primals)[1]
        given = iter(pullback(tuple(grads) if residual is not None else tuple(grads[:3])))
        into = (None if t is None else next(given) for t in (dy, x, weight, bias, residual))
        return (*into, None, None, None, None)
