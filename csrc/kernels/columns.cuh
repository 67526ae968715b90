// The access pattern of NHWC: a tile is lanes*V neighbouring channels over a set's rows.
//
// A row is a (sample, position) of one of the Q = max(1, G/C) ranges into which groups cut a
// channel; range q of channel c is piece c*Q + q. Threads lie along channels first, so a warp reads
// contiguous memory, and then along rows. A thread keeps the state of its V channels in registers,
// and the block reduces them over its rows. Serves every G that divides C or is divided by it.
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
  static constexpr int kWidth = V;
  static constexpr int kShared = kMaxBlock / 2 * V;

  FUSEDNORM_DEVICE Columns(const Geometry& g, const Plan& plan, int64_t block)
      : geometry_(g), plan_(plan) {
    // block = ((set*Q + range)*column_tiles + column_tile)*splits + split
    const int64_t tile = block / plan.splits;
    const int64_t slab = tile / plan.column_tiles;
    split_ = block - tile * plan.splits;
    set_ = slab / plan.ranges;
    range_ = slab - set_ * plan.ranges;
    const int64_t column_tile = tile - slab * plan.column_tiles;
    channel_ = (column_tile * plan.lanes + threadIdx.x % plan.lanes) * V;
  }

  // Whether this thread has channels at all; V divides C, so it has all V or none.
  FUSEDNORM_DEVICE bool active() const { return channel_ < geometry_.channels; }

  FUSEDNORM_DEVICE int64_t channel(int w) const { return channel_ + w; }

  FUSEDNORM_DEVICE int64_t cell(int w) const {
    // Either Q = 1 and a group is C/G channels, or a group is one range of one channel. Channel
    // numbers fit 32 bits, where a division is several times cheaper.
    const uint32_t per_group = geometry_.channels > geometry_.groups
                                   ? uint32_t(geometry_.channels / geometry_.groups)
                                   : 1u;
    const int64_t group = uint32_t(channel_ + w) / per_group * plan_.ranges + range_;
    return set_ * geometry_.groups + group;
  }

  FUSEDNORM_DEVICE Cursor cursor() const {
    const int64_t rows_of_range = geometry_.spatial / plan_.ranges;
    const int64_t total = geometry_.pooled() * rows_of_range;
    const int64_t share = (total + plan_.splits - 1) / plan_.splits;
    const int64_t first = split_ * share;
    const int64_t last = first + share < total ? first + share : total;
    const int64_t base = set_ * geometry_.pooled() * geometry_.size +
                         range_ * rows_of_range * geometry_.channels + channel_;
    return Cursor(first + threadIdx.x / plan_.lanes, active() ? last : 0, blockDim.x / plan_.lanes,
                  rows_of_range, base, geometry_.channels, geometry_.size);
  }

  template <typename S>
  FUSEDNORM_DEVICE void reduce(S (&state)[V], S* shared) const {
    rows_reduce(state, plan_.lanes, shared);
  }

  template <typename S>
  FUSEDNORM_DEVICE void store_partials(const S (&state)[V], S* partials) const {
    if (threadIdx.x >= unsigned(plan_.lanes) || !active()) return;
    FUSEDNORM_UNROLL
    for (int w = 0; w < V; ++w) {
      const int64_t piece = (channel_ + w) * plan_.ranges + range_;
      partials[(set_ * geometry_.pieces + piece) * plan_.splits + split_] = state[w];
    }
  }

 private:
  const Geometry& geometry_;
  const Plan& plan_;
  int64_t split_;
  int64_t set_;
  int64_t range_;
  int64_t channel_;
};

}  // namespace fusednorm
