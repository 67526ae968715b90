"""Modules: state dicts, running statistics, autocast, conventions of torch's BatchNorm."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fusednorm
from fusednorm import BatchGroupNorm, BatchNorm, GroupNorm
from fusednorm.ops import backend as choice


def train_both(ours: nn.Module, theirs: nn.Module, device: str, steps: int = 3) -> None:
    for _ in range(steps):
        x = torch.randn(4, 6, 5, 5, device=device)
        torch.testing.assert_close(ours(x), theirs(x), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_follows_torch(
    momentum: float | None, track: bool, affine: bool, target: tuple[str, str]
) -> None:
    device = target[0]
    options = {"momentum": momentum, "track_running_stats": track, "affine": affine}
    ours = BatchNorm(6, **options, device=device)
    theirs = nn.BatchNorm2d(6, **options, device=device)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        nn.init.uniform_(p)
        q.data.copy_(p)
    train_both(ours, theirs, device)
    ours.eval(), theirs.eval()
    train_both(ours, theirs, device, 1)
    mine, others = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == others.keys()
    for key in mine:
        torch.testing.assert_close(mine[key], others[key], rtol=1e-6, atol=1e-6, msg=key)


def test_state_dict_loads_strictly_both_ways() -> None:
    theirs, ours = nn.BatchNorm2d(6), BatchGroupNorm(6, 6)
    theirs(torch.randn(4, 6, 3, 3))
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.running_var, theirs.running_var)
    nn.BatchNorm2d(6).load_state_dict(BatchNorm(6).state_dict())
    nn.GroupNorm(2, 6).load_state_dict(GroupNorm(6, 2).state_dict())
    with pytest.raises(RuntimeError, match="running_mean"):
        BatchGroupNorm(6, 3).load_state_dict(theirs.state_dict())


def test_running_statistics_have_one_entry_a_group() -> None:
    norm = BatchGroupNorm(6, 3)
    x = torch.randn(4, 6, 5, 5)
    norm(x)
    cells = x.reshape(4, 3, -1).movedim(1, 0).reshape(3, -1)
    torch.testing.assert_close(norm.running_mean, 0.1 * cells.mean(1))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * cells.var(1, correction=1))
    assert norm.num_batches_tracked == 1


def test_sub_channel_statistics_belong_to_one_resolution() -> None:
    norm = BatchGroupNorm(4, 8)
    norm(torch.randn(2, 4, 6, 6))
    before = copy.deepcopy(norm.state_dict())
    for training in (True, False):
        norm.train(training)
        with pytest.raises(ValueError, match="expected spatial size 36.*got 64"):
            norm(torch.randn(2, 4, 8, 8))
    after = norm.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert before.keys() == BatchGroupNorm(4, 8).state_dict().keys()
    restored = BatchGroupNorm(4, 8).eval()
    restored.load_state_dict(before)
    with pytest.raises(ValueError, match="expected spatial size 36"):
        restored(torch.randn(2, 4, 8, 8))
    restored(torch.randn(2, 4, 9, 4))
    resumed = BatchGroupNorm(4, 8)
    resumed.load_state_dict(before)
    with pytest.raises(ValueError, match="expected spatial size 36"):
        resumed(torch.randn(2, 4, 8, 8))
    average = torch.optim.swa_utils.AveragedModel(BatchGroupNorm(4, 8), use_buffers=True).eval()
    average.update_parameters(norm)
    with pytest.raises(ValueError, match="expected spatial size 36"):
        average(torch.randn(2, 4, 8, 8))
    norm.reset_running_stats()
    norm(torch.randn(2, 4, 8, 8))
    norm.load_state_dict(BatchGroupNorm(4, 8).state_dict())
    norm(torch.randn(2, 4, 6, 6))


def test_whole_channel_groups_take_any_resolution() -> None:
    norm = BatchGroupNorm(4, 2)
    norm(torch.randn(2, 4, 6, 6))
    norm.eval()(torch.randn(2, 4, 8, 9))
    assert "spatial_size" not in norm.state_dict()


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_any_rank(rank: int, target: tuple[str, str]) -> None:
    x = torch.randn(4, 6, *[3] * (rank - 2), device=target[0])
    for norm in (BatchNorm(6), BatchGroupNorm(6, 2), GroupNorm(6, 2)):
        y = norm.to(target[0])(x)
        assert y.shape == x.shape and torch.isfinite(y).all()


def test_autocast_leaves_the_dtype(target: tuple[str, str]) -> None:
    """As nn.BatchNorm under autocast: no cast, half activations with float32 parameters."""
    device = target[0]
    for norm in (BatchNorm(6), BatchGroupNorm(6, 2)):
        block = nn.Sequential(nn.Conv2d(3, 6, 3), norm).to(device)
        with torch.autocast(device, dtype=torch.bfloat16):
            y = block(torch.randn(2, 3, 8, 8, device=device))
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
        assert norm.weight.grad.dtype == norm.running_var.dtype == torch.float32
        # A float32 skip connection beside a half branch.
        with torch.autocast(device, dtype=torch.bfloat16):
            z = norm(y.detach(), residual=torch.randn(y.shape, device=device))
        assert z.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_whole_module_in_another_dtype(dtype: torch.dtype, target: tuple[str, str]) -> None:
    norm = BatchGroupNorm(6, 2, device=target[0], dtype=dtype)
    x = torch.randn(4, 6, 5, 5, device=target[0], dtype=dtype, requires_grad=True)
    norm(x).sum().backward()
    assert norm.weight.grad.dtype == x.grad.dtype == norm.running_mean.dtype == dtype
    assert torch.isfinite(norm.running_var).all()
    assert norm.eval()(x).dtype == dtype


@pytest.mark.parametrize("act", [None, "relu", "silu", "gelu", "leaky_relu"])
def test_activation_and_residual(act: str | None, target: tuple[str, str]) -> None:
    """The fused layer equals the composition, in training and evaluation."""
    plain = {None: nn.Identity(), "relu": nn.ReLU(), "silu": nn.SiLU(), "gelu": nn.GELU()}
    plain["leaky_relu"] = nn.LeakyReLU(0.01)
    x, r = torch.randn(2, 4, 6, 5, 5, device=target[0])
    for make in (
        lambda act: BatchNorm(6, act=act),
        lambda act: BatchGroupNorm(6, 2, act=act),
        lambda act: GroupNorm(6, 3, act=act),
    ):
        fused, linear = make(act).to(target[0]), make(None).to(target[0])
        for training in (True, False):
            fused.train(training), linear.train(training)
            expected = plain[act](linear(x) + r)
            torch.testing.assert_close(fused(x, r), expected, rtol=2e-6, atol=2e-6)


def test_repr_names_the_options() -> None:
    assert repr(BatchGroupNorm(6, 2, act="relu")) == (
        "BatchGroupNorm(6, num_groups=2, eps=1e-05, momentum=0.1, affine=True, "
        "track_running_stats=True, act=relu)"
    )
    assert repr(BatchNorm(6)).startswith("BatchNorm(6, eps=1e-05")
    assert repr(GroupNorm(6, 2)) == "GroupNorm(6, num_groups=2, eps=1e-05, affine=True)"


def test_deepcopy_and_pickle(tmp_path) -> None:
    norm = BatchGroupNorm(4, 8, act="relu")
    norm(torch.randn(2, 4, 6, 6))
    torch.save(norm, tmp_path / "norm.pt")
    for twin in (copy.deepcopy(norm), torch.load(tmp_path / "norm.pt", weights_only=False)):
        x = torch.randn(2, 4, 6, 6)
        torch.testing.assert_close(twin.eval()(x), norm.eval()(x), rtol=0, atol=0)
        assert twin.spatial_size == 36
        with pytest.raises(ValueError, match="expected spatial size 36"):
            twin(torch.randn(2, 4, 8, 8))


def test_backend_choice() -> None:
    assert "reference" in fusednorm.available_backends()
    x = torch.randn(2, 3, 4)
    with fusednorm.backend("reference"):
        fusednorm.functional.batch_norm(x, None, None, training=True)
    with fusednorm.backend("auto"):
        with fusednorm.backend("reference"):
            assert choice._choice == "reference"
        assert choice._choice == "auto", "the block's choice outlived it"
    unknown = pytest.raises(ValueError, match="unknown backend 'opencl'.*'auto'.*'triton'")
    with unknown, fusednorm.backend("opencl"):
        pass
    if not torch.cuda.is_available():
        missing = pytest.raises(RuntimeError, match="'cuda' is not available.*'reference'")
        with missing, fusednorm.backend("cuda"):
            pass


def test_strided_running_statistics(target: tuple[str, str]) -> None:
    """Buffers that are columns of something else: all of them move, and nothing beside them."""
    both = torch.stack([torch.zeros(6), torch.ones(6)], 1).to(target[0])
    plain = [both[:, i].clone() for i in (0, 1)]
    x = torch.randn(4, 6, 3, 3, device=target[0])
    fusednorm.functional.batch_norm(x, both[:, 0], both[:, 1], training=True)
    fusednorm.functional.batch_norm(x, *plain, training=True)
    torch.testing.assert_close(both, torch.stack(plain, 1))


def test_fx_sees_one_call() -> None:
    """Symbolic tracers (feature extractors, quantisation) record a norm as it stands."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3), BatchNorm(6, act="relu"), GroupNorm(6, 2)).eval()

    class Leafless(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, name: str) -> bool:
            return isinstance(m, nn.Conv2d)

    graph = Leafless().trace(model)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(torch.fx.GraphModule(model, graph)(x), model(x))
    calls = [n.target.__name__ for n in graph.nodes if n.op == "call_function"]
    assert calls == ["batch_group_norm", "group_norm"]


