"""Which implementation runs: ``cuda``, ``triton``, ``reference``, or ``auto``.

``auto`` takes the compiled CUDA kernels for CUDA tensors, Triton where they are not installed,
and the reference for every other device. ``FUSEDNORM_BACKEND`` sets the choice for a process,
``with backend(name):`` for a block; the choice is process-wide, not per thread.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from fusednorm.ops.schema import NAMESPACES, NATIVE_MISSING

CHOICES = ("auto", *NAMESPACES)


def _checked(name: str, source: str) -> str:
    if name not in CHOICES:
        allowed = ", ".join(repr(c) for c in CHOICES)
        raise ValueError(f"{source}: unknown backend {name!r}, expected one of {allowed}")
    return name


_choice = _checked(os.environ.get("FUSEDNORM_BACKEND", "auto"), "FUSEDNORM_BACKEND")
_null = False


# Looked up once at import, without importing Triton: torch.compile traces these as constants.
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def _missing(name: str) -> str | None:
    """Why ``name`` cannot run here, or None if it can."""
    if name == "cuda" and NATIVE_MISSING is not None:
        return NATIVE_MISSING
    if name == "triton" and not HAS_TRITON:
        return "the package 'triton' is not installed"
    if name == "reference" or torch.cuda.is_available() or (name == "triton" and INTERPRETED):
        return None
    return "there is no CUDA device"


def available_backends() -> tuple[str, ...]:
    """The backends that can run on this machine now, fastest first."""
    return tuple(name for name in NAMESPACES if _missing(name) is None)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the backend of every operator called inside the block.

    Args:
        name: ``"cuda"``, ``"triton"``, ``"reference"`` or ``"auto"``.

    Raises:
        ValueError: an unknown name.
        RuntimeError: a backend that cannot run on this machine.
    """
    global _choice
    why = _missing(_checked(name, "backend")) if name != "auto" else None
    if why is not None:
        raise RuntimeError(
            f"backend {name!r} is not available: {why}; available: "
            + ", ".join(repr(b) for b in available_backends())
        )
    previous, _choice = _choice, name
    try:
        yield
    finally:
        _choice = previous


@contextlib.contextmanager
def null_launch() -> Iterator[None]:
    """The compiled operators for CPU tensors, without their launches: outputs are uninitialised.

    For measuring what the host does in a call, and for nothing else.
    """
    global _choice, _null
    if NATIVE_MISSING is not None:
        raise RuntimeError(f"backend 'cuda' is not available: {NATIVE_MISSING}")
    switch = torch.ops.fusednorm._set_null_launch
    previous, _choice, _null = _choice, "cuda", True
    switch(True)
    try:
        yield
    finally:
        switch(False)
        _choice, _null = previous, False


def resolve(x: Tensor) -> str:
    """The backend that serves x.

    Raises:
        RuntimeError: the chosen backend is missing or does not take x's device.
    """
    if _choice == "reference" or (_choice == "auto" and not x.is_cuda):
        return "reference"
    if _choice == "auto":
        return "cuda" if NATIVE_MISSING is None else "triton" if HAS_TRITON else "reference"
    if _null and _choice == "cuda":
        return _choice
    if not x.is_cuda and not (_choice == "triton" and INTERPRETED):
        raise RuntimeError(
            f"backend {_choice!r} takes CUDA tensors, got input on {x.device}; "
            "use backend 'auto' or 'reference'"
        )
    why = _missing(_choice)
    if why is not None:
        raise RuntimeError(f"backend {_choice!r} is not available: {why}")
    return _choice


def reasoned(x: Tensor) -> tuple[str, str]:
    """``resolve(x)`` and the reason for it, for people."""
    name = resolve(x)
    if _choice != "auto":
        return name, "chosen by backend() or FUSEDNORM_BACKEND"
    if not x.is_cuda:
        return name, f"input is on {x.device}"
    if name == "cuda":
        return name, "input is a CUDA tensor and the compiled library is installed"
    without = f"input is a CUDA tensor, but {NATIVE_MISSING}"
    return name, without if name == "triton" else f"{without}, and neither is triton"
