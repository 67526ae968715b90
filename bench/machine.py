"""Where the numbers were measured: the header without which no row means anything."""

from __future__ import annotations

import datetime
import platform
import subprocess
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


def header(device: str, copy_gb_per_s: float, commit_name: str | None = None) -> dict[str, Any]:
    """GPU or CPU, software, clocks, commit and the copy bandwidth measured in this run."""
    facts: dict[str, Any] = {
        "device": _cpu(),
        "threads": torch.get_num_threads(),
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
        "copy_gb_per_s": copy_gb_per_s,
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
