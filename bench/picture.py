"""The README's picture: speed against tensor size, and every case beside its peer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .palette import GROUND, style
from .registry import DIRECTIONS
from .views import (
    PEER_TITLE,
    Row,
    compare_rows,
    first_choice,
    in_order,
    is_step,
    machine_line,
    peer_provider,
    roofs,
    tensor_bytes,
    timed,
)

INK = ("#1c1f24", "#e6e8eb")
FAINT = ("#d5d9de", "#3a4049")


def _dots(axis: Any, xs: Sequence[float], ys: Sequence[float], row: Row, dark: bool) -> None:
    """Marks in the provider's colour and shape, hollow for channels-last."""
    look = style(row["provider"])
    colour = look.dark if dark else look.light
    faces = "none" if row["layout"] == "nhwc" else colour
    outline = [*look.marker, look.marker[0]]
    looks = {"facecolors": faces, "edgecolors": colour, "marker": outline}
    axis.scatter(xs, ys, s=42, linewidths=1.1, zorder=3, **looks)


def _plain(axis: Any) -> None:
    """Ticks as numbers rather than as powers; over many decades, one each, or they overlap."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1e3 * low else (1,), numticks=9))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _roofline(axis: Any, rows: Sequence[Row], copies: Sequence[float], dark: bool) -> None:
    ink = INK[dark]
    for provider in in_order(row["provider"] for row in rows):
        for layout in ("nchw", "nhwc"):
            some = [r for r in rows if r["provider"] == provider and r["layout"] == layout]
            sizes = [(tensor_bytes(row) or 0) / 1e6 for row in some]
            if some:
                _dots(axis, sizes, [row["gb_per_s"] for row in some], some[0], dark)
    for copy in copies:
        axis.axhline(copy, color=ink, linewidth=1, linestyle=(0, (4, 3)))
        where = {"xycoords": ("axes fraction", "data"), "color": ink}
        axis.annotate(f" copy {copy:.4g} GB/s", (0, copy), va="bottom", fontsize=8, **where)
    axis.set(xscale="log", yscale="log", xlabel="tensor, MB")
    _plain(axis.xaxis)
    _plain(axis.yaxis)


def _strips(axis: Any, rows: Sequence[Row], dark: bool) -> int:
    """A dot for every case of every op and provider; the number of dots."""
    pairs = zip(rows, compare_rows(rows), strict=True)
    found = [(r, c.speedup) for r, c in pairs if c.speedup is not None and not c.is_peer]
    lanes = list(dict.fromkeys((row["op"], row["provider"]) for row, _ in found))
    for row, speedup in found:
        _dots(axis, [speedup], [lanes.index((row["op"], row["provider"]))], row, dark)
    axis.axvline(1, color=INK[dark], linewidth=1)
    axis.set_xscale("log", base=2)
    axis.set_yticks(range(len(lanes)), [f"{op} · {provider}" for op, provider in lanes])
    axis.set_ylim(len(lanes) - 0.4, -0.6)
    reach = max([2.0, *(max(s, 1 / s) * 1.25 for _, s in found)])
    axis.set_xlim(1 / reach, reach)
    from matplotlib.ticker import FuncFormatter

    def factor(value: float, _: int) -> str:
        return f"{value:g}x" if value >= 1 else f"1/{1 / value:g}x"

    axis.xaxis.set_major_formatter(FuncFormatter(factor))
    return len(found)


def plot(
    header: dict[str, Any],
    rows: Sequence[Row],
    path: Path,
    dark: bool = False,
    stamp: str | None = None,
) -> None:
    """Draws the rows as PNG: GB/s a direction with the copy line, then speed-ups, 1x as the line.

    Of rows that are cold and warm, replayed and eager, the cold and replayed ones, and says so. A
    case that has no time is in neither panel; `stamp` is kept in the file as its description.
    Raises ValueError where no row has a time, ImportError without matplotlib.
    """
    from matplotlib.figure import Figure

    rows, chosen = first_choice(rows)
    normal = [row for row in rows if timed(row) and not is_step(row)]
    if not any(timed(row) for row in rows):
        raise ValueError("no row has a time, nothing to draw")
    directions = [d for d in DIRECTIONS if any(row["direction"] == d for row in normal)]
    peer = peer_provider(rows)
    lanes = len({(row["op"], row["provider"]) for row in rows})
    panels = len(directions) + (peer is not None)
    figure = Figure(
        figsize=(4.2 * panels + 1.4, max(4.2, 0.26 * lanes + 1.6)), layout="constrained"
    )
    figure.set_facecolor(GROUND[dark])
    axes = list(figure.subplots(1, max(panels, 1), squeeze=False)[0])
    for axis in axes:
        axis.set_facecolor(GROUND[dark])
        axis.tick_params(colors=INK[dark], which="both", labelsize=8)
        axis.grid(color=FAINT[dark], linewidth=0.6)
        axis.set_axisbelow(True)
        for side, spine in axis.spines.items():
            spine.set_color(FAINT[dark])
            spine.set_visible(side in ("left", "bottom"))
    for axis, direction in zip(axes, directions, strict=False):
        mine = [row for row in normal if row["direction"] == direction]
        _roofline(axis, mine, roofs(header), dark)
        axis.set_title(f"{direction}: GB/s of unavoidable bytes", fontsize=10)
    if peer is not None:
        _strips(axes[-1], rows, dark)
        axes[-1].set_title(f"speed-up over {PEER_TITLE[peer]}", fontsize=10)
    for axis in axes:
        for text in (axis.title, axis.xaxis.label, axis.yaxis.label):
            text.set_color(INK[dark])
    _legend(figure, [row for row in rows if timed(row)], dark)
    figure.suptitle(
        "; ".join([machine_line(header), *chosen]), fontsize=8, x=0.01, ha="left", color=INK[dark]
    )
    figure.savefig(path, dpi=150, metadata={"Description": stamp} if stamp else None)


def _legend(figure: Any, rows: Sequence[Row], dark: bool) -> None:
    from matplotlib.lines import Line2D

    handles = []
    marks: dict[str, Any] = {"linestyle": "none", "markersize": 7}
    for provider in in_order(row["provider"] for row in rows):
        look = style(provider)
        colour = look.dark if dark else look.light
        outline: Any = [*look.marker, look.marker[0]]
        handles.append(Line2D([], [], color=colour, label=provider, marker=outline, **marks))
    if any(row["layout"] == "nhwc" for row in rows):
        hollow = {"marker": "o", "markerfacecolor": "none", **marks}
        handles.append(Line2D([], [], color=INK[dark], label="hollow: nhwc", **hollow))
    placed: dict[str, Any] = {
        "loc": "outside lower center",
        "ncols": min(6, len(handles)),
        "frameon": False,
    }
    figure.legend(handles=handles, fontsize=9, labelcolor=INK[dark], **placed)
