"""What rows say beside one another: peers, speed-ups, layers, sums of wins and losses.

Terminal, Markdown, picture and page all read these, so no two of them can disagree. Nothing is
estimated: a ratio needs two times of the same run and the same case.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .palette import OURS, PROVIDERS
from .registry import DTYPES, fusion_name
from .shapes import RESNET50

Row = dict[str, Any]
# What two rows must share for their times to be compared.
CASE = ("run", "direction", "shape", "dtype", "layout", "act", "residual", "cold", "graph")
PEERS = ("cudnn", "native")
PEER_TITLE = {"cudnn": "cuDNN's batch norm", "native": "PyTorch's native batch norm"}
_LAYERS = {size: name for name, size in RESNET50.items()}


def is_step(row: Row) -> bool:
    """Whether the row is a whole model's step rather than one norm."""
    return row.get("kind") == "step"


def timed(row: Row) -> bool:
    return row.get("ms_median") is not None


def case_key(row: Row) -> tuple[str, ...]:
    """The same for rows that were measured side by side."""
    # A step that cannot be captured is launched eagerly and still belongs beside the others.
    names = CASE[:-1] if is_step(row) else CASE
    return (str(row.get("kind") or "kernel"), *(str(row.get(name)) for name in names))


def fusion(row: Row) -> str:
    """What is fused behind the norm, in one word."""
    return fusion_name(row.get("act"), bool(row.get("residual")))


def first_choice(rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """Where norms were measured both ways, the cold and replayed rows, and what was chosen."""
    kept, said = list(rows), []
    for name, words in (("cold", "cold L2"), ("graph", "graph replay")):
        if {row.get(name) for row in rows if not is_step(row)} >= {True, False}:
            kept = [row for row in kept if is_step(row) or row.get(name)]
            said.append(words)
    return kept, said


def case_title(row: Row) -> str:
    """The case in words, short of op and provider."""
    sizes = "x".join(map(str, row["shape"] or ()))
    words = [row["direction"], sizes and f"({sizes})", row["dtype"], row["layout"]]
    if fusion(row) != "none":
        words.append(f"+ {fusion(row).replace('+', ' + ')}")
    if row.get("cold") is not None:
        words.append("cold" if row["cold"] else "warm")
    if row.get("graph"):
        words.append("graph")
    return " ".join(str(word) for word in words if word) or "every case"


def tensor_bytes(row: Row) -> int | None:
    """Bytes of the activation tensor; None in a row that stands for every case."""
    if not row["shape"] or row["dtype"] not in DTYPES:
        return None
    return math.prod(row["shape"]) * DTYPES[row["dtype"]].itemsize


def layer(row: Row) -> str | None:
    """The ResNet-50 layer at 224 x 224 whose norm has this input, whatever the batch."""
    sizes: Sequence[int] = row["shape"] or ()
    if is_step(row) or len(sizes) != 4 or sizes[2] != sizes[3]:
        return None
    return _LAYERS.get((sizes[1], sizes[2]))


def _is_peer(row: Row, provider: str) -> bool:
    op = str(row["op"])
    named = op.endswith("[batch_norm]") if is_step(row) else op == "batch_norm"
    return named and row["provider"] == provider


def peer_provider(rows: Sequence[Row]) -> str | None:
    """Who the speed-ups are over: cuDNN's batch norm, in a file without it PyTorch's own."""
    for provider in PEERS:
        if any(timed(row) and _is_peer(row, provider) for row in rows):
            return provider
    return None


@dataclass(frozen=True)
class Compared:
    """A row beside its peer: speed-up (above 1 is faster), and whether it exceeds the spread."""

    speedup: float | None = None
    verdict: str | None = None
    is_peer: bool = False


def compare_rows(rows: Sequence[Row]) -> list[Compared]:
    """Each row beside the peer's row of the same case, in the rows' order.

    The verdict is "faster" or "slower" where the two spreads from p10 to p90 do not overlap,
    otherwise "even".
    """
    provider = peer_provider(rows)
    if provider is None:
        return [Compared() for _ in rows]
    peers = {case_key(row): row for row in rows if timed(row) and _is_peer(row, provider)}
    found = []
    for row in rows:
        peer = peers.get(case_key(row))
        if peer is None or not timed(row):
            found.append(Compared(is_peer=_is_peer(row, provider)))
            continue
        verdict = "even"
        if row["ms_p90"] < peer["ms_p10"]:
            verdict = "faster"
        elif row["ms_p10"] > peer["ms_p90"]:
            verdict = "slower"
        ratio = peer["ms_median"] / row["ms_median"]
        found.append(Compared(ratio, verdict, _is_peer(row, provider)))
    return found


VERDICTS = ("faster", "even", "slower")


@dataclass
class Tally:
    """How an op of one provider fared against the peer, case by case."""

    op: str
    provider: str
    verdicts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(VERDICTS, 0))
    worst: tuple[float, Row] | None = None
    best: tuple[float, Row] | None = None
    untimed: int = 0

    @property
    def compared(self) -> int:
        return sum(self.verdicts.values())


