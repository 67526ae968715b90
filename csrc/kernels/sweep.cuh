// The four sweeps over activations, written once for both access patterns.
//
//   z = (x - mean)*(rstd*w) + b (+ residual),   h = act'(z)*dy,   xhat = (x - mean)*rstd
//
//   moments          reads x                   partials (count, mean, M2)
//   apply            reads x (, residual)      y = act(z)
//   backward_reduce  reads dy, x (, residual)  partials (sum h, sum h*xhat)
//   backward_apply   reads dy, x (, residual)  dx = rstd*(w*h - live*m0 - live*xhat*m1) (, h)
//
// A Tile (runs.cuh, columns.cuh) says what a block owns: where each thread walks, which cell and
// channel its kWidth columns belong to, and how the block reduces them. kWidth is 1 where a thread
// stays within one piece, and the vector width where its vector spans channels. x - mean comes
// first: folding the mean into the shift would lose digits where |mean| is far above sigma.
// No atomics, and every order is fixed by the plan: bitwise repeatable. The launch bounds ask for
// one block an SM: left to itself, ptxas spills a few registers to fit another.
#pragma once

#include "activation.cuh"
#include "cursor.cuh"
#include "plan.h"
#include "reduce.cuh"
#include "vec.cuh"
#include "welford.cuh"

namespace fusednorm {

template <typename T>
struct SweepArgs {
  using A = Accumulator<T>;

