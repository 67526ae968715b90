"""The kernels' own source, run on the CPU: torch tensors in, torch tensors out.

Every buffer a kernel writes lies between margins inside a larger one, all of it 0xff, which is NaN
in every float type. After a call no element may be left so, and the margins must be.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
ACTIVATIONS = ("none", "relu", "silu", "gelu", "leaky_relu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MARGIN_BYTES = 64

_INTS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def load() -> ModuleType:
    """The module from $FUSEDNORM_HOST_MODULE, else from where CMake puts it."""
    named = os.environ.get("FUSEDNORM_HOST_MODULE")
    found = [Path(named)] if named else sorted((ROOT / "build/host").glob("fusednorm_host*.so"))
    if not found or not found[0].is_file():
        where = named or "build/host/fusednorm_host*.so"
        raise RuntimeError(f"the host-run kernels are not built: no {where}; run `make host`")
    spec = importlib.util.spec_from_file_location("fusednorm_host", found[0])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def strides_of(shape: tuple[int, ...], channels_last: bool) -> tuple[int, ...]:
    """Dense strides in the named layout, without torch's freedom in axes of length one."""
    order = [0, *range(2, len(shape)), 1] if channels_last else list(range(len(shape)))
    strides = [0] * len(shape)
    step = 1
    for axis in reversed(order):
        strides[axis] = step
        step *= shape[axis]
    return tuple(strides)


class Running(NamedTuple):
    """Running statistics that a forward updates."""

    mean: Tensor | None
    var: Tensor | None
    num_batches_tracked: Tensor | None
    momentum: float


