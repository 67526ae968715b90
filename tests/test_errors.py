"""Bad input: a clear error naming the argument, before anything is launched or changed."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import pytest
import torch

import fusednorm
import fusednorm.functional as FF
from fusednorm import BatchGroupNorm, BatchNorm, GroupNorm
from fusednorm.ops.backend import null_launch

X = torch.randn(4, 6, 5, 5)


def stats(groups: int = 6) -> dict[str, torch.Tensor]:
    return {"running_mean": torch.zeros(groups), "running_var": torch.ones(groups)}


BGN_ERRORS = {
    "rank": (X[0, 0, 0], 6, {}, ValueError, "input: expected at least 2 dimensions.*got 1"),
    "groups": (X, 7, {}, ValueError, "num_groups: expected a divisor of 150.*got 7"),
    "no groups": (X, 0, {}, ValueError, "num_groups: expected a divisor of 150.*got 0"),
    "integers": (X.long(), 6, {}, TypeError, "input: expected float16.*got torch.int64"),
    "complex": (X.cfloat(), 6, {}, TypeError, "input: expected float16.*got torch.complex64"),
    "weight": (X, 6, {"weight": torch.ones(5)}, ValueError, r"weight: expected shape \(6,\).*5"),
    "weight rank": (X, 6, {"weight": torch.ones(1, 6)}, ValueError, r"weight: .*got \(1, 6\)"),
    "bias": (X, 6, {"bias": torch.ones(3)}, ValueError, r"bias: expected shape \(6,\)"),
    "bias dtype": (X, 6, {"bias": torch.ones(6).int()}, TypeError, "bias: expected a floating"),
    "residual": (X, 6, {"residual": X[:2]}, ValueError, r"residual: .*\(4, 6, 5, 5\).*\(2,"),
    "residual dtype": (X, 6, {"residual": X.half()}, TypeError, "residual: .*float32.*float16"),
    "running": (X, 6, stats(3), ValueError, r"running_mean: expected shape \(6,\), num_groups"),
    "one running": (X, 6, {"running_mean": torch.zeros(6)}, ValueError, "both or neither"),
    "act": (X, 6, {"act": "tanh"}, ValueError, "act: expected one of None, 'relu'.*got 'tanh'"),
    "one value": (X[:1, :, :1, :1], 6, stats(), ValueError, "more than 1 value per cell.*got 1"),
    "empty batch": (X[:0], 6, stats(), ValueError, "more than 1 value per cell.*got 0"),
    "device": (X, 6, {"weight": torch.ones(6, device="meta")}, RuntimeError, "weight: .*cpu.*meta"),
    "residual device": (X, 6, {"residual": X.to("meta")}, RuntimeError, "residual: .*cpu.*meta"),
    "groups type": (X, 2.0, {}, ValueError, "num_groups: expected a divisor of 150.*got 2.0"),
    "act type": (X, 6, {"act": ["relu"]}, ValueError, r"act: expected one of.*got \['relu'\]"),
    "eps": (X, 6, {"eps": -1.0}, ValueError, "eps: expected at least 0, got -1.0"),
    "running grad": (
        X, 6, stats() | {"running_mean": torch.zeros(6, requires_grad=True)},
        ValueError, "running_mean: expected a buffer",
    ),
    "running dtypes": (
        X, 6, stats() | {"running_var": torch.ones(6).double()},
        TypeError, "running_var: expected the dtype of running_mean torch.float32.*float64",
    ),
    "momentum type": (X, 6, stats() | {"momentum": "a"}, TypeError, "momentum: expected a float"),
    "counter": (
        X, 6, stats() | {"num_batches_tracked": torch.zeros(3, dtype=torch.int64)},
        ValueError, r"num_batches_tracked: expected one int64, got shape \(3,\)",
    ),
    "counter device": (
        X, 6, stats() | {"num_batches_tracked": torch.zeros((), dtype=torch.int64, device="meta")},
        RuntimeError, "num_batches_tracked: expected device cpu, got meta",
    ),
    "momentum": (X, 6, stats() | {"momentum": None}, ValueError, "needs num_batches_tracked"),
}  # fmt: skip


@pytest.fixture(params=["composition", "compiled"])
def checks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Who checks: Python, or C++ with Python's words for what it refused."""
    with null_launch() if request.param == "compiled" else contextlib.nullcontext():
        yield


