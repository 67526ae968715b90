"""EvalNorm: batch norm in training; in evaluation the batch a sample would have been part of."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

import fusednorm
from fusednorm import BatchNorm, EvalNorm
from fusednorm.adapt import adapt_batch_norm
from fusednorm.reference import cells
from fusednorm.reference import eval_norm as reference


def trained(dtype=torch.float32, **options):
    norm = EvalNorm(3, dtype=dtype, **options)
    nn.init.uniform_(norm.weight, 0.5, 2), nn.init.normal_(norm.bias)
    nn.init.normal_(norm.running_mean), nn.init.uniform_(norm.running_var, 0.5, 2)
    return norm


def plain(norm):
    twin = BatchNorm(3, act=norm.act, dtype=norm.weight.dtype)
    own = norm.state_dict()
    twin.load_state_dict({key: own[key] for key in twin.state_dict()})
    return twin.train(norm.training)


@pytest.mark.parametrize("size", [2, 3])
def test_it_is_the_expectation_over_the_other_samples(size):
    """Every batch a small population can make with one sample fixed, averaged: exact in float64."""
    population = torch.randn(4, 3, 5, dtype=torch.float64) * 2 + torch.randn(4, 3, 1).double() * 3
    norm = trained(torch.float64, batch_size=size).eval()
    norm.running_mean.copy_(population.mean((0, 2)))
    norm.running_var.copy_(population.var((0, 2), correction=0))
    for i in range(4):
        batches = [
            torch.stack([population[i], *(population[j] for j in others)])
            for others in itertools.product(range(4), repeat=size - 1)
        ]
        first = torch.stack([b.mean((0, 2)) for b in batches]).mean(0)
        second = torch.stack([b.square().mean((0, 2)) for b in batches]).mean(0)
        mean, var = reference.expected_statistics(
            *cells.moments(population[i : i + 1], 3, True),
            norm.running_mean, norm.running_var, norm.share(),
        )  # fmt: skip
        torch.testing.assert_close(mean[0], first)
        torch.testing.assert_close(var[0], second - first.square())
        xhat = (population[i] - first[:, None]) / (second - first**2 + norm.eps).sqrt()[:, None]
        y = norm(population[i : i + 1])[0]
        torch.testing.assert_close(y, norm.weight[:, None] * xhat + norm.bias[:, None])


@pytest.mark.parametrize("act", [None, "relu", "silu", "gelu", "leaky_relu"])
def test_training_is_batch_norm_bit_for_bit(act):
    norm = trained(batch_size=4, act=act)
    twin = plain(norm)
    for _ in range(3):
        x = torch.randn(4, 3, 5, 5)
        assert torch.equal(norm(x, x), twin(x, x))
    own = norm.state_dict()
    assert all(torch.equal(own[key], value) for key, value in twin.state_dict().items())


def test_its_two_ends():
    x, r = torch.randn(2, 6, 3, 5, 5)
    none = trained(alpha=0.0, act="silu").eval()
    torch.testing.assert_close(none(x, r), plain(none)(x, r))
    # Trained one by one: evaluation is what training did with that sample.
    one = trained(batch_size=1, act="silu").eval()
    single = torch.cat([plain(one).train()(x[i : i + 1], r[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(one(x, r), single)
    torch.testing.assert_close(one(x[2:3], r[2:3]), one(x, r)[2:3])


def test_it_is_closer_to_training_where_batches_were_small():
    """What it is for: samples differ, batches hold two, and evaluation should not feel foreign."""
    torch.manual_seed(3)
    norm = EvalNorm(3, batch_size=2, momentum=None)
    x = torch.randn(400, 3, 8) + torch.randn(400, 3, 1) * 2
    outputs = torch.cat([norm(pair) for pair in x.split(2)]).detach()
    corrected, running = norm.eval()(x), plain(norm)(x)
    gap, old_gap = ((y - outputs).square().mean() for y in (corrected, running))
    assert gap < 0.8 * old_gap
    scale, old_scale = ((y.square().mean() - 1).abs() for y in (corrected, running))
    assert scale < old_scale or scale < 0.02


def test_the_batch_size_is_measured():
    norm = EvalNorm(3)
    x = torch.randn(5, 3, 4) + 4
    torch.testing.assert_close(norm.eval()(x), plain(norm)(x))
    for n in (4, 5, 2):
        norm.train()(x[:n])
    assert norm.trained_batch == 5 and norm.share() == pytest.approx(1 / 5)
    fixed = EvalNorm(3, batch_size=5)
    fixed.load_state_dict({k: v for k, v in norm.state_dict().items() if k != "trained_batch"})
    torch.testing.assert_close(norm.eval()(x), fixed.eval()(x))
    norm.reset_running_stats()
    assert norm.trained_batch == 0


def test_learned_shares_match_training_and_touch_nothing_else():
    torch.manual_seed(0)
    norm = EvalNorm(3, alpha="learned").double()
    nn.init.normal_(norm.running_mean), nn.init.uniform_(norm.running_var, 0.5, 2)
    x = (torch.randn(4, 3, 6) + torch.randn(4, 3, 1)).double().requires_grad_()
    running = norm.running_mean.clone(), norm.running_var.clone()
    with pytest.raises(RuntimeError, match="forward in training"):
        norm.matching_loss()
    y = norm(x)
    loss = norm.matching_loss()
    # The closed form against the outputs it stands for, affine aside.
    evaluated = reference.eval_norm(x, *running, norm.share(), eps=norm.eps)
    torch.testing.assert_close(loss, (y - evaluated).square().mean())
    loss.backward()
    assert norm.alpha_logit.grad.abs() > 0
    assert x.grad is None and norm.weight.grad is None and norm.bias.grad is None
    copy.deepcopy(norm)
    # Batches of two, from a share far too small, judged on pairs it was not fitted to.
    norm = EvalNorm(3, alpha="learned", momentum=None)
    samples = torch.randn(600, 3, 8) + torch.randn(600, 3, 1)
    nn.init.constant_(norm.alpha_logit, -4.0)
    optimizer = torch.optim.SGD([norm.alpha_logit], lr=2.0)
    for pair in samples[:400].split(2):
        norm(pair)
        optimizer.zero_grad(), norm.matching_loss().backward(), optimizer.step()
    learned, losses = norm.share().item(), {}
    for share in (0.018, learned, 0.98):
        held = (cells.moments(pair, 3, True) for pair in samples[400:].split(2))
        losses[share] = sum(
            reference.matching_loss(*m, norm.running_mean, norm.running_var, share, norm.eps)
            for m in held
        )
    assert losses[learned] < 0.9 * min(losses[0.018], losses[0.98]), losses
    assert 0.2 < learned < 0.8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 7), (4, 3, 5, 6), (2, 3, 3, 4, 2)])
def test_dtypes_and_ranks(dtype, shape):
    """Half the error budget of the exact answer's own rounding to the output's dtype, and eps."""
    norm = trained(batch_size=3).eval()
    x = (torch.randn(shape) + 2).to(dtype)
    if dtype == torch.float64:
        norm = norm.double()
    exact = reference.eval_norm(
        x.double(), norm.running_mean.double(), norm.running_var.double(), 1 / 3,
        norm.weight.double(), norm.bias.double(),
    )  # fmt: skip
    y = norm(x)
    assert y.dtype == dtype and y.shape == x.shape
    allowed = 4 * torch.finfo(torch.float32 if dtype != torch.float64 else dtype).eps
    allowed += torch.finfo(dtype).eps
    assert (y.double() - exact).abs().max() < allowed * exact.abs().max() + 2 * allowed


def test_memory_format_and_autocast():
    norm = trained(batch_size=2, act="relu").eval()
    x = torch.randn(4, 3, 5, 6)
    nhwc = x.to(memory_format=torch.channels_last)
    y = norm(nhwc, nhwc)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, norm(x, x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert norm(x.bfloat16()).dtype == torch.bfloat16


def test_gradients_of_evaluation():
    norm = trained(torch.float64, alpha="learned").eval()
    x = torch.randn(3, 3, 4, dtype=torch.float64, requires_grad=True)
    inputs = (x, norm.weight, norm.bias, norm.alpha_logit)
    assert torch.autograd.gradcheck(lambda *_: norm(x), inputs)
    assert torch.autograd.gradgradcheck(lambda *_: norm(x), inputs)


@pytest.mark.parametrize("options", [{}, {"batch_size": 2}, {"alpha": "learned"}])
def test_compiles_in_one_graph(options):
    norm = trained(**options)
    x = torch.randn(4, 3, 5, 6)
    for training in (True, False):
        torch._dynamo.reset()
        expected = copy.deepcopy(norm).train(training)(x)
        compiled = torch.compile(
            copy.deepcopy(norm).train(training), fullgraph=True, backend="aot_eager"
        )
        torch.testing.assert_close(compiled(x), expected)


def test_state_dicts_and_conversion():
    for options in ({}, {"batch_size": 2}, {"alpha": "learned"}):
        theirs = nn.BatchNorm2d(3)
        theirs(torch.randn(4, 3, 5, 5))
        norm = EvalNorm(3, **options)
        norm.load_state_dict(theirs.state_dict())
        assert torch.equal(norm.running_var, theirs.running_var)
        again = EvalNorm(3, **options)
        again.load_state_dict(norm.state_dict())
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    fusednorm.convert_norm(model, lambda c: EvalNorm(c, batch_size=2))
    assert isinstance(model[1], EvalNorm)
    before = model[1].running_mean.clone()
    with adapt_batch_norm(model, torch.randn(4, 3, 5, 5)):
        assert not torch.equal(model[1].running_mean, before)
    fusednorm.revert_norm(model)
    assert type(model[1]) is nn.BatchNorm2d


def test_bad_input():
    for options, message in (
        ({"batch_size": 0}, "batch_size: expected at least 1 sample, got 0"),
        ({"alpha": 1.5}, r"alpha: expected None, 'learned' or within \[0, 1\], got 1.5"),
        ({"alpha": "online"}, "got 'online'"),
        ({"alpha": 0.5, "batch_size": 2}, "no effect beside alpha=0.5"),
        ({"track_running_stats": False}, "track_running_stats: expected True"),
        ({"act": "tanh"}, "act: expected one of"),
    ):
        with pytest.raises(ValueError, match=message):
            EvalNorm(3, **options)
    norm = trained(batch_size=2).eval()
    with pytest.raises(ValueError, match="input: expected 3 channels, got 4"):
        norm(torch.randn(2, 4, 5))
    with pytest.raises(ValueError, match="input: expected at least 2 dimensions"):
        norm(torch.randn(3))
    with pytest.raises(TypeError, match="input: expected float16"):
        norm(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="residual: expected the shape"):
        norm(torch.randn(2, 3, 5), torch.randn(2, 3, 1))
    with pytest.raises(RuntimeError, match="alpha='learned'"):
        norm.matching_loss()
    assert "batch_size=2" in repr(norm) and "alpha='learned'" in repr(EvalNorm(3, alpha="learned"))
