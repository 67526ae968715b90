// Launcher of the backward: backward_reduce, backward_combine, backward_apply. Three launches.
//
// Reads x and dy twice and writes dx: 5 bytes moved for each byte of x; the activation and its
// input are recomputed, so a residual adds two reads, and its gradient one write.
#pragma once

#include "combine.cuh"
#include "launch.cuh"
#include "sweep.cuh"

namespace fusednorm {

// dx, dweight, dbias and, where asked for, dresidual from dy, x, mean and rstd.
inline void backward(const NormParams& p) {
  dispatch_tile(p.dtype, p.plan, [&](auto tile) {
    using Tile = typename decltype(tile)::type;
    using A = Accumulator<typename Tile::Element>;
    auto args = sweep_args<typename Tile::Element>(p);
    // Without an activation h = dy whatever z is, and the residual need not be read.
    if (p.act == kNone) args.residual = nullptr;
    args.sums = static_cast<Sums<A>*>(p.workspace);
    FUSEDNORM_LAUNCH(backward_reduce_kernel<Tile>, p.plan.grid, p.plan.block, p.stream, args);

    CombineArgs<A> combine{};
    combine.geometry = p.geometry;
    combine.splits = p.plan.splits;
    combine.sums = args.sums;
    combine.weight = args.weight;
    const int64_t partials = p.geometry.sets * p.geometry.pieces * p.plan.splits;
    combine.m0 = reinterpret_cast<A*>(args.sums + partials);
    combine.m1 = combine.m0 + p.geometry.cells();
    combine.dweight = static_cast<A*>(p.dweight);
    combine.dbias = static_cast<A*>(p.dbias);
    const int64_t grid = std::min(p.geometry.cells() + p.geometry.channels, p.plan.max_grid);
    FUSEDNORM_LAUNCH(backward_combine_kernel<A>, grid, p.plan.combine_block, p.stream, combine);

    args.m0 = combine.m0;
    args.m1 = combine.m1;
    FUSEDNORM_LAUNCH(backward_apply_kernel<Tile>, p.plan.grid, p.plan.block, p.stream, args);
  });
}

}  // namespace fusednorm
