// One spatial axis of the direct engine: phases, the window of the source that a tile of the output
// reads, and where in the packed window each tap lies.
#pragma once
#include "../kernels.h"
#include "simd.h"

namespace convoxel {
namespace {

// One axis as the engine sees it. j counts output positions within a phase.
struct Axis {
  int64_t in, out, kernel;
  int64_t phases;           // 1 (F) or stride (G)
  int64_t in_step;          // step of the source per j
  int64_t in_tap;           // step of the source per tap
  int64_t w_tap;            // step of the (packed) weight's tap index per tap
  int64_t count;            // j positions, at most, of a phase
  int64_t lowest, highest;  // source offsets that any tap of any phase reaches at j = 0
  int64_t tile;             // j positions of a tile
  bool transposed;          // G
  int64_t common, inverse;  // G: gcd(stride, dilation), inverse of dilation / common modulo stride / common
  ConvAxis conv;
};

struct Phase {
  int64_t first, taps, start, w_first;
};

inline int64_t gcd(int64_t a, int64_t b) { return b ? gcd(b, a % b) : a; }

// The x in [0, m) with a x = 1 modulo m, for a and m without common divisor (extended Euclid).
inline int64_t inverse(int64_t a, int64_t m) {
  int64_t x = 0, next = 1;
  for (int64_t r = m, rest = a % m; rest;) {
    int64_t q = r / rest, x2 = x - q * next, r2 = r - q * rest;
    x = next, next = x2, r = rest, rest = r2;
  }
  return x < 0 ? x + m : x;
}

inline Phase forward_phase(const ConvAxis& a) { return {0, a.kernel, -a.padding, 0}; }

// Outputs i = r + s j of G: taps k with (r + padding - k dilation) divisible by s, in falling order so
// that the source rises. Packed weights are flipped: tap index kernel - 1 - k.
inline Phase input_grad_phase(const Axis& t, int64_t r) {
  const ConvAxis& a = t.conv;
  int64_t period = a.stride / t.common, at = r + a.padding;
  if (at % t.common) return {r, 0, 0, 0};
  int64_t k = int64_t(__int128(at / t.common % period) * t.inverse % period);
  if (k >= a.kernel) return {r, 0, 0, 0};
  int64_t taps = ceil_div(a.kernel - k, period), last = k + (taps - 1) * period;
  return {r, taps, (at - last * a.dilation) / a.stride, a.kernel - 1 - last};
}

inline Phase phase(const Axis& a, int64_t i) { return a.transposed ? input_grad_phase(a, i) : forward_phase(a.conv); }

inline Axis make_axis(const ConvAxis& a, bool transposed) {
  Axis t{};
  t.conv = a, t.transposed = transposed, t.kernel = a.kernel;
  if (!transposed) {
    t.in = a.in, t.out = a.out, t.phases = 1, t.in_step = a.stride, t.in_tap = a.dilation, t.w_tap = 1;
    t.count = a.out, t.lowest = -a.padding, t.highest = (a.kernel - 1) * a.dilation - a.padding;
    return t;
  }
  int64_t g = t.common = gcd(a.stride, a.dilation);
  t.in = a.out, t.out = a.in, t.phases = min(a.stride, a.in), t.in_step = 1, t.in_tap = a.dilation / g;
  t.w_tap = a.stride / g, t.inverse = inverse(t.in_tap, t.w_tap), t.count = ceil_div(a.in, a.stride);
  bool first = true;
  for (int64_t r = 0; r < t.phases; ++r) {
    Phase f = input_grad_phase(t, r);
    if (!f.taps) continue;
    int64_t end = f.start + (f.taps - 1) * t.in_tap;
    t.lowest = first ? f.start : min(t.lowest, f.start);
    t.highest = first ? end : max(t.highest, end);
    first = false;
  }
  return t;
}

inline int64_t dense_extent(const Axis& a, int64_t n) { return (n - 1) * a.in_step + a.highest - a.lowest + 1; }
// Far-apart taps (dilation, stride over kernel) are packed tap by tap instead of with what lies between.
inline int64_t extent(const Axis& a, int64_t n) { return min(dense_extent(a, n), a.kernel * n); }

// Which positions of one axis a tile packs. `index` gives the source position of each, or -1.
struct PackedAxis {
  int64_t extent;
  bool dense;  // index[i] = first + i, but for padding
  int64_t first, size;
  int64_t* index;
};

inline void fill(PackedAxis& p, int64_t at, int64_t source) {
  p.index[at] = source >= 0 && source < p.size ? source : -1;
}

struct TileAxis {
  int64_t begin, n;  // j positions of this tile
  bool dense;
  int64_t out_step, tap_step;  // of the packed window
};

inline TileAxis place_axis(const Axis& t, int64_t tile, PackedAxis& packed) {
  TileAxis s{tile * t.tile, min(t.tile, t.count - tile * t.tile), true, t.in_step, t.in_tap};
  packed.size = t.in;
  packed.extent = dense_extent(t, s.n);
  packed.first = s.begin * t.in_step + t.lowest;
  s.dense = packed.dense = packed.extent <= t.kernel * s.n;
  if (s.dense) {
    for (int64_t i = 0; i < packed.extent; ++i) fill(packed, i, packed.first + i);
    return s;
  }
  packed.extent = t.kernel * s.n;
  s.out_step = 1, s.tap_step = t.w_tap * s.n;  // tap by tap, as the packed weights have them
  for (int64_t i = 0; i < packed.extent; ++i) packed.index[i] = -1;
  for (int64_t r = 0; r < t.phases; ++r) {
    Phase f = phase(t, r);
    for (int64_t k = 0; k < f.taps; ++k)
      for (int64_t j = 0; j < s.n; ++j)
        fill(packed, (f.w_first + k * t.w_tap) * s.n + j, (s.begin + j) * t.in_step + f.start + k * t.in_tap);
  }
  return s;
}

inline int64_t origin(const Axis& a, const TileAxis& s, const Phase& f) {
  return s.dense ? f.start - a.lowest : f.w_first * s.n;
}

// How many j of this tile lie inside the output, for this phase.
inline int64_t positions(const Axis& a, const TileAxis& s, const Phase& f) {
  return max<int64_t>(0, min(s.n, ceil_div(a.out - f.first, a.phases) - s.begin));
}

}  // namespace
}  // namespace convoxel
