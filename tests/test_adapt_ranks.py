"""Adaptation over two gloo processes is adaptation of one process with all the images."""

from __future__ import annotations

import copy
import datetime

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fusednorm import BatchGroupNorm
from fusednorm.adapt import AdaptiveModel, adapt_batch_norm

METHODS = {
    "replace": {},
    "prior": {"prior_strength": 7.0, "total_variance": True},
    "ema": {"momentum": 0.3},
}


def network():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), BatchGroupNorm(4, 2)
    ).double()


def images(n):
    torch.manual_seed(2)
    return torch.randn(n, 3, 8, 8, dtype=torch.float64) * 2 + 3


def agree(model, expected, what):
    values = expected.state_dict()
    for key, got in model.state_dict().items():
        torch.testing.assert_close(
            got, values[key], rtol=1e-12, atol=1e-12, msg=f"{what} {key}: {got} {values[key]}"
        )


def uneven(rank):
    """Two batches, split 2 + 4 and 5 + 1, beside one process's 6 and 6."""
    x = images(12)
    first, second = x[:6].split([2, 4]), x[6:].split([5, 1])
    for method, options in METHODS.items():
        for propagation in ("sequential", "one-shot"):
            model, expected = network(), network()
            given = [first[rank], second[rank]]
            run = adapt_batch_norm(
                model, given, method, propagation=propagation, process_group=dist.group.WORLD,
                **options,
            )  # fmt: skip
            adapt_batch_norm(expected, [x[:6], x[6:]], method, propagation=propagation, **options)
            agree(model, expected, f"{method} {propagation}")
            assert (run.report.images, run.report.batches) == (12, 2)


def ended(rank):
    """Rank 1 has one batch, rank 0 three: the images count, wherever they are."""
    x = images(12)
    model, expected = network(), network()
    given = [x[:3], x[6:8], x[8:]] if rank == 0 else [x[3:6]]
    adapt_batch_norm(model, given, process_group=dist.group.WORLD)
    adapt_batch_norm(expected, [x[:6], x[6:8], x[8:]])
    agree(model, expected, "ended")


def ddp(rank):
    """The wrapper's own group, and no broadcast of rank 0's statistics."""
    x = images(6).split([2, 4])
    model, expected = DistributedDataParallel(network()), network()
    before = copy.deepcopy(expected.state_dict())
    with adapt_batch_norm(model, x[rank]):
        adapt_batch_norm(expected, images(6))
        agree(model.module, expected, "ddp")
        expected.eval(), model.eval()
        torch.testing.assert_close(model(x[rank]), expected(x[rank]))
    after = model.module.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    local, alone = network(), network()
    adapt_batch_norm(local, x[rank])
    adapt_batch_norm(alone, x[rank])
    agree(local, alone, "alone")


def stream(rank):
    x = images(12)
    for method in ("prior", "batch", "replace", "ema"):
        together = AdaptiveModel(network(), method, process_group=dist.group.WORLD)
        alone = AdaptiveModel(network(), method)
        for part in (x[:6], x[6:]):
            expected = alone(part).split([2, 4])[rank]
            torch.testing.assert_close(together(part.split([2, 4])[rank]), expected)
        assert together.images == 12


def failing(rank):
    """No rank waits for one that failed, and none has changed."""
    x, model = images(4), network()
    before = copy.deepcopy(model.state_dict())
    group = dist.group.WORLD
    bad = [x, x / 0] if rank == 1 else [x, x]
    kind, message = (ValueError, "finite") if rank else (RuntimeError, "failed on rank 1")
    with pytest.raises(kind, match=message):
        adapt_batch_norm(model, bad, process_group=group)
    with pytest.raises(ValueError, match="got none on rank 1"):
        adapt_batch_norm(model, [] if rank else [x], process_group=group)
    with pytest.raises(ValueError, match="no batch at all"):
        adapt_batch_norm(model, [], process_group=group)
    wrapper = AdaptiveModel(model, process_group=group)
    with pytest.raises(kind, match=message):
        wrapper(x / 0 if rank else x)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def process(rank, rendezvous):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    try:
        for one in (uneven, ended, ddp, stream, failing):
            one(rank)
    finally:
        dist.destroy_process_group()


def test_two_processes(tmp_path):
    """One pair for all: starting Python and torch twice costs more than the tests."""
    mp.spawn(process, (tmp_path / "rendezvous",), nprocs=2)
