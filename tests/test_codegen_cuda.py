"""The CUDA kernels compiled for sm_80, 90, 100 and 120, against the budget beside this file.

One nvcc run an architecture compiles every instantiation the operators launch; no GPU is needed.
Held for each kernel are

    registers   a ceiling, in steps of 8: the allocation's grain, below which nothing changes; and
                for all kernels kRegisters, from which a plan counts the blocks an SM holds
    spills      none: no stack frame, no local memory
    shared      a ceiling, in bytes
    vector      every 16-byte load of x, dy and residual and store of y and dx that the unrolled
                loop promises, and in half precision no narrower access beside them; what stays on
                the chip comes by 16-byte asynchronous copies
    .f64        no double instruction where x is not double

``codegen_budget.json`` holds {kernel: {sm: [registers, shared]}}. After a change that is meant to
cost registers,

    python tests/test_codegen_cuda.py

writes the file anew, to be read in the diff. Without a CUDA compiler these tests fail;
FUSEDNORM_NO_NVCC=1 in the environment says that this rung of the ladder is knowingly missing.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUDGET = Path(__file__).with_name("codegen_budget.json")
CAPABILITIES = (80, 90, 100, 120)

# What csrc/ops/*.cu instantiate, without torch's headers.
UNIT = """
#include "kernels/pipeline.cuh"
void instantiate(const fusednorm::NormParams& norm, const fusednorm::RunningParams& running) {
  fusednorm::forward(norm);
  fusednorm::backward(norm);
  fusednorm::update_running(running);
}
"""

# 16-byte (loads, stores) of activations in a vector kernel: accesses in flight times tensors. The
# backward sweeps have two loops, of two accesses of x and dy and of one of x, dy and a residual. A
# load of the residual and a store of its gradient are there whether or not a launch wants them.
ACCESSES = {
    "moments_kernel": (4, 0),
    "apply_kernel": (4 * 2, 4),
    "backward_reduce_kernel": (2 * 2 + 3, 0),
    "backward_apply_kernel": (2 * 2 + 3, (2 + 1) * 2),
    "chip_forward_kernel": (2, 2),
    "chip_backward_kernel": (0, 2),
}
ON_CHIP = ("chip_forward_kernel", "chip_backward_kernel")
# The first element of a piece, about which it is summed: once for each column of a thread.
NARROW = {"chip_forward_kernel"}
PATTERNS = ("Runs", "Columns")
TILES = [("float", 1), ("float", 4), ("__half", 1), ("__half", 8)]
TILES += [("__nv_bfloat16", 1), ("__nv_bfloat16", 8), ("double", 1)]
KERNELS = {
    f"{k}<{p}<{t}, {v}>>"
    for k in ACCESSES
    for p in PATTERNS
    for t, v in TILES
    if v > 1 or k not in ON_CHIP
}
KERNELS |= {
    f"{k}<{t}>" for k in ("combine_kernel", "backward_combine_kernel") for t in ("float", "double")
}
KERNELS |= {
    f"{k}<{t}>"
    for k in ("update_running_kernel", "mask_kernel")
    for t in ("float", "__half", "__nv_bfloat16", "double")
}
KERNELS |= {"channels_kernel<float>"}


def planned_registers() -> int:
    """What the plan takes every kernel to need, from its source."""
    source = (ROOT / "csrc/kernels/plan_tiles.h").read_text()
    found = re.search(r"constexpr int kRegisters = (\d+);", source)
    assert found
    return int(found[1])


@dataclass(frozen=True)
class Code:
    """What the compiler made of a kernel."""

    registers: int
    shared: int
    stack: int
    spills: int
    ptx: str

    def accesses(self, kind: str) -> list[str]:
        """The types of its global loads ("ld") or stores ("st"), such as v4.u32 and f32.

        Without those past L1 (.cg): they are of partial results.
        """
        return re.findall(kind + r"\.global(?:\.(?:nc|cs))*\.((?:v\d\.)?[a-z]\d+)", self.ptx)

    def copies(self) -> list[str]:
        """The bytes of its asynchronous copies to shared memory."""
        return re.findall(r"cp\.async\.cg\.shared\.global \S+ \S+ (\d+);", self.ptx)


def nvcc() -> Path:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        found = importlib.import_module("cuda_toolkit").find_toolkit()
    finally:
        sys.path.pop(0)
    if isinstance(found, str):
        raise RuntimeError(f"{found}; or set FUSEDNORM_NO_NVCC=1 to do without this check")
    return Path(found.nvcc)


def readable(names: list[str]) -> dict[str, str]:
    """Mangled names as kernel<Pattern<type, width>>, or kernel<type>."""
    out = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    short = [re.sub(r"^void |fusednorm::|\(.*", "", line) for line in out.stdout.splitlines()]
    return {mangled: re.sub(r"\s+>", ">", name) for mangled, name in zip(names, short, strict=True)}


@functools.cache
def compiled(capability: int) -> dict[str, Code]:
    """{kernel: code} for one architecture."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "unit.cu")
        source.write_text(UNIT)
        command = [nvcc(), "-std=c++17", f"-I{ROOT / 'csrc'}", f"-arch=sm_{capability}", "-cubin"]
        command += ["-Xptxas=-v", "--keep", f"--keep-dir={folder}", source]
        command += ["-o", Path(folder, "unit.out")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        ptx = Path(folder, "unit.ptx").read_text()
    bodies = dict(re.findall(r"\.entry (\w+)\((.*?)\n}\n", ptx, re.DOTALL))
    reports = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)",
        done.stderr,
        re.DOTALL,
    )
    names = readable(list(bodies))
    assert len(reports) == len(bodies) == len(set(names.values()))
    code = {}
    for mangled, stack, stores, loads, registers, rest in reports:
        shared = re.search(r"(\d+) bytes smem", rest)
        code[names[mangled]] = Code(
            int(registers),
            int(shared[1]) if shared else 0,
            int(stack),
            int(stores) + int(loads),
            bodies[mangled],
        )
    return code


