"""Exact before fast: a provider gets a time only after it was compared with float64.

The error of a tensor is its largest deviation over the truth's largest value. PyTorch's own norm in
the same dtype, the residual and the activation as separate ops, sets the scale of what is fair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import plain
from .operands import Operands, last_names, leaves, prepare, settle
from .registry import DTYPES, Case

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
    y = module(*operands.arguments())
    found: dict[str, Tensor] = {}
    if direction != "backward":
        running = last_names((n, b) for n, b in module.named_buffers() if "running" in n)
        found |= {"y": y.detach(), **{name: buffer.clone() for name, buffer in running.items()}}
    if direction != "forward":
        wanted = leaves(module, operands)
        gradients = torch.autograd.grad(y, [*wanted.values()], operands.dy, materialize_grads=True)
        found |= zip(wanted, gradients, strict=True)
    return found


def _spare_kink(case: Case, exact: Operands, operands: Operands) -> None:
    """Zeroes dy where the sign of a kinked activation's argument is a matter of rounding."""
    if case.act not in ("relu", "leaky_relu"):
        return
    argument = prepare(plain.argument(case), str(operands.x.device)).double()
    close = argument(*exact.arguments()).detach().abs() < 16 * torch.finfo(operands.x.dtype).eps
    for each in (exact, operands):
        each.dy.masked_fill_(close, 0)


def truth(case: Case, operands: Operands, history: Sequence[Operands] = ()) -> dict[str, Tensor]:
    """What float64 says after the calls of `history`; may zero a few entries of dy."""
    exact = operands.exact(case)
    _spare_kink(case, exact, operands)
    judge = prepare(plain.judge(case), str(operands.x.device)).double()
    settle(judge, (past.exact(case) for past in history))
    return results(judge, exact, case.direction)


def torch_error(
    case: Case,
    operands: Operands,
    expected: dict[str, Tensor],
    history: Sequence[Operands] = (),
) -> dict[str, float]:
    """Error of PyTorch's own norm of the kind on the same tensors, so in their dtype and layout.

    For norms that exist as a paper's code alone, that code. See `plain.standard`.
    """
    own = prepare(plain.fair(case), str(operands.x.device))
    got = results(settle(own, history), operands, case.direction)
    return errors(got, expected)


def error(got: Tensor, exact: Tensor, least: float = 0.0) -> float:
    """Largest deviation relative to the truth's largest value, or to `least` if that is larger;
    infinite for NaN."""
    if got.shape != exact.shape:
        return float("inf")
    if not exact.numel():
        return 0.0
    scale = exact.abs().max().clamp_min(max(least, torch.finfo(torch.float64).tiny))
    worst = float((got.to(torch.float64) - exact).abs().max() / scale)
    return worst if worst == worst else float("inf")


def errors(got: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """The error of each tensor that was found.

    A parameter's gradient that vanishes, as a shift's does before another norm, is all rounding;
    it is held to the size of the others.
    """
    sizes = {name: float(t.abs().max()) for name, t in expected.items() if t.numel()}
    gradients = [size for name, size in sizes.items() if name.startswith("d") and name != "dx"]
    usual = max(gradients, default=0.0)
    vanished = {n for n, size in sizes.items() if n.startswith("d") and size < 1e-10 * usual}
    return {
        name: error(got[name], exact, usual if name in vanished else 0.0)
        for name, exact in expected.items()
        if name in got
    }


def check(
    module: nn.Module,
    case: Case,
    operands: Operands,
    expected: dict[str, Tensor],
    own: dict[str, float],
) -> Verdict:
    """Compares a fresh module with the truth, tensor by tensor."""
    got = results(module, operands, case.direction)
    found, refusal = errors(got, expected), None
    for name in expected:
        if name not in found:
            refusal = refusal or f"refused a time: {name} is missing"
            continue
        dtype = got[name].dtype
        allowed = FACTOR * own[name] + FLOOR * torch.finfo(dtype).eps
        if name in ("y", "dx", "dresidual") and dtype != DTYPES[case.dtype]:
            refusal = refusal or f"refused a time: {name} is {dtype}, not {case.dtype}"
        if not found[name] <= allowed:
            refusal = refusal or (
                f"refused a time: error of {name} {found[name]:.1e} exceeds {allowed:.1e} "
                f"({FACTOR:g} x torch's own {own[name]:.1e} + {FLOOR:g} eps)"
            )
    return Verdict(max(found.values(), default=0.0), max(own.values()), refusal)
