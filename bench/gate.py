"""Exact before fast: a provider gets a time only after it was compared with float64.

The error of a tensor is its largest deviation over the truth's largest value. PyTorch's own norm in
the same dtype, the residual and the activation as separate ops, sets the scale of what is fair.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .operands import Operands, leaves, prepare
from .registry import ACTIVATIONS, DTYPES, OPS, Case, PlainNorm, torch_norm

# Allowed: FACTOR x torch's own error + FLOOR x the tensor's machine epsilon. The floor is for torch
# being exact by luck; sums over a batch (parameter gradients) earn no more than that, since merging
# partial sums in pairs holds it.
FACTOR = 3.0
FLOOR = 8.0


@dataclass(frozen=True)
class Verdict:
    """Largest errors of the provider and of torch, and what was out of bounds, if anything."""

    max_err: float
    ref_err: float
    refusal: str | None


def results(module: nn.Module, operands: Operands, direction: str) -> dict[str, Tensor]:
    """All that the direction computes, by name: y and running statistics, or every gradient."""
    y = module(operands.x, operands.residual)
    found: dict[str, Tensor] = {}
    if direction != "backward":
        found["y"] = y.detach()
        for name, buffer in module.named_buffers():
            if "running" in name:
                found[name.rsplit(".", 1)[-1]] = buffer.clone()
    if direction != "forward":
        wanted = leaves(module, operands)
        found |= zip(wanted, torch.autograd.grad(y, [*wanted.values()], operands.dy), strict=True)
    return found


def _spare_kink(case: Case, plain: PlainNorm, exact: Operands, operands: Operands) -> None:
    """Zeroes dy where the sign of a kinked activation's argument is a matter of rounding."""
    if case.act not in ("relu", "leaky_relu"):
        return
    plain.act = ACTIVATIONS[None]
    with torch.no_grad():
        close = plain(exact.x, exact.residual).abs() < 16 * torch.finfo(operands.x.dtype).eps
    for each in (exact, operands):
        each.dy.masked_fill_(close, 0)


def truth(case: Case, operands: Operands) -> dict[str, Tensor]:
    """What float64 says; may zero a few entries of dy."""
    device = str(operands.x.device)
    exact = operands.to(torch.float64)

    def plain() -> PlainNorm:
        groups = case.op.num_groups(case.dims)
        norm = PlainNorm(case.dims[1], groups, case.op.per_sample, case.act)
        prepare(norm, device).double()
        return norm

    _spare_kink(case, plain(), exact, operands)
    return results(plain(), exact, case.direction)


def torch_error(case: Case, operands: Operands) -> dict[str, float]:
    """Error of PyTorch's own norm of the kind on the same tensors, so in their dtype and layout.

    For batch group norm, of which PyTorch has none, that is its batch norm.
    """
    if not case.op.per_sample:
        case = replace(case, op=OPS["batch_norm"])
    expected = truth(case, operands)
    own = prepare(torch_norm(case), str(operands.x.device))
    got = results(own, operands, case.direction)
    return {name: error(got[name], expected[name]) for name in expected}


def error(got: Tensor, exact: Tensor) -> float:
    """Largest deviation relative to the truth's largest value; infinite for NaN."""
    if got.shape != exact.shape:
        return float("inf")
    if not exact.numel():
        return 0.0
    scale = exact.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    worst = float((got.to(torch.float64) - exact).abs().max() / scale)
    return worst if worst == worst else float("inf")


def check(
    module: nn.Module,
    case: Case,
    operands: Operands,
    expected: dict[str, Tensor],
    own: dict[str, float],
) -> Verdict:
    """Compares a fresh module with the truth, tensor by tensor."""
    got = results(module, operands, case.direction)
    refusal, worst = None, 0.0
    for name, exact in expected.items():
        if name not in got:
            refusal = refusal or f"refused a time: {name} is missing"
            continue
        found = error(got[name], exact)
        worst = max(worst, found)
        dtype = got[name].dtype
        allowed = FACTOR * own[name] + FLOOR * torch.finfo(dtype).eps
        if name in ("y", "dx", "dresidual") and dtype != DTYPES[case.dtype]:
            refusal = refusal or f"refused a time: {name} is {dtype}, not {case.dtype}"
        if not found <= allowed:
            refusal = refusal or (
                f"refused a time: error of {name} {found:.1e} exceeds {allowed:.1e} "
                f"({FACTOR:g} x torch's own {own[name]:.1e} + {FLOOR:g} eps)"
            )
    return Verdict(worst, max(own.values()), refusal)
