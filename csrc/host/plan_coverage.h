// Where the threads of a plan go, without launching it: each is told its number and asked.
//
// Every element is to be visited by exactly one (job, thread, step), as part of its own channel,
// cell and piece. Where there are few they are counted one by one. Of more, a tile's elements are
// counted, and for some the step that visits them is solved for, in the closed form of a walk.
#pragma once

#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/pipeline.cuh"

namespace fusednorm::host {

struct PlanCase {
  Problem problem;
  Device device;
  Plan plan;
};

inline std::string describe(const PlanCase& c) {
  const Problem& p = c.problem;
  const Geometry& g = p.geometry;
  const Device& d = c.device;
  const Plan& q = c.plan;
  std::string text;
  const auto say = [&](const char* name, int64_t value) {
    text += std::string(" ") + name + " " + std::to_string(value);
  };
  say("N", g.samples), say("C", g.channels), say("S", g.spatial), say("G", g.groups);
  say("sets", g.sets), say("element", p.element_size), say("nhwc", p.channels_last);
  say("aligned", p.aligned), say("direction", int(p.direction)), say("residual", p.residual);
  say("mask", p.mask), say("dresidual", p.dresidual), say("act", p.act);
  text += "; device:";
  say("sms", d.num_sms), say("block bytes", d.shared_per_block), say("sm bytes", d.shared_per_sm);
  say("registers", d.registers_per_sm), say("threads", d.threads_per_sm);
  say("capability", d.capability), say("cooperative", d.cooperative);
  say("max_cluster", d.max_cluster);
  text += "; plan:";
  say("path", int(q.path)), say("tier", int(q.tier)), say("pattern", int(q.pattern));
  say("vector", q.vector), say("block", q.block), say("lanes", q.lanes), say("tiles", q.tiles);
  say("splits", q.splits), say("rows", q.rows_of_tile), say("grid", q.grid);
  say("tiles_per_cell", q.tiles_per_cell), say("cells_per_tile", q.cells_per_tile);
  say("pieces_per_tile", q.pieces_per_tile), say("counters", q.counters), say("fan", q.fan);
  say("fans", q.fans), say("group", q.ctas_per_group), say("slices", q.slices);
  say("jobs", q.jobs), say("jobs_per_cta", q.jobs_per_cta), say("slots", q.slots);
  say("shared", q.shared_bytes), say("ctas_per_sm", q.ctas_per_sm), say("nodes", q.nodes);
  return text;
}

inline void require(bool holds, const PlanCase& c, const std::string& what) {
  if (!holds) throw std::runtime_error(what + ":" + describe(c));
}

// What is where in memory, from nothing but the definition of the layouts.
struct Place {
  int64_t sample;
  int64_t d;  // index in the sample, NCHW order
};

inline Place place_of(const PlanCase& c, int64_t offset) {
  const Geometry& g = c.problem.geometry;
  const int64_t r = offset % g.size;
  return {offset / g.size,
          c.problem.channels_last ? r % g.channels * g.spatial + r / g.channels : r};
}

inline int64_t offset_of(const PlanCase& c, const Place& place) {
  const Geometry& g = c.problem.geometry;
  const int64_t channel = place.d / g.spatial, position = place.d % g.spatial;
  return place.sample * g.size +
         (c.problem.channels_last ? position * g.channels + channel : place.d);
}

// f(Tile) for the tile type that walks this plan; the element type only has to fit the vector.
template <typename F>
void with_tile_type(const Plan& plan, const F& f) {
  dispatch_tile(plan.vector == 8   ? DType::kFloat16
                : plan.vector == 4 ? DType::kFloat32
                                   : DType::kFloat64,
                plan, [&](auto type) { f(type); });
}

inline void be_thread(const Plan& plan, int thread) {
  blockDim = dim3(plan.block);
  threadIdx = {static_cast<unsigned>(thread), 0, 0};
}

// Where a cursor is after k steps, in closed form.
inline int64_t jump(const Cursor& cursor, int64_t k) {
  return cursor.offset + k * cursor.hop +
         (cursor.unit + k * cursor.unit_hop) / cursor.units * cursor.carry;
}

// Channel, cell, slots and the first, second and last address of one thread's walk.
template <typename Tile>
void check_walk(const PlanCase& c, const Tile& tile, const Cursor& cursor) {
  const Geometry& g = c.problem.geometry;
  require(c.plan.path == Path::kStreaming || cursor.left <= c.plan.slots, c, "a slot an access");
  if (!cursor.more()) return;
  const int64_t last = int64_t{cursor.left} - 1;
  for (const int64_t k : {int64_t{0}, std::min<int64_t>(1, last), last}) {
    const int64_t offset = jump(cursor, k);
    require(offset >= 0 && offset + Tile::kVector <= g.samples * g.size, c, "within the tensor");
    require(offset % Tile::kVector == 0, c, "aligned");
    for (int v = 0; v < Tile::kVector; ++v) {
      const Place place = place_of(c, offset + v);
      const int piece = tile.local(v % Tile::kWidth);
      const int64_t set = g.sets == 1 ? 0 : place.sample;
      require(piece < tile.pieces(), c, "a piece of the tile");
      require(tile.piece(piece) == g.piece_of(place.d), c, "piece of an element");
      require(tile.channel(piece) == place.d / g.spatial, c, "channel of an element");
      require(tile.cell(piece) == set * g.groups + place.d / g.group_size, c, "cell of an element");
      const int64_t partial = tile.partial(piece) / c.plan.splits;
      require(partial == set * g.pieces + tile.piece(piece), c, "place of a partial");
    }
  }
}

// Every element one by one.
template <typename Tile>
void count_elements(const PlanCase& c) {
  const Geometry& g = c.problem.geometry;
  std::vector<unsigned char> visits(g.samples * g.size);
  for (const bool back : {false, true}) {
    for (int64_t job = 0; job < c.plan.blocks(); ++job) {
      for (int thread = 0; thread < c.plan.block; ++thread) {
        be_thread(c.plan, thread);
        const Tile tile(g, c.plan, job);
        Cursor cursor = tile.cursor(back);
        check_walk(c, tile, cursor);
        const Cursor start = cursor;
        for (int64_t k = 0; cursor.more(); ++k, cursor.step()) {
          require(cursor.offset == jump(start, k), c, "steps in closed form");
          for (int v = 0; v < Tile::kVector; ++v) ++visits[cursor.offset + v];
        }
      }
    }
    for (const unsigned char visit : visits) require(visit == 1 + back, c, "each element once");
  }
}

// Every (job, thread) of the tiles around one element: how many elements they visit, and how often
// this one.
template <typename Tile>
void solve_element(const PlanCase& c, const Place& place, bool every_split) {
  const Geometry& g = c.problem.geometry;
  const Plan& q = c.plan;
  const int64_t piece = g.piece_of(place.d);
  const int64_t set = g.sets == 1 ? 0 : place.sample;
  // Which tile has the piece: pieces go round the ranges first.
  const int64_t in_range = piece / q.ranges, range = piece % q.ranges;
  const int64_t number = q.pattern == Pattern::kRuns ? set * g.pieces + piece
                                                     : (set * q.ranges + range) * q.column_tiles +
                                                           in_range / q.pieces_per_tile;
  be_thread(q, 0);
  const Tile owner(g, q, number * q.splits);
  int64_t elements = 0, has = 0;
  for (int i = 0; i < owner.pieces(); ++i) {
    const int64_t p = owner.piece(i);
    elements += g.pooled() * (g.piece_start(p + 1) - g.piece_start(p));
    has += p == piece;
  }
  require(has == 1, c, "a tile has the piece");

  // Positions are rows of columns, or accesses of a run, numbered over the samples of the set.
  const int64_t start = g.piece_start(piece);
  const int64_t units = q.pattern == Pattern::kRuns
                            ? (g.piece_start(piece + 1) - start) / Tile::kVector
                            : q.rows_per_sample;
  const auto position = [&](const Place& at) {
    const int64_t row = q.pattern == Pattern::kRuns     ? (at.d - start) / Tile::kVector
                        : q.pattern == Pattern::kFrames ? 0
                                                        : at.d % g.spatial % q.rows_per_sample;
    return (at.sample - set * g.pooled()) * units + row;
  };
  const int64_t wanted = position(place), offset = offset_of(c, place);
  // A share of runs is whole warps, of this piece's length.
  const bool runs = q.pattern == Pattern::kRuns;
  const int64_t share = runs ? round_up(ceil_div(g.pooled() * units, q.splits), kWarp)
                             : ceil_div(q.rows_of_tile, q.splits);
  const int64_t guess = wanted / share;
  const int64_t first = every_split ? 0 : std::max<int64_t>(0, guess - 1);
  const int64_t last = every_split ? q.splits : std::min(q.splits, guess + 2);
  int64_t visited = 0, times = 0;
  for (int64_t split = first; split < last; ++split) {
    for (int thread = 0; thread < q.block; ++thread) {
      be_thread(q, thread);
      const Tile tile(g, q, number * q.splits + split);
      const Cursor cursor = tile.cursor();
      check_walk(c, tile, cursor);
      visited += int64_t{cursor.left} * Tile::kVector;
      if (!cursor.more()) continue;
      const int64_t from = position(place_of(c, cursor.offset));
      const int64_t stride = cursor.left > 1 ? position(place_of(c, jump(cursor, 1))) - from : 1;
      require(stride > 0, c, "a walk goes on");
      const int64_t k = (wanted - from) / stride;
      if (wanted < from || (wanted - from) % stride != 0 || k >= cursor.left) continue;
      const int64_t begin = jump(cursor, k);
      times += begin <= offset && offset < begin + Tile::kVector;
    }
  }
  require(times == 1, c, "element " + std::to_string(offset) + " visited once");
  require(!every_split || visited == elements, c, "the elements of a tile");
}

// Tiles are numbered over sets, ranges and columns, and those of a row hold its pieces, each once.
template <typename Tile>
void check_tiles(const PlanCase& c) {
  const Geometry& g = c.problem.geometry;
  const Plan& q = c.plan;
  be_thread(q, 0);
  const Tile first(g, q, 0), last(g, q, q.blocks() - 1);
  require(first.piece(0) == 0 && last.piece(last.pieces() - 1) == g.pieces - 1, c,
          "tiles in order");
  if (q.pattern == Pattern::kRuns) {
    require(q.tiles == g.sets * g.pieces && q.lanes == 1, c, "a tile a piece");
    return;
  }
  require(q.tiles == g.sets * q.ranges * q.column_tiles, c, "tiles of all ranges");
  require((q.column_tiles - 1) * q.pieces_per_tile * q.ranges < g.pieces &&
              q.column_tiles * q.pieces_per_tile * q.ranges >= g.pieces,
          c, "tiles of a row");
  require(q.pieces_per_tile * q.even == int64_t{q.lanes} * q.vector, c, "lanes of a row");
  require(last.pieces() >= 1, c, "no empty tile");
}

// The tiles that belong together hold complete cells: those of a slice, or of a fold's last level.
template <typename Tile>
void check_component(const PlanCase& c, int64_t number) {
  const Geometry& g = c.problem.geometry;
  const Plan& q = c.plan;
  if (q.cells_per_tile == 0 || (q.pattern == Pattern::kRuns && g.even == 0)) return;
  be_thread(q, 0);
  std::map<int64_t, int64_t> elements;  // of each cell
  for (int64_t i = 0; i < q.tiles_per_cell; ++i) {
    const Tile tile(g, q, (number * q.tiles_per_cell + i) * q.splits);
    for (int piece = 0; piece < tile.pieces(); ++piece) {
      const int64_t p = tile.piece(piece);
      elements[tile.cell(piece)] += g.pooled() * (g.piece_start(p + 1) - g.piece_start(p));
    }
  }
  require(q.tiles_per_cell == 1 || elements.size() == 1, c, "several tiles, one cell");
  require(static_cast<int64_t>(elements.size()) <= q.cells_per_tile, c, "cells of a tile");
  for (const auto& [cell, count] : elements) require(count == g.count(), c, "complete cells");
}

}  // namespace fusednorm::host
