"""Every test starts seeded and with poisoned allocations; devices and backends are fixtures."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fusednorm

sys.path.insert(0, str(Path(__file__).parent))
# pytest-xdist starts a worker a core; more threads only contend.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

TARGETS = [("cpu", "reference")]
if torch.cuda.is_available():
    TARGETS += [("cuda", name) for name in fusednorm.available_backends()]
if os.environ.get("TRITON_INTERPRET") == "1":
    TARGETS = [("cpu", "triton")]  # see test_triton_kernels.py


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Fresh memory is NaN (or the largest integer): a half-written output cannot pass."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=TARGETS, ids=lambda t: "-".join(t))
def target(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """(device, backend), the backend chosen for the test."""
    device, name = request.param
    with fusednorm.backend(name):
        yield request.param
