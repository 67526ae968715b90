"""Bad input to adaptation: an error that names it, and source statistics as they were."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fusednorm import BatchGroupNorm, GroupNorm
from fusednorm.adapt import AdaptiveModel, adapt_batch_norm

X = torch.randn(8, 3, 6, 6)


def network():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(2), nn.BatchNorm1d(4)
    ).eval()


def with_nan(x):
    x = x.clone()
    x[2, 1, 0, 0] = float("nan")
    return x


def labelled():
    return DataLoader(TensorDataset(X, torch.arange(8)), batch_size=4)


def broken_loader():
    yield X
    raise OSError("disk gone")


BAD = {
    "no batches": ([], {}, ValueError, "batches: expected images, got no batch at all"),
    "nothing": (None, {}, TypeError, "expected a tensor of images or an iterable.*NoneType"),
    "a path": ("images/", {}, TypeError, "iterable of such tensors, got str"),
    "labels": (labelled(), {}, TypeError, r"images alone, got a list of float32 \(4, 3, 6, 6\), "
               r"int64 \(4,\).*no labels.*for images, labels in loader"),
    "labels in a dict": ([{"x": X, "y": 1}], {}, TypeError, "got a dict.*no labels"),
    "labels alone": ([torch.arange(8)], {}, TypeError, r"got int64 \(8,\); are these labels"),
    "bytes": ([(X * 255).byte()], {}, TypeError, "uint8.*not yet scaled"),
    "one axis": ([torch.randn(8)], {}, ValueError, r"expected images \(N, C, \*\)"),
    "an empty batch": ([X, X[:0]], {}, ValueError, r"expected images, got shape \(0, 3, 6, 6\)"),
    "NaN, in the second batch": ([X, with_nan(X)], {}, ValueError, "expected finite images, got"),
    "infinity": ([X, X / 0], {}, ValueError, "expected finite images"),
    "overflow inside": ([X, X * 5e37], {}, ValueError, "input of layer 1 has values.*not finite"),
    "a loader that fails": (broken_loader(), {}, OSError, "disk gone"),
    "other channels": ([X, X[:, :2]], {}, RuntimeError, "channels"),
    "a method": ([X], {"method": "none"}, ValueError, "one of 'replace', 'prior', 'ema', 'batch'"),
    "a strength below 0": ([X], {"method": "prior", "prior_strength": -1}, ValueError,
                           "prior_strength: expected at least 0 images, got -1"),
    "a strength that is none": ([X], {"method": "prior", "prior_strength": float("nan")},
                                ValueError, "prior_strength"),
    "a strength in words": ([X], {"method": "prior", "prior_strength": "16"}, TypeError,
                            "prior_strength: expected a number"),
    "a strength without use": ([X], {"prior_strength": 4}, ValueError,
                               "prior_strength: only method='prior'.*got method='replace'"),
    "a momentum without use": ([X], {"momentum": 0.1}, ValueError, "momentum: only method='ema'"),
    "a momentum of 0": ([X], {"method": "ema", "momentum": 0.0}, ValueError, r"in \(0, 1\]"),
    "a spread without use": ([X], {"total_variance": True}, ValueError, "only method='prior'"),
    "a variance": ([X], {"variance": "sample"}, ValueError, "'biased' or 'unbiased', got 'sample'"),
    "neither": ([X], {"adapt_mean": False, "adapt_var": False}, ValueError, "at least one"),
    "a propagation": ([X], {"propagation": "deep"}, ValueError, "'sequential' or 'one-shot'"),
    "batches for batch": ([X], {"method": "batch"}, ValueError, "expected None.*forward's own"),
    "no layer chosen": ([X], {"predicate": lambda name, m: False}, ValueError,
                        "no norm layer.*in Sequential\n  1: not chosen"),
    "a forward around the norms": ([X], {"forward": lambda model, x: x}, ValueError,
                                   "no norm layer's input came by"),
    "a forward that fails": ([X], {"forward": lambda model, x: model(x) / model}, TypeError,
                             "unsupported operand"),
    "no tensor for a forward": ([{"x": 1}], {"forward": lambda model, x: x}, TypeError,
                                "expected tensors, got dict"),
}  # fmt: skip


@pytest.mark.parametrize("batches, options, kind, message", BAD.values(), ids=BAD)
def test_refused_and_nothing_changed(batches, options, kind, message):
    model = network()
    model.train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(kind, match=f"(?s){message}"):
        adapt_batch_norm(model, batches, **options)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("method", ["replace", "prior", "ema", "batch"])
def test_one_value_a_channel_has_no_variance(method):
    model = nn.Sequential(nn.BatchNorm1d(3)).eval()
    message = r"at least 2 values a statistic.*got 1, in layer 0, whose input has shape \(1, 3\)"
    with pytest.raises(ValueError, match=message):
        AdaptiveModel(model, method)(torch.randn(1, 3))
    block = pytest.raises(ValueError, match=message)
    if method == "batch":
        with block, adapt_batch_norm(model, method="batch"):
            model(torch.randn(1, 3))
        return
    with block:
        adapt_batch_norm(model, torch.randn(1, 3), method)
    assert torch.equal(model[0].running_var, torch.ones(3))
    # One more image, or one more pixel, and there is one.
    adapt_batch_norm(model, torch.randn(2, 3), method)
    adapt_batch_norm(nn.Sequential(BatchGroupNorm(4, 2)), torch.randn(1, 4), method)


def test_a_single_image_may_come_last():
    model = nn.Sequential(nn.BatchNorm1d(3)).eval()
    x = torch.randn(5, 3)
    adapt_batch_norm(model, x.split(4))
    torch.testing.assert_close(model[0].running_var, x.var(0))


@pytest.mark.parametrize(
    "model",
    [nn.Sequential(nn.Conv2d(3, 4, 3)), GroupNorm(3, 3), nn.InstanceNorm2d(3, affine=True)],
)
def test_models_without_batch_norms(model):
    for run in (lambda: adapt_batch_norm(model, X), lambda: AdaptiveModel(model)):
        with pytest.raises(ValueError, match="no norm layer with running statistics to adapt"):
            run()


def test_lazy_layers_are_named():
    with pytest.raises(ValueError, match="0: its width is not known before a first forward"):
        adapt_batch_norm(nn.Sequential(nn.LazyBatchNorm2d()), X)


def test_a_single_tensor_in_a_list_is_no_label():
    model = network()
    adapt_batch_norm(model, DataLoader(TensorDataset(X), batch_size=4))
    assert model[1].num_batches_tracked == 2


def test_a_forward_takes_any_batch():
    """With it labels may come along; images are counted by the first tensor, or the list."""
    for batch in ((X, torch.arange(8)), {"image": X, "id": [1, 2]}):
        pick = (lambda m, b: m(b[0])) if isinstance(batch, tuple) else (lambda m, b: m(b["image"]))
        assert adapt_batch_norm(network(), [batch], forward=pick).report.images == 8
    listed = list(X)
    run = adapt_batch_norm(network(), [listed], forward=lambda m, b: m(torch.stack(b)))
    assert run.report.images == 8


@pytest.mark.parametrize("bad", [with_nan(X), X * 5e37, X[:, :2], torch.arange(8)])
def test_a_stream_forgets_a_refused_batch(bad):
    model = network()
    stream, twin = AdaptiveModel(model), AdaptiveModel(model)
    stream(X), twin(X)
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        stream(bad)
    assert (stream.images, stream.batches) == (8, 1)
    assert torch.equal(stream(X + 1), twin(X + 1))


def test_a_stream_wants_a_tensor():
    with pytest.raises(TypeError, match="expected a tensor of images among the arguments"):
        AdaptiveModel(network())("x.png")
