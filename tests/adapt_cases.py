"""A network to adapt, images far from what it was trained on, and looks at its statistics."""

from __future__ import annotations

import torch
from torch import nn


def network(norm=nn.BatchNorm2d, dtype=torch.float32):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), norm(8), nn.ReLU(),
        nn.Dropout(0.5), nn.Conv2d(8, 6, 3, stride=2), norm(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    ).to(dtype)  # fmt: skip
    for module in model:
        if getattr(module, "running_mean", None) is not None:
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            module.num_batches_tracked.fill_(1234)
    return model.eval()


def images(n=12, dtype=torch.float32):
    """Off by a mean of 100: E[x^2] - E[x]^2 would have few digits left."""
    return torch.randn(n, 3, 9, 8, dtype=dtype) * 3 + 100


def statistics(model):
    return {k: v.clone() for k, v in model.state_dict().items() if "running" in k or "num" in k}


def assert_same_state(model, before):
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
