// Plans that read x once: a slice of the tensor stays on the chip between the two sweeps.
//
// A slice is tiles_per_cell tiles, so that its cells are complete; channels that several slices
// share (statistics of a sample, groups within a channel) get their gradients from one more small
// launch. A group of CTAs owns a slice: one CTA, a cluster, or a share of a cooperative grid. Each
// thread keeps its own accesses in shared memory, 16 bytes a slot. Candidates are all sizes of
// group and two widths of a block; the one of least estimated time wins, if that beats streaming.
#pragma once

#include "plan_tiles.h"

namespace fusednorm {

// The estimate, in bytes a nanosecond and nanoseconds. Orders of magnitude for an H200 (4.3 TB/s;
// one SM alone draws about 2.5 times its share); they rank candidates and were not measured.
constexpr double kBandwidthOfSm = 32;
constexpr double kMostOfSm = 80;
constexpr double kNodeTime = 2500;

// What a slice waits for beside its bytes, by tier, and what streaming's last block merges.
constexpr double kExchange[] = {300, 1000, 3000};
constexpr double kFold = 1000;
// A larger group has to gain this much over a smaller one.
constexpr double kGain = 0.97;

// Lays out a CTA's shared memory: its slots, then the rest. False if that is more than `most`.
inline bool lay_out(Plan& plan, int64_t most) {
  const bool runs = plan.pattern == Pattern::kRuns;
  const int64_t half = std::max(plan.block / 2, plan.lanes);
  const int64_t states = runs ? kMaxChipBlock / kWarp : half * plan.vector;
  const int64_t pieces = plan.pieces_per_tile;
  int64_t end = int64_t(plan.tensors) * plan.jobs_per_cta * plan.slots * plan.block * 16;
  const auto take = [&](int& at, int64_t numbers) {
    at = static_cast<int>(std::min<int64_t>(end, most));
    end += round_up(numbers * int64_t(sizeof(float)), 16);
  };
  take(plan.scratch_at, states * 2);
  take(plan.sums_at, pieces);
  take(plan.results_at, plan.jobs_per_cta * pieces * 4);
  take(plan.stats_at, plan.cells_per_tile * 2);
  plan.shared_bytes = static_cast<int>(std::min<int64_t>(end, most));
  return end <= most;
}

// Whether all of a channel's elements lie in one slice: then the slice has its gradients too.
inline bool channels_closed(const Geometry& g) {
  return g.sets == 1 && g.groups <= g.channels;
}

// Numbers of scratch: what the CTAs of a grid exchange, and sums of channels that are not closed.
inline int64_t on_chip_workspace(const Geometry& g, const Plan& plan, bool backward) {
  int64_t numbers = backward && !channels_closed(g) ? 2 * g.sets * g.pieces : 0;
  if (plan.tier == Tier::kGrid) {
    numbers +=
        plan.grid / plan.ctas_per_group * plan.jobs * plan.pieces_per_tile * (backward ? 2 : 4);
    if (backward) numbers += 2 * g.cells();
  }
  return numbers;
}

// `tiles` kept by groups of `ctas`: fills in the rest of the plan, false if a block has no room.
inline bool fit_on_chip(Plan& plan, const Device& device, int ctas, int most_threads) {
  plan.ctas_per_group = ctas;
  plan.splits = plan.tiles_per_cell == 1 ? ctas : std::max<int64_t>(1, ctas / plan.tiles_per_cell);
  const int64_t jobs = plan.tiles_per_cell * plan.splits;
  const int64_t jobs_per_cta = ceil_div(jobs, ctas);
  int64_t share = ceil_div(plan.rows_of_tile, plan.splits);
  if (plan.pattern == Pattern::kRuns) share = round_up(share, kWarp);
  fit_block(plan, ceil_div(share, kInFlight), most_threads);
  // Before they are narrowed: a slot takes 16 bytes of every thread.
  const int64_t slots = ceil_div(share, plan.rows());
  if (slots > device.shared_per_block || jobs_per_cta > device.shared_per_block) return false;
  plan.jobs = static_cast<int>(std::min<int64_t>(jobs, kMaxGrid));
  plan.jobs_per_cta = static_cast<int>(jobs_per_cta);
  plan.slots = static_cast<int>(slots);
  if (!lay_out(plan, device.shared_per_block)) return false;
  plan.ctas_per_sm = resident_ctas(device, plan.block, plan.shared_bytes);
  return true;
}

// Groups that run at a time. Clusters have to lie within one part of the chip, whose size they may
// not divide; what the device really holds is asked before a launch.
inline int64_t resident_groups(const Plan& plan, const Device& device) {
  const int64_t ctas = int64_t(device.num_sms) * plan.ctas_per_sm;
  const int64_t usable =
      plan.tier == Tier::kCluster ? ctas - ctas * plan.ctas_per_group / 128 : ctas;
  return usable / plan.ctas_per_group;
}

// Nanoseconds for `bytes` in all, by groups that take `waves` turns.
inline double on_chip_time(const Plan& plan, const Device& device, double bytes) {
  const int64_t groups = resident_groups(plan, device);
  const int64_t waves = ceil_div(plan.slices, groups);
  const int64_t active = std::min(plan.slices, groups);
  const int64_t sms = std::min<int64_t>(device.num_sms, active * plan.ctas_per_group);
  const double rate = std::min(sms * kMostOfSm, device.num_sms * kBandwidthOfSm);
  const double wave = bytes / double(plan.slices) * double(active) / rate;
  // With several blocks an SM and several waves, one slice waits while another moves.
  const double hidden = waves > 1 ? std::min(plan.ctas_per_sm, 4) : 1;
  const double exchange = kExchange[int(plan.tier)] * (1 + double(waves - 1) / hidden);
  return double(waves) * wave + exchange + plan.nodes * kNodeTime;
}

inline void launch_on_chip(Plan& plan, const Device& device) {
  const bool grid = plan.tier == Tier::kGrid;
  const int64_t most = grid ? resident_groups(plan, device) : plan.max_grid / plan.ctas_per_group;
  const int64_t groups = std::min(plan.slices, most);
  plan.grid = groups * plan.ctas_per_group;
  // Arrivals and departures of each group's barrier.
  plan.counters = grid ? 2 * groups : 0;
}

// The best on-chip plan over tiles of these lanes, into `best` if it beats `time`.
inline void try_tiles(const Problem& problem, const Device& device, const Plan& tiles, Plan& best,
                      double& time) {
  const double bytes = double(activation_bytes(problem, 1));
  const auto consider = [&](Plan plan) {
    if (resident_groups(plan, device) == 0) return;
    launch_on_chip(plan, device);
    const double estimate = on_chip_time(plan, device, bytes);
    if (estimate < time * kGain) {
      time = estimate;
      best = plan;
    }
  };
  for (const int threads : {kMaxChipBlock, kMaxBlock}) {
    Plan plan = tiles;
    const int clusters = device.capability >= 90 ? device.max_cluster : 1;
    for (int ctas = 1; ctas <= clusters; ctas *= 2) {
      plan.tier = ctas == 1 ? Tier::kBlock : Tier::kCluster;
      plan.cluster = ctas;
      if (fit_on_chip(plan, device, ctas, threads)) consider(plan);
    }
    if (!device.cooperative) continue;
    plan.tier = Tier::kGrid;
    plan.cluster = 1;
    // The fewest CTAs that hold a slice with one of them an SM, then as many as divide the SMs.
    const int64_t slice = plan.tiles_per_cell * plan.rows_of_tile * plan.lanes * 16 * plan.tensors;
    const int64_t fewest = std::max<int64_t>(2, ceil_div(slice, device.shared_per_block));
    const int64_t groups = std::min<int64_t>(plan.slices, device.num_sms / fewest);
    for (int64_t divided = groups; divided >= 1 && divided + 3 > groups; --divided) {
      const int ctas = static_cast<int>(device.num_sms / divided);
      if (ctas > 1 && fit_on_chip(plan, device, ctas, threads)) consider(plan);
    }
  }
}

// The on-chip plan that should be fastest if any should take less than `time`, else `otherwise`.
inline Plan plan_on_chip(const Problem& problem, const Device& device, const Plan& otherwise,
                         double time) {
  const Geometry& g = problem.geometry;
  const bool backward = problem.direction == Direction::kBackward;
  if (problem.direction == Direction::kApply || problem.element_size > 4 || g.even == 0) {
    return otherwise;
  }
  const int tensors = !backward ? 1 : problem.residual ? 3 : 2;
  // A cell lies in one slice, and a slice at most in the shared memory of all SMs.
  const double cell_bytes = double(g.count()) * problem.element_size * tensors;
  if (cell_bytes > double(device.num_sms) * device.shared_per_sm) return otherwise;

  Plan best = otherwise;
  int tried = 0;
  for (const int lanes : {kStreamingLanes, 8, 4}) {
    Plan tiles = cut_tiles(problem, lanes);
    if (tiles.vector == 1) return otherwise;
    if (tiles.cells_per_tile == 0 || tiles.lanes == tried) continue;
    tried = tiles.lanes;
    // The kernels number slices in 32 bits.
    if (tiles.tiles > kMaxGrid) continue;
    tiles.path = Path::kOnChip;
    tiles.max_grid = kMaxGrid;
    tiles.combine_block = otherwise.combine_block;
    tiles.slices = tiles.tiles / tiles.tiles_per_cell;
    tiles.tensors = tensors;
    tiles.nodes = backward && !channels_closed(g) ? 2 : 1;
    try_tiles(problem, device, tiles, best, time);
    if (tiles.pattern != Pattern::kColumns) break;
  }
  return best;
}

// `streaming`, or a plan that should be faster.
inline Plan prefer_on_chip(const Problem& problem, const Device& device, const Plan& streaming) {
  const double bytes = double(activation_bytes(problem, 2));
  const double time =
      bytes / (device.num_sms * kBandwidthOfSm) + streaming.nodes * kNodeTime + kFold;
  return plan_on_chip(problem, device, streaming, time);
}

}  // namespace fusednorm
