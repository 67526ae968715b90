"""How far each layer's statistics moved from those of training: a table and a plot."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fusednorm.adapt.gather import Layer
from fusednorm.adapt.rules import Rule
from fusednorm.reference.adaptation import Statistics, wasserstein2, wide

# Beside a dead channel's variance of nothing every distance is infinite.
_FLOOR = 1e-12


@dataclass(frozen=True)
class LayerShift:
    """One layer, its G statistics summarised.

    Attributes:
        name, kind: qualified name and class.
        statistics: G.
        shift: root mean square of (mean - source mean)/source standard deviation.
        log_ratio: root mean square of log(variance/source variance).
        w2: 2-Wasserstein distance of the two diagonal Gaussians, in units of the layer's input.
        relative_w2: root mean square over statistics of their W2 in source standard deviations.
    """

    name: str
    kind: str
    statistics: int
    shift: float
    log_ratio: float
    w2: float
    relative_w2: float


@dataclass(frozen=True)
class AdaptationReport:
    """What was adapted and how far it moved; ``print(report)`` is a table.

    Attributes:
        method: as given.
        images, batches: that were seen, over all ranks; 0 where nothing is gathered.
        layers: in the model's order.
        kept: norm layers left alone, by name, and why.
    """

    method: str
    images: int
    batches: int
    layers: list[LayerShift]
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        width = max((len(layer.name) for layer in self.layers), default=0)
        width = max(width, len("layer"))
        farthest = max((layer.relative_w2 for layer in self.layers), default=0.0)
        seen = f"{self.images} images in {self.batches} batches"
        if not self.batches:
            seen = "by the last forward"
        lines = [
            f"{self.method}: {len(self.layers)} layers, {seen}; distances in source standard "
            "deviations",
            f"{'layer':{width}}  {'G':>5}  {'shift':>8}  {'|log var|':>9}  {'W2':>8}",
        ]
        for x in self.layers:
            bar = "#" * round(20 * x.relative_w2 / farthest) if farthest else ""
            lines.append(
                f"{x.name:{width}}  {x.statistics:>5}  {x.shift:>8.3f}  {x.log_ratio:>9.3f}  "
                f"{x.relative_w2:>8.3f}  {bar}".rstrip()
            )
        lines += [f"{name}: kept, {why}" for name, why in self.kept.items()]
        return "\n".join(lines)

    def rows(self) -> list[dict[str, Any]]:
        """A dict a layer, ready for JSON or a data frame."""
        return [asdict(layer) for layer in self.layers]

    def plot(self, path: str | Path | None = None, axis: Any = None) -> Any:
        """Draw the distances over depth; needs matplotlib.

        Args:
            path: where to save the figure; None: nowhere.
            axis: matplotlib axes to draw on instead of a new figure.

        Returns:
            The figure.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plot: needs matplotlib, pip install matplotlib") from error
        if axis is None:
            width = max(5.0, 0.22 * len(self.layers) + 2)
            axis = Figure(figsize=(width, 3.6), layout="constrained").add_subplot()
        places = range(len(self.layers))
        for name, label, colour, marker in (
            ("relative_w2", "W2, source standard deviations", "#0072B2", "o"),
            ("shift", "shift of the mean, same unit", "#E69F00", "v"),
            ("log_ratio", "|log variance ratio|", "#009E73", "s"),
        ):
            values = [getattr(layer, name) for layer in self.layers]
            axis.plot(places, values, color=colour, marker=marker, ms=4, lw=1.2, label=label)
        names = [layer.name for layer in self.layers]
        axis.set_xticks(places, names, rotation=90, fontsize=8)
        axis.set_ylim(bottom=0)
        axis.grid(axis="y", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        title = f"statistics moved by {self.method!r} on {self.images} images"
        axis.set_title(title, loc="left", fontsize=10)
        axis.legend(frameon=False, fontsize=8)
        if path is not None:
            axis.figure.savefig(path, dpi=130)
        return axis.figure


def shift_of(layer: Layer, source: Statistics, adapted: Statistics) -> LayerShift:
    """The summary of one layer; all arithmetic is in float64."""
    (mean, var), (new_mean, new_var) = ((wide(m), wide(v)) for m, v in (source, adapted))
    unit = var.clamp_min(_FLOOR)
    w2 = wasserstein2((mean, var), (new_mean, new_var))
    ratio = (new_var.clamp_min(_FLOOR) / unit).log()
    return LayerShift(
        layer.name or "(the model)",
        type(layer.module).__name__,
        mean.numel(),
        _root((new_mean - mean).square().div(unit).mean()),
        _root(ratio.square().mean()),
        _root(w2.sum()),
        _root(w2.div(unit).mean()),
    )


def _root(value: Any) -> float:
    return math.sqrt(float(value))


def report_of(
    rule: Rule,
    layers: list[Layer],
    sources: list[Statistics],
    kept: dict[str, str],
    images: int,
    batches: int,
    counted: int | None = None,
) -> AdaptationReport:
    """Of the layers as they stand; ``counted`` images weigh in the statistics, if not all."""
    shifts, kept = [], dict(kept)
    for layer, source in zip(layers, sources, strict=True):
        if layer.reached:
            counts = images if counted is None else counted
            adapted = rule.statistics(layer.state, source, counts)
            shifts.append(shift_of(layer, source, adapted))
        else:
            kept[layer.name] = "no input came to it"
    return AdaptationReport(rule.method, images, batches, shifts, kept)
