// How a problem is cut into blocks: plain data from a pure function, tested without a card.
//
// A tile is the unit of work before splitting; its rows or runs are cut into `splits` shares, one a
// job. The sweeps of one pass use the same plan, and partial results are numbered
// ((set*P + piece)*splits + split), so that those of a cell lie side by side.
//   runs     tile = (set, piece): `pooled` runs of one piece, contiguous in NCHW (stride C in NHWC)
//   columns  tile = (set, range q of S/Q positions, lanes*vector channels), for NHWC: threads along
//            channels, rows = (sample, position in range); Q = max(1, G/C)
//   frames   NCHW whose runs are short or odd, read as columns over the D elements of a sample:
//            tile = (set, k whole pieces), k*(piece length) a multiple of the vector
// plan_tiles.h cuts the tiles, plan_on_chip.h tries to keep slices of them on the chip, and here is
// the streaming plan and the choice between the two.
#pragma once

#include "plan_on_chip.h"
#include "plan_tiles.h"

namespace fusednorm {

// Splits beyond which partials are merged in two levels, so that no block merges them all.
constexpr int64_t kFlatSplits = 16;

// Blocks of a launch, as shares of the tiles: whole waves of resident blocks, as few as leave the
// last one nearly full. Long walks keep more in flight than many short blocks.
inline int64_t streaming_splits(int64_t tiles, int64_t resident, int64_t useful) {
  int64_t best = 1;
  double best_fill = 0;
  for (int64_t waves = 1; waves <= 8; ++waves) {
    const int64_t splits = std::min(waves * resident / tiles, useful);
    if (splits < 1) continue;
    const int64_t blocks = tiles * splits;
    const double fill = double(blocks) / double(ceil_div(blocks, resident) * resident);
    if (fill > best_fill * 1.05) {
      best = splits;
      best_fill = fill;
    }
    if (fill >= 0.94 || splits == useful) break;
  }
  return best;
}

// Where the partials of a cell are merged, and the counters by which the last block knows itself.
inline void plan_fold(const Problem& problem, Plan& plan) {
  const Geometry& g = problem.geometry;
  plan.fan = plan.splits;
  plan.fans = 1;
  if (problem.direction == Direction::kApply) {
    plan.folded = true;
    return;
  }
  if (plan.pattern == Pattern::kRuns) {
    // A counter a cell; its partials lie side by side however many pieces it has.
    plan.folded = true;
    const bool alone = g.even != 0 && plan.tiles_per_cell == 1 && plan.splits == 1;
    plan.counters = alone ? 0 : g.cells();
    return;
  }
  // A cell of several tiles of columns with cuts of its own in them: left to a kernel of its own.
  plan.folded = plan.cells_per_tile > 0;
  if (!plan.folded) return;
  if (plan.splits > kFlatSplits) {
    plan.fan = 1;
    while (plan.fan * plan.fan < plan.splits) ++plan.fan;
    plan.fans = ceil_div(plan.splits, plan.fan);
  }
  if (plan.fan > 1) plan.counters += plan.tiles * plan.fans;
  if (plan.two_levels()) plan.counters += plan.tiles / plan.tiles_per_cell;
}

// Whether the mask takes a kernel of its own, which reads y: scalar threads would share its bytes.
inline bool extra_mask(const Problem& problem, const Plan& plan) {
  return problem.mask && plan.vector == 1 && problem.direction != Direction::kBackward;
}

inline Plan plan_streaming(const Problem& problem, const Device& device) {
  const Geometry& g = problem.geometry;
  Plan plan = cut_tiles(problem, kStreamingLanes);
  plan.path = Path::kStreaming;
  plan.tier = Tier::kBlock;
  plan.cluster = plan.ctas_per_group = 1;
  // Small tiles get small blocks: kInFlight accesses a thread, whole warps.
  fit_block(plan, ceil_div(plan.rows_of_tile, kInFlight), kMaxBlock);
  plan.ctas_per_sm = resident_ctas(device, plan.block, 0);
  const int64_t useful = ceil_div(plan.rows_of_tile, int64_t(plan.rows()) * kInFlight);
  plan.splits = streaming_splits(plan.tiles, int64_t(device.num_sms) * plan.ctas_per_sm, useful);
  plan_fold(problem, plan);
  const bool apply = problem.direction == Direction::kApply;
  plan.nodes = (apply ? 1 : plan.folded ? 2 : 3) + int(extra_mask(problem, plan));

  const int64_t partials = ceil_div(g.pieces, std::min(g.groups, g.channels)) * plan.splits;
  plan.combine_block = static_cast<int>(
      std::clamp<int64_t>(next_power_of_two(ceil_div(partials, 4)), kWarp, kMaxBlock));
  return limit_grid(plan, kMaxGrid);
}

inline Plan make_plan(const Problem& problem, const Device& device) {
  return prefer_on_chip(problem, device, plan_streaming(problem, device));
}

// Bytes of one call's scratch, of the accumulation type: 8 bytes a number for fp64, else 4.
inline int64_t workspace_bytes(const Problem& problem, const Plan& plan) {
  const Geometry& g = problem.geometry;
  const int64_t number = problem.element_size == 8 ? 8 : 4;
  if (problem.direction == Direction::kApply) return 0;
  const bool backward = problem.direction == Direction::kBackward;
  if (plan.path == Path::kOnChip) return number * on_chip_workspace(g, plan, backward);
  const int64_t partials = g.sets * g.pieces * plan.splits;
  const int64_t merged = plan.two_levels() ? plan.tiles * plan.cells_per_tile * plan.fans : 0;
  return backward ? 2 * number * (partials + merged + g.cells()) : 4 * number * (partials + merged);
}

// Bytes through memory a call, from what the kernels read and write: vectors of C or G numbers and
// partials neglected, nothing found in L2.
inline int64_t planned_bytes(const Problem& problem, const Plan& plan) {
  const Geometry& g = problem.geometry;
  const int64_t reread = extra_mask(problem, plan) ? g.samples * g.size * problem.element_size : 0;
  return activation_bytes(problem, plan.path == Path::kOnChip ? 1 : 2) + reread;
}

}  // namespace fusednorm
