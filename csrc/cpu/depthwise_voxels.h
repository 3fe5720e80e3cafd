// Correlation with vectors of voxels along W: depthwise, for contiguous tensors, few channels, several outputs of a
// channel, and memory formats that differ; dense, every output the sum of all sources, for few outputs
// (conv_voxels.cpp).
//
// A tile of the source is packed with its padding, channel by channel; positions that a stride keeps apart are
// sorted by residue, so that neighbours in the output are neighbours in the tile along every axis. Rows of the tile
// then follow each other in one long run, whose ends compute what nobody reads. Outputs that lie side by side along
// D (or H) share what they read.
#pragma once
#include <type_traits>

#include "conv_weights.h"
#include "depthwise.h"
#include "depthwise_pack.h"

namespace convoxel {
namespace {

constexpr int kShared = kVectorBytes == 64 ? 12 : 8;  // outputs along D or H that are computed together
constexpr int64_t kVoxelRow = 1024;                   // positions of a tile along W, at most
constexpr int64_t kDenseRow = 64;                     // the same of many sources: room for depth and height instead
constexpr int64_t kDenseBytes = 1024 * 1024;          // of a tile of all sources
constexpr int64_t kDenseProducts = 96;                // of a chain: what few sources hold of a tile stays in L1

struct VoxelPlan {
  bool transposed, dense, w_last, w_float;  // the latter two as ConvGeometry has them, of dense ones
  int64_t N, outputs, sources, of_each;     // channels; of_each: sources of an output (G, dense)
  int64_t chain;                            // sources that are summed up before the next are read
  int64_t taps, channels, blocks, items;
  int shared_axis;
  int64_t tile, source_channels, out;  // elements of scratch: tile of one channel, ...
  int64_t index[kAxes], tiles[kAxes];
  Axis axis[kAxes];
};

template <class A>
int64_t voxel_tile(const VoxelPlan& p) {
  int64_t e = 1;
  for (const Axis& a : p.axis) e *= most_slots(a, a.tile);
  return round_up(e, kLanes<A>) + 2 * kLanes<A>;
}

template <class A>
VoxelPlan make_voxel_plan(const ConvGeometry& g, bool transposed, bool dense = false) {
  constexpr int64_t L = kLanes<A>;
  VoxelPlan p{};
  p.transposed = transposed, p.dense = dense, p.w_last = g.w_last, p.w_float = g.w_float, p.N = g.N;
  p.outputs = transposed ? g.C : g.K, p.sources = transposed ? g.K : g.C;
  p.of_each = dense ? p.sources : transposed ? g.K / g.C : 1;
  p.taps = 1;
  for (int a = 0; a < kAxes; ++a) p.axis[a] = make_axis(g.axis[a], transposed), p.taps *= g.axis[a].kernel;
  p.chain = dense ? min(p.of_each, max<int64_t>(1, kDenseProducts / p.taps)) : p.of_each;
  p.channels = dense ? p.outputs : g.x_last || g.y_last ? min(L, p.outputs) : 1;
  p.blocks = ceil_div(p.outputs, p.channels);
  p.source_channels = transposed ? p.channels * p.of_each : (p.channels - 1) / (g.K / g.C) + 2;
  if (p.channels == 1 && !transposed) p.source_channels = 1;
  if (dense) p.source_channels = p.sources;
  Axis *d = &p.axis[kD], *h = &p.axis[kH], *w = &p.axis[kW];
  d->tile = h->tile = 1;
  w->tile = ceil_div(w->count, ceil_div(w->count, dense ? kDenseRow : kVoxelRow));
  int64_t room = max<int64_t>((dense ? kDenseBytes : kTileBytes) / int64_t(sizeof(A)) / p.source_channels, 2048);
  for (bool grown = true; grown;) {
    grown = false;
    for (Axis* a : {h, d}) {
      if (a->tile == a->count) continue;
      ++a->tile;
      if (voxel_tile<A>(p) <= room) grown = true;
      else --a->tile;
    }
  }
  for (;;) {
    p.items = p.N * p.blocks;
    for (int a = 0; a < kAxes; ++a) {
      p.axis[a].tile = ceil_div(p.axis[a].count, ceil_div(p.axis[a].count, p.axis[a].tile));
      p.items *= p.tiles[a] = ceil_div(p.axis[a].count, p.axis[a].tile);
    }
    Axis* a = h->tile > d->tile ? h : d;
    if (p.items >= kMinItems || a->tile <= 8) break;
    a->tile = ceil_div(a->tile, 2);
  }
  p.shared_axis = d->kernel > 1 && d->tile > 1 ? kD : kH;
  p.tile = voxel_tile<A>(p);
  int64_t run = p.shared_axis == kD ? h->tile * most_slots(*w, w->tile) : w->tile;
  p.out = round_up(run, L) * kShared;
  for (int a = 0; a < kAxes; ++a) p.index[a] = extent(p.axis[a], p.axis[a].tile);
  return p;
}

// Sums ---------------------------------------------------------------------------------------------

template <class A>
struct VoxelTap {
  const A *x, *w;
};

// GROUP taps along the shared axis (the first `groups`), and single ones.
template <class A>
struct VoxelRun {
  const VoxelTap<A>* taps;
  int64_t groups, count;
  int64_t x_step, w_step;  // along the shared axis: of outputs and taps alike
  A bias;
  A* out;
  int64_t out_step, length;
  int64_t last;  // where the last vector begins, at most
  bool stream;   // past the caches
  bool add;      // to what earlier sources gave
};

template <class A, int R, int GROUP>
__attribute__((noinline)) void correlate_run(const VoxelRun<A>& g, int64_t at) {
  for (int64_t begin = 0; begin < g.length; begin += kLanes<A>) {
    int64_t i = min(begin, g.last);
    Vec<A> acc[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) acc[r] = broadcast(g.add ? A(0) : g.bias);
    const VoxelTap<A>* tap = g.taps;
    int64_t step = g.x_step;
    if constexpr (GROUP > 1) {
      for (; tap < g.taps + g.groups; ++tap) {
        const A* x = tap->x + at + i;
        Vec<A> w[GROUP];
#pragma GCC unroll 16
        for (int t = 0; t < GROUP; ++t) w[t] = broadcast(tap->w[t * g.w_step]);
#pragma GCC unroll 32
        for (int j = 0; j < R + GROUP - 1; ++j, x += step) {
          Vec<A> v = load(x);
          in_register<A>(v);
#pragma GCC unroll 16
          for (int t = 0; t < GROUP; ++t)
            if (j - t >= 0 && j - t < R) acc[j - t < 0 || j - t >= R ? 0 : j - t] += v * w[t];
        }
      }
    }
    for (; tap < g.taps + g.count; ++tap) {
      const A* x = tap->x + at + i;
      Vec<A> w = broadcast(*tap->w);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r, x += step) acc[r] += load(x) * w;
    }
    A* out = g.out + i;
    if (g.stream) {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r, out += g.out_step) stream(out, acc[r]);
      continue;
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r, out += g.out_step) store(out, g.add ? load(out) + acc[r] : acc[r]);
  }
}

