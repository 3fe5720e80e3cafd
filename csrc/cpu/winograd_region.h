// What Winograd's algorithms share that work on a region of tiles in two steps: every row of tiles packed and
// transformed along H and W, all threads at it, into [h, w point][plane][tile][channel]; then points by themselves.
#pragma once
#include "conv_tile.h"
#include "winograd.h"

namespace convoxel {
namespace {

constexpr int64_t kRowChannels = 32;  // that are packed at a time

struct Tiling {
  int64_t N, groups, C, K, taps;  // C to K channels of a group
  int M[kAxes];                   // outputs of a tile
  Axis axis[kAxes];
  int64_t tiles[kAxes], regions[kAxes], most[kAxes];  // most: tiles of a region
  int64_t points_d, points_hw;
};

inline void set_tiling(Tiling& p, const ConvGeometry& g, bool transposed) {
  p.N = g.N, p.groups = g.groups;
  p.C = (transposed ? g.K : g.C) / g.groups, p.K = (transposed ? g.C : g.K) / g.groups;
  p.taps = 1;
  for (int a = 0; a < kAxes; ++a) {
    p.axis[a] = make_axis(g.axis[a], transposed);
    p.M[a] = g.tile[a];
    p.taps *= p.axis[a].kernel;
    p.tiles[a] = ceil_div(p.axis[a].count, p.M[a]);
  }
  p.points_d = points(p.M[kD]), p.points_hw = points(p.M[kH]) * points(p.M[kW]);
}

// As many regions as `most` asks for, of nearly equal size.
inline void even_regions(Tiling& p) {
  for (int a = 0; a < kAxes; ++a) {
    p.regions[a] = ceil_div(p.tiles[a], p.most[a]);
    p.most[a] = ceil_div(p.tiles[a], p.regions[a]);
  }
}

inline int64_t extent_of(const Tiling& p, int a, int64_t tiles) { return tiles * p.M[a] + p.axis[a].kernel - 1; }

template <class A>
inline int64_t packed_elements(const Tiling& p, int64_t rows) {
  return extent_of(p, kH, rows) * extent_of(p, kW, p.most[kW]) * min(max(p.C, p.K), kRowChannels) + kLanes<A>;
}

struct Region {
  int64_t begin[kAxes], n[kAxes];  // tiles
};

inline Region make_region(const Tiling& p, int64_t at) {
  Region r;
  for (int a = kW; a >= kD; at /= p.regions[a--]) {
    Range tiles = piece(p.tiles[a], p.regions[a], at % p.regions[a]);
    r.begin[a] = tiles.begin, r.n[a] = tiles.end - tiles.begin;
  }
  return r;
}

// x or dy of a region: what is packed, and where its transform goes.
template <class S, class A>
struct Side {
  Joined<S> from;
  int64_t n, c0, channels;
  PackedAxis packed[kAxes];
  int64_t stride, slice, step;  // elements of a tile, of a plane, of a point
  A* data;
};

template <class S, class A>
void place(const Tiling& p, const Region& r, bool is_x, Side<S, A>& s) {
  for (int a = 0; a < kAxes; ++a) {
    PackedAxis& k = s.packed[a];
    k.dense = true, k.size = is_x ? p.axis[a].in : p.axis[a].count;
    k.extent = is_x ? extent_of(p, a, r.n[a]) : r.n[a] * p.M[a];
    k.first = r.begin[a] * p.M[a] + (is_x ? p.axis[a].lowest : 0);
    for (int64_t i = 0; i < k.extent; ++i) fill(k, i, k.first + i);
  }
  s.slice = r.n[kH] * r.n[kW] * s.stride;
  s.step = point_step<A>(s.packed[kD].extent * s.slice);
}

// One plane of `count` rows of tiles, along H and W; `rows` holds what is packed.
template <class T, class S, class A>
void transform_rows(const Tiling& p, const Region& r, const Side<S, A>& s, int64_t d, int64_t h, int64_t count, A* rows,
                    A* work) {
  with_outputs(p.M[kW], [&](auto M) {
    PackedAxis one[kAxes] = {s.packed[kD], s.packed[kH], s.packed[kW]};
    one[kD].extent = 1, one[kD].index += d;
    one[kH].extent = (count - 1) * M() + T::in(M()), one[kH].index += h * M();
    int64_t v_step[2] = {points(M()) * s.step, s.step};
    for (int64_t c = 0; c < s.channels; c += kRowChannels) {
      int64_t channels = min(kRowChannels, s.channels - c), x_step[2] = {one[kW].extent * channels, channels};
      A* to = s.data + d * s.slice + h * r.n[kW] * s.stride + c;
      pack_window(s.from, s.n, s.c0 + c, one, channels, rows);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t w = 0; w < r.n[kW]; ++w, to += s.stride)
          for (int64_t j = 0; j < channels; j += kLanes<A>)
            transform_plane<T, M()>(rows + i * M() * x_step[0] + w * M() * x_step[1] + j, x_step, work, to + j, v_step);
    }
  });
}

// Some channels of `n` tiles of each plane, to [d point][tile][channel].
template <class T, class A>
void transform_depth(const Tiling& p, int64_t tiles_d, int64_t n, const A* from, int64_t slice, int64_t stride,
                     int64_t channels, A* to) {
  int64_t each = stride == channels ? n * channels : channels;  // one run, where tiles are adjacent
  with_outputs(p.M[kD], [&](auto M) {
    for (int64_t d = 0; d < tiles_d; ++d)
      for (int64_t i = 0; i < n * channels / each; ++i)
        transform_planes<T, M()>(from + d * M() * slice + i * stride, slice, to + (d * n + i) * channels,
                                 tiles_d * n * channels, each);
  });
}

}  // namespace
}  // namespace convoxel
