"""A results file made up for the report's tests. NOT MEASURED: no figure here means anything.

It has what a large run on a card would have: every kind of provider, fusions, cold and warm rows,
graphs and eager launches, refusals and failures, errors of zero and infinity, whole steps.
"""

from __future__ import annotations

import math
import random
from typing import Any

from fusednorm.bench.results import FIELDS
from fusednorm.bench.shapes import RESNET50

Row = dict[str, Any]
SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
EPS = {"float32": 6e-8, "bfloat16": 4e-3, "float16": 5e-4}
SPEEDS = {
    "cuda": 0.9,
    "triton": 0.82,
    "cudnn": 0.5,
    "native": 0.36,
    "compile": 0.6,
    "compile-max-autotune": 0.66,
    "eager": 0.14,
}
NASTY = 'RuntimeError: </script><b>not bold</b> & "quoted" | piped {{data}} \\u003c'
INFINITE = "refused a time: error of y inf exceeds 3.1e-03"
HEADER = {
    "device": "SYNTHETIC card, made up for tests",
    "threads": 8,
    "cpus": [0, 1],
    "driver": "000.00",
    "cuda": "13.0",
    "torch": "2.13.0",
    "triton": "3.9.0",
    "cudnn": 91000,
    "clocks": {"sm": "1980 MHz", "max_memory": "2619 MHz"},
    "l2_bytes": 50 * 2**20,
    "python": "3.11.2",
    "fusednorm": "0.0.0",
    "commit": "0000synthetic",
    "copy_gb_per_s": 4000.0,
    "runs": [{"started": "2000-01-01T00:00:00+00:00", "copy_gb_per_s": 4000.0}],
    "started": "2000-01-01T00:00:00+00:00",
}


def row(**known: Any) -> Row:
    """A whole row, float32 NCHW without a time unless said otherwise."""
    base: Row = {
        **dict.fromkeys(FIELDS),
        "kind": "kernel",
        "op": "batch_norm",
        "provider": "native",
        "direction": "forward",
        "shape": [2, 64, 8, 8],
        "dtype": "float32",
        "layout": "nchw",
        "residual": False,
        "graph": False,
        "cold": False,
        "run": 0,
    }
    return {**base, **known}


def timed_row(ms: float, **known: Any) -> Row:
    """A row with a time, and what follows from it."""
    made = row(**known)
    size = math.prod(made["shape"]) * SIZES[made["dtype"]]
    made["min_bytes"] = size * {"forward": 2, "backward": 3}.get(made["direction"], 5)
    speed = made["min_bytes"] / ms / 1e6
    figures = {"ms_p10": ms * 0.97, "ms_median": ms, "ms_p90": ms * 1.04, "gb_per_s": speed}
    return {**made, **figures, "pct_copy": 100 * speed / HEADER["copy_gb_per_s"], **known}