  Geometry geometry;
  Plan plan;
  const T* x;  // (N, C, S) in either layout, as are dy, residual, out, dresidual
  const T* dy;
  const T* residual;    // or null
  T* out;               // y or dx
  T* dresidual;         // or null
  const A* weight;      // (C,) or null
  const A* bias;        // (C,) or null
  const A* mean;        // (A, G)
  const A* rstd;        // (A, G)
  const A* m0;          // (A, G)
  const A* m1;          // (A, G)
  Moments<A>* moments;  // (A, P, splits)
  Sums<A>* sums;        // (A, P, splits)
  A live;
  A slope;
  int act;
};

// z = (x - mean)*scale + shift
template <typename A>
struct Affine {
  A mean;
  A scale;
  A shift;
};

template <typename Tile, typename T>
FUSEDNORM_DEVICE void load_affine(const SweepArgs<T>& args, const Tile& tile,
                                  Affine<Accumulator<T>> (&affine)[Tile::kWidth]) {
  using A = Accumulator<T>;
  FUSEDNORM_UNROLL
  for (int w = 0; w < Tile::kWidth; ++w) {
    affine[w] = {};
    if (!tile.active()) continue;
    const int64_t cell = tile.cell(w);
    const int64_t channel = tile.channel(w);
    affine[w].mean = args.mean[cell];
    affine[w].scale = args.rstd[cell] * (args.weight ? args.weight[channel] : A(1));
    affine[w].shift = args.bias ? args.bias[channel] : A(0);
  }
}

// The live accesses of a batch, all issued before the first is used; zeros elsewhere.
template <int V, typename T, int U>
FUSEDNORM_DEVICE void fetch(const T* base, const Batch<U>& batch, Vec<T, V> (&packed)[U]) {
  FUSEDNORM_UNROLL
  for (int u = 0; u < U; ++u) {
    packed[u] = {};
    if (batch.live[u]) packed[u] = load<V>(base, batch.offset[u]);
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

template <typename Tile>
__global__ void __launch_bounds__(kMaxBlock, 1)
    moments_kernel(const SweepArgs<typename Tile::Element> args) {
  using T = typename Tile::Element;
  using A = Accumulator<T>;
  constexpr int V = Tile::kVector;
  constexpr int W = Tile::kWidth;
  // A scalar access carries little, so twice as many are in flight.
  constexpr int U = V > 1 ? kInFlight : 2 * kInFlight;
  FUSEDNORM_SHARED(Moments<A>, shared, Tile::kShared);
  for (int64_t block = blockIdx.x; block < args.plan.blocks(); block += gridDim.x) {
    const Tile tile(args.geometry, args.plan, block);
    Moments<A> state[W] = {};
    for (Cursor cursor = tile.cursor(); cursor.more();) {
      const Batch<U> batch(cursor);
      Vec<T, V> x[U];
      fetch(args.x, batch, x);
      absorb(state, x, batch.live);
    }
    tile.reduce(state, shared);
    tile.store_partials(state, args.moments);
    __syncthreads();  // shared is reused by the next tile
  }
}

template <typename Tile>
__global__ void __launch_bounds__(kMaxBlock, 1)
    apply_kernel(const SweepArgs<typename Tile::Element> args) {
  using T = typename Tile::Element;
  using A = Accumulator<T>;
  constexpr int V = Tile::kVector;
  constexpr int U = kInFlight;
  for (int64_t block = blockIdx.x; block < args.plan.blocks(); block += gridDim.x) {
    const Tile tile(args.geometry, args.plan, block);
    Affine<A> affine[Tile::kWidth];
    load_affine(args, tile, affine);
    for (Cursor cursor = tile.cursor(); cursor.more();) {
      const Batch<U> batch(cursor);
      Vec<T, V> x[U];
      Vec<T, V> residual[U] = {};
      fetch(args.x, batch, x);
      if (args.residual) fetch(args.residual, batch, residual);
      FUSEDNORM_UNROLL
      for (int u = 0; u < U; ++u) {
        if (!batch.live[u]) continue;
        A centred[V];
        A z[V];
        preactivation(affine, x[u], residual[u], centred, z);
        activate(args.act, args.slope, z);
        store(args.out, batch.offset[u], z);
      }
    }
  }
}

// What both backward sweeps read: visit(offset, centred, h) for every live row of a batch, where
// centred = x - mean and h = act'(z)*dy.
template <int U, int V, int W, typename T, typename A, typename Visit>
FUSEDNORM_DEVICE void upstream(const SweepArgs<T>& args, const Affine<A> (&affine)[W],
                               const Batch<U>& batch, const Visit& visit) {
  Vec<T, V> x[U];
  Vec<T, V> dy[U];
  Vec<T, V> residual[U] = {};
  fetch(args.x, batch, x);
  fetch(args.dy, batch, dy);
  if (args.residual) fetch(args.residual, batch, residual);
  FUSEDNORM_UNROLL
  for (int u = 0; u < U; ++u) {
    if (!batch.live[u]) continue;
    A centred[V];
    A z[V];
    A h[V];
    preactivation(affine, x[u], residual[u], centred, z);
    FUSEDNORM_UNROLL
    for (int v = 0; v < V; ++v) h[v] = widen(dy[u].at[v]);
    activate_backward(args.act, args.slope, z, h);
    visit(batch.offset[u], centred, h);
  }
}

template <typename Tile>
__global__ void __launch_bounds__(kMaxBlock, 1)
    backward_reduce_kernel(const SweepArgs<typename Tile::Element> args) {
  using T = typename Tile::Element;
  using A = Accumulator<T>;
  constexpr int V = Tile::kVector;
  constexpr int W = Tile::kWidth;
  // Two tensors are read, so half the batch of `apply` has as much in flight.
  constexpr int U = V > 1 ? kInFlight / 2 : kInFlight;
  FUSEDNORM_SHARED(Sums<A>, shared, Tile::kShared);
  for (int64_t block = blockIdx.x; block < args.plan.blocks(); block += gridDim.x) {
    const Tile tile(args.geometry, args.plan, block);
    Affine<A> affine[W];
    load_affine(args, tile, affine);
    Sums<A> state[W] = {};
    for (Cursor cursor = tile.cursor(); cursor.more();) {
      const Batch<U> batch(cursor);
      upstream<U, V>(args, affine, batch, [&](int64_t, const A(&centred)[V], const A(&h)[V]) {
        // A row is summed by itself first, so that the running sums round once a row.
        FUSEDNORM_UNROLL
        for (int w = 0; w < W; ++w) {
          Sums<A> row = {};
          FUSEDNORM_UNROLL
          for (int v = w; v < V; v += W) row = merge(row, {h[v], h[v] * centred[v]});
          state[w] = merge(state[w], row);
        }
      });
    }
    tile.reduce(state, shared);
    // xhat = (x - mean)*rstd, and rstd is common to all that was summed.
    FUSEDNORM_UNROLL
    for (int w = 0; w < W; ++w) {
      if (tile.active()) state[w].hx *= args.rstd[tile.cell(w)];
    }
    tile.store_partials(state, args.sums);
    __syncthreads();  // shared is reused by the next tile
  }
}

template <typename Tile>
__global__ void __launch_bounds__(kMaxBlock, 1)
    backward_apply_kernel(const SweepArgs<typename Tile::Element> args) {
  using T = typename Tile::Element;
  using A = Accumulator<T>;
  constexpr int V = Tile::kVector;
  constexpr int W = Tile::kWidth;
  constexpr int U = V > 1 ? kInFlight / 2 : kInFlight;
  for (int64_t block = blockIdx.x; block < args.plan.blocks(); block += gridDim.x) {
    const Tile tile(args.geometry, args.plan, block);
    Affine<A> affine[W];
    load_affine(args, tile, affine);
    // dx = scale*h - (shift0 + (x - mean)*scale1)
    A shift0[W];
    A scale1[W];
    FUSEDNORM_UNROLL
    for (int w = 0; w < W; ++w) {
      const int64_t cell = tile.active() ? tile.cell(w) : 0;
      const A rstd = args.rstd[cell];
      shift0[w] = rstd * args.live * args.m0[cell];
      scale1[w] = rstd * (rstd * args.live * args.m1[cell]);
    }
    for (Cursor cursor = tile.cursor(); cursor.more();) {
      const Batch<U> batch(cursor);
      upstream<U, V>(args, affine, batch,
                     [&](int64_t offset, const A(&centred)[V], const A(&h)[V]) {
                       A dx[V];
                       FUSEDNORM_UNROLL
                       for (int v = 0; v < V; ++v) {
                         const int w = v % W;
                         dx[v] = affine[w].scale * h[v] - (centred[v] * scale1[w] + shift0[w]);
                       }
                       store(args.out, offset, dx);
                       if (args.dresidual) store(args.dresidual, offset, h);
                     });
    }
  }
}

}  // namespace fusednorm
