"""The norm operators in Triton: moments, combine, apply, and the way back, in two patterns.

    geometry.py    integers: channels, groups and their common refinement, the pieces
    plan.py        launch plans: frozen data, pure functions of shape, layout and device numbers
    welford.py     statistics: one value a lane, then lanes, then partials
    pointwise.py   one element: z, act(z), act'(z)*dy
    runs.py        sweeps over contiguous runs (NCHW), or the same with a stride
    columns.py     sweeps over channel vectors (NHWC)
    combine.py     cells and channels from partials; running statistics
    launch.py      the four functions below

Tensors in, tensors out; CUDA tensors, or any tensors where Triton interprets (TRITON_INTERPRET=1).
"""

from .launch import norm_apply, norm_backward, norm_forward, update_running

__all__ = ["norm_apply", "norm_backward", "norm_forward", "update_running"]
