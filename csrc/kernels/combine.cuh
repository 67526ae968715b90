// From partials to what the next sweep needs: a few numbers a cell or channel.
//
//   combine           per cell     mean, var = M2/count, rstd = 1/sqrt(var + eps)
//   backward_combine  per cell     m0 = sum(w[c]*h)/count, m1 = sum(w[c]*h*xhat)/count
//                     per channel  dbias = sum h, dweight = sum h*xhat
//
// One block a cell or channel; its threads take the partials in turn and merge in the fixed order
// of block_reduce. Reads A*P*splits partials of 16 bytes (8 in the backward), nothing of x's size.
// The work of a cell is a device function of a block, so that a sweep's last block may run it.
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
  const Moments<A>* moments;  // (A, P, splits)
  const Sums<A>* sums;        // (A, P, splits)
  const A* weight;            // (C,) or null
  A* mean;                    // (A, G)
  A* rstd;                    // (A, G)
  A* var;                     // (A, G)
  A* m0;                      // (A, G)
  A* m1;                      // (A, G)
  A* dweight;                 // (C,)
  A* dbias;                   // (C,)
  A eps;
};

FUSEDNORM_DEVICE float square_root(float x) {
  return sqrtf(x);
}
FUSEDNORM_DEVICE double square_root(double x) {
  return sqrt(x);
}

template <typename A>
FUSEDNORM_DEVICE void combine_cell(const CombineArgs<A>& args, int64_t cell, Moments<A>* shared) {
  const Geometry& g = args.geometry;
  const int64_t set = cell / g.groups;
  const int64_t group = cell - set * g.groups;
  const int64_t first = g.piece_of(group * g.group_size) * args.splits;
  const int64_t last = g.piece_of((group + 1) * g.group_size) * args.splits;
  const Moments<A>* partials = args.moments + set * g.pieces * args.splits;
  Moments<A> state = {};
  for (int64_t i = first + threadIdx.x; i < last; i += blockDim.x)
    state = merge(state, partials[i]);
  state = block_reduce(state, shared);
  if (threadIdx.x == 0) {
    const A var = state.m2 / A(g.count());
    args.mean[cell] = state.mean + state.tail;
    args.var[cell] = var;
    args.rstd[cell] = A(1) / square_root(var + args.eps);
  }
}

template <typename A>
__global__ void __launch_bounds__(kMaxBlock) combine_kernel(const CombineArgs<A> args) {
  FUSEDNORM_SHARED(Moments<A>, shared, kMaxBlock / kWarp);
  for (int64_t cell = blockIdx.x; cell < args.geometry.cells(); cell += gridDim.x) {
    combine_cell(args, cell, shared);
    __syncthreads();  // shared is reused by the next cell
  }
}

template <typename A>
FUSEDNORM_DEVICE void backward_combine_cell(const CombineArgs<A>& args, int64_t cell,
                                            Sums<A>* shared) {
  const Geometry& g = args.geometry;
  const int64_t set = cell / g.groups;
  const int64_t group = cell - set * g.groups;
  const int64_t first = g.piece_of(group * g.group_size) * args.splits;
  const int64_t last = g.piece_of((group + 1) * g.group_size) * args.splits;
  const Sums<A>* partials = args.sums + set * g.pieces * args.splits;
  Sums<A> state = {};
  for (int64_t i = first + threadIdx.x; i < last; i += blockDim.x) {
    const A weight = args.weight ? args.weight[g.channel_of(i / args.splits)] : A(1);
    state = merge(state, {weight * partials[i].h, weight * partials[i].hx});
  }
  state = block_reduce(state, shared);
  if (threadIdx.x == 0) {
    args.m0[cell] = state.h / A(g.count());
    args.m1[cell] = state.hx / A(g.count());
  }
}

template <typename A>
FUSEDNORM_DEVICE void backward_combine_channel(const CombineArgs<A>& args, int64_t channel,
                                               Sums<A>* shared) {
  const Geometry& g = args.geometry;
  const int64_t first = g.piece_of(channel * g.spatial) * args.splits;
  const int64_t units = g.piece_of((channel + 1) * g.spatial) * args.splits - first;
  Sums<A> state = {};
  for (Cursor cursor(threadIdx.x, g.sets * units, blockDim.x, units, first, 1,
                     g.pieces * args.splits);
       cursor.more(); cursor.step()) {
    state = merge(state, args.sums[cursor.offset]);
  }
  state = block_reduce(state, shared);
  if (threadIdx.x == 0) {
    args.dbias[channel] = state.h;
    args.dweight[channel] = state.hx;
  }
}

template <typename A>
__global__ void __launch_bounds__(kMaxBlock) backward_combine_kernel(const CombineArgs<A> args) {
  FUSEDNORM_SHARED(Sums<A>, shared, kMaxBlock / kWarp);
  const int64_t cells = args.geometry.cells();
  const int64_t jobs = cells + args.geometry.channels;
  for (int64_t job = blockIdx.x; job < jobs; job += gridDim.x) {
    if (job < cells) {
      backward_combine_cell(args, job, shared);
    } else {
      backward_combine_channel(args, job - cells, shared);
    }
    __syncthreads();  // shared is reused by the next job
  }
}

}  // namespace fusednorm