// One item -----------------------------------------------------------------------------------------

template <class S, class A>
struct VoxelItem {
  const VoxelPlan* p;
  TileAxis tile[kAxes];
  PackedAxis packed[kAxes];
  Slots slots[kAxes];
  int64_t step[kAxes];  // of the packed tile
  const A *data, *w;    // the tile of the first source; weights [source, tap] of an output
  A bias;
  VoxelTap<A>*one, *taps;  // of the first source; of those in a chain
  A* out;
  bool streams;
};

inline int group_of(int64_t taps) { return taps < 3 ? 1 : taps % 5 ? 3 : 5; }

// Taps of one phase of the first source: groups along the shared axis first, then the rest. How many of either.
struct TapCount {
  int64_t groups, rest;
};

template <class S, class A>
TapCount list_taps(const VoxelItem<S, A>& it, const Phase* f, int group) {
  const VoxelPlan& p = *it.p;
  VoxelTap<A>* to = it.one;
  TapCount n{};
  int shared = p.shared_axis;
  int64_t whole = group > 1 ? f[shared].taps / group * group : 0;
  for (int pass = 0; pass < 2; ++pass) {
    for (int64_t d = 0; d < f[kD].taps; ++d)
      for (int64_t h = 0; h < f[kH].taps; ++h)
        for (int64_t w = 0; w < f[kW].taps; ++w) {
          int64_t k[kAxes] = {d, h, w}, x = 0, number = 0;
          if (pass == 0 ? k[shared] >= whole || k[shared] % group : k[shared] < whole) continue;
          for (int a = 0; a < kAxes; ++a) {
            x += it.slots[a](origin(p.axis[a], it.tile[a], f[a]) + k[a] * it.tile[a].tap_step) * it.step[a];
            number = number * p.axis[a].kernel + f[a].w_first + k[a] * p.axis[a].w_tap;
          }
          *to++ = {it.data + x, it.w + number};
        }
    if (pass == 0) n.groups = to - it.one;
  }
  n.rest = to - it.one - n.groups;
  return n;
}

