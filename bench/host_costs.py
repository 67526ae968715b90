"""What a call costs on the host: ours over a peer of PyTorch's in the same run, and the ceilings.

The table behind ``pytest bench/`` (times, histories, the gate) and behind the gate of ``make
test``. Costs of the host do not depend on the tensor, so it is one that costs nothing; the paths
of the CPU are measured at a few real shapes besides.

Ceilings are measured ratios times 1.2, since most of these costs are the interpreter's and Pythons
differ, and times 1.6 for the larger paths, whose times hang on caches and pages. ``python -m
fusednorm.bench.host_costs`` prints the ratios of this machine beside them.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusednorm
from fusednorm import functional
from fusednorm.checks import check_operands
from fusednorm.ops import Config, train_with_gradient
from fusednorm.ops.backend import null_launch

Call = Callable[[], object]
CHANNELS = 8
TINY = (2, CHANNELS, 4, 4)


# Makes our call and the peer's, on tensors of their own.
Pair = Callable[[], tuple[Call, Call]]


def _input(dims: Sequence[int] = TINY, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*dims, dtype=dtype)


def _modules(
    ours: Callable[[], nn.Module],
    peer: Callable[[], nn.Module],
    prepare: Callable[[nn.Module], Any] = nn.Module.train,
    gradient: bool = False,
) -> Pair:
    """Calls of two modules on one tiny tensor."""

    def make() -> tuple[Call, Call]:
        x = _input().requires_grad_(gradient)
        calls = []
        for build in (ours, peer):
            module = build()
            prepare(module)
            module.requires_grad_(gradient)
            calls.append(lambda module=module: module(x))
        return calls[0], calls[1]

    return make


def _both(
    ours: Callable[[], nn.Module],
    peer: Callable[[], nn.Module],
    dims: Sequence[int] = TINY,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    residual: bool = False,
) -> Pair:
    """Forward and backward of two modules, called with the residual if there is one."""

    def make() -> tuple[Call, Call]:
        form = torch.channels_last if channels_last else torch.contiguous_format
        tensors = [_input(dims, dtype).to(memory_format=form) for _ in range(3)]
        x, other, dy = tensors
        inputs = [each.requires_grad_() for each in ((x, other) if residual else (x,))]

        def both(module: nn.Module) -> Call:
            wanted = [*inputs, *module.parameters()]
            return lambda: torch.autograd.grad(module(*inputs), wanted, dy)

        return both(ours()), both(peer())

    return make


class _Separate(nn.Module):
    """Norm, sum and relu as a residual block writes them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return F.relu(self.norm(x) + residual)


def _vectors() -> list[Tensor]:
    """running_mean, running_var, weight, bias."""
    return [torch.zeros(CHANNELS), *(torch.ones(CHANNELS) for _ in range(2)), torch.zeros(CHANNELS)]


def _functional() -> tuple[Call, Call]:
    x, (mean, var, weight, bias) = _input(), _vectors()
    return (
        lambda: functional.batch_norm(x, mean, var, weight, bias, training=True),
        lambda: F.batch_norm(x, mean, var, weight, bias, training=True),
    )


def _checks() -> tuple[Call, Call]:
    x, (mean, var, weight, bias) = _input(), _vectors()
    tracked = torch.zeros((), dtype=torch.int64)
    running = (mean, var, tracked, 0.1)
    return (
        lambda: check_operands(x, CHANNELS, False, weight, bias, None, running, 1e-5, True),
        lambda: F.batch_norm(x, mean, var, weight, bias, training=True),
    )


def _function() -> tuple[Call, Call]:
    """The autograd Function and the composition under it, no checks before."""
    x, (mean, var, weight, bias) = _input().requires_grad_(), _vectors()
    config, running = Config(CHANNELS, False, 1e-5, 0, 0.0, "reference"), (mean, var, None, 0.1)
    return (
        lambda: train_with_gradient(x, weight, bias, None, running, config),
        lambda: F.batch_norm(x, mean, var, weight, bias, training=True),
    )


def _dispatch() -> tuple[Call, Call]:
    """An operator in Python, through the dispatcher and back, beside one in C++."""
    x, (mean, var, weight, bias) = _input(), _vectors()
    ours = torch.ops.fusednorm_reference.norm_apply.default
    return (
        lambda: ours(x, mean, var, weight, bias, None, CHANNELS, False, 0, 0.0),
        lambda: torch.ops.aten.native_batch_norm.default(
            x, weight, bias, mean, var, False, 0.1, 1e-5
        ),
    )


