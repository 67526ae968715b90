"""Adaptation: identities, pooling, propagation, restoring, and nothing else touched."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adapt_cases import assert_same_state, images, network, statistics
from fusednorm import BatchGroupNorm, BatchNorm
from fusednorm.adapt import AdaptiveModel, adapt_batch_norm
from fusednorm.reference import adaptation as reference


# What the layer's own training mode makes of a batch is torch's business, not ours.
def as_trained(model, x):
    twin = copy.deepcopy(model)
    for module in twin:
        if hasattr(module, "running_mean"):
            module.momentum = 1.0
            module.train()
    y = twin(x)
    return y, twin


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d,
        nn.SyncBatchNorm,
        BatchNorm,
        lambda c: BatchGroupNorm(c, 2),
        lambda c: BatchGroupNorm(c, 2 * c),
    ],
    ids=["torch", "sync", "ours", "groups", "inside channels"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_none_of_the_source_is_full_replacement(norm, dtype):
    """N = 0, replacement and the first cumulative average are what training mode would store."""
    model = network(norm, dtype)
    x = torch.randn(12, 3, 8, 9, dtype=dtype) * 3 + 2 if norm is nn.SyncBatchNorm else images()
    x = x.to(dtype)
    if norm is nn.SyncBatchNorm:  # it trains on GPUs only
        model_for_truth = network(nn.BatchNorm2d, dtype)
        model_for_truth.load_state_dict(model.state_dict())
    else:
        model_for_truth = model
    expected = as_trained(model_for_truth, x)[1].eval()
    for options in ({}, {"method": "prior", "prior_strength": 0}, {"method": "ema"}):
        twin = copy.deepcopy(model)
        adapt_batch_norm(twin, x, **options)
        for key, value in statistics(twin).items():
            if "num" not in key:
                # In the first layer they agree to rounding; the second also sees the first's
                # output through biased or unbiased variances, 1/(2*count) apart.
                slack = 1e-12 if dtype == torch.float64 else 2e-6
                slack = slack if key.startswith("1.") or not options else 5e-3
                reference = expected.state_dict()[key]
                error = (value - reference).abs().max() / reference.abs().max()
                assert error < slack, (options, key, error)


@pytest.mark.parametrize("total_variance", [False, True])
def test_all_of_the_source_is_the_source_bit_for_bit(total_variance):
    model, x = network(), images()
    before, expected = statistics(model), model(x)
    with adapt_batch_norm(
        model, x, "prior", prior_strength=math.inf, total_variance=total_variance
    ) as adaptation:
        assert_same_state(model, before)
        assert torch.equal(model(x), expected)
        assert all(layer.w2 == 0 for layer in adaptation.report.layers)
    nearly = AdaptiveModel(model, "prior", prior_strength=1e15, total_variance=total_variance)
    torch.testing.assert_close(nearly(x), expected)
    assert torch.equal(AdaptiveModel(model, "prior", prior_strength=math.inf)(x), expected)


def test_prediction_time_statistics_are_training_mode_without_its_effects():
    model, x = network(), images()
    expected, before = as_trained(model, x)[0], statistics(model)
    torch.testing.assert_close(AdaptiveModel(model, "batch")(x), expected)
    with adapt_batch_norm(model, method="batch") as adaptation:
        torch.testing.assert_close(model(x), expected)
        assert "2 layers, by the last forward" in str(adaptation.report)
        torch.testing.assert_close(model(x[:5]), as_trained(model, x[:5])[0])
        assert_same_state(model, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_batches_pool_as_if_they_were_one():
    """Uneven batches weigh by their values, and cancellation costs nothing: mean 100, spread 3."""
    model = nn.Sequential(nn.BatchNorm2d(3))
    x = images(23)
    for parts in ([23], [1, 2, 20], [7, 7, 7, 2]):
        adapt_batch_norm(model, x.split(parts))
        exact = x.double().transpose(0, 1).flatten(1)
        # A float32 accumulation of 1656 values is good to about sqrt(1656)*eps.
        torch.testing.assert_close(model[0].running_mean, exact.mean(1).float(), rtol=1e-6, atol=0)
        torch.testing.assert_close(model[0].running_var, exact.var(1).float(), rtol=3e-6, atol=0)
        assert model[0].num_batches_tracked == len(parts)


def test_merging_equals_one_pass_and_the_order_does_not_matter():
    x = torch.randn(40, 3, 2, 2, dtype=torch.float64) * 1e-3 + 1e4
    whole = reference.moments(x, 3)
    parts = [reference.moments(p, 3) for p in x.split([1, 9, 30])]
    for order in ([0, 1, 2], [2, 0, 1]):
        merged = reference.merge(parts[i] for i in order)
        assert merged.size == whole.size == 160
        torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-15, atol=0)
        # The squares of 1e-3 beside a mean of 1e4: only its rounding, 1e4*eps/1e-3, is seen.
        torch.testing.assert_close(merged.m2, whole.m2, rtol=1e-8, atol=0)


def test_total_variance_is_that_of_the_mixture():
    """Against samples: N of the source and n of the target in one heap."""
    source, target = torch.randn(300, dtype=torch.float64), torch.randn(100).double() * 2 + 5
    of = [(t.mean()[None], t.var(correction=0)[None]) for t in (source, target)]
    heap = torch.cat([source, target])
    mean, var = reference.mix(of[0], of[1], 300, 100, total_variance=True)
    torch.testing.assert_close(mean[0], heap.mean())
    torch.testing.assert_close(var[0], heap.var(correction=0))


def test_wasserstein_in_one_dimension_is_the_distance_of_quantiles():
    a, b = (torch.tensor([1.0]), torch.tensor([4.0])), (torch.tensor([3.0]), torch.tensor([0.25]))
    u = torch.linspace(0, 1, 200_002, dtype=torch.float64)[1:-1]
    z = math.sqrt(2) * torch.erfinv(2 * u - 1)
    exact = ((1 + 2 * z) - (3 + 0.5 * z)).square().mean()
    torch.testing.assert_close(reference.wasserstein2(a, b)[0].double(), exact, rtol=1e-3, atol=0)


def test_sequential_and_one_shot_differ_beyond_the_first_layer():
    model, x = network(dtype=torch.float64), images(dtype=torch.float64)
    inputs = []
    hook = model[5].register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    model(x)
    hook.remove()
    one_shot = adapt_batch_norm(copy.deepcopy(model), x, propagation="one-shot").report
    twin = copy.deepcopy(model)
    adapt_batch_norm(twin, x, propagation="one-shot")
    # The second norm's input under the source statistics of the first.
    exact = inputs[0].transpose(0, 1).flatten(1)
    torch.testing.assert_close(twin[5].running_mean, exact.mean(1))
    torch.testing.assert_close(twin[5].running_var, exact.var(1))
    sequential = adapt_batch_norm(model, x).report
    torch.testing.assert_close(model[1].running_var, twin[1].running_var)
    assert not torch.allclose(model[5].running_var, twin[5].running_var, rtol=0.5)
    assert one_shot.layers[0] == sequential.layers[0]
    assert one_shot.layers[1].w2 > 2 * sequential.layers[1].w2


@pytest.mark.parametrize("method", ["replace", "prior", "ema", "batch"])
def test_the_block_restores_bit_for_bit_also_when_it_raises(method):
    model, x = network(), images()
    before = copy.deepcopy(model.state_dict())
    buffers = dict(model.named_buffers())
    given = None if method == "batch" else [x, x + 1]
    with pytest.raises(KeyError, match="ours"), adapt_batch_norm(model, given, method):
        if method != "batch":
            assert not torch.equal(model[1].running_mean, before["1.running_mean"])
        raise KeyError("ours")
    assert_same_state(model, before)
    # The very tensors: a graph or an optimizer that holds them still does.
    assert all(dict(model.named_buffers())[name] is b for name, b in buffers.items())
    adaptation = adapt_batch_norm(model, given, method)
    adaptation.restore()
    adaptation.restore()
    assert_same_state(model, before)
    with pytest.raises(RuntimeError, match="undone"), adaptation:
        pass


def test_nested_blocks_unwind():
    model, x = network(), images()
    before = statistics(model)
    with adapt_batch_norm(model, x):
        inner = statistics(model)
        with adapt_batch_norm(model, x * 2, "ema", momentum=0.3):
            assert not torch.equal(model[1].running_mean, inner["1.running_mean"])
        assert_same_state(model, inner)
    assert_same_state(model, before)


@pytest.mark.parametrize("training", [False, True])
def test_everything_else_is_left_as_found(training):
    model, x = network(), images()
    model.train(training)
    model[2].train(not training)
    model[0].weight.requires_grad_(False)
    calls = []
    model[1].register_forward_pre_hook(lambda m, args: calls.append(m.training))

    def found():
        modes = [m.training for m in model.modules()]
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
        return modes, hooks, [p.requires_grad for p in model.parameters()]

    before, parameters = found(), [p.detach().clone() for p in model.parameters()]
    random = torch.get_rng_state()
    adapt_batch_norm(model, [x, x])
    stream = AdaptiveModel(model, "prior")
    assert found() == before
    # Dropout was off: a pass that leaves no trace draws no numbers.
    assert torch.equal(random, torch.get_rng_state())
    stream(x)
    assert found() == before and calls == [False] * 3
    for p, q in zip(model.parameters(), parameters, strict=True):
        assert torch.equal(p, q) and p.grad is None


def test_gradients_reach_the_parameters_of_a_stream():
    """What entropy minimisation needs; the lent statistics are constants."""
    model, x = network(), images()
    stream = AdaptiveModel(model, "replace")
    F.cross_entropy(stream(x), torch.zeros(12, dtype=torch.long)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_stream_remembers_and_forgets():
    model, x = network(), images()
    source, before = model(x), statistics(model)
    stream = AdaptiveModel(model, "replace")
    stream(x[:4]), stream(x[4:])
    assert stream._layers[0].state.seen.size == 12 * 72
    assert stream.images == 12 and stream.batches == 2
    assert stream.report.layers[0].shift > 1
    stream.adapting = False
    frozen = stream(x)
    assert not torch.allclose(frozen, source)
    torch.testing.assert_close(stream(x[:1]), frozen[:1])
    stream.reset()
    assert torch.equal(stream(x), source)
    assert_same_state(model, before)
    assert stream.state_dict().keys() == {f"model.{key}" for key in model.state_dict()}


def test_momentum_starts_from_the_source():
    model, x = network(), images()
    before = model[1].running_mean.clone()
    stream = AdaptiveModel(nn.Sequential(model[1]), "ema", momentum=0.25)
    h = model[0](x)
    stream(h)
    mean = 0.75 * before + 0.25 * h.mean((0, 2, 3))
    torch.testing.assert_close(stream._layers[0].state.average[0].float(), mean)


def test_a_shared_layer_pools_its_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(x[:, :3]) + self.norm(x[:, 3:])

    model = Twice().eval()
    x = torch.randn(10, 6)
    adapt_batch_norm(model, x)
    torch.testing.assert_close(model.norm.running_var, torch.cat([x[:, :3], x[:, 3:]]).var(0))
