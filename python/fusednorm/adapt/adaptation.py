"""``adapt_batch_norm``: re-estimate a model's batch-norm statistics on unlabelled images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from fusednorm.adapt.batches import Forward, Progress, as_batches, checked, reporter
from fusednorm.adapt.gather import Layer, check_finite, evaluating, gathering
from fusednorm.adapt.norms import Predicate, find
from fusednorm.adapt.ranks import Ranks, unwrapped
from fusednorm.adapt.report import AdaptationReport, report_of
from fusednorm.adapt.rules import Rule, rule

PROPAGATIONS = ("sequential", "one-shot")


class Adaptation:
    """A model's statistics as adapted; as a context manager, until the block is left.

    Attributes:
        report: how far each layer moved, an ``AdaptationReport``.
    """

    def __init__(self, undo: Callable[[], None], report: Callable[[], AdaptationReport]) -> None:
        self._undo: Callable[[], None] | None = undo
        self._report = report

    @property
    def report(self) -> AdaptationReport:
        return self._report()

    def restore(self) -> None:
        """Put the source statistics back, bit for bit; a second call does nothing."""
        if self._undo is not None:
            self._undo()
        self._undo = None

    def __enter__(self) -> Adaptation:
        if self._undo is None:
            raise RuntimeError("this adaptation has been undone: call adapt_batch_norm again")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.restore()


def adapt_batch_norm(
    model: nn.Module,
    batches: Any = None,
    method: str = "replace",
    *,
    prior_strength: float | None = None,
    momentum: float | None = None,
    variance: str | None = None,
    total_variance: bool = False,
    adapt_mean: bool = True,
    adapt_var: bool = True,
    propagation: str = "sequential",
    predicate: Predicate | None = None,
    forward: Forward | None = None,
    process_group: Any = None,
    progress: bool | Progress | None = None,
) -> Adaptation:
    r"""Move the statistics of a trained model's batch norms to unlabelled images of where it runs.

    Every norm of this package with running statistics, torch's ``BatchNorm*`` and
    ``SyncBatchNorm``, and others that evaluate with a ``running_mean`` and ``running_var``. The
    model runs in evaluation mode without gradients; parameters, ``requires_grad``, modes, hooks
    and the identity of buffers are as found, and if anything fails, the statistics as well.

        adapt_batch_norm(model, images)                      # for good
        with adapt_batch_norm(model, loader, "prior") as adaptation:
            print(adaptation.report)                         # source statistics return afterwards

    Args:
        model: any module, also in ``DistributedDataParallel`` or ``torch.compile``.
        batches: a tensor of images (N, C, \*), or an iterable of such tensors, without labels;
            they are moved to the model's device. None for method "batch".
        method: "replace": the images' statistics (Benz et al., arXiv 2010.03630). "prior": their
            mix with the source's as if that were ``prior_strength`` images (Schneider et al.,
            arXiv 2006.16971). "ema": a running average, batch by batch. "batch": from now on
            every forward in evaluation mode uses its own batch (Nado et al., arXiv 2006.10963);
            nothing is gathered.
        prior_strength: N >= 0, 16 by default; 0 is replacement, ``math.inf`` the source.
        momentum: of "ema". None: the average of the batches alone; otherwise the weight of each
            batch, starting from the source.
        variance: "unbiased" or "biased"; by default as published, "biased" for "batch" only.
        total_variance: "prior" also counts the spread between the two means.
        adapt_mean, adapt_var: leave one of them as in the source.
        propagation: "sequential": layers normalize by what has been gathered so far, so that
            deeper ones see adapted inputs. "one-shot": all gather under the source statistics.
        predicate: (qualified name, module) -> whether to adapt a norm layer.
        forward: (model, batch) -> anything, for models that take more than one tensor. Batches
            are then not moved, and may hold anything.
        process_group: processes with a part of the images each; moments are merged over them. By
            default those of a ``DistributedDataParallel`` model, otherwise this one alone. Every
            process of the group must call.
        progress: True, False, a function of (batches done, of how many or None, images), or None:
            a line on a terminal if it takes longer.

    Returns:
        An ``Adaptation``: ``report``, ``restore()``, a context manager.

    Raises:
        TypeError: labels or anything else but floating images in a batch.
        ValueError: an option that is out of range or has no effect with this method; no images;
            values that are not finite; fewer than 2 values a statistic; no norm layer to adapt.
    """
    options = rule(
        method, prior_strength, momentum, variance, total_variance, adapt_mean, adapt_var
    )
    if propagation not in PROPAGATIONS:
        known = " or ".join(map(repr, PROPAGATIONS))
        raise ValueError(f"propagation: expected {known}, got {propagation!r}")
    inner, group = unwrapped(model)
    found, kept = find(inner, predicate)
    layers = [Layer(name, module, handler) for name, (module, handler) in found.items()]
    ranks = Ranks(process_group if process_group is not None else group)
    if method == "batch":
        if batches is not None:
            raise ValueError("batches: expected None, method 'batch' uses each forward's own")
        return _batch_by_batch(inner, layers, kept, options, ranks, compiled=inner is not model)
    sources = [layer.handler.snapshot(layer.module) for layer in layers]
    source_statistics = [_copied(layer) for layer in layers]
    run = _Gathering(inner, layers, options, ranks, forward, propagation == "sequential")
    images, count = run(as_batches(batches), reporter(progress))
    if not any(layer.reached for layer in layers):
        raise ValueError("model: no norm layer's input came by in the forward pass")

    def undo() -> None:
        with torch.no_grad():
            for layer, source in zip(layers, sources, strict=True):
                layer.handler.restore(layer.module, source)

    try:
        with torch.no_grad():
            for layer, source in zip(layers, source_statistics, strict=True):
                if layer.reached:
                    new = options.statistics(layer.state, source, images)
                    counter = options.batches(layer.state)
                    layer.handler.replace(layer.module, *new, counter)
    except BaseException:
        undo()
        raise
    report = report_of(options, layers, source_statistics, kept, images, count)
    return Adaptation(undo, lambda: report)


class _Gathering:
    """The loop over batches: check, agree with the other ranks, forward."""

    def __init__(
        self,
        model: nn.Module,
        layers: list[Layer],
        options: Rule,
        ranks: Ranks,
        forward: Forward | None,
        sequential: bool,
    ) -> None:
        self.model, self.layers, self.options, self.ranks = model, layers, options, ranks
        self.forward, self.sequential = forward, sequential
        self.device = layers[0].handler.source(layers[0].module)[0].device
        first = next(model.parameters(), None)
        self.input_device = self.device if first is None else first.device

    def __call__(self, batches: Any, progress: Progress) -> tuple[int, int]:
        total = len(batches) if hasattr(batches, "__len__") else None
        stream = self._checked(batches)
        images = done = 0
        batch: Any = None
        with ExitStack() as everything:
            everything.enter_context(torch.no_grad())
            # Compiled parts would run without the hooks that were not there when they were traced.
            everything.enter_context(torch.compiler.set_stance("force_eager"))
            everything.enter_context(evaluating(self.model.modules()))
            while True:
                mine, error = self._next(stream)
                news = self.ranks.agree(None if mine is None else mine[1], error, self.device)
                if not news:
                    break
                if not done and not all(news):
                    raise ValueError(f"batches: expected images, got none on rank {news.index(0)}")
                # A rank whose images have ended repeats a forward, so that the others find it
                # wherever they merge.
                batch = batch if mine is None else mine[0]
                images += sum(news)
                self._one(batch, images, weight=int(mine is not None))
                done += 1
                progress(done, total, images)
        if not done:
            raise ValueError("batches: expected images, got no batch at all")
        return images, done

    def _one(self, batch: Any, images: int, weight: int) -> None:
        unbiased = self.options.while_gathering
        with gathering(
            self.layers, self.options, self.ranks, images,
            lend=self.sequential, weight=weight, unbiased=unbiased,
        ):  # fmt: skip
            if self.forward is not None:
                self.forward(self.model, batch)
            else:
                self.model(batch.to(self.input_device))
        check_finite(self.layers)

    def _checked(self, batches: Any) -> Iterator[tuple[Any, int]]:
        for batch in batches:
            yield checked(batch, self.forward)

    def _next(
        self, stream: Iterator[tuple[Any, int]]
    ) -> tuple[tuple[Any, int] | None, Exception | None]:
        try:
            return next(stream, None), None
        except Exception as error:
            return None, error


def _batch_by_batch(
    model: nn.Module,
    layers: list[Layer],
    kept: dict[str, str],
    options: Rule,
    ranks: Ranks,
    compiled: bool,
) -> Adaptation:
    compiled = compiled or any(
        m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in model.modules()
    )
    if compiled:
        raise ValueError(
            "model: its compiled code would not see the batch's statistics; use "
            "AdaptiveModel(model, method='batch')"
        )
    hooks = ExitStack()
    hooks.enter_context(gathering(layers, options, ranks, 0, lend=True))

    def report() -> AdaptationReport:
        return report_of(options, layers, [_copied(layer) for layer in layers], kept, 0, 0)

    return Adaptation(hooks.close, report)


def _copied(layer: Layer) -> tuple[Tensor, Tensor]:
    mean, var = layer.handler.source(layer.module)
    return mean.detach().clone(), var.detach().clone()
