// A thread's walk over a grid of samples x units, division-free after its start.
//
// Positions are numbered sample*units + unit and visited at a constant stride; the offset in memory
// is base + sample*sample_step + unit*unit_step. A step adds stride/units samples and stride%units
// units and carries at most once: nothing is a power of two, and no run has to fill a block. The
// walk back is the same steps: -stride is -(samples + 1) samples and units - stride%units units.
#pragma once

#include "platform.cuh"

namespace fusednorm {

struct Cursor {
  int left;  // positions still to visit, below 0 beyond the end; a thread has fewer than 2^31
  int64_t unit;
  int64_t units;
  int64_t unit_hop;  // stride % units
  int64_t offset;
  int64_t hop;    // offset of one step that does not carry
  int64_t carry;  // to be added when it does

  // Visits first, first + stride, ... below last, or the same from the last one back.
  FUSEDNORM_DEVICE Cursor(int64_t first, int64_t last, int64_t stride, int64_t units, int64_t base,
                          int64_t unit_step, int64_t sample_step, bool back = false)
      : left(first < last ? int((last - first + stride - 1) / stride) : 0), units(units) {
    if (back && left > 0) first += int64_t(left - 1) * stride;
    const int64_t sample = first / units;
    int64_t sample_hop = stride / units;
    unit = first - sample * units;
    unit_hop = stride - sample_hop * units;
    if (back) {
      sample_hop = -(sample_hop + 1);
      unit_hop = units - unit_hop;
    }
    offset = base + sample * sample_step + unit * unit_step;
    hop = sample_hop * sample_step + unit_hop * unit_step;
    carry = sample_step - units * unit_step;
  }

  FUSEDNORM_DEVICE bool more() const { return left > 0; }

  FUSEDNORM_DEVICE void step() {
    --left;
    unit += unit_hop;
    offset += hop;
    if (unit >= units) {
      unit -= units;
      offset += carry;
    }
  }
};

// The next U positions of a cursor, those beyond its end not live.
template <int U>
struct Batch {
  int64_t offset[U];
  bool live[U];

  FUSEDNORM_DEVICE explicit Batch(Cursor& cursor) {
    FUSEDNORM_UNROLL
    for (int u = 0; u < U; ++u) {
      offset[u] = cursor.offset;
      live[u] = cursor.more();
      cursor.step();
    }
  }
};

}  // namespace fusednorm
