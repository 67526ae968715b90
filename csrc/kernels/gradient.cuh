// What a thread does with the accesses of a batch: the pointwise half of every kernel.
//
// Streaming sweeps bring x from memory, the on-chip kernels from shared memory; from there on both
// run the code of this file.
#pragma once

#include "activation.cuh"
#include "combine.cuh"
#include "cursor.cuh"
#include "plan.h"
#include "vec.cuh"

namespace fusednorm {

template <typename T>
struct SweepArgs {
  using A = Accumulator<T>;

  Geometry geometry;
  Plan plan;
  const T* x;  // (N, C, S) in either layout, as are dy, residual, out, dresidual
  const T* dy;
  const T* residual;  // or null
  uint8_t* mask;      // a byte for 16 bytes of y, or null: written forward, read backward
  T* out;             // y or dx
  T* dresidual;       // or null
  const A* weight;    // (C,) or null
  const A* bias;      // (C,) or null
  const A* mean;      // (A, G)
  const A* rstd;      // (A, G)
  const A* m0;        // (A, G)
  const A* m1;        // (A, G)
  CombineArgs<A> combine;
  A live;
  A slope;
  int act;
  bool folded;    // the first sweep's last block combines
  bool channels;  // the second sweep sums up channels of several cells
};

// z = (x - mean)*scale + shift
template <typename A>
struct Affine {
  A mean;
  A scale;
  A shift;
};

template <typename T>
FUSEDNORM_DEVICE Affine<Accumulator<T>> affine_of(const SweepArgs<T>& args, Accumulator<T> mean,
                                                  Accumulator<T> rstd, int64_t channel) {
  using A = Accumulator<T>;
  return {mean, rstd * (args.weight ? args.weight[channel] : A(1)),
          args.bias ? args.bias[channel] : A(0)};
}

template <typename Tile, typename T>
FUSEDNORM_DEVICE void load_affine(const SweepArgs<T>& args, const Tile& tile,
                                  Affine<Accumulator<T>> (&affine)[Tile::kWidth]) {
  FUSEDNORM_UNROLL
  for (int w = 0; w < Tile::kWidth; ++w) {
    affine[w] = {};
    if (!tile.active()) continue;
    const int64_t cell = tile.cell(tile.local(w));
    affine[w] = affine_of(args, args.mean[cell], args.rstd[cell], tile.channel(tile.local(w)));
  }
}

// dx = scale*h - (shift0 + (x - mean)*scale1)
template <typename T, typename A>
FUSEDNORM_DEVICE void load_means(const SweepArgs<T>& args, A rstd, const Sums<A>& means, A& shift0,
                                 A& scale1) {
  shift0 = rstd * args.live * means.h;
  scale1 = rstd * (rstd * args.live * means.hx);
}

// The live accesses of a batch, all issued before the first is used; zeros elsewhere.
template <bool kLast = false, int V, typename T, int U>
FUSEDNORM_DEVICE void fetch(const T* base, const Batch<U>& batch, Vec<T, V> (&packed)[U]) {
  FUSEDNORM_UNROLL
  for (int u = 0; u < U; ++u) {
    packed[u] = {};
    if (batch.live[u]) packed[u] = load<V, kLast>(base, batch.offset[u]);
  }
}

// centred = x - mean, and z before the activation. Without a residual, `residual` is zero.
template <int W, int V, typename T, typename A>
FUSEDNORM_DEVICE void preactivation(const Affine<A> (&affine)[W], const Vec<T, V>& x,
                                    const Vec<T, V>& residual, A (&centred)[V], A (&z)[V]) {
  FUSEDNORM_UNROLL
  for (int v = 0; v < V; ++v) {
    const Affine<A>& a = affine[v % W];
    centred[v] = widen(x.at[v]) - a.mean;
    z[v] = centred[v] * a.scale + a.shift + widen(residual.at[v]);
  }
}

// y of a batch of x, and its mask.
template <int U, int V, int W, typename T, typename A>
FUSEDNORM_DEVICE void normalize(const SweepArgs<T>& args, const Affine<A> (&affine)[W],
                                const Batch<U>& batch, const Vec<T, V> (&x)[U]) {
  Vec<T, V> residual[U] = {};
  if (args.residual) fetch<true>(args.residual, batch, residual);
  FUSEDNORM_UNROLL
  for (int u = 0; u < U; ++u) {
    if (!batch.live[u]) continue;
    A centred[V];
    A z[V];
    preactivation(affine, x[u], residual[u], centred, z);
    activate(args.act, args.slope, z);
    const Vec<T, V> y = pack<T>(z);
    store(args.out, batch.offset[u], y);
    // Scalar threads would share a byte; theirs are written by mask_kernel.
    if (V > 1 && args.mask) args.mask[batch.offset[u] / V] = uint8_t(positive(y));
  }
}

// centred = x - mean and h = act'(z)*dy of one access; with a mask h = dy, not masked yet.
template <int V, int W, typename T, typename A>
FUSEDNORM_DEVICE void unmasked(const SweepArgs<T>& args, const Affine<A> (&affine)[W],
                               const Vec<T, V>& x, const Vec<T, V>& dy, const Vec<T, V>& residual,
                               A (&centred)[V], A (&h)[V]) {
  A z[V];
  preactivation(affine, x, residual, centred, z);
  FUSEDNORM_UNROLL
  for (int v = 0; v < V; ++v) h[v] = widen(dy.at[v]);
  if (!args.mask) activate_backward(args.act, args.slope, z, h);
}

template <bool kLast, bool kResidual, int U, int V, int W, typename T, typename A, typename Visit>
FUSEDNORM_DEVICE void walk_upstream(const SweepArgs<T>& args, const Affine<A> (&affine)[W],
                                    Cursor cursor, const Visit& visit) {
  while (cursor.more()) {
    const Batch<U> batch(cursor);
    Vec<T, V> x[U];
    Vec<T, V> dy[U];
    Vec<T, V> residual[U] = {};
    fetch<kLast>(args.x, batch, x);
    fetch<kLast>(args.dy, batch, dy);
    if constexpr (kResidual) fetch<kLast>(args.residual, batch, residual);
    FUSEDNORM_UNROLL
    for (int u = 0; u < U; ++u) {
      if (!batch.live[u]) continue;
      A centred[V];
      A h[V];
      unmasked(args, affine, x[u], dy[u], residual[u], centred, h);
      if (!kResidual && args.mask) keep_positive<T>(args.mask, batch.offset[u], h);
      visit(batch.offset[u], centred, h);
    }
  }
}

// What both backward sweeps read: visit(offset, centred, h) for every access of a thread. Two
// accesses of two tensors, or one of three, keep as many bytes in flight as `apply` does, and leave
// registers for two blocks an SM; of scalars twice as many.
template <bool kLast, int V, int W, typename T, typename A, typename Visit>
FUSEDNORM_DEVICE void upstream(const SweepArgs<T>& args, const Affine<A> (&affine)[W],
                               const Cursor& cursor, const Visit& visit) {
  constexpr int U = V > 1 ? kInFlight / 2 : kInFlight;
  if (args.residual) {
    walk_upstream<kLast, true, U / 2, V>(args, affine, cursor, visit);
  } else {
    walk_upstream<kLast, false, U, V>(args, affine, cursor, visit);
  }
}

// A row is summed by itself first, so that the running sums round once a row.
template <int W, int V, typename A>
FUSEDNORM_DEVICE void add_row(Sums<A> (&state)[W], const A (&centred)[V], const A (&h)[V]) {
  FUSEDNORM_UNROLL
  for (int w = 0; w < W; ++w) {
    if constexpr (W == V) {
      state[w].h += h[w];
      state[w].hx += h[w] * centred[w];
    } else {
      Sums<A> row = {h[w], h[w] * centred[w]};
      FUSEDNORM_UNROLL
      for (int v = w + W; v < V; v += W) {
        row.h += h[v];
        row.hx += h[v] * centred[v];
      }
      state[w] = merge(state[w], row);
    }
  }
}

template <int W, int V, typename T, typename A>
FUSEDNORM_DEVICE void store_gradients(const SweepArgs<T>& args, const Affine<A> (&affine)[W],
                                      const A (&shift0)[W], const A (&scale1)[W], int64_t offset,
                                      const A (&centred)[V], const A (&h)[V]) {
  A dx[V];
  FUSEDNORM_UNROLL
  for (int v = 0; v < V; ++v) {
    const int w = v % W;
    dx[v] = affine[w].scale * h[v] - (centred[v] * scale1[w] + shift0[w]);
  }
  store(args.out, offset, pack<T>(dx));
  if (args.dresidual) store(args.dresidual, offset, pack<T>(h));
}

}  // namespace fusednorm
