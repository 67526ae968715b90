"""``import fusednorm`` is cheap, touches no GPU, needs neither Triton nor the native library."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RUNS = 5
LIMIT_S = 0.1

# CPU time: the wall clock of a busy machine measures the other processes.
MEASURE = """
import json, sys, time, torch
before = set(sys.modules)
began = time.process_time()
import fusednorm
seconds = time.process_time() - began
print(json.dumps({
    "seconds": seconds,
    "new": sorted(set(sys.modules) - before),
    "cuda": torch.cuda.is_initialized(),
}))
"""

STEP = """
import torch, fusednorm
x = torch.randn(4, 6, 5, 5, requires_grad=True)
norm = fusednorm.BatchGroupNorm(6, num_groups=3)
norm(x).square().sum().backward()
assert x.grad.isfinite().all()
print(*fusednorm.available_backends())
"""


def run(code: str, package: Path = ROOT / "python") -> str:
    """What a new interpreter prints, with the package from that folder."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("FUSEDNORM", "TRITON"))}
    environ["PYTHONPATH"] = str(package)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def imports() -> list[dict[str, object]]:
    run("import torch, fusednorm")  # writes the bytecode
    return [json.loads(run(MEASURE)) for _ in range(RUNS)]


def test_adds_little_to_import_torch(imports):
    seconds = statistics.median(i["seconds"] for i in imports)
    assert seconds < LIMIT_S, f"import fusednorm costs {seconds * 1e3:.0f} ms; {imports[0]['new']}"


def test_initialises_no_cuda(imports):
    assert not any(i["cuda"] for i in imports)


def test_imports_no_triton(imports):
    heavy = {"triton", "numpy", "sympy"}
    assert not {name.split(".")[0] for i in imports for name in i["new"]} & heavy


def test_works_without_triton():
    backends = run("import sys; sys.modules['triton'] = None" + STEP).split()
    assert "triton" not in backends
    assert "reference" in backends


def test_works_without_the_native_library(tmp_path):
    pure = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "python" / "fusednorm", tmp_path / "fusednorm", ignore=pure)
    backends = run(STEP, tmp_path).split()
    assert "cuda" not in backends
    assert "reference" in backends


def test_collect_env_says_what_a_bug_report_needs():
    said = run("from fusednorm import collect_env; collect_env.main()")
    for fact in ("fusednorm", "native library", "backends", "torch", "Triton", "driver", "GPU"):
        assert f"\n{fact} " in f"\n{said}"
    assert "unknown" not in said
