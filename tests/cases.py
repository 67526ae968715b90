"""The one generator of cases, and the one error bound, for every test of numerics.

Shapes are the awkward ones on purpose: no power of two, one sample, one position, channel counts
that no vector width divides, and groups of all four kinds: channels (G = C), whole channels
(G | C), parts of a channel (C | G), and runs that straddle channel borders.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from fusednorm.ops import Config
from fusednorm.reference import cells


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    num_groups: int
    per_sample: bool = False
    layout: str = "nchw"
    dtype: torch.dtype = torch.float32
    act: str | None = None
    residual: bool = False
    affine: bool = True
    mean: float = 0.5

    def __str__(self) -> str:
        options = [self.layout, str(self.dtype).removeprefix("torch."), self.act or "linear"]
        options += [w for w, on in (("sample", self.per_sample), ("res", self.residual)) if on]
        return "x".join(map(str, self.shape)) + f"-g{self.num_groups}-" + "-".join(options)

    @property
    def count(self) -> int:
        """Elements a cell."""
        cells_of_all = self.num_groups * (self.shape[0] if self.per_sample else 1)
        return math.prod(self.shape) // cells_of_all

    def config(self, backend: str, eps: float = 1e-5) -> Config:
        act = cells.ACTIVATIONS[self.act]
        return Config(self.num_groups, self.per_sample, eps, act, 0.01, backend)


@dataclass
class Inputs:
    x: Tensor
    dy: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None

    def tensors(self) -> list[Tensor | None]:
        return [self.x, self.weight, self.bias, self.residual]


def in_layout(t: Tensor, layout: str) -> Tensor:
    """t with dense NCHW or NHWC strides, or as a non-dense slice of something bigger."""
    if layout == "nhwc":
        return t.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "slice":
        wide = torch.empty(*t.shape[:-1], t.shape[-1] + 3, dtype=t.dtype, device=t.device)
        wide[..., 2:-1] = t
        return wide[..., 2:-1]
    return t.contiguous()


def make(case: Case, device: str = "cpu", seed: int = 0) -> Inputs:
    """Random inputs in case.dtype; parameters in float32 (float64 for float64 x)."""
    gen = torch.Generator().manual_seed(seed)
    c = case.shape[1]
    acc = cells.accumulation_dtype(case.dtype)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    spread = randn(1, c, *([1] * (len(case.shape) - 2))).exp()
    x = in_layout((case.mean + spread * randn(*case.shape)).to(case.dtype), case.layout)
    dy = in_layout(randn(*case.shape).to(case.dtype), case.layout)
    weight = (1 + 0.3 * randn(c)).to(acc) if case.affine else None
    bias = (0.3 * randn(c)).to(acc) if case.affine else None
    residual = in_layout(randn(*case.shape).to(case.dtype), case.layout) if case.residual else None
    inputs = Inputs(x, dy, weight, bias, residual)
    return Inputs(*(None if t is None else t.to(device) for t in vars(inputs).values()))


def truth(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Everything in float64 by autograd of the two-pass reference, from the rounded inputs."""
    wide = [None if t is None else t.double().cpu().requires_grad_() for t in inputs.tensors()]
    act = cells.ACTIVATIONS[case.act]
    y, mean, var = cells.normalize(*wide, case.num_groups, case.per_sample, 1e-5, act, 0.01)
    present = [t for t in wide if t is not None]
    grads = iter(torch.autograd.grad(y, present, inputs.dy.double().cpu()))
    names = ("dx", "dweight", "dbias", "dresidual")
    out = {n: next(grads) for n, t in zip(names, wide, strict=True) if t is not None}
    return out | {"y": y.detach(), "mean": mean.detach(), "var": var.detach()}


