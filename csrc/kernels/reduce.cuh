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

template <typename A>
FUSEDNORM_DEVICE Sums<A> shuffle_down(const Sums<A>& s, int delta) {
  return {__shfl_down_sync(kFullMask, s.h, delta), __shfl_down_sync(kFullMask, s.hx, delta)};
}

// Lane 0 gets the result; the others hold partial merges of no meaning.
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

// The block is rows x lanes threads, thread = row*lanes + lane, each with W states: reduces over
// rows, row 0 gets the results. The tree halves any number of rows, rounding up, so shared needs W
// entries for half the threads; entry (w, thread) keeps a warp's accesses to one w contiguous.
template <int W, typename S>
FUSEDNORM_DEVICE void rows_reduce(S (&s)[W], int lanes, S* shared) {
  const int thread = threadIdx.x;
  const int row = thread / lanes;
  constexpr int kPitch = kMaxBlock / 2;
  for (int rows = blockDim.x / lanes; rows > 1;) {
    const int half = (rows + 1) / 2;
    if (row >= half && row < rows) {
      FUSEDNORM_UNROLL
      for (int w = 0; w < W; ++w) shared[w * kPitch + thread - half * lanes] = s[w];
    }
    __syncthreads();
    if (row + half < rows) {
      FUSEDNORM_UNROLL
      for (int w = 0; w < W; ++w) s[w] = merge(s[w], shared[w * kPitch + thread]);
    }
    __syncthreads();
    rows = half;
  }
}

}  // namespace fusednorm
