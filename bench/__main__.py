"""Command line: ``python -m fusednorm.bench run | compare | report | list``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from . import compare, machine, progress, selection
from .results import Log, history, load, save
from .run import DeviceLost, run

# Seconds after which a quick run starts nothing more.
QUICK_BUDGET = {"cuda": 330.0, "cpu": 40.0}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fusednorm.bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    measure = commands.add_parser(
        "run", help="measure, print and write rows; the same command again goes on where it stopped"
    )
    selection.add_filters(measure)
    measure.add_argument("--device", choices=("cuda", "cpu"), help="a GPU if there is one")
    measure.add_argument("--quick", action="store_true", help="less than a minute on the CPU")
    measure.add_argument("--out", type=Path, default=Path("bench.json"), help="results file")
    measure.add_argument(
        "--save",
        nargs="?",
        type=Path,
        const=Path("bench/results"),
        metavar="DIR",
        help="file the results under DIR/<machine>/ (bench/results), as history and as the newest",
    )
    measure.add_argument("--budget", type=float, metavar="SECONDS", help="start nothing after them")
    measure.add_argument("--repetitions", type=int, help="samples of a row, 100 by default")
    measure.add_argument("--threads", type=int, help="CPU threads, each kept on a core of its own")
    measure.add_argument("--progress", choices=progress.MODES, default="auto")
    measure.add_argument("--commit", help="commit to record where there is no git checkout")
    measure.set_defaults(do=_run)

    both = commands.add_parser("compare", help="what became slower from A to B; 1 if anything did")
    both.add_argument("a", type=Path, metavar="A")
    both.add_argument("b", type=Path, metavar="B")
    both.add_argument(
        "--by",
        choices=compare.REFERENCES,
        default="peer",
        help="what a time is held to in its own run: PyTorch's norm beside it, the bandwidth, none",
    )
    both.add_argument("--threshold", type=float, default=compare.THRESHOLD, metavar="SHARE")
    both.add_argument("--all", action="store_true", help="show also what did not change")
    both.set_defaults(do=_compare)

    reading = commands.add_parser("report", help="read a results file again")
    reading.add_argument("results", type=Path)
    reading.add_argument("--html", type=Path, metavar="FILE", help="write the page here")
    reading.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables here")
    reading.add_argument("--png", type=Path, metavar="FILE", help="draw the picture here")
    reading.add_argument("--dark-png", type=Path, metavar="FILE", help="the same for dark pages")
    reading.add_argument("--readme", type=Path, metavar="FILE", help="renew the README's block")
    reading.set_defaults(do=_report)
    commands.add_parser("list", help="names that `run` knows").set_defaults(do=_list)
    return parser


def _once(tell: Callable[[str], None]) -> Callable[[str], None]:
    """Says each line a single time: kernels and networks are without the same providers."""
    said: set[str] = set()

    def say(line: str) -> None:
        if line not in said:
            said.add(line)
            tell(line)

    return say


def _run(options: argparse.Namespace) -> int:
    from . import report

    device = selection.device(options)
    say = _once(lambda line: print(line, flush=True))
    for name in ("repetitions", "threads", "side", "batch"):
        given = getattr(options, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value}: expected at least 1")
    if (cores := machine.cores()) is not None and (options.threads or 1) > len(cores):
        raise ValueError(
            f"--threads {options.threads}: expected at most the {len(cores)} cores here"
        )
    if options.budget is not None and not options.budget >= 0:
        raise ValueError(f"--budget {options.budget:g}: expected seconds, at least 0")
    jobs = selection.jobs(options, device, say)
    budget = options.budget
    if budget is None:
        budget = QUICK_BUDGET[device] if options.quick else float("inf")
    with machine.pinned(options.threads) as cpus:
        log = Log.resume(options.out, machine.header(device, options.commit, cpus), say)
        with progress.shown(options.progress) as tell:
            run(jobs, device, log, budget, tell, say)
    report.show(log.header, log.rows)
    print(f"written: {options.out}")
    if options.save is not None:
        print(f"filed: {save(log, options.save, machine.slug(log.header))}")
    return 0


def _compare(options: argparse.Namespace) -> int:
    a, b = load(options.a), load(options.b)
    reason = compare.incomparable(a[0], b[0])
    if reason is not None:
        raise ValueError(reason)
    found = compare.changes(a, b, options.by, options.threshold)
    if not found:
        raise ValueError(f"{options.a} and {options.b} have no row in common that either timed")
    for line in compare.versions(a[0], b[0]):
        print(line)
    print(compare.table(found, options.all))
    return int(any(change.regressed for change in found))


def _list(options: argparse.Namespace) -> int:
    print(selection.known())
    return 0


def _report(options: argparse.Namespace) -> int:
    from . import html, report

    header, rows = load(options.results)
    report.show(header, rows)
    if options.html:
        # Files that lie beside a machine's newest are its history.
        folder = options.results.resolve().parent
        filed = folder.name == machine.slug(header)
        page = html.html(header, rows, history(folder) if filed else None)
        options.html.write_text(page, encoding="utf-8")
    if options.markdown:
        options.markdown.write_text(report.markdown(header, rows), encoding="utf-8")
    if options.png:
        report.plot(header, rows, options.png)
    if options.dark_png:
        report.plot(header, rows, options.dark_png, dark=True)
    if options.readme:
        report.write_readme(options.readme, options.results)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a subcommand; what the user got wrong is one line and exit code 2."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.do(options))
    except (ValueError, OSError, DeviceLost) as exception:
        print(f"error: {exception}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
