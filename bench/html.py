"""The results as one HTML page that needs nothing else: no network, no server, no library.

Python decides what is beside what (views.py) and puts it into the page as data; report.js filters
and draws it, report.css dresses it, report.html holds the words.
"""

from __future__ import annotations

import html as markup
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .gate import FACTOR
from .palette import GROUND, style, svg_path
from .registry import DIRECTIONS, DTYPES, LAYOUTS
from .views import (
    PEER_TITLE,
    Row,
    compare_rows,
    facts,
    fusion,
    in_order,
    is_step,
    layer,
    peer_provider,
    reason,
    roofs,
    tensor_bytes,
    timed,
)

HERE = Path(__file__).parent
SCRIPTS = ("report.js", "report_table.js")
# What the page knows of a row, in this order.
COLUMNS = (
    "kind",
    "op",
    "provider",
    "direction",
    "shape",
    "dtype",
    "layout",
    "fusion",
    "cache",
    "launch",
    "layer",
    "bytes",
    "ms_p10",
    "ms_median",
    "ms_p90",
    "gb_per_s",
    "pct_copy",
    "images_per_s",
    "peak_bytes",
    "nodes",
    "kernels",
    "max_err",
    "ref_err",
    "speedup",
    "verdict",
    "is_peer",
    "error",
)
FILTERS = {
    "op": "Op",
    "dtype": "Type",
    "layout": "Layout",
    "direction": "Direction",
    "fusion": "Fusion",
    "cache": "L2 cache",
    "launch": "Launch",
    "batch": "Batch",
}
# Chosen at first where a file has both: the figure that is harder to flatter.
FIRST_CHOICE = {"cache": "cold", "launch": "graph"}
# Filters that pass a step by.
NOT_OF_STEPS = ("cache", "launch", "fusion")
# Values that have an order of their own; the others come as they came in the file.
ORDERS: dict[str, Sequence[str]] = {
    "dtype": tuple(DTYPES),
    "layout": LAYOUTS,
    "direction": DIRECTIONS,
    "fusion": ("none",),
}


def _finite(value: Any) -> Any:
    """JSON has no word for infinity and NaN: a string that JavaScript's Number() understands."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _two(value: bool | None, yes: str, no: str) -> str | None:
    return None if value is None else yes if value else no


def _batch(row: dict[str, Any]) -> int | None:
    return row["shape"][0] if row["shape"] else None


def page_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows as the page has them: the measured figures as they are, the derived ones beside."""
    found = []
    for row, compared in zip(rows, compare_rows(rows), strict=True):
        derived = {
            "kind": "step" if is_step(row) else "kernel",
            "fusion": fusion(row),
            "cache": _two(row.get("cold"), "cold", "warm"),
            "launch": _two(row.get("graph"), "graph", "eager"),
            "shape": list(row.get("shape") or ()),
            "layer": layer(row),
            "bytes": tensor_bytes(row),
            "speedup": compared.speedup,
            "verdict": compared.verdict,
            "is_peer": compared.is_peer,
            "error": None if timed(row) else reason(row),
        }
        whole = {**row, **derived}
        found.append({name: _finite(whole.get(name)) for name in COLUMNS})
    return found


