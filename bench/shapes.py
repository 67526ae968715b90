"""The tensors that are measured, under names a command line can ask for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .registry import choose


@dataclass(frozen=True)
class Shape:
    """A named (N, C, *spatial) input."""

    name: str
    dims: tuple[int, ...]

    @property
    def numel(self) -> int:
        total = 1
        for size in self.dims:
            total *= size
        return total


# Channels and side of every distinct BatchNorm input of ResNet-50 at 224 x 224.
RESNET50 = {
    "stem": (64, 112),
    "l1.c1": (64, 56),
    "l1.c3": (256, 56),
    "l2.0.c1": (128, 56),
    "l2.c1": (128, 28),
    "l2.c3": (512, 28),
    "l3.0.c1": (256, 28),
    "l3.c1": (256, 14),
    "l3.c3": (1024, 14),
    "l4.0.c1": (512, 14),
    "l4.c1": (512, 7),
    "l4.c3": (2048, 7),
}
# 2 to 16 is where these norms live, 256 where batch statistics are said to get worse again.
BATCHES = (2, 4, 8, 16, 32, 64, 128, 256)


def _named(prefix: str, dims: dict[str, tuple[int, ...]]) -> list[Shape]:
    return [Shape(f"{prefix}.{name}", size) for name, size in dims.items()]


SETS: dict[str, list[Shape]] = {
    "resnet50": [
        Shape(f"resnet50.{layer}@{batch}", (batch, channels, side, side))
        for batch in BATCHES
        for layer, (channels, side) in RESNET50.items()
    ],
    "detection": _named(
        "detection",
        {
            "p2": (2, 256, 200, 336),
            "p3": (2, 256, 100, 168),
            "p4": (2, 256, 50, 84),
            "p5": (2, 256, 25, 42),
        },
    ),
    # No power of two, no 16-byte alignment, no spatial axis, one position.
    "odd": _named(
        "odd",
        {
            "c24": (16, 24, 56, 56),
            "c65": (8, 65, 31, 33),
            "c200": (32, 200, 7, 7),
            "point": (256, 512, 1, 1),
            "plain": (1024, 768),
        },
    ),
    # Video and medical volumes: a clip's stem and last stage, a 3-D U-Net's top and an odd patch.
    "3d": _named(
        "3d",
        {
            "stem": (4, 64, 16, 56, 56),
            "stage4": (4, 512, 2, 7, 7),
            "unet": (2, 32, 64, 64, 64),
            "odd": (2, 48, 9, 27, 29),
        },
    ),
    # Small enough to be all launch cost on a GPU, and all dispatch cost on a CPU.
    "tiny": _named("tiny", {"a": (2, 8, 4, 4), "b": (2, 64, 8, 8)}),
    # The shape on which the CPU cost is promised (tests/test_bench.py).
    "cpu": _named("cpu", {"step": (32, 64, 56, 56)}),
}
BY_NAME = {shape.name: shape for shapes in SETS.values() for shape in shapes}


def select(names: Iterable[str]) -> list[Shape]:
    """Shapes of the named sets and single shapes, each once, in the order asked for."""
    picked: dict[str, Shape] = {}
    for name in choose("shape", names, [*SETS, *BY_NAME], shown=[*SETS, "or one name of `list`"]):
        for shape in SETS.get(name) or [BY_NAME[name]]:
            picked[shape.name] = shape
    return list(picked.values())