@pytest.mark.parametrize("name", BGN_ERRORS)
def test_batch_group_norm(name: str, checks: None) -> None:
    x, groups, options, error, message = BGN_ERRORS[name]
    running = stats()
    options = dict(options)
    if "running_mean" in options:
        running = {k: v for k, v in options.items() if k.startswith("running")}
        options = {k: v for k, v in options.items() if not k.startswith("running")}
    before = {k: v.detach().clone() for k, v in running.items()}
    with pytest.raises(error, match=re.compile(message, re.S)):
        FF.batch_group_norm(x, groups, **(running | options), training=True)
    for key, value in running.items():
        assert torch.equal(value, before[key]), f"{key} changed although the call failed"


def test_evaluation_needs_statistics() -> None:
    with pytest.raises(ValueError, match="must be given when not training"):
        FF.batch_norm(X, None, None)


@pytest.mark.parametrize("groups", [0, 4, 5, 7, -2])
def test_group_norm_groups(groups: int, checks: None) -> None:
    with pytest.raises(ValueError, match=f"num_groups: .*divisor of the 6 channels.*got {groups}"):
        FF.group_norm(X, groups)
    with pytest.raises(ValueError, match="num_groups"):
        GroupNorm(6, groups)


def test_group_norm_takes_an_empty_batch_and_refuses_single_values(checks: None) -> None:
    assert FF.group_norm(X[:0], 3).shape == (0, 6, 5, 5)
    with pytest.raises(ValueError, match="more than 1 value per cell"):
        FF.group_norm(torch.randn(4, 6), 6)


def test_evaluation_takes_an_empty_batch() -> None:
    for norm in (BatchNorm(6), BatchGroupNorm(6, 2), BatchGroupNorm(6, 4)):
        assert norm.eval()(torch.randn(0, 6, 2, 2)).shape == (0, 6, 2, 2)


@pytest.mark.parametrize("make", [BatchNorm, lambda *a: BatchGroupNorm(6, 2)])
def test_a_failed_call_leaves_the_module_as_it_was(make, checks: None) -> None:
    norm = make(6)
    for bad in (torch.randn(1, 6), torch.randn(3, 5, 2, 2), X.int(), X[:0]):
        if bad.shape == (1, 6) and norm.num_groups != 6:
            continue
        with pytest.raises((ValueError, TypeError)):
            norm(bad)
    assert norm.num_batches_tracked == 0
    assert torch.equal(norm.running_var, torch.ones(norm.num_groups))


def test_width_is_checked_without_parameters(checks: None) -> None:
    norm = BatchGroupNorm(12, 4, affine=False)
    with pytest.raises(ValueError, match="input: expected 12 channels, got 8"):
        norm(torch.randn(2, 8, 3, 3))
    assert norm.num_batches_tracked == 0


@pytest.mark.parametrize("arguments", [(0, 1), (6, 0), (-3, 1)])
def test_module_sizes(arguments: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="expected at least 1"):
        BatchGroupNorm(*arguments)


def test_unknown_activation_is_refused_at_construction() -> None:
    for make in (BatchNorm, lambda c, act: GroupNorm(c, 2, act=act)):
        with pytest.raises(ValueError, match="act: expected one of.*got 'mish'"):
            make(6, act="mish")


def test_unavailable_backends_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusednorm.ops import backend as choice

    monkeypatch.setattr(choice, "_choice", "triton")
    monkeypatch.setattr(choice, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="'triton' takes CUDA tensors, got input on cpu"):
        FF.batch_norm(X, None, None, training=True)
    monkeypatch.setattr(choice, "NATIVE_MISSING", "the compiled library does not load: why")
    missing = pytest.raises(RuntimeError, match="'cuda' is not available: .* does not load: why")
    with missing, fusednorm.backend("cuda"):
        pass


def test_kernels_refuse_forward_mode_instead_of_dropping_tangents():
    norm = fusednorm.BatchNorm(4).requires_grad_(False)
    x = torch.randn(2, 4, 3, 3)
    with null_launch(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="jvp"):
            norm(dual)
