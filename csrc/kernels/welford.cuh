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

// Either side may be empty, as threads and splits without elements are.
template <typename A>
FUSEDNORM_DEVICE Moments<A> merge(const Moments<A>& a, const Moments<A>& b) {
  const A count = a.count + b.count;
  const A share = count > 0 ? b.count / count : A(0);
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
FUSEDNORM_DEVICE Moments<A> shuffle_down(const Moments<A>& s, int delta) {
  return {__shfl_down_sync(kFullMask, s.count, delta), __shfl_down_sync(kFullMask, s.mean, delta),
          __shfl_down_sync(kFullMask, s.tail, delta), __shfl_down_sync(kFullMask, s.m2, delta)};
}

// Rows after which a thread's running sums are folded into its moments.
constexpr int kRowsAFold = 16;

// The moments of W columns, fed U rows of V values at a time; value v goes to column v % W.
//
// Values are summed about the column's mean so far, at first about its first value: differences as
// small as the spread of the data, so a large mean costs no digits, and a constant column gives
// M2 = 0 exactly. Four instructions a value; two divisions every kRowsAFold rows. Cancellation in
// sum(d^2) - sum(d)^2/n stays harmless: the pivot is itself one of the values, or a mean that the
// merge brings back in with its own delta^2, so that difference is in M2 anyway.
template <typename A, int W>
struct Gather {
  A count = 0;
  A mean[W] = {};
  A tail[W] = {};
  A m2[W] = {};
  A sum[W] = {};     // of x - mean, of the rows not yet folded
  A square[W] = {};  // of its square
  int rows = 0;
  int values = 0;  // a row has for each column

  // Row 0 is live.
  template <int U, int V, typename T>
  FUSEDNORM_DEVICE void absorb(const Vec<T, V> (&x)[U], const bool (&live)[U]) {
    values = V / W;
    if (count == 0 && rows == 0) {
      FUSEDNORM_UNROLL
      for (int w = 0; w < W; ++w) mean[w] = widen(x[0].at[w]);
    }
    FUSEDNORM_UNROLL
    for (int u = 0; u < U; ++u) {
      if (!live[u]) continue;
      FUSEDNORM_UNROLL
      for (int v = 0; v < V; ++v) {
        const A centred = widen(x[u].at[v]) - mean[v % W];
        sum[v % W] += centred;
        square[v % W] += centred * centred;
      }
      ++rows;
    }
    if (rows >= kRowsAFold) fold();
  }

  FUSEDNORM_DEVICE void fold() {
    const A added = A(rows * values);
    const A inverse = A(1) / added;
    const A total = count + added;
    const A share = added / total;
    FUSEDNORM_UNROLL
    for (int w = 0; w < W; ++w) {
      const A chunk = sum[w] * inverse;
      const A own = square[w] - sum[w] * chunk;
      const A delta = chunk - tail[w];
      // Not by max, which would drop a NaN; and an empty side gives 0 even where delta^2 overflows.
      m2[w] += (own < 0 ? A(0) : own) + delta * share * count * delta;
      const A moved = tail[w] + delta * share;
      // Knuth's two-sum: mean + tail stays exact.
      const A next = mean[w] + moved;
      const A back = next - mean[w];
      tail[w] = (mean[w] - (next - back)) + (moved - back);
      mean[w] = next;
      sum[w] = square[w] = 0;
    }
    count = total;
    rows = 0;
  }

  FUSEDNORM_DEVICE void finish(Moments<A> (&state)[W]) {
    if (rows > 0) fold();
    FUSEDNORM_UNROLL
    for (int w = 0; w < W; ++w) state[w] = {count, mean[w], tail[w], m2[w]};
  }
};

}  // namespace fusednorm
