"""Two results files side by side: what became slower, beyond the noise of either.

A machine is never as fast twice, so a ratio of times is divided by that of something that should
not have changed: PyTorch's own norm, measured in turns with the row in both runs, or where there
is none, the bandwidth of copy_ in each run. The noise of a ratio is what the p10-p90 spreads of all
times in it come to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .registry import fusion_name
from .results import IDENTITY, Row, key

# Whose times are ours to answer for. Others are compared and shown, and flag nothing.
OURS = ("cuda", "triton", "reference")
PEERS = ("cudnn", "native")
REFERENCES = ("peer", "copy", "none")
# Below this, no ratio is worth a word.
THRESHOLD = 0.05


@dataclass(frozen=True)
class Change:
    """One row in two runs; a ``ratio`` above one is slower, ``noise`` is its uncertainty."""

    row: Row
    before: Row
    ratio: float | None
    noise: float
    verdict: str
    by: str

    @property
    def regressed(self) -> bool:
        return self.verdict in ("slower", "lost") and self.row["provider"] in OURS


def _spread(row: Row) -> float:
    """Half the p10-p90 range over the median."""
    return float(row["ms_p90"] - row["ms_p10"]) / 2 / float(row["ms_median"])


def _copy(header: dict[str, Any], row: Row) -> float:
    runs = header.get("runs") or [header]
    sitting = row.get("run") or 0
    return float(runs[min(sitting, len(runs) - 1)]["copy_gb_per_s"])


def _peers(rows: Sequence[Row]) -> dict[tuple[str, ...], Row]:
    """PyTorch's batch norm of each case and sitting: cuDNN's where it was measured."""
    found: dict[tuple[str, ...], Row] = {}
    for provider in reversed(PEERS):
        for row in rows:
            plain = row["op"] in ("batch_norm", "resnet50[batch_norm]")
            if plain and row["provider"] == provider and row["ms_median"] is not None:
                found[_case(row)] = row
    return found


def _case(row: Row) -> tuple[str, ...]:
    kept = [name for name in IDENTITY if name not in ("op", "provider")]
    if row["kind"] == "step":
        kept.remove("graph")
    return (*(str(row[name]) for name in kept), str(row.get("run")))


def incomparable(a: dict[str, Any], b: dict[str, Any]) -> str | None:
    """Why times of these headers cannot be compared, or None."""
    for name in ("device", "threads", "l2_bytes"):
        if name == "threads" and a.get("l2_bytes") is not None:
            continue
        if a.get(name) != b.get(name):
            return f"measured on different machines: {name} {a.get(name)} and {b.get(name)}"
    return None


def changes(
    a: tuple[dict[str, Any], Sequence[Row]],
    b: tuple[dict[str, Any], Sequence[Row]],
    by: str = "peer",
    threshold: float = THRESHOLD,
) -> list[Change]:
    """All rows that both runs have, in B's order."""
    before = {key(row): row for row in a[1]}
    peers = _peers(a[1]), _peers(b[1])
    found = []
    for row in b[1]:
        old = before.get(key(row))
        if old is None or (old["ms_median"] is None and row["ms_median"] is None):
            continue
        if old["ms_median"] is None or row["ms_median"] is None:
            verdict = "lost" if row["ms_median"] is None else "gained"
            found.append(Change(row, old, None, 0.0, verdict, "none"))
            continue
        then, now = old["ms_median"], row["ms_median"]
        spreads, used = [_spread(old), _spread(row)], "none"
        pair = [known.get(_case(r)) for known, r in zip(peers, (old, row), strict=True)]
        if by == "peer" and None not in pair and row["provider"] not in PEERS:
            peer_then, peer_now = (p for p in pair if p is not None)
            # The same one in both, or the ratio is that of two libraries.
            if peer_then["provider"] == peer_now["provider"]:
                then, now = then / peer_then["ms_median"], now / peer_now["ms_median"]
                spreads += [_spread(peer_then), _spread(peer_now)]
                used = str(peer_now["provider"])
        if used == "none" and by != "none":
            # More bandwidth, less time.
            then, now = then * _copy(a[0], old), now * _copy(b[0], row)
            used = "copy"
        ratio, noise = now / then, math.hypot(*spreads)
        verdict = "same"
        if max(ratio, 1 / ratio) > 1 + max(threshold, noise):
            verdict = "slower" if ratio > 1 else "faster"
        found.append(Change(row, old, ratio, noise, verdict, used))
    return found


def _words(row: Row) -> str:
    sizes = "x".join(map(str, row["shape"]))
    fused = fusion_name(row["act"], bool(row["residual"]))
    words = [
        row["op"],
        row["provider"],
        row["direction"],
        f"({sizes})",
        row["dtype"],
        row["layout"],
    ]
    words += [f"+{fused}"] * (fused != "none") + ["graph"] * bool(row["graph"])
    return " ".join([*map(str, words), *(["cold"] if row["cold"] else [])])


def table(found: Sequence[Change], everything: bool = False) -> str:
    """Text: what changed, worst first, and the counts; with `everything`, also what did not."""
    order = {"lost": 0, "slower": 1, "faster": 2, "gained": 3, "same": 4}
    shown = [change for change in found if everything or change.verdict != "same"]
    shown.sort(key=lambda c: (order[c.verdict], -(c.ratio or 0)))
    lines = []
    for change in shown:
        mark = "REGRESSION " if change.regressed else ""
        what = f"{mark}{change.verdict:7}"
        if change.ratio is None:
            reason = change.row["error"] or change.before["error"] or "no time"
            lines.append(f"{what} {_words(change.row)}: {reason}")
            continue
        then, now = change.before["ms_median"], change.row["ms_median"]
        held = "" if change.by == "none" else f" held to {change.by}"
        lines.append(
            f"{what} x{change.ratio:.2f} (noise {100 * change.noise:.0f} %{held}) "
            f"{then:.4g} -> {now:.4g} ms  {_words(change.row)}"
        )
    counts = {name: sum(c.verdict == name for c in found) for name in order}
    told = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    regressions = sum(change.regressed for change in found)
    lines.append(f"{len(found)} rows in both: {told}; {regressions} regressions of ours")
    return "\n".join(lines)


def versions(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """What else differs between the runs, in words."""
    names = ("commit", "sources", "driver", "cuda", "torch", "triton", "cudnn", "python")
    return [
        f"{name} {a.get(name)} -> {b.get(name)}" for name in names if a.get(name) != b.get(name)
    ]
