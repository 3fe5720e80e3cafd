// Winograd's convolution, forward F(x, w) and input gradient G(dy, w) as one correlation, for three taps along H
// and W, three or one along D, stride and dilation 1.
//
// An item of work is (image, group, region of tiles), and stays in the second-level cache:
//   each plane of the region is packed, its tiles transformed along H and W:  V [h, w point][plane][tile][c];
//   for each block of output channels, for each h, w point, in the first-level cache:
//     V's planes are transformed along D:                                     X [d point][tile][c],
//     multiplied by the weights U [h, w point][d point][c][k]:                Y [d point][tile][k],
//     and transformed back along D:                                           M [h, w point][plane][tile][k];
//   M's tiles are transformed back along H and W, into y.
// A plane's transform serves all tiles that overlap there. A bias joins the point 1 of every axis, which each output
// has once. What a tile computes depends neither on the region nor on the thread that it falls to.
#include <type_traits>

#include "conv_weights.h"
#include "gemm.h"
#include "tables.h"
#include "winograd.h"

namespace convoxel {
namespace {

constexpr int64_t kChain = 64;                 // channels of one chain of sums; their X stays in L1
constexpr int64_t kPlaneChannels = 32;         // of x that are packed at a time
constexpr int64_t kNearWeights = 1024 * 1024;  // bytes of U that stay in the second-level cache

struct Plan {
  bool transposed;
  int64_t N, groups, C, K, taps;
  int M[kAxes];
  Axis axis[kAxes];
  int64_t tiles[kAxes], regions[kAxes], items;
  int64_t points_d, points_hw, most_tiles, c_stride;  // most_tiles: of a region
  int block_vectors;
  int64_t panel, transformed, plane, V, X, Y, M_size, out_tile, index[kAxes];  // elements of scratch
};

inline int64_t extent_of(const Plan& p, int a, int64_t tiles) { return tiles * p.M[a] + p.axis[a].kernel - 1; }

// Regions of many tiles, so that the weights' way from a far cache is shared by them; few where the weights stay in
// the second-level cache beside them. Among these, the ones with little halo.
template <class A>
void choose_regions(Plan& p) {
  bool near = p.C * p.K * p.points_d * p.points_hw * int64_t(sizeof(A)) <= kNearWeights;
  const int64_t T = near ? 14 : 32;
  double best = 0;
  int64_t t[kAxes];
  for (t[kD] = 1; t[kD] <= min<int64_t>(p.tiles[kD], T); ++t[kD])
    for (t[kH] = 1; t[kH] <= min<int64_t>(p.tiles[kH], T / t[kD]); ++t[kH])
      for (t[kW] = 1; t[kW] <= min<int64_t>(p.tiles[kW], T / t[kD] / t[kH]); ++t[kW]) {
        double regions = 1, halo = 1, tiles = 1;
        int64_t most = 1;
        for (int a = 0; a < kAxes; ++a) {
          int64_t n = ceil_div(p.tiles[a], t[a]);
          regions *= double(n), halo *= double(extent_of(p, a, t[a]));
          tiles *= double(p.tiles[a]) / double(n), most *= ceil_div(p.tiles[a], n);
        }
        int64_t parts = ceil_div(most, tile_rows(p.block_vectors));
        double cost = regions * (double(p.points_d * p.points_hw) * (tiles + 2.0 * double(parts)) + 0.3 * halo + 200);
        if (best != 0 && cost >= best) continue;
        best = cost;
        for (int a = 0; a < kAxes; ++a) p.regions[a] = ceil_div(p.tiles[a], t[a]);
      }
}

template <class A>
Plan make_plan(const ConvGeometry& g, bool transposed) {
  Plan p{};
  p.transposed = transposed;
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
  p.block_vectors = min(kTileVectors, p.K > 2 * kLanes<A> ? 4 : 2);
  choose_regions<A>(p);
  p.items = p.N * p.groups, p.most_tiles = 1;
  for (int a = 0; a < kAxes; ++a) {
    int64_t most = ceil_div(p.tiles[a], p.regions[a]);
    p.items *= p.regions[a], p.most_tiles *= most;
    p.index[a] = extent_of(p, a, most);
  }
  ChannelBlocks<A> blocks(p.K, p.block_vectors);
  int64_t tiles_d = ceil_div(p.tiles[kD], p.regions[kD]), tiles_hw = p.most_tiles / tiles_d;
  p.c_stride = round_up(p.C, kLanes<A>);
  p.panel = p.groups * blocks.padded() * p.C * p.taps;
  p.transformed = p.groups * blocks.padded() * p.C * p.points_d * p.points_hw;
  p.plane = p.index[kH] * p.index[kW] * min(p.C, kPlaneChannels) + kLanes<A>;
  p.V = p.points_hw * point_step<A>(p.index[kD] * tiles_hw * p.c_stride);
  p.X = p.points_d * p.most_tiles * kChain;
  p.Y = p.points_d * p.most_tiles * blocks.width;
  p.M_size = p.points_hw * point_step<A>(p.M[kD] * p.most_tiles * blocks.width);
  p.out_tile = p.most_tiles * p.M[kD] * p.M[kH] * p.M[kW] * blocks.width;
  return p;
}

// All points of one vector of weights; `step` lies between the taps, and between the points.
template <class A>
void transform_weight(const Plan& p, const A* panel, int64_t step, A* U) {
  constexpr int L = kLanes<A>;
  int64_t w_step[2] = {3 * step, step}, point_hw = p.points_d * step;
  int64_t u_step[2] = {points(p.M[kW]) * point_hw, point_hw}, plane_step[2] = {points(p.M[kW]) * L, L};
  alignas(64) A work[36 * L], planes[3 * 36 * L];
  with_outputs(p.M[kW], [&](auto M) {
    if (p.M[kD] == 1) return transform_plane<WeightTransform, M()>(panel, w_step, work, U, u_step);
    for (int64_t d = 0; d < 3; ++d)
      transform_plane<WeightTransform, M()>(panel + d * 9 * step, w_step, work, planes + d * p.points_hw * L,
                                            plane_step);
  });
  if (p.M[kD] == 1) return;
  for (int64_t q = 0; q < p.points_hw; ++q)
    with_outputs(p.M[kD], [&](auto M) {
      transform_line<WeightTransform, M()>(planes + q * L, p.points_hw * L, U + q * point_hw, step);
    });
}

// U [group][block of k][h, w point][d point][c][k] from the packed panel [group][block of k][tap][c][k]. An item is
// a run of channels: threads that write side by side would fetch each other's lines.
template <class A>
void transform_weights(const Plan& p, const A* panel, A* U, int threads) {
  constexpr int64_t share = 32;
  ChannelBlocks<A> blocks(p.K, p.block_vectors);
  int64_t shares = ceil_div(p.C, share);
  parallel_for(threads, p.groups * blocks.count * shares, [&](int64_t item, int) {
    int64_t c0 = item % shares * share, kb = item / shares % blocks.count, group = item / shares / blocks.count;
    int64_t width = blocks.padded_width(kb), at = (group * blocks.padded() + kb * blocks.width) * p.C;
    for (int64_t c = c0; c < min(c0 + share, p.C); ++c)
      for (int64_t k = 0; k < width; k += kLanes<A>)
        transform_weight(p, panel + at * p.taps + c * width + k, p.C * width,
                         U + at * p.points_d * p.points_hw + c * width + k);
  });
}

template <class A>
struct Item {
  const Plan* p;
  Range tiles[kAxes];
  PackedAxis packed[kAxes];
  Box box;
  int64_t n[kAxes];         // tiles along each axis
  int64_t v_slice, v_step;  // elements of a plane of V, of a point
};

template <class A>
Item<A> make_item(const Plan& p, int64_t at, int64_t** index) {
  Item<A> it{&p, {}, {}, {}, {}, 0, 0};
  for (int a = kW; a >= kD; --a) {
    Range r = piece(p.tiles[a], p.regions[a], at % p.regions[a]);
    at /= p.regions[a];
    it.n[a] = r.end - r.begin;
    it.box.begin[a] = r.begin * p.M[a];
    it.box.size[a] = min(r.end * p.M[a], p.axis[a].count) - it.box.begin[a];
    PackedAxis& k = it.packed[a];
    k = {extent_of(p, a, it.n[a]), true, it.box.begin[a] + p.axis[a].lowest, p.axis[a].in, index[a]};
    for (int64_t i = 0; i < k.extent; ++i) fill(k, i, k.first + i);
  }
  it.v_slice = it.n[kH] * it.n[kW] * p.c_stride;
  it.v_step = point_step<A>(it.packed[kD].extent * it.v_slice);
  return it;
}

// V from x: a plane at a time, some channels at a time.
template <class S, class A>
void transform_input(const Item<A>& it, const View<S>& x, int64_t n, int64_t c0, A* plane, A* work, A* V) {
  const Plan& p = *it.p;
  PackedAxis one[kAxes] = {it.packed[kD], it.packed[kH], it.packed[kW]};
  one[kD].extent = 1;
  for (int64_t d = 0; d < it.packed[kD].extent; ++d, ++one[kD].index)
    for (int64_t c = 0; c < p.C; c += kPlaneChannels) {
      int64_t channels = min(kPlaneChannels, p.C - c);
      A* to = V + d * it.v_slice + c;
      pack_window(x, n, c0 + c, one, channels, plane);
      int64_t x_step[2] = {it.packed[kW].extent * channels, channels};
      int64_t v_step[2] = {points(p.M[kW]) * it.v_step, it.v_step};
      with_outputs(p.M[kW], [&](auto M) {
        for (int64_t h = 0; h < it.n[kH]; ++h)
          for (int64_t w = 0; w < it.n[kW]; ++w, to += p.c_stride)
            for (int64_t i = 0; i < channels; i += kLanes<A>)
              transform_plane<InputTransform, M()>(plane + h * M() * x_step[0] + w * M() * x_step[1] + i, x_step, work,
                                                   to + i, v_step);
      });
    }
}

// X [d point][tile][c] of some channels.
template <class A>
void transform_depth(const Item<A>& it, const A* V, int64_t channels, int64_t x_stride, A* X) {
  const Plan& p = *it.p;
  int64_t rows = it.n[kH] * it.n[kW], point = it.n[kD] * rows * x_stride;
  with_outputs(p.M[kD], [&](auto M) {
    for (int64_t d = 0; d < it.n[kD]; ++d)
      for (int64_t r = 0; r < rows; ++r)
        transform_planes<InputTransform, M()>(V + d * M() * it.v_slice + r * p.c_stride, it.v_slice,
                                              X + (d * rows + r) * x_stride, point, channels);
  });
}

// Y [tile][k] (+)= X [tile][c] U [c][k]
template <class A, int V>
void multiply(int64_t tiles, const A* X, int64_t x_stride, const A* U, int64_t channels, const A* bias, A* Y) {
  constexpr int R = tile_rows(V);
  constexpr int64_t width = V * kLanes<A>;
  CorrelateTile<A> g{{1, 1, 1}, channels, {}, {}, x_stride, width, kLanes<A>, 0, 1, bias};
  int64_t parts = ceil_div(tiles, R);
  for (int64_t i = 0; i < parts; ++i) {
    Range r = piece(tiles, parts, i);
    with_rows<R>(r.end - r.begin,
                 [&](auto T) { correlate_tile<A, T(), V>(g, X + r.begin * x_stride, U, Y + r.begin * width); });
  }
}

// M of a block of output channels.
template <class A, int V>
void multiply_points(const Item<A>& it, const A* v, const A* U, const A* bias, const A* none, A* X, A* Y, A* M,
                     int64_t m_step) {
  const Plan& p = *it.p;
  constexpr int64_t width = V * kLanes<A>;
  int64_t rows = it.n[kH] * it.n[kW], tiles = it.n[kD] * rows, one = points(p.M[kW]) + 1;
  bool deep = p.M[kD] > 1;
  for (int64_t q = 0; q < p.points_hw; ++q, v += it.v_step, M += m_step) {
    A* sums = deep ? Y : M;
    for (int64_t c = 0; c < p.C; c += kChain) {
      int64_t channels = min(kChain, p.C - c), x_stride = deep ? round_up(channels, kLanes<A>) : p.c_stride;
      if (deep) transform_depth(it, v + c, channels, x_stride, X);
      for (int64_t d = 0; d < p.points_d; ++d) {
        const A* from = deep ? X + d * tiles * x_stride : v + c;
        const A* start = c ? nullptr : q == one && d == int64_t(deep) ? bias : none;
        multiply<A, V>(tiles, from, x_stride, U + ((q * p.points_d + d) * p.C + c) * width, channels, start,
                       sums + d * tiles * width);
      }
    }
    if (deep)
      with_outputs(p.M[kD], [&](auto m) {
        for (int64_t d = 0; d < it.n[kD]; ++d)
          transform_planes<OutputTransform, m()>(Y + d * rows * width, tiles * width, M + d * m() * rows * width,
                                                 rows * width, rows * width);
      });
  }
}

// M back to the outputs of a block of `channels` output channels; a tile over the edge goes there through `spare`.
template <class A>
void transform_output(const Item<A>& it, const A* M, int64_t m_step, int64_t width, int64_t channels, A* work, A* spare,
                      const Target<A>& y) {
  constexpr int L = kLanes<A>;
  const Plan& p = *it.p;
  int64_t step[2] = {points(p.M[kW]) * m_step, m_step}, spare_step[2] = {p.M[kW] * L, L};
  with_outputs(p.M[kW], [&](auto m) {
    for (int64_t d = 0; d < it.n[kD] * p.M[kD]; ++d)
      for (int64_t h = 0; h < it.n[kH]; ++h)
        for (int64_t w = 0; w < it.n[kW]; ++w, M += width) {
          if (d >= it.box.size[kD]) continue;
          int64_t rows = min<int64_t>(m(), it.box.size[kH] - h * m());
          int64_t columns = min<int64_t>(m(), it.box.size[kW] - w * m());
          A* to = y.data + d * y.axis[kD] + h * m() * y.axis[kH] + w * m() * y.axis[kW];
          for (int64_t k = 0; k < channels; k += L) {
            int lanes = int(min<int64_t>(L, channels - k));
            if (rows == m() && columns == m() && lanes == L) {
              transform_plane<OutputTransform, m()>(M + k, step, work, to + k, y.axis + kH);
              continue;
            }
            transform_plane<OutputTransform, m()>(M + k, step, work, spare, spare_step);
            for (int64_t i = 0; i < rows; ++i)
              for (int64_t j = 0; j < columns; ++j)
                store(to + k + i * y.axis[kH] + j * y.axis[kW], load(spare + i * spare_step[0] + j * L), lanes);
          }
        }
  });
}

template <class A>
int64_t thread_bytes(const Plan& p) {
  int64_t bytes = 0;
  for (int64_t n : {p.plane, p.V, p.X, p.Y, p.M_size, p.out_tile}) bytes += aligned(n * int64_t(sizeof(A)));
  for (int a = 0; a < kAxes; ++a) bytes += aligned(p.index[a] * 8);
  return bytes;
}

template <class S, class A>
void correlate(const Plan& p, const View<S>& x, const S* w, const S* b, const View<S>& y, char* scratch, int threads) {
  constexpr int L = kLanes<A>;
  ChannelBlocks<A> blocks(p.K, p.block_vectors);
  A* panel = take<A>(scratch, p.panel);
  A* U = take<A>(scratch, p.transformed);
  pack_weights(Weights{p.transposed, p.groups, p.C, p.K, p.taps, p.C}, blocks, w, panel, threads);
  transform_weights(p, panel, U, threads);
  constexpr bool same = std::is_same<S, A>::value;
  bool direct = same && y.c == 1;
  int64_t per_thread = thread_bytes<A>(p);
  parallel_for(threads, p.items, [&](int64_t item, int thread) {
    char* mine = scratch + thread * per_thread;
    A* plane = take<A>(mine, p.plane);
    A* V = take<A>(mine, p.V);
    A* X = take<A>(mine, p.X);
    A* Y = take<A>(mine, p.Y);
    A* M = take<A>(mine, p.M_size);
    A* out_tile = take<A>(mine, p.out_tile);
    int64_t* index[kAxes];
    for (int a = 0; a < kAxes; ++a) index[a] = take<int64_t>(mine, p.index[a]);
    alignas(64) A work[36 * L], spare[16 * L], bias[kTileVectors * L], none[kTileVectors * L] = {};
    Item<A> it = make_item<A>(p, item, index);
    int64_t rest = item / (p.regions[kD] * p.regions[kH] * p.regions[kW]), group = rest % p.groups, n = rest / p.groups;
    transform_input(it, x, n, group * p.C, plane, work, V);
    for (int64_t kb = 0; kb < blocks.count; ++kb) {
      int64_t k = group * p.K + kb * blocks.width, width = blocks.padded_width(kb);
      zero(bias, kTileVectors * L);
      if (b) convert(b + k, bias, blocks.used(kb));
      const A* u = U + (group * blocks.padded() + kb * blocks.width) * p.C * p.points_d * p.points_hw;
      int64_t m_step = point_step<A>(it.n[kD] * p.M[kD] * it.n[kH] * it.n[kW] * width);
      with_vectors(blocks.vectors(kb), [&](auto v) { multiply_points<A, v()>(it, V, u, bias, none, X, Y, M, m_step); });
      int64_t row = it.box.size[kW] * width;
      Target<A> target{out_tile, {it.box.size[kH] * row, row, width}};
      if constexpr (same) {
        if (direct) target = target_in(y, it.box, n, k);
      }
      transform_output(it, M, m_step, width, direct ? blocks.used(kb) : width, work, spare, target);
      if (!direct) flush(target, y, it.box, n, k, blocks.used(kb));
    }
  });
}

template <class A>
int64_t scratch_bytes(const Plan& p, int threads) {
  return aligned(p.panel * sizeof(A)) + aligned(p.transformed * sizeof(A)) + thread_bytes<A>(p) * threads;
}

template <class S>
void forward(const ConvCall& call) {
  Plan p = make_plan<Compute<S>>(call.g, false);
  correlate<S, Compute<S>>(p, view_x<S>(call), static_cast<const S*>(call.w), static_cast<const S*>(call.b),
                           view_y<S>(call), static_cast<char*>(call.scratch), team(call.g, call.threads));
}

template <class S>
void input_grad(const ConvCall& call) {
  Plan p = make_plan<Compute<S>>(call.g, true);
  correlate<S, Compute<S>>(p, view_y<S>(call), static_cast<const S*>(call.w), static_cast<const S*>(call.b),
                           view_x<S>(call), static_cast<char*>(call.scratch), team(call.g, call.threads));
}

template <class S, bool transposed>
int64_t correlate_scratch(const ConvGeometry& g, int threads) {
  return scratch_bytes<Compute<S>>(make_plan<Compute<S>>(g, transposed), threads);
}

template <class S>
constexpr ConvCorrelate entries() {
  return {forward<S>, input_grad<S>, correlate_scratch<S, false>, correlate_scratch<S, true>};
}

}  // namespace

namespace CONVOXEL_ISA {
extern const ConvCorrelate conv_winograd[kDTypes] = {entries<float>(), entries<bfloat16>(), {}};
}

}  // namespace convoxel
