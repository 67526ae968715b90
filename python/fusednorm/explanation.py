"""Which kernels a call takes, and why not faster ones: ``print(fusednorm.explain(norm, x))``.

The plan is the compiled library's own, asked through the operator ``fusednorm::plan``, which needs
no GPU: so one can also ask, on any machine, what another would do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusednorm import functional
from fusednorm.checks import check_operands
from fusednorm.layout import canonical, is_nhwc, like
from fusednorm.nn import BatchGroupNorm, GroupNorm
from fusednorm.ops import backend as _backends
from fusednorm.ops.schema import NATIVE_MISSING
from fusednorm.reference import cells

# The entries of what ``fusednorm::plan`` returns (csrc/ops/plan.cu).
PLAN_FIELDS = (
    "path", "tier", "pattern", "vector", "block", "grid", "tiles", "splits", "nodes", "cluster",
    "ctas_per_group", "slices", "slots", "shared_bytes", "ctas_per_sm", "counters",
    "workspace_bytes", "activation_bytes",
)  # fmt: skip
_PATHS = ("streaming", "on-chip")
_TIERS = ("block", "cluster", "grid")
_PATTERNS = ("runs", "columns", "frames")
_DIRECTIONS = ("forward", "backward", "apply")
_MIB = 1 << 20


class _Device(NamedTuple):
    """Of a GPU what plans depend on, from CUDA's tables, in the order of ``fusednorm::plan``."""

    num_sms: int
    shared_per_block: int
    shared_per_sm: int
    registers_per_sm: int
    threads_per_sm: int
    capability: int
    cooperative: int
    max_cluster: int
    l2_bytes: int


DEVICES = {
    "A100": _Device(108, 166912, 167936, 65536, 2048, 80, 1, 1, 40 * _MIB),
    "H100": _Device(132, 232448, 233472, 65536, 2048, 90, 1, 16, 50 * _MIB),
    "H200": _Device(132, 232448, 233472, 65536, 2048, 90, 1, 16, 60 * _MIB),
    "B200": _Device(148, 232448, 233472, 65536, 2048, 100, 1, 16, 126 * _MIB),
    "RTX 5090": _Device(170, 101376, 102400, 65536, 1536, 120, 1, 8, 96 * _MIB),
}
_BY_CAPABILITY = {80: "A100", 90: "H200", 100: "B200", 120: "RTX 5090"}


@dataclass(frozen=True)
class Launches:
    """The kernels of one direction: ``nodes`` of them, moving ``activation_bytes``."""

    direction: str  # forward, backward, or apply: forward with given statistics
    path: str  # "streaming" reads x once a sweep, "on-chip" once
    tier: str  # what owns a slice on the chip: a block, a cluster of them, or a share of the grid
    pattern: str  # runs, columns or frames: see docs/kernels.md
    vector: int  # elements an access
    block: int  # threads
    grid: int  # blocks
    tiles: int
    splits: int
    nodes: int
    cluster: int
    ctas_per_group: int
    slices: int
    slots: int
    shared_bytes: int
    ctas_per_sm: int
    counters: int
    workspace_bytes: int
    activation_bytes: int
    tensor_bytes: int  # T, one activation tensor

    @property
    def multiple_of_tensor(self) -> float:
        """Bytes moved, in units of T."""
        return self.activation_bytes / self.tensor_bytes

    def __str__(self) -> str:
        where = self.path
        if self.path == "on-chip":
            owner = {"block": "one block", "cluster": f"clusters of {self.cluster}"}
            where += f", {owner.get(self.tier, f'grid in groups of {self.ctas_per_group}')}"
        kernels = "1 kernel" if self.nodes == 1 else f"{self.nodes} kernels"
        width = "1 element" if self.vector == 1 else f"{self.vector} elements"
        return (
            f"{self.direction:<9} {where}; {kernels}, {self.multiple_of_tensor:.3g} T; "
            f"{self.pattern}, {width} an access; {self.grid} blocks of {self.block} threads, "
            f"{self.ctas_per_sm} an SM, {self.shared_bytes} bytes shared; "
            f"{self.workspace_bytes} bytes of scratch"
        )


@dataclass(frozen=True)
class Explanation:
    """What ``explain`` found. ``launches`` is empty where the compiled kernels do not run."""

    device: str
    backend: str
    why: str  # this backend
    layout: str  # in which x is read
    launches: tuple[Launches, ...]
    reasons: tuple[str, ...]  # why not faster

    def __str__(self) -> str:
        head = [
            ("device", self.device),
            ("backend", f"{self.backend}: {self.why}"),
            ("layout", self.layout),
        ]
        lines = [f"{name:<9} {text}" for name, text in head]
        lines += [str(launch) for launch in self.launches]
        return "\n".join(lines + [f"because   {reason}" for reason in self.reasons])


