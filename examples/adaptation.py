"""Adapt a digit classifier's batch-norm statistics to corrupted images, 32 of them, unlabelled.

    python examples/adaptation.py [--quick] [--out out/adaptation] [--seeds 5]

Trains a small network on scikit-learn's handwritten digits at 32 x 32 pixels, corrupts the test
images (corruptions.py), re-estimates the statistics on 32 of them and scores the others. Writes
results.json, results.md, adaptation.png and statistics.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from corruptions import SEVERITIES, corrupt
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

import fusednorm
from fusednorm import adapt_batch_norm

SIDE = 32  # as CIFAR's images have
ADAPT = 32
EPOCHS = 6
# The kinds of the noise and contrast families, and some of the others.
KINDS = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise"),
    "contrast": ("contrast", "fog", "brightness", "darkness"),
    "blur": ("defocus_blur", "motion_blur"),
    "digital": ("pixelate",),
}
METHODS: dict[str, dict[str, Any]] = {
    "replace": {"method": "replace"},
    "prior, N = 16": {"method": "prior", "prior_strength": 16},
}
COLOURS = {"source": "#000000", "replace": "#0072B2", "prior, N = 16": "#E69F00"}
MARKERS = {"source": "v", "replace": "o", "prior, N = 16": "s"}


@dataclass
class Score:
    """Accuracy in percent of one model on one corruption, on images it was not adapted to."""

    seed: int
    family: str
    kind: str
    severity: int
    method: str
    accuracy: float
    clean: float


def network(width: int = 12) -> nn.Sequential:
    """Five convolutions. Padding reflects: zeros would be an edge that no corruption moves."""
    layers: list[nn.Module] = []
    inputs = 1
    for outputs, stride in ((1, 1), (1, 2), (2, 1), (2, 2), (4, 1)):
        conv = nn.Conv2d(inputs, outputs * width, 3, stride, 1, bias=False, padding_mode="reflect")
        layers += [conv, fusednorm.BatchNorm(outputs * width), nn.ReLU()]
        inputs = outputs * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test pixels in [0, 1], and their labels."""
    images, labels = load_digits(return_X_y=True)
    pixels = torch.as_tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    pixels = F.interpolate(pixels, size=SIDE, mode="bilinear")
    train_x, test_x, train_y, test_y = train_test_split(
        pixels, torch.as_tensor(labels), test_size=0.2, stratify=labels, random_state=0
    )
    return train_x, test_x, train_y, test_y


