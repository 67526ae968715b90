// From partials to what the next sweep needs: a few numbers a cell or channel.
//
//   forward   per cell     mean, var = M2/count, rstd = 1/sqrt(var + eps), running statistics
//   backward  per cell     m0 = sum(w[c]*h)/count, m1 = sum(w[c]*h*xhat)/count
//             per channel  dbias = sum h, dweight = sum h*xhat
//
// Reads A*P*splits partials of 16 bytes (8 in the backward), nothing of x's size. ForwardCells and
// BackwardCells say what a partial is worth and what to do with a finished cell; the merging is
// done by the last block of a sweep (fold.cuh), by the group that holds a slice on the chip, or,
// without counters, by the kernels here.
#pragma once

#include "cursor.cuh"
#include "plan.h"
#include "reduce.cuh"
#include "welford.cuh"

namespace fusednorm {

template <typename A>
struct CombineArgs {
  Geometry geometry;
  int64_t splits;
  Moments<A>* moments;         // (A, P, splits)
  Sums<A>* sums;               // (A, P, splits)
  Moments<A>* merged_moments;  // of the fans of a tile: (tiles, cells of a tile, fans)
  Sums<A>* merged_sums;
  unsigned* counters;  // zeroed, left zeroed
  const A* weight;     // (C,) or null
  A* mean;             // (A, G), as are rstd, var, m0, m1
  A* rstd;
  A* var;  // or null
  A* m0;   // or null
  A* m1;
  A* dweight;                    // (C,)
  A* dbias;                      // (C,)
  A* running_mean;               // (G,) or null
  A* running_var;                // (G,) or null
  int64_t* num_batches_tracked;  // or null
  A eps;
  A momentum;
  A unbias;     // count/(count - 1)
  bool closed;  // a channel is a cell: dweight and dbias come with it
};

FUSEDNORM_DEVICE float square_root(float x) {
  return sqrtf(x);
}
FUSEDNORM_DEVICE double square_root(double x) {
  return sqrt(x);
}

template <typename A>
struct ForwardCells {
  using State = Moments<A>;
  const CombineArgs<A>& args;

  FUSEDNORM_DEVICE State partial(int64_t index, int64_t) const {
    return load_fresh(args.moments + index);
  }
  FUSEDNORM_DEVICE State* merged() const { return args.merged_moments; }

  // mean and rstd of the cell; `store` unless another CTA does.
  FUSEDNORM_DEVICE Sums<A> finish(int64_t cell, const State& state, bool store = true) const {
    const A mean = state.mean + state.tail;
    const A var = state.m2 / A(args.geometry.count());
    const A rstd = A(1) / square_root(var + args.eps);
    if (store) {
      args.mean[cell] = mean;
      if (args.var) args.var[cell] = var;
      args.rstd[cell] = rstd;
      const A keep = A(1) - args.momentum;
      if (args.running_mean) {
        args.running_mean[cell] = keep * args.running_mean[cell] + args.momentum * mean;
      }
      if (args.running_var) {
        args.running_var[cell] =
            keep * args.running_var[cell] + args.momentum * (var * args.unbias);
      }
      if (args.num_batches_tracked && cell == 0) *args.num_batches_tracked += 1;
    }
    return {mean, rstd};
  }
};

template <typename A>
struct BackwardCells {
  using State = Sums<A>;
  const CombineArgs<A>& args;

  FUSEDNORM_DEVICE A weight_of(int64_t channel) const {
    return args.weight ? args.weight[channel] : A(1);
  }

  FUSEDNORM_DEVICE State weighted(const State& state, int64_t piece) const {
    if (args.closed) return state;
    const A weight = weight_of(args.geometry.channel_of(piece));
    return {weight * state.h, weight * state.hx};
  }
  FUSEDNORM_DEVICE State partial(int64_t index, int64_t piece) const {
    return weighted(load_fresh(args.sums + index), piece);
  }
  FUSEDNORM_DEVICE State* merged() const { return args.merged_sums; }

