"""The moments of one batch that is spread over the processes of a group, merged in rank order."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from fusednorm.reference.adaptation import Moments, merge

_ENDED, _READY, _FAILED = range(3)


class Ranks:
    """The processes that adapt together; alone where there is no group."""

    def __init__(self, group: Any | None) -> None:
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    def merged(self, batch: Moments, weight: int = 1) -> Moments:
        """What a single process would have found on the whole batch."""
        if self.size == 1:
            return batch
        mean, m2 = batch.mean, batch.m2
        size = mean.new_tensor([batch.size * weight])
        sizes, means, m2s = self._gather(torch.cat([size, mean, m2])).tensor_split(
            [1, 1 + mean.numel()], 1
        )
        found = zip(sizes.flatten().tolist(), means, m2s, strict=True)
        # One without a value takes no part, whatever its row holds.
        parts = [Moments(int(n), mean, m2) for n, mean, m2 in found if n]
        return merge(parts) if parts else Moments(0, mean, m2)

    def agree(self, images: int | None, error: Exception | None, device: torch.device) -> list[int]:
        """Images of the next batch on every rank, 0 where there is none left; [] when all ended.

        Raises on every rank if one has failed, so that none waits for it in vain.
        """
        status = _FAILED if error is not None else _ENDED if images is None else _READY
        if self.size > 1:
            # NCCL needs the device, gloo takes either.
            mine = torch.tensor([status, images or 0], dtype=torch.int64, device=device)
            told = self._gather(mine).tolist()
        else:
            told = [[status, images or 0]]
        if error is not None:
            raise error
        failed = [rank for rank, (what, _) in enumerate(told) if what == _FAILED]
        if failed:
            raise RuntimeError(f"adaptation failed on rank {failed[0]}; see the error there")
        return [n for _, n in told] if any(what == _READY for what, _ in told) else []

    def _gather(self, mine: Tensor) -> Tensor:
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(rows, mine.contiguous(), group=self.group)
        return torch.stack(rows)


def unwrapped(model: nn.Module) -> tuple[nn.Module, Any | None]:
    """The module inside data-parallel and compiled wrappers, and the group of the former.

    DistributedDataParallel's own forward would broadcast rank 0's buffers over the others'.
    """
    group = None
    while True:
        if isinstance(model, DistributedDataParallel):
            group, model = model.process_group, model.module
        elif isinstance(model, DataParallel):
            model = model.module
        elif isinstance(original := getattr(model, "_orig_mod", None), nn.Module):
            model = original
        else:
            return model, group
