"""The Triton kernels, interpreted on the CPU, against float64.

Triton reads TRITON_INTERPRET when kernels are decorated, so all of this needs a process that has
it from the start. Run without it, this file has one test, which runs the file again with it:

    TRITON_INTERPRET=1 pytest tests/test_triton_kernels.py      the tests themselves
    pytest tests/test_triton_kernels.py                         the same, in a subprocess

Tiles and waves are shrunk, so that tensors of a few hundred elements have several tiles a block,
several blocks a piece, fans of splits, and tails everywhere. Fresh memory is NaN (conftest.py): an
element of an output or a workspace that no kernel wrote fails its test. Every case runs on one of
four paths, dealt so that each kind of group meets all of them:

    streaming   two sweeps, the partials combined by the last to arrive
    captured    two sweeps and a combining launch, as in a CUDA graph
    onchip      one launch, a slice a block
    cache       one launch that reads its slice twice
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fusednorm.triton_kernels import counters, launch
from fusednorm.triton_kernels.geometry import Geometry
from torch import Tensor
from torch.nn import functional as F

from cases import Case, all_cases, check, in_layout, make
from fusednorm import triton_kernels as kernels
from fusednorm.layout import canonical
from fusednorm.ops.mask import mask_size, pack
from fusednorm.reference import cells
from test_triton_plan import PATHS

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = ("nchw", "nhwc", "slice")


DEALT_PATHS = ("streaming", "onchip", "cache", "captured")


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the kernels that a test launches; every counter is zero again afterwards."""
    names: list[str] = []
    real = launch.launch

    def note(kernel: Any, *args: Any, **constants: Any) -> None:
        names.append(kernel.__name__.removesuffix("_kernel"))
        real(kernel, *args, **constants)

    monkeypatch.setattr(launch, "launch", note)
    monkeypatch.setattr(counters, "_cache", {})
    take(monkeypatch, "streaming")
    yield names
    assert not any(zeros.any() for zeros in counters._cache.values())


