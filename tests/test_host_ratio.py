"""The gate on host-side costs: ours over PyTorch's in the same run, held to committed ceilings."""

from __future__ import annotations

import time

import pytest
import torch
from fusednorm.bench.host_costs import CEILINGS, PAIRS, breach, ratio

import fusednorm


@pytest.fixture(autouse=True)
def as_users_run(poisoned):
    """Filling every fresh tensor would be timed too."""
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = False


def test_every_cost_has_a_ceiling():
    assert CEILINGS.keys() == PAIRS.keys()


@pytest.mark.parametrize("name", PAIRS)
def test_ceiling(name):
    assert breach(name, PAIRS[name], CEILINGS[name], tries=5) is None


def spin(seconds):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


@pytest.mark.parametrize(("factor", "red"), [(1.0, False), (1.3, False), (2.0, True)])
def test_the_gate_tells_times_apart(factor, red):
    """Calls of known cost: what is twice its peer breaks a ceiling of 1.5, and says by how much."""

    def pair():
        return lambda: spin(50e-6 * factor), lambda: spin(50e-6)

    said = breach("spin", pair, 1.5)
    assert (said is not None) == red
    if red:
        assert "at most 1.5 allowed" in said
        assert ratio(pair) == pytest.approx(2.0, rel=0.1)


@pytest.mark.parametrize("kind", ["training", "evaluation", "both"])
def test_a_slower_layer_turns_the_gate_red(kind, monkeypatch):
    """Ten microseconds more in forward, as a careless check would cost, are noticed."""
    forward = fusednorm.BatchNorm.forward

    def slower(self, *args):
        spin(10e-6)
        return forward(self, *args)

    monkeypatch.setattr(fusednorm.BatchNorm, "forward", slower)
    name = f"module, {kind}: BatchNorm"
    assert breach(name, PAIRS[name], CEILINGS[name]) is not None
