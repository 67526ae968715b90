"""Rows to read: a table for the terminal, the same in Markdown, and the README's block."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .picture import plot
from .results import load
from .views import (
    PEER_TITLE,
    Compared,
    Row,
    case_title,
    compare_rows,
    is_step,
    machine_line,
    peer_provider,
    reason,
    tallies,
    timed,
)

__all__ = ["cells", "load", "machine_line", "markdown", "plot", "show", "table", "write_readme"]

COLUMNS = (
    "op",
    "provider",
    "ms",
    "p10-p90",
    "GB/s",
    "% copy",
    "images/s",
    "peak MB",
    "speed-up",
    "nodes",
    "error",
    "torch's",
)
BLOCK = re.compile(r"<!-- benchmark (\S+) -->\n(.*?)<!-- /benchmark -->", re.S)
PICTURES = ("docs/benchmark.png", "docs/benchmark-dark.png")


def _shown(form: str, value: float | None) -> str:
    return "" if value is None else format(value, form)


def _speed(value: float | None) -> str:
    return _shown(".3g" if value is not None and value < 100 else ".0f", value)


def cells(row: Row, compared: Compared) -> list[str]:
    """A row as text; one without a time says why in place of its numbers."""
    head = [row["op"], row["provider"]]
    if not timed(row):
        return [*head, reason(row), *[""] * (len(COLUMNS) - 3)]
    peak = row.get("peak_bytes")
    return [
        *head,
        f"{row['ms_median']:.4g}",
        f"{row['ms_p10']:.4g}-{row['ms_p90']:.4g}",
        _speed(row.get("gb_per_s")),
        _speed(row.get("pct_copy")),
        _shown(".4g", row.get("images_per_s")),
        _shown(".4g", None if peak is None else peak / 1e6),
        _shown(".2f", compared.speedup),
        _shown("d", row.get("nodes")),
        _shown(".0e", row.get("max_err")),
        _shown(".0e", row.get("ref_err")),
    ]


def _peer_line(rows: Sequence[Row]) -> str:
    peer = peer_provider(rows)
    if peer is None:
        return "No batch norm of cuDNN's or PyTorch's was timed: no speed-ups."
    return f"Speed-ups are over {PEER_TITLE[peer]} on the same case, above 1 is faster."


def _grouped(rows: Sequence[Row]) -> list[tuple[str, list[tuple[Row, list[str]]], list[str]]]:
    """Title, rows with their cells, and the columns that say something, group by group."""
    groups: dict[str, list[tuple[Row, list[str]]]] = {}
    for row, compared in zip(rows, compare_rows(rows), strict=True):
        name = ("step, " if is_step(row) else "") + case_title(row)
        groups.setdefault(name, []).append((row, cells(row, compared)))
    found = []
    for name, members in groups.items():
        filled = [
            any(line[i] for row, line in members if timed(row)) for i in range(2, len(COLUMNS))
        ]
        kept = [True, True, True, *filled[1:]]
        columns = [column for column, keep in zip(COLUMNS, kept, strict=True) if keep]
        lines = [
            (row, [cell for cell, keep in zip(line, kept, strict=True) if keep])
            for row, line in members
        ]
        found.append((name, lines, columns))
    return found


def table(rows: Sequence[Row]) -> str:
    """Groups of aligned plain text, fit for any terminal and any log."""
    text = [_peer_line(rows), ""]
    for name, members, columns in _grouped(rows):
        # A reason is as long as it is; it must not widen the columns of numbers.
        measured = [columns, *(line for row, line in members if timed(row))]
        widths = [max(len(line[i]) for line in [columns, *(m for _, m in members)]) for i in (0, 1)]
        widths += [max(len(line[i]) for line in measured) for i in range(2, len(columns))]
        text.append(name)
        for row, line in [(None, columns), *members]:
            padded = [
                cell.ljust(width) if column < 2 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ]
            shown = padded if row is None or timed(row) else [*padded[:2], line[2]]
            text.append("  " + "  ".join(shown).rstrip())
        text.append("")
    return "\n".join(text)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _tally_table(rows: Sequence[Row]) -> list[str]:
    """Wins and losses of this package's own, worst before best."""
    found = tallies(rows)
    if not found:
        return ["No row of this package's own."]

    def extreme(entry: tuple[float, Row] | None) -> str:
        return "" if entry is None else f"{entry[0]:.2f}x: {case_title(entry[1])}"

    text = ["| op | provider | cases | faster | within spread | slower | no time | worst | best |"]
    text.append("|---|---|" + "---:|" * 5 + "---|---|")
    for tally in found:
        numbers = [tally.compared, *tally.verdicts.values(), tally.untimed]
        words = [tally.op, tally.provider, *map(str, numbers)]
        words += [extreme(tally.worst), extreme(tally.best)]
        text.append("| " + " | ".join(map(_cell, words)) + " |")
    return text


