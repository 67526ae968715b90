// Count, mean and centred second moment of a set, and their merge (Chan, Golub, LeVeque).
//
//   n = na + nb,  delta = mean_b - mean_a
//   mean = mean_a + delta * nb/n,  M2 = M2_a + M2_b + delta^2 * na*nb/n
//
// The mean is kept as an unevaluated sum mean + tail. Without the tail every merge rounds to a unit
// in the last place of the mean, which at mean/sigma = 1e4 in fp32 is 1e-3 sigma and adds up; with
// it the result is the correctly rounded mean for seven more additions a merge, and a merge serves
// a chunk. count is a number of the accumulation type: above 2^24 it rounds in fp32, which changes
// the weights of a merge by one part in 10^7; whoever divides M2 at the end uses the exact integer
// count instead.
#pragma once

#include "vec.cuh"

namespace fusednorm {

template <typename A>
struct alignas(16) Moments {
  A count;
  A mean;
  A tail;
  A m2;
};

// The merge where count = a.count + b.count and share = b.count/count are known: a sweep has them
// in common for all its columns. Either side may be empty.
template <typename A>
FUSEDNORM_DEVICE Moments<A> merge(const Moments<A>& a, const Moments<A>& b, A count, A share) {
  const A delta = b.mean - a.mean;
  const A delta_tail = b.tail - a.tail;
  const A step = delta * share;
  // Knuth's two-sum: sum + error == a.mean + step exactly, whichever is larger.
  const A sum = a.mean + step;
  const A moved = sum - a.mean;
  const A error = (a.mean - (sum - moved)) + (step - moved);
  const A full = delta + delta_tail;
  return {count, sum, a.tail + (error + delta_tail * share),
          // In this order an empty side gives 0 even where full^2 overflows.
          a.m2 + b.m2 + full * share * a.count * full};
}

template <typename A>
FUSEDNORM_DEVICE Moments<A> merge(const Moments<A>& a, const Moments<A>& b) {
  const A count = a.count + b.count;
  // Threads and splits without elements bring empty sets.
  return merge(a, b, count, count > 0 ? b.count / count : A(0));
}

template <typename A>
FUSEDNORM_DEVICE Moments<A> shuffle_down(const Moments<A>& s, int delta) {
  return {__shfl_down_sync(kFullMask, s.count, delta), __shfl_down_sync(kFullMask, s.mean, delta),
          __shfl_down_sync(kFullMask, s.tail, delta), __shfl_down_sync(kFullMask, s.m2, delta)};
}

// Adds a chunk of values, the live ones of U rows of V, to W states: column v goes to state v % W.
// Row 0 is live. Two passes over registers, about the chunk's first value p: the mean of x - p,
// then M2 about that mean. The differences are as small as the spread of the data, so a large mean
// costs no digits, and a constant column gives M2 = 0 exactly. Two divisions a chunk, none an
// element.
template <int W, int U, int V, typename T, typename A>
FUSEDNORM_DEVICE void absorb(Moments<A> (&state)[W], const Vec<T, V> (&x)[U],
                             const bool (&live)[U]) {
  int rows = 0;
  FUSEDNORM_UNROLL
  for (int u = 0; u < U; ++u) rows += live[u];
  const A count = A(rows * (V / W));
  const A inverse = A(1) / count;
  const A total = state[0].count + count;
  const A share = count / total;
  FUSEDNORM_UNROLL
  for (int w = 0; w < W; ++w) {
    const A pivot = widen(x[0].at[w]);
    A sum = 0;
    FUSEDNORM_UNROLL
    for (int u = 0; u < U; ++u) {
      if (!live[u]) continue;
      FUSEDNORM_UNROLL
      for (int v = w; v < V; v += W) sum += widen(x[u].at[v]) - pivot;
    }
    const A tail = sum * inverse;
    A m2 = 0;
    FUSEDNORM_UNROLL
    for (int u = 0; u < U; ++u) {
      if (!live[u]) continue;
      FUSEDNORM_UNROLL
      for (int v = w; v < V; v += W) {
        const A centred = (widen(x[u].at[v]) - pivot) - tail;
        m2 += centred * centred;
      }
    }
    state[w] = merge(state[w], {count, pivot, tail, m2}, total, share);
  }
}

}  // namespace fusednorm
