"""What a command line asks for: its filters, what they mean by default, and the jobs they make."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

import fusednorm

from . import steps, timing
from .providers import PROVIDERS
from .registry import DIRECTIONS, DTYPES, FAMILIES, FUSIONS, LAYOUTS, OPS, choose, select_ops
from .results import Job
from .run import Plan
from .run import jobs as kernel_jobs
from .shapes import BY_NAME, RESNET50, SETS, select
from .variants import FORMATS, VARIANTS

KINDS = ("kernel", "step")
MODES = ("graph", "eager")
CACHES = ("cold", "warm")
# Compiling takes seconds a case, most of an hour over them all: on the CPU it has to be asked for.
COMPILERS = ("compile", "compile-max-autotune", "compile-cooperative")
# A network's group takes about 15 s on the CPU; on a machine so busy that single norms took longer
# than this, it would not end within the minute.
LATEST_STEP = 25.0
LAYERS = [f"resnet50.{layer}@2" for layer in ("stem", "l1.c3", "l2.c3", "l3.c3", "l4.c3")]
# What is measured unless filtered, long and quick.
DEFAULTS: dict[tuple[str, bool], dict[str, Any]] = {
    # Every shape of every set in three types would be a thousand groups, a day; this is hours.
    ("cuda", False): {
        "op": [
            name for name in OPS if name not in ("batch_group_norm[8]", "batch_group_norm[128]")
        ],
        "shapes": [
            *(f"resnet50.{layer}@32" for layer in RESNET50),
            *LAYERS,
            *("detection.p3", "odd.c24", "odd.c65", "3d.stage4", "tiny.b"),
        ],
        "dtype": ["bfloat16", "float32"],
        "provider": [name for name in PROVIDERS if name != "compile-max-autotune"],
        "direction": ["forward", "backward", *steps.DIRECTIONS],
    },
    ("cuda", True): {
        "op": ["batch_norm", "batch_group_norm[32]"],
        "shapes": ["resnet50.l1.c3@32", "resnet50.l4.c3@32", "resnet50.l3.c1@2", "detection.p3"],
        "dtype": ["bfloat16", "float32"],
        "direction": ["forward", "backward"],
        "provider": [name for name in PROVIDERS if name not in COMPILERS[1:]],
    },
    ("cpu", False): {
        "shapes": ["cpu", "odd", "3d", "tiny"],
        "dtype": ["float32", "bfloat16"],
        "direction": ["forward", "both", *steps.DIRECTIONS],
        "provider": [name for name in PROVIDERS if name not in COMPILERS],
    },
    ("cpu", True): {
        "op": ["batch_norm", "batch_group_norm[32]"],
        "shapes": ["cpu", *LAYERS, "tiny"],
        "dtype": ["float32"],
        "direction": ["both"],
        "provider": [name for name in PROVIDERS if name not in COMPILERS],
    },
}


def add_filters(parser: argparse.ArgumentParser) -> None:
    for name, what in (
        ("kind", "kernel: single norms; step: ResNet-50, end to end"),
        ("op", "ops or families of ops, resnet50[...] for networks"),
        ("provider", "who computes"),
        ("shapes", "shape sets or single shapes"),
        ("dtype", "types of the activations"),
        ("layout", "memory layouts"),
        ("direction", "forward, backward or both in one; train, infer, infer_folded of networks"),
        ("fusion", "what is fused in: none, relu, residual+relu, ..."),
        ("mode", "on a GPU, replayed from a graph or launched by the host"),
        ("cache", "on a GPU, operands found in DRAM (cold) or in L2 (warm)"),
    ):
        parser.add_argument(f"--{name}", nargs="+", metavar="NAME", help=what)
    parser.add_argument("--batch", nargs="+", type=int, help="batch sizes of networks")
    parser.add_argument("--side", type=int, help="side of the networks' images")


def device(options: argparse.Namespace) -> str:
    """Where to measure. Raises ValueError in one line if a GPU is asked for and there is none."""
    named: str = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if named == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here; --device cpu measures the CPU")
    return named


def jobs(
    options: argparse.Namespace, on: str, say: Callable[[str], None] = lambda line: None
) -> list[Job]:
    """All jobs of the filters, networks last; on a GPU, first of a quick run.

    Raises:
        ValueError: for a name that is not known, listing those that are.
    """
    defaults = DEFAULTS[on, options.quick]

    def asked(name: str, everything: Iterable[str]) -> list[str]:
        known, given = [*everything], getattr(options, name)
        return choose(name, given or defaults.get(name) or known, known)

    of_kernels = options.shapes or options.fusion or options.mode or options.cache
    kinds = choose("kind", options.kind or (["kernel"] if of_kernels else KINDS), KINDS)
    ops = asked("op", [*OPS, *(name for name in FAMILIES if name not in OPS), *VARIANTS])
    of_networks = [name for name in ops if name in VARIANTS]
    if options.op is None:
        of_networks = [*VARIANTS]
    providers = asked("provider", PROVIDERS)
    directions = asked("direction", [*DIRECTIONS, *steps.DIRECTIONS])
    dtypes, layouts = asked("dtype", DTYPES), asked("layout", LAYOUTS)
    repetitions = options.repetitions or timing.MIN_REPETITIONS
    plan = Plan(
        shapes=select(options.shapes or defaults.get("shapes") or SETS),
        ops=select_ops(name for name in ops if name not in VARIANTS),
        providers=[PROVIDERS[name] for name in providers],
        dtypes=dtypes,
        layouts=layouts,
        directions=[name for name in directions if name in DIRECTIONS],
        fusions=[
            FUSIONS[name] for name in choose("fusion", options.fusion or ["none"], [*FUSIONS])
        ],
        device=on,
        graphs=[name == "graph" for name in choose("mode", options.mode or MODES, MODES)],
        colds=[name == "cold" for name in choose("cache", options.cache or CACHES, CACHES)],
        repetitions=repetitions,
        seconds_per_group=1.0 if options.quick else 60.0,
    )
    found = kernel_jobs(plan, say) if "kernel" in kinds else []
    if "step" in kinds and of_networks:
        networks = _steps(options, on, of_networks, providers, repetitions)
        latest = LATEST_STEP if options.quick and on == "cpu" else math.inf
        last = [dataclasses.replace(job, latest=latest) for job in steps.jobs(networks, say)]
        # On a GPU a quick run compiles until its budget is spent.
        return [*last, *found] if latest == math.inf and options.quick else [*found, *last]
    return found


def _steps(
    options: argparse.Namespace,
    on: str,
    variants: list[str],
    providers: list[str],
    repetitions: int,
) -> steps.StepPlan:
    """The networks of the filters. Types and layouts come in pairs there, so a default for single
    norms doesn't narrow them."""
    given: dict[str, Any] = {
        "variants": variants,
        "providers": [name for name in providers if name in steps.STEP_PROVIDERS],
        "repetitions": repetitions,
    }
    if options.direction:
        given["directions"] = [name for name in options.direction if name in steps.DIRECTIONS]
    if options.dtype or options.layout:
        given["formats"] = [
            name
            for name, (dtype, layout) in FORMATS.items()
            if dtype in (options.dtype or DTYPES) and layout in (options.layout or LAYOUTS)
        ]
    if options.batch:
        given["batches"] = options.batch
    if options.side:
        given["side"] = options.side
    if options.quick:
        return steps.StepPlan.quick(on, **given)
    # 224 x 224 in batches of 128 are the GPU's; a CPU would take days.
    small: dict[str, Any] = {"batches": (2, 8), "side": 64} if on == "cpu" else {}
    return steps.StepPlan(on, **(small | given))


def known() -> str:
    """Every name the filters know, and what of it this machine and this version have."""
    on = "cuda" if torch.cuda.is_available() else "cpu"
    lines = ["ops:"]
    for op in OPS.values():
        name = FAMILIES[op.family].fused
        lacking = "" if hasattr(fusednorm, name) else f"  not in this version: fusednorm.{name}"
        lines.append(f"  {op.name:32}{lacking}".rstrip())
    lines += [f"  {name}" for name in VARIANTS]
    lines.append("providers:")
    for provider in PROVIDERS.values():
        lines.append(f"  {provider.name:32}{provider.missing(on) or ''}".rstrip())
    for title, names in (
        ("kinds", KINDS),
        ("dtypes", DTYPES),
        ("layouts", LAYOUTS),
        ("directions", (*DIRECTIONS, *steps.DIRECTIONS)),
        ("fusions", FUSIONS),
        ("modes", MODES),
        ("caches", CACHES),
    ):
        lines.append(f"{title}: {' '.join(names)}")
    for name, shapes in SETS.items():
        lines.append(f"shapes {name}:")
        lines += [f"  {shape.name:22} {'x'.join(map(str, shape.dims))}" for shape in shapes]
    return "\n".join([*lines, f"{len(BY_NAME)} shapes"])
