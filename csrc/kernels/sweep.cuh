// The four sweeps over activations, written once for all access patterns.
//
//   z = (x - mean)*(rstd*w) + b (+ residual),   h = act'(z)*dy,   xhat = (x - mean)*rstd
//
//   moments          reads x                   partials (count, mean, M2); its last block: combine
//   apply            reads x (, residual)      y = act(z) (, a mask of y > 0)
//   backward_reduce  reads dy, x (, residual)  partials (sum h, sum h*xhat); likewise
//   backward_apply   reads dy, x (, residual)  dx = rstd*(w*h - live*m0 - live*xhat*m1) (, h)
//
// A Tile (runs.cuh, columns.cuh) says what a job owns: where each thread walks, which cell and
// channel its kWidth columns belong to, and how the block reduces them. kWidth is 1 where a thread
// stays within one piece, and the vector width where its vector spans channels. x - mean comes
// first: folding the mean into the shift would lose digits where |mean| is far above sigma.
// No float atomics, and every order is fixed by the plan: bitwise repeatable. A second sweep walks
// back, jobs and rows, so that what the first one read last is still in L2. The launch bounds hold
// every kernel to 128 registers, two blocks an SM.
#pragma once

#include "fold.cuh"
#include "gradient.cuh"

namespace fusednorm {

template <typename Tile>
__global__ void __launch_bounds__(kMaxBlock, 2)
    moments_kernel(const SweepArgs<typename Tile::Element> args) {
  using T = typename Tile::Element;
  using A = Accumulator<T>;
  constexpr int V = Tile::kVector;
  constexpr int W = Tile::kWidth;
  // A scalar access carries little, so twice as many are in flight.
  constexpr int U = V > 1 ? kInFlight : 2 * kInFlight;
  FUSEDNORM_SHARED(Moments<A>, shared, Tile::kShared);
  FUSEDNORM_SHARED(int, flag, 1);
  for (int64_t job = blockIdx.x; job < args.plan.blocks(); job += gridDim.x) {
    const Tile tile(args.geometry, args.plan, job);
    Moments<A> state[W];
    {
      Gather<A, W> gather;
      for (Cursor cursor = tile.cursor(); cursor.more();) {
        const Batch<U> batch(cursor);
        Vec<T, V> x[U];
        fetch(args.x, batch, x);
        gather.absorb(x, batch.live);
      }
      gather.finish(state);
    }
    tile.reduce(state, shared, [&](int piece, const Moments<A>& moments) {
      args.combine.moments[tile.partial(piece)] = moments;
    });
    if (args.folded) fold(tile, args.plan, ForwardCells<A>{args.combine}, job, shared, flag);
    __syncthreads();  // shared is reused by the next tile
  }
}

template <typename Tile>
__global__ void __launch_bounds__(kMaxBlock, 2)
    apply_kernel(const SweepArgs<typename Tile::Element> args) {
  using T = typename Tile::Element;
  using A = Accumulator<T>;
  constexpr int V = Tile::kVector;
  constexpr int U = sizeof(T) == 8 ? kInFlight / 2 : kInFlight;
  for (int64_t job = blockIdx.x; job < args.plan.blocks(); job += gridDim.x) {
    const Tile tile(args.geometry, args.plan, args.plan.blocks() - 1 - job);
    Affine<A> affine[Tile::kWidth];
    load_affine(args, tile, affine);
    for (Cursor cursor = tile.cursor(true); cursor.more();) {
      const Batch<U> batch(cursor);
      Vec<T, V> x[U];
      fetch<true>(args.x, batch, x);
      normalize(args, affine, batch, x);
    }
  }
}

template <typename Tile>
__global__ void __launch_bounds__(kMaxBlock, 2)
    backward_reduce_kernel(const SweepArgs<typename Tile::Element> args) {
  using T = typename Tile::Element;
  using A = Accumulator<T>;
  constexpr int V = Tile::kVector;
  constexpr int W = Tile::kWidth;
  FUSEDNORM_SHARED(Sums<A>, shared, Tile::kShared);
  FUSEDNORM_SHARED(int, flag, 1);
  for (int64_t job = blockIdx.x; job < args.plan.blocks(); job += gridDim.x) {
    Sums<A> state[W] = {};
    {
      const Tile tile(args.geometry, args.plan, job);
      Affine<A> affine[W];
      load_affine(args, tile, affine);
      upstream<false, V>(
          args, affine, tile.cursor(),
          [&](int64_t, const A(&centred)[V], const A(&h)[V]) { add_row(state, centred, h); });
    }
    const Tile tile(args.geometry, args.plan, recomputed(job));
    // xhat = (x - mean)*rstd, and rstd is common to all that was summed.
    tile.reduce(state, shared, [&](int piece, const Sums<A>& sums) {
      args.combine.sums[tile.partial(piece)] = {sums.h, sums.hx * args.rstd[tile.cell(piece)]};
    });
    if (args.folded) fold(tile, args.plan, BackwardCells<A>{args.combine}, job, shared, flag);
    __syncthreads();  // shared is reused by the next tile
  }
}

template <typename Tile>
__global__ void __launch_bounds__(kMaxBlock, 2)
    backward_apply_kernel(const SweepArgs<typename Tile::Element> args) {
  using T = typename Tile::Element;
  using A = Accumulator<T>;
  constexpr int V = Tile::kVector;
  constexpr int W = Tile::kWidth;
  for (int64_t job = blockIdx.x; job < args.plan.blocks(); job += gridDim.x) {
    const Tile tile(args.geometry, args.plan, args.plan.blocks() - 1 - job);
    Affine<A> affine[W];
    load_affine(args, tile, affine);
    A shift0[W];
    A scale1[W];
    FUSEDNORM_UNROLL
    for (int w = 0; w < W; ++w) {
      const int64_t cell = tile.active() ? tile.cell(tile.local(w)) : 0;
      load_means(args, args.rstd[cell], {args.m0[cell], args.m1[cell]}, shift0[w], scale1[w]);
    }
    upstream<true, V>(args, affine, tile.cursor(true),
                      [&](int64_t offset, const A(&centred)[V], const A(&h)[V]) {
                        store_gradients(args, affine, shift0, scale1, offset, centred, h);
                      });
  }
  // Channels of several cells have all their partials only now.
  if (args.channels) combine_channels(args.combine);
}

// The mask of y for kernels whose threads share its bytes: a byte a thread, from y itself.
template <typename T>
__global__ void __launch_bounds__(kMaxBlock) mask_kernel(const T* y, uint8_t* mask, int64_t numel) {
  constexpr int kWidth = kMaskWidth<T>;
  const int64_t bytes = (numel + kWidth - 1) / kWidth;
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < bytes; i += stride) {
    unsigned bits = 0;
    for (int j = 0; j < kWidth && i * kWidth + j < numel; ++j) {
      bits |= positive(load<1>(y, i * kWidth + j)) << j;
    }
    mask[i] = uint8_t(bits);
  }
}

}  // namespace fusednorm
