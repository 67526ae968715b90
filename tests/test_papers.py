"""The papers' compositions against traces of the published code, step by step, in float64."""

from __future__ import annotations

import pytest
import torch
from fusednorm.bench import papers
from torch import nn

from traces import Trace, gradients, load, same


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def buffers(module, trace, step, names):
    state = dict(module.named_buffers())
    for name in names:
        same(state[name], trace[f"{name}_after"][step], f"{name} after step {step}")


RUNNING = ("running_mean", "running_var")


@pytest.mark.parametrize("name", ["outp_true", "outp_false", "conv3x3_stride2_groups", "burnin"])
def test_cross_iteration(name):
    """Six steps of moving weights: lost entries, a filling window, burn-in, strides, groups."""
    trace = Trace(f"cbn_{name}")
    x, weight = trace["x"], trace["w"]
    settings = {key: int(trace[key]) for key in ("stride", "padding", "groups")}
    conv = nn.Conv2d(x.shape[2], weight.shape[1], weight.shape[3], bias=False, **settings)
    norm = papers.CrossIterationBatchNorm(
        weight.shape[1],
        eps=float(trace["eps"]),
        momentum=float(trace["momentum"]),
        window=int(trace["buffer_num"]) + 1,
        rho=float(trace["rho"]),
        burn_in=int(trace["burnin"]),
        eps_outside=not int(trace["out_p"]),
    )
    load(norm, {name: trace[f"{name}_init"] for name in RUNNING})
    for t in range(len(x)):
        load(conv, {"weight": weight[t]})
        load(norm, {"weight": trace["bn_weight"][t], "bias": trace["bn_bias"][t]})
        u = x[t].clone().requires_grad_()
        y = conv(u)
        out = norm(y, u, conv)
        same(out, trace["out"][t], f"out {t}")
        found = gradients(norm, out, trace["g"][t], {"x": u, "w": conv.weight, "y": y})
        for key, golden in (
            ("x", "dx"), ("w", "dw"), ("y", "dy"), ("weight", "dbn_weight"), ("bias", "dbn_bias")
        ):  # fmt: skip
            same(found[key], trace[golden][t], f"{golden} {t}")
        buffers(norm, trace, t, RUNNING)
    load(conv, {"weight": trace["eval_w"]})
    load(norm, {"weight": trace["eval_bn_weight"], "bias": trace["eval_bn_bias"]})
    same(norm.eval()(conv(trace["eval_x"]), None, conv), trace["eval_out"], "eval_out")
    # The traces are worth something: entries were lost, but in the burn-in one.
    assert (trace["valid"] == 0).any() or name == "burnin"


@pytest.mark.parametrize(
    "prefix", ["g1_", "g2_", "g6_", "g12_", "g4_", "largemean_g2_", "largemean_g4_"]
)
def test_batch_group(prefix):
    trace = Trace("bgn", prefix)
    inputs = Trace("bgn", "largemean_" if "largemean" in prefix else "")
    eps, momentum = float(trace["eps"]), float(trace["momentum"])
    norm = papers.BatchGroupNorm(6, int(trace["num_groups"]), eps=eps, momentum=momentum)
    load(norm, {key: trace[key] for key in ("weight", "bias")})
    load(norm, {key: trace[f"{key}_init"] for key in RUNNING})
    for t in range(2):
        x = inputs["x"][t].clone().requires_grad_()
        out = norm(x)
        same(out, trace["out"][t], f"out {t}")
        for key, found in gradients(norm, out, trace["g"][t], {"x": x}).items():
            same(found, trace[f"d{key}"][t], f"d{key} {t}")
        buffers(norm, trace, t, RUNNING)
    same(norm.eval()(inputs["eval_x"]), trace["eval_out"], "eval_out")


@pytest.mark.parametrize("prefix", ["lam09_tv1_", "lam09_tv0_", "lam10_tv1_", "lam10_tv0_"])
def test_memorized(prefix):
    trace = Trace("mbn", prefix)
    norm = papers.MemorizedBatchNorm(
        5,
        eps=float(trace["eps"]),
        momentum=float(trace["momentum"]),
        memory=int(trace["k"]) - 1,
        decay=float(trace["lambda"]),
        total_variance=bool(trace["total_variance"]),
    )
    load(norm, {key: trace[key] for key in ("weight", "bias")})
    load(norm, {key: trace[f"{key}_init"] for key in RUNNING})
    seconds = trace["second_steps"].tolist()
    for t in range(len(trace["x"])):
        x = trace["x"][t].clone().requires_grad_()
        out = norm(x)
        same(out, trace["out"][t], f"out {t}")
        for key, found in gradients(norm, out, trace["g"][t], {"x": x}).items():
            same(found, trace[f"d{key}"][t], f"d{key} {t}")
        if t in seconds:
            row = seconds.index(t)
            with papers.double_forward(nn.Sequential(norm)):
                second = norm(trace["x_second"][row])
            same(second, trace["out_second"][row], f"out_second {t}")
        buffers(norm, trace, t, (*RUNNING, "memory_mean", "memory_var"))
        assert norm.fill == trace["memory_fill_after"][t]
    same(norm.eval()(trace["eval_x"]), trace["eval_out"], "eval_out")


