"""The Triton kernels, interpreted on the CPU, against float64, and what they are planned by.

Triton reads TRITON_INTERPRET when kernels are decorated, so all of this needs a process that has
it from the start. Run without it, this file has one test, which runs the file again with it:

    TRITON_INTERPRET=1 pytest tests/test_triton_kernels.py      the tests themselves
    pytest tests/test_triton_kernels.py                         the same, in a subprocess

Tiles and waves are shrunk, so that tensors of a few hundred elements have several tiles a block,
several blocks a piece, and tails everywhere. Fresh memory is NaN (conftest.py): an element of an
output or a workspace that no kernel wrote fails its test.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fusednorm.triton_kernels import launch, plan
from fusednorm.triton_kernels.geometry import Geometry
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from cases import Case, all_cases, check, in_layout, make
from fusednorm import triton_kernels as kernels
from fusednorm.layout import canonical
from fusednorm.reference import cells

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = ("nchw", "nhwc", "slice")


@pytest.fixture(autouse=True)
def _many_small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "TILE", 64)
    monkeypatch.setattr(plan, "MAX_BLOCK_CHANNELS", 16)
    monkeypatch.setattr(plan, "REDUCE_BLOCKS", 2)
    monkeypatch.setattr(plan, "APPLY_BLOCKS", 2)


def forward(case: Case, seed: int = 0, eps: float = 1e-5) -> dict[str, Tensor]:
    i = make(case, seed=seed)
    epilogue = (cells.ACTIVATIONS[case.act], 0.01)
    where = (case.num_groups, case.per_sample)
    y, mean, rstd, var = kernels.norm_forward(
        i.x, i.weight, i.bias, i.residual, *where, eps, *epilogue
    )
    return {"y": y, "mean": mean, "rstd": rstd, "var": var}


def backward(case: Case, mean: Tensor, rstd: Tensor, live: float = 1.0) -> dict[str, Tensor]:
    i = make(case)
    epilogue = (cells.ACTIVATIONS[case.act], 0.01)
    where = (case.num_groups, case.per_sample)
    grads = kernels.norm_backward(
        i.dy, i.x, mean, rstd, i.weight, i.bias, i.residual, *where, live, *epilogue
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
# The awkward shapes: every eleventh case, coprime to the periods of dtype, layout and activation.
# The interpreter takes milliseconds a block, and blocks are at least pieces x sets.
DEALT = [
    case
    for case in all_cases(DTYPES, LAYOUTS)[::11]
    if (g := Geometry.of(case.shape, case.num_groups, case.per_sample)).pieces * g.sets <= 80
]
# Every activation x residual in both patterns and in both accumulation types.
EPILOGUES = [
    Case((3, 6, 5, 4), 6, False, form, dtype, act, residual)
    for act in cells.ACTIVATIONS
    for residual in (False, True)
    for form in ("nchw", "nhwc")
    for dtype in (torch.float32, torch.float64)
]


@pytest.mark.parametrize("case", FULL, ids=str)
def test_every_dtype_layout_and_kind(case: Case) -> None:
    verify(case)


@pytest.mark.parametrize("case", DEALT, ids=str)
def test_awkward_shapes(case: Case) -> None:
    verify(case)


@pytest.mark.parametrize("case", EPILOGUES, ids=str)
def test_every_epilogue(case: Case) -> None:
    verify(case)


@pytest.mark.parametrize("form", ["nchw", "nhwc"])
@pytest.mark.parametrize("kind", KINDS)
def test_default_tiles(kind: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan as it ships, not the small one."""
    monkeypatch.undo()
    verify(Case((3, 6, 5, 4), KINDS[kind], False, form, torch.float32, "silu", True))


@pytest.mark.parametrize("case", FULL[::9], ids=str)
def test_same_bits_again(case: Case) -> None:
    first = forward(case)
    second = forward(case)
    first |= backward(case, first["mean"], first["rstd"])
    second |= backward(case, second["mean"], second["rstd"])
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


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


@pytest.mark.parametrize("form", ["nchw", "nhwc"])
@pytest.mark.parametrize("kind", KINDS)
def test_large_mean(kind: str, form: str) -> None:
    """mean/sigma = 10^4 in float32: the error of y is no worse than torch's own."""
    groups = KINDS[kind]
    x = in_layout(1e4 + torch.randn(8, 6, 8, 5), form)
    y, mean, _, var = kernels.norm_forward(x, None, None, None, groups, False, 1e-5, 0, 0.0)
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
def test_constant_input(kind: str, form: str, value: float) -> None:
    """No variance, exactly: y is the bias, and the gradient is finite."""
    x = in_layout(torch.full((3, 6, 5, 4), value), form)
    where, bias = (KINDS[kind], False), torch.arange(6.0)
    y, mean, rstd, var = kernels.norm_forward(x, None, bias, None, *where, 1e-5, 0, 0.0)
    assert torch.equal(var, torch.zeros_like(var))
    assert torch.equal(mean, torch.full_like(mean, value))
    assert torch.equal(y, bias[:, None, None].expand_as(y))
    dy = torch.randn_like(x)
    grads = kernels.norm_backward(dy, x, mean, rstd, None, bias, None, *where, 1.0, 0, 0.0)
    assert all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("form", ["nchw", "nhwc"])
