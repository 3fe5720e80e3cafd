// Depthwise weight gradient with vectors of voxels along W: x is packed as for the correlation (depthwise_voxels.h),
// dy in rows of whole vectors. Where taps along D (or H) reach neighbours, x is read once for a group of them, and
// the last few dy stay in registers.
#pragma once
#include "depthwise_voxels.h"

namespace convoxel {
namespace {

template <class A>
struct VoxelSums {
  const A *x, *dy;              // at the first output of a row
  int64_t x_step, dy_step, n;   // along the shared axis: of outputs and taps alike; outputs
  int64_t width;                // outputs along W
  const int64_t *offset, *sum;  // of taps off the shared axis: in x, and in the sums (vectors)
  int64_t sum_step;             // of taps along the shared axis
  A* sums;
};

template <class A>
inline Vec<A> first_lanes(Vec<A> v, int64_t n) {
  typedef decltype(Vec<A>{} < Vec<A>{}) Mask;
  typedef typename std::conditional<sizeof(A) == 4, int32_t, int64_t>::type Int;
  Mask lane;
  for (int i = 0; i < kLanes<A>; ++i) lane[i] = i;
  return (Vec<A>)((Mask)v & (lane < Int(n)));
}

// T taps off the shared axis, each with a group along it. Zeros of dy do not hide what x has beyond a row: it may be
// infinite.
template <class A, int T, int GROUP, bool tail>
inline void add_column(const VoxelSums<A>& g, const int64_t* offset, int64_t w, Vec<A> (*acc)[GROUP]) {
  Vec<A> dy[GROUP];
#pragma GCC unroll 16
  for (int k = 0; k < GROUP; ++k) dy[k] = Vec<A>{};
  const A *x = g.x + w, *from = g.dy + w;
  auto read = [&](int t) {
    Vec<A> v = load(x + offset[t]);
    if constexpr (tail) v = first_lanes<A>(v, g.width - w);
    return v;
  };
  for (int64_t i = 0; i < g.n + GROUP - 1; ++i, x += g.x_step, from += g.dy_step) {
#pragma GCC unroll 16
    for (int k = GROUP - 1; k > 0; --k) dy[k] = dy[k - 1];
    if (i < g.n) dy[0] = load(from);
    if (i >= GROUP - 1 && i < g.n) {
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) {
        Vec<A> v = read(t);
        in_register<A>(v);
#pragma GCC unroll 16
        for (int k = 0; k < GROUP; ++k) acc[t][k] += v * dy[k];
      }
      continue;
    }
#pragma GCC unroll 16
    for (int k = 0; k < GROUP; ++k)
      if (i >= k && i - k < g.n)
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t) acc[t][k] += read(t) * dy[k];
  }
}

template <class A, int T, int GROUP>
__attribute__((noinline)) void add_taps(const VoxelSums<A>& g, int64_t first) {
  constexpr int64_t L = kLanes<A>;
  Vec<A> acc[T][GROUP];
  int64_t offset[T], w = 0;
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) {
    offset[t] = g.offset[first + t];
#pragma GCC unroll 16
    for (int k = 0; k < GROUP; ++k) acc[t][k] = Vec<A>{};
  }
  for (; w + L <= g.width; w += L) add_column<A, T, GROUP, false>(g, offset, w, acc);
  if (w < g.width) add_column<A, T, GROUP, true>(g, offset, w, acc);
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 16
    for (int k = 0; k < GROUP; ++k) {
      A* sum = g.sums + (g.sum[first + t] + k * g.sum_step) * L;
      store(sum, load(sum) + acc[t][k]);
    }
}

template <class A, int GROUP>
void add_group(const VoxelSums<A>& g, int64_t taps) {
  constexpr int most = kVectorBytes == 64 ? 20 : 9, T = GROUP == 1 ? 9 : most / GROUP;  // sums in registers
  int64_t t = 0;
  for (; t + T <= taps; t += T) add_taps<A, T, GROUP>(g, t);
  if constexpr (T > 3)
    for (; t + 3 <= taps; t += 3) add_taps<A, 3, GROUP>(g, t);
  for (; t < taps; ++t) add_taps<A, 1, GROUP>(g, t);
}

// One channel's tile: sums [tap][lanes] += dy * x.
template <class S, class A>
void add_channel(const VoxelItem<S, A>& it, const A* dy, int64_t dy_row, int64_t* offset, int64_t* sum, A* sums) {
  const VoxelPlan& p = *it.p;
  const int shared = p.shared_axis, other = shared == kD ? kH : kD;
  int64_t dy_step[kAxes] = {it.tile[kH].n * dy_row, dy_row, 1}, number[kAxes] = {0, 0, 1};
  for (int a = kH; a >= kD; --a) number[a] = number[a + 1] * p.axis[a + 1].kernel;
  auto place = [&](int a, int64_t k) {
    return it.slots[a](origin(p.axis[a], it.tile[a], forward_phase(p.axis[a].conv)) + k * it.tile[a].tap_step) *
           it.step[a];
  };
  int64_t taps = 0;
  for (int64_t k = 0; k < p.axis[other].kernel; ++k)
    for (int64_t w = 0; w < p.axis[kW].kernel; ++w, ++taps) {
      offset[taps] = place(other, k) + place(kW, w);
      sum[taps] = k * number[other] + w;
    }
  int64_t all = p.axis[shared].kernel;
  int most = it.tile[shared].tap_step == it.slots[shared].step ? group_of(all) : 1;
  for (int64_t o = 0; o < it.tile[other].n; ++o)
    for (int64_t k = 0; k < all;) {
      int group = all - k >= most ? most : 1;
      VoxelSums<A> g{it.data + o * it.step[other] + place(shared, k),
                     dy + o * dy_step[other],
                     it.step[shared],
                     dy_step[shared],
                     it.tile[shared].n,
                     it.tile[kW].n,
                     offset,
                     sum,
                     number[shared],
                     sums + k * number[shared] * kLanes<A>};
      if (group == 5) add_group<A, 5>(g, taps);
      else if (group == 3) add_group<A, 3>(g, taps);
      else add_group<A, 1>(g, taps);
      k += group;
    }
}

