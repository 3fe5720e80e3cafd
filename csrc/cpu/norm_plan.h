// How a norm's x [N, C, P] is cut into segments, and the moments of a segment.
//
// In both layouts x is [planes, P, channels]: contiguous [N * C, P, 1], channels-last [N, P, C]. Several
// pixels make a row as wide as some whole vectors, so that few channels cost no lanes.
#pragma once
#include "norm_tile.h"
#include "tables.h"

namespace convoxel {
namespace {

constexpr int64_t kSegmentBytes = 256 * 1024;  // an item: enough work to be worth a turn, little enough to share
constexpr int64_t kBlockBytes = 16 * 1024;     // stays in L1 between its two passes
constexpr int64_t kBlockRows = 128;            // terms of one chain of sums: 4e-7 of error at most in float
constexpr int64_t kRowElements = 1024;
constexpr int kConstants = 7;  // of a column, at most

struct Plan {
  int64_t planes, P, channels;
  int64_t pixels, width;  // of a row
  int64_t block;          // rows whose columns are summed in the compute type, then added in double
  int64_t segment, segments, planes_per_item, items;
};

inline int64_t gcd(int64_t a, int64_t b) {
  while (b) {
    int64_t r = a % b;
    a = b, b = r;
  }
  return a;
}

template <class S>
Plan make_plan(int64_t planes, int64_t P, int64_t channels) {
  constexpr int64_t size = sizeof(S), lanes = kLanes<Compute<S>>;
  Plan p{};
  p.planes = planes, p.P = P, p.channels = channels, p.pixels = 1;
  for (int64_t whole : {lanes, kStrip * lanes}) {
    int64_t pixels = whole / gcd(whole, channels);
    if (pixels * channels <= kRowElements) p.pixels = pixels;
  }
  p.width = p.pixels * channels;
  p.block = max<int64_t>(1, min(kBlockRows, kBlockBytes / (p.width * size)));
  p.segment = max<int64_t>(1, kSegmentBytes / (p.width * size)) * p.pixels;
  p.segments = ceil_div(P, p.segment);
  p.planes_per_item = p.segments > 1 ? 1 : max<int64_t>(1, kSegmentBytes / (P * channels * size));
  p.items = p.segments > 1 ? planes * p.segments : ceil_div(planes, p.planes_per_item);
  return p;
}

inline int64_t segment_pixels(const Plan& p, int64_t segment) { return min(p.segment, p.P - segment * p.segment); }
inline int64_t segment_offset(const Plan& p, int64_t plane, int64_t segment) {
  return (plane * p.P + segment * p.segment) * p.channels;
}
inline int64_t segment_index(const Plan& p, int64_t plane, int64_t segment) {
  return (plane * p.segments + segment) * p.channels;
}

// Calls f(plane, segment, thread) for every segment, from the last if `back`.
template <class F>
void each_segment(const Plan& p, int threads, bool back, const F& f) {
  parallel_for(threads, p.items, [&](int64_t i, int thread) {
    int64_t item = back ? p.items - 1 - i : i;
    if (p.segments > 1) return f(item / p.segments, item % p.segments, thread);
    int64_t begin = item * p.planes_per_item, end = min(p.planes, begin + p.planes_per_item);
    for (int64_t plane = begin; plane < end; ++plane) f(plane, 0, thread);
  });
}

// Calls f(offset, rows, width) for the blocks of a run of pixels; the last may be part of a row.
template <class F>
inline void each_block(const Plan& p, int64_t pixels, const F& f) {
  int64_t rows = pixels / p.pixels, rest = pixels % p.pixels;
  for (int64_t r = 0; r < rows; r += p.block) f(r * p.width, min(p.block, rows - r), p.width);
  if (rest) f(rows * p.width, 1, rest * p.channels);
}

// One thread's constants and sums of the columns.
template <class A>
struct Columns {
  A* constant[kConstants];             // [width]
  double *sum, *other, *mean, *spare;  // [width]
};

template <class A>
int64_t columns_bytes(const Plan& p) {
  return p.width * int64_t(kConstants * sizeof(A) + 4 * sizeof(double));
}

template <class A>
Columns<A> columns(const Plan& p, char* at) {
  Columns<A> c;
  double* d = reinterpret_cast<double*>(at);
  c.sum = d, c.other = d + p.width, c.mean = d + 2 * p.width, c.spare = d + 3 * p.width;
  A* a = reinterpret_cast<A*>(d + 4 * p.width);
  for (int i = 0; i < kConstants; ++i) c.constant[i] = a + i * p.width;
  return c;
}

// Of the channels' constants, the columns'.
template <class A>
inline void expand(const Plan& p, A* constant) {
  int64_t used = min(p.width, p.P * p.channels);
  if (p.channels == 1) {
    A a = constant[0];
    for (int64_t j = 1; j < used; ++j) constant[j] = a;
    return;
  }
  for (int64_t j = p.channels; j < used; j += p.channels)
    __builtin_memcpy(constant + j, constant, size_t(p.channels) * sizeof(A));
}

// Of the columns' sums, the channels'.
inline void fold(const Plan& p, double* sum) {
  int64_t used = min(p.width, p.P * p.channels);
  for (int64_t j = p.channels; j < used; j += p.channels)
    for (int64_t c = 0; c < p.channels; ++c) sum[c] += sum[j + c];
}

inline void zero(double* p, int64_t n) { __builtin_memset(p, 0, size_t(n) * sizeof(double)); }
inline bool finite(double a) { return a - a == 0; }

// Mean and sum of squared deviations of each channel over a run of pixels. What is squared is the
// deviation from the mean of the first block: sums and squares then cancel by a factor of
// segment / block at most, whatever the mean is.
template <class S, class A>
void scaled_moments(const Plan& p, const S* x, int64_t pixels, A scale, const Columns<A>& t, double* mean, double* m2) {
  int64_t first = min(pixels, p.block * p.pixels);
  A* shift = t.constant[0];
  auto sums = [&](int64_t count) {
    zero(t.sum, p.width), zero(t.other, p.width);
    each_block(p, count, [&](int64_t offset, int64_t rows, int64_t width) {
      add_deviations(x + offset, rows, width, scale, shift, t.sum, t.other);
    });
    fold(p, t.sum), fold(p, t.other);
  };
  for (int64_t j = 0; j < p.width; ++j) shift[j] = 0;
  sums(first);
  for (int64_t c = 0; c < p.channels; ++c) {
    A m = A(t.sum[c] / double(first));
    shift[c] = finite(double(m)) ? m : 0;
  }
  expand(p, shift);
  sums(pixels);
  double n = double(pixels), k = double(scale);
  for (int64_t c = 0; c < p.channels; ++c) {
    double s = t.sum[c], q = t.other[c] - s * s / n;
    mean[c] = (double(shift[c]) + s / n) / k;
    m2[c] = (q < 0 ? 0 : q) / (k * k);
  }
}

// Squares of more than 1e19 overflow a float: such a channel is taken again in units of 2^80.
template <class S, class A>
void moments(const Plan& p, const S* x, int64_t pixels, const Columns<A>& t, double* mean, double* m2) {
  scaled_moments(p, x, pixels, A(1), t, mean, m2);
  bool all = true;
  for (int64_t c = 0; c < p.channels; ++c) all &= finite(m2[c]);
  if (all) return;
  scaled_moments(p, x, pixels, A(0x1p-80), t, t.mean, t.spare);
  for (int64_t c = 0; c < p.channels; ++c)
    if (!finite(m2[c])) mean[c] = t.mean[c], m2[c] = t.spare[c];
}

}  // namespace
}  // namespace convoxel
