"""The unlabelled images to adapt to: what is accepted, checked before it reaches the model."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[[nn.Module, Any], Any]
Progress = Callable[[int, int | None, int], None]

# Below this a line would be gone before it is read.
_SILENT_S = 2.0
_EVERY_S = 0.5


def as_batches(batches: Any) -> Iterable[Any]:
    """A tensor is one batch, not a loader of single images."""
    if isinstance(batches, Tensor):
        return [batches]
    if isinstance(batches, Iterable) and not isinstance(batches, (str, bytes, dict)):
        return batches
    raise TypeError(
        "batches: expected a tensor of images or an iterable of such tensors, got "
        f"{type(batches).__name__}"
    )


def checked(batch: Any, forward: Forward | None) -> tuple[Any, int]:
    """The batch as the model takes it and its number of images; errors say what is wrong.

    With a ``forward`` of the user's own only the tensors' values are looked at.
    """
    if forward is None:
        batch = _images_alone(batch)
    tensors = list(_tensors(batch))
    if not tensors:
        raise TypeError(f"batches: expected tensors, got {type(batch).__name__}")
    for t in tensors:
        if t.is_floating_point() and not torch.isfinite(t).all():
            raise ValueError(
                f"batches: expected finite images, got NaN or infinity in shape {tuple(t.shape)}"
            )
    # Detection models take a list of images, each (C, H, W).
    listed = isinstance(batch, (list, tuple)) and all(
        isinstance(t, Tensor) and t.dim() == 3 for t in batch
    )
    images = len(batch) if listed else tensors[0].shape[0] if tensors[0].dim() else 1
    if not images:
        raise ValueError(f"batches: expected images, got shape {tuple(tensors[0].shape)}")
    return batch, images


def _images_alone(batch: Any) -> Tensor:
    if isinstance(batch, (list, tuple)) and len(batch) == 1:
        batch = batch[0]  # what a DataLoader over one tensor gives
    hint = "; for models that take something else pass forward=lambda model, batch: ..."
    if not isinstance(batch, Tensor):
        what = type(batch).__name__
        if isinstance(batch, (list, tuple)):
            what += f" of {', '.join(_described(part) for part in batch[:4])}"
        raise TypeError(
            f"batches: expected images alone, got a {what}. Adaptation takes no labels: pass "
            f"(images for images, labels in loader){hint}"
        )
    if not batch.is_floating_point():
        raise TypeError(
            f"batches: expected floating images, got {_described(batch)}; are these labels, or "
            f"images not yet scaled?{hint}"
        )
    if batch.dim() < 2:
        raise ValueError(f"batches: expected images (N, C, *), got shape {tuple(batch.shape)}")
    return batch


def _described(part: Any) -> str:
    if isinstance(part, Tensor):
        return f"{str(part.dtype).removeprefix('torch.')} {tuple(part.shape)}"
    return type(part).__name__


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, dict):
        for part in batch.values():
            yield from _tensors(part)
    elif isinstance(batch, (list, tuple)):
        for part in batch:
            yield from _tensors(part)


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The images among a model's arguments."""
    for t in _tensors((args, kwargs)):
        return t
    raise TypeError("input: expected a tensor of images among the arguments")


def reporter(progress: bool | Progress | None) -> Progress:
    """What to call after each batch with (batches done, of how many or None, images)."""
    if callable(progress):
        return progress
    if progress is False or (progress is None and not sys.stderr.isatty()):
        return lambda done, total, images: None
    began = time.monotonic()
    last = began if progress is None else began - _SILENT_S

    def line(done: int, total: int | None, images: int) -> None:
        nonlocal last
        now = time.monotonic()
        ended = done == total
        wait = _SILENT_S if last == began and progress is None else _EVERY_S
        if now - last < wait and not (ended and last > began) and not (ended and progress):
            return
        last = now
        of = "" if total is None else f"/{total}"
        left = "" if not total else f", {(now - began) / done * (total - done):.0f} s left"
        end = "\n" if ended else "\r"
        print(f"adapting: batch {done}{of}, {images} images{left}   ", end=end, file=sys.stderr)

    return line
