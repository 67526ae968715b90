"""Ahead-of-time compilation of every Triton kernel, against the budget beside this file.

The operators run on CPU tensors with the launcher replaced by one that only notes what it was
asked to launch; each note becomes the very signature, constants and options that the JIT would
compile on a card of 132 multiprocessors, and is compiled for sm_80, 90, 100 and 120 with the
tools bundled in Triton. No GPU is needed, and no kernel text is repeated here. Held are

    registers   a ceiling, in steps of 8: the allocation's grain, below which nothing changes
    spills      none: no local memory, no stack
    shared      a ceiling, in bytes
    vector      16-byte loads and stores of x, and of y or dx, wherever the shape allows them
    hints       the first sweep asks the L2 cache to keep x, the second to drop it, stores stream
    order       partials are published by an acq_rel atomic, and read past the L1 cache
    .f64        no double instruction in a kernel for float32, float16 or bfloat16
    launches    how many there are, which on a card is the number of graph nodes

``triton_budget.json`` has a line for each kernel of each case, {sm: [registers, shared]}. After a
change that is meant to cost registers,

    python tests/test_triton_codegen.py

writes the file anew, to be read in the diff. With --raise it only lifts ceilings, so that a second
run under another Triton leaves a budget that both keep.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

BUDGET = Path(__file__).with_name("triton_budget.json")
CAPABILITIES = (80, 90, 100, 120)
H200_SMS = 132
SHAPE = (32, 256, 56, 56)
ODD = (32, 65, 7, 7)


@dataclass(frozen=True)
class Case:
    """One operator call: forward and backward of x, and what may be expected of its accesses."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    groups: int
    nhwc: bool = False
    per_sample: bool = False
    act: int = 0
    residual: bool = False
    vector: bool = False
    mask: bool = False
    captured: bool = False
    nodes: tuple[int, int] = (2, 2)

    def x(self) -> torch.Tensor:
        n, c, *spatial = self.shape
        if self.nhwc:
            return torch.empty((n, *spatial, c), dtype=self.dtype, device="meta").movedim(-1, 1)
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
NONE, RELU, SILU, GELU, LEAKY_RELU = range(5)