// The taps of a chain of sources, from the first-th on.
template <class S, class A>
void take_chain(const VoxelItem<S, A>& it, const TapCount& n, int64_t first, VoxelRun<A>& g) {
  int64_t end = min(first + it.p->chain, it.p->of_each);
  VoxelTap<A>* to = it.taps;
  auto take = [&](const VoxelTap<A>* from, int64_t count) {
    for (int64_t s = first; s < end; ++s)
      for (int64_t i = 0; i < count; ++i) *to++ = {from[i].x + s * it.p->tile, from[i].w + s * it.p->taps};
  };
  take(it.one, n.groups);
  g.groups = to - it.taps;
  take(it.one + n.groups, n.rest);
  g.taps = it.taps, g.count = to - it.taps, g.add = first > 0;
}

template <class A>
void run_rows(const VoxelRun<A>& g, int64_t rows, int group, int64_t at) {
  with_rows<kShared>(rows, [&](auto R) {
    if (group == 5) correlate_run<A, R(), 5>(g, at);
    else if (group == 3) correlate_run<A, R(), 3>(g, at);
    else correlate_run<A, R(), 1>(g, at);
  });
}

template <class S, class A>
inline void put_row(const A* from, int64_t n, S* to, int64_t step) {
  if (step == 1) return copy_steps(from, 1, to, n);
  for (int64_t i = 0; i < n; ++i) from_compute(from[i], to[i * step]);
}

// One phase of one channel's tile; y: its first voxel.
template <class S, class A>
void correlate_phase(const VoxelItem<S, A>& it, const Phase* f, S* y, const int64_t* y_axis) {
  const VoxelPlan& p = *it.p;
  const int shared = p.shared_axis;
  bool deep = shared == kD;
  int64_t n[kAxes], y_step[kAxes], pitch = it.step[kH];
  for (int a = 0; a < kAxes; ++a) {
    n[a] = positions(p.axis[a], it.tile[a], f[a]);
    if (n[a] <= 0) return;
    y += (it.tile[a].begin * p.axis[a].phases + f[a].first) * y_axis[a];
    y_step[a] = p.axis[a].phases * y_axis[a];
  }
  VoxelRun<A> g{};
  int group = it.tile[shared].tap_step == it.slots[shared].step ? group_of(f[shared].taps) : 1;
  TapCount count = list_taps(it, f, group);
  bool chains = p.chain < p.of_each;
  g.x_step = it.step[shared], g.w_step = p.axis[shared].w_tap * p.axis[kW].kernel * (deep ? p.axis[kH].kernel : 1);
  int64_t parts = ceil_div(n[shared], kShared);
  auto run = [&](int64_t at, const Range& r) { run_rows(g, r.end - r.begin, group, at + r.begin * it.step[shared]); };
  g.bias = it.bias;
  if constexpr (std::is_same<S, A>::value) {  // rows of whole vectors go straight to the output
    int64_t L = kLanes<A>, other = deep ? kH : kD;
    if (y_step[kW] == 1 && n[kW] >= L && 4 * round_up(n[kW], L) <= 5 * n[kW] && !(chains && n[kW] % L)) {
      g.out_step = y_step[shared], g.length = n[kW], g.last = n[kW] - L;
      g.stream = it.streams && !chains && n[kW] % L == 0 && y_step[kH] % L == 0 && y_step[kD] % L == 0 && streamable(y);
      for (int64_t s = 0; s < p.of_each; s += p.chain) {
        take_chain(it, count, s, g);
        for (int64_t i = 0; i < parts; ++i) {
          Range r = piece(n[shared], parts, i);
          for (int64_t o = 0; o < n[other]; ++o) {
            g.out = y + r.begin * y_step[shared] + o * y_step[other];
            run(o * it.step[other], r);
          }
        }
      }
      return;
    }
  }
  g.length = g.last = deep ? (n[kH] - 1) * pitch + n[kW] : n[kW];
  g.out = it.out, g.out_step = round_up(g.length, kLanes<A>);
  for (int64_t o = 0; o < (deep ? 1 : n[kD]); ++o)
    for (int64_t i = 0; i < parts; ++i) {
      Range r = piece(n[shared], parts, i);
      for (int64_t s = 0; s < p.of_each; s += p.chain) {
        take_chain(it, count, s, g);
        run(o * it.step[kD], r);
      }
      for (int64_t b = r.begin; b < r.end; ++b)
        for (int64_t h = 0; h < (deep ? n[kH] : 1); ++h)
          put_row(it.out + (b - r.begin) * g.out_step + h * pitch, n[kW],
                  y + (deep ? b : o) * y_step[kD] + (deep ? h : b) * y_step[kH], y_step[kW]);
    }
}