def _packed(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rows as lists; names of kernels, long and few, by number."""
    kernels: dict[tuple[str, ...], int] = {}
    lists = []
    for row in rows:
        if row["kernels"] is not None:
            number = kernels.setdefault(tuple(row["kernels"]), len(kernels))
            row = {**row, "kernels": number}
        lists.append([row[name] for name in COLUMNS])
    return {"columns": COLUMNS, "kernels": list(kernels), "rows": lists}


def _choices(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """What each filter can be set to."""
    found: dict[str, list[Any]] = {}
    for name in FILTERS:
        if name == "batch":
            found[name] = sorted({_batch(row) for row in rows} - {None})
            continue
        order = ORDERS.get(name, ())
        # A step has neither a cache state nor a fusion of its own, see report.js.
        mine = [row for row in rows if row["kind"] == "kernel" or name not in NOT_OF_STEPS]
        values = list(dict.fromkeys(row[name] for row in mine if row[name] is not None))
        found[name] = sorted(
            values, key=lambda v: order.index(v) if v in order else len(order) + values.index(v)
        )
    return found


def _history(history: Sequence[tuple[dict[str, Any], Sequence[Row]]]) -> list[dict[str, Any]]:
    """Earlier runs, oldest first: when, which commit, and this package's speed-ups."""
    runs = []
    for header, rows in history:
        points = [
            {
                "case": "|".join(str(row[n]) for n in ("op", *COLUMNS[3:10])),
                "kind": row["kind"],
                "provider": row["provider"],
                **{name: row[name] for name in FILTERS if name != "batch"},
                "batch": _batch(row),
                "speedup": row["speedup"],
            }
            for row in page_rows(rows)
            if row["speedup"] is not None and not row["is_peer"]
        ]
        started = str(header.get("started") or "")[:16].replace("T", " ")
        runs.append(
            {
                "started": started,
                "commit": str(header.get("commit") or "no commit"),
                "peer": peer_provider(rows),
                "points": points,
            }
        )
    return runs


def page_data(
    header: dict[str, Any],
    rows: Sequence[Row],
    history: Sequence[tuple[dict[str, Any], Sequence[Row]]] | None = None,
) -> dict[str, Any]:
    """Everything report.js draws."""
    found = page_rows(rows)
    peer = peer_provider(rows)
    earlier = [row for _, old in history or [] for row in old]
    providers = in_order(row["provider"] for row in [*rows, *earlier])
    return {
        "roofs": roofs(header),
        "peer": peer and {"provider": peer, "title": PEER_TITLE[peer]},
        "gate": FACTOR,
        "providers": [
            {"name": name, "path": svg_path(style(name).marker), "colour": f"p{i}"}
            for i, name in enumerate(providers)
        ],
        "filters": FILTERS,
        "not_of_steps": NOT_OF_STEPS,
        "choices": _choices(found),
        "first": {
            name: value
            for name, value in FIRST_CHOICE.items()
            if {value} < {row[name] for row in found if row["kind"] == "kernel"}
        },
        "history": _history([*history, (header, rows)]) if history else [],
        **_packed(found),
    }


def _styles(providers: Sequence[str]) -> str:
    """The palette as CSS variables, after the rules of the page."""
    colours = [f"--ground: light-dark({GROUND[0]}, {GROUND[1]});"]
    for i, name in enumerate(providers):
        look = style(name)
        colours.append(f"--p{i}: light-dark({look.light}, {look.dark});")
    rules = (HERE / "report.css").read_text(encoding="utf-8")
    return f":root {{ {' '.join(colours)} }}\n{rules}"


def _facts(header: dict[str, Any]) -> str:
    return "\n".join(
        f"<div><dt>{markup.escape(label)}</dt><dd>{markup.escape(value)}</dd></div>"
        for label, value in facts(header)
        if label != "Machine"
    )


def html(
    header: dict[str, Any],
    rows: Sequence[Row],
    history: Sequence[tuple[dict[str, Any], Sequence[Row]]] | None = None,
) -> str:
    """The page as text.

    Args:
        header: of the results file.
        rows: its rows, kernels and steps alike.
        history: earlier results of the same machine as (header, rows), oldest first; with any,
            the page shows how this package's speed-ups moved from run to run.
    """
    data = page_data(header, rows, history)
    # Nothing in a row, a kernel's name or a message, may end the script element that holds it.
    packed = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    filled = {
        "machine": markup.escape(str(header.get("device", "unknown machine"))),
        "facts": _facts(header),
        "style": _styles([provider["name"] for provider in data["providers"]]),
        "script": "".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS),
        "data": packed,
    }
    template = (HERE / "report.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: filled[found[1]], template)