# Both types and patterns, plain and with the widest epilogue; each activation once; each of the
# kernels' flags (scalar, whole, regular, strided, framed, fanned) once; what a captured graph
# runs; slices on chip, the largest that fit among them. fp16 differs from bf16 in one conversion.
CASES = [
    Case("nchw-f32", SHAPE, F32, 256, vector=True),
    Case("nchw-bf16", SHAPE, BF16, 256, vector=True),
    Case("nchw-bf16-relu-residual", SHAPE, BF16, 256, act=RELU, residual=True, vector=True),
    Case("nchw-bf16-mask", SHAPE, BF16, 256, act=RELU, residual=True, vector=True, mask=True),
    Case("nchw-bf16-silu", SHAPE, BF16, 256, act=SILU, vector=True),
    Case("nchw-f32-gelu-residual", SHAPE, F32, 256, act=GELU, residual=True, vector=True),
    Case("nchw-bf16-leaky", SHAPE, BF16, 256, act=LEAKY_RELU, vector=True),
    Case("nchw-bf16-samples", SHAPE, BF16, 8, per_sample=True, vector=True),
    Case("nchw-bf16-odd", (256, 65, 15, 15), BF16, 65, act=RELU, residual=True),
    Case(
        "nchw-bf16-odd-mask",
        (256, 65, 15, 15),
        BF16,
        65,
        False,
        False,
        RELU,
        True,
        mask=True,
        nodes=(3, 2),
    ),
    Case("nchw-f32-straddling", (64, 64, 28, 28), F32, 96, act=RELU),
    Case("nchw-f64", (32, 64, 28, 28), F64, 64, act=GELU, vector=True),
    Case("frames-bf16-7x7", (512, 512, 7, 7), BF16, 512, vector=True),
    Case(
        "frames-bf16-14x14-mask", (256, 64, 14, 14), BF16, 64, False, False, RELU, True, True, True
    ),
    Case("nhwc-f32", SHAPE, F32, 256, nhwc=True, vector=True),
    Case("nhwc-f32-64", (32, 64, 112, 112), F32, 64, nhwc=True, vector=True),
    Case("nhwc-bf16", SHAPE, BF16, 256, nhwc=True, vector=True),
    Case("nhwc-bf16-relu-residual", SHAPE, BF16, 256, True, act=RELU, residual=True, vector=True),
    Case("nhwc-bf16-mask", SHAPE, BF16, 256, True, False, RELU, True, True, True),
    Case("nhwc-f32-gelu-residual", SHAPE, F32, 256, True, act=GELU, residual=True, vector=True),
    Case("nhwc-bf16-ranges", SHAPE, BF16, 512, nhwc=True, act=RELU, vector=True),
    Case("nhwc-bf16-groups", SHAPE, BF16, 32, nhwc=True, act=RELU, vector=True),
    Case("nhwc-bf16-odd", (256, 65, 14, 14), BF16, 65, nhwc=True, act=RELU, residual=True),
    Case("nhwc-bf16-straddling", (32, 64, 28, 28), BF16, 96, nhwc=True, act=RELU),
    Case("nchw-bf16-captured", SHAPE, BF16, 256, vector=True, captured=True, nodes=(3, 3)),
    Case("nhwc-f32-captured", SHAPE, F32, 256, True, vector=True, captured=True, nodes=(3, 3)),
    Case("straddling-captured", (64, 64, 28, 28), F32, 96, captured=True, nodes=(3, 3)),
    Case("chip-nchw-bf16", (2, 64, 56, 56), BF16, 64, vector=True, nodes=(1, 1)),
    Case(
        "chip-nchw-bf16-gelu",
        (10, 512, 28, 28),
        BF16,
        512,
        False,
        False,
        GELU,
        True,
        True,
        nodes=(1, 2),
    ),
    Case(
        "chip-nchw-f32-full",
        (8, 512, 28, 28),
        F32,
        512,
        False,
        False,
        GELU,
        True,
        True,
        nodes=(1, 1),
    ),
    Case(
        "chip-nchw-f32-gelu",
        (8, 512, 16, 16),
        F32,
        512,
        False,
        False,
        GELU,
        True,
        True,
        nodes=(1, 1),
    ),
    Case(
        "chip-nhwc-bf16-mask",
        (2, 512, 28, 28),
        BF16,
        512,
        True,
        False,
        RELU,
        True,
        True,
        True,
        nodes=(1, 1),
    ),
    Case(
        "chip-nhwc-f32-gelu",
        (4, 1024, 16, 16),
        F32,
        1024,
        True,
        False,
        GELU,
        True,
        True,
        nodes=(1, 1),
    ),
    Case(
        "chip-nhwc-bf16-groups",
        (8, 1024, 14, 14),
        BF16,
        128,
        True,
        False,
        SILU,
        vector=True,
        nodes=(1, 1),
    ),
    Case("chip-frames-bf16", (2, 2048, 7, 7), BF16, 2048, act=RELU, vector=True, nodes=(1, 1)),
    Case("chip-odd-bf16", (64, 65, 7, 7), BF16, 65, False, False, GELU, True, nodes=(1, 1)),
    Case("chip-straddling-f32", (8, 64, 7, 7), F32, 28, False, False, GELU, True, nodes=(1, 2)),
    Case("chip-straddling-bf16", (8, 24, 7, 7), BF16, 21, False, False, GELU, True, nodes=(1, 1)),
    Case("chip-straddling-bf16", (8, 24, 7, 7), BF16, 21, False, False, GELU, True, nodes=(1, 1)),
    Case(
        "chip-samples-bf16", (8, 64, 28, 28), BF16, 32, False, True, SILU, vector=True, nodes=(1, 2)
    ),
    Case(
        "chip-samples-bf16-wide",
        (8, 128, 20, 20),
        BF16,
        16,
        False,
        True,
        SILU,
        vector=True,
        nodes=(1, 2),
    ),
    Case(
        "chip-nchw-f64-gelu", (4, 64, 28, 28), F64, 64, False, False, GELU, True, True, nodes=(1, 1)
    ),
    Case(
        "chip-nhwc-f64-gelu", (2, 64, 14, 14), F64, 64, True, False, GELU, True, True, nodes=(1, 1)
    ),
    Case(
        "cache-nchw-bf16",
        (2, 64, 112, 112),
        BF16,
        64,
        False,
        False,
        RELU,
        True,
        True,
        True,
        nodes=(1, 1),
    ),
    Case(
        "cache-nhwc-bf16-mask",
        (2, 64, 56, 56),
        BF16,
        64,
        True,
        False,
        RELU,
        True,
        True,
        True,
        nodes=(1, 1),
    ),
    Case(
        "cache-nhwc-f32-gelu", (2, 64, 56, 56), F32, 64, True, False, GELU, True, True, nodes=(1, 1)
    ),
    Case(
        "cache-nchw-f32-full",
        (8, 32, 56, 56),
        F32,
        32,
        False,
        False,
        GELU,
        True,
        True,
        nodes=(1, 1),
    ),
    Case(
        "cache-nhwc-bf16-groups",
        (2, 64, 56, 56),
        BF16,
        16,
        True,
        False,
        GELU,
        True,
        True,
        nodes=(1, 1),
    ),
    Case("cache-odd-bf16", (256, 65, 7, 7), BF16, 65, False, False, RELU, True, nodes=(1, 1)),
]


