"""What the benchmark's clock says: known costs, on the CPU and on a device made of two clocks."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fusednorm.bench import machine, observe, operands, run, timing
from fusednorm.bench.providers import PROVIDERS, Provider
from fusednorm.bench.registry import OPS
from torch import nn

from bench_cases import SMALL, rows_of, small_plan
from fake_cuda import LAUNCH, US, FakeCuda


@pytest.fixture(autouse=True)
def as_users_run(poisoned, monkeypatch):
    """Filling every fresh tensor would be timed too; the copy takes seconds in every process."""
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = False
    monkeypatch.setattr(timing, "copy_gb_per_s", lambda device: 10.0)


def test_a_known_cost_is_measured_and_rounds_are_interleaved():
    order = []

    def sleeper(name, seconds):
        def call():
            order.append(name)
            time.sleep(seconds)

        return timing.Candidate([call])

    slow, fast = sleeper("slow", 0.02), sleeper("fast", 0.005)
    timing.time_cpu([slow, fast], 6)
    # A busy machine oversleeps now and then, never undersleeps.
    assert 0.005 <= min(fast.seconds) < 0.015
    assert 0.02 <= min(slow.seconds) < 0.03
    # One warm-up each, then rounds whose first place turns.
    assert order == ["slow", "fast"] * 2 + ["fast", "slow", "slow", "fast"] * 2 + ["fast", "slow"]


def test_fewer_repetitions_but_five_where_time_runs_out():
    slow = timing.Candidate([lambda: time.sleep(0.02)])
    timing.time_cpu([slow], 100, seconds=0.0)
    assert len(slow.seconds) == 5
    timing.time_cpu([nobody := timing.Candidate([lambda: 1 / 0])], 100, seconds=1.0)
    assert nobody.error == "ZeroDivisionError: division by zero"


class Sleeping(nn.BatchNorm2d):
    """A norm of a fixed cost."""

    def forward(self, x, residual=None):
        time.sleep(0.003)
        return super().forward(x)


def test_the_same_row_measured_twice_differs_less_than_its_spread():
    """In two runs, and by two providers in turns within one."""
    twins = [Provider(name, lambda case: Sleeping(32)) for name in ("one", "two")]
    plan = small_plan(providers=twins, directions=("forward",), repetitions=60)
    runs = [rows_of(plan) for _ in range(2)]
    for a, b in ((runs[0][0], runs[1][0]), (runs[0][0], runs[0][1]), (runs[1][0], runs[1][1])):
        assert a["repetitions"] == b["repetitions"] == 60
        spread = max(row["ms_p90"] - row["ms_p10"] for row in (a, b))
        assert abs(a["ms_median"] - b["ms_median"]) < spread
        assert 3 <= a["ms_median"] < 6


def test_summary_quantiles():
    summary = timing.summarize([i / 1000 for i in range(1, 102)])
    assert (summary.p10, summary.median, summary.p90) == pytest.approx((11, 51, 91))


def test_ring_exceeds_four_l2_or_says_warm():
    megabyte = 2**20
    assert timing.ring_size(50 * megabyte, 50 * megabyte) == (4, True)
    assert timing.ring_size(1000 * megabyte, 50 * megabyte) == (1, True)
    size, cold = timing.ring_size(1000, 50 * megabyte)
    assert size == timing.MAX_RING
    assert not cold


def test_copy_bandwidth_is_measured(monkeypatch):
    monkeypatch.undo()
    rate = timing.copy_gb_per_s("cpu")
    assert 0.2 < rate < 2000
    # Once a process: all rows of a sitting are held to the same roof.
    assert timing.copy_gb_per_s("cpu") == rate


# -- the device of two clocks ---------------------------------------------------------------------


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    fake.install(monkeypatch)
    return fake


def candidate(cuda, count, seconds, name="k", **options):
    calls = [cuda.call(f"{name}{i}", seconds) for i in range(count)]
    return timing.Candidate(calls, **options)


@pytest.mark.parametrize("seconds", [2 * US, 50 * US])
def test_a_graph_is_not_charged_its_launch(cuda, seconds):
    """Not even one that is over before the host could queue it."""
    cold = candidate(cuda, 2, seconds, graph=True, cold=True)
    timing.time_cuda([cold], 100)
    assert cold.seconds == pytest.approx([seconds] * 100)


def test_eager_calls_are_charged_their_launches(cuda):
    short, long = (candidate(cuda, 64, seconds) for seconds in (2 * US, 50 * US))
    # The backlog of a graph in the same round must not hide them.
    timing.time_cuda([short, candidate(cuda, 4, 900 * US, graph=True), long], 100)
    assert short.seconds == pytest.approx([LAUNCH + 2 * US / timing.MAX_CALLS] * 100)
    assert long.seconds == pytest.approx([50 * US + LAUNCH / timing.MAX_CALLS] * 100)


@pytest.mark.parametrize("graph", [True, False])
def test_every_operand_has_its_turn(cuda, graph):
    ring = candidate(cuda, 50, 10 * US, graph=graph, cold=True)
    timing.time_cuda([ring], 100)
    names = [name for name in cuda.log if name.startswith("k")]
    # Before a capture a call is tried.
    turns = names[3:] if graph else names
    assert turns == [f"k{i % 50}" for i in range(len(turns))]
    assert len(turns) >= 100 * min(50, timing.MAX_CALLS)


@pytest.mark.parametrize("graph", [True, False])
def test_nobody_finds_what_another_left_in_l2(cuda, graph):
    """Candidates share operands, so each cold sample, and no warm one, begins by evicting them."""
    cold = [candidate(cuda, 64, 10 * US, name, graph=graph, cold=True) for name in "ab"]
    warm = candidate(cuda, 1, 10 * US, "w", graph=graph)
    timing.time_cuda([*cold, warm], 100)
    samples = [run for run, _ in itertools.groupby(name[0] for name in cuda.log if name != "sleep")]
    text = "".join(samples)
    assert text.count("e") == 200
    assert "ab" not in text[text.index("e") :] and "ba" not in text[text.index("e") :]
    assert "ew" not in text
    # The eviction itself is not in the time.
    each = 10 * US if graph else 10 * US + LAUNCH / timing.MAX_CALLS
    assert cold[0].seconds == pytest.approx([each] * 100)
    cuda.log.clear()
    timing.time_cuda([warm], 100)
    assert "evict" not in cuda.log


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("cold", [True, False])
def test_cold_calls_write_to_memory_of_their_own(cuda, graph, cold):
    timing.time_cuda([candidate(cuda, 40, 10 * US, graph=graph, cold=cold)], 100)
    assert (cuda.most_alive >= 40) == cold
    assert cuda.most_alive <= 41


def test_warmed_up_interleaved_and_one_pool(cuda):
    several = [candidate(cuda, 1, 10 * US, name, graph=True) for name in "abc"]
    timing.time_cuda(several, 100)
    names = [name for name in cuda.log if name != "sleep"]
    measured = names[-300:]
    assert measured[:9] == ["a0", "b0", "c0", "b0", "c0", "a0", "c0", "a0", "b0"]
    assert {names[:-300].count(name) for name in ("a0", "b0", "c0")} == {timing.WARM_UPS + 3}
    assert cuda.pools == ["pool 1"] * 3


def test_what_cannot_be_captured_is_an_error_and_the_others_go_on(cuda):
    def call():
        torch.cuda.synchronize()

    stuck = timing.Candidate([call], graph=True)
    right = candidate(cuda, 4, 10 * US, graph=True)
    timing.time_cuda([stuck, right], 100)
    # Not in the pool of the failed capture, which takes no other.
    assert cuda.pools == ["pool 1", "pool 2"]
    assert stuck.error.startswith("AssertionError: a capture does not survive")
    assert right.seconds == pytest.approx([10 * US] * 100)


def test_rows_of_a_gpu(cuda, monkeypatch):
    """The whole way to rows, all four variants, with the CPU's tensors on the false device."""
    monkeypatch.setattr(run, "_l2_bytes", lambda: 5 * SMALL.numel * 4 * 5 // 4 * 4)
    make, prepare, peak = operands.make, operands.prepare, observe.peak_bytes
    monkeypatch.setattr(operands, "make", lambda case, device, seed: make(case, "cpu", seed))
    monkeypatch.setattr(operands, "prepare", lambda module, device: prepare(module, "cpu"))
    monkeypatch.setattr(observe, "peak_bytes", lambda call, device: peak(call, "cpu"))
    replay = lambda: None  # noqa: E731
    monkeypatch.setattr(observe, "replay", lambda call: replay)
    names = {True: ["one", "combine"], False: ["one"]}
    monkeypatch.setattr(observe, "kernels", lambda call: names[call is replay])
    monkeypatch.setattr(observe, "graph_nodes", lambda call: 3)
    made = {}

    def timed(candidates, repetitions):
        assert repetitions == 100
        for number, each in enumerate(candidates):
            made[each.graph, each.cold] = each.calls
            each.seconds = [1e-6 * (number + 1)] * repetitions

    monkeypatch.setattr(timing, "time_cuda", timed)
    provider = dataclasses.replace(PROVIDERS["native"], name="cuda")
    plan = small_plan(device="cuda", providers=[provider], repetitions=100)
    rows = rows_of(plan)
    assert [(row["graph"], row["cold"]) for row in rows] == [
        (True, True),
        (True, False),
        (False, True),
        (False, False),
    ]
    assert [row["ms_median"] for row in rows] == pytest.approx([1e-3, 2e-3, 3e-3, 4e-3])
    # 4 x L2 over the bytes a call touches, and the warm ones one call again and again.
    assert len(made[True, True]) == len({*made[True, True]}) == 20
    assert len({*made[True, False]}) == 1
    assert {row["nodes"] for row in rows} == {3}
    # A graph may hold other kernels than the host launches.
    assert all(row["kernels"] == names[row["graph"]] for row in rows)
    assert all(row["peak_bytes"] >= SMALL.numel * 4 for row in rows)
    assert [row["error"] for row in rows] == [None] * 4

    # What keeps its state on the host has no graph, and what is tiny is never cold.
    monkeypatch.setattr(run, "_l2_bytes", lambda: 2**30)
    plan = small_plan(
        device="cuda",
        providers=[PROVIDERS["eager"]],
        ops=[OPS["batch_norm"], OPS["cross_iteration_batch_norm"]],
        repetitions=100,
    )
    ways = [(row["op"], row["graph"], row["cold"]) for row in rows_of(plan)]
    assert ways == [
        ("batch_norm", True, False),
        ("batch_norm", False, False),
        ("cross_iteration_batch_norm", False, False),
    ]


def test_graph_nodes_are_asked_of_the_driver(monkeypatch):
    asked = []

    class Graph:
        def __init__(self, keep_graph):
            assert keep_graph

        def raw_cuda_graph(self):
            return 4711

    def nodes(graph, array, count):
        asked.append((graph.value, array))
        count._obj.value = 2
        return 0

    FakeCuda().install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: torch.no_grad())
    libraries = {"libcuda.so.1": SimpleNamespace(cuGraphGetNodes=nodes)}
    monkeypatch.setattr(observe.ctypes, "CDLL", libraries.__getitem__)
    assert observe.graph_nodes(lambda: None) == 2
    assert asked == [(4711, None)]
    libraries["libcuda.so.1"] = SimpleNamespace(cuGraphGetNodes=lambda *arguments: 1)
    assert observe.graph_nodes(lambda: None) is None
    monkeypatch.setattr(observe.ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    assert observe.graph_nodes(lambda: None) is None


def test_a_call_is_replayed_where_it_can_be_captured(cuda):
    again = observe.replay(cuda.call("k", 10 * US))
    again()
    assert cuda.log == ["k", "k"]

    def refuses():
        if cuda.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing")

    assert observe.replay(refuses) is None


def test_kernels_are_named_in_the_order_they_ran(cuda, monkeypatch):
    def event(name, start, device="CUDA", **more):
        kind, span = SimpleNamespace(name=device), SimpleNamespace(start=start)
        return SimpleNamespace(name=name, device_type=kind, time_range=span, **more)

    events = [
        event("second", 2),
        event("aten::add", 0, device="CPU"),
        event("first", 1, is_user_annotation=False),
        event("a range of the user's", 0, is_user_annotation=True),
    ]
    profiler = SimpleNamespace(events=lambda: events)
    monkeypatch.setattr(observe, "_profiled", lambda *kinds: contextlib.nullcontext(profiler))
    assert observe.kernels(lambda: None) == ["first", "second"]

    def forbidden(*kinds):
        raise RuntimeError("CUPTI_ERROR_INSUFFICIENT_PRIVILEGES")

    monkeypatch.setattr(observe, "_profiled", forbidden)
    assert observe.kernels(lambda: None) is None


def test_peak_memory_on_a_gpu_is_above_what_was_there(cuda, monkeypatch):
    state = {"now": 1000, "most": 5000}

    def call():
        state["most"] = max(state["most"], state["now"] + 300)

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: state["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: state["most"])
    reset = lambda: state.update(most=state["now"])  # noqa: E731
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    assert observe.peak_bytes(call, "cuda") == 300


def test_peak_memory_on_the_cpu():
    size = 4_000_000

    compiled = []

    def call():
        if not compiled:
            compiled.append(torch.empty(10_000_000))
        a = torch.empty(1_000_000)
        b = a + 1
        del a
        return b * 2

    # a and b, then b and the result: two at a time of three. What the first call keeps is no cost.
    assert 2 * size <= observe.peak_bytes(call, "cpu") < 2 * size + 1000


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system pins no threads")
def test_threads_are_pinned_and_released():
    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    # A thread that is there already moves, too.
    torch.ones(1 << 20).sin()
    with machine.pinned(1) as cpus:
        assert cpus == [max(before)]
        assert torch.get_num_threads() == 1
        tasks = [int(task.name) for task in Path("/proc/self/task").iterdir()]
        assert {frozenset(os.sched_getaffinity(task)) for task in tasks} == {frozenset(cpus)}
        assert machine.header("cpu", cpus=cpus)["cpus"] == cpus
    assert os.sched_getaffinity(0) == before
    assert torch.get_num_threads() == threads


def test_machines_have_folders():
    cpu = {"device": "AMD EPYC 9654 96-Core (R)", "threads": 2}
    assert machine.slug(cpu) == "amd-epyc-9654-96-core-r-2-threads"
    assert machine.slug({"device": "NVIDIA H200", "threads": 8, "l2_bytes": 1}) == "nvidia-h200"
