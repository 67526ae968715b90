"""Rows to read: a table for the terminal, the same in Markdown, and one picture."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .registry import DTYPES, title
from .run import Row

# Okabe and Ito's colours, told apart by every common form of colour blindness; the markers differ
# as well, for print.
STYLE = {
    "cuda": ("#0072B2", "o"),
    "triton": ("#009E73", "s"),
    "reference": ("#56B4E9", "o"),
    "cudnn": ("#D55E00", "^"),
    "native": ("#E69F00", "v"),
    "compile": ("#CC79A7", "D"),
    "eager": ("#666666", "x"),
}
COLUMNS = (
    "op",
    "provider",
    "ms",
    "p10-p90",
    "GB/s",
    "% copy",
    "x torch",
    "nodes",
    "error",
    "torch's",
)
GROUP = ("direction", "shape", "dtype", "layout", "act", "residual")


def load(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """Header and rows of a results file."""
    try:
        found = json.loads(path.read_text())
        return found["header"], found["rows"]
    except (ValueError, KeyError, TypeError) as exception:
        raise ValueError(f"{path} is not a results file: {exception}") from exception


def _group(row: Row) -> tuple[Any, ...]:
    return tuple(str(row[name]) for name in GROUP)


def _title(row: Row) -> str:
    return title(*(row[name] for name in GROUP))


def peer_times(rows: Sequence[Row]) -> dict[tuple[Any, ...], float]:
    """For each group, the time of the batch norm a PyTorch user has there: cuDNN's or native."""
    times: dict[tuple[Any, ...], float] = {}
    for provider in ("native", "cudnn"):
        for row in rows:
            named = row["op"] == "batch_norm" and row["provider"] == provider
            if named and row["ms_median"] is not None:
                key = _group(row)
                times[key] = min(times.get(key, float("inf")), row["ms_median"])
    return times


def cells(row: Row, peers: dict[tuple[Any, ...], float]) -> list[str]:
    """A row as text; one without a time says why in place of its numbers."""
    head = [row["op"], row["provider"]]
    if row["ms_median"] is None:
        return [*head, row.get("error", "no time"), *[""] * (len(COLUMNS) - 3)]
    peer = peers.get(_group(row))
    return [
        *head,
        f"{row['ms_median']:.4g}",
        f"{row['ms_p10']:.4g}-{row['ms_p90']:.4g}",
        f"{row['gb_per_s']:.0f}",
        f"{row['pct_copy']:.0f}",
        "" if peer is None else f"{row['ms_median'] / peer:.2f}",
        "" if row["nodes"] is None else str(row["nodes"]),
        f"{row['max_err']:.0e}",
        f"{row['ref_err']:.0e}",
    ]


def machine_line(header: dict[str, Any]) -> str:
    """The header in one line."""
    words = [header["device"]]
    if header["cuda"] is None or header["driver"] is None:
        words.append(f"{header['threads']} threads")
    for name in ("driver", "cuda", "torch", "triton", "cudnn", "commit"):
        if header[name] is not None:
            words.append(f"{name} {header[name]}")
    return ", ".join([*words, f"copy {header['copy_gb_per_s']:.0f} GB/s"])


