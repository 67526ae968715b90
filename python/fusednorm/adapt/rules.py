"""The four methods: what a layer normalizes with, given its source and the batches so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from fusednorm.reference.adaptation import Moments, Statistics, merge, mix, wide

METHODS = ("replace", "prior", "ema", "batch")
DEFAULT_STRENGTH = 16.0


class State(NamedTuple):
    """What a layer has seen. Replaced as a whole, so that a failed batch leaves no trace."""

    seen: Moments | None = None
    average: Statistics | None = None
    steps: int = 0


@dataclass(frozen=True)
class Rule:
    """A method with its options, checked."""

    method: str
    strength: float
    momentum: float | None
    unbiased: bool
    total_variance: bool
    adapt_mean: bool
    adapt_var: bool

    def absorb(self, state: State, batch: Moments, source: Statistics) -> State:
        """After one more batch of a layer's input."""
        if self.method != "ema":
            alone = state.seen is None or self.method == "batch"
            seen = batch if alone else merge((state.seen, batch))  # type: ignore[arg-type]
            return State(seen, None, state.steps + 1)
        steps = state.steps + 1
        share = 1 / steps if self.momentum is None else self.momentum
        new = (batch.mean, batch.variance(self.unbiased))
        # The first cumulative average is the batch itself: nothing of the source is left.
        old = new if steps == 1 and self.momentum is None else (state.average or _wide(source))
        pairs = zip(old, new, strict=True)
        mean, var = (o + (n - o) * share for o, n in pairs)
        return State(None, (mean, var), steps)

    def statistics(
        self, state: State, source: Statistics, images: int, unbiased: bool | None = None
    ) -> Statistics:
        """Mean and variance to normalize with; ``images`` of the target have been seen."""
        source = _wide(source)
        if state.average is not None:
            target = state.average
        else:
            assert state.seen is not None
            unbiased = self.unbiased if unbiased is None else unbiased
            var = state.seen.variance(unbiased) if self.adapt_var else source[1]
            target = (state.seen.mean, var)
        if self.method == "prior":
            target = mix(source, target, self.strength, images, self.total_variance)
        return (
            target[0] if self.adapt_mean else source[0],
            target[1] if self.adapt_var else source[1],
        )

    @property
    def while_gathering(self) -> bool | None:
        """Whether the pass that gathers normalizes by unbiased variances; None: as the result.

        Replacement is published as one pass in training mode, which divides by the count.
        """
        return False if self.method == "replace" else None

    def batches(self, state: State) -> int | None:
        """What num_batches_tracked becomes; None where the source is still part of the result."""
        fresh = self.method == "replace" or (self.method == "ema" and self.momentum is None)
        return state.steps if fresh else None


def _wide(statistics: Statistics) -> Statistics:
    return wide(statistics[0]), wide(statistics[1])


def rule(
    method: str,
    prior_strength: float | None,
    momentum: float | None,
    variance: str | None,
    total_variance: bool,
    adapt_mean: bool,
    adapt_var: bool,
) -> Rule:
    """Checked options; ValueError or TypeError names the one that is wrong or has no effect."""
    if method not in METHODS:
        known = ", ".join(map(repr, METHODS))
        raise ValueError(f"method: expected one of {known}, got {method!r}")
    for name, value, belongs in (
        ("prior_strength", prior_strength, "prior"),
        ("momentum", momentum, "ema"),
        ("total_variance", total_variance or None, "prior"),
    ):
        if value is not None and method != belongs:
            raise ValueError(f"{name}: only method={belongs!r} has it, got method={method!r}")
        if value is not None and not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a number, got {value!r}")
    strength = DEFAULT_STRENGTH if prior_strength is None else float(prior_strength)
    if not strength >= 0:
        raise ValueError(f"prior_strength: expected at least 0 images, got {prior_strength}")
    if momentum is not None and not 0 < momentum <= 1:
        raise ValueError(f"momentum: expected None or a weight in (0, 1], got {momentum}")
    if variance not in (None, "biased", "unbiased"):
        raise ValueError(f"variance: expected None, 'biased' or 'unbiased', got {variance!r}")
    if not (adapt_mean or adapt_var):
        raise ValueError("adapt_mean and adapt_var: expected at least one of them")
    unbiased = method != "batch" if variance is None else variance == "unbiased"
    return Rule(method, strength, momentum, unbiased, total_variance, adapt_mean, adapt_var)
