"""Rungs 2 and 3: every backend's forward, backward and running statistics through the public API.

On a machine without a card this is the reference backend; on one with, all of them. The Triton
interpreter and the host-run CUDA kernels have files of their own.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import fusednorm.functional as FF
from cases import Case, all_cases, check, in_layout, make
from fusednorm.layout import canonical, like
from fusednorm.ops import Apply, Normalize
from test_reference import GOLDEN, PREFIXES, golden

LAYOUTS = ("nchw", "nhwc", "slice")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def run(case: Case, device: str, backend: str) -> dict[str, torch.Tensor]:
    inputs = make(case, device)
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs.tensors()]
    x, weight, bias, residual = leaves
    dense = canonical(x)
    res = None if residual is None else like(residual, dense)
    y, mean, _, var, _ = Normalize.apply(dense, weight, bias, res, case.config(backend))
    named = dict(zip(("dx", "dweight", "dbias", "dresidual"), leaves, strict=True))
    present = {name: t for name, t in named.items() if t is not None}
    grads = torch.autograd.grad(y, list(present.values()), inputs.dy)
    got = dict(zip(present, grads, strict=True))
    return got | {"y": y.detach(), "mean": mean, "var": var}


@pytest.mark.parametrize("case", all_cases(DTYPES, LAYOUTS), ids=str)
def test_against_float64(case: Case, target: tuple[str, str]) -> None:
    # The composition inherits the rounding of ATen's kernels, layout by layout.
    check(case, run(case, *target), make(case), same_layout=target[1] == "reference")


EAGER = [
    c for c in all_cases(DTYPES, LAYOUTS) if not c.per_sample or c.shape[1] % c.num_groups == 0
]


@pytest.mark.parametrize("case", EAGER, ids=str)
def test_eager_against_float64(case: Case, target: tuple[str, str]) -> None:
    """What the public functions do of a plain tensor, in one operator; and running statistics."""
    inputs = make(case, target[0])
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs.tensors()]
    x, weight, bias, residual = leaves
    fused = {"act": case.act, "residual": residual, "negative_slope": 0.01}
    got, acc = {}, torch.promote_types(case.dtype, torch.float32)
    if case.per_sample:
        y = FF.group_norm(x, case.num_groups, weight, bias, **fused)
    else:
        mean, var = torch.zeros(2, case.num_groups, dtype=acc, device=target[0]).unbind()
        tracked = torch.tensor(6, device=target[0])
        y = FF.batch_group_norm(
            x, case.num_groups, mean, var, weight, bias, True, 1.0, num_batches_tracked=tracked,
            **fused,
        )  # fmt: skip
        assert tracked == 7
        # With momentum 1 they are the batch's, but for the unbiased variance.
        got = {"mean": mean, "var": var * ((case.count - 1) / case.count)}
    named = dict(zip(("dx", "dweight", "dbias", "dresidual"), leaves, strict=True))
    present = {name: t for name, t in named.items() if t is not None}
    grads = torch.autograd.grad(y, list(present.values()), inputs.dy)
    got |= dict(zip(present, grads, strict=True)) | {"y": y.detach()}
    check(case, got, make(case), same_layout=target[1] == "reference")


@pytest.mark.parametrize("groups", [6, 2, 4])
@pytest.mark.parametrize("wants", ["x", "weight", "residual", "nothing", "no_grad"])
def test_gradients_reach_whoever_wants_them(
    wants: str, groups: int, target: tuple[str, str]
) -> None:
    i = make(Case((3, 6, 4, 2), groups, act="relu", residual=True), target[0])
    named = {"x": i.x, "weight": i.weight, "bias": i.bias, "residual": i.residual}
    if wants in named:
        named[wants].requires_grad_()
    if wants == "no_grad":
        i.x.requires_grad_()

    def run() -> torch.Tensor:
        return FF.batch_group_norm(
            i.x, groups, None, None, i.weight, i.bias, True, act="relu", residual=i.residual
        )

    if wants not in named:
        with torch.no_grad():
            assert not run().requires_grad
        assert run().requires_grad == (wants == "no_grad")
        return
    (got,) = torch.autograd.grad(run(), named[wants], i.dy)
    for t in named.values():
        t.requires_grad_()
    want = torch.autograd.grad(run(), list(named.values()), i.dy)
    assert torch.equal(got, want[list(named).index(wants)])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", [6, 2, 12, 4])
def test_large_mean(groups: int, layout: str, target: tuple[str, str]) -> None:
    """mean/sigma = 10^4 in float32: no worse than torch's own batch norm of the same tensor."""

    def batch_norm(x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, None, None, None, None, True)

    x = in_layout(1e4 + torch.randn(8, 6, 8, 5), layout)
    expected = batch_norm(x.double().reshape(8, groups, -1)).reshape(x.shape)
    x = x.to(target[0])
    yardstick = (batch_norm(x) - batch_norm(x.double())).abs().max().cpu()
    ours = FF.batch_group_norm(x, groups, training=True).cpu()
    error = (ours - expected).abs().max()
    # Both are dominated by the rounding of the mean, up to 1e4 * 2^-24 = 6e-4 standard
    # deviations; which way it rounds is luck, hence one such rounding on top.
    assert error <= yardstick + 1e4 * 2**-24, (error, yardstick)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("act", [None, "relu", "gelu"])
