"""What is measured: families of norms, their ops and cases, and the bytes they cannot avoid.

A family is one entry of `FAMILIES`, whether or not this version of fusednorm has it fused; its
plain composition stands in `papers`, with the extra operands it is called with. So a method that
is only planned is measured as its paper's code today, and beside it on the day its class exists.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from . import papers
from .papers.base import ACTIVATIONS

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
LAYOUTS = ("nchw", "nhwc")
DIRECTIONS = ("forward", "backward", "both")


def choose(
    kind: str, names: Iterable[str], known: Sequence[str], shown: Sequence[str] | None = None
) -> list[str]:
    """The names, or a ValueError that lists the known ones."""
    names = list(names)
    for name in names:
        if name not in known:
            raise ValueError(f"unknown {kind} {name!r}; known: {', '.join(shown or known)}")
    return names


def fusion_name(act: str | None, residual: bool) -> str:
    """What is fused in, in one word: "none", "relu", "residual", "residual+relu"."""
    return "+".join(word for word in ("residual" if residual else None, act) if word) or "none"


FUSIONS = {
    fusion_name(act, residual): (act, residual) for residual in (False, True) for act in ACTIVATIONS
}


@dataclass(frozen=True)
class Family:
    """One method: the class that fuses it, and how its cases differ from batch norm's.

    ``fused`` is looked up in `fusednorm` when it is needed and may be missing there.
    ``options`` are its arguments beside num_features, num_groups and act.
    ``touched`` counts the tensors of x's size that forward and backward cannot avoid to touch.
    ``activated`` names the family whose result the activation sees, where that is not this one's.
    """

    name: str
    fused: str
    grouped: bool = False
    per_sample: bool = False
    residual: bool = True
    ranks: tuple[int, ...] = (2, 3, 4, 5)
    options: dict[str, Any] = field(default_factory=dict)
    touched: tuple[int, int] = (2, 3)
    activated: str | None = None


# Published code takes images.
_IMAGES: dict[str, Any] = {"ranks": (4,)}
FAMILIES = {
    family.name: family
    for family in (
        Family("batch_norm", "BatchNorm"),
        Family("batch_group_norm", "BatchGroupNorm", grouped=True),
        Family("group_norm", "GroupNorm", grouped=True, per_sample=True),
        # Forward also reads the convolution's input, for the statistics' gradients.
        Family(
            "cross_iteration_batch_norm",
            "CrossIterationBatchNorm",
            residual=False,
            touched=(3, 3),
            **_IMAGES,
        ),
        Family("memorized_batch_norm", "MemorizedBatchNorm", **_IMAGES),
        Family("instance_enhancement_batch_norm", "InstanceEnhancementBatchNorm", **_IMAGES),
        Family(
            "sandwich_batch_norm",
            "SandwichBatchNorm",
            residual=False,
            options={"num_classes": papers.CLASSES},
            **_IMAGES,
        ),
        Family(
            "sandwich_aux_batch_norm",
            "SandwichAuxBatchNorm",
            residual=False,
            options={"num_branches": papers.BRANCHES},
            **_IMAGES,
        ),
        Family(
            "sandwich_nas_batch_norm",
            "SandwichNASBatchNorm",
            residual=False,
            options={"num_ops": papers.OPERATIONS, "num_nodes": 1},
            **_IMAGES,
        ),
        # The style is read, too.
        Family("sandwich_adain", "SandwichAdaIN", residual=False, touched=(3, 3), **_IMAGES),
        Family(
            "proxy_norm",
            "ProxyNorm",
            grouped=True,
            per_sample=True,
            residual=False,
            activated="group_norm",
            **_IMAGES,
        ),
        Family("positional_norm", "PositionalNorm", residual=False, **_IMAGES),
        Family("batch_renorm", "BatchRenorm", **_IMAGES),
        Family("moving_average_batch_norm", "MovingAverageBatchNorm", **_IMAGES),
    )
}


@dataclass(frozen=True)
class Op:
    """A norm of one family with a fixed number of groups (None: one a channel)."""

    family: str
    groups: int | None = None

    @property
    def name(self) -> str:
        grouped = FAMILIES[self.family].grouped
        return f"{self.family}[{self.groups or 'C'}]" if grouped else self.family

    @property
    def per_sample(self) -> bool:
        return FAMILIES[self.family].per_sample

    def num_groups(self, dims: Sequence[int]) -> int:
        return dims[1] if self.groups is None else self.groups

    def misfit(self, dims: Sequence[int], residual: bool = False) -> str | None:
        """Why this op cannot take a tensor of these sizes, or a residual; None if it can."""
        family = FAMILIES[self.family]
        if residual and not family.residual:
            return "takes no residual"
        if len(dims) not in family.ranks:
            return f"takes no tensor of {len(dims)} axes"
        groups = self.num_groups(dims)
        unit, what = dims[1], "C"
        if self.family == "batch_group_norm":
            for size in dims[2:]:
                unit *= size
            what = "C*H*W"
        return f"{groups} groups do not divide {what} = {unit}" if unit % groups else None


OPS = {
    op.name: op
    for op in (
        Op("batch_norm"),
        Op("batch_group_norm"),
        Op("batch_group_norm", 8),
        Op("batch_group_norm", 32),
        Op("batch_group_norm", 128),
        Op("group_norm", 32),
        Op("proxy_norm", 32),
        *(Op(name) for name, f in FAMILIES.items() if not f.grouped and name != "batch_norm"),
    )
}


@dataclass(frozen=True)
class Case:
    """One measurement short of its provider."""

    op: Op
    dims: tuple[int, ...]
    dtype: str
    layout: str
    direction: str
    act: str | None = None
    residual: bool = False

    @property
    def family(self) -> Family:
        return FAMILIES[self.op.family]

    @property
    def numel(self) -> int:
        total = 1
        for size in self.dims:
            total *= size
        return total

    @property
    def tensor_bytes(self) -> int:
        return self.numel * DTYPES[self.dtype].itemsize


def title(
    direction: str, dims: Sequence[int], dtype: str, layout: str, act: str | None, residual: bool
) -> str:
    """What is measured side by side, in words."""
    sizes = "x".join(map(str, dims))
    fused = ("+ residual" if residual else "") + (f" + {act}" if act else "")
    return f"{direction} ({sizes}) {dtype} {layout} {fused}".strip()


def min_bytes(case: Case) -> int:
    """Bytes no implementation avoids, per-channel vectors neglected.

    Forward reads x (and the residual) and writes y; backward reads x and dy and writes dx. With a
    residual under an activation, backward also writes the residual's gradient and must know the
    activation's slope: one bit an element for relu and leaky_relu, the residual itself for others.
    """
    size = case.tensor_bytes
    forward, backward = (count * size for count in case.family.touched)
    if case.residual:
        forward += size
    if case.residual and case.act is not None:
        kinked = case.act in ("relu", "leaky_relu")
        backward += size + (case.numel // 8 if kinked else size)
    return {"forward": forward, "backward": backward, "both": forward + backward}[case.direction]


def select_ops(names: Iterable[str]) -> list[Op]:
    """Ops by name; a family's name means all of its ops."""
    names = choose("op", names, [*OPS, *(name for name in FAMILIES if name not in OPS)])
    return [op for op in OPS.values() if op.name in names or op.family in names]