@pytest.mark.parametrize("prefix", ["main_", "init_", "largemean_"])
def test_instance_enhancement(prefix):
    trace = Trace("iebn", prefix)
    norm = papers.InstanceEnhancementBatchNorm(
        trace["weight"].numel(), eps=float(trace["eps"]), momentum=float(trace["momentum"])
    )
    if prefix == "init_":
        for key, value in norm.named_parameters():
            same(value.detach(), trace[key], f"initial {key}")
    load(norm, {key: trace[key] for key, _ in norm.named_parameters()})
    load(norm, {key: trace[f"{key}_init"] for key in RUNNING})
    for t in range(len(trace["x"])):
        x = trace["x"][t].clone().requires_grad_()
        out = norm(x)
        same(out, trace["out"][t], f"out {t}")
        for key, found in gradients(norm, out, trace["g"][t], {"x": x}).items():
            same(found, trace[f"d{key}"][t], f"d{key} {t}")
        buffers(norm, trace, t, RUNNING)
    x = trace["eval_x"].clone().requires_grad_()
    out = norm.eval()(x)
    same(out, trace["eval_out"], "eval_out")
    for key, found in gradients(norm, out, trace["eval_g"], {"x": x}).items():
        same(found, trace[f"eval_d{key}"], f"eval_d{key}")


def test_sandwich_by_class():
    trace = Trace("sabn_gan")
    norm = papers.SandwichBatchNorm(
        6, int(trace["num_classes"]), eps=float(trace["eps"]), momentum=float(trace["momentum"])
    )
    shared = {"bn.weight": "shared_weight", "bn.bias": "shared_bias", "embed": "embed"}
    load(norm, {mine: trace[theirs] for mine, theirs in shared.items()})
    load(norm, {f"bn.{key}": trace[f"{key}_init"] for key in RUNNING})
    for t in range(2):
        x = trace["x"][t].clone().requires_grad_()
        out = norm(x, trace["ids"][t])
        same(out, trace["out"][t], f"out {t}")
        found = gradients(norm, out, trace["g"][t], {"x": x})
        same(found["x"], trace["dx"][t], f"dx {t}")
        for mine, theirs in shared.items():
            same(found[mine], trace[f"d{theirs}"][t], f"d{theirs} {t}")
        for key in RUNNING:
            same(getattr(norm.bn, key), trace[f"{key}_after"][t], f"{key} {t}")
    same(norm.eval()(trace["eval_x"], trace["eval_ids"]), trace["eval_out"], "eval_out")


def branches(norm, trace, step):
    for key in RUNNING:
        stacked = torch.stack([getattr(bn, key) for bn in norm.bns])
        same(stacked, trace[f"{key}_after"][step], f"{key} {step}")


def load_branches(norm, trace):
    for row, bn in enumerate(norm.bns):
        load(bn, {key: trace[f"{key}_init"][row] for key in RUNNING})


def test_sandwich_by_branch():
    trace = Trace("sabn_adv")
    norm = papers.SandwichAuxBatchNorm(
        5, int(trace["num_bns"]), eps=float(trace["eps"]), momentum=float(trace["momentum"])
    )
    load(norm, {"embed": trace["embed"]})
    load_branches(norm, trace)
    for t in range(3):
        x = trace["x"][t].clone().requires_grad_()
        out = norm(x, int(trace["branch"][t]))
        same(out, trace["out"][t], f"out {t}")
        for key, found in gradients(norm, out, trace["g"][t], {"x": x}).items():
            same(found, trace[f"d{key}"][t], f"d{key} {t}")
        branches(norm, trace, t)
    for branch in range(2):
        same(norm.eval()(trace["eval_x"], branch), trace["eval_out"][branch], f"eval {branch}")


def test_sandwich_by_operations():
    trace = Trace("sabn_nas")
    ops, nodes = int(trace["num_prev_ops"]), int(trace["num_prev_nodes"])
    norm = papers.SandwichNASBatchNorm(
        5, ops, nodes, eps=float(trace["eps"]), momentum=float(trace["momentum"])
    )
    load(norm, {key: trace[key] for key, _ in norm.named_parameters()})
    load_branches(norm, trace)
    for t in range(3):
        x = trace["x"][t].clone().requires_grad_()
        out = norm.normalize(x, trace["prev_op_idxs"][t].tolist(), bool(trace["first_layer"][t]))
        same(out, trace["out"][t], f"out {t}")
        for key, found in gradients(norm, out, trace["g"][t], {"x": x}).items():
            same(found, trace[f"d{key}"][t], f"d{key} {t}")
        branches(norm, trace, t)
    out = norm.eval()(trace["eval_x"], trace["eval_prev_op_idxs"].tolist())
    same(out, trace["eval_out"], "eval_out")


