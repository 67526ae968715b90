// What every plan promises, whatever the problem and the device: checked in C++, where a million
// shapes take seconds.
//
//   limits     grid, block, shared memory, registers; clusters and cooperative grids fit the device
//   shares     the jobs of all blocks, or of all groups, are the tiles' splits, each once; what a
//              thread keeps on the chip has slots
//   counters   every arrival has a counter, every counter all of its arrivals
//   bytes      the floor: each tensor once a sweep, or once on the chip
//   coverage   every element once (plan_coverage.h)
#pragma once

#include <algorithm>
#include <limits>
#include <map>
#include <random>
#include <string>

#include "plan_coverage.h"

namespace fusednorm::host {

inline void check_limits(const PlanCase& c) {
  const Plan& q = c.plan;
  const Device& d = c.device;
  const bool chip = q.path == Path::kOnChip;
  const int widest = c.problem.element_size == 8 ? 1 : 16 / c.problem.element_size;
  require(q.vector == 1 || (q.vector == widest && c.problem.aligned), c, "vector");
  require(q.block % kWarp == 0 && q.block >= kWarp, c, "block is whole warps");
  require(q.block <= (chip ? kMaxChipBlock : kMaxBlock), c, "block is no larger than the kernel's");
  require(q.lanes >= 1 && q.lanes <= q.block && q.lanes <= kMaxLanes, c, "lanes");
  require(q.combine_block % kWarp == 0 && q.combine_block >= kWarp && q.combine_block <= kMaxBlock,
          c, "combine_block");
  require(q.grid >= 1 && q.grid <= kMaxGrid, c, "grid");
  require(q.tiles >= 1 && q.splits >= 1, c, "tiles and splits");
  require(q.shared_bytes >= 0 && q.shared_bytes <= d.shared_per_block, c, "shared memory");
  require(q.ctas_per_sm >= 1, c, "a block an SM");
  require(q.ctas_per_sm * q.block <= d.threads_per_sm, c, "threads of an SM");
  require(int64_t{q.ctas_per_sm} * q.block * kRegisters <= d.registers_per_sm, c, "registers");
  require(int64_t{q.ctas_per_sm} * (q.shared_bytes + 1024) <= d.shared_per_sm, c,
          "shared of an SM");
  require(!chip || c.problem.direction != Direction::kApply, c, "apply has nothing to keep");
  // A combine without counters, gradients of channels that no slice has to itself, and a mask whose
  // bytes scalar threads would share take a launch each.
  const Direction direction = c.problem.direction;
  int nodes = direction == Direction::kApply ? 1 : chip ? 1 : 3 - q.folded;
  nodes += chip && direction == Direction::kBackward && !channels_closed(c.problem.geometry);
  nodes += c.problem.mask && q.vector == 1 && direction != Direction::kBackward;
  require(q.nodes == nodes, c, "nodes");
  if (!chip) {
    require(q.grid <= q.blocks(), c, "no block without a job");
    require(q.cluster == 1 && q.shared_bytes == 0 && q.tier == Tier::kBlock, c, "streams only");
    return;
  }
  const int64_t resident = int64_t{d.num_sms} * q.ctas_per_sm;
  require(q.grid % q.ctas_per_group == 0, c, "whole groups");
  switch (q.tier) {
    case Tier::kBlock:
      require(q.ctas_per_group == 1 && q.cluster == 1, c, "a group of one");
      break;
    case Tier::kCluster:
      require(d.capability >= 90 && q.cluster == q.ctas_per_group, c, "clusters");
      require(q.cluster > 1 && q.cluster <= d.max_cluster, c, "size of a cluster");
      require(q.cluster <= resident, c, "a cluster has to be resident");
      break;
    case Tier::kGrid:
      require(d.cooperative && q.cluster == 1, c, "cooperation");
      require(q.grid <= resident, c, "a cooperative grid is resident");
      break;
  }
}

// Jobs of blocks and groups, and the room for what they keep.
inline void check_shares(const PlanCase& c) {
  const Plan& q = c.plan;
  if (q.path == Path::kStreaming) return;
  require(q.slices * q.jobs == q.blocks(), c, "the slices' jobs are all jobs");
  require(q.slices * q.tiles_per_cell == q.tiles, c, "slices are whole cells");
  require(int64_t{q.ctas_per_group} * q.jobs_per_cta >= q.jobs, c, "the group has all its jobs");
  require(q.grid / q.ctas_per_group <= q.slices, c, "no group without a slice");
  const int64_t slots = int64_t{q.tensors} * q.jobs_per_cta * q.slots * q.block * 16;
  // Half the block's threads leave their columns for the others, or a row its own.
  const int64_t columns = int64_t{q.vector} * std::max(q.block / 2, q.lanes);
  const int64_t states = q.pattern == Pattern::kRuns ? q.block / kWarp : columns;
  const int64_t places[] = {slots, q.scratch_at, q.sums_at, q.results_at, q.stats_at};
  const int64_t pieces = q.pieces_per_tile;
  const int64_t sizes[] = {0, 8 * states, 4 * pieces, 16 * q.jobs_per_cta * pieces,
                           8 * q.cells_per_tile};
  for (int i = 0; i < 5; ++i) {
    const int64_t next = i < 4 ? places[i + 1] : q.shared_bytes;
    require(places[i] + sizes[i] <= next, c, "slots and results have room");
    require(places[i] % 16 == 0, c, "slots are aligned");
  }
  const bool backward = c.problem.direction == Direction::kBackward;
  require(q.tensors == (backward ? 2 + c.problem.residual : 1), c, "tensors kept");
}

inline void check_bytes(const PlanCase& c) {
  const Problem& p = c.problem;
  const int64_t numel = p.geometry.samples * p.geometry.size;
  const int64_t t = numel * p.element_size;
  const int64_t vector = 16 / p.element_size;
  const int64_t extra = (p.residual ? t : 0) + (p.mask ? (numel + vector - 1) / vector : 0);
  const int64_t sweeps = c.plan.path == Path::kOnChip ? 1 : 2;
  const int64_t floor = p.direction == Direction::kApply ? 2 * t + extra
                        : p.direction == Direction::kForward
                            ? (1 + sweeps) * t + extra
                            : (2 * sweeps + 1 + p.dresidual) * t + sweeps * extra;
  const bool reread = p.mask && c.plan.vector == 1 && p.direction != Direction::kBackward;
  require(planned_bytes(p, c.plan) == floor + (reread ? t : 0), c, "bytes through memory");
  require(workspace_bytes(p, c.plan) >= 0, c, "workspace");
}

// The arrivals of a launch at each of its counters, without the launch.
inline void check_counters(const PlanCase& c) {
  const Plan& q = c.plan;
  const Geometry& g = c.problem.geometry;
  require(q.counters >= 0, c, "counters");
  if (q.path == Path::kOnChip) {
    const int64_t groups = q.grid / q.ctas_per_group;
    require(q.counters == (q.tier == Tier::kGrid ? 2 * groups : 0), c, "two counters a group");
    return;
  }
  if (c.problem.direction == Direction::kApply || !q.folded) {
    require(q.counters == 0, c, "nothing to count");
    return;
  }
  if (q.pattern == Pattern::kRuns) {
    const bool alone = g.even != 0 && g.pieces == g.groups && q.splits == 1;
    require(q.counters >= (alone ? 0 : g.cells()), c, "a counter a cell");
    return;
  }
  require(q.fan >= 1 && q.fans >= 1 && q.fan * q.fans >= q.splits, c, "fans hold the splits");
  require((q.fans - 1) * q.fan < q.splits, c, "no empty fan");
  const int64_t level = q.fan > 1 ? q.tiles * q.fans : 0;
  const int64_t components = q.two_levels() ? q.tiles / q.tiles_per_cell : 0;
  require(q.tiles % q.tiles_per_cell == 0, c, "components are whole tiles");
  require(q.counters == level + components, c, "a counter a fan and component");
  // A tile of complete cells, or one of the tiles of a cell.
  require(q.cells_per_tile >= 1 && (q.cells_per_tile == 1 || q.tiles_per_cell == 1), c, "cells");
  const int64_t pieces = q.tiles_per_cell > 1 ? q.pieces_per_tile * q.tiles_per_cell
                                              : q.pieces_per_tile / q.cells_per_tile;
  require(pieces == q.pieces_per_cell || q.ranges > 1, c, "pieces of a cell");
}

// `depth` elements are solved for; everything is counted if there is little.
inline void check_plan(const PlanCase& c, int depth, std::mt19937_64& random) {
  constexpr int64_t kCounted = 20000, kAllSplits = 4000, kComponent = 512;
  const Geometry& g = c.problem.geometry;
  const auto draw = [&](int64_t size) {
    return static_cast<int64_t>(random() % static_cast<uint64_t>(size));
  };
  check_limits(c);
  check_shares(c);
  check_bytes(c);
  check_counters(c);
  with_tile_type(c.plan, [&](auto type) {
    using Tile = typename decltype(type)::type;
    check_tiles<Tile>(c);
    const int64_t components = c.plan.tiles / c.plan.tiles_per_cell;
    for (int64_t number : {int64_t{0}, components - 1, components / 3}) {
      if (c.plan.tiles_per_cell * c.plan.pieces_per_tile <= kComponent) {
        check_component<Tile>(c, number);
      }
    }
    for (const int64_t job : {int64_t{0}, draw(c.plan.blocks()), c.plan.blocks() - 1}) {
      for (const int64_t thread : {int64_t{0}, draw(c.plan.block), int64_t{c.plan.block} - 1}) {
        be_thread(c.plan, static_cast<int>(thread));
        const Tile tile(g, c.plan, job);
        check_walk(c, tile, tile.cursor());
        check_walk(c, tile, tile.cursor(true));
      }
    }
    const int64_t numel = g.samples * g.size;
    const int64_t threads = c.plan.blocks() * c.plan.block;
    if (depth > 0 && numel <= kCounted && threads <= kCounted) count_elements<Tile>(c);
    for (int i = 0; i < depth; ++i) {
      const auto any = [&](int64_t size) { return i == 0 ? size - 1 : i == 1 ? 0 : draw(size); };
      solve_element<Tile>(c, {any(g.samples), any(g.size)},
                          c.plan.splits * c.plan.block <= kAllSplits);
    }
  });
}

// Draws that meet the corners: ones, primes, powers of two, what networks have, what nothing holds.
inline int64_t draw_size(std::mt19937_64& random, int64_t most) {
  constexpr int64_t kUsual[] = {1,    1,    2,     3,     4,     7,    8,    14,   16,
                                24,   28,   32,    49,    56,    64,   65,   127,  128,
                                196,  200,  256,   512,   784,   1000, 1021, 1024, 2048,
                                3136, 4099, 12544, 50176, 65537, 67200};
  int64_t size = kUsual[random() % std::size(kUsual)];
  if (random() % 4 == 0) {
    const int bits = 1 + static_cast<int>(random() % 24);
    size = 1 + static_cast<int64_t>(random() % (uint64_t{1} << bits));
  }
  return std::min(size, most);
}

inline PlanCase draw_case(std::mt19937_64& random) {
  const auto coin = [&] { return random() % 2 == 0; };
  const int64_t samples = draw_size(random, 1 << 16);
  const int64_t channels = draw_size(random, 1 << 20);
  const int64_t spatial = draw_size(random, 1 << 22);
  // Any divisor of C*S: batch norm, a divisor of C, a multiple of C, or what straddles channels.
  int64_t groups = channels;
  const auto divisor = [&](int64_t of) {
    int64_t found = 1;
    // Now and then nearly all of it, so that groups are short and odd.
    const uint64_t odds = random() % 3 == 0 ? 16 : 2;
    for (int64_t rest = of, p = 2; rest > 1; ++p) {
      if (p * p > rest) p = rest;
      for (; rest % p == 0; rest /= p) {
        if (random() % odds != 0) found *= p;
      }
    }
    return found;
  };
  switch (random() % 6) {
    case 0:
      groups = divisor(channels);
      break;
    case 1:
      groups = channels * divisor(spatial);
      break;
    case 2:
      groups = divisor(channels) * divisor(spatial);
      break;
    default:
      break;
  }
  const bool per_sample = random() % 3 == 0;
  constexpr Device kDevices[] = {
      kH200,
      {108, 166912, 167936, 65536, 2048, 80, true, 1, 40 << 20},
      {170, 101376, 102400, 65536, 1536, 120, true, 8, 96 << 20},
      {4, 4096, 8192, 65536, 2048, 90, true, 8, 1 << 20},
      {16, 16384, 32768, 65536, 1024, 90, true, 16, 1 << 20},
      {16, 49152, 65536, 65536, 1024, 80, false, 1, 1 << 20},
      {1, 49152, 65536, 65536, 1024, 90, true, 8, 1 << 20},
  };
  Problem p{};
  p.geometry = make_geometry(samples, channels, spatial, groups, per_sample);
  p.element_size = 2 << random() % 3;
  p.channels_last = coin();
  p.aligned = random() % 8 != 0;
  p.direction = static_cast<Direction>(random() % 3);
  p.act = static_cast<int>(random() % kActivations);
  const bool residual = coin();
  if (p.direction == Direction::kBackward) {
    p.mask = residual && p.act == kRelu && coin();
    p.residual = residual && p.act != kNone && !p.mask;
    p.dresidual = residual && p.act != kNone;
  } else {
    p.residual = residual;
    p.mask = residual && p.act == kRelu && coin();
  }
  return {p, kDevices[random() % std::size(kDevices)], {}};
}

// Plans for `count` random problems: streaming, on the chip whatever the estimate says, and what is
// chosen. `depth` elements of each are solved for. How many there were of each kind; throws
// std::runtime_error with the first that fails.
inline std::map<std::string, int64_t> check_plans(uint64_t seed, int64_t count, int depth) {
  constexpr const char* kTiers[] = {"block", "cluster", "grid"};
  constexpr const char* kPatterns[] = {"runs", "columns", "frames"};
  std::mt19937_64 random(seed);
  std::map<std::string, int64_t> seen;
  for (int64_t i = 0; i < count; ++i) {
    PlanCase c = draw_case(random);
    const Geometry& g = c.problem.geometry;
    // No tensor that fits a device comes near: piece_start multiplies an index by S and by L.
    const double product = double(g.size) * double(g.spatial + g.group_size);
    if (product >= 0x1p62 || double(g.samples) * double(g.size) >= 0x1p38) continue;
    const Plan streaming = plan_streaming(c.problem, c.device);
    const Plan kept =
        plan_on_chip(c.problem, c.device, streaming, std::numeric_limits<double>::max());
    for (const Plan& plan : {streaming, kept, make_plan(c.problem, c.device)}) {
      c.plan = plan;
      check_plan(c, depth, random);
      std::string kind = kPatterns[int(plan.pattern)];
      kind += plan.vector == 1 ? " scalar" : " vector";
      if (plan.path == Path::kOnChip) kind += std::string(" ") + kTiers[int(plan.tier)];
      ++seen[kind];
    }
    if (g.samples * g.size > int64_t{1} << 31) ++seen["beyond 32 bits"];
  }
  return seen;
}

}  // namespace fusednorm::host
