"""``AdaptiveModel``: a model that adapts its batch norms to the stream it predicts."""

from __future__ import annotations

import functools
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from fusednorm.adapt.batches import checked, first_tensor
from fusednorm.adapt.gather import Layer, check_finite, evaluating, gathering, lending
from fusednorm.adapt.norms import Predicate, find
from fusednorm.adapt.ranks import Ranks, unwrapped
from fusednorm.adapt.report import AdaptationReport, report_of
from fusednorm.adapt.rules import State, rule
from fusednorm.reference.adaptation import Statistics


class AdaptiveModel(nn.Module):
    """Predict with statistics of the stream: each call adapts to its batch, then uses the result.

    The model itself is never changed: statistics are lent to its norm layers for the length of
    their forward, in training mode too, where gradients see them as constants. Drop the wrapper, or
    call ``reset``, and the source is there.

        model = AdaptiveModel(model, "prior", prior_strength=16)
        for images in camera:
            predictions = model(images)

    Args:
        model: any module with batch norms; parts that are compiled run eagerly in here.
        method: "ema": a running average over the stream (``momentum=None``: of all its batches;
            otherwise starting from the source). "replace": the moments of everything seen, pooled.
            "prior": each batch by itself, mixed with the source. "batch": each batch by itself.
        process_group: ranks that call in step, each with a part of the batch.
        prior_strength, momentum, variance, total_variance, adapt_mean, adapt_var, predicate:
            as in ``adapt_batch_norm``.

    Attributes:
        adapting: False keeps the statistics of the last batch, whatever comes.
        images, batches: of the stream so far.

    Raises:
        ValueError, TypeError: as ``adapt_batch_norm``; a batch that is refused leaves no trace.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str = "ema",
        *,
        prior_strength: float | None = None,
        momentum: float | None = None,
        variance: str | None = None,
        total_variance: bool = False,
        adapt_mean: bool = True,
        adapt_var: bool = True,
        predicate: Predicate | None = None,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        self._rule = rule(
            method, prior_strength, momentum, variance, total_variance, adapt_mean, adapt_var
        )
        inner, group = unwrapped(model)
        found, self._kept = find(inner, predicate)
        self._layers = [Layer(name, module, handler) for name, (module, handler) in found.items()]
        self._ranks = Ranks(process_group if process_group is not None else group)
        self.model = model
        self.adapting = True
        self.reset()
        _prepare()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _prepare()

    def reset(self) -> None:
        """Forget the stream: the next batch finds the source statistics."""
        for layer in self._layers:
            layer.state = State()
        self.images = self.batches = self._counted = 0

    @property
    def report(self) -> AdaptationReport:
        """How far the statistics used last are from the source's."""
        sources = [layer.handler.source(layer.module) for layer in self._layers]
        return report_of(
            self._rule, self._layers, sources, self._kept, self.images, self.batches, self._counted
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's prediction for this batch, the first tensor among the arguments."""
        return _eager["predict"](self, args, kwargs)

    def _predict(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with ExitStack() as everything:
            everything.enter_context(torch.compiler.set_stance("force_eager"))
            if self.adapting:
                return self._adapt(args, kwargs)
            everything.enter_context(evaluating(layer.module for layer in self._layers))
            for layer in self._layers:
                if layer.reached:
                    source = layer.handler.source(layer.module)
                    last = self._rule.statistics(layer.state, source, self._counted)
                    everything.enter_context(lending(layer, functools.partial(_whatever, last)))
            return self.model(*args, **kwargs)

    def _adapt(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        batch = first_tensor(args, kwargs)
        error = None
        try:
            checked(batch, None)
        except (TypeError, ValueError) as refused:
            error = refused
        images = sum(self._ranks.agree(len(batch), error, batch.device))
        before = [layer.state for layer in self._layers]
        alone = self._rule.method in ("prior", "batch")
        if alone:
            for layer in self._layers:
                layer.state = State()
        counted = images if alone else self.images + images
        try:
            with gathering(self._layers, self._rule, self._ranks, counted, lend=True):
                y = self.model(*args, **kwargs)
            check_finite(self._layers)
        except BaseException:
            for layer, state in zip(self._layers, before, strict=True):
                layer.state = state
            raise
        self.images += images
        self.batches += 1
        self._counted = counted
        return y

    def extra_repr(self) -> str:
        return f"method={self._rule.method!r}"


# Traced code would not swap statistics. Filled by the first wrapper: the decorator imports all
# of TorchDynamo, which ``import fusednorm`` should not cost.
_eager: dict[str, Any] = {}


def _prepare() -> None:
    if not _eager:
        _eager["predict"] = torch.compiler.disable(AdaptiveModel._predict)


def _whatever(last: Statistics, x: Tensor) -> Statistics:
    """The statistics for any input."""
    return last
