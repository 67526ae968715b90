"""Makes the environment that make's targets run in: python3 tools/setup_env.py .venv

A torch from 2.10 on that the invoking python (or its active virtual environment) has is used as it
is: the new environment sees that one's packages and never changes them. Otherwise torch and all
else come in the versions of constraints.txt. A stamp makes the second call free; when all packages
are there already, nothing asks the network.

TORCH_INDEX: package index to take torch from, for instance one with builds for the CPU only.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import site
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = (3, 10)
TORCH = (2, 10)
TORCH_TESTED = "2.13.0"
# torchvision's minor version runs ahead of torch's by this much.
TORCHVISION_AHEAD = 15

LIST_PACKAGES = """
import importlib.metadata as m, json, sys
found = {}
for d in m.distributions():
    inside = str(d.locate_file("")).startswith(sys.prefix)
    found.setdefault(d.name.lower().replace("_", "-"), (d.version, inside))
print(json.dumps(found))
"""


def say(line: str) -> None:
    print(f"setup: {line}", flush=True)


def torch_minor(version: str) -> int | None:
    """The minor version of a torch that is new enough, else None."""
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    return numbers[1] if numbers >= TORCH else None


class Environment:
    """A virtual environment, seen from outside."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"
        self.constraints = folder / "constraints.txt"

    def works(self) -> bool:
        try:
            return subprocess.run([self.python, "-c", ""], capture_output=True).returncode == 0
        except OSError:
            return False

    def create(self) -> None:
        for module in ("venv", "ensurepip"):
            if importlib.util.find_spec(module) is None:
                sys.exit(
                    f"setup: {sys.executable} has no module {module}; install it (Debian, Ubuntu: "
                    "apt install python3-venv) or name another python: make PYTHON=/path/to/python3"
                )
        say(f"creating {self.folder} with Python {sys.version.split()[0]}")
        subprocess.run([sys.executable, "-m", "venv", "--clear", self.folder], check=True)

    def packages(self) -> dict[str, tuple[str, bool]]:
        """Version of each visible package, and whether it lies inside this environment."""
        said = subprocess.run(
            [self.python, "-c", LIST_PACKAGES], check=True, capture_output=True, text=True
        )
        return {
            name: (version, inside) for name, (version, inside) in json.loads(said.stdout).items()
        }

    def pip(self, *arguments: str, required: bool = True, **environ: str) -> None:
        command = [self.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        command += ["-c", self.constraints, *arguments]
        failed = subprocess.run(command, env={**os.environ, **environ}, cwd=ROOT).returncode
        if failed and required:
            sys.exit(f"setup: pip install {' '.join(arguments)} failed (see above)")
        if failed:
            say(f"going on without {' '.join(arguments)}")


def share_packages_of_invoker(env: Environment) -> None:
    """Lets env see the packages of the running python, behind its own."""
    folders = [*site.getsitepackages(), site.getusersitepackages()]
    lines = [f"import site; site.addsitedir({p!r})" for p in folders if Path(p).is_dir()]
    (own,) = env.folder.glob("lib/python3*/site-packages")
    (own / "invoking_environment.pth").write_text("\n".join(lines) + "\n")


def invoker_torch() -> str | None:
    import importlib.metadata

    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None
    return version if torch_minor(version) is not None else None


def write_constraints(env: Environment) -> None:
    """constraints.txt, but what is there already, torch and Triton above all, stays as it is."""
    present = env.packages()
    torch = present["torch"][0].split("+")[0] if "torch" in present else None
    kept = [f"{name}=={present[name][0]}" for name in ("torch", "triton") if name in present]
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        name = line.split("==")[0].lower().replace("_", "-")
        if name in present and (name in ("torch", "triton") or not present[name][1]):
            continue
        # A CUDA build of torch asks for the Triton of its own release.
        if name == "triton" and torch is None:
            continue
        if name == "torchvision" and torch != TORCH_TESTED:
            continue
        kept.append(line)
    env.constraints.write_text("\n".join(kept) + "\n")


def install_torch(env: Environment) -> None:
    index = ["--index-url", os.environ["TORCH_INDEX"]] if os.environ.get("TORCH_INDEX") else []
    command = [env.python, "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps", "--report"]
    report = subprocess.run(
        [*command, "-", "-c", env.constraints, *index, "torch"], capture_output=True, text=True
    )
    if report.returncode:
        sys.exit(f"setup: no torch to be had\n{report.stderr}")
    (chosen,) = json.loads(report.stdout)["install"]
    needs = " ".join(chosen["metadata"].get("requires_dist", []))
    say(f"installing torch {chosen['metadata']['version']}")
    if "nvidia-" in needs and not Path("/proc/driver/nvidia/version").exists():
        say(
            "this is a CUDA build, gigabytes with its libraries, and there is no NVIDIA driver; "
            "it works on the CPU too. For a CPU build: make TORCH_INDEX=<its index>"
        )
    env.pip(*index, "torch")


def main() -> int:
    if sys.version_info < PYTHON:
        for minor in range(14, PYTHON[1] - 1, -1):
            if newer := shutil.which(f"python3.{minor}"):
                os.execv(newer, [newer, *sys.argv])
        sys.exit(
            f"setup: Python 3.10 or newer is needed, {sys.executable} is {sys.version.split()[0]}"
        )
    env = Environment(Path(sys.argv[1]).absolute())
    sources = [ROOT / name for name in ("constraints.txt", "pyproject.toml", "tools/setup_env.py")]
    wanted = hashlib.sha256(b"".join(p.read_bytes() for p in sources)).hexdigest()
    wanted = f"{ROOT} {wanted}\n"
    stamp = env.folder / "fusednorm.stamp"
    if stamp.exists() and stamp.read_text() == wanted and env.python.exists():
        return 0

    if not env.works():
        env.create()
        if (torch := invoker_torch()) and Path(sys.prefix) != env.folder:
            say(f"using torch {torch} of {sys.prefix} as it is")
            share_packages_of_invoker(env)
    write_constraints(env)
    if "torch" not in env.packages():
        install_torch(env)
        write_constraints(env)

    present = env.packages()
    torch, inside = present["torch"]
    minor = torch_minor(torch)
    if minor is None:
        sys.exit(
            f"setup: {env.folder} has torch {torch}, 2.10 or newer is needed; remove that folder"
        )
    say("installing what the tests, the demo and the benchmarks use")
    env.pip("setuptools>=77.0.3", "wheel")
    extras = "dev" if "triton" in present else "dev,triton"
    env.pip("--no-build-isolation", "-e", f".[{extras}]", FUSEDNORM_NATIVE="0")
    # Without their dependencies: those would bring another torch.
    torchvision = f"torchvision==0.{minor + TORCHVISION_AHEAD}.*"
    env.pip("--no-deps", torchvision, "timm", required=False)
    search = [env.python, ROOT / "tools" / "cuda_toolkit.py"]
    if subprocess.run(search, capture_output=True).returncode:
        say("no CUDA compiler on this machine: installing NVIDIA's packages of CUDA 13.0")
        sys.path.insert(0, str(ROOT / "tools"))
        from cuda_toolkit import PACKAGES

        # The parts must lie in one folder, so a torch's own copy of the runtime does not count.
        env.pip("--no-deps", *([] if inside else ["--ignore-installed"]), *PACKAGES)
    stamp.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
