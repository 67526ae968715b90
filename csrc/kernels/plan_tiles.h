// What a plan is made from and consists of, and how a tensor is cut into tiles.
//
// Cutting depends on shape, layout and alignment only; how many threads, blocks and copies on the
// chip a tile gets is decided in plan.h and plan_on_chip.h.
#pragma once

#include <algorithm>

#include "geometry.h"

namespace fusednorm {

enum class Pattern : int { kRuns, kColumns, kFrames };
enum class Path : int { kStreaming, kOnChip };
enum class Tier : int { kBlock, kCluster, kGrid };
enum class Direction : int { kForward, kBackward, kApply };

// What a plan needs to know of a GPU.
struct Device {
  int num_sms;
  int shared_per_block;  // bytes a block may ask for
  int shared_per_sm;     // bytes
  int registers_per_sm;
  int threads_per_sm;
  int capability;    // 90 for sm_90
  bool cooperative;  // cooperative launches
  int max_cluster;   // blocks of the largest cluster; 1 where there are none
  int64_t l2_bytes;
};

constexpr Device kH200 = {132, 232448, 233472, 65536, 2048, 90, true, 16, 60 << 20};

// One call: aligned says that every activation pointer is 16-byte aligned. residual and mask say
// which of them is read (backward) or written (the mask, forward).
struct Problem {
  Geometry geometry;
  int element_size;
  bool channels_last;
  bool aligned;
  Direction direction;
  bool residual;
  bool mask;
  bool dresidual;
  int act;
};

struct Plan {
  Path path;
  Tier tier;
  Pattern pattern;
  bool channels_last;  // memory layout
  int vector;          // elements an access
  int block;           // threads
  int lanes;           // accesses of a row, a thread each; runs: 1
  int combine_block;   // threads that merge the partials of a cell or channel
  // Tiles.
  int64_t tiles;         // in all
  int64_t column_tiles;  // tiles along the columns of a row; runs: 1
  int64_t ranges;        // columns: Q
  int64_t even;          // frames: columns of a piece; columns: 1
  int64_t pieces_per_tile;
  int64_t pieces_per_cell;     // nested groups: max(1, C/G)
  int64_t pieces_per_channel;  // nested groups: max(1, G/C)
  int64_t rows_per_sample;     // of a tile of columns; frames: 1
  int64_t cells_per_tile;      // complete ones; or 1, part of one; 0 if tiles cut cells irregularly
  int64_t tiles_per_cell;
  int64_t rows_of_tile;  // accesses of a tile for each lane: what is split
  int64_t splits;        // T
  // Launch.
  int64_t grid;      // blocks; streaming ones stride over the jobs
  int64_t max_grid;  // blocks of any launch
  int nodes;         // kernels a call; one more where the caller has no counters
  int ctas_per_sm;   // co-resident, by registers, threads and shared memory
  // Streaming: the last block to arrive merges, in two levels of `fan` if there are many splits.
  bool folded;
  int64_t fan;
  int64_t fans;
  int64_t counters;  // zeroed 32-bit numbers the launch needs; it leaves them zero
  // On chip: a group of CTAs owns a slice, tiles_per_cell tiles; each CTA has jobs_per_cta of the
  // slice's jobs (tile, split), and `slots` accesses a thread for each of them.
  int cluster;
  int ctas_per_group;
  int64_t slices;
  int jobs;
  int jobs_per_cta;
  int slots;
  int tensors;  // kept on the chip: x; x and dy; x, dy and residual
  // Dynamic shared memory of a block, in bytes, and where in it lies what is beside the slots.
  int shared_bytes;
  int scratch_at;  // of the reductions
  int sums_at;     // a number a piece of the tile
  int results_at;  // Moments or Sums a piece of each job
  int stats_at;    // two numbers a cell of the slice