def test_constant_channel_is_finite(act: str | None, layout: str, target: tuple[str, str]) -> None:
    x = in_layout(torch.randn(4, 6, 5, 5), layout).to(target[0])
    x[:, 2] = 3e4
    x = x.requires_grad_()
    y = FF.batch_norm(x, None, None, None, None, True, act=act)
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert torch.isfinite(y).all() and torch.isfinite(dx).all()
    # x*rstd = 3e4/sqrt(1e-5) = 9.5e6, whose float32 rounding is 0.5: what ATen's CPU kernel, which
    # folds the mean into the shift, may leave of it. The kernels of this package subtract first.
    assert y[:, 2].abs().max() <= (2.0 if target[1] == "reference" else 0.0)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_golden_trace(prefix: str, target: tuple[str, str]) -> None:
    """Two training steps, then evaluation: outputs, gradients and running statistics."""
    device = target[0]
    groups = int(GOLDEN[prefix + "num_groups"])
    source = "largemean_" if prefix.startswith("large") else ""
    mean = golden(prefix + "running_mean_init").clone().to(device)
    var = golden(prefix + "running_var_init").clone().to(device)
    w, b = (golden(n).to(device).requires_grad_() for n in ("weight", "bias"))
    eps, momentum = float(GOLDEN["eps"]), float(GOLDEN["momentum"])
    for t in (0, 1):
        x = golden(source + "x")[t].to(device).requires_grad_()
        y = FF.batch_group_norm(x, groups, mean, var, w, b, True, momentum, eps)
        grads = torch.autograd.grad(y, (x, w, b), golden("g")[t].to(device))
        got = dict(zip(("dx", "dweight", "dbias"), grads, strict=True)) | {"out": y}
        got |= {"running_mean_after": mean, "running_var_after": var}
        for name, value in got.items():
            expected = golden(prefix + name)[t].to(device)
            torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10, msg=name)
    x = golden(source + "eval_x").to(device)
    y = FF.batch_group_norm(x, groups, mean, var, w, b, False, momentum, eps)
    expected = golden(prefix + "eval_out").to(device)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_batch_norm(
    dtype: torch.dtype, training: bool, layout: str, target: tuple[str, str]
) -> None:
    """G = C is F.batch_norm, running statistics included, to a few roundings of the dtype."""
    device = target[0]
    x = in_layout(torch.randn(5, 7, 4, 3, dtype=dtype), layout).to(device)
    w, b = torch.randn(2, 7, dtype=dtype, device=device)
    ours, theirs = ([torch.zeros(7), torch.ones(7)] for _ in range(2))
    ours, theirs = ([s.to(device, dtype) for s in pair] for pair in (ours, theirs))
    y = FF.batch_group_norm(x, 7, *ours, w, b, training, 0.3)
    expected = F.batch_norm(x, *theirs, w, b, training, 0.3)
    tol = 16 * torch.finfo(dtype).eps
    for got, want in zip((y, *ours), (expected, *theirs), strict=True):
        torch.testing.assert_close(got, want, rtol=tol, atol=tol)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_one_sample_is_group_norm(groups: int, layout: str, target: tuple[str, str]) -> None:
    x = in_layout(torch.randn(1, 6, 5, 4), layout).to(target[0])
    w, b = torch.randn(2, 6, device=target[0])
    ours = FF.batch_group_norm(x, groups, None, None, w, b, True)
    torch.testing.assert_close(ours, F.group_norm(x, groups, w, b), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(ours, FF.group_norm(x, groups, w, b), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("groups", [6, 2, 12, 4])
@pytest.mark.parametrize("act", [None, "relu", "silu", "gelu", "leaky_relu"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_gradcheck(groups: int, act: str | None, per_sample: bool) -> None:
    """First and second derivatives of the Function, with affine and residual, in float64."""
    case = Case((3, 6, 2, 2), groups, per_sample, dtype=torch.float64, act=act, residual=True)
    inputs = [t.requires_grad_() for t in make(case).tensors()]
    config = case.config("reference")

    def fn(*tensors: torch.Tensor) -> torch.Tensor:
        return Normalize.apply(*tensors, config)[0]

    assert torch.autograd.gradcheck(fn, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(fn, inputs, fast_mode=True)


@pytest.mark.parametrize("groups", [6, 12, 4])
def test_gradcheck_frozen(groups: int) -> None:
    case = Case((3, 6, 2, 2), groups, dtype=torch.float64, act="silu", residual=True)
    inputs = [t.requires_grad_() for t in make(case).tensors()]
    mean, rstd = torch.randn(groups).double(), torch.rand(groups).double() + 0.5

    def fn(*tensors: torch.Tensor) -> torch.Tensor:
        return Apply.apply(*tensors, mean, rstd, case.config("reference"))

    assert torch.autograd.gradcheck(fn, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(fn, inputs, fast_mode=True)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("how", ["cat", "expand", "transpose", "sliced", "other_layout"])
def test_any_grad_output_strides(how: str, layout: str, target: tuple[str, str]) -> None:
    """Neighbours hand over views: gradients must not depend on the strides of grad_output."""
    shape = (4, 6, 5, 5)
    gen = torch.Generator().manual_seed(1)
    dense = torch.randn(shape, generator=gen)
    views = {
        "cat": torch.cat([dense, dense], 1)[:, 6:],
        "expand": torch.ones(()).expand(shape),
        "transpose": dense.transpose(2, 3),
        "sliced": torch.randn(4, 6, 10, 5, generator=gen)[:, :, ::2],
        "other_layout": in_layout(dense, "nchw" if layout == "nhwc" else "nhwc"),
    }
    dy = views[how].to(target[0])
    x = in_layout(torch.randn(shape, generator=gen), layout).to(target[0]).requires_grad_()
    y = FF.batch_group_norm(x, 2, training=True, act="relu")
    (got,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    (expected,) = torch.autograd.grad(y, x, dy.contiguous().clone())
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert got.stride() == x.stride()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("groups", [6, 2, 12])
def test_memory_format_is_kept(groups: int, training: bool, target: tuple[str, str]) -> None:
    stats = (torch.zeros(groups), torch.ones(groups))
    for x in (
        torch.randn(3, 6, 4, 4).to(memory_format=torch.channels_last),
        torch.randn(3, 6, 4, 2, 2).to(memory_format=torch.channels_last_3d),
        torch.randn(3, 4, 6).transpose(1, 2),
        torch.randn(3, 6, 4, 4),
    ):
        x, mean, var = (t.to(target[0]) for t in (x, *stats))
        y = FF.batch_group_norm(x, groups, mean, var, training=training)
        assert y.stride() == x.stride()


@pytest.mark.parametrize("groups", [6, 2, 4])
def test_sliced_nhwc_stays_nhwc(groups: int, target: tuple[str, str]) -> None:
    """A crop of a channels-last tensor is not dense; its copy is channels-last, as torch's."""
    x = torch.randn(3, 6, 8, 8).to(target[0], memory_format=torch.channels_last)[:, :, 1:-1]
    y = FF.batch_group_norm(x, groups, training=True)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, FF.batch_group_norm(x.contiguous(), groups, training=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [6, 2, 4])
def test_frozen_statistics(groups: int, dtype: torch.dtype, target: tuple[str, str]) -> None:
    """Evaluation with a fused activation and residual, and its gradient, against float64."""
    case = Case((3, 6, 4, 2), groups, dtype=dtype, act="relu", residual=True)
    i = make(case, target[0])
    mean, var = torch.randn(groups), torch.rand(groups) + 0.5

    def run(dtype: torch.dtype, device: str, formula: bool) -> list[torch.Tensor]:
        x, r = (t.detach().to(device, dtype).requires_grad_() for t in (i.x, i.residual))
        acc = torch.promote_types(dtype, torch.float32)
        w, b, m, v = (t.to(device, acc) for t in (i.weight, i.bias, mean, var))
        w = w.detach().requires_grad_()
        if formula:
            y = (x.view(3, groups, -1) - m.view(-1, 1)) / (v.view(-1, 1) + 1e-5).sqrt()
            y = F.relu(y.view_as(x) * w.view(-1, 1, 1) + b.view(-1, 1, 1) + r)
        else:
            y = FF.batch_group_norm(x, groups, m, v, w, b, False, act="relu", residual=r)
        return [y.detach(), *torch.autograd.grad(y, (x, w, r), i.dy.to(device, dtype))]

    exact = run(torch.float64, "cpu", True)
    named = zip(("y", "dx", "dweight", "dres"), run(dtype, target[0], False), exact, strict=True)
    for name, got, want in named:
        # One rounding to store, one more where torch's own eval path rounds before the residual,
        # a few in between. The data keep z away from the kink of relu by more than that.
        error = (got.double().cpu() - want).abs().max()
        assert error <= 4 * torch.finfo(got.dtype).eps * want.abs().max(), (name, error)


@pytest.mark.parametrize("groups", [6, 2, 12, 4])
@pytest.mark.parametrize("per_sample", [False, True])
def test_output_may_be_modified_in_place(
    groups: int, per_sample: bool, target: tuple[str, str]
) -> None:
    """nn.ReLU(inplace=True) follows most norms; it must neither raise nor change gradients."""
    x = torch.randn(3, 6, 4, 4, device=target[0], requires_grad=True)
    config = Case(x.shape, groups, per_sample).config(target[1])
    grads = []
    for relu in (F.relu, F.relu_):
        y = relu(Normalize.apply(x, None, None, None, config)[0])
        grads.append(torch.autograd.grad(y.square().sum(), x)[0])
    assert torch.equal(*grads)