def faults(name: str, code: Code, registers: int, shared: int) -> list[str]:
    """What is wrong with a kernel, in words."""
    found = []
    if code.registers > planned_registers():
        found.append(f"{code.registers} registers, planned {planned_registers()}")
    if code.registers > registers:
        found.append(f"{code.registers} registers, budget {registers}")
    if code.shared > shared:
        found.append(f"{code.shared} bytes of shared memory, budget {shared}")
    if code.stack or code.spills or re.search(r"\b(?:ld|st)\.local\b", code.ptx):
        found.append(f"{code.stack} bytes of stack, {code.spills} spilled")
    if "double" not in name and (double := re.search(r"\S+\.f64\S*", code.ptx)):
        found.append(f"{double[0]} where x is not double")
    kernel, arguments = name.split("<", 1)
    if kernel in ACCESSES and not arguments.endswith(" 1>>"):
        for kind, expected in zip(("ld", "st"), ACCESSES[kernel], strict=True):
            # Partials are 16 bytes too, but written as floats.
            wide = code.accesses(kind).count("v4.u32")
            if wide != expected:
                found.append(f"{wide} 16-byte {kind}, expected {expected}")
            # A mask is read and written by bytes.
            narrow = [t for t in code.accesses(kind) if re.search(r"[a-z]16$", t)]
            if narrow and kernel not in NARROW:
                found.append(f"narrow {kind} of {', '.join(sorted(set(narrow)))}")
    if kernel in ON_CHIP and set(code.copies()) != {"16"}:
        found.append(f"asynchronous copies of {sorted(set(code.copies()))} bytes, expected 16")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda c: f"sm_{c}")
def test_budget(capability: int) -> None:
    if os.environ.get("FUSEDNORM_NO_NVCC") == "1":
        pytest.skip("FUSEDNORM_NO_NVCC=1: the CUDA kernels' code is NOT checked")
    code = compiled(capability)
    assert set(code) == KERNELS
    budget = json.loads(BUDGET.read_text())
    assert set(budget) == KERNELS
    wrong = {
        name: found
        for name in sorted(code)
        if (found := faults(name, code[name], *budget[name][f"sm_{capability}"]))
    }
    assert not wrong, "\n".join(f"{name}: {'; '.join(found)}" for name, found in wrong.items())


def write_budget() -> None:
    budget: dict[str, dict[str, list[int]]] = {name: {} for name in sorted(KERNELS)}
    for capability in CAPABILITIES:
        for name, code in compiled(capability).items():
            budget[name][f"sm_{capability}"] = [-(-code.registers // 8) * 8, code.shared]
    lines = (f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in budget.items())
    BUDGET.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    write_budget()