def _grouped(rows: Sequence[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(_title(row), []).append(row)
    return groups


def table(rows: Sequence[Row]) -> str:
    """Groups of aligned plain text, fit for any terminal and any log."""
    peers, text = peer_times(rows), []
    for name, members in _grouped(rows).items():
        lines = [list(COLUMNS), *(cells(row, peers) for row in members)]
        # A reason is as long as it is; it must not widen the columns of numbers.
        complete = [line for line in lines if line[-1]]
        widths = [max(len(line[i]) for line in lines) for i in range(2)]
        widths += [max(len(line[i]) for line in complete) for i in range(2, len(COLUMNS))]
        text.append(name)
        for line in lines:
            padded = [
                cell.ljust(width) if column < 2 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ]
            shown = padded if line[-1] else [*padded[:2], line[2]]
            text.append("  " + "  ".join(shown).rstrip())
        text.append("")
    return "\n".join(text)


def markdown(header: dict[str, Any], rows: Sequence[Row]) -> str:
    """The same rows for a README, under the machine they were measured on."""
    peers = peer_times(rows)
    text = [machine_line(header), ""]
    for name, members in _grouped(rows).items():
        text += [f"**{name}**", "", "| " + " | ".join(COLUMNS) + " |"]
        text.append("|---|---|" + "---:|" * (len(COLUMNS) - 2))
        text += ["| " + " | ".join(cells(row, peers)) + " |" for row in members]
        text.append("")
    return "\n".join(text)


def show(header: dict[str, Any], rows: Sequence[Row]) -> None:
    """Prints the rows, with rich where it is installed and has the room; a log gets plain text."""
    try:
        from rich.console import Console
        from rich.table import Table

        console = Console()
    except ImportError:
        console = None
    if console is None or not console.is_terminal or console.width < 110:
        print(machine_line(header), "", table(rows), sep="\n")
        return
    peers = peer_times(rows)
    console.print(machine_line(header), style="dim", highlight=False)
    for name, members in _grouped(rows).items():
        grid = Table(title=name, title_justify="left", box=None, header_style="bold")
        for index, column in enumerate(COLUMNS):
            grid.add_column(column, justify="left" if index < 2 else "right", no_wrap=index < 2)
        reasons = []
        for row in members:
            line = cells(row, peers)
            if row["ms_median"] is None:
                reasons.append(f"  {line[0]} {line[1]}: {line[2]}")
                line[2] = "-"
            grid.add_row(*line)
        console.print(grid)
        for reason in reasons:
            console.print(reason, style="red", highlight=False, markup=False)


def plot(header: dict[str, Any], rows: Sequence[Row], path: Path) -> None:
    """Speed against tensor size, one panel a direction, the copy line as the roof."""
    from matplotlib.figure import Figure

    timed = [row for row in rows if row["ms_median"] is not None]
    directions = [
        d for d in ("forward", "backward", "both") if any(r["direction"] == d for r in timed)
    ]
    if not timed:
        raise ValueError("no row has a time, nothing to draw")
    figure = Figure(figsize=(5 * len(directions) + 1.5, 4.6), layout="constrained")
    axes = figure.subplots(1, len(directions), sharey=True, squeeze=False)[0]
    roof = header["copy_gb_per_s"]
    for axis, direction in zip(axes, directions, strict=False):
        for provider, (colour, marker) in STYLE.items():
            mine = [r for r in timed if r["direction"] == direction and r["provider"] == provider]
            for layout, face in (("nchw", colour), ("nhwc", "white")):
                some = [r for r in mine if r["layout"] == layout]
                axis.scatter(
                    [math.prod(r["shape"]) * DTYPES[r["dtype"]].itemsize / 1e6 for r in some],
                    [r["gb_per_s"] for r in some],
                    facecolors=colour if marker == "x" else face,
                    **({} if marker == "x" else {"edgecolors": colour}),
                    marker=marker,
                    s=36,
                    alpha=0.9,
                )
        axis.axhline(roof, color="black", linewidth=1, linestyle="--")
        axis.annotate(
            "copy", (0.01, roof), xycoords=("axes fraction", "data"), va="bottom", fontsize=9
        )
        axis.set(xscale="log", yscale="log", title=direction, xlabel="tensor, MB")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("GB/s of unavoidable bytes")
    shown = [name for name in STYLE if any(row["provider"] == name for row in timed)]
    for name in shown:
        axes[-1].scatter([], [], color=STYLE[name][0], marker=STYLE[name][1], label=name)
    axes[-1].scatter([], [], facecolors="white", edgecolors="black", label="hollow: channels last")
    figure.legend(loc="outside right upper", frameon=False)
    figure.suptitle(machine_line(header), fontsize=8, x=0.01, ha="left")
    figure.savefig(path, dpi=150)