def _kernel_rows(draw: random.Random, batches: tuple[int, ...]) -> list[Row]:
    rows = []
    shapes = [[n, c, s, s] for n in batches for c, s in RESNET50.values()]
    for shape in [*shapes, [2, 256, 200, 336], [16, 24, 56, 56], [1024, 768]]:
        for layout in ("nchw", "nhwc")[: len(shape) // 2]:
            for direction in ("forward", "backward"):
                for cold in (True, False):
                    for op in ("batch_norm", "batch_group_norm[32]"):
                        rows += _providers(draw, op, shape, layout, direction, cold)
    return rows


def _providers(
    draw: random.Random, op: str, shape: list[int], layout: str, direction: str, cold: bool
) -> list[Row]:
    rows = []
    for provider, share in SPEEDS.items():
        if op != "batch_norm" and provider in ("cudnn", "native"):
            continue
        own = EPS["bfloat16"] * draw.uniform(0.6, 1.4)
        known: Row = {
            "op": op,
            "provider": provider,
            "shape": shape,
            "dtype": "bfloat16",
            "layout": layout,
            "direction": direction,
            "cold": cold,
            "graph": True,
            "nodes": 2,
            "kernels": ["moments_kernel<Rows<__nv_bfloat16, 8>>", "apply_kernel"],
            "max_err": own * draw.uniform(0.4, 1.6),
            "ref_err": own,
            "peak_bytes": 2 * math.prod(shape),
            "repetitions": 100,
        }
        sweeps = {"forward": 2, "backward": 3}[direction]
        size = sweeps * 2 * math.prod(shape)
        reached = share * (1.0 if cold else 1.4) * draw.uniform(0.8, 1.1)
        if layout == "nhwc" and provider in ("native", "cudnn"):
            reached *= 1.9
        ms = size / (reached * HEADER["copy_gb_per_s"] * 1e6) + draw.uniform(1.5e-3, 4e-3)
        rows.append(timed_row(ms, **known))
        if draw.random() < 0.01:
            rows[-1] |= row(**known, error="refused a time: error of dx 1.0e-01 exceeds 1.2e-02")
        elif draw.random() < 0.005:
            rows[-1] |= row(
                **{**known, "kernels": None, "nodes": None, "max_err": None}, error=NASTY
            )
    return rows


def _step_rows(draw: random.Random) -> list[Row]:
    rows = []
    variants = {"batch_norm": ("cuda", "cudnn"), "batch_group_norm": ("cuda", "eager")}
    variants["cross_iteration"] = ("eager",)
    for layout, dtype in (("nhwc", "bfloat16"), ("nchw", "float32")):
        for direction in ("train", "infer"):
            for batch in (2, 32):
                for norm, providers in variants.items():
                    for provider in providers:
                        known: Row = {
                            "kind": "step",
                            "op": f"resnet50[{norm}]",
                            "provider": provider,
                            "direction": direction,
                            "shape": [batch, 3, 224, 224],
                            "dtype": dtype,
                            "layout": layout,
                            "graph": True,
                            "cold": None,
                            "peak_bytes": batch * 90_000_000,
                        }
                        if norm == "cross_iteration" and direction == "infer":
                            rows.append(row(**known, error="no folding for this norm"))
                            continue
                        ms = (4 + batch) * draw.uniform(0.9, 1.6)
                        rows.append(timed_row(ms, **known, images_per_s=1000 * batch / ms))
                        rows[-1] |= {"gb_per_s": None, "pct_copy": None, "min_bytes": None}
    return rows


def large(batches: tuple[int, ...] = (2, 32)) -> tuple[dict[str, Any], list[Row]]:
    """A card's run with everything in it."""
    draw = random.Random(0)
    rows = [*_kernel_rows(draw, batches), *_step_rows(draw)]
    fused: Row = {"act": "relu", "residual": True, "shape": [8, 64, 56, 56], "dtype": "float16"}
    fused |= {"cold": True, "graph": False}
    rows += [
        timed_row(0.02, **fused, provider="cudnn", max_err=0.0, ref_err=5e-4),
        timed_row(0.01, **fused, provider="cuda", max_err=4e-4, ref_err=5e-4),
        row(
            **fused, provider="triton", max_err=math.inf, ref_err=5e-4, error="refused a time: nan"
        ),
    ]
    whole = dict.fromkeys(("direction", "shape", "dtype", "layout", "cold", "graph"))
    rows.append(row(**whole, op="renorm", provider="cuda", error="not in this version: X"))
    return dict(HEADER), rows


def small() -> tuple[dict[str, Any], list[Row]]:
    """A CPU's quick run: no cuDNN, one shape, no step."""
    header = {**HEADER, "device": "SYNTHETIC CPU, made up for tests", "driver": None, "cuda": None}
    header |= {"cudnn": None, "clocks": None, "copy_gb_per_s": 12.0, "runs": []}
    rows = []
    for layout, peer in (("nchw", 16.0), ("nhwc", 29.0)):
        case = {"shape": [32, 64, 56, 56], "layout": layout, "direction": "both"}
        case |= {"max_err": 2e-7, "ref_err": 3e-7}
        rows.append(timed_row(peer, **case))
        rows.append(timed_row(17.0, **case, provider="reference"))
        rows.append(timed_row(40.0, **case, provider="reference", op="batch_group_norm[C]"))
    return header, rows
