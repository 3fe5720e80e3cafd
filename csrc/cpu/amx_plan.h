// How the AMX correlations (conv_amx.cpp) cut a problem: tiles of the output, slabs of a window, items of work.
#pragma once
#include "conv_amx.h"

namespace convoxel {
namespace {

#if defined(__AMX_BF16__)

constexpr int64_t kWindowBytes = 640 * 1024;  // a third of L2: as much again comes ahead of time, the rest is weights
constexpr int64_t kFewRows = 60;              // of a window along W: fewer have too much halo, and are cut shorter
constexpr int64_t kSpaceItems = 32;           // cut space at least this fine, output channels half as fine
constexpr int64_t kFewProducts = 1 << 24;     // 30 us on one core: below it no team

struct Plan {
  bool transposed;       // G
  bool w_last, w_float;  // as ConvGeometry has them
  int64_t N, C, K, blocks, pairs, taps;
  Axis axis[kAxes];
  bool by_taps[kAxes], flat;  // flat: positions of a tile run on over the ends of rows along W
  bool in_place;              // tiles are loaded from x itself
  int64_t tiles[kAxes], slabs_per_item, pieces, pairs_per_item, chunks, items;
  int64_t window, lines, steps, index[kAxes];  // elements of scratch
};

inline int64_t window_positions(const Plan& p) {
  int64_t n = p.blocks;
  for (int a = 0; a < kAxes; ++a) n *= packed_extent(p.axis[a], p.axis[a].tile, p.by_taps[a]);
  return n;
}

// Which way the positions of a slice make the fewest tiles of 16.
inline void choose_layout(Plan& p) {
  const Axis &h = p.axis[kH], &w = p.axis[kW];
  int64_t nh = h.count, nw = w.count;
  int64_t rows = nh * ceil_div(nw, kRows), taps = ceil_div(nh * nw, kRows), flat = rows + 1;
  if (h.in_step == 1 && w.in_step == 1) flat = ceil_div((nh - 1) * extent(w, nw) + nw, kRows);
  p.flat = flat < rows;
  if (10 * min(rows, flat) > 12 * taps) {  // rows packed tap by tap cost time, too
    p.flat = true;
    p.by_taps[kW] = w.kernel > 1 || w.in_step > 1;
    p.by_taps[kH] = h.in_step > 1;
  }
}

// One tap that meets every position: channels-last x has the tiles already.
inline bool needs_no_window(const Plan& p, bool last) {
  bool whole = last && p.C % kChannels == 0 && p.axis[kW].in % kRows == 0;
  for (const Axis& a : p.axis)
    whole = whole && a.kernel == 1 && a.phases == 1 && a.in_step == 1 && a.lowest == 0 && a.in == a.out;
  return whole;
}

inline bool fits(const Plan& p) { return window_positions(p) * kChannels * int64_t(sizeof(bfloat16)) <= kWindowBytes; }

// Rows along W whole where they fit, then several along H, whose halo is packed twice, then slices of a slab.
inline void choose_tiles(Plan& p) {
  Axis *d = &p.axis[kD], *h = &p.axis[kH], *w = &p.axis[kW];
  d->tile = h->tile = 1, w->tile = w->count;
  while (window_positions(p) * kChannels * 2 * kFewRows > kWindowBytes * extent(*d, 1) * extent(*h, 1) &&
         w->tile > kRows)
    w->tile = round_up(ceil_div(w->tile, 2), kRows);
  for (bool grown = true; grown;) {
    grown = false;
    for (Axis* a : {h, d}) {
      bool high = h->tile >= 4 * d->tile;  // a slab gets its depth for the cost of a copy
      if (a->tile == a->count || (a == h && high && d->tile < d->count) || (a == d && !high && h->tile < h->count))
        continue;
      ++a->tile;
      if (fits(p)) grown = true;
      else --a->tile;
    }
  }
  for (Axis* a : {h, d}) a->tile = ceil_div(a->count, ceil_div(a->count, a->tile));
}

inline void count_items(Plan& p) {
  for (int a = 0; a < kAxes; ++a) p.tiles[a] = ceil_div(p.axis[a].count, p.axis[a].tile);
  p.pieces = ceil_div(p.tiles[kD], p.slabs_per_item), p.chunks = ceil_div(p.pairs, p.pairs_per_item);
  p.items = p.N * p.pieces * p.tiles[kH] * p.tiles[kW] * p.chunks;
}

inline Plan make_plan(const ConvGeometry& g, bool transposed) {
  Plan p{};
  p.transposed = transposed, p.w_last = g.w_last, p.w_float = g.w_float, p.N = g.N, p.taps = 1;
  p.C = transposed ? g.K : g.C, p.K = transposed ? g.C : g.K;
  p.blocks = ceil_div(p.C, kChannels), p.pairs = ceil_div(p.K, kOutputs);
  for (int a = 0; a < kAxes; ++a) p.axis[a] = make_axis(g.axis[a], transposed), p.taps *= g.axis[a].kernel;
  p.in_place = (transposed || g.parts[1] == 0) && needs_no_window(p, transposed ? g.y_last : g.x_last);
  if (!p.in_place) choose_layout(p);
  choose_tiles(p);
  p.slabs_per_item = ceil_div(p.axis[kD].count, p.axis[kD].tile), p.pairs_per_item = p.pairs;
  count_items(p);
  while (p.items < kSpaceItems && p.slabs_per_item > 1)
    p.slabs_per_item = ceil_div(p.slabs_per_item, 2), count_items(p);
  while (p.items < kSpaceItems / 2 && p.pairs_per_item > 1)
    p.pairs_per_item = ceil_div(p.pairs_per_item, 2), count_items(p);
  for (int a : {kH, kD})
    while (p.items < kSpaceItems / 2 && p.axis[a].tile > 8)
      p.axis[a].tile = ceil_div(p.axis[a].tile, 2), count_items(p);
  for (int a = 0; a < kAxes; ++a) p.index[a] = packed_extent(p.axis[a], p.axis[a].tile, p.by_taps[a]);
  int64_t beyond = kRows * p.axis[kW].in_step * p.axis[kH].in_step;  // what the last tile loads and nobody uses
  p.window = (window_positions(p) + beyond) * kChannels;
  p.lines = round_up(p.axis[kW].in, kRows) * kChannels;
  p.steps = p.blocks * p.taps;
  return p;
}

#endif

}  // namespace
}  // namespace convoxel
