// The combine inside the sweep: the last block to arrive merges what all have left behind.
//
// A block stores its partials and adds one to a counter; whoever completes the count merges. Which
// block that is changes from run to run, the order of the merge does not: by index, so results are
// bitwise repeatable. The last one also sets the counter back to zero for the next launch.
//
//   runs             a counter a cell; the whole block merges its pieces*splits partials
//   columns, frames  hundreds of splits of hundreds of cells would be one block's work for tens of
//                    microseconds. So splits arrive in fans of about sqrt(splits): the last of each
//                    fan merges it, the last fan of a cell's tiles merges the fans.
//
// Hazards: a partial must be in L2 before the counter says so (fence before the addition), and must
// not be read from a line that L1 had before (fence after it, and load_fresh).
#pragma once

#include "combine.cuh"

namespace fusednorm {

// Whether this block is the last of `expected`; in all threads. One block needs no counter.
FUSEDNORM_DEVICE bool arrive_last(unsigned* counters, int64_t which, int64_t expected, int* flag) {
  __syncthreads();  // the block's partials are stored; flag is free
  if (expected == 1) return true;
  unsigned* const counter = counters + which;
  if (threadIdx.x == 0) {
    __threadfence();
    const bool last = atomicAdd(counter, 1u) + 1u == unsigned(expected);
    if (last) *counter = 0;
    __threadfence();
    *flag = last;
  }
  __syncthreads();
  return *flag != 0;
}

template <typename Tile, typename Cells>
FUSEDNORM_DEVICE void fold_runs(const Tile& tile, const Plan& plan, const Cells& cells,
                                typename Cells::State* shared, int* flag) {
  const Geometry& g = cells.args.geometry;
  const int64_t cell = tile.cell(0);
  const int64_t group = cell % g.groups;
  const int64_t pieces = g.piece_of((group + 1) * g.group_size) - g.piece_of(group * g.group_size);
  if (!arrive_last(cells.args.counters, cell, pieces * plan.splits, flag)) return;
  combine_cell(cells, cell, shared);
}

template <typename Tile, typename Cells>
FUSEDNORM_DEVICE void fold_columns(const Tile& tile, const Plan& plan, const Cells& cells,
                                   int64_t job, int* flag) {
  using State = typename Cells::State;
  const int64_t number = job / plan.splits;  // of the tile
  const int64_t split = job - number * plan.splits;
  unsigned* const counters = cells.args.counters;
  const int64_t fan = split / plan.fan;
  const int64_t first = fan * plan.fan;
  const int64_t splits = plan.splits - first < plan.fan ? plan.splits - first : plan.fan;
  if (!arrive_last(counters, number * plan.fans + fan, splits, flag)) return;

  // What the tile has of cells: complete ones, or a part of one.
  const bool whole = plan.tiles_per_cell == 1;
  const int width = whole ? int(plan.pieces_per_cell) : tile.pieces();
  const int parts = tile.pieces() / width;
  const bool two_levels = plan.two_levels();
  const int64_t place = number * plan.cells_per_tile;
  reduce_jobs<State>(
      parts, width * splits,
      [&](int64_t part, int64_t i) {
        const int piece = int(part * width + i / splits);
        return cells.partial(tile.partial(piece) - split + first + i % splits, tile.piece(piece));
      },
      [&](int64_t part, const State& state) {
        if (two_levels) {
          cells.merged()[(place + part) * plan.fans + fan] = state;
        } else {
          cells.finish(tile.cell(int(part * width)), state);
        }
      });
  if (!two_levels) return;

  const int64_t level = plan.fan > 1 ? plan.tiles * plan.fans : 0;
  const int64_t component = number / plan.tiles_per_cell;
  const int64_t fans = plan.fans * plan.tiles_per_cell;
  if (!arrive_last(counters, level + component, fans, flag)) return;
  const int64_t start = component * plan.tiles_per_cell * plan.cells_per_tile;
  reduce_jobs<State>(
      parts, fans,
      [&](int64_t part, int64_t i) {
        return load_fresh(cells.merged() + (start + part) * plan.fans + i);
      },
      [&](int64_t part, const State& state) { cells.finish(tile.cell(int(part * width)), state); });
}

template <typename Tile, typename Cells>
FUSEDNORM_DEVICE void fold(const Tile& tile, const Plan& plan, const Cells& cells, int64_t job,
                           typename Cells::State* shared, int* flag) {
  if constexpr (Tile::kRuns) {
    fold_runs(tile, plan, cells, shared, flag);
  } else {
    fold_columns(tile, plan, cells, job, flag);
  }
}

}  // namespace fusednorm