  FUSEDNORM_HOST_DEVICE int64_t blocks() const { return tiles * splits; }
  FUSEDNORM_HOST_DEVICE int rows() const { return block / lanes; }
  FUSEDNORM_HOST_DEVICE bool two_levels() const {
    return pattern != Pattern::kRuns && folded && fans * tiles_per_cell > 1;
  }
};

// Accesses a thread has in flight before it waits: four of 16 bytes by the 512 threads an SM that
// kRegisters leaves room for are 32 KiB; HBM3 needs 23 to 40.
constexpr int kInFlight = 4;

// Registers a thread that every kernel of a plan stays within, asserted by the budget file: two
// blocks of 256 threads an SM, or one of 512.
constexpr int kRegisters = 128;

// Threads of the largest block that keeps a slice on the chip.
constexpr int kMaxChipBlock = 512;

// A row of a streaming tile is 512 bytes where it can be; a row of any tile has at most 128 lanes,
// for which the reductions have shared memory.
constexpr int kStreamingLanes = 32;
constexpr int kMaxLanes = kMaxBlock / 2;

// Runs shorter than this are read as frames: a warp then reads whole lines instead of pieces.
constexpr int64_t kShortRunBytes = 512;

// Blocks are numbered in one dimension; this is CUDA's limit for it.
constexpr int64_t kMaxGrid = 2147483647;

// The columns kernels number channels and pieces in 32 bits.
constexpr int64_t kMaxColumns = 4294967295;

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

inline int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}

inline int64_t next_power_of_two(int64_t n) {
  int64_t p = 1;
  while (p < n) p *= 2;
  return p;
}

// The plan with no launch larger than max_grid: tests see blocks stride without 2^31 of them.
inline Plan limit_grid(Plan plan, int64_t max_grid) {
  plan.max_grid = max_grid;
  if (plan.path == Path::kStreaming) plan.grid = std::min(plan.blocks(), max_grid);
  return plan;
}

// Blocks of this size that an SM holds, by the ceiling of registers.
inline int resident_ctas(const Device& device, int block, int shared_bytes) {
  // Every block costs a kilobyte of shared memory beside its own.
  const int by_shared = device.shared_per_sm / (shared_bytes + 1024);
  const int by_registers = device.registers_per_sm / (kRegisters * block);
  const int by_threads = device.threads_per_sm / block;
  return std::max(1, std::min({by_shared, by_registers, by_threads, 16}));
}

// rows_wanted rows of threads, as far as whole warps up to `most` threads hold them.
inline void fit_block(Plan& plan, int64_t rows_wanted, int most) {
  const int64_t threads = next_power_of_two(rows_wanted) * plan.lanes;
  plan.block = static_cast<int>(std::clamp<int64_t>(round_up(threads, kWarp), kWarp, most));
}

// Bytes of activations through memory, what both sweeps need being read `reads` times.
inline int64_t activation_bytes(const Problem& problem, int64_t reads) {
  const Geometry& g = problem.geometry;
  const int64_t numel = g.samples * g.size;
  const int64_t tensor = numel * problem.element_size;
  const int64_t mask = problem.mask ? ceil_div(numel, 16 / problem.element_size) : 0;
  const int64_t residual = problem.residual ? tensor : 0;
  switch (problem.direction) {
    case Direction::kApply:
      return 2 * tensor + residual + mask;
    case Direction::kForward:
      return (reads + 1) * tensor + residual + mask;
    case Direction::kBackward:
      return reads * (2 * tensor + residual + mask) + tensor + (problem.dresidual ? tensor : 0);
  }
  return 0;
}