class Outputs:
    """Buffers to be written, checked once the kernels are through."""

    def __init__(self) -> None:
        self.buffers: list[tuple[str, Tensor, int, int]] = []

    def new(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        channels_last: bool = False,
        shift: int = 0,
    ) -> Tensor:
        """`shift` elements past an aligned address: 16-byte accesses are for `shift` 0 only."""
        numel = torch.Size(shape).numel()
        margin = MARGIN_BYTES // dtype.itemsize
        base = torch.full((numel + 2 * margin + shift,), -1, dtype=_INTS[dtype.itemsize])
        self.buffers.append((name, base, margin + shift, numel))
        strides = strides_of(shape, channels_last)
        return base.view(dtype).as_strided(shape, strides, margin + shift)

    def mask(self, x: Tensor) -> Tensor:
        """A byte for 16 bytes of x. A byte of eight positive elements is what poison looks like."""
        numel = -(-x.numel() // (16 // x.itemsize))
        base = torch.full((numel + 2 * MARGIN_BYTES,), -1, dtype=torch.int8)
        self.buffers.append(("", base, MARGIN_BYTES, numel))
        return base[MARGIN_BYTES : MARGIN_BYTES + numel].view(torch.uint8)

    def check(self) -> None:
        for name, base, start, numel in self.buffers:
            inside = base[start : start + numel]
            written = not name or not (inside == -1).any()
            assert written, f"{name}: {(inside == -1).sum()} elements not written"
            outside = torch.cat([base[:start], base[start + numel :]])
            assert (outside == -1).all(), f"{name}: written outside"


def place(x: Tensor, channels_last: bool, shift: int = 0) -> Tensor:
    """A copy of x in the named dense layout, `shift` elements past an aligned address."""
    strides = strides_of(tuple(x.shape), channels_last)
    base = torch.full((x.numel() + 64,), float("nan"), dtype=x.dtype)
    return base.as_strided(x.shape, strides, shift).copy_(x)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.clone().view(torch.uint8).equal(b.clone().view(torch.uint8))


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class Kernels:
    """The ops of the module under one order of threads and blocks, on a pretended device.

    More SMs mean more splits of a reduction, so a tiny tensor runs through every merge; less shared
    memory more CTAs for a slice. `path` is streaming, on_chip (wherever that fits) or auto, as the
    operators choose; without `counters` a streaming call launches its combine. `plan` is that of
    the last call.
    """

    def __init__(
        self,
        module: ModuleType,
        order: str = "forward",
        seed: int = 0,
        *,
        device: dict[str, int] | None = None,
        path: str = "streaming",
        counters: bool = True,
        max_grid: int = (1 << 31) - 1,
    ):
        self.module = module
        self.order = order
        self.seed = seed
        self.device = module.Device(**{"num_sms": 4, **(device or {})})
        self.options = {"path": path, "counters": counters, "max_grid": max_grid}
        self.plan: Any = None

    def forward(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        num_groups: int,
        per_sample: bool,
        eps: float,
        act: str,
        slope: float,
        save_mask: bool = False,
        running: Running | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        out = Outputs()
        channels_last = is_channels_last(x)
        y = out.new("y", tuple(x.shape), x.dtype, channels_last)
        cells = (x.shape[0], num_groups) if per_sample else (num_groups,)
        mean, rstd, var = (out.new(n, cells, acc_dtype(x.dtype)) for n in ("mean", "rstd", "var"))
        mask = out.mask(x) if save_mask else None
        run = running or Running(None, None, None, 0.0)
        self.module.set_order(self.order, self.seed)
        self.plan = self.module.forward(
            self._call(x, num_groups, per_sample),
            *map(pointer, (x, weight, bias, residual, y, mean, rstd, var)),
            eps,
            ACTIVATIONS.index(act),
            slope,
            *map(pointer, (mask, run.mean, run.var, run.num_batches_tracked)),
            run.momentum,
        )
        out.check()
        return y, mean, rstd, var, mask

    def apply(
        self,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        num_groups: int,
        per_sample: bool,
        act: str,
        slope: float,
    ) -> Tensor:
        out = Outputs()
        y = out.new("y", tuple(x.shape), x.dtype, is_channels_last(x))
        self.module.set_order(self.order, self.seed)
        self.plan = self.module.apply(
            self._call(x, num_groups, per_sample),
            *map(pointer, (x, mean, rstd, weight, bias, residual, y)),
            ACTIVATIONS.index(act),
            slope,
            0,
        )
        out.check()
        return y

    def backward(
        self,
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
        act: str,
        slope: float,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        out = Outputs()
        channels_last = is_channels_last(x)
        dx = out.new("dx", tuple(x.shape), x.dtype, channels_last)
        dweight, dbias = (
            out.new(n, (x.shape[1],), acc_dtype(x.dtype)) for n in ("dweight", "dbias")
        )
        dresidual = None
        if (residual is not None or mask is not None) and act != "none":
            dresidual = out.new("dresidual", tuple(x.shape), x.dtype, channels_last)
        self.module.set_order(self.order, self.seed)
        self.plan = self.module.backward(
            self._call(x, num_groups, per_sample),
            *map(pointer, (dy, x, mean, rstd, weight, bias, residual)),
            *map(pointer, (dx, dweight, dbias, dresidual)),
            live,
            ACTIVATIONS.index(act),
            slope,
            pointer(mask),
        )
        out.check()
        return dx, dweight, dbias, dresidual

    def update_running(
        self,
        running_mean: Tensor,
        running_var: Tensor,
        num_batches_tracked: Tensor | None,
        mean: Tensor,
        var: Tensor,
        momentum: float | None,
        count: int,
    ) -> None:
        self.module.set_order(self.order, self.seed)
        self.module.update_running(
            str(running_mean.dtype).removeprefix("torch."),
            *map(pointer, (running_mean, running_var, num_batches_tracked, mean, var)),
            running_mean.numel(),
            momentum,
            count,
        )

    def _call(self, x: Tensor, num_groups: int, per_sample: bool) -> object:
        return self.module.Call(
            dtype=str(x.dtype).removeprefix("torch."),
            channels_last=is_channels_last(x),
            samples=x.shape[0],
            channels=x.shape[1],
            spatial=x.shape[2:].numel(),
            num_groups=num_groups,
            per_sample=per_sample,
            device=self.device,
            **self.options,
        )


def is_channels_last(x: Tensor) -> bool:
    """Whether `place` put it so: the strides decide, NCHW where both hold."""
    return x.stride() != strides_of(tuple(x.shape), False)
