"""EvalNorm: batch norm whose evaluation knows that a training batch held the sample itself."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fusednorm.checks import check_input
from fusednorm.layout import canonical, like
from fusednorm.nn.batch_norm import BatchNorm
from fusednorm.reference import cells
from fusednorm.reference.eval_norm import eval_norm, matching_loss


class EvalNorm(BatchNorm):
    r"""Batch norm with corrected evaluation statistics, over inputs (N, C, \*) (arXiv 1904.06031).

    Training is batch norm's. Evaluation mixes each sample's own moments into the running ones, with
    the share ``alpha`` they had of a training batch (``fusednorm.reference.eval_norm``), which
    matters where batches were small; the batch at evaluation does not. Gradients in evaluation are
    exact, through the sample's moments. State dicts of batch norm load strictly.

    Args:
        num_features, eps, momentum, affine, act, device, dtype: as in ``BatchNorm``.
        track_running_stats: must stay True.
        batch_size: B, samples a process in a training batch; alpha is 1/B. None: the largest that
            came, kept in the buffer ``trained_batch``; 0, before training, is plain batch norm.
        alpha: a share in [0, 1] instead; or "learned", a parameter ``alpha_logit`` of the layer
            that starts at 1/B (1/2 without ``batch_size``) and learns from ``matching_loss()``.

    Example:
        >>> norm = EvalNorm(64, batch_size=2, act="relu")
        >>> y = norm.eval()(torch.randn(1, 64, 56, 56))
    """

    trained_batch: Tensor
    alpha_logit: nn.Parameter

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        batch_size: int | None = None,
        alpha: float | str | None = None,
        act: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not track_running_stats:
            raise ValueError("track_running_stats: expected True, there is nothing to mix without")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1 sample, got {batch_size}")
        number = isinstance(alpha, (int, float)) and 0 <= alpha <= 1
        if not (alpha is None or alpha == "learned" or number):
            raise ValueError(f"alpha: expected None, 'learned' or within [0, 1], got {alpha!r}")
        if number and batch_size is not None:
            raise ValueError(f"batch_size: has no effect beside alpha={alpha}")
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats,
            act=act, device=device, dtype=dtype,
        )  # fmt: skip
        self.batch_size, self.alpha = batch_size, alpha
        self._seen: tuple[Tensor, ...] | None = None
        if self._measures:
            count = torch.zeros((), dtype=torch.int64, device=device)
            self.register_buffer("trained_batch", count)
        if alpha == "learned":
            # A logit of 1 is infinite; nobody learns his way back from there.
            start = min(max(1 / (batch_size or 2), 0.01), 0.99)
            logit = torch.tensor(math.log(start / (1 - start)), device=device, dtype=dtype)
            self.alpha_logit = nn.Parameter(logit)

    @property
    def _measures(self) -> bool:
        return self.alpha is None and self.batch_size is None

    def share(self) -> Tensor | float:
        """The weight of a sample's own moments in evaluation."""
        if self.alpha == "learned":
            return self.alpha_logit.sigmoid()
        if self.alpha is not None:
            return float(self.alpha)
        if self.batch_size is not None:
            return 1 / self.batch_size
        # On the device, so that nothing waits for it.
        seen = self.trained_batch.to(torch.float64 if self._is_double else torch.float32)
        return torch.where(seen > 0, 1 / seen.clamp_min(1), 0)

    def matching_loss(self) -> Tensor:
        """Mean square between the last training batch as it was normalized and as evaluation would.

        A scalar that depends on ``alpha_logit`` alone: add it to the loss, or step on it beside.
        The network gets no gradient from it.

        Raises:
            RuntimeError: alpha is not learned, or no training batch has come.
        """
        if self.alpha != "learned" or self._seen is None:
            raise RuntimeError("matching_loss: needs alpha='learned' and a forward in training")
        mean, var, running_mean, running_var = self._seen
        alpha = self.alpha_logit.sigmoid().to(mean.dtype)
        return matching_loss(mean, var, running_mean, running_var, alpha, self.eps)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """y = act(norm(input) + residual), of input's shape, dtype and memory format."""
        if self.training:
            # Before the statistics move: evaluation will not have seen its batch either.
            seen = self._moments(input) if self.alpha == "learned" and input.dim() > 1 else None
            y = super().forward(input, residual)
            self._seen = seen
            if self._measures:
                self.trained_batch.clamp_(min=input.shape[0])
            return y
        self._check(input, residual)
        assert self.running_mean is not None and self.running_var is not None
        x = canonical(input)
        y = eval_norm(
            x, self.running_mean, self.running_var, self.share(), self.weight, self.bias,
            residual, self.eps, cells.activation_index(self.act),
        )  # fmt: skip
        return like(y, x)

    @torch.no_grad()
    def _moments(self, input: Tensor) -> tuple[Tensor, ...]:
        wide = input.detach().to(cells.accumulation_dtype(input.dtype))
        mean, var = cells.moments(wide, input.shape[1], per_sample=True)
        assert self.running_mean is not None and self.running_var is not None
        # Copies: the buffers are about to move.
        running = (t.to(mean.dtype, copy=True) for t in (self.running_mean, self.running_var))
        return (mean, var, *running)

    def _check(self, input: Tensor, residual: Tensor | None) -> None:
        check_input(input)
        if input.shape[1] != self.num_features:
            raise ValueError(
                f"input: expected {self.num_features} channels, got {input.shape[1]} "
                f"in {tuple(input.shape)}"
            )
        if residual is not None and residual.shape != input.shape:
            raise ValueError(
                f"residual: expected the shape of input {tuple(input.shape)}, "
                f"got {tuple(residual.shape)}"
            )

    @property
    def _is_double(self) -> bool:
        return self.running_mean is not None and self.running_mean.dtype == torch.float64

    def reset_running_stats(self) -> None:
        super().reset_running_stats()
        if "trained_batch" in self._buffers:
            self.trained_batch.zero_()

    def extra_repr(self) -> str:
        chosen = f", batch_size={self.batch_size}" if self.batch_size is not None else ""
        chosen += f", alpha={self.alpha!r}" if self.alpha is not None else ""
        return super().extra_repr() + chosen

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for name in ("trained_batch", "alpha_logit"):
            mine = getattr(self, name, None)
            if mine is not None:
                # Batch norm's own dict knows neither; they stay as they are.
                state_dict.setdefault(prefix + name, mine.detach().clone())
        super()._load_from_state_dict(state_dict, prefix, *args)