class _Call(NamedTuple):
    num_groups: int
    per_sample: bool
    act: int
    training: bool


def explain(
    norm: torch.nn.Module | Callable[..., Any],
    x: Tensor,
    residual: Tensor | None = None,
    *,
    training: bool | None = None,
    device: str | None = None,
    capability: int | None = None,
    **options: Any,
) -> Explanation:
    """Tell which path a call of ``norm`` with x takes, and what keeps it from a faster one.

    Args:
        norm: a module of this package, or a function of ``fusednorm.functional``, whose
            ``num_groups``, ``act`` and ``training`` then come as ``options`` (or by
            ``functools.partial``).
        x, residual: the tensors of the call; only shapes, strides and addresses are looked at.
        training: overrides the module's mode.
        device: a GPU to plan for instead of x's device: one of "A100", "H100", "H200", "B200",
            "RTX 5090".
        capability: the same by compute capability: 80, 90, 100 or 120.

    Raises:
        TypeError: ``norm`` is neither. ValueError: an unknown device, or arguments that the call
            itself would refuse, with its message.
    """
    call = _call_of(norm, x, training, options)
    check_operands(
        x, call.num_groups, call.per_sample, None, None, residual, (None,) * 4, 0.0,
        call.training or call.per_sample, statistics=False,
    )  # fmt: skip
    assumed = _assumed(device, capability)
    if assumed is not None:
        name, numbers = assumed
        why = f"what a CUDA tensor on an {name} would take"
        described, backend = f"{name} (assumed)", "cuda"
    else:
        backend, why = _backends.reasoned(x)
        described = torch.cuda.get_device_name(x.device) if x.is_cuda else str(x.device)
        numbers = None
    dense = canonical(x)
    layout = "NHWC" if is_nhwc(dense) else "NCHW"
    reasons = []
    if dense is not x:
        layout += ", after a copy"
        reasons.append(f"x has strides {tuple(x.stride())}, dense in neither layout: it is copied")
    if residual is not None and like(residual, dense) is not residual:
        reasons.append("residual has other strides than x: it is copied")
    if x.numel() == 0:
        return Explanation(described, backend, why, layout, (), ("x is empty: no launch",))
    if backend != "cuda":
        return Explanation(described, backend, why, layout, (), (*reasons, _elsewhere(backend)))
    if NATIVE_MISSING is not None:
        reasons.append(f"no plan to show: {NATIVE_MISSING}")
        return Explanation(described, backend, why, layout, (), tuple(reasons))
    if numbers is None:
        numbers = _Device(*torch.ops.fusednorm.device(x.device.index).tolist())
    launches, found = _plans(call, dense, residual, x is dense, numbers)
    return Explanation(described, backend, why, layout, launches, (*reasons, *found))


def _call_of(norm: Any, x: Tensor, training: bool | None, options: dict[str, Any]) -> _Call:
    if isinstance(norm, torch.nn.Module):
        if not isinstance(norm, (BatchGroupNorm, GroupNorm)) or options:
            raise TypeError(
                "norm: expected a module of fusednorm, with no options, or a function of "
                f"fusednorm.functional, got {type(norm).__name__} and options {list(options)}"
            )
        act = cells.activation_index(norm.act)
        if isinstance(norm, GroupNorm):
            return _Call(norm.num_groups, True, act, True)
        live = norm.training if training is None else training
        return _Call(norm.num_groups, False, act, live or norm.running_mean is None)
    if isinstance(norm, functools.partial):
        if norm.args:
            raise TypeError("norm: expected a partial with keyword arguments only")
        options, norm = {**norm.keywords, **options}, norm.func
    act = cells.activation_index(options.get("act"))
    live = bool(options.get("training", False)) if training is None else training
    if norm is functional.batch_norm:
        return _Call(x.shape[1] if x.dim() > 1 else 1, False, act, live)
    if norm in (functional.batch_group_norm, functional.group_norm):
        if "num_groups" not in options:
            raise TypeError(f"{norm.__name__}: num_groups is missing among the options")
        per_sample = norm is functional.group_norm
        return _Call(options["num_groups"], per_sample, act, live or per_sample)
    raise TypeError(
        f"norm: expected a module of fusednorm or a function of fusednorm.functional, got {norm!r}"
    )


