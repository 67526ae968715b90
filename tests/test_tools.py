"""The helpers behind make: finding a CUDA compiler, and gpu-check's stages, without either."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch):
    def load(name: str) -> ModuleType:
        monkeypatch.syspath_prepend(ROOT / "tools")
        return importlib.import_module(name)

    return load


def fake_nvcc(home: Path, version: str, folder: str = "bin") -> Path:
    nvcc = home / folder / "nvcc"
    nvcc.parent.mkdir(parents=True, exist_ok=True)
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release x, V{version}'\n")
    nvcc.chmod(0o755)
    return nvcc


def fake_packages(cuda_toolkit: ModuleType, site: Path) -> Path:
    home = site / "nvidia" / "cu13"
    for part in cuda_toolkit.PARTS:
        (home / part).parent.mkdir(parents=True, exist_ok=True)
        (home / part).touch()
    return fake_nvcc(home, "13.0.88")


def test_compilers_are_asked_in_order(tool, tmp_path):
    cuda = tool("cuda_toolkit")
    named, home, path, system = (tmp_path / n for n in ("named", "home", "path", "system"))
    site = tmp_path / "site"
    compilers = [fake_nvcc(folder, "13.0.1") for folder in (named, home, path, system)]
    compilers.append(fake_packages(cuda, site))
    environ = {"CUDACXX": str(compilers[0]), "CUDA_HOME": str(home), "PATH": f"{path}/bin:/bin"}

    for expected, drop in zip(compilers, ("CUDACXX", "CUDA_HOME", "PATH", None, None), strict=True):
        found = cuda.find_toolkit(environ, [str(system)] if system.exists() else [], [str(site)])
        assert found.nvcc == expected
        assert (found.library_dir is None) == (expected is not compilers[-1])
        if drop is None:
            compilers[3].unlink(missing_ok=True)
        elif drop == "PATH":
            environ["PATH"] = "/bin"
        else:
            del environ[drop]


def test_a_compiler_too_old_is_passed_over_and_named(tool, tmp_path):
    cuda = tool("cuda_toolkit")
    old = fake_nvcc(tmp_path / "old", "12.4.131")
    new = fake_nvcc(tmp_path / "new", "12.8.61")
    environ = {"CUDA_HOME": str(old.parents[1]), "PATH": "/bin"}
    assert cuda.find_toolkit(environ, [str(new.parents[1])], []).nvcc == new
    line = cuda.find_toolkit(environ, [], [])
    assert f"{old} is 12.4.131" in line
    assert "pip install 'nvidia-cuda-nvcc==13.0.*'" in line
    assert "\n" not in line


def test_a_compiler_named_by_hand_is_not_replaced(tool, tmp_path):
    cuda = tool("cuda_toolkit")
    fake_nvcc(tmp_path, "13.0.1")
    line = cuda.find_toolkit({"CUDACXX": "/nowhere/nvcc", "PATH": "/bin"}, [str(tmp_path)], [])
    assert "/nowhere/nvcc does not run" in line


@pytest.mark.parametrize("part", ["include/cuda_runtime.h", "nvvm/bin/cicc"])
def test_incomplete_packages_are_not_a_compiler(tool, tmp_path, part):
    cuda = tool("cuda_toolkit")
    nvcc = fake_packages(cuda, tmp_path)
    assert cuda.find_toolkit({"PATH": "/bin"}, [], [str(tmp_path)]).nvcc == nvcc
    (tmp_path / "nvidia" / "cu13" / part).unlink()
    assert isinstance(cuda.find_toolkit({"PATH": "/bin"}, [], [str(tmp_path)]), str)


def stage(gpu_check: ModuleType, name: str, code: str, **options: object):
    return gpu_check.Stage(name, (sys.executable, "-c", code), "log.log", **options)


def test_a_stage_on_record_is_not_run_again(tool, tmp_path):
    gpu_check = tool("gpu_check")
    record = gpu_check.Record(tmp_path / "tests.json", "abc")
    first, second = stage(gpu_check, "first", "print(1)"), stage(gpu_check, "second", "1 / 0")
    assert gpu_check.run_stage(first, tmp_path, record) == "passed"
    assert not record.done("second")
    assert gpu_check.run_stage(second, tmp_path, record) == "failed (exit 1)"

    again = gpu_check.Record(tmp_path / "tests.json", "abc")
    assert again.done("first")
    assert again.done("second")
    assert not gpu_check.Record(tmp_path / "tests.json", "other sources").done("first")
    assert "ZeroDivisionError" in (tmp_path / "log.log").read_text()


def test_a_stage_that_loses_the_device_goes_on_in_a_new_process(tool, tmp_path):
    gpu_check = tool("gpu_check")
    record = gpu_check.Record(tmp_path / "tests.json", "abc")
    tally = tmp_path / "tally"
    code = f"import sys; f = open({str(tally)!r}, 'a+'); f.write('x'); sys.exit(2 * (f.tell() < 3))"
    lost = dataclasses.replace(stage(gpu_check, "bench", code), sittings=4)
    assert gpu_check.run_stage(lost, tmp_path, record) == "passed"
    assert tally.read_text() == "xxx"
    tally.write_text("")
    once = dataclasses.replace(lost, sittings=1)
    assert gpu_check.run_stage(once, tmp_path, record) == "failed (exit 2)"


def test_a_stage_past_its_limit_is_ended_with_all_it_started(tool, tmp_path):
    gpu_check = tool("gpu_check")
    record = gpu_check.Record(tmp_path / "tests.json", "abc")
    child = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    code = f"import subprocess, sys; child = {child}; print(child.pid, flush=True); child.wait()"
    began = time.monotonic()
    outcome = gpu_check.run_stage(stage(gpu_check, "endless", code), tmp_path, record, limit=3)
    assert outcome == "failed (longer than 3 s)"
    assert time.monotonic() - began < 30
    assert gpu_check.Record(tmp_path / "tests.json", "abc").done("endless")
    status = Path("/proc", (tmp_path / "log.log").read_text().split()[-1], "status")
    # Killed is not gone at once: the kernel takes its time, more of it on a busy machine.
    deadline = time.monotonic() + 20
    while is_running(status) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_running(status)


def is_running(status: Path) -> bool:
    try:
        return "State:\tZ" not in status.read_text()
    except OSError:
        return False


def test_outcomes_of_tests_are_recorded_one_by_one(tool, tmp_path, monkeypatch):
    gpu_check = tool("gpu_check")
    (tmp_path / "test_three.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 0\n"
        "def test_absent(): pytest.skip('no')\n"
    )
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_three.py")
    suite = gpu_check.Stage("three", command, "suite.log", pytest=True)
    record = gpu_check.Record(tmp_path / "tests.json", "abc")
    for _ in range(2):  # run anew, a stage's tests replace those of before
        assert gpu_check.run_stage(suite, tmp_path, record) == "failed (exit 1)"
    written = json.loads((tmp_path / "tests.json").read_text())
    assert [(t["name"].split("::")[1], t["outcome"]) for t in written["tests"]] == [
        ("test_good", "passed"),
        ("test_bad", "failed"),
        ("test_absent", "skipped"),
    ]
    assert all(t["stage"] == "three" and t["seconds"] >= 0 for t in written["tests"])


def test_without_a_card_gpu_check_says_so_in_one_line(tool, tmp_path, monkeypatch, capsys):
    gpu_check = tool("gpu_check")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(gpu_check, "TREE", tmp_path / "tree")
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == gpu_check.CANNOT_RUN
    assert capsys.readouterr().out.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_bench_stage_is_a_command_the_benchmark_knows(tool, tmp_path):
    """A run that is cut short goes on, so its file must be the one that it left behind."""
    from fusednorm.bench.__main__ import _parser

    stage = tool("gpu_check").plan(tmp_path)[-1]
    assert stage.command[1:3] == ("-m", "fusednorm.bench")
    options = _parser().parse_args(stage.command[3:])
    assert (options.command, options.device, options.quick) == ("run", "cuda", True)
    assert options.out == tmp_path / "bench.json"
    assert options.commit
