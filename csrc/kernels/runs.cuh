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
  static constexpr int kWidth = 1;
  static constexpr int kShared = kMaxBlock / kWarp;

  FUSEDNORM_DEVICE Runs(const Geometry& g, const Plan& plan, int64_t block) : plan_(plan) {
    partial_ = block;
    const int64_t tile = block / plan.splits;
    const int64_t set = tile / g.pieces;
    const int64_t piece = tile - set * g.pieces;
    const int64_t start = g.piece_start(piece);
    channel_ = start / g.spatial;
    cell_ = set * g.groups + start / g.group_size;
    units_ = (g.piece_start(piece + 1) - start) / V;
    sample_step_ = g.size;
    const int64_t first_sample = set * g.pooled() * g.size;
    const int64_t nhwc = (start - channel_ * g.spatial) * g.channels + channel_;
    base_ = first_sample + (plan.channels_last ? nhwc : start);
    unit_step_ = plan.channels_last ? g.channels : V;
    // Shares are whole warps, so that a warp's accesses start on its own boundary.
    total_ = g.pooled() * units_;
    share_ = (total_ / plan.splits + kWarp) / kWarp * kWarp;
    first_ = (block - tile * plan.splits) * share_;
  }

  FUSEDNORM_DEVICE bool active() const { return true; }
  FUSEDNORM_DEVICE int64_t cell(int) const { return cell_; }
  FUSEDNORM_DEVICE int64_t channel(int) const { return channel_; }

  FUSEDNORM_DEVICE Cursor cursor() const {
    const int64_t end = first_ + share_ < total_ ? first_ + share_ : total_;
    return Cursor(first_ + threadIdx.x, end, blockDim.x, units_, base_, unit_step_, sample_step_);
  }

  template <typename S>
  FUSEDNORM_DEVICE void reduce(S (&state)[1], S* shared) const {
    state[0] = block_reduce(state[0], shared);
  }

  template <typename S>
  FUSEDNORM_DEVICE void store_partials(const S (&state)[1], S* partials) const {
    if (threadIdx.x == 0) partials[partial_] = state[0];
  }

 private:
  const Plan& plan_;
  int64_t partial_;
  int64_t channel_;
  int64_t cell_;
  int64_t base_;
  int64_t units_;
  int64_t unit_step_;
  int64_t sample_step_;
  int64_t first_;
  int64_t share_;
  int64_t total_;
};

}  // namespace fusednorm
