"""apex and cuDNN's graph API: stand-ins of both see that the adapters ask them for the right thing.

The stand-in of cuDNN executes the graph it was given in float64, so that what the adapter builds
is held to the gate like any provider; it knows only the words that the adapter may use.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from fusednorm.bench import peers, providers, timing
from fusednorm.bench.providers import PROVIDERS, Provider
from fusednorm.bench.registry import OPS
from torch import nn

from bench_cases import case, measured, rows_of, small_plan


@pytest.fixture(autouse=True)
def as_users_run(poisoned, monkeypatch):
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = False
    monkeypatch.setattr(timing, "copy_gb_per_s", lambda device: 10.0)


def on_cpu(name: str) -> Provider:
    return dataclasses.replace(PROVIDERS[name], missing=lambda device: None)


def install(monkeypatch, name, **members):
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        part = ".".join(parts[:end])
        if part not in sys.modules:
            monkeypatch.setitem(sys.modules, part, ModuleType(part))
    for member, value in members.items():
        monkeypatch.setattr(sys.modules[name], member, value, raising=False)


def test_what_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    for name, package in (("apex", "apex"), ("cudnn-frontend", "cudnn")):
        assert PROVIDERS[name].missing("cuda") == f"not importable: no package {package}"
        assert PROVIDERS[name].missing("cpu") == "needs a CUDA GPU"


# -- apex -----------------------------------------------------------------------------------------


class PersistentNorm(nn.Module):
    """apex.contrib.groupbn's layer: axes in the memory's order, relu at birth, z at the call."""

    def __init__(self, num_features, fuse_relu=False, bn_group=1):
        super().__init__()
        assert bn_group == 1
        self.fuse_relu = fuse_relu
        own = nn.BatchNorm2d(num_features)
        self.weight, self.bias = own.weight, own.bias
        self.register_buffer("running_mean", own.running_mean)
        self.register_buffer("running_var", own.running_var)

    def forward(self, x, z=None):
        assert x.is_contiguous(), "not NHWC memory"
        running = self.running_mean, self.running_var
        y = nn.functional.batch_norm(
            x.permute(0, 3, 1, 2), *running, self.weight, self.bias, training=True
        ).permute(0, 2, 3, 1)
        if z is not None:
            assert self.fuse_relu
            assert z.is_contiguous()
            y = y + z
        return y.relu() if self.fuse_relu else y


class FusedGroupNorm(nn.GroupNorm):
    """apex.contrib.group_norm's: the activation by name, "" for none."""

    SUPPORTED_CHANNELS = frozenset([32])

    def __init__(self, num_groups, num_channels, act=""):
        super().__init__(num_groups, num_channels)
        self.act = {"": lambda z: z, "silu": nn.functional.silu}[act]

    def forward(self, x):
        return self.act(super().forward(x))


@pytest.fixture
def apex(monkeypatch):
    install(monkeypatch, "apex.contrib.groupbn.batch_norm", BatchNorm2d_NHWC=PersistentNorm)
    install(monkeypatch, "apex.contrib.group_norm", GroupNorm=FusedGroupNorm)


def test_apex_is_asked_for_what_it_fuses(apex):
    fusions = [(None, False), ("relu", False), ("relu", True), ("silu", False)]
    provider = dataclasses.replace(on_cpu("apex"), refuses=lambda case: None)
    plan = small_plan(
        providers=[provider],
        ops=[OPS["batch_norm"], OPS["group_norm[32]"]],
        layouts=["nhwc"],
        fusions=fusions,
    )
    errors = {(r["op"], r["act"], r["residual"]): r["error"] for r in rows_of(plan)}
    for act, residual in fusions[:3]:
        assert errors["batch_norm", act, residual] is None
    assert errors["group_norm[32]", None, False] is None
    assert errors["group_norm[32]", "silu", False] is None
    # Had it not refused, the gate would have: silu was not fused.
    assert errors["batch_norm", "silu", False].startswith("refused a time")


@pytest.mark.parametrize(
    ("op", "changes", "word"),
    [
        ("batch_norm", {"layout": "nchw"}, "NHWC"),
        ("batch_norm", {"dims": (8, 32), "layout": "nhwc"}, "NHWC"),
        ("batch_norm", {"dtype": "bfloat16"}, "float16 only"),
        ("batch_norm", {"act": "silu"}, "relu"),
        ("batch_norm", {"residual": True}, "relu"),
        ("group_norm[32]", {"act": "relu"}, "silu"),
        ("group_norm[32]", {"dtype": "float64"}, "float64"),
        ("group_norm[32]", {"dims": (2, 64, 4, 4)}, "channels"),
        ("batch_norm", {"act": "relu", "residual": True}, None),
        ("group_norm[32]", {"act": "silu", "dtype": "bfloat16"}, None),
    ],
)
def test_apex_refuses_what_it_would_hand_on(apex, op, changes, word):
    given = case(op, **({"layout": "nhwc", "dtype": "float16"} | changes))
    reason = peers.apex_refuses(given)
    assert (reason is None) if word is None else (word in reason)