@pytest.mark.parametrize("norm", [lambda: BatchNorm(6, act="relu"), lambda: BatchGroupNorm(6, 2)])
def test_parametrized_weight(norm, target: tuple[str, str]) -> None:
    """torch.nn.utils.parametrize takes the weight out of the parameters: its values still count."""

    class Doubled(nn.Module):
        def forward(self, w: torch.Tensor) -> torch.Tensor:
            return 2 * w

    plain, doubled = norm().to(target[0]), norm().to(target[0])
    nn.init.constant_(plain.weight, 2)
    nn.utils.parametrize.register_parametrization(doubled, "weight", Doubled())
    x = torch.randn(4, 6, 5, 5, device=target[0])
    assert torch.equal(doubled(x), plain(x))
    doubled(x).square().sum().backward()
    assert doubled.parametrizations.weight.original.grad.abs().sum() > 0


def test_buffers_may_be_none_or_replaced(target: tuple[str, str]) -> None:
    """As torch's: no statistics after the fact, and other tensors in their place."""
    norm = BatchNorm(6).to(target[0])
    norm.running_mean = torch.full((6,), 5.0, device=target[0])
    x = torch.randn(4, 6, 5, 5, device=target[0])
    norm(x)
    torch.testing.assert_close(norm.running_mean, 4.5 + 0.1 * x.mean((0, 2, 3)))
    norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    expected = BatchNorm(6).to(target[0])(x)
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(norm.eval()(x), expected)


@pytest.mark.parametrize("act", [None, "relu"])
def test_subclasses_of_tensor_and_meta_take_the_long_way(act: str | None) -> None:
    class Marked(torch.Tensor):
        pass

    x = torch.randn(4, 6, 5, 5)
    a, b = BatchNorm(6, act=act), BatchNorm(6, act=act)
    torch.testing.assert_close(a(x.as_subclass(Marked)).as_subclass(torch.Tensor), b(x))
    assert a.num_batches_tracked == b.num_batches_tracked == 1
    assert BatchNorm(6, act=act, device="meta")(x.to("meta")).shape == x.shape
