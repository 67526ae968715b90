"""Swapping norms in real models, all or nothing, and back."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn

from fusednorm import (
    BatchGroupNorm,
    BatchNorm,
    ConversionReport,
    GroupNorm,
    convert_norm,
    revert_norm,
)
from models import timm, torchvision

bgn = functools.partial(BatchGroupNorm, num_groups=8)


def small_resnet() -> nn.Module:
    torch.manual_seed(0)
    return torchvision().models.resnet18(num_classes=5)


def test_torchvision_resnet_computes_the_same() -> None:
    """BatchNorm in place of nn.BatchNorm2d: same outputs, gradients and statistics."""
    theirs = small_resnet()
    ours, report = copy.deepcopy(theirs), ConversionReport()
    parameters = dict(ours.named_parameters())
    assert convert_norm(ours, BatchNorm, report=report) is ours
    assert len(report.swapped) == 20 and not report.kept
    assert all(p is parameters[n] for n, p in ours.named_parameters()), "optimizers lost them"
    x = torch.randn(4, 3, 64, 64)
    for model in (theirs, ours):
        model(x).square().sum().backward()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3, msg=name)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)


def test_batch_group_norm_by_factory_and_by_norm_layer() -> None:
    converted = convert_norm(small_resnet(), bgn)
    built = torchvision().models.resnet18(num_classes=5, norm_layer=bgn)
    assert converted.state_dict().keys() == built.state_dict().keys()
    assert all(
        a.shape == b.shape
        for a, b in zip(converted.state_dict().values(), built.state_dict().values(), strict=True)
    )
    assert built(torch.randn(2, 3, 32, 32)).shape == (2, 5)


def test_timm_fuses_the_activation_and_gives_it_back() -> None:
    torch.manual_seed(0)
    theirs = timm().create_model("efficientnet_b0", num_classes=5)
    ours, report = copy.deepcopy(theirs), ConversionReport()
    convert_norm(ours, BatchNorm, report=report)
    norms = [m for m in ours.modules() if isinstance(m, BatchNorm)]
    assert len(norms) == len(report.swapped) == 49 and not report.kept
    assert {m.act for m in norms} == {None, "silu"}
    theirs.eval(), ours.eval()
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    revert_norm(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_timm_model_built_with_our_layer() -> None:
    model = timm().create_model("resnet18", norm_layer=bgn, num_classes=5)
    assert sum(isinstance(m, BatchGroupNorm) for m in model.modules()) == 20
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize("factory", [BatchNorm, functools.partial(BatchGroupNorm, num_groups=4)])
def test_revert_is_the_inverse(factory) -> None:
    model = nn.Sequential(
        nn.Conv1d(3, 4, 3),
        nn.BatchNorm1d(4, eps=1e-3, momentum=None),
        nn.BatchNorm3d(4, affine=False, track_running_stats=False),
    )
    model[1].weight.requires_grad_(False)
    model[2].eval()
    before = copy.deepcopy(model.state_dict())
    revert_norm(convert_norm(model, factory))
    assert [type(m) for m in model] == [nn.Conv1d, nn.BatchNorm1d, nn.BatchNorm3d]
    assert not model[2].affine and not model[2].track_running_stats
    assert model[1].eps == 1e-3 and model[1].momentum is None
    assert not model[1].weight.requires_grad and not model[2].training and model[1].training
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_revert_keeps_what_torch_lacks() -> None:
    model = nn.Sequential(BatchNorm(4), bgn(16), BatchNorm(4, act="relu"), GroupNorm(4, 2))
    report = ConversionReport()
    revert_norm(model, report=report)
    assert [type(m) for m in model] == [nn.BatchNorm2d, BatchGroupNorm, BatchNorm, nn.GroupNorm]
    assert "8 groups over 16 channels" in report.kept["1"] and "'relu'" in report.kept["2"]


def test_report_says_what_was_kept_and_why() -> None:
    class Custom(nn.BatchNorm2d):
        pass

    model = nn.ModuleDict(
        {"a": nn.BatchNorm2d(8), "b": nn.LayerNorm(8), "c": Custom(8), "d": nn.LazyBatchNorm2d()}
    )
    model["e"], model["f"], report = nn.BatchNorm2d(8), nn.SyncBatchNorm(8), ConversionReport()
    convert_norm(model, bgn, predicate=lambda name, module: name != "e", report=report)
    assert list(report.swapped) == ["a"]
    assert report.kept.keys() == set("bcdef")
    reasons = {"b": "not a batch norm", "c": "does more", "e": "predicate", "f": "synchronised"}
    assert all(why in report.kept[name] for name, why in reasons.items())
    assert "1 swapped, 5 kept" in str(report)


def test_shared_modules_stay_shared() -> None:
    norm = nn.BatchNorm2d(8)
    model = nn.ModuleDict({"a": nn.Sequential(norm), "b": nn.Sequential(norm), "c": norm})
    convert_norm(model, bgn)
    assert isinstance(model["c"], BatchGroupNorm)
    assert model["a"][0] is model["b"][0] is model["c"]


def test_a_norm_by_itself_and_other_dtypes() -> None:
    norm = convert_norm(nn.BatchNorm2d(8).double(), bgn)
    assert isinstance(norm, BatchGroupNorm) and norm.running_mean.dtype == torch.float64
    assert norm(torch.randn(2, 8, 4, 4, dtype=torch.float64)).dtype == torch.float64


def test_failure_leaves_the_model_untouched() -> None:
    model = nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm2d(12))
    layers = list(model)

    def picky(channels: int) -> nn.Module:
        if channels == 12:
            raise RuntimeError("no twelves")
        return BatchNorm(channels)

    for factory, error, message in (
        (picky, RuntimeError, "no twelves"),
        (lambda c: BatchNorm(c + 1), ValueError, r"factory: expected weight of shape \(8,\)"),
        (
            lambda c: nn.Sequential(BatchNorm(c)),
            ValueError,
            "factory: expected a layer with weight",
        ),
        (lambda c: None, ValueError, "factory: expected a module, got None"),
    ):
        with pytest.raises(error, match=message):
            convert_norm(model, factory)
        assert list(model) == layers
    with pytest.raises(ValueError, match="no norm layer to swap in Linear"):
        convert_norm(nn.Linear(2, 2), BatchNorm)
    with pytest.raises(ValueError, match="no norm layer to swap"):
        revert_norm(model)


def test_untracked_and_cumulative_statistics() -> None:
    """No statistics stay no statistics; a counter comes only with what it counted."""
    x = torch.randn(4, 8, 3, 3)
    untracked = nn.BatchNorm2d(8, track_running_stats=False).eval()
    expected = untracked(x)
    converted = convert_norm(untracked, BatchNorm)
    torch.testing.assert_close(converted(x), expected)
    assert converted.state_dict().keys() == {"weight", "bias"}
    cumulative = nn.BatchNorm2d(8, momentum=None)
    cumulative(x)
    groups = convert_norm(cumulative, functools.partial(BatchGroupNorm, num_groups=2))
    groups(x)
    torch.testing.assert_close(groups.running_mean, x.view(4, 2, -1).mean((0, 2)))


def test_feature_extraction_from_a_converted_model() -> None:
    torchvision()
    from torchvision.models.feature_extraction import create_feature_extractor

    model = convert_norm(small_resnet(), BatchNorm).eval()
    features = create_feature_extractor(model, ["layer1"])
    assert features(torch.randn(2, 3, 32, 32))["layer1"].shape == (2, 64, 8, 8)


def test_torchs_own_converter_is_known_to_undo_the_swap() -> None:
    """nn.SyncBatchNorm.convert_sync_batchnorm replaces every subclass: pinned, see the docs."""
    model = convert_norm(nn.Sequential(nn.BatchNorm2d(8)), BatchNorm)
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(model)[0]) is nn.SyncBatchNorm
