"""One forward pass whose norm layers hand over their inputs' moments and may be lent statistics.

Nothing of the model is written to: hooks swap a layer's statistics for the length of its own
forward, and hooks, modes and statistics are as they were when the pass is over, also when it fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fusednorm.adapt.norms import Handler
from fusednorm.adapt.ranks import Ranks
from fusednorm.adapt.rules import Rule, State
from fusednorm.reference.adaptation import Statistics


@dataclass
class Layer:
    """A norm layer that is being adapted."""

    name: str
    module: nn.Module
    handler: Handler
    state: State = field(default_factory=State)

    @property
    def reached(self) -> bool:
        return self.state.steps > 0


@contextmanager
def gathering(
    layers: Iterable[Layer],
    rule: Rule,
    ranks: Ranks,
    images: int,
    *,
    lend: bool,
    weight: int = 1,
    unbiased: bool | None = None,
) -> Iterator[None]:
    """Absorb what reaches the layers; with ``lend`` they evaluate with adapted statistics.

    ``images``: of the target so far, those of this pass included. ``weight`` 0 gathers nothing
    from this rank but what the others have.
    """
    layers = list(layers)
    with ExitStack() as everything:
        everything.enter_context(evaluating(layer.module for layer in layers))
        for layer in layers:
            everything.enter_context(
                _hooked(layer, rule, ranks, images, lend=lend, weight=weight, unbiased=unbiased)
            )
        yield


@contextmanager
def _hooked(
    layer: Layer,
    rule: Rule,
    ranks: Ranks,
    images: int,
    *,
    lend: bool,
    weight: int,
    unbiased: bool | None,
) -> Iterator[None]:
    def prepare(x: Tensor) -> Statistics | None:
        batch = layer.handler.moments(layer.module, x)
        if batch is None:
            return None
        batch = ranks.merged(batch, weight)
        source = layer.handler.source(layer.module)
        try:
            layer.state = rule.absorb(layer.state, batch, source)
            return rule.statistics(layer.state, source, images, unbiased) if lend else None
        except ValueError as error:
            raise ValueError(
                f"batches: {error}, in layer {layer.name or '(the model)'}, whose input has shape "
                f"{tuple(x.shape)}"
            ) from None

    with lending(layer, prepare):
        yield


@contextmanager
def lending(layer: Layer, statistics: Callable[[Tensor], Statistics | None]) -> Iterator[None]:
    """Hooks by which ``statistics(input)`` says what to evaluate with; None: with its own."""
    loan = ExitStack()

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(x, Tensor):
            with torch.no_grad():
                lent = statistics(x)
            if lent is not None:
                loan.enter_context(layer.handler.lent(module, *lent))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        loan.close()

    hooks = (
        layer.module.register_forward_pre_hook(before, with_kwargs=True),
        layer.module.register_forward_hook(after, always_call=True),
    )
    try:
        yield
    finally:
        loan.close()
        for hook in hooks:
            hook.remove()


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """These modules in evaluation mode, whatever their ``train`` would do besides."""
    modes = [(module, module.training) for module in modules]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


def check_finite(layers: Iterable[Layer]) -> None:
    """ValueError names the first layer whose inputs were not; one look at the device for all."""
    states = [(layer.name, layer.state) for layer in layers if layer.reached]
    if not states:
        return
    flags = []
    for _, state in states:
        mean, m2 = state.average or state.seen[1:]  # type: ignore[index]
        flags.append((mean.sum() + m2.sum()).isfinite())
    # Layers may be spread over devices.
    finite = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()
    for (name, _), fine in zip(states, finite, strict=True):
        if not fine:
            raise ValueError(
                f"batches: the input of layer {name or '(the model)'} has values that are not "
                "finite, though the images are"
            )
