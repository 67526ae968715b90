"""A CUDA device that is a pair of clocks: enough of torch.cuda to see what the timing does to it.

The host's clock advances with every launch, the device's with the work queued on it; an event is
stamped when the device reaches it. So a timing that charges launch latency to a kernel, or misses
it where it belongs, comes out as a wrong number of microseconds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from fusednorm.bench import timing

US = 1e-6
LAUNCH, REPLAY = 5 * US, 12 * US


class FakeCuda:
    def __init__(self) -> None:
        self.host = self.device = 0.0
        self.capturing: list[tuple[str, float]] | None = None
        self.log: list[str] = []
        self.pools: list[Any] = []
        self.handles = 0
        self.stuck: set[Any] = set()
        self.alive = 0
        self.most_alive = 0

    def call(self, name: str, seconds: float) -> Callable[[], object]:
        """A kernel of a known cost; its result knows whether it is still held."""
        fake = self

        class Result:
            def __init__(self) -> None:
                fake.alive += 1
                fake.most_alive = max(fake.most_alive, fake.alive)

            def __del__(self) -> None:
                fake.alive -= 1

        def run() -> object:
            if fake.capturing is not None:
                fake.capturing.append((name, seconds))
            else:
                fake.host += LAUNCH
                fake.work(name, seconds)
            return Result()

        return run

    def work(self, name: str, seconds: float) -> None:
        self.device = max(self.device, self.host) + seconds
        self.log.append(name)

    def install(self, monkeypatch: Any) -> None:
        fake = self

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = max(fake.device, fake.host)

            def elapsed_time(self, later: Any) -> float:
                return (later.at - self.at) * 1e3

        class Graph:
            def __init__(self) -> None:
                self.nodes: list[tuple[str, float]] = []

            def replay(self) -> None:
                fake.host += REPLAY
                for name, seconds in self.nodes:
                    fake.work(name, seconds)

        @contextlib.contextmanager
        def graph(into: Graph, pool: Any = None, stream: Any = None) -> Iterator[None]:
            assert stream == "current", "captured on a stream other than the calls'"
            if pool in fake.stuck:
                raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
            fake.pools.append(pool)
            fake.capturing = into.nodes
            # As torch has it: a capture that fails never ends its recording to the pool.
            fake.stuck.add(pool)
            try:
                yield
                fake.stuck.remove(pool)
            finally:
                fake.capturing = None

        def synchronize() -> None:
            assert fake.capturing is None, "a capture does not survive a synchronization"
            fake.host = max(fake.host, fake.device)

        def handle() -> str:
            fake.handles += 1
            return f"pool {fake.handles}"

        def sleep(cycles: int) -> None:
            fake.work("sleep", cycles / 2e9)

        for name, made in {
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": graph,
            "synchronize": synchronize,
            "_sleep": sleep,
            "current_stream": lambda: "current",
            "graph_pool_handle": handle,
            "Stream": lambda: "other",
            "stream": lambda stream: contextlib.nullcontext(),
        }.items():
            monkeypatch.setattr(torch.cuda, name, made)
        # No device memory to read: an evicting kernel of 50 us instead.
        monkeypatch.setattr(timing, "_evictor", lambda: fake.call("evict", 50 * US))
