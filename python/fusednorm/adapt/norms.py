"""Which layers can be adapted, and how to read, lend and replace their statistics.

A layer joins by having ``running_mean`` and ``running_var`` that its evaluation reads; what works
otherwise registers a ``Handler``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from fusednorm.reference.adaptation import Moments, Statistics, moments

Predicate = Callable[[str, nn.Module], bool]


class Handler:
    """Statistics in two buffers (G,) that evaluation reads: the rule for most layers.

    A layer whose buffers have other names, or that evaluates otherwise, gets a subclass of this
    and is registered with it: ``register(kind, handler)``.
    """

    names: tuple[str, str] = ("running_mean", "running_var")

    def refuses(self, module: nn.Module) -> str | None:
        """Why this layer cannot be adapted, or None."""
        mean, var = (getattr(module, name, None) for name in self.names)
        if mean is None or var is None:
            return "has no running statistics: it normalizes by the batch as it is"
        if isinstance(module, _LazyNormBase):
            return "its width is not known before a first forward"
        return None

    def source(self, module: nn.Module) -> Statistics:
        """Mean and variance (G,) that evaluation reads now."""
        mean, var = (module._buffers[name] for name in self.names)
        assert mean is not None and var is not None  # else it was refused
        return mean, var

    def moments(self, module: nn.Module, x: Tensor) -> Moments | None:
        """Of the layer's input; None where the layer itself is about to refuse it."""
        num_groups = self.source(module)[0].numel()
        if x.dim() < 2 or x.shape[1:].numel() % num_groups:
            return None
        return moments(x, num_groups)

    @contextmanager
    def lent(self, module: nn.Module, mean: Tensor, var: Tensor) -> Iterator[None]:
        """Evaluate with these statistics; the layer's own tensors are not written to."""
        own = self.source(module)
        try:
            for name, old, new in zip(self.names, own, (mean, var), strict=True):
                module._buffers[name] = _usable(new.to(old))
            yield
        finally:
            for name, old in zip(self.names, own, strict=True):
                module._buffers[name] = old

    def replace(self, module: nn.Module, mean: Tensor, var: Tensor, batches: int | None) -> None:
        """Write statistics in place, and the counter of batches unless ``batches`` is None."""
        for old, new in zip(self.source(module), (mean, var), strict=True):
            old.copy_(new)
        counter = getattr(module, "num_batches_tracked", None)
        if batches is not None and counter is not None:
            counter.fill_(batches)

    def snapshot(self, module: nn.Module) -> dict[str, Tensor]:
        """Copies of every buffer that ``replace`` may change."""
        names = (*self.names, "num_batches_tracked")
        found = ((name, module._buffers.get(name)) for name in names)
        return {name: buffer.clone() for name, buffer in found if buffer is not None}

    def restore(self, module: nn.Module, snapshot: dict[str, Tensor]) -> None:
        for name, value in snapshot.items():
            module._buffers[name].copy_(value)  # type: ignore[union-attr]


def _usable(t: Tensor) -> Tensor:
    """Autograd cannot save a tensor that was made under inference_mode; a copy it can."""
    return t.clone() if t.is_inference() and not torch.is_inference_mode_enabled() else t


_DEFAULT = Handler()
_REGISTERED: dict[type[nn.Module], Handler] = {}


def register(kind: type[nn.Module], handler: Handler) -> None:
    """Adapt layers of this class, and of classes derived from it, by the handler."""
    _REGISTERED[kind] = handler


def handler_of(module: nn.Module) -> Handler | None:
    """The handler of a norm layer; None for every other module."""
    for kind in type(module).__mro__:
        if kind in _REGISTERED:
            return _REGISTERED[kind]
    if isinstance(module, _InstanceNorm):
        return None
    if isinstance(module, (_BatchNorm, _LazyNormBase)):
        return _DEFAULT
    buffers = [module._buffers.get(name) for name in Handler.names]
    fits = all(isinstance(b, Tensor) and b.dim() == 1 and b.is_floating_point() for b in buffers)
    return _DEFAULT if fits and hasattr(module, "eps") else None


def find(
    model: nn.Module, predicate: Predicate | None
) -> tuple[dict[str, tuple[nn.Module, Handler]], dict[str, str]]:
    """The layers to adapt by name, a shared one once, and the norms left alone with the reason.

    Raises:
        ValueError: there is none to adapt.
    """
    found, kept = {}, {}
    for name, module in model.named_modules():
        handler = handler_of(module)
        if handler is None:
            continue
        why = handler.refuses(module)
        if why is None and predicate is not None and not predicate(name, module):
            why = "not chosen by the predicate"
        if why is None:
            found[name] = (module, handler)
        else:
            kept[name] = why
    if not found:
        reasons = "".join(f"\n  {name}: {why}" for name, why in kept.items())
        raise ValueError(
            f"model: no norm layer with running statistics to adapt in {type(model).__name__}"
            + reasons
        )
    return found, kept
