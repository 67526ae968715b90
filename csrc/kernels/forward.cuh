// Launchers of the forward. On chip: one kernel. Streaming: moments, apply, and between them a
// combine where the caller has no counters. With given statistics: apply.
//
// On chip x is read once and y written, 2 bytes moved for each byte of x; streaming it is read
// twice, 3 bytes; a residual is one more.
#pragma once

#include "combine.cuh"
#include "launch.cuh"
#include "on_chip_forward.cuh"
#include "sweep.cuh"

namespace fusednorm {

// The mask of y where the kernel that wrote y could not write it.
inline void scalar_mask(const NormParams& p) {
  if (p.mask == nullptr || p.plan.vector > 1) return;
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t numel = p.geometry.samples * p.geometry.size;
    const int64_t grid = std::min(ceil_div(ceil_div(numel, kMaskWidth<T>), kMaxBlock), kMaxGrid);
    FUSEDNORM_LAUNCH(mask_kernel<T>, grid, kMaxBlock, p.stream, static_cast<const T*>(p.out),
                     p.mask, numel);
  });
}

// y from x, mean and rstd.
inline void apply(const NormParams& p) {
  dispatch_tile(p.dtype, p.plan, [&](auto tile) {
    using Tile = typename decltype(tile)::type;
    const auto args = sweep_args<typename Tile::Element>(p);
    FUSEDNORM_LAUNCH(apply_kernel<Tile>, p.plan.grid, p.plan.block, p.stream, args);
  });
  scalar_mask(p);
}

// mean, rstd, var and y from x; running statistics.
inline void forward(const NormParams& p) {
  if (p.plan.path == Path::kOnChip) return forward_on_chip(p);
  dispatch_tile(p.dtype, p.plan, [&](auto tile) {
    using Tile = typename decltype(tile)::type;
    using A = Accumulator<typename Tile::Element>;
    auto args = sweep_args<typename Tile::Element>(p);
    args.combine.moments = static_cast<Moments<A>*>(p.workspace);
    args.combine.merged_moments =
        args.combine.moments + p.geometry.sets * p.geometry.pieces * p.plan.splits;
    FUSEDNORM_LAUNCH(moments_kernel<Tile>, p.plan.grid, p.plan.block, p.stream, args);
    if (args.folded) return;
    const int64_t grid = std::min(p.geometry.cells(), p.plan.max_grid);
    FUSEDNORM_LAUNCH(combine_kernel<A>, grid, p.plan.combine_block, p.stream, args.combine);
  });
  apply(p);
}

}  // namespace fusednorm
