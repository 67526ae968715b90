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
for float64 x. ``act`` is an index of ``reference.cells.ACTIVATIONS``.
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
from fusednorm.reference.cells import accumulation_dtype

SCHEMAS = {
    "norm_forward": "(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, int num_groups, "
    "bool per_sample, float eps, int act, float slope) -> "
    "(Tensor y, Tensor mean, Tensor rstd, Tensor var)",
    "norm_apply": "(Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, "
    "Tensor? residual, int num_groups, bool per_sample, int act, float slope) -> Tensor",
    "norm_backward": "(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, "
    "Tensor? bias, Tensor? residual, int num_groups, bool per_sample, float live, int act, "
    "float slope) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)",
    "update_running": "(Tensor(a!) running_mean, Tensor(b!) running_var, "
    "Tensor(c!)? num_batches_tracked, Tensor mean, Tensor var, float? momentum, "
    "SymInt count) -> ()",
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (x.shape[0], num_groups) if per_sample else (num_groups,)
    mean, rstd, var = (x.new_empty(shape, dtype=accumulation_dtype(x.dtype)) for _ in range(3))
    return torch.empty_like(canonical(x)), mean, rstd, var


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
    num_groups: int,
    per_sample: bool,
    live: float,
    act: int,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = torch.empty_like(canonical(x))
    dweight, dbias = (x.new_empty(x.shape[1], dtype=mean.dtype) for _ in range(2))
    wants_dresidual = residual is not None and act != 0
    return dx, dweight, dbias, torch.empty_like(dx) if wants_dresidual else x.new_empty(0)


def _fake_update(*_: object) -> None:
    return None


_FAKES: dict[str, Callable[..., Any]] = {
    "norm_forward": _fake_forward,
    "norm_apply": _fake_apply,
    "norm_backward": _fake_backward,
    "update_running": _fake_update,
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
