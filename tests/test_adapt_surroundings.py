"""Adaptation under inference_mode, autocast and compile; its report; layers of other packages."""

from __future__ import annotations

import copy
import json
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adapt_cases import assert_same_state, images, network, statistics
from fusednorm import GroupNorm
from fusednorm.adapt import AdaptiveModel, Handler, adapt_batch_norm, register
from fusednorm.adapt.batches import reporter


@pytest.mark.parametrize("wrap", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", ["replace", "prior", "ema"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_under_inference_mode(wrap, method, dtype):
    model, x = network(dtype=dtype), images(dtype=dtype)
    expected = copy.deepcopy(model)
    adapt_batch_norm(expected, [x, x + 1], method)
    with wrap():
        adapt_batch_norm(model, [x, x + 1], method)
    assert_same_state(model, statistics(expected))
    model(x).sum().backward()
    # A stream that began under inference mode goes on with gradients, frozen or not.
    stream = AdaptiveModel(model, method)
    with wrap():
        stream(x)
    stream.adapting = False
    stream(x).sum().backward()
    stream.adapting = True
    stream(x).sum().backward()


def test_under_autocast():
    model, x = network(), images() - 98
    expected = copy.deepcopy(model)
    adapt_batch_norm(expected, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        adapt_batch_norm(model, x)
        assert AdaptiveModel(model, "batch")(x).dtype == torch.bfloat16
    for key, value in statistics(model).items():
        assert value.dtype == expected.state_dict()[key].dtype
        # bfloat16 keeps 8 bits; statistics average its rounding away.
        torch.testing.assert_close(value, expected.state_dict()[key], rtol=2e-2, atol=2e-2)


def compiled_whole(model):
    return torch.compile(model, backend="aot_eager")


def compiled_in_place(model):
    model.compile(backend="aot_eager")
    return model


def compiled_inside(model):
    return nn.Sequential(torch.compile(model, backend="aot_eager"))


@pytest.mark.parametrize("compiled", [compiled_whole, compiled_in_place, compiled_inside])
def test_compiled_models(compiled):
    """Traced before, when no hook was there; their graphs read the new statistics afterwards."""
    torch._dynamo.reset()
    model, x = network(), images()
    eager = copy.deepcopy(model)
    fast = compiled(model)
    with torch.no_grad():
        source = fast(x)
        torch.testing.assert_close(source, eager(x))
        with adapt_batch_norm(fast, x), adapt_batch_norm(eager, x):
            torch.testing.assert_close(fast(x), eager(x))
            assert not torch.allclose(fast(x), source, rtol=0.1)
        torch.testing.assert_close(fast(x), source)
        expected = AdaptiveModel(eager, "batch")(x)
        torch.testing.assert_close(AdaptiveModel(fast, "batch")(x), expected)
        wrapper = torch.compile(AdaptiveModel(eager, "batch"), backend="aot_eager")
        torch.testing.assert_close(wrapper(x), expected)
        with pytest.raises(ValueError, match="compiled.*AdaptiveModel"):
            adapt_batch_norm(fast, method="batch")


def test_a_wrapper_is_copied_and_pickled_with_its_stream():
    stream, x = AdaptiveModel(network(), "ema", momentum=0.5), images()
    stream(x)
    for twin in (copy.deepcopy(stream), pickle.loads(pickle.dumps(stream))):
        assert torch.equal(twin(x + 1), copy.deepcopy(stream)(x + 1))
        assert twin._layers[0].module is twin.model[1]


def test_the_report(tmp_path):
    """Known shifts: the mean by two standard deviations, the variance by e^3."""
    norm = nn.BatchNorm1d(4).double().eval()
    nn.init.normal_(norm.running_mean), nn.init.uniform_(norm.running_var, 0.5, 2)
    sigma = norm.running_var.sqrt()
    z = torch.randn(64, 4, dtype=torch.float64)
    z = (z - z.mean(0)) / z.std(0)
    x = norm.running_mean + 2 * sigma + z * sigma * math.exp(1.5)
    model = nn.ModuleDict({"first": norm, "unused": nn.BatchNorm2d(3), "frozen": GroupNorm(4, 2)})
    before = norm.running_var.clone()
    report = adapt_batch_norm(model, x, forward=lambda m, x: m["first"](x)).report
    (layer,) = report.layers
    assert (layer.name, layer.kind, layer.statistics) == ("first", "BatchNorm1d", 4)
    assert layer.shift == pytest.approx(2)
    assert layer.log_ratio == pytest.approx(3)
    expected = math.sqrt(4 + (math.exp(1.5) - 1) ** 2)
    assert layer.relative_w2 == pytest.approx(expected)
    assert layer.w2 == pytest.approx(expected * float(before.sum().sqrt()))
    assert (report.images, report.batches) == (64, 1)
    assert report.kept == {"unused": "no input came to it"}
    text = str(report)
    assert "first" in text and "2.000" in text and "no input" in text
    assert json.loads(json.dumps(report.rows()))[0]["name"] == "first"
    figure = report.plot(tmp_path / "moved.png")
    assert (tmp_path / "moved.png").read_bytes().startswith(b"\x89PNG")
    drawn = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}
    assert list(drawn.values()) == [[layer.relative_w2], [layer.shift], [layer.log_ratio]]


def test_progress(capsys):
    model, x = network(), images()
    told = []
    adapt_batch_norm(model, x.split(4), progress=lambda *what: told.append(what))
    assert told == [(1, 3, 4), (2, 3, 8), (3, 3, 12)]
    adapt_batch_norm(model, iter(x.split(4)), progress=lambda *what: told.append(what))
    assert told[-1] == (3, None, 12)
    adapt_batch_norm(model, x.split(4))
    assert capsys.readouterr().err == "", "no terminal, no line"
    adapt_batch_norm(model, x.split(4), progress=True)
    said = capsys.readouterr().err
    assert "batch 3/3, 12 images" in said and said.endswith("\n")
    assert reporter(False)(1, 1, 1) is None


def test_predicate_and_norms_without_statistics():
    model, x = network(), images()
    model[1] = nn.BatchNorm2d(8, track_running_stats=False)
    before = statistics(model)
    report = adapt_batch_norm(model, x).report
    assert [layer.name for layer in report.layers] == ["5"] and "as it is" in report.kept["1"]
    model = network()
    before = statistics(model)
    report = adapt_batch_norm(model, x, predicate=lambda name, m: name == "1").report
    assert report.kept == {"5": "not chosen by the predicate"}
    assert torch.equal(model[5].running_mean, before["5.running_mean"])
    assert not torch.equal(model[1].running_mean, before["1.running_mean"])


class Duck(nn.Module):
    """Frozen batch norm as detection models have it: buffers alone."""

    def __init__(self, channels):
        super().__init__()
        self.eps = 1e-5
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, None, None, False, 0, self.eps)


class OddNorm(nn.Module):
    """Evaluates with statistics under names of its own."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("centre", torch.zeros(channels))
        self.register_buffer("spread", torch.ones(channels))

    def forward(self, x):
        return F.batch_norm(x, self.centre, self.spread, None, None, False, 0, 1e-5)


class OddHandler(Handler):
    names = ("centre", "spread")


def test_other_layers_join_by_their_buffers_or_a_handler():
    x = images()
    for make in (Duck, OddNorm):
        model = nn.Sequential(make(3))
        if make is OddNorm:
            with pytest.raises(ValueError, match="no norm layer"):
                adapt_batch_norm(model, x)
            register(OddNorm, OddHandler())
        before = copy.deepcopy(model.state_dict())
        expected = F.batch_norm(x, None, None, training=True)
        with adapt_batch_norm(model, x, variance="biased"):
            torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4)
        assert_same_state(model, before)
        torch.testing.assert_close(AdaptiveModel(model, "batch")(x), expected, rtol=1e-3, atol=1e-4)
