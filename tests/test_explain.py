"""fusednorm.explain: the plan C++ makes, the path a call takes, and what kept it from a faster."""

from __future__ import annotations

import functools
import sys

import pytest
import torch

import fusednorm
import fusednorm.functional as FF
from cases import in_layout
from fusednorm import BatchGroupNorm, BatchNorm, GroupNorm, explain
from fusednorm.explanation import DEVICES, PLAN_FIELDS
from fusednorm.ops.schema import NATIVE_MISSING

H200 = {"device": "H200"}


def big(layout: str = "nchw", dtype: torch.dtype = torch.bfloat16, n: int = 8) -> torch.Tensor:
    """Strides and an address, and no memory behind them: nothing is read."""
    return in_layout(torch.empty(n, 64, 56, 56, dtype=dtype), layout)


def reason(explanation: fusednorm.Explanation, words: str) -> bool:
    return any(words in text for text in explanation.reasons)


def test_the_compiled_library_is_asked() -> None:
    assert NATIVE_MISSING is None, f"rung missing, make native: {NATIVE_MISSING}"
    plan = torch.ops.fusednorm.plan
    args = ([8, 64, 3136], 64, False, 2, 0, 0, [0, 1, 0, 0, 0, 0])
    assert plan(*args, []).shape == (len(PLAN_FIELDS),)
    # No device means an H200: the table says the same of it as the library.
    assert torch.equal(plan(*args, []), plan(*args, list(DEVICES["H200"])))


def test_on_a_cpu_it_says_what_runs_and_how_to_ask_for_a_gpu() -> None:
    said = explain(BatchNorm(64), big())
    assert (said.device, said.backend, said.layout) == ("cpu", "reference", "NCHW")
    assert said.launches == () and "input is on cpu" in said.why
    assert reason(said, "ATen operators run") and "device='H200'" in str(said)
    with fusednorm.backend("reference"):
        assert "chosen by backend()" in explain(BatchNorm(64), big()).why


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_a_small_layer_is_one_kernel_that_reads_once(layout: str) -> None:
    said = explain(BatchNorm(64), big(layout, n=2), **H200)
    forward, backward = said.launches
    assert said.backend == "cuda" and said.layout == layout.upper() and said.reasons == ()
    assert [launch.path for launch in said.launches] == ["on-chip", "on-chip"]
    assert (forward.nodes, backward.nodes) == (1, 1)
    assert (forward.multiple_of_tensor, backward.multiple_of_tensor) == (2, 3)
    assert forward.vector == backward.vector == 8
    assert "1 kernel, 2 T" in str(said) and "1 kernel, 3 T" in str(said)


def test_a_huge_cell_streams_and_says_so() -> None:
    said = explain(BatchGroupNorm(64, 1), big(dtype=torch.float32, n=40), **H200)
    assert [launch.path for launch in said.launches] == ["streaming", "streaming"]
    assert [launch.nodes for launch in said.launches] == [2, 2]
    assert [launch.multiple_of_tensor for launch in said.launches] == [3, 5]
    assert reason(said, "forward: a cell of 30.6 MiB is larger than all shared memory, 29.3 MiB")
    assert reason(said, "backward: a cell of 61.2 MiB")


def test_residual_relu_and_mask_in_bytes() -> None:
    x = big("nhwc", n=2)
    for act, forward, backward in (
        ("relu", 3 + 1 / 16, 4 + 1 / 16),  # the mask is written; dresidual too, mask read
        ("silu", 3, 5),  # the residual is read again
        (None, 3, 3),  # dresidual is dy
    ):
        said = explain(BatchNorm(64, act=act), x, x.clone(), **H200)
        assert all(launch.path == "on-chip" for launch in said.launches)
        found = [launch.multiple_of_tensor for launch in said.launches]
        assert found == pytest.approx([forward, backward])


def test_misaligned_storage() -> None:
    x = torch.empty(2 * 64 * 56 * 56 + 1)[1:].view(2, 64, 56, 56)
    said = explain(BatchNorm(64), x, **H200)
    assert said.launches[0].vector == 1 and said.launches[0].path == "streaming"
    assert reason(said, "no multiple of 16")
    # A residual counts too; a copy is aligned again.
    said = explain(BatchNorm(64), torch.empty_like(x), x, **H200)
    assert said.launches[0].vector == 1 and reason(said, "no multiple of 16")
    said = explain(BatchNorm(64), x.transpose(2, 3), **H200)
    assert said.launches[0].vector == 4 and not reason(said, "no multiple of 16")


def test_strides_that_cost_a_copy() -> None:
    x = torch.empty(2, 64, 56, 112)[..., ::2]
    said = explain(BatchNorm(64), x, torch.empty(2, 64, 56, 56).mT, **H200)
    assert said.layout == "NCHW, after a copy"
    assert reason(said, "x has strides (401408, 6272, 112, 2), dense in neither layout")
    assert reason(said, "residual has other strides than x")


