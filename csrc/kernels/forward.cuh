// Launchers of the forward: moments, combine, apply. Three launches, or one with given statistics.
//
// Reads x twice and writes y: 3 bytes moved for each byte of x, and one more for a residual.
#pragma once

#include "combine.cuh"
#include "launch.cuh"
#include "sweep.cuh"

namespace fusednorm {

// y from x, mean and rstd.
inline void apply(const NormParams& p) {
  dispatch_tile(p.dtype, p.plan, [&](auto tile) {
    using Tile = typename decltype(tile)::type;
    const auto args = sweep_args<typename Tile::Element>(p);
    FUSEDNORM_LAUNCH(apply_kernel<Tile>, p.plan.grid, p.plan.block, p.stream, args);
  });
}

// mean, rstd, var and y from x.
inline void forward(const NormParams& p) {
  dispatch_tile(p.dtype, p.plan, [&](auto tile) {
    using Tile = typename decltype(tile)::type;
    using A = Accumulator<typename Tile::Element>;
    auto args = sweep_args<typename Tile::Element>(p);
    args.moments = static_cast<Moments<A>*>(p.workspace);
    FUSEDNORM_LAUNCH(moments_kernel<Tile>, p.plan.grid, p.plan.block, p.stream, args);

    CombineArgs<A> combine{};
    combine.geometry = p.geometry;
    combine.splits = p.plan.splits;
    combine.moments = args.moments;
    combine.mean = static_cast<A*>(p.mean);
    combine.rstd = static_cast<A*>(p.rstd);
    combine.var = static_cast<A*>(p.var);
    combine.eps = static_cast<A>(p.eps);
    const int64_t grid = std::min(p.geometry.cells(), p.plan.max_grid);
    FUSEDNORM_LAUNCH(combine_kernel<A>, grid, p.plan.combine_block, p.stream, combine);
  });
  apply(p);
}

}  // namespace fusednorm
