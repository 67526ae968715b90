// Reductions inside a block, in an order fixed by thread numbers alone: bitwise repeatable.
//
// A state is anything with merge(a, b), shuffle_down(s, delta) and an empty value S{}; merging is
// neither assumed commutative nor exactly associative. blockDim.x is any multiple of 32.
#pragma once

#include "platform.cuh"

namespace fusednorm {

// Two sums that travel together: of h, and of h times something.
template <typename A>
struct alignas(2 * sizeof(A)) Sums {
  A h;
  A hx;
};

template <typename A>
FUSEDNORM_DEVICE Sums<A> merge(const Sums<A>& a, const Sums<A>& b) {
  return {a.h + b.h, a.hx + b.hx};
}

FUSEDNORM_DEVICE float merge(float a, float b) {
  return a + b;
}

template <typename A>
FUSEDNORM_DEVICE Sums<A> shuffle_down(const Sums<A>& s, int delta) {
  return {__shfl_down_sync(kFullMask, s.h, delta), __shfl_down_sync(kFullMask, s.hx, delta)};
}

FUSEDNORM_DEVICE float shuffle_down(float s, int delta) {
  return __shfl_down_sync(kFullMask, s, delta);
}

// Every width-th lane gets the result of its `width` lanes, a power of two; the others hold partial
// merges of no meaning. All lanes of the warp take part.
template <typename S>
FUSEDNORM_DEVICE S segment_reduce(S s, int width) {
  for (int delta = width / 2; delta > 0; delta /= 2) s = merge(s, shuffle_down(s, delta));
  return s;
}

// Lane 0 gets the result.
template <typename S>
FUSEDNORM_DEVICE S warp_reduce(S s) {
  FUSEDNORM_UNROLL
  for (int delta = kWarp / 2; delta > 0; delta /= 2) s = merge(s, shuffle_down(s, delta));
  return s;
}

// Thread 0 gets the result. shared has an entry a warp; a barrier is due before it is used again.
template <typename S>
FUSEDNORM_DEVICE S block_reduce(S s, S* shared) {
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  s = warp_reduce(s);
  if (lane == 0) shared[warp] = s;
  __syncthreads();
  if (warp != 0) return s;
  return warp_reduce(lane < int(blockDim.x) / kWarp ? shared[lane] : S{});
}

// The block is rows x lanes threads, thread = row*lanes + lane, each with W states, and fewer than
// `lanes` idle ones: reduces over rows, row 0 gets the results. The tree halves any number of rows,
// rounding up, so shared needs W entries for half the threads; entry (w, thread) keeps a warp's
// accesses to one w contiguous. A barrier has passed when it returns, unless there is one row.
template <int W, typename S>
FUSEDNORM_DEVICE void rows_reduce(S (&s)[W], int lanes, S* shared) {
  const int thread = threadIdx.x;
  const int row = thread / lanes;
  const int pitch = blockDim.x / 2;
  for (int rows = blockDim.x / lanes; rows > 1;) {
    const int half = (rows + 1) / 2;
    if (row >= half && row < rows) {
      FUSEDNORM_UNROLL
      for (int w = 0; w < W; ++w) shared[w * pitch + thread - half * lanes] = s[w];
    }
    __syncthreads();
    if (row + half < rows) {
      FUSEDNORM_UNROLL
      for (int w = 0; w < W; ++w) s[w] = merge(s[w], shared[w * pitch + thread]);
    }
    __syncthreads();
    rows = half;
  }
}

// done(job, state) by one thread for each job: the merge of take(job, i) for i in [0, terms), each
// of its lanes taking every lanes-th. A job has as many lanes, within a warp, as there are.
template <typename S, typename Take, typename Done>
FUSEDNORM_DEVICE void reduce_jobs(int jobs, int64_t terms, const Take& take, const Done& done) {
  int lanes = kWarp;
  while (lanes > 1 && int64_t(lanes) * jobs > int64_t(blockDim.x)) lanes /= 2;
  const int lane = threadIdx.x % lanes;
  for (int base = 0; base < jobs; base += blockDim.x / lanes) {
    const int job = base + threadIdx.x / lanes;
    S state = {};
    if (job < jobs) {
      for (int64_t i = lane; i < terms; i += lanes) state = merge(state, take(job, i));
    }
    state = segment_reduce(state, lanes);
    if (job < jobs && lane == 0) done(job, state);
  }
}

}  // namespace fusednorm