def test_apex_without_its_compiled_parts_is_a_reason():
    for op, dtype in (("batch_norm", "float16"), ("group_norm[32]", "bfloat16")):
        reason = peers.apex_refuses(case(op, layout="nhwc", dtype=dtype))
        assert reason.startswith("not importable: No module named 'apex")


# -- cuDNN ----------------------------------------------------------------------------------------


class Symbol:
    def __init__(self, graph, value=None):
        self.graph, self.value, self.output = graph, value, False

    def set_output(self, output):
        self.output = output
        return self

    def set_data_type(self, kind):
        assert kind in ("half", "float", "bfloat16", "boolean")
        return self


class Graph:
    """A list of steps over symbols, run in float64 on `execute`."""

    def __init__(self, **kinds):
        assert kinds["compute_data_type"] == kinds["intermediate_data_type"] == "float"
        assert kinds["handle"] == "handle"
        self.steps, self.inputs, self.outputs, self.finished = [], [], [], []

    def tensor_like(self, tensor):
        self.inputs.append(Symbol(self))
        return self.inputs[-1]

    def _add(self, count, compute):
        made = [Symbol(self) for _ in range(count)]
        self.outputs += made
        self.steps.append((made, compute))
        return made if count > 1 else made[0]

    def batchnorm(
        self, name, input, scale, bias, in_running_mean, in_running_var, epsilon, momentum
    ):
        def compute():
            x, eps, m = input.value, epsilon.value.item(), momentum.value.item()
            assert epsilon.value.device.type == "cpu"
            var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
            inv = torch.rsqrt(var + eps)
            count = x.numel() // x.shape[1]
            unbiased = var * count / (count - 1)
            y = (x - mean) * inv * scale.value + bias.value
            new = [(1 - m) * in_running_mean.value + m * mean]
            return [y, mean, inv, *new, (1 - m) * in_running_var.value + m * unbiased]

        return self._add(5, compute)

    def batchnorm_inference(self, input, mean, inv_variance, scale, bias):
        def compute():
            y = (input.value - mean.value) * inv_variance.value
            return [y * scale.value + bias.value]

        return self._add(1, compute)

    def batchnorm_backward(self, name, grad, input, scale, mean, inv_variance):
        def compute():
            g, inv = grad.value, inv_variance.value
            xhat = (input.value - mean.value) * inv
            axes = (0, 2, 3)
            dscale, dbias = (g * xhat).sum(axes, True), g.sum(axes, True)
            count = g.numel() // g.shape[1]
            dx = scale.value * inv * (g - dbias / count - xhat * dscale / count)
            return [dx, dscale, dbias]

        return self._add(3, compute)

    def relu(self, name, input):
        return self._add(1, lambda: [input.value.relu()])

    def add(self, name, a, b):
        return self._add(1, lambda: [a.value + b.value])

    def cmp_gt(self, name, input, comparison):
        return self._add(1, lambda: [input.value > comparison.value])

    def scale(self, name, input, scale):
        return self._add(1, lambda: [input.value * scale.value])

    def relu_backward(self, loss, input):
        return self._add(1, lambda: [loss.value * (input.value > 0)])

    def _mark(self, name):
        self.finished.append(name)

    def validate(self):
        self._mark("validate")

    def build_operation_graph(self):
        self._mark("operations")

    def create_execution_plans(self, modes):
        assert modes == ["a", "fallback"]
        self._mark("plans")

    def check_support(self):
        self._mark("support")

    def build_plans(self):
        self._mark("built")

    def get_workspace_size(self):
        assert self.finished == ["validate", "operations", "plans", "support", "built"]
        return 16

    def execute(self, pack, workspace, handle):
        assert (workspace.nbytes, workspace.dtype, handle) == (16, torch.uint8, "handle")
        wanted = {symbol for symbol in self.outputs if symbol.output}
        assert set(pack) == {*self.inputs} | wanted, "tensors missing, or too many"
        for symbol in self.inputs:
            value = pack[symbol]
            symbol.value = value if value.dtype == torch.bool else value.double()
        for made, compute in self.steps:
            for symbol, value in zip(made, compute(), strict=True):
                symbol.value = value
        for symbol in wanted:
            pack[symbol].copy_(symbol.value)


