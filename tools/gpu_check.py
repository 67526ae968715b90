"""The last rung: the GPU suite and the benchmarks, unattended, on a machine with a card.

    make gpu-check OUT=dir        or: python3 tools/gpu_check.py --out dir [--list] [--again NAME]

Needs no network and installs nothing: the running python brings torch, pytest and Triton, and the
package is laid out by links under build/. Work goes in stages, each a process of its own with a
time limit; what a stage did is on record in OUT/tests.json before the next begins. So a call that
was cut short is simply made again and goes on where it stopped. A failed stage doesn't keep the
next ones from running. Sources that changed start afresh.

OUT/tests.json  header, stages, and name, outcome and seconds of every test
OUT/bench.json  the benchmark's rows
OUT/*.log       what the stages printed
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / "build" / "tree"
SOURCES = ("bench", "cmake", "csrc", "python", "tests", "tools", "triton_kernels")
LIMIT_S = 450
# Rungs about the sources rather than the machine, Triton's interpreter and what needs a browser:
# `make test` runs them.
NOT_ON_THE_CARD = ("browser", "codegen", "host", "packaging", "triton_kernels")
# Triton compiles some two thousand variants for the suite, one after the other in one process.
PARALLEL = ("-n", str(min(8, os.cpu_count() or 1)))
CANNOT_RUN = 3
LOST = 2


@dataclass(frozen=True)
class Stage:
    """One process: a command, its log, and whether it leaves pytest's report behind."""

    name: str
    command: tuple[str, ...]
    log: str
    pytest: bool = False
    missing: str = ""
    # Processes it may take: a kernel that takes the device with it ends the benchmark with exit
    # code 2, and the same command goes on behind that row.
    sittings: int = 1


def lay_out_package(tree: Path) -> None:
    """fusednorm as an installation has it, made of links."""
    shutil.rmtree(tree, ignore_errors=True)
    package = tree / "fusednorm"
    package.mkdir(parents=True)
    for entry in (ROOT / "python" / "fusednorm").iterdir():
        (package / entry.name).symlink_to(entry)
    (package / "triton_kernels").symlink_to(ROOT / "triton_kernels")
    (package / "bench").symlink_to(ROOT / "bench")


def plan(out: Path) -> list[Stage]:
    """All stages, in order."""
    python = sys.executable
    stages = [
        Stage("env", (python, "-m", "fusednorm.collect_env"), "env.log"),
        Stage("build", (python, str(ROOT / "tools" / "gpu_check.py"), "--build"), "build.log"),
    ]
    gpu = sorted((ROOT / "tests" / "gpu").glob("test_*.py"))
    suite = [
        file
        for file in sorted((ROOT / "tests").glob("test_*.py"))
        if not any(word in file.stem for word in NOT_ON_THE_CARD)
    ]
    for log, files in (("gpu.log", gpu), ("suite.log", suite)):
        for file in files:
            name = str(file.relative_to(ROOT))
            parallel = PARALLEL if files is suite and importlib.util.find_spec("xdist") else ()
            command = (python, "-m", "pytest", "-q", "-rfEs", *parallel, name)
            stages.append(Stage(name, command, log, True))
    sanitizer = shutil.which("compute-sanitizer", path=search_path())
    missing = "" if sanitizer else "compute-sanitizer is not installed"
    for tool in ("memcheck", "racecheck"):
        guard = (sanitizer or "", f"--tool={tool}", "--error-exitcode=1", "--target-processes=all")
        subset = (python, "-m", "pytest", "-q", "-m", "sanitizer", "tests/gpu")
        stages.append(Stage(tool, (*guard, *subset), "sanitizer.log", missing=missing))
    bench = (python, "-m", "fusednorm.bench", "run", "--device", "cuda", "--quick")
    bench += ("--commit", commit(), "--out", str(out / "bench.json"), "--progress", "plain")
    stages.append(Stage("bench", bench, "bench.log", sittings=4))
    return stages


def search_path() -> str:
    return os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/cuda/bin"))


def fingerprint() -> str:
    """Tells one state of the sources from another, git or no git."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for file in sorted((ROOT / folder).rglob("*")):
            if file.is_file() and file.suffix not in (".so", ".pyc", ".json"):
                digest.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def commit() -> str:
    if named := os.environ.get("COMMIT"):
        return named
    ask = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return f"sources {fingerprint()}"


class Record:
    """OUT/tests.json, on disk after every change."""

    def __init__(self, path: Path, sources: str) -> None:
        self.path = path
        self.content: dict[str, Any] = {"header": {}, "sources": sources, "stages": {}, "tests": []}
        if path.exists():
            before = json.loads(path.read_text())
            if before.get("sources") == sources:
                self.content = before

    def done(self, name: str) -> bool:
        return name in self.content["stages"]

    def forget(self, name: str) -> None:
        self.content["stages"].pop(name, None)
        self.content["tests"] = [t for t in self.content["tests"] if t["stage"] != name]

    def enter(self, name: str, outcome: str, seconds: float, tests: list[dict[str, Any]]) -> None:
        self.forget(name)
        self.content["stages"][name] = {"outcome": outcome, "seconds": round(seconds, 1)}
        self.content["tests"] += [{"stage": name, **test} for test in tests]
        self.save()

    def save(self) -> None:
        # Whole or not at all: the process may be ended at any moment.
        scratch = self.path.with_suffix(".tmp")
        scratch.write_text(json.dumps(self.content, indent=1) + "\n")
        scratch.replace(self.path)


def read_junit(report: Path) -> list[dict[str, Any]]:
    """Name, outcome and seconds of each test in pytest's XML."""
    tests = []
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
        name = f"{case.get('classname')}::{case.get('name')}"
        outcome = {"failure": "failed", "error": "error", "skipped": "skipped"}
        tests.append(
            {
                "name": name,
                "outcome": outcome[min(kinds)] if kinds else "passed",
                "seconds": round(float(case.get("time", 0)), 3),
            }
        )
    return tests


