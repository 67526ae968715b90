"""Who computes a case: fusednorm's backends, PyTorch's own norms, and what else can be imported.

Every provider builds an `nn.Module` called as ``module(x, *extras, residual)``, so that what is
timed is what a user would write, running statistics and all.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

import fusednorm

from . import papers, peers
from .plain import composition, torch_norm
from .registry import FAMILIES, Case


@dataclass(frozen=True)
class Provider:
    """How a module is built, for which families, under which switch, and where it can run.

    ``missing(device)`` says why the provider cannot run there at all, ``refuses(case)`` why not
    this case; both are told once, in a line. ``captures(case)``: a CUDA graph of it is possible.
    """

    name: str
    build: Callable[[Case], nn.Module]
    families: tuple[str, ...] = tuple(FAMILIES)
    missing: Callable[[str], str | None] = lambda device: None
    switch: Callable[[], AbstractContextManager[Any]] = nullcontext
    refuses: Callable[[Case], str | None] = lambda case: None
    captures: Callable[[Case], bool] = lambda case: True


def _fused(case: Case) -> nn.Module:
    family = case.family
    groups = (case.op.num_groups(case.dims),) if family.grouped else ()
    build: Callable[..., nn.Module] = getattr(fusednorm, family.fused)
    # Not every method takes an activation; asked for one, such a class is a row with its error.
    act = {} if case.act is None else {"act": case.act}
    return build(case.dims[1], *groups, **act, **family.options)


def _unfused(case: Case) -> str | None:
    name = case.family.fused
    return None if hasattr(fusednorm, name) else f"not in this version: fusednorm.{name}"


def _no_gpu(device: str) -> str | None:
    return None if device == "cuda" else "needs a CUDA GPU"


def _backend(name: str) -> Callable[[str], str | None]:
    def missing(device: str) -> str | None:
        if (reason := _no_gpu(device)) is not None:
            return reason
        known = fusednorm.available_backends()
        return None if name in known else f"backend not available, only {', '.join(known)}"

    return missing


def _ours(name: str, missing: Callable[[str], str | None]) -> Provider:
    return Provider(
        name,
        _fused,
        missing=missing,
        switch=lambda: fusednorm.backend(name),
        refuses=_unfused,
    )


def _capturable(case: Case) -> bool:
    return papers.capturable(composition(case))


def _uncompiled(case: Case) -> str | None:
    if _capturable(case):
        return None
    return "keeps its history on the host, which torch.compile would trace anew"


# The papers' compositions share one forward, and torch.compile gives up on a function it has
# compiled eight times: it would run it as it is, without a word in the row. So each stays apart,
# where torch can do that, and giving up is an error.
_APART: dict[str, Any] = (
    {"isolate_recompiles": True}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters
    else {}
)


@contextlib.contextmanager
def _compiling(**inductor: Any) -> Iterator[None]:
    # A second of imports that only compilers need.
    import torch._dynamo.config
    import torch._functorch.config
    import torch._inductor.config

    # Backward alone is repeated on one graph, whose buffers it must then not reuse.
    kept = torch._functorch.config.patch(donated_buffer=False)
    # Where modules cannot be kept apart, those of one forward count together.
    loud = torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=64)
    with kept, loud, torch._inductor.config.patch(inductor):
        yield


def _compile(name: str, missing: Callable[[str], str | None], **inductor: Any) -> Provider:
    """The plain composition under torch.compile.

    Settings go through the configuration rather than a mode, since backward is compiled later, and
    max-autotune's own CUDA graphs would stand in the way of the one that everybody is timed in.
    They are given as options too: dynamo takes backends of the same options for the same, and would
    hand this provider what another one compiled.
    """
    options = dict(inductor) or None
    return Provider(
        name,
        lambda case: cast(
            nn.Module, torch.compile(composition(case), dynamic=False, options=options, **_APART)
        ),
        missing=missing,
        switch=lambda: _compiling(**inductor),
        refuses=_uncompiled,
    )


PROVIDERS = {
    provider.name: provider
    for provider in (
        _ours("cuda", _backend("cuda")),
        _ours("triton", _backend("triton")),
        _ours("reference", lambda device: "is our path for the CPU" if device == "cuda" else None),
        Provider(
            "cudnn", torch_norm, ("batch_norm",), _no_gpu, lambda: torch.backends.cudnn.flags(True)
        ),
        Provider(
            "native",
            torch_norm,
            ("batch_norm", "group_norm"),
            switch=lambda: torch.backends.cudnn.flags(False),
        ),
        _compile("compile", lambda device: None),
        _compile(
            "compile-max-autotune",
            lambda device: None,
            max_autotune=True,
            coordinate_descent_tuning=True,
        ),
        _compile(
            "compile-cooperative",
            _no_gpu,
            **{"triton.cooperative_reductions": True},
        ),
        Provider("eager", composition, captures=_capturable),
        Provider(
            "apex",
            peers.apex,
            ("batch_norm", "group_norm"),
            lambda device: _no_gpu(device) or peers.not_importable("apex"),
            refuses=peers.apex_refuses,
        ),
        Provider(
            "cudnn-frontend",
            peers.CudnnFrontend,
            ("batch_norm",),
            lambda device: _no_gpu(device) or peers.not_importable("cudnn"),
            refuses=peers.cudnn_frontend_refuses,
        ),
    )
}