@dataclass(frozen=True)
class Launch:
    """A kernel with what the JIT would specialize it on."""

    kernel: Any
    args: tuple[Any, ...]
    num_warps: int
    constants: dict[str, Any]
    registers: int | None = None

    def source(self) -> Any:
        from triton.compiler import ASTSource

        names = self.kernel.arg_names
        bound = dict(zip(names, self.args, strict=False)) | self.constants
        assert sorted(bound) == sorted(names), "arguments do not fit the kernel"
        signature, constants, attributes = {}, {}, {}
        for i, name in enumerate(names):
            value = bound[name]
            if name in self.constants or value is None:
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name] = _POINTER[value.dtype]
                assert value.data_ptr() % 16 == 0
                attributes[(i,)] = [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32" if value < 2**31 else "i64"
        return ASTSource(self.kernel, signature, constants, attributes)


_POINTER = {
    F32: "*fp32",
    BF16: "*bf16",
    F64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Code:
    """What the compiler made of a launch."""

    registers: int
    stack: int
    shared: int
    ptx: str

    @property
    def double(self) -> list[str]:
        return re.findall(r"\S*\.f64\S*", self.ptx)

    def widest(self, kind: str) -> int:
        """Bytes of the widest global load ("ld") or store ("st")."""
        widths = [4]
        for count, bits in re.findall(kind + r"\.global\S*?\.v(\d)\.[bfu](\d+)", self.ptx):
            widths.append(int(count) * int(bits) // 8)
        return max(widths)


def compile_for(launch: Launch, capability: int) -> Code:
    import triton
    from fusednorm.triton_kernels import launch as module
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", capability, 32)
    options = module.OPTIONS | {"num_warps": launch.num_warps}
    if launch.registers is not None:
        options["maxnreg"] = launch.registers
    compiled = triton.compile(launch.source(), target=target, options=options)
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.check_output([cuobjdump, "-res-usage", cubin.name], text=True)
    found = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Code(
        found["REG"],
        found["STACK"] + found["LOCAL"],
        compiled.metadata.shared,
        compiled.asm["ptx"],
    )


def launches(case: Case) -> tuple[dict[str, Launch], tuple[int, int]]:
    """({kernel name: launch}, (forward, backward) nodes) of a case, noted from the operators."""
    from fusednorm.triton_kernels import counters, operators
    from fusednorm.triton_kernels import launch as module

    noted: dict[str, Launch] = {}
    nodes = [0]

    def note(
        kernel: Any,
        grid: int,
        args: Any,
        num_warps: int,
        registers: int | None = None,
        **constants: Any,
    ) -> None:
        assert 0 < grid < 2**31
        nodes[-1] += 1
        noted[kernel.__name__] = Launch(kernel, args, num_warps, constants, registers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "launch", note)
        patch.setattr(module, "check_device", lambda name, t: None)
        patch.setattr(module, "num_sms", lambda device: H200_SMS)
        if case.captured:
            patch.setattr(counters, "zeros", lambda x, count: None)
        x = case.x()
        acc = F64 if case.dtype == F64 else F32
        weight = torch.empty(x.shape[1], dtype=acc, device="meta")
        residual = torch.empty_like(x) if case.residual else None
        cells, epilogue = (case.groups, case.per_sample), (case.act, 0.01)
        running: list[Any] = [None, None, None]
        if not case.per_sample:
            running = [torch.empty(case.groups, dtype=acc, device="meta") for _ in range(2)]
            running.append(torch.empty((), dtype=torch.int64, device="meta"))
        _, mean, rstd, mask = operators.norm_train(
            x, weight, weight, residual, *running, *cells, 1e-5, 0.1, *epilogue, case.mask
        )
        nodes.append(0)
        activation = (None, mask) if case.mask else (residual, None)
        operators.norm_backward(
            x, x, mean, rstd, weight, weight, *activation, *cells, 1.0, *epilogue
        )
        counted = nodes[0], nodes[1]
        if not case.per_sample:
            operators.update_running(*running, mean, mean, None, x.numel() // case.groups)
    return noted, counted


def read_budget() -> dict[str, dict[str, list[int]]]:
    return json.loads(BUDGET.read_text()) if BUDGET.exists() else {}


def key(case: Case, kernel: str) -> str:
    return f"{kernel.removesuffix('_kernel')} {case.name}"


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_within_budget(case: Case, capability: int) -> None:
    budget = read_budget()
    for name, launch in launches(case)[0].items():
        code = compile_for(launch, capability)
        registers, shared = budget[key(case, name)][str(capability)]
        where = f"{key(case, name)} sm_{capability}"
        assert code.registers <= registers, f"{where}: {code.registers} registers > {registers}"
        assert code.shared <= shared, f"{where}: {code.shared} bytes shared > {shared}"
        hold(case, name, code, where)


def hold(case: Case, name: str, code: Code, where: str) -> None:
    """What no budget can buy."""
    assert code.stack == 0, f"{where}: {code.stack} bytes of stack or spills"
    assert ".local" not in code.ptx, f"{where}: local memory"
    if case.dtype != F64:
        assert not code.double, f"{where}: {code.double[:3]}"
    sweeps = not any(word in name for word in ("combine", "update", "mask"))
    if sweeps and case.vector:
        assert code.widest("ld") == 16, f"{where}: loads of {code.widest('ld')} bytes"
        if any(word in name for word in ("apply", "onchip", "slices")):
            assert code.widest("st") == 16, f"{where}: stores of {code.widest('st')} bytes"
            assert "st.global.cs" in code.ptx, f"{where}: stores that stay in the cache"
    # The plan cuts sweeps for one wave of 512 threads. A residual read again takes more, and has
    # a mask to replace it in training; doubles are not hurried.
    if sweeps and case.vector and case.dtype != F64 and (case.mask or not case.residual):
        reduces = "moments_" in name or "reduce" in name
        assert not reduces or code.registers <= 128, f"{where}: {code.registers} registers"
    if "moments_" in name or "reduce" in name:
        atomics = re.findall(r"atom\S*", code.ptx)
        if sweeps and not case.captured:
            counted = [a for a in atomics if ".add.u32" in a or ".add.s32" in a]
            assert counted, f"{where}: nobody counts arrivals"
            assert all(".acq_rel" in a and ".gpu" in a for a in counted), f"{where}: {counted}"
        assert "ld.global.cg" in code.ptx or (sweeps and case.captured), f"{where}: partials in L1"
        if sweeps:
            assert "evict_last" in code.ptx, f"{where}: x is not asked to stay"
    elif sweeps:
        assert "evict_first" in code.ptx, f"{where}: x is not let go"


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_number_of_launches(case: Case) -> None:
    assert launches(case)[1] == case.nodes


def test_every_kernel_is_compiled() -> None:
    from fusednorm.triton_kernels import (
        columns,
        combine,
        elementwise,
        onchip,
        pointwise,
        runs,
        slices,
    )

    modules = (runs, columns, elementwise, onchip, slices, combine, pointwise)
    defined = {name for module in modules for name in vars(module) if "_kernel" in name}
    assert defined == {name for case in CASES for name in launches(case)[0]}


def test_budget_has_an_entry_for_each_and_no_other() -> None:
    wanted = {key(case, name) for case in CASES for name in launches(case)[0]}
    budget = read_budget()
    assert set(budget) == wanted
    assert all(set(entry) == set(map(str, CAPABILITIES)) for entry in budget.values())


def main() -> None:
    """Write the budget: registers rounded up to 8, and shared bytes, of what the compiler makes."""
    old = read_budget() if sys.argv[1:] == ["--raise"] else {}
    new: dict[str, dict[str, list[int]]] = {}
    for case in CASES:
        for name, launch in launches(case)[0].items():
            floor = old.get(key(case, name), {})
            entry = new.setdefault(key(case, name), {})
            for capability in CAPABILITIES:
                code = compile_for(launch, capability)
                registers, shared = floor.get(str(capability), (0, 0))
                registers = max(registers, -(-code.registers // 8) * 8)
                entry[str(capability)] = [registers, max(shared, code.shared)]
    lines = (f"  {json.dumps(k)}: {json.dumps(new[k])}" for k in sorted(new))
    BUDGET.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
