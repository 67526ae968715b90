"""The papers' compositions as benchmark cases: registry, calls, extras, and what they reduce to."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from fusednorm.bench import papers
from torch import nn
from torch.nn import functional as F

from traces import load, same


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


DIMS = (6, 32, 5, 4)


def case(family, act=None, dims=DIMS):
    op = SimpleNamespace(family=family, groups=8, num_groups=lambda dims: 8)
    return SimpleNamespace(op=op, dims=dims, dtype="float64", act=act)


def reduced(family, module):
    """Sets the module to where algorithm and BatchNorm are one; True if its scale is then 1."""
    with torch.no_grad():
        if family == "instance_enhancement_batch_norm":
            module.bias_readjust.fill_(40)
        if "sandwich" in family:
            module.embed[:, :32] = 1
        if family == "batch_group_norm":
            module.__init__(32, 32)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "family",
    [
        "batch_group_norm",
        "cross_iteration_batch_norm",
        "memorized_batch_norm",
        "instance_enhancement_batch_norm",
        "sandwich_batch_norm",
        "sandwich_aux_batch_norm",
        "sandwich_nas_batch_norm",
    ],
)
def test_reduces_to_batch_norm(family, training):
    """The first step of each, its own part neutral, through the registry's builders."""
    module = papers.PAPERS[family](case(family))
    reduced(family, module)
    x = torch.randn(DIMS) * 2 + 1
    y, extras = papers.extras(case(family), x.requires_grad_())
    expected = nn.BatchNorm2d(32)
    if not training:
        module.eval(), expected.eval()
        if family == "memorized_batch_norm":
            load(module, {"memory_var": torch.ones(3, 32), "fill": torch.tensor(2)})
    same(module(y, *extras), expected(y), family)


@pytest.mark.parametrize("act", [None, "silu"])
@pytest.mark.parametrize("family", papers.PAPERS)
def test_interface(family, act):
    """Built from a case, called with extras and residual, in bfloat16 and channels last as well."""
    this = case(family, act)
    torch.set_default_dtype(torch.float32)
    module = papers.PAPERS[family](this)
    x = torch.randn(DIMS).requires_grad_()
    y, extras = papers.extras(this, x)
    plain = module(y, *extras, None)
    torch.manual_seed(1)
    residual = torch.randn(DIMS)
    if family == "proxy_norm":
        with pytest.raises(ValueError, match="residual"):
            module(y, residual)
    else:
        bare = papers.PAPERS[family](case(family))
        bare.load_state_dict(module.state_dict())
        unactivated = bare.eval()(y, *extras)
        activated = module.eval()(y, *extras, residual)
        act_of = F.silu if act else lambda z: z
        torch.testing.assert_close(activated, act_of(unactivated + residual))
    module.train()
    half = x.detach().bfloat16().to(memory_format=torch.channels_last).requires_grad_()
    y, extras = papers.extras(this, half)
    out = module(y, *extras)
    assert out.dtype == torch.bfloat16
    assert plain.dtype == torch.float32
    out.sum().backward()
    assert half.grad.isfinite().all()


@pytest.mark.parametrize("family", ["cross_iteration_batch_norm", "sandwich_adain"])
def test_exact_extras_have_the_same_values(family):
    """What float64 judges by is the rounded problem, and for a convolution still its graph."""
    this = case(family)
    x = torch.randn(DIMS).bfloat16().requires_grad_()
    y, extras = papers.extras(this, x)
    y64, extras64 = papers.exact(this, y, extras)
    assert y64.dtype == torch.float64
    torch.testing.assert_close(y64.detach(), y.detach().double(), rtol=0, atol=1e-14)
    if family == "sandwich_adain":
        assert torch.equal(extras64[0], extras[0].double())
    else:
        u, conv = extras64
        assert torch.equal(conv.weight, extras[1].weight.double())
        moment = y64.mean((0, 2, 3)).sum()
        (grad,) = torch.autograd.grad(moment, conv.weight)
        assert grad.abs().max() > 0


def test_captured_or_not():
    for family in papers.PAPERS:
        expected = family not in ("cross_iteration_batch_norm", "moving_average_batch_norm")
        module = nn.Sequential(papers.PAPERS[family](case(family)))
        assert papers.capturable(module) == expected, family


def test_history_stays_as_long_as_the_window():
    """Memory is part of what is compared: three past entries, each of the weight's size twice."""
    this = case("cross_iteration_batch_norm")
    module = papers.PAPERS[this.op.family](this)
    y, extras = papers.extras(this, torch.randn(DIMS).requires_grad_())
    fills = []
    for _ in range(papers.WARM_UP[this.op.family] + 1):
        module(y, *extras)
        fills.append(len(module.history))
    assert fills == [1, 2, 3, 3, 3]
    assert {entry.mean_grad.shape for entry in module.history} == {extras[1].weight.shape}
    with torch.no_grad():
        before = module.history
        module(y.detach(), *extras)
    assert module.history is before