# What the plan is made for: a training forward of a layer of ResNet-50 on an H200.
_PLANNED = ((32, 256, 3136), 256, False, 2, 0, 0, (1, 1, 0, 0, 0, 0))
_H200 = (132, 232448, 233472, 65536, 2048, 90, 1, 8, 50 * 2**20)


def _plan() -> tuple[Call, Call]:
    """The choice of a launch and a tensor to tell it by, beside a whole tiny batch norm."""
    x, (mean, var, weight, bias) = _input(), _vectors()
    plan = torch.ops.fusednorm.plan.default
    return (
        lambda: plan(*_PLANNED, _H200),
        lambda: F.batch_norm(x, mean, var, weight, bias, training=True),
    )


def _compiled() -> tuple[Call, Call]:
    """The compiled training operator short of its launch: checks, plan, allocations."""
    x, (mean, var, weight, bias) = _input(), _vectors()
    ours = torch.ops.fusednorm.norm_train.default
    rest = (CHANNELS, False, 1e-5, 0.1, 0, 0.0, False)
    return (
        lambda: ours(x, weight, bias, None, mean, var, None, *rest),
        lambda: torch.ops.aten.native_batch_norm.default(
            x, weight, bias, mean, var, True, 0.1, 1e-5
        ),
    )


def _batch(channels: int = CHANNELS) -> nn.Module:
    return fusednorm.BatchNorm(channels)


