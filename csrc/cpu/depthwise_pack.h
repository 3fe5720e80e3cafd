// Tiles of depthwise_voxels.h: channel by channel, padded, positions that a stride keeps apart sorted by residue.
#pragma once
#include "conv_tile.h"

namespace convoxel {
namespace {

// Positions of one axis of a packed tile, sorted by residue: place i lies at (i % step) * each + i / step.
struct Slots {
  int64_t step, each;
  int64_t operator()(int64_t i) const { return i % step * each + i / step; }
  int64_t count() const { return step * each; }
};

inline Slots slots(const TileAxis& t, const PackedAxis& p) {
  int64_t step = t.dense ? t.out_step : 1;
  return {step, ceil_div(p.extent, step)};
}

inline int64_t most_slots(const Axis& a, int64_t n) { return extent(a, n) + a.in_step; }

// dst[i] = src[i * step], n of them; whole vectors only, the last of which may begin earlier.
template <class S, class R>
inline void copy_steps(const S* src, int64_t step, R* dst, int64_t n) {
  typedef Compute<S> A;
  typedef decltype(Vec<A>{} < Vec<A>{}) Mask;
  constexpr int L = kLanes<A>;
  int64_t i = 0;
  if (step == 1 && n >= L) {
    for (; i + L < n; i += L) store(dst + i, load(src + i));
    return store(dst + n - L, load(src + n - L));
  }
  if (step == 2) {
    Mask even;
    for (int j = 0; j < L; ++j) even[j] = 2 * j;
    for (; i + L < n; i += L) store(dst + i, __builtin_shuffle(load(src + 2 * i), load(src + 2 * i + L), even));
  }
  for (; i < n; ++i) from_compute(to_compute(src[i * step]), dst[i]);
}

// At least n zeros; up to a vector more.
template <class A>
inline void zero_over(A* p, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<A>) store(p + i, Vec<A>{});
}

// One row along W of `channels` channels, each to a tile of its own, `step` elements apart; what follows it in the
// tile is packed later.
template <class S, class A>
void pack_voxel_row(const S* row, const View<S>& x, const PackedAxis& w, const Slots& s, int64_t channels, A* to,
                    int64_t step) {
  if (!w.dense) {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < w.extent; ++i)
        to[c * step + i] = w.index[i] < 0 ? A(0) : to_compute(row[c * x.c + w.index[i] * x.axis[kW]]);
    return;
  }
  for (int64_t r = 0; r < s.step; ++r, to += s.each) {  // every step-th voxel, from the r-th
    int64_t first = w.first + r, rest = w.size - first, left = first < 0 ? -first : 0;
    if (s.step > 1) left = ceil_div(left, s.step), rest = ceil_div(max<int64_t>(0, rest), s.step);
    left = min(left, s.each);
    int64_t run = max<int64_t>(0, min(s.each, rest) - left);
    const S* from = row + (first + left * s.step) * x.axis[kW];
    for (int64_t c = 0; c < channels; ++c) {
      zero_over(to + c * step, left);
      if (x.axis[kW] == 1) copy_steps(from + c * x.c, s.step, to + c * step + left, run);
      if (x.axis[kW] == 1) zero_over(to + c * step + left + run, s.each - left - run);
    }
    if (x.axis[kW] == 1) continue;
    transpose(from, x.axis[kW] * s.step, to + left, step, run, channels);
    for (int64_t c = 0; c < channels; ++c) zero_over(to + c * step + left + run, s.each - left - run);
  }
}

// The place whose slot is s, or nothing where a stride leaves a gap.
inline int64_t source_of(const PackedAxis& p, const Slots& s, int64_t slot) {
  int64_t i = s.step == 1 ? slot : slot % s.each * s.step + slot / s.each;
  return i < p.extent ? p.index[i] : -1;
}

// In the order of the tile, since each row may write a vector beyond its end.
template <class S, class A>
void pack_voxels(const View<S>& x, int64_t n, int64_t c, int64_t channels, const PackedAxis* p, const Slots* s, A* tile,
                 int64_t step) {
  int64_t row = s[kW].count();
  const S* from = x.data + n * x.n + c * x.c;
  for (int64_t d = 0; d < s[kD].count(); ++d) {
    int64_t id = source_of(p[kD], s[kD], d);
    for (int64_t h = 0; h < s[kH].count(); ++h, tile += row) {
      int64_t ih = source_of(p[kH], s[kH], h);
      if (id >= 0 && ih >= 0)
        pack_voxel_row(from + id * x.axis[kD] + ih * x.axis[kH], x, p[kW], s[kW], channels, tile, step);
      else
        for (int64_t i = 0; i < channels; ++i) zero_over(tile + i * step, row);
    }
  }
  for (int64_t i = 0; i < channels; ++i) zero_over(tile + i * step, kLanes<A>);
}

}  // namespace
}  // namespace convoxel