def run_stage(stage: Stage, out: Path, record: Record, limit: float = LIMIT_S) -> str:
    """Runs one stage, puts it on record and returns its outcome."""
    if stage.missing:
        record.enter(stage.name, f"not run ({stage.missing})", 0, [])
        return f"not run ({stage.missing})"
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, (out / stage.log).open("a") as log:
        report = Path(scratch, "report.xml")
        command = [*stage.command, *([f"--junitxml={report}"] if stage.pytest else [])]
        log.write(f"\n== {stage.name}\n")
        log.flush()
        environ = {**os.environ, "PYTHONPATH": str(TREE), "PYTHONUNBUFFERED": "1"}
        if stage.log == "sanitizer.log":
            # torch's allocator would hand out parts of 2 MiB blocks, which hide an overrun.
            environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        for _ in range(stage.sittings):
            process = subprocess.Popen(
                command, cwd=ROOT, env=environ, stdout=log, stderr=log, start_new_session=True
            )
            try:
                code = process.wait(limit)
                outcome = "passed" if code == 0 else f"failed (exit {code})"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                code = process.wait()
                outcome = f"failed (longer than {limit:g} s)"
            if code != LOST:
                break
        tests = read_junit(report) if report.exists() else []
    record.enter(stage.name, outcome, time.monotonic() - began, tests)
    return outcome


def describe_machine() -> dict[str, Any] | str:
    """The header of tests.json, or one line that says why nothing can run here."""
    try:
        import torch
    except ImportError:
        return f"{sys.executable} has no torch"
    if not torch.cuda.is_available():
        return f"no CUDA device (torch {torch.__version__})"
    from fusednorm import collect_env

    properties = torch.cuda.get_device_properties(0)
    facts = collect_env.collect()
    keys = {"driver": "driver", "CUDA of torch": "cuda", "torch": "torch", "Triton": "triton"}
    header = {short: facts[name] for name, short in keys.items()}
    arch = f"{properties.major}{properties.minor}"
    return {"gpu": properties.name, "arch": arch, **header, "commit": commit()}


def build_for_present_card() -> int:
    """A library that lies in the tree and loads is taken; else one is built for this card alone."""
    library = ROOT / "python" / "fusednorm" / "_C.so"
    load = "import sys, fusednorm; print(fusednorm.available_backends())"
    check = [
        sys.executable,
        "-c",
        load + "; sys.exit('cuda' not in fusednorm.available_backends())",
    ]
    if library.exists():
        if subprocess.run(check).returncode == 0:
            print(f"taking {library}")
            return 0
        library.unlink()
    import torch

    arch = "{}{}".format(*torch.cuda.get_device_capability())
    environ = {**os.environ, "FUSEDNORM_NATIVE": "1", "PATH": search_path()}
    environ.setdefault("CUDA_ARCHS", arch)
    command = [sys.executable, str(ROOT / "tools" / "native.py"), str(library.parent)]
    code = subprocess.run(command, env=environ).returncode
    lay_out_package(TREE)
    return code or subprocess.run(check).returncode


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--again", nargs="+", default=[], metavar="STAGE", help="run these anew")
    parser.add_argument("--list", action="store_true", help="name the stages and stop")
    parser.add_argument("--build", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.build:
        return build_for_present_card()
    if options.out is None:
        parser.error("--out is needed")
    out = options.out.resolve()
    record = Record(out / "tests.json", fingerprint())
    stages = plan(out)
    if options.list:
        for stage in stages:
            print(f"{'done' if record.done(stage.name) else 'to do':6}{stage.name}")
        return 0

    lay_out_package(TREE)
    sys.path.insert(0, str(TREE))
    machine = describe_machine()
    if isinstance(machine, str):
        print(f"gpu-check: cannot run here: {machine}")
        return CANNOT_RUN
    out.mkdir(parents=True, exist_ok=True)
    record.content["header"] = machine
    record.save()
    for stage in stages:
        if record.done(stage.name) and stage.name not in options.again:
            continue
        print(f"{stage.name} ... ", end="", flush=True)
        print(run_stage(stage, out, record), flush=True)

    outcomes = [test["outcome"] for test in record.content["tests"]]
    print(", ".join(f"{outcomes.count(o)} {o}" for o in ("passed", "failed", "error", "skipped")))
    bad = {n: s["outcome"] for n, s in record.content["stages"].items() if s["outcome"] != "passed"}
    for name, outcome in bad.items():
        print(f"{name}: {outcome}")
    return 1 if any(outcome.startswith("failed") for outcome in bad.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