  // m0 and m1 of the cell.
  FUSEDNORM_DEVICE Sums<A> finish(int64_t cell, const State& state, bool store = true) const {
    Sums<A> sums = state;
    if (args.closed) {
      const A weight = weight_of(cell);
      sums = {weight * state.h, weight * state.hx};
      if (store) {
        args.dbias[cell] = state.h;
        args.dweight[cell] = state.hx;
      }
    }
    const A count = A(args.geometry.count());
    sums = {sums.h / count, sums.hx / count};
    if (store && args.m0) {
      args.m0[cell] = sums.h;
      args.m1[cell] = sums.hx;
    }
    return sums;
  }
};

// One cell by a whole block; its partials lie side by side. shared has an entry a warp.
template <typename Cells>
FUSEDNORM_DEVICE void combine_cell(const Cells& cells, int64_t cell,
                                   typename Cells::State* shared) {
  const Geometry& g = cells.args.geometry;
  const int64_t splits = cells.args.splits;
  const int64_t set = cell / g.groups;
  const int64_t group = cell - set * g.groups;
  const int64_t first = g.piece_of(group * g.group_size) * splits;
  const int64_t last = g.piece_of((group + 1) * g.group_size) * splits;
  const int64_t base = set * g.pieces * splits;
  typename Cells::State state = {};
  for (int64_t i = first + threadIdx.x; i < last; i += blockDim.x) {
    state = merge(state, cells.partial(base + i, i / splits));
  }
  state = block_reduce(state, shared);
  if (threadIdx.x == 0) cells.finish(cell, state);
}

// dweight and dbias of one channel by a warp: its pieces' partials, set after set.
template <typename A>
FUSEDNORM_DEVICE void combine_channel(const CombineArgs<A>& args, int64_t channel) {
  const Geometry& g = args.geometry;
  const int64_t first = g.piece_of(channel * g.spatial) * args.splits;
  const int64_t units = g.piece_of((channel + 1) * g.spatial) * args.splits - first;
  const int lane = threadIdx.x % kWarp;
  Sums<A> state = {};
  for (Cursor cursor(lane, g.sets * units, kWarp, units, first, 1, g.pieces * args.splits);
       cursor.more(); cursor.step()) {
    state = merge(state, args.sums[cursor.offset]);
  }
  state = warp_reduce(state);
  if (lane == 0) {
    args.dbias[channel] = state.h;
    args.dweight[channel] = state.hx;
  }
}

// All channels, a warp each, by the whole grid.
template <typename A>
FUSEDNORM_DEVICE void combine_channels(const CombineArgs<A>& args) {
  const int64_t warps = blockDim.x / kWarp;
  for (int64_t channel = blockIdx.x * warps + threadIdx.x / kWarp; channel < args.geometry.channels;
       channel += gridDim.x * warps) {
    combine_channel(args, channel);
  }
}

template <typename A>
__global__ void __launch_bounds__(kMaxBlock) combine_kernel(const CombineArgs<A> args) {
  FUSEDNORM_SHARED(Moments<A>, shared, kMaxBlock / kWarp);
  for (int64_t cell = blockIdx.x; cell < args.geometry.cells(); cell += gridDim.x) {
    combine_cell(ForwardCells<A>{args}, cell, shared);
    __syncthreads();  // shared is reused by the next cell
  }
}

template <typename A>
__global__ void __launch_bounds__(kMaxBlock) backward_combine_kernel(const CombineArgs<A> args) {
  FUSEDNORM_SHARED(Sums<A>, shared, kMaxBlock / kWarp);
  for (int64_t cell = blockIdx.x; cell < args.geometry.cells(); cell += gridDim.x) {
    combine_cell(BackwardCells<A>{args}, cell, shared);
    __syncthreads();  // shared is reused by the next cell
  }
  if (!args.closed) combine_channels(args);
}

// Channels that several slices share, after the kernel that kept the slices on the chip.
template <typename A>
__global__ void __launch_bounds__(kMaxBlock) channels_kernel(const CombineArgs<A> args) {
  combine_channels(args);
}

}  // namespace fusednorm