// dy of a tile, [channel][D][H][row], rows filled up with zeros.
template <class S, class A>
void pack_voxel_dy(const View<S>& y, int64_t n, int64_t k, int64_t channels, const TileAxis* t, int64_t row, A* to,
                   int64_t step) {
  PackedAxis w{t[kW].n, true, t[kW].begin, t[kW].begin + t[kW].n, nullptr};
  for (int64_t d = 0; d < t[kD].n; ++d)
    for (int64_t h = 0; h < t[kH].n; ++h, to += row) {
      const S* from = y.data + n * y.n + k * y.c + (t[kD].begin + d) * y.axis[kD] + (t[kH].begin + h) * y.axis[kH];
      pack_voxel_row(from, y, w, Slots{1, row}, channels, to, step);
    }
}

struct VoxelWeightPlan {
  VoxelPlan x;
  int64_t dy_row, dy_tile, all_tiles, pieces;
};

template <class A>
VoxelWeightPlan make_voxel_weight_plan(const ConvGeometry& g) {
  VoxelWeightPlan p{make_voxel_plan<A>(g, false), 0, 0, 0, 0};
  const Axis* a = p.x.axis;
  p.dy_row = round_up(a[kW].tile, kLanes<A>);
  p.dy_tile = a[kD].tile * a[kH].tile * p.dy_row + kLanes<A>;
  p.all_tiles = p.x.items / p.x.blocks;
  p.pieces = min(p.all_tiles, ceil_div(2 * kMinItems, p.x.blocks));
  return p;
}

template <class A>
int64_t voxel_weight_thread_bytes(const VoxelWeightPlan& p) {
  int64_t lists = aligned(p.x.taps * 8), bytes = aligned(p.x.source_channels * p.x.tile * sizeof(A));
  bytes += aligned(p.x.channels * p.dy_tile * sizeof(A)) + 2 * lists;
  bytes += aligned(p.x.channels * p.x.taps * kVectorBytes);
  for (int64_t n : p.x.index) bytes += aligned(n * 8);
  return bytes;
}

template <class A>
int64_t voxel_weight_bytes(const VoxelWeightPlan& p, int threads) {
  return aligned(p.pieces * p.x.outputs * p.x.taps * sizeof(A)) + voxel_weight_thread_bytes<A>(p) * threads;
}

template <class S>
void voxel_weight_grad(const VoxelWeightPlan& plan, const View<S>& x, const View<S>& y, S* dw, char* scratch,
                       int threads) {
  typedef Compute<S> A;
  constexpr int64_t L = kLanes<A>;
  const VoxelPlan& p = plan.x;
  int64_t size = p.outputs * p.taps, per_thread = voxel_weight_thread_bytes<A>(plan);
  int64_t multiplier = p.outputs / p.sources;
  A* panels = take<A>(scratch, plan.pieces * size);
  parallel_for(threads, plan.pieces * p.blocks, [&](int64_t item, int thread) {
    char* mine = scratch + thread * per_thread;
    A* tile = take<A>(mine, p.source_channels * p.tile);
    A* dy = take<A>(mine, p.channels * plan.dy_tile);
    int64_t* offset = take<int64_t>(mine, p.taps);
    int64_t* sum = take<int64_t>(mine, p.taps);
    A* sums = take<A>(mine, p.channels * p.taps * L);
    VoxelItem<S, A> it{};
    it.p = &p;
    for (int a = 0; a < kAxes; ++a) it.packed[a].index = take<int64_t>(mine, p.index[a]);
    int64_t block = item % p.blocks, part = item / p.blocks;
    int64_t first = block * p.channels, channels = min(p.channels, p.outputs - first);
    int64_t source = first / multiplier, sources = (first + channels - 1) / multiplier + 1 - source;
    zero(sums, channels * p.taps * L);
    Range tiles = piece(plan.all_tiles, plan.pieces, part);
    for (int64_t i = tiles.begin; i < tiles.end; ++i) {
      int64_t n = i;
      for (int a = kW; a >= kD; n /= p.tiles[a--]) it.tile[a] = place_axis(p.axis[a], n % p.tiles[a], it.packed[a]);
      for (int a = kW; a >= kD; --a) {
        it.slots[a] = slots(it.tile[a], it.packed[a]);
        it.step[a] = a == kW ? 1 : it.step[a + 1] * it.slots[a + 1].count();
      }
      pack_voxels(x, n, source, sources, it.packed, it.slots, tile, p.tile);
      pack_voxel_dy(y, n, first, channels, it.tile, plan.dy_row, dy, plan.dy_tile);
      for (int64_t k = 0; k < channels; ++k) {
        it.data = tile + ((first + k) / multiplier - source) * p.tile;
        add_channel(it, dy + k * plan.dy_tile, plan.dy_row, offset, sum, sums + k * p.taps * L);
      }
    }
    A* panel = panels + part * size + first * p.taps;
    for (int64_t i = 0; i < channels * p.taps; ++i) {
      panel[i] = 0;
      for (int64_t l = 0; l < L; ++l) panel[i] += sums[i * L + l];
    }
  });
  for (int64_t i = 0; i < size; ++i) {
    A total = 0;
    for (int64_t part = 0; part < plan.pieces; ++part) total += panels[part * size + i];
    from_compute(total, dw[i]);
  }
}

}  // namespace
}  // namespace convoxel
