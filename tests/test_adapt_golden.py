"""Adaptation against traces of the published code, in float64 to 1e-10."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fusednorm import BatchNorm
from fusednorm.adapt import AdaptiveModel, adapt_batch_norm
from traces import Trace, load, same

NORMS = {"torch": nn.BatchNorm2d, "sync": nn.SyncBatchNorm, "fusednorm": BatchNorm}


def source(trace, make=nn.BatchNorm2d):
    """A model of one layer with the trace's parameters and source statistics."""
    norm = make(len(trace["weight"]), eps=float(trace["eps"])).double()
    load(norm, {name: trace[name] for name in ("weight", "bias")})
    load(norm, {f"running_{kind}": trace[f"source_{kind}"] for kind in ("mean", "var")})
    return nn.Sequential(norm)


def gradient(y, x, g):
    return torch.autograd.grad(y, x, g)[0]


@pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("training", [False, True])
def test_prior(make, training):
    """A stream of three batches, in evaluation as in training mode; gradients see constants."""
    trace = Trace("bn_adapt_bayesian")
    for p, strength in enumerate(trace["N_source"].tolist()):
        model = AdaptiveModel(source(trace, make), "prior", prior_strength=strength)
        model.train(training)
        for t in range(3):
            x = trace["x"][t].requires_grad_()
            y = model(x)
            same(y, trace["out"][p, t], f"out, N={strength}, batch {t}")
            same(gradient(y, x, trace["g"][t]), trace["dx"][p, t], f"dx, N={strength}")
        # The published wrapper stops adapting after eval(); here that is asked for.
        model.eval().adapting = False
        same(model(trace["x_after_eval"]), trace["out_after_eval"][p], "the last batch's, kept")
        model.adapting = True
        stale = trace["out_after_eval"][p]
        assert math.isinf(strength) or not torch.allclose(model(trace["x_after_eval"]), stale)


def test_prior_as_a_function():
    trace = Trace("bn_adapt_bayesian")
    for p, strength in enumerate(trace["N_source"].tolist()):
        model = source(trace).eval()
        for t in range(3):
            x = trace["x"][t]
            with adapt_batch_norm(model, x, "prior", prior_strength=strength):
                same(model(x), trace["out"][p, t], f"out, N={strength}, batch {t}")


@pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("mean", [0, 1])
@pytest.mark.parametrize("var", [0, 1])
def test_partly(make, mean, var):
    trace = Trace("bn_adapt_partly")
    model = source(trace, make)
    if not (mean or var):
        with pytest.raises(ValueError, match="at least one"):
            AdaptiveModel(model, "batch", adapt_mean=False, adapt_var=False)
        return
    options = {"variance": "unbiased", "adapt_mean": bool(mean), "adapt_var": bool(var)}
    stream = AdaptiveModel(model, "batch", **options)
    for t in range(2):
        x = trace["x"][t].requires_grad_()
        y, suffix = stream(x), f"mean{mean}_var{var}"
        same(y, trace[f"out_{suffix}"][t], f"out {t}")
        same(gradient(y, x, trace["g"][t]), trace[f"dx_{suffix}"][t], f"dx {t}")
    model.eval()
    before = model(x)
    with adapt_batch_norm(model, method="batch", **options):
        same(model(x), trace[f"out_{suffix}"][t], "as a context manager")
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)
def test_ema(make):
    trace = Trace("bn_adapt_ema")
    stream = AdaptiveModel(source(trace, make), "ema")
    for t in range(3):
        x = trace["x"][t].requires_grad_()
        y = stream(x)
        same(y, trace["out"][t], f"out {t}")
        same(gradient(y, x, trace["g"][t]), trace["dx"][t], f"dx {t}")
        # All batches so far in one call of the function.
        model = source(trace, make)
        adapt_batch_norm(model, list(trace["x"][: t + 1]), "ema")
        same(model[0].running_mean, trace["running_mean_after"][t], f"running_mean {t}")
        same(model[0].running_var, trace["running_var_after"][t], f"running_var {t}")
        assert model[0].num_batches_tracked == trace["num_batches_tracked_after"][t]


@pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)
def test_replacement_in_a_network(make):
    """Benz et al.: 32 samples; deeper layers see inputs that are already adapted."""
    trace = Trace("bn_adapt_benz")
    layers: list[nn.Module] = []
    for i in (1, 2, 3):
        weight = trace[f"conv{i}_weight"]
        stride, padding = (int(trace[f"conv{i}_{key}"]) for key in ("stride", "padding"))
        conv = nn.Conv2d(weight.shape[1], weight.shape[0], 3, stride, padding, bias=False)
        norm = make(weight.shape[0], eps=float(trace["bn_eps"]))
        layers += [conv, norm, nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 4)).double()
    for i in (1, 2, 3):
        load(model[3 * i - 3], {"weight": trace[f"conv{i}_weight"]})
        load(model[3 * i - 2], {key: trace[f"bn{i}_{key}"] for key in ("weight", "bias")})
        keys = {f"running_{key}": trace[f"bn{i}_source_{key}"] for key in ("mean", "var")}
        load(model[3 * i - 2], keys)
    load(model[-1], {key: trace[f"fc_{key}"] for key in ("weight", "bias")})
    model.eval()
    same(model(trace["x_eval"]), trace["logits_eval_before"], "before")
    seen = []
    adapt_batch_norm(model, trace["x_adapt"], forward=lambda m, x: seen.append(m(x)))
    same(seen[0], trace["logits_adapt_pass"], "the pass itself")
    for i in (1, 2, 3):
        norm = model[3 * i - 2]
        same(norm.running_mean, trace[f"bn{i}_adapted_mean"], f"mean {i}")
        same(norm.running_var, trace[f"bn{i}_adapted_var"], f"var {i}")
        assert norm.num_batches_tracked == trace[f"bn{i}_num_batches_tracked_after"]
    same(model(trace["x_eval"]), trace["logits_eval_after"], "after")
