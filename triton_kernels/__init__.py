"""The norm operators in Triton: moments, combine, apply, and the way back, in two patterns.

    geometry.py    integers: channels, groups and their common refinement, the pieces
    plan.py        launch plans: frozen data, pure functions of shape, layout and device numbers
    indexing.py    geometry's integers on the device
    welford.py     statistics: one value a lane, then lanes, then partials
    pointwise.py   one element: z, act(z), act'(z)*dy, and the mask
    combine.py     cells and channels from partials, by the last block to arrive
    runs.py        sweeps over contiguous runs (NCHW), or the same with a stride
    columns.py     reducing sweeps over columns: NHWC, and frames of odd NCHW planes
    elementwise.py the second sweeps over columns
    onchip.py      one launch where a block's registers hold its slice
    slices.py      one launch where a cache does
    counters.py    zeros for the arrivals, a stream's own
    launch.py      launches, and what their arguments begin with
    operators.py   the five functions below

Tensors in, tensors out; CUDA tensors, or any tensors where Triton interprets (TRITON_INTERPRET=1).
"""

from .operators import norm_apply, norm_backward, norm_forward, norm_train, update_running

__all__ = ["norm_apply", "norm_backward", "norm_forward", "norm_train", "update_running"]
