"""Rung 6: opcheck on every operator, and what the compiled library registers."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cases import Case, in_layout, make
from fusednorm.functional import batch_group_norm
from fusednorm.ops import NAMESPACES
from fusednorm.ops.backend import null_launch
from fusednorm.ops.mask import mask_size, pack
from fusednorm.ops.schema import NATIVE_MISSING, SCHEMAS

LAYOUTS = ("nchw", "nhwc", "permuted", "slice", "empty")


def tensor(layout: str, device: str) -> torch.Tensor:
    """(3, 6, 3, 2): no whole number of 16-byte vectors in half precision."""
    if layout == "empty":
        return torch.randn(0, 6, 3, 2, device=device)
    if layout == "permuted":
        return torch.randn(3, 2, 6, 3, device=device).permute(3, 2, 0, 1)
    return in_layout(torch.randn(3, 6, 3, 2), layout).to(device)


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
    for residual, act, save_mask in ((None, 0, False), (x.clone(), 2, False), (x.clone(), 1, True)):
        args = (x, w, b, residual, *key, 1e-5, act, 0.0, save_mask)
        torch.library.opcheck(ops.norm_forward.default, args)
    # Gradients come from Functions; called by itself an operator has none, on any backend.
    leaf = (x.detach().requires_grad_(), w, b, None, *key, 1e-5, 0, 0.0, False)
    torch.library.opcheck(ops.norm_forward.default, leaf)
    torch.library.opcheck(ops.norm_apply.default, (x, mean, rstd, w, None, None, *key, 1, 0.0))
    mask = torch.zeros(mask_size(x), dtype=torch.uint8, device=device)
    for residual, act in ((None, 0), (x.clone(), 1), (x.clone(), 0)):
        args = (dy, x, mean, rstd, w, b, residual, None, *key, 1.0, act, 0.0)
        torch.library.opcheck(ops.norm_backward.default, args)
    args = (dy, x, mean, rstd, w, b, None, mask, *key, 1.0, 1, 0.0)
    torch.library.opcheck(ops.norm_backward.default, args)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("groups", [6, 4])
def test_opcheck_norm_train(
    groups: int, momentum: float | None, layout: str, target: tuple[str, str]
) -> None:
    device, backend = target
    op = getattr(torch.ops, NAMESPACES[backend]).norm_train.default
    x, w = tensor(layout, device), torch.randn(6, device=device)
    running = [*torch.rand(2, groups, device=device).unbind(), torch.tensor(3, device=device)]
    for residual, save_mask in ((None, False), (x.clone(), True)):
        for buffers in (running, [None, None, None]):
            args = (x, w, None, residual, *buffers, groups, False, 1e-5, momentum, 1, 0.0)
            torch.library.opcheck(op, (*args, save_mask))
    torch.library.opcheck(op, (x, w, w, None, None, None, None, 2, True, 1e-5, None, 0, 0.0, False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("groups", [6, 2, 12, 4])
def test_norm_train_is_two_operators(
    groups: int, dtype: torch.dtype, target: tuple[str, str]
) -> None:
    device, backend = target
    ops = getattr(torch.ops, NAMESPACES[backend])
    i = make(Case((3, 6, 4, 2), groups, dtype=dtype, residual=True, act="relu"), device)
    acc = i.weight.dtype
    for momentum in (0.3, None):
        ours = [torch.zeros(groups), torch.ones(groups), torch.tensor(4)]
        ours = [ours[0].to(device, acc), ours[1].to(device, acc), ours[2].to(device)]
        theirs = [t.clone() for t in ours]
        where, how = (groups, False), (1, 0.0, True)
        y, mean, rstd, mask = ops.norm_train(*i.tensors(), *ours, *where, 1e-5, momentum, *how)
        want = ops.norm_forward(*i.tensors(), *where, 1e-5, *how)
        ops.update_running(*theirs, want[1], want[3], momentum, i.x.numel() // groups)
        tol = 16 * torch.finfo(acc).eps
        pairs = zip((mean, rstd, *ours), (want[1], want[2], *theirs), strict=True)
        for got, expected in pairs:
            torch.testing.assert_close(got, expected, rtol=tol, atol=tol)
        tol = 16 * torch.finfo(dtype).eps
        torch.testing.assert_close(y, want[0], rtol=tol, atol=tol)
        assert torch.equal(mask, pack(y))


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
    calls = native_calls()
    assert calls.keys() == SCHEMAS.keys()
    for name, args in calls.items():
        with pytest.raises(RuntimeError, match="expects CUDA tensors, got cpu"):
            getattr(ops, name)(*args)
    # A measure of the host takes them, and the refusal comes back with its end.
    with null_launch():
        for name, args in calls.items():
            getattr(ops, name)(*args)
    with pytest.raises(RuntimeError, match="expects CUDA tensors, got cpu"):
        ops.norm_apply(*calls["norm_apply"])


def native_calls(**options: object) -> dict[str, tuple]:
    """Arguments of every schema."""
    i = make(Case((3, 6, 4, 2), 6, residual=True, **options))
    mean, running = torch.rand(6), (torch.rand(6), torch.rand(6), torch.tensor(0))
    mask = torch.zeros(mask_size(i.x), dtype=torch.uint8)
    return {
        "norm_forward": (*i.tensors(), 6, False, 1e-5, 1, 0.0, True),
        "norm_apply": (i.x, mean, mean, i.weight, None, None, 6, False, 1, 0.0),
        "norm_backward": (i.dy, i.x, mean, mean, None, None, None, mask, 6, False, 1.0, 1, 0.0),
        "update_running": (*running, mean, mean, None, 24),
        "norm_train": (*i.tensors(), *running, 6, False, 1e-5, 0.1, 1, 0.0, True),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("groups", "per_sample"), [(6, False), (2, False), (4, False), (2, True)])
def test_the_compiled_operators_allocate_what_the_fakes_say(
    groups: int, per_sample: bool, dtype: torch.dtype, layout: str
) -> None:
    """Shapes, dtypes and strides of what C++ returns, for every layout, without a launch."""
    x = tensor(layout, "cpu").to(dtype)
    stat = (x.shape[0], groups) if per_sample else (groups,)
    mean, w = torch.rand(stat), torch.rand(6)
    mask = torch.zeros(mask_size(x), dtype=torch.uint8)
    where = (groups, per_sample)
    running = (None,) * 3 if per_sample else (torch.rand(groups), torch.rand(groups), None)
    calls = {
        "norm_forward": (x, w, w, x, *where, 1e-5, 1, 0.0, True),
        "norm_apply": (x, mean, mean, w, None, x, *where, 0, 0.0),
        "norm_backward": (x, x, mean, mean, w, w, None, mask, *where, 1.0, 1, 0.0),
        "norm_train": (x, w, w, x, *running, *where, 1e-5, 0.1, 1, 0.0, True),
    }
    for name, args in calls.items():
        if name == "norm_train" and layout == "empty" and not per_sample:
            continue  # refused: there is no variance
        with null_launch():
            got = getattr(torch.ops.fusednorm, name)(*args)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
            want = getattr(torch.ops.fusednorm, name)(*fakes)
        got, want = ([r] if isinstance(r, torch.Tensor) else r for r in (got, want))
        for g, e in zip(got, want, strict=True):
            assert (g.shape, g.dtype, g.stride()) == (e.shape, e.dtype, e.stride()), name


NATIVE_ERRORS = {
    "mask size": ("norm_backward", {7: torch.zeros(3, dtype=torch.uint8)}, r"mask has shape \[3\]"),
    "mask dtype": ("norm_backward", {7: torch.zeros(36)}, "mask has dtype float32, expected uint8"),
    "mask, act": ("norm_backward", {11: 2}, "mask is given with act 2, expected 1"),
    "both": ("norm_backward", {6: torch.ones(3, 6, 4, 2)}, "mask and residual are both given"),
    "dy": ("norm_backward", {0: torch.ones(3, 6, 4)}, r"dy has shape \[3, 6, 4\]"),
    "eps": ("norm_train", {9: -1.0}, "eps is -1, expected at least 0"),
    "groups": ("norm_train", {7: 7}, "num_groups is 7, expected a divisor of the 48"),
    "one value": ("norm_train", {7: 48, 0: torch.ones(1, 6, 4, 2)}, "x has 1 values a cell"),
    "running": ("norm_train", {4: torch.ones(3)}, r"running_mean has shape \[3\], expected \[6\]"),
    "one running": ("norm_train", {5: None}, "expected both or neither"),
    "running dtype": ("norm_train", {4: torch.ones(6).half()}, "running_mean has dtype float16"),
    "running strides": ("norm_train", {5: torch.ones(6, 2)[:, 0]}, "running_var is not contiguous"),
    "counter": ("norm_train", {6: torch.zeros(())}, "num_batches_tracked has dtype float32"),
    "momentum": ("norm_train", {6: None, 10: None}, "momentum is None, which needs"),
    "per sample": ("norm_train", {8: True}, "running_mean is given"),
    "weight": ("norm_train", {1: torch.ones(5)}, r"weight has shape \[5\], expected \[6\]"),
    "weight dtype": ("norm_train", {1: torch.ones(6).half()}, "weight has dtype float16"),
    "residual": ("norm_train", {3: torch.ones(3, 6, 4, 2).half()}, "residual has dtype float16"),
    "act": ("norm_train", {11: 5}, "act is 5, expected 0 to 4"),
    "x": ("norm_train", {0: torch.ones(3)}, r"x has shape \[3\], expected \(N, C, \*\)"),
}


@pytest.mark.parametrize("name", NATIVE_ERRORS)
def test_the_compiled_operators_check(name: str) -> None:
    """In C++, and before anything changes: null launches move no statistics either."""
    op, changes, message = NATIVE_ERRORS[name]
    args = list(native_calls()[op])
    for index, value in changes.items():
        args[index] = value
    if name == "one value":
        args[3] = None
        args[4], args[5] = torch.ones(48), torch.ones(48)
    with null_launch(), pytest.raises(RuntimeError, match="fusednorm: .*" + message):
        getattr(torch.ops.fusednorm, op)(*args)


def test_null_launches_need_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusednorm.ops import backend

    monkeypatch.setattr(backend, "NATIVE_MISSING", "it is not there")
    with pytest.raises(RuntimeError, match="'cuda' is not available: it is not"), null_launch():
        pass


@pytest.mark.parametrize("wants", range(4))
@pytest.mark.parametrize("grad", [True, False])
def test_compiled_results_require_gradients(grad: bool, wants: int) -> None:
    """Of whichever operand does: no other operator is there to record it."""
    tensors = make(Case((3, 6, 4, 2), 2, residual=True)).tensors()
    tensors[wants].requires_grad_()
    x, w, b, r = tensors
    with null_launch(), torch.set_grad_enabled(grad):
        y = batch_group_norm(x, 2, None, None, w, b, True, act="relu", residual=r)
        assert y.requires_grad == grad
        if grad:
            (gradient,) = torch.autograd.grad(y.sum(), tensors[wants])
            assert gradient.shape == tensors[wants].shape