def _assumed(device: str | None, capability: int | None) -> tuple[str, _Device] | None:
    if device is None and capability is None:
        return None
    if capability is not None:
        if device is not None:
            raise ValueError("device and capability: expected one of them")
        if capability not in _BY_CAPABILITY:
            raise ValueError(f"capability: expected one of {[*_BY_CAPABILITY]}, got {capability!r}")
        device = _BY_CAPABILITY[capability]
    if device not in DEVICES:
        raise ValueError(f"device: expected one of {[*DEVICES]}, got {device!r}")
    return device, DEVICES[device]


def _elsewhere(backend: str) -> str:
    if backend == "triton":
        return "Triton kernels run, whose launches are not shown here"
    return "ATen operators run; explain(..., device='H200') tells what a GPU would"


def _plans(
    call: _Call, x: Tensor, residual: Tensor | None, own: bool, device: _Device
) -> tuple[tuple[Launches, ...], list[str]]:
    # What was copied is aligned, as results are.
    starts = [x.data_ptr()] if own else []
    starts += [residual.data_ptr()] if residual is not None else []
    aligned = all(start % 16 == 0 for start in starts)
    with_residual = residual is not None
    masked = with_residual and call.act == cells.RELU and call.training
    kept = with_residual and call.act != cells.NONE

    def ask(direction: str, aligned: bool = aligned) -> Launches:
        backward = direction == "backward"
        flags = [
            is_nhwc(x),
            aligned,
            kept and not masked if backward else with_residual,
            masked,
            backward and kept,
            False,
        ]
        fields = torch.ops.fusednorm.plan(
            [*x.shape[:2], x.shape[2:].numel()], call.num_groups, call.per_sample, x.element_size(),
            _DIRECTIONS.index(direction), call.act, [int(flag) for flag in flags], [*device],
        ).tolist()  # fmt: skip
        named = dict(zip(PLAN_FIELDS, fields, strict=True))
        named["path"] = _PATHS[named["path"]]
        named["tier"] = _TIERS[named["tier"]]
        named["pattern"] = _PATTERNS[named["pattern"]]
        return Launches(direction, **named, tensor_bytes=x.numel() * x.element_size())

    directions = ("forward", "backward") if call.training else ("apply",)
    launches = tuple(ask(direction) for direction in directions)
    reasons = []
    if not call.training:
        reasons.append("statistics are given: one sweep, and nothing worth keeping on the chip")
    first = launches[0]
    if not aligned and ask(first.direction, aligned=True).vector > first.vector:
        reasons.append(
            "x or residual starts at an address that is no multiple of 16: one element an access"
        )
    reasons += _shape_reasons(call, x, first, aligned)
    for launch in launches:
        if launch.path == "streaming" and launch.vector > 1 and launch.direction != "apply":
            reasons.append(_why_streaming(call, x, launch, device))
    return launches, reasons


def _shape_reasons(call: _Call, x: Tensor, plan: Launches, aligned: bool) -> list[str]:
    channels, groups = x.shape[1], call.num_groups
    if x.element_size() == 8:
        return ["float64 is for checking: one element an access, never on the chip"]
    reasons = []
    if channels % groups and groups % channels:
        reasons.append(
            f"{groups} groups straddle the borders of {channels} channels: runs of uneven length"
            + (", read with a stride in NHWC" if is_nhwc(x) else "")
        )
    if plan.vector == 1 and aligned:
        wide = 16 // x.element_size()
        sizes = f"C = {channels}" if is_nhwc(x) else f"spatial size {x.shape[2:].numel()}"
        reasons.append(f"{sizes} leaves no 16-byte accesses of {wide} elements: one an access")
    return reasons


def _why_streaming(call: _Call, x: Tensor, launch: Launches, device: _Device) -> str:
    """Of a problem whose accesses are wide."""
    cells_of_all = call.num_groups * (x.shape[0] if call.per_sample else 1)
    tensors = 2 if launch.direction == "backward" else 1
    kept = launch.tensor_bytes // cells_of_all * tensors / _MIB
    chip = device.num_sms * device.shared_per_block / _MIB
    if kept > chip:
        return (
            f"{launch.direction}: a cell of {kept:.3g} MiB is larger than all shared memory, "
            f"{chip:.3g} MiB"
        )
    return (
        f"{launch.direction}: no slice of whole cells fits the chip at a gain over streaming "
        f"(a cell is {kept:.3g} MiB, a block has {device.shared_per_block // 1024} KiB)"
    )
