"""Where the numbers were measured: the header without which no row means anything."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import fusednorm


def _output(*command: str) -> str | None:
    """What a command prints, or None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def commit() -> str | None:
    """The commit of the checkout this file is tracked in; None for an installed copy."""
    here = Path(__file__).resolve()
    git = ("git", "-C", str(here.parent))
    if _output(*git, "ls-files", here.name) is None:
        return None
    return _output(*git, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def sources() -> str:
    """Tells one state of the installed code from another, commit or no commit."""
    digest = hashlib.sha256()
    package = Path(fusednorm.__file__).parent
    # In an editable installation these two lie elsewhere.
    for folder in (package, Path(__file__).parent, *_triton_kernels()):
        for file in sorted(folder.rglob("*")):
            if file.suffix in (".py", ".so"):
                digest.update(f"{file.relative_to(folder)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def _triton_kernels() -> list[Path]:
    import importlib.util

    found = importlib.util.find_spec("fusednorm.triton_kernels")
    return [Path(p) for p in found.submodule_search_locations or ()] if found else []


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _triton() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    version: str = triton.__version__
    return version


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def slug(header: dict[str, Any]) -> str:
    """The folder of bench/results that a machine's figures go to.

    The device's name in lower case, all but letters and digits made one hyphen: "NVIDIA H200" is
    nvidia-h200. A CPU's has its threads behind it, since they are half of what it is.
    """
    name = (
        header["device"] if _on_gpu(header) else f"{header['device']} {header['threads']} threads"
    )
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def _on_gpu(header: dict[str, Any]) -> bool:
    return header.get("l2_bytes") is not None


def cores() -> list[int] | None:
    """The cores that this process may use; None where the system does not say."""
    try:
        return sorted(os.sched_getaffinity(0))
    except AttributeError:
        return None


@contextlib.contextmanager
def pinned(threads: int | None = None) -> Iterator[list[int] | None]:
    """Runs on so many CPU threads (as many as torch has now), kept on as many cores.

    The last of the cores that this process may use, since interrupts like the first; yields which.
    Yields None where the system cannot pin.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    allowed = cores()
    if allowed is None:
        yield None
        torch.set_num_threads(before)
        return
    kept = allowed[-torch.get_num_threads() :]
    try:
        _keep_on(kept)
        yield kept
    finally:
        _keep_on(allowed)
        torch.set_num_threads(before)


def _keep_on(cores: list[int]) -> None:
    """Also for the threads that are there already: a new mask is inherited by new ones only."""
    for task in Path("/proc/self/task").glob("*"):
        # A thread may end in between.
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(task.name), cores)


def header(
    device: str, commit_name: str | None = None, cpus: list[int] | None = None
) -> dict[str, Any]:
    """GPU or CPU, software, clocks and commit; `cpus` are those that the threads are kept on."""
    facts: dict[str, Any] = {
        "device": _cpu(),
        "threads": torch.get_num_threads(),
        "cpus": cpus,
        "driver": None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": _triton(),
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "clocks": None,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        # nvidia-smi comes with every driver, so this needs no package on a machine without network.
        query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem"
        told = _output("nvidia-smi", "--id=0", f"--query-gpu={query}", "--format=csv,noheader")
        driver, *clocks = (told or "").split(", ")
        names = ("sm", "memory", "max_sm", "max_memory")
        facts |= {
            "device": properties.name,
            "l2_bytes": properties.L2_cache_size,
            "driver": driver or None,
            "clocks": dict(zip(names, clocks, strict=False)) or None,
        }
    return facts | {
        "python": platform.python_version(),
        "fusednorm": getattr(fusednorm, "__version__", None),
        "commit": commit_name or commit(),
        "sources": sources(),
    }
