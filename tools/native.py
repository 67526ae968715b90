"""Builds the native library through CMakeLists.txt: what setup.py, make and gpu-check share.

    python tools/native.py python/fusednorm    builds and puts _C.so into that folder

FUSEDNORM_NATIVE=0 asks for no library, FUSEDNORM_NATIVE=1 makes a missing part an error; MAX_JOBS
bounds the parallel compilations. Standard library only.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from cuda_toolkit import find_toolkit

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "native"
TORCH = (2, 10)
CMAKE = (3, 24)


def _first_two(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version)[:2])


def _tools_of_this_environment() -> None:
    """Puts cmake and ninja of the running environment on PATH, activated or not."""
    scripts = sysconfig.get_path("scripts")
    if scripts not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = scripts + os.pathsep + os.environ.get("PATH", "")


def obstacle() -> str | None:
    """What keeps the library from being built, with the way out; None if nothing does.

    Raises:
        SystemExit: FUSEDNORM_NATIVE=1 and something is missing.
    """
    _tools_of_this_environment()
    wanted = os.environ.get("FUSEDNORM_NATIVE")
    missing = "FUSEDNORM_NATIVE=0" if wanted == "0" else _missing()
    if missing is not None:
        line = f"fusednorm: no native library, only Triton and reference backends: {missing}"
        if wanted == "1":
            sys.exit(line)
        print(line, file=sys.stderr)
    return missing


def _missing() -> str | None:
    if importlib.util.find_spec("torch") is None:
        return (
            "torch is not in the build environment; pip install 'torch>=2.10' cmake ninja and "
            "'setuptools>=77.0.3' first, then pip install --no-build-isolation"
        )
    if _first_two(torch := importlib.metadata.version("torch")) < TORCH:
        return f"torch {torch} is too old; pip install 'torch>=2.10'"
    cmake = shutil.which("cmake")
    said = subprocess.run([cmake, "--version"], capture_output=True, text=True) if cmake else None
    if said is None or _first_two(said.stdout) < CMAKE:
        return "no CMake 3.24 or newer; pip install cmake ninja"
    toolkit = find_toolkit()
    return toolkit if isinstance(toolkit, str) else None


def build(folder: Path) -> None:
    """Configures, compiles what changed and puts _C.so into the folder."""
    # CMake keeps the compiler it met first and refuses a cache from another folder.
    made_with = f"{ROOT}\n{sys.executable}\n{find_toolkit()}\n"
    record = BUILD / "made_with.txt"
    fresh = [] if record.exists() and record.read_text() == made_with else ["--fresh"]
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    configure = ["cmake", *fresh, "-S", ROOT, "-B", BUILD, *generator]
    subprocess.run([*configure, f"-DPython3_EXECUTABLE={sys.executable}"], check=True)
    record.write_text(made_with)
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
    subprocess.run(["cmake", "--build", BUILD, "--parallel", jobs], check=True)
    subprocess.run(["cmake", "--install", BUILD, "--prefix", folder], check=True)


def main() -> int:
    if obstacle() is None:
        build(Path(sys.argv[1]).resolve())
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as failed:
        # The compiler has said why.
        sys.exit(f"fusednorm: {Path(failed.cmd[0]).name} failed")