@pytest.mark.parametrize("act", cells.ACTIVATIONS)
def test_kinks_and_nan(act: str | None, form: str) -> None:
    """z = 0 has torch's derivative; with given statistics NaN stays in its element."""
    values = torch.tensor([0.0, -0.0, -1.0, 2.0, math.nan])
    z = in_layout(values.expand(1, 2, 5), form).requires_grad_()
    expected = cells.activate(z, cells.ACTIVATIONS[act], 0.3)
    (dz,) = torch.autograd.grad(expected.sum(), z)
    given_args = (torch.zeros(2), torch.ones(2), None, None, None, 2, False)
    epilogue = (cells.ACTIVATIONS[act], 0.3)
    y = kernels.norm_apply(z.detach(), *given_args, *epilogue)
    dx = kernels.norm_backward(torch.ones_like(z), z.detach(), *given_args, 0.0, *epilogue)[0]
    torch.testing.assert_close(y, expected.detach(), equal_nan=True)
    torch.testing.assert_close(dx, dz, equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 6, 5, 4), (2, 6, 0, 4), (0, 6)], ids=str)
@pytest.mark.parametrize("per_sample", [False, True])
def test_empty(shape: tuple[int, ...], per_sample: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "launch", lambda *_, **__: pytest.fail("launched"))
    x, weight = torch.empty(shape), torch.ones(6)
    where = (6, per_sample)
    y, mean, rstd, var = kernels.norm_forward(x, weight, weight, x, *where, 1e-5, 1, 0.0)
    assert y.shape == shape
    assert mean.shape == ((shape[0], 6) if per_sample else (6,))
    assert not mean.any()
    assert not var.any()
    torch.testing.assert_close(rstd, torch.full_like(mean, 1e-5**-0.5))
    assert kernels.norm_apply(x, mean, rstd, weight, weight, x, *where, 1, 0.0).shape == shape
    grads = kernels.norm_backward(x, x, mean, rstd, weight, weight, x, *where, 1.0, 1, 0.0)
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
    _, mean, rstd, _ = kernels.norm_forward(x, None, None, residual, *where, 1e-5, 1, 0.0)
    got = kernels.norm_backward(dy, x, mean, rstd, None, None, residual, *where, 1.0, 1, 0.0)
    want = kernels.norm_backward(
        dy.contiguous(), i.x, mean, rstd, None, None, i.residual, *where, 1.0, 1, 0.0
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


def test_update_running_equals_batch_norm() -> None:
    x = torch.randn(4, 6, 5, 4)
    ours, theirs = ([torch.zeros(6), torch.ones(6)] for _ in range(2))
    F.batch_norm(x, *theirs, training=True, momentum=0.3)
    _, mean, _, var = kernels.norm_forward(x, None, None, None, 6, False, 1e-5, 0, 0.0)
    kernels.update_running(*ours, None, mean, var, 0.3, 80)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


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


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    n, c, s = (draw(st.integers(1, m)) for m in (4, 24, 40))
    divisors = [g for g in range(1, c * s + 1) if c * s % g == 0]
    return Geometry(n, c, s, draw(st.sampled_from(divisors)), draw(st.booleans()))


@given(geometries())
def test_pieces_are_the_common_refinement(g: Geometry) -> None:
    cuts = sorted({*range(0, g.sample, g.spatial), *range(0, g.sample, g.group)})
    assert [g.piece_start(p) for p in range(g.pieces)] == cuts
    assert g.piece_start(g.pieces) == g.sample
    owner = [sum(cut <= d for cut in cuts) - 1 for d in range(g.sample)]
    assert [g.piece_of(d) for d in range(g.sample)] == owner
    lengths = [b - a for a, b in zip(cuts, [*cuts[1:], g.sample], strict=True)]
    assert g.longest == max(lengths)
    assert g.regular == (set(lengths) == {g.unit}) or g.unit == max(lengths)
    assert all(length % g.unit == 0 for length in lengths)
    assert g.count * g.cells == g.n * g.sample
    assert g.whole_groups().pieces == g.groups


# The plan as it ships: hypothesis and the fixture's patch both apply, and neither matters here.
@settings(max_examples=300)
@given(geometries(), st.sampled_from([2, 4, 8]), st.booleans(), st.integers(1, 200))
def test_plans_cover_and_fit(g: Geometry, itemsize: int, nhwc: bool, sms: int) -> None:
    p = plan.make_plan(g, itemsize, nhwc, sms)
    assert p.pattern == ("columns" if nhwc and plan.fits_columns(g) else "runs")
    assert p.strided == (nhwc and p.pattern == "runs")
    for geometry, sweep in ((p.moments, p.reduce_moments), (g, p.reduce), (g, p.apply)):
        for size in (sweep.block_rows, sweep.block_cols, sweep.num_warps):
            assert size & (size - 1) == 0
        assert sweep.block_rows * sweep.block_cols <= plan.TILE
        rows = geometry.rows
        if p.pattern == "columns":
            assert g.spatial % p.ranges == 0
            rows *= g.spatial // p.ranges
            assert g.channels % sweep.vec == 0
            columns = 1
        else:
            columns = plan.ceil_div(geometry.longest, sweep.block_cols)
            assert geometry.unit % sweep.vec == 0
        # No split without a tile in the longest piece, and 16 bytes at most.
        assert 1 <= sweep.splits <= plan.ceil_div(rows, sweep.block_rows) * columns
        assert sweep.vec * itemsize <= 16
        if p.strided:
            assert sweep.vec == 1


def test_plan_fills_a_card() -> None:
    """ResNet-50's layers at batch 32 have a block for every place of 132 multiprocessors."""
    for c, hw in ((64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7)):
        for nhwc in (False, True):
            g = Geometry(32, c, hw * hw, c, False)
            p = plan.make_plan(g, 2, nhwc, 132)
            wide = c if p.pattern == "runs" else plan.ceil_div(c, p.reduce.block_cols)
            tiles = 32 * hw * hw * c / (p.reduce.block_rows * p.reduce.block_cols)
            assert wide * p.reduce.splits >= min(plan.REDUCE_BLOCKS * 132, tiles / 2), (c, nhwc)


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