template <class S, class A>
void correlate_channel(const VoxelItem<S, A>& it, S* y, const int64_t* y_axis) {
  const Axis* a = it.p->axis;
  for (int64_t d = 0; d < a[kD].phases; ++d)
    for (int64_t h = 0; h < a[kH].phases; ++h)
      for (int64_t w = 0; w < a[kW].phases; ++w) {
        Phase f[kAxes] = {phase(a[kD], d), phase(a[kH], h), phase(a[kW], w)};
        correlate_phase(it, f, y, y_axis);
      }
}

template <class A>
int64_t voxel_thread_bytes(const VoxelPlan& p) {
  int64_t bytes = aligned(p.source_channels * p.tile * sizeof(A)) + aligned(p.out * sizeof(A)) +
                  aligned(p.of_each * p.taps * sizeof(A)) + aligned((1 + p.chain) * p.taps * sizeof(VoxelTap<A>));
  for (int64_t n : p.index) bytes += aligned(n * 8);
  return bytes;
}

// Weights of one output, [source, tap]; G reads them backwards.
template <class S, class A>
void take_weights(const VoxelPlan& p, const S* w, int64_t output, A* to) {
  int64_t k_step = p.of_each * p.taps, s_step = p.taps, t_step = 1;
  if (p.dense && p.transposed) k_step = p.taps, s_step = p.outputs * p.taps;
  if (p.dense && p.w_last) {
    t_step = p.transposed ? p.outputs : p.sources;
    (p.transposed ? k_step : s_step) = 1;
  }
  for (int64_t s = 0; s < p.of_each; ++s)
    for (int64_t t = 0; t < p.taps; ++t) {
      int64_t at = output * k_step + s * s_step + (p.transposed ? p.taps - 1 - t : t) * t_step;
      to[s * p.taps + t] = weight_at(w, p.dense && p.w_float, at);
    }
}

template <class S>
void correlate_voxels(const VoxelPlan& p, const View<S>& x, const S* w, const S* b, const View<S>& y, char* scratch,
                      int threads) {
  typedef Compute<S> A;
  int64_t per_thread = voxel_thread_bytes<A>(p), multiplier = max<int64_t>(1, p.outputs / p.sources);
  parallel_for(threads, p.items, [&](int64_t item, int thread) {
    char* mine = scratch + thread * per_thread;
    A* tile = take<A>(mine, p.source_channels * p.tile);
    VoxelItem<S, A> it{};
    it.p = &p;
    it.out = take<A>(mine, p.out);
    it.streams = p.N * y.n * int64_t(sizeof(S)) >= kStreamBytes;
    A* weights = take<A>(mine, p.of_each * p.taps);
    it.w = weights, it.one = take<VoxelTap<A>>(mine, (1 + p.chain) * p.taps), it.taps = it.one + p.taps;
    for (int a = kW; a >= kD; --a) {
      it.packed[a].index = take<int64_t>(mine, p.index[a]);
      it.tile[a] = place_axis(p.axis[a], item % p.tiles[a], it.packed[a]);
      it.slots[a] = slots(it.tile[a], it.packed[a]);
      it.step[a] = a == kW ? 1 : it.step[a + 1] * it.slots[a + 1].count();
      item /= p.tiles[a];
    }
    int64_t first = item % p.blocks * p.channels, last = min(first + p.channels, p.outputs), n = item / p.blocks;
    auto source_of = [&](int64_t k) { return p.dense ? 0 : p.transposed ? k * p.of_each : k / multiplier; };
    int64_t source = source_of(first), end = source_of(last - 1) + p.of_each;
    pack_voxels(x, n, source, end - source, it.packed, it.slots, tile, p.tile);
    for (int64_t k = first; k < last; ++k) {
      it.data = tile + (source_of(k) - source) * p.tile;
      take_weights(p, w, k, weights);
      it.bias = b ? to_compute(b[k]) : A(0);
      correlate_channel(it, y.data + n * y.n + k * y.c, y.axis);
    }
    if (it.streams) end_streams();
  });
}

}  // namespace
}  // namespace convoxel
