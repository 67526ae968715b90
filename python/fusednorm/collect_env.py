"""What a bug report needs to say: ``python -m fusednorm.collect_env``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

import fusednorm
from fusednorm.ops.schema import NATIVE_LIBRARY

# cmake/build_info.cpp.in puts this text into the library.
_BUILD_INFO = re.compile(rb"fusednorm-build-info: ([ -~]*)")


def build_info(library: Path) -> str | None:
    """What a native library was compiled for, read without loading it."""
    found = _BUILD_INFO.search(library.read_bytes())
    return found[1].decode() if found else None


def _triton() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "none found"
    return said.stdout.splitlines()[0]


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none"
    gpus = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return "; ".join(f"{gpu.name}, sm_{gpu.major}{gpu.minor}" for gpu in gpus)


def _native_library() -> str:
    if not NATIVE_LIBRARY.exists():
        return "not installed (the package was built without a CUDA compiler)"
    return f"{NATIVE_LIBRARY} ({build_info(NATIVE_LIBRARY) or 'built for an unknown target'})"


def _environment() -> str:
    named = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("FUSEDNORM_")]
    named += [f"{k}={os.environ[k]}" for k in ("TRITON_INTERPRET",) if k in os.environ]
    return " ".join(named) or "nothing set"


FACTS: dict[str, Callable[[], str]] = {
    "fusednorm": lambda: f"{fusednorm.__version__} at {Path(fusednorm.__file__).parent}",
    "native library": _native_library,
    "backends": lambda: ", ".join(fusednorm.available_backends()),
    "environment": _environment,
    "Python": platform.python_version,
    "torch": lambda: torch.__version__,
    "Triton": _triton,
    "CUDA of torch": lambda: torch.version.cuda or "none (CPU build)",
    "cuDNN": lambda: str(torch.backends.cudnn.version() or "none"),
    "driver": _driver,
    "GPU": _gpus,
    "system": platform.platform,
}


def collect() -> dict[str, str]:
    """Each fact by name; one that cannot be had says why instead of hiding the others."""
    facts = {}
    for name, ask in FACTS.items():
        try:
            facts[name] = ask()
        except Exception as failure:
            facts[name] = f"unknown ({type(failure).__name__}: {failure})"
    return facts


def main() -> None:
    """Print the facts, one a line."""
    facts = collect()
    width = max(map(len, facts))
    for name, fact in facts.items():
        print(f"{name:<{width}}  {fact}")


if __name__ == "__main__":
    main()
