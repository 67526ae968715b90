"""The CUDA kernels' own source, run on the CPU, against the equations in float64.

Error budget: twice the error that torch's own batch norm makes on the same input in the
accumulation dtype, its result rounded to x's dtype, plus a floor of a few units in the last place
of the largest value. The floor covers shapes where torch happens to be exact. Both errors are taken
against float64, and each output is judged in its own dtype: fp16 in y excuses nothing in the mean.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import host_ops
from host_ops import Kernels, acc_dtype, place, same_bits

MODULE = host_ops.load()
EPS = 1e-5
SLOPE = 0.1
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "leaky_relu": lambda z: F.leaky_relu(z, SLOPE),
}
# Every order must give the same bits; the second shuffle is there for the luck of the first.
ORDERS = [("forward", 0), ("reversed", 0), ("shuffled", 1), ("shuffled", 2)]


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    groups: int
    per_sample: bool = False
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    act: str = "none"
    affine: bool = True
    residual: bool = False
    shift: int = 0
    sms: int = 4
    counters: bool = True
    path: str = "streaming"
    device: tuple[tuple[str, int], ...] = ()
    mask: bool = False

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        parts = [shape, f"g{self.groups}", str(self.dtype).removeprefix("torch."), self.act]
        options = ("per_sample", "channels_last", "residual", "mask")
        parts += [name for name in options if getattr(self, name)]
        parts += [] if self.affine else ["plain"]
        parts += [f"shift{self.shift}"] if self.shift else []
        parts += [] if self.counters else ["unfolded"]
        parts += [self.path] if self.path != "streaming" else []
        return "-".join(parts)


@dataclass
class Inputs:
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    dy: Tensor


def make_inputs(case: Case, mean: float = 1.0) -> Inputs:
    generator = torch.Generator().manual_seed(hash_of(case))

    def draw(shape: tuple[int, ...], scale: float = 1.0, offset: float = 0.0) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * scale + offset

    def activation(tensor: Tensor) -> Tensor:
        return place(tensor.to(case.dtype), case.channels_last, case.shift)

    channels, acc = case.shape[1], acc_dtype(case.dtype)
    return Inputs(
        x=activation(draw(case.shape, 1.0, mean)),
        weight=draw((channels,), 0.3, 1.0).to(acc) if case.affine else None,
        bias=draw((channels,)).to(acc) if case.affine else None,
        residual=activation(draw(case.shape)) if case.residual else None,
        dy=activation(draw(case.shape, 1.0, 0.3)),
    )


def hash_of(case: Case) -> int:
    """A seed that is the same in every process, unlike `hash`."""
    return sum((i + 1) * ord(c) for i, c in enumerate(str(case)))


def cells(x: Tensor, case: Case) -> tuple[Tensor, tuple[int, ...]]:
    """x as (N, G, L) in NCHW order, and the axes that a cell spans."""
    return x.reshape(x.shape[0], case.groups, -1), (2,) if case.per_sample else (0, 2)


def finish(xhat: Tensor, inputs: Inputs, act: str) -> Tensor:
    """Affine, residual and activation in xhat's dtype."""
    z = xhat
    if inputs.weight is not None and inputs.bias is not None:
        shape = (-1, *[1] * (z.dim() - 2))
        z = z * inputs.weight.to(z).view(shape) + inputs.bias.to(z).view(shape)
    if inputs.residual is not None:
        z = z + inputs.residual.to(z)
    return ACTIVATIONS[act](z)


def exact_forward(inputs: Inputs, case: Case, live: float = 1.0) -> dict[str, Tensor]:
    """The op's equations in float64. `live` scales what gradients see of the statistics."""
    grouped, axes = cells(inputs.x.double(), case)
    mean = grouped.mean(axes, keepdim=True)
    var = (grouped - mean).square().mean(axes, keepdim=True)
    if live != 1.0:
        mean = live * mean + (1 - live) * mean.detach()
        var = live * var + (1 - live) * var.detach()
    rstd = (var + EPS).rsqrt()
    xhat = ((grouped - mean) * rstd).reshape(inputs.x.shape)
    y = finish(xhat, inputs, case.act)
    shape = (case.shape[0], case.groups) if case.per_sample else (case.groups,)
    mean, rstd, var = (v.reshape(shape) for v in (mean, rstd, var))
    return {"y": y, "mean": mean, "rstd": rstd, "var": var}


