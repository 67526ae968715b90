"""Rung 1: the reference against golden traces, torch's own norms, and mpmath."""

from __future__ import annotations

from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fusednorm.reference import batch_group_norm, batch_norm, cells, group_norm

GOLDEN = np.load(Path(__file__).parent / "golden" / "bgn.npz", allow_pickle=False)
PREFIXES = [f"g{g}_" for g in GOLDEN["groups"]] + [
    f"largemean_g{g}_" for g in GOLDEN["largemean_groups"]
]


def golden(key: str) -> torch.Tensor:
    return torch.from_numpy(GOLDEN[key])


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("step", [0, 1])
def test_golden_trace(prefix: str, step: int) -> None:
    inputs = "largemean_" if prefix.startswith("large") else ""
    groups = int(GOLDEN[prefix + "num_groups"])
    x = golden(inputs + "x")[step].requires_grad_()
    w, b = golden("weight").requires_grad_(), golden("bias").requires_grad_()
    y, mean, var = batch_group_norm(x, groups, w, b, float(GOLDEN["eps"]))
    dx, dw, db = torch.autograd.grad(y, (x, w, b), golden("g")[step])
    got = {"mean": mean, "var": var, "out": y, "dx": dx, "dweight": dw, "dbias": db}
    for name, value in got.items():
        expected = golden(prefix + name)[step]
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("shape", [(4, 6, 5, 3), (7, 3), (2, 5, 9), (2, 3, 2, 3, 4)])
def test_one_group_a_channel_is_batch_norm(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    w, b = torch.randn(2, shape[1], dtype=torch.float64)
    ours = batch_norm(x, w, b)[0]
    theirs = F.batch_norm(x, None, None, w, b, True)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours, batch_group_norm(x, shape[1], w, b)[0], rtol=0, atol=0)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_one_sample_is_group_norm(groups: int) -> None:
    x = torch.randn(1, 6, 5, 3, dtype=torch.float64)
    w, b = torch.randn(2, 6, dtype=torch.float64)
    theirs = F.group_norm(x, groups, w, b)
    torch.testing.assert_close(batch_group_norm(x, groups, w, b)[0], theirs)
    many = torch.randn(4, 6, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(group_norm(many, groups, w, b)[0], F.group_norm(many, groups, w, b))


@pytest.mark.parametrize("groups", [6, 2, 1, 12, 4])
def test_gradients(groups: int) -> None:
    """The reference itself, first and second derivatives."""
    x = torch.randn(3, 6, 2, 2, dtype=torch.float64, requires_grad=True)
    w, b = (torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    norms = [batch_group_norm, group_norm] if 6 % groups == 0 else [batch_group_norm]
    for norm in norms:
        for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
            assert check(lambda *t, norm=norm: norm(t[0], groups, *t[1:])[0], (x, w, b))


@pytest.mark.parametrize("act", cells.ACTIVATIONS)
def test_activation_derivatives_are_torchs(act: str | None) -> None:
    """At the kink too: relu'(0) = 0, leaky_relu'(0) = slope."""
    z = torch.tensor([-3.0, -1e-3, -0.0, 0.0, 1e-3, 3.0], dtype=torch.float64, requires_grad=True)
    index = cells.activation_index(act)
    (expected,) = torch.autograd.grad(cells.activate(z, index, 0.01).sum(), z)
    torch.testing.assert_close(cells.activation_derivative(z, index, 0.01), expected)


def test_against_mpmath() -> None:
    """A mean 10^6 standard deviations away, in 50 digits: the two-pass form keeps its own."""
    x = 1e6 + torch.randn(2, 2, 3, dtype=torch.float64)
    y, mean, var = batch_group_norm(x, 3)
    with mpmath.workdps(50):
        for g in range(3):
            values = [mpmath.mpf(v) for v in x.reshape(2, 3, 2)[:, g].flatten().tolist()]
            mu = mpmath.fsum(values) / len(values)
            sigma2 = mpmath.fsum((v - mu) ** 2 for v in values) / len(values)
            z = [(v - mu) / mpmath.sqrt(sigma2 + mpmath.mpf(1e-5)) for v in values]
            # x itself is given to 1e-16 relative, that is to 1e-10 standard deviations.
            assert abs(mean[g].item() - mu) < 1e-9 and abs(var[g].item() - sigma2) < 1e-9
            got = y.reshape(2, 3, 2)[:, g].flatten().tolist()
            assert max(abs(a - b) for a, b in zip(got, z, strict=True)) < 1e-9
