"""Train a small residual network on scikit-learn's handwritten digits, norm against norm.

    python examples/digits.py [--quick] [--out out/demo]

Batch norm, batch group norm and group norm at batch size 2 and 32, same network, data, schedule and
seeds; then the kernels by themselves, beside PyTorch's batch norm. Writes results.json, results.md,
bench.json and digits.png.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from fusednorm.bench import machine, palette, report
from fusednorm.bench.providers import PROVIDERS
from fusednorm.bench.registry import OPS
from fusednorm.bench.results import Log
from fusednorm.bench.run import Plan, jobs, run
from fusednorm.bench.shapes import select
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

import fusednorm

NormLayer = Callable[[int], nn.Module]
# The smaller the batch, the fewer groups, so that a statistic still sees enough elements. 128 is
# what is commonly quoted for batch 32; for batch 2 that would be 1, which trains slower in this
# narrow network: 8 are the groups that group norm has beside it.
NUM_GROUPS = {2: 8, 32: 128}
EPOCHS = {2: 3, 32: 12}
LEARNING_RATE_AT_32 = 0.1
# Told apart by every common form of colour blindness.
COLOURS = {"BatchNorm2d": "#E69F00", "BatchGroupNorm": "#0072B2", "GroupNorm": "#009E73"}
MARKERS = {"BatchNorm2d": "v", "BatchGroupNorm": "o", "GroupNorm": "s"}


def norm_layers(batch: int) -> dict[str, NormLayer]:
    """What is compared: each a callable from channels to a layer, as torchvision and timm take."""
    return {
        "BatchNorm2d": nn.BatchNorm2d,
        "BatchGroupNorm": functools.partial(fusednorm.BatchGroupNorm, num_groups=NUM_GROUPS[batch]),
        "GroupNorm": lambda channels: nn.GroupNorm(8, channels),
    }


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm_layer: NormLayer) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = norm_layer(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = norm_layer(outputs)
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.skip = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.skip(x))


def network(norm_layer: NormLayer) -> nn.Sequential:
    """8 x 8 pixels to ten digits in five convolutions."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, 1, 1, bias=False),
        norm_layer(32),
        nn.ReLU(),
        Block(32, 32, 1, norm_layer),
        Block(32, 64, 2, norm_layer),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


class Data(NamedTuple):
    """Pixels in [0, 1] and labels, split once for everyone."""

    train_x: Tensor
    test_x: Tensor
    train_y: Tensor
    test_y: Tensor


def load(device: str, quick: bool) -> Data:
    images, labels = load_digits(return_X_y=True)
    pixels = torch.as_tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    parts = train_test_split(
        pixels, torch.as_tensor(labels), test_size=0.2, stratify=labels, random_state=0
    )
    train_x, test_x, train_y, test_y = (part.to(device) for part in parts)
    kept = 320 if quick else len(train_x)
    return Data(train_x[:kept], test_x, train_y[:kept], test_y)


@dataclass
class Training:
    """One seed of one norm at one batch size: test accuracy and loss as training goes."""

    norm: str
    batch: int
    seed: int
    epochs: list[float]
    accuracy: list[float]
    loss: list[float]
    step_ms: float


def accuracy(model: nn.Module, data: Data) -> float:
    model.eval()
    with torch.no_grad():
        right = int((model(data.test_x).argmax(1) == data.test_y).sum())
    model.train()
    return 100 * right / len(data.test_y)


