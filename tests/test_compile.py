"""torch.compile(fullgraph=True): forward, backward, running statistics, bounded recompiles."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch._dynamo.testing
from torch import nn

from fusednorm import BatchGroupNorm, BatchNorm, GroupNorm

MAKERS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: BatchNorm(8),
    "batch norm, cumulative average": lambda: BatchNorm(8, momentum=None, act="silu"),
    "whole channels": lambda: BatchGroupNorm(8, 4, act="relu"),
    "straddling": lambda: BatchGroupNorm(8, 3),
    "no statistics": lambda: BatchGroupNorm(8, 4, track_running_stats=False),
    "group norm": lambda: GroupNorm(8, 4, act="gelu"),
}
# Batch, then height and width, become dynamic one after the other: three compilations, as for
# nn.BatchNorm2d, after which no size costs another.
SIZES = [(2, 8, 9), (3, 8, 9), (4, 12, 6), (5, 16, 18), (7, 10, 12)]


class Block(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 8, 3, padding=1), norm, nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.norm(self.conv(x)))


def same(compiled: nn.Module, eager: nn.Module, run: nn.Module, x: torch.Tensor) -> None:
    grads = []
    for module, call in ((eager, eager), (compiled, run)):
        module.zero_grad()
        y = call(x)
        y.square().sum().backward()
        grads.append([y.detach(), *(p.grad for p in module.parameters())])
    for got, expected in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    for key, value in eager.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[key], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MAKERS)
def test_fullgraph_with_dynamic_sizes(name: str, target: tuple[str, str]) -> None:
    torch._dynamo.reset()
    device = target[0]
    compiled = Block(MAKERS[name]()).to(device)
    eager = copy.deepcopy(compiled)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = torch.compile(compiled, fullgraph=True, backend=counter)
    fixed = name == "straddling"  # its statistics belong to one resolution
    for n, h, w in SIZES:
        shape = (n, 3, 12, 6) if fixed else (n, 3, h, w)
        same(compiled, eager, run, torch.randn(shape, device=device))
    assert 1 <= counter.frame_count <= (4 if fixed else 3), "recompiled for a new size"
    compiled.eval(), eager.eval()
    for n in (2, 3, 4, 5):
        x = torch.randn(n, 3, 12, 6, device=device)
        torch.testing.assert_close(run(x), eager(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("training", [True, False])
def test_everything_symbolic(name: str, training: bool, target: tuple[str, str]) -> None:
    """dynamic=True on the norm alone: even the channels are a symbol to the tracer."""
    torch._dynamo.reset()
    norm = MAKERS[name]().to(target[0]).train(training)
    eager = copy.deepcopy(norm)
    run = torch.compile(norm, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (2, 3):
        x = torch.randn(n, 8, 6, 6, device=target[0])
        torch.testing.assert_close(run(x), eager(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_inductor(layout: torch.memory_format, target: tuple[str, str]) -> None:
    """Through code generation, in both layouts, with the output's memory format kept."""
    torch._dynamo.reset()
    compiled = Block(BatchGroupNorm(8, 4, act="relu")).to(target[0], memory_format=layout)
    eager = copy.deepcopy(compiled)
    run = torch.compile(compiled, fullgraph=True)
    x = torch.randn(2, 3, 8, 8, device=target[0]).to(memory_format=layout)
    same(compiled, eager, run, x)
    assert run(x).is_contiguous(memory_format=layout)


@pytest.mark.parametrize("act", ["relu", "silu", None])
def test_residual(act: str | None, target: tuple[str, str]) -> None:
    """With relu a mask is kept of it, of a size that is a symbol; without gradients, nothing."""
    torch._dynamo.reset()
    device = target[0]
    compiled = BatchGroupNorm(8, 4, act=act).to(device)
    eager = copy.deepcopy(compiled)
    run = torch.compile(compiled, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, h in ((2, 5), (3, 7), (5, 3)):
        grads = []
        x, r = torch.randn(2, n, 8, h, 5, device=device).unbind()
        for module in (eager, run):
            leaves = [t.clone().requires_grad_() for t in (x, r)]
            y = module(*leaves)
            grads.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
        for got, want in zip(*grads, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(run(x, r), eager(x, r), rtol=1e-5, atol=1e-5)


def test_export_is_aten() -> None:
    """Evaluation exports to ATen operators only, which deployment tools know."""
    for norm in (BatchNorm(8, act="relu"), BatchGroupNorm(8, 4), BatchGroupNorm(8, 3)):
        block = Block(norm).eval()
        x = torch.randn(2, 3, 6, 6)
        program = torch.export.export(block, (x,))
        names = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
        assert names and all(n.startswith("aten.") for n in names), names
        torch.testing.assert_close(program.module()(x), block(x), rtol=1e-5, atol=1e-5)


def test_func_transforms() -> None:
    """torch.func: vmap over per-sample gradients equals a loop; grad and vjp agree."""
    norm = GroupNorm(8, 4, act="silu")
    params = dict(norm.named_parameters())
    x = torch.randn(5, 8, 3, 3)

    def loss(params: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(norm, params, (x.unsqueeze(0),)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, x)
    for n in range(5):
        expected = torch.func.grad(loss)(params, x[n])
        for key in params:
            torch.testing.assert_close(per_sample[key][n], expected[key], rtol=1e-4, atol=1e-5)