@pytest.fixture
def cudnn(monkeypatch):
    streams = []
    kinds = {"HALF": "half", "BFLOAT16": "bfloat16", "FLOAT": "float", "BOOLEAN": "boolean"}
    install(
        monkeypatch,
        "cudnn",
        data_type=SimpleNamespace(**kinds),
        heur_mode=SimpleNamespace(A="a", FALLBACK="fallback"),
        create_handle=lambda: "handle",
        set_stream=lambda handle, stream: streams.append((handle, stream)),
        pygraph=Graph,
    )
    stream = SimpleNamespace(cuda_stream=42)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    return streams


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fusion", [(None, False), ("relu", False), ("relu", True)])
def test_cudnn_frontends_graphs_are_the_norm(cudnn, dtype, fusion):
    rows = measured(
        on_cpu("cudnn-frontend"),
        dtypes=[dtype],
        fusions=[fusion],
        layouts=["nchw", "nhwc"],
        directions=["forward", "backward", "both"],
    )
    assert len(rows) == 6
    assert [row["error"] for row in rows] == [None] * 6
    assert set(cudnn) == {("handle", 42)}


def test_what_cudnn_does_not_support_is_a_row(cudnn, monkeypatch):
    class Unsupported(RuntimeError):
        pass

    def check_support(self):
        raise Unsupported("No valid engine configs")

    monkeypatch.setattr(Graph, "check_support", check_support)
    (row,) = measured(on_cpu("cudnn-frontend"))
    assert row["error"] == "Unsupported: No valid engine configs"


def test_cudnn_frontend_refuses_what_it_has_no_graph_for():
    assert peers.cudnn_frontend_refuses(case(act="silu")) is not None
    assert peers.cudnn_frontend_refuses(case(residual=True)) is not None
    assert peers.cudnn_frontend_refuses(case(dims=(8, 32))) is not None
    assert peers.cudnn_frontend_refuses(case(dtype="float64")) is not None
    assert peers.cudnn_frontend_refuses(case(act="relu", residual=True)) is None


# -- torch.compile --------------------------------------------------------------------------------


def test_compilers_settings_hold_where_the_module_is_built_and_run():
    settings = torch._inductor.config
    seen = {}
    for name in ("compile", "compile-max-autotune", "compile-cooperative"):
        with PROVIDERS[name].switch():
            seen[name] = (
                settings.max_autotune,
                settings.triton.cooperative_reductions,
                torch._functorch.config.donated_buffer,
                torch._dynamo.config.fail_on_recompile_limit_hit,
            )
    assert seen == {
        "compile": (False, False, False, True),
        "compile-max-autotune": (True, False, False, True),
        "compile-cooperative": (False, True, False, True),
    }
    assert not settings.triton.cooperative_reductions
    assert not settings.max_autotune


def test_what_is_compiled_stays_compiled(monkeypatch):
    """Past eight modules of one forward torch.compile gives up, and the row would be eager's."""
    compiled = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", compiled)
    torch.compiler.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    provider = PROVIDERS["compile"]
    with provider.switch(), torch.no_grad():
        modules = [provider.build(case("memorized_batch_norm")) for _ in range(12)]
        for module in modules:
            module(torch.randn(2, 32, 6, 4))
    assert graphs["unique_graphs"] >= 12


def test_no_compiler_is_handed_what_another_compiled(monkeypatch):
    """Where torch cannot keep modules apart, dynamo tells backends by their options alone."""
    from torch._inductor import compile_fx

    seen = []
    monkeypatch.setattr(providers, "_APART", {})
    monkeypatch.setattr(
        compile_fx,
        "compile_fx",
        lambda graph, inputs, **rest: seen.append(rest["config_patches"]) or graph.forward,
    )
    torch.compiler.reset()
    names = ("compile", "compile-max-autotune", "compile-cooperative")
    for name in names:
        with PROVIDERS[name].switch(), torch.no_grad():
            PROVIDERS[name].build(case("batch_norm"))(torch.randn(2, 32, 6, 4))
    assert len(seen) == len(names)
    torch.compiler.reset()


def test_what_keeps_its_history_on_the_host_is_not_compiled():
    reason = PROVIDERS["compile"].refuses(case("cross_iteration_batch_norm"))
    assert "history on the host" in reason
    assert PROVIDERS["compile"].refuses(case("memorized_batch_norm")) is None
    assert not PROVIDERS["eager"].captures(case("cross_iteration_batch_norm"))
