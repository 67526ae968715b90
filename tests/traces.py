"""Golden traces, and what comparing a module with one takes."""

from __future__ import annotations

from pathlib import Path

import numpy
import torch

GOLDEN = Path(__file__).parent / "golden"


class Trace:
    """A golden file; keys of one prefix fall back to those all prefixes share."""

    def __init__(self, name: str, prefix: str = "") -> None:
        self.file = numpy.load(GOLDEN / f"{name}.npz", allow_pickle=False)
        self.prefix = prefix
        self.seen: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return self.prefix + key in self.file or key in self.file

    def __getitem__(self, key: str) -> torch.Tensor:
        self.seen.add(key)
        key = self.prefix + key if self.prefix + key in self.file else key
        return torch.from_numpy(numpy.array(self.file[key]))


def same(got, expected, what):
    scale = max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(
        got, expected, rtol=0, atol=1e-10 * scale, msg=lambda m: f"{what}: {m}"
    )


def load(module, values):
    """Parameters and buffers by name."""
    with torch.no_grad():
        state = dict(module.named_parameters()) | dict(module.named_buffers())
        for name, value in values.items():
            state[name].copy_(value.reshape(state[name].shape))


def gradients(module, y, g, inputs):
    """Of sum(y * g) by the named inputs and every parameter, zero where there is no way to one."""
    wanted = inputs | dict(module.named_parameters())
    found = torch.autograd.grad(y, [*wanted.values()], g, allow_unused=True)
    return {
        name: torch.zeros_like(wanted[name]) if value is None else value
        for name, value in zip(wanted, found, strict=True)
    }
