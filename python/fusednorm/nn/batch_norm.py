"""BatchNorm and BatchGroupNorm: torch's BatchNorm, its keys and conventions, with G statistics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from fusednorm import functional
from fusednorm.reference.cells import ACTIVATIONS, activation_index
from fusednorm.training import is_plain, train_eagerly


class BatchGroupNorm(_BatchNorm):
    r"""Batch Group Normalization over inputs (N, C, \*) (Zhou et al., arXiv 2012.02782).

    One mean and variance for each of ``num_groups`` contiguous runs of the flattened (C, \*) axes,
    pooled over the batch; the affine is per channel. Few groups serve small batches: fewer, larger
    cells give steadier statistics. ``num_groups = num_features`` is batch normalization, whose
    state dict then loads strictly. Shapes, dtypes and errors: ``fusednorm.functional``.

    Args:
        num_features: C.
        num_groups: G, a divisor of C times the spatial size. Groups that are not whole channels
            (G does not divide C) tie the running statistics to one spatial size H*W, kept in the
            buffer ``spatial_size`` (0 before the first batch); another is refused with a
            ValueError.
        eps, momentum, affine, track_running_stats, device, dtype: as in ``torch.nn.BatchNorm2d``;
            ``momentum=None`` is a cumulative average.
        act: None, "relu", "silu", "gelu" or "leaky_relu" (slope 0.01), fused.

    Buffers: ``running_mean``, ``running_var`` (unbiased), both (G,), ``num_batches_tracked``.

    Example:
        >>> norm = BatchGroupNorm(64, num_groups=16, act="relu")
        >>> y = norm(torch.randn(2, 64, 56, 56))
    """

    spatial_size: Tensor
    _known_spatial_size: int

    def __init__(
        self,
        num_features: int,
        num_groups: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        act: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if num_features < 1:
            raise ValueError(f"num_features: expected at least 1, got {num_features}")
        if num_groups < 1:
            raise ValueError(f"num_groups: expected at least 1, got {num_groups}")
        activation_index(act)
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        self.num_groups = num_groups
        self.act = act
        if track_running_stats and num_groups != num_features:
            for name, fill in (("running_mean", torch.zeros), ("running_var", torch.ones)):
                self.register_buffer(name, fill(num_groups, device=device, dtype=dtype))
        if track_running_stats and self._splits_channels:
            self.register_buffer("spatial_size", torch.zeros((), dtype=torch.int64, device=device))

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """y = act(norm(input) + residual), of input's shape, dtype and memory format."""
        if self.training and is_plain(input):
            return self._train_eagerly(input, residual)
        tracked = self.running_mean is not None
        training = self.training or not tracked
        update = self.training and tracked
        if self.weight is None:
            self._check_channels(input)
        if tracked and self._splits_channels:
            self._check_spatial_size(input)
        y = functional.batch_group_norm(
            input,
            self.num_groups,
            self.running_mean if update or not training else None,
            self.running_var if update or not training else None,
            self.weight,
            self.bias,
            training,
            self.momentum,
            self.eps,
            act=self.act,
            residual=residual,
            num_batches_tracked=self.num_batches_tracked if update else None,
        )
        if update and self._splits_channels:
            self._remember_spatial_size(input)
        return y

    def _train_eagerly(self, input: Tensor, residual: Tensor | None) -> Tensor:
        """What forward does for a plain tensor in training; past Module.__getattr__, whose five
        calls take the host as long as the operator does."""
        parameters, buffers = self._parameters, self._buffers
        if "weight" in parameters and "bias" in parameters:
            weight, bias = parameters["weight"], parameters["bias"]
        else:  # parametrized
            weight, bias = self.weight, self.bias
        mean = buffers["running_mean"]
        if weight is None:
            self._check_channels(input)
        inside = mean is not None and self._splits_channels
        if inside:
            self._check_spatial_size(input)
        y = train_eagerly(
            input, self.num_groups, False, weight, bias, residual,
            (mean, buffers["running_var"], buffers["num_batches_tracked"], self.momentum),
            self.eps, ACTIVATIONS[self.act], 0.01,
        )  # fmt: skip
        if inside:
            self._remember_spatial_size(input)
        return y

    def reset_running_stats(self) -> None:
        super().reset_running_stats()
        # What the buffer holds, where the host can see it without waiting for the device.
        self._known_spatial_size = 0
        if "spatial_size" in self._buffers:
            self.spatial_size.zero_()

    @property
    def _splits_channels(self) -> bool:
        return self.num_features % self.num_groups != 0

    def _check_channels(self, input: Tensor) -> None:
        """Without parameters nothing else would notice; with them, theirs is the message."""
        if input.dim() >= 2 and input.shape[1] != self.num_features:
            raise ValueError(
                f"input: expected {self.num_features} channels, got {input.shape[1]} "
                f"in {tuple(input.shape)}"
            )

    def _remember_spatial_size(self, input: Tensor) -> None:
        if not self._known_spatial_size:
            self._known_spatial_size = input.shape[2:].numel()
            self.spatial_size.fill_(self._known_spatial_size)

    def _check_spatial_size(self, input: Tensor) -> None:
        """Group borders inside channels move with the spatial size; so do their statistics."""
        known, size = self._known_spatial_size, input.shape[2:].numel()
        if not known and not self.training and not torch.compiler.is_compiling():
            # A buffer that somebody else filled, averaging models say: one look at the device.
            known = self._known_spatial_size = int(self.spatial_size)
        if known and size != known:
            raise ValueError(
                f"input: expected spatial size {known}, for which the {self.num_groups} running "
                f"statistics over {self.num_features} channels were gathered, got {size}"
            )

    def _check_input_dim(self, input: Tensor) -> None:
        """Any rank from 2 on; fusednorm.functional checks it."""

    def extra_repr(self) -> str:
        act = "" if self.act is None else f", act={self.act}"
        return f"{self.num_features}, num_groups={self.num_groups}, {self._options()}{act}"

    def _options(self) -> str:
        return (
            f"eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}"
        )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        size = state_dict.get(prefix + "spatial_size")
        if size is not None and not size.is_meta:
            self._known_spatial_size = int(size)


class BatchNorm(BatchGroupNorm):
    r"""Batch normalization over inputs (N, C, \*) of any rank from 2 on (Ioffe & Szegedy 2015).

    ``torch.nn.BatchNorm1d/2d/3d`` in one class, with an optional fused residual and activation;
    state dicts load strictly both ways. Arguments as in ``BatchGroupNorm``, without groups.

    Example:
        >>> norm = BatchNorm(64, act="relu")
        >>> y = norm(torch.randn(2, 64, 56, 56), residual=torch.randn(2, 64, 56, 56))
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        act: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features,
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            act=act,
            device=device,
            dtype=dtype,
        )

    def extra_repr(self) -> str:
        act = "" if self.act is None else f", act={self.act}"
        return f"{self.num_features}, {self._options()}{act}"