def _batch_group(channels: int = CHANNELS) -> nn.Module:
    return fusednorm.BatchGroupNorm(channels, channels // 4)


def _group() -> nn.Module:
    return fusednorm.GroupNorm(CHANNELS, 2)


def _fused(channels: int = CHANNELS) -> nn.Module:
    return fusednorm.BatchNorm(channels, act="relu")


_peer = functools.partial(nn.BatchNorm2d, CHANNELS)
_group_peer = functools.partial(nn.GroupNorm, 2, CHANNELS)


def _paths() -> dict[str, Pair]:
    """What a CPU's user waits for: forward and backward at a layer's sizes."""
    small, large = (2, 32, 8, 8), (8, 64, 28, 28)
    kinds: dict[str, tuple[Callable[[int], nn.Module], Callable[[int], nn.Module], bool]] = {
        "BatchNorm": (_batch, nn.BatchNorm2d, False),
        "BatchGroupNorm": (_batch_group, nn.BatchNorm2d, False),
        "BatchNorm + residual + relu": (_fused, _Separate, True),
    }
    found: dict[str, Pair] = {}
    for dims, dtype, last in (
        (small, torch.float32, False),
        (large, torch.float32, False),
        (large, torch.float32, True),
        (large, torch.bfloat16, False),
    ):
        what = f"{'x'.join(map(str, dims))} {str(dtype)[6:]} {'nhwc' if last else 'nchw'}"
        for name, (ours, peer, residual) in kinds.items():
            ours_here, peer_here = (functools.partial(build, dims[1]) for build in (ours, peer))
            found[f"path, {what}: {name}"] = _both(
                ours_here, peer_here, dims, dtype, last, residual
            )
    return found


PAIRS: dict[str, Pair] = {
    "dispatch of an operator": _dispatch,
    "checks": _checks,
    "compiled, plan": _plan,
    "compiled, operator": _compiled,
    "compiled, evaluation: BatchNorm": _modules(_batch, _peer, nn.Module.eval),
    "compiled, training: BatchNorm": _modules(_batch, _peer),
    "compiled, training: GroupNorm": _modules(_group, _group_peer),
    "compiled, both: BatchNorm": _both(_batch, _peer),
    "compiled, both: GroupNorm": _both(_group, _group_peer),
    "functional": _functional,
    "Function": _function,
    "module, training: BatchNorm": _modules(_batch, _peer),
    "module, training: BatchGroupNorm": _modules(_batch_group, _peer),
    "module, training: GroupNorm": _modules(_group, _group_peer),
    "module, gradient: BatchNorm": _modules(_batch, _peer, gradient=True),
    "module, gradient: BatchGroupNorm": _modules(_batch_group, _peer, gradient=True),
    "module, evaluation: BatchNorm": _modules(_batch, _peer, nn.Module.eval),
    "module, evaluation: BatchGroupNorm": _modules(_batch_group, _peer, nn.Module.eval),
    "module, both: BatchNorm": _both(_batch, _peer),
    "module, both: BatchGroupNorm": _both(_batch_group, _peer),
    "module, both: GroupNorm": _both(_group, _group_peer),
    **_paths(),
}


def within(name: str) -> AbstractContextManager[None]:
    """What a pair's calls run under: compiled operators get CPU tensors and launch nothing."""
    return null_launch() if name.startswith("compiled") else nullcontext()


CEILINGS: dict[str, float] = {
    "dispatch of an operator": 4.9,
    "checks": 0.95,
    "compiled, plan": 1.1,
    "compiled, operator": 1.15,
    "compiled, evaluation: BatchNorm": 5.5,
    "compiled, training: BatchNorm": 0.9,
    "compiled, training: GroupNorm": 1.8,
    "compiled, both: BatchNorm": 1.35,
    "compiled, both: GroupNorm": 1.6,
    "functional": 2.5,
    "Function": 2.05,
    "module, training: BatchNorm": 1.35,
    "module, training: BatchGroupNorm": 5.9,
    "module, training: GroupNorm": 12,
    "module, gradient: BatchNorm": 1.35,
    "module, gradient: BatchGroupNorm": 5.7,
    "module, evaluation: BatchNorm": 2.6,
    "module, evaluation: BatchGroupNorm": 3.5,
    "module, both: BatchNorm": 1.3,
    "module, both: BatchGroupNorm": 6.3,
    "module, both: GroupNorm": 7.9,
    "path, 2x32x8x8 float32 nchw: BatchNorm": 1.3,
    "path, 2x32x8x8 float32 nchw: BatchGroupNorm": 5.65,
    "path, 2x32x8x8 float32 nchw: BatchNorm + residual + relu": 3.4,
    "path, 8x64x28x28 float32 nchw: BatchNorm": 1.65,
    "path, 8x64x28x28 float32 nchw: BatchGroupNorm": 2.1,
    "path, 8x64x28x28 float32 nchw: BatchNorm + residual + relu": 2.45,
    "path, 8x64x28x28 float32 nhwc: BatchNorm": 1.65,
    "path, 8x64x28x28 float32 nhwc: BatchGroupNorm": 2.5,
    "path, 8x64x28x28 float32 nhwc: BatchNorm + residual + relu": 2.7,
    "path, 8x64x28x28 bfloat16 nchw: BatchNorm": 4.75,
    "path, 8x64x28x28 bfloat16 nchw: BatchGroupNorm": 5.4,
    "path, 8x64x28x28 bfloat16 nchw: BatchNorm + residual + relu": 5.1,
}


def _fastest(call: Call, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def ratio(pair: Pair, rounds: int = 40, sample: float = 2e-4) -> float:
    """Our fastest over the peer's fastest, in turns; what else runs on the machine only adds."""
    ours, peer = pair()
    fastest = [float("inf"), float("inf")]
    calls = [1, 1]
    for warm in (True, False):
        for _ in range(3 if warm else rounds):
            for index, call in enumerate((ours, peer)):
                fastest[index] = min(fastest[index], _fastest(call, calls[index]))
        # Samples long beside the clock's own cost, short beside a scheduler's turn.
        calls = [max(1, int(sample / seconds)) for seconds in fastest]
    return fastest[0] / fastest[1]


def breach(name: str, pair: Pair, ceiling: float, tries: int = 3) -> str | None:
    """What is wrong if every try is above the ceiling, else None."""
    found = []
    for _ in range(tries):
        with within(name):
            found.append(ratio(pair))
        if found[-1] <= ceiling:
            return None
    return f"{name}: {min(found):.2f} x its peer, at most {ceiling:g} allowed"


def main() -> None:
    """Each ratio, the median of five, beside its ceiling."""
    torch.set_num_threads(1)
    for name, pair in PAIRS.items():
        with within(name):
            found = statistics.median(ratio(pair) for _ in range(5))
        print(f"{found:6.2f}  of {CEILINGS[name]:6.2f}  {name}", flush=True)


if __name__ == "__main__":
    main()