def torch_forward(inputs: Inputs, case: Case) -> dict[str, Tensor]:
    """torch's batch norm over the same cells, the rest composed around it."""
    acc = acc_dtype(case.dtype)
    samples, groups = case.shape[0], case.groups
    grouped = inputs.x.to(acc).contiguous()
    view = (1, samples * groups, -1) if case.per_sample else (samples, groups, -1)
    grouped = grouped.reshape(view)
    xhat, mean, rstd = torch.native_batch_norm(grouped, None, None, None, None, True, 0.0, EPS)
    y = finish(xhat.reshape(case.shape), inputs, case.act)
    shape = (samples, groups) if case.per_sample else (groups,)
    mean, rstd = mean.reshape(shape), rstd.reshape(shape)
    return {"y": y, "mean": mean, "rstd": rstd, "var": rstd.pow(-2) - EPS}


Compose = Callable[[Inputs, Case], dict[str, Tensor]]


def gradients(
    compose: Compose, inputs: Inputs, case: Case, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Gradients of a composition by autograd; weight 1 and bias 0 stand in where there are none."""
    channels = case.shape[1]
    leaves = {
        "x": inputs.x.to(dtype),
        "weight": torch.ones(channels) if inputs.weight is None else inputs.weight,
        "bias": torch.zeros(channels) if inputs.bias is None else inputs.bias,
    }
    if inputs.residual is not None:
        leaves["residual"] = inputs.residual
    leaves = {k: v.detach().to(dtype, copy=True).requires_grad_() for k, v in leaves.items()}
    y = compose(replace(inputs, **leaves), case)["y"]
    grads = torch.autograd.grad(y, list(leaves.values()), inputs.dy.to(dtype))
    return {"d" + k: g for k, g in zip(leaves, grads, strict=True)}


def assert_close(name: str, ours: Tensor, theirs: Tensor, exact: Tensor, terms: float = 1) -> None:
    """ours against exact, no worse than twice theirs plus a floor.

    `terms` is how many rounded numbers one entry sums: their errors add up like a random walk. Four
    units in the last place: x - mean, the product, the shift, the rounding to x's dtype.
    """
    eps = torch.finfo(ours.dtype).eps
    exact = exact.double()
    floor = 4 * eps * math.sqrt(terms) * max(exact.abs().max().item(), 1e-3)
    error = (ours.double() - exact).abs().max().item()
    torch_error = (theirs.to(ours.dtype).double() - exact).abs().max().item()
    bound = 2 * torch_error + floor
    assert error <= bound, f"{name}: error {error:.3e}, bound {bound:.3e}, torch {torch_error:.3e}"


def run(
    case: Case,
    inputs: Inputs,
    order: tuple[str, int],
    live: float = 1.0,
    plans: list[Any] | None = None,
) -> dict[str, Tensor]:
    """Forward, apply and backward in one order of threads and blocks; `plans` gets what was run."""
    device = {"num_sms": case.sms, **dict(case.device)}
    k = Kernels(MODULE, *order, device=device, counters=case.counters, path=case.path)
    i, tail = inputs, (case.groups, case.per_sample)
    y, mean, rstd, var, mask = k.forward(
        i.x, i.weight, i.bias, i.residual, *tail, EPS, case.act, SLOPE, save_mask=case.mask
    )
    plans = [] if plans is None else plans
    plans.append(k.plan)
    again = k.apply(i.x, mean, rstd, i.weight, i.bias, i.residual, *tail, case.act, SLOPE)
    residual = None if case.mask else i.residual
    dx, dweight, dbias, dresidual = k.backward(
        i.dy, i.x, mean, rstd, i.weight, i.bias, residual, *tail, live, case.act, SLOPE, mask
    )
    plans.append(k.plan)
    out = {"y": y, "mean": mean, "rstd": rstd, "var": var, "apply": again}
    out |= {"dx": dx, "dweight": dweight, "dbias": dbias}
    if dresidual is not None:
        out["dresidual"] = dresidual
    return out


def check(case: Case) -> list[Any]:
    """All outputs against float64, and the same bits in every order; the plans that were run."""
    inputs = make_inputs(case)
    plans: list[Any] = []
    ours = run(case, inputs, ORDERS[0], plans=plans)
    assert same_bits(ours["apply"].contiguous(), ours["y"].contiguous()), "apply is not forward's"

    acc = acc_dtype(case.dtype)
    exact, theirs = exact_forward(inputs, case), torch_forward(inputs, case)
    exact |= gradients(exact_forward, inputs, case, torch.float64)
    theirs |= gradients(torch_forward, inputs, case, acc)
    in_channel = inputs.x.numel() // case.shape[1]
    terms = {"dweight": in_channel, "dbias": in_channel}
    for name in ("y", "mean", "rstd", "var", "dx", "dweight", "dbias", "dresidual"):
        if name in ours:
            assert_close(name, ours[name], theirs[name], exact[name], terms.get(name, 1))

    for order in ORDERS[1:]:
        other = run(case, inputs, order)
        for name, tensor in ours.items():
            assert same_bits(tensor.contiguous(), other[name].contiguous()), f"{name} in {order}"
    return plans


# One row a regime of groups against channels and positions, with sizes that fit no power of two.
REGIMES = [
    ((4, 6, 5), 6),  # BN: G = C
    ((3, 6, 7), 2),  # G | C, three channels a group
    ((2, 4, 3, 4), 12),  # C | G, three runs a channel
    ((2, 5, 6), 1),  # everything in one group
    ((3, 3, 4), 12),  # C*S groups of one position: cells of N elements
    ((2, 6, 5), 10),  # groups of 3 straddle channels of 5
    ((3, 10, 2), 4),  # groups of 5 straddle channels of 2
    ((5, 7), 7),  # no positions
    ((9, 1, 11), 1),  # one channel
    ((2, 3, 2, 2, 3), 3),  # five axes
    ((3, 16, 24), 16),  # vectors of 16 bytes in either layout, in every dtype
    ((3, 16, 24), 48),
    ((3, 16, 24), 4),
    ((2, 136, 3), 136),  # more channels than a tile of columns holds, the last tile partly filled
    ((3, 2, 1372), 2),  # runs long enough to be split among blocks, into unequal shares
    ((700, 5), 5),  # and columns
]


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", host_ops.DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("shape", "groups"), REGIMES, ids=str)
def test_batch_statistics(
    shape: tuple[int, ...], groups: int, dtype: torch.dtype, channels_last: bool
) -> None:
    check(Case(shape, groups, dtype=dtype, channels_last=channels_last))


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(
    ("shape", "groups"), [r for r in REGIMES if math.prod(r[0][1:]) > r[1]], ids=str
)
def test_sample_statistics(shape: tuple[int, ...], groups: int, channels_last: bool) -> None:
    check(Case(shape, groups, per_sample=True, channels_last=channels_last))


# Activations meet residuals and missing affines once each: all layouts share the code for them.
FUSED = [
    Case(shape, groups, act=act, residual=residual, affine=affine, dtype=dtype, channels_last=last)
    for (act, residual, affine), (shape, groups, last), dtype in itertools.product(
        [
            ("relu", True, True),
            ("relu", False, False),
            ("silu", True, False),
            ("gelu", False, True),
            ("gelu", True, True),
            ("leaky_relu", True, True),
            ("none", True, True),
        ],
        [((3, 6, 7), 6, False), ((3, 16, 8), 4, True), ((2, 6, 5), 10, False)],
        [torch.float32, torch.bfloat16],
    )
]


@pytest.mark.parametrize("case", FUSED, ids=str)
def test_fused_activation_and_residual(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("shift", [1, 3])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_unaligned_tensors(channels_last: bool, shift: int) -> None:
    """Shapes that allow 16-byte accesses at addresses that do not."""
    check(Case((3, 16, 8), 16, channels_last=channels_last, shift=shift, residual=True, act="relu"))


@pytest.mark.parametrize("sms", [1, 132])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_any_number_of_multiprocessors(channels_last: bool, sms: int) -> None:
    check(Case((4, 3, 900), 3, channels_last=channels_last, sms=sms))


@pytest.mark.parametrize("live", [0.0, 0.25])
def test_live_weight(live: float) -> None:
    """`live` scales the gradient that reaches x through the statistics; 0 is frozen statistics."""
    case = Case((3, 6, 7), 3)
    inputs = make_inputs(case)
    ours = run(case, inputs, ORDERS[0], live)
    exact = gradients(lambda i, c: exact_forward(i, c, live), inputs, case, torch.float64)
    for name in ("dx", "dweight", "dbias"):
        # torch has no such op to be measured by; twice the floor, sums of 3 * 7 terms.
        assert_close(name, ours[name], exact[name], exact[name], terms=4 * 21)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("shape", [(4, 64, 10), (3, 32, 128)], ids=str)
def test_large_mean_no_worse_than_torch(shape: tuple[int, ...], channels_last: bool) -> None:
    """mean/sigma = 1e4 in fp32, where E[x^2] - E[x]^2 has no digit left.

    The mean must be the fp32 number next to the exact one: nothing that stores it does better. Its
    rounding is what is left in y; a channel's is luck, so y is judged over many of them.
    """
    case = Case(shape, shape[1], affine=False, channels_last=channels_last)
    inputs = make_inputs(case, mean=1e4)
    ours = run(case, inputs, ORDERS[0])
    theirs, exact = torch_forward(inputs, case), exact_forward(inputs, case)
    assert torch.equal(ours["mean"], exact["mean"].float())
    for name in ("y", "rstd"):
        error, torch_error = (
            (t[name].double() - exact[name]).square().mean().sqrt().item() for t in (ours, theirs)
        )
        assert error <= torch_error, f"{name}: rms {error:.3e}, torch {torch_error:.3e}"


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4, -3e36])
@pytest.mark.parametrize("dtype", host_ops.DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_constant_channel_stays_finite(dtype: torch.dtype, value: float) -> None:
    value = max(value, -1e4) if dtype == torch.float16 else value
    case = Case((4, 3, 300), 3, dtype=dtype, act="silu", sms=16)
    inputs = make_inputs(case)
    inputs.x[:, 1] = value
    ours = run(case, inputs, ORDERS[0])
    assert all(tensor.isfinite().all() for tensor in ours.values())
    assert ours["var"][1] == 0
    assert ours["mean"][1] == inputs.x[0, 1, 0]
    assert (ours["y"][:, 1] == ours["y"][0, 1, 0]).all()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_nan_stays_in_its_cell(poison: float) -> None:
    case = Case((3, 6, 7), 3)
    inputs = make_inputs(case)
    inputs.x[1, 2, 3] = poison
    ours = run(case, inputs, ORDERS[0])
    assert ours["mean"].isfinite().tolist() == [True, False, True]
    assert ours["y"].isnan().any(dim=2).tolist() == [[False, False, True, True, False, False]] * 3
    assert ours["dx"].isnan().any(dim=2).tolist() == [[False, False, True, True, False, False]] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(
    ("momentum", "tracked"),
    [(0.1, True), (0.1, False), (0.0, True), (1.0, True), (None, True)],
)
def test_update_running(dtype: torch.dtype, momentum: float | None, tracked: bool) -> None:
    groups, count = 300, 12  # more groups than threads in a block
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return torch.rand(groups, generator=generator, dtype=dtype)

    start, batches = (draw(), draw()), [(draw(), draw()) for _ in range(3)]
    results = []
    for order in ORDERS:
        running = [t.clone() for t in start]
        exact = [t.double() for t in start]
        counter = torch.tensor(5) if tracked else None
        for step, (mean, var) in enumerate(batches):
            kernels = Kernels(MODULE, *order)
            kernels.update_running(running[0], running[1], counter, mean, var, momentum, count)
            factor = 1 / (6 + step) if momentum is None else momentum
            new = (mean.double(), var.double() * count / (count - 1))
            exact = [(1 - factor) * e + factor * n for e, n in zip(exact, new, strict=True)]
        if counter is not None:
            assert counter.item() == 8
        for name, ours, want in zip(("mean", "var"), running, exact, strict=True):
            bound = 3 * 4 * torch.finfo(dtype).eps * want.abs().max()
            assert (ours.double() - want).abs().max() <= bound, name
        results.append(running)
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))
