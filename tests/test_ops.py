"""Rung 6: opcheck on every operator, and what the compiled library registers."""

from __future__ import annotations

import pytest
import torch

from cases import Case, in_layout, make
from fusednorm.ops import NAMESPACES
from fusednorm.ops.schema import NATIVE_MISSING, SCHEMAS

LAYOUTS = ("nchw", "nhwc", "permuted", "slice", "empty")


def tensor(layout: str, device: str) -> torch.Tensor:
    if layout == "empty":
        return torch.randn(0, 6, 4, 2, device=device)
    if layout == "permuted":
        return torch.randn(4, 2, 6, 3, device=device).permute(3, 2, 0, 1)
    return in_layout(torch.randn(3, 6, 4, 2), layout).to(device)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", [6, 2, 4])
@pytest.mark.parametrize("per_sample", [False, True])
def test_opcheck(layout: str, groups: int, per_sample: bool, target: tuple[str, str]) -> None:
    device, backend = target
    ops = getattr(torch.ops, NAMESPACES[backend])
    x, w, b = tensor(layout, device), torch.randn(6, device=device), torch.randn(6, device=device)
    key = (groups, per_sample)
    stat = (x.shape[0], groups) if per_sample else (groups,)
    mean, rstd = torch.randn(stat, device=device), torch.rand(stat, device=device) + 0.5
    dy = torch.randn_like(x)
    for args in ((x, w, b, None, *key, 1e-5, 0, 0.0), (x, w, b, x.clone(), *key, 1e-5, 2, 0.0)):
        torch.library.opcheck(ops.norm_forward.default, args)
    # Gradients come from Functions; called by itself an operator has none, on any backend.
    leaf = (x.detach().requires_grad_(), w, b, None, *key, 1e-5, 0, 0.0)
    torch.library.opcheck(ops.norm_forward.default, leaf)
    torch.library.opcheck(ops.norm_apply.default, (x, mean, rstd, w, None, None, *key, 1, 0.0))
    for residual, act in ((None, 0), (x.clone(), 1), (x.clone(), 0)):
        args = (dy, x, mean, rstd, w, b, residual, *key, 1.0, act, 0.0)
        torch.library.opcheck(ops.norm_backward.default, args)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_opcheck_update_running(momentum: float | None, target: tuple[str, str]) -> None:
    device, backend = target
    op = getattr(torch.ops, NAMESPACES[backend]).update_running.default
    mean, var, new_mean, new_var = torch.rand(4, 3, device=device).unbind()
    tracked = torch.tensor(3, device=device)
    torch.library.opcheck(op, (mean, var, tracked, new_mean, new_var, momentum, 10))


def test_the_compiled_library_serves_every_schema() -> None:
    """Each operator has a CUDA kernel, and its CPU entry unboxes every argument, then refuses."""
    assert NATIVE_MISSING is None, f"rung missing, make native: {NATIVE_MISSING}"
    for name in SCHEMAS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fusednorm::{name}", "CUDA"), name
    ops = torch.ops.fusednorm
    i = make(Case((3, 6, 4, 2), 6, residual=True))
    mean = torch.rand(6)
    calls = {
        "norm_forward": (*i.tensors(), 6, False, 1e-5, 1, 0.0),
        "norm_apply": (i.x, mean, mean, i.weight, None, None, 6, False, 1, 0.0),
        "norm_backward": (i.dy, i.x, mean, mean, None, None, None, 6, False, 1.0, 1, 0.0),
        "update_running": (mean, mean.clone(), torch.tensor(0), mean, mean, None, 24),
    }
    assert calls.keys() == SCHEMAS.keys()
    for name, args in calls.items():
        with pytest.raises(RuntimeError, match="expects CUDA tensors, got cpu"):
            getattr(ops, name)(*args)
