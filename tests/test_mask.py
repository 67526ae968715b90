"""The mask of relu with a residual: its bits, what is kept of a step, and its gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fusednorm.functional as FF
from cases import Case, in_layout, make
from fusednorm import BatchGroupNorm, BatchNorm, GroupNorm
from fusednorm.ops import NAMESPACES
from fusednorm.ops.mask import keep, mask_size, pack, unpack

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("shape", [(2, 8, 4, 4), (3, 5, 7, 3), (1, 1, 1), (3, 4, 5), (0, 3, 2, 2)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits(dtype: torch.dtype, shape: tuple[int, ...], layout: str) -> None:
    """By definition: byte k, bit j is element k*W + j of memory, W = 16 bytes of elements."""
    y = in_layout(torch.randn(shape).relu().to(dtype), layout)
    memory = torch.as_strided(y, (y.numel(),), (1,)).tolist()
    width = 16 // y.element_size()
    expected = [
        sum((v > 0) << j for j, v in enumerate(memory[k : k + width]))
        for k in range(0, len(memory), width)
    ]
    mask = pack(y)
    assert mask.dtype == torch.uint8 and mask.tolist() == expected
    assert mask.shape == (mask_size(y),)
    back = unpack(mask, y)
    assert torch.equal(back, y > 0)
    assert y.numel() == 0 or back.stride() == y.stride()


def test_keep_drops_what_is_not_finite() -> None:
    for dtype in (torch.float32, torch.float64):
        h = torch.tensor([torch.inf, torch.nan, -2.0, 3.0, -torch.inf], dtype=dtype)
        kept = keep(h, torch.tensor([False, False, True, True, True]))
        assert kept.tolist() == [0, 0, -2, 3, -torch.inf]
        assert h[0] == torch.inf


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("groups", [6, 2, 12, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_says_what_the_residual_says(
    dtype: torch.dtype, groups: int, layout: str, target: tuple[str, str]
) -> None:
    """The backward operator, given the mask or the residual it stands for."""
    device, backend = target
    ops = getattr(torch.ops, NAMESPACES[backend])
    case = Case((3, 6, 4, 2), groups, layout=layout, dtype=dtype, act="relu", residual=True)
    i = make(case, device)
    where = (groups, False)
    y, mean, rstd, _, mask = ops.norm_forward(*i.tensors(), *where, 1e-5, 1, 0.0, True)
    assert torch.equal(mask, pack(y))
    assert ops.norm_forward(*i.tensors(), *where, 1e-5, 1, 0.0, False)[4].shape == (0,)
    given = (i.dy, i.x, mean, rstd, i.weight, i.bias)
    by_mask = ops.norm_backward(*given, None, mask, *where, 1.0, 1, 0.0)
    by_residual = ops.norm_backward(*given, i.residual, None, *where, 1.0, 1, 0.0)
    # Apart from y = 0 by underflow, of which there is none here, the sums are of the same numbers.
    tol = 4 * torch.finfo(dtype).eps
    for got, want in zip(by_mask, by_residual, strict=True):
        torch.testing.assert_close(got, want, rtol=tol, atol=tol)


def kept_bytes(norm: nn.Module, x: Tensor, residual: Tensor | None) -> int:
    """Storage kept for backward, each once, without parameters."""
    kept: dict[int, int] = {}

    def see(t: Tensor) -> Tensor:
        if not isinstance(t, nn.Parameter):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(see, lambda t: t):
        norm(x, residual)
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", [None, "relu", "silu"])
@pytest.mark.parametrize(
    "norm",
    [
        lambda act: BatchNorm(16, act=act),
        lambda act: BatchGroupNorm(16, 4, act=act),
        lambda act: GroupNorm(16, 4, act=act),
    ],
    ids=["batch", "batch group", "group"],
)
def test_what_a_step_keeps(norm, act: str | None, dtype: torch.dtype, target) -> None:
    """x, an activation recomputed; of a residual a bit an element for relu, all of it for silu."""
    device = target[0]
    layer = norm(act).to(device)
    x, r = (torch.randn(4, 16, 8, 8, device=device, dtype=dtype) for _ in range(2))
    x.requires_grad_()
    tensor = x.numel() * x.element_size()
    small = 2 * 4 * 16 * 4  # mean and rstd
    mask = x.numel() // (16 // x.element_size())
    with_residual = {None: 0, "relu": mask, "silu": tensor}[act]
    assert tensor <= kept_bytes(layer, x, None) <= tensor + small
    kept = kept_bytes(layer, x, r)
    assert tensor + with_residual <= kept <= tensor + with_residual + small


@pytest.mark.parametrize("groups", [6, 2, 12, 4])
@pytest.mark.parametrize("act", [None, "relu", "silu"])
@pytest.mark.parametrize("functional", [True, False])
def test_second_derivatives(functional: bool, act: str | None, groups: int) -> None:
    """Of the public function in eager mode, residual and all, in float64."""
    i = make(Case((3, 6, 2, 2), groups, dtype=torch.float64, residual=True))
    inputs = [t.requires_grad_() for t in i.tensors()]

    def fn(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
        if functional:
            return FF.batch_group_norm(x, groups, None, None, w, b, True, act=act, residual=r)
        # No residual, no activation: ATen's own for groups == channels.
        return FF.batch_group_norm(x, groups, None, None, w, b, True) + 0 * r

    assert torch.autograd.gradcheck(fn, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(fn, inputs, fast_mode=True)


def test_checkpointing(target: tuple[str, str]) -> None:
    """What is kept may be given up and made again."""
    device = target[0]
    norm = BatchNorm(6, act="relu").to(device)
    x, r = torch.randn(2, 4, 6, 5, 5, device=device).unbind()
    grads = []
    for run in (norm, lambda *a: checkpoint(norm, *a, use_reentrant=False)):
        leaves = [t.clone().requires_grad_() for t in (x, r)]
        y = run(*leaves)
        grads.append(torch.autograd.grad(y.square().sum(), [*leaves, *norm.parameters()]))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("residual", [False, True])
def test_gradients_of_a_batch_of_dy(residual: bool) -> None:
    """``is_grads_batched`` hands backward one tensor that stands for several."""
    x = torch.randn(2, 6, 4, 4, requires_grad=True)
    y = BatchNorm(6, act="relu")(x, torch.randn(2, 6, 4, 4) if residual else None)
    dy = torch.randn(3, *y.shape)
    (batched,) = torch.autograd.grad(y, x, dy, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, x, one, retain_graph=True)[0] for one in dy]
    torch.testing.assert_close(batched, torch.stack(each), rtol=0, atol=0)