def markdown(header: dict[str, Any], rows: Sequence[Row]) -> str:
    """All rows in Markdown, under the machine they were measured on and the sum of the cases."""
    text = [machine_line(header), "", _peer_line(rows), "", *_tally_table(rows), ""]
    for name, members, columns in _grouped(rows):
        text += [f"**{name}**", "", "| " + " | ".join(columns) + " |"]
        text.append("|---|---|" + "---:|" * (len(columns) - 2))
        text += ["| " + " | ".join(map(_cell, line)) + " |" for _, line in members]
        text.append("")
    return "\n".join(text)


def digest(header: dict[str, Any], rows: Sequence[Row]) -> str:
    """Tells one results file from another; the README's pictures carry it."""
    content = json.dumps([header, rows], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def readme_block(named: str, header: dict[str, Any], rows: Sequence[Row]) -> str:
    """What stands between the README's markers for the results file of that name."""
    picture, dark = PICTURES
    untimed = sum(not timed(row) for row in rows)
    peer = peer_provider(rows)
    over = "" if peer is None else f" over {PEER_TITLE[peer]}"
    text = [
        f"Measured on {machine_line(header)}; {str(header.get('started', ''))[:10]}.",
        "",
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">',
        f'<img alt="speed against tensor size, and speed-up{over}, case by case" src="{picture}">',
        "</picture>",
        "",
        f"{_peer_line(rows)} Faster and slower are told where the spreads from p10 to p90 do not",
        f"overlap. {len(rows)} rows, {untimed} of them without a time (refused or failed), all in",
        f"[{named}]({named}).",
        "",
        *_tally_table(rows),
    ]
    return "\n".join(text)


def write_readme(readme: Path, results: Path) -> None:
    """Fills the README's benchmark block and draws its pictures from a results file.

    Raises ValueError where the README has no such block or the file lies outside its folder.
    """
    text, home = readme.read_text(encoding="utf-8"), readme.resolve().parent
    if not BLOCK.search(text):
        raise ValueError(f"{readme} has no <!-- benchmark FILE --> ... <!-- /benchmark --> block")
    if not results.resolve().is_relative_to(home):
        raise ValueError(f"{results} lies outside {home}: a README can only name a file beside it")
    named = results.resolve().relative_to(home).as_posix()
    header, rows = load(results)
    for dark, picture in enumerate(PICTURES):
        (home / picture).parent.mkdir(exist_ok=True)
        plot(header, rows, home / picture, dark=bool(dark), stamp=digest(header, rows))
    block = readme_block(named, header, rows)
    filled = f"<!-- benchmark {named} -->\n{block}\n<!-- /benchmark -->"
    readme.write_text(BLOCK.sub(lambda _: filled, text), encoding="utf-8")


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
    console.print(machine_line(header), style="dim", highlight=False)
    console.print(_peer_line(rows), style="dim", highlight=False)
    for name, members, columns in _grouped(rows):
        grid = Table(title=name, title_justify="left", box=None, header_style="bold")
        for index, column in enumerate(columns):
            grid.add_column(column, justify="left" if index < 2 else "right", no_wrap=index < 2)
        reasons = []
        for row, line in members:
            if not timed(row):
                reasons.append(f"  {line[0]} {line[1]}: {line[2]}")
                line = [*line[:2], "-", *line[3:]]
            grid.add_row(*line)
        console.print(grid)
        for why in reasons:
            console.print(why, style="red", highlight=False, markup=False)
