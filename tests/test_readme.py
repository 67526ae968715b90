"""The README's snippets run, and its support table is what the probes below find.

``python tests/test_readme.py`` writes the table.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from fusednorm import BatchGroupNorm, BatchNorm, GroupNorm

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
MODULES: dict[str, Callable[[], nn.Module]] = {
    "`BatchNorm`": lambda: BatchNorm(8),
    "`BatchGroupNorm`, whole channels": lambda: BatchGroupNorm(8, 4),
    "`BatchGroupNorm`, inside channels": lambda: BatchGroupNorm(8, 16),
    "`BatchGroupNorm`, straddling": lambda: BatchGroupNorm(8, 3),
    "`GroupNorm`": lambda: GroupNorm(8, 4),
}


def run(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = x.detach().requires_grad_()
    y = norm(x)
    (dx,) = torch.autograd.grad(y.float().square().sum(), x)
    assert y.dtype == x.dtype and torch.isfinite(y).all() and torch.isfinite(dx).all()
    return y


def dtypes(norm: nn.Module) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        run(norm, torch.randn(3, 8, 6, 4).to(dtype))
    run(norm.double(), torch.randn(3, 8, 6, 4).double())


def layouts(norm: nn.Module) -> None:
    x = torch.randn(3, 8, 6, 4)
    a, b = run(copy.deepcopy(norm), x), run(norm, x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert b.is_contiguous(memory_format=torch.channels_last)


def fusion(norm: nn.Module) -> None:
    x, residual = torch.randn(2, 3, 8, 6, 4)
    expected = torch.relu(copy.deepcopy(norm)(x) + residual)
    norm.act = "relu"
    torch.testing.assert_close(norm(x, residual), expected, rtol=1e-4, atol=1e-4)


def double_backward(norm: nn.Module) -> None:
    x = torch.randn(3, 8, 6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(norm.double(), (x,), fast_mode=True)


def fullgraph(norm: nn.Module) -> None:
    x = torch.randn(3, 8, 6, 4)
    expected = copy.deepcopy(norm)(x)
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)


def export(norm: nn.Module) -> None:
    program = torch.export.export(norm.eval(), (torch.randn(3, 8, 6, 4),))
    called = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert called and all(name.startswith("aten.") for name in called)


def torch_state_dict(norm: nn.Module) -> None:
    theirs = nn.GroupNorm(4, 8) if isinstance(norm, GroupNorm) else nn.BatchNorm2d(8)
    norm.load_state_dict(theirs.state_dict())


def per_sample_gradients(norm: nn.Module) -> None:
    params = dict(norm.named_parameters())

    def loss(params: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(norm, params, (x.unsqueeze(0),)).square().sum()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.func.vmap(torch.func.grad(loss), (None, 0))(params, torch.randn(3, 8, 6, 4))


PROBES: dict[str, Callable[[nn.Module], None]] = {
    "fp16, bf16, fp32, fp64": dtypes,
    "NCHW, NHWC": layouts,
    "fused residual, activation": fusion,
    "double backward": double_backward,
    "`torch.compile(fullgraph=True)`": fullgraph,
    "evaluation exports to ATen": export,
    "loads torch's state dict": torch_state_dict,
    "per-sample gradients (vmap)": per_sample_gradients,
}


def works(probe: Callable[[nn.Module], None], make: Callable[[], nn.Module]) -> bool:
    torch.manual_seed(0)
    torch._dynamo.reset()
    try:
        probe(make())
    except (AssertionError, RuntimeError, ValueError):
        return False
    return True


def support_table() -> str:
    head = "| | " + " | ".join(MODULES) + " |\n|---|" + ":-:|" * len(MODULES)
    rows = [
        f"| {name} | " + " | ".join("yes" if works(p, m) else "no" for m in MODULES.values()) + " |"
        for name, p in PROBES.items()
    ]
    return "\n".join([head, *rows])


def section(name: str) -> str:
    found = re.search(f"<!-- {name} -->\n(.*?)<!-- /{name} -->", README.read_text(), re.S)
    assert found, f"README.md has no section {name}"
    return found[1].strip()


def test_support_table_is_what_the_probes_find() -> None:
    assert section("support") == support_table()


def test_the_table_tells_yes_from_no() -> None:
    """Batch norm's running statistics refuse vmap; a probe that cannot fail would not notice."""
    assert not works(per_sample_gradients, MODULES["`BatchNorm`"])
    assert works(per_sample_gradients, MODULES["`GroupNorm`"])


PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
SNIPPETS = [
    (page.name, i, code)
    for page in PAGES
    for i, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S))
]


@pytest.mark.parametrize("page, i, code", SNIPPETS, ids=[f"{p}-{i}" for p, i, _ in SNIPPETS])
def test_snippets_run(page: str, i: int, code: str) -> None:
    exec(compile(code, f"{page}, snippet {i}", "exec"), {})


def test_every_environment_variable_is_documented() -> None:
    """Names the sources read from the environment, against docs/environment.md, both ways."""
    page = (ROOT / "docs/environment.md").read_text()
    cells = re.findall(r"^\| (`.*?) \|", page, re.M)
    documented = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    pattern = r"""environ(?:\.get|\.pop)?[\[(]\s*["'](\w+)["']|ENV\{(\w+)\}"""
    folders = ("python", "tools", "triton_kernels", "cmake", "bench", "examples", "tests")
    files = [p for f in folders for p in (ROOT / f).rglob("*") if p.suffix in (".py", ".cmake")]
    read = {a or b for path in files for a, b in re.findall(pattern, path.read_text())}
    assert "FUSEDNORM_BACKEND" in read and "CUDA_ARCHS" in read
    everywhere = {"PATH", "PYTHONPATH", "OMP_NUM_THREADS"}
    assert read - everywhere <= documented
    sources = "".join(path.read_text() for path in files)
    assert all(f'"{name}"' in sources or f"ENV{{{name}}}" in sources for name in documented)


if __name__ == "__main__":
    text = README.read_text()
    table = f"<!-- support -->\n{support_table()}\n<!-- /support -->"
    README.write_text(
        re.sub(r"<!-- support -->.*<!-- /support -->", lambda _: table, text, flags=re.S)
    )
