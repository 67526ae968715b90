"""Command line: ``python -m fusednorm.bench run | list | report``."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from . import report, timing
from .registry import ACTIVATIONS, DIRECTIONS, DTYPES, LAYOUTS, OPS, PROVIDERS, choose, select_ops
from .run import Plan, run
from .shapes import SETS, select

# What is measured unless filtered, long and quick. torch.compile takes seconds a case, most of an
# hour over them all, so on the CPU it has to be asked for.
DEFAULTS: dict[tuple[str, bool], dict[str, list[str]]] = {
    ("cuda", False): {
        "shapes": ["resnet50", "detection", "odd", "tiny"],
        "dtype": ["bfloat16", "float16", "float32"],
        "direction": ["forward", "backward"],
    },
    ("cuda", True): {
        "op": ["batch_norm", "batch_group_norm[32]"],
        "shapes": ["resnet50.l1.c3@32", "resnet50.l4.c3@32", "resnet50.l3.c1@2", "detection.p3"],
        "dtype": ["bfloat16", "float32"],
        "direction": ["forward", "backward"],
    },
    ("cpu", False): {
        "shapes": ["cpu", "odd", "tiny"],
        "dtype": ["float32", "bfloat16"],
        "direction": ["forward", "both"],
        "provider": [name for name in PROVIDERS if name != "compile"],
    },
    ("cpu", True): {
        "op": ["batch_norm", "batch_group_norm"],
        "shapes": ["cpu"],
        "dtype": ["float32"],
        "direction": ["both"],
        "provider": [name for name in PROVIDERS if name not in ("compile", "eager")],
    },
}


# Seconds after which a quick run starts nothing more.
QUICK_BUDGET = {"cuda": 330.0, "cpu": 45.0}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fusednorm.bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    measure = commands.add_parser("run", help="measure, print and write rows")
    for name, what in (
        ("op", "ops or families of ops"),
        ("provider", "who computes"),
        ("shapes", "shape sets or single shapes"),
        ("dtype", "types of the activations"),
        ("layout", "memory layouts"),
        ("direction", "forward, backward or both in one"),
    ):
        measure.add_argument(f"--{name}", nargs="+", metavar="NAME", help=what)
    measure.add_argument("--act", metavar="NAME", help="activation fused in (none by default)")
    measure.add_argument("--residual", action="store_true", help="add a residual before it")
    measure.add_argument("--device", choices=("cuda", "cpu"), help="a GPU if there is one")
    measure.add_argument("--quick", action="store_true", help="a minute's worth on the CPU")
    measure.add_argument("--out", type=Path, default=Path("bench.json"), help="results file")
    measure.add_argument("--budget", type=float, metavar="SECONDS", help="start nothing after them")
    measure.add_argument("--repetitions", type=int)
    measure.add_argument("--threads", type=int, help="CPU threads, recorded in the header")
    measure.add_argument("--no-graph", action="store_true", help="time eager launches on the GPU")
    measure.add_argument("--commit", help="commit to record where there is no git checkout")
    commands.add_parser("list", help="names that `run` knows")
    reading = commands.add_parser("report", help="read a results file again")
    reading.add_argument("results", type=Path)
    reading.add_argument("--markdown", type=Path, help="write the tables here")
    reading.add_argument("--png", type=Path, help="draw speed against size here")
    return parser


def _plan(options: argparse.Namespace) -> Plan:
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here; --device cpu measures the CPU")
    defaults = DEFAULTS[device, options.quick]

    def asked(name: str, everything: Iterable[str]) -> list[str]:
        given: list[str] | None = getattr(options, name)
        return given or defaults.get(name) or list(everything)

    act = options.act if options.act != "none" else None
    if act is not None:
        choose("activation", [act], [name for name in ACTIVATIONS if name is not None])
    return Plan(
        shapes=select(asked("shapes", SETS)),
        ops=select_ops(asked("op", OPS)),
        providers=[
            PROVIDERS[name]
            for name in choose("provider", asked("provider", PROVIDERS), [*PROVIDERS])
        ],
        dtypes=choose("dtype", asked("dtype", DTYPES), [*DTYPES]),
        layouts=choose("layout", asked("layout", LAYOUTS), LAYOUTS),
        directions=choose("direction", asked("direction", DIRECTIONS), DIRECTIONS),
        fusions=[(act, options.residual)],
        device=device,
        graph=not options.no_graph,
        repetitions=options.repetitions or timing.MIN_REPETITIONS,
        seconds_per_group=6.0 if options.quick else 60.0,
    )


def _run(options: argparse.Namespace) -> None:
    plan = _plan(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.out.exists():
        # Never lose an hour of somebody's GPU to a second command.
        options.out.replace(options.out.with_suffix(".before.json"))
    say = functools.partial(print, flush=True)
    budget = options.budget
    if budget is None:
        budget = QUICK_BUDGET[plan.device] if options.quick else float("inf")
    log = run(plan, options.out, budget, options.commit, say)
    report.show(log.header, log.rows)
    print(f"written: {options.out}")


def _list() -> None:
    print("ops:       ", *OPS)
    print("providers: ", *PROVIDERS)
    print("dtypes:    ", *DTYPES)
    print("layouts:   ", *LAYOUTS)
    print("directions:", *DIRECTIONS)
    print("activations:", *(name for name in ACTIVATIONS if name))
    for name, shapes in SETS.items():
        print(f"shapes {name}:")
        for shape in shapes:
            print(f"  {shape.name:22} {'x'.join(map(str, shape.dims))}")


def _report(options: argparse.Namespace) -> None:
    header, rows = report.load(options.results)
    report.show(header, rows)
    if options.markdown:
        options.markdown.write_text(report.markdown(header, rows))
    if options.png:
        report.plot(header, rows, options.png)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a subcommand; what the user got wrong is one line and exit code 2."""
    options = _parser().parse_args(arguments)
    try:
        {"run": lambda: _run(options), "list": _list, "report": lambda: _report(options)}[
            options.command
        ]()
    except (ValueError, OSError) as exception:
        print(f"error: {exception}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
