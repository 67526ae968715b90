// The forward in one kernel, x kept on the chip between mean and y.
//
//   sum     S = sum(x - p) about p, the piece's first element: c = p + S/n, exact for a constant
//   square  D = sum(x - c), Q = sum((x - c)^2): mean = c + D/n, M2 = Q - D^2/n
//
// Two passes over shared memory, the second corrected for what c was rounded by: the two-pass
// variance at no cost in bytes. CTAs are merged as splits are (welford.cuh).
#pragma once

#include <stdexcept>

#include "launch.cuh"
#include "on_chip.cuh"

namespace fusednorm {

// The moments of one job's pieces, left where the group looks for them.
template <typename Tile>
FUSEDNORM_DEVICE void chip_moments(const SweepArgs<typename Tile::Element>& args,
                                   const Chip<Moments<float>>& chip, const Share& share,
                                   int64_t first_job, int job) {
  using T = typename Tile::Element;
  constexpr int V = Tile::kVector;
  constexpr int W = Tile::kWidth;
  const Tile tile(args.geometry, args.plan, first_job + job);
  const int accesses = int(tile.cursor().left);
  const float count = float(tile.count());
  const float inverse = count > 0 ? 1 / count : 0;
  float* const centres = chip.sums();

  float pivot[W];
  float sum[W] = {};
  FUSEDNORM_UNROLL
  for (int w = 0; w < W; ++w) {
    pivot[w] = tile.active() ? widen(args.x[tile.anchor(tile.local(w))]) : 0;
  }
  for_arriving(args.plan, accesses, [&](int s) {
    const Vec<T, V> x = chip.template get<T>(0, job - share.begin, s);
    FUSEDNORM_UNROLL
    for (int v = 0; v < V; ++v) sum[v % W] += widen(x.at[v]) - pivot[v % W];
  });
  tile.reduce(sum, chip.template scratch<float>(), [&](int piece, float total) {
    centres[piece] = widen(args.x[tile.anchor(piece)]) + total * inverse;
  });
  __syncthreads();

  float centre[W];
  Sums<float> state[W] = {};
  FUSEDNORM_UNROLL
  for (int w = 0; w < W; ++w) centre[w] = tile.active() ? centres[tile.local(w)] : 0;
  for (int s = 0; s < accesses; ++s) {
    const Vec<T, V> x = chip.template get<T>(0, job - share.begin, s);
    FUSEDNORM_UNROLL
    for (int v = 0; v < V; ++v) {
      const float centred = widen(x.at[v]) - centre[v % W];
      state[v % W].h += centred;
      state[v % W].hx += centred * centred;
    }
  }
  Moments<float>* const results = chip.own(job);
  tile.reduce(state, chip.template scratch<Sums<float>>(), [&](int piece, const Sums<float>& sums) {
    const float tail = sums.h * inverse;
    const float m2 = sums.hx - sums.h * tail;
    // Not by max, which would drop a NaN.
    results[piece] = {count, centres[piece], tail, m2 < 0 ? 0.f : m2};
  });
  __syncthreads();  // scratch and centres are reused by the next job
}

template <typename Tile>
__global__ void __launch_bounds__(kMaxChipBlock, 1)
    chip_forward_kernel(const SweepArgs<typename Tile::Element> args) {
  using T = typename Tile::Element;
  constexpr int V = Tile::kVector;
  constexpr int W = Tile::kWidth;
  // Of the residual only; x is here already.
  constexpr int U = kInFlight / 2;
  FUSEDNORM_DYNAMIC_SHARED(memory);
  const Plan& plan = args.plan;
  Group group(plan, args.combine.counters);
  const Chip<Moments<float>> chip(plan, group, memory, args.combine.moments);
  const Share share(plan, group.rank());
  const ForwardCells<float> finish{args.combine};
  for (int slice = group.index(); slice < plan.slices; slice += group.count()) {
    const int64_t first_job = int64_t(slice) * plan.jobs;
    const T* const tensors[] = {args.x};
    load_slice<Tile>(args, chip, share, first_job, tensors);
    for (int job = share.begin; job < share.end; ++job) {
      chip_moments<Tile>(args, chip, share, first_job, job);
    }

    const Tile whole(args.geometry, plan, first_job);
    const Cells cells(plan, whole);
    group.barrier();
    const int mine = (cells.cells - group.offset() + group.stride() - 1) / group.stride();
    reduce_jobs<Moments<float>>(
        mine, plan.jobs * cells.width,
        [&](int i, int term) {
          const int cell = i * group.stride() + group.offset();
          return chip.result(term / cells.width, cell * cells.width + term % cells.width);
        },
        [&](int i, const Moments<float>& state) {
          const int cell = i * group.stride() + group.offset();
          chip.stats()[cell] = finish.finish(whole.cell(cell * cells.width), state, group.stores());
        });
    group.barrier();
    if (group.tier() == Tier::kGrid) {
      for (int cell = threadIdx.x; cell < cells.cells; cell += blockDim.x) {
        const int64_t number = whole.cell(cell * cells.width);
        chip.stats()[cell] = {load_fresh(args.mean + number), load_fresh(args.rstd + number)};
      }
      __syncthreads();
    }

    for (int job = share.begin; job < share.end; ++job) {
      const Tile tile(args.geometry, plan, first_job + job);
      Affine<float> affine[W];
      FUSEDNORM_UNROLL
      for (int w = 0; w < W; ++w) {
        affine[w] = {};
        if (!tile.active()) continue;
        const int piece = tile.local(w);
        const Sums<float> stat = chip.stats()[cells.of(piece)];
        affine[w] = affine_of(args, stat.h, stat.hx, tile.channel(piece));
      }
      int s = 0;
      for (Cursor cursor = tile.cursor(); cursor.more(); s += U) {
        const Batch<U> batch(cursor);
        Vec<T, V> x[U];
        FUSEDNORM_UNROLL
        for (int u = 0; u < U; ++u) {
          x[u] = {};
          if (batch.live[u]) x[u] = chip.template get<T>(0, job - share.begin, s + u);
        }
        normalize(args, affine, batch, x);
      }
    }
  }
  group.leave();
}

inline void require_counters(const NormParams& p) {
  if (p.plan.counters > 0 && p.counters == nullptr) {
    throw std::logic_error("fusednorm: a cooperative plan was launched without counters");
  }
}

inline LaunchShape chip_shape(const Plan& plan) {
  return {plan.grid, plan.block, plan.shared_bytes, plan.cluster, plan.tier == Tier::kGrid};
}

// The kernel itself, for questions about its occupancy.
inline const void* forward_kernel_on_chip(const NormParams& p) {
  const void* kernel = nullptr;
  dispatch_chip_tile(p.dtype, p.plan, [&](auto tile) {
    using Tile = typename decltype(tile)::type;
    kernel = reinterpret_cast<const void*>(&chip_forward_kernel<Tile>);
  });
  return kernel;
}

inline void forward_on_chip(const NormParams& p) {
  require_counters(p);
  dispatch_chip_tile(p.dtype, p.plan, [&](auto tile) {
    using Tile = typename decltype(tile)::type;
    auto args = sweep_args<typename Tile::Element>(p);
    args.combine.moments = static_cast<Moments<float>*>(p.workspace);
    FUSEDNORM_LAUNCH_SHAPED(chip_forward_kernel<Tile>, chip_shape(p.plan), p.stream, args);
  });
}

}  // namespace fusednorm
