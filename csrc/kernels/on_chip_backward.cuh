// The backward in one kernel, x and dy (and a residual) kept on the chip between the two sums of
// each channel and dx.
//
// The sums are those of the streaming sweep, over a CTA's share of a slice. With a mask, dy is
// masked where it lies: relu' is 0 or 1, so that loses nothing, and the mask is read once. Channels
// that several slices share leave their sums in the workspace for channels_kernel.
#pragma once

#include "launch.cuh"
#include "on_chip.cuh"
#include "on_chip_forward.cuh"

namespace fusednorm {

// The sums of one job's pieces, left where the group looks for them.
template <typename Tile>
FUSEDNORM_DEVICE void chip_sums(const SweepArgs<typename Tile::Element>& args,
                                const Chip<Sums<float>>& chip, const Share& share,
                                int64_t first_job, int job) {
  using T = typename Tile::Element;
  constexpr int V = Tile::kVector;
  constexpr int W = Tile::kWidth;
  const Tile tile(args.geometry, args.plan, first_job + job);
  Affine<float> affine[W];
  load_affine(args, tile, affine);
  Sums<float> state[W] = {};
  Cursor cursor = tile.cursor();
  const int local = job - share.begin;
  for_arriving(args.plan, int(cursor.left), [&](int s) {
    const Vec<T, V> x = chip.template get<T>(0, local, s);
    const Vec<T, V> dy = chip.template get<T>(1, local, s);
    Vec<T, V> residual = {};
    if (args.residual) residual = chip.template get<T>(2, local, s);
    float centred[V];
    float h[V];
    unmasked(args, affine, x, dy, residual, centred, h);
    if (args.mask) {
      keep_positive<T>(args.mask, cursor.offset, h);
      chip.template set<T>(1, local, s, pack<T>(h));
    }
    add_row(state, centred, h);
    cursor.step();
  });
  Sums<float>* const results = chip.own(job);
  tile.reduce(state, chip.template scratch<Sums<float>>(), [&](int piece, const Sums<float>& sums) {
    results[piece] = {sums.h, sums.hx * args.rstd[tile.cell(piece)]};
  });
  __syncthreads();  // scratch is reused by the next job
}

// dweight and dbias of the slice's pieces, or their sums where they are not whole channels.
template <typename Tile>
FUSEDNORM_DEVICE void chip_channels(const SweepArgs<typename Tile::Element>& args,
                                    const Chip<Sums<float>>& chip, const Group& group,
                                    int64_t first_job) {
  const Plan& plan = args.plan;
  const int pieces = int(plan.tiles_per_cell * plan.pieces_per_tile);
  const int mine = (pieces - group.rank() + plan.ctas_per_group - 1) / plan.ctas_per_group;
  const auto numbered = [&](int i) { return i * plan.ctas_per_group + group.rank(); };
  const int per_tile = int(plan.pieces_per_tile);
  const int splits = int(plan.splits);
  reduce_jobs<Sums<float>>(
      mine, splits,
      [&](int i, int split) {
        return chip.result(numbered(i) / per_tile * splits + split, numbered(i) % per_tile);
      },
      [&](int i, const Sums<float>& state) {
        const Tile tile(args.geometry, plan, first_job + numbered(i) / per_tile * splits);
        const int piece = numbered(i) % per_tile;
        if (piece >= tile.pieces()) return;
        if (args.channels) {
          args.combine.sums[tile.partial(piece) / splits] = state;
        } else {
          args.combine.dbias[tile.channel(piece)] = state.h;
          args.combine.dweight[tile.channel(piece)] = state.hx;
        }
      });
}

template <typename Tile>
__global__ void __launch_bounds__(kMaxChipBlock, 1)
    chip_backward_kernel(const SweepArgs<typename Tile::Element> args, Sums<float>* exchange) {
  using T = typename Tile::Element;
  constexpr int V = Tile::kVector;
  constexpr int W = Tile::kWidth;
  FUSEDNORM_DYNAMIC_SHARED(memory);
  const Plan& plan = args.plan;
  Group group(plan, args.combine.counters);
  const Chip<Sums<float>> chip(plan, group, memory, exchange);
  const Share share(plan, group.rank());
  const BackwardCells<float> finish{args.combine};
  for (int slice = group.index(); slice < plan.slices; slice += group.count()) {
    const int64_t first_job = int64_t(slice) * plan.jobs;
    const T* const tensors[] = {args.x, args.dy, args.residual};
    load_slice<Tile>(args, chip, share, first_job, tensors);
    for (int job = share.begin; job < share.end; ++job) {
      chip_sums<Tile>(args, chip, share, first_job, job);
    }

    const Tile whole(args.geometry, plan, first_job);
    const Cells cells(plan, whole);
    group.barrier();
    const int mine = (cells.cells - group.offset() + group.stride() - 1) / group.stride();
    reduce_jobs<Sums<float>>(
        mine, plan.jobs * cells.width,
        [&](int i, int term) {
          const int cell = i * group.stride() + group.offset();
          const int job = term / cells.width;
          const int piece = cell * cells.width + term % cells.width;
          const Sums<float> sums = chip.result(job, piece);
          if (args.combine.closed) return sums;
          // The job's tile has other pieces than the slice's first where a cell has several tiles.
          const int64_t number =
              int64_t(whole.piece(piece)) + job / plan.splits * plan.pieces_per_tile;
          return finish.weighted(sums, number);
        },
        [&](int i, const Sums<float>& state) {
          const int cell = i * group.stride() + group.offset();
          chip.stats()[cell] = finish.finish(whole.cell(cell * cells.width), state, group.stores());
        });
    if (!args.combine.closed) chip_channels<Tile>(args, chip, group, first_job);
    group.barrier();
    if (group.tier() == Tier::kGrid) {
      for (int cell = threadIdx.x; cell < cells.cells; cell += blockDim.x) {
        const int64_t number = whole.cell(cell * cells.width);
        chip.stats()[cell] = {load_fresh(args.combine.m0 + number),
                              load_fresh(args.combine.m1 + number)};
      }
      __syncthreads();
    }

    for (int job = share.begin; job < share.end; ++job) {
      const Tile tile(args.geometry, plan, first_job + job);
      const int local = job - share.begin;
      Affine<float> affine[W];
      load_affine(args, tile, affine);
      float shift0[W];
      float scale1[W];
      FUSEDNORM_UNROLL
      for (int w = 0; w < W; ++w) {
        const int piece = tile.active() ? tile.local(w) : 0;
        load_means(args, args.rstd[tile.cell(piece)], chip.stats()[cells.of(piece)], shift0[w],
                   scale1[w]);
      }
      int s = 0;
      for (Cursor cursor = tile.cursor(); cursor.more(); cursor.step(), ++s) {
        Vec<T, V> residual = {};
        if (args.residual) residual = chip.template get<T>(2, local, s);
        float centred[V];
        float h[V];
        unmasked(args, affine, chip.template get<T>(0, local, s), chip.template get<T>(1, local, s),
                 residual, centred, h);
        store_gradients(args, affine, shift0, scale1, cursor.offset, centred, h);
      }
    }
  }
  group.leave();
}

// The kernel itself, for questions about its occupancy.
inline const void* backward_kernel_on_chip(const NormParams& p) {
  const void* kernel = nullptr;
  dispatch_chip_tile(p.dtype, p.plan, [&](auto tile) {
    using Tile = typename decltype(tile)::type;
    kernel = reinterpret_cast<const void*>(&chip_backward_kernel<Tile>);
  });
  return kernel;
}

inline void backward_on_chip(const NormParams& p) {
  require_counters(p);
  dispatch_chip_tile(p.dtype, p.plan, [&](auto tile) {
    using Tile = typename decltype(tile)::type;
    const Geometry& g = p.geometry;
    auto args = sweep_args<typename Tile::Element>(p);
    CombineArgs<float>& combine = args.combine;
    args.channels = !channels_closed(g);
    float* workspace = static_cast<float*>(p.workspace);
    if (args.channels) {
      combine.sums = reinterpret_cast<Sums<float>*>(workspace);
      workspace += 2 * g.sets * g.pieces;
    }
    if (p.plan.tier == Tier::kGrid) {
      combine.m0 = workspace;
      combine.m1 = workspace + g.cells();
      workspace += 2 * g.cells();
    }
    auto* const exchange = reinterpret_cast<Sums<float>*>(workspace);
    FUSEDNORM_LAUNCH_SHAPED(chip_backward_kernel<Tile>, chip_shape(p.plan), p.stream, args,
                            exchange);
    if (!args.channels) return;
    combine.splits = 1;
    const int64_t grid = std::min(ceil_div(g.channels, kMaxBlock / kWarp), p.plan.max_grid);
    FUSEDNORM_LAUNCH(channels_kernel<float>, grid, kMaxBlock, p.stream, combine);
  });
}

}  // namespace fusednorm
