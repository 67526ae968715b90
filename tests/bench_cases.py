"""What the benchmark's tests share: small plans, and providers wrong in one respect."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from fusednorm.bench.providers import PROVIDERS, Provider
from fusednorm.bench.registry import FAMILIES, OPS, Case
from fusednorm.bench.results import Log, Row
from fusednorm.bench.run import Plan, jobs, run
from fusednorm.bench.shapes import Shape
from torch import Tensor, nn
from torch.nn import functional as F

SMALL = Shape("small", (2, 32, 6, 4))


def small_plan(**changes: Any) -> Plan:
    defaults = {"directions": ("both",), "layouts": ("nchw",), "repetitions": 3}
    plan = {"shapes": [SMALL], "ops": [OPS["batch_norm"]], "providers": [PROVIDERS["native"]]}
    return Plan(**(plan | defaults | changes))


def case(op: str = "batch_norm", **changes: Any) -> Case:
    base = Case(OPS[op], SMALL.dims, "float32", "nchw", "both")
    return dataclasses.replace(base, **changes)


def rows_of(plan: Plan, **options: Any) -> list[Row]:
    return run(jobs(plan), plan.device, Log.resume(None, {}), **options).rows


def measured(*providers: Provider, **changes: Any) -> list[Row]:
    return rows_of(small_plan(providers=providers, **changes))


class Wrong(nn.Module):
    """A provider whose norm is right but for one defect."""

    def __init__(self, defect: str | None) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(32)
        self.defect = defect

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.defect == "raises":
            raise RuntimeError("no kernel for this shape\nand a long trace")
        if self.defect == "dx":
            x = x * 1.001 - x.detach() * 0.001
        if self.defect == "dweight":
            weight = self.norm.weight
            scale = weight * 1.001 - weight.detach() * 0.001
            running = self.norm.running_mean, self.norm.running_var
            y = F.batch_norm(x, *running, scale, self.norm.bias, training=True)
        elif self.defect == "dbias":
            weight, bias = self.norm.weight, self.norm.bias.detach()
            running = self.norm.running_mean, self.norm.running_var
            y = F.batch_norm(x, *running, weight, bias, training=True)
        else:
            y = self.norm(x)
        if self.defect == "running_var":
            self.norm.running_var = self.norm.running_var * 1.001
        if self.defect == "one element":
            y = y.index_put((torch.tensor(1),) * 4, torch.tensor(0.0))
        if self.defect == "nan":
            y = y.index_put((torch.tensor(1),) * 4, torch.tensor(math.nan))
        return y.double() if self.defect == "dtype" else y


def wrong(defect: str | None) -> Provider:
    return Provider("wrong", lambda _: Wrong(defect), tuple(FAMILIES))