def test_sandwich_adain():
    trace = Trace("saadain")
    norm = papers.SandwichAdaIN(5, eps=float(trace["eps"]))
    load(norm, {key: trace[key] for key in ("shared_weight", "shared_bias")})
    inputs = {key: trace[key].clone().requires_grad_() for key in ("content", "style")}
    out = norm(*inputs.values())
    same(out, trace["out"], "out")
    for key, found in gradients(norm, out, trace["g"], inputs).items():
        same(found, trace[f"d{key}"], f"d{key}")


PROXY = {
    "weight": "gamma",
    "bias": "beta",
    "weight_proxy": "gamma_extra",
    "bias_proxy": "beta_extra",
}


@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("act", ["relu", "silu", "identity"])
@pytest.mark.parametrize("quantiles", [200, 256])
def test_proxy_activation(quantiles, act, extra):
    trace = Trace("proxynorm", f"k{quantiles}_{act}_extra{extra}_")
    norm = papers.ProxyNorm(
        5, 1, None if act == "identity" else act, num_quantiles=quantiles,
        eps_proxy=float(trace["eps_proxy"]),
    )  # fmt: skip
    same(norm.quantiles, trace[f"q_k{quantiles}"], "quantiles")
    load(norm, {mine: trace[key] for mine, key in PROXY.items() if extra or "extra" not in key})
    y = trace["y"].clone().requires_grad_()
    out = norm.activate(y)
    same(out, trace["out"], "out")
    found = gradients(norm, out, trace["g"], {"y": y})
    same(found["y"], trace["dy"], "dy")
    for mine, key in PROXY.items():
        if extra or "extra" not in key:
            same(found[mine], trace[f"d{key}"], f"d{key}")


def test_proxy_chain():
    trace = Trace("proxynorm", "chain_")
    norm = papers.ProxyNorm(5, 1, eps=float(trace["norm_eps"]))
    load(norm, {mine: trace[key] for mine, key in PROXY.items()})
    x = trace["x"].clone().requires_grad_()
    out = norm(x, None)
    same(out, trace["out"], "out")
    found = gradients(norm, out, trace["g"], {"x": x})
    for mine, key in ({"x": "x"} | PROXY).items():
        same(found[mine], trace[f"d{key}"], f"d{key}")


def test_positional_and_shortcut():
    trace = Trace("pono")
    norm = papers.PositionalNorm(eps=float(trace["eps"]))
    x, h = (trace[key].clone().requires_grad_() for key in ("x", "h"))
    out, mean, std = norm.moments(x)
    shortcut = papers.moment_shortcut(h, mean, std)
    for key, found in (("out", out), ("mean", mean), ("std", std), ("ms_out", shortcut)):
        same(found, trace[key], key)
    same(norm(x), trace["out"], "out of the module")
    both = [out, shortcut], [x, h], [trace["g_out"], trace["g_ms"]]
    dx, dh = torch.autograd.grad(*both)
    same(dx, trace["dx_both"], "dx")
    same(dh, trace["dh_ms"], "dh")


@pytest.mark.parametrize("prefix", ["t0_", "t12000_", "t40000_"])
def test_batch_renorm(prefix):
    trace = Trace("batchrenorm", prefix)
    norm = papers.BatchRenorm(5, eps=float(trace["eps"]), momentum=float(trace["momentum"]))
    load(norm, {key: trace[key] for key in ("weight", "bias")})
    state = ("running_mean", "running_std", "num_batches_tracked")
    load(norm, {key: trace[f"{key}_init"] for key in state})
    for t in range(2):
        x = trace["x"][t].clone().requires_grad_()
        out = norm(x)
        same(out, trace["out"][t], f"out {t}")
        for key, found in gradients(norm, out, trace["g"][t], {"x": x}).items():
            same(found, trace[f"d{key}"][t], f"d{key} {t}")
        buffers(norm, trace, t, state)
    same(norm.eval()(trace["eval_x"]), trace["eval_out"], "eval_out")


@pytest.mark.parametrize("prefix", ["a_", "b_"])
def test_moving_average(prefix):
    """Both gates open on the way: b_ starts at iteration 996 of the 1000 that renorm waits for."""
    trace = Trace("mabn", prefix)
    norm = papers.MovingAverageBatchNorm(
        5,
        eps=float(trace["eps"]),
        momentum=float(trace["momentum"]),
        window=int(trace["buffer_size"]),
        warm_up=int(trace["warmup_iters"]),
    )
    state = ("running_var", "buffer_x2", "buffer_gz")
    load(norm, {key: trace[f"{key}_init"] for key in (*state, "iters")})
    for t in range(len(trace["x"])):
        load(norm, {key: trace[key][t] for key in ("weight", "bias")})
        x = trace["x"][t].clone().requires_grad_()
        out = norm(x)
        same(out, trace["out"][t], f"out {t}")
        for key, found in gradients(norm, out, trace["g"][t], {"x": x}).items():
            same(found, trace[f"d{key}"][t], f"d{key} {t}")
        buffers(norm, trace, t, state)
    load(norm, {key: trace[f"eval_{key}"] for key in ("weight", "bias")})
    same(norm.eval()(trace["eval_x"]), trace["eval_out"], "eval_out")