@pytest.mark.parametrize(
    ("shape", "groups", "layout", "words"),
    [
        ((3, 5, 7, 7), 5, "nchw", "spatial size 49 leaves no 16-byte accesses of 4 elements"),
        ((3, 6, 4, 4), 6, "nhwc", "C = 6 leaves no 16-byte accesses of 4 elements"),
        ((3, 8, 3, 3), 3, "nchw", "3 groups straddle the borders of 8 channels"),
        ((3, 8, 3, 3), 3, "nhwc", "read with a stride in NHWC"),
    ],
)
def test_sizes(shape: tuple[int, ...], groups: int, layout: str, words: str) -> None:
    said = explain(BatchGroupNorm(shape[1], groups), in_layout(torch.empty(shape), layout), **H200)
    assert said.launches[0].vector == 1 and said.launches[0].path == "streaming"
    assert reason(said, words), said


def test_float64_and_evaluation() -> None:
    said = explain(BatchNorm(64), big(dtype=torch.float64), **H200)
    assert said.reasons == ("float64 is for checking: one element an access, never on the chip",)
    for said in (
        explain(BatchNorm(64).eval(), big(), **H200),
        explain(BatchNorm(64), big(), training=False, **H200),
    ):
        (only,) = said.launches
        assert (only.direction, only.nodes, only.multiple_of_tensor) == ("apply", 1, 2)
        assert reason(said, "statistics are given")
    # Without running statistics, and for group norm, evaluation is training.
    untracked = BatchNorm(64, track_running_stats=False).eval()
    assert len(explain(untracked, big(), **H200).launches) == 2
    assert len(explain(GroupNorm(64, 32).eval(), big(), **H200).launches) == 2


def test_functions_and_modules_agree() -> None:
    x = big("nhwc")
    for module, function, options in (
        (BatchNorm(64, act="relu"), FF.batch_norm, {"act": "relu", "training": True}),
        (BatchGroupNorm(64, 16), FF.batch_group_norm, {"num_groups": 16, "training": True}),
        (GroupNorm(64, 32, act="silu"), FF.group_norm, {"num_groups": 32, "act": "silu"}),
    ):
        expected = explain(module, x, **H200)
        assert explain(function, x, **options, **H200) == expected
        assert explain(functools.partial(function, **options), x, **H200) == expected
    assert explain(FF.batch_norm, x, **H200).launches[0].direction == "apply"


def test_other_gpus() -> None:
    x = big(n=32)
    for capability, name in ((80, "A100"), (90, "H200"), (100, "B200"), (120, "RTX 5090")):
        by_number = explain(BatchNorm(64), x, capability=capability)
        assert by_number == explain(BatchNorm(64), x, device=name)
        assert by_number.device == f"{name} (assumed)"
        # No clusters before Hopper.
        assert name != "A100" or all(launch.tier != "cluster" for launch in by_number.launches)


def test_empty_input() -> None:
    said = explain(BatchNorm(64).eval(), torch.empty(0, 64, 2, 2), **H200)
    assert said.launches == () and said.reasons == ("x is empty: no launch",)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["fusednorm.explanation"], "NATIVE_MISSING", "it is not there")
    said = explain(BatchNorm(64), big(), **H200)
    assert said.launches == () and said.reasons == ("no plan to show: it is not there",)


def test_bad_questions() -> None:
    norm, x = BatchNorm(64), big()
    with pytest.raises(TypeError, match="norm: expected a module of fusednorm.*got BatchNorm2d"):
        explain(torch.nn.BatchNorm2d(64), x)
    with pytest.raises(TypeError, match="norm: expected .* a function of fusednorm.functional"):
        explain(torch.relu, x)
    with pytest.raises(TypeError, match="with no options.*'num_groups'"):
        explain(norm, x, num_groups=3)
    with pytest.raises(TypeError, match="batch_group_norm: num_groups is missing"):
        explain(FF.batch_group_norm, x)
    with pytest.raises(ValueError, match="device: expected one of .*'H200'.*got 'V100'"):
        explain(norm, x, device="V100")
    with pytest.raises(ValueError, match=r"capability: expected one of \[80, .*got 75"):
        explain(norm, x, capability=75)
    with pytest.raises(ValueError, match="expected one of them"):
        explain(norm, x, device="H200", capability=90)
    # What the call itself would refuse.
    with pytest.raises(ValueError, match="num_groups: expected a divisor"):
        explain(FF.batch_group_norm, x, num_groups=65 * 7, training=True)
    with pytest.raises(ValueError, match="residual: expected the shape"):
        explain(norm, x, x[:2])
    with pytest.raises(ValueError, match="more than 1 value per cell"):
        explain(norm, torch.empty(1, 64, 1, 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: [8, 64]}, "sizes has 2 entries"),
        ({0: [0, 64, 1]}, "entry below 1"),
        ({1: 11}, "num_groups is 11, expected a divisor of 200704"),
        ({3: 3}, "element_size is 3"),
        ({4: 3}, "direction is 3"),
        ({6: [1]}, "flags has 1 entries, expected 6"),
        ({7: [1, 2]}, "device has 2 numbers, expected 9"),
    ],
)
def test_the_operator_checks(changes: dict[int, object], message: str) -> None:
    args = [[8, 64, 3136], 64, False, 2, 0, 0, [0, 1, 0, 0, 0, 0], []]
    for index, value in changes.items():
        args[index] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fusednorm.plan(*args)
