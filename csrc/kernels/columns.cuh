// The access pattern of NHWC, and of NCHW with short or odd runs: a tile is lanes*V neighbouring
// elements of a row, over a set's rows.
//
//   columns  a row is a (sample, position) of one of the Q = max(1, G/C) ranges into which groups
//            cut a channel, and holds C channels; range q of channel c is piece c*Q + q
//   frames   a row is a sample of NCHW, D elements, and holds P pieces of `even` elements each
//
// Threads lie along the row first, so a warp reads contiguous memory, and then along rows; with
// lanes no power of two, the last threads idle. A thread keeps the states of its V columns in
// registers, the block reduces them over its rows and, in frames, over the columns of a piece.
// Serves every G that divides C or is divided by it.
#pragma once

#include "cursor.cuh"
#include "plan.h"
#include "reduce.cuh"
#include "vec.cuh"

namespace fusednorm {

template <typename T, int V>
class Columns {
 public:
  using Element = T;
  static constexpr int kVector = V;
  static constexpr bool kRuns = false;
  static constexpr int kWidth = V;
  static constexpr int kShared = kMaxBlock / 2 * V;

  FUSEDNORM_DEVICE Columns(const Geometry& g, const Plan& plan, int64_t job)
      : geometry_(g), plan_(plan) {
    // job = ((set*Q + range)*column_tiles + column_tile)*splits + split
    const int64_t tile = job / plan.splits;
    split_ = int(job - tile * plan.splits);
    const int64_t slab = tile / plan.column_tiles;
    set_ = slab / plan.ranges;
    range_ = uint32_t(slab - set_ * plan.ranges);
    first_piece_ = uint32_t((tile - slab * plan.column_tiles) * plan.pieces_per_tile);
    const int64_t left = g.pieces / plan.ranges - first_piece_;
    pieces_ = int(left < plan.pieces_per_tile ? left : plan.pieces_per_tile);
    row_ = threadIdx.x / plan.lanes;
    column_ = (int(threadIdx.x) - row_ * plan.lanes) * V;
  }

  // Whether this thread has columns at all; V divides what is left of a row, so all V or none.
  FUSEDNORM_DEVICE bool active() const {
    return row_ < plan_.rows() && column_ < pieces_ * int(plan_.even);
  }

  FUSEDNORM_DEVICE int pieces() const { return pieces_; }
  FUSEDNORM_DEVICE int local(int w) const { return (column_ + w) / int(plan_.even); }
  // Pieces are numbered in 32 bits, where a division is several times cheaper.
  FUSEDNORM_DEVICE uint32_t piece(int local) const {
    return (first_piece_ + local) * uint32_t(plan_.ranges) + range_;
  }
  FUSEDNORM_DEVICE int64_t cell(int local) const {
    return set_ * geometry_.groups + piece(local) / uint32_t(plan_.pieces_per_cell);
  }
  FUSEDNORM_DEVICE int64_t channel(int local) const {
    return piece(local) / uint32_t(plan_.pieces_per_channel);
  }
  FUSEDNORM_DEVICE int64_t partial(int local) const {
    return (set_ * geometry_.pieces + piece(local)) * plan_.splits + split_;
  }

  FUSEDNORM_DEVICE int64_t count() const {
    const int64_t rows = last() - first();
    return rows > 0 ? rows * plan_.even : 0;
  }
  FUSEDNORM_DEVICE int64_t anchor(int local) const {
    return base() + (first_piece_ + local) * plan_.even;
  }

  FUSEDNORM_DEVICE Cursor cursor(bool back = false) const {
    return Cursor(first() + row_, active() ? last() : 0, plan_.rows(), plan_.rows_per_sample,
                  base() + first_piece_ * plan_.even + column_, geometry_.channels, geometry_.size,
                  back);
  }

  // put(piece, state) by one thread for each piece of the tile; a barrier is due before shared is
  // used again.
  template <typename S, typename Put>
  FUSEDNORM_DEVICE void reduce(S (&state)[V], S* shared, const Put& put) const {
    rows_reduce(state, plan_.lanes, shared);
    const bool owner = row_ == 0 && active();
    if (plan_.even == 1) {
      FUSEDNORM_UNROLL
      for (int w = 0; w < V; ++w) {
        if (owner) put(column_ + w, state[w]);
      }
      return;
    }
    FUSEDNORM_UNROLL
    for (int w = 0; w < V; ++w) {
      if (owner) shared[column_ + w] = state[w];
    }
    __syncthreads();
    // A warp a piece.
    const int lane = threadIdx.x % kWarp;
    for (int piece = threadIdx.x / kWarp; piece < pieces_; piece += blockDim.x / kWarp) {
      S merged = {};
      for (int i = lane; i < plan_.even; i += kWarp) {
        merged = merge(merged, shared[piece * plan_.even + i]);
      }
      merged = warp_reduce(merged);
      if (lane == 0) put(piece, merged);
    }
  }

 private:
  FUSEDNORM_DEVICE int64_t share() const {
    return (plan_.rows_of_tile + plan_.splits - 1) / plan_.splits;
  }
  FUSEDNORM_DEVICE int64_t first() const { return split_ * share(); }
  FUSEDNORM_DEVICE int64_t last() const {
    const int64_t end = first() + share();
    return end < plan_.rows_of_tile ? end : plan_.rows_of_tile;
  }
  // The first row of the set and range.
  FUSEDNORM_DEVICE int64_t base() const {
    return set_ * geometry_.pooled() * geometry_.size +
           range_ * plan_.rows_per_sample * geometry_.channels;
  }

  const Geometry& geometry_;
  const Plan& plan_;
  // In 32 bits what fits: all of it is live through a sweep.
  int64_t set_;
  int split_;
  uint32_t range_;
  uint32_t first_piece_;
  int pieces_;
  int row_;
  int column_;
};

}  // namespace fusednorm
