"""How far a run is, with the time left: a bar on a terminal, lines without rich, else quiet."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# done, of how many, what comes next, seconds left (NaN: not known yet)
Tell = Callable[[int, int, str, float], None]
MODES = ("auto", "plain", "none")


def _clock(seconds: float) -> str:
    return "" if math.isnan(seconds) else f"{int(seconds) // 60}:{int(seconds) % 60:02} left"


def _plain(done: int, of: int, what: str, left: float) -> None:
    if done < of:
        print(f"[{done + 1}/{of}] {what}  {_clock(left)}".rstrip(), file=sys.stderr, flush=True)


@contextmanager
def shown(mode: str = "auto") -> Iterator[Tell]:
    """Yields what a run reports to. `auto` looks at the terminal, `plain` is for logs."""
    if mode == "none" or (mode == "auto" and not sys.stderr.isatty()):
        yield lambda done, of, what, left: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    except ImportError:
        mode = "plain"
    if mode == "plain":
        yield _plain
        return
    columns = (BarColumn(24), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
    words = TextColumn("{task.description}", markup=False)
    # rich's own estimate jumps with every group; the run's is handed down to it.
    with Progress(
        *columns,
        words,
        console=Console(stderr=True),
        transient=True,
        auto_refresh=False,
    ) as bar:
        task = bar.add_task("", total=None, left="")

        def tell(done: int, of: int, what: str, left: float) -> None:
            bar.update(task, completed=done, total=of, description=what, left=_clock(left))
            bar.refresh()

        yield tell
