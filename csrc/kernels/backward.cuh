// Launchers of the backward. On chip: one kernel, and one for channels that slices share.
// Streaming: backward_reduce, backward_apply, and between them a combine where the caller has no
// counters.
//
// On chip x and dy are read once and dx written, 3 bytes moved for each byte of x; streaming they
// are read twice, 5 bytes. The activation and its input are recomputed, so a residual adds one read
// or two, and its gradient one write; with a mask the residual is not read at all.
#pragma once

#include "combine.cuh"
#include "launch.cuh"
#include "on_chip_backward.cuh"
#include "sweep.cuh"

namespace fusednorm {

// dx, dweight, dbias and, where asked for, dresidual from dy, x, mean and rstd.
inline void backward(NormParams p) {
  // Without an activation h = dy whatever z is; with a mask z is not needed.
  if (p.act == kNone) p.mask = nullptr;
  if (p.act == kNone || p.mask != nullptr) p.residual = nullptr;
  if (p.plan.path == Path::kOnChip) return backward_on_chip(p);
  dispatch_tile(p.dtype, p.plan, [&](auto tile) {
    using Tile = typename decltype(tile)::type;
    using A = Accumulator<typename Tile::Element>;
    const Geometry& g = p.geometry;
    auto args = sweep_args<typename Tile::Element>(p);
    CombineArgs<A>& combine = args.combine;
    combine.m0 = static_cast<A*>(p.workspace);
    combine.m1 = combine.m0 + g.cells();
    combine.sums = reinterpret_cast<Sums<A>*>(combine.m1 + g.cells());
    combine.merged_sums = combine.sums + g.sets * g.pieces * p.plan.splits;
    args.m0 = combine.m0;
    args.m1 = combine.m1;
    args.channels = args.folded && !combine.closed;
    FUSEDNORM_LAUNCH(backward_reduce_kernel<Tile>, p.plan.grid, p.plan.block, p.stream, args);
    if (!args.folded) {
      const int64_t grid = std::min(std::max(g.cells(), g.channels), p.plan.max_grid);
      FUSEDNORM_LAUNCH(backward_combine_kernel<A>, grid, p.plan.combine_block, p.stream, combine);
    }
    FUSEDNORM_LAUNCH(backward_apply_kernel<Tile>, p.plan.grid, p.plan.block, p.stream, args);
  });
}

}  // namespace fusednorm
