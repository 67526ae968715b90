"""Swapping the norm layers of a whole model, and back, all or nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase

from fusednorm.nn import BatchGroupNorm, GroupNorm

Predicate = Callable[[str, nn.Module], bool]

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_OTHER_NORMS = (_BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)


@dataclass
class ConversionReport:
    """Which modules were swapped, and which norm layers were kept and why, by qualified name."""

    swapped: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} swapped, {len(self.kept)} kept"]
        lines += [f"  {name}: {what}" for name, what in self.swapped.items()]
        lines += [f"  {name}: kept, {why}" for name, why in self.kept.items()]
        return "\n".join(lines)


class _Kept(Exception):
    """A norm layer that is left alone; the message says why."""


def convert_norm(
    model: nn.Module,
    factory: Callable[[int], nn.Module],
    *,
    predicate: Predicate | None = None,
    report: ConversionReport | None = None,
) -> nn.Module:
    """Replace the model's batch norms by what ``factory`` makes, in place.

    Swapped are ``nn.BatchNorm1d/2d/3d`` and batch norms that carry their activation in ``act``
    beside an idle ``drop`` (timm's ``BatchNormAct2d``), whose activation is then fused.
    ``SyncBatchNorm`` is kept: this package does not synchronise statistics yet. eps, momentum, the
    parameters themselves (optimizers stay valid), ``training``, device and dtype are carried over,
    running statistics with their counter where their sizes agree, and their absence; hooks are
    not. A module used in several places stays shared.

    Args:
        model: any module; if it is itself a batch norm, the new layer is returned.
        factory: num_features -> norm layer, e.g. ``functools.partial(BatchGroupNorm,
            num_groups=16)``.
        predicate: (qualified name, module) -> whether to swap it. Default: all.
        report: filled with what was swapped and what was kept and why.

    Returns:
        The model.

    Raises:
        ValueError: there is nothing to swap, or ``factory`` makes a layer without the parameters
            of the old one, or with others' shapes. Whatever is raised, the model is untouched.
    """
    return _swap(model, functools.partial(_from_torch, factory=factory), predicate, report)


def revert_norm(
    model: nn.Module,
    *,
    predicate: Predicate | None = None,
    report: ConversionReport | None = None,
) -> nn.Module:
    """Replace this package's norms by torch's, in place: the inverse of ``convert_norm``.

    A batch norm that was converted becomes what it was; one that was built here becomes
    ``nn.BatchNorm2d``. ``GroupNorm`` becomes ``nn.GroupNorm``. ``BatchGroupNorm`` layers without
    one group a channel, and fused activations that were not there before, have no counterpart:
    they are kept and named in the report. Arguments, result and errors as ``convert_norm``.
    """
    return _swap(model, _to_torch, predicate, report)


def _swap(
    model: nn.Module,
    make: Callable[[nn.Module], nn.Module | None],
    predicate: Predicate | None,
    report: ConversionReport | None,
) -> nn.Module:
    report = ConversionReport() if report is None else report
    made: dict[nn.Module, nn.Module] = {}
    places: dict[str, nn.Module] = {}
    found = ConversionReport()
    for name, module in model.named_modules(remove_duplicate=False):
        try:
            if predicate is not None and not predicate(name, module):
                if isinstance(module, _OTHER_NORMS):
                    raise _Kept("not chosen by the predicate")
                continue
            new = made.get(module) or make(module)
        except _Kept as why:
            found.kept[name] = f"{type(module).__name__}: {why}"
            continue
        if new is not None:
            made[module] = places[name] = new
            found.swapped[name] = f"{type(module).__name__} -> {new}"
    report.swapped, report.kept = found.swapped, found.kept
    if not made:
        raise ValueError(f"model: no norm layer to swap in {type(model).__name__}; {found}")
    for name, new in places.items():
        parent, _, child = name.rpartition(".")
        if name:
            setattr(model.get_submodule(parent), child, new)
    return made.get(model, model)


def _from_torch(old: nn.Module, factory: Callable[[int], nn.Module]) -> nn.Module | None:
    if isinstance(old, (BatchGroupNorm, GroupNorm)) or not isinstance(old, _OTHER_NORMS):
        return None
    if isinstance(old, _LazyNormBase):
        raise _Kept("its width is not known before a first forward")
    if not isinstance(old, _BatchNorm):
        raise _Kept("not a batch norm")
    if isinstance(old, nn.SyncBatchNorm):
        raise _Kept("synchronised statistics have no counterpart")
    origin: Callable[..., nn.Module] = type(old)
    act: str | None = None
    if type(old) not in _BATCH_NORMS:
        act = _carried_activation(old)
        origin = functools.partial(origin, act_layer=type(old.act))
    new = factory(old.num_features)
    if not isinstance(new, nn.Module):
        raise ValueError(f"factory: expected a module, got {new!r}")
    if act is not None:
        if getattr(new, "act", act) is not None:
            raise _Kept(f"its activation {act!r} does not fit {type(new).__name__}")
        new.act = act  # type: ignore[assignment]
    return _take_over(new, old, origin)


def _carried_activation(old: nn.Module) -> str | None:
    drop, act = getattr(old, "drop", None), getattr(old, "act", None)
    if not isinstance(drop, nn.Identity):
        raise _Kept("a subclass that does more than normalize")
    if isinstance(act, nn.Identity):
        return None
    if isinstance(act, nn.GELU) and act.approximate != "none":
        raise _Kept("its GELU is approximate")
    if isinstance(act, nn.LeakyReLU) and act.negative_slope != 0.01:
        raise _Kept(f"its LeakyReLU has slope {act.negative_slope}, not 0.01")
    names = {nn.ReLU: "relu", nn.SiLU: "silu", nn.GELU: "gelu", nn.LeakyReLU: "leaky_relu"}
    if type(act) not in names:
        raise _Kept(f"its activation {type(act).__name__} is none of ours")
    return names[type(act)]


def _to_torch(old: nn.Module) -> nn.Module | None:
    if not isinstance(old, (BatchGroupNorm, GroupNorm)):
        if isinstance(old, _OTHER_NORMS):
            raise _Kept("not a layer of this package")
        return None
    if isinstance(old, GroupNorm):
        if old.act is not None:
            raise _Kept(f"its fused activation {old.act!r} has no counterpart")
        group_norm = nn.GroupNorm(old.num_groups, old.num_channels, old.eps, old.affine)
        return _take_over(group_norm, old, None)
    if old.num_groups != old.num_features:
        raise _Kept(f"{old.num_groups} groups over {old.num_features} channels")
    origin = getattr(old, "_origin", nn.BatchNorm2d)
    if old.act is not None and not isinstance(origin, functools.partial):
        raise _Kept(f"its fused activation {old.act!r} has no counterpart")
    new = origin(
        old.num_features,
        eps=old.eps,
        momentum=old.momentum,
        affine=old.affine,
        track_running_stats=old.track_running_stats,
    )
    return _take_over(new, old, None)


def _take_over(new: nn.Module, old: nn.Module, origin: Callable[..., Any] | None) -> nn.Module:
    """Give new everything of old that both have; raise before anything of old has changed."""
    tensor = next((t for t in (*old.parameters(False), *old.buffers(False))), None)
    if tensor is not None:
        dtype = tensor.dtype if tensor.is_floating_point() else None
        new = new.to(device=tensor.device, dtype=dtype)
    for name, value in old._parameters.items():
        mine = new._parameters.get(name)
        if value is not None and name not in new._parameters:
            raise ValueError(f"factory: expected a layer with {name}, got {type(new).__name__}")
        if value is not None and mine is not None and mine.shape != value.shape:
            raise ValueError(
                f"factory: expected {name} of shape {tuple(value.shape)}, "
                f"got {tuple(mine.shape)} in {type(new).__name__}"
            )
        if name in new._parameters:
            new._parameters[name] = value
    if isinstance(old, _BatchNorm) and isinstance(new, _BatchNorm):
        _take_over_statistics(new, old)
    for name in ("eps", "momentum", "affine"):
        if hasattr(old, name) and hasattr(new, name):
            setattr(new, name, getattr(old, name))
    if hasattr(old, "qconfig"):
        new.qconfig = old.qconfig
    if origin is not None and isinstance(new, BatchGroupNorm):
        new._origin = origin  # type: ignore[assignment]
    return new.train(old.training)


def _take_over_statistics(new: _BatchNorm, old: _BatchNorm) -> None:
    if old.running_mean is None:
        new.track_running_stats = False
        for name in new._buffers:
            new._buffers[name] = None
        return
    mine = new.running_mean
    # A counter without its statistics would weigh the next batch as the last of many.
    if mine is not None and mine.shape == old.running_mean.shape:
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            new._buffers[name].copy_(old._buffers[name])  # type: ignore[union-attr, arg-type]
