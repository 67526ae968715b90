"""Launches: devices, counters, and the arguments that all kernels of a pattern begin with.

Every launch of the package goes through ``launch``. Nothing here knows what an operator is.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import columns, counters, elementwise, runs
from .plan import Limits, Sweep, ceil_div, power_of_two, step

# Read when kernels are decorated, as Triton does: later changes of the variable have no effect.
INTERPRETED = triton.knobs.runtime.interpret

# What a plan is made for where there is no device: small, but enough to split.
INTERPRETER_SMS = 4

LIMITS = Limits.standard()

# Triton 3.10 turns multiply-adds off unless asked; forward and backward must agree on z.
OPTIONS = {"enable_fp_fusion": True}

KERNELS = {
    ("runs", "moments"): runs.moments_runs_kernel,
    ("runs", "apply"): runs.apply_runs_kernel,
    ("runs", "backward_reduce"): runs.backward_reduce_runs_kernel,
    ("runs", "backward_apply"): runs.backward_apply_runs_kernel,
    ("columns", "moments"): columns.moments_columns_kernel,
    ("columns", "apply"): elementwise.apply_columns_kernel,
    ("columns", "backward_reduce"): columns.backward_reduce_columns_kernel,
    ("columns", "backward_apply"): elementwise.backward_apply_columns_kernel,
}


# A ceiling for reducing sweeps: what one wave of the plan's threads may have. Without it the
# assembler aims lower, and spills where a block combines. Doubles, residuals and an address
# for every element need more.
REGISTERS = 128


@functools.lru_cache
def num_sms(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETER_SMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def check_device(name: str, t: Tensor) -> None:
    if not (t.is_cuda or INTERPRETED):
        raise RuntimeError(
            f"backend 'triton' takes CUDA tensors, got {name} on {t.device}; other devices are "
            "allowed only where Triton interprets (TRITON_INTERPRET=1 set before the import)"
        )


def launch(
    kernel: Any,
    grid: int,
    args: tuple[Any, ...],
    num_warps: int,
    registers: int | None = None,
    **constants: Any,
) -> None:
    """One kernel on the device of its first tensor. Every launch goes through here."""
    device = next(a for a in args if isinstance(a, Tensor)).device
    options = OPTIONS if registers is None else OPTIONS | {"maxnreg": registers}
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(grid,)](*args, num_warps=num_warps, **options, **constants)


def tiles(s: Sweep) -> tuple[tuple[int, ...], dict[str, Any]]:
    """(sizes, constants) of a sweep's kernel: what all kernels of its pattern begin with."""
    g = s.geometry
    constants = {"BLOCK_ROWS": s.block_rows, "BLOCK_COLS": s.block_cols, "VEC": s.vec}
    if s.pattern == "runs":
        constants |= {"REGULAR": g.regular, "STRIDED": s.strided}
        sizes = (g.rows, g.channels, g.spatial, g.group, g.unit, g.groups, g.pieces, s.splits)
        return sizes, constants
    constants["WHOLE"] = s.ranges == 1
    sizes = (g.rows, s.columns, s.positions, s.span, s.ranges, s.width, s.unit, s.stride)
    return (*sizes, s.splits), constants


def reducing(s: Sweep) -> tuple[tuple[int, ...], dict[str, Any]]:
    """tiles and what a sweep needs that combines."""
    sizes, constants = tiles(s)
    cells, constants["STEP"] = step(s.cells)
    if s.pattern == "columns":
        sizes += (s.fan, s.bundle)
        constants["LANES"] = power_of_two(s.stride // s.unit) if s.unit > 1 else s.block_cols
        constants |= {"FRAMED": s.unit > 1, "FANNED": s.fan > 1, "CELLS": cells}
    return (*sizes, s.planes), constants


def foldable(s: Sweep, x: Tensor) -> tuple[Sweep, Tensor | None]:
    """The sweep with its counters; without fans where there are none to be had."""
    zeros = counters.zeros(x, s.counters)
    return (s, zeros) if zeros is not None else (replace(s, fan=1), None)


def combine_cells(
    kernel: Any, s: Sweep, args: tuple[Any, ...], tl_acc: tl.dtype, *more: int
) -> None:
    """The combining launch of a sweep that had no counters."""
    g = s.geometry
    cells = min(128, max(1, 1024 // ceil_div(g.pieces * s.fans, g.groups)))
    cells, steps = step(min(cells, g.cells))
    sizes = (g.spatial, g.group, g.unit, g.groups, g.pieces, s.fans, s.planes)
    launch(
        kernel,
        ceil_div(g.cells, cells),
        (*args, g.cells, *more, *sizes),
        num_warps=4,
        ACC=tl_acc,
        CELLS=cells,
        STEP=steps,
        REGULAR=g.regular,
    )
