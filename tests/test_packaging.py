"""Wheels hold the package and nothing else; the library needs only torch's stable ABI."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import fusednorm
from fusednorm.collect_env import build_info

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "python" / "fusednorm" / "_C.so"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = {
    "fusednorm": ROOT / "python" / "fusednorm",
    "fusednorm/bench": ROOT / "bench",
    "fusednorm/triton_kernels": ROOT / "triton_kernels",
}
STEP = """
import torch, fusednorm
y = fusednorm.BatchGroupNorm(4, num_groups=2)(torch.randn(2, 4, 3, 3))
assert abs(float(y.mean())) < 1e-5
print(fusednorm.__file__)
"""
needs_library = pytest.mark.skipif(
    not LIBRARY.exists(), reason="no native library: make native builds it"
)


def build_wheel(tree: Path, to: Path, **environ: str) -> tuple[Path, str]:
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "-w", to, tree],
        env={**os.environ, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    (wheel,) = to.glob("*.whl")
    return wheel, done.stdout


def modules() -> set[str]:
    """What a wheel must hold of the sources."""
    return {
        f"{package}/{file.relative_to(folder)}"
        for package, folder in SOURCES.items()
        for file in folder.rglob("*")
        if file.suffix in (".py", ".css", ".html", ".js")
    }


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {n for n in archive.namelist() if ".dist-info/" not in n}


def import_installed(wheel: Path, folder: Path) -> Path:
    """Installs the wheel alone into an empty folder, uses it there, and says where it lies."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, wheel]
    subprocess.run(pip, check=True)
    environ = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", STEP]
    done = subprocess.run(command, env=environ, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


@pytest.fixture(scope="module")
def pure(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A wheel from a copy of the tree, built where the CUDA compiler cannot run, and the log.

    The copy still has a native library: an old one must not get in.
    """
    copy = tmp_path_factory.mktemp("tree")
    for name in ("python", "bench", "triton_kernels", "csrc", "cmake", "tools"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.egg-info"))
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    (copy / "python" / "fusednorm" / "_C.so").write_bytes(b"old")
    (copy / "build" / "lib" / "fusednorm").mkdir(parents=True)
    (copy / "build" / "lib" / "fusednorm" / "_C.so").write_bytes(b"old")
    return build_wheel(copy, tmp_path_factory.mktemp("pure"), CUDACXX="/nowhere/nvcc")


def test_without_a_compiler_the_wheel_is_pure(pure, tmp_path):
    wheel, _ = pure
    assert wheel.name == f"fusednorm-{fusednorm.__version__}-py3-none-any.whl"
    assert names(wheel) == modules() | {"fusednorm/py.typed"}
    assert import_installed(wheel, tmp_path).is_relative_to(tmp_path)


def test_one_line_says_what_is_missing_and_how_to_get_it(pure):
    lines = {line.strip() for line in pure[1].splitlines() if "no native library" in line}
    (line,) = lines
    assert "/nowhere/nvcc does not run" in line
    assert "nvidia-cuda-nvcc==13.0.*" in line


def test_metadata(pure):
    with zipfile.ZipFile(pure[0]) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("METADATA"))
        about = Parser().parsestr(archive.read(name).decode())
        assert any(n.endswith("/licenses/LICENSE") for n in archive.namelist())
    assert about["Version"] == fusednorm.__version__
    assert about["License-Expression"] == "Apache-2.0"
    assert about["Requires-Python"] == ">=3.10"
    assert "torch>=2.10" in about.get_all("Requires-Dist")


def test_the_version_stands_in_one_place():
    stated = re.compile(rf"""["']{re.escape(fusednorm.__version__)}["']""")
    files = [ROOT / "pyproject.toml", ROOT / "setup.py", ROOT / "CMakeLists.txt"]
    files += (ROOT / "python" / "fusednorm").rglob("*.py")
    found = [f.name for f in files if stated.search(f.read_text())]
    assert found == ["__init__.py"]


def test_every_requirement_has_a_pin_inside_its_range():
    pins: dict[str, list[Version]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            (specifier,) = pin.specifier
            assert specifier.operator == "==", line
            pins.setdefault(pin.name.lower(), []).append(Version(specifier.version))
    extras = PROJECT["project"]["optional-dependencies"].values()
    wanted = [*PROJECT["project"]["dependencies"], *(r for extra in extras for r in extra)]
    for requirement in map(Requirement, wanted):
        if requirement.name != "fusednorm":
            versions = pins[requirement.name.lower()]
            assert all(v in requirement.specifier for v in versions), requirement


@needs_library
def test_wheel_with_the_native_library(tmp_path):
    # In the tree itself: its library has just been built, so nothing compiles again.
    wheel, _ = build_wheel(ROOT, tmp_path, FUSEDNORM_NATIVE="1")
    expected = rf"fusednorm-{re.escape(fusednorm.__version__)}-py3-none-(many)?linux\w*\.whl"
    assert re.fullmatch(expected, wheel.name)
    assert names(wheel) == modules() | {"fusednorm/py.typed", "fusednorm/_C.so"}
    installed = import_installed(wheel, tmp_path / "empty")
    assert build_info(installed.parent / "_C.so") == build_info(LIBRARY)


def binutils(*command: str) -> list[str]:
    done = subprocess.run([*command, LIBRARY], check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


@needs_library
def test_library_takes_nothing_from_torch_but_the_stable_shims():
    undefined = [line.split() for line in binutils("nm", "-D", "--undefined-only", "--no-demangle")]
    symbols = {name.split("@")[0]: kind for kind, name in undefined}
    # Itanium mangling names a namespace by its length: at, c10, torch, caffe2.
    mangled = [s for s in symbols if re.match(r"_Z\w*?N?K?(2at|3c10|5torch|6caffe2)\d", s)]
    assert mangled == []
    shims = {s for s in symbols if s.startswith(("aoti_torch_", "torch_"))}
    assert len(shims) > 5
    foreign = {s for s in symbols if re.match(r"_*cuda|cu[A-Z]|_?Py", s)}
    assert foreign == set()
    # Only CUDA builds of torch have it: a strong reference would not load on the others. The
    # number of the device type they all have.
    assert symbols["aoti_torch_get_current_cuda_stream"] == "w"
    strong = {s for s in shims if "cuda" in s and symbols[s] != "w"}
    assert strong <= {"aoti_torch_device_type_cuda"}


@needs_library
def test_library_depends_on_libtorch_and_the_system_alone():
    dynamic = "\n".join(binutils("readelf", "-d", "--wide"))
    needed = set(re.findall(r"NEEDED.*\[(.+?)\.so", dynamic))
    system = {"libstdc++", "libm", "libgcc_s", "libc", "libdl", "libpthread", "librt", "ld-linux"}
    torch = {"libtorch", "libtorch_cpu", "libc10"}
    assert needed >= torch
    assert {n.removesuffix("-x86-64").removesuffix("-aarch64") for n in needed} <= system | torch
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


@needs_library
def test_library_carries_no_path_of_its_builder():
    content = LIBRARY.read_bytes()
    for folder in (ROOT, Path(sys.prefix)):
        assert f"{folder}/".encode() not in content


@needs_library
def test_library_says_what_it_was_built_for():
    assert re.fullmatch(
        r"CUDA \d+\.\d+[.\d]*, sm [\d af]+, PTX \d+[af]?", build_info(LIBRARY) or ""
    )
