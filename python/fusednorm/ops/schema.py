"""The operators: one schema table, one fake kernel each, one namespace a backend.

==========================  ==============================  =========================
namespace                   implemented by                  runs on
==========================  ==============================  =========================
``fusednorm``               csrc/, the compiled ``_C.so``   CUDA
``fusednorm_triton``        fusednorm.triton_kernels        CUDA, CPU when interpreted
``fusednorm_reference``     fusednorm.ops.composite         anything
==========================  ==============================  =========================

x is (N, C, *), D its elements a sample. Statistics have one entry per cell: (G,), or (N, G) with
``per_sample``; see ``fusednorm.reference.cells``. Statistics and parameters are float32, float64
for float64 x. ``act`` is an index of ``reference.cells.ACTIVATIONS``; ``mask``, see
``fusednorm.ops.mask``, stands for y > 0, and is empty unless ``save_mask``.

``norm_train`` is ``norm_forward`` and ``update_running`` in one call, for eager training: the
compiled library does both in the same launch, and the host calls out once. ``norm_backward`` takes
either the residual or the mask, and gives ``dresidual`` for either, unless there is no activation.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusednorm.layout import canonical
from fusednorm.ops import composite
from fusednorm.ops.mask import mask_size, no_mask
from fusednorm.reference.cells import accumulation_dtype

SCHEMAS = {
    "norm_forward": "(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, int num_groups, "
    "bool per_sample, float eps, int act, float slope, bool save_mask) -> "
    "(Tensor y, Tensor mean, Tensor rstd, Tensor var, Tensor mask)",
    "norm_apply": "(Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, "
    "Tensor? residual, int num_groups, bool per_sample, int act, float slope) -> Tensor",
    "norm_backward": "(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, "
    "Tensor? bias, Tensor? residual, Tensor? mask, int num_groups, bool per_sample, float live, "
    "int act, float slope) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)",
    "update_running": "(Tensor(a!) running_mean, Tensor(b!) running_var, "
    "Tensor(c!)? num_batches_tracked, Tensor mean, Tensor var, float? momentum, "
    "SymInt count) -> ()",
    "norm_train": "(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, "
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, "
    "int num_groups, bool per_sample, float eps, float? momentum, int act, float slope, "
    "bool save_mask) -> (Tensor y, Tensor mean, Tensor rstd, Tensor mask)",
}
NAMESPACES = {
    "cuda": "fusednorm",
    "triton": "fusednorm_triton",
    "reference": "fusednorm_reference",
}
NATIVE_LIBRARY = Path(__file__).resolve().parents[1] / "_C.so"


def _fake_forward(
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
    mean, rstd, var = (x.new_empty(shape, dtype=accumulation_dtype(x.dtype)) for _ in range(3))
    mask = x.new_empty(mask_size(x), dtype=torch.uint8) if save_mask else no_mask(x)
    return torch.empty_like(canonical(x)), mean, rstd, var, mask


def _fake_apply(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(canonical(x))


def _fake_backward(
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
    dx = torch.empty_like(canonical(x))
    dweight, dbias = (x.new_empty(x.shape[1], dtype=mean.dtype) for _ in range(2))
    wants_dresidual = (residual is not None or mask is not None) and act != 0
    return dx, dweight, dbias, torch.empty_like(dx) if wants_dresidual else x.new_empty(0)


def _fake_update(*_: object) -> None:
    return None


def _fake_train(
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
    # One tensor on the meta device brings a real call here.
    for t in (weight, bias, residual, running_mean, running_var, num_batches_tracked):
        if t is not None and t.device != x.device:
            raise RuntimeError(f"expected all tensors on {x.device}, that of x, got {t.device}")
    y, mean, rstd, _, mask = _fake_forward(
        x, weight, bias, residual, num_groups, per_sample, eps, act, slope, save_mask
    )
    return y, mean, rstd, mask


_FAKES: dict[str, Callable[..., Any]] = {
    "norm_forward": _fake_forward,
    "norm_apply": _fake_apply,
    "norm_backward": _fake_backward,
    "update_running": _fake_update,
    "norm_train": _fake_train,
}


def _below_autograd(name: str) -> Callable[..., Any]:
    """Operators have no gradient of their own, like the compiled ones: Functions give it."""
    operator = getattr(composite, name)

    def call(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    return call


def _in_triton(name: str) -> Callable[..., Any]:
    """Triton is imported by the first call, so that importing fusednorm stays cheap."""

    def call(*args: Any) -> Any:
        return getattr(importlib.import_module("fusednorm.triton_kernels"), name)(*args)

    return call


def _define() -> list[torch.library.Library]:
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
    libraries = []
    for backend, namespace in NAMESPACES.items():
        library = torch.library.Library(namespace, "DEF")
        for name, schema in SCHEMAS.items():
            library.define(name + schema, tags=tags)
            torch.library.register_fake(f"{namespace}::{name}", _FAKES[name], lib=library)
            if backend == "reference":
                library.impl(name, _below_autograd(name), "CompositeExplicitAutograd")
            elif backend == "triton":
                library.impl(name, _in_triton(name), "CompositeExplicitAutograd")
        libraries.append(library)
    return libraries


def _load_native() -> str | None:
    """Why the compiled CUDA kernels are not registered, or None if they are."""
    if not NATIVE_LIBRARY.exists():
        return f"the compiled library {NATIVE_LIBRARY.name} is not installed"
    try:
        torch.ops.load_library(str(NATIVE_LIBRARY))
    except OSError as error:
        return f"the compiled library does not load: {error}"
    return None


_LIBRARIES = _define()
NATIVE_MISSING = _load_native()

__all__ = ["NAMESPACES", "NATIVE_LIBRARY", "NATIVE_MISSING", "SCHEMAS"]
