// The access pattern of NCHW: a tile is one piece of a set, `pooled` runs of the same length.
//
// A piece has one channel and one group, so everything a sweep needs besides x is uniform over the
// block. Runs start at sample*D + start in memory; vectors are used where S and L are multiples of
// them, which makes every run start and end on one. The same walk with stride C reads NHWC memory
// for groups that straddle channels: correct for any G, and slow.
#pragma once

#include "cursor.cuh"
#include "plan.h"
#include "reduce.cuh"
#include "vec.cuh"

namespace fusednorm {

template <typename T, int V>
class Runs {
 public:
  using Element = T;
  static constexpr int kVector = V;
  static constexpr bool kRuns = true;
  static constexpr int kWidth = 1;
  static constexpr int kShared = kMaxBlock / kWarp;

  FUSEDNORM_DEVICE Runs(const Geometry& g, const Plan& plan, int64_t job) {
    partial_ = job;
    const int64_t tile = job / plan.splits;
    const int64_t set = tile / g.pieces;
    piece_ = tile - set * g.pieces;
    const int64_t start = g.piece_start(piece_);
    channel_ = start / g.spatial;
    cell_ = set * g.groups + start / g.group_size;
    units_ = (g.piece_start(piece_ + 1) - start) / V;
    sample_step_ = g.size;
    const int64_t first_sample = set * g.pooled() * g.size;
    const int64_t nhwc = (start - channel_ * g.spatial) * g.channels + channel_;
    base_ = first_sample + (plan.channels_last ? nhwc : start);
    unit_step_ = plan.channels_last ? g.channels : V;
    // Shares are whole warps, so that a warp's accesses start on its own boundary.
    const int64_t total = g.pooled() * units_;
    const int64_t share = (total + plan.splits * kWarp - 1) / (plan.splits * kWarp) * kWarp;
    first_ = (job - tile * plan.splits) * share;
    last_ = first_ + share < total ? first_ + share : total;
  }

  FUSEDNORM_DEVICE bool active() const { return true; }

  // Pieces of the tile, numbered within it, and the piece of the thread's column w.
  FUSEDNORM_DEVICE int pieces() const { return 1; }
  FUSEDNORM_DEVICE int local(int) const { return 0; }
  FUSEDNORM_DEVICE int64_t piece(int) const { return piece_; }
  FUSEDNORM_DEVICE int64_t cell(int) const { return cell_; }
  FUSEDNORM_DEVICE int64_t channel(int) const { return channel_; }
  FUSEDNORM_DEVICE int64_t partial(int) const { return partial_; }

  // Elements of a piece in this share, and the first one of the piece in memory.
  FUSEDNORM_DEVICE int64_t count() const { return first_ < last_ ? (last_ - first_) * V : 0; }
  FUSEDNORM_DEVICE int64_t anchor(int) const { return base_; }

  FUSEDNORM_DEVICE Cursor cursor(bool back = false) const {
    return Cursor(first_ + threadIdx.x, last_, blockDim.x, units_, base_, unit_step_, sample_step_,
                  back);
  }

  // put(piece, state) by one thread for each piece of the tile; a barrier is due before shared is
  // used again.
  template <typename S, typename Put>
  FUSEDNORM_DEVICE void reduce(S (&state)[1], S* shared, const Put& put) const {
    state[0] = block_reduce(state[0], shared);
    if (threadIdx.x == 0) put(0, state[0]);
  }

 private:
  int64_t partial_;
  int64_t piece_;
  int64_t channel_;
  int64_t cell_;
  int64_t base_;
  int64_t units_;
  int64_t unit_step_;
  int64_t sample_step_;
  int64_t first_;
  int64_t last_;
};

}  // namespace fusednorm
