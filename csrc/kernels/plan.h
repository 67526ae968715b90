// How a problem is cut into blocks: plain data from a pure function, tested without a card.
//
// A tile is the unit of work before splitting; its rows or runs are cut into `splits` shares, a
// block each. The sweeps of one pass use the same plan, and partial results are numbered
// ((set*P + piece)*splits + split), so that those of a cell lie side by side.
//   runs     tile = (set, piece): `pooled` runs of one piece, contiguous in NCHW (stride C in NHWC)
//   columns  tile = (set, range q of S/Q positions, lanes*vector channels), for NHWC: threads along
//            channels, rows = (sample, position in range); Q = max(1, G/C)
#pragma once

#include <algorithm>

#include "geometry.h"

namespace fusednorm {

enum class Pattern : int { kRuns, kColumns };

struct Plan {
  Pattern pattern;
  bool channels_last;    // memory layout
  int vector;            // elements an access
  int block;             // threads
  int lanes;             // columns: threads along the channels; runs: 1
  int combine_block;     // threads that merge the partials of a cell or channel
  int64_t tiles;         // tiles in all
  int64_t column_tiles;  // columns: tiles along the channels
  int64_t ranges;        // columns: Q
  int64_t splits;        // T
  int64_t grid;          // blocks launched; they stride over tiles * splits
  int64_t max_grid;      // blocks of any launch; beyond it they stride over the jobs

  FUSEDNORM_HOST_DEVICE int64_t blocks() const { return tiles * splits; }
};

// Accesses a thread has in flight before it waits. Four of 16 bytes by the 384 threads that fit at
// 168 registers (kHalfVectorBlock) are 24 KiB an SM, by the 512 that fit at 128 they are 32; HBM3
// needs 23 to 40.
constexpr int kInFlight = 4;

// Sweeps of 8 half-precision values a vector take 128 to 168 registers on sm_90 (the budget file):
// of blocks of 256 threads only one would fit an SM, of 128 three do.
constexpr int kHalfVectorBlock = kMaxBlock / 2;

// Blocks wanted for each SM: two waves of four resident blocks.
constexpr int64_t kBlocksPerSm = 8;

// Blocks are numbered in one dimension; this is CUDA's limit for it.
constexpr int64_t kMaxGrid = 2147483647;

// The columns kernels number channels in 32 bits.
constexpr int64_t kMaxColumnChannels = 4294967295;

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

inline int64_t next_power_of_two(int64_t n) {
  int64_t p = 1;
  while (p < n) p *= 2;
  return p;
}

// The plan with no launch larger than max_grid: tests see blocks stride without 2^31 of them.
inline Plan limit_grid(Plan plan, int64_t max_grid) {
  plan.max_grid = max_grid;
  plan.grid = std::min(plan.blocks(), max_grid);
  return plan;
}

// element_size: bytes of x's dtype. aligned: every activation pointer is 16-byte aligned.
inline Plan make_plan(const Geometry& g, int element_size, bool channels_last, bool aligned,
                      int num_sms) {
  Plan plan{};
  plan.channels_last = channels_last;
  const bool nested = g.channels % g.groups == 0 || g.groups % g.channels == 0;
  // With one position a channel NCHW memory is NHWC memory too.
  const bool columns =
      nested && (channels_last || g.spatial == 1) && g.channels <= kMaxColumnChannels;
  plan.pattern = columns ? Pattern::kColumns : Pattern::kRuns;
  plan.ranges = std::max<int64_t>(1, g.groups / g.channels);

  // All addresses of a sweep are multiples of the vector if the extents they are made of are. fp64
  // stays scalar: it is there for gradient checks.
  const int widest = element_size == 8 ? 1 : 16 / element_size;
  const bool divides =
      columns ? g.channels % widest == 0
              : !channels_last && g.spatial % widest == 0 && g.group_size % widest == 0;
  plan.vector = aligned && divides ? widest : 1;

  int64_t work;  // accesses of a tile along the axis that is split, for each lane
  if (columns) {
    const int64_t lanes = next_power_of_two(ceil_div(g.channels, plan.vector));
    // 32 vectors are 512 bytes a row, 64 scalars at least 128.
    plan.lanes = static_cast<int>(std::min<int64_t>(lanes, plan.vector > 1 ? 32 : 64));
    plan.column_tiles = ceil_div(g.channels, int64_t(plan.lanes) * plan.vector);
    plan.tiles = g.sets * plan.ranges * plan.column_tiles;
    work = g.pooled() * (g.spatial / plan.ranges);
  } else {
    plan.lanes = 1;
    plan.column_tiles = 1;
    plan.tiles = g.sets * g.pieces;
    // A piece lies within a channel and within a group.
    work = g.pooled() * std::min(g.spatial, g.group_size) / plan.vector;
  }
  // Small tiles get small blocks: kInFlight accesses a thread, whole warps.
  const int64_t threads = next_power_of_two(ceil_div(work, kInFlight)) * plan.lanes;
  const int64_t most = plan.vector == 8 ? kHalfVectorBlock : kMaxBlock;
  plan.block = static_cast<int>(std::clamp<int64_t>(threads, kWarp, most));

  const int64_t wanted = ceil_div(kBlocksPerSm * num_sms, plan.tiles);
  const int64_t useful = ceil_div(work * plan.lanes, int64_t(plan.block) * kInFlight);
  plan.splits = std::max<int64_t>(1, std::min(wanted, useful));

  const int64_t partials = ceil_div(g.pieces, std::min(g.groups, g.channels)) * plan.splits;
  plan.combine_block = static_cast<int>(
      std::clamp<int64_t>(next_power_of_two(ceil_div(partials, 4)), kWarp, kMaxBlock));
  return limit_grid(plan, kMaxGrid);
}

// Scratch of one call: partials of (count, mean, tail, M2), or of two sums and then the two means a
// cell. accumulator_size: 8 for fp64, else 4.
inline int64_t forward_workspace_bytes(const Geometry& g, const Plan& plan, int accumulator_size) {
  return 4 * accumulator_size * g.sets * g.pieces * plan.splits;
}

inline int64_t backward_workspace_bytes(const Geometry& g, const Plan& plan, int accumulator_size) {
  return 2 * accumulator_size * (g.sets * g.pieces * plan.splits + g.cells());
}

}  // namespace fusednorm
