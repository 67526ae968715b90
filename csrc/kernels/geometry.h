// Which cell, channel and piece an element of a sample belongs to.
//
// x is (N, C, *spatial), S spatial positions, D = C*S elements a sample. d = c*S + s is an
// element's index in NCHW order whatever the memory layout. Channels change at multiples of S,
// groups at multiples of L = D/G. Pieces are the common refinement: [0, D) cut at every multiple of
// S and of L. A piece has one channel and one group, and the pieces of a channel, or of a group,
// are contiguous:
//
//   piece(d) = d/S + d/L - d/lcm(S, L)       P = piece(D) = C + G - gcd(C, G)
//
// Statistics pool the batch (A = 1) or stay within a sample (A = N). Cell (a, g) is number a*G + g.
// Everything is 64-bit and in closed form, so a block finds its piece without tables.
#pragma once

#include <numeric>

#include "platform.cuh"

namespace fusednorm {

struct Geometry {
  int64_t samples;     // N
  int64_t channels;    // C
  int64_t spatial;     // S
  int64_t groups;      // G
  int64_t sets;        // A: N if statistics are per sample, else 1
  int64_t size;        // D
  int64_t group_size;  // L
  int64_t period;      // lcm(S, L), after which the pattern of pieces repeats
  int64_t pieces;      // P
  int64_t even;        // the length of a piece if all have the same, else 0

  FUSEDNORM_HOST_DEVICE int64_t cells() const { return sets * groups; }

  // Samples that share one set of statistics, and elements of a cell.
  FUSEDNORM_HOST_DEVICE int64_t pooled() const { return samples / sets; }
  FUSEDNORM_HOST_DEVICE int64_t count() const { return pooled() * group_size; }

  // The piece that starts at or contains d, for d in [0, D]; piece_of(D) = P.
  FUSEDNORM_HOST_DEVICE int64_t piece_of(int64_t d) const {
    return d / spatial + d / group_size - d / period;
  }

  // The first element of piece p, for p in [0, P]; piece_start(P) = D.
  //
  // Let r > 0 count the pieces since the period began. On the real line d/S + d/L = r at
  // d = r*S*L/(S+L), where d/S = r*L/(S+L) =: u and d/L = r*S/(S+L) =: v are not integers and add
  // up to r, so floor(u) + floor(v) = r - 1 cuts lie before d, and the r-th is the next of either
  // kind.
  FUSEDNORM_HOST_DEVICE int64_t piece_start(int64_t p) const {
    if (even) return p * even;
    const int64_t per_period = period / spatial + period / group_size - 1;
    const int64_t r = p % per_period;
    const int64_t begin = p / per_period * period;
    if (r == 0) return begin;
    const int64_t channel_cut = (r * group_size / (spatial + group_size) + 1) * spatial;
    const int64_t group_cut = (r * spatial / (spatial + group_size) + 1) * group_size;
    return begin + (channel_cut < group_cut ? channel_cut : group_cut);
  }

  // Piece ranges [first, last) of a channel and of a group are [piece_of(c*S), piece_of((c+1)*S))
  // and [piece_of(g*L), piece_of((g+1)*L)).
  FUSEDNORM_HOST_DEVICE int64_t channel_of(int64_t piece) const {
    return piece_start(piece) / spatial;
  }
};

// Sizes at least 1; num_groups divides C*S.
inline Geometry make_geometry(int64_t samples, int64_t channels, int64_t spatial,
                              int64_t num_groups, bool per_sample) {
  Geometry g;
  g.samples = samples;
  g.channels = channels;
  g.spatial = spatial;
  g.groups = num_groups;
  g.sets = per_sample ? samples : 1;
  g.size = channels * spatial;
  g.group_size = g.size / num_groups;
  // lcm(D/C, D/G) = D/gcd(C, G): no product that could overflow.
  const int64_t shared = std::gcd(channels, num_groups);
  g.period = g.size / shared;
  g.pieces = channels + num_groups - shared;
  const int64_t finest = channels > num_groups ? channels : num_groups;
  g.even = g.pieces == finest ? g.size / finest : 0;
  return g;
}

}  // namespace fusednorm
