"""The benchmark's clock and its witnesses on a real device: known costs come out as they are."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from fusednorm.bench import observe, timing
from fusednorm.bench.providers import PROVIDERS
from fusednorm.bench.registry import OPS
from fusednorm.bench.results import FIELDS
from fusednorm.bench.shapes import Shape

from bench_cases import rows_of, small_plan

pytestmark = pytest.mark.gpu
MICROSECOND = 1e-6


@pytest.fixture(autouse=True)
def as_users_run(poisoned: None):
    """On a stream that can be captured; filling fresh tensors would be timed, too."""
    assert torch.cuda.is_available(), "tests/gpu needs a CUDA device; CPU rungs live in tests/"
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = False
    with torch.cuda.stream(torch.cuda.Stream()):
        yield


def spin(cycles: int) -> timing.Call:
    return lambda: torch.cuda._sleep(cycles)


def test_a_known_cost_is_proportional_and_repeats() -> None:
    """Ten times the cycles, ten times the time, launched by a graph or the host."""
    short, long, again = (
        timing.Candidate([spin(cycles)] * 4, graph=True) for cycles in (20_000, 200_000, 20_000)
    )
    eager = timing.Candidate([spin(200_000)] * 4)
    timing.time_cuda([short, long, again, eager], 100)
    times = [timing.summarize(c.seconds) for c in (short, long, again, eager)]
    assert times[1].median / times[0].median == pytest.approx(10, rel=0.2)
    spread = max(t.p90 - t.p10 for t in (times[0], times[2]))
    assert abs(times[0].median - times[2].median) <= max(spread, 0.02 * times[0].median)
    assert times[3].median == pytest.approx(times[1].median, rel=0.1)


def test_a_graph_has_no_launch_gaps_and_eager_has() -> None:
    tiny = torch.zeros(8, device="cuda")
    calls = [lambda: tiny.add_(1)] * 16
    graph, eager = (timing.Candidate(calls, graph=graph) for graph in (True, False))
    timing.time_cuda([graph, eager], 100)
    assert statistics.median(graph.seconds) < statistics.median(eager.seconds)
    assert statistics.median(graph.seconds) < 10 * MICROSECOND


def test_cold_reads_dram_and_warm_reads_l2() -> None:
    """Half of L2: found there again and again, or never."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    numel = l2 // 8
    ring = [torch.rand(numel, device="cuda") for _ in range(math.ceil(4 * l2 / (4 * numel)) + 1)]
    cold = timing.Candidate([t.sum for t in ring], graph=True, cold=True)
    warm = timing.Candidate([ring[0].sum] * len(ring), graph=True)
    timing.time_cuda([cold, warm], 100)
    assert statistics.median(cold.seconds) > 1.1 * statistics.median(warm.seconds)


def test_witnesses_agree() -> None:
    x = torch.rand(1 << 20, device="cuda")

    def call() -> object:
        return (x + 1).mul_(2)

    names = observe.kernels(call)
    assert observe.graph_nodes(call) == 2
    if names is not None:
        assert len(names) == 2
    assert observe.peak_bytes(call, "cuda") == x.nbytes


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def test_every_provider_has_its_rows(direction: str) -> None:
    """Times, kernels, nodes and memory of whoever is here, in all four variants."""
    plan = small_plan(
        shapes=[Shape("half a layer", (8, 64, 56, 56))],
        ops=[OPS["batch_norm"], OPS["batch_group_norm[32]"], OPS["memorized_batch_norm"]],
        providers=[*PROVIDERS.values()],
        directions=[direction],
        layouts=["nhwc"],
        device="cuda",
        dtypes=["float16"],
        repetitions=20,
    )
    rows = rows_of(plan)
    timed = [row for row in rows if row["ms_median"] is not None]
    assert {"cuda", "triton", "cudnn", "native", "compile", "eager"} <= {
        row["provider"] for row in timed
    }
    assert all(tuple(row) == FIELDS for row in rows)
    assert {(row["graph"], row["cold"]) for row in timed if row["provider"] == "cuda"} == {
        (graph, cold) for graph in (True, False) for cold in (True, False)
    }
    for row in timed:
        assert 0 < row["ms_p10"] <= row["ms_median"] <= row["ms_p90"]
        # No colder than DRAM: half as fast again as a copy would be a clock that lies.
        assert not row["cold"] or row["pct_copy"] < 150
        assert row["nodes"] is None or row["nodes"] >= 1
        assert row["peak_bytes"] >= 0
