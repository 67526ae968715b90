"""Finds a CUDA compiler: the one place that setup.py, CMakeLists.txt and the tests ask.

Looked at in this order: CUDACXX, CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda, and the compiler
packages that PyPI carries for CUDA 13.0 (site-packages/nvidia/cu13). Standard library only, since
it runs inside build environments that have nothing else.

    python tools/cuda_toolkit.py    prints "nvcc;library folder;version", or says what is missing
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# sm_100 and sm_120 came with 12.8.
MINIMUM = (12, 8)
PACKAGES = (
    "nvidia-cuda-nvcc==13.0.*",
    "nvidia-cuda-crt==13.0.*",
    "nvidia-nvvm==13.0.*",
    "nvidia-cuda-runtime==13.0.*",
    "nvidia-cuda-cccl==13.0.*",
)
# What a build takes from those packages: some of them can be there without the others (a CUDA
# build of torch brings the runtime alone).
PARTS = (
    "bin/nvcc",
    "bin/crt/link.stub",
    "nvvm/bin/cicc",
    "include/crt/host_defines.h",
    "include/cuda_runtime.h",
    "include/cccl/cuda/std/version",
    "lib/libcudart_static.a",
)
HOW_TO_GET_ONE = (
    f"install CUDA {'.'.join(map(str, MINIMUM))} or newer and set CUDA_HOME, or: "
    f"pip install {' '.join(repr(p) for p in PACKAGES)}"
)


@dataclass(frozen=True)
class Toolkit:
    nvcc: Path
    version: tuple[int, ...]
    # PyPI's packages keep libcudart_static.a in lib, nvcc looks for it in lib64.
    library_dir: Path | None = None


def _version(nvcc: Path) -> tuple[int, ...] | None:
    """The compiler's version, None if it does not run."""
    try:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"V(\d+(?:\.\d+)+)", said.stdout)
    return tuple(map(int, found[1].split("."))) if said.returncode == 0 and found else None


def _candidates(
    environ: Mapping[str, str], roots: Sequence[str], site_dirs: Iterable[str]
) -> Iterator[tuple[Path, Path | None]]:
    if compiler := environ.get("CUDACXX"):
        # A choice made by hand is kept to: no quiet step down to another compiler.
        yield Path(shutil.which(compiler, path=environ.get("PATH")) or compiler), None
        return
    homes = [environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    yield from ((Path(home, "bin", "nvcc"), None) for home in homes)
    if on_path := shutil.which("nvcc", path=environ.get("PATH", "")):
        yield Path(on_path), None
    yield from ((Path(root, "bin", "nvcc"), None) for root in roots)
    for site in site_dirs:
        package = Path(site, "nvidia", "cu13")
        if all((package / part).exists() for part in PARTS):
            yield package / "bin" / "nvcc", package / "lib"


def find_toolkit(
    environ: Mapping[str, str] | None = None,
    roots: Sequence[str] = ("/usr/local/cuda",),
    site_dirs: Iterable[str] | None = None,
) -> Toolkit | str:
    """The first compiler that runs and is new enough, else one line that says what is missing."""
    environ = os.environ if environ is None else environ
    site_dirs = [p for p in sys.path if p] if site_dirs is None else site_dirs
    rejected = []
    for nvcc, library_dir in _candidates(environ, roots, site_dirs):
        if not nvcc.exists() and "CUDACXX" not in environ:
            continue
        version = _version(nvcc)
        if version is not None and version >= MINIMUM:
            return Toolkit(nvcc, version, library_dir)
        reason = "does not run" if version is None else f"is {'.'.join(map(str, version))}"
        rejected.append(f"{nvcc} {reason}")
    found = f" ({'; '.join(rejected)})" if rejected else ""
    return f"no CUDA compiler{found}; {HOW_TO_GET_ONE}"


def main() -> int:
    found = find_toolkit()
    if isinstance(found, str):
        print(found, file=sys.stderr)
        return 1
    print(found.nvcc, found.library_dir or "", ".".join(map(str, found.version)), sep=";")
    return 0


if __name__ == "__main__":
    sys.exit(main())