def torch_own(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """The same by torch's own norm in the case's dtype: the yardstick of the error bound.

    Groups are made batch-norm channels (or group norm's groups) by a view, the affine, the
    residual and the activation composed as a user would, each rounding to the dtype.
    """
    x, weight, bias, residual = (
        None if t is None else t.detach().clone().requires_grad_() for t in inputs.tensors()
    )
    n = x.shape[0]
    if case.num_groups == x.shape[1] and not case.per_sample:
        core = F.batch_norm(x, None, None, None, None, True)
    elif case.per_sample:
        core = F.group_norm(x.reshape(n, case.num_groups, -1), case.num_groups, eps=1e-5)
    else:
        core = F.batch_norm(x.reshape(n, case.num_groups, -1), None, None, None, None, True)
    z = core.reshape(x.shape)
    if weight is not None:
        z = z * cells.per_channel(weight.to(x.dtype), x) + cells.per_channel(bias.to(x.dtype), x)
    if residual is not None:
        z = z + residual
    y = cells.activate(z, cells.ACTIVATIONS[case.act], 0.01)
    named = {"dx": x, "dweight": weight, "dbias": bias, "dresidual": residual}
    present = {k: t for k, t in named.items() if t is not None}
    grads = torch.autograd.grad(y, list(present.values()), inputs.dy)
    return dict(zip(present, grads, strict=True)) | {"y": y.detach()}


def errors(got: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    return {
        name: (value.double().cpu() - exact[name]).abs().max().item() if value.numel() else 0.0
        for name, value in got.items()
    }


def yardstick(case: Case, inputs: Inputs, same_layout: bool) -> dict[str, float]:
    """torch's own error for the same cells; with ``same_layout`` also that of its batch norm of
    the same tensor, which on the CPU is several times larger in NHWC than in NCHW."""
    own = errors(torch_own(case, inputs), truth(case, inputs))
    if same_layout and not case.per_sample:
        plain = replace(case, num_groups=case.shape[1])
        other = errors(torch_own(plain, inputs), truth(plain, inputs))
        own = {name: max(error, other[name]) for name, error in own.items()}
    return own


def bound(
    name: str, case: Case, expected: Tensor, theirs: float, offset: float, k: float = 2.0
) -> float:
    """k x torch's own largest error, plus what rounding alone may cost.

    The floor: one unit in the last place of the largest value in the dtype the result is stored
    in; then, in the accumulation dtype, sqrt(count) roundings for a sum and 8 for a value of x's
    shape, which carries those of (x - mean), of relative size ``offset``: mean/sigma.
    """
    acc = cells.accumulation_dtype(case.dtype)
    stored = case.dtype if name in ("y", "dx", "dresidual") else acc
    scale = expected.abs().max().item() if expected.numel() else 0.0
    roundings = 8 if name in ("y", "dx", "dresidual") else math.sqrt(case.count)
    rounding = torch.finfo(acc).eps * roundings * (1 + offset)
    floor = scale * (torch.finfo(stored).eps + rounding) + rounding
    return k * theirs + floor


def check(
    case: Case,
    got: dict[str, Tensor],
    inputs: Inputs,
    k: float = 2.0,
    same_layout: bool = False,
) -> None:
    """Hold every named result to its bound against float64; name the one that misses it."""
    exact, own = truth(case, inputs), yardstick(case, inputs, same_layout)
    offset = abs(case.mean)
    if same_layout:
        # ATen's CPU kernels fold the mean into the shift: the worst cell's own mean/sigma counts.
        offset = (exact["mean"].abs() * (exact["var"] + 1e-5).rsqrt()).max().item()
    assert got, "nothing to check"
    for name, value in got.items():
        assert value.shape == exact[name].shape, f"{name}: {value.shape} != {exact[name].shape}"
        assert torch.isfinite(value).all(), f"{name}: not finite"
        error = errors({name: value}, exact)[name]
        limit = bound(name, case, exact[name], own.get(name, 0.0), offset, k)
        assert error <= limit, f"{name}: error {error:.3e} > {limit:.3e} for {case}"


_SHAPES = {
    (3, 6, 5, 4): (6, 2, 1, 12, 4),  # last two: parts of channels, straddling
    (2, 24, 7, 7): (24, 8, 24 * 49 // 7, 28),
    (4, 65, 3, 3): (65, 13, 195, 9),
    (1, 8, 6, 6): (8, 4, 16, 3),
    (5, 16): (16, 4),
    (2, 10, 9): (10, 5, 30, 18),
    (2, 4, 3, 4, 5): (4, 2, 12, 16),
}


def all_cases(dtypes: tuple[torch.dtype, ...], layouts: tuple[str, ...]) -> list[Case]:
    """Every shape x groups x layout x dtype, with activations and residuals dealt around."""
    acts = (None, "relu", "silu", "gelu", "leaky_relu")
    cases: list[Case] = []
    for shape, groups in _SHAPES.items():
        for g in groups:
            for per_sample in (False, True):
                for layout in layouts:
                    if layout == "nhwc" and len(shape) < 3:
                        continue
                    for dtype in dtypes:
                        i = len(cases)
                        case = Case(shape, g, per_sample, layout, dtype, acts[i % 5], i % 3 == 0)
                        case = replace(case, affine=i % 7 != 0)
                        if case.count > 1:
                            cases.append(case)
    return cases