// Tiles of columns: as many pieces as `most_lanes` lanes hold, at least `step` (with which a tile
// ends on an access), ending where cells end if they can.
inline void cut_columns(Plan& plan, int64_t pieces, int64_t step, int most_lanes) {
  const int64_t cell = plan.pieces_per_cell;
  const int64_t closed = std::lcm(step, cell);
  const auto lanes_of = [&](int64_t count) { return count * plan.even / plan.vector; };
  plan.cells_per_tile = 1;
  plan.tiles_per_cell = 1;
  int64_t count = step;  // pieces of a tile
  if (lanes_of(closed) <= kMaxLanes) {
    const int64_t units = ceil_div(pieces, closed);
    const int64_t most = std::max<int64_t>(1, most_lanes / lanes_of(closed));
    // Equal tiles: 40 vectors are 20 + 20, not 32 + 8.
    count = ceil_div(units, ceil_div(units, most)) * closed;
    plan.cells_per_tile = count / cell;
  } else if (cell % step == 0) {
    // closed == cell: the largest divisor of the cell that fits.
    for (int64_t units = std::max<int64_t>(1, most_lanes / lanes_of(step)); units > 1; --units) {
      if (cell % (units * step) == 0) {
        count = units * step;
        break;
      }
    }
    plan.tiles_per_cell = cell / count;
  } else {
    const int64_t most = std::max<int64_t>(1, most_lanes / lanes_of(step));
    count = std::min(most, ceil_div(pieces, step)) * step;
    plan.cells_per_tile = 0;
  }
  plan.pieces_per_tile = count;
  plan.lanes = static_cast<int>(lanes_of(count));
  plan.column_tiles = ceil_div(pieces, count);
}

// Pattern, vector, lanes and tiles.
inline Plan cut_tiles(const Problem& problem, int most_lanes) {
  const Geometry& g = problem.geometry;
  Plan plan{};
  plan.channels_last = problem.channels_last;
  plan.ranges = std::max<int64_t>(1, g.groups / g.channels);
  const bool nested = g.channels % g.groups == 0 || g.groups % g.channels == 0;
  plan.pieces_per_cell = nested ? g.pieces / g.groups : 1;
  plan.pieces_per_channel = nested ? g.pieces / g.channels : 1;
  // All addresses of a sweep are multiples of the vector if the extents they are made of are. fp64
  // stays scalar: it is there for gradient checks.
  const int64_t widest = problem.element_size == 8 ? 1 : 16 / problem.element_size;
  const int64_t wide = problem.aligned ? widest : 1;
  const bool numbered = nested && g.pieces <= kMaxColumns;

  // With one position a channel NCHW memory is NHWC memory too.
  if (numbered && (problem.channels_last || g.spatial == 1)) {
    plan.pattern = Pattern::kColumns;
    plan.vector = static_cast<int>(g.channels % wide == 0 ? wide : 1);
    plan.even = 1;
    // 64 scalars are at least 128 bytes.
    cut_columns(plan, g.channels, plan.vector, plan.vector > 1 ? most_lanes : 2 * most_lanes);
    plan.tiles = g.sets * plan.ranges * plan.column_tiles;
    plan.rows_per_sample = g.spatial / plan.ranges;
    plan.rows_of_tile = g.pooled() * plan.rows_per_sample;
    return plan;
  }
  const bool whole = g.spatial % wide == 0 && g.group_size % wide == 0;
  if (numbered && !problem.channels_last && wide > 1 && g.size % wide == 0) {
    const int64_t step = wide / std::gcd(g.even, wide);
    const bool fits = step * g.even / wide <= kMaxLanes;
    if (fits && (!whole || g.even * problem.element_size < kShortRunBytes)) {
      plan.pattern = Pattern::kFrames;
      plan.vector = static_cast<int>(wide);
      plan.even = g.even;
      plan.ranges = 1;
      cut_columns(plan, g.pieces, step, std::max(most_lanes, kStreamingLanes));
      plan.tiles = g.sets * plan.column_tiles;
      plan.rows_per_sample = 1;
      plan.rows_of_tile = g.pooled();
      return plan;
    }
  }
  plan.pattern = Pattern::kRuns;
  plan.vector = static_cast<int>(!problem.channels_last && whole ? wide : 1);
  plan.lanes = 1;
  plan.column_tiles = plan.pieces_per_tile = plan.cells_per_tile = 1;
  plan.tiles_per_cell = plan.pieces_per_cell;
  plan.tiles = g.sets * g.pieces;
  // A piece lies within a channel and within a group.
  plan.rows_of_tile = g.pooled() * std::min(g.spatial, g.group_size) / plan.vector;
  return plan;
}

}  // namespace fusednorm