def take(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr(launch, "LIMITS", PATHS[path])
    if path == "captured":
        monkeypatch.setattr(counters, "zeros", lambda x, count: None)


def forward(case: Case, seed: int = 0, eps: float = 1e-5) -> dict[str, Tensor]:
    i = make(case, seed=seed)
    epilogue = (cells.ACTIVATIONS[case.act], 0.01)
    where = (case.num_groups, case.per_sample)
    y, mean, rstd, var, mask = kernels.norm_forward(
        i.x, i.weight, i.bias, i.residual, *where, eps, *epilogue, False
    )
    assert mask.shape == (0,)
    return {"y": y, "mean": mean, "rstd": rstd, "var": var}


def backward(
    case: Case, mean: Tensor, rstd: Tensor, live: float = 1.0, mask: Tensor | None = None
) -> dict[str, Tensor]:
    i = make(case)
    epilogue = (cells.ACTIVATIONS[case.act], 0.01)
    where = (case.num_groups, case.per_sample)
    residual = i.residual if mask is None else None
    grads = kernels.norm_backward(
        i.dy, i.x, mean, rstd, i.weight, i.bias, residual, mask, *where, live, *epilogue
    )
    return dict(zip(("dx", "dweight", "dbias", "dresidual"), grads, strict=True))


def verify(case: Case) -> None:
    """Both directions and the apply of a case, every result held to the bound of cases.py."""
    out = forward(case)
    grads = backward(case, out["mean"], out["rstd"])
    rstd = (out["var"].double() + 1e-5).rsqrt()
    torch.testing.assert_close(out["rstd"].double(), rstd, rtol=3e-7, atol=0)
    if case.residual and case.act is None:
        assert grads["dresidual"].shape == (0,)
    if not case.residual or case.act is None:
        del grads["dresidual"]
    if not case.affine:
        # Always returned; without a weight nobody's gradient, but still the sums.
        assert grads.pop("dweight").shape == grads.pop("dbias").shape == (case.shape[1],)
    del out["rstd"]
    check(case, out | grads, make(case))
    assert out["y"].stride() == torch.empty_like(canonical(make(case).x)).stride()


# Every dtype x layout x kind of group x set of statistics, on one shape that has all kinds.
KINDS = {"channels": 6, "whole": 2, "parts": 12, "straddling": 4}
FULL = [
    Case((3, 6, 5, 4), g, per_sample, form, dtype)
    for g in KINDS.values()
    for per_sample in (False, True)
    for form in ("nchw", "nhwc")
    for dtype in DTYPES
]
# The awkward shapes: every seventh case, coprime to the periods of dtype, layout and activation.
# The interpreter takes milliseconds a block, and blocks are at least pieces x sets.
DEALT = [
    case
    for case in all_cases(DTYPES, LAYOUTS)[::7]
    if (g := Geometry.of(case.shape, case.num_groups, case.per_sample)).pieces * g.sets <= 30
]
# Every activation x residual in both patterns and in both accumulation types.
EPILOGUES = [
    Case((3, 6, 5, 4), 6, False, form, dtype, act, residual)
    for act in cells.ACTIVATIONS
    for residual in (False, True)
    for form in ("nchw", "nhwc")
    for dtype in (torch.float32, torch.float64)
]


def dealt(cases: list[Case]) -> list[Any]:
    """Each case with one of the paths, the next for the next one."""
    paths = [DEALT_PATHS[(i + i // 4) % 4] for i in range(len(cases))]
    return [pytest.param(c, p, id=f"{c}-{p}") for c, p in zip(cases, paths, strict=True)]


@pytest.mark.parametrize(("case", "path"), dealt(FULL))
def test_every_dtype_layout_and_kind(
    case: Case, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(monkeypatch, path)
    verify(case)


@pytest.mark.parametrize(("case", "path"), dealt(DEALT))
def test_awkward_shapes(case: Case, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(monkeypatch, path)
    verify(case)


@pytest.mark.parametrize(("case", "path"), dealt(EPILOGUES))
def test_every_epilogue(case: Case, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(monkeypatch, path)
    verify(case)


@pytest.mark.parametrize("groups", [16, 4, 64], ids=["channels", "whole", "parts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_frames(groups: int, dtype: torch.dtype, launched: list[str]) -> None:
    """Planes that do not begin on 16 bytes are read as samples x C*S; others as runs."""
    verify(Case((3, 16, 3, 4), groups, False, "nchw", dtype, "silu", True))
    assert len(launched) == 4
    # Whole channels make a group whose run begins on 16 bytes.
    wide = {torch.float32: {16: 4, 4: 4, 64: 0}, torch.bfloat16: {16: 0, 4: 1, 64: 0}}
    runs = wide[dtype][groups]
    assert sum("runs" in name for name in launched) == runs


LAUNCHES = {
    ("streaming", False): (["moments", "apply"], ["backward_reduce", "backward_apply"]),
    ("streaming", True): (["moments", "apply"], ["backward_reduce", "backward_apply"]),
    ("captured", False): (
        ["moments", "moments_combine", "apply"],
        ["backward_reduce", "sums_combine", "backward_apply"],
    ),
    ("onchip", False): (["forward_onchip"], ["backward_onchip"]),
    ("onchip", True): (["forward_onchip"], ["backward_onchip", "channels_combine"]),
    ("cache", False): (["forward_slices"], ["backward_slices"]),
}


@pytest.mark.parametrize("form", ["nchw", "nhwc"])
@pytest.mark.parametrize(("path", "per_sample"), LAUNCHES)
def test_number_of_launches(
    path: str, per_sample: bool, form: str, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a card these are the nodes of a graph. The running statistics take none of their own."""
    take(monkeypatch, path)
    case = Case((3, 6, 5, 4), 2, per_sample, form, torch.float32, "relu")
    out = train(case, [None] * 3 if per_sample else running(2), 0.1)
    first = list(launched)
    launched.clear()
    backward(case, out["mean"], out["rstd"])
    for names, wanted in zip((first, launched), LAUNCHES[path, per_sample], strict=True):
        assert [n.removesuffix("_runs").removesuffix("_columns") for n in names] == wanted


ORDERED = [
    Case((3, 6, 5, 4), 6, False, "nchw", torch.float32, "relu", True),
    Case((3, 6, 5, 4), 2, False, "nhwc", torch.bfloat16, "relu", True),
    Case((2, 4, 3, 2), 2, True, "nchw", torch.float32, "relu", True),
]


@pytest.mark.parametrize("path", ["streaming", "onchip", "cache"])
@pytest.mark.parametrize("case", ORDERED, ids=str)
def test_same_bits_in_any_order(case: Case, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Again with the same counters, and with the programs run backwards: whoever arrives last."""
    take(monkeypatch, path)
    first = forward(case)
    first |= backward(case, first["mean"], first["rstd"])
    kept = [zeros.data_ptr() for zeros in counters._cache.values()]
    for reverse in (False, True):
        with monkeypatch.context() as patch:
            if reverse:
                run_backwards(patch)
            again = forward(case)
            again |= backward(case, again["mean"], again["rstd"])
        for name, value in first.items():
            assert torch.equal(value, again[name]), (name, reverse)
    assert kept == [zeros.data_ptr() for zeros in counters._cache.values()]


def run_backwards(patch: pytest.MonkeyPatch) -> None:
    """Make the interpreter start with the last program of a grid."""
    from triton.runtime.interpreter import interpreter_builder as builder

    place = builder.set_grid_idx
    patch.setattr(
        builder,
        "set_grid_idx",
        lambda x, y, z: place(builder.grid_dim[0] - 1 - x, y, z),
        raising=True,
    )


MASKED = [
    Case(shape, shape[1], False, form, dtype, "relu", True)
    for shape in ((3, 8, 4, 2), (3, 5, 3, 3))
    for form in ("nchw", "nhwc")
    for dtype in (torch.bfloat16, torch.float32, torch.float64)
]


@pytest.mark.parametrize(("case", "path"), dealt(MASKED))
def test_mask(case: Case, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit an element where y > 0; backward makes of it what it makes of the residual."""
    take(monkeypatch, path)
    i = make(case)
    out = kernels.norm_forward(
        i.x, i.weight, i.bias, i.residual, case.num_groups, False, 1e-5, cells.RELU, 0.0, True
    )
    y, mean, rstd, _, mask = out
    assert mask.dtype == torch.uint8
    assert mask.shape == (mask_size(i.x),)
    assert torch.equal(mask, pack(y))
    want = backward(case, mean, rstd)
    for name, got in backward(case, mean, rstd, mask=mask).items():
        assert torch.equal(got, want[name]), name


@pytest.mark.parametrize("act", [None, "gelu"])
def test_mask_of_anything(act: str | None) -> None:
    """Whoever asks gets the bits of y > 0, NaN counting as not."""
    x = torch.randn(3, 8, 4, 2)
    x[1, 2, 3, 1] = math.nan
    code = cells.ACTIVATIONS[act]
    y, *_, mask = kernels.norm_forward(x, None, None, None, 8, False, 1e-5, code, 0.0, True)
    assert torch.equal(mask, pack(y))


@pytest.mark.parametrize("act", ["relu", "gelu"])
@pytest.mark.parametrize("form", ["nchw", "nhwc"])
@pytest.mark.parametrize("kind", ["channels", "straddling"])
def test_given_statistics(kind: str, form: str, act: str) -> None:
    """norm_apply with statistics that are not x's, and the backward pass that knows it (live)."""
    case = Case((3, 6, 5, 4), KINDS[kind], False, form, torch.float64, act, True)
    i = make(case)
    mean, var = torch.rand(2, case.num_groups, dtype=torch.float64)
    rstd = (var + 0.1).rsqrt()
    code = cells.ACTIVATIONS[act]
    given_args = (mean, rstd, i.weight, i.bias, i.residual, case.num_groups, False, code, 0.01)
    leaves = [t.clone().requires_grad_() for t in (i.x, i.weight, i.bias, i.residual)]
    x, weight, bias, residual = leaves
    flat = (x.reshape(3, case.num_groups, -1) - mean[:, None]) * rstd[:, None]
    z = flat.reshape(x.shape) * weight[:, None, None] + bias[:, None, None] + residual
    y = cells.activate(z, code, 0.01)
    expected = torch.autograd.grad(y, leaves, i.dy)
    torch.testing.assert_close(kernels.norm_apply(i.x, *given_args), y.detach())
    frozen = backward(case, mean, rstd, live=0.0)
    for name, want in zip(("dx", "dweight", "dbias", "dresidual"), expected, strict=True):
        torch.testing.assert_close(frozen[name], want, msg=name)
    # live interpolates: dx is affine in it.
    half, whole = (backward(case, mean, rstd, live)["dx"] for live in (0.5, 1.0))
    torch.testing.assert_close(half, (frozen["dx"] + whole) / 2)


@pytest.mark.parametrize("path", ["streaming", "onchip", "cache"])
@pytest.mark.parametrize("form", ["nchw", "nhwc"])
@pytest.mark.parametrize("kind", ["channels", "whole"])
def test_large_mean(kind: str, form: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """mean/sigma = 10^4 in float32: the error of y is no worse than torch's own."""
    take(monkeypatch, path)
    groups = KINDS[kind]
    x = in_layout(1e4 + torch.randn(8, 6, 8, 5), form)
    y, mean, _, var, _ = kernels.norm_forward(
        x, None, None, None, groups, False, 1e-5, 0, 0.0, False
    )
    flat = x.reshape(8, groups, -1)
    exact = F.batch_norm(flat.double(), None, None, None, None, True)
    own = F.batch_norm(flat, None, None, None, None, True)
    error = (y.reshape(flat.shape) - exact).abs().max()
    # A float32 mean of 1e4 is off by up to half a unit in the last place; twice where it is merged
    # from partials. Luck decides the direction, so that y has half a unit to spare.
    unit = 1e4 * 2**-23
    assert error <= (own - exact).abs().max() + 0.5 * unit
    assert (mean - flat.double().mean((0, 2))).abs().max() <= unit
    # The lanes' means round at every value, independently: their effect falls with the count.
    wide = flat.double().var((0, 2), correction=0)
    assert ((var - wide) / wide).abs().max() <= 3 * unit / math.sqrt(x.numel() / groups)


@pytest.mark.parametrize("form", ["nchw", "nhwc"])
def test_mean_is_subtracted_first(form: str) -> None:
    """With the statistics given exactly, y is exact to a few roundings of y, not of the mean."""
    x = in_layout(1e4 + torch.randn(3, 6, 5, 4), form)
    mean, rstd, weight = torch.full((6,), 1e4), torch.full((6,), 0.3), torch.full((6,), 1.7)
    y = kernels.norm_apply(x, mean, rstd, weight, None, None, 6, False, 0, 0.0)
    exact = (x.double() - 1e4) * rstd[0].double() * weight[0].double()
    torch.testing.assert_close(y.double(), exact, rtol=2**-22, atol=0)


@pytest.mark.parametrize("value", [1e4 / 3, -1e30])
@pytest.mark.parametrize("form", ["nchw", "nhwc"])
@pytest.mark.parametrize("kind", KINDS)
def test_constant_input(
    kind: str, form: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No variance, exactly: y is the bias, and the gradient is finite."""
    paths = dict(zip(KINDS, DEALT_PATHS if form == "nchw" else DEALT_PATHS[::-1], strict=True))
    take(monkeypatch, paths[kind])
    x = in_layout(torch.full((3, 6, 5, 4), value), form)
    where, bias = (KINDS[kind], False), torch.arange(6.0)
    y, mean, rstd, var, _ = kernels.norm_forward(x, None, bias, None, *where, 1e-5, 0, 0.0, False)
    assert torch.equal(var, torch.zeros_like(var))
    assert torch.equal(mean, torch.full_like(mean, value))
    assert torch.equal(y, bias[:, None, None].expand_as(y))
    dy = torch.randn_like(x)
    grads = kernels.norm_backward(dy, x, mean, rstd, None, bias, None, None, *where, 1.0, 0, 0.0)
    assert all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("form", ["nchw", "nhwc"])
@pytest.mark.parametrize("act", cells.ACTIVATIONS)
def test_kinks_and_nan(act: str | None, form: str) -> None:
    """z = 0 has torch's derivative; with given statistics NaN stays in its element."""
    values = torch.tensor([0.0, -0.0, -1.0, 2.0, math.nan])
    z = in_layout(values.expand(1, 2, 5), form).requires_grad_()
    expected = cells.activate(z, cells.ACTIVATIONS[act], 0.3)
    (dz,) = torch.autograd.grad(expected.sum(), z)
    given_args = (torch.zeros(2), torch.ones(2), None, None, None)
    epilogue = (cells.ACTIVATIONS[act], 0.3)
    y = kernels.norm_apply(z.detach(), *given_args, 2, False, *epilogue)
    given_args += (None, 2, False, 0.0)
    dx = kernels.norm_backward(torch.ones_like(z), z.detach(), *given_args, *epilogue)[0]
    torch.testing.assert_close(y, expected.detach(), equal_nan=True)
    torch.testing.assert_close(dx, dz, equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 6, 5, 4), (2, 6, 0, 4), (0, 6)], ids=str)
@pytest.mark.parametrize("per_sample", [False, True])
def test_empty(shape: tuple[int, ...], per_sample: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "launch", lambda *_, **__: pytest.fail("launched"))
    x, weight = torch.empty(shape), torch.ones(6)
    where = (6, per_sample)
    y, mean, rstd, var, mask = kernels.norm_forward(
        x, weight, weight, x, *where, 1e-5, 1, 0.0, True
    )
    assert mask.shape == (0,)
    assert y.shape == shape
    assert mean.shape == ((shape[0], 6) if per_sample else (6,))
    assert not mean.any()
    assert not var.any()
    torch.testing.assert_close(rstd, torch.full_like(mean, 1e-5**-0.5))
    assert kernels.norm_apply(x, mean, rstd, weight, weight, x, *where, 1, 0.0).shape == shape
    grads = kernels.norm_backward(x, x, mean, rstd, weight, weight, x, None, *where, 1.0, 1, 0.0)
    assert [g.shape for g in grads] == [shape, (6,), (6,), shape]
    assert not grads[1].any()
    assert not grads[2].any()


def test_strange_strides() -> None:
    """A stride-0 gradient, a residual in the other layout, x off any 16-byte boundary."""
    case = Case((3, 6, 5, 4), 6, act="relu", residual=True)
    i = make(case)
    x = torch.empty(i.x.numel() + 1)[1:].view(case.shape).copy_(i.x)
    residual = in_layout(i.residual, "nhwc")
    dy = torch.randn(()).expand(case.shape)
    where = (6, False)
    _, mean, rstd, _, _ = kernels.norm_forward(x, None, None, residual, *where, 1e-5, 1, 0.0, False)
    got = kernels.norm_backward(dy, x, mean, rstd, None, None, residual, None, *where, 1.0, 1, 0.0)
    want = kernels.norm_backward(
        dy.contiguous(), i.x, mean, rstd, None, None, i.residual, None, *where, 1.0, 1, 0.0
    )
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    assert got[3].is_contiguous()


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 65, 1030])
def test_update_running(groups: int, dtype: torch.dtype, momentum: float | None) -> None:
    """Three updates in float64, torch's rule; buffers of a half module round once an update."""
    acc = cells.accumulation_dtype(dtype)
    buffers = [torch.rand(groups, dtype=dtype) for _ in range(2)]
    expected = [b.double().clone() for b in buffers]
    tracked = torch.tensor(4)
    for step in range(3):
        mean, var = torch.randn(groups, dtype=acc), torch.rand(groups, dtype=acc)
        kernels.update_running(*buffers, tracked, mean, var, momentum, 7)
        factor = 1 / (5 + step) if momentum is None else momentum
        for k, new in enumerate((mean.double(), var.double() * 7 / 6)):
            expected[k] = (1 - factor) * expected[k] + factor * new
    assert tracked == 7
    for got, want in zip(buffers, expected, strict=True):
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=2 * tolerance)


def running(groups: int, dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
    """running_mean, running_var, num_batches_tracked."""
    return [torch.zeros(groups, dtype=dtype), torch.ones(groups, dtype=dtype), torch.tensor(4)]


def train(case: Case, buffers: list[Tensor | None], momentum: float | None) -> dict[str, Tensor]:
    i = make(case)
    y, mean, rstd, mask = kernels.norm_train(
        i.x, i.weight, i.bias, i.residual, *buffers, case.num_groups, case.per_sample,
        1e-5, momentum, cells.ACTIVATIONS[case.act], 0.01, False,
    )  # fmt: skip
    assert mask.shape == (0,)
    return {"y": y, "mean": mean, "rstd": rstd}


TRAINED = [
    Case((3, 6, 5, 4), groups, False, form, dtype, "relu", True)
    for groups, dtype in zip(KINDS.values(), (torch.float32, torch.float64) * 2, strict=True)
    for form in ("nchw", "nhwc")
]


@pytest.mark.parametrize(("case", "path"), dealt(TRAINED))
def test_train(case: Case, path: str, launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of torch's rule in float64, and what norm_forward returns, bit by bit."""
    take(monkeypatch, path)
    plain = forward(case)
    acc = cells.accumulation_dtype(case.dtype)
    var = plain["var"].double() * case.count / (case.count - 1)
    for momentum in (0.3, None):
        buffers = running(case.num_groups, acc)
        mean, second = torch.zeros(case.num_groups).double(), torch.ones(case.num_groups).double()
        launched.clear()
        for step in range(2):
            out = train(case, buffers, momentum)
            factor = 1 / (5 + step) if momentum is None else momentum
            mean = (1 - factor) * mean + factor * plain["mean"].double()
            second = (1 - factor) * second + factor * var
        assert ("update_running" in launched) == (momentum is None)
        assert all(torch.equal(out[name], plain[name]) for name in out)
        assert buffers[2] == 6
        tolerance = 8 * torch.finfo(acc).eps
        torch.testing.assert_close(buffers[0].double(), mean, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(buffers[1].double(), second, rtol=tolerance, atol=tolerance)


def test_train_without_buffers(launched: list[str]) -> None:
    """No running statistics, or no count of batches, or narrower buffers."""
    case = Case((3, 6, 5, 4), 6)
    plain = forward(case)
    assert torch.equal(train(case, [None, None, None], 0.1)["y"], plain["y"])
    buffers = running(6)[:2]
    train(case, [*buffers, None], 1.0)
    assert torch.equal(buffers[0], plain["mean"])
    narrow = running(6, torch.bfloat16)
    launched.clear()
    train(case, narrow, 1.0)
    assert launched[-1] == "update_running"
    torch.testing.assert_close(narrow[0].float(), plain["mean"], rtol=2**-7, atol=0)


@pytest.mark.parametrize("momentum", [0.3, None])
def test_train_strided_buffers(momentum: float | None) -> None:
    """Columns of something else move as dense buffers do, and nothing beside them."""
    case, plain = Case((3, 6, 5, 4), 6), running(6)
    both = torch.stack([*plain[:2], torch.full((6,), 5.0)], 1)
    train(case, [both[:, 0], both[:, 1], torch.tensor(4)], momentum)
    train(case, plain, momentum)
    assert torch.equal(both, torch.stack([*plain[:2], torch.full((6,), 5.0)], 1))


def test_train_equals_batch_norm() -> None:
    case = Case((4, 6, 5, 4), 6)
    ours, theirs = running(6), running(6)
    F.batch_norm(make(case).x, *theirs[:2], training=True, momentum=0.3)
    train(case, ours, 0.3)
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_counters_are_a_streams_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """One tensor a stream, longer when a plan needs it; one a captured call; none beyond reason."""
    monkeypatch.setattr(counters, "_cache", {})
    x = torch.zeros(1)
    first = counters.zeros(x, 3)
    assert first is counters.zeros(x, counters.LEAST)
    longer = counters.zeros(x, counters.LEAST + 1)
    assert longer.numel() > counters.LEAST
    assert counters.zeros(x, 1) is longer
    assert counters.zeros(x, counters.MOST + 1) is None

    class Card:
        is_cuda, device = True, torch.device("meta")

    stream, capturing = [7], [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=stream[0])
    )
    one = counters.zeros(Card(), 1)
    assert counters.zeros(Card(), 1) is one
    stream[0] = 8
    assert counters.zeros(Card(), 1) is not one
    # A graph's own at every call, and of the capture's length: nothing that eager calls can meet.
    capturing[0] = True
    captured = counters.zeros(Card(), 3)
    assert captured is not None and captured.numel() == 3 and captured is not one
    assert counters.zeros(Card(), 3) is not captured
    assert counters.zeros(Card(), counters.MOST + 1) is None
    assert all(captured is not kept for kept in [*counters._cache.values(), *counters._kept])
    monkeypatch.undo()


def test_python_floats_reach_float64_kernels() -> None:
    """eps = 0.1 is not a float32: a kernel that took it as one would be off by 1e-8."""
    case = Case((3, 6, 5, 4), 6, dtype=torch.float64)
    out = forward(case, eps=0.1)
    torch.testing.assert_close(out["rstd"], (out["var"] + 0.1).rsqrt(), rtol=1e-14, atol=0)


def test_other_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    calls: list[Callable[[], object]] = [
        lambda: forward(Case((3, 6, 5, 4), 6)),
        lambda: backward(Case((3, 6, 5, 4), 6), torch.zeros(6), torch.ones(6)),
        lambda: kernels.update_running(*(torch.ones(2),) * 2, None, *(torch.ones(2),) * 2, 0.1, 9),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=r"'triton' takes CUDA tensors, got \w+ on cpu"):
            call()


if not INTERPRETED:
    for _name in [name for name in globals() if name.startswith("test_")]:
        del globals()[_name]

    def interpreted(*arguments: str) -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]

    def test_in_an_interpreting_process() -> None:
        interpreted(__file__)

    def test_public_api_in_an_interpreting_process() -> None:
        """Operators, functions and modules on the Triton backend: the tests of every backend."""
        files = [str(Path(__file__).with_name(f"test_{n}.py")) for n in ("ops", "modules", "norms")]
        # test_against_float64 would repeat what this file does kernel by kernel.
        interpreted(*files, "-k", "cpu-triton and not against_float64")