def train(seed: int, x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    """SGD with momentum and a cosine schedule, on clean images alone."""
    torch.manual_seed(seed)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    steps = len(x) // 32
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    for _ in range(epochs):
        for picked in torch.randperm(len(x))[: steps * 32].split(32):
            loss = F.cross_entropy(model(x[picked]), y[picked])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.inference_mode()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return 100 * float((model(x).argmax(1) == y).float().mean())


def scores(
    model: nn.Module, seed: int, corrupted: dict[tuple[str, str, int], Tensor], x: Tensor, y: Tensor
) -> list[Score]:
    """Source and adapted accuracy for every corruption."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    few, rest = order[:ADAPT], order[ADAPT:]
    clean = accuracy(model, x[rest], y[rest])
    found = []
    for (family, kind, severity), images in corrupted.items():
        held, labels = images[rest], y[rest]
        reached = {"source": accuracy(model, held, labels)}
        for name, options in METHODS.items():
            with adapt_batch_norm(model, images[few], **options):
                reached[name] = accuracy(model, held, labels)
        found += [
            Score(seed, family, kind, severity, name, value, clean)
            for name, value in reached.items()
        ]
    return found


def summary(found: Sequence[Score], severities: Sequence[int] = (3, 4, 5)) -> list[dict[str, Any]]:
    """A row a kind and a row a family: mean accuracies at these severities over kinds and seeds,
    and the part of the accuracy lost that each method recovered."""
    some = [s for s in found if s.severity in severities]
    rows = []
    for family in dict.fromkeys(s.family for s in some):
        kinds = list(dict.fromkeys(s.kind for s in some if s.family == family))
        for name, members in [*((kind, [kind]) for kind in kinds), (f"all {family}", kinds)]:
            these = [s for s in some if s.kind in members]
            row: dict[str, Any] = {"corruption": name, "family": family}
            row["clean"] = statistics.fmean(s.clean for s in these)
            for method in ("source", *METHODS):
                values = [s.accuracy for s in these if s.method == method]
                row[method] = statistics.fmean(values)
            for method in METHODS:
                row[f"recovered by {method}"] = _recovered(these, method)
            rows.append(row)
    return rows


def _recovered(these: Sequence[Score], method: str) -> dict[str, float]:
    """Percent of the accuracy lost: all seeds together, and the worst and best seed."""

    def of(some: Sequence[Score]) -> float:
        source = sum(s.accuracy for s in some if s.method == "source")
        lost = sum(s.clean for s in some if s.method == "source") - source
        gained = sum(s.accuracy for s in some if s.method == method) - source
        return 100 * gained / lost if lost > 0 else float("nan")

    each = [of([s for s in these if s.seed == seed]) for seed in {s.seed for s in these}]
    return {"all": of(these), "worst": min(each), "best": max(each)}


def table(rows: Sequence[dict[str, Any]], severities: str = "3-5") -> str:
    """Markdown that also reads well in a terminal."""
    head = ["clean", "source", *METHODS]
    recovers = [f"{method} recovers" for method in METHODS]
    titles = [f"{'corruption':16}", *(f"{h:>13}" for h in head), *(f"{r:>23}" for r in recovers)]
    lines = [
        f"Accuracy in percent at severity {severities}; recovered: percent of the accuracy lost, "
        "all seeds (worst to best seed).",
        "",
        f"| {' | '.join(titles)} |",
        f"|{'-' * 18}|{('-' * 14 + ':|') * len(head)}{('-' * 24 + ':|') * len(METHODS)}",
    ]
    for row in rows:
        name = f"**{row['corruption']}**" if " " in row["corruption"] else row["corruption"]
        cells = [f"{name:16}", *(f"{row[h]:>13.1f}" for h in head)]
        for method in METHODS:
            part = row[f"recovered by {method}"]
            span = f"{part['all']:.0f} ({part['worst']:.0f} to {part['best']:.0f})"
            cells.append(f"{span:>23}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(found: Sequence[Score], path: Path) -> None:
    """Accuracy over severity, a panel a corruption; bands span the seeds."""
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(s.kind for s in found))
    columns = min(4, len(kinds))
    lines = -(-len(kinds) // columns)
    figure = Figure(figsize=(2.9 * columns, 2.6 * lines + 0.5), layout="constrained")
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for axis, kind in zip(axes, kinds, strict=False):
        some = [s for s in found if s.kind == kind]
        severities = sorted({s.severity for s in some})
        axis.axhline(statistics.fmean(s.clean for s in some), color="0.6", lw=1, ls=":")
        for method, colour in COLOURS.items():
            at = [
                [s.accuracy for s in some if (s.severity, s.method) == (severity, method)]
                for severity in severities
            ]
            means = [statistics.fmean(values) for values in at]
            axis.plot(severities, means, color=colour, marker=MARKERS[method], ms=4, label=method)
            axis.fill_between(
                severities, [min(v) for v in at], [max(v) for v in at],
                color=colour, alpha=0.15, linewidth=0,
            )  # fmt: skip
        axis.set_title(kind.replace("_", " "), loc="left", fontsize=10)
        axis.set(ylim=(0, 101), xticks=severities)
        axis.grid(axis="y", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(kinds) :]:
        axis.set_visible(False)
    axes[0].legend(frameon=False, fontsize=8, loc="lower left")
    figure.supxlabel("severity", fontsize=10)
    figure.supylabel("test accuracy, %", fontsize=10)
    seeds = len({s.seed for s in found})
    figure.suptitle(
        f"batch norm adapted to {ADAPT} unlabelled corrupted digits "
        f"(dotted: clean; mean and range, seeds: {seeds})",
        ha="left", x=0.01, fontsize=10,
    )  # fmt: skip
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/adaptation"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one seed, severities 3 to 5, less")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    # Images this small are not worth sharing out; results then do not depend on the cores.
    torch.set_num_threads(1)
    train_x, test_x, train_y, test_y = load()
    families = ("noise", "contrast") if options.quick else tuple(KINDS)
    severities = (3, 4, 5) if options.quick else SEVERITIES
    corrupted = {
        (family, kind, severity): corrupt(test_x, kind, severity)
        for family in families
        for kind in KINDS[family]
        for severity in severities
    }
    found: list[Score] = []
    seeds = 1 if options.quick else options.seeds
    began = time.perf_counter()
    for seed in range(seeds):
        model = train(seed, train_x, train_y, EPOCHS)
        found += scores(model, seed, corrupted, test_x, test_y)
        spent = time.perf_counter() - began
        left = spent / (seed + 1) * (seeds - seed - 1)
        print(f"[{seed + 1}/{seeds}] clean {found[-1].clean:.1f} %, {left:.0f} s left", flush=True)
        if not seed:
            images = corrupted["noise", "gaussian_noise", 3][:ADAPT]
            with adapt_batch_norm(model, images) as adaptation:
                report = adaptation.report
    report.plot(options.out / "statistics.png")
    rows = summary(found)
    page = f"{table(rows)}\n\nGaussian noise, severity 3, seed 0:\n\n```\n{report}\n```\n"
    print(f"\n{page}")
    results = {"summary": rows, "scores": [asdict(score) for score in found]}
    (options.out / "results.json").write_text(json.dumps(results, indent=1))
    (options.out / "results.md").write_text(page)
    plot(found, options.out / "adaptation.png")
    print(f"written to {options.out}: results.md, results.json, adaptation.png, statistics.png")


if __name__ == "__main__":
    main()