def tallies(rows: Sequence[Row], providers: Iterable[str] = OURS) -> list[Tally]:
    """Wins and losses of the providers' ops, in the order of the rows."""
    wanted, found = set(providers), dict[tuple[str, str], Tally]()
    for row, compared in zip(rows, compare_rows(rows), strict=True):
        if row["provider"] not in wanted or compared.is_peer:
            continue
        name = (row["op"], row["provider"])
        tally = found.setdefault(name, Tally(*name))
        if not timed(row):
            tally.untimed += 1
        if compared.speedup is None or compared.verdict is None:
            continue
        tally.verdicts[compared.verdict] += 1
        entry = (compared.speedup, row)
        if tally.worst is None or entry[0] < tally.worst[0]:
            tally.worst = entry
        if tally.best is None or entry[0] > tally.best[0]:
            tally.best = entry
    return list(found.values())


def in_order(names: Iterable[str]) -> list[str]:
    """Providers as the palette lists them, unknown ones behind in their own order."""
    known = list(PROVIDERS)
    return sorted(dict.fromkeys(names), key=lambda n: known.index(n) if n in known else len(known))


def reason(row: Row) -> str:
    """Why a row has no time, in one line."""
    said = row.get("error") or "no time, no reason given"
    return re.sub(r"\s+", " ", str(said)).strip()


def facts(header: dict[str, Any]) -> list[tuple[str, str]]:
    """The header as labels and words; what was not recorded is left out."""
    words = {
        "device": "Machine",
        "threads": "CPU threads",
        "cpus": "CPUs used",
        "driver": "Driver",
        "cuda": "CUDA",
        "cudnn": "cuDNN",
        "torch": "PyTorch",
        "triton": "Triton",
        "python": "Python",
        "fusednorm": "fusednorm",
        "commit": "Commit",
        "started": "Started",
    }
    found = []
    for key, label in words.items():
        value = header.get(key)
        if value is None or (key == "cuda" and header.get("driver") is None):
            continue
        if key == "started":
            value = re.sub(r":\d\d(\.\d+)?\+00:00$", " UTC", str(value).replace("T", " "))
        found.append((label, ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    clocks = header.get("clocks")
    if isinstance(clocks, dict) and clocks:
        said = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in clocks.items())
        found.append(("Clocks", said))
    if header.get("l2_bytes"):
        found.append(("L2 cache", f"{header['l2_bytes'] / 2**20:.0f} MiB"))
    if header.get("copy_gb_per_s"):
        found.append(("Copy bandwidth", f"{header['copy_gb_per_s']:.4g} GB/s"))
    return found


def roofs(header: dict[str, Any]) -> list[float]:
    """Copy bandwidths in GB/s: one for each sitting the file holds, equal ones once."""
    sittings = header.get("runs") or [header]
    found = [run.get("copy_gb_per_s") for run in sittings] or [header.get("copy_gb_per_s")]
    return sorted({float(f"{copy:.3g}") for copy in found if copy})


def machine_line(header: dict[str, Any]) -> str:
    """The header in one line."""
    skip = {"Python", "fusednorm", "Started", "Clocks", "L2 cache", "CPUs used"}
    words = []
    for label, value in facts(header):
        if label in skip or (label == "CPU threads" and header.get("driver") is not None):
            continue
        named = {
            "Machine": value,
            "CPU threads": f"{value} thread{'' if value == '1' else 's'}",
            "Copy bandwidth": f"copy {value}",
            "Commit": f"commit {value}",
        }
        words.append(named.get(label, f"{label} {value}"))
    return ", ".join(words)
