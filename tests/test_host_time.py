"""What a call costs the host, beside nn.BatchNorm2d's, on a tensor that costs nothing.

Null launches: the compiled operators check, plan for an H200, allocate, and launch nothing.
nn.BatchNorm2d runs the same tiny CPU tensor through ATen, whose arithmetic is below a microsecond.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from fusednorm import BatchGroupNorm, BatchNorm
from fusednorm.ops.backend import null_launch

Call = Callable[[], object]


@pytest.fixture(autouse=True)
def as_users_run(poisoned: None) -> Iterator[None]:
    """Filling every fresh tensor would be timed too."""
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = False
    with null_launch():
        yield


def ratio(ours: Call, theirs: Call, rounds: int = 150, calls: int = 20) -> float:
    """Median over rounds of our time over theirs, each round one after the other: what disturbs a
    busy machine disturbs both or falls out of the median."""
    for call in (ours, theirs) * 50:
        call()
    found = []
    for i in range(rounds):
        took = []
        for call in (ours, theirs) if i % 2 else (theirs, ours):
            began = time.perf_counter()
            for _ in range(calls):
                call()
            took.append(time.perf_counter() - began)
        found.append(took[0] / took[1] if i % 2 else took[1] / took[0])
    return statistics.median(found)


def best_ratio(ours: Call, theirs: Call, promised: float) -> float:
    """The least of three tries: a neighbour on the same core slows the one it meets, while a call
    that is really slower is so each time."""
    tries: list[float] = []
    while len(tries) < 3 and (not tries or min(tries) > promised):
        tries.append(ratio(ours, theirs))
    return min(tries)


@pytest.mark.parametrize("requires_grad", [True, False])
def test_training_forward_costs_no_more_than_torchs(requires_grad: bool) -> None:
    x = torch.randn(2, 8, 4, 4, requires_grad=requires_grad)
    ours, theirs = BatchNorm(8), nn.BatchNorm2d(8)
    assert ours(x).requires_grad and theirs(x).requires_grad
    found = best_ratio(lambda: ours(x), lambda: theirs(x), 1.0)
    assert found <= 1.0, f"{found:.2f} times nn.BatchNorm2d's time"


def step(norm: nn.Module, x: Tensor, dy: Tensor, *rest: Tensor) -> Call:
    wanted = [x, *norm.parameters()]
    return lambda: torch.autograd.grad(norm(x, *rest), wanted, dy)


@pytest.mark.parametrize(
    ("norm", "promised"),
    [(lambda: BatchNorm(8), 1.2), (lambda: BatchGroupNorm(8, 2), 1.2)],
    ids=["batch", "batch group"],
)
def test_forward_and_backward(norm: Callable[[], nn.Module], promised: float) -> None:
    """No promise of the package; that Python stays out of the backward, though, shows here."""
    x, dy = torch.randn(2, 8, 4, 4, requires_grad=True), torch.randn(2, 8, 4, 4)
    found = best_ratio(step(norm(), x, dy), step(nn.BatchNorm2d(8), x, dy), promised)
    assert found <= promised, f"{found:.2f} times nn.BatchNorm2d's time"


def test_residual_and_activation_come_at_no_more_than_torchs_three_calls() -> None:
    class Composed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x: Tensor, residual: Tensor) -> Tensor:
            return torch.relu(self.norm(x) + residual)

    x, dy, r = torch.randn(3, 2, 8, 4, 4).unbind()
    x.requires_grad_()
    found = best_ratio(step(BatchNorm(8, act="relu"), x, dy, r), step(Composed(), x, dy, r), 1.0)
    assert found <= 1.0, f"{found:.2f} times the time of norm, add and relu"


def test_null_launches_are_training_steps() -> None:
    """What is timed is the whole path, the operator and its gradient, and nothing of ATen's."""
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    norm = BatchNorm(8, act="relu")
    with torch.profiler.profile() as profile:
        y = norm(x, torch.randn_like(x))
        grads = torch.autograd.grad(y, [x, *norm.parameters()], torch.ones_like(y))
    names = [event.key for event in profile.key_averages()]
    assert "fusednorm::norm_train" in names and "fusednorm::norm_backward" in names
    aten = {n for n in names if n.startswith("aten::") and "_norm" in n}
    assert not aten, aten
    assert [g.shape for g in grads] == [x.shape, (8,), (8,)]
    # Nothing was launched, so nothing has moved.
    assert norm.num_batches_tracked == 0 and not norm.running_mean.any()
