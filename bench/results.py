"""The results file: rows under the header of the machine they were measured on.

It is whole and valid after every addition, so a run that was killed goes on where it stopped. A
file that is damaged, or was measured on something else, is set aside and never written over.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]
# What tells one row from another.
IDENTITY = (
    "kind",
    "op",
    "provider",
    "direction",
    "shape",
    "dtype",
    "layout",
    "act",
    "residual",
    "graph",
    "cold",
)
# kind         "kernel" (one norm) or "step" (a network: images_per_s)
# graph, cold  replayed from a CUDA graph; operands rotated so that none is found in L2
# ms_*         of one call, over so many repetitions
# min_bytes    no implementation avoids them: gb_per_s, and pct_copy of the bandwidth of copy_
# nodes        of the CUDA graph of one call
# kernels      names of what ran, in order: in the graph's replay if `graph`, else in a call
# peak_bytes   allocated at once during a call, above what was there before it
# max_err      against float64, ref_err that of PyTorch's own norm in the same dtype
# run          index into the header's `runs`: which sitting measured it
# error        why there is no time
FIELDS = (
    *IDENTITY,
    "ms_p10",
    "ms_median",
    "ms_p90",
    "repetitions",
    "min_bytes",
    "gb_per_s",
    "pct_copy",
    "images_per_s",
    "peak_bytes",
    "nodes",
    "kernels",
    "max_err",
    "ref_err",
    "run",
    "error",
)
# Of the header, what may differ between the sittings that one file holds.
PASSING = ("started", "clocks", "copy_gb_per_s", "runs", "left_out")
Key = tuple[str, ...]


def key(row: Row) -> Key:
    """What tells a row from all others of its file.

    Whether a network's step can be captured is known only after trying, so it does not count.
    """
    names = [name for name in IDENTITY if name != "graph" or row["kind"] != "step"]
    return tuple(json.dumps(row[name]) for name in names)


@dataclass(frozen=True)
class Job:
    """Rows that are measured side by side.

    `rows` hold the identity of those it would make; `measure` gets the ones that are wanted and
    returns each of them complete, one that failed with its `error`. It isn't begun once a run has
    taken `latest` seconds, if it's too long for what may be left.
    """

    title: str
    rows: Sequence[Row]
    measure: Callable[[Sequence[Row]], list[Row]]
    latest: float = math.inf


def load(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """Header and rows of a results file, fields that it is too old to have filled with None.

    Raises:
        ValueError: in one line, if it is not a whole results file.
        OSError: if it cannot be read.
    """
    text = path.read_bytes()
    try:
        found = json.loads(text)
        header, rows = found["header"], found["rows"]
        if not isinstance(header, dict) or not isinstance(rows, list):
            raise TypeError("header and rows are not an object and a list")
        for row in rows:
            for name in ("op", "provider", "direction", "shape", "ms_median"):
                row[name]
    except (ValueError, KeyError, TypeError, RecursionError) as exception:
        told = f"{type(exception).__name__}: {exception}".splitlines()[0]
        raise ValueError(f"{path} is not a whole results file ({told})") from exception
    return header, [dict.fromkeys(FIELDS) | {"kind": "kernel", "run": 0} | row for row in rows]


def set_aside(path: Path) -> Path:
    """Gives a file another name, `x.before.json` or the next free one, and returns that."""
    count = 1
    while True:
        number = f"-{count}" if count > 1 else ""
        other = path.with_name(f"{path.stem}.before{number}{path.suffix}")
        if not other.exists():
            return path.rename(other)
        count += 1


def write(path: Path, header: dict[str, Any], lines: Sequence[str]) -> None:
    """The file of these rows, one a line; whole or not at all, whenever the process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    rows = ",\n".join(lines)
    unfinished.write_text(f'{{"header": {json.dumps(header, indent=2)},\n"rows": [\n{rows}\n]}}\n')
    os.replace(unfinished, path)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Facts of the header that keep two sittings' rows from standing in one file, in words."""
    names = [name for name in {**new, **old} if name not in PASSING]
    # As JSON has it: a tuple comes back from the file as a list.
    pairs = [(name, *(json.dumps(h.get(name)) for h in (old, new))) for name in names]
    return [f"{name} was {a} and is {b}" for name, a, b in pairs if a != b]


def _finite(row: Row) -> Row:
    """JSON knows neither infinity nor NaN, which an error can be; the row's `error` says so."""
    infinite = {k for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)}
    return row | dict.fromkeys(infinite)


@dataclass
class Log:
    """A results file that is being measured; without a path, the rows alone."""

    path: Path | None
    header: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    _lines: list[str] = field(default_factory=list)

    @classmethod
    def resume(
        cls,
        path: Path | None,
        header: dict[str, Any],
        say: Callable[[str], None] = lambda line: None,
    ) -> Log:
        """The log at `path`, going on with what lies there if that was measured on the same.

        `say` hears in one line of a file that is set aside, and why.
        """
        log = cls(path, {**header, "runs": []})
        if path is None or not path.exists():
            return log
        try:
            old, rows = load(path)
            reasons = differences(old, header)
        except ValueError as exception:
            reasons = [str(exception)]
        if reasons:
            more = f" and {len(reasons) - 1} more" if len(reasons) > 1 else ""
            say(f"set aside as {set_aside(path)}: {reasons[0]}{more}")
            return log
        log.header = old | {"runs": old.get("runs", [])}
        log._extend(rows)
        return log

    def begin(self, started: str, copy_gb_per_s: float) -> None:
        """A new sitting, with the bandwidth of copy_ that its rows are held to."""
        self.header.setdefault("started", started)
        self.header.setdefault("copy_gb_per_s", copy_gb_per_s)
        self.header["runs"].append({"started": started, "copy_gb_per_s": copy_gb_per_s})
        self.flush()

    def missing(self, rows: Sequence[Row]) -> list[Row]:
        """Those of the rows that are not in the file yet."""
        here = {key(row) for row in self.rows}
        return [row for row in rows if key(row) not in here]

    def add(self, rows: Sequence[Row]) -> None:
        sitting = len(self.header["runs"]) - 1
        self._extend([_finite(row | {"run": sitting}) for row in rows])
        self.flush()

    def flush(self) -> None:
        if self.path is not None:
            write(self.path, self.header, self._lines)

    def _extend(self, rows: Sequence[Row]) -> None:
        self.rows.extend(rows)
        self._lines.extend(json.dumps(row) for row in rows)


def save(log: Log, folder: Path, slug: str) -> Path:
    """Files the rows under their machine and returns where.

    `folder/slug/<date>-<commit>.json` stays as the history, and `folder/slug/bench.json`, the
    newest, is made anew.
    """
    commit = log.header.get("commit") or f"sources-{log.header['sources']}"
    stem = f"{log.header['started'][:10]}-{commit}"
    path, count = folder / slug / f"{stem}.json", 1
    while path.exists():
        count += 1
        path = path.with_name(f"{stem}-{count}.json")
    for target in (path, path.with_name("bench.json")):
        write(target, log.header, log._lines)
    return path


def history(folder: Path) -> list[tuple[dict[str, Any], list[Row]]]:
    """All results filed in a machine's folder, oldest first."""
    found = [load(path) for path in folder.glob("*.json") if path.name != "bench.json"]
    return sorted(found, key=lambda result: str(result[0].get("started")))