def train(
    name: str, norm_layer: NormLayer, batch: int, seed: int, epochs: int, data: Data
) -> Training:
    """SGD with momentum, a cosine schedule, and a learning rate proportional to the batch."""
    torch.manual_seed(seed)
    device = data.train_x.device
    model = network(norm_layer).to(device)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=LEARNING_RATE_AT_32 * batch / 32, momentum=0.9, weight_decay=1e-4
    )
    steps_per_epoch = len(data.train_x) // batch
    total = epochs * steps_per_epoch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    # A quarter epoch of 718 small steps is as telling as a whole one of 45 large ones.
    every = max(1, steps_per_epoch // (4 if batch < 8 else 1))
    result = Training(name, batch, seed, [0.0], [accuracy(model, data)], [], 0.0)
    seconds, losses = [], []
    order = torch.randperm(0)
    for step in range(total):
        if step % steps_per_epoch == 0:
            order = torch.randperm(len(data.train_x)).to(device)
        start = step % steps_per_epoch * batch
        picked = order[start : start + batch]
        began = time.perf_counter()
        loss = F.cross_entropy(model(data.train_x[picked]), data.train_y[picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())  # also waits for the device
        seconds.append(time.perf_counter() - began)
        if (step + 1) % every == 0:
            result.epochs.append((step + 1) / steps_per_epoch)
            result.accuracy.append(accuracy(model, data))
            result.loss.append(statistics.fmean(losses[-every:]))
    result.step_ms = statistics.median(seconds) * 1e3
    return result


def summary(trainings: list[Training]) -> list[dict[str, Any]]:
    """A row a norm and batch size, over its seeds."""
    rows: list[dict[str, Any]] = []
    for batch, name in dict.fromkeys((t.batch, t.norm) for t in trainings):
        some = [t for t in trainings if (t.batch, t.norm) == (batch, name)]
        final = [t.accuracy[-1] for t in some]
        row: dict[str, Any] = {"batch": batch, "norm": name, "seeds": len(some)}
        row["accuracy"] = statistics.fmean(final)
        row["sd"] = statistics.stdev(final) if len(final) > 1 else 0.0
        row["step_ms"] = min(t.step_ms for t in some)
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown that also reads well in a terminal."""
    lines = [
        "| batch | norm           | test accuracy, % | step, ms |",
        "|------:|----------------|-----------------:|---------:|",
    ]
    for row in rows:
        score = f"{row['accuracy']:.1f} ± {row['sd']:.1f}"
        lines.append(
            f"| {row['batch']:>5} | {row['norm']:14} | {score:>16} | {row['step_ms']:>8.2f} |"
        )
    return "\n".join(lines)


def kernels(device: str, quick: bool, out: Path) -> Log:
    """Our batch norm and batch group norm beside torch's batch norm, exact before timed."""
    where = ("cuda", "triton", "cudnn", "native") if device == "cuda" else ("reference", "native")
    plan = Plan(
        shapes=select(["tiny.b"] if quick else ["cpu"]),
        ops=[OPS[name] for name in ("batch_norm", "batch_group_norm[8]", "batch_group_norm[128]")],
        providers=[PROVIDERS[name] for name in where],
        dtypes=("float32", "bfloat16") if device == "cuda" else ("float32",),
        directions=("both",),
        device=device,
        seconds_per_group=8.0,
    )
    # A log that begins anew, whatever an earlier demo left there.
    log = Log(out, {**machine.header(device), "runs": []})
    return run(jobs(plan), device, log, say=lambda line: print(line, flush=True))


def plot(trainings: list[Training], log: Log, path: Path) -> None:
    """Learning curves by batch size, the step's time, and the kernels."""
    from matplotlib.figure import Figure

    rows = summary(trainings)
    figure = Figure(figsize=(11, 7.6), layout="constrained")
    above, below = cast(Any, figure.subfigures(2, 1, height_ratios=(1.1, 1)))
    curve_axes, bar_axes = above.subplots(1, 2, sharey=True), below.subplots(1, 2)
    for axis, batch in zip(curve_axes, NUM_GROUPS, strict=True):
        for name, colour in COLOURS.items():
            some = [t for t in trainings if (t.norm, t.batch) == (name, batch)]
            curves = torch.tensor([t.accuracy for t in some])
            epochs, span = some[0].epochs, (curves.amin(0), curves.amax(0))
            row = next(r for r in rows if (r["norm"], r["batch"]) == (name, batch))
            label = f"{name}: {row['accuracy']:.1f} ± {row['sd']:.1f} %"
            axis.plot(epochs, curves.mean(0), color=colour, marker=MARKERS[name], ms=4, label=label)
            axis.fill_between(epochs, *span, color=colour, alpha=0.15, linewidth=0)
        title = f"handwritten digits, batch size {batch} (num_groups={NUM_GROUPS[batch]})"
        axis.set_title(title, loc="left", fontsize=11)
        axis.set(xlabel="epoch", ylim=(0, 101))
        axis.grid(axis="y", alpha=0.25)
        axis.legend(loc="lower right", frameon=False)
    curve_axes[0].set_ylabel(f"test accuracy, % (mean and range, seeds: {rows[0]['seeds']})")
    steps = [(f"{r['norm']}, batch {r['batch']}", r["step_ms"], COLOURS[r["norm"]]) for r in rows]
    where = "" if torch.cuda.is_available() else ", one CPU thread"
    _bars(bar_axes[0], steps, f"training step, ms{where}")
    ours = {"reference": "fusednorm", "native": "PyTorch"}
    kernel_bars = [
        (f"{r['layout']} {r['op']}, {ours.get(r['provider'], r['provider'])}", r["ms_median"],
         palette.style(r["provider"]).light)
        for r in log.rows
        if r["ms_median"] is not None and r["dtype"] == "float32"
    ]  # fmt: skip
    sizes = "x".join(map(str, log.rows[0]["shape"]))
    _bars(bar_axes[1], kernel_bars, f"norm alone, forward + backward, ms\n{sizes} float32")
    for axis in (*curve_axes, *bar_axes):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(report.machine_line(log.header), ha="left", x=0.01, fontsize=9)
    figure.savefig(path, dpi=130)


def _bars(axis: Any, bars: list[tuple[str, float, str]], title: str) -> None:
    names, values, colours = zip(*bars, strict=True)
    places = range(len(bars))
    drawn = axis.barh(places, values, color=colours, height=0.7)
    axis.bar_label(drawn, fmt="%.3g", padding=3, fontsize=9)
    axis.set_yticks(places, names, fontsize=9)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set_title(title, loc="left", fontsize=11)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a smoke run: numbers mean nothing")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        print("no CUDA device: running on the CPU, with fusednorm's reference path")
    threads = torch.get_num_threads()
    # 8 x 8 pixels are too few to share out among threads; results then do not depend on the cores.
    torch.set_num_threads(1)
    torch.backends.cudnn.deterministic = True
    data = load(device, options.quick)
    began, trainings = time.perf_counter(), []
    seeds = range(1 if options.quick else options.seeds)
    todo = list(itertools.product(NUM_GROUPS, seeds, COLOURS))
    for batch, seed, name in todo:
        epochs = 1 if options.quick else EPOCHS[batch]
        done = train(name, norm_layers(batch)[name], batch, seed, epochs, data)
        trainings.append(done)
        spent = time.perf_counter() - began
        left = spent / len(trainings) * (len(todo) - len(trainings))
        what = f"[{len(trainings)}/{len(todo)}] batch {batch} seed {seed} {name}"
        how = f"{done.accuracy[-1]:.1f} %, {done.step_ms:.2f} ms a step"
        print(f"{what}: {how}, {left:.0f} s left", flush=True)
    rows = summary(trainings)
    print(f"\n{table(rows)}\n\nThe kernels alone, checked against float64 first:")
    torch.set_num_threads(threads)
    log = kernels(device, options.quick, options.out / "bench.json")
    report.show(log.header, log.rows)
    runs = [asdict(training) for training in trainings]
    results = {"machine": log.header, "summary": rows, "trainings": runs}
    (options.out / "results.json").write_text(json.dumps(results, indent=1))
    page = f"{table(rows)}\n\n{report.markdown(log.header, log.rows)}"
    (options.out / "results.md").write_text(page)
    plot(trainings, log, options.out / "digits.png")
    print(f"written to {options.out}: results.md, results.json, bench.json, digits.png")


if __name__ == "__main__":
    main()
